"""The datasets by name: DATASETS says how each is opened, datasets.yaml where most of them lie.

To add one, write a function (H, registry) -> dataset, enter it in DATASETS, and add its name to
DATASETS of hparams/groups.py; where its images lie is a line of datasets.yaml.
"""

from pathlib import Path

import yaml

from utils.data.folders import EXTENSIONS, real_faces, scan
from utils.data.images import Digits, ImageFiles, Textures
from utils.data.lsun import LsunImages
from utils.errors import SettingsError, UserError

DATASETS_YAML = Path(__file__).resolve().parents[2] / "datasets.yaml"


def load_dataset(H, registry=DATASETS_YAML):
    """The dataset that `H.dataset` names; `registry` is the file that maps names to paths.

    Raises SettingsError or UserError, naming the path and where to change it, where there is none.
    """
    return DATASETS[H.dataset](H, Path(registry))


def image_folder(H, registry, choose=None):
    """Open a folder of images; `choose(root, found)` -> (those taken, what they are called)."""
    root, remedy = root_of(H, registry)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: {remedy}")
    found, what = scan(root), f"image ({', '.join(EXTENSIONS)})"
    if found and choose is not None:
        found, what = choose(root, found)
    if not found:
        raise UserError(f"there is no {what} in {root}: {remedy}")
    return ImageFiles(H.dataset, H.img_size, H.n_channels, root, found)


def lsun(H, registry, name):
    """Open an LSUN dataset, whose lmdb folder is the registry's or is called `name` in it."""
    root, remedy = root_of(H, registry)
    folder = root if (root / "data.mdb").is_file() else root / name
    if not (folder / "data.mdb").is_file():
        raise UserError(f"there is no LSUN database {folder}: {remedy}")
    dataset = LsunImages(H.dataset, H.img_size, H.n_channels, folder)
    if len(dataset) == 0:
        raise UserError(f"there is no image in {folder}: {remedy}")
    return dataset


DATASETS = {
    "digits": lambda H, registry: Digits(H.dataset, H.img_size, H.n_channels),
    "textures": lambda H, registry: Textures(H.dataset, H.img_size, H.n_channels),
    "ffhq": image_folder,
    "churches": lambda H, registry: lsun(H, registry, "church_outdoor_train_lmdb"),
    "bedrooms": lambda H, registry: lsun(H, registry, "bedroom_train_lmdb"),
    "real_fake_faces": lambda H, registry: image_folder(H, registry, real_faces),
    "custom": image_folder,
}


def root_of(H, registry):
    """(folder of the dataset, what to do where it is not there), by the flag or the registry."""
    remedy = f"put {H.dataset} there or change"
    if H.dataset == "custom":
        if not H.custom_dataset_path:
            raise SettingsError("--dataset custom needs --custom_dataset_path, a folder of images")
        return Path(H.custom_dataset_path).expanduser(), f"{remedy} --custom_dataset_path"
    try:
        paths = yaml.safe_load(registry.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {registry}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{registry} is no valid YAML: write one `name: path` a line") from None
    path = paths.get(H.dataset) if isinstance(paths, dict) else None
    if not isinstance(path, str) or not path:
        raise UserError(f"{registry} gives no path for {H.dataset}: add a line "
                        f"`{H.dataset}: path`")
    folder = registry.resolve().parent / Path(path).expanduser()
    return folder, f"{remedy} its path in {registry}"
