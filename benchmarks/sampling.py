"""Network calls, time and quality of every sampler, on a trained digits model.

    python benchmarks/sampling.py --load_dir demo_absorbing --load_step 1600 --ema \
        --n_samples 500 --log_dir sampling --out assets/sampling.png

Quality is the Fréchet distance (the formula of FID) between samples and held-out digits in the
space of their 8x8 pixels, and the samples' bits per token under the model itself. `plain loop` is
ancestral sampling as published: every step runs the network on the whole batch. Prints a Markdown
table and draws distance against seconds. Flags are those of experiments/get_samples.py, and --out.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from hparams import UserError, get_samples_hparams
from measure import machine, number, table
from models.sampling.samplers import draw
from utils.training.assemble import load_autoencoder, load_sampler
from utils.data.datasets import load_dataset, train_validation_split
from utils.evaluation.metrics import frechet_distance
from utils.evaluation.samples import decode
from utils.runs.script import run_script, start_run
from utils.training.loop import Precision, resolve_device, seed_step

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  after the choice of a backend that needs no screen

STEPS = (8, 16, 32, 64, 256)
SAMPLERS = ("diffusion", "first_hitting", "mlm", "confidence", "halton", "remdm")
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


def run_sampler(H, sampler, name, steps, precision):
    """(ids, seconds, the counted network) of `n_samples` drawn in batches of `batch_size`."""
    network = Counted(sampler._denoise_fn)
    ids, seconds = [], 0.0
    for first in range(0, H.n_samples, H.batch_size):
        count = min(H.batch_size, H.n_samples - first)
        seed_step(H.seed, first, "samples")
        began = time.perf_counter()
        with precision.autocast():
            if name == PLAIN:
                start = torch.full((count, sampler.tokens), sampler.mask_id)
                start = start.to(sampler.embedding_weight.device)
                part = plain_loop(network, start, sampler.mask_id, steps, H.temp)
            else:
                part = sampler.sample(count, H.temp, steps, name, denoise=network)
        ids.append(part.cpu())
        seconds += time.perf_counter() - began
    return torch.cat(ids), seconds, network


def figures(H, sampler, autoencoder, held_out, name, steps, precision):
    """What one sampler does: a dict of figures."""
    ids, seconds, network = run_sampler(H, sampler, name, steps, precision)
    batches = -(-H.n_samples // H.batch_size)
    device = sampler.embedding_weight.device
    seed_step(0, 0, "validation")
    with torch.no_grad():
        bits = sampler.bits_per_token(ids.repeat(4, 1).to(device)).mean().item()
    images = decode(sampler, autoencoder, ids.to(device))
    return {
        "sampler": name, "steps": steps, "calls": network.calls / batches,
        "calls per sample": network.samples / H.n_samples, "seconds": seconds,
        "distance": distance(features(images), held_out), "bits": bits,
    }


def draw_plot(path, results):
    """Distance against seconds, a line for each sampler."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in (PLAIN, *SAMPLERS):
        points = [(r["seconds"], r["distance"]) for r in results if r["sampler"] == name]
        axes.plot(*zip(*points), "k.--" if name == PLAIN else ".-", label=name)
    axes.set(xscale="log", xlabel="seconds for all samples",
             ylabel="Fréchet distance to held-out digits")
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    own, argv = parser.parse_known_args()
    description = "Calls, time and quality of every sampler. --out FILE.png draws them."
    H = get_samples_hparams(argv, description)
    if H.dataset != "digits" or H.sampler != "absorbing":
        raise UserError("this benchmark is for an absorbing sampler of the digits")
    if own.out and not Path(own.out).parent.is_dir():
        raise UserError(f"--out {own.out}: there is no such folder")
    device = resolve_device(H.device)
    with start_run(H, device) as log:
        _, validation = train_validation_split(load_dataset(H))
        held_out = torch.stack([validation.load(index) for index in range(len(validation))])
        held_out = features(held_out)
        autoencoder = load_autoencoder(H, device, log)
        sampler = load_sampler(H, autoencoder, device, log)
        precision = Precision(H.amp, device)
        sampler.sample(min(H.n_samples, H.batch_size), sample_steps=8)  # warms up
        cases = [(name, steps) for name in (PLAIN, *SAMPLERS) for steps in STEPS]
        results = [
            figures(H, sampler, autoencoder, held_out, *case, precision) for case in tqdm(cases)
        ]
        rows = [
            [r["sampler"], r["steps"], number(r["calls"]), number(r["calls per sample"]),
             number(r["seconds"]), number(r["distance"]), number(r["bits"])] for r in results
        ]
        head = ["sampler", "steps", "calls of a batch", "calls per sample", "seconds",
                "Fréchet distance", "bits per token"]
        log.info(f"{machine(device)}; {H.n_samples} samples in batches of {H.batch_size}, "
                 f"temperature {H.temp}\n\n{table(head, rows)}\n")
        if own.out:
            draw_plot(own.out, results)
            log.info(f"drawn: {own.out}")


if __name__ == "__main__":
    run_script(main)
