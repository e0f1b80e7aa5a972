"""What the benchmarks share: time, memory, untrained models and tables."""

import gc
import math
import platform
import re
import statistics
import time
from pathlib import Path

import torch

from hparams import get_sampler_hparams
from utils.evaluation.experiment import table
from utils.training.build import build_sampler


def untrained_sampler(side, flags, device):
    """A sampler of `side` x `side` ids with random weights; `flags` is a string."""
    H = get_sampler_hparams(
        "--dataset custom --custom_dataset_path . --ae_load_dir none --ae_load_step 1 "
        f"--img_size {16 * side} --attn_resolutions {side} --latent_shape 1 {side} {side} "
        f"{flags}".split()
    )
    torch.manual_seed(0)
    return build_sampler(H, torch.zeros(H.codebook_size, H.emb_dim)).to(device)


def run_seconds(function, device):
    """Seconds that `function()` takes; on a GPU, until that is done."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def milliseconds(function, device, seconds=1.0, least=3):
    """Median milliseconds of `function()`, called for about `seconds` and `least` times or more.

    One call before warms up what is built on the first: caches, threads, kernels. Where that one
    takes longer than ten times `seconds`, it is the figure.
    """
    first = run_seconds(function, device)
    if first > 10 * max(seconds, 1):
        return 1e3 * first
    times = []
    while len(times) < least or sum(times) < seconds:
        times.append(run_seconds(function, device))
    return 1e3 * statistics.median(times)


def resident_megabytes(field):
    """`VmRSS` (resident now) or `VmHWM` (its peak) of this process, by Linux's /proc."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


def peak_megabytes(function, device):
    """Megabytes (2^20 bytes) that `function()` takes at its peak beyond what was there before.

    On a GPU what torch takes of the card, which holds what CUDA graphs keep for themselves; on a
    CPU the resident memory of the process, which Linux alone tells: None elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        function()
        return (torch.cuda.max_memory_reserved(device) - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    except OSError:
        return None
    before = resident_megabytes("VmRSS")
    function()
    return resident_megabytes("VmHWM") - before


def machine(device):
    """A line that says what the figures were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        model = re.search(r"^model name\s*: (.*)", cpuinfo, re.MULTILINE)
        name = model[1] if model else platform.processor() or platform.machine()
        name += f", {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}"


def number(value, digits=3):
    """A figure with so many significant digits; `-` for None."""
    if value is None:
        return "-"
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"


def print_table(head, rows):
    """Print each of the rows, which may be a generator, as it comes, then all as a table."""
    shown = []
    for row in rows:
        print(*row, sep=", ", flush=True)
        shown.append(row)
    print("\n" + table(head, shown) + "\n")
