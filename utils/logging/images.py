"""Images as grids and as PNG files.

Shapes: N images, C channels (1 or 3), H rows, W columns.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from utils.data.pixels import to_uint8
from utils.files import make_folder, remove_leftovers, whole_file

CELL = 64  # pixels; grids enlarge smaller images until the shorter side has about this many
PAD = 2  # white pixels around each image of a grid
TITLE = 26  # pixels of the letters of a title
GAP = 24  # white pixels between panels
LABEL = 84  # pixels of a row's label


def image_grid(images, columns=None):
    """Images [N, C, H, W] side by side, row by row, as one image [C, H', W'] of the same type.

    `columns` is ceil(sqrt(N)) by default. Raises ValueError for another shape or for no images.
    """
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] not in (1, 3):
        raise ValueError(f"a grid needs [N, 1 or 3, H, W] images, not {list(images.shape)}")
    times = max(1, CELL // min(images.shape[2:]))
    images = images.detach().cpu().repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
    count = len(images)
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    white = 255 if images.dtype == torch.uint8 else 1
    # white above and left of every image, and white images up to whole rows
    images = F.pad(images, (PAD, 0, PAD, 0, 0, 0, 0, -count % columns), value=white)
    grid = images.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)  # [C, rows, H, columns, W]
    return F.pad(grid.flatten(3, 4).flatten(1, 2), (0, PAD, 0, PAD), value=white)


def labelled_rows(rows, columns):
    """Rows of images below each other, their labels at the left, as one uint8 image [C, H', W'].

    `rows` maps labels to as many images uint8 [N, C, H, W] each. The first `columns` of all rows
    are followed by the next ones.
    """
    lines, total = [], len(next(iter(rows.values())))
    for first in range(0, total, columns):
        for label, images in rows.items():
            lines.append((label, image_grid(images[first : first + columns], columns)))
    width = max(grid.shape[2] for _, grid in lines)
    lines = [torch.cat((text_image(label, LABEL, grid.shape[1]).expand(len(grid), -1, -1),
                        F.pad(grid, (0, width - grid.shape[2]), value=255)), dim=2)
             for label, grid in lines]
    return torch.cat(lines, dim=1)


def text_image(text, width, height):
    """Black text in the middle of a white image, uint8 [1, height, width]."""
    image = Image.new("L", (width, height), "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text)
    place = (width - right - left) / 2, (height - bottom - top) / 2
    draw.multiline_text(place, text, fill="black", align="center")
    return torch.from_numpy(np.array(image))[None]


def to_pil(image):
    """One image [C, H, W], floats in [0, 1] or uint8, as a PIL image (grey where C is 1)."""
    return to_pil_image(to_uint8(image).cpu())


def panels(images):
    """Images, a dict {title: uint8 [C, H, W]}, side by side, each below its title: a PIL image."""
    pictures = {title: to_pil(image) for title, image in images.items()}
    font = ImageFont.load_default(TITLE)
    widths = [max(picture.width, math.ceil(font.getlength(title)))
              for title, picture in pictures.items()]
    height = 2 * TITLE + max(picture.height for picture in pictures.values())
    modes = {picture.mode for picture in pictures.values()}
    mode = modes.pop() if len(modes) == 1 else "RGB"
    whole = Image.new(mode, (sum(widths) + GAP * (len(widths) - 1), height), "white")
    draw, left = ImageDraw.Draw(whole), 0
    for (title, picture), width in zip(pictures.items(), widths):
        draw.text((left + (width - font.getlength(title)) / 2, TITLE / 3), title, "black", font)
        whole.paste(picture, (left + (width - picture.width) // 2, 2 * TITLE))
        left += width + GAP
    return whole


def save_image(image, path):
    """Write one image [C, H, W], floats in [0, 1] or uint8, or a PIL image, as a PNG, whole or not
    at all.

    Raises DiskError where the file cannot be written.
    """
    picture = to_pil(image) if torch.is_tensor(image) else image
    with whole_file(path, durable=False) as file:
        picture.save(file, format="PNG")


def remove_images(folder):
    """Remove the images that `save_images_individually` wrote into a folder earlier."""
    remove_leftovers(folder)
    for path in Path(folder).glob("[0-9]*.png"):
        path.unlink()


def save_images_individually(images, folder, start_index=0):
    """Write images [N, C, H, W] as folder/000000.png and on, numbered from `start_index`.

    Raises DiskError where the folder or a file cannot be written.
    """
    make_folder(folder)
    for index, image in enumerate(images, start_index):
        save_image(image, Path(folder) / f"{index:06d}.png")
