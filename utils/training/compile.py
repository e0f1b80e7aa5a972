"""Whether torch.compile is to be used: on GPUs where what it needs is there."""

import contextlib

import torch

from models.devices import compiler_problem


def compiles(H, device, log, pays_on=("cuda",)):
    """Whether H asks for compiled networks, or leaves it open where they pay, on devices of the
    kinds `pays_on`; the log says what came of it."""
    if H.compile is False or (H.compile is None and device.type not in pays_on):
        return False
    problem = compiler_problem(device.type)
    if problem:
        log.warning(f"nothing is compiled, which makes training slower: {problem}")
        return False
    # code that does not come about is run as it is, with a warning of torch's
    torch._dynamo.config.suppress_errors = H.compile is None
    log.info("training begins later: torch.compile makes the networks' code (--no_compile does "
             "without)")
    return True


def only_compiled(compiled):
    """Context in which nothing new is compiled where networks are `compiled`: what no code is there
    for, such as a smaller batch, runs as it is."""
    if not compiled:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("eager_on_recompile")
