"""Masks, which part of an image they hide, and completions laid back into a photograph."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from helpers import Log, name_transparent
from hparams import UserError
from utils.evaluation.inpainting import (
    as_png_holds, central_square, lay_back, mask_square, open_image, read_mask, scaled,
)


def painted(size, box, mode="L", ground=0, colour=255):
    """An image of `size` with a box (left, top, right, bottom) of another colour."""
    image = Image.new(mode, size, ground)
    image.paste(colour, box)
    return image


def hidden_in(size, box):
    """What a mask of `size` hides where white is the box: bool [h, w]."""
    return np.asarray(painted(size, box)) > 0


def random_photograph(mode, size=(50, 40)):
    """Noise in one of PIL's modes."""
    if mode == "1":
        return random_photograph("L", size).convert("1")
    count = size[0] * size[1] * len(Image.new(mode, (1, 1)).tobytes())
    return Image.frombytes(mode, size, np.random.RandomState(0).bytes(count))


# --- masks ---------------------------------------------------------------------------------------

BOX = (2, 1, 5, 3)
WHITE, BLACK, CLEAR, CLEAR_WHITE = (255,) * 4, (0, 0, 0, 255), (0,) * 4, (255, 255, 255, 0)


@pytest.mark.parametrize("mask", [
    painted((8, 6), BOX),
    painted((8, 6), BOX, "RGB", "black", "white"),
    painted((8, 6), BOX, "1"),
    painted((8, 6), BOX, "RGBA", CLEAR, WHITE),
    painted((8, 6), BOX, "RGBA", CLEAR_WHITE, WHITE),  # transparent white is kept too
    painted((8, 6), BOX, "RGBA", BLACK, WHITE),
    painted((8, 6), BOX, "LA", (255, 0), (255, 255)),
    Image.fromarray(hidden_in((8, 6), BOX).astype(np.uint16) * 65535),
    painted((8, 6), BOX, "L", 100, 200),
])
def test_opaque_white_is_hidden_and_transparency_is_kept(mask, tmp_path):
    mask.save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png"), hidden_in((8, 6), BOX))


def test_a_photograph_with_a_hole_is_no_mask(tmp_path):
    """Elsewhere the hole is what is filled in; here its bright parts would be."""
    photograph = random_photograph("RGB", (60, 40)).convert("RGBA")
    photograph.paste(CLEAR, (10, 10, 30, 30))
    photograph.save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="is no picture in black and white"):
        read_mask(tmp_path / "mask.png")
    brush = painted((60, 40), (10, 10, 30, 30)).convert("L").filter(ImageFilter.GaussianBlur(2))
    brush.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").sum() == pytest.approx(400, rel=0.1)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_grey_value_named_as_transparent_is_kept(kind, tmp_path):
    white = np.iinfo(kind).max
    values = np.full((6, 8), white, dtype=kind)
    values[1:3, 2:5] = white - 1
    Image.fromarray(values).save(tmp_path / "mask.png")
    name_transparent(tmp_path / "mask.png", int(white))
    assert np.array_equal(read_mask(tmp_path / "mask.png"), hidden_in((8, 6), BOX))


def test_a_mask_painted_black_on_transparent_hides_nothing(tmp_path):
    painted((8, 6), BOX, "RGBA", CLEAR_WHITE, BLACK).save(tmp_path / "mask.png")
    hidden = read_mask(tmp_path / "mask.png")
    assert not hidden.any()
    with pytest.raises(UserError, match="nothing is hidden: a mask is white"):
        mask_square(hidden, "mask.png", (8, 6), Log())


@pytest.mark.parametrize("size, mask", [
    ((12, 8), (12, 8)), ((12, 8), (24, 16)), ((12, 8), (6, 4)),
    ((1500, 1000), (100, 67)), ((100, 67), (1500, 1000)),  # a rounded side
])
def test_a_mask_of_the_images_shape_is_cut_like_it(size, mask):
    width, height = mask
    left = (width - height) // 2
    box = (left + 1, 0, left + 2, height)
    log = Log()
    square = mask_square(hidden_in(mask, box), "m.png", size, log)
    assert np.array_equal(square, hidden_in((height, height), (1, 0, 2, height)))
    cut = f"of its {width}x{height} pixels the model sees the central {height}x{height}"
    assert log.lines == [f"--mask m.png is cut like the image: {cut}"]


