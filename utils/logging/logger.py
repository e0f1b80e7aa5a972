"""What a run reports: the console, log.txt, metrics.jsonl, image files and plots."""

import contextlib
import json
import math
import threading
import time
from datetime import datetime

import torch
from tqdm import tqdm

from utils.data.pixels import to_uint8
from utils.errors import DiskError, UserError
from utils.files import whole_file
from utils.logging.curves import LINE_KEYS
from utils.logging.images import image_grid, remove_images, save_image, save_images_individually
from utils.logging.replay import draw_line, read_board, replay, until


class RunLogger:
    """The one object a script logs through; a context manager.

    `folder` is the RunFolder of the run, which is created; `board` a VisdomBoard or None, which
    is started here and closed with the logger, as the folder's `lock` is released. What the folder
    holds of earlier is drawn again. Raises UserError where a file cannot be written.
    """

    def __init__(self, folder, board=None, lock=None):
        self.folder, self.lock = folder.create(), lock
        self._board = board
        self._log = _Log(folder.log)
        self._metrics = _AppendedFile(folder.metrics)
        self.rewind(math.inf)
        if board is not None:
            board.start(on_info=self.info, on_warning=self.warning)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def info(self, message, table=""):
        """Log one line on the console and in log.txt, with the lines of `table` below it."""
        self._log.write("INFO", message, table)

    def warning(self, message):
        """Log one line, marked as a warning."""
        self._log.write("WARNING", message)

    def passed_over(self, path, reason):
        """Warn that an image cannot be read."""
        self.warning(f"passed over {path}: {reason}")

    def to_file(self, level, message, table=""):
        """Log one line, with `table` below it, in log.txt only."""
        self._log.write(level, message, table, on_console=False)

    def begin_again(self, moved, lock):
        """Go on in a new folder of the same path, whose `lock` is held, with what was logged since
        this logger was opened, which is taken out of the old log.txt, now at `moved`."""
        self.lock.release()
        self.lock = lock
        self._log.follow(moved)
        self.rewind(math.inf)  # which clears the board of the curves of the other run

    def metrics(self, step, values, group="train"):
        """Write one line of metrics.jsonl, and add a point to the curve `group` of each metric.

        `values` is a dict of numbers, tensors with one element, or None for what is unknown, which
        is NaN. JSON has no NaN and no infinities: they are written as the strings "nan", "inf" and
        "-inf", which `float` reads back, and are gaps in the curves. The figures of an experiment,
        any `group` but those of `curves.GROUPS`, are a table too. Raises ValueError for metrics
        named "step", "group" or "time".
        """
        line = {"step": int(step), "group": group, "time": round(time.time(), 3)}
        for name, value in values.items():
            if name in LINE_KEYS:
                raise ValueError(f"a metric cannot be named {name!r}: that is a key of every line")
            value = value.item() if torch.is_tensor(value) else value
            number = math.nan if value is None else float(value)
            line[name] = number if math.isfinite(number) else str(number)
        self._write_metrics(json.dumps(line, allow_nan=False) + "\n")
        if self._board is not None:
            draw_line(self._board, line)

    def _write_metrics(self, text=""):
        warned = self._metrics.waiting
        try:
            self._metrics.write(text)
        except OSError as error:
            if not warned:
                self.warning(f"cannot write {self.folder.metrics}: {error.strerror}; its lines "
                             "are kept in memory until the disk takes them")

    def bars(self, step, name, values):
        """Show `values`, a list or a tensor with one axis, as bars over the index on the board, and
        keep them in board.json.

        Non-finite values leave out their bar.
        """
        values = [float(f"{value:.6g}") if math.isfinite(value) else None
                  for value in torch.as_tensor(values).tolist()]
        if self._board is not None:
            self._board.bars(name, int(step), values)
        self._keep(bars={name: {"step": int(step), "values": values}})

    def images(
        self, step, name, images, save=True, display=True, individually=False, columns=None
    ):
        """Images [N, C, H, W], floats in [0, 1], as a grid `images/<name>_<step>.png`.

        `save` writes the file, `display` shows the grid on the board. `individually` writes one
        file for each image in the folder `images/<name>_<step>` instead of the grid, which has
        `columns` columns or as many as rows. Raises DiskError where the disk does not take them.
        """
        images = to_uint8(images)
        grid = image_grid(images, columns)
        if save and individually:
            singles = self.folder.images / f"{name}_{step}"
            remove_images(singles)  # or they would be counted as this run's
            save_images_individually(images, singles)
        elif save:
            self._save(step, name, grid)
        if display and self._board is not None:
            self._board.image(name, int(step), grid)

    def picture(self, step, name, picture):
        """Save a PIL image as `images/<name>_<step>.png`, show it on the board, and give its path.

        Raises DiskError where the disk does not take it.
        """
        path = self._save(step, name, picture)
        if self._board is not None:
            self._board.picture(name, int(step), picture)
        return path

    def _save(self, step, name, picture):
        """Save a picture, keep its step in board.json, and give its path; DiskError."""
        path = self.folder.picture(name, int(step))
        save_image(picture, path)
        self._keep(pictures={name: int(step)})
        return path

    def health(self, step, sentences):
        """Show how the training goes, a list of sentences, and keep it in board.json."""
        if self._board is not None:
            self._board.health(int(step), sentences)
        self._keep(health={"step": int(step), "sentences": sentences})

    def settings(self, values, defaults):
        """Show the settings, a dict, on the board: what differs from `defaults` first."""
        if self._board is not None:
            self._board.settings(values, defaults)

    def _keep(self, pictures=None, bars=None, health=None, last=math.inf):
        """Write into board.json what a dashboard shows beside metrics, as `read_board` gives it;
        what it holds of steps after `last` is dropped."""
        kept = read_board(self.folder, last)
        kept = {"pictures": kept["pictures"] | (pictures or {}),
                "bars": kept["bars"] | (bars or {}), "health": health or kept["health"]}
        with contextlib.suppress(DiskError), whole_file(self.folder.board, durable=False) as file:
            file.write(json.dumps(kept, allow_nan=False).encode())

    def rewind(self, step):
        """Drop what training has written into metrics.jsonl and board.json after `step`, which
        training will write again.

        A crash can leave half a line at the end: it is dropped too, or the next line would be
        glued to it. The board follows.
        """
        path = self.folder.metrics
        lines = until(step, read_metrics(path))
        if self._board is not None:
            self._board.clear()
            replay(self.folder, lines, self._board, step)
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        if path.exists() and len(content) != path.stat().st_size:
            with whole_file(path) as file:
                file.write(content)
        if step < math.inf:
            self._keep(last=step)

    def close(self, timeout=5.0):
        """Send the last plots, for at most `timeout` seconds, and log no more."""
        if self._board is not None:
            self._board.close(timeout)
        self._write_metrics()
        self._log.close()
        if self.lock is not None:
            self.lock.release()


