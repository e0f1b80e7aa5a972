"""2-D neighborhood attention (Hassani et al., arXiv 2204.07143; dilated: 2209.15001).

A query at (y, x) attends to exactly k*k keys: in each axis, among the positions congruent to its
own modulo the dilation d, the k consecutive ones centred on it, shifted inward at the borders.
The optional relative positional bias is a table [heads, 2k-1, 2k-1] whose entry
[dy/d + k-1, dx/d + k-1] is added to the scaled score of the key at offset (dy, dx).

This is the only file that imports natten, and everything runs without it.

Shapes: B batch, H W grid, h heads, d head_dim, N = H*W tokens.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

try:
    import natten
except Exception as error:  # a build for another torch fails with more than ImportError
    natten, NATTEN_PROBLEM = None, f"natten does not import ({error})"
else:
    NATTEN_PROBLEM = None

BACKENDS = ("natten", "dense")


def axis_neighbors(length, kernel_size, dilation):
    """Which keys each query of one axis attends to: bool [length, length], rows are queries."""
    position = torch.arange(length)
    group, order = position % dilation, position // dilation
    members = (length - group + dilation - 1) // dilation  # how many positions share the group
    start = (order - kernel_size // 2).clamp(min=0)
    start = torch.minimum(start, members - kernel_size)
    same_group = group[:, None] == group[None, :]
    after_start = order[None, :] >= start[:, None]
    before_end = order[None, :] < (start + kernel_size)[:, None]
    return same_group & after_start & before_end


@lru_cache(maxsize=16)
def neighborhood_mask(height, width, kernel_size, dilation, device):
    """Which keys each query of the grid attends to: bool [N, N], rows are queries."""
    rows = axis_neighbors(height, kernel_size, dilation)
    columns = axis_neighbors(width, kernel_size, dilation)
    mask = rows[:, None, :, None] & columns[None, :, None, :]  # [H, W, H, W]
    return mask.reshape(height * width, height * width).to(device)


@lru_cache(maxsize=16)
def bias_index(height, width, kernel_size, dilation, device):
    """Where in a flattened [2k-1, 2k-1] bias table each (query, key) looks: int64 [N, N].

    Pairs outside the neighborhood point at the entry one past the table's end.
    """
    side = 2 * kernel_size - 1

    def offsets(length):
        position = torch.arange(length)
        distance = position[None, :] - position[:, None]
        return torch.div(distance, dilation, rounding_mode="floor") + kernel_size - 1

    index = offsets(height)[:, None, :, None] * side + offsets(width)[None, :, None, :]
    index = index.reshape(height * width, height * width)
    outside = ~neighborhood_mask(height, width, kernel_size, dilation, torch.device("cpu"))
    return index.masked_fill(outside, side * side).to(device)


def neighborhood_bias(height, width, kernel_size, dilation, rpb):
    """The additive mask of dense attention: [h, N, N], -inf outside the neighborhood."""
    index = bias_index(height, width, kernel_size, dilation, rpb.device)
    table = F.pad(rpb.flatten(1), (0, 1), value=float("-inf"))  # [h, side*side + 1]
    tokens = height * width
    return table.index_select(1, index.flatten()).view(-1, tokens, tokens)


def check_neighborhood(height, width, kernel_size, dilation):
    """Raise ValueError when a kernel with this dilation does not fit the grid."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, not {kernel_size}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, not {dilation}")
    if kernel_size * dilation > min(height, width):
        raise ValueError(
            f"kernel_size {kernel_size} x dilation {dilation} = {kernel_size * dilation} is larger "
            f"than the grid's shorter side ({height}x{width})"
        )


def natten_problem(query, rpb, kernel_size):
    """Why natten cannot do this call, as a sentence; None when it can."""
    if natten is None:
        return NATTEN_PROBLEM
    if rpb is not None:
        return "natten's fused kernels have no relative positional bias"
    if kernel_size == 1:
        return "natten has no kernel of size 1"
    if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        return "natten has no backward on the CPU"
    if query.device.type == "cuda" and not natten.HAS_LIBNATTEN:
        return "this natten was built without its CUDA library"
    return None


def dense_attention(query, key, value, kernel_size, dilation, rpb, scale):
    """One scaled_dot_product_attention over the whole grid under the neighborhood mask."""
    batch, height, width, heads, dim = query.shape
    if rpb is None:
        mask = neighborhood_mask(height, width, kernel_size, dilation, query.device)
    else:
        mask = neighborhood_bias(height, width, kernel_size, dilation, rpb).to(query.dtype)

    def to_sequence(tensor):
        return tensor.flatten(1, 2).transpose(1, 2)  # [B, h, N, d]

    out = F.scaled_dot_product_attention(
        to_sequence(query), to_sequence(key), to_sequence(value), attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2).reshape(batch, height, width, heads, dim)


def neighborhood_attention_2d(
    query, key, value, kernel_size, dilation=1, rpb=None, scale=None, backend=None
):
    """Neighborhood attention of `query` over `key` and `value`, each [B, H, W, heads, head_dim].

    `kernel_size` is odd, `rpb` is [heads, 2*kernel_size-1, 2*kernel_size-1] or None, `scale`
    defaults to head_dim ** -0.5. `backend` is one of BACKENDS; None takes natten's fused CUDA
    kernels where they can do what is asked and dense attention elsewhere.

    Returns [B, H, W, heads, head_dim]. Raises ValueError for a kernel that does not fit the grid,
    a bias of the wrong shape, or a backend that cannot do what is asked.
    """
    _, height, width, heads, _ = query.shape
    check_neighborhood(height, width, kernel_size, dilation)
    side = 2 * kernel_size - 1
    if rpb is not None and rpb.shape != (heads, side, side):
        raise ValueError(f"rpb must be {(heads, side, side)} here, not {tuple(rpb.shape)}")
    arguments = (query, key, value, kernel_size, dilation)
    if backend in (None, "natten"):
        problem = natten_problem(query, rpb, kernel_size)
        worthwhile = backend == "natten" or query.device.type == "cuda"
        if worthwhile and not problem:
            try:
                return natten.na2d(*arguments[:4], dilation=dilation, scale=scale)
            except NotImplementedError as error:  # shapes and types that no kernel of natten takes
                problem = str(error)
        if backend == "natten":
            raise ValueError(f"backend 'natten' cannot do this call: {problem}")
    if backend in (None, "dense"):
        return dense_attention(*arguments, rpb, scale)
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
