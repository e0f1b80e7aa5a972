"""A training step asks for nothing that a GPU would have to be waited for, and does what the
settings for short memory say."""

import pytest
import torch
from gpu_setup import Operations
from test_modern_training import MODERN, photos

import train_sampler
import train_vqgan
from hparams import get_sampler_hparams, get_vqgan_hparams
from test_training import (
    SAMPLER, VQGAN, assert_identical, files_of, sampler, trained, two_runs, vqgan, workplace,
)
from utils.runs.script import start_run
from utils.training.processes import init_processes
from utils.training.step import take_step

__all__ = ["photos", "trained", "two_runs", "workplace"]  # fixtures of this file too


def operations_of_second_step(kind, H, half):
    """Operations of the whole second step of a training, in bfloat16 or, with `half`, in float16
    with a gradient scaler."""
    processes = init_processes("cpu")
    with start_run(H, processes) as log:
        training = kind(H, log, processes)
    precision = training.precision
    precision.dtype = torch.float16 if half else torch.bfloat16
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=half)
    model = training.vqgan if kind is train_vqgan.VQGANTraining else training.sampler
    model.train()
    torch.manual_seed(0)
    if kind is train_vqgan.VQGANTraining:
        batch = torch.rand(H.batch_size, H.n_channels, H.img_size, H.img_size)
        optimizers = list(training.optimizers.values())
    else:
        batch = training.ids[: H.batch_size, 0].long()
        optimizers = [training.optimizer]
    buffers = getattr(training, "buffers", None)
    for step in (H.train_steps - 1, H.train_steps):
        with Operations() as operations:
            if buffers is not None:
                buffers.keep()
            losses, *_ = training.gradients(step, batch)
            outcome = take_step(losses, optimizers, precision, processes, 1.0, buffers)
            if training.ema:
                training.ema.update(step, outcome.bad)
            if kind is train_sampler.SamplerTraining:
                model.end_step(outcome.bad)
                training.update_histories()
        assert not outcome.bad
    return operations


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("flags", [
    "--position rpb absolute", "--position rope absolute --optimizer adam --mask_schedule fixed",
    "--attention full --optimizer adamw", "--sampler autoregressive",
])
def test_a_step_of_a_sampler_waits_for_nothing(flags, half, two_runs):
    H = get_sampler_hparams(f"{SAMPLER} --log_dir a --train_steps 9 {flags}".split())
    operations = operations_of_second_step(train_sampler.SamplerTraining, H, half)
    assert operations.total > 100 and operations.waits == {}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("flags", [
    "--disc_start_step 0 --diff_aug", "--disc_start_step 0 --quantizer gumbel",
    "--recipe modern --disc_start_step 0 --disc_lead_steps 0 --disc_fade_steps 0 "
    "--codebook_start_step 0 --codebook_revival 5",
])
def test_a_step_of_an_autoencoder_waits_for_nothing(flags, half, workplace):
    H = get_vqgan_hparams(f"{VQGAN} --log_dir a --train_steps 9 {flags}".split())
    operations = operations_of_second_step(train_vqgan.VQGANTraining, H, half)
    assert operations.total > 100 and operations.waits == {}


def test_a_modern_step_on_photographs_waits_for_nothing(photos):
    flags = f"{photos} {MODERN} --log_dir a".replace("--ema", "")
    H = get_vqgan_hparams(flags.split())
    assert H.perceptual == "efficientnet_lite0"
    operations = operations_of_second_step(train_vqgan.VQGANTraining, H, False)
    assert operations.total > 100 and operations.waits == {}


@pytest.mark.parametrize("flags", [
    "--optimizer adam", "--optimizer muon --mask_schedule fixed --t_sampling uniform"
])
def test_a_sampler_learns_the_same_in_parts(flags, two_runs):
    """Weights and what is known of each time's loss."""
    flags = f"{flags} --embd_pdrop 0 --resid_pdrop 0 --steps_per_log 1 --train_steps 4"
    sampler(f"{flags} --log_dir whole")
    sampler(f"{flags} --log_dir parts --accumulate 4")
    sampler(f"{flags} --log_dir blocks --checkpoint_blocks")
    whole = files_of("whole", 4)["absorbing_4.th"]
    for run in ("parts", "blocks"):
        state = files_of(run, 4)["absorbing_4.th"]
        for name, value in whole.items():
            assert torch.allclose(value, state[name], rtol=1e-3, atol=2e-3), (run, name)


def test_an_autoencoder_learns_the_same_in_parts(workplace):
    flags = "--steps_per_log 1 --lr 1e-4 --train_steps 4 --num_workers 0"
    vqgan(f"{flags} --log_dir whole")
    vqgan(f"{flags} --log_dir parts --accumulate 2")
    vqgan(f"{flags} --log_dir blocks --checkpoint_blocks")
    whole = files_of("whole", 4)["vqgan_4.th"]
    assert_identical(whole, files_of("blocks", 4)["vqgan_4.th"])
    parts = files_of("parts", 4)["vqgan_4.th"]
    assert all(torch.allclose(value, parts[name], atol=5e-4) for name, value in whole.items())


def test_parts_divide_the_batch(capsys):
    with pytest.raises(SystemExit):
        get_vqgan_hparams(f"{VQGAN} --accumulate 3".split())
    assert "--accumulate 3 does not divide --batch_size 4" in capsys.readouterr().err
