"""Mixed precision, and random numbers as a function of seed and step."""

import contextlib
import hashlib

import torch


def cpu_has_bfloat16():
    """Whether this CPU multiplies bfloat16 in hardware.

    Without it torch emulates: measured 12 times slower than float32 on an AVX2 machine.
    """
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
    return any(capabilities.get(name) for name in names)


def has_bfloat16(device):
    """Whether a device, a CPU or a GPU, multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_has_bfloat16()


class Precision:
    """Mixed precision on a device: `autocast()` for forward passes, `scaler` for backward ones.

    With `amp`: bfloat16 on CPUs and GPUs that have it, float16 with a gradient scaler on other
    GPUs, float32 on other CPUs, where it is faster, as `description` then says.
    """

    def __init__(self, amp, device):
        self.device, self.dtype = device, torch.float32
        if amp and has_bfloat16(device):
            self.dtype = torch.bfloat16
        elif amp and device.type == "cuda":
            self.dtype = torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.description = str(self.dtype).removeprefix("torch.")
        if amp and self.dtype == torch.float32:
            self.description += f" (--amp set aside: this {device.type} has no bfloat16 units)"

    def frozen(self, module):
        """A frozen `module` for use in `autocast`, whose linear layers have their weights in its
        type: what autocast would make of them at every call. Returns the module."""
        if self.dtype != torch.float32:
            for layer in module.modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.to(self.dtype)
        return module

    @property
    def scale(self):
        """By what losses are multiplied before they are differentiated: 0-d on the device in
        float16, else 1.0."""
        if not self.scaler.is_enabled():
            return 1.0
        return self.scaler.scale(torch.ones((), device=self.device))

    def autocast(self, cached=True):
        """Context in which forward passes run; a no-op in float32. With `cached` a weight that is
        used twice is cast once."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=cached)


def allow_tf32(allowed):
    """Whether GPUs may compute float32 products and convolutions in TF32, which has 10 bits of
    precision."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def training_arithmetic(H):
    """GPUs use TF32 with `H.tf32`, and find out which algorithm of a convolution is the fastest
    unless `H.deterministic`; afterwards neither."""
    allow_tf32(H.tf32)
    torch.backends.cudnn.benchmark = not H.deterministic
    try:
        yield
    finally:
        allow_tf32(False)
        torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def measuring_arithmetic():
    """What `training_arithmetic` allows is set aside: figures are those that experiments give."""
    tf32, benchmark = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    allow_tf32(False)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        allow_tf32(tf32)
        torch.backends.cudnn.benchmark = benchmark


def step_seed(seed, step, purpose="train"):
    """The number that (seed, step, purpose) stand for in torch's generators."""
    digest = hashlib.sha256(f"{seed} {step} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_step(seed, step, purpose="train"):
    """Seed torch's generators from (seed, step, purpose).

    The noise of a step is then a function of its number: a resumed run needs no generator's state,
    and what is displayed in between does not matter.
    """
    torch.manual_seed(step_seed(seed, step, purpose))