class NoLogger:
    """No-op logger for ranks above 0; it only writes warnings about unreadable images."""

    def __init__(self, folder):
        self.folder = folder

    def passed_over(self, path, reason):
        """Warn in the run's log that an image cannot be read, which rank 0 has not tried."""
        _Log(self.folder.create().log).write("WARNING", f"passed over {path}: {reason}")

    def __getattr__(self, name):
        if name.startswith("_") or not hasattr(RunLogger, name):
            raise AttributeError(name)
        return lambda *arguments, **options: None


class _AppendedFile:
    """A file that grows line by line; what a full disk does not take is written later.

    Raises UserError where it cannot be opened.
    """

    def __init__(self, path):
        self.path, self.waiting = path, b""
        try:
            open(path, "ab").close()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    def write(self, text=""):
        """Append `text` to what waits and write that; raises OSError where the disk is full."""
        self.waiting += text.encode()
        while self.waiting:  # without a buffer, of which nobody knows what the disk has taken
            with open(self.path, "ab", buffering=0) as file:
                self.waiting = self.waiting[file.write(self.waiting) :]


class _Log:
    """Lines with the time, on the console and at the end of the file `path`."""

    def __init__(self, path):
        self._file = _AppendedFile(path)
        self._begin = path.stat().st_size
        self._lock = threading.Lock()  # the board reports from its own thread
        self._closed = False

    def write(self, level, message, table="", on_console=True):
        """Log one line; what a full disk does not take is no error, here or on the console."""
        now = datetime.now().isoformat(" ", "milliseconds").replace(".", ",")
        text = f"{now} {level} {one_line(message)}\n" + (table and f"\n{table}\n\n")
        with self._lock:
            if self._closed:  # the board's thread may still be waiting for a hung server
                return
            with contextlib.suppress(OSError):
                if on_console:
                    tqdm.write(text, end="")  # above a progress bar
            with contextlib.suppress(OSError):
                self._file.write(text)

    def follow(self, moved):
        """Move the lines since the beginning from the file `moved` to a new one at `path`."""
        with self._lock, contextlib.suppress(OSError), open(moved, "r+b") as old:
            old.seek(self._begin)
            self._file.waiting = old.read() + self._file.waiting
            old.truncate(self._begin)
            self._begin = 0

    def close(self):
        with self._lock, contextlib.suppress(OSError):
            self._closed = True
            self._file.write()


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


def read_metrics(path):
    """The dicts in the lines of a metrics.jsonl, but for those that a crash has cut; none where
    there is no such file."""
    lines, content = [], path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for text in content.splitlines(keepends=True):
        try:
            line = json.loads(text)
            for name, value in line.items():
                if name not in LINE_KEYS:
                    float(value)
            whole = isinstance(line["step"], int) and isinstance(line["group"], str)
        except Exception:  # a line may hold values of any type, as deep as it likes
            continue
        if whole and text.endswith("\n"):
            lines.append(line)
    return lines
