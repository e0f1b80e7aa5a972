"""Cached pixels: batches as without them, made once, never damaged by what interrupts them."""

import errno
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT, Log, OneOfMany, with_small_files
from utils.data import pixel_cache
from utils.data.batches import TrainingBatches, UnreadableFiles, evaluation_batches
from utils.data.datasets import load_dataset
from utils.data.images import augmented
from utils.data.pixel_cache import cached_pixels
from utils.data.split import apply_split, new_split
from utils.errors import DiskError, UserError
from utils.training.processes import Processes

CPU = torch.device("cpu")
COUNT = 100


def settings(folder, **changes):
    return SimpleNamespace(**dict(
        dataset="custom", custom_dataset_path=str(folder), img_size=8, n_channels=3, crops=0,
        crop_side=None, cache_pixels=True, num_workers=0, distorted_copies=0, distortion=0.5,
        batch_size=7, seed=0, horizontal_flip=True,
    ) | changes)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of photographs of noise, two of which are broken; pixels/ is below another."""
    monkeypatch.chdir(tmp_path)
    photos, noise = tmp_path / "photos", np.random.RandomState(0)
    photos.mkdir()
    for index in range(COUNT):
        image = noise.randint(0, 256, (9, 11, 3)).astype(np.uint8)
        Image.fromarray(image).save(photos / f"{index:03d}.png")
    for index in (0, 57):
        (photos / f"{index:03d}.png").write_bytes(b"no image")
    return photos


def both(H, log=None, processes=Processes()):
    """The dataset without and with cached pixels."""
    return load_dataset(H), cached_pixels(load_dataset(H), H, processes, log or Log())


def batches_of(dataset, H):
    """Training batches, evaluated images with their numbers, and what could not be read."""
    report = UnreadableFiles()
    found = itertools.islice(TrainingBatches(dataset, H, 3, Processes(), report), 40)
    return [*found, *itertools.chain(*evaluation_batches(dataset, 9, 0, CPU, report))], report


@pytest.mark.parametrize("changes", [{}, dict(crops=3, crop_side=5), dict(distorted_copies=1),
                                     dict(n_channels=1, num_workers=2)])
def test_batches_are_those_without_the_cache(folder, changes):
    H = settings(folder, **changes)
    results = []
    for dataset in both(H):
        train, validation, split = apply_split(dataset, new_split(dataset))
        train = augmented(train, H)
        results.append([
            batches_of(train, H), batches_of(validation, H), split, train.fingerprint(),
            dataset.fingerprint(), dataset.root_name, dataset.embedded, len(dataset),
            dataset.open(5).size,
        ])
    plain, cached = results
    assert plain[2:] == cached[2:]
    for (tensors, unreadable), (others, found) in zip(plain[:2], cached[:2]):
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
        assert dict(unreadable) == dict(found)
    assert sum(len(unreadable) for _, unreadable in plain[:2]) >= 2


def test_the_cache_is_made_once_and_again_for_other_images(folder, monkeypatch):
    H, log = settings(folder), Log()
    _, dataset = both(H, log)
    assert dataset.reads_fast and torch.equal(dataset.pixels(3), load_dataset(H).pixels(3))
    assert "2 of 100 images could not be read" in log.lines[2]
    assert log.lines[0].startswith("passed over") and "000.png" in log.lines[0]
    monkeypatch.setattr(pixel_cache.PixelFile, "make", None)  # a second time would fail
    assert torch.equal(both(H)[1].pixels(99), dataset.pixels(99))
    with pytest.raises(TypeError):
        both(settings(folder, img_size=9))
    os.utime(folder / "003.png", (1, 1))
    with pytest.raises(TypeError):
        both(H)


def test_without_the_flag_and_for_embedded_data_nothing_is_cached(folder):
    for H in (settings(folder, cache_pixels=False), settings(folder, dataset="digits")):
        dataset = load_dataset(H)
        assert cached_pixels(dataset, H, Processes(), Log()) is dataset
    assert not pixel_cache.PIXELS.exists()


def test_ranks_wait_for_the_first_and_read_its_file(folder):
    H = settings(folder)
    first = both(H, processes=OneOfMany(0, 2))[1]
    log = Log()
    second = both(H, log, OneOfMany(1, 2))[1]
    assert torch.equal(first.pixels(4), second.pixels(4)) and not log.lines
    with pytest.raises(UserError, match="000.png: it is no image of a known format"):
        second.pixels(0)
    first.pixels(5)
    assert len(pickle.dumps(first)) < 20_000  # without the array
    assert torch.equal(pickle.loads(pickle.dumps(first)).pixels(5), second.pixels(5))


def test_an_interrupted_cache_is_gone_on_with(folder, monkeypatch):
    H = settings(folder)
    whole = both(H)[1]
    expected = whole.file.read_bytes()
    read, pixel_batches = [], pixel_cache.pixel_batches

    def spy(dataset, *arguments):
        read.append(dataset.indices.tolist())
        if len(read) == 3:
            raise KeyboardInterrupt
        return pixel_batches(dataset, *arguments)

    monkeypatch.setattr(pixel_cache, "PART", 32 * 8 * 8 * 3)
    monkeypatch.setattr(pixel_cache, "pixel_batches", spy)
    whole.file.unlink()
    whole.file.with_suffix(".json").unlink()
    with pytest.raises(KeyboardInterrupt):
        both(H)
    part = whole.file.with_name(f"{whole.file.name}.part")
    assert not whole.file.exists() and part.exists()
    with open(part, "ab") as file:
        file.write(b"half an image")
    log = Log()
    again = both(H, log)[1]
    assert [indices[0] for indices in read] == [0, 32, 64, 64, 96]
    assert log.lines[0] == "pixels: 64 of 100 images are there already"
    assert again.file.read_bytes() == expected and set(again.unreadable) == {0, 57}
    part.write_bytes(expected[:200])  # shorter than its record says: a disk that lost it
    again.file.unlink()
    assert both(H)[1].file.read_bytes() == expected and not part.exists()


def test_a_file_cut_short_is_made_again(folder):
    H = settings(folder)
    path = both(H)[1].file
    expected = path.read_bytes()
    path.write_bytes(expected[:-1])
    assert both(H)[1].file.read_bytes() == expected
    path.with_suffix(".json").write_text("{}")
    assert both(H)[1].file.read_bytes() == expected


KILLED = """
import sys
sys.path[:0] = sys.argv[1:4]
from test_pixel_cache import both, settings
both(settings(sys.argv[4], num_workers=1))
"""


def test_kill_9_leaves_no_damaged_file(folder, monkeypatch):
    H = settings(folder)
    expected = both(H)[1].file.read_bytes()
    for path in pixel_cache.PIXELS.iterdir():
        path.unlink()
    here = os.path.dirname(__file__)
    tests = os.path.join(here, "..", "..")
    command = [sys.executable, "-c", KILLED, here, tests, str(ROOT), str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not pixel_cache.PIXELS.exists() or not list(pixel_cache.PIXELS.glob("*.part")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert both(H)[1].file.read_bytes() == expected


def test_a_full_disk_is_said_and_the_cache_goes_on_once_there_is_room(folder, monkeypatch):
    H = settings(folder)
    monkeypatch.setattr(pixel_cache, "PART", 32 * 8 * 8 * 3)
    with pytest.raises(DiskError, match="cannot write pixels/custom_.*File too large"):
        with_small_files(10_000, lambda: both(H))
    [part] = pixel_cache.PIXELS.glob("*.part")
    assert json.loads(part.with_suffix("").with_suffix(".json").read_text())["done"] == 32
    plain, cached = both(H)
    assert torch.equal(plain.pixels(99), cached.pixels(99))


def test_a_folder_without_a_readable_image_is_a_user_error(folder):
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(UserError, match="none of the 100 images of custom can be read"):
            both(settings(folder))


def test_images_that_the_system_does_not_let_be_read_are_not_a_full_disk(folder, monkeypatch):
    """The second attempt goes on where the first has ended."""
    H, asked, fails = settings(folder), [], [True]
    monkeypatch.setattr(pixel_cache, "PART", 32 * 8 * 8 * 3)

    class Dataset(type(load_dataset(H))):
        def pixels(self, index):
            asked.append(index)
            if index == 70 and fails:
                raise OSError(errno.ENFILE, "Too many open files in system", "photos/070.png")
            return super().pixels(index)

    dataset = load_dataset(H)
    dataset.__class__ = Dataset
    sentence = "cannot read photos/070.png: Too many open files in system"
    with pytest.raises(UserError, match=sentence) as raised:
        cached_pixels(dataset, H, Processes(), Log())
    assert not isinstance(raised.value, DiskError)
    asked.clear()
    fails.clear()
    assert torch.equal(cached_pixels(dataset, H, Processes(), Log()).pixels(99), dataset.pixels(99))
    assert asked[0] == 64
