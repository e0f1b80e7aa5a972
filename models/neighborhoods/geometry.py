"""Which keys each query of a grid attends to, as tensors: masks, tiles and their windows.

Shapes: H W grid, N = H*W tokens, h heads. Along one axis, a block is T queries of one dilation
group and its window the S keys that any of them attends to; there are A blocks. Primes mark the
columns: A' T' S'.
"""

from collections import OrderedDict
from functools import lru_cache, wraps
from threading import RLock
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

CACHE_BYTES = 2**29  # two masks of 8 heads over 63x63 ids in bfloat16 take so much
ALIGNMENT = 16  # CUDA's memory-efficient kernel copies a mask whose rows are not so many apart


class Heads(NamedTuple):
    """`count` consecutive heads that share a neighborhood."""

    count: int
    kernel_size: int
    dilation: int


def faked():
    """Whether tensors are fakes now (FakeTensorMode), which no cache may keep."""
    return any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())


class BoundedCache:
    """What functions give, tuples of tensors, by function and arguments: a least-recently-used
    cache of at most CACHE_BYTES; the newest entry always stays."""

    def __init__(self):
        self.bytes = 0
        self.values = OrderedDict()  # call to (value, its bytes), the last used at the end
        self.lock = RLock()  # blocks are computed again in the thread of the backward pass

    def __call__(self, *call):
        function, *arguments = call
        with self.lock:
            if call in self.values:
                self.values.move_to_end(call)
                return self.values[call][0]
            with torch.inference_mode(False), torch.no_grad():  # training may need it later
                value = function(*arguments)
            self.values[call] = value, sum(tensor.nbytes for tensor in value)
            self.bytes += self.values[call][1]
            while self.bytes > CACHE_BYTES and len(self.values) > 1:
                self.bytes -= self.values.popitem(last=False)[1][1]
            return value

    def clear(self):
        with self.lock:
            self.values.clear()
            self.bytes = 0


CACHE = BoundedCache()  # of all `constant` functions


def constant(function):
    """`function` of plain arguments, behind the CACHE; a constant in a compiled graph, which holds
    it as long as it lives.

    It returns a tuple of tensors (a single one has no shape in a graph), which nobody may change.
    """
    @wraps(function)
    def wrapper(*arguments):
        return function(*arguments) if faked() else CACHE(function, *arguments)

    return torch.compiler.assume_constant_result(wrapper)


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


@lru_cache(maxsize=64)  # more than a model has neighborhoods: CUDA graphs read what is kept
def cut_grid(height, width, kernel_size, dilation, tile, device):
    """(rows, columns, kind, mask): both axes cut into tiles of `tile` (rows, columns), the kind
    int64 [A*A'] of each block of the grid, and for each kind which keys each query attends to:
    bool [K*K', T*T', S*S']."""
    rows = tiled_axis(height, kernel_size, dilation, tile[0], device)
    columns = tiled_axis(width, kernel_size, dilation, tile[1], device)
    kind = (rows.kind[:, None] * len(columns.offset) + columns.kind).flatten()
    in_row, in_column = rows.offset >= 0, columns.offset >= 0
    mask = in_row[:, None, :, None, :, None] & in_column[None, :, None, :, None, :]
    return rows, columns, kind, mask.flatten(4, 5).flatten(2, 3).flatten(0, 1)


def cached_grid(*cut):
    """`cut_grid`, cached; a part of the graph where one is compiled."""
    if torch.compiler.is_compiling() or faked():
        return cut_grid.__wrapped__(*cut)
    with torch.inference_mode(False):  # else what is cached would not serve training
        return cut_grid(*cut)


def axis_offset(length, kernel_size, dilation, device):
    """`table_offset` of every position against every position, int64 [length, length]."""
    position = torch.arange(length, device=device)
    return table_offset(position, position, length, kernel_size, dilation)


def additive_mask(mask, dtype):
    """0 where bool `mask` [..., keys] is true, else -inf, in rows ALIGNMENT apart."""
    keys = mask.shape[-1]
    padded = mask.new_zeros((*mask.shape[:-1], -(-keys // ALIGNMENT) * ALIGNMENT), dtype=dtype)
    return padded[..., :keys].masked_fill_(~mask, float("-inf"))


@constant
def tile_mask(height, width, kernel_size, dilation, tile, dtype, device):
    """0 where a query of a tile attends to a key of its window, else -inf, for every block of
    `cut_grid`: a tuple of one tensor [A*A', 1, T*T', S*S']."""
    _, _, kind, mask = cached_grid(height, width, kernel_size, dilation, tile, device)
    return (additive_mask(mask if len(kind) == 1 else mask[kind], dtype)[:, None],)


@constant
def dense_mask(height, width, groups, dtype, device):
    """0 where a query attends to a key, else -inf, a tuple of one tensor: [1, h, N, N] for `groups`
    of Heads; [1, 1, N, N] where all have one neighborhood."""
    shared = len({group[1:] for group in groups}) == 1
    masks = []
    for count, kernel_size, dilation in groups[:1] if shared else groups:
        row = axis_offset(height, kernel_size, dilation, device) >= 0
        column = axis_offset(width, kernel_size, dilation, device) >= 0
        mask = (row[:, None, :, None] & column[None, :, None, :]).flatten(2, 3).flatten(0, 1)
        masks += [mask] * (1 if shared else count)
    return (additive_mask(torch.stack(masks)[None], dtype),)


@constant
def dense_lookup(height, width, kernel_size, dilation, dtype, device):
    """One-hot matrices [H*H, side] and [W*W, side] that look a relative bias up: row @ table @
    column.T is that of each pair of rows and each pair of columns, 0 outside the neighborhood."""
    entries = torch.arange(2 * kernel_size - 1, device=device)
    offsets = (axis_offset(length, kernel_size, dilation, device) for length in (height, width))
    return tuple((offset.flatten()[:, None] == entries).to(dtype) for offset in offsets)
