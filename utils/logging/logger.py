"""What a run tells people: the console, log.txt, metrics.jsonl, image files and live plots."""

import contextlib
import json
import logging
import math
import threading
import time

import torch
from tqdm import tqdm

from utils.errors import UserError
from utils.runs.files import whole_file
from utils.logging.images import (
    image_grid, remove_images, save_image, save_images_individually, to_uint8,
)

LINE_KEYS = ("step", "group", "time")  # what a line of metrics.jsonl holds beside the metrics


class RunLogger:
    """The one object a script logs through; a context manager.

    `folder` is the RunFolder of the run, which is created; `board` a VisdomBoard or None, which
    is started here and closed with the logger. The board's warnings become the logger's, and its
    curves are drawn again from a metrics.jsonl that is there already. Raises UserError where the
    folder cannot be written or its metrics.jsonl not be read.
    """

    def __init__(self, folder, board=None):
        self.folder = folder.create()
        self._board = board
        self._log = _lines(folder.log)
        self._lock = threading.Lock()  # the board reports from its own thread
        self._closed = False
        self._metrics = None
        self._unwritten = b""  # lines of metrics.jsonl that a full disk has not taken yet
        self._disk_is_full = False
        self._load_metrics(math.inf)
        if board is not None:
            board.start(on_info=self.info, on_warning=self.warning)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def info(self, message, table=""):
        """One line on the console and in log.txt, with the time; the lines of a table below it."""
        self._write(logging.INFO, message, table and f"\n\n{table}\n")

    def warning(self, message):
        """As `info`, marked as a warning."""
        self._write(logging.WARNING, message)

    def passed_over(self, path, reason):
        """A warning that an image cannot be read."""
        self.warning(f"passed over {path}: {reason}")

    def error_to_file(self, message):
        """An error in log.txt only, for scripts that say it on the console as they end."""
        with self._lock:
            message = one_line(message)
            record = self._log.makeRecord("run", logging.ERROR, "", 0, message, (), None)
            self._log.handlers[-1].handle(record)

    def _write(self, level, message, below=""):
        with self._lock:
            if not self._closed:  # the board's thread may still be waiting for a hung server
                self._log.log(level, "%s%s", one_line(message), below)

    def metrics(self, step, values, group="train"):
        """One line of metrics.jsonl, and a point on the curve `group` of each metric.

        `values` is a dict of numbers or tensors with one element. JSON has no NaN and no
        infinities: they are written as the strings "nan", "inf" and "-inf", which `float` reads
        back, and are gaps in the curves. Lines that a full disk does not take are written once it
        does. Raises ValueError for metrics named "step", "group" or "time".
        """
        values = {name: _number(value) for name, value in values.items()}
        for name in LINE_KEYS:
            if name in values:
                raise ValueError(f"a metric cannot be named {name!r}: that is a key of every line")
        line = {"step": int(step), "group": group, "time": round(time.time(), 3)}
        line |= {name: v if math.isfinite(v) else str(v) for name, v in values.items()}
        self._unwritten += json.dumps(line, allow_nan=False).encode() + b"\n"
        self._write_metrics()
        self._draw(line)

    def _write_metrics(self):
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]
            self._disk_is_full = False
        except OSError as error:
            if not self._disk_is_full:
                self.warning(f"cannot write {self.folder.metrics}: {error.strerror}; its lines "
                             "are kept in memory until the disk takes them")
            self._disk_is_full = True

    def bars(self, step, name, values):
        """Bars over the index, such as the loss of each time step, on the board only.

        `values` is a list or a tensor with one axis; non-finite values leave out their bar.
        """
        if self._board is not None:
            self._board.bars(name, int(step), [_number(value) for value in values])

    def images(
        self, step, name, images, save=True, display=True, individually=False, columns=None
    ):
        """Images [N, C, H, W], floats in [0, 1], as a grid `images/<name>_<step>.png`.

        `save` writes the file, `display` shows the grid on the board. `individually` writes one
        file for each image in the folder `images/<name>_<step>` instead of the grid, which has
        `columns` columns or as many as rows. Raises UserError where the disk does not take them.
        """
        images = to_uint8(images)
        if save and individually:
            singles = self.folder.images / f"{name}_{step}"
            remove_images(singles)  # or they would be counted as this run's
            save_images_individually(images, singles)
        if (save and not individually) or (display and self._board is not None):
            grid = image_grid(images, columns)
        if save and not individually:
            save_image(grid, self.folder.images / f"{name}_{step}.png")
        if display and self._board is not None:
            self._board.image(name, int(step), grid)

    def table(self, name, values):
        """Show a dict as a table of two columns on the board."""
        if self._board is not None:
            self._board.table(name, values)

    def rewind(self, step):
        """Drop the lines of metrics.jsonl after `step`, for a run that resumes from there.

        The resumed run writes them again. The curves on the board follow.
        """
        self._load_metrics(step)

    def close(self, timeout=5.0):
        """Send the last plots, for at most `timeout` seconds, and close the files."""
        if self._board is not None:
            self._board.close(timeout)
        self._write_metrics()
        with self._lock:
            self._closed = True
        self._metrics.close()
        for handler in self._log.handlers:
            with contextlib.suppress(OSError):  # a full disk, which has been warned of
                handler.close()

    def _load_metrics(self, last_step):
        """Bring metrics.jsonl and the curves to `last_step`, and open the file to go on.

        A crash can leave half a line at the end: it is dropped, or the next line would be
        glued to it.
        """
        path = self.folder.metrics
        if self._metrics is not None:
            self._metrics.close()
        if self._board is not None:
            self._board.clear_curves()
        try:
            dropped = False
            kept = []
            if path.exists():
                with open(path, encoding="utf-8", errors="replace") as file:
                    for text in file:
                        line = _parse(text)
                        if line is None or line["step"] > last_step:
                            dropped = True
                            continue
                        kept.append(text)
                        self._draw(line)
            if dropped:
                with whole_file(path) as file:
                    file.write("".join(kept).encode())
            # Without a buffer, which would write a line twice where the disk is full for a while.
            self._metrics = open(path, "ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot read and write {path}: {error.strerror}") from None

    def _draw(self, line):
        """Put a line of metrics.jsonl on the board's curves."""
        if self._board is None:
            return
        for name, value in line.items():
            if name not in LINE_KEYS:
                self._board.curve(name, line["step"], float(value), line["group"])


