"""Every setting of training, declared once: name, type, default, limits, help; and the rules.

What only experiments have is in `hparams/experiment_groups.py`.

The defaults written here are those of ffhq; `hparams/defaults.py` holds what other datasets,
recipes and presets change.
"""

import math

from hparams.defaults import ENDLESS, PRESETS, RECIPES, UNALIGNED, follow_steps, levels
from hparams.registry import DatasetNames, registered_path
from hparams.settings import Settings, did_you_mean, setting
from utils.errors import SettingsError

DATASETS = ["digits", "textures", "ffhq", "churches", "bedrooms", "real_fake_faces", "custom"]


class Data(Settings):
    """Data."""

    dataset: str = setting("", "what to learn from; digits and textures need no download, custom "
                           "is given by --custom_dataset_path, the others by datasets.yaml, to "
                           "which you can add any", choices=DatasetNames(DATASETS), required=True)
    custom_dataset_path: str | None = setting(None, "folder of images, nested or flat, or lmdb "
                                              "folder, for --dataset custom")
    crops: int = setting(0, "how many squares at random places of each image are images of the "
                         "dataset; 0: one, the whole image's central square", minimum=0)
    crop_side: int | None = setting(None, "side of these squares in pixels of the file (none: "
                                    "img_size, so that nothing is resized)", minimum=1)
    horizontal_flip: bool = setting(False, "also learn from mirrored images")
    distorted_copies: int = setting(0, "also learn from so many copies of each image, shifted, "
                                    "turned, scaled and sheared at random", minimum=0)
    distortion: float = setting(0.5, "how strongly these are distorted; 1: by up to 6% of the "
                                "side, 10 degrees, 8%, 12%", minimum=0)
    cache_pixels: bool = setting(False, "keep the resized images of files in pixels/, one byte a "
                                 "value, and read them from there: for GPUs that wait for data")
    num_workers: int | None = setting(None, "processes that read images (none: as many as CPUs, "
                                      "one less where there are more than two, 16 at most; 0 for "
                                      "embedded data and cached pixels)", minimum=0)

    def validate(self):
        super().validate()
        if self.dataset == "custom" and not self.custom_dataset_path:
            raise SettingsError("--dataset custom needs --custom_dataset_path, a folder of images")
        if self.crop_side and not self.crops:
            raise SettingsError("--crop_side is for --crops, how many squares of each image")
        if self.custom_dataset_path and self.dataset != "custom":
            raise SettingsError(
                f"--custom_dataset_path is for --dataset custom, not {self.dataset}"
            )

    def check_flags(self, given):
        super().check_flags(given)
        if "dataset" in given and self.dataset not in DATASETS:
            check_registered(self.dataset)
        if "distortion" in given and not self.distorted_copies:
            raise SettingsError("--distortion would do nothing: it is for --distorted_copies, how "
                                "many of each image")


def check_registered(name):
    """Raise SettingsError unless datasets.yaml gives a path for the dataset `name`."""
    try:
        registered_path(name)
    except SettingsError as error:
        hint = did_you_mean(name, DatasetNames(DATASETS))
        raise SettingsError(f"there is no dataset {name!r}{hint} ({error})") from None


