"""The two attentions of the transformer, both on grids [B, H, W, C] or sequences [B, N, C].

Shapes: B batch, H W grid, N tokens, C channels, h heads, d head_dim = C / h.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.neighborhood_attention import neighborhood_attention_2d


def split_heads(num_heads, groups):
    """Heads of each group; where they do not divide evenly, the last groups get one more.

    Raises ValueError when there are fewer heads than groups.
    """
    if groups > num_heads:
        raise ValueError(f"{groups} groups need at least {groups} heads, not {num_heads}")
    heads, remainder = divmod(num_heads, groups)
    return [heads + (group >= groups - remainder) for group in range(groups)]


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

        `cache` is a dict that keeps keys and values [B, h, N, d] between calls, empty at first.
        """
        batch, tokens, dim = x.shape

        def heads(tensor):
            return tensor.view(batch, tokens, self.num_heads, -1).transpose(1, 2)  # [B, h, N, d]

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
    a relative positional bias table `rpb.i` [heads, 2k-1, 2k-1]. Attention is not dropped out:
    `attn_drop` other than 0 is refused, since a neighborhood's fused kernels have none.

    Raises ValueError for heads that do not divide `dim` or groups that do not match.
    """

    def __init__(
        self, dim, kernel_sizes, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0,
        proj_drop=0.0, dilations=(1,), rpb=True,
    ):
        super().__init__()
        kernel_sizes, dilations = list(kernel_sizes), list(dilations)
        if len(dilations) == 1:
            dilations = dilations * len(kernel_sizes)
        if len(dilations) != len(kernel_sizes):
            raise ValueError(f"{len(kernel_sizes)} kernel sizes but {len(dilations)} dilations")
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {dim}")
        if attn_drop:
            raise ValueError("hydra attention has no attention dropout: set attn_pdrop to 0")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.kernel_sizes = kernel_sizes
        self.dilations = dilations
        self.group_heads = split_heads(num_heads, len(kernel_sizes))
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

    def forward(self, x):
        """Attend within x [B, H, W, C], any grid that the largest kernel x dilation fits into."""
        batch, height, width, dim = x.shape
        qkv = self.qkv(x).view(batch, height, width, 3, self.num_heads, -1)
        groups = zip(*(part.split(self.group_heads, dim=3) for part in qkv.unbind(3)))
        tables = self.rpb or [None] * len(self.kernel_sizes)
        outs = [
            neighborhood_attention_2d(*group, kernel, dilation, rpb=table, scale=self.scale)
            for group, kernel, dilation, table in zip(
                groups, self.kernel_sizes, self.dilations, tables
            )
        ]
        out = torch.cat(outs, dim=3)  # [B, H, W, h, d]
        return self.proj_drop(self.proj(out.reshape(batch, height, width, dim)))
