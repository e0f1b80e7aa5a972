"""Canvases larger than the grid that a denoiser was trained on (Unleashing Transformers,
arXiv 2111.12701, section 4.4): it runs on windows of its own size, whose probabilities are averaged
where they overlap. A denoiser without absolute positions can run on the whole canvas instead.

Shapes: B batch, [h, w] the trained grid, [H, W] the canvas in ids, K codebook size.
"""

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from models.devices import to_device, to_host


class WindowedDenoiser:
    """A denoiser (see `models.sampling.samplers`) of a canvas, made from one of a window.

    Computes only windows that cover a position asked for, `batch_size` at a time. Logits are the
    logs of averaged probabilities. Raises ValueError for a canvas smaller than the window.
    """

    def __init__(self, denoise, window, canvas, batch_size=64):
        self.denoise, self.batch_size = denoise, batch_size
        self.window, self.canvas = tuple(window), tuple(canvas)
        if any(side < least for side, least in zip(self.canvas, self.window)):
            raise ValueError(
                f"a canvas of {canvas[0]}x{canvas[1]} ids is smaller than the {window[0]}x"
                f"{window[1]} that the model was trained on"
            )

    @torch.no_grad()
    def __call__(self, ids, where):
        """Logits [M, K] of the positions `where` [B, H*W] of ids [B, H*W]."""
        (height, width), device = self.canvas, ids.device
        where = to_host(where).reshape(-1, height, width)
        number = where.cumsum().reshape(where.shape) - 1  # of each position asked for
        axes = dict(window_shape=self.window, axis=(1, 2))
        asked_in, number_in = (sliding_window_view(plan, **axes) for plan in (where, number))
        places = np.stack(asked_in.any((3, 4)).nonzero())  # samples, tops, lefts of the windows
        cut = ids.view(-1, height, width).unfold(1, self.window[0], 1).unfold(2, self.window[1], 1)
        sums = None
        for first in range(0, places.shape[1], self.batch_size):
            at = tuple(places[:, first : first + self.batch_size])
            asked = asked_in[at].reshape(len(at[0]), -1)  # [n, h*w]
            target = to_device(number_in[at].reshape(asked.shape)[asked], device)
            seen = cut[tuple(to_device(axis, device) for axis in at)].flatten(1)
            probabilities = self.denoise(seen, to_device(asked, device)).float().softmax(-1)
            if sums is None:
                sums = probabilities.new_zeros(int(where.sum()), probabilities.shape[-1])
                counts = sums.new_zeros(len(sums), 1)
            sums.index_add_(0, target, probabilities)
            counts.index_add_(0, target, torch.ones_like(probabilities[:, :1]))
        return (sums / counts).clamp(min=1e-30).log()


def tile_starts(length, tile, stride):
    """Where the tiles of one axis start: every `stride`, and the last one flush with the end."""
    return [*range(0, length - tile, stride), length - tile]


def tile_weights(starts, tile):
    """Weights [tiles, tile] of tiles along one axis: linear ramps where two of them overlap."""
    weights = torch.ones(len(starts), tile)
    for i, (start, following) in enumerate(zip(starts, starts[1:])):
        overlap = start + tile - following
        if overlap:
            rising = (torch.arange(overlap) + 0.5) / overlap
            weights[i, -overlap:] = torch.minimum(weights[i, -overlap:], 1 - rising)
            weights[i + 1, :overlap] = rising
    return weights


@torch.no_grad()
def decode_canvas(decode, grid, tile):
    """Decode codebook vectors `grid` [B, C, H, W] tile by tile: [B, c, H*f, W*f], on the CPU.

    `decode` maps [B, C, h, w] to images [B, c, h*f, w*f]. Tiles of `tile` (h, w), the size trained
    on, overlap by half and are blended linearly; memory beyond the canvas is that of one tile.
    """
    (height, width), (h, w) = grid.shape[2:], tile
    tops, lefts = tile_starts(height, h, max(h // 2, 1)), tile_starts(width, w, max(w // 2, 1))
    canvas = None
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            image = decode(grid[:, :, top : top + h, left : left + w]).float().cpu()
            if canvas is None:
                f = image.shape[2] // h
                canvas = torch.zeros(*image.shape[:2], height * f, width * f)
                total = torch.zeros(height * f, width * f)
                row_weights = tile_weights([f * start for start in tops], f * h)
                column_weights = tile_weights([f * start for start in lefts], f * w)
            weight = row_weights[row][:, None] * column_weights[column]
            region = ..., slice(f * top, f * (top + h)), slice(f * left, f * (left + w))
            canvas[region] += image * weight
            total[region] += weight
    return canvas / total
