"""Where the files of a run lie: the one place that builds their paths."""

import os
import re
from pathlib import Path

from hparams.parser import BEST_FILE, LOGS, SETTINGS_FILE, read_settings, run_name
from utils.errors import SettingsError
from utils.files import make_folder

METRICS = "metrics.jsonl"
NAMED = 20  # runs that a sentence names


class RunFolder:
    """Paths of `<root>/<name>/`; nothing is created before `create()`.

    `name` is what `run_name` takes, which raises SettingsError where it leaves `root`.
    """

    def __init__(self, name, root=LOGS):
        self.path = Path(root) / (run_name(name) if root == LOGS else name)
        self.log = self.path / "log.txt"
        self.lock = self.path / ".lock"
        self.metrics = self.path / METRICS
        self.hparams = self.path / SETTINGS_FILE
        self.best = self.path / BEST_FILE
        self.images = self.path / "images"
        self.curves = self.path / "curves.png"
        self.board = self.path / "board.json"  # what the dashboard shows beside metrics and images
        self.results = self.path / "results.json"
        self.report = self.path / "report.html"
        self.samples = self.path / "samples"
        self.models = self.path / "saved_models"
        self.saved_stats = self.path / "saved_stats"

    def create(self):
        """Make the folders of a run; raises DiskError where the disk does not allow it."""
        for folder in (self.images, self.models, self.saved_stats):
            make_folder(folder)
        return self

    def picture(self, name, step):
        """Path of the picture `<name>_<step>.png`."""
        return self.images / f"{name}_{step}.png"

    def model(self, name, step):
        """Path of the model or optimiser file `<name>_<step>.th`."""
        return self.models / f"{name}_{step}.th"

    def stats(self, step):
        """Path of what resuming needs beyond models and optimisers, `stats_<step>`."""
        return self.saved_stats / f"stats_{step}"

    def manifest(self, step):
        """Path of the sizes and hashes of a checkpoint's files; it is written last."""
        return self.saved_stats / f"manifest_{step}.json"

    def complete_steps(self):
        """Steps, ascending, of the checkpoints that were written to their end."""
        return steps_in(self.saved_stats, r"manifest_(\d+)\.json")

    def steps(self, name):
        """Steps, ascending, at which `<name>_<step>.th` exists."""
        return steps_in(self.models, re.escape(name) + r"_(\d+)\.th")

    def trained_steps(self):
        """Steps, ascending, of the models that a training has saved, complete or not."""
        names = r"(?:vqgan|absorbing|autoregressive)(?:_ema)?"
        return sorted(set(steps_in(self.models, names + r"_(\d+)\.th")))

    def holds_run(self):
        """Whether a training has left its settings or models here."""
        return self.hparams.exists() or bool(self.trained_steps())

    def last_saved(self):
        """Which checkpoint there is to go back to, in words."""
        steps = self.complete_steps()
        return f"the last checkpoint is that of step {steps[-1]}" if steps else "nothing was saved"


def steps_in(folder, pattern):
    """The numbers, ascending, in the names of a folder's files that match `pattern`."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(pattern, name)))


def run_names(root=LOGS):
    """The names of the runs below `root` that have a metrics.jsonl, the newest first."""
    found, seen = {}, set()
    inside = {"images", "saved_models", "saved_stats", "samples"}  # of a run, without runs
    for path, folders, files in os.walk(root, followlinks=True):
        here = os.path.realpath(path)
        if here in seen:  # a link that leads in a circle
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if name not in inside)
        name = Path(path).relative_to(root).as_posix()
        if METRICS in files and name != ".":
            found[name] = os.stat(os.path.join(path, METRICS)).st_mtime
    return sorted(found, key=found.get, reverse=True)


def steps_built_on(folder):
    """The steps of a run's checkpoints, a set, that samplers below logs/ have as autoencoder."""
    steps = set()
    for name in run_names():
        try:
            settings = read_settings(RunFolder(name).hparams)
            autoencoder = RunFolder(settings["ae_load_dir"])
        except (KeyError, SettingsError, TypeError):  # no sampler, or a file that says nothing
            continue
        if autoencoder.path.resolve() == folder.path.resolve():
            steps.add(settings.get("ae_load_step"))
    return steps


def listed_runs(names):
    """The names of runs, the first ones of many, as a part of a sentence."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
