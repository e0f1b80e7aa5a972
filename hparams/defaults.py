"""What datasets, recipes and presets change of the declared defaults, for each of the two stages.

Later layers win: the declared default, that of the stage, the recipe, the preset, the dataset, the
recipe for this dataset, a preset that a flag names and that is not the usual one. What is None at
the end follows from `--train_steps`, by `follow_steps`.
"""

import dataclasses

from utils.errors import SettingsError

ENDLESS = 100000000  # train_steps that no run reaches
LIKE = 200000  # steps of a run of which the defaults of an endless one are taken
LARGEST_GRID = 32  # ids a side, unless --ch_mult asks for more
START = 70  # steps of an autoencoder's warm-up, and of those without a codebook, at most

RECIPES = ("published", "modern")
PRESETS = ("small", "medium", "published")

# Datasets that the published programs know keep the settings that their commands mean.
PUBLISHED_DATASETS = {"ffhq", "churches", "bedrooms"}
DECIDED = {  # defaults that the dataset and the recipe decide, in words
    "recipe": f"default modern; {', '.join(sorted(PUBLISHED_DATASETS))} published",
    "preset": "default small with recipe modern, published with published; of a sampler that of "
              "its autoencoder, where their recipe is the same",
}

# Where a thing stands says nothing in these images: hydra attention has no absolute positions by
# default, and runs on larger canvases as it is.
UNALIGNED = {"textures"}


@dataclasses.dataclass
class Defaults:
    """Defaults of one stage, and what recipes, presets and datasets change: dicts of settings.

    `modern_datasets` is what the modern recipe changes of a dataset's settings.
    """

    everywhere: dict
    datasets: dict
    modern_datasets: dict
    recipes: dict = dataclasses.field(default_factory=dict)
    presets: dict = dataclasses.field(default_factory=dict)

    def of(self, chosen, preset_given):
        """The defaults beside the settings `chosen`, among them `dataset`; sizes of a preset that
        is given, and not the usual one, come after those of the dataset."""
        dataset, recipe = chosen["dataset"], recipe_of(chosen)
        usual = "small" if recipe == "modern" else "published"
        preset = chosen.get("preset", usual)
        sizes, own = self.presets.get(preset, {}), self.datasets.get(dataset, {})
        modern = self.modern_datasets.get(dataset, {}) if recipe == "modern" else {}
        return {
            **self.everywhere, **self.recipes.get(recipe, {}), **sizes, **own, **modern,
            **(sizes if preset_given and preset != usual else {}),
            "recipe": recipe, "preset": preset,
        }

    def layers(self):
        """(name, the settings that it changes), in the order in which help shows them."""
        for layers in (self.recipes, self.presets, self.datasets):
            yield from layers.items()
        for dataset, settings in self.modern_datasets.items():
            yield f"modern {dataset}", settings


def recipe_of(chosen):
    """The recipe of the settings `chosen`, a dict with `dataset`."""
    published = chosen["dataset"] in PUBLISHED_DATASETS
    return chosen.get("recipe", "published" if published else "modern")


# --- what follows from other settings ------------------------------------------------------------


