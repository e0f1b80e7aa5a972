"""Parts of a dataset, and the split into training and validation images."""

import hashlib

import numpy as np

from utils.data.images import ImageDataset
from utils.errors import UserError


class Subset(ImageDataset):
    """The images of `dataset` at `indices`, in that order."""

    def __init__(self, dataset, indices):
        super().__init__(dataset.name, dataset.img_size, dataset.n_channels)
        self.dataset, self.embedded = dataset, dataset.embedded
        self.indices = np.asarray(indices, dtype=np.int64)

    def __len__(self):
        return len(self.indices)

    def pixels(self, index):
        return self.dataset.pixels(int(self.indices[index]))

    def path(self, index):
        return self.dataset.path(int(self.indices[index]))

    def fingerprint(self):
        digest = hashlib.sha256(self.dataset.fingerprint().encode())
        digest.update(self.indices.astype("<i8").tobytes())
        return digest.hexdigest()


def shuffled(n):
    """A permutation of range(n), the same on every machine and with every numpy version."""
    # RandomState, unlike numpy's newer generators, promises the same numbers in every version.
    return np.random.RandomState(0).permutation(n)


def train_validation_split(dataset):
    """The same (train, validation) Subsets always; validation is a tenth, at most 10,000 images.

    Raises UserError when there are fewer than two images.
    """
    n = len(dataset)
    if n < 2:
        raise UserError(f"the dataset {dataset.name} has {n} image, too few to hold out validation "
                        "images: add images or set --steps_per_eval 0")
    order, held_out = shuffled(n), max(1, min(n // 10, 10_000))
    validation, train = np.sort(order[:held_out]), np.sort(order[held_out:])
    return Subset(dataset, train), Subset(dataset, validation)


def split_if_validated(dataset, H, log):
    """(training images, validation images or None where `steps_per_eval` is 0)."""
    train_set, validation_set = dataset, None
    if H.steps_per_eval:
        train_set, validation_set = train_validation_split(dataset)
    held_out = len(dataset) - len(train_set)
    log.info(f"{dataset.name}: {len(train_set)} images to train on, {held_out} held out")
    return train_set, validation_set


def sample_of(dataset, n):
    """`n` images of a dataset, always the same ones; all of it where it has no more."""
    if n >= len(dataset):
        return dataset
    return Subset(dataset, np.sort(shuffled(len(dataset))[:n]))


def part_of(dataset, first, n):
    """The `n` images of a dataset from number `first` on."""
    return Subset(dataset, np.arange(first, first + n))
