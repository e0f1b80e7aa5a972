"""The images of every dataset, as float32 [C, S, S] tensors in [0, 1].

A dataset has a `name`, a length, `load(index)`, which raises UnreadableImage where the image cannot
be read, and `fingerprint()`, which changes when its images would. What to do about an unreadable
image, and in which order to read, is decided in `utils/data/batches.py`.

Shapes: C = n_channels (3 for RGB, 1 for grey), S = img_size.
"""

import csv
import hashlib
import os
import stat
from array import array
from pathlib import Path, PurePosixPath

import lmdb
import numpy as np
import yaml
from PIL import Image

from utils.errors import SettingsError, UserError
from utils.data.pixels import TRANSFORM_VERSION, UnreadableImage, decode, to_square

REPOSITORY = Path(__file__).resolve().parents[2]
DATASETS_YAML = REPOSITORY / "datasets.yaml"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LSUN_FOLDERS = {"churches": "church_outdoor_train_lmdb", "bedrooms": "bedroom_train_lmdb"}
LARGEST_FILE = 1 << 30  # bytes
VALIDATION_SHARE, VALIDATION_LIMIT, VALIDATION_SEED = 10, 10_000, 0


# --- datasets ----------------------------------------------------------------------------------


class ImageDataset:
    """What all datasets share; a subclass gives `__len__`, `open` and `identity`."""

    embedded = False  # True where reading costs so little that worker processes would not pay

    def __init__(self, name, img_size, n_channels):
        self.name = name
        self.img_size = img_size
        self.n_channels = n_channels

    def __len__(self):
        raise NotImplementedError

    def open(self, index):
        """The PIL image at `index`; raises UnreadableImage."""
        raise NotImplementedError

    def path(self, index):
        """Where the image at `index` is found, in words."""
        return f"{self.name}:{index}"

    def identity(self):
        """Yields the bytes that tell this state of the data from any other."""
        raise NotImplementedError

    def load(self, index):
        """The image at `index` as float32 [C, S, S] in [0, 1]; raises UnreadableImage."""
        return to_square(self.open(index), self.img_size, self.n_channels)

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


EMBEDDED = {"digits": Digits, "textures": Textures}


class ImageFiles(ImageDataset):
    """The image files `found` = [(relative path, size, mtime_ns)] below the folder `root`."""

    def __init__(self, name, img_size, n_channels, root, found):
        super().__init__(name, img_size, n_channels)
        self.root = Path(root)
        self.found = found

    def __len__(self):
        return len(self.found)

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


class LsunImages(ImageDataset):
    """The encoded images in the values of an LSUN lmdb folder, in the order of its keys.

    The keys are held in one piece of memory, which forked workers share: bedrooms have 3 million.
    """

    def __init__(self, name, img_size, n_channels, folder):
        super().__init__(name, img_size, n_channels)
        self.folder = Path(folder).resolve()
        self.keys, self.ends = bytearray(), array("q")
        _close_lmdb(self.folder)  # what is still open may be older than the file
        try:
            environment = _lmdb(self.folder)
            self.stamp = _stamp(self.folder)
            # lmdb maps the file into memory, where reading beyond its end kills the process.
            pages = environment.stat()
            used = sum(pages[kind] for kind in ("branch_pages", "leaf_pages", "overflow_pages"))
            if used * pages["psize"] > self.stamp[0]:
                raise UserError(f"the LSUN database {folder} is cut short: download it again")
            with environment.begin() as transaction:
                for key in transaction.cursor().iternext(values=False):
                    self.keys += key
                    self.ends.append(len(self.keys))
        except (lmdb.Error, OSError) as error:
            raise UserError(f"cannot read the LSUN database {folder}: {error}") from None
        finally:
            _close_lmdb(self.folder)  # each process opens its own when it first reads an image

    def __len__(self):
        return len(self.ends)

    def key(self, index):
        start = self.ends[index - 1] if index else 0
        return bytes(self.keys[start : self.ends[index]])

    def path(self, index):
        return f"{self.folder}:{self.key(index).decode('ascii', 'backslashreplace')}"

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


def _stamp(folder):
    status = (folder / "data.mdb").stat()
    return status.st_size, status.st_mtime_ns


class Subset:
    """The images of `dataset` at `indices`, in that order, with the interface of a dataset."""

    def __init__(self, dataset, indices):
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)
        self.name, self.embedded = dataset.name, dataset.embedded
        self.img_size, self.n_channels = dataset.img_size, dataset.n_channels

    def __len__(self):
        return len(self.indices)

    def load(self, index):
        """The image at `index` as float32 [C, S, S] in [0, 1]; raises UnreadableImage."""
        return self.dataset.load(int(self.indices[index]))

    def path(self, index):
        """Where the image at `index` is found, in words."""
        return self.dataset.path(int(self.indices[index]))

    def fingerprint(self):
        """Hex SHA-256 that changes with the whole dataset's, or with the choice of indices."""
        digest = hashlib.sha256(self.dataset.fingerprint().encode())
        digest.update(self.indices.astype("<i8").tobytes())
        return digest.hexdigest()


