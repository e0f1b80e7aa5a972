"""What a device can, and copies between it and this process' memory, where arrays of NumPy hold
what is planned."""

import os
import shutil
import sysconfig
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

COMPILERS = {"cuda": ("cc", "gcc", "clang"), "cpu": ("g++", "clang++", "c++")}


@torch.compiler.assume_constant_result
def compiler_problem(kind):
    """Why torch cannot compile code for devices of a kind, such as "cuda", as a sentence; None
    where it can."""
    return find_compiler_problem(kind)


@lru_cache
def find_compiler_problem(kind):
    """`compiler_problem`, looked for once."""
    if kind not in COMPILERS:
        return f"nothing is compiled for {kind}"
    from torch.utils._triton import has_triton  # asks for the driver: not when this is imported

    if kind == "cuda" and not has_triton():
        return "Triton is not installed or does not support this GPU"
    variable = {"cuda": "CC", "cpu": "CXX"}[kind]
    if not any(map(shutil.which, filter(None, (os.environ.get(variable), *COMPILERS[kind])))):
        return f"there is no compiler ({', '.join(COMPILERS[kind])})"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's header files are not there (on Debian: apt install python3-dev)"
    return None


def to_device(array, device):
    """An array as a tensor on a device; a GPU copies it while this process goes on."""
    tensor = torch.from_numpy(np.asarray(array, order="C"))  # rows: others would wait for a copy
    if device.type == "cuda" and torch.cuda.is_available():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensor):
    """A tensor as an array: the one way in which sampling methods wait for a device."""
    return tensor.cpu().numpy()
