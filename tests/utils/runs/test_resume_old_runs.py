"""Runs that commit 0725476 wrote are resumed as it would have resumed them, but for rounding.

`tests/data/run_0725476` holds a run of each stage at step 3, its model files gzipped, and in
expected.json the commands that wrote them and what the same commit made of them by step 6: of each
tensor its sum and its norm.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from helpers import DATA, ROOT

OLD = DATA / "run_0725476"

COMMON = (
    "--dataset digits --ema --ema_beta 0.9 --horizontal_flip --steps_per_log 1 --steps_per_eval 6 "
    "--steps_per_save_output 0 --seed 3 --device cpu --no_visdom"
)
COMMANDS = {
    "vqgan": (
        f"train_vqgan.py --img_size 8 --ch_mult 1 1 --attn_resolutions 4 --emb_dim 8 "
        f"--codebook_size 16 --ndf 8 --disc_layers 1 --disc_start_step 2 --diff_aug "
        f"--batch_size 4 {COMMON}"
    ),
    "prior": (
        f"train_sampler.py --sampler absorbing --ae_load_dir vqgan --ae_load_step 3 "
        f"--attention hydra --kernel_sizes 1 3 --bert_n_emb 16 --bert_n_head 4 --bert_n_layers 2 "
        f"--total_steps 16 --sample_steps 8 --optimizer muon --weight_decay 0.01 "
        f"--warmup_iters 4 --embd_pdrop 0.1 --resid_pdrop 0.1 --clip_grad_norm 1 "
        f"--batch_size 8 {COMMON}"
    ),
}

def tensors_of(tree, where=""):
    """{path: tensor} of what lies in dicts and lists, ordered by the parts of the paths."""
    if isinstance(tree, torch.Tensor):
        return {where: tree}
    if not isinstance(tree, (dict, list, tuple)):
        return {}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = {}
    for key, value in sorted(items, key=lambda item: str(item[0])):
        found |= tensors_of(value, f"{where}/{key}")
    return found


def figures(tensors):
    """{name: [sum, norm]} of the tensors with two axes or more.

    The gradients of many biases, which a normalisation takes out again, are rounding errors, and
    Adam makes them as large as any: other arithmetic gives other ones.
    """
    sums = {name: value.double() for name, value in tensors.items() if value.dim() >= 2}
    return {name: [float(f"{number:.9g}") for number in (value.sum(), value.norm())]
            for name, value in sums.items()}


def files_of(run, step):
    """{name: tensors} of the model and optimiser files of a checkpoint in a run's folder."""
    paths = sorted(run.glob(f"saved_models/*_{step}.th"))
    return {path.name: tensors_of(torch.load(path, weights_only=True)) for path in paths}


def is_close(numbers, expected, tolerance=1e-3):
    """Whether sum and norm differ by at most `tolerance` times the norm."""
    return all(abs(a - b) <= tolerance * expected[1] for a, b in zip(numbers, expected))


@pytest.fixture
def old_runs(tmp_path):
    """A folder with the runs as the old commit left them."""
    for run in COMMANDS:
        shutil.copytree(OLD / run, tmp_path / "logs" / run)
    for path in tmp_path.rglob("*.th.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    return tmp_path


def resume_and_compare(name, folder):
    run, expected = folder / "logs" / name, json.loads((OLD / "expected.json").read_text())
    record = (run / "metrics.jsonl").read_text()
    script, *flags = COMMANDS[name].split()
    flags += ["--log_dir", name, "--resume", "--train_steps", "6"]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags], cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (run / "metrics.jsonl").read_text().startswith(record)
    files, entries = files_of(run, 6), expected["files"][name]
    assert set(files) == set(entries)
    for file, entry in entries.items():
        found = figures(files[file])
        assert set(found) == set(entry["figures"]), file
        assert not [t for t in found if not is_close(found[t], entry["figures"][t])], file


def test_a_vqgan_run_of_commit_0725476_resumes_to_the_same_weights(old_runs):
    resume_and_compare("vqgan", old_runs)


def test_a_sampler_run_of_commit_0725476_resumes_to_the_same_weights(old_runs):
    resume_and_compare("prior", old_runs)
