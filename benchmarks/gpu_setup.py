"""What the parts of benchmarks/gpu.py share: the models at their sizes, a training step of each
stage, precision, compilation, timing and counting of what a step runs."""

import contextlib
import functools
import gc
import time
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hparams import get_sampler_hparams, get_vqgan_hparams
from models import VQGAN
from models.autoencoder.perceptual import PerceptualDistance
from utils.training.build import build_sampler
from utils.training.ema import EMA
from utils.training.loop import due
from utils.training.optimizers import (
    build_optimizer, is_inner_convolution, is_matrix_of_block, learning_rate, set_learning_rate,
)
from utils.training.precision import Precision, seed_step
from utils.training.processes import Processes
from utils.training.step import backward, take_step

PUBLISHED = "--dataset ffhq --ema"  # churches and bedrooms have the same sizes and batches
SMALL_AUTOENCODER = (
    "--img_size 32 --nf 8 --norm_groups 4 --ch_mult 1 2 2 --res_blocks 1 --attn_resolutions 8 "
    "--emb_dim 8 --codebook_size 16 --ndf 8 --disc_layers 1 --batch_size 2"
)
SMALL_SAMPLER = "--bert_n_emb 32 --bert_n_head 4 --bert_n_layers 2 --batch_size 2"
FIRST_STEP = 40000  # of a published training: warmed up, and the discriminator takes part
STAGES = ("autoencoder", "sampler")
WAITS = ("_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal")


