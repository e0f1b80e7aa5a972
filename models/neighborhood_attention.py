"""2-D neighborhood attention (Hassani et al., arXiv 2204.07143; dilated: 2209.15001).

A query at (y, x) attends to exactly k*k keys: in each axis, among the positions congruent to its
own modulo the dilation d, the k consecutive ones centred on it, shifted inward at the borders.
The optional relative positional bias is a table [heads, 2k-1, 2k-1] whose entry
[dy/d + k-1, dx/d + k-1] is added to the scaled score of the key at offset (dy, dx).

Four backends compute it:

- `natten`: the fused kernels of the natten package; no bias; on a CPU forward only, and slow;
- `flex`: torch's FlexAttention, one fused kernel for all heads, with a bias or without; it is
  compiled on CUDA, and on a CPU there for comparison only;
- `tiled`: plain PyTorch on any device, its time and memory linear in the number of tokens;
- `dense`: one attention of the whole grid under a mask, the fastest on small grids.

`natten` and `tiled` attend once for each pair of kernel and dilation, `flex` and `dense` once for
all heads. Without a backend, `fastest_backend` picks one. Only this file imports natten.

Shapes: B batch, H W grid, h heads, e head_dim.
"""

import torch

from models.neighborhoods.flex import flex_attend, flex_attend_if_it_compiles, flex_problem
from models.neighborhoods.geometry import Heads
from models.neighborhoods.masked import dense_attention, tile_shape, tiled_attention

NATTEN_PROBLEM = None
try:
    import natten
except Exception as error:  # a build for another torch fails with more than ImportError
    natten, NATTEN_PROBLEM = None, f"natten does not import ({error})"

BACKENDS = ("natten", "flex", "tiled", "dense")

# `tiled` is faster than `dense` where the grid is larger than so many windows: measured by
# benchmarks/neighborhood_attention.py on CPU cores, by benchmarks/gpu.py on an H200 in bfloat16,
# as is from how many tokens on `flex` is the fastest there.
CPU_WINDOWS = 3
CPU_BFLOAT16_WINDOWS = 4
CUDA_WINDOWS = 32
CUDA_WINDOWS_WITH_BIAS = 12
FLEX_TOKENS = 64 * 64


def check_neighborhood(height, width, kernel_size, dilation):
    """Raise ValueError when a kernel with this dilation does not fit the grid."""
    if not (isinstance(kernel_size, int) and isinstance(dilation, int)):
        raise ValueError(f"`kernel_size` {kernel_size} and `dilation` {dilation} must be integers")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"`kernel_size` must be odd, not {kernel_size}")
    if dilation < 1:
        raise ValueError(f"`dilation` must be at least 1, not {dilation}")
    if kernel_size * dilation > min(height, width):
        raise ValueError(
            f"`kernel_size` {kernel_size} x `dilation` {dilation} = {kernel_size * dilation} is "
            f"larger than the {height}x{width} grid"
        )


def check_tensors(query, key, value, groups, tables):
    """Raise ValueError for tensors that do not match each other or `groups` of Heads."""
    if query.dim() != 5 or not query.shape == key.shape == value.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"`query`, `key` and `value` must be equal [B, H, W, h, e], not {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"`query`, `key` and `value` differ in type: {query.dtype}, {key.dtype}, {value.dtype}"
        )
    _, height, width, heads, _ = query.shape
    for group in groups:
        check_neighborhood(height, width, group.kernel_size, group.dilation)
    if sum(group.count for group in groups) != heads:
        raise ValueError(f"`groups` have {sum(group.count for group in groups)} heads, not {heads}")
    for group, table in zip(groups, tables or []):
        side = 2 * group.kernel_size - 1
        if table.shape != (group.count, side, side):
            raise ValueError(
                f"`rpb` must be {(group.count, side, side)} here, not {tuple(table.shape)}"
            )


def natten_problem(query, key, value, rpb, kernel_size):
    """Why natten cannot do this call, as a sentence; None when it can."""
    if natten is None:
        return NATTEN_PROBLEM
    if rpb is not None:
        return "natten's fused kernels have no relative positional bias"
    if kernel_size == 1:
        return "natten has no kernel of size 1"
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.device.type == "cpu" and differentiated:
        return "natten has no backward on the CPU"
    if query.device.type == "cuda" and not natten.HAS_LIBNATTEN:
        return "this natten was built without its CUDA library"
    return None


