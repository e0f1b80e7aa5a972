"""Batches of images: in which order, by how many processes, and what if one cannot be read.

The order is a pure function of (seed, batch number), so a run that resumes at batch b sees what it
would have seen without the interruption. It serves any kind of data: training on cached latents
takes its indices from `stream` as well.

Shapes: n = size of the dataset, B = batch size, [B, C, S, S] = images in [0, 1].
"""

import functools
import hashlib
import itertools
import os
import signal
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from utils.errors import UserError
from utils.data.pixels import UnreadableImage

# --- the order ---------------------------------------------------------------------------------


def stream_positions(n, batch_size, seed, batch):
    """(indices int64 [B], flips bool [B]) of batch number `batch` of an endless stream of epochs.

    Epoch e is a permutation of range(n) and n fair coins, both functions of (n, seed, e) alone.
    The stream is cut every B positions, across the ends of epochs, and n may be less than B.
    Raises ValueError when `n` or `batch_size` is not positive or `batch` is negative.
    """
    if n < 1 or batch_size < 1 or batch < 0:
        raise ValueError(f"no such batch: n={n}, batch_size={batch_size}, batch={batch}")
    position, end = batch * batch_size, (batch + 1) * batch_size
    indices, flips = [], []
    while position < end:
        epoch, offset = divmod(position, n)
        order, coins = _epoch(n, seed, epoch)
        stop = min(n, offset + end - position)
        indices.append(order[offset:stop])
        flips.append(coins[offset:stop])
        position += stop - offset
    return np.concatenate(indices), np.concatenate(flips)


def stream(n, batch_size, seed, start_batch=0, share=(0, 1)):
    """Endless iterator of `stream_positions` from `start_batch` on.

    With a `share` (r, R) it is process r of R: B positions each, that together are R·B a batch.
    """
    rank, shares = share
    ours = slice(rank * batch_size, (rank + 1) * batch_size)
    for batch in itertools.count(start_batch):
        indices, flips = stream_positions(n, batch_size * shares, seed, batch)
        yield indices[ours], flips[ours]


@functools.lru_cache(maxsize=4)  # a batch at the end of an epoch needs two; 27 MB at n = 3 million
def _epoch(n, seed, epoch):
    """The permutation int64 [n] and the coins bool [n] of one epoch."""
    # RandomState promises the same numbers in every numpy version, and the hash takes any seed.
    key = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    state = np.random.RandomState(np.frombuffer(key, "<u4"))
    return state.permutation(n), state.randint(0, 2, n, dtype=np.bool_)


# --- unreadable images -------------------------------------------------------------------------


class UnreadableFiles:
    """Counts the files that could not be read and calls `on_new(path, reason)` once for each.

    It is itself such a callback: one object given to several loaders names a file once in all.
    `reasons` maps each path to its reason.
    """

    def __init__(self, on_new=None):
        self.on_new = on_new
        self.reasons = {}

    def __len__(self):
        return len(self.reasons)

    def __bool__(self):
        return True  # an object that has seen nothing yet is still a callback

    def __call__(self, path, reason):
        if path not in self.reasons:
            self.reasons[path] = reason
            if self.on_new is not None:
                self.on_new(path, reason)


# --- the batches -------------------------------------------------------------------------------


def training_batches(
    dataset, batch_size, seed, start_batch, flip, num_workers, device, on_unreadable, share=(0, 1)
):
    """Endless iterator of float32 [B, C, S, S] on `device`, starting at batch `start_batch`.

    Each image is flipped left to right by its position's coin when `flip` is true. An unreadable
    image is replaced by the next readable index, and `on_unreadable(path, reason)` is called once
    for it. `num_workers` (None: 0 for embedded data, else up to 4) does not change the batches.
    `share`: see `stream`. Raises UserError when no image at all can be read.
    """
    plans = stream(len(dataset), batch_size, seed, start_batch, share)
    if not flip:
        plans = ((indices, None) for indices, _ in plans)
    report = UnreadableFiles(on_unreadable)
    for batch in _read(dataset, plans, True, num_workers, device, report):
        if batch.images is None:
            raise _nothing_readable(dataset, report)
        yield batch.images


def evaluation_batches(
    dataset, batch_size, num_workers, device, on_unreadable, may_be_empty=False
):
    """Iterator of (images float32 [b, C, S, S] on `device`, indices int64 [b]), each image once.

    In order of index; b is `batch_size` but for the last batch and for batches with unreadable
    images, which are left out. `on_unreadable` and `num_workers` as in `training_batches`.
    Raises UserError when no image at all can be read, unless that `may_be_empty`.
    """
    starts = range(0, len(dataset), batch_size)
    plans = ((np.arange(s, min(s + batch_size, len(dataset))), None) for s in starts)
    report, any_readable = UnreadableFiles(on_unreadable), False
    for batch in _read(dataset, plans, False, num_workers, device, report):
        if batch.images is not None:
            any_readable = True
            yield batch.images, batch.indices
    if not any_readable and not may_be_empty:
        raise _nothing_readable(dataset, report)


def _nothing_readable(dataset, report):
    path, reason = next(iter(report.reasons.items()), ("the dataset", "it is empty"))
    return UserError(
        f"none of the {len(dataset)} images of {dataset.name} can be read: "
        f"check its path (the first is {path}: {reason})"
    )


class _Batch(NamedTuple):
    images: torch.Tensor | None  # [b, C, S, S]; None where no image could be read
    indices: torch.Tensor  # int64 [b]
    unreadable: list  # of (path, reason)


class _Batches(Dataset):
    """Items are whole batches, and the index of an item is its plan, (indices, flips or None)."""

    def __init__(self, dataset, replace):
        self.dataset = dataset
        self.replace = replace  # an unreadable image by the next one, rather than leave it out

    def __getitem__(self, plan):
        indices, flips = plan
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
        stacked = torch.stack(images) if images else None
        return _Batch(stacked, torch.tensor(kept, dtype=torch.int64), unreadable)

    def _load(self, index, unreadable):
        """The image at `index`, or the next readable one, or None; appends to `unreadable`."""
        n = len(self.dataset)
        for step in range(n if self.replace else 1):
            try:
                return self.dataset.load((index + step) % n)
            except UnreadableImage as error:
                unreadable.append((error.path, error.reason))
        return None


def _read(dataset, plans, replace, num_workers, device, report):
    """Yields the _Batch of each plan with its images on `device`, reporting what is unreadable."""
    if num_workers is None:
        num_workers = 0 if dataset.embedded else min(4, usable_cpus())
    on_gpu = device.type == "cuda"
    loader = DataLoader(
        _Batches(dataset, replace),
        sampler=plans,
        batch_size=None,  # an item is a batch already
        collate_fn=_as_it_is,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        pin_memory=on_gpu,
        # Starting an iterator draws a number: from here, lest it move the training's own stream.
        generator=torch.Generator(),
    )
    # The workers live as long as the loader's iterator, which only this generator holds: they end
    # when it is exhausted, closed or collected.
    for batch in loader:
        for path, reason in batch.unreadable:
            report(path, reason)
        if batch.images is not None:
            batch = batch._replace(images=batch.images.to(device, non_blocking=on_gpu))
        yield batch


def usable_cpus():
    """How many processors this process may use, which in a container are not all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _as_it_is(batch):
    return batch


def _start_worker(worker):
    """Leaves Ctrl-C to the main process, which ends its workers, and lets them end quietly."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _pass_over_hang_ups


def _pass_over_hang_ups(kind, error, trace):
    # The thread that hands over tensors reports here when the main process stops while it takes
    # one. What goes wrong in reading images does not come by here: it travels with the batch.
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
