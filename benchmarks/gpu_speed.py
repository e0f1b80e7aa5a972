"""The figures of benchmarks/gpu.py: training, attention, sampling, and images through networks."""

import tempfile
import time
from pathlib import Path

import torch
from gpu_setup import STAGES, Operations, Products, fastest_convolutions, seconds_a_call, tf32
from gpu_steps import precision_of
from torch.profiler import ProfilerActivity, profile
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from models.autoencoder.autoencoder import VQAutoEncoder
from models.autoencoder.formats import in_precision, to_fast_format
from models.neighborhood_attention import BACKENDS, hydra_attention
from models.prior.attention import HydraNeighborhoodAttention
from models.sampling.samplers import SAMPLERS
from utils.evaluation.features import NAMES, Extractor
from utils.training.cuda_graphs import first_line

HEADS, WIDTH = 8, 64  # of the published denoiser
WAYS = [  # stage, precision, compiled, graphs: the most important first
    ("sampler", "half", True, True),
    *((stage, "half", False, graphs) for graphs in (True, False) for stage in STAGES),
    ("sampler", "half", True, False),
    *((stage, precision, False, True) for precision in ("tf32", "float32") for stage in STAGES),
]  # "half" is what --amp takes on the card; only a GPU has graphs
SAMPLES, SAMPLE_STEPS = 64, 16  # the published number of steps is 256


def matmul(setup, report):
    """What the card multiplies at best: the peak by which utilisation is measured."""
    side = 256 if setup.tiny else 8192
    for precision in ("bfloat16", "float16", "tf32", "float32"):
        dtype = torch.float32 if precision in ("tf32", "float32") else getattr(torch, precision)
        a, b = torch.randn(2, side, side, device=setup.device, dtype=dtype)
        with tf32(precision == "tf32"):
            seconds = seconds_a_call(lambda: a @ b, setup, 0.5)
        report.figure("matrix product", 2 * side**3 / seconds / 1e12, "TFLOP/s",
                      precision=precision, side=side)


# --- training ------------------------------------------------------------------------------------


def training(setup, report):
    """Steps a second of both stages at published sizes, which share of the peak they use, and how
    many kernels they launch."""
    flops = {stage: flops_of(setup, stage) for stage in STAGES}
    for stage, value in flops.items():
        report.figure("operations of a step", value / 1e12, "TFLOP", stage=stage)
    for stage, precision, compiled, graphs in WAYS:
        precision, graphs = setup.precision(precision), graphs and setup.on_gpu
        if report.left <= 0:
            report.say("training: the rest is skipped, the time is spent")
            return
        try:
            time_training(setup, report, stage, precision, compiled, graphs, flops[stage])
        except Exception as error:  # out of memory, or no compiler
            report.check("trains at published sizes", False, first_line(error), stage=stage,
                         precision=precision, compiled=compiled, graphs=graphs)
        setup.clean(code=compiled)


def compiled_autoencoder(setup, report):
    """What --compile makes of the autoencoder, which takes a minute or more to compile."""
    flops = flops_of(setup, "autoencoder")
    time_training(setup, report, "autoencoder", setup.half, True, setup.on_gpu, flops)
    setup.clean(code=True)


def time_training(setup, report, stage, precision, compiled, graphs, flops):
    """Figures of one way to train a stage."""
    about = dict(stage=stage, precision=precision, compiled=compiled, graphs=graphs)
    with tf32(precision == "tf32"), fastest_convolutions():
        step = setup.step(stage, precision)
        if compiled:
            step.compile()
        began = time.perf_counter()
        if graphs:
            step.capture()
        step()
        step()
        setup.wait()
        first = time.perf_counter() - began
        seconds = seconds_a_call(step, setup, 0 if setup.tiny else 2, least=2)
        count, unit = launches(step, setup)
    report.figure("training", 1 / seconds, "steps/s", **about)
    report.figure("images in training", step.H.batch_size / seconds, "images/s", **about)
    report.figure("launches of a step", count, unit, **about)
    if compiled or graphs:
        report.figure("preparation", max(first - 2 * seconds, 0), "s", **about)
    peak = report.value("matrix product", precision=precision)
    if peak:
        report.figure("model flops utilisation", 100 * flops / seconds / (1e12 * peak), "%",
                      **about)


def flops_of(setup, stage):
    """Floating-point operations of a training step, both ways, as `Products` counts them;
    attention counts as that of the whole grid."""
    step = setup.step(stage, "float32")
    for module in step.model.modules():
        if isinstance(module, HydraNeighborhoodAttention):
            module.backend = "dense"
    with Products() as products:
        step()
    return products.flops


def launches(step, setup):
    """(how many kernels a call of `step` launches, "kernels"), as profiled on a GPU; elsewhere
    (how many operations torch dispatches, views not counted, "operations")."""
    if not setup.on_gpu:
        with Operations() as operations:
            step()
        return operations.total, "operations"
    return len(kernels_of(step, setup)), "kernels"


