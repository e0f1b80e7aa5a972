"""Likelihoods of images under a Gaussian for each pixel, for the ELBO (2111.12701)."""

import math

import torch


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
