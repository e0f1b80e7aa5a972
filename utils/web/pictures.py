"""Ids as colours and images enlarged by whole pixels, so that small ones can be seen.

Shapes: n images, K codebook size, D width of its vectors, h x w the grid of ids.
"""

import colorsys
import math

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from utils.data.pixels import to_float, to_uint8
from utils.evaluation.metrics import psnr
from utils.logging.images import image_grid, to_pil

WIDTH = 640  # pixels that a picture is about wide
BLANK = (236, 238, 241)  # of an id that is not drawn yet
CODES_SHOWN = 32  # of those in use, the most frequent ones


def palette(codebook):
    """A colour for each vector of a codebook [K, D], and one for the mask id: uint8 [K+1, 3].

    Vectors are ordered by their first principal component: hue goes around by golden angles, so
    that neighbours are told apart, and lightness rises with the order.
    """
    count = len(codebook)
    centred = codebook.float() - codebook.float().mean(0)
    direction = torch.linalg.svd(centred, full_matrices=False)[2][0]
    order = (centred @ direction).argsort().argsort().tolist()
    colours = [
        colorsys.hls_to_rgb(place * 0.381966 % 1, 0.32 + 0.4 * place / max(1, count - 1), 0.62)
        for place in order
    ]
    return torch.tensor([[round(255 * value) for value in colour] for colour in colours]
                        + [list(BLANK)], dtype=torch.uint8)


def ids_as_images(ids, shape, colours, size):
    """Ids [n, h*w] of a grid `shape` (h, w) as images uint8 [n, 3, H, W] of `size` (H, W)."""
    images = colours[ids.cpu()].transpose(1, 2).unflatten(2, shape)  # [n, 3, h, w]
    return F.interpolate(images.float(), size=size, mode="nearest").to(torch.uint8)


def veiled(images, missing):
    """Images [n, C, H, W] in [0, 1] with the patches of `missing` ids, bool [n, h, w], veiled."""
    missing = F.interpolate(missing[:, None].float(), size=images.shape[2:], mode="nearest")
    return torch.where(missing > 0, 0.25 * images + 0.75 * BLANK[0] / 255, images)


def sheet(images):
    """Images [n, C, H, W] side by side as a PIL image about WIDTH pixels wide, each enlarged by a
    whole number of times."""
    columns = math.ceil(math.sqrt(len(images)))
    times = max(1, WIDTH // (columns * images.shape[3]))
    images = to_uint8(images).repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
    return to_pil(image_grid(images, columns))


def enlarged(image, width=WIDTH):
    """A PIL image enlarged by a whole number of times until it is about `width` pixels wide."""
    times = max(1, width // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def numbered(ids, shape, colours):
    """Ids [h*w] of a grid (h, w) as a PIL image of coloured cells with their numbers in them, where
    these can be read."""
    cell = max(4, WIDTH // max(shape))
    size = (shape[0] * cell, shape[1] * cell)
    picture = to_pil(ids_as_images(ids[None], shape, colours, size)[0])
    if cell < 28:
        return picture
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(10, int(cell * 0.36)))
    for place, number in enumerate(ids.tolist()):
        row, column = divmod(place, shape[1])
        at = ((column + 0.5) * cell, (row + 0.5) * cell)
        draw.text(at, str(number), font=font, fill=contrast(colours[number]), anchor="mm")
    return picture


def contrast(colour):
    """Black or white, whichever is read better on a colour, uint8 [3]."""
    red, green, blue = colour.tolist()
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 130 else "white"


def codes_in_use(ids, colours, patches):
    """A PIL image of the codes that ids [h*w] use, the most frequent first: the colour, one of
    `patches` {code: uint8 [C, p, p]}, and how often it is used."""
    numbers, counts = ids.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:CODES_SHOWN]
    columns, side, gap = 16, 2 * WIDTH // 16 - 10, 10
    rows = math.ceil(len(order) / columns)
    picture = Image.new("RGB", (2 * WIDTH, rows * (2 * side + 42)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    for place, index in enumerate(order.tolist()):
        number, count = int(numbers[index]), int(counts[index])
        row, column = divmod(place, columns)
        left, top = column * (side + gap), row * (2 * side + 42)
        colour = tuple(colours[number].tolist())
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill=colour)
        draw.text((left + side / 2, top + side / 2), str(number), font=ImageFont.load_default(20),
                  fill=contrast(colours[number]), anchor="mm")
        patch = to_pil(patches[number]).convert("RGB")
        picture.paste(patch.resize((side, side), Image.Resampling.NEAREST), (left, top + side + 2))
        draw.rectangle((left, top + side + 2, left + side - 1, top + 2 * side + 1), outline="#999")
        draw.text((left + side / 2, top + 2 * side + 14), f"{count}x", font=font, fill="black",
                  anchor="mm")
    return picture


def labelled_row(images, labels):
    """Images [n, C, H, W] in a row, each with a line of text below it: a PIL image."""
    side = min(160, (2 * WIDTH - 12 * len(images)) // len(images))
    picture = Image.new("RGB", (2 * WIDTH, side + 30), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for place, (image, label) in enumerate(zip(images, labels)):
        left = place * (side + 12)
        scaled = to_pil(image).convert("RGB").resize((side, side), Image.Resampling.NEAREST)
        picture.paste(scaled, (left, 0))
        draw.text((left + side / 2, side + 15), label, font=font, fill="black", anchor="mm")
    return picture


def difference(image, reconstruction):
    """How far two images uint8 [C, S, S] are apart: (peak signal-to-noise ratio in dB, 120 for
    equal ones; largest difference of a pixel)."""
    apart = image.int() - reconstruction.int()
    decibels = psnr(to_float(image)[None], to_float(reconstruction)[None]).item()
    return decibels, int(apart.abs().max())
