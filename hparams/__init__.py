"""Hyperparameters: `get_vqgan_hparams(argv)` and its siblings turn flags into checked objects."""

from hparams.errors import SettingsError, UserError
from hparams.scripts import (
    SamplerSettings,
    VQGANSettings,
    get_big_samples_hparams,
    get_inpaint_hparams,
    get_samples_hparams,
    get_sampler_hparams,
    get_vqgan_hparams,
)

__all__ = [
    "SamplerSettings",
    "SettingsError",
    "UserError",
    "VQGANSettings",
    "get_big_samples_hparams",
    "get_inpaint_hparams",
    "get_samples_hparams",
    "get_sampler_hparams",
    "get_vqgan_hparams",
]