def train_validation_split(dataset):
    """The same (train, validation) Subsets always; validation is a tenth, at most 10,000 images.

    Raises UserError when there are fewer than two images.
    """
    n = len(dataset)
    if n < 2:
        raise UserError(f"the dataset {dataset.name} has {n} image, too few to hold out validation "
                        "images: add images or set --steps_per_eval 0")
    held_out = max(1, min(n // VALIDATION_SHARE, VALIDATION_LIMIT))
    # RandomState, unlike numpy's newer generators, promises the same numbers in every version.
    shuffled = np.random.RandomState(VALIDATION_SEED).permutation(n)
    validation, train = np.sort(shuffled[:held_out]), np.sort(shuffled[held_out:])
    return Subset(dataset, train), Subset(dataset, validation)


# --- finding them ------------------------------------------------------------------------------


def load_dataset(H, registry=DATASETS_YAML):
    """The dataset that `H.dataset`, `H.custom_dataset_path`, `H.img_size`, `H.n_channels` ask for.

    `registry` is the file that maps names to paths. Raises SettingsError when the settings ask for
    no dataset, and UserError, naming the path and where to change it, when no image lies there.
    """
    if H.n_channels not in (1, 3):
        raise SettingsError(f"--n_channels {H.n_channels} is neither 1 (grey) nor 3 (RGB)")
    shape = H.img_size, H.n_channels
    if H.dataset in EMBEDDED:
        return EMBEDDED[H.dataset](H.dataset, *shape)
    if H.dataset == "custom":
        if not H.custom_dataset_path:
            raise SettingsError("--dataset custom needs --custom_dataset_path, a folder of images")
        root, remedy = Path(H.custom_dataset_path).expanduser(), "change --custom_dataset_path"
    else:
        registry = Path(registry)
        root, remedy = _registered_path(H.dataset, registry), f"change its path in {registry}"

    if H.dataset in LSUN_FOLDERS:
        folder = root if (root / "data.mdb").is_file() else root / LSUN_FOLDERS[H.dataset]
        if not (folder / "data.mdb").is_file():
            raise UserError(
                f"there is no LSUN database {folder}: put {H.dataset} there or {remedy}"
            )
        dataset = LsunImages(H.dataset, *shape, folder)
        what, where = "image", folder
    else:
        if not root.is_dir():
            raise UserError(f"there is no folder {root}: put {H.dataset} there or {remedy}")
        found, what = scan(root), f"image ({', '.join(EXTENSIONS)})"
        if found and H.dataset == "real_fake_faces":
            found, what = _real_faces(root, found)
        dataset, where = ImageFiles(H.dataset, *shape, root, found), root
    if len(dataset) == 0:
        raise UserError(f"there is no {what} in {where}: put {H.dataset} there or {remedy}")
    return dataset


def _registered_path(name, registry):
    try:
        paths = yaml.safe_load(registry.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {registry}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{registry} is no valid YAML: write one `name: path` a line") from None
    path = paths.get(name) if isinstance(paths, dict) else None
    if not isinstance(path, str) or not path:
        raise UserError(f"{registry} gives no path for {name}: add a line `{name}: path`")
    return registry.resolve().parent / Path(path).expanduser()


def scan(root):
    """[(posix path relative to `root`, bytes, mtime_ns)] of the images below it, by path.

    Hidden names and `__MACOSX` are passed over, links are followed, each folder is visited once. A
    link to nothing is listed, so that reading it is reported. Raises UserError when a folder cannot
    be read.
    """
    found, visited = [], set()

    def visit(folder, prefix):
        visited.add(os.path.realpath(folder))
        with os.scandir(folder) as entries:
            # Folders themselves before links to them, by name: the same on every machine.
            for entry in sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name)):
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if is_folder(entry):
                    if os.path.realpath(entry.path) not in visited:
                        visit(entry.path, f"{prefix}{entry.name}/")
                elif entry.name.lower().endswith(EXTENSIONS):
                    try:
                        status = entry.stat()
                        found.append((prefix + entry.name, status.st_size, status.st_mtime_ns))
                    except OSError:
                        found.append((prefix + entry.name, -1, -1))

    try:
        visit(root, "")
    except OSError as error:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from None
    return sorted(found)


def is_folder(entry):
    """Whether a directory entry is a folder; a link to itself is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _real_faces(root, found):
    """The real faces among `found`, and what they are called should there be none.

    The csv files name paths that Kaggle's archive nests some folders deeper, so a file is real when
    any end of its path is listed. Listed files that are not on the disk are no part of the set.
    """
    tables = [root / f"{part}.csv" for part in ("train", "valid", "test")]
    tables = [table for table in tables if table.is_file()]
    if not tables:
        real = [file for file in found if "real" in file[0].lower().split("/")[:-1]]
        return real, "train.csv, valid.csv, test.csv, nor a folder `real` with images"
    listed = set().union(*(_listed_as_real(table) for table in tables))

    def is_listed(path):
        parts = path.split("/")
        return any("/".join(parts[start:]) in listed for start in range(len(parts)))

    names = ", ".join(table.name for table in tables)
    return [file for file in found if is_listed(file[0])], f"image that {names} lists as real"


def _listed_as_real(table):
    """Paths that one csv file of real_fake_faces lists as real; raises UserError."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines)
            columns = set(rows.fieldnames or ())
            if "path" not in columns or not columns & {"label_str", "label"}:
                raise UserError(f"{table} lacks the columns `path` and `label_str` or `label`")
            column, real = ("label_str", "real") if "label_str" in columns else ("label", "1")
            return {
                PurePosixPath(row["path"].replace("\\", "/")).as_posix()
                for row in rows
                if row["path"] and (row[column] or "").strip().lower() == real
            }
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {table}: {error}") from None
