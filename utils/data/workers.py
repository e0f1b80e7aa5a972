"""The processes that read images: how many there are, how they start, and what becomes of a run
when one ends."""

import contextlib
import multiprocessing.queues
import os
import signal
import sys
import threading
import time
from typing import NamedTuple

from hparams.environment import process_count
from utils.errors import UserError
from utils.signals import SIGNALS

MOST_WORKERS = 16  # beyond which they wait for the pipe to the main process


class Failure(NamedTuple):
    """What went wrong in a worker, whose exception may be none that can be handed over."""

    kind: str
    message: str


def workers_for(dataset, num_workers):
    """How many processes read a dataset where `--num_workers` gives `num_workers` or None.

    None: one for each CPU that this rank has, but one for the main process where there are more
    than two, and at most MOST_WORKERS; none where reading costs next to nothing.
    """
    if num_workers is not None:
        return num_workers
    if dataset.reads_fast:
        return 0
    here = os.environ.get("LOCAL_WORLD_SIZE", "") if process_count() > 1 else ""
    cpus = usable_cpus() // (int(here) if here.isdigit() and int(here) else 1)
    return min(cpus - 1 if cpus > 2 else max(cpus, 1), MOST_WORKERS)


# Errors that cut the start of torch's iterators. They hold these iterators, which print a traceback
# when they are deleted, unless Python ends.
_HALF_MADE = []
REMEDY = "lower --num_workers (0 reads in this process) or --batch_size"


def from_workers(loader):
    """The items of a loader; UserError, which says what to change, where a worker fails."""
    try:
        batches = iter(loader)
    except OSError as error:  # no process, or no shared memory for the locks of their queues
        raise UserError(f"processes that read images do not start ({error.strerror}): {REMEDY}"
                        ) from None
    except RuntimeError as error:  # a process has ended while others start
        _HALF_MADE.append(error)
        raise
    for batch in batches:
        if isinstance(batch, Failure):
            raise UserError(f"a process that reads images failed ({batch.kind}: {batch.message}): "
                            f"{REMEDY}")
        yield batch


@contextlib.contextmanager
def ends_with_its_workers():
    """Raise UserError for what torch raises, wherever this process is, when a worker ends.

    Where that is a finalizer, Python prints the error and goes on. It is not printed here: the
    loader finds out by itself.
    """
    print_error = sys.unraisablehook

    def print_others(unraisable):
        if not _is_end_of_worker(unraisable.exc_value):
            print_error(unraisable)

    sys.unraisablehook = print_others
    try:
        yield
    except RuntimeError as error:
        if not _is_end_of_worker(error):
            raise
        raise UserError(f"a process that reads images has ended, killed or out of memory: {REMEDY}"
                        ) from None
    finally:
        sys.unraisablehook = print_error


def _is_end_of_worker(error):
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def usable_cpus():
    """How many processors this process may use, which in a container are not all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_worker(worker):
    """Leaves the signals that ask to end to the main process, which ends its workers, and ends
    this one where it cannot hand over what it has read, for which that would wait for ever."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *error: os._exit(1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent):
    """Ends a worker whose main process was killed, which gives it another parent. Without this a
    worker that waits at a full pipe, which other workers hold open, would stay for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
