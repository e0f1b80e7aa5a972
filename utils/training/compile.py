"""Whether torch.compile is to be used: on GPUs where what it needs is there."""

import contextlib
import importlib.util
import shutil
import sysconfig
from pathlib import Path

import torch


def compile_problem(device):
    """Why torch.compile cannot make code for a device here, as a sentence; None where it can."""
    compilers = ("cc", "gcc", "clang") if device.type == "cuda" else ("g++", "clang++", "c++")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not any(map(shutil.which, compilers)):
        return f"there is no compiler ({', '.join(compilers)})"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's header files are not there (on Debian: apt install python3-dev)"
    return None


def compiles(H, device, log):
    """Whether H asks for compiled networks, or leaves it open where a GPU can have them; the log
    says what came of it."""
    if H.compile is False or (H.compile is None and device.type != "cuda"):
        return False
    problem = compile_problem(device)
    if problem:
        log.warning(f"nothing is compiled, which makes training slower: {problem}")
        return False
    # code that does not come about is run as it is, with a warning of torch's
    torch._dynamo.config.suppress_errors = H.compile is None
    log.info("the first steps take longer: torch.compile makes the networks' code "
             "(--no_compile does without)")
    return True


def only_compiled(compiled):
    """Context in which nothing new is compiled where networks are `compiled`: what no code is there
    for, such as a smaller batch, runs as it is."""
    if not compiled:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("eager_on_recompile")
