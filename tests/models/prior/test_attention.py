"""Hydra attention: its groups of heads, against brute force, and its rotary positions."""

import pytest
import torch
from neighborhood_reference import brute_force

from helpers import assert_close
from models import HydraNeighborhoodAttention
from models.prior.attention import match_groups, rotary_tables, rotate, split_heads


def test_heads_of_uneven_groups():
    assert split_heads(8, 3) == [2, 3, 3]
    assert split_heads(7, 2) == [3, 4]
    with pytest.raises(ValueError, match="at least 3 heads"):
        split_heads(2, 3)


def test_match_groups_repeats_a_single_value():
    assert match_groups(3, 1) == ([3], [1])
    assert match_groups(7, (1, 2)) == ([7, 7], [1, 2])
    assert match_groups([3, 5, 7], 2) == ([3, 5, 7], [2, 2, 2])
    assert match_groups((3, 5), [2, 1]) == ([3, 5], [2, 1])
    for kernel_sizes, dilations in [([3, 5], [1, 2, 1]), ([3, 5, 7], [1, 1]), ([], [1])]:
        with pytest.raises(ValueError, match="must be equally many, or one of either"):
            match_groups(kernel_sizes, dilations)


@pytest.mark.parametrize("kernel_sizes, dilations, groups", [
    ([3], [1, 2, 3], [(3, 1), (3, 2), (3, 3)]),
    (3, (2, 1), [(3, 2), (3, 1)]),
    ([3, 5], 2, [(3, 2), (5, 2)]),
    (5, 1, [(5, 1)]),
])
def test_hydra_with_one_value_for_all_groups(kernel_sizes, dilations, groups):
    """Against a brute-force attention of each group, and against both lists written out."""
    torch.manual_seed(0)
    hydra = HydraNeighborhoodAttention(16, kernel_sizes, 4, dilations=dilations)
    x = torch.randn(1, 10, 11, 16)
    q, k, v = hydra.qkv(x).view(1, 10, 11, 3, 4, 4).unbind(3)
    outs, first = [], 0
    for (kernel, dilation), table in zip(groups, hydra.rpb, strict=True):
        heads = slice(first, first + len(table))
        parts = (part[..., heads, :] for part in (q, k, v))
        outs.append(brute_force(*parts, kernel, dilation, table, 0.5))
        first += len(table)
    assert_close(hydra(x), hydra.proj(torch.cat(outs, dim=3).flatten(3)))
    kernels, spread = zip(*groups)
    written_out = HydraNeighborhoodAttention(16, kernels, 4, dilations=spread)
    written_out.load_state_dict(hydra.state_dict())
    assert torch.equal(written_out(x), hydra(x))


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


def test_rotary_products_depend_on_the_distance_only():
    torch.manual_seed(0)
    query, key = torch.randn(2, 8, dtype=torch.float64)
    tables = [table.double() for table in rotary_tables(9, 9, 8, torch.device("cpu"))]
    turned = [rotate(x.expand(1, 9, 9, 1, 1, 8), tables)[0, :, :, 0, 0] for x in (query, key)]
    products = torch.einsum("yxe,vwe->yxvw", *turned)
    assert_close(products[2, 3, 4, 1], products[5, 7, 7, 5])  # both (2, -2) apart
    assert (products[2, 3, 4, 1] - products[2, 3, 4, 2]).abs() > 1e-3
    assert_close(turned[0].norm(dim=-1), query.norm().expand(9, 9))
    assert rotate(query.bfloat16().expand(1, 9, 9, 1, 1, 8), tables).dtype == torch.bfloat16


def test_rotation_gradients():
    tables = [table.double() for table in rotary_tables(2, 3, 8, torch.device("cpu"))]
    x = torch.randn(1, 2, 3, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, tables), x)
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, tables), x)


@pytest.mark.parametrize("options", [dict(rpb=True), dict(rpb=False, rope=True)])
def test_hydra_is_translation_equivariant_away_from_borders(options):
    torch.manual_seed(0)
    hydra = HydraNeighborhoodAttention(16, [3, 5], 2, dilations=[2, 1], **options).double()
    x = torch.randn(1, 20, 20, 16, dtype=torch.float64)
    shifted = x.roll((3, 2), dims=(1, 2))
    expected = hydra(x).roll((3, 2), dims=(1, 2))
    margin = slice(6, -6)  # the reach of 2 tokens, and what the roll brought round
    assert_close(hydra(shifted)[:, margin, margin], expected[:, margin, margin])


def test_hydra_rope_equals_complex_rotation():
    """Against complex numbers: pair i of the channels is turned by its angle."""
    torch.manual_seed(0)
    hydra = HydraNeighborhoodAttention(16, [3], 2, rpb=False, rope=True)
    x = torch.randn(1, 6, 7, 16)
    qkv = hydra.qkv(x).view(1, 6, 7, 3, 2, 8).unbind(3)
    place = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(7), indexing="ij"), dim=-1)
    angle = (place[..., None] * torch.tensor([1.0, 0.1])).flatten(2)  # frequencies 100^(-i/2)
    turn = torch.polar(torch.ones_like(angle), angle)[:, :, None]
    turned = [torch.complex(part[..., :4], part[..., 4:]) * turn for part in qkv[:2]]
    query, key = (torch.cat((part.real, part.imag), dim=-1) for part in turned)
    expected = brute_force(query, key, qkv[2], 3, 1, None, 8**-0.5)
    assert_close(hydra(x), hydra.proj(expected.flatten(3)))
    with pytest.raises(ValueError, match="a multiple of 4, not 12 / 2"):
        HydraNeighborhoodAttention(12, [3], 2, rope=True)
