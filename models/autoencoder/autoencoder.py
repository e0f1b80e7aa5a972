"""The autoencoder: images to grids of codebook ids and back (Esser et al., 2012.09841).

Shapes: B images of C channels and side S in [0, 1]; the grid is h x w with D = emb_dim.
Module names give the keys of the published files: `encoder.blocks.N`, `generator.blocks.N`, ...
"""

from torch import nn
from torch.nn import functional as F

from models.autoencoder.quantizers import GumbelQuantizer, NearestQuantizer

NORM_GROUPS = 32


def group_norm(width):
    """GroupNorm over `width` channels; raises ValueError when they do not split into groups."""
    if width % NORM_GROUPS:
        raise ValueError(
            f"--nf times every entry of --ch_mult must be a multiple of {NORM_GROUPS}, "
            f"not {width}."
        )
    return nn.GroupNorm(NORM_GROUPS, width, eps=1e-6)


def conv3x3(in_width, out_width):
    return nn.Conv2d(in_width, out_width, 3, padding=1)


class ResBlock(nn.Module):
    """Two rounds of norm, swish, 3x3 convolution, and a skip: [B, in, H, W] -> [B, out, H, W]."""

    def __init__(self, in_width, out_width):
        super().__init__()
        self.widens = in_width != out_width
        self.norm1 = group_norm(in_width)
        self.conv1 = conv3x3(in_width, out_width)
        self.norm2 = group_norm(out_width)
        self.conv2 = conv3x3(out_width, out_width)
        # Published files hold this weight in every block, also where the skip is the identity.
        self.conv_out = nn.Conv2d(in_width, out_width, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.conv_out(x) if self.widens else x) + h


class AttentionBlock(nn.Module):
    """One head of self-attention over all positions, with a skip: [B, width, H, W] kept."""

    def __init__(self, width):
        super().__init__()
        self.norm = group_norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (
            project(h).flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, H*W, width]
            for project in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])  # [B, width, H, W]
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """[B, width, H, W] -> [B, width, H/2, W/2] by a strided convolution."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only


class Upsample(nn.Module):
    """[B, width, H, W] -> [B, width, 2H, 2W]: nearest neighbour, then a convolution."""

    def __init__(self, width):
        super().__init__()
        self.conv = conv3x3(width, width)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


# Encoder and generator ---------------------------------------------------------------------


def _level(in_width, out_width, res_blocks, attend):
    """The blocks of one resolution."""
    blocks = []
    for i in range(res_blocks):
        blocks.append(ResBlock(in_width if i == 0 else out_width, out_width))
        if attend:
            blocks.append(AttentionBlock(out_width))
    return blocks


def _middle(width):
    return [ResBlock(width, width), AttentionBlock(width), ResBlock(width, width)]


class Encoder(nn.Module):
    """Images [B, C, S, S] -> vectors [B, emb_dim, h, w], h = w = S / 2^(len(ch_mult) - 1).

    Raises ValueError when widths do not split into GroupNorm's groups or the sides do not halve.
    """

    def __init__(self, n_channels, nf, emb_dim, ch_mult, res_blocks, img_size, attn_resolutions):
        super().__init__()
        halvings = len(ch_mult) - 1
        if img_size % 2**halvings:
            raise ValueError(
                f"--img_size must be a multiple of {2**halvings}, since --ch_mult of "
                f"{len(ch_mult)} levels halves images {halvings} times, not {img_size}."
            )
        blocks = [conv3x3(n_channels, nf)]
        width, side = nf, img_size
        for level, mult in enumerate(ch_mult):
            blocks += _level(width, nf * mult, res_blocks, side in attn_resolutions)
            width = nf * mult
            if level < halvings:
                blocks.append(Downsample(width))
                side //= 2
        blocks += _middle(width)
        blocks += [group_norm(width), conv3x3(width, emb_dim)]  # no activation in between
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(x)


class Generator(nn.Module):
    """Codes [B, emb_dim, h, w] -> images [B, C, S, S], the mirror of `Encoder`.

    A larger grid than it was trained on gives a larger image. Raises ValueError as `Encoder`.
    """

    def __init__(self, n_channels, nf, emb_dim, ch_mult, res_blocks, img_size, attn_resolutions):
        super().__init__()
        width, side = nf * ch_mult[-1], img_size // 2 ** (len(ch_mult) - 1)
        blocks = [conv3x3(emb_dim, width), *_middle(width)]
        for level, mult in reversed(list(enumerate(ch_mult))):
            blocks += _level(width, nf * mult, res_blocks, side in attn_resolutions)
            width = nf * mult
            if level > 0:
                blocks.append(Upsample(width))
                side *= 2
        blocks += [group_norm(width), conv3x3(width, n_channels)]
        self.blocks = nn.Sequential(*blocks)
        self.logsigma = nn.Sequential(
            conv3x3(width, width), nn.ReLU(), nn.Conv2d(width, n_channels, 1)
        )

    @property
    def last_weight(self):
        """Weight of the last convolution, where the adaptive weight compares gradients."""
        return self.blocks[-1].weight

    def forward(self, z):
        return self.blocks(z)

    def probabilistic(self, z):
        """Codes [B, emb_dim, h, w] -> (mu, logsigma), each [B, C, S, S], of a Gaussian a pixel.

        mu is what `forward` gives; see `gaussian_nll` for what they are good for.
        """
        features = self.blocks[:-1](z)
        return self.blocks[-1](features), self.logsigma(features)


class VQAutoEncoder(nn.Module):
    """Encoder, quantizer and generator as the flags in H describe them.

    Raises ValueError for an unknown quantizer, a `latent_shape` that img_size and ch_mult do not
    give, and what `Encoder` and `Generator` raise.
    """

    def __init__(self, H):
        super().__init__()
        architecture = dict(
            n_channels=H.n_channels,
            nf=H.nf,
            emb_dim=H.emb_dim,
            ch_mult=H.ch_mult,
            res_blocks=H.res_blocks,
            img_size=H.img_size,
            attn_resolutions=H.attn_resolutions,
        )
        self.encoder = Encoder(**architecture)
        side = H.img_size // 2 ** (len(H.ch_mult) - 1)
        if list(H.latent_shape) != [1, side, side]:
            raise ValueError(
                f"--latent_shape must be 1 {side} {side} for --img_size {H.img_size} and "
                f"--ch_mult of {len(H.ch_mult)} levels, not {' '.join(map(str, H.latent_shape))}."
            )
        self.grid_shape = (side, side)
        if H.quantizer == "nearest":
            self.quantize = NearestQuantizer(H.codebook_size, H.emb_dim, H.beta)
        elif H.quantizer == "gumbel":
            self.quantize = GumbelQuantizer(
                H.codebook_size, H.emb_dim, H.gumbel_kl_weight, H.gumbel_straight_through
            )
        else:
            raise ValueError(f"--quantizer must be nearest or gumbel, not {H.quantizer!r}.")
        self.generator = Generator(**architecture)

    def encode(self, x):
        """Images [B, C, S, S] -> what the quantizer gives: (z_q, codebook loss, stats, ids)."""
        return self.quantize(self.encoder(x))

    def decode_indices(self, indices, shape=None):
        """Ids [B, h*w] on a grid of shape (h, w), the trained one by default -> images."""
        return self.generator(self.quantize.embed_indices(indices, shape or self.grid_shape))

    def forward(self, x):
        """Images [B, C, S, S] -> (x_hat [B, C, S, S], codebook loss (0-d), stats, ids [B, h*w])."""
        z_q, codebook_loss, stats, indices = self.encode(x)
        return self.generator(z_q), codebook_loss, stats, indices
