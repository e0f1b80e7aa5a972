"""The benchmarks: what they would train parses, and a small one runs to its end."""

import subprocess
import sys
from argparse import Namespace

import denoiser_ablation
import numpy as np
import pytest
import recipes
import torch

import measure
import sampling
from helpers import ROOT
from hparams import get_sampler_hparams, get_vqgan_hparams


@pytest.mark.parametrize("title", denoiser_ablation.VARIANTS)
def test_every_variant_of_the_ablation_parses(title):
    arguments = Namespace(
        dataset="digits", ae_load_dir="none", ae_load_step=1, train_steps=50, kernels=(3, 7)
    )
    H = get_sampler_hparams(denoiser_ablation.variant_flags(arguments, title))
    assert H.attention == ("full" if title.startswith("full") else "hydra")


def test_step_of_finds_the_first_step_that_is_low_enough():
    points = [(50, 3.0), (100, 2.0), (150, 2.5)]
    assert denoiser_ablation.step_of(points, 2.4) == 100
    assert denoiser_ablation.step_of(points, 1.0) is None


@pytest.mark.parametrize("parts", [False, True])
def test_every_recipe_and_part_parses(parts):
    arguments = Namespace(photographs=".", parts=parts, vgg_weights=None)
    plain = get_vqgan_hparams(recipes.training_flags(arguments, "modern", []))
    for title in recipes.PARTS if parts else recipes.RECIPES:
        flags = recipes.training_flags(arguments, title, ["--train_steps", "900"])
        H = get_vqgan_hparams(flags)
        assert H.recipe == ("published" if title == "published" else "modern")
        assert (H.img_size, H.crops, H.batch_size, H.nf) == (64, 64, 8, 32)
        assert title == "modern" or any(
            getattr(H, name) != getattr(plain, name)
            for name in ("recipe", "optimizer", "codebook_revival", "perceptual_weight",
                         "disc_start_step", "lr_schedule", "ema_warmup", "norm_groups")
            if name != "disc_start_step" or H.disc_start_step > 10**8
        )


def test_measures_of_recipes_tell_blur_and_colour(tmp_path):
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert recipes.detail(blurred) < 0.1 * recipes.detail(x)
    means = x.mean((2, 3)).numpy()
    assert recipes.correlation(means, 0.5 * means + 0.1) == pytest.approx(1)
    assert recipes.correlation(means, -means) == pytest.approx(-1)
    point = dict(psnr=20.0, frechet=100.0, perceptual=None, codes=3)
    curve = [dict(point, step=step) for step in (10, 20)]
    recipes.draw_curves({"modern": [curve, curve]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_numbers_have_three_digits_and_tables_are_markdown():
    values = [None, 0.0, 0.01234, 0.95, 1.234, 12.34, 1234.5]
    assert [measure.number(value) for value in values] == [
        "-", "0.00", "0.0123", "0.950", "1.23", "12.3", "1234"
    ]
    assert measure.table(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


@pytest.mark.slow
def test_attention_benchmark_runs(tmp_path):
    picture = tmp_path / "plot.png"
    command = [sys.executable, "benchmarks/neighborhood_attention.py", "--quick", "--seconds", "0"]
    output = subprocess.run(
        [*command, "--out", str(picture)], cwd=ROOT, capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    assert "| 32x32 | 7 | 1 |" in output.stdout and picture.stat().st_size > 10_000


@pytest.mark.slow
def test_sampling_speed_benchmark_runs():
    command = [sys.executable, "benchmarks/sampling_speed.py", "--width", "32", "--layers", "1"]
    output = subprocess.run(
        [*command, "--canvases", "18", "--repeats", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    assert "canvas of 18x18 ids, native" in output.stdout
    assert "100% of the ids equal" in output.stdout


def test_sampling_distance_matches_the_formula_for_two_gaussians():
    """Of two Gaussians along one axis: (m1 - m2)^2 + (s1 - s2)^2."""
    values = np.random.RandomState(0).randn(1000, 1)
    values = (values - values.mean()) / values.std(ddof=1) * [1, 0]
    assert sampling.distance(values, [3, 0] + 2 * values) == pytest.approx(9 + 1)


def test_plain_loop_draws_every_id():
    ids = sampling.plain_loop(
        lambda ids: torch.zeros(*ids.shape, 5), torch.full((4, 24), 5), 5, 10, 1.0
    )
    assert ids.max() < 5 and len(ids.unique()) == 5
