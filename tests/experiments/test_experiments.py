"""The measuring scripts from end to end on tiny runs: samples that go on, results that tell."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock, call

import numpy as np
import pytest
import scipy
import torch
import torchvision
from PIL import Image, ImageCms

import train_sampler
import train_vqgan
from experiments import (
    calc_approximate_ELBO, calc_FID, calc_nearest_neighbours, calc_PRDC, calc_VQGAN_FID,
    digits_report, get_samples, inpaint,
)
from helpers import ON_DIGITS, ROOT, wait_until, with_small_files
from hparams import UserError, get_samples_hparams
from models import AutoregressiveTransformer
from models.autoencoder.perceptual import PerceptualDistance, load_vgg16
from models.autoencoder.vqgan import VQAutoEncoder
from utils.data.images import Digits
from utils.data.split import train_validation_split
from utils.errors import DiskError
from utils.evaluation import samples as sampling
from utils.evaluation.experiment import experiment, read_results
from utils.files import file_hash, save_file
from utils.runs.folder import RunFolder

VQGAN = (
    f"{ON_DIGITS} "
    "--img_size 16 --ch_mult 1 1 --attn_resolutions 8 --emb_dim 8 "
    "--codebook_size 16 --ndf 8 --disc_layers 1 --batch_size 4 --no_visdom --train_steps 2"
)
SAMPLER = (
    f"{ON_DIGITS} --ae_load_dir ae --ae_load_step 2 --bert_n_emb 32 --bert_n_head 4 "
    "--bert_n_layers 1 --total_steps 16 --sample_steps 8 --batch_size 8 --no_visdom "
    "--train_steps 2"
)
LOAD = "--load_dir prior --load_step 2 --no_visdom"
PUBLISHED = f"--sampler absorbing --dataset digits --ae_load_dir ae --ae_load_step 2 {LOAD} --ema"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the runs `ae`, `prior`, `causal`, and `plain`, whose file does not tell the
    number of heads nor their kernels; trained for two steps."""
    folder, here = tmp_path_factory.mktemp("trained"), os.getcwd()
    os.chdir(folder)
    try:
        train_vqgan.main([*VQGAN.split(), "--log_dir", "ae", "--ema"])
        flags = [*SAMPLER.split(), "--sampler"]
        train_sampler.main([*flags, "absorbing", "--log_dir", "prior", "--ema"])
        train_sampler.main([*flags, "autoregressive", "--log_dir", "causal"])
        train_sampler.main([*flags, "absorbing", "--log_dir", "plain", "--position", "absolute"])
    finally:
        os.chdir(here)
    return folder


@pytest.fixture(autouse=True)
def workplace(trained, tiny, tmp_path):
    """A folder of one's own that holds the runs."""
    shutil.copytree(trained / "logs", tmp_path / "logs")
    return tmp_path


def run(script, flags, log_dir="out"):
    """Run a script; the figures that it has added to logs/<log_dir>/results.json."""
    script.main([*flags.split(), "--log_dir", log_dir])
    return list(read_results(RunFolder(log_dir).results).values())[-1]["figures"]


def tensors(folder):
    return {path.name: torch.load(path)["ids"] for path in folder.glob("*/*.pt")}


def test_the_published_commands():
    fid = run(calc_FID, f"{PUBLISHED} --n_samples 70 --temp 0.9")
    assert (fid["images"], fid["real images"]) == (70, 1797) and fid["FID"] > 0
    prdc = run(calc_PRDC, f"{PUBLISHED} --n_samples 70 --temp 0.9")
    assert (prdc["samples"], prdc["real images"]) == (70, 70)
    vqgan = "--dataset digits --load_dir ae --load_step 2 --no_visdom"
    fid = run(calc_VQGAN_FID, vqgan)
    assert (fid["images"], fid["real images"]) == (1797, 1797) and fid["PSNR (dB)"] > 0
    assert run(get_samples, f"{PUBLISHED} --n_samples 3")["samples"] == 3
    names = {name.rsplit(" ", 1)[0] for name in read_results(RunFolder("out").results)}
    assert names == {"FID", "PRDC", "VQGAN FID", "samples"}


def test_everything_that_is_measured_on_the_features():
    flags = f"{LOAD} --n_samples 66 --kid --kid_subset_size 50 --isc --prc"
    for load in ("--load_dir prior", "--load_dir causal"):
        figures = run(calc_FID, f"{flags} {load}")
        assert all(np.isfinite(value) for value in figures.values())
        assert 0 <= figures["precision"] <= 1 and 1 <= figures["IS"] <= 5


