"""Captured networks train as others do, on a CPU by a stand-in for CUDA graphs; where they are not
captured, and what is said then. On a GPU benchmarks/gpu.py checks the real ones."""

import contextlib
import types

import gpu_checks
import pytest
import torch
from gpu_setup import STAGES, Setup

import train_sampler
import train_vqgan
from test_modern_training import MODERN, photos
from test_training import (
    SAMPLER, VQGAN, assert_identical, bfloat16, files_of, lines_of, sampler, vqgan,
    workplace,
)
from utils.errors import UserError
from utils.runs.folder import RunFolder
from utils.signals import Stopped
from utils.training import cuda_graphs
from utils.training.build import build_sampler
from utils.training.precision import Precision
from utils.training.processes import Processes

__all__ = ["bfloat16", "photos", "workplace"]  # fixtures of this file too
CPU = torch.device("cpu")


class Graph:
    """What torch.cuda.make_graphed_callables makes of a module, by its own forward and backward
    passes: input, output and gradients lie where they lay before, and are overwritten. Weights must
    stay where they are, and it knows no autocast but that of the capture."""

    def __init__(self, part, arguments):
        self.part, (self.input,) = part, arguments
        self.learned = tuple(part.parameters())
        self.addresses = [p.data_ptr() for p in self.learned]
        self.output, self.gradients, self.replays = None, None, 0
        for _ in range(3):  # warm-up draws random numbers
            part(self.input)

    def kept(self, name, tensors):
        """`tensors`, in the memory of the first ones of that name."""
        if getattr(self, name) is None:
            setattr(self, name, [t if t is None else t.detach().clone() for t in tensors])
        for place, tensor in zip(getattr(self, name), tensors):
            if tensor is not None:
                place.copy_(tensor)
        return tuple(t if t is None else t.detach() for t in getattr(self, name))

    def __call__(self, x):
        graph = self

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, *learned):
                with torch.no_grad():
                    graph.input.copy_(x)
                with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                    graph.leaf = graph.input.detach()
                    graph.leaf.requires_grad_(graph.input.requires_grad)
                    graph.result = graph.part(graph.leaf)
                return graph.kept("output", [graph.result])[0]

            @staticmethod
            def backward(ctx, gradient):
                leaves = [graph.leaf] * graph.leaf.requires_grad + [*graph.learned]
                gradients = torch.autograd.grad(graph.result, leaves, gradient, allow_unused=True)
                nothing = () if graph.leaf.requires_grad else (None,)
                return graph.kept("gradients", [*nothing, *gradients])

        assert [p.data_ptr() for p in self.learned] == self.addresses
        self.replays += 1
        return Replay.apply(x, *self.learned)


@pytest.fixture
def graphs(monkeypatch):
    """CPUs have graphs; those that are captured."""
    made, emptied = [], []

    def make(parts, arguments, allow_unused_input):
        assert allow_unused_input and not torch.is_autocast_enabled("cpu")
        assert emptied.pop() == "cache"  # what the trial used, which the capture cannot use
        made.extend(map(Graph, parts, arguments))
        return tuple(made[-len(parts):])

    monkeypatch.setattr(cuda_graphs, "HAVE_GRAPHS", ("cpu",))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cache"))
    return made


@pytest.mark.parametrize("flags", [
    "--sampler absorbing --optimizer adam", "--sampler absorbing --optimizer muon --amp",
    "--sampler autoregressive --amp",
])
def test_a_captured_sampler_trains_to_the_same_bits(flags, graphs, bfloat16):
    vqgan("--log_dir ae --train_steps 2 --ema --no_cuda_graphs")
    flags += " --ema --resid_pdrop 0.1 --clip_grad_norm 1 --steps_per_checkpoint 3"
    sampler(f"{flags} --log_dir plain --train_steps 6 --no_cuda_graphs")
    assert not graphs
    sampler(f"{flags} --log_dir captured --train_steps 6")
    assert [graph.replays for graph in graphs] == [6]
    assert "the networks' kernels are captured" in RunFolder("captured").log.read_text()
    sampler(f"{flags} --log_dir parts --train_steps 3")
    sampler(f"{flags} --log_dir parts --train_steps 6 --resume")
    plain = files_of("plain", 6)
    assert_identical(files_of("captured", 6), plain)
    assert_identical(files_of("parts", 6), plain)
    assert [line["loss"] for line in lines_of("captured") if line["group"] == "train"] == [
        line["loss"] for line in lines_of("plain") if line["group"] == "train"
    ]


@pytest.mark.parametrize("flags", [
    "--quantizer nearest --amp --diff_aug", "--quantizer gumbel",
])
def test_a_captured_autoencoder_trains_to_the_same_bits(flags, graphs, bfloat16):
    flags += " --ema --disc_start_step 3"
    vqgan(f"{flags} --log_dir plain --train_steps 6 --no_cuda_graphs")
    vqgan(f"{flags} --log_dir captured --train_steps 6")
    assert [graph.replays for graph in graphs] == [6, 6]  # encoder, generator
    assert_identical(files_of("captured", 6), files_of("plain", 6))


def test_a_captured_modern_run_trains_to_the_same_bits(graphs, photos, bfloat16):
    for flags in ("plain --no_cuda_graphs", "captured"):
        train_vqgan.main(f"{photos} {MODERN} --log_dir {flags}".split())
    assert [graph.replays for graph in graphs] == [14, 14]
    assert_identical(files_of("captured", 14), files_of("plain", 14))


