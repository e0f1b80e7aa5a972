"""VQGAN, stage 1: an autoencoder, its discriminator, and their losses (2012.09841).

Shapes: B images of C channels and side S in [0, 1].
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F

from models.autoencoder.autoencoder import VQAutoEncoder, option
from models.autoencoder.diffaug import diff_augment
from models.autoencoder.discriminator import Discriminator, FeatureDiscriminator
from models.autoencoder.perceptual import SMALLEST, EfficientNetDistance, lpips_input


def generator_adversarial_loss(fake_logits):
    """-mean(D(x_hat)), 0-d: low where the generator fools the discriminator."""
    return -fake_logits.float().mean()


def hinge_loss(real_logits, fake_logits):
    """The discriminator's loss: the mean of its hinge on real and on generated images."""
    real = F.relu(1 - real_logits.float()).mean()
    fake = F.relu(1 + fake_logits.float()).mean()
    return (real + fake) / 2


def share_right(logits, sign):
    """The share of logits that have the `sign` they should have, 0-d."""
    return (sign * logits.detach() > 0).float().mean()


def adaptive_weight(nll_gradient, g_gradient, max_weight):
    """Weight that gives the adversarial gradient the size of the reconstruction's (2012.09841).

    lambda = |grad_L nll| / (|grad_L g_loss| + 1e-4), clamped to [0, max_weight], of the gradients
    of both losses with respect to the generator's last weight L; 0-d.
    """
    return (nll_gradient.norm() / (g_gradient.norm() + 1e-4)).clamp(0, max_weight)


class GivenGradient(torch.autograd.Function):
    """The 0-d `value` of a loss of x, as a function of x whose gradient is known:
    `scaled_gradient` / `scale`, float32 and of x's shape."""

    @staticmethod
    def forward(ctx, x, value, scaled_gradient, scale):
        ctx.save_for_backward(scaled_gradient)
        ctx.dtype, ctx.scale = x.dtype, scale
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        # With float16 `grad_output` holds the gradient scaler's factor, which is `scale`: their
        # quotient is about 1, and what x gets is scaled as it is without this function.
        (scaled_gradient,) = ctx.saved_tensors
        return (scaled_gradient * (grad_output / ctx.scale)).to(ctx.dtype), None, None, None


def weighted_sum(nll, g_loss, share, max_weight, x_hat, seen, last_weight, grad_scale=1.0):
    """nll + w g_loss with w = share · `adaptive_weight`: (0-d with x_hat's graph, w detached).

    Both losses are functions of `seen`, a leaf that holds the values of x_hat. So each of their
    networks is passed backward once, to the image: the last layer's gradients and that of the sum
    follow from the gradients there. `grad_scale`, a float or a 0-d tensor, multiplies the losses
    while they are differentiated, so that float16 gradients do not vanish. Where that makes both
    gradients of the last layer overflow, w counts as 0 in the value, which stays finite; the
    gradient does not, so the scaler lowers its scale.
    """
    of_image, of_last_weight = [], []
    for loss in (nll, g_loss):
        (gradient,) = torch.autograd.grad(loss * grad_scale, seen)
        of_image.append(gradient.float())
        (gradient,) = torch.autograd.grad(x_hat, last_weight, gradient, retain_graph=True)
        of_last_weight.append(gradient.float() / grad_scale)
    weight = share * adaptive_weight(*of_last_weight, max_weight)
    # A weight of 0 also comes of an adversarial gradient that float16 cannot hold: leave it out.
    adversarial = (weight * of_image[1]).masked_fill(weight == 0, 0)
    weight = weight.nan_to_num(0.0)  # of two infinite gradients
    value = (nll + weight * g_loss).detach()  # the graphs of both are used up
    return GivenGradient.apply(x_hat, value, of_image[0] + adversarial, grad_scale), weight


def build_discriminator(H, network):
    """The discriminator of H, of pixels or of the features of `network`, an `EfficientNetDistance`
    (None: a random one); ValueError for settings that do not fit together."""
    norm = option(H, "disc_norm")
    if option(H, "disc_input") == "pixels":
        return Discriminator(
            H.n_channels, H.ndf, H.disc_layers, H.img_size, norm, option(H, "disc_blur")
        )
    if H.img_size < (least := SMALLEST["efficientnet_lite0"]):
        raise ValueError(f"`disc_input` features needs images of {least} pixels or more, not "
                         f"`img_size` {H.img_size}: set `disc_input` pixels")
    return FeatureDiscriminator(network or EfficientNetDistance(), 2 * H.ndf, H.img_size, norm)


