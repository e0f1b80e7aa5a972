"""Time and memory of neighborhood attention, and of a denoiser's training step.

    python benchmarks/neighborhood_attention.py --out assets/neighborhood_attention.png

Compares this project's backends with natten's own call and with dense attention of all tokens
(torch's scaled_dot_product_attention, no mask), and a Hydra denoiser with full attention. Prints
Markdown tables and draws the cost against the number of tokens. About eleven minutes on two CPU
cores; --quick measures a few cases in half a minute.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from measure import machine, milliseconds, number, peak_megabytes, print_table, untrained_sampler
from models.neighborhood_attention import (
    hydra_attention, natten, natten_problem, neighborhood_attention_2d,
)

HEADS, HEAD_DIM = 8, 32
DENOISER = "--sampler absorbing --bert_n_emb 256 --bert_n_head 8 --bert_n_layers 4 --attention "


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Time and memory of neighborhood attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--sides", nargs="+", type=int, default=[16, 32, 64, 96],
                        help="sides of the square grids of tokens")
    parser.add_argument("--kernel_sizes", nargs="+", type=int, default=[3, 7, 13])
    parser.add_argument("--dilations", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--device", type=torch.device,
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each figure")
    parser.add_argument("--quick", action="store_true", help="sides 16 32, kernel 7, no dilation")
    parser.add_argument("--out", help="PNG to draw the costs into")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sides, arguments.kernel_sizes, arguments.dilations = [16, 32], [7], [1]
    return arguments


def dense_attention(query, key, value):
    """Attention of all tokens, no mask: what a transformer without neighborhoods computes."""
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value)


def inputs(side, batch, device, bias_kernel=None):
    """{name: tensor}: query, key, value [B, side, side, h, e], and `rpb` for `bias_kernel`."""
    shapes = dict.fromkeys(("query", "key", "value"), (batch, side, side, HEADS, HEAD_DIM))
    if bias_kernel:
        shapes["rpb"] = (HEADS, 2 * bias_kernel - 1, 2 * bias_kernel - 1)
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def forward_and_backward(attention, tensors):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    torch.autograd.grad(attention(**leaves).sum(), list(leaves.values()))


def costs(attention, tensors, arguments):
    """Milliseconds of attention(**tensors): (forward, forward and backward)."""
    with torch.no_grad():
        forward = milliseconds(lambda: attention(**tensors), arguments.device, arguments.seconds)
    return forward, milliseconds(
        lambda: forward_and_backward(attention, tensors), arguments.device, arguments.seconds
    )


def natten_forward(tensors, kernel, dilation, arguments):
    """Milliseconds of natten's own call, forward; None where it has no kernel for this."""
    if natten_problem(**tensors, rpb=None, kernel_size=kernel):
        return None
    with torch.no_grad():
        return milliseconds(lambda: natten.na2d(**tensors, kernel_size=kernel, dilation=dilation),
                            arguments.device, arguments.seconds, least=1)


def operator_rows(arguments, curves):
    """Yield the figures of every case; those without dilation are added to `curves`."""
    for side in arguments.sides:
        tensors = inputs(side, arguments.batch, arguments.device)
        dense, dense_both = costs(dense_attention, tensors, arguments)
        add_point(curves, "dense", side, dense_both, "k.-")
        for kernel, dilation in product(arguments.kernel_sizes, arguments.dilations):
            if kernel * dilation > side:
                continue
            attention = partial(neighborhood_attention_2d, kernel_size=kernel, dilation=dilation)
            forward, both = costs(attention, tensors, arguments)
            with_bias = inputs(side, arguments.batch, arguments.device, kernel)
            _, biased = costs(attention, with_bias, arguments)
            other = natten_forward(tensors, kernel, dilation, arguments)
            if dilation == 1:
                color = f"C{arguments.kernel_sizes.index(kernel)}"
                add_point(curves, f"kernel {kernel}", side, both, f"{color}.-")
                add_point(curves, f"kernel {kernel} with bias", side, biased, f"{color}.--")
            if other and (kernel, dilation) == (7, 1):
                add_point(curves, "natten, kernel 7, forward only", side, other, "C7x:")
            ratio = other and other / forward
            figures = (forward, dense, other, ratio, both, biased, dense_both, dense_both / both)
            yield [f"{side}x{side}", kernel, dilation, *map(number, figures)]


def backends_compared(device):
    """The backends that train on `device`, natten aside."""
    return ("tiled", "dense", "flex") if device.type == "cuda" else ("tiled", "dense")


def backend_rows(arguments):
    """Yield forward and backward of each backend around where they cross, milliseconds."""
    for side, kernel in product((8, 12, 16, 20, 24, 32), (3, 7)):
        times = []
        for bias_kernel, backend in product((None, kernel), backends_compared(arguments.device)):
            tensors = inputs(side, 8, arguments.device, bias_kernel)
            attention = partial(neighborhood_attention_2d, kernel_size=kernel, backend=backend)
            times.append(costs(attention, tensors, arguments)[1])
        yield [f"{side}x{side}", kernel, *map(number, times)]


