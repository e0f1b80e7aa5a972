"""The checks of benchmarks/gpu.py: attention, steps that do not wait, memory. What the scripts do
is checked in gpu_scripts.py."""

import contextlib
import math
from unittest import mock

import torch
from gpu_setup import STAGES, Operations, fastest_convolutions, out_of_memory

from measure import peak_megabytes
from models.neighborhood_attention import neighborhood_attention_2d
from models.prior.attention import HydraNeighborhoodAttention
from utils.training import step as training_step
from utils.training.cuda_graphs import capture_problem
from utils.training.processes import Processes

# Largest error of outputs and of gradients, as shares of the largest entry. bfloat16 has 8 bits,
# float16 11; a gradient of the bias is a sum over the images and the whole grid.
TOLERANCES = {
    torch.float32: (2e-5, 1e-4), torch.bfloat16: (2e-2, 4e-2), torch.float16: (4e-3, 8e-3),
}
OPERATOR_CASES = [  # grid, kernel, dilation
    ((16, 16), 7, 1), ((16, 16), 3, 1), ((16, 16), 5, 3), ((17, 23), 5, 2), ((17, 23), 3, 4),
]
LAYER_CASES = [  # grid, kernels, dilations, rpb, rope
    ((16, 16), [3, 7], [1], False, True), ((16, 16), [3, 7], [1], True, False),
    ((24, 16), [3, 3, 5], [1, 4, 2], True, True),
]
COMPILED = ("flex",)  # backends that compile each case on a GPU, for seconds
MOST_SECONDS = 90  # of the whole check of attention
FIRST_STEPS = 20  # in which float16's scale of 65536 comes down to one without overflow
HEADS, WIDTH = 8, 64  # of the published denoiser


def largest(errors):
    """The largest of numbers; NaN if one of them is, which Python's `max` may pass over."""
    return torch.tensor(errors, dtype=torch.float64).max().item()


