"""Draw samples larger than those trained on: a canvas of H x W ids.

    python experiments/generate_big_samples.py --load_dir absorbing_textures --load_step 2000 \
        --ema --shape 32 32 --canvas native --n_samples 4 --log_dir big

`--canvas windows` runs the denoiser at every window of the trained size that covers an id about to
be drawn and averages; `native` runs it on the whole canvas, which a denoiser without absolute
positions can do. `--sample_type raster` draws the ids row by row: one by one, as was published,
with as many `--sample_steps` as there are ids. Writes logs/<log_dir>/images/big_<step>.png.
"""

from hparams import get_big_samples_hparams
from utils.evaluation.canvas import draw_canvases
from utils.evaluation.experiment import experiment
from utils.runs.script import run_script


def main(argv=None):
    H = get_big_samples_hparams(argv)
    with experiment(H, "big samples", several=False) as run:
        run.load_sampler()
        _, images = draw_canvases(run, H.shape, H.canvas)
        run.show_images("big", images)
        if H.save_individually:
            run.log.images(H.load_step, "big", images, display=False, individually=True)
        run.log.info(f"{len(images)} canvases of {H.shape[0]}x{H.shape[1]} ids, {images.shape[2]}x"
                     f"{images.shape[3]} pixels: {run.log.folder.images}/big_{H.load_step}.png")


if __name__ == "__main__":
    run_script(main)
