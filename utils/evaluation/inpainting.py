"""What inpainting hides of a photograph, how it is drawn, and how it gets back into the photograph.

A model sees the central square of a photograph, scaled to S x S pixels (`img_size`). What is hidden
is known on that square, bool [m, m], in pixels of the mask file or, for a box, of the model.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.sampling.blending import lay_in
from utils.data.pixels import decode as decode_file
from utils.errors import UserError
from utils.evaluation.samples import decode, over_batches
from utils.logging.images import to_pil
from utils.training.precision import seed_step

NEITHER_SHAPE = ("--mask {} of {}x{} pixels does not fit the image of {}x{}: give one of the same "
                 "size or shape, or a square one for the image's central square")


def open_image(path):
    """The upright PIL image in a file; raises UserError."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return decode_file(content, path)


def central_square(width, height):
    """(left, top, side) of the square that a model sees of an image."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def on_square(mask):
    """The part bool [m, m] of a mask bool [h, w] on the central square of its image."""
    left, top, side = central_square(mask.shape[1], mask.shape[0])
    return mask[top : top + side, left : left + side]


def read_mask(path):
    """Which pixels of a mask file are hidden: bool [h, w], True where it is lighter than mid-grey.

    Transparency is laid over black, so that white on transparent hides what is white.
    """
    image = open_image(path)
    if image.mode.startswith("I"):  # 16-bit grey, of which PNG may name one value as transparent
        values = np.asarray(image)
        return (values > 32767) & (values != image.info.get("transparency", -1))
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image.convert("RGBA"))
    values = np.asarray(image.convert("L"))
    # some grey is the soft edge of a brush
    if ((values > 32) & (values < 223)).mean() > 0.1 and len(np.unique(values)) > 64:
        raise UserError(f"--mask {path} is no picture in black and white: paint what is to be "
                        f"filled in white, on black or on transparent")
    return values > 127


def mask_square(hidden, path, size, log):
    """The part bool [m, m] of a mask bool [h, w] that lies on the square that the model sees of an
    image of `size` (width, height).

    Raises UserError where the mask, the file `path`, does not fit the image or hides nothing there.
    """
    (height, width), (image_width, image_height) = hidden.shape, size
    if not hidden.any():
        raise UserError("nothing is hidden: a mask is white where the image is to be filled in")
    # equal but for the rounding of a side that was scaled
    difference = abs(width * image_height - height * image_width)
    if difference >= max(width, height, *size):
        if width != height:
            raise UserError(NEITHER_SHAPE.format(path, width, height, *size))
        side = min(size)
        log.info(f"--mask {path} is square and the image is not: it is taken to lie on the central "
                 f"{side}x{side} pixels, which are what the model sees")
        return hidden
    square = on_square(hidden)
    if width != height:
        log.info(f"--mask {path} is cut like the image: of its {width}x{height} pixels the model "
                 f"sees the central {len(square)}x{len(square)}")
    if not square.any():
        raise UserError(f"what --mask {path} hides lies outside the central square of the image, "
                        f"which is all that the model sees: move it, or cut the image around it")
    outside = 1 - square.sum() / hidden.sum()
    if outside > 0:
        log.warning(f"{outside:.1%} of what --mask {path} hides lies outside the central square of "
                    f"the image, which is all that the model sees: that part stays as it is")
    return square


def hidden_square(H, size, log):
    """What `--mask` or `--box` hides of an image of `size` (width, height): bool [m, m]."""
    if H.mask:
        return mask_square(read_mask(H.mask), H.mask, size, log)
    left, top, right, bottom = H.box
    hidden = np.zeros((H.img_size, H.img_size), dtype=bool)
    hidden[top:bottom, left:right] = True
    return hidden


def scaled(hidden, side):
    """bool [m, m] as bool [side, side]: a pixel is hidden where any part of it is, so that a thin
    line is not lost, and no kept pixel shows a mixture with what is hidden."""
    image = Image.fromarray(hidden.astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BOX)) > 0


def hidden_ids(hidden, shape):
    """Which ids [h*w] of a grid (h, w) stand for a patch with a hidden pixel: bool."""
    patch = [side // count for side, count in zip(hidden.shape, shape)]
    return torch.nn.functional.max_pool2d(hidden[None].float(), patch).flatten() > 0


@torch.no_grad()
def complete(run, image, hidden, progress=None):
    """`n_samples` completions of image [C, S, S], its pixels kept where `hidden` is False.

    `run` is an Experiment; `progress` that of `models.sampling.samplers`, for all batches.
    """
    H, sampler = run.H, run.sampler
    ids = run.autoencoder.encode(image[None].to(run.device))[-1]  # [1, N]
    unknown = hidden_ids(hidden, sampler.shape).to(run.device)
    known = ids.masked_fill(unknown, sampler.mask_id).expand(H.n_samples, -1)
    run.log.info(f"{int(unknown.sum())} of {ids.shape[1]} ids are drawn again")
    drawn, images = [], []
    for first in range(0, H.n_samples, H.batch_size):
        part, rest = known[first : first + H.batch_size], known[first + H.batch_size :]
        seed_step(H.seed, first, "inpaint")
        with run.precision.autocast():
            drawn.append(sampler.sample(
                len(part), H.temp, H.sample_steps, H.sample_type, known=part,
                progress=over_batches(progress, drawn, rest),
            ))
        images.append(decode(run.decoder, drawn[-1]))
    return lay_in(image, torch.cat(images), hidden)


def as_png_holds(photograph):
    """A PIL image with its pixels as they are, in a mode of PNG: 8-bit grey or colour, colour with
    transparency, 16-bit grey."""
    mode, profile = photograph.mode, photograph.info.get("icc_profile")
    if mode.startswith("I"):
        photograph = Image.fromarray(np.asarray(photograph).clip(0, 65535).astype(np.uint16))
        return with_profile(photograph, profile)
    if photograph.has_transparency_data:
        photograph = photograph.convert("RGBA")
    elif mode not in ("L", "RGB"):
        photograph = photograph.convert("L" if mode == "1" else "RGB")
    if mode == "CMYK" or mode in ("L", "LA") and photograph.mode == "RGBA":
        photograph.info.pop("icc_profile", None)  # that of inks, or of grey
    return photograph


def with_profile(image, profile):
    """A PIL image with an ICC profile, bytes or None, which it is saved with."""
    if profile:
        image.info["icc_profile"] = profile
    return image


def lay_back(photograph, completion, hidden):
    """A PIL image as `as_png_holds` it, the hidden pixels, bool [side, side], of its central square
    replaced by those of `completion` [C, S, S], which is enlarged; all others stay as they are.

    What is filled in takes the photograph's form: grey in a grey one, opaque in a transparent one.
    The photograph's ICC profile is kept.
    """
    left, top, side = central_square(*photograph.size)
    drawn = to_pil(completion).resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.array(photograph)
    if pixels.dtype == np.uint16:
        drawn = np.asarray(drawn.convert("L")).astype(np.uint16) * 257
    else:
        drawn = np.asarray(drawn.convert(photograph.mode))
    pixels[top : top + side, left : left + side][hidden] = drawn[hidden]
    return with_profile(Image.fromarray(pixels), photograph.info.get("icc_profile"))
