"""The figures of benchmarks/gpu.py: training, attention, sampling, and images through networks."""

import tempfile
import time
from pathlib import Path

import torch
from gpu_setup import STAGES, Operations, Products, fastest_convolutions, seconds_a_call, tf32
from gpu_steps import FIRST_STEP, precision_of
from torch.profiler import ProfilerActivity, profile
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from models.autoencoder.autoencoder import VQAutoEncoder
from models.autoencoder.formats import in_precision, to_fast_format
from models.neighborhood_attention import BACKENDS, hydra_attention
from models.prior.attention import HydraNeighborhoodAttention
from models.sampling.samplers import SAMPLERS
from utils.data.device import bytes_of_image, number_that_fits
from utils.evaluation.features import NAMES, Extractor
from utils.training.cuda_graphs import CaptureFailed, first_line

HEADS, WIDTH = 8, 64  # of the published denoiser
WAYS = [  # stage, precision, compiled, graphs: the most important first
    ("sampler", "half", True, True),
    *((stage, "half", False, graphs) for graphs in (True, False) for stage in STAGES),
    ("sampler", "half", True, False),
    *((stage, precision, False, True) for precision in ("tf32", "float32") for stage in STAGES),
]  # "half" is what --amp takes on the card; only a GPU has graphs
SAMPLES, SAMPLE_STEPS = 64, 16  # the published number of steps is 256
IMAGES = 64  # at once, where as many fit
COMPILATION = 150  # seconds that the compiled autoencoder takes
NO_KERNELS = "the profiler tells of no kernels, as where CUPTI is missing"


def matmul(setup, report):
    """What the card multiplies at best: the peak by which utilisation is measured."""
    side = 256 if setup.tiny else 8192
    for precision in (*setup.halves, "tf32", "float32"):
        dtype = torch.float32 if precision in ("tf32", "float32") else getattr(torch, precision)
        about = dict(precision=precision, side=side)
        with report.going_on("matrix product", **about), tf32(precision == "tf32"):
            a, b = torch.randn(2, side, side, device=setup.device, dtype=dtype)
            seconds = seconds_a_call(lambda: a @ b, setup, 0.5)
            report.figure("matrix product", 2 * side**3 / seconds / 1e12, "TFLOP/s", **about)


# --- training ------------------------------------------------------------------------------------


def training(setup, report):
    """Steps a second of both stages at published sizes, which share of the peak they use, and how
    many kernels they launch."""
    flops = {stage: flops_of(setup, report, stage) for stage in STAGES}
    for stage, value in flops.items():
        if value:
            report.figure("operations of a step", value / 1e12, "TFLOP", stage=stage)
    setup.clean()
    for stage, precision, compiled, graphs in WAYS:
        precision, graphs = setup.precision(precision), graphs and setup.on_gpu
        if report.spent("the rest of training"):
            return
        try:
            time_training(setup, report, stage, precision, compiled, graphs, flops[stage])
        except Exception as error:  # out of memory, or no compiler
            report.check("trains at published sizes", False, first_line(error), stage=stage,
                         precision=precision, compiled=compiled, graphs=graphs)
            if isinstance(error, CaptureFailed):
                raise
        setup.clean(code=compiled)


def compiled_autoencoder(setup, report):
    """What --compile makes of the autoencoder, which takes a minute or more to compile."""
    if report.spent("training", 0 if setup.tiny else COMPILATION, stage="autoencoder",
                    precision=setup.half, compiled=True):
        return
    flops = flops_of(setup, report, "autoencoder")
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
        report.figure("training", 1 / seconds, "steps/s", **about)
        report.figure("images in training", step.H.batch_size / seconds, "images/s", **about)
        with report.going_on("launches of a step", **about):
            launches(step, setup, report, about)
    if compiled or graphs:
        report.figure("preparation", max(first - 2 * seconds, 0), "s", **about)
    peak = report.value("matrix product", precision=precision)
    if peak and flops:
        report.figure("model flops utilisation", 100 * flops / seconds / (1e12 * peak), "%",
                      **about)


def flops_of(setup, report, stage):
    """Floating-point operations of a training step, both ways, as `Products` counts them;
    attention counts as that of the whole grid. None where a step in float32 does not fit."""
    setup.clean()
    with report.going_on("operations of a step", stage=stage):
        step = setup.step(stage, "float32")
        for module in step.model.modules():
            if isinstance(module, HydraNeighborhoodAttention):
                module.backend = "dense"
        with Products() as products:
            step()
        return products.flops


