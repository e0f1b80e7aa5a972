"""Batches of images: their order, how they are read, images that cannot be read.

The order is a function of (seed, batch number), so a run that resumes at batch b sees what it
would have seen without the interruption. Workers hand over uint8; the device makes floats of them.

Shapes: n = size of the dataset, B = batch size, [B, C, S, S] = images.
"""

import collections
import functools
import hashlib
import itertools
import time
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from models.devices import to_device
from utils.data.device import copied_ahead
from utils.data.pixels import UnreadableImage, to_float
from utils.data.workers import Failure, from_workers, start_worker, workers_for
from utils.errors import UserError

PREFETCHED = 2  # batches that each worker reads ahead, as torch does by default
KEPT = 1 << 30  # bytes of images that are kept in memory to be shown again

# --- the order ---------------------------------------------------------------------------------


def stream_positions(n, batch_size, seed, batch):
    """(indices int64 [B], flips bool [B]) of batch number `batch` of an endless stream of epochs.

    Epoch e is a permutation of range(n) and n fair coins, functions of (n, seed, e) alone. Batches
    go on across the ends of epochs. Raises ValueError for numbers out of range.
    """
    if n < 1 or batch_size < 1 or batch < 0:
        raise ValueError(f"no such batch: n={n}, batch_size={batch_size}, batch={batch}")
    position, end = batch * batch_size, (batch + 1) * batch_size
    parts = []
    while position < end:
        epoch, offset = divmod(position, n)
        part = [values[offset : offset + end - position] for values in _epoch(n, seed, epoch)]
        parts.append(part)
        position += len(part[0])
    indices, flips = map(np.concatenate, zip(*parts))
    return indices, flips


def stream(n, batch_size, seed, start_batch=0, part=(0, 1)):
    """Endless iterator of `stream_positions` from `start_batch` on.

    With a `part` (r, R) it gives rank r of R its B positions of a batch of R·B.
    """
    rank, ranks = part
    mine = slice(rank * batch_size, (rank + 1) * batch_size)
    for batch in itertools.count(start_batch):
        indices, flips = stream_positions(n, batch_size * ranks, seed, batch)
        yield indices[mine], flips[mine]


@functools.lru_cache(maxsize=4)  # a batch at the end of an epoch needs two; 27 MB at n = 3 million
def _epoch(n, seed, epoch):
    """The permutation int64 [n] and the coins bool [n] of one epoch."""
    # RandomState promises the same numbers in every numpy version, and the hash takes any seed.
    key = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    state = np.random.RandomState(np.frombuffer(key, "<u4"))
    return state.permutation(n), state.randint(0, 2, n, dtype=np.bool_)


# --- unreadable images -------------------------------------------------------------------------


class UnreadableFiles(dict):
    """{path: reason} of the files that could not be read; called with a path and a reason it adds
    one, and calls `on_new(path, reason)` where it is new."""

    def __init__(self, on_new=None):
        super().__init__()
        self.on_new = on_new

    def __bool__(self):
        return True  # an empty one is still a callback

    def __call__(self, path, reason):
        if path not in self:
            self[path] = reason
            if self.on_new is not None:
                self.on_new(path, reason)


def nothing_readable(count, what, unreadable):
    """The UserError that none of `count` images can be read; `unreadable` is {path: reason}."""
    path, reason = next(iter(unreadable.items()), ("the dataset", "it is empty"))
    return UserError(f"none of the {count} {what} can be read: check the path of the dataset "
                     f"(the first is {path}: {reason})")


def warn_of_unreadable(unreadable, count, what, path, log):
    """Name the images, {path: reason}, that what is cached in the file `path` was made without."""
    for name, reason in unreadable.items():
        log.warning(f"passed over {name}: {reason}")
    if unreadable:
        log.warning(f"{len(unreadable)} of {count} {what} could not be read; they are tried again "
                    f"once {path} is removed")


# --- the batches -------------------------------------------------------------------------------


class TrainingBatches:
    """Endless iterator of this rank's batches [B, C, S, S] in [0, 1] from batch `start` on.

    With `H.horizontal_flip` each image is mirrored by its position's coin. An unreadable image is
    replaced by the next readable one; UserError when there is none. On a GPU the next batch is read
    and copied while it computes. `seconds_waited` adds up the time spent in `next`.
    """

    def __init__(self, dataset, H, start, processes, on_unreadable):
        part = processes.rank, processes.size
        plans = stream(len(dataset), H.batch_size, H.seed, start, part)
        if not H.horizontal_flip:
            plans = ((indices, None) for indices, _ in plans)
        self.device, self.seconds_waited = processes.device, 0.0
        self.workers = workers_for(dataset, H.num_workers)
        self.reader = _read(dataset, plans, True, self.workers, on_unreadable)
        self.early = collections.deque()  # batches that `images_per_second` has read
        self.copies = copied_ahead(_without_indices(self.early, self.reader), self.device)

    def __iter__(self):
        return self

    def __next__(self):
        began = time.perf_counter()
        pixels = next(self.copies)
        self.seconds_waited += time.perf_counter() - began
        return to_float(pixels)

    def images_per_second(self, seconds=1.0):
        """How many images this rank reads in a second when nothing else is done.

        Reads some batches, for about `seconds` at most, after a first one that starts the workers.
        They are not lost: they come first in `next`. To be called before it.
        """
        self.early.append(next(self.reader)[0])
        began, images = time.perf_counter(), 0
        for _ in range(2 * PREFETCHED * max(self.workers, 1)):  # twice what workers read ahead
            self.early.append(next(self.reader)[0])
            images += len(self.early[-1])
            if time.perf_counter() - began > seconds:
                break
        return images / (time.perf_counter() - began)

    def close(self):
        """End the workers."""
        self.reader.close()