class Training(Settings):
    """Training."""

    recipe: str = setting("published", "how it is trained: published as the original programs do, "
                          "modern with what makes short runs good; every part is a flag too",
                          choices=list(RECIPES))
    preset: str = setting("published", "sizes of model, images and batch: small for half an hour "
                          "on two CPU cores at 64 pixels, medium for a day on a GPU at 128 to 256",
                          choices=list(PRESETS))
    train_steps: int = setting(ENDLESS, "step to train to; a checkpoint is written there",
                               minimum=1)
    batch_size: int = setting(20, "images a step, of each of torchrun's processes", minimum=1)
    lr: float | None = setting(None, "learning rate (none, autoencoder: base_lr x batch_size)",
                               above=0)
    optimizer: str = setting("adam", "adam as published, adamw, or muon for the matrices of a "
                             "sampler's blocks or the autoencoder's convolutions, with AdamW for "
                             "the rest", choices=["adam", "adamw", "muon"])
    weight_decay: float = setting(0.0, "decoupled weight decay of adamw and muon", minimum=0,
                                  only_with=("optimizer", "adamw", "muon"))
    warmup_iters: int | None = setting(30000, "steps over which the learning rate rises from 0 "
                                       "(none: a twentieth of train_steps, at most 1000, "
                                       "of the autoencoder 70)",
                                       minimum=0)
    lr_schedule: str = setting("constant", "after the warm-up: constant, or falling to 0 at "
                               "train_steps", choices=["constant", "cosine", "linear"])
    amp: bool = setting(False, "mixed precision: bfloat16 on CPUs and on GPUs that have it, "
                        "float16 with a gradient scaler on the others")
    tf32: bool = setting(True, "train in TF32 where a GPU has it and --amp does not say otherwise; "
                         "experiments measure without")
    compile: bool | None = setting(None, "compile the networks by torch.compile (none: a "
                                   "sampler's blocks on a GPU where a compiler is there)")
    cuda_graphs: bool | None = setting(None, "capture the kernels of the networks once and replay "
                                       "them in every step (none: on one GPU, without --accumulate "
                                       "and --checkpoint_blocks)")
    accumulate: int = setting(1, "parts in which a batch is computed one after another, for memory "
                              "that is short", minimum=1)
    checkpoint_blocks: bool = setting(False, "keep of each block only its input, and compute it "
                                      "again for the gradients: less memory, more time")
    ema: bool = setting(False, "keep an exponential moving average of the weights; display, "
                        "validate, and (experiments) sample with it")
    ema_beta: float | None = setting(0.995, "what an EMA update keeps of the average (none: an "
                                     "average over 3% of train_steps)", minimum=0, below=1,
                                     only_with=("ema", True))
    ema_warmup: bool = setting(False, "average over at most a tenth of the steps so far, so that "
                               "the average is not behind while there are few",
                               only_with=("ema", True))
    steps_per_update_ema: int = setting(10, "steps between EMA updates", minimum=1,
                                        only_with=("ema", True))
    load_dir: str = setting("test", "run whose checkpoint is loaded")
    load_step: int = setting(0, "step of the checkpoint to load, or best, that of the best "
                             "validation; 0 loads none", minimum=0, step_of="load_dir")
    load_optim: bool = setting(True, "also restore the optimisers; --no_load_optim starts them "
                               "afresh")
    resume: bool = setting(False, "go on from the newest complete checkpoint of --log_dir, where "
                           "there is one: the same command again and again (experiments use "
                           "the samples that they have drawn, with and without it)")
    overwrite: bool = setting(False, "begin anew where --log_dir holds a run: that run is moved "
                              "aside, whole, once a step of the new one is trained")
    keep_checkpoints: int = setting(0, "how many of the newest checkpoints are kept; 0 for all",
                                    minimum=0)
    clip_grad_norm: float = setting(0.0, "largest norm of the gradient; 0 for no limit", minimum=0)
    max_bad_steps: int = setting(10, "how many steps in a row may be passed over because a loss "
                                 "or a gradient is not finite", minimum=0)
    deterministic: bool = setting(False, "use deterministic algorithms only, which repeat to the "
                                  "bit on GPUs too, more slowly")
    seed: int = setting(0, "seed of weights, data order and noise: equal seeds, equal runs",
                        minimum=0)
    device: str | None = setting(None, "cpu, cuda, cuda:1, ... (none: a GPU where there is one)")

    def validate(self):
        super().validate()
        follow_steps(self)
        if self.batch_size % self.accumulate:
            raise SettingsError(f"--accumulate {self.accumulate} does not divide --batch_size "
                                f"{self.batch_size}")
        if self.overwrite and self.resume:
            raise SettingsError("--overwrite begins a run anew and --resume goes on with it: leave "
                                "one of them out")


