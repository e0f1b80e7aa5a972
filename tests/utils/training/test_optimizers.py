"""Our Muon is torch's, computed in another precision."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from utils.training import optimizers
from utils.training.optimizers import Muon, build_optimizer, is_inner_convolution, orthogonalize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_brings_singular_values_near_one(dtype):
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 48, 16), (2, 16, 48)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), dtype))
        assert values.min() > 0.3 and values.max() < 1.3


@pytest.mark.parametrize("bfloat16", [False, True])
def test_muon_agrees_with_torch(bfloat16):
    torch.manual_seed(0)
    shapes = [(16, 16), (48, 16), (16, 48), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = Muon(ours, lr=0.1, weight_decay=0.05, bfloat16=bfloat16)
    reference = torch.optim.Muon(
        theirs, lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    start = [p.detach().clone() for p in ours]
    for _ in range(4):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    for one, other, before in zip(ours, theirs, start):
        moved = (other - before).norm()
        assert (one - other).norm() < 0.03 * moved  # torch rounds to bfloat16


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="takes matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("device, dtype, has_bfloat16, expected", [
    ("cpu", torch.float32, True, False), ("cpu", torch.bfloat16, True, True),
    ("cuda", torch.float32, True, True), ("cuda", torch.float16, False, False),
])
def test_muon_multiplies_bfloat16_where_it_pays(device, dtype, has_bfloat16, expected, monkeypatch):
    """On CPUs where the network does, on GPUs that have it."""
    monkeypatch.setattr(optimizers, "has_bfloat16", lambda device: has_bfloat16)
    H = SimpleNamespace(optimizer="muon", lr=1e-3, weight_decay=0.0)
    with FakeTensorMode():
        model = torch.nn.Conv2d(8, 8, 3, device=device)
        optimizer = build_optimizer(model, H, is_inner_convolution, dtype)
    assert optimizer.parts["muon"].bfloat16 is expected