def dense_is_faster(height, width, groups, biased, windows):
    """Whether one attention of the whole grid costs less than tiles, whose keys count `windows`
    times; `groups` are those that `dense` computes at once."""
    dense = tiled = 0
    for count, kernel_size, dilation in groups:
        tile = tile_shape(kernel_size, biased)
        window_height = min(tile[0] + kernel_size - 1, -(-height // dilation))
        window_width = min(tile[1] + kernel_size - 1, -(-width // dilation))
        tiled += count * windows * window_height * window_width
        dense += count * height * width
    return dense < tiled


def prefers_natten(device):
    """Whether natten is tried first; on CPUs it is slow."""
    return device.type == "cuda"


def fastest_backend(query, groups, biased):
    """The backend for `groups` of Heads where natten is not taken: `dense` on small grids and
    `tiled` on others. On CUDA `flex` from FLEX_TOKENS tokens on, unless there is a `flex_problem`,
    or a bias, whose gradient it adds up slowly and in no fixed order.
    """
    _, height, width, _, _ = query.shape
    if query.device.type == "cuda":
        if height * width >= FLEX_TOKENS:
            return "tiled" if biased or flex_problem(query) else "flex"
        windows = CUDA_WINDOWS_WITH_BIAS if biased else CUDA_WINDOWS
    else:
        windows = CPU_BFLOAT16_WINDOWS if query.dtype == torch.bfloat16 else CPU_WINDOWS
    return "dense" if dense_is_faster(height, width, groups, biased, windows) else "tiled"


def natten_attention(query, key, value, groups, tables, scale):
    """Attention by natten; raises NotImplementedError, with the problem, where it cannot."""
    for group in groups:
        problem = natten_problem(query, key, value, tables, group.kernel_size)
        if problem:
            raise NotImplementedError(problem)

    def attend(query, key, value, kernel_size, dilation, rpb, scale):
        return natten.na2d(query, key, value, kernel_size, dilation=dilation, scale=scale)

    return by_neighborhood(attend, query, key, value, groups, tables, scale)


def by_neighborhood(attend, query, key, value, groups, tables, scale):
    """`attend` (query, key, value, kernel_size, dilation, rpb, scale) for each kernel and dilation,
    groups of equal ones together; other arguments as of `hydra_attention`."""
    if len(groups) == 1:
        return attend(query, key, value, *groups[0][1:], tables and tables[0], scale)
    counts = [group.count for group in groups]
    parts = [part.split(counts, dim=3) for part in (query, key, value)]
    together = {}  # (kernel, dilation) to the groups that share it
    for index, group in enumerate(groups):
        together.setdefault(group[1:], []).append(index)
    outs = {}
    for neighborhood, indices in together.items():
        heads = [concatenate([part[index] for index in indices], dim=3) for part in parts]
        table = tables and concatenate([tables[index] for index in indices], dim=0)
        out = attend(*heads, *neighborhood, table, scale)
        outs.update(zip(indices, out.split([counts[index] for index in indices], dim=3)))
    return concatenate([outs[index] for index in sorted(outs)], dim=3)


def concatenate(tensors, dim):
    """`torch.cat` that does not copy a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=dim)


def hydra_attention(query, key, value, groups, tables=None, scale=None, backend=None):
    """Neighborhood attention whose heads have several neighborhoods (StyleNAT, 2211.05770).

    `query`, `key` and `value` are [B, H, W, heads, head_dim]; `groups` are tuples (number of heads,
    kernel_size, dilation) in the order of the heads, and `tables` their relative biases, or None.
    The rest is as of `neighborhood_attention_2d`, which is this with one group.
    """
    groups, tables = tuple(Heads(*group) for group in groups), list(tables) if tables else None
    check_tensors(query, key, value, groups, tables)
    if backend not in (None, *BACKENDS):
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, not {backend!r}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    arguments = (query, key, value, groups, tables, scale)
    if backend == "natten" or (backend is None and prefers_natten(query.device)):
        try:
            return natten_attention(*arguments)
        except NotImplementedError as error:  # shapes and types that no kernel of natten takes
            if backend == "natten":
                raise ValueError(f"`backend` 'natten' cannot do this call: {error}") from None
    if backend == "flex" and flex_problem(query):
        raise ValueError(f"`backend` 'flex' cannot do this call: {flex_problem(query)}")
    if backend == "flex":
        return flex_attend(*arguments)
    backend = backend or fastest_backend(query, groups, tables is not None)
    if backend == "flex":
        if torch.compiler.is_compiling():
            return flex_attend(*arguments)
        out = flex_attend_if_it_compiles(*arguments)
        if out is not None:
            return out
    if backend == "dense":
        return dense_attention(*arguments)
    return by_neighborhood(tiled_attention, *arguments)


def neighborhood_attention_2d(
    query, key, value, kernel_size, dilation=1, rpb=None, scale=None, backend=None
):
    """Neighborhood attention of `query` over `key` and `value`, each [B, H, W, heads, head_dim].

    `kernel_size` is odd, `rpb` is [heads, 2*kernel_size-1, 2*kernel_size-1] or None, `scale`
    defaults to head_dim ** -0.5. `backend` is one of BACKENDS; None takes the fastest that can do
    the call. Returns [B, H, W, heads, head_dim]. Raises ValueError for tensors that do not match, a
    kernel that does not fit the grid, or a backend that cannot do the call. Compiles without graph
    breaks; grids of several sizes want `dynamic=False`.
    """
    heads = query.shape[3] if query.dim() == 5 else 0
    groups = [(heads, kernel_size, dilation)]
    return hydra_attention(
        query, key, value, groups, None if rpb is None else [rpb], scale, backend
    )
