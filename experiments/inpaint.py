"""Fill in a part of an image: n completions of what a mask or a box hides.

    python experiments/inpaint.py --load_dir demo_absorbing --load_step 1600 --ema \
        --image_index 3 --box 8 8 24 24 --n_samples 8 --log_dir inpaint

The image is encoded, ids whose pixels are hidden are drawn again given all others, and the result
is decoded and laid into the hidden part without a seam: kept pixels stay exactly as they are.
Writes logs/<log_dir>/images/inpaint_<step>.png: the image, the mask, the completions.
"""

from pathlib import Path

import torch

from hparams import UserError, get_inpaint_hparams
from models.sampling.blending import lay_in
from utils.data.datasets import load_dataset
from utils.data.pixels import decode as decode_file
from utils.data.pixels import to_float, to_square
from utils.evaluation.experiment import experiment
from utils.evaluation.samples import decode
from utils.runs.script import run_script
from utils.training.precision import seed_step


def read_image(path, img_size, n_channels):
    """An image file as [C, S, S] in [0, 1], cut to a square like the data trained on."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return to_float(to_square(decode_file(content, path), img_size, n_channels))


def hidden_pixels(H):
    """Which pixels are to be filled in: bool [S, S], from `--mask` or `--box`."""
    hidden = torch.zeros(H.img_size, H.img_size, dtype=torch.bool)
    if H.mask:
        hidden = read_image(H.mask, H.img_size, 1)[0] > 0.5
    else:
        left, top, right, bottom = H.box
        hidden[top:bottom, left:right] = True
    if not hidden.any():
        raise UserError("nothing is hidden: a mask is white where the image is to be filled in")
    return hidden


def hidden_ids(hidden, shape):
    """Which ids [h*w] of a grid (h, w) stand for a patch with a hidden pixel: bool."""
    patch = [side // count for side, count in zip(hidden.shape, shape)]
    return torch.nn.functional.max_pool2d(hidden[None].float(), patch).flatten() > 0


@torch.no_grad()
def complete(run, image, hidden):
    """`n_samples` completions of image [C, S, S], its pixels kept where `hidden` is False."""
    H, sampler = run.H, run.sampler
    ids = run.autoencoder.encode(image[None].to(run.device))[-1]  # [1, N]
    unknown = hidden_ids(hidden, sampler.shape).to(run.device)
    known = ids.masked_fill(unknown, sampler.mask_id).expand(H.n_samples, -1)
    run.log.info(f"{int(unknown.sum())} of {ids.shape[1]} ids are drawn again")
    images = []
    for first in range(0, H.n_samples, H.batch_size):
        part = known[first : first + H.batch_size]
        seed_step(H.seed, first, "inpaint")
        with run.precision.autocast():
            drawn = sampler.sample(len(part), H.temp, known=part)
        images.append(decode(run.autoencoder, drawn))
    return lay_in(image, torch.cat(images), hidden)


def image_to_fill(H):
    """The image of `--image`, or the one of the dataset that `--image_index` names: [C, S, S]."""
    if H.image:
        return read_image(H.image, H.img_size, H.n_channels)
    dataset = load_dataset(H)
    if H.image_index >= len(dataset):
        raise UserError(f"--image_index {H.image_index}: there are {len(dataset)} images")
    return dataset.load(H.image_index)


def main(argv=None):
    H = get_inpaint_hparams(argv)
    with experiment(H, "inpainting", several=False) as run:
        image, hidden = image_to_fill(H), hidden_pixels(H)
        run.load_sampler()
        images = complete(run, image, hidden)
        mask = hidden.float().expand_as(image)
        before = torch.stack((image, mask, torch.where(hidden, mask * 0.5, image)))
        run.log.images(H.load_step, "inpaint", torch.cat((before, images)))
        if H.save_individually:
            run.log.images(H.load_step, "inpaint", images, display=False, individually=True)
        run.log.info(f"the image, the mask, what is kept, {len(images)} completions: "
                     f"{run.log.folder.images}/inpaint_{H.load_step}.png")


if __name__ == "__main__":
    run_script(main)
