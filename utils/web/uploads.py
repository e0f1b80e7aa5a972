"""Images that visitors bring, and what they paint on them: checked, and refused in one sentence."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from utils.data.pixels import decode
from utils.errors import UserError
from utils.evaluation.inpainting import central_square, on_square

MOST_BYTES = 10_000_000  # of a file
MOST_PIXELS = 16_000_000  # of an image
CANVAS = 512  # pixels: about the longer side of an image that is painted on
MOST_PAINTED = 2 * CANVAS**2  # pixels of a layer of what is painted on it
MOST_LAYERS = 4
MOST_BLOB = 4 * MOST_PAINTED  # bytes of a layer's file


def read_upload(path):
    """The upright PIL image in a visitor's file; UserError."""
    name = Path(path).name
    return decode(content_of(path, name, MOST_BYTES), name, MOST_PIXELS)


def content_of(path, name, most):
    """The bytes of a visitor's file, `most` at most; UserError, which calls it `name`."""
    try:
        if os.stat(path).st_size > most:
            raise UserError(f"{name} is larger than {most // 10**6} MB: give a smaller image")
        return Path(path).read_bytes()
    except OSError:
        raise UserError(f"{name} is gone: give it again") from None


def read_layers(layers):
    """The PIL images of what is painted, paths or bytes of files as a browser sent them; UserError.
    """
    if len(layers) > MOST_LAYERS:
        raise UserError(f"what is painted has {len(layers)} layers, and {MOST_LAYERS} are allowed "
                        f"at most")
    name = "what is painted"
    contents = [layer if isinstance(layer, bytes) else content_of(layer, name, MOST_BLOB)
                for layer in layers]
    return [decode(content, name, MOST_PAINTED) for content in contents]


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
    square = on_square(mask)
    if not square.any():
        raise UserError("what is painted lies outside the central square of the image, which is "
                        "all that the model sees: paint inside it")
    return square
