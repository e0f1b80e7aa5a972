"""What training takes of a GPU's memory, computed: no card is needed, and nothing is trained.

    python benchmarks/gpu_memory.py

Weights, gradients, Adam's two averages and the EMA are counted as they are; what the forward pass
keeps for the backward one is counted on tensors without content (torch's FakeTensorMode), each
storage once, at the moment when there is most. Attention keeps its inputs and outputs, as fused
kernels do. A card takes more: temporary results, cuDNN's workspaces, CUDA itself. Prints a Markdown
table.
"""

import contextlib
import sys
from unittest import mock

import gpu_steps
import torch
from gpu_setup import STAGES, Setup
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from measure import number
from models.prior import attention
from utils.evaluation.experiment import table

MEGABYTE = 2**20
WITHOUT_CONTENT = FakeTensorMode()  # one for all: tables that the models keep are of it
CASES = (  # precision, flags beside the published ones
    ("float32", ""), ("bfloat16", ""), ("bfloat16", "--checkpoint_blocks"),
)


class Kept:
    """Context that follows the bytes of all storages that autograd keeps, but for `known` ones:
    `peak` is the most at once."""

    def __init__(self, known):
        self.known = {address(x) for x in known}
        self.holders, self.bytes, self.peak = {}, 0, 0  # how many hold a storage, by address

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: Held(tensor, self), lambda held: held.tensor
        )
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)


class Held:
    """A tensor that autograd keeps, until the graph lets it go."""

    def __init__(self, tensor, kept):
        self.tensor, self.kept = tensor, kept
        self.address = address(tensor)
        self.size = 0 if self.address in kept.known else tensor.untyped_storage().nbytes()
        holders = kept.holders[self.address] = kept.holders.get(self.address, 0) + 1
        if holders == 1:
            kept.bytes += self.size
            kept.peak = max(kept.peak, kept.bytes)

    def __del__(self):
        self.kept.holders[self.address] -= 1
        if self.kept.holders[self.address] == 0:
            self.kept.bytes -= self.size


def address(tensor):
    """What tells a tensor's storage from any other that is there."""
    return tensor.untyped_storage()._cdata


def fused_attention(query, key, value, groups, tables=None, scale=None, backend=None):
    """What `hydra_attention` keeps where a fused kernel computes it, without its neighborhoods."""
    grid = query.shape[1:3]
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return out.transpose(1, 2).unflatten(1, grid)


def emptied(module, device):
    """The module with new parameters on the device, as `to_empty` makes them."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))
    return module


@contextlib.contextmanager
def adapted():
    """Attention keeps what fused kernels keep; there is no EMA, and modules change their device
    without an exchange of contents: tensors without content can be neither copied so nor moved."""
    with (
        mock.patch.object(gpu_steps, "EMA"),
        mock.patch.object(attention, "hydra_attention", fused_attention),
        mock.patch.object(nn.Module, "to", lambda module, *where, **how: module),
        mock.patch.object(nn.Module, "to_empty", emptied),
    ):
        yield


def bytes_of(parameters):
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def computed(stage, precision, flags=""):
    """{what: bytes} of a training step with the published settings and these flags."""
    if stage == "sampler":
        flags += " --position rope absolute"  # the tables of a bias are small, and not drawn here
    with WITHOUT_CONTENT, adapted():
        step = Setup(torch.device("cpu")).step(stage, precision, flags)
        model, batch = step.model, step.batch
        trained = [p for group in step.all_optimizers for g in group.param_groups
                   for p in g["params"] if p.requires_grad]
        known = [*model.parameters(), *model.buffers(), batch]
        with Kept(known) as kept, step.precision.autocast():
            if stage == "sampler":
                kept_results = model(batch)
            else:
                kept_results = step.ae_loss(batch, step.number, 1.0)
            del kept_results  # the graph lives until here
        weights = bytes_of(model.parameters())
        return {
            "batch": step.H.batch_size, "weights": weights, "gradients": bytes_of(trained),
            "optimiser": 2 * bytes_of(trained), "EMA": bytes_of(trained),
            "kept for the backward pass": kept.peak,
        }


def main():
    rows = []
    for stage in STAGES:
        for precision, flags in CASES:
            found = computed(stage, precision, flags)
            batch = found.pop("batch")
            kept = found.pop("kept for the backward pass")
            fixed = sum(found.values())
            figures = (fixed, kept, kept / batch, fixed + kept)
            rows.append([f"{stage}, {precision} {flags}".strip(), batch,
                         *(number(figure / MEGABYTE) for figure in figures)])
    head = ["", "batch", "weights, gradients, optimiser, EMA, MB", "kept for the backward pass",
            "of it an image", "together"]
    print(table(head, rows))


if __name__ == "__main__":
    sys.exit(main())