class Logging(Settings):
    """Logging."""

    log_dir: str = setting("test", "name of the run: its files go to logs/NAME")
    save_individually: bool = setting(False, "save images one by one: beside the grid, in "
                                      "training in its place")
    steps_per_log: int = setting(10, "steps between log entries", minimum=1)
    steps_per_eval: int | None = setting(0, "steps between validations (none: a tenth of "
                                         "train_steps); 0 trains on everything, without a "
                                         "validation split", minimum=0)
    validation_images: int | None = setting(0, "how many of the images held out a validation looks "
                                            "at, always the same (none: a sixteenth of those "
                                            "trained on in between, 64 at least); 0 for all",
                                            minimum=0)
    steps_per_display_output: int | None = setting(5000, "steps between images on visdom (none: a "
                                                   "tenth of train_steps); 0 for none", minimum=0)
    steps_per_save_output: int | None = setting(5000, "steps between images in logs/NAME/images "
                                                "(none: a tenth of train_steps), the last step's "
                                                "too; 0 for none", minimum=0)
    steps_per_checkpoint: int | None = setting(25000, "steps between checkpoints (none: a tenth of "
                                               "train_steps)", minimum=1)
    visdom_server: str = setting("http://localhost", "address of the visdom server")
    visdom_port: int = setting(8097, "port of the visdom server", minimum=1, maximum=65535)
    no_visdom: bool = setting(False, "do not plot on visdom")


class AutoencoderArchitecture(Settings):
    """Architecture of the autoencoder (a sampler takes it from the run in --ae_load_dir)."""

    img_size: int = setting(256, "side of the square images, pixels", minimum=8)
    n_channels: int = setting(3, "3 for colour, 1 for grey", choices=[1, 3])
    nf: int = setting(128, "channels of the first level", minimum=1)
    ch_mult: list[int] | None = setting([1, 1, 2, 2, 4], "channels of each level, as multiples of "
                                        "nf; each level but the first halves the side (none: as "
                                        "img_size needs for 8x8 to 16x16 ids)", minimum=1)
    res_blocks: int = setting(2, "residual blocks a level", minimum=1)
    attn_resolutions: list[int] = setting([16], "sides at which residual blocks are followed by "
                                          "attention", minimum=1)
    norm_groups: int = setting(32, "groups of channels that are normalised together; fewer are "
                               "faster and better in narrow networks", minimum=1)
    emb_dim: int = setting(256, "width of a codebook vector", minimum=1)
    codebook_size: int = setting(1024, "number of codebook vectors", minimum=2)
    latent_shape: list[int] | None = setting(None, "1 H W, the grid of ids (none: what img_size "
                                             "and ch_mult give)", minimum=1)
    quantizer: str = setting("nearest", "how vectors become ids", choices=["nearest", "gumbel"])
    ndf: int = setting(64, "channels of the discriminator's first layer", minimum=1)
    disc_layers: int = setting(3, "strided layers of a discriminator of pixels", minimum=1)
    disc_input: str | None = setting("pixels", "what the discriminator looks at: pixels, or "
                                     "features of the frozen EfficientNet-Lite0 (2111.01007), "
                                     "which need few steps (none: features; pixels where images "
                                     "are smaller than 32 pixels)", choices=["pixels", "features"])
    disc_norm: str = setting("batch", "normalisation in the discriminator: batch as published, "
                             "group, or spectral (1802.05957), which do not mix images",
                             choices=["batch", "group", "spectral"])
    disc_blur: bool = setting(False, "discriminator: 3x3 convolutions and a low-pass before the "
                              "side is halved (1904.11486)", only_with=("disc_input", "pixels"))

    def validate(self):
        super().validate()
        self.ch_mult = self.ch_mult or levels(self.img_size)
        self.disc_input = self.disc_input or ("features" if self.img_size >= 32 else "pixels")
        side = self.img_size // 2 ** (len(self.ch_mult) - 1)
        self.latent_shape = self.latent_shape or [1, side, side]


