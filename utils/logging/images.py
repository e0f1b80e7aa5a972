"""Images on their way out: the one place that turns [0, 1] floats into uint8, and into files.

Shapes: N images, C channels (1 or 3), H rows, W columns.
"""

import math
from pathlib import Path

import torch
from PIL import Image

from utils.errors import DiskError
from utils.runs.files import remove_leftovers, whole_file

GRID_CELL = 64  # smaller images are enlarged in grids until a side has about this many pixels


def to_uint8(images):
    """Floats in [0, 1], of any shape, as uint8 in 0..255 on the CPU; uint8 is kept as it is.

    Values outside [0, 1] are clamped and NaN becomes 0, so that a diverged model still shows.
    """
    images = images.detach().cpu()
    if images.dtype == torch.uint8:
        return images
    return images.float().nan_to_num(nan=0.0).clamp(0, 1).mul(255).round().to(torch.uint8)


def image_grid(images, columns=None, pad=2, enlarge=None):
    """Images [N, C, H, W] side by side, row by row, as one image [C, H', W'].

    `columns` is ceil(sqrt(N)) by default. `pad` white pixels separate neighbours and frame the
    grid. `enlarge` repeats each pixel that many times in both axes; None picks the factor that
    brings images smaller than 64 pixels near that size, 1 leaves them as they are. The type and
    the range of the values are kept. Raises ValueError for another shape or for no images.
    """
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] not in (1, 3):
        raise ValueError(f"a grid needs [N, 1 or 3, H, W] images, not {list(images.shape)}")
    if enlarge is None:
        enlarge = max(1, GRID_CELL // min(images.shape[2:]))
    images = images.detach().cpu()
    images = images.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)

    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    white = 255 if images.dtype == torch.uint8 else 1
    shape = (channels, rows * (height + pad) + pad, columns * (width + pad) + pad)
    grid = images.new_full(shape, white)
    for index, image in enumerate(images):
        top = pad + index // columns * (height + pad)
        left = pad + index % columns * (width + pad)
        grid[:, top : top + height, left : left + width] = image
    return grid


def to_pil(image):
    """One image [C, H, W], floats in [0, 1] or uint8, as a PIL image (grey where C is 1)."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image is [1 or 3, H, W], not {list(image.shape)}")
    pixels = to_uint8(image).permute(1, 2, 0).contiguous().numpy()  # [H, W, C]
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def save_image(image, path):
    """Write one image [C, H, W], floats in [0, 1] or uint8, as PNG; never a half-written file.

    Raises DiskError where the file cannot be written.
    """
    picture = to_pil(image)
    with whole_file(path, durable=False) as file:
        picture.save(file, format="PNG")


def remove_images(folder):
    """Remove what `save_images_individually` wrote into a folder earlier, if anything."""
    remove_leftovers(folder)
    for path in Path(folder).glob("[0-9]*.png"):
        path.unlink()


def save_images_individually(images, folder, start_index=0):
    """Write images [N, C, H, W] as folder/000000.png and on, numbered from `start_index`.

    Returns the paths. Raises DiskError where the folder or a file cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot create the folder {folder}: {error.strerror}") from None
    paths = [folder / f"{start_index + index:06d}.png" for index in range(len(images))]
    for image, path in zip(images, paths):
        save_image(image, path)
    return paths
