"""How every script starts and ends: its run folder, its lock and log, errors as one sentence."""

import atexit
import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import platform
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from hparams.environment import incomplete_launch, is_first_process
from utils.data.workers import ends_with_its_workers
from utils.errors import UserError
from utils.logging.logger import NoLogger, RunLogger, one_line
from utils.logging.visdom_board import VisdomBoard
from utils.runs.folder import RunFolder
from utils.signals import Stopped, handle_signals, stop_at_once
from utils.training.precision import allow_tf32

LOCK_SECONDS = 10
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
OUT_OF_MEMORY = ("there is not enough memory: lower --batch_size or the sizes of the model (of a "
                 "GPU: docs/gpu.md, When memory is short)")


def run_script(main, keep_memory=True):
    """Run `main()` and end the process: 0, or another status after one sentence.

    1 and 2 are those of UserErrors, 128 + n that of signal n. With `keep_memory` what is freed is
    kept for what comes: faster, but for a process that mostly waits.
    """
    if keep_memory:
        keep_freed_memory()
    atexit.register(kill_workers)  # when those that do not hang have ended
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # of a stream that is none of Python's own
            stream.reconfigure(errors="backslashreplace")  # a console may know only ASCII
    try:
        check_packages()
        with handle_signals(stop_at_once):
            main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        end(str(error), error.exit_status)
    except OSError as error:
        if error.filename is None:
            raise
        end(f"{error.filename}: {error.strerror}", 1)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            end(OUT_OF_MEMORY, 1)
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            end("another of torchrun's processes has ended, which ends this one", 1)
        raise
    except KeyboardInterrupt:
        end("interrupted; the same command uses what is kept so far", 130, "")
    except Stopped as stopped:
        end(str(stopped), stopped.exit_status, "")


def keep_freed_memory():
    """Have glibc keep the memory of freed tensors for the next ones. By default it hands back large
    pieces, and when they are needed again, each 4 KiB cost a page fault."""
    with contextlib.suppress(TypeError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def is_out_of_memory(error):
    """Whether an exception says that the memory of the machine or of its GPU did not suffice."""
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def kill_workers():
    """End the processes that hang in reading images: they ignore the signals that ask to end."""
    for worker in multiprocessing.active_children():
        worker.kill()


def check_packages():
    """Raise UserError where a script is run with the packages of another checkout."""
    ours, script = Path(__file__).resolve(), Path(sys.argv[0]).resolve()
    for root in script.parents[:2]:
        theirs = root / "utils" / "runs" / "script.py"
        if theirs.exists() and theirs != ours:
            raise UserError(f"{script} would run with the packages of {ours.parents[2]}: run it "
                            f"with the environment that `make install` makes in {root}")


def end(message, status, kind="error: "):
    """End the process after one sentence."""
    if not is_first_process():
        if not kind:  # a signal, which rank 0 tells of
            sys.exit(status)
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
    allow_tf32(False)  # what is measured is measured in float32
    folder, device = RunFolder(H.log_dir), processes.device
    if not processes.is_first:
        with ends_with_its_workers():
            yield NoLogger(folder)
        return
    board = None if H.no_visdom else VisdomBoard(H.visdom_server, H.visdom_port, env=H.log_dir)
    with RunLogger(folder, board, hold_lock(folder.create())) as log:
        log.info("command: " + command_of(H))
        log.info(
            f"python {platform.python_version()}, torch {torch.__version__}, {device}"
            + (f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "")
        )
        if remark := incomplete_launch():
            log.warning(remark)
        try:
            with ends_with_its_workers():
                yield log
        except UserError as error:
            log.to_file("ERROR", str(error))
            raise
        except (Stopped, KeyboardInterrupt) as error:
            log.to_file("INFO", str(error) or "interrupted")
            raise
        except Exception as error:
            log.to_file("ERROR", f"unexpected {type(error).__name__}", traceback.format_exc())
            raise


def hold_lock(folder):
    """The lock of a run folder, acquired; UserError where another program holds it.

    One that was killed lets go once its workers have ended, for which LOCK_SECONDS are given. A
    file system without locks does without.
    """
    lock = try_lock(folder, LOCK_SECONDS)
    if lock is None:
        raise UserError(f"another program is using {folder.path}: let it end, or give another "
                        f"--log_dir")
    return lock


def try_lock(folder, seconds=0):
    """The lock of a run folder, acquired within so many seconds; None where another program holds
    it. On a file system without locks it is not acquired, and can be released all the same."""
    lock = FileLock(folder.lock, thread_local=False)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return None
    except (OSError, NotImplementedError):
        pass
    return lock


@contextlib.contextmanager
def unless_in_use(folder):
    """Keep other programs out of a run folder during a `with` block; gives whether none uses it. A
    folder without a lock file, which no program has opened, gets none."""
    if not folder.lock.exists():
        yield True
    elif (lock := try_lock(folder)) is None:
        yield False
    else:
        try:
            yield True
        finally:
            lock.release()


def without_credentials(H):
    """H with the visdom server's address without the name and password that it may hold."""
    scheme, separator, rest = H.visdom_server.rpartition("://")
    return dataclasses.replace(H, visdom_server=scheme + separator + rest.rpartition("@")[2])


def command_of(H):
    """The command line as it may be written down, without credentials."""
    address = without_credentials(H).visdom_server
    return H.command.replace(H.visdom_server, address)