class Autoencoder(AutoencoderArchitecture):
    """Training of the autoencoder (a sampler takes it from the run in --ae_load_dir)."""

    base_lr: float = setting(4.5e-6, "learning rate per image of the batch", above=0)
    beta: float = setting(0.25, "weight of the codebook term of the nearest quantizer", minimum=0)
    gumbel_kl_weight: float = setting(1e-8, "weight of the gumbel quantizer's KL term", minimum=0)
    gumbel_straight_through: bool = setting(False, "gumbel: one-hot codes in the forward pass")
    entropy_weight: float = setting(0.0, "weight of the entropy term that makes vectors certain of "
                                    "their id and all ids as common (2310.05737)", minimum=0,
                                    only_with=("quantizer", "nearest"))
    codebook_start_step: int | None = setting(0, "step until which vectors are not quantized; the "
                                              "codebook then begins as their k-means centres "
                                              "(none: a twentieth of train_steps, at most 70)",
                                              minimum=0, only_with=("quantizer", "nearest"))
    codebook_revival: int = setting(0, "steps after which a codebook vector that was not used "
                                    "becomes one of the encoder's; 0 for never", minimum=0,
                                    only_with=("quantizer", "nearest"))
    perceptual: str = setting("lpips", "perceptual distance in the loss: lpips, which needs VGG16's"
                              " weights, efficientnet_lite0, which is installed with its own, or "
                              "none", choices=["lpips", "efficientnet_lite0", "none"])
    perceptual_weight: float | None = setting(1.0, "weight of the perceptual distance (none: 0.15 "
                                              "of efficientnet_lite0, 1 of lpips); 0 needs and "
                                              "downloads nothing", minimum=0)
    perceptual_range: str = setting("0_1", "range of the images LPIPS sees: 0_1 as the published "
                                    "models were trained, or, typed --perceptual_range=-1_1, that "
                                    "on which LPIPS was fitted", choices=["0_1", "-1_1"])
    vgg_weights: str | None = setting(None, "local file of torchvision's VGG16 weights for LPIPS "
                                      "(none: torchvision downloads them once)")
    diff_aug: bool = setting(False, "augment what the discriminator sees (DiffAug: color, "
                             "translation)")
    disc_weight_max: float = setting(1.0, "upper limit of the adversarial weight", minimum=0)
    disc_weight: float = setting(1.0, "factor of the adversarial weight; at 1 its gradient is as "
                                 "large as that of the reconstruction", minimum=0)
    disc_lr: float | None = setting(None, "learning rate of the discriminator, on the schedule of "
                                    "the autoencoder's (none: that of the autoencoder)", above=0)
    disc_start_step: int | None = setting(30001, "step from which the discriminator takes part "
                                          "(none: half of train_steps)", minimum=0)
    disc_lead_steps: int | None = setting(0, "steps for which the discriminator learns before its "
                                          "loss counts (none: a twentieth of train_steps)",
                                          minimum=0)
    disc_fade_steps: int | None = setting(0, "steps over which its loss comes to count in full "
                                          "(none: a tenth of train_steps)", minimum=0)

    def validate(self):
        super().validate()
        if self.perceptual == "none":
            self.perceptual_weight = 0.0
        elif self.perceptual_weight is None:
            self.perceptual_weight = 0.15 if self.perceptual == "efficientnet_lite0" else 1.0


