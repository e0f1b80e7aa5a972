"""Train a VQGAN, the autoencoder between images and grids of codebook ids.

    python train_vqgan.py --dataset digits --log_dir vqgan_digits --train_steps 500 --ema
"""

import torch
from torch import nn

from hparams import get_vqgan_hparams
from utils.runs.folder import RunFolder
from models.autoencoder.quantizers import gumbel_temperature
from utils.training.assemble import build_vqgan
from utils.training.checkpoints import Checkpoints, choose_checkpoint
from utils.data.datasets import load_dataset, train_validation_split
from utils.training.processes import join
from utils.data.batches import (
    UnreadableFiles, evaluation_batches, stream_positions, training_batches,
)
from utils.evaluation.metrics import psnr
from utils.runs.script import log_changed_settings, record_settings, run_script, start_run
from utils.training.loop import (
    EMA, Precision, backward, buffers_kept, due, seed_step, take_step, training_loop,
)


class Objective(nn.Module):
    """A loss as a forward pass: `function`, whose gradients are those of the module `part`."""

    def __init__(self, part, function):
        super().__init__()
        self.part = part
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


def objectives_of(vqgan, world):
    """The losses of the autoencoder and of the discriminator, as the world wraps them.

    Not every weight has a part in them: some only in published files, `logsigma` only later.
    """
    return (
        world.wrap(Objective(vqgan.ae, vqgan.generator_losses), find_unused_parameters=True),
        world.wrap(Objective(vqgan.disc, vqgan.discriminator_loss)),
    )


def train_step(vqgan, objectives, ema, optimizers, images, step, H, precision, world):
    """One step of the autoencoder and, from `disc_start_step` on, one of the discriminator.

    `images` [B, C, S, S] are this process's share of the batch; the discriminator's BatchNorm
    and the adaptive weight see this share only.
    """
    vqgan.train()
    if H.quantizer == "gumbel":
        vqgan.ae.quantize.temperature = gumbel_temperature(step)
    ae_loss, disc_loss = objectives
    learning = [optimizers["ae_optim"]]
    with buffers_kept(vqgan):
        with precision.autocast():
            loss, reconstructions, stats = ae_loss(images, step, precision.scaler.get_scale())
        backward(loss, learning[0], precision)
        losses = [loss]
        if step >= H.disc_start_step:
            with precision.autocast():
                d_loss = disc_loss(images, reconstructions.detach())
            learning.append(optimizers["disc_optim"])
            backward(d_loss, learning[1], precision)
            losses.append(d_loss)
            stats["d_loss"] = d_loss.detach()
        take_step(losses, learning, precision, world, H.clip_grad_norm)
    if ema is not None and due(step, H.steps_per_update_ema):
        ema.update(vqgan)
    return {"loss": loss.detach(), **stats}


@torch.no_grad()
def validate(vqgan, dataset, H, device, on_unreadable):
    """Means over a dataset: L1 and LPIPS of reconstructions, PSNR (dB), and codebook use [K]."""
    sums, images_seen = {}, 0
    usage = torch.zeros(H.codebook_size, device=device)
    batches = evaluation_batches(dataset, H.batch_size, H.num_workers, device, on_unreadable)
    for images, _ in batches:
        reconstructions, _, codes, _ = vqgan.ae(images)
        nll, l1, perceptual = vqgan.reconstruction_losses(images, reconstructions)
        values = dict(loss=nll, l1=l1, perceptual=perceptual)
        values["psnr"] = psnr(images, reconstructions.clamp(0, 1)).mean()
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value * len(images)
        usage += codes["usage"]
        images_seen += len(images)
    means = {name: float(value) / images_seen for name, value in sums.items()}
    means["codes_used"] = int((usage > 0).sum())
    return means, usage / usage.sum()


def main(argv=None):
    H = get_vqgan_hparams(argv)
    world = join(H.device)
    device = world.device
    with start_run(H, device, world) as log:
        choose_checkpoint(H, log, world)
        dataset = load_dataset(H)
        train_set, validation_set = dataset, None
        if H.steps_per_eval:
            train_set, validation_set = train_validation_split(dataset)
        held_out = len(dataset) - len(train_set)
        log.info(f"{dataset.name}: {len(train_set)} images to train on, {held_out} held out")
        on_unreadable = UnreadableFiles(log.passed_over)

        seed_step(H.seed, 0, "weights")
        vqgan = build_vqgan(H, log).to(device)
        ema = None
        if H.ema and world.is_first:
            ema = EMA(vqgan, H.ema_beta, shared=["perceptual"])
        best = ema.model if ema else vqgan
        optimizers = {
            "ae_optim": torch.optim.Adam(vqgan.ae.parameters(), lr=H.lr),
            "disc_optim": torch.optim.Adam(vqgan.disc.parameters(), lr=H.lr),
        }
        precision = Precision(H.amp, device)
        log.info(f"precision: {precision.description}")
        models = {"vqgan": vqgan, **({"vqgan_ema": ema.model} if ema else {})}
        checkpoints = Checkpoints(
            log.folder, models, optimizers, precision.scaler, H.keep_checkpoints
        )
        stats = {}
        if H.load_step:
            run = RunFolder(H.load_dir)
            stats = checkpoints.restore(
                run, H.load_step, log, optimizers=H.load_optim, optional=["perceptual."]
            )
            log_changed_settings(H, run, log)
        objectives = objectives_of(vqgan, world)
        if world.is_first:
            record_settings(H, log)

        batches = training_batches(
            train_set, H.batch_size, H.seed, H.load_step, H.horizontal_flip, H.num_workers,
            device, on_unreadable, (world.rank, world.size),
        )
        if world.is_first:
            shown = first_images(validation_set or train_set, device, on_unreadable)

        def step_of_training(step):
            return train_step(
                vqgan, objectives, ema, optimizers, next(batches), step, H, precision, world
            )

        def batch(step):
            return stream_positions(len(train_set), H.batch_size * world.size, H.seed, step - 1)[0]

        def run_validation(step):
            best.eval()
            values, usage = validate(best, validation_set, H, device, on_unreadable)
            log.metrics(step, values, group="validation")
            log.bars(step, "codebook_use", usage)

        @torch.no_grad()
        def display(step, save, show):
            best.eval()
            reconstructions = best.ae(shown)[0].clamp(0, 1)
            pairs = torch.stack((shown, reconstructions), dim=1).flatten(0, 1)
            log.images(step, "reconstructions", pairs, save=save, display=show,
                       individually=H.save_individually)

        training_loop(
            H, log, world, stats.get("seconds", 0.0), step_of_training,
            batch=batch, validate=run_validation, display=display, save=checkpoints.save,
        )
        batches.close()
        if len(on_unreadable) and world.size == 1:
            log.warning(f"{len(on_unreadable)} images could not be read and were passed over")


def first_images(dataset, device, on_unreadable, count=16):
    """The first readable images of a dataset, at most `count`, to watch reconstructions of."""
    batches = evaluation_batches(dataset, count, 0, device, on_unreadable)
    images = next(batches)[0]
    batches.close()
    return images


if __name__ == "__main__":
    run_script(main)
