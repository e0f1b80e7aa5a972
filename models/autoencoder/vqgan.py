"""VQGAN, stage 1: images to grids of codebook ids and back (Esser et al., 2012.09841).

Shapes: B images of C channels and side S in [0, 1]; the grid is h x w with D = emb_dim.
Module names give the keys of the published files: `ae.encoder.blocks.N`, `disc.main.N`, ...
"""

import math

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from models.autoencoder.diffaug import diff_augment
from models.autoencoder.discriminator import Discriminator
from models.autoencoder.perceptual import lpips_input
from models.autoencoder.quantizers import GumbelQuantizer, NearestQuantizer

NORM_GROUPS = 32


# Layers ------------------------------------------------------------------------------------


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


# Losses ------------------------------------------------------------------------------------


def generator_adversarial_loss(fake_logits):
    """-mean(D(x_hat)): what the generator gets for fooling the discriminator."""
    return -fake_logits.float().mean()


def hinge_loss(real_logits, fake_logits):
    """The discriminator's loss: the mean of its hinge on real and on generated images."""
    real = F.relu(1 - real_logits.float()).mean()
    fake = F.relu(1 + fake_logits.float()).mean()
    return (real + fake) / 2


def adaptive_weight(nll, g_loss, last_weight, max_weight, grad_scale=1.0):
    """Weight that gives the adversarial gradient the size of the reconstruction's (2012.09841).

    lambda = |grad_L nll| / (|grad_L g_loss| + 1e-4), clamped to [0, max_weight], where L is
    `last_weight` and both losses are 0-d with a graph to it. Returns a 0-d tensor without one.
    `grad_scale` multiplies the losses while they are differentiated, so that gradients passing
    through float16 do not vanish; the result is that of the unscaled gradients.
    """
    def gradient_norm(loss):
        (gradient,) = torch.autograd.grad(loss * grad_scale, last_weight, retain_graph=True)
        return (gradient.float() / grad_scale).norm()

    weight = gradient_norm(nll) / (gradient_norm(g_loss) + 1e-4)
    return weight.clamp(0, max_weight).detach()


def gaussian_nll(x, mu, logsigma):
    """-log N(x; mu, exp(logsigma)^2) in nats, summed over each image: [B, ...] x 3 -> [B]."""
    scaled = (x - mu) * torch.exp(-logsigma)
    nats = 0.5 * scaled.square() + logsigma + 0.5 * math.log(2 * math.pi)
    return nats.flatten(1).sum(1)


def bits_per_dim(nats, n_dims, levels):
    """Nats of a density on [0, 1]^n_dims -> bits per dimension of images of `levels` levels.

    A level is 1/levels wide, so an image's probability is its density over levels^n_dims; both
    2^5 (published) and 2^8 levels are in use, and `levels=1` leaves the density as it is.
    """
    return nats / (n_dims * math.log(2)) + math.log2(levels)


def gaussian_level_nll(x, mu, logsigma, levels=256):
    """-log of the probability that a Gaussian gives to each image's levels: nats, float64 [B].

    x holds k / (levels - 1), k = 0, 1, ... The level k is the interval of that width around it,
    the first and the last reaching to infinity: a pixel's probabilities add up to 1.
    Unlike that of a density this is never negative, however narrow the Gaussian.
    """
    mu, logsigma = mu.double(), logsigma.double()
    level = (x.double() * (levels - 1)).round()
    lower = ((level - 0.5) / (levels - 1) - mu) * torch.exp(-logsigma)
    upper = ((level + 0.5) / (levels - 1) - mu) * torch.exp(-logsigma)
    lower = lower.masked_fill(level == 0, -math.inf)
    upper = upper.masked_fill(level == levels - 1, math.inf)
    # In the left tail logarithms of both ends are exact; the right one is its mirror image.
    mirror = lower + upper > 0
    lower, upper = torch.where(mirror, -upper, lower), torch.where(mirror, -lower, upper)
    log_lower, log_upper = torch.special.log_ndtr(lower), torch.special.log_ndtr(upper)
    nats = -(log_upper + torch.log(-torch.expm1(log_lower - log_upper)))
    return nats.flatten(1).sum(1)


def gaussian_nll_bits(x, mu, logsigma, levels):
    """`gaussian_nll` of images with values in [0, 1], in bits per dimension: [B, ...] x 3 -> [B].

    See `bits_per_dim` for `levels`.
    """
    return bits_per_dim(gaussian_nll(x, mu, logsigma), x[0].numel(), levels)


