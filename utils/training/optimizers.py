"""Optimisers and learning rates.

All of them leave everything as it is where their attribute `found_inf`, float32 0-d on the device,
is 1: torch's fused kernels do, and Muon here.

Muon is momentum whose matrices are orthogonalised before they are applied (Jordan et al.,
kellerjordan.github.io/posts/muon; the step's scale is that of Liu et al., arXiv 2502.16982).
torch.optim.Muon computes in bfloat16 on any device, which many CPUs emulate so slowly that it takes
longer than the network; here CPUs do so only where the network does, and GPUs where they have it.
Matrices of one shape go together.
"""

import math

import torch

from utils.training.precision import has_bfloat16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic of Jordan et al.


def orthogonalize(matrices, dtype=torch.float32):
    """Matrices [n, r, c] with their singular values brought near 1, between about 0.7 and 1.2, by
    products of numbers of a `dtype`.

    Five Newton-Schulz iterations X <- aX + b(XX')X + c(XX')^2 X.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype).contiguous()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = torch.bmm(x, x.mT)  # [n, r, r], r the shorter side
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for parameters of two or more
    dimensions, of which all but the first count as one; ValueError for others.

    A step's root mean square is 0.2 lr, about that of AdamW, so AdamW's learning rate serves.
    Products are in bfloat16 where `bfloat16` asks for it.
    """

    found_inf = None

    def __init__(self, parameters, lr=1e-3, momentum=0.95, weight_decay=0.0, bfloat16=False):
        self.bfloat16 = bfloat16
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() < 2:
                    raise ValueError(f"Muon takes matrices, not {list(parameter.shape)}")

    @torch.no_grad()
    def step(self):
        """One update of every parameter that has a gradient, unless `found_inf` is 1."""
        for group in self.param_groups:
            by_shape = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self.update(parameters, group["lr"], group["momentum"], group["weight_decay"])

    def update(self, parameters, lr, momentum, weight_decay):
        """Step parameters of one shape [r, ...], all n of them together."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients, before = torch.stack([p.grad for p in parameters]), torch.stack(buffers)
        average = before.lerp(gradients, 1 - momentum)  # [n, r, ...]
        steps = orthogonalize(  # [n, r, c]
            gradients.lerp(average, momentum).flatten(2),
            torch.bfloat16 if self.bfloat16 else torch.float32,
        )
        steps = steps.mul_(-0.2 * lr * max(steps.shape[1:]) ** 0.5).view_as(average)
        shrink = 1 - lr * weight_decay
        if self.found_inf is not None:
            skip = self.found_inf > 0
            average = torch.where(skip, before, average)
            steps = steps.masked_fill_(skip, 0.0)
            shrink = 1 - lr * weight_decay * (1 - self.found_inf)
        torch._foreach_copy_(buffers, list(average.unbind()))
        if weight_decay:
            torch._foreach_mul_(parameters, shrink)
        torch._foreach_add_(parameters, list(steps.unbind()))


def is_matrix_of_block(name, parameter):
    """Whether Muon is for a parameter of a transformer: a matrix of its blocks."""
    return ".blocks." in f".{name}" and parameter.dim() == 2


def is_inner_convolution(name, parameter):
    """Whether Muon is for a parameter of an autoencoder: a convolution between features, whose
    shorter side as a matrix [out, in·k·k] is more than a few colours."""
    return parameter.dim() == 4 and min(len(parameter), parameter.shape[1]) > 3


def build_optimizer(model, H, takes_muon, dtype=torch.float32):
    """Adam, as published, AdamW, or Muon on those parameters of which `takes_muon(name, parameter)`
    says so and AdamW on the others. `dtype` is that in which the network computes."""
    if H.optimizer == "muon":
        device = next(model.parameters()).device
        bfloat16 = has_bfloat16(device) if device.type == "cuda" else dtype == torch.bfloat16
        return MuonWithAdamW(model, H.lr, H.weight_decay, takes_muon, bfloat16)
    if H.optimizer == "adamw":
        return torch.optim.AdamW(
            model.parameters(), H.lr, weight_decay=H.weight_decay, fused=True
        )
    return torch.optim.Adam(model.parameters(), H.lr, fused=True)


class MuonWithAdamW:
    """One optimiser: Muon on the parameters that `takes_muon` chooses, AdamW on everything else."""

    def __init__(
        self, model, lr, weight_decay=0.0, takes_muon=is_matrix_of_block, bfloat16=False
    ):
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (matrices if takes_muon(name, parameter) else others).append(parameter)
        self.parts = {
            "muon": Muon(matrices, lr, weight_decay=weight_decay, bfloat16=bfloat16),
            "adamw": torch.optim.AdamW(
                others, lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
            ),
        }

    @property
    def param_groups(self):
        """The groups of both, whose settings may be changed in place."""
        return [group for part in self.parts.values() for group in part.param_groups]

    @property
    def state(self):
        """What both keep for each parameter."""
        return {**self.parts["muon"].state, **self.parts["adamw"].state}

    @property
    def found_inf(self):
        return self.parts["adamw"].found_inf

    @found_inf.setter
    def found_inf(self, value):
        for part in self.parts.values():
            part.found_inf = value

    def step(self):
        for part in self.parts.values():
            part.step()

    def zero_grad(self):
        for part in self.parts.values():
            part.zero_grad()

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state):
        """Restore what `state_dict` gave; ValueError for another optimiser's state."""
        if set(state) != set(self.parts):
            raise ValueError("the file holds another optimiser's state")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def learning_rate(H, step, highest=None):
    """The learning rate of a step: linear warm-up over `warmup_iters` to `highest` (None: `lr`),
    then `lr_schedule`."""
    rate = (H.lr if highest is None else highest) * min(1.0, step / max(H.warmup_iters, 1))
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
