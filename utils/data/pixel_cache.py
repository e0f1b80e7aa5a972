"""The resized pixels of a dataset, read from its files once and kept in pixels/ as one array.

Beside the array NAME_KEY.npy, uint8 [n, C, S, S], lies NAME_KEY.json: how many images of
NAME_KEY.npy.part are on the disk, and which cannot be read. The array has its name only once it is
whole; one that was begun is gone on with.
"""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.data.batches import UnreadableFiles, nothing_readable, pixel_batches, warn_of_unreadable
from utils.data.images import ImageDataset
from utils.data.pixels import UnreadableImage
from utils.data.split import part_of
from utils.errors import DiskError, UserError
from utils.files import make_folder, remove_leftovers, sync_folder, whole_file

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

PIXELS = Path("pixels")
PART = 1 << 30  # bytes after which what is written is recorded
READ = 32  # images read together


class CachedPixels(ImageDataset):
    """`dataset`, whose pixels come from the array `pixels` uint8 [n, C, S, S], a file of which only
    what is read takes memory. `unreadable` is {index: reason}. All else is the dataset's."""

    reads_fast = True

    def __init__(self, dataset, path, unreadable):
        super().__init__(dataset.name, dataset.img_size, dataset.n_channels)
        self.dataset, self.embedded, self.remarks = dataset, dataset.embedded, dataset.remarks
        self.file, self.array, self.unreadable = path, None, unreadable

    def __len__(self):
        return len(self.dataset)

    @property
    def root_name(self):
        return self.dataset.root_name

    def identifier(self, index):
        return self.dataset.identifier(index)

    def description(self, index):
        return self.dataset.description(index)

    def path(self, index):
        return self.dataset.path(index)

    def open(self, index):
        return self.dataset.open(index)

    def pixels(self, index):
        if index in self.unreadable:
            raise UnreadableImage(self.path(index), self.unreadable[index])
        if self.array is None:  # opened by each process for itself
            self.array = np.load(self.file, mmap_mode="r")
        return torch.from_numpy(np.array(self.array[index]))

    def fingerprint(self):
        return self.dataset.fingerprint()

    def __getstate__(self):
        return {**self.__dict__, "array": None}  # a mapped array would travel whole


def cached_pixels(dataset, H, processes, log):
    """`dataset`, or with `--cache_pixels` its CachedPixels, which rank 0 makes where they are not
    there. Raises UserError where no image can be read, or the system fails to read them, DiskError
    where the disk is full."""
    if not H.cache_pixels or dataset.reads_fast:
        return dataset
    key = dataset.fingerprint()
    processes.check_equal(key, "images")
    path = PIXELS / f"{dataset.name}_{key[:16]}.npy"
    cache = PixelFile(dataset, path, key)
    if processes.is_first and not cache.is_whole():
        make_folder(PIXELS)
        remove_leftovers(PIXELS)
        with only_one(path.with_suffix(".lock")):
            if not cache.is_whole():  # another process may have made it meanwhile
                cache.make(H.num_workers, log)
    processes.wait()
    unreadable = cache.read_record()["unreadable"]
    unreadable = {int(index): reason for index, reason in unreadable.items()}
    if processes.is_first:
        reasons = {dataset.path(index): reason for index, reason in unreadable.items()}
        warn_of_unreadable(reasons, len(dataset), "images", path, log)
        log.info(f"pixels of {len(dataset) - len(unreadable)} images in {path}")
    return CachedPixels(dataset, path, unreadable)


