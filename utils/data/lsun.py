"""Images in an lmdb folder, as LSUN comes: its values are encoded image files."""

import os
from array import array
from pathlib import Path

import lmdb

from utils.data.images import ImageDataset
from utils.data.pixels import UnreadableImage, decode
from utils.errors import UserError


class LsunImages(ImageDataset):
    """The encoded images in the values of an lmdb folder, in the order of its keys."""

    def __init__(self, name, img_size, n_channels, folder):
        super().__init__(name, img_size, n_channels)
        self.folder = Path(folder).resolve()
        # All keys in one piece of memory, which forked workers share: bedrooms have 3 million.
        self.keys, self.ends = bytearray(), array("q")
        _close_lmdb(self.folder)  # what is still open may be older than the file
        try:
            environment = _lmdb(self.folder)
            status = (self.folder / "data.mdb").stat()
            self.stamp = status.st_size, status.st_mtime_ns
            # lmdb maps the file into memory, where reading beyond its end kills the process.
            pages = environment.stat()
            used = sum(pages[kind] for kind in ("branch_pages", "leaf_pages", "overflow_pages"))
            if used * pages["psize"] > status.st_size:
                raise UserError(f"the lmdb folder {folder} is cut short: download it again")
            with environment.begin() as transaction:
                for key in transaction.cursor().iternext(values=False):
                    self.keys += key
                    self.ends.append(len(self.keys))
        except (lmdb.Error, OSError) as error:
            raise UserError(f"cannot read the lmdb folder {folder}: {error}") from None
        finally:
            _close_lmdb(self.folder)  # each process opens its own when it first reads an image

    def __len__(self):
        return len(self.ends)

    def key(self, index):
        start = self.ends[index - 1] if index else 0
        return bytes(self.keys[start : self.ends[index]])

    @property
    def root_name(self):
        return str(self.folder)

    def identifier(self, index):
        return self.key(index).decode("ascii", "backslashreplace")

    def path(self, index):
        return f"{self.folder}:{self.identifier(index)}"

    def open(self, index):
        try:
            with _lmdb(self.folder).begin() as transaction:
                content = transaction.get(self.key(index))
        except (lmdb.Error, OSError) as error:
            raise UnreadableImage(self.path(index), str(error)) from None
        return decode(content, self.path(index))

    def identity(self):
        size, mtime = self.stamp
        yield f"{size} {mtime} {len(self)}".encode()


_environments = {}  # folder -> (process id, lmdb environment)


def _lmdb(folder):
    """The environment of `folder`, opened once a process: lmdb refuses to open it twice in one."""
    owner, environment = _environments.get(folder, (None, None))
    if owner != os.getpid():
        _close_lmdb(folder)  # a forked worker inherits its parent's, which it may not read from
        environment = lmdb.open(
            str(folder), readonly=True, lock=False, create=False, readahead=False, meminit=False
        )
        _environments[folder] = os.getpid(), environment
    return environment


def _close_lmdb(folder):
    if folder in _environments:
        _environments.pop(folder)[1].close()
