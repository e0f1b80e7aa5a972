"""Kill training with SIGKILL at random moments, go on with --resume, and compare the weights.

    python tests/pull_the_plug.py --stage vqgan --kills 100

Every attempt is a process of its own that runs the script's `main`, forked from this one, so that
torch is imported once. When a run reaches its end its files must be those, to the bit, of a run
that nothing disturbed; then the next run begins, until there were enough kills. Prints how many
hit which phase. `latents` is the sampler's stage killed before it trains, mostly while it encodes.
"""

import argparse
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter

import torch

import train_sampler
import train_vqgan
from hparams.runs import RunFolder
from test_training import COMMON, SAMPLER, VQGAN, assert_identical, files_of
from utils import checkpoints, latents, training

PHASES = ("startup", "caching", "training", "checkpointing", "ending")
TRAINING = "--train_steps 24 --steps_per_checkpoint 4 --keep_checkpoints 2 --steps_per_log 1 --ema"
COMMANDS = {
    "vqgan": (train_vqgan.main, f"{VQGAN} {TRAINING}"),
    "sampler": (train_sampler.main, f"{SAMPLER} {TRAINING}"),
    "latents": (train_sampler.main, f"{SAMPLER} --train_steps 1 --horizontal_flip --ema {COMMON}"),
}
phase = mmap.mmap(-1, 1)  # shared with the forked processes: an index of PHASES


def announce(module, name, during, afterwards):
    """Let a function set the phase when it is called and when it returns."""
    function = getattr(module, name)

    def announced(*arguments, **options):
        phase[0] = PHASES.index(during)
        try:
            return function(*arguments, **options)
        finally:
            phase[0] = PHASES.index(afterwards)

    setattr(module, name, announced)


def attempt(main, flags, seconds=None):
    """Run `main` in a forked process and kill it after `seconds`.

    Returns (the phase it was killed in or None, seconds that it ran).
    """
    phase[0] = 0
    begun = time.perf_counter()
    process = os.fork()
    if process == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        status = 1
        try:
            main(flags.split())
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return PHASES[phase[0]], time.perf_counter() - begun
    assert os.WEXITSTATUS(status) == 0, "the script failed: see its log.txt"
    return None, time.perf_counter() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=COMMANDS, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(arguments.seed)
    announce(latents, "load_latents", "caching", "startup")
    train_sampler.load_latents = latents.load_latents
    announce(training, "training_loop", "training", "ending")
    train_vqgan.training_loop = train_sampler.training_loop = training.training_loop
    announce(checkpoints.Checkpoints, "save", "checkpointing", "training")
    latents.PART = 256  # several parts of the 1,618 digits
    run_main, flags = COMMANDS[arguments.stage]

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        attempt(train_vqgan.main, f"{VQGAN} --log_dir ae --train_steps 2")
        _, whole = attempt(run_main, f"{flags} --log_dir undisturbed")
        undisturbed, caches = files_of_last("undisturbed"), cached()
        kills, finished = Counter(), 0
        while kills.total() < arguments.kills:
            for path in latents.LATENTS.glob("*"):
                path.unlink()
            run, killed = f"run_{finished}", True
            while killed and kills.total() < arguments.kills:
                moment = rng.uniform(0, whole)
                killed, _ = attempt(run_main, f"{flags} --log_dir {run} --resume", moment)
                kills[killed] += killed is not None
            if killed:
                attempt(run_main, f"{flags} --log_dir {run} --resume")
            assert_identical(undisturbed, files_of_last(run))
            assert_identical(caches, cached())
            finished += 1
            print(f"run {finished} is bit-identical after {kills.total()} kills", flush=True)
        os.chdir("/")
    print(f"{arguments.stage}: {kills.total()} kills in {finished} runs, all bit-identical to the "
          "undisturbed one")
    for name in PHASES:
        print(f"  {name:14} {kills[name]:4}")


def files_of_last(run):
    """The models and optimisers of a run's last checkpoint."""
    return files_of(run, RunFolder(run).complete_steps()[-1])


def cached():
    """The files of cached ids, by name."""
    return {path.name: torch.load(path, weights_only=True)
            for path in sorted(latents.LATENTS.glob("*.pt"))}


if __name__ == "__main__":
    main()
