"""Ids as colours, and pictures that keep pixels square."""

import numpy as np
import pytest
import torch

from utils.web import pictures


def test_every_code_has_a_colour_of_its_own():
    colours = pictures.palette(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    assert colours.shape == (65, 3) and len(colours.unique(dim=0)) == 65
    assert tuple(colours[-1].tolist()) == pictures.BLANK


def test_a_codebook_of_equal_vectors_has_colours():
    assert pictures.palette(torch.zeros(4, 3)).shape == (5, 3)


def test_ids_are_laid_out_like_the_images_that_they_decode_to():
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    ids = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]])
    images = pictures.ids_as_images(ids, (2, 2), colours, (4, 6))
    assert images.shape == (2, 3, 4, 6)
    assert images[0, :, 0, 0].tolist() == [255, 0, 0] and images[0, :, 1, 5].tolist() == [0, 255, 0]
    assert images[0, :, 3, 2].tolist() == [0, 0, 255] and images[1, :, 3, 3].tolist() == [0, 255, 0]
    assert pictures.sheet(images).size == pictures.sheet(torch.rand(2, 1, 4, 6)).size


def test_sheets_enlarge_by_whole_pixels():
    images = torch.rand(4, 1, 8, 8)
    sheet = np.asarray(pictures.sheet(images))
    side = (sheet.shape[0] - 2) // 2 - 2
    assert side % 8 == 0 and 600 <= sheet.shape[1] <= 660
    first = sheet[2 : 2 + side, 2 : 2 + side].reshape(8, side // 8, 8, side // 8)
    assert (first == first[:, :1, :, :1]).all()


def test_what_is_missing_is_veiled():
    images = torch.zeros(1, 1, 4, 4)
    missing = torch.tensor([[[True, False], [False, False]]])
    veiled = pictures.veiled(images, missing)
    assert (veiled[0, 0, :2, :2] > 0.5).all() and veiled.sum() == veiled[0, 0, :2, :2].sum()


@pytest.mark.parametrize("shape", [(8, 8), (4, 4), (64, 64)])
def test_numbered_ids_and_codes_in_use(shape):
    colours = pictures.palette(torch.randn(200, 4))
    ids = torch.randint(200, (shape[0] * shape[1],))
    picture = pictures.numbered(ids, shape, colours)
    assert max(picture.size) <= pictures.WIDTH
    assert picture.getpixel((0, 0)) == tuple(colours[ids[0]].tolist())
    patches = {code: torch.zeros(1, 4, 4, dtype=torch.uint8) for code in range(200)}
    assert pictures.codes_in_use(ids, colours, patches).width == 2 * pictures.WIDTH


def test_differences():
    image = torch.zeros(1, 2, 2, dtype=torch.uint8)
    assert pictures.difference(image, image) == (120, 0)
    psnr, largest = pictures.difference(image, image + 255)
    assert (psnr, largest) == (pytest.approx(0, abs=1e-6), 255)
