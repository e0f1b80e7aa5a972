"""How ids are drawn from a denoiser, on any canvas."""
