"""How every script starts and ends: its run folder and logger, and errors as one sentence."""

import contextlib
import dataclasses
import fcntl
import os
import platform
import shlex
import shutil
import sys
import time

import torch

from utils.errors import UserError
from utils.runs.files import remove_leftovers
from utils.runs.folder import RunFolder
from hparams.settings import read_settings, show
from utils.training.checkpoints import goes_on
from utils.training.processes import World, is_lost_peer, leave
from utils.logging.logger import RunLogger, SilentLogger, one_line
from utils.logging.visdom_board import VisdomBoard

LOCK_SECONDS = 10
OUT_OF_MEMORY = "there is not enough memory: lower --batch_size or the sizes of the model"


def run_script(main):
    """Run `main()` and end the process: 0, or the status of a UserError after one sentence."""
    try:
        main()
        leave()
    except UserError as error:
        end(str(error), error.exit_status)
    except OSError as error:
        if error.filename is None:
            raise
        end(f"{error.filename}: {error.strerror}", 1)
    except (MemoryError, torch.OutOfMemoryError):
        end(OUT_OF_MEMORY, 1)
    except RuntimeError as error:
        if is_lost_peer(error):
            end("another of torchrun's processes has ended, which ends this one", 1)
        if "can't allocate memory" in str(error):
            end(OUT_OF_MEMORY, 1)
        raise
    except KeyboardInterrupt:
        end("interrupted; the same command uses what is kept so far", 130, "")


def end(message, status, kind="error: "):
    """End the process after one sentence.

    What is wrong is mostly wrong in all of torchrun's processes: the first one says it, and
    torchrun ends the others before they do.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(10)
    print(f"{sys.argv[0]}: {kind}{one_line(message)}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def start_run(H, device, world=World()):
    """Open the run folder of `H.log_dir`; gives its RunLogger, with visdom unless `no_visdom`.

    The log begins with the command and the versions; an error that ends the run is logged. Only
    the first process of the world has a log. `--deterministic` takes effect here.
    """
    if H.deterministic:
        compute_deterministically()
    folder = RunFolder(H.log_dir)
    if not world.is_first:
        yield SilentLogger(folder)
        return
    board = None if H.no_visdom else VisdomBoard(H.visdom_server, H.visdom_port, env=H.log_dir)
    with locked(folder.create()), RunLogger(folder, board) as log:
        log.info("command: " + command_of(H))
        log.info(
            f"python {platform.python_version()}, torch {torch.__version__}, {device}"
            + (f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "")
        )
        try:
            yield log
        except Exception as error:
            folder.begun.unlink(missing_ok=True)  # an earlier run in this folder is as it was
            if isinstance(error, UserError):
                log.error_to_file(str(error))
            raise


@contextlib.contextmanager
def locked(folder):
    """Hold a run folder, which two programs would spoil for each other.

    Raises UserError where another one holds it and does not let go within LOCK_SECONDS: one that
    was killed has let go already, or does once it has finished a step. The lock ends with the
    process, whatever ends that. A file system without locks does without.
    """
    with open(folder.lock, "a") as file:
        for _ in range(LOCK_SECONDS):
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                time.sleep(1)
            except OSError:
                break
        else:
            raise UserError(f"another program is using {folder.path}: let it end, or give another "
                            f"--log_dir")
        yield


def compute_deterministically():
    """Make torch refuse what does not repeat to the bit on one machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def command_of(H):
    """The command line as it may be written down, without what `address_of` leaves out."""
    return shlex.join(
        argument.replace(H.visdom_server, address_of(H)) for argument in sys.argv
    )


def address_of(H):
    """The visdom server without the name and the password that its address may hold."""
    scheme, separator, rest = H.visdom_server.rpartition("://")
    return scheme + separator + rest.rpartition("@")[2]


def record_settings(H, log):
    """Save H as the run's hparams.yaml and show it; metrics after the step loaded are dropped.

    So are what a killed process left half-written, and the manifests of later checkpoints: those
    are not of this run, and --resume is not to take them. Called once everything is loaded, so
    that a command that fails leaves the run as it was.
    """
    H = dataclasses.replace(H, visdom_server=address_of(H))
    folder, start = log.folder, H.load_step if goes_on(H) else 0
    if not start and not began_here(H, folder):
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
    H.save(folder.hparams)
    folder.begun.unlink(missing_ok=True)
    log.table("hyperparameters", dataclasses.asdict(H))


def began_here(H, folder):
    """Whether the folder holds the record of the same run, killed before its first checkpoint."""
    try:
        before = read_settings(folder.hparams)
        return H.resume and before | {"resume": True} == dataclasses.asdict(H)
    except UserError:
        return False


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
    H = dataclasses.replace(H, visdom_server=address_of(H))
    ignored = {"load_dir", "load_step", "load_optim", "log_dir", "resume", "train_steps"}
    for name, value in dataclasses.asdict(H).items():
        if name in before and name not in ignored and before[name] != value:
            log.info(f"{name} is now {show(value)}, was {show(before[name])}")


def holds_out(run):
    """Whether the model of a RunFolder was trained without the validation images; None where no
    hparams.yaml tells."""
    if not run.hparams.exists():
        return None
    return read_settings(run.hparams).get("steps_per_eval", 0) not in (0, None)
