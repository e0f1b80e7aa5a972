"""The images of a dataset part by part, by processes that go on from one part to the next."""

import itertools

import numpy as np

from models.devices import to_device
from utils.data.batches import read_plans
from utils.data.workers import workers_for


class PartReader:
    """Reads parts of `size` images of a dataset, in batches.

    The parts are asked for one after the other, all of them or, by one of several ranks, every so
    many: what comes next is read ahead. Any other order only starts the processes anew.
    """

    def __init__(self, dataset, size, batch_size, num_workers):
        self.dataset, self.size, self.batch_size = dataset, size, batch_size
        self.workers = workers_for(dataset, num_workers)
        self.batches, self.coming, self.before, self.stride = None, None, None, size

    def read(self, first, n, device, on_unreadable):
        """Iterator of the images uint8 [b, C, S, S], on `device`, of the `n` of the part from
        number `first` on; `on_unreadable(path, reason)` is told of those that are missing."""
        if self.coming != first:
            if self.before is not None and first > self.before:
                self.stride = first - self.before
            self.batches = read_plans(self.dataset, self._plans(first), False, self.workers)
        self.before, self.coming = first, None  # until the part is read to its end
        for batch in itertools.islice(self.batches, -(-n // self.batch_size)):
            for path, reason in batch.unreadable:
                on_unreadable(path, reason)
            if batch.images is not None:
                yield to_device(batch.images, device)
        self.coming = first + self.stride
        if self.coming >= len(self.dataset):
            self.batches = None  # its processes end

    def _plans(self, first):
        """The plans, (indices, no flips), of the part from number `first` on and those after it."""
        for start in range(first, len(self.dataset), self.stride):
            end = min(start + self.size, len(self.dataset))
            for batch in range(start, end, self.batch_size):
                yield np.arange(batch, min(batch + self.batch_size, end)), None
