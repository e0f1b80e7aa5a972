"""2-D neighborhood attention (Hassani et al., arXiv 2204.07143; dilated: 2209.15001).

A query at (y, x) attends to exactly k*k keys: in each axis, among the positions congruent to its
own modulo the dilation d, the k consecutive ones centred on it, shifted inward at the borders.
The optional relative positional bias is a table [heads, 2k-1, 2k-1] whose entry
[dy/d + k-1, dx/d + k-1] is added to the scaled score of the key at offset (dy, dx).

Three backends compute it:

- `natten`: the fused kernels of the natten package; no bias; on a CPU forward only, and slow;
- `tiled`: plain PyTorch on any device, its time and memory linear in the number of tokens;
- `dense`: one attention of the whole grid under a mask, the fastest on small grids.

`neighborhood_attention_2d` picks one: natten on a GPU (`prefers_natten`) unless there is a
`natten_problem`, else dense where `dense_is_faster`, else tiled. Only this file imports natten.

Shapes: B batch, H W grid, h heads, e head_dim, side = 2k-1. Along one axis, a block is T queries
of one dilation group and its window the S keys that any of them attends to; there are A blocks.
Primes mark the columns: A' T' S'.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

NATTEN_PROBLEM = None
try:
    import natten
except Exception as error:  # a build for another torch fails with more than ImportError
    natten, NATTEN_PROBLEM = None, f"natten does not import ({error})"

BACKENDS = ("natten", "tiled", "dense")

# `tiled` is faster than `dense` where the grid is larger than so many windows: measured on two CPU
# cores by benchmarks/neighborhood_attention.py, assumed for GPUs.
WORTHWHILE_WINDOWS = 3


class Axis(NamedTuple):
    """How one axis is cut into A = tiles * groups blocks, of K kinds: most blocks are alike."""

    tiles: int
    groups: int
    tile: int  # T
    window: int  # S
    keys: torch.Tensor | None  # int64 [tiles * S * groups]: positions; None for the axis as it is
    offset: torch.Tensor  # int64 [K, T, S]: see `table_offset`
    kind: torch.Tensor  # int64 [A]: of each block; block a is tile a // groups


def table_offset(query, key, length, kernel_size, dilation):
    """The bias table's rows (or columns) for positions `query` [..., T] and `key` [..., S] of an
    axis: int64 [..., T, S], -1 where the query does not attend to the key."""
    query, key = query[..., None], key[..., None, :]
    members = (length - query % dilation + dilation - 1) // dilation  # of the query's group
    first = (query // dilation - kernel_size // 2).clamp(min=0)
    nth = key // dilation - torch.minimum(first, members - kernel_size)
    attends = (key % dilation == query % dilation) & (nth >= 0) & (nth < kernel_size)
    return torch.where(attends, (key - query) // dilation + kernel_size - 1, -1)


def dense_axis(length, kernel_size, dilation, device):
    """The axis as one block: every position against every position."""
    position = torch.arange(length, device=device)
    offset = table_offset(position, position, length, kernel_size, dilation)
    return Axis(1, 1, length, length, None, offset[None], position.new_zeros(1))


def tiled_axis(length, kernel_size, dilation, tile, device):
    """The axis with each dilation group cut into tiles of at most `tile` queries; groups shorter
    than the longest, and the last tile, are padded: no query attends to the padding."""
    longest = -(-length // dilation)
    tile = min(tile, longest)
    tiles = -(-longest // tile)
    window = min(tile + kernel_size - 1, longest)
    group = torch.arange(dilation, device=device)[:, None]
    start = torch.arange(tiles, device=device) * tile - kernel_size // 2
    start = start.clamp(0, longest - window)[:, None, None]
    keys = (start + torch.arange(window, device=device)) * dilation + group
    keys = keys.clamp(max=length - 1)  # [tiles, groups, S]
    query = torch.arange(tiles * tile, device=device).view(tiles, 1, tile) * dilation + group
    query = torch.minimum(query, length - 1 - (length - 1 - group) % dilation)  # the group's last
    offset = table_offset(query, keys, length, kernel_size, dilation).flatten(0, 1)

    full_groups = length - (longest - 1) * dilation  # the groups that have the longest's length
    shortest = longest - (full_groups < dilation)
    reach = kernel_size // 2
    inner = [t for t in range(tiles) if reach <= t * tile <= shortest - tile - reach]
    alike = [
        inner[0] * dilation if t in inner
        else t * dilation + (0 if g < full_groups else full_groups)
        for t in range(tiles) for g in range(dilation)
    ]  # the first block that is like each
    kinds = sorted(set(alike))
    kind = torch.tensor([kinds.index(block) for block in alike], device=device)

    keys = None if tiles == dilation == 1 else keys.mT.flatten()
    return Axis(tiles, dilation, tile, window, keys, offset[kinds], kind)


@lru_cache(maxsize=16)
def cut_grid(height, width, kernel_size, dilation, tile, device):
    """(rows, columns, kind, mask): both axes, the kind int64 [A*A'] of each block of the grid, and
    for each kind which keys each query attends to: bool [K*K', T*T', S*S'].

    `tile` is the (rows, columns) of a tile of `tiled`, or None for `dense`.
    """
    if tile is None:
        rows = dense_axis(height, kernel_size, dilation, device)
        columns = dense_axis(width, kernel_size, dilation, device)
    else:
        rows = tiled_axis(height, kernel_size, dilation, tile[0], device)
        columns = tiled_axis(width, kernel_size, dilation, tile[1], device)
    kind = (rows.kind[:, None] * len(columns.offset) + columns.kind).flatten()
    in_row, in_column = rows.offset >= 0, columns.offset >= 0
    mask = in_row[:, None, :, None, :, None] & in_column[None, :, None, :, None, :]
    return rows, columns, kind, mask.flatten(4, 5).flatten(2, 3).flatten(0, 1)


def neighborhood_bias(rows, columns, kind, mask, rpb):
    """The bias of every block, -inf where a query does not attend: [h, A*A', T*T', S*S'].

    Products with one-hot matrices look the table up: their gradients are products too, which is
    faster than scattering into so small a table.
    """
    heads, side, _ = rpb.shape
    entries = torch.arange(side, device=rpb.device)
    row = (rows.offset.flatten()[:, None] == entries).to(rpb.dtype)  # [K*T*S, side]
    column = (columns.offset.flatten()[:, None] == entries).to(rpb.dtype)
    bias = (row @ rpb) @ column.mT  # [h, K*T*S, K'*T'*S']
    bias = bias.view(heads, *rows.offset.shape, *columns.offset.shape)  # [h, K, T, S, K', T', S']
    bias = bias.permute(0, 1, 4, 2, 5, 3, 6).reshape(heads, *mask.shape)
    bias = bias.masked_fill(~mask, float("-inf"))
    return bias if len(kind) == 1 else bias.index_select(1, kind)


def masked_attention(query, key, value, rpb, scale, grid):
    """Attention of each block of `query` to its window, on a `grid` cut by `cut_grid`.

    One scaled_dot_product_attention, whose mask is not repeated for each image: without a bias its
    batch are the blocks, its heads those of all images; with one, the images and all blocks' heads.
    """
    rows, columns, kind, mask = grid
    batch, height, width, heads, dim = query.shape
    groups = rows.groups

    def sizes(row_block, column_block):
        return batch, rows.tiles, row_block, groups, columns.tiles, column_block, groups, heads, dim

    if rpb is None:  # to [A, A', B, h, T, T', e]
        order, leading = (1, 3, 4, 6, 0, 7, 2, 5, 8), (len(kind), batch * heads)
        mask = (mask if len(kind) == 1 else mask[kind])[:, None]
    else:  # to [B, h, A, A', T, T', e]
        order, leading = (0, 7, 1, 3, 4, 6, 2, 5, 8), (batch, heads * len(kind))
        bias = neighborhood_bias(rows, columns, kind, mask, rpb.to(query.dtype))
        mask = bias.flatten(0, 1)[None]

    def blocks(tensor, *block):
        tensor = tensor.reshape(sizes(*block)).permute(order)
        return tensor.reshape(*leading, block[0] * block[1], dim)

    def windows(tensor):
        for axis, plan in ((1, rows), (2, columns)):
            if plan.keys is not None:
                tensor = tensor.index_select(axis, plan.keys)
        return blocks(tensor, rows.window, columns.window)

    missing_rows = rows.tiles * rows.tile * groups - height
    missing_columns = columns.tiles * columns.tile * groups - width
    if missing_rows or missing_columns:
        query = F.pad(query, (0, 0, 0, 0, 0, missing_columns, 0, missing_rows))
    out = F.scaled_dot_product_attention(
        blocks(query, rows.tile, columns.tile), windows(key), windows(value), mask, scale=scale
    )
    shape = sizes(rows.tile, columns.tile)
    out = out.reshape([shape[axis] for axis in order])
    out = out.permute([order.index(axis) for axis in range(9)])
    return out.reshape(query.shape)[:, :height, :width]


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


def prefers_natten(device):
    """Whether natten is tried first; on CPUs it is slow."""
    return device.type == "cuda"


def dense_is_faster(height, width, kernel_size, dilation, tile):
    """Whether the grid is too small for tiles."""
    window_height = min(tile[0] + kernel_size - 1, -(-height // dilation))
    window_width = min(tile[1] + kernel_size - 1, -(-width // dilation))
    return height * width < WORTHWHILE_WINDOWS * window_height * window_width


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
    if query.dim() != 5 or not query.shape == key.shape == value.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"`query`, `key` and `value` must be equal [B, H, W, h, e], not {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"`query`, `key` and `value` differ in type: {query.dtype}, {key.dtype}, {value.dtype}"
        )
    _, height, width, heads, _ = query.shape
    check_neighborhood(height, width, kernel_size, dilation)
    side = 2 * kernel_size - 1
    if rpb is not None and rpb.shape != (heads, side, side):
        raise ValueError(f"`rpb` must be {(heads, side, side)} here, not {tuple(rpb.shape)}")
    if backend not in (None, *BACKENDS):
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "natten" or (backend is None and prefers_natten(query.device)):
        problem = natten_problem(query, key, value, rpb, kernel_size)
        if not problem:
            try:
                return natten.na2d(query, key, value, kernel_size, dilation=dilation, scale=scale)
            except NotImplementedError as error:  # shapes and types that no kernel of natten takes
                problem = str(error)
        if backend == "natten":
            raise ValueError(f"`backend` 'natten' cannot do this call: {problem}")
    # the fastest from 4x4 to 16x16 on two CPU cores
    tile = (4, 8) if rpb is not None or kernel_size < 7 else (8, 8)
    cut = (height, width, kernel_size, dilation)
    dense = backend == "dense" or (backend is None and dense_is_faster(*cut, tile))
    cut += (None if dense else tile, query.device)
    if torch.compiler.is_compiling():
        grid = cut_grid.__wrapped__(*cut)  # a part of the graph
    else:
        with torch.inference_mode(False):  # else what is cached would not serve training
            grid = cut_grid(*cut)
    return masked_attention(query, key, value, rpb, scale, grid)
