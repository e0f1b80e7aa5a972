"""What a dataset of images is, the embedded ones, and those in folders of files.

Shapes: C = n_channels (3 for RGB, 1 for grey), S = img_size.
"""

import hashlib
import stat
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from utils.data.pixels import (
    TRANSFORM_VERSION, UnreadableImage, decode, to_float, to_square, to_uint8,
)

LARGEST_FILE = 1 << 30  # bytes
KEPT = 256 << 20  # bytes of decoded images of which squares are cut


class ImageDataset:
    """What all datasets share.

    A subclass gives `__len__`, `open(index)`, a PIL image or UnreadableImage, and `identity()`,
    which yields the bytes that tell this state of the data from any other. `remarks` are sentences
    about the data that a person should know, for the log.
    """

    embedded = False  # True where the images come with a package, and their order is for ever

    def __init__(self, name, img_size, n_channels):
        self.name, self.img_size, self.n_channels = name, img_size, n_channels
        self.remarks = []

    @property
    def reads_fast(self):
        """Whether reading costs so little that worker processes would not pay."""
        return self.embedded

    @property
    def root_name(self):
        """Where the images lie, in words."""
        return self.name

    def identifier(self, index):
        """The name by which the image at `index` is known, wherever the dataset lies."""
        return str(index)

    def description(self, index):
        """What tells the image at `index` from others, as far as is known without reading it."""
        return self.identifier(index)

    def path(self, index):
        """Where the image at `index` is found, in words."""
        return f"{self.name}:{index}"

    def pixels(self, index):
        """The image at `index` as uint8 [C, S, S]; raises UnreadableImage."""
        return to_square(self.open(index), self.img_size, self.n_channels)

    def load(self, index):
        """The image at `index` as float32 [C, S, S] in [0, 1]; raises UnreadableImage."""
        return to_float(self.pixels(index))

    def fingerprint(self):
        """Hex SHA-256 that changes with the data as found at construction, or its transform."""
        transform = f"{self.name} {TRANSFORM_VERSION} {self.img_size} {self.n_channels}\n"
        digest = hashlib.sha256(transform.encode())
        for part in self.identity():
            digest.update(part)
        return digest.hexdigest()


class Digits(ImageDataset):
    """scikit-learn's 1,797 handwritten digits, 8x8 with values 0..16, enlarged to `img_size`."""

    embedded = True

    def __init__(self, name, img_size, n_channels):
        super().__init__(name, img_size, n_channels)
        from sklearn.datasets import load_digits  # slow to import, and needed by this class only

        self.images = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)  # [n, 8, 8]

    def __len__(self):
        return len(self.images)

    def open(self, index):
        return Image.fromarray(self.images[index])

    def identity(self):
        yield self.images.tobytes()


class Textures(ImageDataset):
    """Crops at random places of the photographs of brick, grass and gravel (512x512, grey) that
    scikit-image ships: 1,000 of each, `img_size` wide."""

    embedded = True
    photographs = ("brick", "grass", "gravel")
    crops = 1000

    def __init__(self, name, img_size, n_channels):
        super().__init__(name, img_size, n_channels)
        from skimage import data  # slow to import, and needed by this class only

        self.images = [np.asarray(getattr(data, photograph)()) for photograph in self.photographs]
        self.side = min(img_size, *(side for image in self.images for side in image.shape))
        # RandomState, unlike numpy's newer generators, promises the same numbers in every version.
        self.places = np.random.RandomState(0).uniform(size=(len(self), 2))

    def __len__(self):
        return self.crops * len(self.photographs)

    def open(self, index):
        image = self.images[index % len(self.images)]
        top, left = (self.places[index] * (np.array(image.shape) - self.side + 1)).astype(int)
        return Image.fromarray(image[top : top + self.side, left : left + self.side])

    def identity(self):
        yield f"{self.crops} {self.side}\n".encode()
        for image in self.images:
            yield image.tobytes()


class ImageFiles(ImageDataset):
    """The image files `found` = [(relative path, size, mtime_ns)] below the folder `root`."""

    def __init__(self, name, img_size, n_channels, root, found):
        super().__init__(name, img_size, n_channels)
        self.root, self.found = Path(root), found

    def __len__(self):
        return len(self.found)

    @property
    def root_name(self):
        return str(self.root.resolve())

    def identifier(self, index):
        return self.found[index][0]

    def description(self, index):
        relative, size, _ = self.found[index]
        return f"{relative}, {size} bytes"

    def path(self, index):
        return str(self.root / self.found[index][0])

    def open(self, index):
        path = Path(self.path(index))
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device has no end
                raise UnreadableImage(path, "it is no regular file")
            if status.st_size > LARGEST_FILE:
                raise UnreadableImage(path, f"it has {status.st_size} bytes: no image has")
            content = path.read_bytes()
        except OSError as error:
            raise UnreadableImage(path, error.strerror or str(error)) from None
        return decode(content, path)

    def identity(self):
        for relative, size, mtime in self.found:
            yield f"{relative}\0{size}\0{mtime}\n".encode("utf-8", "surrogateescape")


