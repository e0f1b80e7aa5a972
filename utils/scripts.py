"""How every script starts and ends: its run folder and logger, and errors as one sentence."""

import contextlib
import dataclasses
import platform
import shlex
import shutil
import sys
import time

import torch

from hparams.errors import UserError
from hparams.runs import RunFolder
from hparams.settings import read_settings, show
from utils.logger import RunLogger
from utils.visdom_board import VisdomBoard


def run_script(main):
    """Run `main()` and end the process: 0, or the status of a UserError after one sentence."""
    try:
        main()
    except UserError as error:
        print(f"{sys.argv[0]}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"{sys.argv[0]}: error: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def start_run(H, device):
    """Open the run folder of `H.log_dir`; gives its RunLogger, with visdom unless `no_visdom`.

    The log begins with the command and the versions; an error that ends the run is logged.
    """
    folder = RunFolder(H.log_dir)
    board = None if H.no_visdom else VisdomBoard(H.visdom_server, H.visdom_port, env=H.log_dir)
    with RunLogger(folder, board) as log:
        log.info("command: " + shlex.join(sys.argv))
        log.info(
            f"python {platform.python_version()}, torch {torch.__version__}, {device}"
            + (f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "")
        )
        try:
            yield log
        except UserError as error:
            log.error_to_file(str(error))
            raise


def record_settings(H, log):
    """Save H as the run's hparams.yaml and show it; metrics after the step loaded are dropped.

    Called once everything is loaded, so that a command that fails leaves the run as it was.
    """
    if not H.load_step:
        keep_earlier_records(log)
    log.rewind(H.load_step or -1)
    H.save(log.folder.hparams)
    log.table("hyperparameters", dataclasses.asdict(H))


def keep_earlier_records(log):
    """Copy the metrics and settings of a run that began in this folder before, with its date."""
    for path in (log.folder.metrics, log.folder.hparams):
        if path.exists() and path.stat().st_size:
            date = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
            kept = path.with_name(f"{path.stem}_until_{date}{path.suffix}")
            shutil.copyfile(path, kept)
            log.warning(f"this run begins in a folder that holds another: its record is {kept}")


def log_changed_settings(H, run, log):
    """Name the settings that differ from those that the loaded run was trained with."""
    if not run.hparams.exists():
        log.warning(f"{run.hparams} is not there: the settings are those of this command")
        return
    before = read_settings(run.hparams)
    ignored = {"load_dir", "load_step", "log_dir", "train_steps"}
    for name, value in dataclasses.asdict(H).items():
        if name in before and name not in ignored and before[name] != value:
            log.info(f"{name} is now {show(value)}, was {show(before[name])}")


def holds_out(run):
    """Whether the model of a RunFolder was trained without the validation images; None where no
    hparams.yaml tells."""
    if not run.hparams.exists():
        return None
    return read_settings(run.hparams).get("steps_per_eval", 0) > 0
