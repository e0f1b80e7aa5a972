"""Losses and likelihoods of stage 1, as functions of tensors."""

import math

import torch
from torch.nn import functional as F


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
    `grad_scale` multiplies the losses while they are differentiated, so that float16 gradients do
    not vanish; the result is that of the unscaled gradients.
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

    A level is 1/levels wide, so an image's probability is its density over levels^n_dims. The
    published figures are of 32 levels, others of 256.
    """
    return nats / (n_dims * math.log(2)) + math.log2(levels)


def gaussian_level_nll(x, mu, logsigma, levels=256):
    """-log of the probability that a Gaussian gives to each image's levels: nats, float64 [B].

    x holds k / (levels - 1), k = 0, 1, ... Level k is the interval of that width around it, the
    first and the last reach to infinity. So probabilities add up to 1 and nats are never negative.
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