@dataclass
class Setup:
    """Where the parts run, and at which sizes: `tiny` ones take seconds on a CPU."""

    device: torch.device
    tiny: bool = False

    @property
    def on_gpu(self):
        return self.device.type == "cuda"

    def wait(self):
        """Wait until the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def clean(self):
        """Forget compiled code, and give the memory of the last part back to the card."""
        torch._dynamo.reset()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def autoencoder_settings(self, flags=""):
        """H of train_vqgan.py with the published sizes and these flags."""
        sizes = SMALL_AUTOENCODER if self.tiny else ""
        return get_vqgan_hparams(f"{PUBLISHED} {sizes} {flags}".split())

    def sampler_settings(self, flags=""):
        """H of train_sampler.py with the published sizes and these flags."""
        sizes = f"{SMALL_AUTOENCODER} {SMALL_SAMPLER}" if self.tiny else ""
        run = "--sampler absorbing --ae_load_dir none --ae_load_step 1"
        return get_sampler_hparams(f"{PUBLISHED} {run} {sizes} {flags}".split())

    def step(self, stage, precision, flags=""):
        """The training step of a stage; `precision` as in `precision_of`."""
        kind = {"autoencoder": AutoencoderStep, "sampler": SamplerStep}[stage]
        return kind(self, precision, flags)

    def sampler(self, flags=""):
        """A sampler with random weights, for inference."""
        H = self.sampler_settings(flags)
        codebook = torch.zeros(H.codebook_size, H.emb_dim)
        model = build_sampler(H, codebook).to(self.device)
        return model.eval().requires_grad_(False)


def precision_of(name, device):
    """Precision "float32", "tf32", "bfloat16" or "float16" of a training step on the device."""
    precision = Precision(False, device)
    if name in ("bfloat16", "float16"):
        precision.dtype = getattr(torch, name)
    precision.scaler = torch.amp.GradScaler(device.type, enabled=name == "float16")
    return precision


@contextlib.contextmanager
def tf32(on):
    """Whether float32 matrices and convolutions are multiplied in TF32 in this context."""
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = convolutions


def has_setting(H, name):
    """Whether the training scripts have the flag --`name`."""
    return name in H.__dataclass_fields__


class SamplerStep:
    """One training step of train_sampler.py on ids that stay on the device."""

    def __init__(self, setup, precision, flags=""):
        self.H = H = setup.sampler_settings(flags)
        torch.manual_seed(0)
        codebook = torch.zeros(H.codebook_size, H.emb_dim)
        self.model = build_sampler(H, codebook).to(setup.device).train()
        self.ema = EMA(self.model, H.ema_beta, ["embedding_weight"], H.ema_warmup)
        self.optimizer = build_optimizer(self.model, H, is_matrix_of_block)
        self.precision = precision_of(precision, setup.device)
        self.processes = Processes(device=setup.device)
        shape = (H.batch_size, self.model.tokens)
        self.batch = torch.randint(H.codebook_size, shape, device=setup.device)
        self.number = FIRST_STEP

    def __call__(self):
        H, self.number = self.H, self.number + 1
        seed_step(H.seed, self.number)
        set_learning_rate(self.optimizer, learning_rate(H, self.number))
        with self.precision.autocast():
            loss = self.model(self.batch)["loss"]
        self.optimizer.zero_grad()
        backward(loss, self.precision)
        outcome = take_step([loss], [self.optimizer], self.precision, H.clip_grad_norm)
        if due(self.number, H.steps_per_update_ema):
            self.ema.update(self.model, self.number // H.steps_per_update_ema, outcome.bad)

    def compile(self):
        """Compile what `--compile` compiles."""
        network = self.model._denoise_fn
        if hasattr(network, "compile_blocks"):
            network.compile_blocks()
        else:
            for block in network.blocks:
                block.compile(dynamic=False)


class AutoencoderStep:
    """One training step of train_vqgan.py, the discriminator's included, on one batch of images.

    LPIPS' trunk has random weights: what it costs does not depend on them.
    """

    def __init__(self, setup, precision, flags=""):
        self.H = H = setup.autoencoder_settings(flags)
        torch.manual_seed(0)
        self.model = VQGAN(H, PerceptualDistance()).to(setup.device).train()
        self.ema = EMA(self.model, H.ema_beta, ["perceptual"], H.ema_warmup)
        self.optimizers = [
            build_optimizer(part, H, is_inner_convolution)
            for part in (self.model.ae, self.model.disc)
        ]
        self.precision = precision_of(precision, setup.device)
        self.processes = Processes(device=setup.device)
        shape = (H.batch_size, H.n_channels, H.img_size, H.img_size)
        self.batch = torch.rand(shape, device=setup.device)
        self.number = FIRST_STEP

    def __call__(self):
        H, model, precision = self.H, self.model, self.precision
        self.number += 1
        seed_step(H.seed, self.number)
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, learning_rate(H, self.number))
            optimizer.zero_grad()
        with precision.autocast():
            loss, images, _ = model.generator_losses(self.batch, self.number, precision.scale)
        backward(loss, precision)
        with precision.autocast():
            d_loss, _ = model.discriminator_losses(self.batch, images.detach())
        backward(d_loss, precision)
        outcome = take_step([loss, d_loss], self.optimizers, precision, H.clip_grad_norm)
        if due(self.number, H.steps_per_update_ema):
            self.ema.update(model, self.number // H.steps_per_update_ema, outcome.bad)

    def compile(self):
        """Compile what `--compile` compiles."""
        if hasattr(self.model, "compile_networks"):
            self.model.compile_networks()
        else:
            for network in (self.model.ae.encoder, self.model.ae.generator):
                network.compile(dynamic=False)


def seconds_a_call(function, setup, seconds=1.0, least=3):
    """Mean seconds of `function()` over about `seconds`, after two calls to warm up.

    The device is waited for at the ends only, as in training.
    """
    function()
    setup.wait()
    began = time.perf_counter()
    function()
    setup.wait()
    calls = max(least, int(seconds / max(time.perf_counter() - began, 1e-6)))
    began = time.perf_counter()
    for _ in range(calls):
        function()
    setup.wait()
    return (time.perf_counter() - began) / calls


class Operations(TorchDispatchMode):
    """Counts what torch dispatches: `total` operations that are no views, and `waits`, {name:
    count}, of those whose result a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.total, self.waits = 0, {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function._schema.name.removeprefix("aten::")
        if not is_view(function):
            self.total += 1
        if name in WAITS or (name in ("index", "index_put_") and has_mask(arguments)):
            self.waits[name] = self.waits.get(name, 0) + 1
        return function(*arguments, **(keywords or {}))


@functools.cache
def is_view(function):
    """Whether an operation of torch gives a view of an argument and computes nothing."""
    aliases = [result.alias_info for result in function._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def has_mask(arguments):
    """Whether the arguments of an indexing operation hold a bool tensor to index by."""
    return any(x is not None and x.dtype == torch.bool for x in arguments[1])
