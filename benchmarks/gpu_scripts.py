"""The check of benchmarks/gpu.py that runs the real scripts: both stages train, resume to the bit,
sample and are measured, on the digits at tiny sizes, in a folder of its own."""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from utils.files import load_file

ROOT = Path(__file__).resolve().parent.parent
STEPS = 8
SEVERAL = 15e9  # bytes of a card on which nine scripts run at once: "16 GB" are somewhat less
AUTOENCODER = (
    "train_vqgan.py --dataset digits --nf 8 --norm_groups 4 --res_blocks 1 --emb_dim 8 "
    "--batch_size 8 --disc_start_step 3 --disc_layers 1 --ndf 8 --validation_images 16"
)
SAMPLER = (
    "train_sampler.py --sampler absorbing --dataset digits --bert_n_emb 64 --bert_n_head 4 "
    "--bert_n_layers 2 --batch_size 8 --validation_images 16 --sample_steps 4"
)
ON_GPU = " --img_size 64 --attn_resolutions 16"  # 16x16 ids, of which a GPU's attention takes care
CASES = {  # flags of the autoencoder's training and of the sampler's
    "float32": ("--recipe published", "--no_compile"),
    "amp": ("--amp --codebook_start_step 2", "--amp --no_compile --no_cuda_graphs"),
    "amp, compiled": ("--amp --recipe published", "--amp --compile"),
}


class Workplace:
    """Runs scripts in an empty folder."""

    def __init__(self, setup, folder, report):
        self.setup, self.folder, self.report = setup, folder, report

    def run(self, command):
        """Run a script with its flags. Raises RuntimeError with the end of what it printed, and
        TimeoutExpired where no time is left, or too little."""
        left = self.report.left
        if left <= 0:
            raise subprocess.TimeoutExpired(command, 0)
        script, *flags = command.split()
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        flags += ["--no_visdom", "--device", str(self.setup.device), "--num_workers", "0"]
        output = subprocess.run(
            [sys.executable, str(ROOT / script), *flags], cwd=self.folder, env=environment,
            capture_output=True, text=True, timeout=left,
        )
        if output.returncode:
            raise RuntimeError(f"{command}: exit code {output.returncode}\n"
                               f"{(output.stderr or output.stdout)[-1500:]}")
        self.report.say(f"{script} {' '.join(flags)}"[:160])

    def train(self, command, name):
        """Train `STEPS` steps, and the second half of them again; what differs, in words."""
        every = f"--steps_per_eval {STEPS // 2} --steps_per_checkpoint {STEPS // 2} --deterministic"
        last = f"{command} {every} --ema --train_steps"
        self.run(f"{last} {STEPS} --log_dir {name}_whole")
        again = f"--log_dir {name}_again --load_dir {name}_whole --load_step {STEPS // 2}"
        self.run(f"{last} {STEPS} {again}")
        return self.difference(f"{name}_whole", f"{name}_again")

    def difference(self, first, second):
        """Names of the files of the last step that differ between two runs, and what in them."""
        folders = [Path(self.folder) / "logs" / run / "saved_models" for run in (first, second)]
        names = [sorted(path.name for path in folder.glob(f"*_{STEPS}.th")) for folder in folders]
        if not names[0] or names[0] != names[1]:
            return f"files {names[0]} and {names[1]}"
        different = [
            name for name in names[0]
            if not equal(*(load_file(folder / name) for folder in folders))
        ]
        return ", ".join(different)


def in_turn(functions, at_once):
    """Call functions one after another, or at once in threads."""
    with ThreadPoolExecutor(len(functions) if at_once else 1) as pool:
        for future in [pool.submit(function) for function in functions]:
            future.result()


def equal(first, second):
    """Whether two contents of files are the same to the bit."""
    if torch.is_tensor(first):
        return torch.is_tensor(second) and torch.equal(first.cpu(), second.cpu())
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def scripts(setup, report):
    """Both stages train, resume to the bit, sample, are measured, by the scripts themselves."""
    if "Exclusive" in (report.facts.get("compute_mode") or ""):
        report.pass_over("scripts", "the card's compute mode is exclusive: it takes no second "
                         "process beside this one (nvidia-smi --compute-mode DEFAULT lets it)")
        return
    cases = {"amp": CASES["amp"]} if setup.tiny else CASES
    # a core is for one process, a large card for several
    at_once = not setup.tiny and report.facts.get("memory_bytes", 0) >= SEVERAL
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(setup, folder, report)
        in_turn([lambda case=case: check_case(place, *case, at_once) for case in cases.items()],
                at_once)


def check_case(place, name, flags, at_once):
    """Check the chain of scripts with these flags of the two trainings."""
    report, short = place.report, name.replace(", ", "_")
    autoencoder = AUTOENCODER + (ON_GPU if place.setup.on_gpu else "")
    sampler = f"{SAMPLER} --ae_load_dir autoencoder_{short}_whole --ae_load_step {STEPS}"
    for stage, command in (
        ("autoencoder", f"{autoencoder} {flags[0]}"), ("sampler", f"{sampler} {flags[1]}")
    ):
        try:
            found = place.train(command, f"{stage}_{short}")
        except subprocess.TimeoutExpired:
            report.pass_over("scripts train and resume", "passed over for time, with what follows",
                             stage=stage, case=name)
            return
        except RuntimeError as error:
            report.check("scripts train and resume", False, str(error), stage=stage, case=name)
            return
        report.check("scripts train and resume", not found, found or "equal to the bit",
                     stage=stage, case=name)
    amp = "--amp" if "--amp" in flags[1] else ""
    run = f"--load_dir sampler_{short}_whole --load_step {STEPS} --ema {amp} --sample_steps 4"
    commands = [
        f"experiments/get_samples.py --n_samples 8 --log_dir samples_{short}",
        f"experiments/calc_FID.py --n_samples 16 --feature_extractor efficientnet_lite0 "
        f"--log_dir fid_{short}",
        f"experiments/digits_report.py --n_samples 32 --log_dir report_{short}",
    ]
    if place.setup.tiny:  # the features of all digits take a core a minute
        commands = commands[:1]
    in_turn([
        lambda command=command: check_script(place, f"{command} {run}", name)
        for command in commands
    ], at_once)


def check_script(place, command, name):
    """Check that an experiment runs and keeps its results."""
    script = command.partition(" ")[0]
    try:
        place.run(command)
        results = Path(place.folder) / "logs" / command.split("--log_dir ")[1].split()[0]
        found = "" if (results / "results.json").exists() else "no results.json"
    except subprocess.TimeoutExpired:
        place.report.pass_over("scripts measure", "passed over for time", script=script, case=name)
        return
    except RuntimeError as error:
        found = str(error)
    place.report.check("scripts measure", not found, found or "results kept", script=script,
                       case=name)