@contextlib.contextmanager
def only_one(path):
    """Let one process at a time into the block, by a lock on the file `path`; the others wait."""
    with open(path, "wb") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class PixelFile:
    """The array of a dataset's pixels at `path`, and its record."""

    def __init__(self, dataset, path, key):
        self.dataset, self.path, self.key = dataset, path, key
        self.part, self.record = path.with_name(f"{path.name}.part"), path.with_suffix(".json")
        side, channels = dataset.img_size, dataset.n_channels
        self.shape = (len(dataset), channels, side, side)
        self.image_bytes = channels * side**2

    def header(self):
        """The bytes of the .npy file before those of the first image."""
        header, start = {"descr": "|u1", "fortran_order": False, "shape": self.shape}, io.BytesIO()
        np.lib.format.write_array_header_1_0(start, header)
        return start.getvalue()

    def read_record(self):
        """{"key", "done", "unreadable"}; that of nothing done where there is none, or another's."""
        try:
            record = json.loads(self.record.read_text())
            if record["key"] == self.key and {"done", "unreadable"} <= record.keys():
                return record
        except (OSError, ValueError, LookupError, TypeError):
            pass
        return {"key": self.key, "done": 0, "unreadable": {}}

    def is_whole(self):
        """Whether the file holds all images."""
        size = len(self.header()) + self.shape[0] * self.image_bytes
        return (self.path.exists() and self.path.stat().st_size == size
                and self.read_record()["done"] == self.shape[0])

    def make(self, num_workers, log):
        """Read the images that are not in the file, and write them."""
        record, header = self.read_record(), self.header()
        there = self.part.stat().st_size if self.part.exists() else 0
        if there < len(header) + record["done"] * self.image_bytes:
            record = {"key": self.key, "done": 0, "unreadable": {}}
        elif record["done"]:
            log.info(f"pixels: {record['done']} of {self.shape[0]} images are there already")
        try:
            with open(self.part, "r+b" if there else "wb") as file:
                file.truncate(len(header) + record["done"] * self.image_bytes)
                file.write(header)
                file.seek(0, os.SEEK_END)
                self.write_images(file, record, num_workers)
            os.replace(self.part, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise DiskError(f"cannot write {self.path}: {error.strerror or error}") from None

    def write_images(self, file, record, num_workers):
        """Append the images after the first `record["done"]`, and keep the record with them."""
        size = max(READ, PART // self.image_bytes // READ * READ)  # images of a part
        with tqdm(
            total=self.shape[0], initial=record["done"], desc="pixels", unit="image",
            dynamic_ncols=True,
        ) as bar:
            for first in range(record["done"], self.shape[0], size):
                count = min(size, self.shape[0] - first)
                self.write_part(file, record, first, count, num_workers, bar)
                bar.update(first + count - bar.n)
                file.flush()
                os.fsync(file.fileno())
                record["done"] = first + count
                if record["done"] == self.shape[0] == len(record["unreadable"]):
                    reasons = {self.dataset.path(int(index)): reason
                               for index, reason in record["unreadable"].items()}
                    raise nothing_readable(self.shape[0], f"images of {self.dataset.name}", reasons)
                with whole_file(self.record) as written:
                    written.write(json.dumps(record).encode())

    def write_part(self, file, record, first, count, num_workers, bar):
        """Append `count` images from number `first` on; those that cannot be read are black."""
        unreadable, place = UnreadableFiles(), first

        def fill_up(end):
            for missing in range(place, end):
                name = UnreadableImage(self.dataset.path(missing), "").path
                record["unreadable"][str(missing)] = unreadable.get(name, "it cannot be read")
                file.write(bytes(self.image_bytes))

        for pixels, indices in self.read(first, count, num_workers, unreadable):
            for index, image in zip(indices.tolist(), pixels):
                fill_up(first + index)
                file.write(image.numpy().tobytes())
                place = first + index + 1
            bar.update(place - bar.n)
        fill_up(first + count)

    def read(self, first, count, num_workers, unreadable):
        """`pixel_batches` of `count` images from number `first` on; UserError where the system does
        not let them be read."""
        part = part_of(self.dataset, first, count)
        try:
            yield from pixel_batches(part, READ, num_workers, torch.device("cpu"), unreadable)
        except OSError as error:
            what = error.filename or f"the images of {self.dataset.name}"
            raise UserError(f"cannot read {what}: {error.strerror or error}") from None
