"""The two attentions of the transformer, both on grids [B, H, W, C] or sequences [B, N, C].

Shapes: B batch, H W grid, N tokens, C channels, h heads, e head_dim = C / h.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.neighborhood_attention import neighborhood_attention_2d


ROPE_BASE = 100.0  # Heo et al., arXiv 2403.13298, for grids of some tens of tokens a side


def rotary_angles(height, width, head_dim, device=None):
    """Angles of axial rotary positions, float32 [H, W, head_dim / 2] (Heo et al., 2403.13298).

    The first half of the angles turns with the row, the second with the column, at frequencies
    from 1 down to almost 1 / ROPE_BASE radians a token. `head_dim` is a multiple of 4.
    """
    quarter = head_dim // 4
    frequency = ROPE_BASE ** -(torch.arange(quarter, device=device) / quarter)
    rows = torch.arange(height, device=device)[:, None] * frequency  # [H, head_dim / 4]
    columns = torch.arange(width, device=device)[:, None] * frequency
    rows = rows[:, None].expand(height, width, quarter)
    return torch.cat((rows, columns[None].expand(height, width, quarter)), dim=-1)


def rotate(x, angles):
    """Turn pairs of channels (i, i + e/2) of x [B, H, W, h, e] by angles [H, W, e/2] (Su et al.,
    RoFormer, arXiv 2104.09864): products of two turned vectors see their distance only."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.to(x.dtype)


def split_heads(num_heads, groups):
    """Heads of each group; where they do not divide evenly, the last groups get one more.

    Raises ValueError when there are fewer heads than groups.
    """
    if groups > num_heads:
        raise ValueError(f"{groups} groups need at least {groups} heads, not {num_heads}")
    heads, remainder = divmod(num_heads, groups)
    return [heads + (group >= groups - remainder) for group in range(groups)]


def join(tensors, dim):
    """Concatenation that leaves a single tensor as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=dim)


class FullAttention(nn.Module):
    """Multi-head attention over the whole sequence [B, N, C]; `causal` looks back only.

    Parameters are named as in the published transformers. A causal module carries the buffer
    `mask` [1, 1, block_size, block_size] that the published files hold.
    """

    def __init__(self, dim, num_heads, attn_drop=0.0, proj_drop=0.0, causal=False, block_size=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {dim}")
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.causal = causal
        if causal:
            mask = torch.ones(block_size, block_size).tril().view(1, 1, block_size, block_size)
            self.register_buffer("mask", mask)
        self.key = nn.Linear(dim, dim)
        self.query = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x, cache=None):
        """Attend within x [B, N, C]; with `cache`, x holds the one token that follows it.

        `cache` is a dict that keeps keys and values [B, h, N, e] between calls, empty at first.
        """
        batch, tokens, dim = x.shape

        def heads(tensor):
            return tensor.view(batch, tokens, self.num_heads, -1).transpose(1, 2)  # [B, h, N, e]

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        if cache is not None:
            if cache:
                key = torch.cat((cache["key"], key), dim=2)
                value = torch.cat((cache["value"], value), dim=2)
            cache.update(key=key, value=value)
        out = F.scaled_dot_product_attention(
            query, key, value,
            dropout_p=self.attn_drop if self.training else 0.0,
            is_causal=self.causal and tokens > 1,
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, dim)))


class HydraNeighborhoodAttention(nn.Module):
    """Groups of heads with different neighborhoods (StyleNAT, arXiv 2211.05770) on [B, H, W, C].

    The heads are split into len(kernel_sizes) groups (see `split_heads`), group i with kernel
    `kernel_sizes[i]`, dilation `dilations[i]` (one dilation serves all groups) and, when `rpb`,
    a relative positional bias table `rpb.i` [heads, 2k-1, 2k-1]. With `rope`, queries and keys
    carry axial rotary positions: relative like the bias, but natten's fused kernels can use them.
    Groups of equal kernel and dilation are computed together, by `backend` (None: the fastest, see
    `neighborhood_attention_2d`). Attention is not dropped out: `attn_drop` other than 0 is refused,
    since fused kernels have none.

    Raises ValueError for heads that do not divide `dim`, a head_dim that rotary positions cannot
    split in four, or groups that do not match.
    """

    def __init__(
        self, dim, kernel_sizes, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0,
        proj_drop=0.0, dilations=(1,), rpb=True, rope=False, backend=None,
    ):
        super().__init__()
        kernel_sizes, dilations = list(kernel_sizes), list(dilations)
        if len(dilations) == 1:
            dilations = dilations * len(kernel_sizes)
        if len(dilations) != len(kernel_sizes):
            raise ValueError(f"{len(kernel_sizes)} kernel sizes but {len(dilations)} dilations")
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {dim}")
        if rope and dim // num_heads % 4:
            raise ValueError(f"rotary positions need a head_dim of 4n, not {dim // num_heads}")
        if attn_drop:
            raise ValueError("hydra attention has no attention dropout: set attn_pdrop to 0")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.kernel_sizes = kernel_sizes
        self.dilations = dilations
        self.group_heads = split_heads(num_heads, len(kernel_sizes))
        self.rope = rope
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = None
        if rpb:
            self.rpb = nn.ParameterList(
                nn.Parameter(torch.zeros(heads, 2 * kernel - 1, 2 * kernel - 1))
                for heads, kernel in zip(self.group_heads, kernel_sizes)
            )
            for table in self.rpb:
                nn.init.trunc_normal_(table, std=0.02)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

        self.neighborhoods = {}  # (kernel, dilation) to the groups that share it
        for group, neighborhood in enumerate(zip(kernel_sizes, dilations)):
            self.neighborhoods.setdefault(neighborhood, []).append(group)

    def forward(self, x):
        """Attend within x [B, H, W, C], any grid that the largest kernel x dilation fits into."""
        batch, height, width, dim = x.shape
        qkv = self.qkv(x).view(batch, height, width, 3, self.num_heads, -1)
        query, key, value = qkv.unbind(3)  # [B, H, W, h, e]
        if self.rope:
            angles = rotary_angles(height, width, query.shape[-1], x.device)
            query, key = rotate(query, angles), rotate(key, angles)
        parts = [part.split(self.group_heads, dim=3) for part in (query, key, value)]
        outs = [None] * len(self.group_heads)
        for (kernel, dilation), groups in self.neighborhoods.items():
            together = [join([part[group] for group in groups], dim=3) for part in parts]
            table = None
            if self.rpb is not None:
                table = join([self.rpb[group] for group in groups], dim=0)
            out = neighborhood_attention_2d(
                *together, kernel, dilation, table, self.scale, self.backend
            )
            for group, part in zip(groups, out.split([self.group_heads[g] for g in groups], 3)):
                outs[group] = part
        out = join(outs, dim=3)  # [B, H, W, h, e]
        return self.proj_drop(self.proj(out.reshape(batch, height, width, dim)))