def layer_rows(arguments):
    """Yield forward and backward of a Hydra layer, half its heads with kernel 3 and half with 7, in
    float32 and bfloat16, milliseconds: the figures behind `fastest_backend`."""
    groups = [(HEADS // 2, kernel, 1) for kernel in (3, 7)]
    for side, dtype in product((8, 12, 16, 20, 24, 32), (torch.float32, torch.bfloat16)):
        times = []
        for backend in backends_compared(arguments.device):
            tensors = inputs(side, arguments.batch, arguments.device)
            tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            attention = partial(hydra_attention, groups=groups, backend=backend)
            times.append(costs(attention, tensors, arguments)[1])
        yield [f"{side}x{side}", str(dtype).removeprefix("torch."), *map(number, times)]


def memory_rows(arguments):
    """Yield the peak memory of kernel 7, forward and backward, megabytes.

    Each case is measured in a fresh process, whose allocator has nothing to give out again; one
    that the system kills for its memory is a dash.
    """
    ours = partial(neighborhood_attention_2d, kernel_size=7)
    cases = [*product((ours, partial(ours, backend="dense")), (None, 7)), (dense_attention, None)]
    context = multiprocessing.get_context("spawn")
    for side in arguments.sides:
        peaks = []
        for case in cases:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                try:
                    peaks.append(pool.submit(peak_of_case, side, *case, arguments).result())
                except BrokenProcessPool:
                    peaks.append(None)
        yield [f"{side}x{side}", *(number(peak, 2) for peak in peaks)]


def peak_of_case(side, attention, bias_kernel, arguments):
    """Megabytes of one forward and backward; to be called in a process of its own."""
    tensors = inputs(side, arguments.batch, arguments.device, bias_kernel)
    return peak_megabytes(lambda: forward_and_backward(attention, tensors), arguments.device)


def step_rows(arguments, curves):
    """Yield milliseconds of a training step, hydra against full attention, and add to `curves`."""
    for side in [side for side in arguments.sides if side <= 64]:
        times = {}
        for kind, flags in {"hydra": "hydra --position rpb", "full": "full"}.items():
            model = untrained_sampler(side, DENOISER + flags, arguments.device)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
            shape = (arguments.batch, side * side)
            ids = torch.randint(model.mask_id, shape, device=arguments.device)

            def step():
                optimizer.zero_grad()
                model(ids)["loss"].backward()
                optimizer.step()

            times[kind] = milliseconds(step, arguments.device, 4 * arguments.seconds)
            add_point(curves, kind, side, times[kind], {"hydra": "C1.-", "full": "k.-"}[kind])
        ratio = times["full"] / times["hydra"]
        yield [f"{side}x{side}", *map(number, (times["hydra"], times["full"], ratio))]


def add_point(curves, label, side, time, style):
    """Add (side, time) to `curves`: {label: (style of matplotlib, sides, times)}."""
    _, sides, times = curves.setdefault(label, (style, [], []))
    sides.append(side)
    times.append(time)


def draw(path, operator, steps):
    """Two log-log plots: the operator's cost and the training step's, against tokens."""
    figure = Figure(figsize=(11, 4.2), layout="tight")
    plots = {"attention, forward and backward, no dilation": operator,
             "a denoiser's training step": steps}
    for axes, (title, curves) in zip(figure.subplots(1, 2), plots.items()):
        for label, (style, sides, times) in curves.items():
            axes.plot(np.square(sides), times, style, label=label)
        ticks = sorted({side for _, sides, _ in curves.values() for side in sides})
        axes.set(title=title, xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds")
        axes.set_xticks(np.square(ticks), [f"{side}x{side}" for side in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")


def main():
    arguments = parse_arguments()
    torch.manual_seed(0)
    print(f"{machine(arguments.device)}; natten {natten and natten.__version__}; batch "
          f"{arguments.batch}, {HEADS} heads of {HEAD_DIM}, float32")
    operator, steps = {}, {}
    head = ["grid", "kernel", "dilation", "forward, ms", "forward, dense", "forward, natten",
            "natten / ours", "both ways, ms", "both ways, with bias", "both ways, dense",
            "dense / ours"]
    print_table(head, operator_rows(arguments, operator))
    names = backends_compared(arguments.device)
    biased = [f"{name} with bias" for name in names]
    print_table(["grid", "kernel", *names, *biased], backend_rows(arguments))
    print_table(["grid", "kernels 3 7 in", *names], layer_rows(arguments))
    head = ["grid", "ours, MB", "ours with bias", "dense under the mask", "the same with bias",
            "dense, no mask"]
    print_table(head, memory_rows(arguments))
    print_table(["grid", "hydra, ms", "full, ms", "full / hydra"], step_rows(arguments, steps))
    for kind, (_, sides, times) in steps.items():
        if len(sides) > 1:
            slope = np.polyfit(np.log(np.square(sides)), np.log(times), 1)[0]
            print(f"{kind}: time grows with tokens to the power {slope:.2f}")
    if arguments.out:
        draw(arguments.out, operator, steps)


if __name__ == "__main__":
    main()
