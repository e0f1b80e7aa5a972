"""How many bits does a trained model need for held-out images? A bound on its likelihood.

    python experiments/calc_approximate_ELBO.py --load_dir absorbing_digits --load_step 2200 \
        --ema --steps_per_eval 500 --train_steps 2000 --log_dir elbo_digits

-log p(x) <= -log p(ids) - log p(x | ids), with the encoder's ids (2111.12701). The ids' part is
the diffusion's bound, summed over all T times or estimated by `--elbo_samples` of them, or the
autoregressive prior's exact likelihood. The pixels' part is a Gaussian for each pixel around the
decoded image; its log sigma, a head of the generator, is first fitted to the training images. The
whole validation set is measured every `--steps_per_eval` and at the end.

"5 bits" and "8 bits" are the density of x in [0, 1] over levels 1/32 and 1/256 wide, as such
figures are published. A Gaussian narrower than a level makes them too small, even negative. "8
bits, whole levels" has no such fault: it is the Gaussian integrated over each level.

The head is saved as logs/<log_dir>/saved_models/logsigma_<step>.th; the same command, or one with
more `--train_steps`, goes on from there.
"""

import hashlib
import math

import torch
from tqdm import tqdm

from hparams import get_elbo_hparams
from models.autoencoder.likelihood import bits_per_dim, gaussian_level_nll, gaussian_nll
from utils.data.batches import TrainingBatches, evaluation_batches
from utils.data.cache import read_cached
from utils.data.datasets import load_dataset
from utils.evaluation.experiment import experiment
from utils.files import save_file
from utils.runs.script import run_script
from utils.runs.trained_on import images_held_out
from utils.training.checkpoints import load_optimizer, load_weights
from utils.training.loop import TrainingLoop, tolerate_full_disk
from utils.training.precision import Precision, seed_step
from utils.training.step import backward, take_step

CHUNK = 16  # images whose masks are drawn together: a fixed number, whatever the batch size
UNITS = "bits per dimension"


@torch.no_grad()
def ids_nats(run, dataset, on_unreadable):
    """-log p(ids) of each image of a dataset, or its bound: nats, float64 [n]."""
    H, nats = run.H, []
    batches = evaluation_batches(dataset, CHUNK, H.num_workers, run.device, on_unreadable)
    with tqdm(total=len(dataset), desc="ids", unit="image", dynamic_ncols=True) as bar:
        for images, indices in batches:
            seed_step(H.seed, int(indices[0]), "elbo")
            ids = run.autoencoder.encode(images)[-1]
            with run.precision.autocast():
                nats.append(run.sampler.nats(ids, H.elbo_samples, batch_size=H.batch_size).cpu())
            bar.update(len(images))
    return torch.cat(nats)


def gaussians(autoencoder, images):
    """(mu, logsigma) of every pixel of images [B, C, S, S], given the images' ids."""
    with torch.no_grad():
        z_q = autoencoder.encode(images)[0]
    return autoencoder.generator.probabilistic(z_q)


@torch.no_grad()
def pixel_nats(run, dataset, on_unreadable):
    """-log p(x | ids) of each image of a dataset in nats: float64 (density [n], levels [n])."""
    H, nats = run.H, []
    batches = evaluation_batches(dataset, H.batch_size, H.num_workers, run.device, on_unreadable)
    for images, _ in batches:
        mu, logsigma = gaussians(run.autoencoder, images)
        density = gaussian_nll(images, mu, logsigma).double()
        nats.append(torch.stack((density, gaussian_level_nll(images, mu, logsigma))).cpu())
    return torch.cat(nats, dim=1)


def likelihood_table(ids, density, levels, tokens, dims):
    """Means over images of nats [n], with their standard errors, None for a single image: name ->
    value; `tokens` and `dims` are how many ids and pixel values an image has."""
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
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
        table[f"{name} (standard error)"] = error
    return table


def warn_of_single_image(count, log):
    """Warn where there is but one validation image that its standard errors stay unknown."""
    if count == 1:
        log.warning("a standard error needs 2 validation images, and there is 1: it stays unknown "
                    "until you add images to the dataset, of which a tenth is held out")


class LogSigmaFit:
    """Fits the generator's log sigma to a dataset by maximum likelihood, everything else frozen."""

    def __init__(self, run, train_set):
        H = run.H
        self.run, self.train_set, self.folder = run, train_set, run.log.folder
        facts = (run.autoencoder.weights_hash, train_set.fingerprint(), H.seed, H.batch_size,
                 H.logsigma_lr)
        self.key = hashlib.sha256(repr(facts).encode()).hexdigest()
        self.head = run.autoencoder.generator.logsigma.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=H.logsigma_lr, fused=True)

    def restore(self):
        """Load the last file of this fit up to `train_steps`; returns its step, 0 without one."""
        steps = [s for s in self.folder.steps("logsigma") if s <= self.run.H.train_steps]
        for step in reversed(steps):
            path = self.folder.model("logsigma", step)
            content = read_cached(path, self.key, self.run.log)
            if content is None:
                continue
            load_weights(self.head, content["logsigma"], path)
            load_optimizer(self.optimizer, content["optimizer"], path)
            self.run.log.info(f"goes on from {path}")
            return step
        return 0

    def train(self, evaluate, on_unreadable):
        """Fit to `train_steps`, and save and `evaluate(step)` every `steps_per_eval`."""
        run, H, start = self.run, self.run.H, self.restore()
        precision = Precision(False, run.device)
        batches = TrainingBatches(self.train_set, H, start, run.processes, on_unreadable)
        with TrainingLoop(
            H, run.log, run.processes, len(self.train_set), start,
            hint="the same command goes on from there",
        ) as loop:
            for step in loop:
                images = next(batches)
                nats = gaussian_nll(images, *gaussians(run.autoencoder, images))
                loss = bits_per_dim(nats, images[0].numel(), levels=256).mean()
                self.optimizer.zero_grad()
                backward(loss, precision)
                outcome = take_step([loss], [self.optimizer], precision, run.processes)
                loop.count(outcome, loss=loss.detach())
                loop.end_step()
                if loop.must_save or loop.must_validate:
                    content = {"key": self.key, "logsigma": self.head.state_dict(),
                               "optimizer": self.optimizer.state_dict()}
                    with tolerate_full_disk(run.log, unless=loop.ends):
                        save_file(content, self.folder.model("logsigma", step))
                if loop.must_validate and not loop.is_last:
                    evaluate(step)
        batches.close()


def main(argv=None):
    H = get_elbo_hparams(argv)
    with experiment(H, "ELBO", several=False) as run:
        dataset = load_dataset(H, run.log)
        train_set, validation_set, held_out = images_held_out(H, dataset, run.log)
        run.note_data(validation_set)
        warn_of_single_image(len(validation_set), run.log)
        run.load_sampler()
        on_unreadable = run.unreadable_files()
        ids = ids_nats(run, validation_set, on_unreadable)
        if len(ids) < len(validation_set):  # some could not be read
            warn_of_single_image(len(ids), run.log)

        def evaluate(step):
            density, levels = pixel_nats(run, validation_set, on_unreadable)
            dims = H.n_channels * H.img_size**2
            table = likelihood_table(ids, density, levels, run.sampler.tokens, dims)
            if step < H.train_steps:
                run.log.metrics(step, table, group="validation")
            return table

        LogSigmaFit(run, train_set).train(evaluate, on_unreadable)
        path = run.log.folder.model("logsigma", H.train_steps)
        run.note_checkpoint("logsigma", path, H.train_steps)
        run.report(evaluate(H.train_steps), held_out=held_out)


if __name__ == "__main__":
    run_script(main)