class SamplerArchitecture(Settings):
    """Architecture of the sampler."""

    sampler: str = setting("", "the prior over ids", choices=["absorbing", "autoregressive"],
                           required=True)
    attention: str | None = setting(None, "hydra: groups of heads with different neighborhoods; "
                                    "full: all tokens, as in published checkpoints (none: hydra "
                                    "for absorbing, full for autoregressive)",
                                    choices=["hydra", "full"])
    kernel_sizes: list[int] = setting([3, 7], "hydra: kernel of each group of heads, odd, or one "
                                      "for all", minimum=1, one_for_all=True,
                                      only_with=("attention", "hydra"))
    dilations: list[int] = setting([1], "hydra: dilation of each group, or one for all", minimum=1,
                                   one_for_all=True, only_with=("attention", "hydra"))
    position: list[str] | None = setting(None, "one or more of rpb (hydra: relative bias), "
                                         "rope (hydra: rotary), absolute (a table; ties the model "
                                         "to its grid) (none: rope absolute for hydra, rope "
                                         "for hydra on textures, absolute for full)",
                                         choices=["rpb", "rope", "absolute"])
    bert_n_emb: int = setting(512, "width of the transformer", minimum=1)
    bert_n_head: int = setting(8, "attention heads", minimum=1)
    bert_n_layers: int = setting(24, "blocks", minimum=1)
    block_size: int | None = setting(None, "number of ids (none: H x W of latent_shape)",
                                     minimum=1)
    total_steps: int = setting(256, "T, the steps of the diffusion", minimum=1)

    def validate(self):
        super().validate()
        self.attention = self.attention or (
            "full" if self.sampler == "autoregressive" else "hydra"
        )
        if self.position is None:
            relative = ["rope"] if self.attention == "hydra" else []
            aligned = self.attention == "full" or self.dataset not in UNALIGNED
            self.position = relative + (["absolute"] if aligned else [])
        self.block_size = self.block_size or math.prod(self.latent_shape)
        groups = max(len(self.kernel_sizes), len(self.dilations))
        for name in ("kernel_sizes", "dilations"):
            if len(values := getattr(self, name)) == 1:
                setattr(self, name, values * groups)


class SamplingMethod(Settings):
    """Sampling method."""

    sample_type: str = setting(
        "diffusion", "diffusion: ancestral sampling; first_hitting: its limit of ever shorter "
        "steps, one token at a time; mlm: mask-predict with random re-masking; confidence: "
        "MaskGIT, the surest tokens first; halton: tokens that lie far apart first; remdm: "
        "ancestral with re-masking; raster: one after another, row by row",
        choices=["diffusion", "first_hitting", "mlm", "confidence", "halton", "remdm", "raster"],
    )
    sample_steps: int = setting(256, "steps of sampling", minimum=1)
    temp: float = setting(1.0, "temperature of sampling; lower is safer, less diverse", above=0)
    choice_temp: float = setting(4.5, "confidence: noise in the order of tokens, falling to 0",
                                 minimum=0, only_with=("sample_type", "confidence"))
    remask: float = setting(0.05, "remdm: share of the largest possible re-masking", minimum=0,
                            maximum=1, only_with=("sample_type", "remdm"))
    top_k: int = setting(0, "autoregressive: draw from the likeliest ids only; 0 for all",
                         minimum=0, only_with=("sampler", "autoregressive"))
    top_p: float = setting(1.0, "autoregressive: draw from the likeliest ids that together have "
                           "this probability", above=0, maximum=1,
                           only_with=("sampler", "autoregressive"))


class Sampler(SamplerArchitecture, SamplingMethod):
    """Sampler."""

    ae_load_dir: str = setting("", "run of the autoencoder", required=True)
    ae_load_step: int = setting(0, "step of the autoencoder's checkpoint, or best", minimum=1,
                                required=True, step_of="ae_load_dir")
    attn_pdrop: float = setting(0.0, "dropout of attention (full only)", minimum=0, below=1)
    embd_pdrop: float = setting(0.0, "dropout of embeddings", minimum=0, below=1)
    resid_pdrop: float = setting(0.0, "dropout of residual branches", minimum=0, below=1)
    loss_type: str = setting("reweighted_elbo", "training objective of the diffusion",
                             choices=["reweighted_elbo", "elbo", "mlm"])
    mask_schedule: str = setting("random", "mask each token with probability t/T, or a fixed "
                                 "number of them", choices=["random", "fixed"])
    t_sampling: str = setting("uniform", "times of a batch: independent, or spread evenly over "
                              "1..T", choices=["uniform", "low_discrepancy"])
