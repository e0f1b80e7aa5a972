"""The benchmarks: what they would train parses, and a small one runs to its end."""

import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import denoiser_ablation
import numpy as np
import pytest
import recipes
import torch
from PIL import Image

import measure
import sampling
import train_vqgan
from helpers import ROOT
from hparams import get_sampler_hparams, get_vqgan_hparams
from models import VQGAN
from utils.runs.folder import RunFolder
from utils.training.build import check_models


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
@pytest.mark.parametrize("weights", [None, "vgg16.pth"])
def test_every_recipe_and_part_parses(parts, weights):
    arguments = Namespace(photographs=".", parts=parts, vgg_weights=weights)
    plain = get_vqgan_hparams(recipes.training_flags(arguments, "modern", []))
    for title in recipes.PARTS if parts else recipes.RECIPES:
        flags = recipes.training_flags(arguments, title, ["--train_steps", "900"])
        H = get_vqgan_hparams(flags)
        check_models(H, VQGAN)
        assert H.recipe == ("published" if title == "published" else "modern")
        assert H.vgg_weights == (weights if H.perceptual == "lpips" else None)
        assert (H.img_size, H.crops, H.batch_size, H.nf) == (64, 64, 8, 32)
        assert title == "modern" or any(
            getattr(H, name) != getattr(plain, name)
            for name in ("recipe", "optimizer", "codebook_start_step", "codebook_revival",
                         "perceptual_weight", "disc_start_step", "disc_input", "disc_lead_steps",
                         "disc_weight", "lr_schedule", "ema_warmup", "norm_groups")
            if name != "disc_start_step" or H.disc_start_step > 10**8
        )


