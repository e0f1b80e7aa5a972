"""The transformer: settings that do not fit together, compiled and checkpointed blocks."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from helpers import assert_close
from models import Transformer
from models.prior import transformer

aot_eager = lookup_backend("aot_eager")

SETTINGS = dict(
    sampler="absorbing", attention="hydra", position=["rpb", "absolute"], latent_shape=[1, 8, 8],
    block_size=64, bert_n_emb=32, bert_n_head=4, bert_n_layers=2, kernel_sizes=[3, 7],
    dilations=[1], codebook_size=12, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
)


def build(**changes):
    with torch.device("meta"):
        return Transformer(SimpleNamespace(**SETTINGS | changes))


@pytest.mark.parametrize("changes, message", [
    (dict(sampler="autoregressive"),
     "`sampler` autoregressive needs `attention` full: hydra looks ahead"),
    (dict(attention="full"), "`attention` full has absolute positions only, not rpb absolute"),
    (dict(attention="full", position=["rope"]), "has absolute positions only, not rope"),
    (dict(block_size=63), "`block_size` 63 is not the number of ids of `latent_shape` 1 8 8, 64"),
    (dict(bert_n_head=7), "`bert_n_head` 7 does not divide `bert_n_emb` 32"),
    (dict(bert_n_head=7, attention="full", position=["absolute"]),
     "`bert_n_head` 7 does not divide `bert_n_emb` 32"),
    (dict(kernel_sizes=[3, 5, 7], dilations=[1, 1]),
     "`kernel_sizes` 3 5 7 and `dilations` 1 1 must be equally many, or one of either for all"),
    (dict(kernel_sizes=[3] * 5), "5 groups of `kernel_sizes` and `dilations` need at least 5 "
     "heads, not `bert_n_head` 4"),
    (dict(kernel_sizes=[1], dilations=[1, 2, 3, 4, 5]), "5 groups of `kernel_sizes` and"),
    (dict(attn_pdrop=0.1), "`attn_pdrop` must be 0: hydra attention has no attention dropout"),
    (dict(position=["rope"], bert_n_emb=24), "`position` rope needs `bert_n_emb` / `bert_n_head` "
     "to be a multiple of 4, not 24 / 4"),
    (dict(kernel_sizes=[3, 4]), "`kernel_sizes` must be odd, not 4"),
    (dict(kernel_sizes=[3, 9]), "`kernel_sizes` 9 x `dilations` 1 = 9 is larger than the 8x8 grid"),
    (dict(kernel_sizes=[3, 5], dilations=[1, 2]), "`kernel_sizes` 5 x `dilations` 2 = 10 is "),
    (dict(latent_shape=[1, 6, 16], block_size=96), "= 7 is larger than the 6x16 grid"),
    (dict(dilations=[0]), "`dilations` must be at least 1, not 0"),
])
def test_invalid_settings_raise(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**changes)


def test_one_kernel_serves_several_dilations():
    attn = build(kernel_sizes=[3], dilations=[1, 2]).blocks[0].attn
    assert (attn.kernel_sizes, attn.dilations) == ([3, 3], [1, 2])


def small(position="rope absolute", **changes):
    torch.manual_seed(0)
    settings = SETTINGS | dict(position=position.split()) | changes
    return Transformer(SimpleNamespace(**settings))


def logits_and_gradients(model, ids):
    model.zero_grad()
    logits = model(ids)
    logits.square().mean().backward()
    return [logits.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


CONFIGURATIONS = [
    dict(position="rope absolute"), dict(position="rpb"), dict(position="rpb rope absolute"),
    dict(position="rope absolute", dilations=[2, 1]),
    dict(position="absolute", attention="full"),
    dict(position="absolute", attention="full", sampler="autoregressive"),
]


@pytest.mark.parametrize("changes", CONFIGURATIONS)
def test_compiled_blocks_are_one_graph_that_equals_the_eager_blocks(changes):
    """`fullgraph` raises at a graph break; one graph serves all blocks, forward and backward."""
    torch._dynamo.reset()
    graphs = []

    def compiler(module, inputs):
        graphs.append(module)
        return aot_eager(module, inputs)

    eager, compiled = small(bert_n_layers=3, **changes), small(bert_n_layers=3, **changes)
    compiled.compile_blocks(backend=compiler)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    ids = torch.randint(12, (2, 64 - eager.causal))
    for actual, expected in zip(*(logits_and_gradients(m, ids) for m in (compiled, eager))):
        assert_close(actual, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("position", ["rope absolute", "rpb absolute"])
def test_compiled_blocks_under_autocast(position):
    """In bfloat16, training and then without gradients, as sampling does."""
    torch._dynamo.reset()
    eager, compiled = small(position), small(position)
    compiled.compile_blocks(backend="aot_eager")
    ids = torch.randint(12, (2, 64))
    with torch.autocast("cpu", torch.bfloat16):
        for actual, expected in zip(*(logits_and_gradients(m, ids) for m in (compiled, eager))):
            assert_close(actual, expected, tolerance=0.03)
        where = torch.rand(2, 64) < 0.5
        with torch.inference_mode():
            assert_close(compiled(ids, where=where), eager(ids, where=where), tolerance=0.03)


@pytest.mark.slow
def test_compiled_blocks_with_inductor():
    eager, compiled = small("rope absolute", bert_n_layers=1), small(bert_n_layers=1)
    compiled.compile_blocks()
    ids = torch.randint(12, (2, 64))
    for actual, expected in zip(*(logits_and_gradients(m, ids) for m in (compiled, eager))):
        assert_close(actual, expected)


@pytest.mark.parametrize("changes", CONFIGURATIONS)
def test_checkpointed_blocks_have_equal_gradients(changes):
    """Dropout draws the same noise again."""
    plain = small(resid_pdrop=0.1, **changes).train()
    saving = small(resid_pdrop=0.1, **changes).train()
    saving.checkpoint_blocks = True
    ids = torch.randint(12, (2, 64 - plain.causal))
    calls = []
    saving.blocks[0].ln1.register_forward_hook(lambda *_: calls.append(1))
    results = []
    for model in (plain, saving):
        torch.manual_seed(1)
        results.append(logits_and_gradients(model, ids))
    assert len(calls) == 2  # once more in backward
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    with torch.no_grad():
        saving(ids)
    assert len(calls) == 3


def test_where_computes_only_those_positions():
    model, where = small().eval(), torch.rand(2, 64) < 0.3
    ids = torch.randint(12, (2, 64))
    with torch.no_grad():
        assert_close(model(ids, where=where), model(ids)[where])


def test_a_cpu_takes_few_images_at_a_time_where_nothing_is_learned(monkeypatch):
    model, sizes = small().eval(), []
    model.blocks[0].register_forward_hook(lambda _, inputs, out: sizes.append(len(inputs[0])))
    ids = torch.randint(0, 8, (5, model.grid[0] * model.grid[1]))
    expected = model(ids)
    monkeypatch.setattr(transformer, "IN_CACHE", 2 * ids.shape[1] * model.head.in_features)
    with torch.no_grad():
        where = torch.ones_like(ids, dtype=torch.bool)
        assert_close(model(ids), expected)
        assert_close(model(ids, where=where).view_as(expected), expected)
    assert_close(model(ids), expected)
    assert sizes == [5, 2, 2, 1, 2, 2, 1, 5]


def test_a_cpu_takes_whole_batches_through_compiled_blocks(monkeypatch):
    """A part of a batch would have to be compiled for; a copy of the model has no compiled code."""
    def compiler(module, inputs):
        sizes.update(len(x) for x in inputs if x.dim() == 4)
        return module.forward

    torch._dynamo.reset()
    model, sizes = small().eval(), set()
    ids = torch.randint(0, 8, (5, model.grid[0] * model.grid[1]))
    monkeypatch.setattr(transformer, "IN_CACHE", 2 * ids.shape[1] * model.head.in_features)
    model.compile_blocks(backend=compiler)
    with torch.no_grad():
        compiled = model(ids)
        assert sizes == {5}
        alone, sizes = copy.deepcopy(model), []
        alone.blocks[0].register_forward_hook(lambda _, inputs, out: sizes.append(len(inputs[0])))
        assert_close(alone(ids), compiled)
    assert sizes == [2, 2, 1]
