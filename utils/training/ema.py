"""Exponential moving average of a model's parameters."""

import copy

import torch


class EMA:
    """Exponential moving average of a model's parameters; `.model` is the averaged copy.

    Buffers are copied; submodules and buffers named in `shared`, which never change, are shared.
    """

    def __init__(self, model, beta, shared=()):
        never_copied = {id(getattr(model, name)): getattr(model, name) for name in shared}
        self.model = copy.deepcopy(model, never_copied).requires_grad_(False).eval()
        self.beta = beta

    @torch.no_grad()
    def update(self, model):
        """average <- beta * average + (1 - beta) * parameter."""
        averages, values = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(averages, values, 1 - self.beta)
        for average, value in zip(self.model.buffers(), model.buffers()):
            average.copy_(value)