def test_measures_of_recipes_tell_blur_and_colour(tmp_path):
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert recipes.detail(blurred) < 0.1 * recipes.detail(x)
    means = x.mean((2, 3)).numpy()
    assert recipes.correlation(means, 0.5 * means + 0.1) == pytest.approx(1)
    assert recipes.correlation(means, -means) == pytest.approx(-1)
    assert recipes.correlation(means, np.full_like(means, 0.3)) == 0
    point = dict(psnr=20.0, frechet=100.0, perceptual=None, codes=3)
    curve = [dict(point, step=step) for step in (10, 20)]
    recipes.draw_curves({"modern": [curve, curve]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("flags, says", [
    ("--minutes 12", "--minutes must be a multiple of 5"), ("--minutes 0", "a multiple of 5"),
    ("--variants 0 99", "--variants must be numbers from 0 to 2"),
    ("--parts --variants -1", "from 0 to 13"), ("--seed 3", "--seed of train_vqgan.py is set"),
    ("--train_steps=9", "--train_steps of train_vqgan.py is set"),
])
def test_wrong_flags_of_recipes_get_a_sentence(flags, says, capsys):
    with pytest.raises(SystemExit) as stop:
        recipes.parse_arguments(["--photographs", ".", *flags.split()])
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_other_flags_of_recipes_are_handed_on():
    arguments, handed_on = recipes.parse_arguments(
        "--photographs . --minutes 10 --image 3 --cache_pixels".split())
    assert arguments.minutes == 10 and handed_on == ["--image", "3", "--cache_pixels"]


TINY = ("--img_size 16 --ch_mult 1 1 --attn_resolutions 8 --nf 8 --norm_groups 4 --emb_dim 8 "
        "--codebook_size 16 --ndf 8 --disc_layers 1 --batch_size 2 --res_blocks 1 "
        "--perceptual none --crops 16").split()


class Trainings:
    """In place of train_vqgan.py: trainings that learn nothing and take 100 seconds a step.

    `done` has of each (its run, the step that it began with, the last one); in so many steps as
    `ends_after` one is interrupted.
    """

    def __init__(self):
        self.seconds, self.done, self.ends_after = 0, [], math.inf

    def run(self, command, **options):
        assert Path(command[1]) == ROOT / "train_vqgan.py"
        name, steps = (command[command.index(flag) + 1] for flag in ("--log_dir", "--train_steps"))
        folder = RunFolder(name).create()
        begins = max(folder.complete_steps(), default=0) if "--resume" in command else 0
        ends = min(int(steps), begins + self.ends_after)
        self.seconds += 100 * (ends - begins)
        self.done.append((name, begins, ends))
        folder.manifest(ends).touch()
        return SimpleNamespace(returncode=int(ends < int(steps)), stderr="stopped")

    def getrusage(self, who):
        return SimpleNamespace(ru_utime=self.seconds)


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainings = Trainings()
    monkeypatch.setattr(recipes.subprocess, "run", trainings.run)
    monkeypatch.setattr(recipes.resource, "getrusage", trainings.getrusage)
    return trainings


def test_interrupted_trials_of_recipes_begin_anew(trainings):
    """Else a step would take as long as what is left of a trial."""
    trainings.ends_after = 50
    with pytest.raises(SystemExit, match="stopped"):
        recipes.seconds_of_step("published", TINY, "0")
    trainings.ends_after = math.inf
    for _ in range(2):
        assert recipes.seconds_of_step("published", TINY, "0") == 100
    assert [steps for _, *steps in trainings.done] == [[0, 30], [0, 50], [0, 30], [0, 90]]


def test_recipes_are_trained_once_and_go_on(trainings):
    arguments = Namespace(photographs="photos", parts=False, vgg_weights=None, minutes=10)

    def train():
        seconds, every, name, flags = recipes.trained(arguments, "modern", 3, TINY)
        assert seconds == 100 and every == 3
        assert flags[-6:] == ["--seed", "3", "--train_steps", "6", "--log_dir", name]
        return name

    name = train()
    assert train() == name
    assert trainings.done[2:] == [(name, 0, 6)]
    RunFolder(name).model("vqgan_ema", 6).touch()
    RunFolder(name).manifest(6).unlink()  # the file alone may be half written
    trainings.ends_after = 4
    with pytest.raises(SystemExit, match="stopped"):
        train()
    train()
    assert trainings.done[3:] == [(name, 0, 4), (name, 4, 6)]


def test_recipes_are_measured_and_drawn(tmp_path, monkeypatch, capsys):
    def run(command, **options):
        train_vqgan.main(command[2:])
        runs.append(command[command.index("--log_dir") + 1])
        return SimpleNamespace(returncode=0)

    runs, random = [], np.random.RandomState(0)
    monkeypatch.setattr(recipes.subprocess, "run", run)
    monkeypatch.setattr(recipes, "seconds_of_step", lambda *_: 100)
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number in range(20):
        values = random.randint(0, 127, (20, 24, 3)) + random.randint(0, 128, 3)
        Image.fromarray(values.astype(np.uint8)).save(f"photos/{number}.png")
    monkeypatch.setattr(sys, "argv", [
        "recipes.py", "--photographs", "photos", "--images", "2", "--variants", "1", "--minutes",
        "10", *TINY])
    tables = []
    for _ in range(2):  # which trains and measures nothing again
        recipes.main()
        tables.append(capsys.readouterr().out.splitlines()[-3])
    assert len(runs) == 1 and tables[0] == tables[1]
    cells = [cell.strip() for cell in tables[0].strip("|").split("|")]
    assert cells[:4] == ["modern", "0", "6", "100"] and len(cells) == len(recipes.HEAD)
    drawn = np.asarray(Image.open("recipes_pictures.png"))
    assert drawn.shape[:2] == (2 * (3 * 16 + 3) + 3, 8 * (3 * 16 + 3) + 3) and drawn.std() > 10
    assert Image.open("recipes_curves.png").width > 500
    found = [json.loads(path.read_text()) for path in RunFolder(runs[0]).path.glob("figures_*")]
    assert sorted(figures["step"] for figures in found) == [3, 6]
    for figures in found:
        assert figures["model"] in ("vqgan", "vqgan_ema") and figures["perceptual"] is None
        assert 0 < figures["codes"] <= 16 and figures["detail"] > 0


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
