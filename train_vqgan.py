"""Train a VQGAN, the autoencoder between images and grids of codebook ids.

    python train_vqgan.py --dataset digits --log_dir vqgan_digits --train_steps 500 --ema
"""

from functools import partial

import torch
from torch import nn

from hparams import get_vqgan_hparams
from hparams.scripts import AUTOENCODER_ARCHITECTURE
from models import VQGAN
from models.autoencoder.formats import to_fast_format
from models.autoencoder.perceptual import SMALLEST, lpips_input
from models.autoencoder.quantizers import gumbel_temperature
from utils.data.batches import RepeatedBatches, TrainingBatches, UnreadableFiles, evaluation_batches
from utils.data.datasets import load_dataset
from utils.data.images import augmented
from utils.data.pixel_cache import cached_pixels
from utils.data.split import apply_split, describe, sample_of
from utils.evaluation.metrics import psnr
from utils.evaluation.reconstruction import ENOUGH_TO_COMPARE, ReconstructionDistance
from utils.runs.resume import choose_checkpoint, record_settings
from utils.runs.script import run_script, start_run
from utils.runs.trained_on import choose_split
from utils.training.build import build_vqgan, check_models, efficientnet_distance
from utils.training.checkpoints import Checkpoints, architecture_of
from utils.training.codebook import CodebookCare
from utils.training.compile import compiles, only_compiled
from utils.training.cuda_graphs import capture, captures, parts_of_autoencoder
from utils.training.ema import EMA
from utils.training.health import autoencoder_health
from utils.training.loop import Means, TrainingLoop, due, mean_of, tolerate_full_disk
from utils.training.optimizers import (
    build_optimizer, is_inner_convolution, learning_rate, set_learning_rate,
)
from utils.training.precision import Precision, measuring_arithmetic, seed_step, training_arithmetic
from utils.training.processes import init_processes
from utils.training.step import Buffers, backward, take_step


class Objective(nn.Module):
    """A loss as a forward pass: DistributedDataParallel averages the gradients of nothing else."""

    def __init__(self, module, loss):
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, *arguments):
        return self.loss(*arguments)


