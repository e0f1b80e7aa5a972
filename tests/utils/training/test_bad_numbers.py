"""Losses and gradients that are not finite: the step is passed over and leaves no trace."""

import math
import signal

import pytest
import torch

import models.autoencoder.vqgan
import train_vqgan
import utils.training.loop
import utils.training.step
from helpers import at_the_end_of_steps, half_precision
from models import AbsorbingDiffusion
from models.autoencoder.vqgan import VQGAN
from test_training import VQGAN as VQGAN_FLAGS
from test_training import (
    assert_identical, files_of, lines_of, sampler, sentence, trained, two_runs, vqgan, workplace,
)
from utils.data.batches import stream_positions
from utils.runs.folder import RunFolder
from utils.signals import Stopped
from utils.training.loop import TrainingLoop
from utils.training.precision import step_seed

__all__ = ["trained", "two_runs", "workplace"]  # fixtures of this file too

FLAGS = "--ema --steps_per_update_ema 1 --steps_per_log 1 --steps_per_checkpoint 100"


class Poison(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")


def spoil(monkeypatch, cls, method, steps, how):
    """Make the loss of a method, or only its gradient, not finite in some of the steps."""
    function = getattr(cls, method)
    seeds = {step_seed(0, step) for step in steps}

    def spoilt(self, *arguments, **options):
        result = function(self, *arguments, **options)
        if torch.initial_seed() not in seeds:
            return result
        loss = result["loss"] if isinstance(result, dict) else result
        loss = loss[0] if isinstance(loss, tuple) else loss  # a dict, a tuple or the loss itself
        bad = {"nan": loss * float("nan"), "inf": loss + float("inf"),
               "gradient": Poison.apply(loss)}[how]
        if isinstance(result, dict):
            return {**result, "loss": bad}
        return (bad, *result[1:]) if isinstance(result, tuple) else bad

    monkeypatch.setattr(cls, method, spoilt)


STAGES = {
    "sampler": (sampler, "", AbsorbingDiffusion, "forward"),
    "autoencoder": (vqgan, "--disc_start_step 2", VQGAN, "generator_losses"),
    "discriminator": (vqgan, "--disc_start_step 2", VQGAN, "discriminator_losses"),
}


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_is_logged_and_changes_nothing(stage, how, monkeypatch, two_runs):
    """Steps 4 and 5 of 5 are bad: the end is what a run of 3 steps left, to the bit."""
    train, more, cls, method = STAGES[stage]
    spoil(monkeypatch, cls, method, (4, 5), how)
    flags = f"{FLAGS} {more} --log_dir"
    train(f"{flags} bad --train_steps 5")
    train(f"{flags} good --train_steps 3")
    bad = {name.replace("_5", "_3"): content for name, content in files_of("bad", 5).items()}
    assert_identical(without_rates(files_of("good", 3)), without_rates(bad))
    log = RunFolder("bad").log.read_text()
    batch_size = 8 if stage == "sampler" else 4
    for step in (4, 5):
        images = " ".join(map(str, stream_positions(1618, batch_size, 0, step - 1)[0]))
        assert f"step {step} is passed over" in log and f"images of its batch: {images}" in log
    assert [line["step"] for line in lines_of("bad") if line["group"] == "train"] == [1, 2, 3]


def without_rates(content):
    """The learning rates of a step are set at its beginning, whatever becomes of it."""
    if isinstance(content, dict):
        return {key: without_rates(value) for key, value in content.items() if key != "lr"}
    return [without_rates(value) for value in content] if isinstance(content, list) else content


def test_too_many_bad_steps_in_a_row_end_training(monkeypatch, capsys, workplace):
    spoil(monkeypatch, VQGAN, "generator_losses", (2, 3, 5, 6, 7), "nan")
    limit = "--max_bad_steps 2 --steps_per_checkpoint 4 --log_dir a"
    flags = f"{VQGAN_FLAGS} {limit} --train_steps 9"
    line = sentence(train_vqgan.main, flags, capsys, monkeypatch)
    assert "3 steps in a row up to step 7 were not finite" in line
    assert "the last checkpoint is that of step 4" in line
    assert RunFolder("a").complete_steps() == [4]


def test_bad_steps_count_in_the_speed(monkeypatch, workplace):
    """Two of the four steps of the second log entry are bad, but took their time too."""
    spoil(monkeypatch, VQGAN, "generator_losses", (5, 6), "nan")
    now = iter(range(10**6))
    monkeypatch.setattr(utils.training.loop.time, "perf_counter", lambda: float(next(now)))
    vqgan("--log_dir a --steps_per_log 4 --train_steps 8")
    first, second = (line for line in lines_of("a") if line["group"] == "train")
    assert second["steps_per_second"] == first["steps_per_second"]
    assert second["images_per_second"] == 4 * second["steps_per_second"]


def test_overflow_of_the_adaptive_weight_lowers_the_scale(monkeypatch, workplace):
    """Both gradients of the last layer are infinite at first: no such step is bad."""
    scale = 2.0**24
    weights, adaptive_weight = [], models.autoencoder.vqgan.adaptive_weight

    def noted(*arguments):
        weights.append(float(adaptive_weight(*arguments)))
        return torch.tensor(weights[-1])

    monkeypatch.setattr(models.autoencoder.vqgan, "adaptive_weight", noted)
    monkeypatch.setattr(train_vqgan, "Precision", half_precision(scale))
    vqgan("--disc_start_step 1 --log_dir a --steps_per_log 1 --max_bad_steps 0 --train_steps 20")
    overflows = sum(weight != weight for weight in weights)
    assert 2 < overflows < 20
    assert "passed over" not in RunFolder("a").log.read_text()
    lines = [line for line in lines_of("a") if line["group"] == "train"]
    assert len(lines) == 20 and all(math.isfinite(float(line["d_weight"])) for line in lines)
    lowered = torch.load(RunFolder("a").stats(20), weights_only=True)["scaler"]["scale"]
    assert lowered <= scale / 2**overflows


def test_training_continues_after_a_bad_step(monkeypatch, two_runs):
    spoil(monkeypatch, AbsorbingDiffusion, "forward", (2,), "nan")
    sampler(f"{FLAGS} --log_dir a --train_steps 4")
    assert [line["step"] for line in lines_of("a") if line["group"] == "train"] == [1, 3, 4]
    state = files_of("a", 4)["absorbing_4.th"]
    assert all(value.isfinite().all() for value in state.values())
    assert float(state["Lt_count"].sum()) == 3 * 8


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_host_that_is_ahead_of_the_device_finds_out_later(stage, how, monkeypatch, two_runs):
    """As on a GPU: steps 4, 5 and 7 of 7 are bad; it is asked when something is due."""
    monkeypatch.setattr(utils.training.step, "ASYNCHRONOUS", ("cpu",))
    train, more, cls, method = STAGES[stage]
    monkeypatch.setattr(TrainingLoop, "settle", counted := Counted(TrainingLoop.settle))
    later = "--steps_per_log 20 --log_dir"
    train(f"{FLAGS} {more} {later} good --train_steps 3")
    spoil(monkeypatch, cls, method, (4, 5, 7), how)
    counted.calls = 0
    train(f"{FLAGS} {more} {later} bad --train_steps 5")
    assert counted.calls == 3  # after the first step, before a validation, after the last step
    bad = {name.replace("_5", "_3"): content for name, content in files_of("bad", 5).items()}
    assert_identical(without_rates(files_of("good", 3)), without_rates(bad))
    train(f"{FLAGS} {more} {later} bad --train_steps 7 --resume")
    log = RunFolder("bad").log.read_text()
    assert all(f"step {step} is passed over" in log for step in (4, 5, 7))
    assert "step 6 is passed over" not in log


def test_a_host_that_is_ahead_ends_a_run_of_bad_steps_in_time(monkeypatch, capsys, workplace):
    """Nothing is due before step 20, but no step is begun after three bad ones."""
    begun, seed_step = [], utils.training.loop.seed_step
    monkeypatch.setattr(
        utils.training.loop, "seed_step", lambda *step: begun.append(step) or seed_step(*step)
    )
    monkeypatch.setattr(utils.training.step, "ASYNCHRONOUS", ("cpu",))
    spoil(monkeypatch, VQGAN, "generator_losses", range(2, 21), "nan")
    later = "--steps_per_log 20 --steps_per_eval 0 --steps_per_checkpoint 100 --log_dir a"
    flags = f"{VQGAN_FLAGS} {later} --max_bad_steps 2 --train_steps 20"
    line = sentence(train_vqgan.main, flags, capsys, monkeypatch)
    assert "3 steps in a row up to step 4 were not finite" in line and len(begun) == 4


class Counted:
    """A method that counts its calls."""

    def __init__(self, method):
        self.method, self.calls = method, 0

    def __get__(self, loop, cls):
        self.calls += 1
        return self.method.__get__(loop)


@pytest.mark.parametrize("train, more, optimizer", [
    (vqgan, "", "ae_optim_1.th"),
    (vqgan, "--disc_start_step 1", "disc_optim_1.th"),
    (sampler, "--optimizer adam", "absorbing_optim_1.th"),
])
def test_clip_grad_norm_limits_gradients_of_both_stages(train, more, optimizer, two_runs):
    for run, clip in (("free", ""), ("clipped", "--clip_grad_norm 1e-9")):
        train(f"--log_dir {run} --train_steps 1 {more} {clip}")
    free, clipped = (files_of(run, 1)[optimizer]["state"][0] for run in ("free", "clipped"))
    assert float(clipped["exp_avg"].norm()) < 1e-9 < float(free["exp_avg"].norm())


def test_weights_that_are_not_finite_are_not_saved(
    monkeypatch, capsys, workplace
):
    """The weights go bad in step 5, of which the checkpoints of steps 6 and 8 would be made."""
    gradients = train_vqgan.VQGANTraining.gradients

    def spoil_weights(training, step, images):
        result = gradients(training, step, images)
        if step == 5:
            next(training.vqgan.ae.parameters()).data[0] = float("inf")
        return result

    monkeypatch.setattr(train_vqgan.VQGANTraining, "gradients", spoil_weights)
    limits = "--steps_per_checkpoint 2 --keep_checkpoints 1 --max_bad_steps 4"
    shows = "--steps_per_save_output 1 --steps_per_eval 2 --train_steps 20"
    flags = f"{VQGAN_FLAGS} {limits} {shows} --log_dir a"
    line = sentence(train_vqgan.main, flags, capsys, monkeypatch)
    assert "5 steps in a row up to step 10" in line and "that of step 4" in line
    assert RunFolder("a").complete_steps() == RunFolder("a").steps("vqgan") == [4]
    # and where it is found out by the checkpoint of that very step
    flags = (f"{VQGAN_FLAGS} --steps_per_checkpoint 5 --train_steps 20 --steps_per_eval 0 "
             f"--log_dir b")
    line = sentence(train_vqgan.main, flags, capsys, monkeypatch)
    assert "vqgan holds weights at step 5 that are not finite" in line
    assert not RunFolder("b").complete_steps() and not RunFolder("b").steps("vqgan")


@pytest.fixture
def nondeterministic_again():
    yield
    torch.use_deterministic_algorithms(False)


def test_the_deterministic_flag_reaches_torch(nondeterministic_again, workplace):
    vqgan("--log_dir a --train_steps 2 --deterministic")
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    vqgan("--log_dir b --train_steps 2")
    assert_identical(files_of("a", 2), files_of("b", 2))


@pytest.mark.parametrize("end", ["the last step", "an interrupt"])
def test_a_run_none_of_whose_steps_is_finite_saves_nothing(end, monkeypatch, capsys):
    """Nor does it move the run aside that it was to replace."""
    vqgan(f"{FLAGS} --log_dir a --train_steps 2")
    before = {path: path.read_bytes() for path in RunFolder("a").path.rglob("*.th")}
    spoil(monkeypatch, VQGAN, "generator_losses", range(1, 9), "nan")
    if end == "an interrupt":
        at_the_end_of_steps(monkeypatch, lambda loop: loop.interrupt(signal.SIGTERM, None))
    flags = f"{FLAGS} --log_dir a --train_steps 3 --overwrite"
    if end == "an interrupt":
        with pytest.raises(Stopped, match="before a step was trained: the last checkpoint is that"):
            vqgan(flags)
    else:
        line = sentence(train_vqgan.main, f"{VQGAN_FLAGS} {flags}", capsys, monkeypatch)
        assert "none of the steps was finite, so nothing is saved" in line
    assert {path: path.read_bytes() for path in RunFolder("a").path.rglob("*.th")} == before
    assert RunFolder("a").complete_steps() == [2]
