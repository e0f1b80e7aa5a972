"""What a dataset of images is, the embedded ones, and those in folders of files.

Shapes: C = n_channels (3 for RGB, 1 for grey), S = img_size.
"""

import hashlib
import stat
from pathlib import Path

import numpy as np
from PIL import Image

from utils.data.pixels import TRANSFORM_VERSION, UnreadableImage, decode, to_float, to_square

LARGEST_FILE = 1 << 30  # bytes


class ImageDataset:
    """What all datasets share.

    A subclass gives `__len__`, `open(index)`, a PIL image or UnreadableImage, and `identity()`,
    which yields the bytes that tell this state of the data from any other. `remarks` are sentences
    about the data that a person should know, for the log.
    """

    embedded = False  # True where reading costs so little that worker processes would not pay

    def __init__(self, name, img_size, n_channels):
        self.name, self.img_size, self.n_channels = name, img_size, n_channels
        self.remarks = []

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
