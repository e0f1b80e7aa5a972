"""How many bits a trained model needs for held-out images: a bound on its likelihood.

    python experiments/calc_approximate_ELBO.py --load_dir absorbing_digits --load_step 1500 \
        --ema --steps_per_eval 500 --train_steps 2000 --log_dir elbo_digits

-log p(x) <= -log p(ids) - log p(x | ids), with the encoder's ids (2111.12701). The ids' part is
the sampler's: the diffusion's bound, summed over all T times or estimated by `--elbo_samples` of
them, or the autoregressive prior's exact likelihood. The pixels' part is a Gaussian for each pixel
around the decoded image; its log sigma, a head of the generator, is first fitted to the training
images, everything else frozen. The whole validation set is measured every `--steps_per_eval` and
at the end.

"5 bits" and "8 bits" are the density of x in [0, 1] over levels 1/32 and 1/256 wide, as such
figures are published. That takes a density to be constant within a level; a Gaussian narrower than
a level makes it too small, even negative. "8 bits, whole levels" has no such fault: it is the
probability of the 8-bit image, the Gaussian being integrated over each level.

The head is saved as logs/<log_dir>/saved_models/logsigma_<step>.th; the same command, or one with
more `--train_steps`, goes on from there.
"""

import hashlib
import math
from dataclasses import replace

import torch
from tqdm import tqdm

from hparams import UserError, get_elbo_hparams
from utils.runs.folder import RunFolder
from models.autoencoder.losses import bits_per_dim, gaussian_level_nll, gaussian_nll
from utils.data.cache import read_cached
from utils.training.checkpoints import load_optimizer, load_weights, save_file, weights_hash
from utils.data.datasets import load_dataset, train_validation_split
from utils.training.processes import World
from utils.evaluation.experiment import experiment
from utils.data.batches import (
    UnreadableFiles, evaluation_batches, stream_positions, training_batches,
)
from utils.runs.script import holds_out, run_script
from utils.training.loop import Precision, backward, seed_step, take_step, training_loop

CHUNK = 16  # images whose masks are drawn together: a fixed number, whatever the batch size
UNITS = "bits per dimension"


@torch.no_grad()
def ids_nats(H, sampler, autoencoder, precision, dataset, on_unreadable):
    """-log p(ids) of each image of a dataset, or its bound: nats, float64 [n]."""
    device = sampler.embedding_weight.device
    batches = evaluation_batches(dataset, CHUNK, H.num_workers, device, on_unreadable)
    nats = []
    with tqdm(total=len(dataset), desc="ids", unit="image", dynamic_ncols=True) as bar:
        for images, indices in batches:
            seed_step(H.seed, int(indices[0]), "elbo")
            ids = autoencoder.encode(images)[-1]
            with precision.autocast():
                nats.append(sampler.nats(ids, H.elbo_samples, batch_size=H.batch_size).cpu())
            bar.update(len(images))
    return torch.cat(nats)


def gaussians(autoencoder, images):
    """(mu, logsigma) of every pixel of images [B, C, S, S], given the images' ids."""
    with torch.no_grad():
        z_q = autoencoder.encode(images)[0]
    return autoencoder.generator.probabilistic(z_q)


@torch.no_grad()
def pixel_nats(H, autoencoder, device, dataset, on_unreadable):
    """-log p(x | ids) of each image of a dataset in nats: float64 (density [n], levels [n])."""
    batches = evaluation_batches(dataset, H.batch_size, H.num_workers, device, on_unreadable)
    nats = []
    for images, _ in batches:
        mu, logsigma = gaussians(autoencoder, images)
        density = gaussian_nll(images, mu, logsigma).double()
        nats.append(torch.stack((density, gaussian_level_nll(images, mu, logsigma))).cpu())
    return torch.cat(nats, dim=1)


def likelihood_table(ids, density, levels, tokens, dims):
    """Means over images of nats [n] each, with their standard errors: name -> value.

    `tokens` and `dims` are the ids and the pixel values of an image.
    """
    bits = {
        "ids: bits per token": bits_per_dim(ids, tokens, levels=1),
        f"ids: {UNITS}": bits_per_dim(ids, dims, levels=1),
        f"pixels given ids, density: {UNITS}": bits_per_dim(density, dims, levels=1),
        f"pixels given ids, whole levels: {UNITS}": bits_per_dim(levels, dims, levels=1),
        f"total, 5 bits: {UNITS}": bits_per_dim(ids + density, dims, levels=32),
        f"total, 8 bits: {UNITS}": bits_per_dim(ids + density, dims, levels=256),
        f"total, 8 bits, whole levels: {UNITS}": bits_per_dim(ids + levels, dims, levels=1),
    }
    table = {"validation images": len(ids)}
    for name, values in bits.items():
        table[name] = values.mean().item()
        table[f"{name} (standard error)"] = values.std().item() / math.sqrt(len(values))
    return table