# Model -------------------------------------------------------------------------------------


class VQGAN(nn.Module):
    """The autoencoder `ae`, its discriminator `disc`, and their objectives.

    `perceptual` is a frozen module that maps two batches [B, 3, S, S] to distances [B, 1, 1, 1]
    (`models.autoencoder.perceptual.build_perceptual()`); it is kept only where `perceptual_weight` uses it.
    Raises ValueError for settings that do not fit together.
    """

    def __init__(self, H, perceptual=None):
        super().__init__()
        self.ae = VQAutoEncoder(H)
        self.disc = Discriminator(H.n_channels, H.ndf, H.disc_layers, H.img_size)
        self.perceptual_weight = H.perceptual_weight
        self.disc_start_step, self.disc_weight_max = H.disc_start_step, H.disc_weight_max
        self.diff_aug = H.diff_aug
        self.perceptual = None
        if perceptual is not None and H.perceptual_weight > 0:
            if H.perceptual_range not in ("0_1", "-1_1"):
                raise ValueError(
                    f"--perceptual_range must be 0_1 or -1_1, not {H.perceptual_range!r}."
                )
            if H.img_size < 16 or H.n_channels not in (1, 3):
                raise ValueError(
                    "LPIPS needs images of at least 16 pixels and of 1 or 3 channels: set "
                    f"--perceptual_weight 0 for {H.n_channels}x{H.img_size}x{H.img_size}."
                )
            self.perceptual_range = H.perceptual_range
            self.perceptual = perceptual

    def perceptual_loss(self, x, x_hat):
        """Mean LPIPS between images [B, C, S, S] in [0, 1], 0-d; zero without `perceptual`."""
        if self.perceptual is None:
            return x.new_zeros(())
        x, x_hat = (lpips_input(images, self.perceptual_range) for images in (x, x_hat))
        return self.perceptual(x, x_hat).float().mean()

    def reconstruction_losses(self, x, x_hat):
        """Images [B, C, S, S] -> (nll, l1, perceptual), 0-d: nll = mean|x - x_hat| + w · LPIPS."""
        l1 = (x - x_hat).abs().float().mean()
        perceptual = self.perceptual_loss(x, x_hat)
        return l1 + self.perceptual_weight * perceptual, l1, perceptual

    def discriminate(self, x, frozen=False):
        """Images [B, C, S, S] -> the discriminator's logits, after DiffAug where it is on.

        With `frozen` gradients reach x and not the discriminator's parameters.
        """
        parameters = {}
        if frozen:
            # Stand-ins rather than requires_grad switched off for a while: autocast may still
            # hold half-precision copies of the parameters that lead back to them.
            parameters = {name: p.detach() for name, p in self.disc.named_parameters()}
        return functional_call(self.disc, parameters, diff_augment(x) if self.diff_aug else x)

    def generator_losses(self, x, step, grad_scale=1.0):
        """The autoencoder's objective on images x [B, C, S, S] at a training step.

        Returns (loss, x_hat, stats): loss is 0-d, x_hat [B, C, S, S] keeps its graph, and stats
        holds 0-d tensors without one: l1, perceptual, g_loss, d_weight, codebook_loss,
        perplexity. The discriminator takes part from `disc_start_step` on, and gets no gradient.
        Needs gradients to be on from then. `grad_scale`: see `adaptive_weight`.
        """
        x_hat, codebook_loss, codes, _ = self.ae(x)
        nll, l1, perceptual = self.reconstruction_losses(x, x_hat)
        if step < self.disc_start_step:
            # The weight would be zero: the discriminator need not run.
            g_loss = d_weight = torch.zeros_like(nll)
        else:
            g_loss = generator_adversarial_loss(self.discriminate(x_hat, frozen=True))
            d_weight = adaptive_weight(
                nll, g_loss, self.ae.generator.last_weight, self.disc_weight_max, grad_scale
            )
        loss = nll + d_weight * g_loss + codebook_loss
        stats = dict(
            l1=l1,
            perceptual=perceptual,
            g_loss=g_loss,
            d_weight=d_weight,
            codebook_loss=codebook_loss,
            perplexity=codes["perplexity"],
        )
        return loss, x_hat, {name: value.detach() for name, value in stats.items()}

    def discriminator_loss(self, x, x_hat):
        """Hinge loss (0-d) of the discriminator on images and their reconstructions.

        No gradient reaches x_hat, whose graph may be used up.
        """
        return hinge_loss(self.discriminate(x), self.discriminate(x_hat.detach()))