def evaluation_batches(dataset, batch_size, num_workers, device, on_unreadable):
    """Iterator of (images [b, C, S, S] in [0, 1] on `device`, indices int64 [b]), each image once.

    Unreadable images are missing from their batch. Raises UserError when no image can be read.
    """
    unreadable = UnreadableFiles(on_unreadable)
    for pixels, indices in pixel_batches(dataset, batch_size, num_workers, device, unreadable):
        yield to_float(pixels), indices
    if len(unreadable) == len(dataset):
        raise nothing_readable(len(dataset), f"images of {dataset.name}", unreadable)


def pixel_batches(dataset, batch_size, num_workers, device, on_unreadable):
    """`evaluation_batches` of uint8 images, which may be none."""
    starts = range(0, len(dataset), batch_size)
    plans = ((np.arange(s, min(s + batch_size, len(dataset))), None) for s in starts)
    workers = workers_for(dataset, num_workers)
    for images, indices in _read(dataset, plans, False, workers, on_unreadable):
        yield to_device(images.numpy(), device), indices


class RepeatedBatches:
    """`evaluation_batches` of a dataset that are read again and again: iterating gives them.

    They are read from the dataset once, and from memory after that where they take at most
    `limit` bytes: then there are no workers to be started each time.
    """

    def __init__(self, dataset, batch_size, num_workers, device, on_unreadable, limit=KEPT):
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers
        self.device, self.on_unreadable = device, on_unreadable
        size = len(dataset) * dataset.n_channels * dataset.img_size**2
        self.keeps, self.kept = size <= limit, None

    def __iter__(self):
        if self.kept is not None:
            for pixels, indices in self.kept:
                yield to_float(to_device(pixels.numpy(), self.device)), indices
            return
        kept, cpu = [], torch.device("cpu")
        unreadable = UnreadableFiles(self.on_unreadable)
        for pixels, indices in pixel_batches(
            self.dataset, self.batch_size, self.num_workers, cpu, unreadable
        ):
            if self.keeps:
                kept.append((pixels, indices))
            yield to_float(to_device(pixels.numpy(), self.device)), indices
        if len(unreadable) == len(self.dataset):
            raise nothing_readable(
                len(self.dataset), f"images of {self.dataset.name}", unreadable
            )
        self.kept = kept if self.keeps else None


class _Batch(NamedTuple):
    # NumPy's arrays, which travel through a pipe: a container's shared memory is small.
    images: np.ndarray | None  # uint8 [b, C, S, S]; None where no image could be read
    indices: np.ndarray  # int64 [b]
    unreadable: list  # of (path, reason)


class _Batches(Dataset):
    """Items are batches, and the index of an item is its plan, (indices, flips or None)."""

    def __init__(self, dataset, replace):
        self.dataset = dataset
        self.replace = replace  # an unreadable image by the next one, rather than leave it out

    def __getitem__(self, plan):
        try:
            return self.read(*plan)
        except Exception as error:
            if get_worker_info() is None:
                raise
            return Failure(type(error).__name__, str(error))

    def read(self, indices, flips):
        """The _Batch of a plan."""
        images, kept, unreadable = [], [], []
        for place, index in enumerate(indices.tolist()):
            image = self._load(index, unreadable)
            if image is not None:
                flipped = flips is not None and flips[place]
                images.append(image.flip(-1) if flipped else image)
                kept.append(index)
            elif self.replace:  # nothing in the whole dataset is readable
                images, kept = [], []
                break
        stacked = torch.stack(images).numpy() if images else None
        return _Batch(stacked, np.array(kept, dtype=np.int64), unreadable)

    def _load(self, index, unreadable):
        """The pixels at `index`, or of the next readable one, or None; adds to `unreadable`."""
        n = len(self.dataset)
        for step in range(n if self.replace else 1):
            try:
                return self.dataset.pixels((index + step) % n)
            except UnreadableImage as error:
                unreadable.append((error.path, error.reason))
        return None


def _read(dataset, plans, replace, num_workers, on_unreadable):
    """Yields (images uint8 [b, C, S, S], indices int64 [b]) of each plan that has any.

    With `replace` every plan must have some: UserError where no image can be read.
    """
    unreadable = UnreadableFiles(on_unreadable)
    for batch in read_plans(dataset, plans, replace, num_workers):
        for path, reason in batch.unreadable:
            unreadable(path, reason)
        if batch.images is not None:
            yield torch.from_numpy(batch.images), torch.from_numpy(batch.indices)
        elif replace:
            raise nothing_readable(len(dataset), f"images of {dataset.name}", unreadable)


def read_plans(dataset, plans, replace, num_workers):
    """Iterator of the _Batch of each plan, read by `num_workers` processes, or by this one."""
    loader = DataLoader(
        _Batches(dataset, replace),
        sampler=plans,
        batch_size=None,  # an item is a batch already
        collate_fn=_as_it_is,
        num_workers=num_workers,
        worker_init_fn=start_worker,
        # Starting an iterator draws a number: from here, lest it move the training's own stream.
        generator=torch.Generator(),
    )
    # The workers live as long as the loader's iterator, which only this generator holds.
    yield from from_workers(loader)


def _without_indices(early, reader):
    """The images of batches that are read already, then those of a reader."""
    while early:
        yield early.popleft()
    for images, _ in reader:
        yield images


def _as_it_is(batch):
    return batch
