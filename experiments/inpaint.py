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
from utils.training.assemble import load_autoencoder, load_sampler
from models.sampling.blending import lay_in
from utils.data.datasets import load_dataset
from utils.data.pixels import decode as decode_file
from utils.data.pixels import to_square
from utils.training.processes import alone
from utils.evaluation.samples import decode
from utils.runs.script import run_script, start_run
from utils.training.loop import Precision, seed_step

def read_image(path, img_size, n_channels):
    """An image file as [C, S, S] in [0, 1], cut to a square like the data trained on."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return to_square(decode_file(content, path), img_size, n_channels)


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
def complete(H, sampler, autoencoder, precision, image, hidden, count, log):
    """`count` completions of image [C, S, S], its pixels kept where `hidden` is False."""
    device = sampler.embedding_weight.device
    ids = autoencoder.encode(image[None].to(device))[-1]  # [1, N]
    unknown = hidden_ids(hidden, sampler.shape).to(device)
    known = ids.masked_fill(unknown, sampler.mask_id).expand(count, -1)
    log.info(f"{int(unknown.sum())} of {ids.shape[1]} ids are drawn again")
    images = []
    for first in range(0, count, H.batch_size):
        part = known[first : first + H.batch_size]
        seed_step(H.seed, first, "inpaint")
        with precision.autocast():
            drawn = sampler.sample(len(part), H.temp, known=part)
        images.append(decode(sampler, autoencoder, drawn))
    return lay_in(image, torch.cat(images), hidden)


def main(argv=None):
    H = get_inpaint_hparams(argv)
    device = alone(H.device)
    with start_run(H, device) as log:
        if H.image:
            image = read_image(H.image, H.img_size, H.n_channels)
        else:
            dataset = load_dataset(H)
            if H.image_index >= len(dataset):
                raise UserError(f"--image_index {H.image_index}: there are {len(dataset)} images")
            image = dataset.load(H.image_index)
        hidden = hidden_pixels(H)
        autoencoder = load_autoencoder(H, device, log)
        sampler = load_sampler(H, autoencoder, device, log)
        precision = Precision(H.amp, device)
        images = complete(H, sampler, autoencoder, precision, image, hidden, H.n_samples, log)
        mask = hidden.float().expand_as(image)
        before = torch.stack((image, mask, torch.where(hidden, mask * 0.5, image)))
        log.images(H.load_step, "inpaint", torch.cat((before, images)))
        if H.save_individually:
            log.images(H.load_step, "inpaint", images, display=False, individually=True)
        log.info(f"the image, the mask, what is kept, {len(images)} completions: "
                 f"{log.folder.images}/inpaint_{H.load_step}.png")


if __name__ == "__main__":
    run_script(main)
