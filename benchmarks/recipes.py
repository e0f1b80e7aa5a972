"""What the recipes give in equal time: autoencoders of a folder of photographs, one after another.

    python benchmarks/recipes.py --photographs PHOTOS --minutes 30 --seeds 0 1 \
        --vgg_weights FILE --out recipes
    python benchmarks/recipes.py --photographs PHOTOS --minutes 10 --seeds 0 --parts \
        --vgg_weights FILE --out parts

Trains `--preset small` on random crops of 64 pixels with train_vqgan.py, into logs/recipes_*: the
published recipe and the modern one, the latter also without its discriminator, or, with `--parts`,
with one part after another taken out. Each gets the steps that fit into the minutes: two short
trials, which have a discriminator in half of their steps, tell the CPU seconds of a step, so that
what else the machine does does not count. A tenth of the photographs, whole ones, is held out, and
decides. What is there already is not made again.

The discriminator of the published recipe would start at step 30,001, long after the end: here it
starts after a quarter of an hour. Nothing else of that recipe follows the length of a run, so the
30 minutes of a run of 60 are its first half.

Prints a Markdown table, and writes OUT_curves.png and OUT_pictures.png. Of each checkpoint the
weights and their average are both measured, and the better ones (by the Fréchet distance) count,
since the published average is behind in runs as short as these. Flags that this script has not are
handed on to every training.

The columns, all of images held out and their reconstructions: `detail` is the energy of a Laplacian
of the reconstructions, as a share of that of the images (below 1: blurred; above 1: noise), `codes`
the entries of the codebook in use, and `colour` the correlation between the mean colours of images
and reconstructions, `colour early` after the first five minutes.
"""

import argparse
import hashlib
import itertools
import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F
from torchvision.utils import save_image

from hparams import get_vqgan_hparams
from measure import number, table
from models.autoencoder.perceptual import PerceptualDistance, load_vgg16
from utils.data.batches import UnreadableFiles, evaluation_batches
from utils.data.datasets import load_dataset
from utils.data.split import sample_of, train_validation_split
from utils.evaluation.metrics import psnr, ssim
from utils.evaluation.reconstruction import ReconstructionDistance
from utils.files import load_file
from utils.runs.folder import RunFolder
from utils.runs.script import run_script
from utils.training.build import load_autoencoder

ROOT = Path(__file__).resolve().parent.parent
MARK = 5  # minutes between the times at which a run is measured
TRIALS = (30, 90)  # steps of the two trials
# Step at which the published discriminator starts: a quarter of an hour on one core of an AMD EPYC.
START = 1650
NEVER = "--disc_start_step 100000001"
RECIPES = {
    "published": f"--recipe published --disc_start_step {START}",
    "modern": "--recipe modern",
    "modern without discriminator": f"--recipe modern {NEVER}",
}
PARTS = {  # what `--recipe modern` is without one of its parts
    "modern": "",
    "AdamW 1e-3 for Muon": "--optimizer adamw --lr 1e-3",
    "codebook not started": "--codebook_start_step 0",
    "no perceptual distance": "--perceptual none",
    "no discriminator": NEVER,
    "constant learning rate": "--lr_schedule constant",
    "EMA as published": "--ema_beta 0.995 --no_ema_warmup --steps_per_update_ema 10",
    "32 norm groups": "--norm_groups 32",
    "codebook not revived": "--codebook_revival 0",
    "discriminator of pixels": "--disc_input pixels",
    "discriminator of pixels with BatchNorm": "--disc_input pixels --disc_norm batch",
    "no lead and fade": "--disc_lead_steps 0 --disc_fade_steps 0",
    "adversarial weight 1": "--disc_weight 1",
    "LPIPS for EfficientNet-Lite0": "--perceptual lpips",
}
# Flags of train_vqgan.py that each training is given by this script.
TAKEN = ("seed", "train_steps", "log_dir", "steps_per_eval", "steps_per_checkpoint",
         "steps_per_save_output", "resume", "overwrite")
