"""Runs that commit 0725476 wrote are resumed as it would have resumed them, to the bit.

`tests/data/run_0725476` holds a run of each stage at step 3, its model files gzipped, and in
expected.json the commands that wrote them and what the same commit made of them by step 6.
"""

import gzip
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings

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

# Arithmetic that is the same on every x86-64 machine: one thread, and the code for the oldest
# processors in torch (ATEN), MKL and the C library. What no variable decides RUN does: oneDNN and
# NNPACK, which choose their algorithms by the machine's caches and instructions, are off, and
# square roots are exact, where MKL improves on an approximation that each processor has its own of.
PIN = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=" + ",".join(
        # from glibc 2.33 on, and before
        f"-{name},-{name}_Usable" for name in ("AVX", "AVX2", "AVX512F", "FMA", "FMA4")
    ),
}

# Runs a script, given with its flags, and leaves in the file `arithmetic` a hash of what some
# functions and a small network's step come to here: the C library's logarithm, say, may be
# another one in another version.
RUN = """
import hashlib, runpy, sys
import numpy as np
import torch
from torch.nn import functional as F

torch.backends.mkldnn.set_flags(False)
torch.backends.nnpack.set_flags(False)
square_roots = torch.library.Library("aten", "IMPL")
square_roots.impl(
    "sqrt", lambda x: torch.from_numpy(np.asarray(np.sqrt(x.detach().numpy()))), "CPU"
)

x = torch.arange(1, 20001) / 4096
names = ("exp", "log", "sin", "cos", "tanh", "erf", "sqrt", "rsqrt")
values = [getattr(torch, name)(x) for name in names]
torch.manual_seed(0)
images, logits = torch.randn(4, 32, 16, 16), torch.randn(128, 64)
kernel, matrix = (torch.randn(shape, requires_grad=True) for shape in ((32, 32, 3, 3), (64, 64)))
h = F.silu(F.group_norm(F.conv2d(images, kernel, padding=1), 32)).flatten(2).mT[:, None]
h = F.scaled_dot_product_attention(h, h, h).square().mean()
h = h + F.cross_entropy(F.gelu(F.layer_norm(logits @ matrix, (64,))), torch.arange(128) % 64)
h.backward()
values += [h.detach(), kernel.grad, matrix.grad, matrix.detach() @ matrix.grad.mT]
with open("arithmetic", "w") as file:
    file.write(hashlib.sha256(b"".join(v.numpy().tobytes() for v in values)).hexdigest())

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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


def sha256(tensors):
    """Hash of the names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
        [sys.executable, "-c", RUN, str(ROOT / script), *flags], cwd=folder,
        env={**os.environ, **PIN, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (run / "metrics.jsonl").read_text().startswith(record)
    files, entries = files_of(run, 6), expected["files"][name]
    assert set(files) == set(entries)
    if (
        platform.machine() in ("x86_64", "AMD64") and torch.__version__.startswith("2.14.")
        and (folder / "arithmetic").read_text() == expected["arithmetic"]
    ):
        assert {f: sha256(files[f]) for f in files} == {f: entries[f]["sha256"] for f in files}
        return
    warnings.warn("this machine's arithmetic is another one: compared within a tolerance")
    for file, entry in entries.items():
        found = figures(files[file])
        assert set(found) == set(entry["figures"]), file
        assert not [t for t in found if not is_close(found[t], entry["figures"][t])], file


def test_a_vqgan_run_of_commit_0725476_resumes_to_the_same_weights(old_runs):
    resume_and_compare("vqgan", old_runs)


def test_a_sampler_run_of_commit_0725476_resumes_to_the_same_weights(old_runs):
    resume_and_compare("prior", old_runs)