def _lines(path):
    """A logger of lines with the time, on the console and at the end of the file `path`."""
    # Made by hand rather than with getLogger: private to its owner, so that two runs in one
    # process never write into each other's files.
    log = logging.Logger("run", level=logging.INFO)
    try:
        handlers = [_ConsoleHandler(), _LogFile(path, encoding="utf-8")]
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
    return log


class SilentLogger:
    """A RunLogger's likeness for all processes but the first, which keeps and shows nothing but
    what no other process knows."""

    def __init__(self, folder):
        self.folder = folder

    def passed_over(self, path, reason):
        """A warning that an image of this process's share cannot be read, in the run's log."""
        log = _lines(self.folder.create().log)
        log.warning("%s", one_line(f"passed over {path}: {reason}"))
        for handler in log.handlers:
            handler.close()

    def __getattr__(self, name):
        if name.startswith("_") or not hasattr(RunLogger, name):
            raise AttributeError(name)
        return lambda *arguments, **options: None


class _LogFile(logging.FileHandler):
    """log.txt, which may miss a line where the disk is full: the console has it."""

    def handleError(self, record):
        pass


class _ConsoleHandler(logging.Handler):
    """Prints through tqdm, which keeps a progress bar below the lines."""

    def emit(self, record):
        with contextlib.suppress(OSError):
            tqdm.write(self.format(record))


class ProgressBar(tqdm):
    """tqdm's bar, which does without where its output goes to a file on a full disk."""

    def display(self, *arguments, **options):
        with contextlib.suppress(OSError):
            return super().display(*arguments, **options)

    def clear(self, *arguments, **options):
        with contextlib.suppress(OSError):
            super().clear(*arguments, **options)

    def close(self):
        with contextlib.suppress(OSError):
            super().close()


def one_line(message):
    """A message whose control characters, as file names may hold them, are shown escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


def _number(value):
    """A float from a number or from a tensor with one element."""
    return float(value.detach().item() if torch.is_tensor(value) else value)


def _parse(text):
    """The dict in a line of metrics.jsonl, or None where the line is not whole."""
    try:
        line = json.loads(text) if text.endswith("\n") else None
        whole = isinstance(line, dict) and isinstance(line["group"], str)
        if not whole or not isinstance(line["step"], int):
            return None
        for name, value in line.items():
            if name not in LINE_KEYS:
                float(value)
    except (ValueError, KeyError, TypeError):
        return None
    return line
