"""Train a VQGAN, the autoencoder between images and grids of codebook ids.

    python train_vqgan.py --dataset digits --log_dir vqgan_digits --train_steps 500 --ema
"""

import torch

from hparams import get_vqgan_hparams
from hparams.runs import RunFolder
from models.quantizers import gumbel_temperature
from utils.assemble import build_vqgan
from utils.checkpoints import Checkpoints
from utils.data import load_dataset, train_validation_split
from utils.loading import UnreadableFiles, evaluation_batches, training_batches
from utils.metrics import psnr
from utils.scripts import log_changed_settings, record_settings, run_script, start_run
from utils.training import (
    EMA, Precision, backward_step, due, resolve_device, seed_step, training_loop,
)


def train_step(vqgan, ema, optimizers, images, step, H, precision):
    """One step of the autoencoder and, from `disc_start_step` on, one of the discriminator."""
    vqgan.train()
    if H.quantizer == "gumbel":
        vqgan.ae.quantize.temperature = gumbel_temperature(step)
    with precision.autocast():
        loss, reconstructions, stats = vqgan.generator_losses(
            images, step, grad_scale=precision.scaler.get_scale()
        )
    backward_step(loss, optimizers["ae_optim"], precision)
    if step >= H.disc_start_step:
        with precision.autocast():
            d_loss = vqgan.discriminator_loss(images, reconstructions.detach())
        backward_step(d_loss, optimizers["disc_optim"], precision)
        stats["d_loss"] = d_loss.detach()
    precision.scaler.update()
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
    device = resolve_device(H.device)
    with start_run(H, device) as log:
        dataset = load_dataset(H)
        train_set, validation_set = dataset, None
        if H.steps_per_eval:
            train_set, validation_set = train_validation_split(dataset)
        held_out = len(dataset) - len(train_set)
        log.info(f"{dataset.name}: {len(train_set)} images to train on, {held_out} held out")
        on_unreadable = UnreadableFiles(
            lambda path, reason: log.warning(f"passed over {path}: {reason}")
        )

        seed_step(H.seed, 0, "weights")
        vqgan = build_vqgan(H, log).to(device)
        ema = EMA(vqgan, H.ema_beta, shared=["perceptual"]) if H.ema else None
        best = ema.model if ema else vqgan
        optimizers = {
            "ae_optim": torch.optim.Adam(vqgan.ae.parameters(), lr=H.lr),
            "disc_optim": torch.optim.Adam(vqgan.disc.parameters(), lr=H.lr),
        }
        precision = Precision(H.amp, device)
        log.info(f"precision: {precision.description}")
        models = {"vqgan": vqgan, **({"vqgan_ema": ema.model} if ema else {})}
        checkpoints = Checkpoints(log.folder, models, optimizers, precision.scaler)
        stats = {}
        if H.load_step:
            run = RunFolder(H.load_dir)
            stats = checkpoints.restore(
                run, H.load_step, log, optimizers=H.load_optim, optional=["perceptual."]
            )
            log_changed_settings(H, run, log)
        record_settings(H, log)

        batches = training_batches(
            train_set, H.batch_size, H.seed, H.load_step, H.horizontal_flip, H.num_workers,
            device, on_unreadable,
        )
        shown = first_images(validation_set or train_set, device, on_unreadable)

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
            H, log, stats.get("seconds", 0.0),
            lambda step: train_step(vqgan, ema, optimizers, next(batches), step, H, precision),
            validate=run_validation, display=display,
            save=checkpoints.save,
        )
        batches.close()
        if len(on_unreadable):
            log.warning(f"{len(on_unreadable)} images could not be read and were passed over")


def first_images(dataset, device, on_unreadable, count=16):
    """The first readable images of a dataset, at most `count`, to watch reconstructions of."""
    batches = evaluation_batches(dataset, count, 0, device, on_unreadable)
    images = next(batches)[0]
    batches.close()
    return images


if __name__ == "__main__":
    run_script(main)
