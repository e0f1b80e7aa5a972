"""PatchGAN discriminator: one real/fake logit per overlapping patch (Isola et al., 1611.07004)."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

GROUP_WIDTH = 8  # channels of a group of GroupNorm


class BlurPool(nn.Module):
    """Halves the side after a binomial low-pass, against aliasing (Zhang, 1904.11486):
    [B, width, H, W] -> [B, width, H/2, W/2]."""

    def __init__(self, width):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = torch.outer(taps, taps) / taps.sum() ** 2
        self.register_buffer("kernel", kernel.expand(width, 1, 4, 4).clone(), persistent=False)

    def forward(self, x):
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.kernel.to(x.dtype), stride=2, groups=x.shape[1])


def normalization(norm, width):
    """The layers, a list, that follow a convolution of `width` channels."""
    if norm == "batch":
        return [nn.BatchNorm2d(width)]
    if norm == "group":
        return [nn.GroupNorm(max(1, width // GROUP_WIDTH), width)]
    return []  # spectral norm is one of the weights


class Discriminator(nn.Module):
    """Images [B, n_channels, S, S] -> logits [B, 1, s, s], where s = S // 2^disc_layers - 2.

    `disc_layers` convolutions halve the side, two more follow. Widths double from `ndf` to 8·ndf.
    `norm` is batch, as published, group, whose logits do not depend on the other images, or
    spectral (Miyato et al., 1802.05957); the latter two, which do not take the mean out of every
    batch, see images from -1 to 1. With `blur` a low-pass halves the side between 3x3
    convolutions, and s = S / 2^disc_layers. Raises ValueError where nothing is left of images of
    side `img_size`.
    """

    def __init__(self, n_channels, ndf, disc_layers, img_size, norm="batch", blur=False):
        super().__init__()
        if disc_layers < 1:
            raise ValueError(f"`disc_layers` must be at least 1, not {disc_layers}")
        if img_size >> disc_layers < 3:
            raise ValueError(
                f"`disc_layers` {disc_layers} leaves nothing of images of {img_size} pixels"
            )
        if norm not in ("batch", "group", "spectral"):
            raise ValueError(f"`disc_norm` must be batch, group or spectral, not {norm!r}")

        def convolution(width, wider, stride, bias):
            if not blur:
                return [nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=bias)]
            halve = [BlurPool(wider)] if stride == 2 else []
            return [nn.Conv2d(width, wider, 3, padding=1, bias=bias), *halve]

        layers = [*convolution(n_channels, ndf, 2, bias=True), nn.LeakyReLU(0.2)]
        widths = [ndf * min(2**depth, 8) for depth in range(disc_layers + 1)]
        for depth, (width, wider) in enumerate(pairwise(widths), start=1):
            layers += [
                # BatchNorm subtracts the mean, which a bias would only shift.
                *convolution(width, wider, 2 if depth < disc_layers else 1, bias=norm != "batch"),
                *normalization(norm, wider),
                nn.LeakyReLU(0.2),
            ]
        layers += convolution(widths[-1], 1, 1, bias=True)
        for layer in layers:  # as in DCGAN (1511.06434, section 3)
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)
        if norm == "spectral":
            layers = [
                nn.utils.parametrizations.spectral_norm(layer)
                if isinstance(layer, nn.Conv2d) else layer for layer in layers
            ]
        self.main = nn.Sequential(*layers)
        self.by_batch = norm == "batch"  # logits depend on the other images of a batch

    def forward(self, x):
        return self.main(x if self.by_batch else 2 * x - 1)
