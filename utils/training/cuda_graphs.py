"""CUDA graphs: the kernels of a network are captured once and replayed in every training step.

Python hands a GPU its kernels one by one, thousands a step: where a step is small, the GPU waits
for Python most of the time. A captured graph is handed over as a whole. Shapes: B batch, N tokens;
C channels, S side of images.
"""

import contextlib
import functools
import warnings

import torch
from torch import nn

from models.neighborhoods.geometry import CACHE
from utils.errors import UserError
from utils.signals import Stopped

HAVE_GRAPHS = ("cuda",)  # kinds of devices
WARM_UP = 2  # passes, in which code is compiled and algorithms are chosen


class CaptureFailed(UserError):
    """A capture that failed, for short memory too: torch's streams and memory are in an unclear
    state then (it keeps the memory of the capture, pytorch/pytorch#190348), so nothing more is to
    be computed on the GPU."""


def capture_problem(H, processes):
    """Why the networks of a training cannot be captured, as a sentence; None where they can."""
    if processes.device.type not in HAVE_GRAPHS:
        return f"the device ({processes.device.type}) has no CUDA graphs"
    if processes.size > 1:
        return "several processes exchange gradients during the backward pass"
    if H.accumulate > 1:
        return "the gradients of a part of a batch would replace those of another (--accumulate)"
    if H.checkpoint_blocks:
        return "blocks are computed again in the backward pass (--checkpoint_blocks)"
    return None


def captures(H, processes, log):
    """Whether a training captures its networks: where it can, unless H says not to. The log says
    why not where H asks for it."""
    problem = capture_problem(H, processes)
    if problem and H.cuda_graphs:
        log.warning(f"no CUDA graphs are captured: {problem}")
    return problem is None and H.cuda_graphs is not False


class Capturable(nn.Module):
    """The method `name` of the module `owner`, which makes one tensor of one like `sample` with the
    parameters of the module `learned`, under the `autocast` of `precision`.

    `owner` has no buffers that training changes. Its copies share a method that is replaced:
    copy it before.
    """

    def __init__(self, owner, name, learned, sample, precision):
        super().__init__()
        self.place, self.method, self.precision = (owner, name), getattr(owner, name), precision
        self.learned = nn.ParameterList(p for p in learned.parameters() if p.requires_grad)
        self.static_input = sample.detach().clone().requires_grad_(sample.requires_grad)

    def forward(self, x):
        with self.precision.autocast(cached=False):  # what was cast before is not captured
            return self.method(x)

    def try_out(self):
        """Forward and backward passes as they are captured; RuntimeError where one that is warmed
        up waits for the GPU: to capture it would fail, and leave torch in an unclear state."""
        inputs = [self.static_input] * self.static_input.requires_grad + [*self.learned]
        for number in range(WARM_UP + 1):
            with waits_are_errors(self.static_input.device, number == WARM_UP):
                output = self(self.static_input)
                torch.autograd.grad(output, inputs, torch.ones_like(output), allow_unused=True)

    def replace(self, replay):
        """Let the method call `replay` for inputs like the sample in training mode with gradients;
        it runs as ever for all others."""
        owner, name = self.place

        @functools.wraps(self.method)
        def replayed_or_called(x, *arguments, **options):
            alike = x.shape == self.static_input.shape and x.dtype == self.static_input.dtype
            if owner.training and torch.is_grad_enabled() and alike and not (arguments or options):
                return replay(x)
            return self.method(x, *arguments, **options)

        replayed_or_called.kept_alive = list(CACHE.values.values())  # masks that the graph reads
        setattr(owner, name, replayed_or_called)


@contextlib.contextmanager
def waits_are_errors(device, on):
    """Context in which, if `on`, torch raises RuntimeError where it waits for a GPU."""
    if not on or device.type != "cuda":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this mode of torch's warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(parts, log, required=False):
    """Capture `Capturable` parts in the order in which a step calls them, and replay them from now
    on. What they give, and the gradients of their parameters, are overwritten by the next replay:
    each is called once a step.

    Where a trial shows that one cannot be captured the log says why, or UserError is raised if it
    is `required` (OutOfMemoryError where memory is short); in any case CaptureFailed if the capture
    itself fails.
    """
    device = parts[0].static_input.device
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    devices = [device] if device.type == "cuda" else []
    with on_device, torch.random.fork_rng(devices):  # trials draw random numbers
        try:
            for part in parts:
                part.try_out()
        except RuntimeError as error:
            if required and isinstance(error, torch.OutOfMemoryError):
                raise
            if required:
                raise UserError(f"--cuda_graphs: {first_line(error)}") from error
            log.warning(f"no CUDA graphs are captured: {first_line(error)}")
            return
        torch.cuda.empty_cache()  # the capture has a stream of its own, which cannot use it
        try:
            replays = torch.cuda.make_graphed_callables(
                tuple(parts), tuple((part.static_input,) for part in parts),
                allow_unused_input=True,
            )
        except RuntimeError as error:
            cause = first_cause(error)
            if isinstance(cause, (KeyboardInterrupt, Stopped)):
                raise cause from None
            raise CaptureFailed(f"the networks' kernels cannot be captured: give --no_cuda_graphs "
                                f"({first_line(cause)})") from error
    if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
        # the parameters' gradients are those of the stream of the capture: torch waits between both
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    for part, replay in zip(parts, replays):
        part.replace(replay)
    log.info("the networks' kernels are captured, and replayed in every step (--no_cuda_graphs "
             "does without)")


def first_cause(error):
    """The exception that led to others, `error` the last of them."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def first_line(error):
    """What an exception says, without the advice that torch appends."""
    return str(error).strip().partition("\n")[0]


def parts_of_sampler(sampler, batch_size, precision):
    """What is captured of a sampler: its transformer on ids [B, N]."""
    transformer = sampler.train().transformer
    device = next(transformer.parameters()).device
    # no id follows the last one, so a causal prior does not see it
    tokens = sampler.tokens - transformer.causal
    ids = torch.zeros((batch_size, tokens), dtype=torch.int64, device=device)
    return [Capturable(transformer, "forward", transformer, ids, precision)]


def parts_of_autoencoder(autoencoder, shape, precision):
    """What is captured of an autoencoder on images of a `shape` (B, C, S, S): the encoder, and the
    generator without its last convolution, whose gradient is asked for by itself."""
    encoder, generator = autoencoder.encoder, autoencoder.generator
    images = torch.zeros(shape, device=next(encoder.parameters()).device)
    autoencoder.eval()
    with torch.no_grad(), precision.autocast():
        z_q, *_ = autoencoder.encode(images)
    autoencoder.train()
    return [
        Capturable(encoder, "forward", encoder, images, precision),
        Capturable(generator, "features", generator.blocks[:-1], z_q.requires_grad_(), precision),
    ]