def launches(step, setup, report, about):
    """The figure of how many kernels a call of `step` launches, as profiled on a GPU; elsewhere of
    how many operations torch dispatches, views not counted."""
    step.number = FIRST_STEP  # the next one updates neither the EMA nor the histories
    if not setup.on_gpu:
        with Operations() as operations:
            step()
        report.figure("launches of a step", operations.total, "operations", **about)
        return
    count = len(kernels_of(step, setup))
    if count:
        report.figure("launches of a step", count, "kernels", **about)
    else:
        report.pass_over("launches of a step", NO_KERNELS, **about)


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
                if report.spent("the rest of attention both ways"):
                    return
                about = dict(side=side, kernels="3 7", bias=bias, backend=str(backend))
                with report.going_on("attention both ways", **about):
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
    except ValueError as error:
        report.say(f"{backend}, {side}x{side}: {str(error).splitlines()[0]}")
        return
    report.figure("attention both ways", 1e3 * seconds, "ms", **about, batch=batch)
    if setup.on_gpu:  # what is left where a compiled block calls it, or a graph
        on_device = device_seconds(both_ways, setup)
        if on_device:
            report.figure("kernels of attention", 1e3 * on_device, "ms", **about, batch=batch)
        else:
            report.say(f"kernels of attention: {NO_KERNELS}")


# --- sampling and measuring ----------------------------------------------------------------------


def sampling(setup, report):
    """Samples a second of each method, with fewer steps than published."""
    precision = precision_of(setup.half, setup.device)
    model = precision.frozen(setup.sampler())  # as experiments have it
    samples, steps = (2, 2) if setup.tiny else (SAMPLES, SAMPLE_STEPS)

    def sample(method, steps):
        torch.manual_seed(0)
        with precision.autocast():
            return model.sample(samples, sample_steps=steps, sample_type=method)

    for method in SAMPLERS:
        if report.spent("the rest of sampling"):
            return
        with report.going_on("sampling", method=method, calls=steps):
            sample(method, 2)  # what is built, compiled or chosen at first is not timed
            setup.wait()
            began = time.perf_counter()
            sample(method, steps)
            setup.wait()
            speed = samples / (time.perf_counter() - began)
            report.figure("sampling", speed, "samples/s", method=method, calls=steps)


def images(setup, report):
    """Images a second through the extractors of FID, the encoder and the decoder."""
    with report.going_on("features"):
        time_extractors(setup, report)
    time_autoencoder(setup, report)


def time_extractors(setup, report):
    """The figures of the extractors."""
    batch = 2 if setup.tiny else IMAGES
    pixels = torch.randint(256, (batch, 3, 256, 256), dtype=torch.uint8, device=setup.device)
    for name, extract in extractors(setup).items():
        if report.spent("features", extractor=name):
            continue
        with report.going_on("features", extractor=name):
            seconds = seconds_a_call(lambda: extract(pixels), setup, 0 if setup.tiny else 1)
            report.figure("features", batch / seconds, "images/s", extractor=name)


def time_autoencoder(setup, report):
    """The figures of the encoder and the decoder, with as many images at once as fit."""
    H = setup.autoencoder_settings()
    model = VQAutoEncoder(H).to(setup.device).eval().requires_grad_(False)
    to_fast_format(model, setup.device)
    size, tokens = H.img_size, model.grid_shape[0] * model.grid_shape[1]

    def pictures(n):
        return torch.rand(n, H.n_channels, size, size, device=setup.device)

    def ids(n):
        return torch.randint(H.codebook_size, (n, tokens), device=setup.device)

    cases = (("encoding", "encode", pictures, bytes_of_image(model.encoder, size**2)),
             ("decoding", "decode_indices", ids, bytes_of_image(model.generator, tokens)))
    for precision in ("float32", "tf32", setup.half):
        for what, method, inputs, each in cases:
            if report.spent(what, precision=precision):
                continue
            with (report.going_on(what, precision=precision), tf32(precision == "tf32"),
                  torch.no_grad()):
                batch = number_that_fits(setup.device, each, 1, IMAGES)
                network = in_precision(model, precision_of(precision, setup.device).dtype)
                function, x = getattr(network, method), inputs(batch)
                seconds = seconds_a_call(lambda: function(x), setup, 0 if setup.tiny else 1)
                report.figure(what, batch / seconds, "images/s", precision=precision, batch=batch)


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
