"""How every script starts and ends: its run folder, its lock and log, errors as one sentence."""

import contextlib
import dataclasses
import fcntl
import os
import platform
import shlex
import sys
import time

import torch
import torch.distributed as dist

from hparams.environment import is_first_process
from utils.errors import UserError
from utils.logging.logger import NoLogger, RunLogger, one_line
from utils.logging.visdom_board import VisdomBoard
from utils.runs.folder import RunFolder

LOCK_SECONDS = 10
OUT_OF_MEMORY = "there is not enough memory: lower --batch_size or the sizes of the model"


def run_script(main):
    """Run `main()` and end the process: 0, or the status of a UserError after one sentence."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        end(str(error), error.exit_status)
    except OSError as error:
        if error.filename is None:
            raise
        end(f"{error.filename}: {error.strerror}", 1)
    except (MemoryError, torch.OutOfMemoryError):
        end(OUT_OF_MEMORY, 1)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            end("another of torchrun's processes has ended, which ends this one", 1)
        if "can't allocate memory" in str(error):
            end(OUT_OF_MEMORY, 1)
        raise
    except KeyboardInterrupt:
        end("interrupted; the same command uses what is kept so far", 130, "")


def end(message, status, kind="error: "):
    """End the process after one sentence."""
    if not is_first_process():
        time.sleep(10)  # rank 0 says it, and torchrun ends the others before they do
    print(f"{sys.argv[0]}: {kind}{one_line(message)}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def start_run(H, processes):
    """Open the run folder of `H.log_dir`; gives its logger, on rank 0 one with visdom.

    The log begins with the command and the versions, and an error that ends the run is logged.
    `--deterministic` takes effect here.
    """
    if H.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    folder, device = RunFolder(H.log_dir), processes.device
    RunFolder(H.load_dir)  # a name that leaves logs/ is refused before anything is written
    if not processes.is_first:
        yield NoLogger(folder)
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
    """Hold the lock of a run folder; UserError where another program holds it for LOCK_SECONDS.

    One that was killed lets go once it has finished a step. A file system without locks does
    without.
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


def without_credentials(H):
    """H with the visdom server's address without the name and password that it may hold."""
    scheme, separator, rest = H.visdom_server.rpartition("://")
    return dataclasses.replace(H, visdom_server=scheme + separator + rest.rpartition("@")[2])


def command_of(H):
    """The command line as it may be written down, without credentials."""
    address = without_credentials(H).visdom_server
    return shlex.join(argument.replace(H.visdom_server, address) for argument in sys.argv)
