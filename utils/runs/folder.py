"""Where the files of a run lie: the one place that builds their paths."""

import os
import re
from pathlib import Path

from utils.errors import SettingsError, UserError

LOGS = Path("logs")


def process_count():
    """How many processes torchrun has started, 1 without it.

    Some clusters set one of its variables themselves: only all of them together mean torchrun.
    """
    torchrun = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}
    return int(os.environ["WORLD_SIZE"]) if torchrun else 1


class RunFolder:
    """Paths of `logs/<name>/`; nothing is created before `create()`.

    `root` is the folder that holds all runs, `logs` in the working directory by default.
    Raises SettingsError when `name` would leave `root`.
    """

    def __init__(self, name, root=LOGS):
        self.name = name
        self.path = Path(root) / name
        if "\0" in name or Path(root).resolve() not in self.path.resolve().parents:
            raise SettingsError(f"the run folder {name!r} lies outside {root}/: use a plain name")
        self.log = self.path / "log.txt"
        self.lock = self.path / ".lock"
        self.metrics = self.path / "metrics.jsonl"
        self.hparams = self.path / "hparams.yaml"
        self.images = self.path / "images"
        self.results = self.path / "results.json"
        self.samples = self.path / "samples"
        self.features = self.path / "features"
        self.models = self.path / "saved_models"
        self.saved_stats = self.path / "saved_stats"
        self.begun = self.saved_stats / "begun"

    def create(self):
        """Make the folders of a run; raises UserError where the disk does not allow it."""
        try:
            for folder in (self.images, self.models, self.saved_stats):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the run folder {self.path}: {error.strerror}") from None
        return self

    def model(self, name, step):
        """Path of the model or optimiser file `<name>_<step>.th`."""
        return self.models / f"{name}_{step}.th"

    def stats(self, step):
        """Path of what resuming needs beyond models and optimisers, `stats_<step>`."""
        return self.saved_stats / f"stats_{step}"

    def manifest(self, step):
        """Path of the sizes and hashes of a checkpoint's files, the last one that is written."""
        return self.saved_stats / f"manifest_{step}.json"

    def complete_steps(self):
        """Steps, ascending, of the checkpoints that were written to their end."""
        matches = (re.fullmatch(r"manifest_(\d+)\.json", file.name)
                   for file in self.saved_stats.glob("manifest_*.json"))
        return sorted(int(match[1]) for match in matches if match)

    def steps_to_resume(self):
        """The `complete_steps` that --resume may take: none where the file `begun` says that a run
        was to begin anew, which has not come to replace the earlier one's record yet."""
        return [] if self.begun.exists() else self.complete_steps()

    def last_kept(self):
        """Which checkpoint there is to go back to, in words."""
        steps = self.complete_steps()
        return f"the last checkpoint is that of step {steps[-1]}" if steps else "nothing was saved"

    def steps(self, name):
        """Steps, ascending, at which `<name>_<step>.th` exists."""
        pattern = re.compile(re.escape(name) + r"_(\d+)\.th")
        matches = (pattern.fullmatch(file.name) for file in self.models.glob(f"{name}_*.th"))
        return sorted(int(match.group(1)) for match in matches if match)
