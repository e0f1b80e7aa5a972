"""Hyperparameters: `get_vqgan_hparams(argv)` and its siblings turn flags into checked objects."""

from hparams.scripts import (
    get_big_samples_hparams, get_digits_report_hparams, get_elbo_hparams, get_fid_hparams,
    get_inpaint_hparams, get_nearest_neighbours_hparams, get_page_hparams, get_prdc_hparams,
    get_reconstruct_hparams, get_sampler_hparams, get_samples_hparams, get_vqgan_fid_hparams,
    get_vqgan_hparams,
)
from utils.errors import SettingsError, UserError

__all__ = [
    "SettingsError", "UserError", "get_big_samples_hparams", "get_digits_report_hparams",
    "get_elbo_hparams", "get_fid_hparams", "get_inpaint_hparams",
    "get_nearest_neighbours_hparams", "get_page_hparams", "get_prdc_hparams",
    "get_reconstruct_hparams", "get_sampler_hparams", "get_samples_hparams",
    "get_vqgan_fid_hparams", "get_vqgan_hparams",
]