def test_with_real_weights():
    """No connection, no file: the extractor that is installed with its own."""
    run(get_samples, f"{LOAD} --n_samples 4 --save_individually", "photos")
    photos = RunFolder("photos").images / "samples_2"
    flags = f"{LOAD} --dataset custom --custom_dataset_path {photos} --n_samples 3"
    figures = run(calc_FID, f"{flags} --feature_extractor efficientnet_lite0")
    assert (figures["images"], figures["real images"]) == (3, 4)
    [result] = read_results(RunFolder("out").results).values()
    assert result["manifest"]["extractor"]["extractor"] == "efficientnet-lite0"


def test_samples_do_not_depend_on_the_batch_size():
    figures = {
        size: run(calc_FID, f"{LOAD} --n_samples 70 --batch_size {size}", f"batch{size}")["FID"]
        for size in (1, 7, 64)
    }
    assert figures[1] == pytest.approx(figures[7], rel=1e-6)
    assert figures[1] == pytest.approx(figures[64], rel=1e-6)
    ids = [tensors(RunFolder(f"batch{size}").samples) for size in figures]
    assert ids[0].keys() == {"000000_64.pt", "000064_6.pt"}
    for other in ids[1:]:
        assert all(torch.equal(ids[0][name], other[name]) for name in ids[0])


