"""Files that are there whole or not at all, whenever the process or the machine stops."""

import contextlib
import os
import re
from pathlib import Path

from utils.errors import DiskError


@contextlib.contextmanager
def whole_file(path, durable=True):
    """Open a binary file that takes the place of `path` when the block ends.

    Until then, and where the block fails, `path` is what it was. `durable` waits for the disk, so
    that the new content survives a power cut too. Raises DiskError where the disk does not take it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise DiskError(f"cannot write {path}: {error.strerror or error}") from None
        raise


def sync_folder(folder):
    """Wait until the disk has the names in a folder, the renamed and the removed ones."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder):
    """Remove what `whole_file` left in a folder when its process was killed."""
    for path in Path(folder).glob(".*.tmp"):
        writer = re.fullmatch(r"\..*\.(\d+)\.tmp", path.name)
        if writer and not is_running(int(writer[1])):
            path.unlink(missing_ok=True)


def is_running(process):
    """Whether a process id is in use on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
