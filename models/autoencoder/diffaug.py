"""Differentiable augmentation of what the discriminator sees (Zhao et al., 2006.10738).

Every function maps images [B, C, H, W] to images of that shape, draws one random change per
image (from `rng`, which must live where the images do), and passes gradients on.
"""

import torch
from torch.nn import functional as F


def _uniform(x, low, high, rng):
    """One number per image, broadcastable over it: [B, 1, 1, 1]."""
    draws = torch.rand(len(x), 1, 1, 1, device=x.device, generator=rng)
    return (low + (high - low) * draws).to(x.dtype)


def brightness(x, rng=None):
    """Add a constant in [-0.5, 0.5) to the whole image."""
    return x + _uniform(x, -0.5, 0.5, rng)


def saturation(x, rng=None):
    """Scale each pixel's distance from its own grey by [0, 2); one channel has no colour."""
    if x.shape[1] == 1:
        return x
    grey = x.mean(1, keepdim=True)  # [B, 1, H, W]
    return grey + (x - grey) * _uniform(x, 0.0, 2.0, rng)


def contrast(x, rng=None):
    """Scale each value's distance from the image's mean by [0.5, 1.5)."""
    mean = x.mean((1, 2, 3), keepdim=True)  # [B, 1, 1, 1]
    return mean + (x - mean) * _uniform(x, 0.5, 1.5, rng)


def translation(x, rng=None):
    """Shift by whole pixels, up to an eighth of each side either way; zeros come in."""
    batch, _, height, width = x.shape

    def source_positions(size, reach):
        # Position p of the result is p + reach - shift of the image padded by `reach`.
        start = torch.randint(2 * reach + 1, (batch, 1), device=x.device, generator=rng)
        return start + torch.arange(size, device=x.device)  # [B, size]

    reach_y, reach_x = round(height / 8), round(width / 8)
    rows = source_positions(height, reach_y)[:, :, None]   # [B, H, 1]
    columns = source_positions(width, reach_x)[:, None, :]  # [B, 1, W]
    padded = F.pad(x, (reach_x, reach_x, reach_y, reach_y)).permute(0, 2, 3, 1)
    image = torch.arange(batch, device=x.device)[:, None, None]  # [B, 1, 1]
    return padded[image, rows, columns].permute(0, 3, 1, 2)      # [B, H, W, C] -> [B, C, H, W]


def diff_augment(x, rng=None):
    """All of the above in order: images [B, C, H, W] -> [B, C, H, W]."""
    for augment in (brightness, saturation, contrast, translation):
        x = augment(x, rng)
    return x
