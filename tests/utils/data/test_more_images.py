"""--crops, several squares of each image at places that follow from its name; distorted copies."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from utils.data import images
from utils.data.datasets import load_dataset
from utils.data.images import Distorted, augmented
from utils.data.split import apply_split, new_split
from utils.errors import SettingsError, UserError


@pytest.fixture
def folder(tmp_path):
    """20 images whose red is the column, whose green is the row, and whose blue is the number."""
    for number in range(20):
        height, width = 40 + number, 60
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
        pixels[..., 2] = number
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    return tmp_path


def dataset(folder, **changes):
    settings = dict(dataset="custom", custom_dataset_path=str(folder), img_size=16, n_channels=3,
                    crops=5, crop_side=None)
    return load_dataset(SimpleNamespace(**settings | changes))


def test_crops_are_squares_of_their_image_at_its_own_resolution(folder):
    crops = dataset(folder)
    assert len(crops) == 100
    places = set()
    for index in range(100):
        red, green, blue = crops.pixels(index)
        assert (blue == index // 5).all()
        assert torch.equal(red, red[0, 0] + torch.arange(16).expand(16, 16))
        assert torch.equal(green, green[0, 0] + torch.arange(16)[:, None].expand(16, 16))
        places.add((int(red[0, 0]), int(green[0, 0])))
    assert len(places) > 90  # spread over the images
    lefts = [left for left, _ in places]
    assert min(lefts) < 5 and max(lefts) > 39


def test_an_image_is_decoded_once_for_its_squares_while_memory_lasts(folder, monkeypatch):
    expected = [pixels.clone() for pixels in map(dataset(folder).pixels, range(100))]
    one = 60 * 59 * 3  # bytes of the largest image
    for kept, decodings in ((20 * one, 20), (3 * one, 40), (0, 40)):  # two passes over 20 images
        monkeypatch.setattr(images, "KEPT", kept)
        crops, opened = dataset(folder), []
        decode = crops.dataset.open
        crops.dataset.open = lambda number: opened.append(number) or decode(number)
        for index in (*range(100), *range(100)):
            assert torch.equal(crops.pixels(index), expected[index])
        assert len(opened) == decodings
        assert crops.bytes == sum(map(images.bytes_of, crops.kept.values())) <= max(kept, one)
        assert not pickle.loads(pickle.dumps(dataset(folder))).kept


def test_places_follow_from_the_name_alone(folder):
    before = {crops.path(i): crops.pixels(i) for crops in [dataset(folder, crops=1)]
              for i in range(20)}
    (folder / "03.png").unlink()
    after = dataset(folder, crops=1)
    for index in range(19):
        assert torch.equal(after.pixels(index), before[after.path(index)])


def test_a_split_holds_out_whole_images(folder):
    crops = dataset(folder)
    train, held_out, split = apply_split(crops, new_split(crops))
    names = [{part.path(i) for i in range(len(part))} for part in (train, held_out)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 20
    assert split["trained_on"] + split["held_out"] == 100


def test_squares_of_one_image_are_too_few_for_a_split(folder):
    for number in range(1, 20):
        (folder / f"{number:02}.png").unlink()
    with pytest.raises(UserError, match="has 1 image, too few to hold out"):
        new_split(dataset(folder))


def test_another_side_is_resized_and_small_images_give_their_largest_square(folder):
    halved = dataset(folder, crop_side=32).pixels(0)
    steps = (halved[0, 8, 1:].int() - halved[0, 8, :-1].int()).float()
    assert steps.mean() == pytest.approx(2, abs=0.2)  # two columns of the file a pixel
    assert dataset(folder, crop_side=500).open(0).size == (40, 40)


def test_the_fingerprint_tells_crops_apart(folder):
    prints = {dataset(folder, crops=crops, crop_side=side).fingerprint()
              for crops, side in ((0, None), (1, None), (5, None), (5, 20))}
    assert len(prints) == 4


def test_embedded_images_have_no_crops():
    H = SimpleNamespace(dataset="digits", img_size=16, n_channels=1, crops=2, crop_side=None)
    with pytest.raises(SettingsError, match="--crops is for images in files"):
        load_dataset(H)


# --- distorted copies ----------------------------------------------------------------------------


class Squares:
    """A white square, and one a third as wide as the image, far from its edges."""

    name, img_size, n_channels, embedded = "squares", 30, 1, True

    def __len__(self):
        return 2

    def pixels(self, index):
        pixels = torch.full((1, 30, 30), 255 if index == 0 else 0, dtype=torch.uint8)
        pixels[:, 10:20, 10:20] = 255
        return pixels

    def path(self, index):
        return f"square {index}"

    def fingerprint(self):
        return "squares"


def test_copies_follow_the_images_and_are_distorted_within_limits():
    copies = Distorted(Squares(), 100, 1.0)
    assert len(copies) == 202 and copies.path(5) == "square 1"
    assert torch.equal(copies.pixels(1), Squares().pixels(1))
    areas, places = [], []
    grid = torch.stack(torch.meshgrid(torch.arange(30.0), torch.arange(30.0), indexing="ij"))
    for index in range(2, 202):
        pixels = copies.pixels(index)
        assert torch.equal(pixels, copies.pixels(index)) and pixels.shape == (1, 30, 30)
        if index % 2 == 0:
            assert (pixels == 255).all()  # beyond the edge the image goes on
            continue
        mass = pixels[0].float() / 255
        areas.append(mass.sum())
        places.append((grid * mass).flatten(1).sum(1) / mass.sum() - 14.5)
    areas, places = torch.tensor(areas) / 100, torch.stack(places)
    assert 0.8 < areas.min() < 0.95 and 1.05 < areas.max() < 1.25  # 8% each way, both sides
    assert 1.2 < places.abs().max() < 2.4 and places.mean(0).abs().max() < 0.3  # 6% of 30 pixels


def test_strength_zero_changes_nothing_and_is_another_dataset():
    same = Distorted(Squares(), 1, 0.0)
    assert (same.pixels(3).int() - Squares().pixels(1).int()).abs().max() <= 1
    prints = {Distorted(Squares(), copies, strength).fingerprint()
              for copies, strength in ((1, 0.0), (2, 0.0), (1, 0.5))}
    assert len(prints) == 3


def test_only_training_images_are_distorted():
    H = SimpleNamespace(distorted_copies=3, distortion=0.5)
    assert len(augmented(Squares(), H)) == 8
    H.distorted_copies = 0
    assert len(augmented(Squares(), H)) == 2
