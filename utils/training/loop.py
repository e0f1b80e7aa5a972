"""What both training scripts share: device, precision, seeds, optimisers, EMA, and the loop."""

import contextlib
import copy
import hashlib
import math
import signal
import time

import torch
from torch import nn

from utils.errors import DiskError, UserError
from utils.logging.logger import ProgressBar


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


def step_seed(seed, step, purpose="train"):
    """The number that (seed, step, purpose) stand for in torch's generators."""
    digest = hashlib.sha256(f"{seed} {step} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_step(seed, step, purpose="train"):
    """Seed torch's generators from (seed, step, purpose).

    Called at the start of every step, it makes the noise of a step a function of its number, so
    that a resumed run needs no generator's state and what is displayed in between does not matter.
    """
    torch.manual_seed(step_seed(seed, step, purpose))


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


class BadStep(Exception):
    """A loss or a gradient is not finite; nothing has learned from it."""


@contextlib.contextmanager
def buffers_kept(model):
    """Where the block raises BadStep, the model's buffers are afterwards what they were."""
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    except BadStep:
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)
        raise


def backward(loss, optimizer, precision):
    """The gradients of `loss` (0-d) alone, scaled where the precision asks for it."""
    optimizer.zero_grad()
    precision.scaler.scale(loss).backward()


def take_step(losses, optimizers, precision, world, clip=0.0):
    """One step of each optimiser on the gradients that `backward` has left, or of none.

    Raises BadStep where a loss or the norm of an optimiser's gradient is not finite, in any of the
    world's processes. A gradient that float16's scale has made overflow is no bad one: the scaler
    passes that step over and lowers the scale. `clip` limits the norms; 0 does not.
    """
    scaler, norms, parameters = precision.scaler, [], []
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        parameters.append([p for group in optimizer.param_groups for p in group["params"]])
        gradients = [p.grad for p in parameters[-1] if p.grad is not None]
        norms.append(nn.utils.get_total_norm(gradients))
    values = torch.stack([value.detach().float() for value in (*losses, *norms)])
    finite = world.all(values.isfinite())
    if scaler.get_scale() > 1:
        finite = finite[: len(losses)]
    if not finite.all():  # waits for the device
        scaler.update()
        shown = ", ".join(f"{value:.3g}" for value in values.tolist())
        raise BadStep(f"not finite (losses, then norms of gradients: {shown})")
    for optimizer, ours, norm in zip(optimizers, parameters, norms):
        if clip:
            nn.utils.clip_grads_with_norm_(ours, clip, norm)
        scaler.step(optimizer)
    scaler.update()


class Interruption:
    """Context that turns the first Ctrl-C (or SIGTERM) into the flag `.asked`; a second one is
    a KeyboardInterrupt as usual, unless `patient`."""

    def __init__(self, patient=False):
        self.patient = patient

    def __enter__(self):
        self.asked = False
        self.previous = {
            number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def ask(self, number, frame):
        self.asked = True
        if not self.patient:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def due(step, interval):
    """Whether something done every `interval` steps (0: never) is due after `step`."""
    return interval > 0 and step % interval == 0


def training_loop(
    H, log, world, seconds, train_step, *, batch, validate, display, save, go_on=None
):
    """Run `train_step(step)` for the steps after `H.load_step`, to `H.train_steps`.

    `train_step` returns a dict of 0-d tensors or floats with a `loss`; means over `steps_per_log`
    are logged with images/s and `seconds`, the time spent so far on top of what `seconds` says
    the loaded run had taken. `validate(step)`, `display(step, save=, show=)` and
    `save(step, {"seconds": ...})` are called when their settings say so, in the first process of
    the world; `save` also at the end and after Ctrl-C, where `go_on` says how the run goes on.
    `batch(step)` are the indices of a step's images, to name them where it raises BadStep: such a
    step is passed over, nothing is saved or shown until one is sound again, and more than
    `max_bad_steps` in a row are a UserError. What a full disk
    refuses is tried again when it is next due; the last checkpoint is a DiskError. Returns the
    step that was reached.
    """
    started = time.perf_counter() - seconds
    bar = ProgressBar(
        total=H.train_steps, initial=H.load_step, desc=H.log_dir, unit="step", dynamic_ncols=True,
        mininterval=0.5, disable=not world.is_first,
    )
    sums, counts, training_time, bad_steps = {}, {}, 0.0, 0
    with Interruption(patient=world.size > 1) as interruption, bar:
        for step in range(H.load_step + 1, H.train_steps + 1):
            begun = time.perf_counter()
            seed_step(H.seed, step, world.purpose)
            try:
                stats, bad_steps = train_step(step), 0
            except BadStep as error:
                stats, bad_steps = {}, bad_steps + 1
                pass_over(error, step, bad_steps, batch(step), H.max_bad_steps, log)
            for name, value in stats.items():
                sums[name] = sums.get(name, 0) + value
                counts[name] = counts.get(name, 0) + 1
            bar.update()
            if due(step, H.steps_per_log) and sums:
                means = {name: float(value) / counts[name] for name, value in sums.items()}
                means = world.mean(means)
                now = time.perf_counter()
                images = counts["loss"] * H.batch_size * world.size
                speed = images / (training_time + now - begun)
                log.metrics(step, {**means, "images_per_second": speed, "seconds": now - started})
                bar.set_postfix_str(f"loss {means['loss']:.4f}, {speed:.0f} images/s")
                sums, counts, training_time = {}, {}, 0.0
            else:
                training_time += time.perf_counter() - begun
            last = step == H.train_steps
            asked = world.any(interruption.asked or world.is_orphan)
            if not world.is_first:
                if asked:
                    return step
                continue
            sound = not bad_steps  # else it may be the weights: nothing is made of them
            if sound and H.steps_per_eval and (due(step, H.steps_per_eval) or last):
                validate(step)
            shows = sound and due(step, H.steps_per_display_output) and not H.no_visdom
            saves = sound and due(step, H.steps_per_save_output)
            if shows or saves:
                with later_if_disk_is_full(log):
                    display(step, save=saves, show=shows)
            if last or asked:
                save(step, {"seconds": time.perf_counter() - started})
            elif sound and due(step, H.steps_per_checkpoint):
                with later_if_disk_is_full(log):
                    save(step, {"seconds": time.perf_counter() - started})
            if asked and not last:
                go_on = go_on or (
                    f"go on with --resume, or with --load_dir {H.log_dir} --load_step {step}"
                )
                log.info(f"interrupted: saved step {step}; {go_on}")
                return step
    if H.load_step >= H.train_steps:
        log.info(f"step {H.load_step} leaves nothing to train: train_steps is {H.train_steps}")
    reached = max(H.train_steps, H.load_step)
    log.info(f"trained to step {reached}: checkpoints are in {log.folder.models}")
    return reached


def pass_over(error, step, in_a_row, indices, limit, log):
    """Log a BadStep with its batch; raises UserError where it is one too many in a row."""
    images = " ".join(map(str, indices))
    log.warning(f"step {step} is passed over, it is {error}; images of its batch: {images}")
    if in_a_row > limit:
        raise UserError(
            f"{in_a_row} steps in a row up to step {step} were not finite, which --max_bad_steps "
            f"{limit} does not allow: lower the learning rate, or clip gradients "
            f"({log.folder.last_kept()})"
        )


@contextlib.contextmanager
def later_if_disk_is_full(log):
    """Log the DiskError of something that is done again later, and go on."""
    try:
        yield
    except DiskError as error:
        log.warning(f"{error}; training goes on, and the next time will be another attempt")
