"""The two attentions of the transformer: on sequences [B, N, C] and on grids [B, H, W, C].

Shapes: B batch, H W grid, N tokens, C channels, h heads, e head_dim = C / h.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.messages import listed
from models.neighborhood_attention import hydra_attention
from models.neighborhoods.geometry import constant

ROPE_BASE = 100.0  # Heo et al., arXiv 2403.13298, for grids of some tens of tokens a side


def rotary_angles(height, width, head_dim, device=None):
    """Angles of axial rotary positions, float32 [H, W, head_dim / 2] (Heo et al., 2403.13298).

    The first half of the angles turns with the row, the second with the column, at frequencies
    from 1 down to almost 1 / ROPE_BASE radians a token. `head_dim` is a multiple of 4.
    """
    quarter = head_dim // 4
    frequency = ROPE_BASE ** -(torch.arange(quarter, device=device) / quarter)
    rows = torch.arange(height, device=device)[:, None, None] * frequency  # [H, 1, head_dim / 4]
    columns = torch.arange(width, device=device)[:, None] * frequency  # [W, head_dim / 4]
    return torch.cat(torch.broadcast_tensors(rows, columns), dim=-1)


@constant
def rotary_tables(height, width, head_dim, device):
    """Factors (of x, of its halves exchanged) that `rotate` takes: float32 [H, W, 1, 1, e] each."""
    angles = rotary_angles(height, width, head_dim, device)[:, :, None, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class Rotation(torch.autograd.Function):
    """x * cos + (x, its halves exchanged) * sin, in float32 and back in x's type; its gradient is
    the rotation backwards, with `sign` -1."""

    @staticmethod
    def forward(ctx, x, cos, sin, sign):
        ctx.save_for_backward(cos, sin)
        ctx.sign = sign
        turned = x * cos
        return turned.addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=sign).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return Rotation.apply(grad, *ctx.saved_tensors, -ctx.sign), None, None, None


def rotate(x, tables):
    """Rotate pairs of channels (i, i + e/2) of x [B, H, W, n, h, e] by `rotary_tables` (Su et al.,
    RoFormer, arXiv 2104.09864): dot products of two of them depend on their distance only."""
    return Rotation.apply(x, *tables, 1.0)


def match_groups(kernel_sizes, dilations):
    """Kernel size and dilation of each group of heads, as two lists of one length.

    Both are ints or sequences of ints; one value serves all groups (as in StyleNAT's module).
    Raises ValueError where both have several values, and not equally many.
    """
    kernel_sizes, dilations = (
        [sizes] if isinstance(sizes, int) else list(sizes) for sizes in (kernel_sizes, dilations)
    )
    groups = max(len(kernel_sizes), len(dilations))
    if {len(kernel_sizes), len(dilations)} - {1, groups}:
        raise ValueError(
            f"`kernel_sizes` {listed(kernel_sizes)} and `dilations` {listed(dilations)} must be "
            f"equally many, or one of either for all"
        )
    return kernel_sizes * (groups // len(kernel_sizes)), dilations * (groups // len(dilations))


def split_heads(num_heads, groups):
    """Heads of each group, one more in the last groups where they do not divide evenly.

    Raises ValueError when there are fewer heads than groups.
    """
    if groups > num_heads:
        raise ValueError(
            f"{groups} groups of `kernel_sizes` and `dilations` need at least {groups} heads, not "
            f"`num_heads` {num_heads}"
        )
    heads, remainder = divmod(num_heads, groups)
    return [heads + (group >= groups - remainder) for group in range(groups)]


def head_width(dim, num_heads):
    """Channels of each head; raises ValueError where the heads do not divide `dim`."""
    if dim % num_heads:
        raise ValueError(f"`num_heads` {num_heads} does not divide `dim` {dim}")
    return dim // num_heads


class FullAttention(nn.Module):
    """Multi-head attention over the whole sequence [B, N, C]; `causal` looks back only.

    Parameters are named as in the published files, which also hold the causal `mask`.
    """

    def __init__(self, dim, num_heads, attn_drop=0.0, proj_drop=0.0, causal=False, block_size=None):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_width(dim, num_heads)
        self.attn_drop, self.causal = attn_drop, causal
        if causal:
            self.register_buffer("mask", torch.ones(1, 1, block_size, block_size).tril())
        self.key = nn.Linear(dim, dim)
        self.query = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x, cache=None):
        """Attend within x [B, N, C]; with `cache`, x holds the one token that follows it.

        `cache` is a dict that keeps keys and values [B, h, N, e] between calls, empty at first.
        """
        query, key, value = (
            project(x).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )  # [B, h, N, e]
        if cache is not None:
            if cache:
                key = torch.cat((cache["key"], key), dim=2)
                value = torch.cat((cache["value"], value), dim=2)
            cache.update(key=key, value=value)
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.attn_drop if self.training else 0.0,
            is_causal=self.causal and x.shape[1] > 1,
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))  # [B, N, C]


class HydraNeighborhoodAttention(nn.Module):
    """Groups of heads with different neighborhoods (StyleNAT, arXiv 2211.05770) on [B, H, W, C].

    Group i has kernel `kernel_sizes[i]`, dilation `dilations[i]` (see `match_groups` and
    `split_heads`) and, with `rpb`, a relative positional bias table `rpb.i` [heads, 2k-1, 2k-1].
    With `rope`, queries and keys carry axial rotary positions, which all kernels can do. `backend`
    is that of `hydra_attention`, which attends for all groups. `attn_drop` must be 0. Raises
    ValueError for arguments that do not fit together.
    """

    def __init__(
        self, dim, kernel_sizes, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0,
        proj_drop=0.0, dilations=(1,), rpb=True, rope=False, backend=None,
    ):
        super().__init__()
        self.kernel_sizes, self.dilations = match_groups(kernel_sizes, dilations)
        self.group_heads = split_heads(num_heads, len(self.kernel_sizes))
        self.num_heads, self.head_dim = num_heads, head_width(dim, num_heads)
        if rope and self.head_dim % 4:
            raise ValueError(
                f"`rope` needs `dim` / `num_heads` to be a multiple of 4, not {dim} / {num_heads}"
            )
        if attn_drop:
            raise ValueError("`attn_drop` must be 0: hydra attention has no attention dropout")
        self.scale = qk_scale or self.head_dim**-0.5
        self.rope, self.backend = rope, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = None
        if rpb:
            self.rpb = nn.ParameterList(
                nn.init.trunc_normal_(torch.empty(heads, 2 * k - 1, 2 * k - 1), std=0.02)
                for heads, k in zip(self.group_heads, self.kernel_sizes)
            )
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

        self.groups = tuple(zip(self.group_heads, self.kernel_sizes, self.dilations))

    def forward(self, x):
        """Attend within x [B, H, W, C], any grid that the largest kernel x dilation fits into."""
        qkv = self.qkv(x).unflatten(3, (3, self.num_heads, self.head_dim))  # [B, H, W, 3, h, e]
        if self.rope:
            both, value = qkv.split((2, 1), dim=3)
            tables = rotary_tables(*x.shape[1:3], self.head_dim, x.device)
            query, key = rotate(both, tables).unbind(3)  # [B, H, W, h, e]
            value = value.squeeze(3)
        else:
            query, key, value = qkv.unbind(3)
        tables = None if self.rpb is None else list(self.rpb)
        out = hydra_attention(query, key, value, self.groups, tables, self.scale, self.backend)
        return self.proj_drop(self.proj(out.flatten(3)))  # [B, H, W, C]
