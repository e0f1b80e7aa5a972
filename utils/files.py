"""Files that are written whole or not at all, read without running code, and hashed once."""

import contextlib
import functools
import hashlib
import os
import pickle
import platform
import re
import time
import zipfile
from pathlib import Path

import torch

from utils.errors import DiskError, UserError

HOST = re.sub(r"\W", "-", platform.node()) or "host"  # of file names
WEEK = 7 * 24 * 3600  # seconds


@contextlib.contextmanager
def whole_file(path, durable=True):
    """Open a binary file that replaces `path` once the block has ended without an error.

    `durable` waits for the disk, so that the content survives a power cut. Raises DiskError where
    the disk does not take it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{HOST}.{os.getpid()}.tmp")
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
    if os.name == "nt":  # Windows does not open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder):
    """Create a folder and those above it; raises DiskError where the disk does not allow it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot create the folder {folder}: {error.strerror}") from None


def remove_leftovers(folder):
    """Remove the temporary files of `whole_file` whose process was killed.

    Those of other machines that share the file system stay for a week.
    """
    for path in Path(folder).glob(".*.tmp"):
        writer = re.fullmatch(r"\..*\.([^.]+)\.(\d+)\.tmp", path.name)
        if writer and (
            not is_running(int(writer[2])) if writer[1] == HOST and os.name != "nt"
            else time.time() - path.stat().st_mtime > WEEK
        ):
            path.unlink(missing_ok=True)


def is_running(process):
    """Whether a process id is in use on this machine; not for Windows, where asking ends it."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


class HashingWriter:
    """A binary file to write that hashes the bytes.

    It keeps a full disk's error for `finish`: torch's writer would hide it behind its own.
    """

    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, content):
        """Write `content`; a full disk shows in `finish`."""
        try:
            if self.error is None:
                self.file.write(content)
        except OSError as error:
            self.error = error
        self.digest.update(content)
        return len(content)

    def flush(self):
        """No-op: `whole_file` flushes once at the end."""

    def finish(self):
        """{"size", "sha256"} of all that was written; raises the OSError of a full disk."""
        if self.error is not None:
            raise self.error
        return {"size": self.file.tell(), "sha256": self.digest.hexdigest()}


def save_file(content, path):
    """torch.save `content` into a `whole_file`; returns {"size", "sha256"}."""
    with whole_file(path) as file:
        writer = HashingWriter(file)
        torch.save(content, writer)
        return writer.finish()


def load_file(path, verified=False):
    """Load what `save_file` wrote, on the CPU, without running code.

    A file whose hash is `verified` is not checked again. Raises UserError where the file is
    missing, damaged or of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file {path}")
    try:
        # Mapped, because torch believes the sizes that an archive claims: read into memory, what
        # lies beyond the end of a shorter one would be anything.
        mmap = verified or is_archive(path)
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is refused: it is no file of tensors, or holds code that would be run"
        ) from None
    except Exception as error:  # a broken or foreign file makes the reader raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{path} cannot be read as a model file: it is cut short, or another kind of file "
            f"({type(error).__name__}: {reason})"
        ) from None


def is_archive(path):
    """Whether a file is a zip archive, as torch writes, rather than one pickle, as it once did.

    Raises ValueError for a compressed or damaged archive, which torch does not check.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if compressed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("torch does not compress, this archive does")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it is damaged")
    return True


def file_hash(path):
    """sha256 of a file's bytes, as sha256sum prints it; computed once for a file as it is."""
    status = os.stat(path)
    return _file_hash(
        str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )


@functools.lru_cache(maxsize=256)
def _file_hash(path, *status):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_hash(module):
    """sha256 of a module's state: names, shapes and bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {list(value.shape)} {value.dtype}".encode())
        value = value.detach().cpu().contiguous().flatten()  # a number cannot be viewed as bytes
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