HEAD = ["variant", "seed", "steps", "s per step", "PSNR, dB", "SSIM", "perceptual", "Fréchet",
        "detail", "codes", "colour early", "colour"]


def parse_arguments(argv=None):
    """(this script's arguments, the flags for train_vqgan.py)."""
    parser = argparse.ArgumentParser(
        description="What the recipes give in equal time. Other flags than these go to "
        "train_vqgan.py.", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--photographs", required=True, help="folder of photographs")
    parser.add_argument("--minutes", type=int, default=30, help="of one core, for each run: a "
                        f"multiple of {MARK}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--parts", action="store_true", help="take out the parts of modern")
    parser.add_argument("--variants", nargs="+", type=int, metavar="N", help="only these, from 0")
    parser.add_argument("--vgg_weights", help="torchvision's VGG16 weights for the perceptual "
                        "distance, of which the published recipe has one too (none: a download)")
    parser.add_argument("--images", type=int, default=512, help="crops held out to measure with")
    parser.add_argument("--out", default="recipes", help="beginning of the pictures' names")
    arguments, handed_on = parser.parse_known_args(argv)
    if arguments.minutes < MARK or arguments.minutes % MARK:
        parser.error(f"--minutes must be a multiple of {MARK}, the minutes between measurements")
    count = len(PARTS if arguments.parts else RECIPES)
    if not all(0 <= index < count for index in arguments.variants or ()):
        parser.error(f"--variants must be numbers from 0 to {count - 1}")
    if taken := {flag.partition("=")[0][2:] for flag in handed_on} & set(TAKEN):
        parser.error(f"--{min(taken)} of train_vqgan.py is set by this script, which has --minutes "
                     f"and --seeds")
    return arguments, handed_on


# --- training ------------------------------------------------------------------------------------


def training_flags(arguments, variant, handed_on):
    """The flags of train_vqgan.py for a variant, but for its length, seed and run folder."""
    flags = PARTS if arguments.parts else RECIPES
    recipe = f"--recipe modern {flags[variant]}" if arguments.parts else flags[variant]
    words = [*recipe.split(), *handed_on]
    with_lpips = variant == "published" or "lpips" in words
    vgg = ["--vgg_weights", arguments.vgg_weights] if arguments.vgg_weights and with_lpips else []
    return [
        "--dataset", "custom", "--custom_dataset_path", arguments.photographs, "--crops", "64",
        "--preset", "small", "--amp", "--ema", "--no_visdom", "--num_workers", "0",
        "--keep_checkpoints", "0", "--validation_images", "64", *vgg, *words,
    ]


def train(flags, name, steps, every, again="--resume"):
    """Train for some steps, with a checkpoint `every` so many; the CPU seconds that it took.

    A run that was interrupted goes on, or begins anew where `again` is --overwrite.
    """
    command = [
        sys.executable, str(ROOT / "train_vqgan.py"), *flags, "--train_steps", str(steps),
        "--steps_per_eval", str(steps), "--steps_per_checkpoint", str(every),
        "--steps_per_save_output", "0", "--log_dir", name, again,
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if output.returncode:
        sys.exit(f"{' '.join(command)}\n{output.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime


def seconds_of_step(variant, flags, digest):
    """CPU seconds of a step on one core, of two trials that differ in length; half of the steps of
    each have a discriminator where the recipe has one."""
    kept = RunFolder(f"recipes_{digest}_trial").path / "seconds.json"
    if not kept.exists():
        took = []
        for n in TRIALS:
            earlier = ["--disc_start_step", str(n // 2)] if variant == "published" else []
            name = f"recipes_{digest}_trial{n}"
            took.append(train([*flags, *earlier], name, n, n, again="--overwrite"))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps((took[1] - took[0]) / (TRIALS[1] - TRIALS[0])))
    return json.loads(kept.read_text())


def trained(arguments, variant, seed, handed_on):
    """Train a variant if it is not yet: (seconds of a step, steps between two times at which it is
    measured, the run's name, its flags)."""
    flags = training_flags(arguments, variant, handed_on)
    digest = hashlib.sha256("\n".join(flags).encode()).hexdigest()[:8]
    seconds = seconds_of_step(variant, flags, digest)
    every = max(1, round(60 * MARK / seconds))
    steps = every * (arguments.minutes // MARK)
    length = "any" if variant == "published" else steps
    name = f"recipes_{digest}_{length}_{seed}"
    flags = [*flags, "--seed", str(seed)]
    if steps not in RunFolder(name).complete_steps():
        train(flags, name, steps, every)
    flags += ["--train_steps", str(steps), "--log_dir", name]
    return seconds, every, name, flags


# --- measuring -----------------------------------------------------------------------------------


def detail(images):
    """Energy of the Laplacian of grey, 0-d, of images [B, C, S, S]: what is sharp, and noise."""
    grey = images.mean(1, keepdim=True)
    kernel = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d(grey, kernel).square().mean()


def correlation(means, others):
    """Correlation of the means of whole images [n, 3], averaged over the colours; 0 for a colour
    that is the same in all images."""
    return float(np.mean([np.corrcoef(a, b)[0, 1] if np.ptp(a) and np.ptp(b) else 0.0
                          for a, b in zip(means.T, others.T)]))


class Measure:
    """Measures autoencoders on images that are held out, always the same ones."""

    def __init__(self, H, count, vgg_weights):
        device = torch.device("cpu")
        held_out = sample_of(train_validation_split(load_dataset(H))[1], count)
        batches = evaluation_batches(held_out, 32, 0, device, UnreadableFiles())
        self.images = torch.cat([images for images, _ in batches])
        self.distance = ReconstructionDistance(device)
        self.perceptual = None
        if vgg_weights:
            self.perceptual = PerceptualDistance()
            load_vgg16(self.perceptual, load_file(vgg_weights))

    @torch.no_grad()
    def reconstructions(self, autoencoder):
        """(reconstructions [n, C, S, S] in [0, 1], how often each code is used [K])."""
        parts, usage = [], 0
        for images in self.images.split(32):
            x_hat, _, stats, _ = autoencoder(images)
            parts.append(x_hat.clamp(0, 1))
            usage = usage + stats["usage"]
        return torch.cat(parts), usage

    @torch.no_grad()
    def frechet(self, x_hat):
        """The reconstruction Fréchet distance of x_hat [n, C, S, S]."""
        for images, others in zip(self.images.split(32), x_hat.split(32)):
            self.distance.add(images, others)
        return float(self.distance.take()["frechet"])

    @torch.no_grad()
    def perceptual_distance(self, x_hat):
        """The mean LPIPS of x_hat [n, C, S, S], None without VGG16's weights."""
        if self.perceptual is None:
            return None
        pairs = zip(self.images.split(32), x_hat.split(32))
        distances = [self.perceptual(2 * a - 1, 2 * b - 1).flatten() for a, b in pairs]
        return torch.cat(distances).mean().item()

    def __call__(self, autoencoders):
        """The figures of the one of `autoencoders`, {name: autoencoder}, whose Fréchet distance is
        the lowest: {name: number, "model": its name}."""
        made = {name: self.reconstructions(model) for name, model in autoencoders.items()}
        frechet = {name: self.frechet(x_hat) for name, (x_hat, _) in made.items()}
        best = min(frechet, key=frechet.get)
        x, (x_hat, usage) = self.images, made[best]
        return {
            "model": best, "psnr": psnr(x, x_hat).mean().item(),
            "ssim": ssim(x, x_hat).mean().item(),
            "perceptual": self.perceptual_distance(x_hat), "frechet": frechet[best],
            "detail": (detail(x_hat) / detail(x)).item(), "codes": int((usage > 0).sum()),
            "colour": correlation(x.mean((2, 3)).numpy(), x_hat.mean((2, 3)).numpy()),
        }


def figures_at(measure, name, step, flags):
    """The figures at a step, of the weights or their average, which are better."""
    kept = RunFolder(name).path / f"figures_{len(measure.images)}_{step}.json"
    if not kept.exists():
        both = {which: autoencoder(name, which, step, flags) for which in ("vqgan", "vqgan_ema")}
        kept.write_text(json.dumps({"step": step, **measure(both)}, indent=1))
    return json.loads(kept.read_text())


def autoencoder(name, which, step, flags):
    """The autoencoder of a run's checkpoint: its weights, `vqgan`, or their average."""
    H, device = get_vqgan_hparams(flags), torch.device("cpu")
    path = RunFolder(name).model(which, step)
    return load_autoencoder(H, device, logging.getLogger("recipes"), path)


# --- results -------------------------------------------------------------------------------------


def row(variant, seed, seconds, curve):
    """A row of the table: the figures at the end, and the colours after the first minutes."""
    end = curve[-1]
    return [
        variant, seed, end["step"], number(seconds), number(end["psnr"]), number(end["ssim"]),
        number(end["perceptual"]), number(end["frechet"]), number(end["detail"]), end["codes"],
        number(curve[0]["colour"]), number(end["colour"]),
    ]


def draw_curves(curves, path):
    """Figures against minutes; `curves` are {variant: [the curve of each seed]}."""
    names = {"psnr": "PSNR, dB", "frechet": "Fréchet distance", "perceptual": "perceptual",
             "codes": "codes used"}
    figure = Figure(figsize=(4 * len(names), 3.2), layout="tight")
    axes = figure.subplots(1, len(names))
    for place, (variant, runs) in enumerate(curves.items()):
        for curve in runs:
            for axis, name in zip(axes, names):
                times = [MARK * (mark + 1) for mark in range(len(curve))]
                axis.plot(times, [point[name] for point in curve], f"C{place}.-",
                          label=variant if curve is runs[0] else None)
    for axis, title in zip(axes, names.values()):
        axis.set(xlabel="minutes of one core", title=title)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=80)


def draw_pictures(measure, models, path, count=8):
    """A row of images that are held out, then one of reconstructions for each of the `models`;
    three times as large."""
    spread = torch.linspace(0, len(measure.images) - 1, count).long()
    images = measure.images[spread]
    with torch.no_grad():
        rows = [images, *(model(images)[0].clamp(0, 1) for model in models)]
    enlarged = F.interpolate(torch.cat(rows), scale_factor=3, mode="nearest")
    save_image(enlarged, path, nrow=count, padding=3)


def main():
    arguments, handed_on = parse_arguments()
    titles = list(PARTS if arguments.parts else RECIPES)
    if arguments.variants is not None:
        titles = [titles[index] for index in arguments.variants]
    H = get_vqgan_hparams(training_flags(arguments, titles[0], handed_on))
    measure = Measure(H, arguments.images, arguments.vgg_weights)
    rows, curves, last = [], {title: [] for title in titles}, {}
    for title, seed in itertools.product(titles, arguments.seeds):
        seconds, every, name, flags = trained(arguments, title, seed, handed_on)
        steps = range(every, get_vqgan_hparams(flags).train_steps + 1, every)
        curve = [figures_at(measure, name, step, flags) for step in steps]
        curves[title].append(curve)
        last[title] = autoencoder(name, curve[-1]["model"], curve[-1]["step"], flags)
        rows.append(row(title, seed, seconds, curve))
        print(*rows[-1], sep=", ", flush=True)
    print(f"\n{table(HEAD, rows)}\n")
    draw_curves(curves, f"{arguments.out}_curves.png")
    draw_pictures(measure, last.values(), f"{arguments.out}_pictures.png")
    print(f"rows of {arguments.out}_pictures.png: images held out, then {', '.join(titles)}")


if __name__ == "__main__":
    run_script(main)
