"""End a run by signals at random moments, go on with --resume, and compare what it comes to.

    PYTHONPATH=. python tests/pull_the_plug.py --stage vqgan --kills 100

Half of the signals are SIGKILL, a quarter each SIGTERM and SIGHUP, all to the process group. Every
attempt is a process of its own that runs the script, forked from this one, so that torch is
imported once. When a run reaches its end its files must be those, to the bit, of a run that nothing
disturbed; then the next run begins, until there were enough signals. Prints how many ended which
phase. `latents` is the sampler's stage ended before it trains, mostly while it encodes;
`experiment` is calc_FID.py with a tiny extractor, which must come to the same ids and figures.
`modern` is an autoencoder with all parts of that recipe.
"""

import argparse
import contextlib
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter

import numpy as np
import torch
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

import train_sampler
import train_vqgan
from experiments import calc_FID
from helpers import TinyExtractor
from models import AbsorbingDiffusion
from test_training import COMMON, SAMPLER, VQGAN, assert_identical, files_of
from utils.data import latents
from utils.evaluation import experiment, features
from utils.evaluation import measure as measuring
from utils.evaluation import reference
from utils.runs.folder import RunFolder
from utils.runs.script import run_script
from utils.training import checkpoints

PHASES = ("startup", "caching", "training", "checkpointing", "drawing", "extracting", "reporting",
          "ending")
TRAINING = "--train_steps 24 --steps_per_checkpoint 4 --keep_checkpoints 2 --steps_per_log 1 --ema"
MODERN = (
    f"--dataset digits --recipe modern --img_size 32 --nf 8 --norm_groups 4 --ch_mult 1 1 "
    f"--attn_resolutions 16 --emb_dim 8 --codebook_size 16 --ndf 8 --batch_size 4 --amp "
    f"--perceptual_weight 0.15 --codebook_start_step 3 --codebook_revival 2 --entropy_weight 0.01 "
    f"--disc_input features --disc_start_step 6 --disc_lead_steps 1 --disc_fade_steps 3 "
    f"--steps_per_eval 4 {COMMON}"
)
COMMANDS = {
    "vqgan": (train_vqgan.main, f"{VQGAN} {TRAINING}"),
    "modern": (train_vqgan.main, f"{MODERN} {TRAINING}"),
    "sampler": (train_sampler.main, f"{SAMPLER} {TRAINING}"),
    "latents": (train_sampler.main, f"{SAMPLER} --train_steps 1 --horizontal_flip --ema {COMMON}"),
    "experiment": (
        calc_FID.main, "--load_dir prior --load_step 2 --n_samples 500 --sample_steps 4 --kid "
        "--kid_subset_size 99 --no_visdom"
    ),
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


def attempt(main, flags, seconds=None, number=signal.SIGKILL):
    """Run `main` in a forked process and send its group a signal after `seconds`.

    Returns (the phase that the signal ended it in or None, seconds that it ran).
    """
    phase[0] = 0
    begun = time.perf_counter()
    process = os.fork()
    if process == 0:
        os.setsid()
        sys.stdout = sys.stderr = open(os.devnull, "w")
        status = 1
        try:
            run_script(lambda: main(flags.split()))
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):  # it has ended, or has no group yet
            os.killpg(process, number)
    reached = PHASES[phase[0]]
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status in (-number, 128 + number):
        return reached, time.perf_counter() - begun
    assert status == 0, f"the script failed with {status}: see its log.txt"
    return None, time.perf_counter() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=COMMANDS, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(arguments.seed)
    announce_phases()
    latents.PART = features.PART = 256  # several parts of the 1,797 digits
    run_main, flags = COMMANDS[arguments.stage]
    outcome = measured if arguments.stage == "experiment" else trained

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        attempt(train_vqgan.main, f"{VQGAN} --log_dir ae --train_steps 2")
        if arguments.stage == "experiment":
            attempt(train_sampler.main, f"{SAMPLER} --log_dir prior --train_steps 2")
        _, whole = attempt(run_main, f"{flags} --log_dir undisturbed")
        undisturbed, kills, by, finished = outcome("undisturbed"), Counter(), Counter(), 0
        quarter = arguments.kills // 4
        numbers = [signal.SIGTERM] * quarter + [signal.SIGHUP] * quarter
        numbers += [signal.SIGKILL] * (arguments.kills - len(numbers))
        rng.shuffle(numbers)
        while kills.total() < arguments.kills:
            for cache in (latents.LATENTS, reference.STATISTICS):
                shutil.rmtree(cache, ignore_errors=True)
            run, killed = f"run_{finished}", True
            while killed and kills.total() < arguments.kills:
                moment = rng.uniform(0, whole)
                number = numbers[kills.total()]
                killed, _ = attempt(run_main, f"{flags} --log_dir {run} --resume", moment, number)
                if killed:
                    kills[killed] += 1
                    by[number.name] += 1
            if killed:
                attempt(run_main, f"{flags} --log_dir {run} --resume")
            assert_identical(undisturbed, outcome(run))
            finished += 1
            print(f"run {finished} is bit-identical after {kills.total()} kills", flush=True)
        os.chdir("/")
    print(f"{arguments.stage}: {kills.total()} kills in {finished} runs, all bit-identical to the "
          "undisturbed one")
    for name, count in [*by.items(), *((name, kills[name]) for name in PHASES)]:
        print(f"  {name:14} {count:4}")


def announce_phases():
    """Let what takes long in training and in experiments say what it is."""
    announce(latents, "load_latents", "caching", "startup")
    train_sampler.load_latents = latents.load_latents
    for stage in (train_vqgan.VQGANTraining, train_sampler.SamplerTraining):
        announce(stage, "train", "training", "ending")
    announce(checkpoints.Checkpoints, "save", "checkpointing", "training")
    # what an experiment does; training draws nothing here
    announce(measuring, "real_of", "caching", "extracting")
    announce(AbsorbingDiffusion, "sample", "drawing", "extracting")
    announce(experiment.Experiment, "report", "reporting", "ending")
    FEATURE_EXTRACTORS_REGISTRY["tiny"] = TinyExtractor
    features.NAMES["inception"] = "tiny"


def trained(run):
    """The models and optimisers of a run's last checkpoint, and all cached ids."""
    return files_of(run, RunFolder(run).complete_steps()[-1]), tensors(latents.LATENTS)


def measured(run):
    """The figures of an experiment, its samples' ids, and the statistics and the features of real
    images."""
    results = experiment.read_results(RunFolder(run).results)
    figures = [result["figures"] for result in results.values()]
    arrays = {path.name: torch.from_numpy(np.load(path)) for path in
              sorted(reference.STATISTICS.glob("*.npy"))}
    return figures, tensors(RunFolder(run).samples), tensors(reference.STATISTICS), arrays


def tensors(folder):
    """The contents of the files in a folder that are written by torch, by name."""
    return {path.name: torch.load(path, weights_only=True)
            for path in sorted(folder.rglob("*.pt"))}


if __name__ == "__main__":
    main()
