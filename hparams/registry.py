"""datasets.yaml: the paths of the datasets on disk, and the names that a user adds to --dataset.

A name that is built in and needs no path (`digits`, `textures`, `custom`) means what it always
means, whatever the file says.
"""

import os
import re
from pathlib import Path

import yaml

from utils.errors import SettingsError

DATASETS_YAML = Path(__file__).resolve().parents[1] / "datasets.yaml"
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def read_registry(file=None):
    """{name: path, both as written} in `file` (None: datasets.yaml); SettingsError where it cannot
    be read."""
    file = Path(file or DATASETS_YAML)
    try:
        # With the base loader all scalars are text, also names like 2024 or yes.
        paths = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    except OSError as error:
        raise SettingsError(f"cannot read {file}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise SettingsError(f"{file} is no valid YAML: write one `name: path` a line") from None
    return paths if isinstance(paths, dict) else {}


def registered_path(name, file=None):
    """Path of the dataset `name`, which counts from the folder of `file` (None: datasets.yaml).

    Raises SettingsError where the file cannot be read, gives no path, or the name is not plain.
    """
    file = Path(file or DATASETS_YAML)
    path = read_registry(file).get(name)
    if not isinstance(path, str) or not path:
        raise SettingsError(f"{file} gives no path for {name}: add a line `{name}: path`")
    if not PLAIN.fullmatch(name):
        raise SettingsError(f"{file} holds the name {name!r}, which goes into names of files: "
                            f"write it in at most 64 letters, digits and - _ .")
    return file.resolve().parent / os.path.expanduser(path)


class DatasetNames:
    """The choices of --dataset: the `builtin` names, then the plain ones that datasets.yaml adds.

    Every name is `in` it, so that `registered_path` says what is wrong with one that is not listed.
    """

    def __init__(self, builtin):
        self.builtin = builtin

    def __iter__(self):
        yield from self.builtin
        try:
            names = read_registry()
        except SettingsError:
            return  # said when a dataset of the file is asked for
        yield from (n for n in names if n not in self.builtin and PLAIN.fullmatch(n))

    def __contains__(self, name):
        return True
