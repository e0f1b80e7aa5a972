"""CUDA graphs: a network's kernels are recorded once and replayed in every training step.

Python hands a GPU its kernels one by one, thousands a step: where a step is small, the GPU waits
for Python most of the time. A recording is handed over as a whole.
"""

import functools

import torch
from torch import nn

from models.neighborhoods.geometry import CACHE
from utils.errors import UserError

RECORDED_ON = ("cuda",)  # kinds of devices that have such graphs


def recording_problem(H, processes):
    """Why the networks of a training cannot be recorded, as a sentence; None where they can."""
    if processes.device.type not in RECORDED_ON:
        return f"a {processes.device.type} has none"
    if processes.size > 1:
        return "several processes exchange gradients amid the backward pass"
    if H.accumulate > 1:
        return "the gradients of a part of a batch would replace those of another (--accumulate)"
    if H.checkpoint_blocks:
        return "blocks are computed again in the backward pass (--checkpoint_blocks)"
    return None


def records(H, processes, log):
    """Whether a training records its networks: where it can, unless H says not to. The log says why
    not where H asks for it."""
    problem = recording_problem(H, processes)
    if problem and H.cuda_graphs:
        log.warning(f"no CUDA graphs are recorded: {problem}")
    return problem is None and H.cuda_graphs is not False


class Part(nn.Module):
    """A function of one tensor, with the parameters of the module `learned`, which it uses."""

    def __init__(self, function, learned):
        super().__init__()
        self.function = function
        self.learned = nn.ParameterList(p for p in learned.parameters() if p.requires_grad)

    def forward(self, x):
        return self.function(x)


def record(owner, name, learned, sample, precision):
    """Record the method `name` of the module `owner`, which makes one tensor of another with the
    parameters of the module `learned`, forward and backward, on inputs like `sample`, under the
    `autocast` of `precision`.

    The method then replays the recording for inputs of that kind in training mode with gradients,
    and runs as ever for all others. What it gives, and the gradients of the parameters, are
    overwritten by the next replay: one a step. `owner` has no buffers that training changes.
    """
    method, device = getattr(owner, name), sample.device
    place = sample.detach().clone().requires_grad_(sample.requires_grad)  # where inputs are copied
    devices = [device] if device.type == "cuda" else []
    if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
        # gradients come from the stream of the recording, which torch synchronises with
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    # The calls that warm up draw random numbers; what autocast has cast before is not recorded.
    with torch.random.fork_rng(devices), precision.autocast(cached=False):
        replay = torch.cuda.make_graphed_callables(
            Part(method, learned), (place,), allow_unused_input=True
        )

    @functools.wraps(method)
    def chosen(x, *arguments, **options):
        is_alike = x.shape == sample.shape and x.dtype == sample.dtype
        if owner.training and torch.is_grad_enabled() and is_alike and not (arguments or options):
            return replay(x)
        return method(x, *arguments, **options)

    chosen.constants = list(CACHE.values.values())  # the recording reads their memory
    setattr(owner, name, chosen)


def record_sampler(sampler, ids, precision):
    """Record the denoiser, or the causal prior, of a sampler for batches like `ids` [B, N]."""
    transformer = sampler.train().transformer
    seen = ids[:, :-1] if transformer.causal else ids  # no id follows the last one
    record(transformer, "forward", transformer, seen, precision)


def record_autoencoder(autoencoder, images, precision):
    """Record encoder and generator, but for its last convolution, whose gradient is asked for by
    itself, for batches like `images` [B, C, S, S]."""
    autoencoder.eval()
    with torch.no_grad(), precision.autocast():
        z_q, *_ = autoencoder.encode(images)
    autoencoder.train()
    encoder, generator = autoencoder.encoder, autoencoder.generator
    record(encoder, "forward", encoder, images, precision)
    record(generator, "features", generator.blocks[:-1], z_q.requires_grad_(), precision)


def record_if_it_works(record_networks, model, batch, precision, required, log):
    """`record_networks` of a `model` for batches like `batch`; where that fails, training goes on
    without, or ends where recordings are `required`."""
    try:
        record_networks(model, batch, precision)
    except RuntimeError as error:  # also of memory; torch names what cannot be recorded
        reason = str(error).partition("\n")[0]
        if required:
            raise UserError(f"--cuda_graphs: the networks cannot be recorded: {reason}") from error
        log.warning(f"no CUDA graphs are recorded: {reason}")
        return
    log.info("the networks' kernels are recorded, and replayed in every step (--no_cuda_graphs "
             "does without)")
