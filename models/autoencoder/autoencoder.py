"""The autoencoder: images to grids of codebook ids and back (Esser et al., 2012.09841).

Shapes: B images of C channels and side S in [0, 1]; h x w grid, D = emb_dim, K = codebook_size.
Module names give the keys of the published files: `encoder.blocks.N`, `generator.blocks.N`, ...
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.autoencoder.quantizers import GumbelQuantizer, NearestQuantizer, embed_grid
from models.messages import listed

PUBLISHED = dict(  # what settings that the published programs do not have are with them
    norm_groups=32, entropy_weight=0.0, codebook_revival=0, perceptual="lpips",
    disc_input="pixels", disc_norm="batch", disc_blur=False, disc_weight=1.0, disc_lead_steps=0,
    disc_fade_steps=0,
)


def option(H, name):
    """The setting `name` of H, or what it is with the published programs where H lacks it."""
    return getattr(H, name, PUBLISHED[name])


def group_norm(width, groups):
    return nn.GroupNorm(groups, width, eps=1e-6)


def conv3x3(in_width, out_width):
    return nn.Conv2d(in_width, out_width, 3, padding=1)


class ResBlock(nn.Module):
    """Two rounds of norm, swish, 3x3 convolution, and a skip: [B, in, H, W] -> [B, out, H, W]."""

    def __init__(self, in_width, out_width, groups=32):
        super().__init__()
        self.norm1 = group_norm(in_width, groups)
        self.conv1 = conv3x3(in_width, out_width)
        self.norm2 = group_norm(out_width, groups)
        self.conv2 = conv3x3(out_width, out_width)
        # Published files hold this weight in every block, also where the skip is the identity.
        self.conv_out = nn.Conv2d(in_width, out_width, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if x.shape == h.shape else self.conv_out(x))


class AttentionBlock(nn.Module):
    """One head of self-attention over all positions, with a skip: [B, width, H, W], kept."""

    def __init__(self, width, groups=32):
        super().__init__()
        self.norm = group_norm(width, groups)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x):
        # Contiguous tokens, and linear layers in place of 1x1 convolutions: what SDPA gets has
        # stride 1 in its last dimension, without which no fused kernel takes it. (On CUDA flash
        # takes heads of up to 256 channels; wider ones go to the memory-efficient kernel.)
        h = self.norm(x).flatten(2).transpose(1, 2).contiguous()  # [B, H*W, width]
        q, k, v = (pointwise(project, h).unsqueeze(1) for project in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # [B, H*W, width]
        return x + pointwise(self.proj_out, h).transpose(1, 2).unflatten(2, x.shape[2:])


def pointwise(conv, tokens):
    """The 1x1 convolution `conv` of tokens [B, N, in]: [B, N, out]."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


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
        if x.device.type != "cpu":
            return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return F.conv_transpose2d(x, doubled(self.conv.weight), self.conv.bias, stride=2, padding=1)


def doubled(weight):
    """Kernels [in, out, 4, 4] of the transposed convolution of stride 2 and padding 1 that is a 3x3
    convolution `weight` [out, in, 3, 3] of an image doubled by nearest neighbour.

    Pixels that repeat share taps, so 16 products do the work of 36. Measured on a CPU, forward and
    backward: 2.4 times as fast in float32, 1.7 in bfloat16 (64 channels, 64 x 64 pixels).
    """
    taps = F.pad(weight.flip(2, 3), (1, 1, 1, 1))  # [out, in, 5, 5]
    taps = taps[:, :, 1:] + taps[:, :, :-1]
    return (taps[..., 1:] + taps[..., :-1]).transpose(0, 1)


def check_architecture(H):
    """Raise ValueError where the autoencoder's widths and sides do not fit together."""
    halvings = len(H.ch_mult) - 1
    if H.img_size % 2**halvings:
        raise ValueError(
            f"`img_size` {H.img_size} cannot be halved {halvings} times, as the "
            f"{len(H.ch_mult)} levels of `ch_mult` ask"
        )
    sides = [H.img_size >> level for level in range(len(H.ch_mult))]
    if list(H.latent_shape) != [1, sides[-1], sides[-1]]:
        raise ValueError(
            f"`latent_shape` {listed(H.latent_shape)} does not follow from `img_size` "
            f"{H.img_size} and `ch_mult` {listed(H.ch_mult)}, which give 1 {sides[-1]} {sides[-1]}"
        )
    for mult in (*H.ch_mult, 1):  # the first block starts from nf channels
        groups = option(H, "norm_groups")
        if H.nf * mult % groups:
            raise ValueError(
                f"`nf` {H.nf} x `ch_mult` {mult} = {H.nf * mult} is no multiple of `norm_groups` "
                f"{groups}, the number of normalisation groups"
            )
    for resolution in H.attn_resolutions:
        if resolution not in sides:
            raise ValueError(
                f"`attn_resolutions` {resolution} never occurs: the sides are {listed(sides)}"
            )


def level_blocks(H, in_width, level):
    """The blocks of a level of `ch_mult`, whose grid has side S / 2^level."""
    out_width, groups, blocks = H.nf * H.ch_mult[level], option(H, "norm_groups"), []
    for width in [in_width] + [out_width] * (H.res_blocks - 1):
        blocks.append(ResBlock(width, out_width, groups))
        if H.img_size >> level in H.attn_resolutions:
            blocks.append(AttentionBlock(out_width, groups))
    return blocks


def middle_blocks(width, groups):
    return [
        ResBlock(width, width, groups), AttentionBlock(width, groups),
        ResBlock(width, width, groups),
    ]