def test_an_interrupted_measurement_goes_on(monkeypatch):
    flags = f"{LOAD} --n_samples 200"
    undisturbed = run(calc_FID, flags, "undisturbed")
    draws = []
    step_seed = sampling.step_seed

    def die_at_the_third(seed, first, purpose):
        draws.append(first)
        if len(draws) == 3:
            raise KeyboardInterrupt
        return step_seed(seed, first, purpose)

    monkeypatch.setattr(sampling, "step_seed", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(calc_FID, flags)
    assert run(calc_FID, flags) == undisturbed
    assert draws == [0, 64, 128, 128, 192]
    assert run(calc_FID, flags) == undisturbed and len(draws) == 5
    # other settings, other samples
    assert run(calc_FID, f"{flags} --temp 0.5") != undisturbed and len(draws) == 9
    assert run(calc_FID, f"{flags} --seed 1") != undisturbed and len(draws) == 13


def test_a_full_disk_ends_a_measurement_that_goes_on_once_there_is_room(monkeypatch):
    flags = f"{LOAD} --n_samples 200"
    undisturbed = run(calc_FID, flags, "undisturbed")
    step_seed = sampling.step_seed

    def fill_the_disk(seed, first, purpose):
        if first == 128:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        return step_seed(seed, first, purpose)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patched:
        patched.setattr(sampling, "step_seed", fill_the_disk)
        with pytest.raises(DiskError, match="cannot write logs/out/samples/.*File too large"):
            with_small_files(limits[0], lambda: run(calc_FID, flags))
    out = RunFolder("out")
    assert tensors(out.samples).keys() == {"000000_64.pt", "000064_64.pt"}
    assert not out.results.exists() and not list(out.path.rglob("*.tmp"))
    assert run(calc_FID, flags) == undisturbed
    assert tensors(out.samples).keys() == {
        "000000_64.pt", "000064_64.pt", "000128_64.pt", "000192_8.pt"
    }


@pytest.mark.slow
def test_kill_9_at_any_moment(workplace):
    flags = f"{LOAD} --n_samples 640 --save_individually"
    command = [sys.executable, str(ROOT / "experiments" / "get_samples.py"), *flags.split()]
    for chunks in (1, 4):
        process = subprocess.Popen(
            [*command, "--log_dir", "killed"], cwd=workplace, stderr=subprocess.DEVNULL
        )
        folder = RunFolder("killed").samples
        wait_until(
            lambda: len(list(folder.glob("*/*.pt"))) >= chunks or process.poll() is not None,
            seconds=180,
        )
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not RunFolder("killed").results.exists()
    subprocess.run([*command, "--log_dir", "killed"], cwd=workplace, check=True)
    subprocess.run([*command, "--log_dir", "whole"], cwd=workplace, check=True)
    killed, whole = (torch.load(RunFolder(name).path / "ids_2.pt") for name in ("killed", "whole"))
    assert len(whole) == 640 and torch.equal(killed, whole)
    singles = [sorted((RunFolder(name).images / "samples_2").iterdir())
               for name in ("killed", "whole")]
    assert [p.read_bytes() for p in singles[0]] == [p.read_bytes() for p in singles[1]]


def test_ids_from_a_file():
    drawn = run(calc_FID, f"{LOAD} --n_samples 70")
    run(get_samples, f"{LOAD} --n_samples 70", "ids")
    path = RunFolder("ids").path / "ids_2.pt"
    assert run(calc_FID, f"{LOAD} --n_samples 70 --latents_path {path}") == drawn
    assert run(calc_FID, f"{LOAD} --n_samples 20 --latents_path {path}")["images"] == 20
    ids = torch.load(path)
    for content, says in (
        (ids[:10], "10 x 64 ids where 70 x 64 are needed"),
        (ids[:, 1:], "70 x 63 ids"),
        (ids + 1, "ids outside 0..15"),
        (ids.float(), "does not hold a tensor of ids"),
        ({}, "does not hold a tensor of ids"),
    ):
        save_file(content, path)
        with pytest.raises(UserError, match=says):
            run(calc_FID, f"{LOAD} --n_samples 70 --latents_path {path}")


def test_results_are_kept_apart_and_tell_how_they_came_about():
    flags = f"{LOAD} --n_samples 20 --sample_steps 8"
    first = run(calc_FID, flags)
    run(calc_FID, f"{flags} --temp 0.5")
    run(calc_FID, flags)  # the same measurement again
    results = read_results(RunFolder("out").results)
    assert len(results) == 2
    manifest = list(results.values())[-1]["manifest"]
    assert list(results.values())[-1]["figures"] == first
    sampler = manifest["checkpoints"]["sampler"]
    assert sampler["path"].endswith("absorbing_ema_2.th") and sampler["step"] == 2
    assert sampler["sha256"] == file_hash(sampler["path"])
    assert manifest["samples"]["sample_steps"] == 8 and manifest["samples"]["seed"] == 0
    assert manifest["data"]["images"] == 1797 and len(manifest["data"]["fingerprint"]) == 64
    assert manifest["extractor"]["extractor"] == "tiny"
    assert manifest["versions"]["torch"] and manifest["hyperparameters"]["n_samples"] == 20
    lines = [json.loads(line) for line in RunFolder("out").metrics.read_text().splitlines()]
    assert [line["group"] for line in lines] == ["FID"] * 3
    RunFolder("out").results.write_text("{")
    with pytest.raises(UserError, match="results.json is no JSON"):
        run(calc_FID, flags)


def test_only_this_runs_images_are_in_its_folder():
    run(get_samples, f"{LOAD} --n_samples 9 --save_individually")
    run(get_samples, f"{LOAD} --n_samples 5 --save_individually")
    assert len(list((RunFolder("out").images / "samples_2").iterdir())) == 5
    run(calc_FID, f"{LOAD} --n_samples 5")  # writes none, and leaves those
    assert len(list((RunFolder("out").images / "samples_2").iterdir())) == 5
    run(calc_FID, f"{LOAD} --n_samples 3 --save_individually")
    assert len(list((RunFolder("out").images / "samples_2").iterdir())) == 3
    reconstructions = RunFolder("out").images / "reconstructions_2"
    reconstructions.mkdir()
    (reconstructions / "001797.png").touch()  # of a larger dataset
    run(calc_VQGAN_FID, "--load_dir ae --load_step 2 --no_visdom --save_individually")
    assert len(list(reconstructions.iterdir())) == 1797


def test_the_folder_of_a_training_is_no_place_for_an_experiment():
    """Its samples would replace those that the training drew at that step."""
    before = RunFolder("prior").log.read_bytes()
    with pytest.raises(UserError, match="--log_dir prior is the run of a training"):
        run(get_samples, f"{LOAD} --n_samples 2", log_dir="prior")
    assert RunFolder("prior").log.read_bytes() == before


def test_images_stay_where_kept_features_need_them_no_more():
    flags = f"{LOAD} --n_samples 70 --fake_feats fake.npy --save_individually"
    first = run(calc_PRDC, flags)
    folder = RunFolder("out").images / "samples_2"
    images = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(images) == 70 and run(calc_PRDC, flags) == first
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == images


@pytest.mark.parametrize("change", [
    "--sample_type halton", "--sample_type remdm --remask 0.5", "--temp 0.5", "--seed 1",
    "--sample_type confidence --choice_temp 1", "--sample_steps 4", "--amp",
    "--bert_n_head 2", "--kernel_sizes 3 5",
])
def test_kept_ids_are_those_of_all_settings(change, monkeypatch):
    """Also of what a published file, without settings beside it, does not tell."""
    monkeypatch.setattr("utils.training.precision.cpu_has_bfloat16", lambda: True)
    for name in ("ae", "plain"):
        folder = RunFolder(name)
        for path in (folder.hparams, folder.stats(2), folder.manifest(2)):
            path.unlink()
    architecture = (
        "--img_size 16 --ch_mult 1 1 --attn_resolutions 8 --emb_dim 8 --codebook_size 16 --ndf 8 "
        "--disc_layers 1 --bert_n_emb 32 --bert_n_layers 1 --total_steps 16 --position absolute"
    )
    load = PUBLISHED.replace("prior", "plain").replace("--ema", "")
    flags = f"{load} {architecture} --bert_n_head 4 --sample_steps 8 --n_samples 2"
    run(get_samples, flags)
    assert len(tensors(RunFolder("out").samples)) == 1
    run(get_samples, f"{flags} {change}")
    assert len(list(RunFolder("out").samples.iterdir())) == 2


def test_prdc_of_samples_of_a_folder_and_of_kept_features():
    # Samples of another seed stand for the real images: these models draw nothing like digits.
    run(get_samples, f"{LOAD} --n_samples 90 --seed 1 --save_individually", "real")
    real = RunFolder("real").images / "samples_2"
    load = f"{LOAD} --dataset custom --custom_dataset_path {real} --num_workers 0"
    flags = f"{load} --n_samples 70 --nearest_k 5"
    drawn = run(calc_PRDC, flags)
    assert all(0 < value for value in drawn.values())
    run(get_samples, f"{load} --n_samples 70 --save_individually")
    folder = RunFolder("out").images / "samples_2"
    assert run(calc_PRDC, f"{flags} --fake_images_path {folder}") == drawn
    with pytest.raises(UserError, match="holds 70 images, fewer than --n_samples 71"):
        run(calc_PRDC, f"{load} --n_samples 71 --fake_images_path {folder}")

    kept = f"{flags} --real_feats real.npy --fake_feats fake.npy"
    assert run(calc_PRDC, kept) == drawn
    written = np.load("fake.npy")
    assert written.shape == (70, 16) and run(calc_PRDC, kept) == drawn
    assert run(calc_PRDC, f"{kept} --temp 0.5") != drawn  # never the stale ones
    assert not np.array_equal(np.load("fake.npy"), written)
    assert run(calc_PRDC, kept) == drawn
    np.save("mine.npy", np.load("real.npy"))
    same = run(calc_PRDC, f"{flags} --real_feats real.npy --fake_feats mine.npy")
    assert same["recall"] == same["coverage"] == 1
    result = list(read_results(RunFolder("out").results).values())[-1]
    assert result["manifest"]["features"]["mine.npy"] == file_hash("mine.npy")
    np.save("mine.npy", np.zeros((70, 3), dtype=np.float32))
    with pytest.raises(UserError, match="different extractors"):
        run(calc_PRDC, f"{flags} --fake_feats mine.npy")
    with pytest.raises(UserError, match="--nearest_k 70"):
        run(calc_PRDC, f"{flags} --nearest_k 70")


def test_a_large_dataset_is_compared_in_part(workplace):
    """KID and precision of a few samples do not take the features of everything."""
    figures = run(calc_FID, f"{LOAD} --n_samples 30 --prc")
    assert figures["real images"] == 1797
    assert [len(np.load(path)) for path in (workplace / "statistics").glob("*.npy")] == [30]


def test_an_experiment_reports_what_is_unknown():
    H = get_samples_hparams([*LOAD.split(), "--n_samples", "3", "--log_dir", "out"])
    with experiment(H, "mine") as this:
        this.report({"known": 0.5, "not": None}, distances=[1, 2])
    [result] = read_results(RunFolder("out").results).values()
    assert result["figures"] == {"known": 0.5, "not": None} and result["distances"] == [1, 2]
    assert "\n| known | 0.5 |\n| not | unknown |\n" in RunFolder("out").log.read_text()


def test_a_table_is_sent_to_the_board_once_and_comes_back_as_it_was(monkeypatch):
    board = Mock()
    monkeypatch.setattr("utils.runs.script.VisdomBoard", lambda *_, **__: board)
    H = get_samples_hparams([*LOAD.split(), "--n_samples", "3", "--log_dir", "out"])
    H.no_visdom = False
    with experiment(H, "mine") as this:
        this.report({"known": 0.5, "not": None})
    shown = call.table("mine", {"known": "0.5", "not": "unknown"})
    assert [found for found in board.mock_calls if found[0] == "table"] == [shown]
    with experiment(H, "another"):
        assert [found for found in board.mock_calls if found[0] == "table"] == [shown] * 2


def strict(path):
    """What a file of strict JSON holds."""
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null_and_named():
    H = get_samples_hparams([*LOAD.split(), "--n_samples", "3", "--log_dir", "out"])
    out, many = RunFolder("out"), [math.inf] * 12
    with experiment(H, "mine") as this:
        this.report({"a": math.nan, "b": -math.inf, "c": 1.5}, rows=[{"d": (2, math.inf)}, []])
        this.report({"a": math.nan, "b": -math.inf, "c": 1.5}, many=many)
        this.report({"c": 1.5})
    [result] = strict(out.results).values()
    assert result["figures"] == {"c": 1.5}
    lines = [line.partition("WARNING ")[2] for line in out.log.read_text().splitlines()
             if "WARNING" in line]
    assert lines[0] == "not finite, and so unknown: a; b; rows/0/d/1"
    assert lines[1].startswith("not finite, and so unknown: a; b; many/0; ") and len(lines) == 2
    assert lines[1].endswith("; many/7 and 4 more")
    assert "\n| a | unknown |\n| b | unknown |\n| c | 1.5 |\n" in out.log.read_text()
    lines = list(map(json.loads, out.metrics.read_text().splitlines()))
    assert [[line.get(name) for name in "abc"] for line in lines] == [["nan", "nan", 1.5]] * 2 + [
        [None, None, 1.5]]


def test_null_takes_the_place_of_what_is_not_finite_in_results():
    H = get_samples_hparams([*LOAD.split(), "--n_samples", "3", "--log_dir", "out"])
    with experiment(H, "mine") as this:
        this.report({"a": math.nan, "c": 1.5}, rows=[{"d": (2, math.inf)}, []])
    [result] = strict(RunFolder("out").results).values()
    assert result["figures"] == {"a": None, "c": 1.5}
    assert result["rows"] == [{"d": [2, None]}, []]


def test_results_with_nan_of_earlier_versions_are_read_and_become_strict():
    path = RunFolder("out").create().results
    path.write_text('{"FID 0": {"figures": {"FID": NaN, "images": 2}, "rows": [-Infinity]}}')
    assert math.isnan(read_results(path)["FID 0"]["figures"]["FID"])
    run(get_samples, f"{LOAD} --n_samples 3")
    old, new = strict(path).values()
    assert old == {"figures": {"FID": None, "images": 2}, "rows": [None]}
    assert new["figures"]["samples"] == 3


@pytest.mark.parametrize("script, flags, says", [
    (calc_FID, f"{LOAD} --n_samples 2 --prc", "--prc, .* needs 4 generated images or more, not 2"),
    (calc_FID, f"{LOAD} --n_samples 9 --isc", "needs 10 generated images or more, not 9"),
    (calc_FID, f"{LOAD} --n_samples 9 --kid", "needs 1000 generated images or more, not 9"),
    (calc_FID, f"{LOAD} --n_samples 9 CUSTOM 1", "FID needs 2 real images or more, not 1"),
    (calc_FID, f"{LOAD} --n_samples 9 --prc CUSTOM 3", "needs 4 real images or more, not 3"),
    (calc_PRDC, f"{LOAD} --n_samples 3", "--nearest_k 3 needs 4 generated images or more, not 3"),
    (calc_PRDC, f"{LOAD} --n_samples 9 --real_feats new.npy CUSTOM 2",
     "needs 4 real images or more, not 2: add images to the dataset, or lower --nearest_k"),
    (calc_VQGAN_FID, "--load_dir ae --load_step 2 --no_visdom CUSTOM 1",
     "FID needs 2 generated images or more, not 1: add images to the dataset"),
    (digits_report, f"{LOAD} --n_samples 1", "--n_samples 1 is too few .*: give 2 or more"),
])
def test_too_few_images_are_refused_before_any_is_drawn(script, flags, says, workplace):
    for index in range(3):
        for count in range(index + 1, 4):
            (workplace / str(count)).mkdir(exist_ok=True)
            Image.new("L", (16, 16), index).save(workplace / str(count) / f"{index}.png")
    flags = flags.replace("CUSTOM", "--dataset custom --custom_dataset_path")
    with pytest.raises(UserError, match=says):
        run(script, flags)
    assert not RunFolder("out").samples.exists() and not (workplace / "statistics").exists()


def test_too_few_features_of_ones_own_are_refused_before_any_sample_is_drawn():
    np.save("mine.npy", np.zeros((2, 16), dtype=np.float32))
    with pytest.raises(UserError, match="needs 4 real images or more, not 2"):
        run(calc_PRDC, f"{LOAD} --n_samples 9 --real_feats mine.npy")
    assert not RunFolder("out").samples.exists()
    with pytest.raises(UserError, match="needs 4 generated images or more, not 2"):
        run(calc_PRDC, f"{LOAD} --n_samples 9 --fake_feats mine.npy")
    np.save("mine.npy", np.random.RandomState(0).rand(5, 16).astype(np.float32))
    figures = run(calc_PRDC, f"{LOAD} --n_samples 2 --fake_feats mine.npy --nearest_k 1")
    assert (figures["samples"], figures["real images"]) == (5, 2)


# --- filling in ----------------------------------------------------------------------------------


@pytest.fixture
def photograph(workplace):
    """A colour photograph of 50x40 pixels, whose square of 40 begins at 5: uint8 [40, 50, 3]."""
    pixels = np.random.RandomState(0).randint(0, 256, (40, 50, 3)).astype(np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(workplace / "photo.png", icc_profile=profile)
    return pixels


def fill_in(flags, log_dir="out"):
    """(completions of the model's size, at the image's own) by inpaint.py: uint8 arrays."""
    flags = f"{LOAD} --n_samples 2 --save_individually --log_dir {log_dir} {flags}"
    inpaint.main(flags.split())
    folders = (RunFolder(log_dir).images / name for name in ("inpaint_2", "inpaint_2_full"))
    return [[np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))]
            for folder in folders]


