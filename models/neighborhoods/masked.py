"""Neighborhood attention in plain PyTorch: under one mask (dense), or tile by tile (tiled).

Shapes: B batch, H W grid, N = H*W tokens, h heads, e head_dim; A T S K as in `geometry`.
"""

import torch
import torch.nn.functional as F

from models.neighborhoods.geometry import cached_grid, dense_lookup, dense_mask, tile_mask

EXPLICIT_TOKENS = 1024  # up to so many tokens a CPU keeps the scores of bfloat16


def dense_bias(height, width, groups, tables, dtype, device):
    """Relative bias under the mask, -inf where a query does not attend: [1, h, N, N].

    Products with one-hot matrices look the tables up: their gradients are products too, which is
    faster than scattering into so small a table, and adds in one order only.
    """
    biases = []
    for group, table in zip(groups, tables, strict=True):
        row, column = dense_lookup(height, width, *group[1:], dtype, device)
        biases.append(row @ table.to(dtype) @ column.mT)  # [heads, H*H, W*W]
    bias = biases[0] if len(biases) == 1 else torch.cat(biases)
    bias = bias.view(len(bias), height, height, width, width).transpose(2, 3)
    (mask,) = dense_mask(height, width, groups, dtype, device)
    return bias.reshape(1, len(bias), *mask.shape[2:]) + mask


def keeps_scores(query, biased):
    """Whether explicit products are faster than SDPA's kernels: on a CPU, in bfloat16 (half the
    time) or where a bias is learned, for which CPUs have no kernel."""
    if query.device.type != "cpu":
        return False
    learned = biased and torch.is_grad_enabled()  # SDPA keeps them then
    return query.dtype == torch.bfloat16 and (learned or query.shape[2] <= EXPLICIT_TOKENS)


def explicit_attention(query, key, value, mask, scale):
    """Attention [B, h, N, e] of its three products; scores are kept in the inputs' type."""
    batch, heads = query.shape[:2]
    inputs = (query * scale, key, value)
    query, key, value = (x.reshape(batch * heads, *x.shape[2:]) for x in inputs)
    scores = torch.bmm(query, key.mT).unflatten(0, (batch, heads)) + mask
    return torch.bmm(scores.softmax(-1).flatten(0, 1), value).unflatten(0, (batch, heads))


def dense_attention(query, key, value, groups, tables, scale):
    """One attention of all tokens and heads under a mask; arguments as of `hydra_attention`."""
    _, height, width, _, _ = query.shape
    where = (height, width, groups)
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):  # all is of one type here
        if tables is None:
            (mask,) = dense_mask(*where, query.dtype, query.device)
        else:
            mask = dense_bias(*where, tables, query.dtype, query.device)
        if keeps_scores(query, tables is not None):
            out = explicit_attention(query, key, value, mask, scale)
        else:
            out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return out.transpose(1, 2).unflatten(1, (height, width))


def tile_shape(kernel_size, biased):
    """Rows and columns of a tile of queries: the fastest from 4x4 to 16x16 on two CPU cores."""
    return (4, 8) if biased or kernel_size < 7 else (8, 8)


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


def tiled_attention(query, key, value, kernel_size, dilation, rpb, scale):
    """Attention of each tile of `query` to its window; arguments of `neighborhood_attention_2d`.

    One scaled_dot_product_attention, whose mask is not repeated for each image: without a bias its
    batch are the blocks, its heads those of all images; with one, the images and all blocks' heads.
    """
    batch, height, width, heads, dim = query.shape
    cut = (height, width, kernel_size, dilation, tile_shape(kernel_size, rpb is not None))
    rows, columns, kind, mask = cached_grid(*cut, query.device)
    groups = rows.groups

    def sizes(row_block, column_block):
        return batch, rows.tiles, row_block, groups, columns.tiles, column_block, groups, heads, dim

    if rpb is None:  # to [A, A', B, h, T, T', e]
        order, leading = (1, 3, 4, 6, 0, 7, 2, 5, 8), (len(kind), batch * heads)
        (mask,) = tile_mask(*cut, query.dtype, query.device)
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
