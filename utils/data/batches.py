"""Batches of images: their order, the workers that read them, images that cannot be read.

The order is a function of (seed, batch number), so a run that resumes at batch b sees what it
would have seen without the interruption. Workers hand over uint8; the device makes floats of them.

Shapes: n = size of the dataset, B = batch size, [B, C, S, S] = images.
"""

import contextlib
import functools
import hashlib
import itertools
import multiprocessing.queues
import os
import signal
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from utils.data.pixels import UnreadableImage, to_float
from utils.errors import UserError
from utils.signals import SIGNALS

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


def training_batches(dataset, H, start, processes, on_unreadable):
    """Endless iterator of this rank's batches [B, C, S, S] in [0, 1] from batch `start` on.

    With `H.horizontal_flip` each image is mirrored by its position's coin. An unreadable image is
    replaced by the next readable one; UserError when there is none.
    """
    part = processes.rank, processes.size
    plans = stream(len(dataset), H.batch_size, H.seed, start, part)
    if not H.horizontal_flip:
        plans = ((indices, None) for indices, _ in plans)
    for pixels, _ in _read(dataset, plans, True, H.num_workers, processes.device, on_unreadable):
        yield to_float(pixels)


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
    return _read(dataset, plans, False, num_workers, device, on_unreadable)


class _Batch(NamedTuple):
    # NumPy's arrays, which travel through a pipe: a container's shared memory is small.
    images: np.ndarray | None  # uint8 [b, C, S, S]; None where no image could be read
    indices: np.ndarray  # int64 [b]
    unreadable: list  # of (path, reason)


class _Failure(NamedTuple):
    """What went wrong in a worker, whose exception may be none that can be handed over."""

    kind: str
    message: str


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
            return _Failure(type(error).__name__, str(error))

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


def _read(dataset, plans, replace, num_workers, device, on_unreadable):
    """Yields (images uint8 [b, C, S, S] on `device`, indices int64 [b]) of each plan that has any.

    With `replace` every plan must have some: UserError where no image can be read.
    """
    unreadable = UnreadableFiles(on_unreadable)
    if num_workers is None:
        num_workers = 0 if dataset.embedded else min(4, usable_cpus())
    loader = DataLoader(
        _Batches(dataset, replace),
        sampler=plans,
        batch_size=None,  # an item is a batch already
        collate_fn=_as_it_is,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        # Starting an iterator draws a number: from here, lest it move the training's own stream.
        generator=torch.Generator(),
    )
    # The workers live as long as the loader's iterator, which only this generator holds.
    for batch in _from_workers(loader):
        for path, reason in batch.unreadable:
            unreadable(path, reason)
        if batch.images is not None:
            images = torch.from_numpy(batch.images)
            if device.type == "cuda":
                images = images.pin_memory()
            yield images.to(device, non_blocking=True), torch.from_numpy(batch.indices)
        elif replace:
            raise nothing_readable(len(dataset), f"images of {dataset.name}", unreadable)


def _as_it_is(batch):
    return batch


REMEDY = "lower --num_workers (0 reads in this process) or --batch_size"


def _from_workers(loader):
    """The items of a loader; UserError, which says what to change, where a worker fails."""
    try:
        batches = iter(loader)
    except OSError as error:  # no process, or no shared memory for the locks of their queues
        raise UserError(f"processes that read images do not start ({error.strerror}): {REMEDY}"
                        ) from None
    for batch in batches:
        if isinstance(batch, _Failure):
            raise UserError(f"a process that reads images failed ({batch.kind}: {batch.message}): "
                            f"{REMEDY}")
        yield batch


@contextlib.contextmanager
def ends_with_its_workers():
    """Raise UserError for what torch raises, wherever this process is, when a worker ends."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"a process that reads images has ended, killed or out of memory: {REMEDY}"
                        ) from None


def usable_cpus():
    """How many processors this process may use, which in a container are not all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_worker(worker):
    """Leaves the signals that ask to end to the main process, which ends its workers, and ends
    this one where it cannot hand over what it has read, for which that would wait for ever."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *error: os._exit(1)
