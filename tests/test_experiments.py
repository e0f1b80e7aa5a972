"""The measuring scripts from end to end on tiny runs: samples that go on, results that tell."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import train_sampler
import train_vqgan
from experiments import calc_FID, calc_PRDC, calc_VQGAN_FID, get_samples
from helpers import ROOT, wait_until
from hparams import UserError, get_samples_hparams
from hparams.runs import RunFolder
from utils import sampling
from utils.checkpoints import file_hash, save_file
from utils.experiment import experiment, read_results

VQGAN = (
    "--dataset digits --img_size 16 --ch_mult 1 1 --attn_resolutions 8 --emb_dim 8 "
    "--codebook_size 16 --ndf 8 --disc_layers 1 --batch_size 4 --no_visdom --train_steps 2"
)
SAMPLER = (
    "--dataset digits --ae_load_dir ae --ae_load_step 2 --bert_n_emb 32 --bert_n_head 4 "
    "--bert_n_layers 1 --total_steps 16 --sample_steps 8 --batch_size 8 --no_visdom "
    "--train_steps 2"
)
LOAD = "--load_dir prior --load_step 2 --no_visdom"
PUBLISHED = f"--sampler absorbing --dataset digits --ae_load_dir ae --ae_load_step 2 {LOAD} --ema"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the runs `ae`, `prior` and `causal`, trained for two steps."""
    folder, here = tmp_path_factory.mktemp("trained"), os.getcwd()
    os.chdir(folder)
    try:
        train_vqgan.main([*VQGAN.split(), "--log_dir", "ae", "--ema"])
        flags = [*SAMPLER.split(), "--sampler"]
        train_sampler.main([*flags, "absorbing", "--log_dir", "prior", "--ema"])
        train_sampler.main([*flags, "autoregressive", "--log_dir", "causal"])
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
    seed_step = sampling.seed_step

    def die_at_the_third(seed, first, purpose):
        draws.append(first)
        if len(draws) == 3:
            raise KeyboardInterrupt
        seed_step(seed, first, purpose)

    monkeypatch.setattr(sampling, "seed_step", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(calc_FID, flags)
    assert run(calc_FID, flags) == undisturbed
    assert draws == [0, 64, 128, 128, 192]
    assert run(calc_FID, flags) == undisturbed and len(draws) == 5
    # other settings, other samples
    assert run(calc_FID, f"{flags} --temp 0.5") != undisturbed and len(draws) == 9
    assert run(calc_FID, f"{flags} --seed 1") != undisturbed and len(draws) == 13


@pytest.mark.slow
def test_kill_9_at_any_moment(workplace):
    flags = f"{LOAD} --n_samples 640 --save_individually"
    command = [sys.executable, str(ROOT / "experiments" / "get_samples.py"), *flags.split()]
    for chunks in (1, 4):
        process = subprocess.Popen(
            [*command, "--log_dir", "killed"], cwd=workplace, stderr=subprocess.DEVNULL
        )
        folder = RunFolder("killed").samples
        wait_until(lambda: len(list(folder.glob("*/*.pt"))) >= chunks, seconds=60)
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
    run(calc_VQGAN_FID, "--load_dir ae --load_step 2 --no_visdom --save_individually")
    assert len(list((RunFolder("out").images / "reconstructions_2").iterdir())) == 1797


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
    assert "| not | unknown |" in RunFolder("out").log.read_text()