@pytest.mark.parametrize("size", [(8, 12), (5, 5), (64, 64)])
def test_a_square_mask_lies_on_the_square_that_the_model_sees(size):
    hidden, log = hidden_in((8, 8), BOX), Log()
    assert np.array_equal(mask_square(hidden, "m.png", size, log), hidden)
    assert len(log.lines) == (size[0] != size[1])
    if log.lines:
        assert "is taken to lie on the central 8x8 pixels" in log.lines[0]


@pytest.mark.parametrize("size, mask", [
    ((12, 8), (8, 12)), ((12, 8), (12, 9)), ((64, 64), (64, 48)), ((1500, 1000), (100, 68)),
])
def test_a_mask_of_another_shape_is_refused_with_both_sizes(size, mask):
    sizes = "m.png of {}x{} pixels does not fit the image of {}x{}".format(*mask, *size)
    with pytest.raises(UserError, match=sizes):
        mask_square(hidden_in(mask, (0, 0, 4, 4)), "m.png", size, Log())


def test_what_is_hidden_outside_the_square_is_refused_or_said():
    for box in ((0, 0, 2, 8), (10, 0, 12, 8)):
        with pytest.raises(UserError, match="m.png hides lies outside the central square"):
            mask_square(hidden_in((12, 8), box), "m.png", (12, 8), Log())
    log = Log()
    square = mask_square(hidden_in((12, 8), (0, 0, 8, 8)), "m.png", (12, 8), log)
    assert np.array_equal(square, hidden_in((8, 8), (0, 0, 6, 8)))
    assert log.lines[-1].startswith("25.0% of what --mask m.png hides lies outside")


# --- scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, height", [(50, 40), (40, 50), (41, 40), (7, 7)])
def test_the_central_square_is_in_the_middle(width, height):
    left, top, side = central_square(width, height)
    assert side == min(width, height)
    assert 0 <= width - side - 2 * left <= 1 and 0 <= height - side - 2 * top <= 1


@pytest.mark.parametrize("m, side", [(100, 32), (64, 64), (33, 32), (700, 16)])
def test_no_hidden_pixel_is_lost_in_a_smaller_mask(m, side):
    for x, y in ((0, 0), (m - 1, m // 4), (m // 3, m - 1)):
        hidden = np.zeros((m, m), dtype=bool)
        hidden[y, x] = True
        place = (int((y + 0.5) * side / m), int((x + 0.5) * side / m))
        assert np.argwhere(scaled(hidden, side)).tolist() == [list(place)]


def test_a_larger_mask_has_the_same_pixels_in_blocks():
    hidden = np.random.RandomState(0).rand(8, 8) > 0.5
    assert np.array_equal(scaled(hidden, 24), hidden.repeat(3, 0).repeat(3, 1))


# --- photographs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_kept_pixels_are_those_of_the_file_and_hidden_ones_the_enlarged(mode, channels):
    original = random_photograph(mode)
    photograph = as_png_holds(original)
    holds = {"1": "L", "LA": "RGBA", "CMYK": "RGB"}.get(mode, mode)
    assert photograph.mode == holds
    assert np.array_equal(np.asarray(photograph), np.asarray(original.convert(holds)))
    completion = torch.rand(channels, 16, 16, generator=torch.Generator().manual_seed(0))
    hidden = np.zeros((40, 40), dtype=bool)
    hidden[5:20, 10:30] = True
    filled = np.asarray(lay_back(photograph, completion, hidden))
    before = np.asarray(photograph)
    assert filled.shape == before.shape and filled.dtype == before.dtype
    inside = np.zeros((40, 50), dtype=bool)
    inside[5:20, 15:35] = True  # the square begins at 5
    assert np.array_equal(filled[~inside], before[~inside])
    drawn = Image.fromarray((completion.permute(1, 2, 0) * 255).round().byte().numpy().squeeze())
    drawn = drawn.resize((40, 40), Image.Resampling.BICUBIC)
    if mode == "I;16":
        expected = np.asarray(drawn.convert("L")).astype(int) * 257
    else:
        expected = np.asarray(drawn.convert(holds))
    assert np.array_equal(filled[inside], expected[hidden])
    if holds == "RGBA":
        assert (filled[inside][:, 3] == 255).all()


def test_a_palette_is_written_in_its_colours(tmp_path):
    image = random_photograph("RGB").quantize(7)
    image.save(tmp_path / "palette.png")
    opened = open_image(tmp_path / "palette.png")
    assert np.array_equal(np.asarray(as_png_holds(opened)), np.asarray(image.convert("RGB")))


def test_an_image_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.png: No such file"):
        open_image(tmp_path / "none.png")
