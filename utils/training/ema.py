"""Exponential moving average of a model's parameters."""

import copy

import torch


class EMA:
    """Exponential moving average of a model's parameters; `.model` is the averaged copy.

    Buffers are copied; submodules and buffers named in `shared`, which never change, are shared.
    With `warmup` the n-th update keeps at most (n + 1) / (n + 10) of the average, which so is not
    behind while there are few.
    """

    def __init__(self, model, beta, shared=(), warmup=False):
        never_copied = {id(value): value for value in (getattr(model, name) for name in shared)}
        self.model = copy.deepcopy(model, never_copied).requires_grad_(False).eval()
        self.beta, self.warmup = beta, warmup

    @torch.no_grad()
    def update(self, model, n):
        """average <- beta * average + (1 - beta) * parameter; `n` is the number of the update."""
        beta = min(self.beta, (n + 1) / (n + 10)) if self.warmup else self.beta
        averages, values = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(averages, values, 1 - beta)
        for average, value in zip(self.model.buffers(), model.buffers()):
            average.copy_(value)
