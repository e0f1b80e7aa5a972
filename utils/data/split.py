"""Parts of a dataset, and the split into images that are trained on and images that are held out.

A split is a dict that is kept with every checkpoint:

    {"dataset", "root": which images, "by", "share": the rule,
     "trained_on", "held_out": how many there were, "examples": names of some trained on,
     "seen_before": True where the run goes on from weights that may have seen those held out}

By "name" an image is held out where the number in [0, 1) that its name stands for is below
`share`: its side depends on its name alone, whatever images come and go. By "order", the rule of
embedded datasets and of runs of earlier versions, it is a permutation of all. By None nothing is
held out.
"""

import hashlib
import math

import numpy as np

from utils.data.images import ImageDataset
from utils.errors import UserError

SHARE, MOST = 0.1, 10_000  # of images that are held out
EXAMPLES = 32


class Subset(ImageDataset):
    """The images of `dataset` at `indices`, in that order."""

    def __init__(self, dataset, indices):
        super().__init__(dataset.name, dataset.img_size, dataset.n_channels)
        self.dataset, self.embedded = dataset, dataset.embedded
        self.indices = np.asarray(indices, dtype=np.int64)

    @property
    def reads_fast(self):
        return self.dataset.reads_fast

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


def sample_of(dataset, n):
    """`n` images of a dataset, always the same ones; all of it where it has no more."""
    if n >= len(dataset):
        return dataset
    return Subset(dataset, np.sort(shuffled(len(dataset))[:n]))


def part_of(dataset, first, n):
    """The `n` images of a dataset from number `first` on."""
    return Subset(dataset, np.arange(first, first + n))


# --- the split -----------------------------------------------------------------------------------


def numbers_of_names(dataset):
    """A number in [0, 1) for each image, float64 [n], by its name alone."""
    digests = (hashlib.sha256(dataset.identifier(i).encode("utf-8", "surrogateescape")).digest()
               for i in range(len(dataset)))
    return np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests])


def new_split(dataset):
    """The split of a new run: a tenth is held out, at most 10,000 images, at least one.

    Raises UserError when there are fewer than two images.
    """
    n = len(dataset)
    numbers = np.empty(n) if dataset.embedded else np.sort(numbers_of_names(dataset))
    images = n if dataset.embedded else len(np.unique(numbers))  # crops share a name
    if images < 2:
        raise UserError(f"the dataset {dataset.name} has {images} image, too few to hold out "
                        f"validation images: add images or set --steps_per_eval 0")
    if dataset.embedded:
        return {"by": "order"}
    share = max(min(SHARE, MOST / n), math.nextafter(numbers[0], 1))
    return {"by": "name", "share": float(min(share, numbers[-1]))}


def sides(dataset, split):
    """Which images of a dataset a split holds out: bool [n]."""
    n = len(dataset)
    if split["by"] == "name":
        return numbers_of_names(dataset) < split["share"]
    held_out = np.zeros(n, dtype=bool)
    if split["by"] == "order":
        held_out[shuffled(n)[: max(1, min(n // 10, MOST))]] = True
    return held_out


def apply_split(dataset, split):
    """(the images to train on, those that are held out), both Subsets, and the whole `split`, now
    with what is known of the images.

    Raises UserError where nothing is left to train on, or nothing is held out by the rule.
    """
    held_out = sides(dataset, split)
    train, validation = (Subset(dataset, np.flatnonzero(part)) for part in (~held_out, held_out))
    if not len(train) or split["by"] and not len(validation):
        which = "none" if len(train) else "all"
        raise UserError(f"{which} of the {len(dataset)} images of {dataset.name} are held out by "
                        f"the rule of the run that this one goes on from: add images, or train "
                        f"with --steps_per_eval 0")
    return train, validation, {
        **split, "dataset": dataset.name, "root": dataset.root_name,
        "trained_on": len(train), "held_out": len(validation),
        "examples": [
            dataset.description(int(index))
            for index in train.indices[:: max(1, len(train) // EXAMPLES)][:EXAMPLES]
        ],
    }


def train_validation_split(dataset):
    """The (train, validation) Subsets of a new run on a dataset."""
    return apply_split(dataset, new_split(dataset))[:2]


def examples_there(dataset, split):
    """Which part of the images that a split names as examples of those trained on is there."""
    examples = set(split["examples"])
    there = {name for name in map(dataset.description, range(len(dataset))) if name in examples}
    return len(there) / len(examples)


def is_same_data(dataset, split):
    """Whether a dataset is that of a split: most images that were trained on are there by name and
    size, wherever the folder lies. Of splits without examples, which earlier versions leave, only
    the place tells."""
    if dataset.embedded or not split["examples"]:
        return (dataset.name, dataset.root_name) == (split["dataset"], split["root"])
    return examples_there(dataset, split) > 0.5


def is_held_out(dataset, split):
    """Whether the images that `split` holds out of a dataset were not trained on; None where that
    cannot be told: where there is no split, or images that were trained on are gone, which may be
    there under other names."""
    if split is None or split["by"] is None:
        return None if split is None else False
    if split.get("seen_before") or not is_same_data(dataset, split):
        return None
    if split["by"] == "name":
        return True if examples_there(dataset, split) == 1 else None
    unchanged = dataset.embedded or len(dataset) == split["trained_on"] + split["held_out"]
    return True if unchanged else None


def describe(split):
    """What a model was trained on, in words."""
    if split is None:
        return "which images it was trained on is not recorded"
    rule = f", {split['held_out'] or 'some'} held out by their {split['by']}" if split["by"] else ""
    return f"trained on {split['trained_on'] or 'the'} images of {split['root']}{rule}"