def fit_logsigma(run, train_set, evaluate, on_unreadable):
    """Fit the generator's log sigma to a dataset by maximum likelihood, everything else frozen.

    Goes on from what is kept in the run folder of the same fit, and keeps the head there wherever
    `evaluate(step)` is called, which is every `steps_per_eval` but for the last step. Returns the
    step that was reached.
    """
    H, folder, autoencoder = run.H, run.log.folder, run.autoencoder
    facts = (
        weights_hash(autoencoder), train_set.fingerprint(), H.seed, H.batch_size, H.logsigma_lr
    )
    key = hashlib.sha256(repr(facts).encode()).hexdigest()
    head = autoencoder.generator.logsigma.requires_grad_(True)
    optimizer = torch.optim.Adam(head.parameters(), lr=H.logsigma_lr)
    start = 0
    for step in reversed(folder.steps("logsigma")):
        path = folder.model("logsigma", step)
        if step > H.train_steps:
            continue
        try:
            kept = read_cached(path, key)
        except UserError as error:
            run.log.warning(f"{path} is passed over: {error}")
            continue
        load_weights(head, kept["logsigma"], path)
        load_optimizer(optimizer, kept["optimizer"], path)
        run.log.info(f"goes on from {path}")
        start = step
        break
    world, precision = World(device=run.device), Precision(False, run.device)
    batches = training_batches(
        train_set, H.batch_size, H.seed, start, False, H.num_workers, run.device, on_unreadable
    )

    def train_step(step):
        images = next(batches)
        nats = gaussian_nll(images, *gaussians(autoencoder, images))
        loss = bits_per_dim(nats, images[0].numel(), levels=256).mean()
        backward(loss, optimizer, precision)
        take_step([loss], [optimizer], precision, world)
        return {"loss": loss.detach()}

    def batch(step):
        return stream_positions(len(train_set), H.batch_size, H.seed, step - 1)[0]

    def save(step, so_far=None):
        content = {"logsigma": head.state_dict(), "optimizer": optimizer.state_dict()}
        save_file({"key": key, **content}, folder.model("logsigma", step))

    def save_and_evaluate(step):
        if step < H.train_steps:
            save(step)
            evaluate(step)

    reached = training_loop(
        replace(H, load_step=start, steps_per_display_output=0, steps_per_save_output=0),
        run.log, world, 0.0, train_step, batch=batch, validate=save_and_evaluate, display=None,
        save=save, go_on="the same command goes on from there",
    )
    batches.close()
    return reached


def warn_of_seen_images(H, log):
    """{run: whether it was trained without the validation images}; a warning where it was not."""
    held_out = {run: holds_out(RunFolder(run)) for run in (H.ae_load_dir, H.load_dir)}
    for run, held in held_out.items():
        if not held:
            why = "no hparams.yaml tells" if held is None else "--steps_per_eval 0"
            log.warning(f"{run} may have been trained on the validation images too ({why}): then "
                        f"these figures are better than those of new images")
    return held_out


def main(argv=None):
    H = get_elbo_hparams(argv)
    with experiment(H, "ELBO", shared=False) as run:
        train_set, validation_set = train_validation_split(load_dataset(H))
        run.note_data(validation_set)
        run.load_sampler()
        held_out = warn_of_seen_images(H, run.log)
        on_unreadable = UnreadableFiles(run.log.passed_over)
        ids = ids_nats(
            H, run.sampler, run.autoencoder, run.precision, validation_set, on_unreadable
        )

        def evaluate():
            density, levels = pixel_nats(
                H, run.autoencoder, run.device, validation_set, on_unreadable
            )
            dims = H.n_channels * H.img_size**2
            return likelihood_table(ids, density, levels, run.sampler.tokens, dims)

        reached = fit_logsigma(
            run, train_set, lambda step: run.log.metrics(step, evaluate(), group="validation"),
            on_unreadable,
        )
        if reached == H.train_steps:
            path = run.log.folder.model("logsigma", reached)
            run.note_checkpoint("logsigma", path, reached)
            run.report(evaluate(), held_out=held_out)


if __name__ == "__main__":
    run_script(main)
