"""Neighborhood attention against golden data, a brute-force definition, and natten itself."""

import contextlib
import weakref

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from neighborhood_reference import brute_force

import models.neighborhood_attention as module
from helpers import assert_close, golden
from models.neighborhood_attention import hydra_attention, neighborhood_attention_2d
from models.neighborhoods import flex, geometry
from models.prior.attention import rotary_tables, rotate

OURS = ["tiled", "dense", "flex"]


@st.composite
def cases(draw):
    kernel = draw(st.sampled_from([1, 3, 5, 7]))
    dilation = draw(st.integers(1, 3))
    side = st.integers(kernel * dilation, kernel * dilation + 12)  # one tile to several
    height, width, heads = draw(side), draw(side), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    qkv = torch.randn(3, 2, height, width, heads, 16, generator=generator)
    rpb = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, generator=generator)
    return *qkv, kernel, dilation, rpb


@pytest.mark.parametrize("backend", OURS)
@settings(max_examples=25, deadline=None)
@given(case=cases(), with_bias=st.booleans())
def test_equals_brute_force(backend, case, with_bias):
    *qkv, kernel, dilation, rpb = case
    rpb = rpb if with_bias else None
    out = neighborhood_attention_2d(*qkv, kernel, dilation, rpb, scale=0.7, backend=backend)
    assert_close(out, brute_force(*qkv, kernel, dilation, rpb, 0.7))


@settings(max_examples=15, deadline=None)
@given(cases())
def test_agrees_with_natten(case):
    natten = pytest.importorskip("natten")
    *qkv, kernel, dilation, _ = case
    assume(kernel > 1)
    expected = natten.na2d(*qkv, kernel, dilation=dilation)
    for backend in (*OURS, "natten"):
        assert_close(neighborhood_attention_2d(*qkv, kernel, dilation, backend=backend), expected)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("kind", ["with_rpb", "without_rpb"])
@pytest.mark.parametrize("backend", OURS)
def test_golden_outputs_and_gradients(index, kind, backend):
    case = golden("neighborhood_attention.pt")[index]
    tensors = {name: case[name].clone().requires_grad_() for name in ("q", "k", "v", "rpb")}
    rpb = tensors["rpb"] if kind == "with_rpb" else None
    out = neighborhood_attention_2d(
        tensors["q"], tensors["k"], tensors["v"], case["kernel_size"], case["dilation"], rpb,
        case["scale"], backend,
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


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dilation", [1, 2])
def test_gradcheck_in_float64(backend, dilation):
    shape = (1, 9, 10, 2, 2)  # more than one tile, of which the last is not whole
    qkv = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    rpb = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)

    def attend(*tensors, table=None):
        return neighborhood_attention_2d(*tensors, 3, dilation, table, backend=backend)

    torch.autograd.gradcheck(attend, qkv, fast_mode=True)
    torch.autograd.gradcheck(lambda *t: attend(*t[:3], table=t[3]), (*qkv, rpb), fast_mode=True)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_half_precision(backend, dtype, with_bias):
    """Outputs and gradients near those of float32, with tables of float32 or of the same type."""
    torch.manual_seed(0)
    qkv, rpb = torch.randn(3, 2, 18, 17, 2, 16), torch.randn(2, 9, 9)
    results = []
    for type_, table_type in [(torch.float32,) * 2, (dtype, dtype), (dtype, torch.float32)]:
        inputs = [qkv.to(type_).requires_grad_()]
        if with_bias:
            inputs.append(rpb.to(table_type).requires_grad_())
        out = neighborhood_attention_2d(*inputs[0], 5, 2, *inputs[1:], backend=backend)
        assert out.dtype == type_
        gradients = torch.autograd.grad(out.float().square().sum(), inputs)
        results.append((out, *gradients))
    for result in results[1:]:
        for actual, expected in zip(result, results[0]):
            assert_close(actual, expected, tolerance=0.03)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("tile", [2, 3, 4])
