"""Neighborhood attention against golden data, a brute-force definition, and natten itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models.neighborhood_attention as module
from helpers import assert_close, golden
from models import HydraNeighborhoodAttention
from models.attention import split_heads
from models.neighborhood_attention import neighborhood_attention_2d


def brute_force(query, key, value, kernel_size, dilation, rpb, scale):
    """The definition, one query at a time."""
    _, height, width, heads, _ = query.shape
    out = torch.zeros_like(value)

    def neighbors(position, length):
        group = list(range(position % dilation, length, dilation))
        start = group.index(position) - kernel_size // 2
        start = min(max(start, 0), len(group) - kernel_size)
        return group[start : start + kernel_size]

    for y in range(height):
        for x in range(width):
            rows, columns = neighbors(y, height), neighbors(x, width)
            keys = key[:, rows][:, :, columns]  # [B, k, k, h, d]
            scores = torch.einsum("bhd,bijhd->bhij", query[:, y, x], keys) * scale
            if rpb is not None:
                dy = [(row - y) // dilation + kernel_size - 1 for row in rows]
                dx = [(column - x) // dilation + kernel_size - 1 for column in columns]
                scores = scores + rpb[:, dy][:, :, dx]
            weights = scores.flatten(2).softmax(-1).view_as(scores)
            values = value[:, rows][:, :, columns]
            out[:, y, x] = torch.einsum("bhij,bijhd->bhd", weights, values)
    return out


@st.composite
def cases(draw):
    kernel = draw(st.sampled_from([1, 3, 5, 7]))
    dilation = draw(st.integers(1, 3))
    side = st.integers(kernel * dilation, kernel * dilation + 5)
    height, width, heads = draw(side), draw(side), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    qkv = torch.randn(3, 2, height, width, heads, 16, generator=generator)
    rpb = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, generator=generator)
    return *qkv, kernel, dilation, rpb


@settings(max_examples=25, deadline=None)
@given(cases(), st.booleans())
def test_dense_is_the_definition(case, with_bias):
    *qkv, kernel, dilation, rpb = case
    rpb = rpb if with_bias else None
    out = neighborhood_attention_2d(*qkv, kernel, dilation, rpb, scale=0.7, backend="dense")
    assert_close(out, brute_force(*qkv, kernel, dilation, rpb, 0.7))


@settings(max_examples=10, deadline=None)
@given(cases())
def test_dense_agrees_with_natten(case):
    natten = pytest.importorskip("natten")
    *qkv, kernel, dilation, _ = case
    if kernel == 1:
        return
    expected = natten.na2d(*qkv, kernel, dilation=dilation)
    assert_close(neighborhood_attention_2d(*qkv, kernel, dilation, backend="dense"), expected)
    assert_close(neighborhood_attention_2d(*qkv, kernel, dilation, backend="natten"), expected)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("kind", ["with_rpb", "without_rpb"])
def test_golden_outputs_and_gradients(index, kind):
    case = golden("neighborhood_attention.pt")[index]
    tensors = {name: case[name].clone().requires_grad_() for name in ("q", "k", "v", "rpb")}
    rpb = tensors["rpb"] if kind == "with_rpb" else None
    out = neighborhood_attention_2d(
        tensors["q"], tensors["k"], tensors["v"], case["kernel_size"], case["dilation"], rpb,
        case["scale"],
    )
    assert_close(out, case[kind]["out"])
    batch, height, width, heads, dim = out.shape
    weights = torch.arange(out.numel(), dtype=torch.float64).sin().float()
    weights = weights.view(batch, heads, height, width, dim).permute(0, 2, 3, 1, 4)
    (out * weights).sum().backward()
    for name in ("q", "k", "v"):
        assert_close(tensors[name].grad, case[kind][f"grad_{name}"])
    if rpb is not None:
        assert_close(rpb.grad, case[kind]["grad_rpb"])


def test_gradcheck_in_float64():
    shape = (1, 5, 4, 2, 3)
    qkv = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    rpb = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *t: neighborhood_attention_2d(*t[:3], 3, 1, t[3]), (*qkv, rpb))


def test_refusals_say_why(monkeypatch):
    qkv = torch.randn(3, 1, 6, 6, 2, 4)
    for arguments, says in [
        (dict(kernel_size=4), "must be odd"),
        (dict(kernel_size=3, dilation=3), "larger than the grid"),
        (dict(kernel_size=3, dilation=0), "dilation must be"),
        (dict(kernel_size=3, rpb=torch.zeros(2, 3, 3)), "rpb must be"),
        (dict(kernel_size=3, rpb=torch.zeros(2, 5, 5), backend="natten"), "no relative"),
        (dict(kernel_size=3, backend="cudnn"), "backend must be one of"),
    ]:
        with pytest.raises(ValueError, match=says):
            neighborhood_attention_2d(*qkv, **arguments)
    with pytest.raises(ValueError, match="backend 'natten' cannot"):  # no kernel for head_dim 4
        neighborhood_attention_2d(*qkv, 3, backend="natten")
    with pytest.raises(ValueError, match="no backward on the CPU"):
        neighborhood_attention_2d(*qkv.requires_grad_(), 3, backend="natten")
    monkeypatch.setattr(module, "natten", None)
    monkeypatch.setattr(module, "NATTEN_PROBLEM", "natten does not import (broken)")
    with pytest.raises(ValueError, match="broken"):
        neighborhood_attention_2d(*qkv, 3, backend="natten")
    assert neighborhood_attention_2d(*qkv, 3).shape == (1, 6, 6, 2, 4)


def test_heads_of_uneven_groups():
    assert split_heads(8, 3) == [2, 3, 3]
    assert split_heads(7, 2) == [3, 4]
    with pytest.raises(ValueError, match="at least 3 heads"):
        split_heads(2, 3)


def test_hydra_groups_are_independent_attentions():
    """Each group equals a brute-force attention of its own heads."""
    torch.manual_seed(0)
    hydra = HydraNeighborhoodAttention(12, [3, 5], 3, dilations=[2, 1])
    x = torch.randn(1, 6, 7, 12)
    q, k, v = hydra.qkv(x).view(1, 6, 7, 3, 3, 4).unbind(3)
    parts = [
        brute_force(q[..., :1, :], k[..., :1, :], v[..., :1, :], 3, 2, hydra.rpb[0], 0.5),
        brute_force(q[..., 1:, :], k[..., 1:, :], v[..., 1:, :], 5, 1, hydra.rpb[1], 0.5),
    ]
    expected = hydra.proj(torch.cat(parts, dim=3).flatten(3))
    assert_close(hydra(x), expected)
