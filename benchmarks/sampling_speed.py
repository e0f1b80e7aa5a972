"""How much faster the samplers are than the published loops, written plainly.

    python benchmarks/sampling_speed.py

With one denoiser for 16x16 ids (random weights: what it costs does not depend on them): eight
samples in 256 steps; canvases of 32x32 and 64x64 ids, one id a call, by windows and natively; and
an autoregressive prior with and without its cache. Prints a Markdown table. A canvas is timed at
some ids spread over it, since the plain loop would take hours. Ten minutes on two cores.
"""

import argparse
import copy
import statistics
from functools import partial

import torch

from measure import machine, number, run_seconds, untrained_sampler
from models.sampling.canvas import WindowedDenoiser
from models.sampling.samplers import draw
from sampling import Counted, plain_loop
from utils.evaluation.experiment import table
from utils.runs.script import run_script
from utils.training.precision import Precision

SIDE, STEPS, SAMPLES = 16, 256, 8


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Samplers against the published loops.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", type=torch.device,
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=256, help="width of the denoiser")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the denoiser")
    parser.add_argument("--canvases", nargs="+", type=int, default=[32, 64],
                        help="sides of the canvases, ids")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the median counts")
    return parser.parse_args()


def frozen_sampler(arguments, flags):
    """A sampler of 16x16 ids with random weights, for inference."""
    flags += f" --bert_n_emb {arguments.width} --bert_n_layers {arguments.layers}"
    return untrained_sampler(SIDE, flags, arguments.device).eval().requires_grad_(False)


def median_seconds(function, arguments):
    """Median seconds of `function()` after one call to warm up."""
    times = [run_seconds(function, arguments.device) for _ in range(arguments.repeats + 1)]
    return statistics.median(times[1:])


def all_windows(model, canvas, ids, position):
    """Draw the id at `position` of ids [1, H*W] from the mean over all windows of the canvas."""
    grid = ids.view(canvas, canvas)
    total = torch.zeros(canvas, canvas, model.mask_id, device=ids.device)
    count = torch.zeros(canvas, canvas, 1, device=ids.device)
    for top in range(canvas - SIDE + 1):
        for left in range(canvas - SIDE + 1):
            part = slice(top, top + SIDE), slice(left, left + SIDE)
            logits = model._denoise_fn(grid[part].reshape(1, -1))
            total[part] += logits.softmax(-1).view(SIDE, SIDE, -1)
            count[part] += 1
    ids[0, position] = draw((total / count).log().flatten(0, 1)[position : position + 1])


def one_id(denoise, ids, position):
    """Draw the id at `position` of ids [1, N] by the project's interface of denoisers."""
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[0, position] = True
    ids[0, position] = draw(denoise(ids, where))


def seconds_a_call(draw_one, count, canvas, mask_id, device):
    """Mean seconds of `draw_one(ids [1, N], position)` at `count` places of a raster schedule."""
    states = []
    for index in range(count):
        position = (2 * index + 1) * canvas**2 // (2 * count)  # spread evenly
        ids = torch.full((1, canvas**2), mask_id, device=device)
        ids[:, :position] = torch.randint(mask_id, (1, position), device=device)
        states.append((ids, position))
    draw_one(*states[0])  # warms up
    return run_seconds(lambda: [draw_one(*state) for state in states], device) / count


def same_size_rows(model, arguments):
    """Eight samples in 256 steps."""
    start = torch.full((SAMPLES, model.tokens), model.mask_id, device=arguments.device)
    plain = median_seconds(
        lambda: plain_loop(model._denoise_fn, start, model.mask_id, STEPS, 1.0), arguments
    )
    rows = []
    for amp in (False, True):
        precision = Precision(amp, arguments.device)
        sampler = precision.frozen(copy.deepcopy(model))
        network = Counted(sampler._denoise_fn)

        def sample():
            with precision.autocast():
                sampler.sample(SAMPLES, 1.0, STEPS, "diffusion", denoise=network)

        seconds = median_seconds(sample, arguments)
        calls = network.calls / (arguments.repeats + 1)
        rows.append([f"{SAMPLES} samples, {STEPS} steps, {precision.description}", plain, seconds,
                     f"{calls:.0f} of {STEPS} calls"])
    return rows


def canvas_rows(model, canvas, device):
    """A canvas, one id a call in raster order, by windows and natively."""
    network, grid = model._denoise_fn, (canvas, canvas)
    windowed = WindowedDenoiser(lambda ids, where: network(ids, where=where), model.shape, grid)

    def native(ids, where):
        return network(ids, grid=grid, where=where)

    seconds = partial(seconds_a_call, canvas=canvas, mask_id=model.mask_id, device=device)
    plain = seconds(partial(all_windows, model, canvas), count=2)
    rows = []
    for name, denoise in (("windows", windowed), ("native", native)):
        ours = seconds(partial(one_id, denoise), count=23)
        rows.append([f"canvas of {canvas}x{canvas} ids, {name}", plain, ours, "a call"])
    return rows


def autoregressive_row(arguments):
    """Eight samples of the autoregressive prior, with its cache and without."""
    model = frozen_sampler(arguments, "--sampler autoregressive")

    def without_cache():
        ids = torch.empty((SAMPLES, 0), dtype=torch.long, device=arguments.device)
        for _ in range(model.tokens):
            ids = torch.cat((ids, draw(model.net(ids)[:, -1])[:, None]), dim=1)
        return ids

    ids, times = [], []
    for function in (without_cache, lambda: model.sample(SAMPLES)):
        torch.manual_seed(0)
        ids.append(function())
        times.append(median_seconds(function, arguments))
    same = (ids[0] == ids[1]).double().mean().item()
    return [f"autoregressive, {SAMPLES} samples", *times, f"{same:.0%} of the ids equal"]


def main():
    arguments = parse_arguments()
    model = frozen_sampler(arguments, "--sampler absorbing --position rpb")
    rows = same_size_rows(model, arguments)
    for canvas in arguments.canvases:
        rows += canvas_rows(model, canvas, arguments.device)
    rows.append(autoregressive_row(arguments))
    print(f"{machine(arguments.device)}; denoiser of {arguments.layers} blocks of width "
          f"{arguments.width}\n")
    cells = [
        [name, number(plain), number(ours), number(plain / ours), note]
        for name, plain, ours, note in rows
    ]
    print(table(["", "plain loop, s", "ours, s", "times faster", ""], cells))


if __name__ == "__main__":
    run_script(main)
