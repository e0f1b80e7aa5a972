"""How much faster the samplers are than the published loops, written plainly.

    python benchmarks/sampling_speed.py

With one denoiser for 16x16 ids (random weights: what it costs does not depend on them): eight
samples in 256 steps; canvases of 32x32 and 64x64 ids, one id a call, by windows and natively; and
an autoregressive prior with and without its cache. Prints a Markdown table. A canvas is timed at
some ids spread over it, since the plain loop would take hours. Eight minutes on two cores.
"""

import argparse
import statistics
import time

import torch

from hparams import get_sampler_hparams
from measure import machine, number, table, wait_for
from models import AbsorbingDiffusion, AutoregressiveTransformer, Transformer
from models.sampling.canvas import WindowedDenoiser
from models.sampling.samplers import draw
from sampling import plain_loop
from utils.training.loop import Precision

SIDE, STEPS, SAMPLES = 16, 256, 8


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Samplers against the published loops.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=256, help="width of the denoiser")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the denoiser")
    parser.add_argument("--canvases", nargs="+", type=int, default=[32, 64],
                        help="sides of the canvases, ids")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the median counts")
    return parser.parse_args()


def settings(arguments, *flags):
    """H of a sampler of 16x16 ids out of 1024."""
    return get_sampler_hparams([
        "--dataset", "custom", "--custom_dataset_path", ".", "--ae_load_dir", "none",
        "--ae_load_step", "1", "--img_size", str(16 * SIDE), "--bert_n_emb", str(arguments.width),
        "--bert_n_layers", str(arguments.layers), *flags,
    ])


def run_seconds(function, device):
    """Seconds that `function()` takes."""
    began = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - began


def median_seconds(function, device, repeats):
    """Median seconds of `function()` after one call to warm up."""
    return statistics.median([run_seconds(function, device) for _ in range(repeats + 1)][1:])


@torch.no_grad()
def all_windows(network, ids, position, canvas):
    """Draw the id at `position` of ids [1, H*W] from the mean over all windows of the canvas."""
    grid = ids.view(canvas, canvas)
    total, count = None, torch.zeros(canvas, canvas, 1, device=ids.device)
    for top in range(canvas - SIDE + 1):
        for left in range(canvas - SIDE + 1):
            part = slice(top, top + SIDE), slice(left, left + SIDE)
            probabilities = network(grid[part].reshape(1, -1)).softmax(-1).view(SIDE, SIDE, -1)
            if total is None:
                total = torch.zeros(canvas, canvas, probabilities.shape[-1], device=ids.device)
            total[part] += probabilities
            count[part] += 1
    ids[0, position] = draw((total / count).log().flatten(0, 1)[position : position + 1])


@torch.no_grad()
def one_id(denoise, ids, position):
    """Draw the id at `position` of ids [1, N] by the project's interface of denoisers."""
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[0, position] = True
    ids[0, position] = draw(denoise(ids, where))


def raster_states(canvas, mask_id, count, device):
    """(ids [1, N], position) at `count` places spread evenly over a raster schedule."""
    tokens = canvas**2
    for index in range(count):
        position = (2 * index + 1) * tokens // (2 * count)
        ids = torch.full((1, tokens), mask_id, device=device)
        ids[:, :position] = torch.randint(mask_id, (1, position), device=device)
        yield ids, position


def seconds_a_call(draw_one, canvas, mask_id, count, device):
    """Mean seconds of drawing one id of the schedule, at `count` places of it."""
    states = list(raster_states(canvas, mask_id, count, device))
    draw_one(*states[0])  # warms up
    return run_seconds(lambda: [draw_one(*state) for state in states], device) / count


def same_size_rows(model, arguments, device):
    """Eight samples in 256 steps."""
    network = model._denoise_fn
    start = torch.full((SAMPLES, model.tokens), model.mask_id, device=device)
    plain = median_seconds(
        lambda: plain_loop(network, start, model.mask_id, STEPS, 1.0), device, arguments.repeats
    )
    rows = []
    for amp in (False, True):
        precision = Precision(amp, device)
        calls = []

        def sample():
            calls.append(0)
            with torch.no_grad(), precision.autocast():
                model.sample(SAMPLES, sample_steps=STEPS, sample_type="diffusion",
                             progress=lambda done, total: calls.__setitem__(-1, done))

        seconds = median_seconds(sample, device, arguments.repeats)
        rows.append([f"{SAMPLES} samples, {STEPS} steps, {precision.description}", plain, seconds,
                     f"{statistics.mean(calls):.0f} of {STEPS} calls"])
    return rows


def canvas_rows(model, canvas, device):
    """A canvas, one id a call in raster order, by windows and natively."""
    network, mask_id = model._denoise_fn, model.mask_id
    windowed = WindowedDenoiser(
        lambda ids, where: network(ids, where=where), model.shape, (canvas, canvas)
    )

    def native(ids, where):
        return network(ids, grid=(canvas, canvas), where=where)

    plain = seconds_a_call(
        lambda ids, position: all_windows(network, ids, position, canvas), canvas, mask_id, 2,
        device,
    )
    rows = []
    for name, denoise in (("windows", windowed), ("native", native)):
        ours = seconds_a_call(
            lambda ids, position: one_id(denoise, ids, position), canvas, mask_id, 23, device
        )
        rows.append([f"canvas of {canvas}x{canvas} ids, {name}", plain, ours, "a call"])
    return rows


def autoregressive_row(arguments, device):
    """Eight samples of the autoregressive prior, with its cache and without."""
    H = settings(arguments, "--sampler", "autoregressive")
    model = AutoregressiveTransformer(H, torch.zeros(H.codebook_size, H.emb_dim)).to(device).eval()

    @torch.no_grad()
    def without_cache():
        ids = torch.empty((SAMPLES, 0), dtype=torch.long, device=device)
        for _ in range(model.tokens):
            ids = torch.cat((ids, draw(model.net(ids)[:, -1])[:, None]), dim=1)
        return ids

    @torch.no_grad()
    def with_cache():
        return model.sample(SAMPLES)

    torch.manual_seed(0)
    first = without_cache()
    torch.manual_seed(0)
    same = (with_cache() == first).double().mean().item()
    times = [median_seconds(f, device, arguments.repeats) for f in (without_cache, with_cache)]
    return [f"autoregressive, {SAMPLES} samples", *times, f"{same:.0%} of the ids equal"]


def main():
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    H = settings(arguments, "--sampler", "absorbing", "--position", "rpb")
    embedding = torch.zeros(H.codebook_size, H.emb_dim)
    model = AbsorbingDiffusion(H, Transformer(H), H.codebook_size, embedding).to(device).eval()
    model.requires_grad_(False)
    rows = same_size_rows(model, arguments, device)
    for canvas in arguments.canvases:
        rows += canvas_rows(model, canvas, device)
    rows.append(autoregressive_row(arguments, device))
    print(f"{machine(device)}; denoiser of {arguments.layers} blocks of width {arguments.width}\n")
    cells = [
        [name, number(plain), number(ours), number(plain / ours), note]
        for name, plain, ours, note in rows
    ]
    print(table(["", "plain loop, s", "ours, s", "times faster", ""], cells))


if __name__ == "__main__":
    main()
