"""Neighborhood attention by FlexAttention: its blocks, and its kernel."""

from functools import partial

import pytest
import torch

from helpers import assert_close
from models import neighborhood_attention
from models.neighborhood_attention import hydra_attention
from models.neighborhoods import flex, geometry
from utils.training.compile import only_compiled


@pytest.mark.parametrize("height, width", [(7, 8), (12, 17), (20, 24)])
def test_flex_blocks_are_those_that_hold_a_neighbor(height, width):
    """Against the dense mask, cut into blocks, in both directions."""
    groups = (geometry.Heads(1, 3, 2), geometry.Heads(2, 7, 1))
    tokens, size = height * width, flex.BLOCK
    (mask,) = geometry.dense_mask(height, width, groups, torch.float32, torch.device("cpu"))
    count = -(-tokens // size)
    padded = torch.zeros(3, count * size, count * size, dtype=torch.bool)
    padded[:, :tokens, :tokens] = mask[0] == 0
    used = padded.view(3, count, size, count, size).any(4).any(2)
    numbers = flex.neighborhood_blocks(height, width, groups, torch.device("cpu"))
    for wanted, number, indices in ((used, *numbers[:2]), (used.mT, *numbers[2:])):
        for head in range(3):
            for row in range(count):
                listed = indices[0, head, row, : number[0, head, row]].tolist()
                assert listed == wanted[head, row].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("compiler", [
    "eager", pytest.param("inductor", marks=pytest.mark.slow),
])
@pytest.mark.parametrize("with_bias", [False, True])
def test_flex_kernel_equals_dense(compiler, with_bias):
    """FlexAttention itself, on several blocks: on a CPU it runs in a compiled graph only."""
    torch.manual_seed(0)
    groups = [(1, 3, 2), (2, 7, 1)]
    qkv = torch.randn(3, 2, 12, 17, 3, 16)
    tables = [torch.randn(1, 5, 5), torch.randn(2, 13, 13)] if with_bias else None

    def attend(qkv):
        return hydra_attention(*qkv, groups, tables, backend="flex")

    expected = hydra_attention(*qkv, groups, tables, backend="dense")
    assert_close(torch.compile(attend, backend=compiler, fullgraph=True)(qkv), expected)


def test_the_kernel_is_compiled_where_nothing_else_is(monkeypatch):
    """As validations forbid it: a batch of another size would have all scores in memory."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with monkeypatch.context() as patched:
        patched.setattr(flex, "fused", lambda x: x + 1)
        patched.setattr(torch, "compile", partial(torch.compile, backend=backend))
        flex.compiled.cache_clear()
        attend = flex.compiled()
    flex.compiled.cache_clear()
    attend(torch.ones(2))
    with only_compiled(True):
        assert attend(torch.ones(3)).tolist() == [2, 2, 2]
    assert len(graphs) == 2


def test_where_the_kernel_does_not_compile_another_backend_attends(monkeypatch):
    """As Triton says it on GPUs with little shared memory."""
    def fail(*arguments):
        raise RuntimeError("No valid triton configs. out of resource: shared memory")

    monkeypatch.setattr(neighborhood_attention, "fastest_backend", lambda *_: (
        "tiled" if flex.flex_problem(qkv[0]) else "flex"))
    monkeypatch.setattr(flex, "FLEX_PROBLEM", None)
    monkeypatch.setattr(flex, "unfused", fail)
    torch.manual_seed(0)
    qkv, groups = torch.randn(3, 1, 8, 8, 2, 16), [(2, 3, 1)]
    expected = hydra_attention(*qkv, groups, backend="dense")
    with pytest.warns(UserWarning, match="does not compile here .No valid triton configs.*another"):
        assert_close(hydra_attention(*qkv, groups), expected)
    assert_close(hydra_attention(*qkv, groups), expected)  # not tried again
    assert "out of resource" in flex.flex_problem(qkv[0])
