"""The table of curves, and what is drawn of a run's metrics."""

import math

import pytest

from test_training import sampler, vqgan
from utils.logging.curves import (
    BARS, CURVES, FEW_POINTS, HEALTH, PARTS, PICTURES, Trace, bars_of, is_drawn, metrics_in, plots,
    rank, window_of,
)
from utils.logging.logger import read_metrics
from utils.logging.replay import read_board
from utils.runs.folder import RunFolder


def lines(values, group="train", steps=(10, 20, 30)):
    """Lines of a metrics.jsonl: `values` maps a metric to its values at the steps."""
    return [{"step": step, "group": group, "time": 0.0}
            | {name: column[index] for name, column in values.items()}
            for index, step in enumerate(steps)]


def shown(lines, **settings):
    return {plot.title: plot for plot in plots(lines, settings)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of an autoencoder `ae` with a discriminator and a sampler `prior`."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = "--steps_per_log 1 --train_steps 3 --steps_per_eval 2 --steps_per_save_output 2"
        vqgan(f"--log_dir ae {flags} --disc_start_step 0")
        sampler(f"--log_dir prior {flags} --ae_load_dir ae --ae_load_step 3")
    return folder / "logs"


@pytest.mark.parametrize("run, bars, picture", [
    ("ae", "codebook_use", "reconstructions"), ("prior", "loss_per_timestep", "samples"),
])
def test_all_that_a_training_records_is_in_the_table(run, bars, picture, runs):
    folder = RunFolder(run, runs)
    names = {name for line in read_metrics(folder.metrics) for name, _ in metrics_in(line)}
    assert {"loss", "steps_per_second"} <= names
    assert not [name for name in names if window_of(name).part == "others"]
    kept = read_board(folder)
    assert list(kept["bars"]) == [bars] and bars in BARS
    assert kept["health"]["step"] == 3 and kept["health"]["sentences"]
    assert kept["pictures"] == {picture: 3} and picture in PICTURES


def test_every_metric_has_one_window_and_every_window_a_part_and_an_axis():
    stats = [stat for window in CURVES for stat in window.stats]
    assert len(stats) == len(set(stats))
    for window in (*CURVES, *BARS.values()):
        assert window.part in PARTS and window.axis


def test_windows_stand_in_the_order_in_which_one_looks():
    found = shown([
        *lines({"zeta": [1, 2, 3], "steps_per_second": [2, 2, 3], "perplexity": [3, 4, 5],
                "loss": [3, 2, 1], "waiting_for_data": [0.5, 0.25, 0.125]}),
        *lines({"psnr": [10, 20, 30], "codes_used": [5, 6, 7], "loss": [4, 3, 2]}, "validation"),
    ], codebook_size=1024)
    assert list(found) == ["Loss", "Reconstruction PSNR, dB", "Codes in use of 1,024",
                           "Steps per second", "Waiting for data", "zeta"]
    parts = ["pictures", "results", "loss", "validation", "health", "speed", "others", "settings"]
    assert sorted(parts, key=lambda part: rank(part, "a")) == parts
    codes = rank("health", "Codes in use")
    assert rank(*HEALTH) < codes < rank("health", bars_of("codebook_use").title)
    loss = found["Loss"].traces
    assert [(trace.label, trace.dashed, trace.values) for trace in loss] == [
        ("training", False, (3, 2, 1)), ("validation, reconstruction alone", True, (4, 3, 2)),
    ]
    codes = found["Codes in use of 1,024"]
    assert codes.axis == "codes" and len({trace.stat for trace in codes.traces}) == 2
    assert found["Waiting for data"].traces[0].values == (50, 25, 12.5)
    assert found["Waiting for data"].from_zero and not found["Waiting for data"].legend
    assert found["Waiting for data"].axis == "% of the time"


def test_dead_curves_are_left_out():
    nan = math.nan
    found = shown(lines({
        "g_loss": [0, 0, 0], "d_loss": [nan, nan, nan], "d_weight": [0.0, 0.0, 0.0],
        "d_real_right": [0, 0, 0.5], "d_fake_right": [0, 0, 0], "loss": [1, nan, 1],
    }))
    assert list(found) == ["Loss", "Discriminator is right about"]
    right = found["Discriminator is right about"]
    assert right.legend and [trace.label for trace in right.traces] == ["images"]
    assert found["Loss"].traces[0].values == (1, None, 1)


def test_a_logarithmic_axis_has_no_place_for_zero():
    [plot] = plots(lines({"l1": [0.5, 0.25, 0.125], "codebook_loss": [0, -1, 0.1]}), {})
    assert plot.logarithmic and [trace.label for trace in plot.traces] == ["L1", "codebook"]
    assert plot.traces[1].values == (None, None, 0.1)


def test_figures_of_an_experiment_are_curves_once_there_are_two_steps():
    fid = lines({"FID": [9.0], "validation images": [4]}, "FID", [100])
    assert plots(fid, {}) == []
    [plot] = plots([*fid, *lines({"FID": [8.0]}, "FID", [200])], {})
    assert plot.title == "FID" and plot.traces[0].values == (9, 8)
    assert not is_drawn("ids: bits per token (standard error)")


def test_gaps_are_no_points_of_a_short_curve():
    values = (1.0, None) * FEW_POINTS
    steps = tuple(range(len(values)))
    assert Trace("loss", 0, False, steps, values).is_short
    assert not Trace("loss", 0, False, (*steps, 100), (*values, 1.0)).is_short


def test_images_per_second_say_nothing_more_than_steps_per_second():
    old = lines({"images_per_second": [1, 2, 3]})
    assert list(shown(old)) == ["Images per second"]
    assert list(shown([*old, *lines({"steps_per_second": [1, 2, 3]})])) == ["Steps per second"]
