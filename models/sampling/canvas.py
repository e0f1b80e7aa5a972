"""Canvases larger than the grid that a denoiser was trained on (Unleashing Transformers,
arXiv 2111.12701, section 4.4).

The denoiser runs on windows of its own size; where several cover a token, their probabilities are
averaged. A denoiser without absolute positions needs none of this: it runs on the canvas itself.

Shapes: B batch, [h, w] the trained grid, [H, W] the canvas in ids, K codebook size.
"""

import torch
import torch.nn.functional as F


def windows_over(where, window):
    """Which windows hold a position of `where` bool [B, H, W]: bool [B, H-h+1, W-w+1]."""
    return F.max_pool2d(where[:, None].float(), window, stride=1)[:, 0] > 0


class WindowedDenoiser:
    """A denoiser (see `models.sampling.samplers`) of the canvas, made from the one of a window.

    Only windows that cover a position asked for are computed, `batch_size` of them at a time: the
    others cannot matter. Returns the log of the averaged probabilities, which are logits.
    """

    def __init__(self, denoise, window, canvas, batch_size=64):
        self.denoise = denoise
        self.window = tuple(window)
        self.canvas = tuple(canvas)
        self.batch_size = batch_size
        if any(side < least for side, least in zip(self.canvas, self.window)):
            raise ValueError(
                f"a canvas of {canvas[0]}x{canvas[1]} ids is smaller than the {window[0]}x"
                f"{window[1]} that the model was trained on"
            )

    @torch.no_grad()
    def __call__(self, ids, where):
        """Logits [M, K] of the positions `where` [B, H*W] of ids [B, H*W]."""
        (height, width), (h, w) = self.canvas, self.window
        where = where.view(-1, height, width)
        number = where.flatten().cumsum(0).view(where.shape) - 1  # of each position asked for
        batch, top, left = windows_over(where, self.window).nonzero(as_tuple=True)

        def cut(tensor):
            return tensor.view(-1, height, width).unfold(1, h, 1).unfold(2, w, 1)

        sums = None
        for part in torch.arange(len(batch), device=ids.device).split(self.batch_size):
            at = batch[part], top[part], left[part]
            asked = cut(where)[at].flatten(1)  # [n, h*w]
            logits = self.denoise(cut(ids)[at].flatten(1), asked)
            probabilities = logits.float().softmax(-1)
            target = cut(number)[at].flatten(1)[asked]
            if sums is None:
                shape = int(where.sum()), logits.shape[-1]
                sums = torch.zeros(shape, device=ids.device)
                counts = torch.zeros(shape[0], 1, device=ids.device)
            sums.index_add_(0, target, probabilities)
            counts.index_add_(0, target, torch.ones_like(probabilities[:, :1]))
        return (sums / counts).clamp(min=1e-30).log()


def blending_weight(length, overlap_before, overlap_after):
    """Weights of one axis of a tile: rising over what it shares with the tile before it and
    falling over what it shares with the next."""
    weight = torch.ones(length)
    if overlap_before:
        weight[:overlap_before] = (torch.arange(overlap_before) + 0.5) / overlap_before
    if overlap_after:
        falling = 1 - (torch.arange(overlap_after) + 0.5) / overlap_after
        weight[-overlap_after:] = torch.minimum(weight[-overlap_after:], falling)
    return weight


def tile_starts(length, tile, stride):
    """Where tiles of one axis start: every `stride`, the last one flush with the end."""
    return [*range(0, length - tile, stride), length - tile]


@torch.no_grad()
def decode_canvas(decode, grid, tile):
    """Decode codebook vectors `grid` [B, C, H, W] tile by tile: [B, c, H*f, W*f], on the CPU.

    `decode` maps [B, C, h, w] to images [B, c, h*f, w*f]. Tiles of `tile` (h, w), the size that
    the generator was trained on, overlap by half and are blended linearly: memory beyond the
    canvas itself is that of one tile.
    """
    (height, width), (h, w) = grid.shape[2:], tile
    tops, lefts = tile_starts(height, h, max(h // 2, 1)), tile_starts(width, w, max(w // 2, 1))
    canvas = None
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            image = decode(grid[:, :, top : top + h, left : left + w]).float().cpu()
            scale = image.shape[2] // h
            weights = [
                blending_weight(
                    side * scale,
                    (starts[i - 1] + side - starts[i]) * scale if i else 0,
                    (starts[i] + side - starts[i + 1]) * scale if i + 1 < len(starts) else 0,
                )
                for starts, i, side in ((tops, row, h), (lefts, column, w))
            ]
            weight = weights[0][:, None] * weights[1]
            if canvas is None:
                shape = *image.shape[:2], height * scale, width * scale
                canvas, total = torch.zeros(shape), torch.zeros(shape[2:])
            region = (
                slice(top * scale, (top + h) * scale), slice(left * scale, (left + w) * scale)
            )
            canvas[(..., *region)] += image * weight
            total[region] += weight
    return canvas / total
