"""Images of every dataset, their order, and what happens to those that cannot be read."""

import gc
import io
import itertools
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lmdb
import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import as_torchrun, name_transparent
from utils.data import batches as loading
from utils.data.batches import (
    TrainingBatches, UnreadableFiles, evaluation_batches, pixel_batches, stream, stream_positions,
)
from utils.data.datasets import DATASETS_YAML, load_dataset
from utils.data.pixels import UnreadableImage, to_float
from utils.data.split import Subset, part_of, sample_of, train_validation_split
from utils.data.workers import ends_with_its_workers
from utils.errors import SettingsError, UserError
from utils.runs.script import kill_workers
from utils.signals import SIGNALS
from utils.training.processes import Processes

CPU = torch.device("cpu")


def settings_for(dataset="custom", path=None, img_size=8, n_channels=3):
    path = None if path is None else str(path)
    return SimpleNamespace(
        dataset=dataset, custom_dataset_path=path, img_size=img_size, n_channels=n_channels
    )


def custom(path, **shape):
    return load_dataset(settings_for("custom", path, **shape))


def registered(tmp_path, name, path, **shape):
    """The dataset `name` by a datasets.yaml of its own that says `path`."""
    registry = tmp_path / "datasets.yaml"
    registry.write_text(f"{name}: {path}\n")
    return load_dataset(settings_for(name, **shape), registry=registry)