class VQGANTraining:
    """Everything that is trained, and the loop that trains it."""

    def __init__(self, H, log, processes):
        self.H, self.log, self.processes = H, log, processes
        self.on_unreadable = UnreadableFiles(log.passed_over)
        dataset = cached_pixels(load_dataset(H, log), H, processes, log)
        self.train_set, self.validation_set, split = apply_split(
            dataset, choose_split(H, dataset, log)
        )
        log.info(describe(split))
        self.train_set = augmented(self.train_set, H)
        self.facts = {  # kept with every checkpoint
            "split": split, "architecture": architecture_of(H, AUTOENCODER_ARCHITECTURE),
        }
        seed_step(H.seed, 0, "weights")
        self.vqgan = to_fast_format(build_vqgan(H, log).to(processes.device), processes.device)
        self.best, self.ema = self.vqgan, None
        models = {"vqgan": self.vqgan}
        if H.ema and processes.is_first:
            self.ema = EMA(self.vqgan, H.ema_beta, self.vqgan.never_learn, H.ema_warmup)
            self.best = models["vqgan_ema"] = self.ema.model
        self.precision = Precision(H.amp, processes.device)
        self.optimizers = {
            name: build_optimizer(network, H, is_inner_convolution, self.precision.dtype)
            for name, network in (("ae_optim", self.vqgan.ae), ("disc_optim", self.vqgan.disc))
        }
        self.codebook = CodebookCare(
            H, self.vqgan, self.ema and self.ema.model, self.train_set, processes,
            self.on_unreadable,
        )
        log.info(f"precision: {self.precision.description}")
        self.checkpoints = Checkpoints(
            log.folder, models, self.optimizers, self.precision.scaler, H.keep_checkpoints
        )
        stats = self.checkpoints.restore(H, log, optional=["perceptual."])
        self.codebook.restored()
        self.seconds = stats.get("seconds", 0.0)
        self.prepare_networks(log)
        if processes.is_first:
            self.prepare_validation()

    def prepare_networks(self, log):
        """Make of the networks what a step calls, as H wants them compiled, captured and spread."""
        H, processes = self.H, self.processes
        self.vqgan.checkpoint_blocks(H.checkpoint_blocks)
        self.compiled = compiles(H, processes.device, log, pays_on=())
        if self.compiled:
            self.vqgan.compile_networks()
        if captures(H, processes, log):
            shape = (H.batch_size, H.n_channels, H.img_size, H.img_size)
            with training_arithmetic(H):
                capture(parts_of_autoencoder(self.vqgan.ae, shape, self.precision), log,
                        H.cuda_graphs)
        self.ae_loss = processes.wrap(
            Objective(self.vqgan.ae, self.vqgan.generator_losses),
            [f"module.{name}" for name in self.vqgan.ae.without_gradient()],
        )
        self.disc_loss = processes.wrap(Objective(self.vqgan.disc, self.vqgan.discriminator_losses))
        self.buffers = Buffers(self.vqgan, ["perceptual."])

    def prepare_validation(self):
        """What rank 0 validates with, and the images that it shows."""
        H, device = self.H, self.processes.device
        looked_at = sample_of(
            self.validation_set, H.validation_images or len(self.validation_set)
        )
        self.looked_at = RepeatedBatches(
            looked_at, H.batch_size, H.num_workers, device, self.on_unreadable
        )
        self.distance = ReconstructionDistance(device)
        # where the loss has no perceptual distance, validations have one
        self.perceptual = None
        if self.vqgan.perceptual is None and H.img_size >= SMALLEST["efficientnet_lite0"]:
            self.perceptual = efficientnet_distance().to(device)
        enough = len(looked_at) >= ENOUGH_TO_COMPARE
        self.judged_by = ["frechet", "loss"] if enough else ["loss"]
        if H.steps_per_eval and not enough:
            self.log.info(f"{len(looked_at)} images held out are too few for a Fréchet distance: "
                          f"the best checkpoint is that of the lowest validation loss")
        images = sample_of(self.validation_set or self.train_set, 16)  # of all nested folders
        batches = evaluation_batches(images, 16, 0, device, self.on_unreadable)
        self.shown, _ = next(batches)

    def train(self):
        """Train to `H.train_steps`."""
        H, vqgan, precision = self.H, self.vqgan, self.precision
        ae_optim, disc_optim = self.optimizers.values()
        batches = TrainingBatches(
            self.train_set, H, H.load_step, self.processes, self.on_unreadable
        )
        self.log.info(f"the loader reads {batches.images_per_second():.0f} images/s alone")
        with training_arithmetic(H), TrainingLoop(
            H, self.log, self.processes, len(self.train_set), H.load_step, self.seconds,
            batches=batches,
        ) as loop:
            for step in loop:
                vqgan.train()
                set_learning_rate(ae_optim, learning_rate(H, step))
                set_learning_rate(disc_optim, learning_rate(H, step, H.disc_lr))
                if H.quantizer == "gumbel":
                    vqgan.ae.quantize.temperature = gumbel_temperature(step)
                self.codebook.before(step)
                self.buffers.keep()
                losses, optimizers, stats = self.gradients(step, next(batches))
                outcome = take_step(losses, optimizers, precision, self.processes,
                                    H.clip_grad_norm, self.buffers)
                if self.ema and due(step, H.steps_per_update_ema):
                    self.ema.update(step // H.steps_per_update_ema, outcome.bad)
                loop.count(outcome, **stats)
                self.codebook.after(step, loop)
                if loop.must_record:
                    record_settings(H, self.log)
                loop.end_step()
                if loop.must_reduce:
                    self.codebook.gather_uses()
                best = self.judge(step, loop) if loop.must_validate else None
                if loop.must_show or loop.must_save_images:
                    self.show_reconstructions(step, loop.must_save_images, loop.must_show)
                if loop.must_save or best:
                    with tolerate_full_disk(self.log, unless=loop.ends):
                        stats = {"seconds": loop.seconds, **self.facts}
                        self.checkpoints.save(step, stats, best, extra=not loop.must_save)
        batches.close()

    def gradients(self, step, images):
        """Compute the gradients of images [B, C, S, S] in `H.accumulate` parts.

        Returns (the losses of each part, the optimisers that have a step to take, the means of what
        the parts have to log).
        """
        H, precision, processes = self.H, self.precision, self.processes
        parts, losses, all_stats = images.chunk(H.accumulate), [], []
        optimizers = list(self.optimizers.values())[: 2 if step >= H.disc_start_step else 1]
        for optimizer in optimizers:
            optimizer.zero_grad()
        for index, part in enumerate(parts):
            last = index + 1 == len(parts)
            with processes.adds_up(self.ae_loss, last):
                with precision.autocast():
                    loss, reconstructions, stats = self.ae_loss(part, step, precision.scale)
                backward(loss / len(parts), precision)
            stats["loss"] = loss.detach()
            losses.append(loss.detach())
            if len(optimizers) == 2:
                with processes.adds_up(self.disc_loss, last):
                    with precision.autocast():
                        d_loss, d_stats = self.disc_loss(part, reconstructions.detach())
                    backward(d_loss / len(parts), precision)
                stats |= {"d_loss": d_loss.detach(), **d_stats}
                losses.append(d_loss.detach())
            all_stats.append(stats)
        return losses, optimizers, mean_of(all_stats)

    def judge(self, step, loop):
        """Validate, and say how it goes; returns the record of the best step if it is this one."""
        with only_compiled(self.compiled), measuring_arithmetic():
            figures, known = self.validate(step)
        loop.report_validation(figures, partial(autoencoder_health, self.H, step, known))
        if step < self.H.codebook_start_step:
            return None  # nothing is quantized yet
        return self.checkpoints.better(step, figures, *self.judged_by)

    @torch.no_grad()
    def validate(self, step):
        """(figures of images that are held out, always the same ones, what `autoencoder_health`
        must know): means of losses and PSNR in dB, how many codes are used, and the Fréchet
        distance of the features of reconstructions, as FID has it."""
        means, usage, distance = Means(), 0, self.distance
        self.best.eval()
        self.vqgan.eval()
        for images, _ in self.looked_at:
            reconstructions, _, stats, _ = self.best.ae(images)
            nll, l1, perceptual = self.best.reconstruction_losses(images, reconstructions)
            if self.perceptual is not None:
                pair = (lpips_input(part, "0_1") for part in (images, reconstructions))
                perceptual = self.perceptual(*pair).mean()
            values = dict(loss=nll, l1=l1, perceptual=perceptual)
            values["psnr"] = psnr(images, reconstructions.clamp(0, 1)).mean()
            means.add(values, len(images))
            usage = usage + stats["usage"]
            distance.add(images, reconstructions)
            if self.ema:
                of_weights = self.vqgan.ae(images)[0]
                means.add({"of_weights": (images - of_weights).abs().mean()}, len(images))
        self.log.bars(step, "codebook_use", usage / usage.sum())
        figures = {**means.take(), "codes_used": int((usage > 0).sum()), **distance.take()}
        of_weights = figures.pop("of_weights", figures["l1"])
        return figures, dict(figures, ids_seen=int(usage.sum()), of_weights=of_weights)

    @torch.no_grad()
    def show_reconstructions(self, step, save, display):
        """Images, held-out ones where there are any, each beside its reconstruction."""
        self.best.eval()
        with only_compiled(self.compiled):
            reconstructions = self.best.ae(self.shown)[0].clamp(0, 1)
        pairs = torch.stack((self.shown, reconstructions), dim=1).flatten(0, 1)
        with tolerate_full_disk(self.log):
            self.log.images(step, "reconstructions", pairs, save=save, display=display,
                            individually=self.H.save_individually)


def main(argv=None):
    H = get_vqgan_hparams(argv)
    check_models(H, VQGAN)
    processes = init_processes(H.device)
    with start_run(H, processes) as log:
        choose_checkpoint(H, log, processes)
        training = VQGANTraining(H, log, processes)
        training.train()
        if len(training.on_unreadable) and processes.size == 1:
            log.warning(
                f"{len(training.on_unreadable)} images could not be read and were passed over"
            )


if __name__ == "__main__":
    run_script(main)
