"""What benchmarks/gpu.py has found: checks, figures, what failed; on the terminal and as JSON."""

import json
import re
import subprocess
import time
import traceback
from pathlib import Path

import torch

from measure import machine, number
from utils.evaluation.experiment import table
from utils.files import whole_file


class Report:
    """Checks and figures by part; the file is written anew after each part.

    `minutes` is the time that all parts may take together.
    """

    def __init__(self, setup, folder, minutes):
        self.began, self.seconds = time.perf_counter(), 60 * minutes
        self.setup, self.part = setup, ""
        self.parts = {}  # name: {"state": "done", "failed" or "skipped", ...}
        self.figures, self.checks, self.words = [], [], []
        self.facts = facts(setup)
        name = re.sub(r"\W+", "_", self.facts["card"]).strip("_")
        self.path = Path(folder) / f"gpu_{name}.json"

    @property
    def elapsed(self):
        """Seconds since the start."""
        return time.perf_counter() - self.began

    @property
    def left(self):
        """Seconds that are left of the minutes given."""
        return self.seconds - self.elapsed

    def say(self, words):
        """Print a line with the seconds since the start."""
        print(f"[{self.elapsed:4.0f} s] {words}", flush=True)

    def figure(self, what, value, unit, **about):
        """Add a measured figure; `about` says of which case it is."""
        self.figures.append(
            {"part": self.part, "what": what, **about, "value": value, "unit": unit}
        )
        self.say(f"{describe(what, about)}: {number(value)} {unit}")

    def check(self, what, holds, detail, **about):
        """Add whether something holds that should, with what was found."""
        self.checks.append(
            {"part": self.part, "what": what, **about, "holds": bool(holds), "detail": detail}
        )
        verdict = "yes" if holds else "NO"
        self.say(f"{describe(what, about)}: {verdict} ({detail})")

    def values(self, what, **about):
        """The values of all figures of `what` for which all of `about` holds."""
        return [
            figure["value"] for figure in self.figures
            if figure["what"] == what and all(figure.get(k) == v for k, v in about.items())
        ]

    def value(self, what, **about):
        """The one value of that figure; None where there is none."""
        values = self.values(what, **about)
        return values[0] if values else None

    def run(self, name, part):
        """Run a part unless the time is spent. What it raises is told and kept."""
        self.part = name
        if self.left <= 0:
            self.say(f"{name}: skipped, the {self.seconds / 60:g} minutes are spent")
            self.parts[name] = {"state": "skipped", "why": "the time was spent"}
            return
        began, known = self.elapsed, len(self.checks)
        self.say(f"-- {name}")
        try:
            part(self.setup, self)
            failed = [check for check in self.checks[known:] if not check["holds"]]
            found = {"state": "failed" if failed else "done"}
        except Exception as error:
            last = traceback.format_exc().strip().splitlines()[-6:]
            self.say(f"{name} failed:\n" + "\n".join(last))
            found = {"state": "failed", "why": f"{type(error).__name__}: {error}"[:2000],
                     "traceback": last}
        self.parts[name] = {**found, "seconds": round(self.elapsed - began, 1)}
        self.setup.clean(code=True)
        self.save()

    def save(self):
        """Write the file, whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            **self.facts, "seconds": round(self.elapsed, 1), "parts": self.parts,
            "checks": self.checks, "figures": self.figures, "words": self.words,
        }
        with whole_file(self.path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())

    def table(self):
        """Everything as Markdown tables: parts, checks that do not hold, figures."""
        states = [[name, part["state"], part.get("seconds", "-"), part.get("why", "")[:80]]
                  for name, part in self.parts.items()]
        text = table(["part", "state", "s", ""], states)
        counts = {}
        for check in self.checks:
            holds = counts.setdefault(check["what"], [0, 0])
            holds[0] += check["holds"]
            holds[1] += 1
        if counts:
            rows = [[what, f"{good} of {all_}"] for what, (good, all_) in counts.items()]
            text += "\n\n" + table(["check", "holds"], rows)
        if self.figures:
            rows = [[describe(figure["what"], about(figure)), number(figure["value"]),
                     figure["unit"]] for figure in self.figures]
            text += "\n\n" + table(["figure", "", "unit"], rows)
        return text


def about(figure):
    """What a figure says of its case."""
    return {k: v for k, v in figure.items() if k not in ("part", "what", "value", "unit")}


def describe(what, about):
    """A figure's or check's name with its case, in one line."""
    return ", ".join([what, *(f"{name} {value}" for name, value in about.items())])


def facts(setup):
    """What the figures depend on beside the code: card, driver, versions."""
    found = {"card": machine(setup.device).partition(";")[0], "torch": torch.__version__,
             "cuda": torch.version.cuda, "driver": driver(), "tiny": setup.tiny, "amp": setup.half}
    if setup.on_gpu:
        properties = torch.cuda.get_device_properties(setup.device)
        found |= {"memory_bytes": properties.total_memory,
                  "compute_capability": f"{properties.major}.{properties.minor}"}
    return found


def driver():
    """The version of NVIDIA's driver; None where `nvidia-smi` does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return output.stdout.split("\n")[0].strip() or None
