"""What both training scripts share: device, precision, seeds, optimisers, EMA, and the loop."""

import contextlib
import copy
import hashlib
import math
import signal
import time

import torch
from torch import nn
from tqdm import tqdm

from hparams.errors import UserError


def resolve_device(name):
    """The torch.device called `name`; None takes a GPU where there is one.

    Raises UserError for a device that this machine or this torch has not.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not usable here: {reason}") from None
    return device


def cpu_has_bfloat16():
    """Whether this CPU multiplies bfloat16 in hardware.

    Without it torch emulates: measured 12 times slower than float32 on an AVX2 machine.
    """
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
    return any(capabilities.get(name) for name in names)


class Precision:
    """Mixed precision on a device: `autocast()` for forward passes, `scaler` for backward ones.

    With `amp`: bfloat16 on CPUs and on GPUs that have it, float16 with a gradient scaler on other
    GPUs; a CPU without bfloat16 units stays with float32, which is faster there, and
    `description` says so.
    """

    def __init__(self, amp, device):
        self.device = device
        self.dtype = torch.float32
        if amp and device.type == "cuda":
            with torch.cuda.device(device):  # emulated bfloat16 would be slower than float16
                has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype = torch.bfloat16 if has_bfloat16 else torch.float16
        elif amp and device.type == "cpu" and cpu_has_bfloat16():
            self.dtype = torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.description = str(self.dtype).removeprefix("torch.")
        if amp and self.dtype == torch.float32:
            self.description += f" (--amp set aside: this {device.type} has no bfloat16 units)"

    def autocast(self):
        """Context in which forward passes run; a no-op in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def seed_step(seed, step, purpose="train"):
    """Seed torch's generators from (seed, step, purpose).

    Called at the start of every step, it makes the noise of a step a function of its number, so
    that a resumed run needs no generator's state and what is displayed in between does not matter.
    """
    digest = hashlib.sha256(f"{seed} {step} {purpose}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class EMA:
    """Exponential moving average of a model's parameters; `.model` is the averaged copy.

    Buffers are copied. `shared` names submodules that never change and are not copied.
    """

    def __init__(self, model, beta, shared=()):
        kept = {id(getattr(model, name)): getattr(model, name) for name in shared}
        self.model = copy.deepcopy(model, kept).requires_grad_(False).eval()
        self.beta = beta

    @torch.no_grad()
    def update(self, model):
        """average <- beta * average + (1 - beta) * parameter."""
        averages, values = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(averages, values, 1 - self.beta)
        for average, value in zip(self.model.buffers(), model.buffers()):
            average.copy_(value)


def learning_rate(H, step):
    """The learning rate of a step: linear warm-up over `warmup_iters`, then `lr_schedule`."""
    rate = H.lr * min(1.0, step / max(H.warmup_iters, 1))
    progress = max(0.0, step - H.warmup_iters) / max(H.train_steps - H.warmup_iters, 1)
    if H.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    elif H.lr_schedule == "linear":
        rate *= 1 - min(progress, 1.0)
    return rate


def set_learning_rate(optimizer, rate):
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def backward_step(loss, optimizer, precision, clip=0.0, parameters=()):
    """One optimiser step on `loss` (0-d); gradients are scaled where the precision asks for it.

    `clip` limits the norm of the gradient of `parameters`; 0 does not. `precision.scaler.update()`
    is due once after all the steps of an iteration.
    """
    scaler = precision.scaler
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, clip)
    scaler.step(optimizer)


class Interruption:
    """Context that turns the first Ctrl-C (or SIGTERM) into the flag `.asked`; a second one is
    a KeyboardInterrupt as usual."""

    def __enter__(self):
        self.asked = False
        self.previous = {
            number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def due(step, interval):
    """Whether something done every `interval` steps (0: never) is due after `step`."""
    return interval > 0 and step % interval == 0


def training_loop(H, log, seconds, train_step, *, validate, display, save, go_on=None):
    """Run `train_step(step)` for the steps after `H.load_step`, to `H.train_steps`.

    `train_step` returns a dict of 0-d tensors or floats with a `loss`; means over `steps_per_log`
    are logged with images/s and `seconds`, the time spent so far on top of what `seconds` says
    the loaded run had taken. `validate(step)`, `display(step, save=, show=)` and
    `save(step, {"seconds": ...})` are called when their settings say so; `save` also at the end
    and after Ctrl-C, where `go_on` says how the run goes on. Returns the step that was reached.
    """
    started = time.perf_counter() - seconds
    bar = tqdm(
        total=H.train_steps, initial=H.load_step, desc=H.log_dir, unit="step", dynamic_ncols=True,
        mininterval=0.5,
    )
    sums, counts, training_time = {}, {}, 0.0
    with Interruption() as interruption, bar:
        for step in range(H.load_step + 1, H.train_steps + 1):
            begun = time.perf_counter()
            seed_step(H.seed, step)
            for name, value in train_step(step).items():
                sums[name] = sums.get(name, 0) + value
                counts[name] = counts.get(name, 0) + 1
            bar.update()
            if due(step, H.steps_per_log):
                means = {name: float(value) / counts[name] for name, value in sums.items()}
                now = time.perf_counter()
                speed = counts["loss"] * H.batch_size / (training_time + now - begun)
                log.metrics(step, {**means, "images_per_second": speed, "seconds": now - started})
                bar.set_postfix_str(f"loss {means['loss']:.4f}, {speed:.0f} images/s")
                sums, counts, training_time = {}, {}, 0.0
            else:
                training_time += time.perf_counter() - begun
            last = step == H.train_steps
            if H.steps_per_eval and (due(step, H.steps_per_eval) or last):
                validate(step)
            shows = due(step, H.steps_per_display_output) and not H.no_visdom
            saves = due(step, H.steps_per_save_output)
            if shows or saves:
                display(step, save=saves, show=shows)
            if due(step, H.steps_per_checkpoint) or last or interruption.asked:
                save(step, {"seconds": time.perf_counter() - started})
            if interruption.asked and not last:
                go_on = go_on or f"go on with --load_dir {H.log_dir} --load_step {step}"
                log.info(f"interrupted: saved step {step}; {go_on}")
                return step
    log.info(f"trained to step {H.train_steps}: checkpoints are in {log.folder.models}")
    return H.train_steps
