"""Samples larger than those trained on, drawn and decoded as an experiment's settings say."""

import torch
from tqdm import tqdm

from models.sampling.canvas import WindowedDenoiser, decode_canvas
from utils.evaluation.samples import over_batches
from utils.training.precision import seed_step


@torch.no_grad()
def draw_canvas(run, count, shape, canvas, progress=None):
    """Ids [count, H*W] of canvases of `shape` (H, W), `canvas` windows or native.

    `run` is an Experiment; `progress` that of `models.sampling.samplers` (None: a bar).
    """
    H, sampler, options = run.H, run.sampler, {}
    if canvas == "windows":
        options["denoise"] = WindowedDenoiser(
            lambda ids, where: sampler._denoise_fn(ids, where=where), sampler.shape, shape
        )
    shown = dict(desc="sampling", unit="call", dynamic_ncols=True)
    with tqdm(**shown, disable=progress is not None) as bar:
        def show(done, total, ids):
            bar.total = total
            bar.update()

        with run.precision.autocast():
            return sampler.sample(
                count, H.temp, H.sample_steps, H.sample_type, grid=tuple(shape),
                progress=progress or show, **options
            )


@torch.no_grad()
def decode_big(run, ids, shape):
    """Images [n, C, H*f, W*f] in [0, 1] of ids [n, H*W], decoded tile by tile."""
    vectors = run.sampler.embed(ids, tuple(shape))
    return decode_canvas(run.autoencoder.generator, vectors, run.sampler.shape).clamp(0, 1)


def draw_canvases(run, shape, canvas, progress=None):
    """(ids [n_samples, H*W] on the CPU, images [n_samples, C, H*f, W*f] in [0, 1]) of canvases of
    `shape` (H, W) ids; the arguments are those of `draw_canvas`, `progress` that of all batches."""
    H, ids, images = run.H, [], []
    for first in range(0, H.n_samples, H.batch_size):
        seed_step(H.seed, first, "samples")
        count = min(H.batch_size, H.n_samples - first)
        rest = torch.full((H.n_samples - first - count, shape[0] * shape[1]), run.sampler.mask_id,
                          device=run.device)
        told = over_batches(progress, ids, rest)
        ids.append(draw_canvas(run, count, shape, canvas, told))
        images.append(decode_big(run, ids[-1], shape))
    return torch.cat(ids).cpu(), torch.cat(images)
