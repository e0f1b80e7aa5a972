"""The hyperparameters of each script: its groups of settings, its defaults, and its checks."""

import dataclasses

from hparams.defaults import SAMPLER_DEFAULTS, UNALIGNED, VQGAN_DEFAULTS, dataset_defaults
from utils.errors import SettingsError
from hparams.groups import (
    ELBO, FID, PRDC, Autoencoder, Canvas, Data, Features, Inpainting, Logging, NearestNeighbours,
    Sampler, Samples, SamplesToMeasure, Training,
)
from utils.runs.folder import RunFolder, process_count
from hparams.settings import LoadedRun, build_parser, register, resolve, show


def names_of(group):
    """The settings that a group declares."""
    return frozenset(group.__annotations__)


def architecture(group, model):
    """The settings of a group that decide the shape of `model`."""
    fields = dataclasses.fields(group)
    return frozenset(f.name for f in fields if f.metadata["architecture"] == model)


@register
class VQGANSettings(Data, Autoencoder, Training, Logging):
    """train_vqgan.py."""

    def validate(self):
        super().validate()
        check_data(self)
        check_training(self)
        check_autoencoder(self)
        if self.lr is None:
            self.lr = self.base_lr * self.batch_size * process_count()  # each has a batch


@register
class SamplerSettings(Data, Sampler, Training, Logging, Autoencoder):
    """train_sampler.py."""

    def validate(self):
        super().validate()
        check_data(self)
        check_training(self)
        check_autoencoder(self)
        check_sampler(self)


# What training reads and experiments do not, though their models are built with some of it.
TRAINING_ONLY = (
    (names_of(Data) - {"dataset", "custom_dataset_path", "num_workers"})
    | (names_of(Training)
       - {"batch_size", "amp", "ema", "load_dir", "load_step", "seed", "device", "resume"})
    | (names_of(Logging)
       - {"log_dir", "save_individually", "visdom_server", "visdom_port", "no_visdom"})
    | (names_of(Autoencoder) - architecture(Autoencoder, "autoencoder"))
    | (names_of(Sampler) - architecture(Sampler, "sampler")
       - {"ae_load_dir", "ae_load_step", "sample_type", "sample_steps", "temp", "choice_temp",
          "remask", "top_k", "top_p"})
)


@register
class ExperimentSettings(Data, Sampler, Training, Logging, Autoencoder):
    """What all experiments on a sampler read."""

    without_flag = TRAINING_ONLY

    def validate(self):
        super().validate()
        check_data(self)
        check_autoencoder(self)
        check_sampler(self)


@register
class SamplesSettings(Samples, ExperimentSettings):
    """experiments/get_samples.py and experiments/digits_report.py."""


@register
class FIDSettings(SamplesToMeasure, Features, FID, ExperimentSettings):
    """experiments/calc_FID.py."""

    def validate(self):
        super().validate()
        check_features(self)


@register
class PRDCSettings(SamplesToMeasure, Features, PRDC, ExperimentSettings):
    """experiments/calc_PRDC.py."""

    def validate(self):
        super().validate()
        check_features(self)
        if self.fake_images_path and self.latents_path:
            raise SettingsError("--fake_images_path and --latents_path exclude each other")


@register
class ELBOSettings(ELBO, ExperimentSettings):
    """experiments/calc_approximate_ELBO.py."""

    without_flag = TRAINING_ONLY - names_of(ELBO) - {"max_bad_steps", "deterministic"}


@register
class NearestNeighboursSettings(NearestNeighbours, ExperimentSettings):
    """experiments/calc_nearest_neighbours.py."""

    without_flag = TRAINING_ONLY - {"perceptual_range", "vgg_weights"}


@register
class VQGANFIDSettings(Features, FID, Data, Autoencoder, Training, Logging):
    """experiments/calc_VQGAN_FID.py."""

    without_flag = TRAINING_ONLY

    def validate(self):
        super().validate()
        check_data(self)
        check_autoencoder(self)
        check_features(self)


@register
class InpaintSettings(SamplesSettings, Inpainting):
    """experiments/inpaint.py."""

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


@register
class BigSamplesSettings(SamplesSettings, Canvas):
    """experiments/generate_big_samples.py."""

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
        if self.canvas == "native" and (self.attention == "full" or "absolute" in self.position):
            raise SettingsError(
                "--canvas native needs a model without absolute positions: use --canvas windows"
            )


def check_data(H):
    """The dataset's path and the run folders."""
    for run in (H.log_dir, H.load_dir):
        RunFolder(run)
    if H.dataset == "custom" and not H.custom_dataset_path:
        raise SettingsError("--dataset custom needs --custom_dataset_path, a folder of images")
    if H.custom_dataset_path and H.dataset != "custom":
        raise SettingsError(f"--custom_dataset_path is for --dataset custom, not {H.dataset}")


