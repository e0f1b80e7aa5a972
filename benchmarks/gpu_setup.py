"""What the parts of benchmarks/gpu.py share: devices and sizes, timing, counting of operations."""

import contextlib
import functools
import gc
import time
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hparams import get_sampler_hparams, get_vqgan_hparams
from utils.training.build import build_sampler
from utils.training.cuda_graphs import CaptureFailed
from utils.training.precision import Precision, allow_tf32

PUBLISHED = "--dataset ffhq --ema"  # churches and bedrooms have the same sizes and batches
SMALL_AUTOENCODER = (
    "--img_size 32 --nf 8 --norm_groups 4 --ch_mult 1 2 2 --res_blocks 1 --attn_resolutions 8 "
    "--emb_dim 8 --codebook_size 16 --ndf 8 --disc_layers 1 --batch_size 2"
)
SMALL_SAMPLER = "--bert_n_emb 32 --bert_n_head 4 --bert_n_layers 2 --batch_size 2"
STAGES = ("sampler", "autoencoder")
HALF = ("bfloat16", "float16")
WAITS = ("_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal")


@dataclass
class Setup:
    """Where the parts run, and at which sizes: `tiny` ones take seconds on a CPU."""

    device: torch.device
    tiny: bool = False

    @property
    def on_gpu(self):
        return self.device.type == "cuda"

    @property
    def half(self):
        """The type that `--amp` takes on the device; "bfloat16" where it takes none."""
        name = Precision(True, self.device).description
        return name if name in HALF else "bfloat16"

    @property
    def halves(self):
        """The half types that the device computes in, which `half` is one of. GPUs before Ampere
        only emulate bfloat16."""
        return ("float16",) if self.half == "float16" else HALF

    def precision(self, name):
        """The name of a precision, where "half" is what `--amp` takes on the device."""
        return self.half if name == "half" else name

    def wait(self):
        """Wait until the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def clean(self, code=False):
        """Give the memory of what is no more back to the card; forget compiled `code` too."""
        if code:
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
        """The training step of a stage; `precision` as in `gpu_steps.precision_of`."""
        from gpu_steps import STEPS  # with all that the training scripts import

        H = getattr(self, f"{stage}_settings")(flags)
        return STEPS[stage](H, self.device, precision)

    def sampler(self, flags=""):
        """A sampler with random weights, for inference."""
        H = self.sampler_settings(flags)
        codebook = torch.zeros(H.codebook_size, H.emb_dim)
        model = build_sampler(H, codebook).to(self.device)
        return model.eval().requires_grad_(False)


def out_of_memory(error):
    """Whether an exception, or what it says, is of memory that did not suffice: torch's, CUDA's, or
    that of one of CUDA's libraries, but not in a capture, after which there is no going on."""
    words = ("out of memory", "STATUS_ALLOC_FAILED")
    return not isinstance(error, CaptureFailed) and (
        isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
    )


@contextlib.contextmanager
def tf32(on):
    """Whether float32 matrices and convolutions are multiplied in TF32 in this context; nor are
    they afterwards."""
    allow_tf32(on)
    try:
        yield
    finally:
        allow_tf32(False)


@contextlib.contextmanager
def fastest_convolutions():
    """cuDNN tries its algorithms, as in training."""
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


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


class Products(TorchDispatchMode):
    """Counts floating-point operations, `flops`: of products, convolutions, and those attentions
    that torch has a formula for, which leaves flex and natten out."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula:
            self.flops += formula(*arguments, **(keywords or {}), out_val=out)
        return out