def formatted(x, blocks):
    """x [B, D, H, W] in the memory format of the weights of `blocks`, whose first is a convolution.

    A tensor in another format would make every convolution copy its weights.
    """
    weight = blocks[0].weight
    channels_last = not weight.is_contiguous()
    return x.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


class Network(nn.Module):
    """A chain of `blocks`. With `checkpoint_blocks` training keeps only what goes into each block
    and computes its inside again in the backward pass: less memory, a third more time."""

    checkpoint_blocks = False

    def run(self, x, blocks):
        """x through `blocks`, which are all or the first ones of the chain."""
        x = formatted(x, blocks)
        checkpoints = self.checkpoint_blocks and self.training and torch.is_grad_enabled()
        for block in blocks:
            if checkpoints and not isinstance(block, nn.Conv2d):
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x


class Encoder(Network):
    """Images [B, C, S, S] -> vectors [B, D, h, w], h = w = S / 2^(len(ch_mult) - 1)."""

    def __init__(self, H):
        super().__init__()
        blocks, width, groups = [conv3x3(H.n_channels, H.nf)], H.nf, option(H, "norm_groups")
        for level, mult in enumerate(H.ch_mult):
            if level > 0:
                blocks.append(Downsample(width))
            blocks += level_blocks(H, width, level)
            width = H.nf * mult
        blocks += middle_blocks(width, groups)
        blocks += [group_norm(width, groups), conv3x3(width, H.emb_dim)]  # no activation in between
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        return self.run(x, self.blocks)


class Generator(Network):
    """Vectors [B, D, h, w] -> images [B, C, S, S], the mirror of `Encoder` on grids of any size."""

    def __init__(self, H):
        super().__init__()
        width, groups = H.nf * H.ch_mult[-1], option(H, "norm_groups")
        blocks = [conv3x3(H.emb_dim, width), *middle_blocks(width, groups)]
        for level, mult in reversed(list(enumerate(H.ch_mult))):
            blocks += level_blocks(H, width, level)
            width = H.nf * mult
            if level > 0:
                blocks.append(Upsample(width))
        blocks += [group_norm(width, groups), conv3x3(width, H.n_channels)]
        self.blocks = nn.Sequential(*blocks)
        self.logsigma = nn.Sequential(
            conv3x3(width, width), nn.ReLU(), nn.Conv2d(width, H.n_channels, 1)
        )

    def features(self, z):
        """Vectors [B, D, h, w] -> what the last convolution makes images of: [B, nf, S, S]."""
        return self.run(z, self.blocks[:-1])

    def forward(self, z):
        return self.blocks[-1](self.features(z))

    def probabilistic(self, z):
        """Vectors [B, D, h, w] -> (mu, logsigma), each [B, C, S, S], of a Gaussian a pixel."""
        features = self.features(z)
        return self.blocks[-1](features), self.logsigma(features)


class VQAutoEncoder(nn.Module):
    """Encoder, quantizer and generator; raises ValueError for settings that do not fit together."""

    def __init__(self, H):
        super().__init__()
        check_architecture(H)
        self.grid_shape = tuple(H.latent_shape[1:])
        self.encoder = Encoder(H)
        if H.quantizer == "nearest":
            self.quantize = NearestQuantizer(
                H.codebook_size, H.emb_dim, H.beta, option(H, "entropy_weight"),
                count_uses=option(H, "codebook_revival") > 0,
            )
        elif H.quantizer == "gumbel":
            self.quantize = GumbelQuantizer(
                H.codebook_size, H.emb_dim, H.gumbel_kl_weight, H.gumbel_straight_through
            )
        else:
            raise ValueError(f"`quantizer` must be nearest or gumbel, not {H.quantizer!r}")
        self.generator = Generator(H)

    @property
    def codebook(self):
        """The codebook [K, D] without a gradient; it shares memory with the quantizer's."""
        return self.quantize.codebook.detach()

    def without_gradient(self):
        """Names of the parameters that no loss of training has a gradient for: `logsigma`, and
        what only published files hold, the weight of a skip that is the identity."""
        names = [name for name, _ in self.named_parameters() if ".logsigma." in name]
        for name, block in self.named_modules():
            if isinstance(block, ResBlock) and block.conv1.in_channels == block.conv1.out_channels:
                names += [f"{name}.conv_out.{part}" for part in ("weight", "bias")]
        return names

    def compile_networks(self, **options):
        """Compile encoder and generator, with `options` of torch.compile; names of the state dict
        stay. The quantizer, which is small, runs as it is, and so does the last convolution, whose
        gradient is asked for by itself (see `weighted_sum` in vqgan.py). Copies of a compiled
        network would compute with this one's weights: copy before."""
        self.encoder.forward = torch.compile(self.encoder.forward, **options)
        self.generator.features = torch.compile(self.generator.features, **options)

    def encode(self, x):
        """Images [B, C, S, S] -> what the quantizer returns: (z_q, codebook loss, stats, ids)."""
        return self.quantize(self.encoder(x))

    def decode_indices(self, indices, shape=None):
        """Ids [B, h*w] on a grid of shape (h, w), the trained one by default -> images."""
        return self.generator(embed_grid(self.quantize.codebook, indices, shape or self.grid_shape))

    def forward(self, x):
        """Images [B, C, S, S] -> (x_hat [B, C, S, S], codebook loss (0-d), stats, ids [B, h*w])."""
        z_q, codebook_loss, stats, indices = self.encode(x)
        return self.generator(z_q), codebook_loss, stats, indices
