"""Finding image files: below a folder, or the real ones of real_fake_faces."""

import csv
import os
from collections import Counter
from pathlib import PurePosixPath

from utils.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TABLES = ("train.csv", "valid.csv", "test.csv")  # of real_fake_faces
KINDS_NAMED = 8  # of the files that are passed over


def scan(root):
    """[(posix path relative to `root`, bytes, mtime_ns)] of the images below it, by path.

    Ignores hidden names and `__MACOSX`, follows links, visits each folder once. Raises UserError
    when a folder cannot be read.
    """
    return survey(root)[0]


def survey(root, layout=()):
    """(what `scan` gives, Counter of the other files by extension, but for names in `layout`)."""
    found, others, visited = [], Counter(), set()

    def visit(folder, prefix):
        visited.add(os.path.realpath(folder))
        with os.scandir(folder) as entries:
            # Folders themselves before links to them, by name: the same on every machine.
            for entry in sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name)):
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                try:
                    is_folder, status = entry.is_dir(), entry.stat()
                    size, mtime = status.st_size, status.st_mtime_ns
                except OSError:  # a link to nothing or to itself: reading it will be reported
                    is_folder, size, mtime = False, -1, -1
                if is_folder:
                    if os.path.realpath(entry.path) not in visited:
                        visit(entry.path, f"{prefix}{entry.name}/")
                elif entry.name.lower().endswith(EXTENSIONS):
                    found.append((prefix + entry.name, size, mtime))
                elif entry.name not in layout:
                    others[os.path.splitext(entry.name)[1].lower().rstrip(".")] += 1

    try:
        visit(root, "")
    except OSError as error:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from None
    return sorted(found), others


def counted(others):
    """`30 .tif, 10 .gif, 2 with no extension`: a Counter of files by extension in words."""
    named = others.most_common(KINDS_NAMED)
    parts = [f"{n} {kind or 'with no extension'}" for kind, n in named]
    if rest := others.total() - sum(n for _, n in named):
        parts.append(f"{rest} of other kinds")
    return ", ".join(parts)


def real_faces(root, found):
    """The real faces among `found`, and what they are called should there be none.

    Kaggle's archive nests files deeper than its csv files say: a file is real when any end of its
    path is listed.
    """
    names = [name for name in TABLES if (root / name).is_file()]
    if not names:
        real = [file for file in found if "real" in file[0].lower().split("/")[:-1]]
        return real, "train.csv, valid.csv, test.csv, nor a folder `real` with images"
    listed = set().union(*(listed_as_real(root / name) for name in names))

    def is_listed(path):
        parts = path.split("/")
        return any("/".join(parts[start:]) in listed for start in range(len(parts)))

    real = [file for file in found if is_listed(file[0])]
    return real, f"image that {', '.join(names)} lists as real"


def listed_as_real(table):
    """Paths that one csv file of real_fake_faces lists as real; raises UserError."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines)
            columns = set(rows.fieldnames or ())
            if "path" not in columns or not columns & {"label_str", "label"}:
                raise UserError(f"{table} lacks the columns `path` and `label_str` or `label`")
            column, real = ("label_str", "real") if "label_str" in columns else ("label", "1")
            return {
                PurePosixPath(row["path"].replace("\\", "/")).as_posix()
                for row in rows
                if row["path"] and (row[column] or "").strip().lower() == real
            }
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {table}: {error}") from None