def test_tiles_hold_the_keys_that_their_queries_attend_to(kernel, dilation, tile):
    """Every length: what the few kinds of blocks say is what the definition says."""
    for length in range(kernel * dilation, kernel * dilation + 26):
        axis = geometry.tiled_axis(length, kernel, dilation, tile, torch.device("cpu"))
        keys = torch.arange(length)[None] if axis.keys is None else axis.keys
        keys = keys.view(axis.tiles, axis.window, axis.groups)
        for position in range(length):
            group = list(range(position % dilation, length, dilation))
            first = min(max(group.index(position) - kernel // 2, 0), len(group) - kernel)
            member, block = divmod(position, dilation)
            offset = axis.offset[axis.kind[member // tile * dilation + block]][member % tile]
            seen = offset >= 0
            attended = keys[member // tile, seen, block].tolist()
            assert attended == group[first : first + kernel]
            distance = [(key - position) // dilation + kernel - 1 for key in attended]
            assert offset[seen].tolist() == distance


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_compiles_without_graph_breaks(backend, with_bias):
    """The graph is whole in both directions; that inductor's kernels run is in the slow tests."""
    check_compiled(backend, with_bias, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", OURS)
def test_compiles_with_inductor(backend):
    check_compiled(backend, True, "inductor")


def check_compiled(backend, with_bias, compiler):
    qkv = torch.randn(3, 1, 18, 17, 2, 8, requires_grad=True)
    rpb = torch.randn(2, 9, 9, requires_grad=True) if with_bias else None

    def attend(qkv, rpb):
        return neighborhood_attention_2d(*qkv, 5, 2, rpb, backend=backend)

    inputs = [tensor for tensor in (qkv, rpb) if tensor is not None]
    outs, gradients = [], []
    for function in (attend, torch.compile(attend, backend=compiler, fullgraph=True)):
        outs.append(function(qkv, rpb))
        gradients.append(torch.autograd.grad(outs[-1].square().sum(), inputs))
    assert_close(outs[1], outs[0])
    for actual, expected in zip(gradients[1], gradients[0]):
        assert_close(actual, expected)


@pytest.mark.parametrize("backend", OURS)
def test_grids_cached_in_inference_mode_work_in_training(backend):
    geometry.cut_grid.cache_clear()
    geometry.CACHE.clear()
    qkv = torch.randn(3, 1, 12, 18, 1, 4, requires_grad=True)
    rpb = torch.randn(1, 5, 5, requires_grad=True)
    for table in (None, rpb):
        for context in (torch.inference_mode(), contextlib.nullcontext()):
            with context:
                out = neighborhood_attention_2d(*qkv, 3, rpb=table, backend=backend)
        out.sum().backward()


def test_masks_of_many_sizes_take_no_more_memory_than_allowed(monkeypatch):
    """The last used stay; one that is larger than the limit is kept until the next."""
    monkeypatch.setattr(geometry, "CACHE_BYTES", 100_000)
    geometry.CACHE.clear()
    there, groups = [], (geometry.Heads(1, 3, 1),)

    def mask_of(side):
        return geometry.dense_mask(side, side, groups, torch.float32, torch.device("cpu"))[0]

    for side in (4, 8, 12, 11, 8, 10, 20, 9):  # 80 kB and more from 12 on
        there.append(weakref.ref(mask_of(side)))
        alive = {id(mask()): mask().nbytes for mask in there if mask() is not None}
        assert len(alive) == 1 or sum(alive.values()) <= 100_000
        assert mask_of(side) is there[-1]()
    assert there[4]() is None and there[6]() is None and there[7]() is not None
    geometry.CACHE.clear()


def test_all_constants_together_take_no_more_memory_than_allowed(monkeypatch):
    monkeypatch.setattr(geometry, "CACHE_BYTES", 100_000)
    geometry.CACHE.clear()
    zeros = geometry.constant(lambda size: (torch.zeros(size),))
    ones = geometry.constant(lambda size: (torch.ones(size),))
    first, second = weakref.ref(zeros(15_000)[0]), weakref.ref(ones(15_000)[0])
    assert first() is None and ones(15_000)[0] is second()
    small = zeros(5_000)[0]
    assert zeros(5_000)[0] is small and ones(15_000)[0] is second()
    geometry.CACHE.clear()


@pytest.mark.parametrize("backend", ["tiled", "dense"])
def test_fake_tensors_leave_the_caches_alone(backend):
    """Two simulated GPUs one after the other, and a real call after them."""
    def attend(device):
        qkv = torch.ones(3, 1, 12, 18, 1, 4, device=device)
        out = neighborhood_attention_2d(*qkv, 3, backend=backend)
        tables = rotary_tables(12, 18, 4, qkv.device)
        return rotate(out[:, :, :, None], tables)

    for device in ("cpu", "cuda", "cuda"):
        with torch._subclasses.FakeTensorMode():
            assert attend(device).device.type == device
    assert attend("cpu").sum().isfinite()


def test_falls_back_where_natten_has_no_kernel(monkeypatch):
    """What a GPU without the right kernel does, on a CPU: natten is asked and refuses."""
    qkv = torch.randn(3, 1, 6, 6, 2, 16)
    expected = neighborhood_attention_2d(*qkv, 3)

    class Natten:
        asked = 0

        def na2d(self, *arguments, **options):
            self.asked += 1
            raise NotImplementedError("no kernel for this")

    stand_in = Natten()
    monkeypatch.setattr(module, "natten", stand_in)
    monkeypatch.setattr(module, "prefers_natten", lambda device: True)
    assert torch.equal(neighborhood_attention_2d(*qkv, 3), expected) and stand_in.asked == 1
    with pytest.raises(ValueError, match="no kernel for this"):
        neighborhood_attention_2d(*qkv, 3, backend="natten")


@pytest.mark.parametrize("groups, side, expected", [
    ([(8, 7, 1)], 16, "dense"), ([(8, 7, 1)], 32, "tiled"), ([(8, 3, 1)], 8, "dense"),
    ([(8, 3, 1)], 16, "tiled"), ([(8, 7, 2)], 16, "tiled"),
    ([(4, 3, 1), (4, 7, 1)], 16, "dense"), ([(4, 3, 1), (4, 7, 1)], 32, "tiled"),
])
def test_small_grids_are_attended_to_at_once_on_a_cpu(groups, side, expected):
    """Small against the windows of all heads: one call of a Hydra layer's two neighborhoods."""
    groups = [geometry.Heads(*group) for group in groups]
    heads = sum(group.count for group in groups)
    query = torch.empty(1, side, side, heads, 4)
    assert module.fastest_backend(query, groups, biased=False) == expected


@pytest.mark.parametrize("side, dim, biased, problem, expected", [
    (64, 32, False, None, "flex"), (32, 32, False, None, "dense"), (16, 32, True, None, "dense"),
    (64, 32, True, None, "tiled"), (64, 32, False, "no compiler", "tiled"),
    (64, 24, False, None, "tiled"), (64, 8, False, None, "tiled"),
])
def test_backend_on_cuda_follows_its_own_rule(monkeypatch, side, dim, biased, problem, expected):
    """On fake tensors: flex on large grids without a bias, where its kernels take the heads."""
    monkeypatch.setattr(flex, "compiler_problem", lambda kind: problem)
    with torch._subclasses.FakeTensorMode():
        query = torch.empty(1, side, side, 8, dim, device="cuda")
        groups = [geometry.Heads(8, 7, 1)]
        assert module.fastest_backend(query, groups, biased) == expected


def test_memory_of_tiles_is_linear():
    """The largest tensors, scores and bias, grow with the tokens; what is cached hardly grows."""
    scores, cached = [], []
    for side in (32, 64, 128):
        _, _, kind, mask = geometry.cut_grid(side, side, 7, 2, (4, 8), torch.device("cpu"))
        scores.append(len(kind) * mask[0].numel())
        cached.append(mask.numel())
    assert scores[2] == 4 * scores[1] and scores[1] <= 4 * scores[0]
    assert cached[2] == cached[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", [None, *OURS])
def test_on_a_gpu(backend):
    """With natten's kernels where they are (None), and without."""
    torch.manual_seed(0)
    qkv = torch.randn(3, 2, 20, 24, 2, 32)
    results = []
    for device in ("cpu", "cuda"):
        leaf = qkv.to(device).requires_grad_()
        chosen = "tiled" if device == "cpu" else backend
        out = neighborhood_attention_2d(*leaf, 7, 2, backend=chosen)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for actual, expected in zip(results[1], results[0]):
        assert_close(actual.cpu(), expected, tolerance=1e-3)


def test_invalid_arguments_raise(monkeypatch):
    pytest.importorskip("natten")
    qkv = torch.randn(3, 1, 6, 6, 2, 4)
    for arguments, says in [
        (dict(kernel_size=4), "must be odd"),
        (dict(kernel_size=(3, 3)), "must be integers"),
        (dict(kernel_size=3, dilation=3), "= 9 is larger than the 6x6 grid"),
        (dict(kernel_size=3, dilation=0), "`dilation` must be"),
        (dict(kernel_size=3, rpb=torch.zeros(2, 3, 3)), "`rpb` must be"),
        (dict(kernel_size=3, rpb=torch.zeros(2, 5, 5), backend="natten"), "no relative"),
        (dict(kernel_size=3, backend="cudnn"), "`backend` must be one of"),
    ]:
        with pytest.raises(ValueError, match=says):
            neighborhood_attention_2d(*qkv, **arguments)
    with pytest.raises(ValueError, match="`backend` 'natten' cannot"):  # no kernel for head_dim 4
        neighborhood_attention_2d(*qkv, 3, backend="natten")
    query, key, value = qkv
    value = value.clone().requires_grad_()
    with pytest.raises(ValueError, match="no backward on the CPU"):
        neighborhood_attention_2d(query, key, value, 3, backend="natten")
    for key, says in [(qkv[1, :, :5], "must be equal"), (qkv[1].double(), "differ in type")]:
        with pytest.raises(ValueError, match=says):
            neighborhood_attention_2d(query, key, key, 3)
    monkeypatch.setattr(module, "natten", None)
    monkeypatch.setattr(module, "NATTEN_PROBLEM", "natten does not import (broken)")
    with pytest.raises(ValueError, match="broken"):
        neighborhood_attention_2d(*qkv, 3, backend="natten")
    assert neighborhood_attention_2d(*qkv, 3).shape == (1, 6, 6, 2, 4)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_groups_of_heads_are_independent_attentions(backend, with_bias):
    """Groups of 1, 2 and 2 heads, two of them with equal neighborhoods, gradients included."""
    torch.manual_seed(0)
    groups = [(1, 3, 1), (2, 5, 1), (2, 3, 1)]
    qkv = torch.randn(3, 2, 6, 7, 5, 4, requires_grad=True)
    tables = [torch.randn(n, 2 * k - 1, 2 * k - 1, requires_grad=True) for n, k, _ in groups]
    heads, leaves = [], [qkv, *tables] if with_bias else [qkv]
    for (count, kernel, dilation), table, last in zip(groups, tables, (1, 3, 5)):
        parts = qkv[..., last - count : last, :].unbind(0)
        table = table if with_bias else None
        heads.append(brute_force(*parts, kernel, dilation, table, 0.5))
    expected = torch.cat(heads, dim=3)
    out = hydra_attention(*qkv, groups, tables if with_bias else None, 0.5, backend)
    assert_close(out, expected)
    weights = torch.randn_like(out)
    gradients = (torch.autograd.grad((x * weights).sum(), leaves) for x in (out, expected))
    for actual, wanted in zip(*gradients, strict=True):
        assert_close(actual, wanted)


def test_tiles_of_equal_groups_are_computed_together(monkeypatch):
    calls = []
    attend = module.tiled_attention

    def counted(query, key, value, kernel, *rest):
        calls.append((kernel, query.shape[3]))
        return attend(query, key, value, kernel, *rest)

    monkeypatch.setattr(module, "tiled_attention", counted)
    groups = [(1, 3, 1), (2, 5, 1), (2, 3, 1)]
    hydra_attention(*torch.randn(3, 1, 6, 7, 5, 4), groups, backend="tiled")
    assert calls == [(3, 3), (5, 2)]