def test_a_graph_serves_training_on_its_shape_only(graphs):
    H = train_sampler.get_sampler_hparams([*SAMPLER.split(), "--resid_pdrop", "0.1"])
    sampler = build_sampler(H, torch.zeros(H.codebook_size, H.emb_dim))
    transformer = sampler.transformer
    ids = torch.zeros(H.batch_size, H.block_size, dtype=torch.int64)
    torch.manual_seed(0)
    expected = transformer(ids)
    state = list(transformer.state_dict())
    parts = cuda_graphs.parts_of_sampler(sampler, len(ids), Precision(False, CPU))
    torch.manual_seed(0)
    cuda_graphs.capture(parts, types.SimpleNamespace(info=print))  # draws nothing of this seed's
    (graph,) = graphs
    assert torch.equal(transformer(ids), expected) and graph.replays == 1
    transformer(ids[:1])
    transformer(ids, where=torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        transformer(ids)
    transformer.eval()(ids)
    assert graph.replays == 1 and list(transformer.state_dict()) == state


@pytest.mark.parametrize("flags, size, words", [
    ("--accumulate 2", 1, "--accumulate"), ("--checkpoint_blocks", 1, "--checkpoint_blocks"),
    ("", 2, "several processes"),
])
def test_what_is_not_captured_is_said_where_it_is_asked_for(flags, size, words, graphs):
    said = []
    log = types.SimpleNamespace(warning=said.append)
    for asked in ("", "--no_cuda_graphs"):
        H = train_sampler.get_sampler_hparams(f"{SAMPLER} {flags} {asked}".split())
        assert not cuda_graphs.captures(H, Processes(size=size), log) and not said
    H = train_sampler.get_sampler_hparams(f"{SAMPLER} {flags} --cuda_graphs".split())
    assert not cuda_graphs.captures(H, Processes(size=size), log)
    (sentence,) = said
    assert sentence.startswith("no CUDA graphs are captured: ") and words in sentence


@pytest.mark.parametrize("stage", STAGES)
def test_steps_of_the_check_are_those_of_training(stage, graphs):
    found = []
    for captured in (False, True):
        step = Setup(CPU, tiny=True).step(stage, "bfloat16")
        if captured:
            step.capture()
        found.append([step().values.tolist() for _ in range(3)])
    assert found[0] == found[1] and {graph.replays for graph in graphs} == {3}


def test_the_check_of_a_gpu_compares_both(graphs, monkeypatch):
    checks = []
    report = types.SimpleNamespace(
        check=lambda what, holds, found, stage: checks.append((stage, holds, found)),
        spent=lambda what, stage: False,
    )
    gpu_checks.graphs(Setup(CPU, tiny=True), report)
    assert checks == [(stage, True, "equal to the bit") for stage in STAGES]
    # an empty graph gives what lay there
    monkeypatch.setattr(Graph, "kept", lambda graph, name, tensors: tuple(
        None if t is None else torch.zeros_like(t) for t in tensors
    ))
    gpu_checks.graphs(Setup(CPU, tiny=True), report)
    assert not checks[2][1] and not checks[3][1]


def test_a_cpu_captures_nothing():
    H = train_sampler.get_sampler_hparams(SAMPLER.split())
    said = []
    H.cuda_graphs = True
    assert not cuda_graphs.captures(H, Processes(), types.SimpleNamespace(warning=said.append))
    assert said == ["no CUDA graphs are captured: the device (cpu) has no CUDA graphs"]


@pytest.mark.parametrize("asked", ["", "--cuda_graphs"])
def test_what_waits_for_the_device_is_not_captured(asked, graphs, monkeypatch):
    """A trial finds out, after which training goes on, unless graphs are asked for."""
    @contextlib.contextmanager
    def refuse(device, on):
        if on:
            raise RuntimeError("called a synchronizing CUDA operation\nmore")
        yield

    monkeypatch.setattr(cuda_graphs, "waits_are_errors", refuse)
    flags = f"{VQGAN} --log_dir a --train_steps 2 {asked}".split()
    if asked:
        with pytest.raises(UserError, match="--cuda_graphs: called a synchronizing CUDA operation"):
            train_vqgan.main(flags)
        return
    train_vqgan.main(flags)
    log = RunFolder("a").log.read_text()
    assert "no CUDA graphs are captured: called a synchronizing CUDA operation\n" in log
    assert "trained to step 2" in log and not graphs


SHORT = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("cause, asked, raised, words", [
    (ValueError("a copy from the host"), "", UserError, "--no_cuda_graphs .a copy from the host"),
    (SHORT, "", cuda_graphs.CaptureFailed, "--no_cuda_graphs .CUDA out of memory"),
    (SHORT, "--cuda_graphs", cuda_graphs.CaptureFailed, "--no_cuda_graphs .CUDA out of memory"),
    (Stopped(15, "interrupted"), "", Stopped, "interrupted"),
    (KeyboardInterrupt(), "", KeyboardInterrupt, None),
])
def test_where_a_capture_fails_training_ends(cause, asked, raised, words, graphs, monkeypatch):
    """torch reports the end of the capture, not what ended it."""
    def fail(*arguments, **options):
        try:
            raise cause
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with pytest.raises(raised, match=words):
        train_vqgan.main(f"{VQGAN} --log_dir a --train_steps 2 {asked}".split())
    assert not RunFolder("a").complete_steps()


@pytest.mark.parametrize("asked", ["", "--cuda_graphs"])
def test_memory_that_is_short_in_a_trial(asked, graphs, monkeypatch):
    def fail(part):
        raise SHORT

    monkeypatch.setattr(cuda_graphs.Capturable, "try_out", fail)
    flags = f"{VQGAN} --log_dir a --train_steps 2 {asked}".split()
    if asked:
        with pytest.raises(torch.OutOfMemoryError):
            train_vqgan.main(flags)
        return
    train_vqgan.main(flags)
    assert "no CUDA graphs are captured: CUDA out of memory" in RunFolder("a").log.read_text()