def assert_filled_in(photograph, hidden, small, full):
    """The hidden pixels of a photograph, bool [40, 50], and no others are those of the completions,
    enlarged."""
    assert len(small) == len(full) == 2
    for completion, whole in zip(small, full):
        assert completion.shape == (16, 16) and whole.shape == photograph.shape
        assert np.array_equal(whole[~hidden], photograph[~hidden])
        assert (whole[hidden] != photograph[hidden]).any()
        enlarged = Image.fromarray(completion).resize((40, 40), Image.Resampling.BICUBIC)
        expected = np.zeros((40, 50, 3), dtype=np.uint8)
        expected[:, 5:45] = np.asarray(enlarged)[:, :, None]  # the model is grey
        assert np.array_equal(whole[hidden], expected[hidden])


def test_a_box_is_filled_in_at_the_photographs_own_size(photograph):
    hidden = np.zeros((40, 50), dtype=bool)
    hidden[5:20, 15:30] = True  # 2.5 pixels for each of the model's
    assert_filled_in(photograph, hidden, *fill_in("--image photo.png --box 4 2 10 8"))
    whole = Image.open(RunFolder("out").images / "inpaint_2_full" / "000000.png")
    assert whole.info["icc_profile"] == Image.open("photo.png").info["icc_profile"]
    log = RunFolder("out").log.read_text()
    assert "own size, 50x40 (filled in with grey, which is all that this model draws)" in log
    # an image that is no larger than the model's is there once
    small, full = fill_in("--image_index 4 --box 4 2 10 8")
    assert len(small) == 2 and not full
    assert not (RunFolder("out").images / "inpaint_2_full").exists()


