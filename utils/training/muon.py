"""Muon: momentum whose matrices are orthogonalised before they are applied.

Jordan et al., kellerjordan.github.io/posts/muon; the step's scale is that of Liu et al.,
arXiv 2502.16982. torch.optim.Muon computes the same in bfloat16 on any device, which CPUs without
bfloat16 units emulate so slowly that the optimiser takes longer than the network; here CPUs
compute in float32, and matrices of one shape are orthogonalised together.
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, chosen by Jordan et al.


def orthogonalize(matrices, iterations=5):
    """Matrices [n, r, c] with their singular values brought near 1, between about 0.7 and 1.2.

    Newton-Schulz iteration X <- aX + b(XX')X + c(XX')^2 X; float32 on the CPU, bfloat16 elsewhere.
    """
    a, b, c = COEFFICIENTS
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        square = x @ x.mT  # [n, r, r], r the shorter side
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for parameters that are matrices.

    A step's root mean square is 0.2 lr, as large as AdamW's typically is, so a learning rate for
    AdamW serves. Raises ValueError for a parameter that is no matrix.
    """

    def __init__(self, parameters, lr=1e-3, momentum=0.95, weight_decay=0.0):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(f"Muon takes matrices, not {list(parameter.shape)}")

    @torch.no_grad()
    def step(self):
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self.update(parameters, **{k: v for k, v in group.items() if k != "params"})

    def update(self, parameters, lr, momentum, weight_decay):
        """Step parameters of one shape [r, c]."""
        directions = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            directions.append(parameter.grad.lerp(buffer, momentum))
        steps = orthogonalize(torch.stack(directions))  # [n, r, c]
        scale = 0.2 * max(parameters[0].shape) ** 0.5
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, list(steps.unbind(0)), alpha=-lr * scale)


class MuonWithAdamW:
    """Muon on the matrices of a transformer's blocks, AdamW on everything else.

    One learning rate serves both, and to its users, the gradient scaler among them, the pair is
    one optimiser.
    """

    def __init__(self, model, lr, weight_decay=0.0):
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_matrix = ".blocks." in f".{name}" and parameter.dim() == 2
                (matrices if is_matrix else others).append(parameter)
        self.parts = {
            "muon": Muon(matrices, lr=lr, weight_decay=weight_decay),
            "adamw": torch.optim.AdamW(
                others, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay
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

    def step(self):
        """One step of both."""
        for part in self.parts.values():
            part.step()

    def zero_grad(self):
        """Forget the gradients."""
        for part in self.parts.values():
            part.zero_grad()

    def state_dict(self):
        """The state of both, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state):
        """Restore what `state_dict` gave; ValueError for another optimiser's state."""
        if set(state) != set(self.parts):
            raise ValueError("the file holds another optimiser's state")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
