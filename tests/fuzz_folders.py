"""Take a file of a run's folder away, rename it, double it or cut it, and use the run.

    PYTHONPATH=. python tests/fuzz_folders.py --folders 500

The run of a sampler or that of its autoencoder is harmed; then a command resumes it, goes on from
its checkpoint in a new folder, or draws samples of it. That must end with one sentence, or give
what it gives on a sound folder, to the bit; and but for log.txt nothing in the folder may change
unless a step is trained there again.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import train_sampler
import train_vqgan
from experiments import get_samples
from test_training import SAMPLER, VQGAN, assert_identical, files_of
from utils.runs.folder import RunFolder
from utils.runs.script import run_script

TRAINED = "--ema --steps_per_checkpoint 2 --train_steps 4"
RUNS = {"ae": (train_vqgan, VQGAN), "prior": (train_sampler, f"{SAMPLER} --ae_load_step 4")}
OWN = ("log.txt", ".lock", "metrics.jsonl")  # a command may write there; of metrics see `contents`


def harm(folder, rng):
    """Harm one file of a folder; returns (what was done, the file's name)."""
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "log.txt"))
    kind = rng.choice(["removed", "renamed", "doubled", "cut"])
    other = path.with_name(rng.choice([
        f"{path.name}.bak", f"copy of {path.name}", path.name.replace("4", "6"),
        path.name.replace("4", "2"), path.name.replace("_ema", ""), path.name.upper(),
    ]))
    if kind == "removed":
        path.unlink()
    elif kind == "renamed":
        path.rename(other)
    elif kind == "doubled":
        if other != path:
            shutil.copy(path, other)
    else:
        content = path.read_bytes()
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    return kind, path.name


def contents(folder):
    """{path: bytes} of a folder, and the whole lines of its metrics, which none may lose."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in OWN:
            found[str(path.relative_to(folder))] = path.read_bytes()
    metrics = folder / "metrics.jsonl"
    text = metrics.read_bytes() if metrics.exists() else b""
    return found | {"metrics": text[: text.rfind(b"\n") + 1]}


def command(run, rng):
    """(script, flags, function that gives what it came to) of a command that uses a run."""
    script, flags = RUNS[run]
    kind = rng.choice(["resume", "resume without flags", "load", "load bare", "sample"])
    if kind.startswith("resume"):
        flags = f"{flags} {TRAINED}" if kind == "resume" else "--train_steps 4 --no_visdom"
        return kind, script, f"{flags} --log_dir {run} --resume", lambda: files_of(run, 4)
    if kind == "load":
        flags = f"{flags} {TRAINED} --log_dir new --load_dir {run} --load_step 2"
        return kind, script, flags, lambda: files_of("new", 4)
    bare = "--load_dir prior --load_step 4 --no_visdom --log_dir new --n_samples 4"
    if kind == "sample":
        bare += " --ema"
    return kind, get_samples, bare, lambda: torch.load("logs/new/ids_4.pt", weights_only=True)


def attempt(script, flags):
    """The exit status of a script, and what it wrote to the console."""
    output, arguments = io.StringIO(), sys.argv
    sys.argv = ["script.py", *flags.split()]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            run_script(script.main)
        return 0, output.getvalue()
    except SystemExit as stop:
        return stop.code, output.getvalue()
    finally:
        sys.argv = arguments


def use(run, rng, base, expected):
    """Harm a copy of a run and use it; returns (kind of harm, what came of it)."""
    for path in Path().iterdir():
        if path.name == "logs":
            shutil.rmtree(path)
    shutil.copytree(base, "logs")
    kind, name = harm(Path("logs") / run, rng)
    what, script, flags, result = command(run, rng)
    before = contents(Path("logs") / run)
    status, output = attempt(script, flags)
    case = f"{name} {kind}, then {what}: {flags}\n{output}"
    if "going on from step 2" not in output:  # else it trains steps 3 and 4 again
        assert contents(Path("logs") / run) == before, f"the folder changed: {case}"
    assert "Traceback" not in output, case
    if status:
        assert status in (1, 2) and output.count("script.py: error: ") == 1, case
        return kind, "a sentence"
    if (run, what) in expected:
        right, came = expected[run, what], result()
        try:
            if isinstance(right, dict):  # a doubled file is one more
                came = {name: came.get(name) for name in right}
            assert_identical(right, came)
        except AssertionError:
            # other weights are right where the log names what was not there
            assert " WARNING " in output, f"a wrong answer: {case}"
            return kind, "another answer, with a warning"
    return kind, "the right answer"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folders", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng, outcomes, began = random.Random(arguments.seed), Counter(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for run, (script, flags) in RUNS.items():
            status, output = attempt(script, f"{flags} {TRAINED} --log_dir {run}")
            assert status == 0, output
        base, expected = Path(folder) / "base", {}
        shutil.copytree("logs", base)
        for run in RUNS:
            for _ in range(50):  # every kind of command on a sound folder
                what, script, flags, result = command(run, rng)
                if (run, what) not in expected:
                    shutil.rmtree("logs")
                    shutil.copytree(base, "logs")
                    status, output = attempt(script, flags)
                    assert status == 0, output
                    expected[run, what] = result()
        for index in range(arguments.folders):
            run = rng.choice(sorted(RUNS))
            kind, outcome = use(run, rng, base, expected)
            outcomes[kind, outcome] += 1
        assert RunFolder("ae").hparams  # the folder of runs is where it was
        os.chdir("/")
    print(f"{arguments.folders} harmed folders, seed {arguments.seed}, in "
          f"{time.perf_counter() - began:.0f} s: no traceback, nothing changed in them")
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"  {kind:8} {count:4} {outcome}")


if __name__ == "__main__":
    main()
