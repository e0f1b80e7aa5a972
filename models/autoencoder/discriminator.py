"""Discriminators: networks that tell images from reconstructions, patch by patch."""

from itertools import islice, pairwise

import torch
from torch import nn
from torch.nn import functional as F

GROUP_WIDTH = 8  # channels of a group of GroupNorm
ENLARGED_BELOW = 128  # pixels of a side, where a discriminator looks at features


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


def bounded(layers, norm):
    """The `layers`, their convolutions with a spectral norm of 1 where `norm` is spectral."""
    if norm != "spectral":
        return layers
    return [
        nn.utils.parametrizations.spectral_norm(layer) if isinstance(layer, nn.Conv2d) else layer
        for layer in layers
    ]


class Discriminator(nn.Module):
    """PatchGAN, one logit for each overlapping patch of the pixels (Isola et al., 1611.07004):
    images [B, n_channels, S, S] -> logits [B, 1, s, s], where s = S // 2^disc_layers - 2.

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
        self.main = nn.Sequential(*bounded(layers, norm))
        self.by_batch = norm == "batch"  # logits depend on the other images of a batch
        self.every = 1  # it sees every image of a batch

    def forward(self, x):
        return self.main(x if self.by_batch else 2 * x - 1)


class FeatureDiscriminator(nn.Module):
    """Small heads on features of the frozen EfficientNet-Lite0, which know from the start what
    images look like (Projected GAN, Sauer et al., 2111.01007): images [B, 1 or 3, S, S] in [0, 1]
    -> logits [B, 6, E/4, E/4], those of coarser features repeated.

    Images below 128 pixels are enlarged, to E = 2S, else E = S: a network that was trained on
    larger ones sees more in them. That costs four times as much, so only every second image of a
    batch is to be shown then. `network` is an `EfficientNetDistance`. Each head, of `width`
    channels, sees one place of the features, scaled to one length there, and its neighbours. `norm`
    is that of the heads, group or spectral; ValueError for another one.
    """

    widths = (24, 40, 80, 112, 192, 320)  # channels of all layers but two, at E/4 to E/32
    by_batch = False

    def __init__(self, network, width, img_size, norm="group"):
        super().__init__()
        if norm not in ("group", "spectral"):
            raise ValueError(f"`disc_norm` must be group or spectral with `disc_input` features, "
                             f"not {norm!r}")
        self.network, self.heads = network, nn.ModuleList()
        self.enlarged = self.every = 2 if img_size < ENLARGED_BELOW else 1
        for channels in self.widths:
            layers = [
                nn.Conv2d(channels, width, 1), nn.LeakyReLU(0.2),
                nn.Conv2d(width, width, 3, padding=1), *normalization(norm, width),
                nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 1),
            ]
            self.heads.append(nn.Sequential(*bounded(layers, norm)))

    def forward(self, x):
        if self.enlarged > 1:
            x = F.interpolate(x, scale_factor=self.enlarged, mode="bilinear")
        logits, layers = [], islice(self.network.layers(x.expand(-1, 3, -1, -1)), 2, None)
        for head, seen in zip(self.heads, layers, strict=True):
            scaled = F.normalize(seen.float(), dim=1) * seen.shape[1] ** 0.5
            logits.append(F.interpolate(head(scaled).float(), x.shape[2] // 4))
        return torch.cat(logits, dim=1)
