"""Pixels: from the bytes of an image file to uint8 [C, S, S], and between uint8 and [0, 1].

Shapes: C = n_channels (3 for RGB, 1 for grey), S = img_size.
"""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.errors import UserError

# What a file holds is decided by its first bytes, not by its name. Other decoders stay off, since
# some of them start programs (EPS) or read samples that are no pixels (TIFF).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
LARGEST_GREY = 65535  # of 16-bit grey images
TRANSFORM_VERSION = 1  # part of every fingerprint: raise it when `to_square` gives other pixels


class UnreadableImage(UserError):
    """One image cannot be read; `path` names it and `reason` says why."""

    def __init__(self, path, reason):
        # A file name may hold bytes that are no text, which a log could not write.
        self.path = str(path).encode("utf-8", "backslashreplace").decode()
        self.reason = reason
        super().__init__(f"cannot read the image {self.path}: {reason}")


def decode(content, path, most_pixels=None):
    """The upright PIL image in the bytes `content`; raises UnreadableImage, naming `path`, also
    where its header says that it has more than `most_pixels`, before any is decoded."""
    if not content:
        raise UnreadableImage(path, "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata, which the pixels do not need
            # Above 89 million pixels Pillow only warns, yet each of four workers would need
            # gigabytes for such an image.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if most_pixels and image.width * image.height > most_pixels:
                raise ValueError(f"it has {image.width}x{image.height} pixels, and "
                                 f"{most_pixels / 1e6:.3g} megapixels are allowed at most")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        return image
    except UnidentifiedImageError:
        reason = "it is no image of a known format"
    except Exception as error:  # on broken bytes the decoders raise nearly anything
        reason = str(error) or type(error).__name__
    raise UnreadableImage(path, reason)


def to_square(image, img_size, n_channels):
    """The centre square of a PIL image as uint8 [C, S, S].

    Transparency is laid over white; the shorter side becomes `img_size` by antialiased bicubic
    interpolation, which never enlarges a long, thin image as a whole.
    """
    image = _over_white(image).convert("L" if n_channels == 1 else "RGB")
    image = ImageOps.fit(image, (img_size, img_size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).reshape(img_size, img_size, n_channels)
    return pixels.permute(2, 0, 1).contiguous()  # [C, S, S]


def value_range(image):
    """(lowest, highest, largest possible) value in a PIL image, over all channels."""
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, LARGEST_GREY)
        white = (values == image.info.get("transparency")).any()
        return int(values.min()), LARGEST_GREY if white else int(values.max()), LARGEST_GREY
    lows, highs = zip(*_over_white(image).convert("RGB").getextrema())
    return min(lows), max(highs), 255


def _over_white(image):
    """A PIL image with its transparency laid over white, of 8 bits a channel."""
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image


def _to_8_bits(image):
    """A 16-bit grey image with its whole range scaled to 0..255; PIL itself would clip it."""
    values = np.asarray(image).astype(np.int64)
    scaled = (values.clip(0, LARGEST_GREY) * 255 + LARGEST_GREY // 2) // LARGEST_GREY
    transparent = image.info.get("transparency")
    if transparent is not None:  # PNG names one 16-bit value as transparent
        scaled[values == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8))


def to_float(pixels):
    """uint8 values of any shape as float32 in [0, 1], where they are."""
    # By a tensor, not by a number, which a GPU would replace by a product with its inverse.
    return pixels.float() / torch.full((), 255.0, device=pixels.device)


def to_uint8(images):
    """Floats in [0, 1] of any shape as uint8 in 0..255, where they are; uint8 stays as it is.

    Other values are clamped and NaN becomes 0, so that a diverged model still shows.
    """
    images = images.detach()
    if images.dtype == torch.uint8:
        return images
    return images.float().nan_to_num(nan=0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