def test_a_mask_painted_on_transparent_hides_to_the_pixel(photograph):
    mask = np.zeros((40, 50, 4), dtype=np.uint8)
    mask[:, :, :3] = 255
    mask[7:20, 13:36, 3] = 255
    mask[30, 20:40, 3] = 255  # a thin line
    mask[3:9, 41:50, 3] = 255  # beyond the square, in part
    Image.fromarray(mask).save("mask.png")
    hidden = mask[:, :, 3] > 0
    hidden[:, 45:] = False
    assert_filled_in(photograph, hidden, *fill_in("--image photo.png --mask mask.png"))
    log = RunFolder("out").log.read_text()
    assert "of its 50x40 pixels the model sees the central 40x40" in log
    assert f"WARNING {100 * 30 / (13 * 23 + 20 + 54):.1f}% of what --mask mask.png hides" in log


def test_images_of_a_dataset_are_filled_in_at_their_own_size(photograph, workplace):
    folder = workplace / "photos"
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "a.png")
    (workplace / "photo.png").rename(folder / "b.png")
    hidden = np.zeros((40, 50), dtype=bool)
    hidden[0:40, 5:25] = True
    flags = f"--dataset custom --custom_dataset_path {folder} --image_index 1"
    assert_filled_in(photograph, hidden, *fill_in(f"{flags} --box 0 0 8 16"))


