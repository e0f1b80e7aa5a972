"""One training step: gradients, and the step of the optimisers where everything is finite.

Whether it is, the device decides: the host, which is ahead of a GPU, does not wait for it.
"""

from typing import NamedTuple

import torch
from torch import nn

ASYNCHRONOUS = ("cuda",)  # kinds of devices that the host gives work to ahead of time


def is_asynchronous(device):
    """Whether the host would have to wait for what a device computes."""
    return device.type in ASYNCHRONOUS


class Outcome(NamedTuple):
    """What became of a step, on the device."""

    bad: torch.Tensor  # bool 0-d: a loss or a gradient is not finite, and nothing has changed
    values: torch.Tensor  # float32: losses, then norms of gradients


class Buffers:
    """The buffers of a model that its forward pass in training mode changes: `keep` copies them,
    and `restore` gives back what was kept. Names that begin with one of `frozen` are no such."""

    def __init__(self, model, frozen=()):
        saved = set(model.state_dict())
        self.buffers = [
            buffer for name, buffer in model.named_buffers()
            if name in saved and not name.startswith(tuple(frozen))
        ]
        self.kept = []

    def keep(self):
        self.kept = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def restore(self, where):
        """Where `where`, bool 0-d, is true, make the buffers what they were."""
        for buffer, kept in zip(self.buffers, self.kept):
            torch.where(where, kept, buffer, out=buffer)


def backward(loss, precision):
    """Add the gradients of `loss`, 0-d, to those that are there, scaled where float16 needs it.

    Where the loss is not finite, no gradient is: several processes, which average them, then all
    know.
    """
    value = loss.detach()
    precision.scaler.scale(loss * (value - value + 1)).backward()


def take_step(losses, optimizers, precision, processes, clip=0.0, buffers=None):
    """Step all optimisers; where a loss or a gradient is not finite, none, and `restore` the
    `buffers`. Gives the Outcome, which is bad on all ranks or on none.

    A gradient that float16's scale has made overflow is not bad: that step is passed over and the
    scaler lowers the scale. `clip` limits the norms of the gradients; 0 does not.
    """
    scaler, norms, parameters = precision.scaler, [], []
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        parameters.append([p for group in optimizer.param_groups for p in group["params"]])
        gradients = [p.grad for p in parameters[-1] if p.grad is not None]
        norms.append(nn.utils.get_total_norm(gradients))
    values = torch.stack([value.detach().float() for value in (*losses, *norms)])
    finite = values.isfinite()
    bad = passed_over = ~finite.all()
    for optimizer, its_parameters, norm in zip(optimizers, parameters, norms):
        if clip:
            nn.utils.clip_grads_with_norm_(its_parameters, clip, norm)
        optimizer.found_inf = passed_over.float()  # by which it leaves everything as it is
        optimizer.step()
    if scaler.is_enabled():
        finite_losses = processes.all(finite[: len(losses)])  # gradients do not tell whose it was
        overflow = passed_over & (precision.scale > 1) & finite_losses.all()
        bad = passed_over & ~overflow
    scaler.update()
    if buffers is not None:
        buffers.restore(bad)
    return Outcome(bad, values)
