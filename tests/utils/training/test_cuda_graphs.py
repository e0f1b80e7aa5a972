"""Recorded networks train as others do, on a CPU by a stand-in for CUDA graphs; where they are not
recorded, and what is said then. On a GPU benchmarks/gpu.py checks the real ones."""

import types

import pytest
import torch
from gpu_setup import STAGES, Setup

import train_sampler
import train_vqgan
from models.prior.transformer import Transformer
from test_modern_training import MODERN, photos
from test_training import (
    SAMPLER, VQGAN, assert_identical, bfloat16, files_of, lines_of, sampler, vqgan,
    workplace,
)
from utils.errors import UserError
from utils.runs.folder import RunFolder
from utils.training import cuda_graphs
from utils.training.precision import Precision
from utils.training.processes import Processes

__all__ = ["bfloat16", "photos", "workplace"]  # fixtures of this file too


class Recording:
    """What torch.cuda.make_graphed_callables makes of a module, by its own forward and backward
    passes: input, output and gradients lie where they lay before, and are overwritten."""

    def __init__(self, part, arguments):
        self.part, (self.input,) = part, arguments
        self.learned = tuple(part.parameters())
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
        recording = self

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, *learned):
                with torch.no_grad():
                    recording.input.copy_(x)
                with torch.enable_grad():
                    recording.leaf = recording.input.detach()
                    recording.leaf.requires_grad_(recording.input.requires_grad)
                    recording.result = recording.part(recording.leaf)
                return recording.kept("output", [recording.result])[0]

            @staticmethod
            def backward(ctx, gradient):
                leaves = [recording.leaf] * recording.leaf.requires_grad + [*recording.learned]
                gradients = torch.autograd.grad(
                    recording.result, leaves, gradient, allow_unused=True
                )
                nothing = () if recording.leaf.requires_grad else (None,)
                return recording.kept("gradients", [*nothing, *gradients])

        self.replays += 1
        return Replay.apply(x, *self.learned)


@pytest.fixture
def recordings(monkeypatch):
    """CPUs have graphs; the recordings that are made."""
    made = []

    def make(part, arguments, allow_unused_input):
        assert allow_unused_input
        assert not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
        made.append(Recording(part, arguments))
        return made[-1]

    monkeypatch.setattr(cuda_graphs, "RECORDED_ON", ("cpu",))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    return made


@pytest.mark.parametrize("flags", [
    "--sampler absorbing --optimizer adam", "--sampler absorbing --optimizer muon --amp",
    "--sampler autoregressive --amp",
])
def test_a_recorded_sampler_trains_to_the_same_bits(flags, recordings, bfloat16):
    vqgan("--log_dir ae --train_steps 2 --ema --no_cuda_graphs")
    flags += " --ema --resid_pdrop 0.1 --clip_grad_norm 1 --steps_per_checkpoint 3"
    sampler(f"{flags} --log_dir plain --train_steps 6 --no_cuda_graphs")
    assert not recordings
    sampler(f"{flags} --log_dir recorded --train_steps 6")
    assert [recording.replays for recording in recordings] == [6]
    assert "the networks' kernels are recorded" in RunFolder("recorded").log.read_text()
    sampler(f"{flags} --log_dir parts --train_steps 3")
    sampler(f"{flags} --log_dir parts --train_steps 6 --resume")
    plain = files_of("plain", 6)
    assert_identical(files_of("recorded", 6), plain)
    assert_identical(files_of("parts", 6), plain)
    assert [line["loss"] for line in lines_of("recorded") if line["group"] == "train"] == [
        line["loss"] for line in lines_of("plain") if line["group"] == "train"
    ]


@pytest.mark.parametrize("flags", [
    "--quantizer nearest --amp --diff_aug", "--quantizer gumbel",
])
def test_a_recorded_autoencoder_trains_to_the_same_bits(flags, recordings, bfloat16):
    flags += " --ema --disc_start_step 3"
    vqgan(f"{flags} --log_dir plain --train_steps 6 --no_cuda_graphs")
    vqgan(f"{flags} --log_dir recorded --train_steps 6")
    assert [recording.replays for recording in recordings] == [6, 6]  # encoder, generator
    assert_identical(files_of("recorded", 6), files_of("plain", 6))