class VQGAN(nn.Module):
    """The autoencoder `ae`, its discriminator `disc`, and their objectives.

    `perceptual` is a module of `models.autoencoder.perceptual`, not needed with `perceptual_weight`
    0, and `network` the `EfficientNetDistance` of a discriminator of features. Raises ValueError
    for settings that do not fit together.
    """

    def __init__(self, H, perceptual=None, network=None):
        super().__init__()
        self.ae = VQAutoEncoder(H)
        self.disc = build_discriminator(H, network)
        self.perceptual_weight = H.perceptual_weight
        self.disc_start_step, self.disc_weight_max = H.disc_start_step, H.disc_weight_max
        self.disc_weight = option(H, "disc_weight")
        self.disc_counts_after = H.disc_start_step + option(H, "disc_lead_steps")
        self.disc_fade_steps = option(H, "disc_fade_steps")
        self.diff_aug = H.diff_aug
        name = option(H, "perceptual")
        if H.perceptual_weight > 0 and H.img_size < SMALLEST[name]:
            raise ValueError(
                f"`perceptual` {name} needs images of {SMALLEST[name]} pixels or more, not "
                f"`img_size` {H.img_size}: set `perceptual_weight` 0"
            )
        self.perceptual = perceptual if H.perceptual_weight > 0 else None
        if self.perceptual is not None:
            self.perceptual_range = H.perceptual_range if name == "lpips" else "0_1"
            if H.perceptual_range not in ("0_1", "-1_1"):
                raise ValueError(
                    f"`perceptual_range` must be 0_1 or -1_1, not {H.perceptual_range!r}"
                )
        self.never_learn = ["perceptual"]  # modules that an average of the weights shares
        if isinstance(self.disc, FeatureDiscriminator):
            self.never_learn.append("disc.network")

    def compile_networks(self, **options):
        """Compile encoder and generator: `VQAutoEncoder.compile_networks`."""
        self.ae.compile_networks(**options)

    def checkpoint_blocks(self, on=True):
        """Whether training computes the insides of blocks again for the backward pass."""
        self.ae.encoder.checkpoint_blocks = self.ae.generator.checkpoint_blocks = on

    def perceptual_loss(self, x, x_hat):
        """Mean perceptual distance of images [B, C, S, S] in [0, 1], 0-d; zero without one."""
        if self.perceptual is None:
            return x.new_zeros(())
        x, x_hat = (lpips_input(images, self.perceptual_range) for images in (x, x_hat))
        return self.perceptual(x, x_hat).float().mean()

    def reconstruction_losses(self, x, x_hat):
        """Images [B, C, S, S] -> (nll, l1, perceptual), 0-d: nll = mean|x - x_hat| + w · d."""
        l1 = (x - x_hat).abs().float().mean()
        perceptual = self.perceptual_loss(x, x_hat)
        return l1 + self.perceptual_weight * perceptual, l1, perceptual

    def discriminate(self, x, frozen=False):
        """Images [B, C, S, S] -> the discriminator's logits, after DiffAug where it is on.

        With `frozen` gradients reach x and not the discriminator's parameters.
        """
        # Not by switching requires_grad off: autocast may still hold half-precision copies of the
        # parameters that lead back to them.
        parameters = {n: p.detach() for n, p in self.disc.named_parameters()} if frozen else {}
        return functional_call(self.disc, parameters, diff_augment(x) if self.diff_aug else x)

    def adversarial_share(self, step):
        """How much of the adversarial loss counts at a step, from 0 to 1: nothing before
        `disc_start_step` and for `disc_lead_steps` after it, then it rises over
        `disc_fade_steps`."""
        if step < self.disc_counts_after:
            return 0.0
        return min(1.0, (step - self.disc_counts_after + 1) / (self.disc_fade_steps + 1))

    def generator_losses(self, x, step, grad_scale=1.0):
        """The autoencoder's objective on images x [B, C, S, S] at a training step.

        Returns (loss, x_hat, stats): loss is 0-d, x_hat [B, C, S, S] keeps its graph, stats are
        0-d and detached. The discriminator, which gets no gradient, takes part by its
        `adversarial_share`; gradients must be on then. `grad_scale`: see `weighted_sum`.
        """
        x_hat, codebook_loss, usage, _ = self.ae(x)
        share = self.adversarial_share(step)
        if share == 0:
            nll, l1, perceptual = self.reconstruction_losses(x, x_hat)
            objective, g_loss, d_weight = nll, torch.zeros_like(nll), torch.zeros_like(nll)
        else:
            seen = x_hat.detach().requires_grad_()
            nll, l1, perceptual = self.reconstruction_losses(x, seen)
            logits = self.discriminate(seen[:: self.disc.every], frozen=True)
            g_loss = generator_adversarial_loss(logits)
            objective, d_weight = weighted_sum(
                nll, g_loss, share * self.disc_weight, self.disc_weight_max, x_hat, seen,
                self.ae.generator.blocks[-1].weight, grad_scale,
            )
        loss = objective + codebook_loss
        stats = dict(
            l1=l1, perceptual=perceptual, g_loss=g_loss, d_weight=d_weight,
            codebook_loss=codebook_loss, perplexity=usage["perplexity"],
        )
        return loss, x_hat, {name: value.detach() for name, value in stats.items()}

    def discriminator_losses(self, x, x_hat):
        """(hinge loss, 0-d, stats) of images [B, C, S, S] and reconstructions, which get no
        gradient; the stats are the shares of both that it takes for what they are."""
        x, x_hat = x[:: self.disc.every], x_hat[:: self.disc.every].detach()
        if self.disc.by_batch:
            real, fake = self.discriminate(x), self.discriminate(x_hat)
        else:
            real, fake = self.discriminate(torch.cat((x, x_hat))).chunk(2)
        stats = dict(d_real_right=share_right(real, 1), d_fake_right=share_right(fake, -1))
        return hinge_loss(real, fake), stats
