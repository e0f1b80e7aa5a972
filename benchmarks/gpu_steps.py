"""A training step of each stage as the training scripts take it, on one batch of noise."""

import logging
import sys
from pathlib import Path

import torch
from gpu_setup import HALF

from models import VQGAN
from models.autoencoder.formats import to_fast_format
from models.autoencoder.perceptual import PerceptualDistance
from utils.training.build import build_sampler
from utils.training.cuda_graphs import capture, parts_of_autoencoder, parts_of_sampler
from utils.training.ema import EMA
from utils.training.loop import due
from utils.training.optimizers import (
    build_optimizer, is_inner_convolution, is_matrix_of_block, learning_rate, set_learning_rate,
)
from utils.training.precision import Precision, seed_step
from utils.training.processes import Processes
from utils.training.step import Buffers, take_step

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where the training scripts lie
from train_sampler import SamplerTraining  # noqa: E402
from train_vqgan import Objective, VQGANTraining  # noqa: E402

# Of a published training: warmed up, and the discriminator takes part. After two steps comes one
# that updates the EMA.
FIRST_STEP = 40007


def precision_of(name, device):
    """Precision "float32", "tf32", "bfloat16" or "float16" of a training step on the device."""
    precision = Precision(False, device)
    if name in HALF:
        precision.dtype = getattr(torch, name)
    precision.scaler = torch.amp.GradScaler(device.type, enabled=name == "float16")
    return precision


class Step:
    """What both stages have; a call takes one training step and gives its Outcome."""

    buffers = None  # what a bad step must not change

    def __init__(self, H, device, precision):
        self.H, self.processes = H, Processes(device=device)
        self.precision = precision_of(precision, device)
        self.number = FIRST_STEP
        torch.manual_seed(0)

    def __call__(self):
        H, self.number = self.H, self.number + 1
        seed_step(H.seed, self.number)
        for optimizer in self.all_optimizers:
            set_learning_rate(optimizer, learning_rate(H, self.number))
        if self.buffers is not None:
            self.buffers.keep()
        losses = self.gradients(self.number, self.batch)[0]
        outcome = take_step(
            losses, self.all_optimizers, self.precision, self.processes, H.clip_grad_norm,
            self.buffers,
        )
        if due(self.number, H.steps_per_update_ema):
            self.ema.update(self.number // H.steps_per_update_ema, outcome.bad)
        self.end_step(outcome)
        return outcome

    def end_step(self, outcome):
        """What a stage does besides."""

    def capture(self):
        """Capture what `--cuda_graphs` captures, the stage's `parts`, and replay it from now on."""
        capture(self.parts(), logging.getLogger("gpu"), required=True)


class SamplerStep(Step):
    """A step of train_sampler.py."""

    gradients, noise_of = SamplerTraining.gradients, SamplerTraining.noise_of

    def __init__(self, H, device, precision):
        super().__init__(H, device, precision)
        codebook = torch.zeros(H.codebook_size, H.emb_dim)
        self.model = self.loss = build_sampler(H, codebook).to(device).train()
        self.model.transformer.checkpoint_blocks = H.checkpoint_blocks
        self.ema = EMA(self.model, H.ema_beta, ["embedding_weight"], H.ema_warmup)
        self.optimizer = build_optimizer(self.model, H, is_matrix_of_block)
        self.all_optimizers = [self.optimizer]
        shape = (H.batch_size, self.model.tokens)
        self.batch = torch.randint(H.codebook_size, shape, device=device)

    def end_step(self, outcome):
        self.model.end_step(outcome.bad)
        if due(self.number, self.H.steps_per_log):
            self.model.update_histories()

    def compile(self):
        """Compile what `--compile` compiles."""
        self.model.transformer.compile_blocks()

    def parts(self):
        return parts_of_sampler(self.model, len(self.batch), self.precision)


class AutoencoderStep(Step):
    """A step of train_vqgan.py, the discriminator's included.

    LPIPS' trunk has random weights: what it costs does not depend on them.
    """

    gradients = VQGANTraining.gradients

    def __init__(self, H, device, precision):
        super().__init__(H, device, precision)
        model = to_fast_format(VQGAN(H, PerceptualDistance()).to(device), device).train()
        model.checkpoint_blocks(H.checkpoint_blocks)
        self.model = model
        self.ema = EMA(model, H.ema_beta, ["perceptual"], H.ema_warmup)
        self.optimizers = {
            name: build_optimizer(part, H, is_inner_convolution)
            for name, part in (("ae_optim", model.ae), ("disc_optim", model.disc))
        }
        self.all_optimizers = list(self.optimizers.values())
        self.ae_loss = Objective(model.ae, model.generator_losses)
        self.disc_loss = Objective(model.disc, model.discriminator_losses)
        self.buffers = Buffers(model, ["perceptual."])
        shape = (H.batch_size, H.n_channels, H.img_size, H.img_size)
        self.batch = torch.rand(shape, device=device)

    def compile(self):
        """Compile what `--compile` compiles."""
        self.model.compile_networks()

    def parts(self):
        return parts_of_autoencoder(self.model.ae, self.batch.shape, self.precision)


STEPS = {"autoencoder": AutoencoderStep, "sampler": SamplerStep}
