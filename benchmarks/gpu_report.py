"""What benchmarks/gpu.py has found: checks, figures, what failed; on the terminal and as JSON."""

import contextlib
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
from utils.training.cuda_graphs import CaptureFailed, first_line


class Report:
    """Checks and figures by part; the file is written anew after each part.

    `minutes` is the time that all parts may take together.
    """

    def __init__(self, setup, folder, minutes):
        self.began, self.seconds = time.perf_counter(), 60 * minutes
        self.setup, self.part = setup, ""
        self.parts = {}  # name: {"state": "done", "failed", "skipped" or "not run", ...}
        self.figures, self.checks, self.passed_over, self.words = [], [], [], []
        self.broken = ""  # why the card can do no more
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

    def pass_over(self, what, why, **about):
        """Add a case that gives nothing, and why. It is no failure."""
        self.passed_over.append({"part": self.part, "what": what, **about, "why": why})
        self.say(f"{describe(what, about)}: {why}")

    def spent(self, what, needed=0, **about):
        """Whether no more seconds are left than `needed`: the case is then passed over."""
        if self.left > needed:
            return False
        self.pass_over(what, "passed over for time", **about)
        return True

    @contextlib.contextmanager
    def going_on(self, what, **about):
        """Context in which an exception passes over the case, and the part goes on, unless a
        capture failed."""
        try:
            yield
        except CaptureFailed:
            raise
        except Exception as error:
            self.pass_over(what, described(error), **about)

    def run(self, name, part):
        """Run a part unless the time is spent or the card broken. What it raises is told and
        kept."""
        self.part = name
        if self.broken or self.left <= 0:
            state = "not run" if self.broken else "skipped"
            why = self.broken or f"the {self.seconds / 60:g} minutes are spent"
            self.say(f"{name}: {state}, {why}")
            self.parts[name] = {"state": state, "why": why}
            return
        began = self.elapsed
        self.say(f"-- {name}")
        try:
            part(self.setup, self)
            found = {"state": self.state_of(name)}
        except Exception as error:
            last = traceback.format_exc().strip().splitlines()[-6:]
            self.say(f"{name} failed:\n" + "\n".join(last))
            found = {"state": "failed", "why": f"{type(error).__name__}: {error}"[:2000],
                     "traceback": last}
            if isinstance(error, CaptureFailed):
                self.broken = f"the card can do no more after {name}: {described(error)}"
        self.parts[name] = {**found, "seconds": round(self.elapsed - began, 1)}
        self.save()
        self.clean(name)

    def state_of(self, name):
        """What became of a part that has come to its end."""
        checks = [check for check in self.checks if check["part"] == name]
        if any(not check["holds"] for check in checks):
            return "failed"
        found = checks + [figure for figure in self.figures if figure["part"] == name]
        passed_over = any(case["part"] == name for case in self.passed_over)
        return "skipped" if passed_over and not found else "done"

    def clean(self, name):
        """Give back what a part took. After an error such as an illegal access the card can do no
        more in this process: then the part has failed, and no other one runs."""
        try:
            self.setup.wait()
            self.setup.clean(code=True)
        except Exception as error:
            self.broken = f"the card can do no more after {name}: {described(error)}"
            self.say(self.broken)
            self.parts[name] = {"why": self.broken, **self.parts[name], "state": "failed"}
            self.save()

    def save(self):
        """Write the file, whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            **self.facts, "seconds": round(self.elapsed, 1), "parts": self.parts,
            "checks": self.checks, "figures": self.figures, "passed_over": self.passed_over,
            "words": self.words,
        }
        with whole_file(self.path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())

    def table(self):
        """Everything as Markdown tables: parts, checks, figures, what gave none."""
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
        if self.passed_over:
            rows = [[describe(case["what"], about(case)), case["why"]]
                    for case in self.passed_over]
            text += "\n\n" + table(["passed over", "why"], rows)
        return text


def about(figure):
    """What a figure says of its case."""
    others = ("part", "what", "value", "unit", "why")
    return {k: v for k, v in figure.items() if k not in others}


def describe(what, about):
    """A figure's or check's name with its case, in one line."""
    return ", ".join([what, *(f"{name} {value}" for name, value in about.items())])


def described(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {first_line(error)}"[:300]


def facts(setup):
    """What the figures depend on beside the code: card, driver, versions."""
    found = {"card": machine(setup.device).partition(";")[0], "torch": torch.__version__,
             "cuda": torch.version.cuda, "driver": nvidia_smi("driver_version"),
             "tiny": setup.tiny, "amp": setup.half}
    if setup.on_gpu:
        properties = torch.cuda.get_device_properties(setup.device)
        found |= {"memory_bytes": properties.total_memory,
                  "compute_capability": f"{properties.major}.{properties.minor}",
                  "compute_mode": nvidia_smi("compute_mode", f"--id=GPU-{properties.uuid}")}
    return found


def nvidia_smi(field, *options):
    """What `nvidia-smi` says of a card, the first unless an option names it; None where nothing."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", *options]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return output.stdout.split("\n")[0].strip() or None