def bytes_of(image):
    """How much memory the pixels of a PIL image take, about."""
    return image.width * image.height * len(image.getbands())


class Crops(ImageDataset):
    """`count` squares of `side` pixels of each image of a dataset of files, as images of their own.

    Where a square lies follows from the name of its image and its number alone. An image that is
    smaller gives its largest square at that place. The images used last stay in memory, at most
    `KEPT` bytes of them in each process, since decoding one takes longer than all else.
    """

    def __init__(self, dataset, count, side):
        super().__init__(dataset.name, dataset.img_size, dataset.n_channels)
        self.dataset, self.count, self.side = dataset, count, side
        self.remarks = dataset.remarks
        self.kept, self.bytes = {}, 0  # {number of an image: the image}, those used last at the end

    def __getstate__(self):
        return {**self.__dict__, "kept": {}, "bytes": 0}  # not for worker processes to begin with

    def __len__(self):
        return len(self.dataset) * self.count

    @property
    def root_name(self):
        return self.dataset.root_name

    def identifier(self, index):
        return self.dataset.identifier(index // self.count)  # a split holds out whole images

    def description(self, index):
        return self.dataset.description(index // self.count)

    def path(self, index):
        return self.dataset.path(index // self.count)

    def whole(self, number):
        """The image of a number, from memory where it is there; raises UnreadableImage."""
        image = self.kept.pop(number, None)
        if image is None:
            image = self.dataset.open(number)
            self.bytes += bytes_of(image)
        self.kept[number] = image
        while self.bytes > KEPT and len(self.kept) > 1:
            self.bytes -= bytes_of(self.kept.pop(next(iter(self.kept))))
        return image

    def open(self, index):
        image = self.whole(index // self.count)
        name = f"{self.identifier(index)} {index % self.count}".encode("utf-8", "surrogateescape")
        numbers = np.frombuffer(hashlib.sha256(name).digest()[:8], "<u4") / 2**32  # in [0, 1)
        side = min(self.side, *image.size)
        left, top = (numbers * (np.array(image.size) - side + 1)).astype(int).tolist()
        return image.crop((left, top, left + side, top + side))

    def identity(self):
        yield f"{self.count} crops of {self.side}\n".encode()
        yield from self.dataset.identity()


class Distorted(ImageDataset):
    """A dataset and `copies` of each of its images, shifted, turned, scaled and sheared at random
    by amounts that depend on the copy's number alone, at most `strength` times those below."""

    shift, degrees, scale, shear = 0.06, 10.0, 0.08, 0.12  # the first in sides of the image

    def __init__(self, dataset, copies, strength):
        super().__init__(dataset.name, dataset.img_size, dataset.n_channels)
        self.dataset, self.embedded = dataset, dataset.embedded
        self.copies, self.strength = copies, strength

    def __len__(self):
        return len(self.dataset) * (1 + self.copies)

    def pixels(self, index):
        pixels = self.dataset.pixels(index % len(self.dataset))
        return pixels if index < len(self.dataset) else self.distort(pixels, index)

    def distort(self, pixels, index):
        """The image uint8 [C, S, S] as the copy of number `index` shows it."""
        # RandomState, unlike numpy's newer generators, promises the same numbers in every version.
        amounts = np.random.RandomState(index).uniform(-1, 1, 6) * self.strength
        angle = np.deg2rad(amounts[0] * self.degrees)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        skew = np.array([[1.0, amounts[1] * self.shear], [0.0, 1.0]])
        matrix = turn @ skew @ np.diag(1 + amounts[2:4] * self.scale)
        # affine_grid has sides of length 2
        matrix = np.concatenate((matrix, 2 * self.shift * amounts[4:, None]), axis=1)
        image = to_float(pixels)[None]
        grid = F.affine_grid(torch.from_numpy(matrix).float()[None], image.shape, False)
        return to_uint8(F.grid_sample(image, grid, "bicubic", "border", False)[0])

    def path(self, index):
        return self.dataset.path(index % len(self.dataset))

    def fingerprint(self):
        amounts = (self.copies, self.strength, self.shift, self.degrees, self.scale, self.shear)
        return hashlib.sha256(f"{self.dataset.fingerprint()} {amounts}".encode()).hexdigest()


def augmented(dataset, H):
    """The dataset as H wants it to be learned from, with distorted copies or without."""
    if H.distorted_copies:
        return Distorted(dataset, H.distorted_copies, H.distortion)
    return dataset
