"""Draw on a board what the folder of a run holds: curves, pictures, bars, settings."""

import contextlib
import json
import math
import re

from PIL import Image

from hparams.parser import read_settings
from hparams.scripts import default_settings
from utils.errors import SettingsError
from utils.logging.curves import GROUPS, LINE_KEYS
from utils.logging.panes import LARGEST_PICTURE


def until(step, lines):
    """The lines, dicts, of a metrics.jsonl but for those of a training after `step`."""
    return [line for line in lines if line["step"] <= step or line["group"] not in GROUPS]


def replay(folder, lines, board, step):
    """Draw all that a RunFolder holds until `step`; `lines` are those of its metrics.jsonl.

    What cannot be read is left out, and so are pictures of steps that training has not reached
    again since it was taken back.
    """
    settings = settings_of(folder)
    for line in lines:
        draw_line(board, line)
    reached = min(step, last_step(lines, settings))
    for name, (number, path) in newest_pictures(folder.images, reached).items():
        # anything: a file that is cut short, too large, or no picture
        with contextlib.suppress(Exception), Image.open(path) as picture:
            picture = picture.convert("RGB")
            picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
            board.picture(name, number, picture)
    kept = read_board(folder.board, step)
    for name, bars in kept["bars"].items():
        values = [float("nan") if value is None else value for value in bars["values"]]
        board.bars(name, bars["step"], values)
    if kept["health"]:
        board.health(**kept["health"])
    if settings:
        board.settings(settings, defaults_of(settings))


def draw_line(board, line):
    """Put a line of metrics.jsonl on the board: points of curves, and a table of what an experiment
    has measured."""
    figures = {name: value for name, value in line.items() if name not in LINE_KEYS}
    for name, value in figures.items():
        board.curve(name, line["step"], float(value), line["group"])
    if line["group"] not in GROUPS:
        board.table(line["group"], {name: f"{float(v):.6g}" for name, v in figures.items()})


def last_step(lines, settings):
    """The last step that the training with these lines and settings, dicts, may have reached: one
    before its next log entry. Infinity where that is unknown."""
    interval = settings.get("steps_per_log")
    if not isinstance(interval, int):
        return math.inf
    logged = max((line["step"] for line in lines if line["group"] in GROUPS), default=0)
    return logged + interval - 1


def newest_pictures(folder, step):
    """{name: (step, path)} of the newest `<name>_<step>.png` of each name until `step`."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        match = re.fullmatch(r"([^.].*)_(\d{1,15})\.png", path.name)
        if match and int(match[2]) <= step:
            name = match[1]
            found[name] = max(found.get(name, (-1, path)), (int(match[2]), path))
    return dict(sorted(found.items()))


def read_board(path, until=math.inf):
    """{"bars": {name: {"step", "values"}}, "health": {"step", "sentences"} or None} of a
    board.json, but for what is of steps after `until`; empty where it cannot be read."""
    try:
        kept = json.loads(path.read_text())
        bars = {name: {"step": int(bars["step"]), "values": [
            None if value is None or not math.isfinite(float(value)) else float(value)
            for value in bars["values"]
        ]} for name, bars in kept["bars"].items()}
        health = kept["health"] and {"step": int(kept["health"]["step"]),
                                     "sentences": list(map(str, kept["health"]["sentences"]))}
    except Exception:  # a file may hold values of any type, as deep as it likes
        return {"bars": {}, "health": None}
    bars = {name: bars for name, bars in bars.items() if bars["step"] <= until}
    return {"bars": bars, "health": health if health and health["step"] <= until else None}


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
