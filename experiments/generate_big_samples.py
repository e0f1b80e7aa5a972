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
from utils.training.assemble import load_autoencoder, load_sampler
from utils.training.processes import alone
from utils.runs.script import run_script, start_run
from utils.training.loop import Precision, seed_step


@torch.no_grad()
def draw_canvas(H, sampler, precision, count):
    """Ids [count, H*W] of canvases of `H.shape`."""
    options = {}
    if H.canvas == "windows":
        options["denoise"] = WindowedDenoiser(
            lambda ids, where: sampler._denoise_fn(ids, where=where), sampler.shape, H.shape
        )
    with tqdm(desc="sampling", unit="call", dynamic_ncols=True) as bar, precision.autocast():
        def progress(done, total):
            bar.total = total
            bar.update()

        return sampler.sample(count, H.temp, grid=tuple(H.shape), progress=progress, **options)


@torch.no_grad()
def decode_big(sampler, autoencoder, ids, shape):
    """Images [n, C, H*f, W*f] in [0, 1] of ids [n, H*W], decoded tile by tile."""
    return decode_canvas(
        autoencoder.generator, sampler.embed(ids, tuple(shape)), sampler.shape
    ).clamp(0, 1)


def main(argv=None):
    H = get_big_samples_hparams(argv)
    device = alone(H.device)
    with start_run(H, device) as log:
        autoencoder = load_autoencoder(H, device, log)
        sampler = load_sampler(H, autoencoder, device, log)
        precision = Precision(H.amp, device)
        images = []
        for first in range(0, H.n_samples, H.batch_size):
            seed_step(H.seed, first, "samples")
            count = min(H.batch_size, H.n_samples - first)
            ids = draw_canvas(H, sampler, precision, count)
            images.append(decode_big(sampler, autoencoder, ids, H.shape))
        images = torch.cat(images)
        log.images(H.load_step, "big", images)
        if H.save_individually:
            log.images(H.load_step, "big", images, display=False, individually=True)
        log.info(f"{len(images)} canvases of {H.shape[0]}x{H.shape[1]} ids, {images.shape[2]}x"
                 f"{images.shape[3]} pixels: {log.folder.images}/big_{H.load_step}.png")


if __name__ == "__main__":
    run_script(main)
