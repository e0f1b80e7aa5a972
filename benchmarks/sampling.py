"""Network calls, time and quality of every sampling method, on a trained digits model.

    python benchmarks/sampling.py --load_dir demo_absorbing --load_step 2200 --ema \
        --n_samples 500 --log_dir sampling --out assets/sampling.png

Quality is the Fréchet distance (the formula of FID) between samples and held-out digits in the
space of their 8x8 pixels, and the samples' bits per token under the model itself. `plain loop` is
ancestral sampling as published: every step runs the network on the whole batch. Prints a Markdown
table and draws distance against seconds. Flags are those of experiments/get_samples.py, and --out.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from hparams import UserError, get_samples_hparams
from measure import machine, number
from models.sampling.samplers import draw
from utils.data.datasets import load_dataset
from utils.data.split import train_validation_split
from utils.evaluation.experiment import experiment, table
from utils.evaluation.metrics import frechet_distance
from utils.evaluation.samples import decode
from utils.runs.script import run_script
from utils.training.precision import seed_step

STEPS = (8, 16, 32, 64, 256)
METHODS = ("diffusion", "first_hitting", "mlm", "confidence", "halton", "remdm")
PLAIN = "plain loop"


@torch.no_grad()
def plain_loop(denoise, ids, mask_id, steps, temp):
    """The published ancestral loop: the network runs on every sample at every step."""
    ids = ids.clone()
    for t in range(steps, 0, -1):
        now = (ids == mask_id) & (torch.rand(ids.shape, device=ids.device) < 1 / t)
        logits = denoise(ids)
        ids[now] = draw(logits[now], temp)
    return ids


def features(images):
    """Digits [n, 1, S, S] as the vectors [n, 64] of their 8x8 pixels, float64."""
    return torch.nn.functional.interpolate(images, size=8, mode="area").flatten(1).double().numpy()


def distance(first, second):
    """Fréchet distance of two sets of vectors [n, D]."""
    moments = [(part.mean(0), np.cov(part, rowvar=False)) for part in (first, second)]
    return frechet_distance(*moments[0], *moments[1])


class Counted:
    """A network that counts its calls and the samples that they are for."""

    def __init__(self, network):
        self.network, self.calls, self.samples = network, 0, 0

    def __call__(self, ids, where=None):
        self.calls += 1
        self.samples += len(ids)
        return self.network(ids, where=where)


def draw_by(run, name, steps):
    """(ids, seconds, the counted network) of `n_samples` drawn in batches of `batch_size`."""
    H, sampler = run.H, run.sampler
    network = Counted(sampler._denoise_fn)
    ids, seconds = [], 0.0
    for first in range(0, H.n_samples, H.batch_size):
        count = min(H.batch_size, H.n_samples - first)
        seed_step(H.seed, first, "samples")
        began = time.perf_counter()
        with run.precision.autocast():
            if name == PLAIN:
                start = torch.full((count, sampler.tokens), sampler.mask_id, device=run.device)
                part = plain_loop(network, start, sampler.mask_id, steps, H.temp)
            else:
                part = sampler.sample(count, H.temp, steps, name, denoise=network)
        ids.append(part.cpu())
        seconds += time.perf_counter() - began
    return torch.cat(ids), seconds, network


def figures(run, held_out, name, steps):
    """Calls, seconds and quality of one sampling method: {heading of the table: figure}."""
    ids, seconds, network = draw_by(run, name, steps)
    batches = -(-run.H.n_samples // run.H.batch_size)
    seed_step(0, 0, "validation")
    with torch.no_grad(), run.precision.autocast():
        bits = run.sampler.bits_per_token(ids.repeat(4, 1).to(run.device)).mean().item()
    images = decode(run.decoder, ids.to(run.device))
    return {
        "method": name, "steps": steps, "calls of a batch": network.calls / batches,
        "calls per sample": network.samples / run.H.n_samples, "seconds": seconds,
        "Fréchet distance": distance(features(images), held_out), "bits per token": bits,
    }


def draw_plot(path, results):
    """Distance against seconds, a line for each method."""
    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.subplots()
    for name in (PLAIN, *METHODS):
        points = [(r["seconds"], r["Fréchet distance"]) for r in results if r["method"] == name]
        axes.plot(*zip(*points), "k.--" if name == PLAIN else ".-", label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="seconds for all samples", ylabel="Fréchet distance to held-out digits")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    own, argv = parser.parse_known_args()
    H = get_samples_hparams(argv)
    if H.dataset != "digits" or H.sampler != "absorbing":
        raise UserError("this benchmark is for an absorbing sampler of the digits")
    if own.out and not Path(own.out).parent.is_dir():
        raise UserError(f"--out {own.out}: there is no such folder")
    with experiment(H, "sampling methods", several=False) as run:
        _, validation = train_validation_split(load_dataset(H, run.log))
        images = [validation.load(index) for index in range(len(validation))]
        held_out = features(torch.stack(images))
        run.load_sampler()
        with run.precision.autocast():
            run.sampler.sample(min(H.n_samples, H.batch_size), sample_steps=8)  # warms up
        cases = [(name, steps) for name in (PLAIN, *METHODS) for steps in STEPS]
        results = [figures(run, held_out, *case) for case in tqdm(cases)]
        rows = []
        for result in results:
            name, steps, *measured = result.values()
            rows.append([name, steps, *map(number, measured)])
        run.log.info(
            f"{machine(run.device)}; {H.n_samples} samples in batches of {H.batch_size}, "
            f"temperature {H.temp}", table(list(results[0]), rows)
        )
        if own.out:
            draw_plot(own.out, results)
            run.log.info(f"drawn: {own.out}")


if __name__ == "__main__":
    run_script(main)
