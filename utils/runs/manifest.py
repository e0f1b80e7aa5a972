"""The manifest of a checkpoint: size and hash of each of its files, and files checked against it.

It is written last: a step that has one was saved to its end.
"""

import json
from pathlib import Path

from utils.errors import UserError
from utils.files import file_hash, load_file, whole_file
from utils.runs.folder import RunFolder

PASSED_OVER = set()  # files of stats that a warning has named


def checkpoint_file(folder, name):
    """Path of the file that a manifest calls `name`: a plain name, which leaves no folder."""
    return (folder.saved_stats if name.startswith("stats_") else folder.models) / Path(name).name


def write_manifest(folder, step, files):
    """Write the manifest of a step; `files` maps names to {"size", "sha256"}."""
    with whole_file(folder.manifest(step)) as file:
        file.write(json.dumps({"files": files}, indent=1).encode())


def read_manifest(folder, step):
    """{file name: {"size", "sha256"}} of a step; ValueError where the manifest is damaged."""
    try:
        files = json.loads(folder.manifest(step).read_bytes())["files"]
        for name, entry in files.items():
            if not name.removesuffix(".th").endswith(f"_{step}"):
                raise ValueError(name)
            entry["size"], entry["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder.manifest(step)} is damaged ({type(error).__name__})") from None
    return files


def file_damage(path, entry):
    """What is wrong with a file that a manifest has an `entry` on; None where it is whole."""
    if not path.is_file():
        return f"{path} is not there"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{path} is damaged: it has {size} bytes, {entry['size']} were written"
    if file_hash(path) != entry["sha256"]:
        return f"{path} is damaged: its bytes are not those that were written"
    return None


def damage(folder, step):
    """What is wrong with a checkpoint, naming the file; None where all its files are whole."""
    try:
        for name, entry in read_manifest(folder, step).items():
            if problem := file_damage(checkpoint_file(folder, name), entry):
                return problem
    except ValueError as error:
        return str(error)
    return None


def read_best(folder, last):
    """The record of a run's best checkpoint; {} where there is none up to the step `last`."""
    try:
        best = json.loads(folder.best.read_bytes())
        if best["step"] <= last and isinstance(best["value"], float) and best["figure"]:
            return best
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # it is written again at the next validation
    return {}


def place_of(path):
    """(run folder, name, step) of one file of a checkpoint."""
    folder = RunFolder(path.parent.parent.name, root=path.parent.parent.parent)
    name, _, step = path.name.removesuffix(".th").rpartition("_")
    return folder, name, int(step)


def is_saved(path):
    """Whether a checkpoint has a file: it is there, or the manifest promises it or is damaged, and
    loading it says so."""
    folder, _, step = place_of(path)
    try:
        promised = folder.manifest(step).exists() and path.name in read_manifest(folder, step)
    except ValueError:
        promised = True
    return promised or path.exists()


def load_checkpoint(path):
    """Load one file of a checkpoint, checked against its manifest where there is one.

    Raises UserError that names a damaged file and the step before it that is whole, or the steps
    that are there where the file is missing.
    """
    folder, name, step = place_of(path)
    entry = problem = None
    if folder.manifest(step).exists():
        try:
            entry = read_manifest(folder, step).get(path.name)
            problem = entry and file_damage(path, entry)
        except ValueError as error:
            problem = str(error)
    if problem:
        for earlier in reversed([s for s in folder.complete_steps() if s < step]):
            if not damage(folder, earlier):
                raise UserError(f"{problem}; step {earlier} is whole")
        raise UserError(f"{problem}; no earlier checkpoint is whole")
    if not path.exists():
        raise UserError(f"there is no file {path}: {steps_there(folder, name)}")
    return load_file(path, verified=entry is not None)


def steps_there(folder, name):
    """Which steps of a model there are, in words."""
    if not folder.models.is_dir():
        return f"{folder.models} does not exist, check the run's name"
    steps = folder.steps(name)
    if not steps:
        return f"the run has no {name} checkpoint"
    return f"{name} is there at steps {' '.join(map(str, steps[-8:]))}"


def load_stats(folder, step):
    """The dict of values saved beside a checkpoint; UserError where the file holds none."""
    stats = load_checkpoint(folder.stats(step))
    if not isinstance(stats, dict):
        raise UserError(f"{folder.stats(step)} holds no dict of values")
    return stats


def read_stats(folder, step, log):
    """The stats saved beside a checkpoint, a dict; {} where there are none.

    A file that is refused is an error where a manifest says that it is ours; without one it is
    another program's, as the published ones with their numpy arrays, and {} is given for it.
    """
    if not is_saved(folder.stats(step)):
        return {}
    try:
        return load_stats(folder, step)
    except UserError as error:
        if folder.manifest(step).exists():
            raise
        if (path := folder.stats(step).resolve()) not in PASSED_OVER:
            PASSED_OVER.add(path)
            log.warning(f"{error}; it is passed over, since no manifest says that it is this "
                        f"program's")
        return {}