def follow_steps(H):
    """Set what is None and follows from `train_steps`: warm-up, EMA, intervals, and what the
    autoencoder's training begins later."""
    steps = H.train_steps if H.train_steps < ENDLESS else LIKE
    horizon = min(max(0.03 * steps, 10), 5000)  # steps that the EMA averages over
    # A longer start without a codebook leaves vectors that its entries cannot stand for.
    start = min(steps // 20, START)
    values = {
        "warmup_iters": min(steps // 20, 1000) if hasattr(H, "sampler") else start,
        "ema_beta": round(1 - 1 / horizon, 6),
        "steps_per_eval": max(steps // 10, 1),
        "steps_per_display_output": max(steps // 10, 1),
        "steps_per_save_output": max(steps // 10, 1),
        "steps_per_checkpoint": max(steps // 10, 1),
        "codebook_start_step": start,
        "disc_start_step": steps // 2,
        "disc_lead_steps": steps // 20,
        "disc_fade_steps": steps // 10,
    }
    for name, value in values.items():
        if name in H.__dataclass_fields__ and getattr(H, name) is None:
            setattr(H, name, value)
    if H.validation_images is None:  # of which each costs about as much as one that is learned
        H.validation_images = max(64, H.batch_size * H.steps_per_eval // 16)


def levels(img_size):
    """`ch_mult` for images of a size: a grid of 8x8 to 16x16 ids for 32 to 256 pixels, and a larger
    one for sizes that cannot be halved as often.

    Raises SettingsError where that would have more than LARGEST_GRID ids a side.
    """
    usual = halvings = 2 if img_size <= 64 else 3 if img_size <= 128 else 4
    while img_size % 2**halvings and halvings > 0:
        halvings -= 1
    if not halvings or img_size // 2**halvings > LARGEST_GRID:
        below = img_size // 2**usual * 2**usual
        raise SettingsError(f"--img_size {img_size} cannot be halved often enough for a grid of at "
                            f"most {LARGEST_GRID}x{LARGEST_GRID} ids: give {below} or "
                            f"{below + 2**usual}, or channels for each level, --ch_mult")
    return {1: [1, 2], 2: [1, 1, 2], 3: [1, 1, 2, 2], 4: [1, 1, 2, 2, 4]}[halvings]


# --- the two stages ------------------------------------------------------------------------------

INTERVALS = dict.fromkeys(
    ("steps_per_eval", "validation_images", "steps_per_display_output", "steps_per_save_output",
     "steps_per_checkpoint")
)
# Both stages: a short warm-up, a learning rate that falls to 0 at the end, an EMA over the last
# steps, which while there are few is over those.
MODERN = dict(
    INTERVALS, lr_schedule="cosine", warmup_iters=None, ema_beta=None, ema_warmup=True,
    steps_per_update_ema=1, keep_checkpoints=3,
)

# Small enough to train on two CPU cores in minutes. Without a discriminator: L1 alone draws digits
# well, and sharper ones would take longer.
DIGITS = dict(
    num_workers=0, img_size=32, n_channels=1, nf=32, ch_mult=[1, 1, 2], res_blocks=1,
    attn_resolutions=[8], emb_dim=32, codebook_size=16, ndf=16, disc_layers=2,
    perceptual_weight=0.0, disc_input="pixels", disc_start_step=100000001, batch_size=32,
    ema_beta=0.99, steps_per_update_ema=1, steps_per_eval=200, steps_per_display_output=500,
    steps_per_save_output=500, steps_per_checkpoint=500,
)

# On a grid of 4x4 ids fewer must fit together than on 8x8, which made the largest difference to
# what samples look like.
MODERN_DIGITS = dict(
    MODERN, ch_mult=[1, 1, 2, 2], attn_resolutions=[4], norm_groups=8, codebook_size=256,
)

# Photographs of surfaces, 16x16 ids.
TEXTURES = dict(
    DIGITS, img_size=64, attn_resolutions=[], codebook_size=256, batch_size=8,
)
MODERN_TEXTURES = dict(MODERN, norm_groups=8)

VQGAN_DEFAULTS = Defaults(
    everywhere=dict(batch_size=3, warmup_iters=0, lr_schedule="constant", optimizer="adam"),
    recipes={
        "modern": dict(
            MODERN, optimizer="muon", lr=1e-3, perceptual="efficientnet_lite0",
            perceptual_weight=None, codebook_start_step=None, codebook_revival=10,
            disc_input=None, disc_norm="group", disc_lr=1e-3, disc_weight=0.25,
            disc_start_step=None, disc_lead_steps=None, disc_fade_steps=None,
        ),
    },
    presets={
        "small": dict(
            img_size=64, nf=32, ch_mult=None, res_blocks=1, attn_resolutions=[], norm_groups=8,
            emb_dim=32, codebook_size=256, ndf=32, disc_layers=2, batch_size=8,
        ),
        "medium": dict(
            img_size=128, nf=64, ch_mult=None, res_blocks=2, attn_resolutions=[], norm_groups=16,
            emb_dim=64, codebook_size=1024, ndf=64, disc_layers=3, batch_size=16,
        ),
    },
    datasets={
        "digits": dict(DIGITS, lr=1e-3, validation_images=64),
        "textures": dict(TEXTURES, lr=1e-3, validation_images=64),
    },
    modern_datasets={
        "digits": dict(
            MODERN_DIGITS, lr=2e-3, codebook_revival=15, distorted_copies=7, validation_images=64,
        ),
        "textures": MODERN_TEXTURES,
    },
)

SAMPLER_DEFAULTS = Defaults(
    everywhere=dict(batch_size=20, lr=1e-4, warmup_iters=30000),
    recipes={
        "modern": dict(MODERN, optimizer="muon", lr=3e-3, t_sampling="low_discrepancy"),
    },
    presets={
        "small": dict(bert_n_emb=128, bert_n_layers=4, batch_size=16),
        "medium": dict(bert_n_emb=384, bert_n_layers=12, batch_size=32),
    },
    datasets={
        "churches": dict(lr=2e-4, warmup_iters=10000),
        "bedrooms": dict(lr=2e-4, warmup_iters=10000),
        "digits": dict(
            DIGITS, bert_n_emb=128, bert_n_layers=4, optimizer="muon", lr=3e-3, warmup_iters=50,
            embd_pdrop=0.1, resid_pdrop=0.1, t_sampling="low_discrepancy", sample_steps=512,
            temp=0.8,  # steps in which no id is drawn cost nothing, and two in one are rarer
        ),
        "textures": dict(
            TEXTURES, bert_n_emb=128, bert_n_layers=4, optimizer="muon", lr=3e-3, warmup_iters=50,
            t_sampling="low_discrepancy", sample_steps=256,
        ),
    },
    modern_datasets={
        "digits": dict(
            MODERN_DIGITS, batch_size=128, lr=4e-3, bert_n_emb=192, kernel_sizes=[3],
            position=["absolute"], embd_pdrop=0.0, resid_pdrop=0.0, distorted_copies=11,
            distortion=0.6, sample_type="mlm", sample_steps=64, temp=1.0,
        ),
        "textures": MODERN_TEXTURES,
    },
)
