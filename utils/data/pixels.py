"""One image: from the bytes of a file to a float32 [C, S, S] tensor in [0, 1].

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
TRANSFORM_VERSION = 1  # part of every fingerprint: raise it when `to_square` gives other pixels


class UnreadableImage(UserError):
    """One image cannot be read; `path` names it and `reason` says why."""

    def __init__(self, path, reason):
        # A file name may hold bytes that are no text, which a log could not write.
        self.path = str(path).encode("utf-8", "backslashreplace").decode()
        self.reason = reason
        super().__init__(f"cannot read the image {self.path}: {reason}")


def decode(content, path):
    """The upright PIL image in the bytes `content`; raises UnreadableImage, naming `path`."""
    if not content:
        raise UnreadableImage(path, "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata, which the pixels do not need
            # Above 89 million pixels Pillow only warns, yet each of four workers would need
            # gigabytes for such an image.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        return image
    except UnidentifiedImageError:
        reason = "it is no image of a known format"
    except Exception as error:  # on broken bytes the decoders raise nearly anything
        reason = str(error) or type(error).__name__
    raise UnreadableImage(path, reason)


def to_square(image, img_size, n_channels):
    """The centre square of a PIL image as float32 [C, S, S] in [0, 1].

    Transparency is laid over white; the shorter side becomes `img_size` by antialiased bicubic
    interpolation. The square is cut by the resize itself: the same pixels as cutting afterwards,
    without ever enlarging a long, thin image as a whole.
    """
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("L" if n_channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    image = image.resize((img_size, img_size), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.array(image)).reshape(img_size, img_size, n_channels)
    return pixels.permute(2, 0, 1).float().div(255).contiguous()  # [C, S, S]


def _to_8_bits(image):
    """A 16-bit grey image with its whole range scaled to 0..255; PIL itself would clip it."""
    values = np.asarray(image).astype(np.int64)
    scaled = (values.clip(0, 65535) * 255 + 32767) // 65535
    transparent = image.info.get("transparency")
    if transparent is not None:  # PNG names one 16-bit value as transparent
        scaled[values == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8))
