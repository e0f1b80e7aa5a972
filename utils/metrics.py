"""Measures of images, pure functions on tensors."""


def psnr(images, others):
    """Peak signal-to-noise ratio of each pair, [B] in dB, of images [B, C, H, W] in [0, 1]."""
    error = (images.double() - others.double()).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-12).log10()
