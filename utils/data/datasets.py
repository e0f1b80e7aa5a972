"""The datasets by name: DATASETS says how each is opened, datasets.yaml where most of them lie.

A name that only datasets.yaml holds is opened like `custom`. To add one that is opened in another
way, write a function (H, registry) -> dataset, enter it in DATASETS, and add its name to DATASETS
of hparams/groups.py; where its images lie is a line of datasets.yaml.
"""

import os
from pathlib import Path

import numpy as np

from hparams.registry import DATASETS_YAML, read_registry, registered_path
from utils.data.folders import EXTENSIONS, TABLES, counted, real_faces, scan, survey
from utils.data.images import Crops, Digits, ImageFiles, Textures
from utils.data.lsun import LsunImages
from utils.data.pixels import UnreadableImage, value_range
from utils.errors import SettingsError, UserError

ARCHIVES = (".zip", ".tar", ".tgz", ".tbz", ".txz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
LOOKED_AT = 16  # images whose values tell whether a dataset uses the range of its files
WITHOUT_PATH = ("digits", "textures", "custom")  # in datasets.yaml


def load_dataset(H, log=None, registry=DATASETS_YAML):
    """The dataset that `H.dataset` names; `registry` is the file that maps names to paths.

    What a person should know about the data is a warning in the `log`. Raises SettingsError or
    UserError, naming the path and where to change it, where there is no dataset.
    """
    dataset = DATASETS.get(H.dataset, folder_or_lmdb)(H, Path(registry))
    if getattr(H, "crops", 0):
        if dataset.embedded:
            raise SettingsError(f"--crops is for images in files, not for {H.dataset}")
        dataset = Crops(dataset, H.crops, H.crop_side or H.img_size)
    if log is not None:
        remarks = remarks_on_registry(H.dataset, registry)
        for remark in remarks + dataset.remarks + remarks_on_values(dataset):
            log.warning(remark)
    return dataset


def remarks_on_registry(name, registry):
    """A sentence where the file `registry` gives a path for `name` that has no meaning."""
    try:
        if name not in WITHOUT_PATH or name not in read_registry(registry):
            return []
    except SettingsError:
        return []  # what is wrong with the file does not concern this dataset
    return [f"the path that {registry} gives for {name} is not used: that name is built in, so "
            f"give your dataset another one"]


def remarks_on_values(dataset):
    """A sentence where most images of a dataset are nearly black, since their values use less than
    a quarter of what their files can hold; judged by some of them, spread evenly."""
    looks = []
    if not dataset.embedded:
        for index in np.linspace(0, len(dataset) - 1, min(LOOKED_AT, len(dataset))).astype(int):
            try:
                looks.append((*value_range(dataset.open(int(index))), dataset.path(int(index))))
            except UnreadableImage:
                pass  # reported when it is to be learned from
    dark = [look for look in looks if look[1] * 4 < look[2]]
    if 2 * len(dark) <= len(looks):
        return []
    _, highest, largest, path = max(dark, key=lambda look: look[1] / look[2])
    lowest = min(look[0] for look in dark if look[2] == largest)
    return [f"{len(dark)} of {len(looks)} images that were looked at are nearly black: they have "
            f"values from {lowest} to {highest} of {largest} (such as {path}); scale the values to "
            f"the whole range first"]


# --- datasets on disk ----------------------------------------------------------------------------


def image_folder(H, registry, choose=None, layout=()):
    """Open a folder of images; `choose(root, found)` -> (those taken, what they are called).

    Files named in `layout` are no images and belong there.
    """
    root, setting = folder_of(H, registry)
    return images_in(root, setting, H, choose, layout)


def lsun(H, registry, name):
    """Open an LSUN dataset, whose lmdb folder is the registry's or is called `name` in it."""
    root, setting = folder_of(H, registry)
    folder = root if is_lmdb(root) else root / name
    if not is_lmdb(folder):
        raise UserError(f"there is no LSUN database {folder}: {remedy(H, setting)}")
    return lmdb_in(folder, setting, H)


def folder_or_lmdb(H, registry):
    """Open a folder of images, an lmdb folder, or one without images that holds an lmdb folder."""
    root, setting = folder_of(H, registry)
    if is_lmdb(root):
        return lmdb_in(root, setting, H)
    databases = sorted(path.parent for path in root.glob("[!.]*/data.mdb"))
    if not databases or scan(root):
        return images_in(root, setting, H)
    if len(databases) > 1:
        names = ", ".join(folder.name for folder in databases)
        raise UserError(f"{root} holds several lmdb folders ({names}): change {setting} to one")
    return lmdb_in(databases[0], setting, H)


DATASETS = {
    "digits": lambda H, registry: Digits(H.dataset, H.img_size, H.n_channels),
    "textures": lambda H, registry: Textures(H.dataset, H.img_size, H.n_channels),
    "ffhq": image_folder,
    "churches": lambda H, registry: lsun(H, registry, "church_outdoor_train_lmdb"),
    "bedrooms": lambda H, registry: lsun(H, registry, "bedroom_train_lmdb"),
    "real_fake_faces": lambda H, registry: image_folder(H, registry, real_faces, TABLES),
    "custom": folder_or_lmdb,
}


# --- what they share -----------------------------------------------------------------------------


def folder_of(H, registry):
    """(folder of the dataset, the flag or line that says so); UserError where it is no folder."""
    if H.dataset == "custom":
        if not H.custom_dataset_path:
            raise SettingsError("--dataset custom needs --custom_dataset_path, a folder of images")
        root, setting = Path(os.path.expanduser(H.custom_dataset_path)), "--custom_dataset_path"
    else:
        root, setting = registered_path(H.dataset, registry), f"its path in {registry}"
    if root.is_dir():
        return root, setting
    if not root.exists():
        raise UserError(f"there is no folder {root}: {remedy(H, setting)}")
    if root.name.lower().endswith(ARCHIVES):
        raise UserError(f"{root} is an archive: unpack it, and change {setting} to the folder")
    raise UserError(f"{root} is a file: change {setting} to the folder of the images")


def remedy(H, setting):
    """What to do where a dataset is not in the folder that `setting` gives."""
    images = "the images" if H.dataset == "custom" else H.dataset
    return f"put {images} there or change {setting}"


def images_in(root, setting, H, choose=None, layout=()):
    """The images in the folder `root`; `choose` and `layout` are those of `image_folder`."""
    found, others = survey(root, layout)
    passed_over, kinds = counted(others), ", ".join(EXTENSIONS)
    what = f"image ({kinds})" + (f" but {passed_over}" if passed_over else "")
    if found and choose is not None:
        found, what = choose(root, found)
    if not found:
        raise UserError(f"there is no {what} in {root}: {remedy(H, setting)}")
    dataset = ImageFiles(H.dataset, H.img_size, H.n_channels, root, found)
    if passed_over:
        dataset.remarks.append(f"passed over {passed_over} in {root}: images are {kinds}")
    return dataset


def is_lmdb(folder):
    """Whether a folder holds an lmdb database."""
    return os.path.isfile(folder / "data.mdb")


def lmdb_in(folder, setting, H):
    """The images in the lmdb folder `folder`."""
    dataset = LsunImages(H.dataset, H.img_size, H.n_channels, folder)
    if len(dataset) == 0:
        raise UserError(f"there is no image in {folder}: {remedy(H, setting)}")
    return dataset
