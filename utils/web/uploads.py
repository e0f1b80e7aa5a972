"""Images that visitors bring, and what they paint on them: checked, and refused in one sentence."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from utils.data.pixels import decode
from utils.errors import UserError
from utils.evaluation.inpainting import central_square

MOST_BYTES = 10_000_000  # of a file
MOST_PIXELS = 16_000_000  # of an image
CANVAS = 512  # pixels: about the longer side of an image that is painted on


def read_upload(path):
    """The upright PIL image in a visitor's file; UserError."""
    name = Path(path).name
    try:
        if os.stat(path).st_size > MOST_BYTES:
            raise UserError(f"{name} is larger than {MOST_BYTES // 10**6} MB: give a smaller image")
        content = Path(path).read_bytes()
    except OSError:
        raise UserError(f"{name} is gone: give it again") from None
    image = decode(content, name)
    if image.width * image.height > MOST_PIXELS:
        raise UserError(f"{name} has {image.width}x{image.height} pixels: give an image of "
                        f"{MOST_PIXELS // 10**6} megapixels at most")
    return image


def to_paint_on(photograph):
    """A PIL image in colour to paint a mask on: small ones enlarged by whole pixels, large ones
    reduced, and what the model does not see, outside the central square, faded."""
    width, height = photograph.size
    if photograph.mode.startswith("I"):  # 16-bit grey
        photograph = Image.fromarray((np.asarray(photograph) // 257).astype(np.uint8))
    longer = max(width, height)
    if longer <= CANVAS:
        times = max(1, CANVAS // longer)
        shown = photograph.convert("RGB").resize((width * times, height * times),
                                                 Image.Resampling.NEAREST)
    else:
        shown = photograph.convert("RGB")
        shown.thumbnail((CANVAS, CANVAS), Image.Resampling.LANCZOS)
    left, top, side = central_square(*shown.size)
    seen = shown.crop((left, top, left + side, top + side))
    faded = Image.blend(shown, Image.new("RGB", shown.size, "white"), 0.65)
    faded.paste(seen, (left, top))
    return faded


def painted(layers, size):
    """What is painted on an image of `size` (width, height), bool [h, w], of the transparent PIL
    images laid over it; UserError where nothing is, or where they are of another size."""
    if any(layer.size != size for layer in layers):
        raise UserError("what is painted on is another image than the one that is named: give it "
                        "as a file, then paint")
    opaque = [np.asarray(layer.convert("RGBA"))[..., 3] > 127 for layer in layers]
    if not opaque or not np.any(opaque):
        raise UserError("paint over what is to be filled in first")
    return np.any(opaque, axis=0)


def square_of(mask):
    """The part bool [m, m] of a mask bool [h, w] on the central square, all that a model sees."""
    left, top, side = central_square(mask.shape[1], mask.shape[0])
    square = mask[top : top + side, left : left + side]
    if not square.any():
        raise UserError("what is painted lies outside the central square of the image, which is "
                        "all that the model sees: paint inside it")
    return square
