"""Draw samples larger than those trained on: a canvas of H x W ids.

    python experiments/generate_big_samples.py --load_dir absorbing_textures --load_step 2000 \
        --ema --shape 32 32 --canvas native --n_samples 4 --log_dir big

`--canvas windows` runs the denoiser at every window of the trained size that covers an id about to
be drawn and averages; `native` runs it on the whole canvas, which a denoiser without absolute
positions can do. `--sample_type raster` draws the ids row by row: one by one, as was published,
with as many `--sample_steps` as there are ids. Writes logs/<log_dir>/images/big_<step>.png.
"""

import torch
from tqdm import tqdm

from hparams import get_big_samples_hparams
from models.sampling.canvas import WindowedDenoiser, decode_canvas
from utils.evaluation.experiment import experiment
from utils.runs.script import run_script
from utils.training.precision import seed_step


@torch.no_grad()
def draw_canvas(run, count):
    """Ids [count, H*W] of canvases of `--shape`."""
    H, sampler, options = run.H, run.sampler, {}
    if H.canvas == "windows":
        options["denoise"] = WindowedDenoiser(
            lambda ids, where: sampler._denoise_fn(ids, where=where), sampler.shape, H.shape
        )
    with tqdm(desc="sampling", unit="call", dynamic_ncols=True) as bar, run.precision.autocast():
        def progress(done, total, ids):
            bar.total = total
            bar.update()

        return sampler.sample(count, H.temp, grid=tuple(H.shape), progress=progress, **options)


@torch.no_grad()
def decode_big(run, ids):
    """Images [n, C, H*f, W*f] in [0, 1] of ids [n, H*W], decoded tile by tile."""
    vectors = run.sampler.embed(ids, tuple(run.H.shape))
    return decode_canvas(run.autoencoder.generator, vectors, run.sampler.shape).clamp(0, 1)


def main(argv=None):
    H = get_big_samples_hparams(argv)
    with experiment(H, "big samples", several=False) as run:
        run.load_sampler()
        images = []
        for first in range(0, H.n_samples, H.batch_size):
            seed_step(H.seed, first, "samples")
            ids = draw_canvas(run, min(H.batch_size, H.n_samples - first))
            images.append(decode_big(run, ids))
        images = torch.cat(images)
        run.log.images(H.load_step, "big", images)
        if H.save_individually:
            run.log.images(H.load_step, "big", images, display=False, individually=True)
        run.log.info(f"{len(images)} canvases of {H.shape[0]}x{H.shape[1]} ids, {images.shape[2]}x"
                     f"{images.shape[3]} pixels: {run.log.folder.images}/big_{H.load_step}.png")


if __name__ == "__main__":
    run_script(main)