def test_a_recorded_modern_run_trains_to_the_same_bits(recordings, photos, bfloat16):
    for flags in ("plain --no_cuda_graphs", "recorded"):
        train_vqgan.main(f"{photos} {MODERN} --log_dir {flags}".split())
    assert [recording.replays for recording in recordings] == [14, 14]
    assert_identical(files_of("recorded", 14), files_of("plain", 14))


def test_a_recording_serves_training_on_its_shape_only(recordings):
    H = train_sampler.get_sampler_hparams(SAMPLER.split())
    transformer = Transformer(H)
    ids = torch.zeros(2, H.block_size, dtype=torch.int64)
    torch.manual_seed(0)
    expected = transformer(ids)
    state = list(transformer.state_dict())
    precision = Precision(False, torch.device("cpu"))
    torch.manual_seed(0)
    cuda_graphs.record(transformer, "forward", transformer, ids, precision)
    (recording,) = recordings
    assert torch.equal(transformer(ids), expected) and recording.replays == 1
    transformer(ids + 1)
    assert not ids.any()  # what is recorded lies elsewhere
    transformer(ids[:1])
    transformer(ids, where=torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        transformer(ids)
    transformer.eval()(ids)
    assert recording.replays == 2 and list(transformer.state_dict()) == state


@pytest.mark.parametrize("flags, size, words", [
    ("--accumulate 2", 1, "--accumulate"), ("--checkpoint_blocks", 1, "--checkpoint_blocks"),
    ("", 2, "several processes"),
])
def test_what_is_not_recorded_is_said_where_it_is_asked_for(flags, size, words, recordings):
    said = []
    log = types.SimpleNamespace(warning=said.append)
    for asked in ("", "--cuda_graphs", "--no_cuda_graphs"):
        H = train_sampler.get_sampler_hparams(f"{SAMPLER} {flags} {asked}".split())
        assert not cuda_graphs.records(H, Processes(size=size), log)
        assert len(said) == (asked == "--cuda_graphs") or asked == "--no_cuda_graphs"
    (sentence_,) = said
    assert sentence_.startswith("no CUDA graphs are recorded: ") and words in sentence_


@pytest.mark.parametrize("stage", STAGES)
def test_the_check_of_a_gpu_records_what_training_does(stage, recordings):
    found = []
    for recorded in (False, True):
        step = Setup(torch.device("cpu"), tiny=True).step(stage, "bfloat16")
        if recorded:
            step.record()
        found.append([step().values.tolist() for _ in range(3)])
    assert found[0] == found[1] and {recording.replays for recording in recordings} == {3}


def test_a_cpu_records_nothing():
    H = train_sampler.get_sampler_hparams(SAMPLER.split())
    assert cuda_graphs.recording_problem(H, Processes()) == "a cpu has none"
    said = []
    H.cuda_graphs = True
    assert not cuda_graphs.records(H, Processes(), types.SimpleNamespace(warning=said.append))
    assert said == ["no CUDA graphs are recorded: a cpu has none"]


@pytest.mark.parametrize("asked", ["", "--cuda_graphs"])
def test_where_recording_fails_training_goes_on_unless_it_is_asked_for(
    asked, recordings, monkeypatch
):
    def fail(*arguments, **options):
        raise RuntimeError("CUDA error: operation not permitted\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    flags = f"{VQGAN} --log_dir a --train_steps 2 {asked}".split()
    if asked:
        with pytest.raises(UserError, match="cannot be recorded: CUDA error: operation not perm"):
            train_vqgan.main(flags)
        return
    train_vqgan.main(flags)
    log = RunFolder("a").log.read_text()
    assert "no CUDA graphs are recorded: CUDA error: operation not permitted\n" in log
    assert "trained to step 2" in log
