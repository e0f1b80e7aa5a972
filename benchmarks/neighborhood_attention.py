"""Time and memory of neighborhood attention, and of a denoiser's training step.

    python benchmarks/neighborhood_attention.py --out assets/neighborhood_attention.png

Compares this project's backends with natten's own call and with dense attention of all tokens
(torch's scaled_dot_product_attention, no mask), and a Hydra denoiser with full attention. Prints
Markdown tables and draws the cost against the number of tokens. About eleven minutes on two CPU
cores; --quick measures a few cases in half a minute.
"""

import argparse
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

from hparams import get_sampler_hparams
from measure import machine, milliseconds, number, peak_megabytes, table
from models import AbsorbingDiffusion, Transformer
from models.neighborhood_attention import natten, natten_problem, neighborhood_attention_2d

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  after the choice of a backend that needs no screen

HEADS, HEAD_DIM = 8, 32


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Time and memory of neighborhood attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--sides", nargs="+", type=int, default=[16, 32, 64, 96],
                        help="sides of the square grids of tokens")
    parser.add_argument("--kernel_sizes", nargs="+", type=int, default=[3, 7, 13])
    parser.add_argument("--dilations", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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


def attention_function(kernel, dilation=1, backend=None):
    """The function (query, key, value, rpb=None) to measure; `dense_attention` without a kernel."""
    if kernel is None:
        return dense_attention
    return lambda *tensors: neighborhood_attention_2d(
        *tensors[:3], kernel, dilation, *tensors[3:], backend=backend
    )


def inputs(side, arguments, kernel=None, batch=None):
    """query, key and value [B, side, side, h, e], and a bias table when `kernel` is given."""
    shape = (batch or arguments.batch, side, side, HEADS, HEAD_DIM)
    tensors = [torch.randn(shape, device=arguments.device) for _ in range(3)]
    if kernel:
        extent = 2 * kernel - 1
        tensors.append(torch.randn(HEADS, extent, extent, device=arguments.device))
    return tensors


def forward_and_backward(attend, tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    torch.autograd.grad(attend(*leaves).sum(), leaves)


def costs(attend, tensors, arguments):
    """{"forward": ms, "both": ms of forward and backward} of attend(*tensors)."""
    device = torch.device(arguments.device)
    with torch.no_grad():
        forward = milliseconds(lambda: attend(*tensors), device, arguments.seconds)
    both = milliseconds(lambda: forward_and_backward(attend, tensors), device, arguments.seconds)
    return {"forward": forward, "both": both}


def peak_of_case(side, kernel, backend, with_bias, arguments):
    """Megabytes of one forward and backward; to be called in a process of its own."""
    tensors = inputs(side, arguments, kernel if with_bias else None)
    attend = attention_function(kernel, backend=backend)
    return peak_megabytes(
        lambda: forward_and_backward(attend, tensors), torch.device(arguments.device)
    )


def memory_table(arguments):
    """Peak memory of kernel 7, forward and backward: rows.

    Each case is measured in a fresh process, whose allocator has nothing to give out again; one
    that the system kills for its memory is a dash.
    """
    context = multiprocessing.get_context("spawn")
    cases = [(7, None, False), (7, None, True), (7, "dense", False), (7, "dense", True)]
    rows = []
    for side in arguments.sides:
        peaks = []
        for case in [*cases, (None, None, False)]:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                try:
                    peaks.append(pool.submit(peak_of_case, side, *case, arguments).result())
                except BrokenProcessPool:
                    peaks.append(None)
        rows.append([f"{side}x{side}", *(number(peak, 2) for peak in peaks)])
        print(*rows[-1], flush=True)
    return rows


def backend_table(arguments):
    """Milliseconds of forward and backward of `tiled` and `dense` around where they cross: rows."""
    rows = []
    for side, kernel in itertools.product((8, 12, 16, 20, 24, 32), (3, 7)):
        times = []
        for with_bias in (False, True):
            tensors = inputs(side, arguments, kernel if with_bias else None, batch=8)
            for backend in ("tiled", "dense"):
                attend = attention_function(kernel, backend=backend)
                times.append(costs(attend, tensors, arguments)["both"])
        rows.append([f"{side}x{side}", kernel, *map(number, times)])
        print(*rows[-1], flush=True)
    return rows


def natten_forward(tensors, kernel, dilation, arguments):
    """Milliseconds of natten's own call, forward; None where it has no kernel for this."""
    if natten_problem(*tensors, None, kernel):
        return None
    device = torch.device(arguments.device)
    with torch.no_grad():
        return milliseconds(
            lambda: natten.na2d(*tensors, kernel, dilation=dilation), device, arguments.seconds, 1
        )


def operator_table(arguments):
    """Measure every case; returns the table's rows and, for the plot, {(side, case): costs}."""
    rows, measured = [], {}
    for side in arguments.sides:
        tensors = inputs(side, arguments)
        dense = measured[side, "dense"] = costs(dense_attention, tensors, arguments)
        for kernel, dilation in itertools.product(arguments.kernel_sizes, arguments.dilations):
            if kernel * dilation > side:
                continue
            attend = attention_function(kernel, dilation)
            plain = costs(attend, tensors, arguments)
            biased = costs(attend, inputs(side, arguments, kernel), arguments)
            other = natten_forward(tensors, kernel, dilation, arguments)
            measured[side, kernel, dilation] = dict(plain, biased=biased["both"], natten=other)
            ratio = other and other / plain["forward"]
            rows.append([
                f"{side}x{side}", kernel, dilation,
                *map(number, (plain["forward"], dense["forward"], other, ratio)),
                *map(number, (plain["both"], biased["both"], dense["both"])),
                number(dense["both"] / plain["both"]),
            ])
            print(*rows[-1], flush=True)
    return rows, measured


HEADINGS = [
    "grid", "kernel", "dilation", "forward, ms", "forward, dense", "forward, natten",
    "natten / ours", "both ways, ms", "both ways, with bias", "both ways, dense", "dense / ours",
]
BACKEND_HEADINGS = [
    "grid", "kernel", "tiled, ms", "dense under the mask", "tiled with bias", "dense with bias",
]
MEMORY_HEADINGS = [
    "grid", "ours, MB", "ours with bias", "dense under the mask", "the same with bias",
    "dense, no mask",
]


def denoiser(side, kind, device):
    """A denoiser of `side` x `side` ids, four blocks of width 256, and its settings."""
    H = get_sampler_hparams(
        f"--sampler absorbing --dataset custom --custom_dataset_path . --ae_load_dir none "
        f"--ae_load_step 1 --img_size {side * 16} --attn_resolutions {side} "
        f"--latent_shape 1 {side} {side} "
        f"--attention {kind} --bert_n_emb 256 --bert_n_head 8 --bert_n_layers 4".split()
    )
    torch.manual_seed(0)
    embedding = torch.zeros(H.codebook_size, H.emb_dim)
    model = AbsorbingDiffusion(H, Transformer(H), H.codebook_size, embedding)
    return H, model.to(device)


def training_step_table(arguments, device):
    """Milliseconds of one training step, hydra against full attention: rows and {...: ms}."""
    rows, times = [], {}
    for side in [side for side in arguments.sides if side <= 64]:
        for kind in ("hydra", "full"):
            H, model = denoiser(side, kind, device)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
            ids = torch.randint(H.codebook_size, (arguments.batch, side * side), device=device)

            def step():
                optimizer.zero_grad()
                model(ids)["loss"].backward()
                optimizer.step()

            times[side, kind] = milliseconds(step, device, 4 * arguments.seconds)
        hydra, full = times[side, "hydra"], times[side, "full"]
        rows.append([f"{side}x{side}", number(hydra), number(full), number(full / hydra)])
        print(*rows[-1], flush=True)
    return rows, times


def exponent(tokens, times):
    """The power of the number of tokens that the time grows with: a log-log fit's slope."""
    return np.polyfit(np.log(tokens), np.log(times), 1)[0]


def draw(path, arguments, measured, times):
    """Two log-log plots: the operator's cost and the training step's, against tokens."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    sides = arguments.sides
    tokens = [side**2 for side in sides]
    left.plot(tokens, [measured[side, "dense"]["both"] for side in sides], "k.-", label="dense")
    kernel_7 = [(side, measured[side, 7, 1]) for side in sides if (side, 7, 1) in measured]
    known = [(side**2, found["natten"]) for side, found in kernel_7 if found["natten"]]
    if known:
        left.plot(*zip(*known), "x:", color="gray", label="natten, kernel 7, forward only")
    for kernel in arguments.kernel_sizes:
        for name, style, label in (("both", ".-", ""), ("biased", ".--", " with bias")):
            cases = [(s, measured[s, kernel, 1]) for s in sides if (s, kernel, 1) in measured]
            left.plot(
                [side**2 for side, _ in cases], [found[name] for _, found in cases], style,
                color=f"C{arguments.kernel_sizes.index(kernel)}", label=f"kernel {kernel}{label}",
            )
    left.set_title("attention, forward and backward, no dilation")
    sides = sorted({side for side, _ in times})
    for kind, style in (("full", "k.-"), ("hydra", "C1.-")):
        right.plot(
            [side**2 for side in sides], [times[side, kind] for side in sides], style,
            label=kind,
        )
    right.set_title("a denoiser's training step")
    for axes, shown in ((left, arguments.sides), (right, sides)):
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds")
        axes.set_xticks([side**2 for side in shown], [f"{side}x{side}" for side in shown])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")


def main():
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    print(f"{machine(device)}; natten {natten and natten.__version__}; batch {arguments.batch}, "
          f"{HEADS} heads of {HEAD_DIM}, float32")
    rows, measured = operator_table(arguments)
    print("\n" + table(HEADINGS, rows) + "\n")
    print("\n" + table(BACKEND_HEADINGS, backend_table(arguments)) + "\n")
    print("\n" + table(MEMORY_HEADINGS, memory_table(arguments)) + "\n")
    step_rows, times = training_step_table(arguments, device)
    print("\n" + table(["grid", "hydra, ms", "full, ms", "full / hydra"], step_rows) + "\n")
    for kind in ("hydra", "full"):
        cases = [(side**2, time) for (side, name), time in times.items() if name == kind]
        if len(cases) > 1:
            print(f"{kind}: time grows with tokens to the power {exponent(*zip(*cases)):.2f}")
    if arguments.out:
        draw(arguments.out, arguments, measured, times)


if __name__ == "__main__":
    main()