def test_a_square_mask_of_a_photograph_that_is_not_square(photograph):
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 2, 10, 8))
    mask.save("mask.png")
    small, full = fill_in("--image photo.png --mask mask.png")
    by_box = fill_in("--image photo.png --box 4 2 10 8", "box")
    assert np.array_equal(small, by_box[0]) and np.array_equal(full, by_box[1])
    log = RunFolder("out").log.read_text()
    assert "mask.png is square and the image is not: it is taken to lie on the central 40x40" in log


ELBO = f"{PUBLISHED} --steps_per_eval 2 --train_steps 4"


def fitted_gaussians(images, step=4):
    """(mu, logsigma) of images by the autoencoder `ae` with the head that was fitted in `out`."""
    H = get_samples_hparams([*LOAD.split(), "--log_dir", "out"])
    autoencoder = VQAutoEncoder(H).eval()
    state = torch.load(RunFolder("ae").model("vqgan_ema", 2))
    state = {key.removeprefix("ae."): value for key, value in state.items() if "ae." in key}
    autoencoder.load_state_dict(state)
    head = torch.load(RunFolder("out").model("logsigma", step))["logsigma"]
    autoencoder.generator.logsigma.load_state_dict(head)
    with torch.no_grad():
        z_q, _, _, ids = autoencoder.encode(images)
        return *autoencoder.generator.probabilistic(z_q), ids


