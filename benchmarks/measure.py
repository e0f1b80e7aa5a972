"""How the benchmarks measure time and memory, and how they print what they found."""

import gc
import math
import platform
import statistics
import time
from pathlib import Path

import torch


def wait_for(device):
    """Wait until the device has done what it was told: a GPU runs behind the program."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(function, device, seconds=1.0, least=3):
    """Median milliseconds of `function()`, called for about `seconds` and `least` times or more.

    One call before warms up what is built on the first: caches, threads, kernels. Where that one
    takes longer than ten times `seconds`, it is the figure.
    """
    began = time.perf_counter()
    function()
    wait_for(device)
    if time.perf_counter() - began > 10 * max(seconds, 1):
        return 1e3 * (time.perf_counter() - began)
    times, began = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        function()
        wait_for(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def resident_megabytes(field):
    """`VmRSS` (resident now) or `VmHWM` (its peak) of this process, by Linux's /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}")


def peak_megabytes(function, device):
    """Megabytes (2^20 bytes) that `function()` takes at its peak beyond what was there before.

    On a GPU what torch's allocator hands out; on a CPU the resident memory of the process, which
    Linux alone tells: None elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    except OSError:
        return None
    before = resident_megabytes("VmRSS")
    function()
    return resident_megabytes("VmHWM") - before


def machine(device):
    """A line that says what the figures were measured on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        if Path("/proc/cpuinfo").exists():
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next((x.split(": ")[1] for x in lines if x.startswith("model name")), name)
        name += f", {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}"


def table(head, rows):
    """Rows of strings as a Markdown table."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value, digits=3):
    """A figure with so many significant digits; `-` for None."""
    if value is None:
        return "-"
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"
