"""The hyperparameters of each script: its groups of settings, its defaults, its own rules.

What shapes fit together is a rule of the models, which `utils/training/build.py` asks before a run
begins.
"""

import dataclasses
import os
from functools import partial

from hparams.defaults import SAMPLER_DEFAULTS, VQGAN_DEFAULTS
from hparams.environment import PASSWORD, is_loopback, process_count
from hparams.experiment_groups import (
    ELBO, FID, PRDC, Canvas, Features, Inpainting, NearestNeighbours, Page, Reconstruction, Samples,
    SamplesToMeasure,
)
from hparams.groups import (
    Autoencoder, AutoencoderArchitecture, Data, Logging, Sampler, SamplerArchitecture,
    SamplingMethod, Training,
)
from hparams.parser import LoadedRun, get_hparams
from hparams.settings import names_of, show
from utils.errors import SettingsError

AUTOENCODER_ARCHITECTURE = names_of(AutoencoderArchitecture)
SAMPLER_ARCHITECTURE = names_of(SamplerArchitecture)
LPIPS = ("perceptual_range", "vgg_weights")  # what LPIPS alone reads, in training or measuring


class VQGANSettings(Data, Autoencoder, Training, Logging):
    """train_vqgan.py: train a VQGAN, images to grids of codebook ids and back."""

    def validate(self):
        super().validate()
        check_steps_left(self)
        if self.lr is None:
            self.lr = self.base_lr * self.batch_size * process_count()  # each has a batch

    def check_flags(self, given):
        super().check_flags(given)
        derived = self.base_lr * self.batch_size * process_count()
        if "base_lr" in given and "lr" not in given and self.lr != derived:
            raise SettingsError(f"--base_lr would do nothing: lr is {self.lr} by the dataset's "
                                f"defaults or the run, so give --lr")
        for name in LPIPS:
            if name in given and not (self.perceptual == "lpips" and self.perceptual_weight):
                raise SettingsError(f"--{name} would do nothing: it is for --perceptual lpips, at "
                                    f"a weight above 0")


class SamplerSettings(Data, Sampler, Training, Logging, Autoencoder):
    """train_sampler.py: train a prior over the ids of a trained VQGAN."""

    def validate(self):
        super().validate()
        check_steps_left(self)

    def check_flags(self, given):
        super().check_flags(given)
        for name in LPIPS:
            if name in given:
                raise SettingsError(f"--{name} would do nothing: the autoencoder is trained")


def check_steps_left(H):
    """There are steps left to train, unless a run is resumed, which may be at its end."""
    if H.load_step >= H.train_steps and not H.resume:
        raise SettingsError(
            f"load_step {H.load_step} leaves nothing to train: train_steps is {H.train_steps}"
        )


# What training reads and experiments do not, though their models are built with some of it.
TRAINING_ONLY = names_of(SamplerSettings) - {
    *AUTOENCODER_ARCHITECTURE, *SAMPLER_ARCHITECTURE, *names_of(SamplingMethod),
    "dataset", "custom_dataset_path", "crops", "crop_side", "num_workers",
    "batch_size", "amp", "ema", "load_dir", "load_step", "seed", "device", "resume",
    "log_dir", "save_individually", "visdom_server", "visdom_port", "no_visdom",
    "ae_load_dir", "ae_load_step",
}


class ExperimentSettings(Data, Sampler, Training, Logging, Autoencoder):
    """What all experiments on a sampler read."""

    without_flag = TRAINING_ONLY


class SamplesSettings(Samples, ExperimentSettings):
    """experiments/get_samples.py: draw samples from a trained sampler and save them as PNG."""


class DigitsReportSettings(SamplesSettings):
    """experiments/digits_report.py: judge a sampler that was trained on the digits."""


class FIDSettings(SamplesToMeasure, Features, FID, ExperimentSettings):
    """experiments/calc_FID.py: Fréchet distance between samples and the dataset's images."""


class PRDCSettings(SamplesToMeasure, Features, PRDC, ExperimentSettings):
    """experiments/calc_PRDC.py: precision, recall, density and coverage of samples."""

    def validate(self):
        super().validate()
        if self.fake_images_path and self.latents_path:
            raise SettingsError("--fake_images_path and --latents_path exclude each other")


