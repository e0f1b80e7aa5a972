"""Chooses the checkpoint that a run goes on from (--resume), and records the run's settings."""

import dataclasses
import shutil
import time

from hparams.parser import read_settings
from hparams.settings import show
from utils.errors import SettingsError, UserError
from utils.files import remove_leftovers, whole_file
from utils.runs.folder import RunFolder
from utils.runs.manifest import damage
from utils.runs.script import without_credentials


def choose_checkpoint(H, log, processes):
    """With --resume, set `load_dir` and `load_step` to the newest whole checkpoint of the run.

    Rank 0 chooses for all. Raises UserError where every checkpoint is damaged. Without --resume,
    writes a marker until hparams.yaml exists, so that --resume restarts a run killed before that.
    """
    if H.resume:
        step = processes.broadcast(newest_whole_step(log) if processes.is_first else None)
        if step is not None:
            H.load_dir, H.load_step, H.load_optim = H.log_dir, step, True
    elif processes.is_first and not continues_itself(H):
        log.folder.begun.touch()


def newest_whole_step(log):
    """The step that --resume takes in the log's run folder; None where there is none."""
    folder = log.folder
    steps = [] if folder.begun.exists() else folder.complete_steps()
    for step in reversed(steps):
        problem = damage(folder, step)
        if problem is None:
            log.info(f"--resume: going on from step {step} of {folder.path}")
            return step
        log.warning(f"{problem}: --resume takes the checkpoint before step {step}")
    if steps:
        raise UserError(f"every checkpoint of {folder.path} is damaged: give another --log_dir")
    log.info(f"--resume: {folder.path} has no complete checkpoint, training begins")
    return None


def continues_itself(H):
    """Whether a run goes on in its own folder, rather than begin there."""
    return H.load_step > 0 and H.load_dir == H.log_dir


def record_settings(H, log):
    """Save H as the run's hparams.yaml, show it, and drop metrics after the step loaded.

    Called once everything is loaded, so that a command that fails leaves the run as it was. Also
    removes half-written files, and the manifests of later checkpoints, which are another run's.
    """
    H = without_credentials(H)
    if H.load_step:
        log_changed_settings(H, log)
    folder, start = log.folder, H.load_step if continues_itself(H) else 0
    if not start and not was_begun_alike(H, folder):
        keep_earlier_records(log)
    for path in (folder.path, folder.images, folder.models, folder.saved_stats):
        remove_leftovers(path)
    if dropped := [step for step in folder.complete_steps() if step > start]:
        for step in dropped:
            folder.manifest(step).unlink()
        steps = " ".join(map(str, dropped))
        log.info(f"this run goes on from step {start}: --resume will not take the checkpoints that "
                 f"were here of steps {steps}, whose files stay")
    log.rewind(start or -1)
    with whole_file(folder.hparams) as file:
        file.write(H.as_yaml().encode())
    folder.begun.unlink(missing_ok=True)
    log.table("hyperparameters", dataclasses.asdict(H))


def was_begun_alike(H, folder):
    """Whether the folder holds the record of the same run, killed before its first checkpoint."""
    try:
        before = read_settings(folder.hparams)
    except SettingsError:
        return False
    return H.resume and before | {"resume": True} == dataclasses.asdict(H)


def keep_earlier_records(log):
    """Copy the metrics and settings of an earlier run in this folder, with their date."""
    for path in (log.folder.metrics, log.folder.hparams):
        if path.exists() and path.stat().st_size:
            date = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
            copy = path.with_name(f"{path.stem}_until_{date}{path.suffix}")
            shutil.copyfile(path, copy)
            log.warning(f"this run begins in a folder that holds another: its record is {copy}")


def log_changed_settings(H, log):
    """Name the settings that differ from those that the loaded run was trained with."""
    path = RunFolder(H.load_dir).hparams
    if not path.exists():
        log.warning(f"{path} is not there: the settings are those of this command")
        return
    before = read_settings(path)
    ignored = {"load_dir", "load_step", "load_optim", "log_dir", "resume", "train_steps"}
    for name, value in dataclasses.asdict(H).items():
        if name in before and name not in ignored and before[name] != value:
            log.info(f"{name} is now {show(value)}, was {show(before[name])}")


def was_validation_held_out(run):
    """Whether a run was trained without the validation images; None without a hparams.yaml."""
    path = RunFolder(run).hparams
    return bool(read_settings(path).get("steps_per_eval")) if path.exists() else None
