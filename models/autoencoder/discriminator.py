"""PatchGAN discriminator: one real/fake logit per overlapping patch (Isola et al., 1611.07004)."""

from itertools import pairwise

from torch import nn


class Discriminator(nn.Module):
    """Images [B, n_channels, S, S] -> logits [B, 1, s, s], where s = S // 2^disc_layers - 2.

    `disc_layers` convolutions halve the side, two more follow. Widths double from `ndf` to 8·ndf.
    Raises ValueError where nothing is left of images of side `img_size`.
    """

    def __init__(self, n_channels, ndf, disc_layers, img_size):
        super().__init__()
        if disc_layers < 1:
            raise ValueError(f"`disc_layers` must be at least 1, not {disc_layers}")
        if img_size >> disc_layers < 3:
            raise ValueError(
                f"`disc_layers` {disc_layers} leaves nothing of images of {img_size} pixels"
            )
        layers = [nn.Conv2d(n_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        widths = [ndf * min(2**depth, 8) for depth in range(disc_layers + 1)]
        for depth, (width, wider) in enumerate(pairwise(widths), start=1):
            stride = 2 if depth < disc_layers else 1
            layers += [
                # BatchNorm subtracts the mean, which a bias would only shift.
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in layers:  # as in DCGAN (1511.06434, section 3)
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)
        self.main = nn.Sequential(*layers)

    def forward(self, x):
        return self.main(x)