class ELBOSettings(ELBO, ExperimentSettings):
    """experiments/calc_approximate_ELBO.py: a bound on the likelihood of the validation images."""

    without_flag = TRAINING_ONLY - names_of(ELBO) - {"max_bad_steps", "deterministic"}


class NearestNeighboursSettings(NearestNeighbours, ExperimentSettings):
    """experiments/calc_nearest_neighbours.py: the training images nearest to samples."""

    without_flag = TRAINING_ONLY - {*LPIPS}


class VQGANFIDSettings(Features, FID, Data, Autoencoder, Training, Logging):
    """experiments/calc_VQGAN_FID.py: Fréchet distance between images and reconstructions."""

    without_flag = TRAINING_ONLY


class ReconstructSettings(Reconstruction, Data, Autoencoder, Training, Logging):
    """experiments/reconstruct.py: images through a trained autoencoder, as pairs and in figures."""

    without_flag = TRAINING_ONLY | {"batch_size", "resume"}

    def check_flags(self, given):
        super().check_flags(given)
        for name in ("crops", "crop_side"):
            if self.images is not None and name in given:
                raise SettingsError(f"--{name} would do nothing: it is for a dataset, and --images "
                                    f"are taken whole, as their central squares")


class InpaintSettings(SamplesSettings, Inpainting):
    """experiments/inpaint.py: fill in a part of an image."""

    without_flag = TRAINING_ONLY | {"resume"}

    def validate(self):
        super().validate()
        if self.sampler != "absorbing":
            raise SettingsError("inpainting needs --sampler absorbing: autoregressive draws in "
                                "one order only")
        if (self.mask is None) == (self.box is None):
            raise SettingsError("say what is to be filled in, with either --mask or --box")
        if self.box is not None:
            inside = len(self.box) == 4 and max(self.box) <= self.img_size
            if not inside or self.box[0] >= self.box[2] or self.box[1] >= self.box[3]:
                raise SettingsError(
                    f"--box is x0 y0 x1 y1 with x0 < x1 and y0 < y1 in an image of "
                    f"{self.img_size} pixels, not {show(self.box)}"
                )


NOT_NATIVE = "--canvas native needs a model without absolute positions: use --canvas windows"


def runs_on_any_grid(H):
    """Whether the denoiser runs on canvases of any size, not only on windows of that trained on."""
    return H.attention != "full" and "absolute" not in H.position


class BigSamplesSettings(SamplesSettings, Canvas):
    """experiments/generate_big_samples.py: draw samples larger than those trained on."""

    without_flag = TRAINING_ONLY | {"resume"}

    def validate(self):
        super().validate()
        trained = self.latent_shape[1:]
        if self.sampler != "absorbing":
            raise SettingsError("larger canvases need --sampler absorbing")
        if len(self.shape) != 2:
            raise SettingsError(f"--shape is height and width in ids, not {show(self.shape)}")
        if any(side < least for side, least in zip(self.shape, trained)):
            raise SettingsError(
                f"--shape {show(self.shape)} is smaller than the {show(trained)} ids trained on"
            )
        if self.canvas == "native" and not runs_on_any_grid(self):
            raise SettingsError(NOT_NATIVE)


class PageSettings(Page, ExperimentSettings):
    """experiments/web_demo.py: a page to play with a trained model."""

    without_flag = TRAINING_ONLY | {
        "resume", "save_individually", "visdom_server", "visdom_port", "no_visdom",
    }

    def validate(self):
        super().validate()
        self.no_visdom = True
        self.password = self.password or os.environ.get(PASSWORD)
        if not self.password and not is_loopback(self.host):
            raise SettingsError(f"--host {self.host} lets others in: set a password in the "
                                f"variable {PASSWORD}, or with --password")