@contextlib.contextmanager
def where_it_fits(report, what, **about):
    """Context in which a case that does not fit into memory is passed over."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        report.pass_over(what, "does not fit, passed over", **about)


# --- attention -----------------------------------------------------------------------------------


def attention(setup, report):
    """Every backend against `dense` in float64: outputs and gradients, of the call and the layer.

    A backend that has no code for a case says so by ValueError, which is told and no failure. Where
    cases are compiled, which takes seconds each, some of them do.
    """
    operators, layers = OPERATOR_CASES, LAYER_CASES
    if setup.tiny:
        operators, layers = [((6, 7), 3, 2)], [((7, 8), [3, 7], [1], True, True)]
    end = report.elapsed + min(MOST_SECONDS, report.left)
    for backend in ("dense", "tiled", "natten", *COMPILED):
        for name in dict.fromkeys((setup.half, "float32", *setup.halves)):
            chosen, dtype = (operators, layers), getattr(torch, name)
            if setup.on_gpu and backend in COMPILED:
                most = name == setup.half
                chosen = operators[:: 3 if most else 6], layers[: 3 if most else 1]
            cases = [operator_case(*case, bias) for case in chosen[0] for bias in (False, True)]
            cases += [layer_case(*case) for case in chosen[1]]
            for case in cases:
                if report.elapsed > end:
                    report.say(f"passed over for time: {backend}, {dtype}, {case[0]}")
                else:
                    check_case(setup, report, case, backend, dtype)


def operator_case(grid, kernel, dilation, bias):
    """(name, function from a backend, type and device to [output, *gradients])."""
    def run(backend, dtype, device):
        torch.manual_seed(0)
        tensors = [torch.randn(2, *grid, HEADS, WIDTH) for _ in range(4)]
        *leaves, weights = [x.to(device, dtype) for x in tensors]
        if bias:
            table = 0.2 * torch.randn(HEADS, 2 * kernel - 1, 2 * kernel - 1)
            leaves.append(table.to(device, torch.promote_types(dtype, torch.float32)))
        leaves = [x.requires_grad_() for x in leaves]
        out = neighborhood_attention_2d(
            *leaves[:3], kernel, dilation, rpb=leaves[3] if bias else None, backend=backend
        )
        return [out, *torch.autograd.grad((out * weights).sum(), leaves)]

    height, width = grid
    name = f"{height}x{width}, kernel {kernel}, dilation {dilation}"
    return name + (", bias" if bias else ""), run


def layer_case(grid, kernels, dilations, rpb, rope):
    """The same of a whole layer of attention, under autocast as in training."""
    def run(backend, dtype, device):
        torch.manual_seed(0)
        layer = HydraNeighborhoodAttention(
            HEADS * WIDTH, kernels, HEADS, dilations=dilations, rpb=rpb, rope=rope, backend=backend
        )
        x, weights = torch.randn(2, 2, *grid, HEADS * WIDTH)
        wide = torch.promote_types(dtype, torch.float32)
        layer, x, weights = layer.to(device, wide), x.to(device, wide), weights.to(device, wide)
        leaves = [x.requires_grad_(), *layer.parameters()]
        with torch.autocast(device.type, dtype, enabled=dtype != wide):
            out = layer(x)
        return [out, *torch.autograd.grad((out * weights).sum(), leaves)]

    height, width = grid
    name = f"layer {height}x{width}, kernels {kernels}, dilations {dilations}"
    return name + (", rpb" if rpb else "") + (", rope" if rope else ""), run


def check_case(setup, report, case, backend, dtype):
    """Check one case of one backend."""
    name, run = case
    facts = dict(backend=str(backend), dtype=str(dtype).removeprefix("torch."), case=name)
    expected = reference(setup, name, run, dtype)
    try:
        found = run(backend, dtype, setup.device)
    except ValueError as error:
        report.say(f"{facts['backend']}, {facts['dtype']}, {name}: passed over: {error}")
        return
    except Exception as error:
        report.check("attention", False, f"{type(error).__name__}: {error}"[:500], **facts)
        return
    errors = [relative_error(x, y) for x, y in zip(found, expected)]
    of_output, of_gradients = errors[0], largest(errors[1:])
    limits = TOLERANCES[dtype]
    holds = of_output <= limits[0] and of_gradients <= limits[1]
    detail = f"errors {of_output:.1e} and {of_gradients:.1e}, allowed {limits[0]} and {limits[1]}"
    report.check("attention", holds, detail, **facts)


REFERENCES = {}


def reference(setup, name, run, dtype):
    """[output, *gradients] of `dense` in float64, of the same numbers."""
    if name not in REFERENCES:
        REFERENCES[name] = run("dense", torch.float64, setup.device)
    return REFERENCES[name]


def relative_error(found, expected):
    """The largest difference of two tensors as a share of the largest entry expected."""
    scale = expected.abs().max().clamp(min=1e-30)
    return ((found.double() - expected).abs().max() / scale).item()


# --- steps that do not wait ----------------------------------------------------------------------


def waits(setup, report):
    """A step of each stage does not wait for the device.

    On a GPU torch raises where it would wait; elsewhere the operations that would are counted.
    """
    ways = [("float32", False), *((half, False) for half in setup.halves)]
    ways.append((setup.half, setup.on_gpu))  # elsewhere there are no graphs
    for stage in STAGES:
        for precision, graphs in ways:
            about = dict(stage=stage, precision=precision, graphs=graphs)
            if report.spent("a step without waits", **about):
                continue
            with where_it_fits(report, "a step without waits", **about):
                found = waits_of_stage(setup, **about)
                report.check("a step without waits", not found, found or "none", **about)
            setup.clean()


def waits_of_stage(setup, stage, precision, graphs):
    """What the third step of a stage waits for, in words."""
    step = setup.step(stage, precision)
    if graphs:
        step.capture()
    for _ in range(2):
        step()
    setup.wait()
    return waits_of(step, setup)


def waits_of(step, setup):
    """What a call of `step` waits for, in words; "" for nothing."""
    if not setup.on_gpu:
        as_on_gpu = mock.patch.object(training_step, "ASYNCHRONOUS", (setup.device.type,))
        with as_on_gpu, Operations() as operations:
            step()
        return ", ".join(f"{count} {name}" for name, count in operations.waits.items())
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        return str(error).splitlines()[0] + where(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def where(error):
    """The last line of this project's code in an exception's traceback, in words."""
    place, frame = "", error.__traceback__
    while frame:
        path = frame.tb_frame.f_code.co_filename
        if "site-packages" not in path and "/benchmarks/gpu" not in path:
            place = f" ({path.rpartition('/')[2]}, line {frame.tb_lineno})"
        frame = frame.tb_next
    return place


# --- CUDA graphs ---------------------------------------------------------------------------------


def graphs(setup, report):
    """Steps whose kernels are captured and replayed compute what other steps do."""
    problem = capture_problem(setup.sampler_settings(), Processes(device=setup.device))
    if problem:
        report.say(f"no CUDA graphs: {problem}")
        return
    for stage in STAGES:
        if report.spent("CUDA graphs compute the same", stage=stage):
            continue
        with where_it_fits(report, "CUDA graphs compute the same", stage=stage):
            plain = values_of(setup, stage)
            setup.clean()
            holds, found = same_values(plain, values_of(setup, stage, replays=len(plain)))
            report.check("CUDA graphs compute the same", holds, found, stage=stage)
        setup.clean()


def values_of(setup, stage, replays=0):
    """Losses and norms of gradients of a stage's first steps: with graphs as many as `replays`,
    else three, or more until the last but one is finite."""
    step, values = setup.step(stage, setup.half), []
    if replays:
        step.capture()
    while len(values) < (replays or FIRST_STEPS):
        values.append(step().values.tolist())
        if not replays and len(values) > 2 and all_finite(values[-2]):
            break
    return values


def all_finite(values):
    return all(map(math.isfinite, values))


def same_values(plain, replayed):
    """(whether replayed steps have the values of others, what was found).

    The first finite step decides: up to then no weight has changed. (Later ones of an autoencoder
    part, as its discriminator magnifies what atomic additions make of rounding.) A step after it
    has other values, or nothing is computed anew.
    """
    first = next((n for n, values in enumerate(plain[:-1]) if all_finite(values)), None)
    if first is None:
        return False, f"none of the first {len(plain)} steps has finite losses and gradients"
    pairs = zip(plain[first], replayed[first])
    error = largest([abs(a - b) / max(abs(a), 1e-6) for a, b in pairs])
    holds = error < 1e-2 and replayed[first] != replayed[first + 1]
    return holds, ("equal to the bit" if plain == replayed
                   else f"step {first + 1}: errors of {error:.1e}")


# --- memory --------------------------------------------------------------------------------------

AMOUNTS = [  # flags of a training beside the published ones
    (stage, precision, flags)
    for stage in STAGES
    for precision, flags in (
        ("half", ""), ("float32", ""), ("half", "--checkpoint_blocks"),
    )
]  # "half" is what --amp takes on the card


def memory(setup, report):
    """Peak memory of a step at the published batch, and at twice that: what an image costs.

    Without a GPU, how much the process grows. What does not fit has no value. cuDNN looks long for
    its algorithms of float32, so twice the batch is left out there.
    """
    for stage, precision, flags in AMOUNTS:
        precision = setup.precision(precision)
        published = getattr(setup, f"{stage}_settings")().batch_size
        for batch in (published, 2 * published)[: 1 if precision == "float32" else 2]:
            about = dict(stage=stage, precision=precision, flags=flags, batch=batch)
            if report.spent("peak memory", **about):
                continue
            try:
                peak = peak_of_training(setup, stage, precision, f"--batch_size {batch} {flags}")
            except Exception as error:
                if not out_of_memory(error):
                    raise
                peak = None
            report.figure("peak memory", peak, "MB", **about)


def peak_of_training(setup, stage, precision, flags):
    """Megabytes (2^20 bytes) that a model, its optimiser and two steps take at their peak; on a GPU
    with the graphs that are captured by default."""
    def train():
        step = setup.step(stage, precision, flags)
        if capture_problem(step.H, step.processes) is None:
            step.capture()
        step()
        step()
        setup.wait()

    setup.clean()
    with fastest_convolutions():
        return peak_megabytes(train, setup.device)
