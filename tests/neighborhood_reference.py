"""Neighborhood attention as it is defined, one query at a time: what backends are compared with."""

import torch


def brute_force(query, key, value, kernel_size, dilation, rpb, scale):
    """The definition, one query at a time."""
    _, height, width, heads, _ = query.shape
    out = torch.zeros_like(value)

    def neighbors(position, length):
        group = list(range(position % dilation, length, dilation))
        start = group.index(position) - kernel_size // 2
        start = min(max(start, 0), len(group) - kernel_size)
        return group[start : start + kernel_size]

    for y in range(height):
        for x in range(width):
            rows, columns = neighbors(y, height), neighbors(x, width)
            keys = key[:, rows][:, :, columns]  # [B, k, k, h, d]
            scores = torch.einsum("bhd,bijhd->bhij", query[:, y, x], keys) * scale
            if rpb is not None:
                dy = [(row - y) // dilation + kernel_size - 1 for row in rows]
                dx = [(column - x) // dilation + kernel_size - 1 for column in columns]
                scores = scores + rpb[:, dy][:, :, dx]
            weights = scores.flatten(2).softmax(-1).view_as(scores)
            values = value[:, rows][:, :, columns]
            out[:, y, x] = torch.einsum("bhij,bijhd->bhd", weights, values)
    return out