CROPS = {"crops", "crop_side"}
AUTOENCODER_RUN = LoadedRun(
    "ae_load_dir", "ae_load_step", names_of(Autoencoder),
    {*LPIPS, *CROPS},
)
VQGAN_RUN = LoadedRun(
    "load_dir", "load_step", names_of(Autoencoder),
    {"dataset", "custom_dataset_path", "ema", *CROPS},
)
SAMPLER_RUN = LoadedRun(
    "load_dir", "load_step", SAMPLER_ARCHITECTURE,
    {"dataset", "custom_dataset_path", "ae_load_dir", "ae_load_step", "ema", *CROPS,
     *names_of(SamplingMethod)},
)


# What a command says of itself, which a run that goes on does not take from its own record.
COMMAND = {"load_dir", "load_step", "load_optim", "log_dir", "resume", "overwrite", "device",
           "visdom_server", "visdom_port", "no_visdom"}


# What a person chooses first, from which the defaults of a training follow.
CHOSEN = {"dataset", "custom_dataset_path", "recipe", "preset", "train_steps", "sampler",
          "ae_load_dir", "ae_load_step"}


def default_settings(settings):
    """The settings, a dict, of a training for which only CHOSEN of the dict `settings` are given:
    that of a run's hparams.yaml.

    What a command says of itself stays, and a sampler keeps what is its autoencoder's. Raises
    SettingsError where they do not go together.
    """
    is_sampler = "sampler" in settings
    settings_class = SamplerSettings if is_sampler else VQGANSettings
    stage = SAMPLER_DEFAULTS if is_sampler else VQGAN_DEFAULTS
    chosen = {"recipe": "published", "preset": "published"}  # of files that are older than these
    chosen |= {name: settings[name] for name in CHOSEN & settings.keys()}
    kept = names_of(Autoencoder) if is_sampler else set()
    kept = {name: settings[name] for name in kept & settings.keys()}
    H = settings_class()
    for name, value in {**stage.of(chosen, True), **kept, **chosen}.items():
        if name in settings_class.__dataclass_fields__:
            setattr(H, name, value)
    H.validate()
    return dataclasses.asdict(H) | {name: settings[name] for name in COMMAND & settings.keys()}


def runs_to_train_on(architecture, training):
    """The runs that a training script goes on from: --load_dir, and --log_dir with --resume.

    Where that is the run of --log_dir itself, its settings of `training` are the defaults.
    """
    own, recipe = training - architecture - COMMAND, {"recipe", "preset"}
    return [LoadedRun("load_dir", "load_step", architecture, recipe, own),
            LoadedRun("log_dir", "resume", architecture, recipe, own)]


# Each takes `argv`, a list of strings, or None for the command line, and gives the script's H.
get_vqgan_hparams = partial(
    get_hparams, VQGANSettings, VQGAN_DEFAULTS,
    runs_to_train_on(AUTOENCODER_ARCHITECTURE, names_of(VQGANSettings)),
)
get_sampler_hparams = partial(
    get_hparams, SamplerSettings, SAMPLER_DEFAULTS,
    [*runs_to_train_on(SAMPLER_ARCHITECTURE, names_of(SamplerSettings)), AUTOENCODER_RUN],
)
get_vqgan_fid_hparams = partial(
    get_hparams, VQGANFIDSettings, VQGAN_DEFAULTS, [VQGAN_RUN], must_load=True
)

get_reconstruct_hparams = partial(
    get_hparams, ReconstructSettings, VQGAN_DEFAULTS, [VQGAN_RUN], must_load=True
)


def of_experiment(settings_class):
    runs = [SAMPLER_RUN, AUTOENCODER_RUN]
    return partial(get_hparams, settings_class, SAMPLER_DEFAULTS, runs, must_load=True)


get_samples_hparams = of_experiment(SamplesSettings)
get_digits_report_hparams = of_experiment(DigitsReportSettings)
get_inpaint_hparams = of_experiment(InpaintSettings)
get_big_samples_hparams = of_experiment(BigSamplesSettings)
get_fid_hparams = of_experiment(FIDSettings)
get_prdc_hparams = of_experiment(PRDCSettings)
get_elbo_hparams = of_experiment(ELBOSettings)
get_nearest_neighbours_hparams = of_experiment(NearestNeighboursSettings)
get_page_hparams = of_experiment(PageSettings)
