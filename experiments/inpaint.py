"""Fill in a part of an image: n completions of what a mask or a box hides.

    python experiments/inpaint.py --load_dir demo_absorbing --load_step 2200 --ema \
        --image_index 3 --box 8 8 24 24 --n_samples 8 --log_dir inpaint

The image is encoded, ids whose pixels are hidden are drawn again given all others, and the result
is decoded and laid into the hidden part without a seam: kept pixels stay exactly as they are.
Writes logs/<log_dir>/images/inpaint_<step>.png: the image, the mask, the completions; and, where
the image is larger than the model's, images/inpaint_<step>_full/000000.png and on: the whole image
at its own size, all but the hidden pixels as its file has them.
"""

import contextlib

import torch
from tqdm import tqdm

from hparams import UserError, get_inpaint_hparams
from utils.data.datasets import load_dataset
from utils.data.pixels import to_float, to_square
from utils.evaluation.experiment import experiment
from utils.evaluation.inpainting import (
    as_png_holds, complete, hidden_square, lay_back, open_image, scaled,
)
from utils.files import make_folder
from utils.logging.images import remove_images, save_image
from utils.runs.script import run_script


def photograph_of(H, log):
    """The PIL image of `--image`, or the one of the dataset that `--image_index` names."""
    if H.image:
        return open_image(H.image)
    dataset = load_dataset(H, log)
    if H.image_index >= len(dataset):
        raise UserError(f"--image_index {H.image_index}: there are {len(dataset)} images")
    return dataset.open(H.image_index)


def save_at_full_size(run, photograph, images, hidden):
    """Write completions [n, C, S, S] into the photograph where it is larger than they are; `hidden`
    bool [m, m]."""
    H, log, (width, height) = run.H, run.log, photograph.size
    folder = log.folder.images / f"inpaint_{H.load_step}_full"
    remove_images(folder)  # or those of an earlier command would be counted as this one's
    if max(width, height) <= H.img_size:
        with contextlib.suppress(OSError):
            folder.rmdir()
        return
    make_folder(folder)
    hidden = scaled(hidden, min(width, height))
    for number, image in enumerate(tqdm(images, desc="full size", unit="image")):
        save_image(lay_back(photograph, image, hidden), folder / f"{number:06d}.png")
    grey = " (filled in with grey, which is all that this model draws)"
    is_grey = H.n_channels == 1 and photograph.mode.startswith("RGB")
    log.info(f"the same completions at the image's own size, {width}x{height}"
             f"{grey if is_grey else ''}: {folder}")


def main(argv=None):
    H = get_inpaint_hparams(argv)
    with experiment(H, "inpainting", several=False) as run:
        photograph = photograph_of(H, run.log)
        square = hidden_square(H, photograph.size, run.log)
        image = to_float(to_square(photograph, H.img_size, H.n_channels))
        hidden = torch.from_numpy(scaled(square, H.img_size))
        run.load_sampler()
        images = complete(run, image, hidden)
        mask = hidden.float().expand_as(image)
        before = torch.stack((image, mask, torch.where(hidden, mask * 0.5, image)))
        run.show_images("inpaint", torch.cat((before, images)))
        if H.save_individually:
            run.log.images(H.load_step, "inpaint", images, display=False, individually=True)
        run.log.info(f"the image, the mask, what is kept, {len(images)} completions: "
                     f"{run.log.folder.images}/inpaint_{H.load_step}.png")
        save_at_full_size(run, as_png_holds(photograph), images, square)


if __name__ == "__main__":
    run_script(main)
