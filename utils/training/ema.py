"""Exponential moving average of a model's parameters."""

import copy
from operator import attrgetter

import torch

from utils.training.step import is_asynchronous


class EMA:
    """Exponential moving average of the parameters of `model`; `.model` is the averaged copy.

    Buffers are copied; submodules and buffers named in `shared`, which never change, are shared.
    With `warmup` the n-th update keeps at most (n + 1) / (n + 10) of the average, which so is not
    behind while there are few.
    """

    def __init__(self, model, beta, shared=(), warmup=False):
        never_copied = {id(value): value for value in (attrgetter(name)(model) for name in shared)}
        self.model = copy.deepcopy(model, never_copied).requires_grad_(False).eval()
        self.beta, self.warmup = beta, warmup
        # Listed once: walking through the modules takes longer than averaging.
        own = pairs_of(self.model.parameters(), model.parameters())
        self.averages, self.values = (list(tensors) for tensors in zip(*own))
        self.buffers = pairs_of(self.model.buffers(), model.buffers())

    @torch.no_grad()
    def update(self, n, skip=None):
        """average <- beta * average + (1 - beta) * parameter; `n` is the number of the update.

        With `skip`, bool 0-d, nothing changes where it is true.
        """
        if skip is not None and not is_asynchronous(skip.device):
            if skip:
                return
            skip = None
        beta = min(self.beta, (n + 1) / (n + 10)) if self.warmup else self.beta
        if skip is None:
            torch._foreach_lerp_(self.averages, self.values, 1 - beta)
        else:
            move(self.averages, self.values, (1 - beta) * (~skip).float())
        self.copy_buffers()

    @torch.no_grad()
    def copy_buffers(self):
        """Make the buffers those of the model."""
        for average, value in self.buffers:
            average.copy_(value)


def pairs_of(averages, values):
    """The pairs of two iterables of tensors, without those that are one tensor."""
    return [(average, value) for average, value in zip(averages, values) if average is not value]


def move(averages, values, weight):
    """Move each of the tensors `averages` towards its value by a `weight`, 0-d on the device."""
    differences = torch._foreach_sub(values, averages)
    torch._foreach_mul_(differences, weight)
    torch._foreach_add_(averages, differences)