@pytest.mark.parametrize("sampler", ["prior", "causal"])
def test_the_elbo_is_that_of_the_whole_validation_set(sampler):
    flags = ELBO
    if sampler == "causal":
        flags = "--load_dir causal --load_step 2 --no_visdom --steps_per_eval 2 --train_steps 4"
    figures = run(calc_approximate_ELBO, flags)
    assert figures["validation images"] == 179
    dataset = train_validation_split(Digits("digits", 16, 1))[1]
    images = torch.stack([dataset.load(index) for index in range(179)])
    mu, logsigma, ids = fitted_gaussians(images)
    nats = -torch.distributions.Normal(mu, logsigma.exp()).log_prob(images).sum((1, 2, 3))
    bits = nats.double() / 256 / math.log(2)
    part = "pixels given ids, density: bits per dimension"
    assert figures[part] == pytest.approx(bits.mean().item(), rel=1e-5)
    error = scipy.stats.sem(bits.numpy())
    assert figures[f"{part} (standard error)"] == pytest.approx(error, rel=1e-5)
    total = figures[part] + figures["ids: bits per token"] * 64 / 256
    assert figures["total, 5 bits: bits per dimension"] == pytest.approx(total + 5)
    assert figures["total, 8 bits: bits per dimension"] == pytest.approx(total + 8)
    whole = figures["pixels given ids, whole levels: bits per dimension"]
    whole += figures["ids: bits per dimension"]
    assert figures["total, 8 bits, whole levels: bits per dimension"] == pytest.approx(whole)
    if sampler == "causal":
        H = get_samples_hparams(["--load_dir", "causal", "--load_step", "2"])
        model = AutoregressiveTransformer(H, torch.zeros(16, 8)).eval()
        model.load_state_dict(torch.load(RunFolder("causal").model("autoregressive", 2)))
        exact = model.bits_per_token(ids).mean().item()
        assert figures["ids: bits per token"] == pytest.approx(exact, rel=1e-5)
    lines = [json.loads(line) for line in RunFolder("out").metrics.read_text().splitlines()]
    validation = [line for line in lines if line["group"] == "validation"]
    assert [line["step"] for line in validation] == [2]
    assert validation[0]["validation images"] == 179 and validation[0][part] > figures[part]


def test_the_standard_error_of_one_validation_image_is_unknown(workplace):
    (workplace / "two").mkdir()
    for index in range(2):
        Image.new("L", (16, 16), 100 * index).save(workplace / "two" / f"{index}.png")
    figures = run(calc_approximate_ELBO, f"{ELBO} --dataset custom --custom_dataset_path two")
    assert figures["validation images"] == 1
    errors = [value for name, value in figures.items() if "standard error" in name]
    assert len(errors) == 7 and errors == [None] * 7
    assert all(math.isfinite(value) for value in figures.values() if value is not None)
    strict(RunFolder("out").results)
    log = RunFolder("out").log.read_text()
    assert log.count("WARNING a standard error needs 2 validation images, and there is 1") == 1
    lines = [json.loads(line) for line in RunFolder("out").metrics.read_text().splitlines()]
    assert {line[name] for line in lines for name in line if "standard error" in name} == {"nan"}


def test_draws_of_t_agree_with_the_sum_over_all():
    draws = "--elbo_samples 3"
    exact, few, again, small = (
        run(calc_approximate_ELBO, f"{ELBO} {flags}")
        for flags in ("", draws, draws, f"{draws} --batch_size 5")
    )
    name = "ids: bits per token"
    errors = [figures[f"{name} (standard error)"] for figures in (exact, few)]
    assert 0 < abs(exact[name] - few[name]) < 4 * math.hypot(*errors)
    assert errors[1] > errors[0] and few == again
    assert small[name] == pytest.approx(few[name], rel=1e-6)


def test_the_fit_of_sigma_goes_on_to_the_bit():
    flags = ELBO.replace("--train_steps 4", "--train_steps")
    whole = run(calc_approximate_ELBO, f"{flags} 5", "whole")
    run(calc_approximate_ELBO, f"{flags} 3", "parts")
    assert run(calc_approximate_ELBO, f"{flags} 5", "parts") == whole
    log = RunFolder("parts").log.read_text()
    assert "goes on from logs/parts/saved_models/logsigma_3.th" in log
    heads = [torch.load(RunFolder(name).model("logsigma", 5)) for name in ("whole", "parts")]
    assert heads[0]["key"] == heads[1]["key"]
    for name, value in heads[0]["logsigma"].items():
        assert torch.equal(value, heads[1]["logsigma"][name])
    assert run(calc_approximate_ELBO, f"{flags} 5", "parts") == whole  # nothing left to fit
    other = run(calc_approximate_ELBO, f"{flags} 5 --logsigma_lr 0.01", "parts")
    assert other != whole  # another fit begins afresh
    assert other == run(calc_approximate_ELBO, f"{flags} 5 --logsigma_lr 0.01", "afresh")


def test_images_that_were_trained_on_are_no_validation(workplace):
    settings = RunFolder("prior").hparams.read_text()
    folder = RunFolder("seen").create()
    folder.hparams.write_text(settings.replace("steps_per_eval: 200", "steps_per_eval: 0"))
    for path in RunFolder("prior").models.iterdir():
        (folder.models / path.name).symlink_to(path.resolve())
    run(calc_approximate_ELBO, ELBO.replace("prior", "seen"))
    log = RunFolder("out").log.read_text()
    assert "seen may have been trained on the validation images too" in log
    assert "ae may have been" not in log
    [result] = read_results(RunFolder("out").results).values()
    assert result["held_out"] == {"ae": True, "seen": False}