def check_training(H):
    """There are steps left to train, unless a run is resumed, which may be at its end."""
    if H.load_step >= H.train_steps and not H.resume:
        raise SettingsError(
            f"load_step {H.load_step} leaves nothing to train: train_steps is {H.train_steps}"
        )


def check_features(H):
    """What the feature extractors of torch-fidelity can do."""
    if H.feature_extractor == "dinov2" and H.feature_extractor_weights:
        raise SettingsError("dinov2 comes by torch.hub, code and weights together: leave "
                            "--feature_extractor_weights out, or take another extractor")


def check_autoencoder(H):
    """Shapes that follow from one another; fills in `latent_shape`."""
    halvings = len(H.ch_mult) - 1
    side, remainder = divmod(H.img_size, 2**halvings)
    if remainder:
        raise SettingsError(
            f"img_size {H.img_size} cannot be halved {halvings} times, as the {len(H.ch_mult)} "
            f"levels of ch_mult ask"
        )
    if H.latent_shape is None:
        H.latent_shape = [1, side, side]
    if H.latent_shape != [1, side, side]:
        raise SettingsError(
            f"latent_shape {show(H.latent_shape)} does not follow from img_size {H.img_size} and "
            f"ch_mult {show(H.ch_mult)}, which give 1 {side} {side}"
        )
    if H.n_channels == 2:
        raise SettingsError("n_channels must be 1 (grey) or 3 (colour), not 2")
    for mult in H.ch_mult:
        if H.nf * mult % 32:
            raise SettingsError(
                f"nf {H.nf} x ch_mult {mult} = {H.nf * mult} is no multiple of 32, the number of "
                f"normalisation groups"
            )
    sides = [H.img_size // 2**level for level in range(halvings + 1)]
    for resolution in H.attn_resolutions:
        if resolution not in sides:
            raise SettingsError(
                f"attn_resolutions {resolution} never occurs: the sides are {show(sides)}"
            )
    if H.perceptual_weight and H.img_size < 16:
        raise SettingsError(
            f"LPIPS needs images of 16 pixels or more, not img_size {H.img_size}: set "
            f"perceptual_weight 0"
        )
    if H.img_size // 2**H.disc_layers < 3:
        raise SettingsError(
            f"disc_layers {H.disc_layers} leaves nothing of images of {H.img_size} pixels"
        )


def check_sampler(H):
    """Attention and grid; fills in what is derived: attention, position, block_size, dilations."""
    causal = H.sampler == "autoregressive"
    H.attention = H.attention or ("full" if causal else "hydra")
    if causal and H.attention == "hydra":
        raise SettingsError("--sampler autoregressive needs --attention full: hydra looks ahead")
    if H.position is None:
        relative = ["rpb"] if H.attention == "hydra" else []
        aligned = H.attention == "full" or H.dataset not in UNALIGNED
        H.position = relative + (["absolute"] if aligned else [])
    if H.attention == "full" and H.position != ["absolute"]:
        raise SettingsError(
            f"--attention full has absolute positions only, not {show(H.position)}"
        )
    _, height, width = H.latent_shape
    if H.block_size is None:
        H.block_size = height * width
    if H.block_size != height * width:
        raise SettingsError(
            f"block_size {H.block_size} is not the number of ids of latent_shape "
            f"{show(H.latent_shape)}, {height * width}"
        )
    if H.bert_n_emb % H.bert_n_head:
        raise SettingsError(
            f"bert_n_head {H.bert_n_head} does not divide bert_n_emb {H.bert_n_emb}"
        )
    if H.attention == "hydra":
        check_hydra(H, height, width)


def check_hydra(H, height, width):
    """The groups of heads; a single dilation becomes one for each group."""
    groups = len(H.kernel_sizes)
    if len(H.dilations) == 1:
        H.dilations = H.dilations * groups
    if len(H.dilations) != groups:
        raise SettingsError(
            f"kernel_sizes {show(H.kernel_sizes)} and dilations {show(H.dilations)} must be "
            f"equally many, or one dilation for all"
        )
    if groups > H.bert_n_head:
        raise SettingsError(f"{groups} kernel_sizes need at least {groups} heads, not "
                            f"bert_n_head {H.bert_n_head}")
    if H.attn_pdrop:
        raise SettingsError("attn_pdrop must be 0 with --attention hydra, which has no dropout")
    if "rope" in H.position and H.bert_n_emb // H.bert_n_head % 4:
        raise SettingsError(
            f"--position rope needs bert_n_emb / bert_n_head to be a multiple of 4, not "
            f"{H.bert_n_emb} / {H.bert_n_head}"
        )
    for kernel, dilation in zip(H.kernel_sizes, H.dilations):
        if kernel % 2 == 0:
            raise SettingsError(f"kernel_sizes must be odd, not {kernel}")
        if kernel * dilation > min(height, width):
            raise SettingsError(
                f"kernel_sizes {kernel} x dilations {dilation} = {kernel * dilation} is larger "
                f"than the {height}x{width} grid of ids"
            )


def get_hparams(settings_class, argv, description, defaults, loaded_runs, must_load=False):
    """Parse, resolve and check; a wrong setting ends the program with one sentence, status 2."""
    parser = build_parser(settings_class, defaults, description)
    given = vars(parser.parse_args(argv))
    if must_load and not (given.get("load_dir") and given.get("load_step")):
        parser.error("--load_dir and --load_step must name the checkpoint to load")
    try:
        if given.get("resume") and not must_load:
            run = given.get("log_dir", settings_class.log_dir)
            if steps := RunFolder(run).steps_to_resume():
                given |= {"load_dir": run, "load_step": steps[-1], "load_optim": True}
        if must_load and not RunFolder(given["load_dir"]).path.is_dir():
            raise SettingsError(
                f"there is no run folder {RunFolder(given['load_dir']).path}: --load_dir is the "
                f"name of a run below logs/ of the folder you are in"
            )
        return resolve(
            settings_class, given, lambda dataset: dataset_defaults(defaults, dataset),
            loaded_runs, lambda run: RunFolder(run).hparams,
        )
    except SettingsError as error:
        parser.error(str(error))


def get_vqgan_hparams(argv=None):
    """Hyperparameters of train_vqgan.py from `argv` (None: the command line)."""
    resumed = LoadedRun("load_dir", "load_step", architecture(Autoencoder, "autoencoder"))
    return get_hparams(
        VQGANSettings, argv, "Train a VQGAN: images to grids of codebook ids and back.",
        VQGAN_DEFAULTS, [resumed],
    )


AUTOENCODER_RUN = LoadedRun(
    "ae_load_dir", "ae_load_step", names_of(Autoencoder),
    borrow=frozenset({"perceptual_range", "vgg_weights"}),
)
SAMPLER_ARCHITECTURE = architecture(Sampler, "sampler")


def get_sampler_hparams(argv=None):
    """Hyperparameters of train_sampler.py from `argv` (None: the command line)."""
    resumed = LoadedRun("load_dir", "load_step", SAMPLER_ARCHITECTURE)
    return get_hparams(
        SamplerSettings, argv, "Train a prior over the ids of a trained VQGAN.",
        SAMPLER_DEFAULTS, [AUTOENCODER_RUN, resumed],
    )


def get_samples_hparams(
    argv=None, description="Draw samples from a trained sampler and save them as PNG.",
    settings_class=SamplesSettings,
):
    """Hyperparameters of experiments that draw samples, from `argv` (None: the command line)."""
    run = LoadedRun(
        "load_dir", "load_step", SAMPLER_ARCHITECTURE,
        borrow=frozenset({"dataset", "custom_dataset_path", "ae_load_dir", "ae_load_step", "ema"}),
    )
    return get_hparams(
        settings_class, argv, description, SAMPLER_DEFAULTS, [run, AUTOENCODER_RUN],
        must_load=True,
    )


def get_inpaint_hparams(argv=None):
    """Hyperparameters of experiments/inpaint.py from `argv` (None: the command line)."""
    return get_samples_hparams(argv, "Fill in a part of an image.", InpaintSettings)


def get_big_samples_hparams(argv=None):
    """Hyperparameters of experiments/generate_big_samples.py from `argv`."""
    return get_samples_hparams(
        argv, "Draw samples larger than those trained on.", BigSamplesSettings
    )


def get_fid_hparams(argv=None):
    """Hyperparameters of experiments/calc_FID.py from `argv`."""
    return get_samples_hparams(
        argv, "Fréchet distance between samples and the dataset's images.", FIDSettings
    )


def get_prdc_hparams(argv=None):
    """Hyperparameters of experiments/calc_PRDC.py from `argv`."""
    return get_samples_hparams(
        argv, "Precision, recall, density and coverage of samples.", PRDCSettings
    )


def get_elbo_hparams(argv=None):
    """Hyperparameters of experiments/calc_approximate_ELBO.py from `argv`."""
    return get_samples_hparams(
        argv, "A bound on the likelihood of the validation images.", ELBOSettings
    )


def get_nearest_neighbours_hparams(argv=None):
    """Hyperparameters of experiments/calc_nearest_neighbours.py from `argv`."""
    return get_samples_hparams(
        argv, "The training images nearest to samples.", NearestNeighboursSettings
    )


def get_vqgan_fid_hparams(argv=None):
    """Hyperparameters of experiments/calc_VQGAN_FID.py from `argv`."""
    run = LoadedRun(
        "load_dir", "load_step", names_of(Autoencoder),
        borrow=frozenset({"dataset", "custom_dataset_path", "ema"}),
    )
    return get_hparams(
        VQGANFIDSettings, argv,
        "Fréchet distance between the dataset's images and their reconstructions.",
        VQGAN_DEFAULTS, [run], must_load=True,
    )
