"""Which checkpoint a training goes on from, what it may not overwrite, and its record."""

import dataclasses
import os
import time

from hparams.parser import read_settings
from hparams.scripts import COMMAND
from hparams.settings import show
from utils.errors import UserError
from utils.files import remove_leftovers, whole_file
from utils.logging.replay import defaults_of
from utils.runs.folder import RunFolder
from utils.runs.manifest import damage, read_best
from utils.runs.script import hold_lock, without_credentials


def choose_checkpoint(H, log, processes):
    """With --resume, set `load_dir` and `load_step` to the newest whole checkpoint of the run.

    Rank 0 chooses for all. Raises UserError where every checkpoint is damaged, or where this
    command would overwrite what another one has trained.
    """
    step = None
    if processes.is_first:
        step = newest_whole_step(H, log) if H.resume else check_nothing_is_overwritten(H, log)
    step = processes.broadcast(step)
    if step is not None:
        # beside another run to begin from, --no_load_optim is about that run's
        H.load_optim = H.load_optim or H.load_step > 0
        H.load_dir, H.load_step = H.log_dir, step
    if processes.is_first and H.load_step:
        log_changed_settings(H, log)


def newest_whole_step(H, log):
    """The step that --resume takes in the log's run folder; None where there is none."""
    folder = log.folder
    steps = folder.complete_steps()
    for step in reversed(steps):
        problem = damage(folder, step)
        if problem is None:
            name = getattr(H, "sampler", "vqgan")
            if not folder.model(name, step).exists():
                raise UserError(f"{folder.path} holds no {name}: it is a run of another kind")
            log.info(f"--resume: going on from step {step} of {folder.path}")
            return step
        log.warning(f"{problem}: --resume takes the checkpoint before step {step}")
    if steps:
        raise UserError(f"every checkpoint of {folder.path} is damaged: give another --log_dir, or "
                        f"move it aside by --overwrite instead of --resume")
    trained = folder.trained_steps()
    if trained and not folder.hparams.exists():
        raise UserError(f"{folder.path} holds models without manifests, as other programs write "
                        f"them: go on with --load_dir {H.log_dir} --load_step {trained[-1]}")
    for step in reversed(trained):
        if folder.stats(step).exists():  # the last file but for the manifest
            log.warning(f"{folder.manifest(step)} is not there: step {step} is taken as it is")
            return step
    log.info(f"--resume: {folder.path} has no complete checkpoint, training begins")
    return None


def check_nothing_is_overwritten(H, log):
    """Raise UserError where a run without --resume would overwrite another one's checkpoints."""
    folder = log.folder
    if H.overwrite:
        needed = [H.load_dir] if H.load_step else []
        for run in (*needed, getattr(H, "ae_load_dir", "")):
            if run and RunFolder(run).path.resolve() == folder.path.resolve():
                raise UserError(f"--overwrite would move {run} aside, from which this run loads: "
                                f"leave --overwrite out, or give another --log_dir")
    elif continues_itself(H):
        later = [step for step in folder.trained_steps() if step > H.load_step]
        if folder.hparams.exists():  # a run of this program: what is cut off or damaged is no loss
            listed = folder.complete_steps()
            later = [step for step in later if (
                not damage(folder, step) if step in listed else folder.stats(step).exists()
            )]
        if later:
            steps = " ".join(map(str, later))
            raise UserError(f"{folder.path} holds checkpoints after step {H.load_step} ({steps}), "
                            f"which this run would overwrite: give another --log_dir")
    elif folder.holds_run():
        raise UserError(f"{folder.path} holds a run ({folder.last_saved()}): go on with it by "
                        f"--resume, move it aside by --overwrite, or give another --log_dir")


def continues_itself(H):
    """Whether a run goes on in its own folder, rather than begin there."""
    return H.load_step > 0 and H.load_dir == H.log_dir


def record_settings(H, log):
    """Save H as the run's hparams.yaml, show it, and drop metrics after the step loaded.

    Called once a step has been trained, so that a command that fails before leaves the run as it
    was. Also moves aside what --overwrite replaces, and removes half-written files and the
    manifests of later checkpoints, which are damaged.
    """
    H = without_credentials(H)
    folder, start = log.folder, H.load_step if continues_itself(H) else 0
    if H.overwrite and folder.holds_run():
        move_aside(log)
    for path in (folder.path, folder.images, folder.models, folder.saved_stats):
        remove_leftovers(path)
    for step in folder.complete_steps():
        if step > start:
            folder.manifest(step).unlink()
            log.info(f"the damaged checkpoint of step {step} counts no more")
    if not read_best(folder, start):
        folder.best.unlink(missing_ok=True)  # it is of a step that there will not be
    if folder.hparams.exists():  # else the metrics are those of an experiment
        log.rewind(start or -1)
    with whole_file(folder.hparams) as file:
        file.write(H.as_yaml().encode())
    settings = dataclasses.asdict(H)
    log.settings(settings, defaults_of(settings))


def move_aside(log):
    """Rename the folder of a log, with all that is in it, and go on in a new one of its name.

    What the log said since it was opened goes along. Raises UserError where it cannot be renamed.
    """
    folder = log.folder
    here = folder.path.resolve()  # where it is a link, that stays
    until = f"_until_{time.strftime('%Y%m%d-%H%M%S')}"
    while os.path.lexists(here.with_name(here.name + until)):
        until += "_"  # another one of the same second
    aside = here.with_name(here.name + until)
    if os.name == "nt":  # Windows moves no folder that holds an open file
        log.lock.release()
    try:
        os.rename(here, aside)
        here.mkdir(exist_ok=True)
        if folder.path.is_symlink():
            folder.path.with_name(folder.path.name + until).symlink_to(aside)
    except OSError as error:
        raise UserError(f"cannot move {here} aside to {aside}: {error.strerror}") from None
    log.begin_again(aside / folder.log.name, hold_lock(folder.create()))
    log.info(f"the run that was here is now {aside}")


def log_changed_settings(H, log):
    """Name the settings that differ from those that the loaded run was trained with."""
    path = RunFolder(H.load_dir).hparams
    if not path.exists():
        log.warning(f"{path} is not there: the settings are those of this command")
        return
    before = read_settings(path)
    for name, value in dataclasses.asdict(without_credentials(H)).items():
        if name in before and name not in COMMAND and before[name] != value:
            log.info(f"{name} is now {show(value)}, was {show(before[name])}")