def save(path, value=0, size=(8, 8), mode="RGB"):
    """A file of one even colour; grey `value` where the mode is RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value,) * 3 if mode == "RGB" else value).save(path)
    return path


def grey_files(folder, values):
    """One image for each value, in order of name."""
    for number, value in enumerate(values):
        save(folder / f"{number:03}.png", value)
    return folder


def levels(images):
    """The 0..255 grey of each of the even images [b, C, S, S]."""
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def load_one(path, **shape):
    dataset = custom(path.parent, **shape)
    assert len(dataset) == 1
    return dataset.load(0)


def bytes_of(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


# --- one image ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.WebP", "a.BMP"])
@pytest.mark.parametrize("n_channels", [1, 3])
def test_every_format_gives_the_same_tensor(tmp_path, name, n_channels):
    image = load_one(save(tmp_path / name, 100, (20, 12)), n_channels=n_channels)
    assert image.shape == (n_channels, 8, 8) and image.dtype == torch.float32
    torch.testing.assert_close(image, torch.full_like(image, 100 / 255), rtol=0, atol=1.01 / 255)


def test_pixels_at_their_own_size_are_exact(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    assert torch.equal(load_one(tmp_path / "a.png"), expected)


def test_resize_is_of_the_shorter_side_with_antialiasing_and_the_crop_is_central(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (40, 72, 3)).astype(np.uint8)
    whole = Image.fromarray(pixels)
    whole.save(tmp_path / "a.png")
    small = whole.resize((36, 20), Image.Resampling.BICUBIC).crop((8, 0, 28, 20))
    got = (load_one(tmp_path / "a.png", img_size=20) * 255).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(got.round(), np.asarray(small))


def test_a_long_thin_image_is_not_enlarged_as_a_whole(tmp_path):
    path = save(tmp_path / "thin.png", 7, (60_000, 1))
    assert levels(load_one(path, img_size=64)[None]) == [7]


@pytest.mark.parametrize("n_channels", [1, 3])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, n_channels):
    ramp = (np.arange(64, dtype=np.uint32) * 65535 // 63).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    with Image.open(tmp_path / "ramp.png") as reopened:
        assert reopened.mode.startswith("I")
    image = load_one(tmp_path / "ramp.png", n_channels=n_channels)
    expected = torch.from_numpy(ramp / 65535.0).float().expand(n_channels, 8, 8)
    torch.testing.assert_close(image, expected, rtol=0, atol=0.501 / 255)


def palette_image():
    """A palette image: left half transparent, right half blue."""
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (4, 0, 8, 8))
    image.info["transparency"] = 0
    return image


def rgba_image():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (4, 0, 8, 8))
    return image


@pytest.mark.parametrize("make", [palette_image, rgba_image])
@pytest.mark.parametrize("n_channels", [1, 3])
def test_transparency_of_colours_becomes_white(tmp_path, make, n_channels):
    make().save(tmp_path / "a.png")
    image = load_one(tmp_path / "a.png", n_channels=n_channels)
    blue = torch.tensor([0.0, 0.0, 1.0] if n_channels == 3 else [29 / 255])
    assert torch.equal(image[:, 3, 0], torch.ones(n_channels))
    torch.testing.assert_close(image[:, 3, 7], blue)


def test_half_transparent_grey_lies_over_white(tmp_path):
    Image.new("LA", (8, 8), (0, 127)).save(tmp_path / "a.png")
    image = load_one(tmp_path / "a.png", n_channels=1)
    torch.testing.assert_close(image, torch.full((1, 8, 8), 128 / 255))


def test_transparent_value_of_16_bit_grey_becomes_white(tmp_path):
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(tmp_path / "a.png")
    name_transparent(tmp_path / "a.png", 300)
    assert torch.equal(load_one(tmp_path / "a.png"), torch.ones(3, 8, 8))


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.jpg")
    red, green, blue = load_one(tmp_path / "a.jpg")[:, 4, 4]
    assert red < 0.1 and green > 0.6 and blue > 0.6


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 8, 8))  # stored with white in the top left corner
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored image is to be turned a quarter clockwise
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = load_one(tmp_path / "a.jpg")[0]
    corners = [upright[y, x].item() > 0.5 for y, x in [(1, 1), (1, 6), (6, 1), (6, 6)]]
    assert corners == [False, True, False, False]


# --- finding them ------------------------------------------------------------------------------


def test_nested_folders_are_read_in_order_of_path_without_hidden_and_foreign_files(tmp_path):
    for value, name in enumerate(["B.png", "a/2.JPG", "a/b/1.bmp", "a.webp", "a/x.jpg/0.png"]):
        save(tmp_path / name, value * 40)
    save(tmp_path / "__MACOSX/no.png")
    save(tmp_path / ".thumbnails/no.png")
    save(tmp_path / "._a.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    dataset = custom(tmp_path)
    names = [relative for relative, _, _ in dataset.found]
    assert names == ["B.png", "a.webp", "a/2.JPG", "a/b/1.bmp", "a/x.jpg/0.png"]
    got = levels(torch.stack([dataset.load(index) for index in range(5)]))
    assert got == pytest.approx([0, 120, 40, 80, 160], abs=2)
    assert dataset.name == "custom"


def test_digits_are_embedded_and_scaled_to_the_whole_range():
    dataset = load_dataset(settings_for("digits", img_size=8, n_channels=1))
    assert len(dataset) == 1797 and dataset.name == "digits" and dataset.embedded
    first = [0, 0, 5, 13, 9, 1, 0, 0]  # the top row of scikit-learn's first digit
    expected = torch.tensor(first) / 16
    torch.testing.assert_close(dataset.load(0)[0, 0], expected, rtol=0, atol=0.501 / 255)
    large = load_dataset(settings_for("digits", img_size=32, n_channels=3))
    assert large.load(5).shape == (3, 32, 32) and large.fingerprint() != dataset.fingerprint()


def test_textures_are_embedded_crops_of_three_photographs():
    dataset = load_dataset(settings_for("textures", img_size=64, n_channels=1))
    assert len(dataset) == 3000 and dataset.embedded
    images = torch.stack([dataset.load(index) for index in range(30)])
    assert images.shape == (30, 1, 64, 64) and len(images.flatten(1).unique(dim=0)) == 30
    again = load_dataset(settings_for("textures", img_size=64, n_channels=1))
    assert torch.equal(again.load(7), images[7]) and again.fingerprint() == dataset.fingerprint()
    brick = torch.from_numpy(skimage.data.brick())
    top, left = (dataset.places[3] * (512 - 64 + 1)).astype(int)
    crop = brick[top : top + 64, left : left + 64].float() / 255
    assert torch.allclose(crop, images[3][0])
    large = load_dataset(settings_for("textures", img_size=1024, n_channels=3))
    assert large.load(0).shape == (3, 1024, 1024)  # the whole photograph, enlarged


def faces(tmp_path, below=""):
    """Real faces of grey 1, 2, 3 and fake ones of grey 200, laid out as Kaggle does."""
    root = tmp_path / "faces"
    for part, value in [("train", 1), ("valid", 2), ("test", 3)]:
        save(root / below / part / "real" / "0.png", value)
        save(root / below / part / "fake" / "0.png", 200)
    return root


def write_table(root, part, columns="label_str"):
    names = {"label_str": "path,label,label_str", "label": "path,label"}[columns]
    rows = [f"{part}/real/0.png,1,real", f"{part}/fake/0.png,0,fake"]
    if columns == "label":
        rows = [row.rsplit(",", 1)[0] for row in rows]
    (root / f"{part}.csv").write_text("\n".join([names, *rows]))


def all_levels(dataset):
    return sorted(levels(torch.stack([dataset.load(index) for index in range(len(dataset))])))


@pytest.mark.parametrize("below", ["", "real_vs_fake/real-vs-fake"])
@pytest.mark.parametrize("columns", ["label_str", "label"])
def test_real_faces_by_their_tables(tmp_path, below, columns):
    root = faces(tmp_path, below)
    for part in ("train", "valid"):
        write_table(root, part, columns)
    dataset = registered(tmp_path, "real_fake_faces", root)
    assert all_levels(dataset) == [1, 2]  # test.csv is not there, so its face is not listed


def test_real_faces_by_their_folders(tmp_path):
    dataset = registered(tmp_path, "real_fake_faces", faces(tmp_path, "Real_and_fake"))
    assert all_levels(dataset) == [1, 2, 3]


def test_real_faces_without_tables_or_folders_and_with_broken_tables(tmp_path):
    save(tmp_path / "faces" / "a.png")
    with pytest.raises(UserError, match="nor a folder `real`.*faces.*datasets.yaml"):
        registered(tmp_path, "real_fake_faces", tmp_path / "faces")
    (tmp_path / "faces" / "train.csv").write_text("file,real\n")
    with pytest.raises(UserError, match="train.csv lacks the columns `path`"):
        registered(tmp_path, "real_fake_faces", tmp_path / "faces")
    write_table(tmp_path / "faces", "train")
    with pytest.raises(UserError, match="no image that train.csv lists as real"):
        registered(tmp_path, "real_fake_faces", tmp_path / "faces")


def lsun(root, contents, folder="church_outdoor_train_lmdb"):
    (root / folder).mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(root / folder), map_size=1 << 22) as environment:
        with environment.begin(write=True) as transaction:
            for key, content in contents.items():
                transaction.put(key.encode(), content)
    return root


def lsun_values(values, kind="WEBP"):
    # Keys of unequal length, so that cutting them out of one piece of memory is put to the test.
    images = [Image.new("RGB", (10, 8), (value,) * 3) for value in values]
    return {f"{n}" + "k" * n: bytes_of(image, kind) for n, image in enumerate(images)}


@pytest.mark.parametrize("kind", ["WEBP", "JPEG"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_lsun_is_read_from_lmdb_also_by_workers_after_the_main_process(
    tmp_path, kind, num_workers
):
    root = lsun(tmp_path / "lsun", lsun_values([0, 50, 100, 150, 200], kind))
    dataset = registered(tmp_path, "churches", root)
    again = registered(tmp_path, "churches", root / "church_outdoor_train_lmdb")
    assert len(dataset) == len(again) == 5
    assert torch.equal(dataset.load(2), again.load(2))  # from here on the database is open here
    batches = evaluation_batches(dataset, 2, num_workers, CPU, fail_on_unreadable)
    got = levels(torch.cat([images for images, _ in batches]))
    assert got == pytest.approx([0, 50, 100, 150, 200], abs=3)


def test_broken_values_of_lsun_are_unreadable_and_missing_databases_are_errors(tmp_path):
    root = lsun(tmp_path, {"a": b"text"}, "bedroom_train_lmdb")
    dataset = registered(tmp_path, "bedrooms", root)
    with pytest.raises(UnreadableImage, match="bedroom_train_lmdb:a: it is no image"):
        dataset.load(0)
    registered(tmp_path, "bedrooms", root)  # ends the reading of the first, to write to it below
    with pytest.raises(UserError, match="no LSUN database .*church_outdoor.*datasets.yaml"):
        registered(tmp_path, "churches", root)
    with pytest.raises(UserError, match="no image in .*church_outdoor"):
        registered(tmp_path, "churches", lsun(tmp_path, {}))
    lsun(tmp_path, {str(n): b"x" * 5000 for n in range(50)}, "bedroom_train_lmdb")
    database = root / "bedroom_train_lmdb" / "data.mdb"
    database.write_bytes(database.read_bytes()[:100_000])
    with pytest.raises(UserError, match="bedroom_train_lmdb is cut short"):
        registered(tmp_path, "bedrooms", root)
    database.write_bytes(b"text")
    with pytest.raises(UserError, match="cannot read the lmdb folder .*bedroom_train_lmdb"):
        registered(tmp_path, "bedrooms", root)


def test_paths_of_the_registry_count_from_its_folder(tmp_path):
    save(tmp_path / "sets" / "faces" / "a.png", 9)
    assert all_levels(registered(tmp_path, "ffhq", "sets/faces")) == [9]


def test_the_registry_of_the_repository_names_every_dataset_on_disk():
    for name in ("ffhq", "churches", "bedrooms", "real_fake_faces"):
        try:
            load_dataset(settings_for(name))  # a developer may have it
        except UserError as error:
            assert str(DATASETS_YAML.parent) in str(error) and "datasets.yaml" in str(error)
            assert "gives no path" not in str(error)


def test_errors_are_one_sentence_that_names_the_path_and_where_to_change_it(tmp_path):
    with pytest.raises(SettingsError, match="--custom_dataset_path"):
        load_dataset(settings_for("custom"))
    with pytest.raises(UserError, match="no folder .*nowhere.*--custom_dataset_path") as raised:
        custom(tmp_path / "nowhere")
    assert not isinstance(raised.value, SettingsError) and "\n" not in str(raised.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no image \(.jpg.*empty.*--custom_dataset_path"):
        custom(tmp_path / "empty")
    with pytest.raises(UserError, match="no folder .*nowhere.*datasets.yaml"):
        registered(tmp_path, "ffhq", "nowhere")
    registry = tmp_path / "datasets.yaml"
    for text, message in [("churches: x", "no path for ffhq"), ("", "no path for ffhq"),
                          ("ffhq:", "no path for ffhq"), ("a: [", "no valid YAML")]:
        registry.write_text(text)
        with pytest.raises(UserError, match=message):
            load_dataset(settings_for("ffhq"), registry=registry)
    with pytest.raises(UserError, match="cannot read .*absent.yaml"):
        load_dataset(settings_for("ffhq"), registry=tmp_path / "absent.yaml")


# --- fingerprint and split ---------------------------------------------------------------------


def test_fingerprint_is_stable_and_changes_with_the_files_and_the_transform(tmp_path):
    folder = grey_files(tmp_path / "set", [1, 2, 3])
    seen = [custom(folder).fingerprint()]
    assert custom(folder).fingerprint() == seen[0] and len(seen[0]) == 64

    def changed(**shape):
        seen.append(custom(folder, **shape).fingerprint())
        return len(set(seen)) == len(seen)

    assert changed(img_size=16) and changed(n_channels=1)
    status = (folder / "000.png").stat()
    os.utime(folder / "000.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert changed()  # touched
    status = (folder / "001.png").stat()
    with open(folder / "001.png", "ab") as file:
        file.write(b"x")
    os.utime(folder / "001.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert changed()  # another size at the same time
    save(folder / "003.png", 4)
    assert changed()  # added
    (folder / "003.png").rename(folder / "004.png")
    assert changed()  # renamed
    (folder / "004.png").unlink()
    (folder / "002.png").unlink()
    assert changed()  # removed
    by_name = registered(tmp_path, "ffhq", folder).fingerprint()
    assert by_name not in seen


def test_fingerprint_of_lsun_changes_with_the_database(tmp_path):
    root = lsun(tmp_path, lsun_values([1, 2]))
    before = registered(tmp_path, "churches", root).fingerprint()
    assert registered(tmp_path, "churches", root).fingerprint() == before
    lsun(root, lsun_values([1, 2, 3]))
    assert registered(tmp_path, "churches", root).fingerprint() != before


def test_split_is_disjoint_complete_and_the_same_whatever_the_seeds():
    dataset = load_dataset(settings_for("digits"))
    torch.manual_seed(1)
    np.random.seed(1)
    train, validation = train_validation_split(dataset)
    torch.manual_seed(2)
    np.random.seed(2)
    again, _ = train_validation_split(dataset)
    assert np.array_equal(train.indices, again.indices)
    assert validation.indices[:5].tolist() == [6, 14, 18, 34, 37]  # fixed for good
    assert len(validation) == 179 and len(train) == 1797 - 179
    assert sorted([*train.indices, *validation.indices]) == list(range(1797))
    assert train.name == "digits" and train.embedded and train.img_size == 8
    assert torch.equal(validation.load(3), dataset.load(int(validation.indices[3])))
    prints = {part.fingerprint() for part in (dataset, train, validation)}
    assert len(prints) == 3 and again.fingerprint() == train.fingerprint()


class Fake:
    """Even images whose grey is their index, in any number."""

    name, embedded, reads_fast, img_size, n_channels = "fake", True, True, 4, 1

    def __init__(self, n, broken=()):
        self.n, self.broken = n, set(broken)

    def __len__(self):
        return self.n

    root_name = "fake"

    def path(self, index):
        return f"file {index}"

    def identifier(self, index):
        return str(index)

    description = identifier

    def pixels(self, index):
        if index in self.broken:
            raise UnreadableImage(f"file {index}", "broken")
        return torch.full((1, 4, 4), index, dtype=torch.uint8)


@pytest.mark.parametrize("n, held_out", [(2, 1), (9, 1), (30, 3), (300_000, 10_000)])
def test_split_sizes(n, held_out):
    train, validation = train_validation_split(Fake(n))
    assert (len(train), len(validation)) == (n - held_out, held_out)


def test_one_image_cannot_be_split():
    with pytest.raises(UserError, match="fake has 1 image"):
        train_validation_split(Fake(1))


def test_a_sample_of_a_dataset_is_always_the_same():
    dataset = Fake(9)
    assert sample_of(dataset, 9) is dataset
    sample = sample_of(dataset, 4)
    assert len(set(sample.indices.tolist())) == 4
    assert (sample_of(dataset, 4).indices == sample.indices).all()
    assert sample.indices.tolist() == [1, 2, 4, 7]  # fixed for good


def test_a_part_of_a_dataset_is_a_range_of_it():
    part = part_of(train_validation_split(Fake(30))[1], 1, 2)
    whole = train_validation_split(Fake(30))[1]
    assert [part.path(0), part.path(1)] == [whole.path(1), whole.path(2)]
    assert all(torch.equal(part.pixels(i), whole.pixels(i + 1)) for i in range(2))


# --- the order ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12), batch_size=st.integers(1, 30), seed=st.integers(-5, 2**70)
)
def test_every_epoch_of_the_stream_is_a_permutation(n, batch_size, seed):
    batches = list(itertools.islice(stream(n, batch_size, seed), 8))
    assert all(indices.shape == flips.shape == (batch_size,) for indices, flips in batches)
    positions = np.concatenate([indices for indices, _ in batches])
    for start in range(0, len(positions) - n + 1, n):
        assert sorted(positions[start : start + n]) == list(range(n))
    for offset in (0, 3, 7):
        resumed = next(stream(n, batch_size, seed, offset))
        assert np.array_equal(resumed[0], batches[offset][0])
        assert np.array_equal(resumed[1], batches[offset][1])


def test_order_depends_on_the_seed_and_the_epoch_but_not_on_the_batch_size():
    def positions(batch_size, seed, count=200):
        order = np.concatenate([
            np.stack(stream_positions(50, batch_size, seed, batch))
            for batch in range(count // batch_size)
        ], axis=1)
        return order

    assert np.array_equal(positions(10, 0), positions(25, 0))
    assert not np.array_equal(positions(10, 0), positions(10, 1))
    first, second = positions(50, 0, 100).reshape(2, 2, 50).transpose(1, 0, 2)
    assert not np.array_equal(first[0], second[0]) and not np.array_equal(first[1], second[1])
    # Fixed for good: a run that resumes after an upgrade must go on in the same order.
    assert stream_positions(10, 6, 0, 1)[0].tolist() == [9, 1, 5, 0, 7, 8]


def test_a_late_batch_of_a_large_set_is_cheap():
    began = time.monotonic()
    for batch in range(1_000_000, 1_000_200):
        stream_positions(3_000_000, 20, 0, batch)
    assert time.monotonic() - began < 5  # a permutation for each batch would take half a minute


def test_coins_are_fair_and_independent_of_the_order():
    indices, flips = stream_positions(20_000, 20_000, 3, 0)
    assert flips.dtype == bool and abs(flips.mean() - 0.5) < 0.02  # 5.6 standard deviations
    assert abs(np.corrcoef(indices, flips)[0, 1]) < 0.03


def test_changing_a_batch_leaves_the_cached_epoch_alone():
    indices, flips = stream_positions(10, 10, 0, 0)
    indices[:], flips[:] = 0, True
    assert sorted(stream_positions(10, 10, 0, 0)[0]) == list(range(10))


def test_batch_numbers_and_sizes_out_of_range_raise():
    for n, batch_size, batch in [(0, 1, 0), (1, 0, 0), (1, 1, -1)]:
        with pytest.raises(ValueError):
            stream_positions(n, batch_size, 0, batch)


# --- batches -----------------------------------------------------------------------------------


def fail_on_unreadable(path, reason):
    raise AssertionError(f"{path}: {reason}")


def loading_of(workers=0, batch_size=4, flip=False):
    return SimpleNamespace(batch_size=batch_size, seed=0, horizontal_flip=flip, num_workers=workers)


def train(
    dataset, count, batch_size=4, start=0, flip=False, workers=0, report=fail_on_unreadable,
    processes=Processes(),
):
    H = loading_of(workers, batch_size, flip)
    batches = TrainingBatches(dataset, H, start, processes, report)
    return list(itertools.islice(batches, count))


def test_training_batches_follow_the_stream_in_any_number_of_processes(tmp_path):
    dataset = custom(grey_files(tmp_path, range(0, 70, 10)))
    one, two = (train(dataset, 6, workers=workers, flip=True) for workers in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one[0].shape == (4, 3, 8, 8) and one[0].dtype == torch.float32
    for batch, images in enumerate(one):
        assert levels(images) == (stream_positions(7, 4, 0, batch)[0] * 10).tolist()
    late = train(dataset, 2, workers=2, start=4, flip=True)
    assert all(torch.equal(a, b) for a, b in zip(one[4:], late, strict=True))


def test_workers_hand_over_bytes_of_which_the_floats_are_made(tmp_path, monkeypatch):
    """Batches are, to the bit, what `load` gives for each image; what travels is a quarter."""
    pixels = np.random.RandomState(0).randint(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    dataset, travelled, loader = custom(tmp_path), [], loading.DataLoader

    def spy(*arguments, **options):
        for batch in loader(*arguments, **options):
            travelled.append(batch.images.dtype)
            yield batch

    monkeypatch.setattr(loading, "DataLoader", spy)
    subset = Subset(dataset, [5, 0, 3])
    for index, place in enumerate(subset.indices):
        assert subset.pixels(index).dtype == torch.uint8
        expected = torch.from_numpy(pixels[place]).permute(2, 0, 1)
        assert torch.equal(subset.pixels(index), expected)
        assert torch.equal(subset.load(index), to_float(expected))
    [(images, _)] = evaluation_batches(subset, 4, 2, CPU, fail_on_unreadable)
    assert torch.equal(images, torch.stack([subset.load(index) for index in range(3)]))
    [(as_bytes, _)] = pixel_batches(subset, 4, 2, CPU, fail_on_unreadable)
    assert torch.equal(as_bytes, torch.stack([subset.pixels(index) for index in range(3)]))
    batches = train(dataset, 3, workers=2)
    for batch, images in enumerate(batches):
        indices = stream_positions(6, 4, 0, batch)[0].tolist()
        assert torch.equal(images, torch.stack([dataset.load(index) for index in indices]))
    assert set(travelled) == {np.dtype("uint8")}


def test_the_batches_of_all_ranks_are_the_batches_of_one_process(tmp_path):
    dataset = custom(grey_files(tmp_path, range(0, 70, 10)))
    whole = train(dataset, 5, batch_size=6, start=2, flip=True)
    parts = [
        train(dataset, 5, batch_size=2, start=2, flip=True, processes=Processes(rank, 3))
        for rank in range(3)
    ]
    for images, *mine in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(mine), images)


def test_flips_follow_the_coins(tmp_path):
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 4, 8))  # white on the left
    image.save(tmp_path / "a.png")
    dataset = custom(tmp_path, n_channels=1)
    images = torch.cat(train(dataset, 20, batch_size=10, flip=True))
    on_the_right = images[:, 0, 4, -1] == 1
    assert torch.equal(on_the_right, images[:, 0, 4, 0] == 0)
    coins = np.concatenate([stream_positions(1, 10, 0, batch)[1] for batch in range(20)])
    assert on_the_right.tolist() == coins.tolist() and 60 < coins.sum() < 140
    assert not (torch.cat(train(dataset, 4))[:, 0, 4, -1] == 1).any()


def spoil(folder):
    """Makes 001..005 of a folder unreadable, each in another way, and gives them."""
    whole = bytes_of(Image.effect_noise((64, 64), 50), "JPEG")
    (folder / "001.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "002.png").write_bytes(b"")
    (folder / "003.jpg").write_text("this is text")
    (folder / "004.png").symlink_to(folder / "nowhere")
    Image.new("L", (200, 200)).save(folder / "005.png")
    return [str(folder / name) for name in ("001.jpg", "002.png", "003.jpg", "004.png", "005.png")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_files_are_named_once_and_replaced_or_left_out(
    tmp_path, monkeypatch, num_workers
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # 005 is twice as large and more
    broken = spoil(tmp_path)
    save(tmp_path / "000.png", 10)
    save(tmp_path / "006.png", 60)
    save(tmp_path / "007.png", 70)
    dataset = custom(tmp_path)
    (tmp_path / "007.png").unlink()  # vanishes after the scan
    broken.append(str(tmp_path / "007.png"))

    named = []
    report = UnreadableFiles(lambda path, reason: named.append((path, reason)))
    got = list(evaluation_batches(dataset, 3, num_workers, CPU, report))
    assert [indices.tolist() for _, indices in got] == [[0], [6]]  # 3, 4, 5: an empty batch
    assert [levels(images) for images, _ in got] == [[10], [60]]
    assert [path for path, _ in named] == broken and len(report) == 6
    reasons = dict(named)
    assert reasons[broken[1]] == "the file is empty"
    assert reasons[broken[2]] == "it is no image of a known format"
    assert reasons[broken[3]] == reasons[broken[5]] == "No such file or directory"
    assert "decompression bomb" in reasons[broken[4]]
    assert all("object at 0x" not in reason for reason in reasons.values())

    # Images 1 to 5 are replaced by 6, and 7 by 0.
    batches = train(dataset, 10, workers=num_workers, report=report)
    readable = np.array([10, 60, 60, 60, 60, 60, 60, 10])
    for batch, images in enumerate(batches):
        assert levels(images) == readable[stream_positions(8, 4, 0, batch)[0]].tolist()
    assert len(named) == 6  # the same object does not name them again
    plain = []
    train(dataset, 10, workers=num_workers, report=lambda path, reason: plain.append(path))
    assert sorted(plain) == broken  # a plain function is called once for each as well


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_without_a_readable_image_is_a_user_error(tmp_path, num_workers):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_text("text")
    dataset, report = custom(tmp_path), UnreadableFiles()
    message = "^none of the 3 images of custom can be read: .*no image of a known format"
    with pytest.raises(UserError, match=message) as raised:
        train(dataset, 1, workers=num_workers, report=report)
    assert "\n" not in str(raised.value) and len(report) == 3
    with pytest.raises(UserError, match=message):
        list(evaluation_batches(dataset, 2, num_workers, CPU, UnreadableFiles()))
    report = UnreadableFiles()  # of which pixels leave it to the caller what to say
    assert not list(pixel_batches(dataset, 2, num_workers, CPU, report)) and len(report) == 3


def test_unreadable_images_of_a_subset_are_replaced_within_it():
    train_half = Subset(Fake(10, broken=[4]), [2, 4, 7])
    images = torch.cat(train(train_half, 6, report=lambda path, reason: None))
    assert sorted(set(levels(images))) == [2, 7]
    assert levels(images).count(7) == 16 and levels(images).count(2) == 8


def test_pipes_devices_and_endless_files_are_unreadable_at_once(
    tmp_path, monkeypatch
):
    os.mkfifo(tmp_path / "0.png")  # has no end until somebody writes
    (tmp_path / "1.png").symlink_to("/dev/zero")
    (tmp_path / "2.png").symlink_to(tmp_path / "2.png")
    with open(tmp_path / "3.png", "wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    (tmp_path / "4.png").mkdir()
    dataset = custom(tmp_path)
    reasons = []
    for index in range(len(dataset)):
        with pytest.raises(UnreadableImage) as raised:
            dataset.load(index)
        reasons.append(raised.value.reason)
    assert reasons == ["it is no regular file", "it is no regular file",
                       "Too many levels of symbolic links",
                       "it has 1099511627776 bytes: no image has"]


def test_circular_links_are_followed_once(tmp_path):
    save(tmp_path / "a" / "x.png", 10)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "to_all").symlink_to(tmp_path)
    found = [name for name, _, _ in custom(tmp_path).found]
    assert found == ["a/x.png"]


def test_folders_that_all_link_to_each_other_are_visited_once(tmp_path):
    for one in range(12):
        save(tmp_path / f"{one}" / "x.png", 10)
        for other in range(12):
            if other != one:
                (tmp_path / f"{one}" / f"to_{other}").symlink_to(tmp_path / f"{other}")
    assert len(custom(tmp_path).found) == 12  # and not in factorial time


def test_a_folder_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    save(tmp_path / "secret" / "x.png", 10)
    real = os.scandir

    def scandir(path):  # in place of chmod, which root does not notice
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="cannot read the folder .*secret: Permission denied"):
        custom(tmp_path)


@pytest.mark.parametrize("limit", [63, 33, 10])
def test_a_bomb_is_refused_also_where_pillow_only_warns(tmp_path, monkeypatch, recwarn, limit):
    save(tmp_path / "0.png", 10)  # 64 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        custom(tmp_path).load(0)
    assert not recwarn.list


def test_a_file_name_that_is_no_text_can_be_logged(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.jpg"
    try:
        Path(os.fsdecode(name)).write_text("text")
    except OSError:
        pytest.skip("this file system takes no such names")
    dataset = custom(tmp_path)
    dataset.fingerprint()
    with pytest.raises(UnreadableImage) as raised:
        dataset.load(0)
    str(raised.value).encode()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_reads_each_image_once_in_order(num_workers):
    got = list(evaluation_batches(Fake(10), 4, num_workers, CPU, fail_on_unreadable))
    assert [indices.tolist() for _, indices in got] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [levels(images) for images, _ in got] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_number_of_workers_follows_the_data_where_it_is_not_given(monkeypatch):
    asked, loader = [], loading.DataLoader

    def spy(*arguments, num_workers, **options):
        asked.append(num_workers)
        return loader(*arguments, num_workers=0, **options)

    monkeypatch.setattr(loading, "DataLoader", spy)
    files = Fake(4)
    files.reads_fast = False
    train(Fake(4), 1, workers=None)
    for cpus in (1, 2, 3, 8, 99):
        monkeypatch.setattr("utils.data.workers.usable_cpus", lambda: cpus)
        train(files, 1, workers=None)
    assert asked == [0, 1, 2, 2, 7, 16]
    for name, value in (*as_torchrun(0, 4).items(), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("utils.data.workers.usable_cpus", lambda: 16)
    train(files, 1, workers=None)
    train(files, 1, workers=3)
    assert asked[-2:] == [7, 3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_random_state_alone(num_workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train(Fake(5), 3, workers=num_workers)
    list(evaluation_batches(Fake(5), 2, num_workers, CPU, fail_on_unreadable))
    assert torch.equal(torch.get_rng_state(), before)


def worker_processes():
    gc.collect()
    return set(multiprocessing.active_children())


def test_workers_ignore_signals_and_end_with_their_iterator(capfd):
    others = worker_processes()
    H = loading_of(workers=2)
    batches = TrainingBatches(Fake(5), H, 0, Processes(), fail_on_unreadable)
    next(batches)
    workers = worker_processes() - others
    assert len(workers) == 2
    next(batches)  # by now both have started up
    for worker, number in itertools.product(workers, SIGNALS):
        os.kill(worker.pid, number)
    expected = train(Fake(5), 30)[2:]
    for images in expected:
        assert torch.equal(next(batches), images)
    assert all(worker.is_alive() for worker in workers)
    batches.close()
    assert worker_processes() == others

    abandoned = evaluation_batches(Fake(50), 1, 2, CPU, fail_on_unreadable)
    next(abandoned)
    assert len(worker_processes() - others) == 2
    del abandoned
    assert worker_processes() == others
    assert capfd.readouterr().err == ""


class Large(Fake):
    """Images of which a few fill the pipe from the workers to the main process."""

    def pixels(self, index):
        return torch.zeros((1, 1000, 1000), dtype=torch.uint8)


def die_with_workers(path):
    torch.set_num_threads(1)  # threads of the process that this one was forked from are not here
    batches = TrainingBatches(Large(9), loading_of(workers=2), 0, Processes(), fail_on_unreadable)
    next(batches)
    time.sleep(1)  # until both wait to hand over what they have read
    path.write_text(" ".join(str(worker.pid) for worker in worker_processes()))
    os.kill(os.getpid(), signal.SIGKILL)


def runs(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_end_where_the_main_process_is_killed(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=die_with_workers, args=(tmp_path / "workers",)
    )
    process.start()
    process.join(60)
    status = process.exitcode
    process.kill()
    assert status == -signal.SIGKILL
    workers = (tmp_path / "workers").read_text().split()
    assert len(workers) == 2
    until = time.monotonic() + 20
    while any(map(runs, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    left = [pid for pid in workers if runs(pid)]
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert not left


def test_a_worker_that_ends_while_a_finalizer_runs_prints_no_traceback(monkeypatch):
    class Deleted:
        def __init__(self, message):
            self.message = message

        def __del__(self):
            raise RuntimeError(self.message)

    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda info: printed.append(str(info.exc_value)))
    with ends_with_its_workers():
        Deleted("DataLoader worker (pid 1) is killed by signal: Killed. ")
        Deleted("something else")
    Deleted("DataLoader worker (pid 1) is killed by signal: Killed. ")
    assert [text[:10] for text in printed] == ["something ", "DataLoader"]


WORKER = "from utils.data import workers; import time; workers.start_worker(0); time.sleep(1)"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_stay_however_they_are_started(method):
    """Their parent is not the main process where a server forks them."""
    process = multiprocessing.get_context(method).Process(target=exec, args=(WORKER,))
    process.start()
    process.join(60)
    status = process.exitcode
    process.kill()
    assert status == 0


class Failing(Fake):
    """A dataset whose images cannot be read, for a reason that is no image's fault."""

    def __init__(self, n, fail):
        super().__init__(n)
        self.fail = fail

    def pixels(self, index):
        return self.fail() or super().pixels(index)