def kernels_of(function, setup):
    """What the GPU does in a call of `function`, events of torch's profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function()
        setup.wait()
    on_device = torch.autograd.DeviceType.CUDA
    return [event for event in profiled.events() if event.device_type == on_device]


def device_seconds(function, setup):
    """Seconds for which the GPU is busy in a call of `function`."""
    return sum(event.device_time for event in kernels_of(function, setup)) / 1e6


# --- attention -----------------------------------------------------------------------------------


def backends(setup, report):
    """Milliseconds of attention, forward and backward, by backend; `None` is the one chosen.

    Kernels 3 and 7 on half of the heads each, without and with a bias.
    """
    sides = (8,) if setup.tiny else (16, 32, 64, 96)
    for side in sides:
        for bias in (False, True):
            for backend in (None, *BACKENDS):
                if report.left <= 0:
                    report.say("backends: the rest is skipped, the time is spent")
                    return
                about = dict(side=side, kernels="3 7", bias=bias, backend=str(backend))
                time_attention(setup, report, backend, (3, 7), about)
        setup.clean()


def time_attention(setup, report, backend, kernels, about):
    """The figure of one case; a backend that cannot do it says why, and has none."""
    side, heads = about["side"], HEADS // len(kernels)
    batch = 2 if setup.tiny else max(1, 20 * 16**2 // side**2)  # as many ids as 20 grids of 16x16
    shape, dtype = (batch, side, side, HEADS, WIDTH), getattr(torch, setup.half)
    leaves = [torch.randn(shape, device=setup.device, dtype=dtype) for _ in range(3)]
    if about["bias"]:
        leaves += [torch.zeros(heads, 2 * kernel - 1, 2 * kernel - 1, device=setup.device)
                   for kernel in kernels]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    groups = [(heads, kernel, 1) for kernel in kernels]

    def both_ways():
        out = hydra_attention(*leaves[:3], groups, leaves[3:] or None, backend=backend)
        torch.autograd.grad(out.sum(), leaves)

    try:
        seconds = seconds_a_call(both_ways, setup, 0 if setup.tiny else 0.2)
        on_device = device_seconds(both_ways, setup) if setup.on_gpu else None
    except (ValueError, torch.OutOfMemoryError) as error:
        report.say(f"{backend}, {side}x{side}: {str(error).splitlines()[0]}")
        return
    report.figure("attention both ways", 1e3 * seconds, "ms", **about, batch=batch)
    if on_device:  # what is left where a compiled block calls it, or a graph
        report.figure("kernels of attention", 1e3 * on_device, "ms", **about, batch=batch)


# --- sampling and measuring ----------------------------------------------------------------------


def sampling(setup, report):
    """Samples a second of each method, with fewer steps than published."""
    model, precision = setup.sampler(), precision_of(setup.half, setup.device)
    samples, steps = (2, 2) if setup.tiny else (SAMPLES, SAMPLE_STEPS)

    def sample(method, count):
        torch.manual_seed(0)
        with precision.autocast():
            return model.sample(count, sample_steps=steps, sample_type=method)

    sample("diffusion", samples)
    for method in SAMPLERS:
        if report.left <= 0:
            report.say("sampling: the rest is skipped, the time is spent")
            return
        setup.wait()
        began = time.perf_counter()
        sample(method, samples)
        setup.wait()
        speed = samples / (time.perf_counter() - began)
        report.figure("sampling", speed, "samples/s", method=method, calls=steps)


def images(setup, report):
    """Images a second through the extractors of FID, the encoder and the decoder."""
    batch = 2 if setup.tiny else 64
    pixels = torch.randint(256, (batch, 3, 256, 256), dtype=torch.uint8)
    for name, extract in extractors(setup).items():
        seconds = seconds_a_call(lambda: extract(pixels), setup, 0 if setup.tiny else 1)
        report.figure("features", batch / seconds, "images/s", extractor=name)
    H = setup.autoencoder_settings()
    model = VQAutoEncoder(H).to(setup.device).eval().requires_grad_(False)
    size, tokens = H.img_size, model.grid_shape[0] * model.grid_shape[1]
    inputs = torch.rand(batch, H.n_channels, size, size, device=setup.device)
    ids = torch.randint(H.codebook_size, (batch, tokens), device=setup.device)
    to_fast_format(model, setup.device)
    for precision in ("float32", "tf32", setup.half):
        network = in_precision(model, precision_of(precision, setup.device).dtype)
        for what, function, argument in (
            ("encoding", network.encode, inputs), ("decoding", network.decode_indices, ids)
        ):
            with tf32(precision == "tf32"), torch.no_grad():
                seconds = seconds_a_call(lambda: function(argument), setup,
                                         0 if setup.tiny else 1)
            report.figure(what, batch / seconds, "images/s", precision=precision)


class RandomInception(FeatureExtractorInceptionV3):
    """FID's Inception with random weights: what it costs does not depend on them."""

    def load_state_dict(self, state):
        """Keep the weights as they are."""


def extractors(setup):
    """{name: function from images uint8 [b, 3, S, S] to features}."""
    class H:
        feature_extractor, feature_extractor_weights = "efficientnet_lite0", None

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "none.pth"
        torch.save({}, path)
        network = RandomInception(NAMES["inception"], ["2048"], str(path)).to(setup.device)
    inception = torch.no_grad()(lambda pixels: network(pixels.to(setup.device))[0].cpu())
    return {"efficientnet_lite0": Extractor(H, setup.device, ["fid"]), "inception": inception}
