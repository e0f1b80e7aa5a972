"""Draw on a board what the folder of a run holds: curves, pictures, bars, settings."""

import contextlib
import json
import math
import re

from PIL import Image

from hparams.parser import read_settings
from hparams.scripts import default_settings
from utils.errors import SettingsError
from utils.logging.curves import GROUPS, LINE_KEYS, in_words
from utils.logging.panes import LARGEST_PICTURE


def until(step, lines):
    """The lines, dicts, of a metrics.jsonl but for those of a training after `step`."""
    return [line for line in lines if line["step"] <= step or line["group"] not in GROUPS]


def replay(folder, lines, board, step):
    """Draw all that a RunFolder holds until `step`; `lines` are those of its metrics.jsonl.

    What cannot be read is left out.
    """
    settings, kept = settings_of(folder), read_board(folder, step)
    for line in lines:
        draw_line(board, line)
    for name, number in kept["pictures"].items():
        # anything: a file that is gone, cut short, too large, or no picture
        with contextlib.suppress(Exception), Image.open(folder.picture(name, number)) as picture:
            picture = picture.convert("RGB")
            picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
            board.picture(name, number, picture)
    for name, bars in kept["bars"].items():
        board.bars(name, bars["step"], bars["values"])
    if kept["health"]:
        board.health(**kept["health"])
    if settings:
        board.settings(settings, defaults_of(settings))


def draw_line(board, line):
    """Put a line of metrics.jsonl on the board: points of curves, and a table of what an experiment
    has measured."""
    figures = {name: float(value) for name, value in line.items() if name not in LINE_KEYS}
    for name, value in figures.items():
        board.curve(name, line["step"], value, line["group"])
    if line["group"] not in GROUPS:
        board.table(line["group"], in_words(figures))


def newest_pictures(folder, last=math.inf):
    """{name: step} of the newest `<name>_<step>.png` of each name in a folder, up to step `last`.
    """
    found = {}
    for path in sorted(folder.glob("*.png")):
        match = re.fullmatch(r"([^.].*)_(0|[1-9]\d{0,14})\.png", path.name)
        if match and int(match[2]) <= last:
            found[match[1]] = max(found.get(match[1], -1), int(match[2]))
    return dict(sorted(found.items()))


def read_board(folder, last=math.inf):
    """What a dashboard shows of a RunFolder beside metrics, but for what is of steps after `last`:
    {"pictures": {name: step}, "bars": {name: {"step", "values"}}, "health": {"step", "sentences"}
    or None}.

    It is in board.json. Where that names no pictures, as those of older versions do, or cannot be
    read, the newest files count. For a picture of a later step, the newest file up to `last`
    counts.
    """
    kept = _read(folder.board)
    pictures, health = kept["pictures"], kept["health"]
    if pictures is None or max(pictures.values(), default=0) > last:
        newest = newest_pictures(folder.images, last)
        pictures = newest if pictures is None else {
            name: step if step <= last else newest.get(name) for name, step in pictures.items()
        }
    return {
        "pictures": {name: step for name, step in pictures.items() if step is not None},
        "bars": {name: bars for name, bars in kept["bars"].items() if bars["step"] <= last},
        "health": health if health and health["step"] <= last else None,
    }


def _read(path):
    """What a board.json holds; empty, its pictures None, where it cannot be read."""
    try:
        kept = json.loads(path.read_text())
        bars = {name: {"step": int(bars["step"]), "values": [
            None if value is None or not math.isfinite(float(value)) else float(value)
            for value in bars["values"]
        ]} for name, bars in kept["bars"].items()}
        health = kept["health"] and {"step": int(kept["health"]["step"]),
                                     "sentences": list(map(str, kept["health"]["sentences"]))}
        pictures = kept.get("pictures")
        if pictures is not None:
            pictures = {name: int(step) for name, step in pictures.items()}
    except Exception:  # a file may hold values of any type, as deep as it likes
        return {"pictures": None, "bars": {}, "health": None}
    return {"pictures": pictures, "bars": bars, "health": health}


def settings_of(folder):
    """The settings, a dict, of a training's hparams.yaml; empty where it cannot be read."""
    try:
        return read_settings(folder.hparams) if folder.hparams.exists() else {}
    except SettingsError:
        return {}


def defaults_of(settings):
    """The defaults of the settings of a run, a dict; empty where these do not go together."""
    try:
        return default_settings(settings)
    except Exception:  # a file may hold values of any type
        return {}