def out_of_memory():
    raise MemoryError("256 MiB")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def bus_error():
    os.kill(os.getpid(), signal.SIGBUS)


@pytest.mark.parametrize("fail, says", [
    (out_of_memory, "failed (MemoryError: 256 MiB): lower --num_workers"),
    (killed, "has ended, killed or out of memory: lower --num_workers"),
    (bus_error, "has ended, killed or out of memory: lower --num_workers"),
])
def test_what_fails_in_a_worker_ends_the_run_with_one_sentence(fail, says):
    batches = TrainingBatches(
        Failing(5, fail), loading_of(workers=2), 0, Processes(), fail_on_unreadable
    )
    with pytest.raises(UserError, match=re.escape(says)), ends_with_its_workers():
        next(batches)


def test_a_batch_that_a_worker_cannot_hand_over_ends_the_run(monkeypatch):
    """Its thread fails after the batch was read: the main process would wait for ever."""
    monkeypatch.setattr(loading._Batches, "read", lambda *plan: lambda: "cannot be pickled")
    batches = TrainingBatches(Fake(5), loading_of(workers=1), 0, Processes(), fail_on_unreadable)
    with pytest.raises(UserError, match="has ended"), ends_with_its_workers():
        next(batches)


def test_workers_need_no_shared_memory(monkeypatch):
    """A container's /dev/shm may be small."""
    def full(*arguments, **options):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_new_using_fd_cpu", full)
    assert len(train(Fake(5), 3, workers=2)) == 3


def test_a_worker_that_ends_while_others_start_prints_no_traceback(monkeypatch):
    reading = pixel_batches(Fake(50), 1, 1, CPU, fail_on_unreadable)
    next(reading)
    (worker,) = multiprocessing.active_children()
    start, ignored = multiprocessing.Process.start, []

    def start_late(process):
        start(process)
        if len(multiprocessing.active_children()) > 2:  # torch has kept the one before
            worker.kill()
            time.sleep(30)  # which torch's handler of the signal ends

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start_late)
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with pytest.raises(UserError, match="a process that reads images has ended"):
        with ends_with_its_workers():
            next(pixel_batches(Fake(5), 1, 2, CPU, fail_on_unreadable))
    reading.close()
    kill_workers()  # as a script does that ends
    gc.collect()
    assert not ignored