@pytest.fixture
def vgg_weights(workplace):
    """A file as torchvision's VGG16, with random weights."""
    torch.manual_seed(0)
    state = PerceptualDistance().net.state_dict()
    names = {f"features.{name.split('.', 1)[1]}": value for name, value in state.items()}
    save_file(names, workplace / "vgg16.pth")
    return f"--vgg_weights {workplace / 'vgg16.pth'}"


def test_nearest_neighbours(vgg_weights, monkeypatch):
    seen, vectors = [], PerceptualDistance.vectors
    monkeypatch.setattr(
        PerceptualDistance, "vectors", lambda self, x: seen.append(len(x)) or vectors(self, x)
    )
    flags = f"{PUBLISHED} {vgg_weights} --n_samples 5 --k_nearest 3 --save_individually"
    figures = run(calc_nearest_neighbours, flags)
    assert sum(seen) == 5 + 1618  # each image goes through the network once
    [result] = read_results(RunFolder("out").results).values()
    train_set = train_validation_split(Digits("digits", 16, 1))[0]
    images = torch.stack([train_set.load(index) for index in range(len(train_set))])
    paths = sorted((RunFolder("out").images / "samples_2").iterdir())
    samples = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths])
    samples = samples[:, None] / 255
    distances = torch.cdist(samples.flatten(1).double(), images.flatten(1).double())
    expected = distances.sort(dim=1, stable=True)
    found = result["neighbours"]["pixels"]
    assert [[each["index"] for each in row] for row in found] == [
        train_set.indices[row[:3]].tolist() for row in expected.indices.numpy()
    ]
    first = [row[0]["distance"] for row in found]
    assert first == pytest.approx(expected.values[:, 0].tolist())
    assert figures["pixels: distance to the nearest (smallest)"] == min(first)

    perceptual = PerceptualDistance()
    load_vgg16(perceptual, torch.load("vgg16.pth"))
    for sample, row in zip(samples, result["neighbours"]["lpips"]):
        near = torch.stack([train_set.dataset.load(each["index"]) for each in row])
        with torch.no_grad():
            pairs = perceptual(sample.expand(3, 3, -1, -1), near.expand(-1, 3, -1, -1)).flatten()
            others = perceptual(sample.expand(90, 3, -1, -1), images[:90].expand(-1, 3, -1, -1))
        assert [each["distance"] for each in row] == pytest.approx(pairs.tolist(), rel=1e-5)
        assert pairs.tolist() == sorted(pairs.tolist()) and others.min() >= pairs[0] * (1 - 1e-5)
        assert row[0]["path"] == f"digits:{row[0]['index']}"
    picture = Image.open(RunFolder("out").images / "neighbours_lpips_2.png")
    assert picture.size == (4 * 66 + 2, 5 * 66 + 2)  # a sample and three neighbours in each row
    other = run(calc_nearest_neighbours, f"{flags} --perceptual_range=-1_1 --batch_size 100")
    name = "{}: distance to the nearest (median)".format
    assert other[name("lpips")] != figures[name("lpips")]
    assert other[name("pixels")] == figures[name("pixels")]


def test_neighbours_in_a_small_folder_without_lpips(workplace, monkeypatch):
    load = f"{LOAD} --n_samples 4 --temp 0.8 --sample_steps 8"  # whatever the dataset's defaults
    run(get_samples, f"{load} --save_individually", "photos")
    photos = RunFolder("photos").images / "samples_2"
    flags = f"{load} --dataset custom --custom_dataset_path {photos} --num_workers 0"
    run(calc_nearest_neighbours, f"{flags} --spaces pixels")
    [result] = read_results(RunFolder("out").results).values()
    found = result["neighbours"]
    assert found.keys() == {"pixels"} and [len(row) for row in found["pixels"]] == [4] * 4
    copy = found["pixels"][1][0]  # none of these is held out, and each is a copy
    assert copy["distance"] == pytest.approx(0, abs=1e-5)
    assert (copy["index"], copy["path"]) == (1, str(photos / "000001.png"))

    def refuse(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.VGG16_Weights, "get_state_dict", refuse)
    with pytest.raises(UserError, match="--vgg_weights.*--spaces pixels"):
        run(calc_nearest_neighbours, flags)


def test_results_hold_no_credentials_of_the_visdom_server(workplace, monkeypatch):
    server = "http://somebody:secret@localhost"
    flags = f"{LOAD} --n_samples 2 --visdom_server {server}"
    monkeypatch.setattr(sys, "argv", ["get_samples.py", *flags.split()])
    run(get_samples, flags)
    text = RunFolder("out").results.read_text()
    assert "secret" not in text and "somebody" not in text and "http://localhost" in text
