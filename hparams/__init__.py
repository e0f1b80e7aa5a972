"""Hyperparameters: `get_vqgan_hparams(argv)` and its siblings turn flags into checked objects."""

from utils.errors import SettingsError, UserError
from hparams.scripts import (
    SamplerSettings,
    VQGANSettings,
    get_big_samples_hparams,
    get_elbo_hparams,
    get_fid_hparams,
    get_inpaint_hparams,
    get_nearest_neighbours_hparams,
    get_prdc_hparams,
    get_samples_hparams,
    get_sampler_hparams,
    get_vqgan_fid_hparams,
    get_vqgan_hparams,
)

__all__ = [
    "SamplerSettings",
    "SettingsError",
    "UserError",
    "VQGANSettings",
    "get_big_samples_hparams",
    "get_elbo_hparams",
    "get_fid_hparams",
    "get_inpaint_hparams",
    "get_nearest_neighbours_hparams",
    "get_prdc_hparams",
    "get_samples_hparams",
    "get_sampler_hparams",
    "get_vqgan_fid_hparams",
    "get_vqgan_hparams",
]
