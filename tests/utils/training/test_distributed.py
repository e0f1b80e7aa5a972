"""Several processes train as one does with their batches together, and measure as one does; one
log, one set of files."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import train_sampler
import train_vqgan
from experiments import (
    calc_approximate_ELBO, calc_FID, calc_PRDC, calc_VQGAN_FID, generate_big_samples, get_samples,
    inpaint,
)
from helpers import (
    ON_DIGITS, ROOT, as_torchrun, at_the_end_of_steps, half_precision, on_processes, one_thread,
)
from hparams import UserError, get_vqgan_hparams
from models import AbsorbingDiffusion
from test_training import (
    SAMPLER, VQGAN, assert_identical, files_of, lines_of, sampler, trained, two_runs, vqgan,
    workplace,
)
from utils.data import latents
from utils.data.batches import stream, stream_positions
from utils.evaluation import features
from utils.evaluation import samples as sampling
from utils.evaluation.experiment import read_results
from utils.files import load_file
from utils.runs.folder import RunFolder
from utils.training import processes
from utils.training.precision import step_seed
from utils.training.processes import init_processes

__all__ = ["trained", "two_runs", "workplace"]  # fixtures of this file too

EXACT = "--embd_pdrop 0 --resid_pdrop 0 --steps_per_log 1 --ema --steps_per_checkpoint 5"


def losses(run):
    return [line["loss"] for line in lines_of(run) if line["group"] == "train"]


def assert_near(left, right, tolerance):
    """State dicts of the same names, with no value further apart than `tolerance`."""
    assert list(left) == list(right)
    for name in left:
        assert float((left[name] - right[name]).abs().max()) <= tolerance, name


@pytest.mark.parametrize("flags", ["--optimizer adam", "--optimizer muon --mask_schedule fixed"])
def test_two_processes_are_one_with_twice_the_batch(flags, two_runs):
    """20 steps; then one process goes on from what two have left, and the other way round."""
    command = f"{SAMPLER} {EXACT} {flags}"
    statuses = on_processes(
        2, train_sampler.main, f"{command} --batch_size 4 --log_dir two --train_steps 20"
    )
    assert statuses == [0, 0]
    sampler(f"{EXACT} {flags} --batch_size 8 --log_dir one --train_steps 20")
    assert len(losses("one")) == 20
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)
    two, one = files_of("two", 20), files_of("one", 20)
    assert set(two) == set(one)
    for name in ("absorbing_20.th", "absorbing_ema_20.th"):
        assert_near(two[name], one[name], 1e-3)
    assert RunFolder("two").log.read_text().count("command: ") == 1

    sampler(f"{EXACT} {flags} --batch_size 8 --log_dir two --resume --train_steps 25")
    on_processes(2, train_sampler.main,
                 f"{command} --batch_size 4 --log_dir one --resume --train_steps 25")
    assert len(losses("one")) == len(losses("two")) == 25
    assert losses("two") == pytest.approx(losses("one"), rel=1e-4)


def test_two_processes_train_an_autoencoder_and_keep_the_same_weights(workplace):
    """Without noise or BatchNorm in play, two processes are one with twice the batch."""
    flags = "--steps_per_log 1 --ema --lr 1e-4 --train_steps 6 --num_workers 0"
    assert on_processes(
        2, train_vqgan.main, f"{VQGAN} {flags} --batch_size 2 --log_dir two"
    ) == [0, 0]
    vqgan(f"{flags} --batch_size 4 --log_dir one")
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)
    assert_near(files_of("two", 6)["vqgan_6.th"], files_of("one", 6)["vqgan_6.th"], 1e-3)


@pytest.mark.parametrize("rank, half", [(0, False), (1, False), (0, True), (1, True)])
def test_a_bad_step_of_one_process_is_passed_over_by_all(rank, half, two_runs, monkeypatch):
    """With `half` in float16, where gradients that are not finite may be the scale's doing."""
    if half:
        monkeypatch.setattr(train_sampler, "Precision", half_precision(2.0**8))
    forward, seeds = AbsorbingDiffusion.forward, {step_seed(0, 2, f"train, process {rank} of 2")}

    def spoilt(self, *arguments, **options):
        stats = forward(self, *arguments, **options)
        if torch.initial_seed() in seeds:
            stats["loss"] = stats["loss"] * float("nan")
        return stats

    monkeypatch.setattr(AbsorbingDiffusion, "forward", spoilt)
    flags = f"{SAMPLER} {EXACT} --train_steps 4 --batch_size 4 --log_dir two"
    assert on_processes(2, train_sampler.main, flags) == [0, 0]
    steps = [line["step"] for line in lines_of("two") if line["group"] == "train"]
    assert steps == [1, 3, 4] and "step 2 is passed over" in RunFolder("two").log.read_text()
    state = files_of("two", 4)["absorbing_4.th"]
    assert all(value.isfinite().all() for value in state.values())
    assert float(state["Lt_count"].sum()) == 3 * 8


@pytest.mark.parametrize("sign", ["a signal", "torchrun is gone"])
def test_several_processes_leave_together_and_go_on(sign, two_runs, monkeypatch):
    """Where one of them is interrupted, or left alone: they ask each other when they log, after
    every second step, and all save the same."""
    def interrupt(loop):
        if loop.step == 3 and os.environ.get("RANK") == "1":
            if sign == "a signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                monkeypatch.setattr(os, "getppid", lambda: 1)

    flags = f"{SAMPLER} --ema --batch_size 4 --train_steps 6 --steps_per_checkpoint 100"
    with monkeypatch.context() as patched:
        at_the_end_of_steps(patched, interrupt)
        statuses = on_processes(2, train_sampler.main, f"{flags} --log_dir parts")
    assert statuses == [128 + signal.SIGTERM] * 2
    assert RunFolder("parts").complete_steps() == [4]
    assert on_processes(2, train_sampler.main, f"{flags} --log_dir parts --resume") == [0, 0]
    assert on_processes(2, train_sampler.main, f"{flags} --log_dir through") == [0, 0]
    assert_identical(files_of("through", 6), files_of("parts", 6))


def test_who_was_interrupted_is_asked_without_the_device(workplace):
    """Values on a meta device cannot be read."""
    def main(flags):
        processes = replace(init_processes("cpu"), device=torch.device("meta"))
        assert processes.any(processes.rank == 1) and not processes.any(False)

    assert on_processes(2, main) == [0, 0]


def test_processes_on_gpus_have_a_group_on_their_hosts(monkeypatch):
    """Of gloo, with the timeout of a step, besides that of nccl."""
    for name, value in as_torchrun(0, 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "resolve_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    made = []
    monkeypatch.setattr(dist, "init_process_group", lambda name, **how: made.append((name, how)))
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: (backend, timeout))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    found = init_processes("cuda")
    device = torch.device("cuda:0")
    assert made == [("nccl", dict(timeout=processes.TIMEOUT, device_id=device))]
    assert found.hosts == ("gloo", processes.TIMEOUT)
    assert found.patient == ("gloo", processes.PATIENCE)


def test_an_unreadable_image_of_any_rank_is_named_in_the_log(workplace):
    folder = workplace / "images"
    folder.mkdir()
    for index in range(8):
        noise = torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(folder / f"{index}.png")
    flags = VQGAN.replace(ON_DIGITS, f"--dataset custom --custom_dataset_path {folder}")
    flags += " --nf 32 --res_blocks 1 --perceptual_weight 0 --n_channels 3 --num_workers 0"
    flags += " --batch_size 2 --steps_per_eval 0"
    first = stream_positions(8, 4, 0, 0)[0]
    for index in first[2:]:  # the second process's part of the first batch
        (folder / f"{index}.png").write_bytes(b"no image")
    assert on_processes(2, train_vqgan.main, f"{flags} --log_dir a --train_steps 1") == [0, 0]
    log = RunFolder("a").log.read_text()
    for index in first[2:]:
        assert f"{index}.png: it is no image" in log


def test_what_is_cached_is_decided_by_one_process(two_runs, monkeypatch):
    """Another command may finish the same file between the looks of two processes."""
    read_cached = latents.read_cached
    there = {"key": "", "ids": torch.zeros(1), "unreadable": {}}
    monkeypatch.setattr(
        latents, "read_cached",
        lambda *file: there if os.environ.get("RANK") == "1" else read_cached(*file),
    )
    shutil.rmtree(latents.LATENTS)
    flags = f"{SAMPLER} --log_dir two --train_steps 1"
    assert on_processes(2, train_sampler.main, flags) == [0, 0]


@pytest.mark.parametrize("cached", [False, True])
def test_processes_that_find_different_data_say_so(cached, two_runs, monkeypatch, capfd):
    """Also where the ids of what the first one has found are cached."""
    content = {"ids": torch.zeros(1), "unreadable": {}} if cached else None
    monkeypatch.setattr(latents, "read_cached", lambda *file: content)
    monkeypatch.setattr(latents, "latents_key", lambda *what: f"key {os.environ.get('RANK')}")
    statuses = on_processes(2, train_sampler.main, f"{SAMPLER} --log_dir two --train_steps 1")
    assert statuses == [1, 1] or statuses == [0, 1]
    assert "the processes found different images to encode" in capfd.readouterr().err


def test_the_discriminator_takes_part_in_several_processes(workplace):
    flags = f"{VQGAN} --steps_per_log 1 --disc_start_step 2 --diff_aug --train_steps 4"
    assert on_processes(2, train_vqgan.main, f"{flags} --batch_size 2 --log_dir a") == [0, 0]
    (_, second, *_) = [line for line in lines_of("a") if line["group"] == "train"]
    assert second["d_loss"] > 0 and second["d_weight"] > 0
    before, after = (files_of("a", 4)[f"{name}_4.th"] for name in ("vqgan", "disc_optim"))
    assert after["state"] and before["disc.main.0.weight"].isfinite().all()


def test_the_learning_rate_of_the_autoencoder_follows_the_whole_batch(monkeypatch):
    flags = "--dataset churches --batch_size 4".split()
    one = get_vqgan_hparams(flags).lr
    monkeypatch.setenv("WORLD_SIZE", "8")  # as some clusters do
    assert get_vqgan_hparams(flags).lr == one and init_processes("cpu").size == 1
    for name, value in as_torchrun(0, 8).items():
        monkeypatch.setenv(name, value)
    assert get_vqgan_hparams(flags).lr == 8 * one == pytest.approx(8 * 4 * 4.5e-6)


def test_parts_of_the_stream_are_its_batches():
    whole = stream(50, 12, seed=1, start_batch=3)
    parts = [stream(50, 4, seed=1, start_batch=3, part=(rank, 3)) for rank in range(3)]
    for _ in range(10):
        indices, flips = next(whole)
        got = [next(part) for part in parts]
        assert [i for part, _ in got for i in part] == list(indices)
        assert [f for _, part in got for f in part] == list(flips)


# --- experiments -------------------------------------------------------------------------------


MEASURES = {
    "FID": (calc_FID, "--n_samples 200 --kid --kid_subset_size 50 --isc --prc"),
    "PRDC": (calc_PRDC, "--n_samples 200 --fake_feats fake.npy"),
    "VQGAN FID": (calc_VQGAN_FID, "--load_dir ae"),
    "samples": (get_samples, "--n_samples 200"),
}


@pytest.mark.parametrize("name", MEASURES)
def test_processes_divide_what_is_measured_and_measure_the_same(name, tiny, two_runs, monkeypatch):
    """To the bit, with one log, one set of images, and no files but those of one process."""
    monkeypatch.setattr(features, "PART", 256)
    monkeypatch.setattr(calc_VQGAN_FID, "PART", 256)
    script, flags = MEASURES[name]
    command = f"--load_dir prior --load_step 2 --no_visdom {flags} --save_individually"
    with one_thread():
        script.main([*command.split(), "--log_dir", "one"])
    statistics = files_below(Path("statistics"))
    for path in (*Path("statistics").glob("*"), *Path().glob("fake.npy*")):
        path.unlink()
    assert on_processes(3, script.main, f"{command} --log_dir three") == [0, 0, 0]
    one, three = (read_results(RunFolder(run).results) for run in ("one", "three"))
    [(key, result)] = one.items()
    assert three[key]["figures"] == result["figures"] and len(three) == 1
    assert RunFolder("three").log.read_text().count("command: ") == 1
    assert images_of("one") == images_of("three") and images_of("one")
    assert files_below(RunFolder("three").path) == files_below(RunFolder("one").path)
    assert files_below(Path("statistics")) == statistics


def test_an_experiment_goes_on_with_another_number_of_processes(tiny, two_runs, monkeypatch):
    """One of three dies without a word, which ends the others; one process goes on."""
    flags = "--load_dir prior --load_step 2 --no_visdom --n_samples 400 --sample_steps 8 --resume"
    step_seed, drawn = sampling.step_seed, []

    def die(seed, first, purpose):
        if os.environ.get("RANK") == "1" and first > 64:
            os._exit(9)
        drawn.append(first)
        return step_seed(seed, first, purpose)

    with monkeypatch.context() as patched:
        patched.setattr(sampling, "step_seed", die)
        statuses = on_processes(3, calc_FID.main, f"{flags} --log_dir killed")
    assert statuses[1] == 9 and statuses[0] and statuses[2]
    killed = RunFolder("killed")
    kept = {path.name for path in killed.samples.glob("*/*.pt")}
    assert kept and not killed.results.exists()
    [path] = killed.samples.glob("*/000000_64.pt")
    path.write_bytes(path.read_bytes()[:-9])
    with one_thread():
        calc_FID.main(f"{flags} --log_dir undisturbed".split())
        with monkeypatch.context() as patched:
            patched.setattr(sampling, "step_seed", die)
            calc_FID.main(f"{flags} --log_dir killed".split())
    assert "000000_64.pt is not used" in killed.log.read_text()
    assert len(drawn) == 7 - len(kept) + 1
    undisturbed, found = (read_results(RunFolder(run).results) for run in ("undisturbed", "killed"))
    assert [r["figures"] for r in found.values()] == [r["figures"] for r in undisturbed.values()]


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def images_of(run):
    return {path.name: path.read_bytes() for path in RunFolder(run).images.rglob("*.png")}


def test_a_dataset_is_encoded_by_all_processes(two_runs, monkeypatch):
    """Each encodes some parts of it, and the ids are those of one process."""
    monkeypatch.setattr(latents, "PART", 300)
    shutil.rmtree(latents.LATENTS)
    with one_thread():
        sampler("--log_dir one --train_steps 1 --horizontal_flip")
    ids = {path.name: load_file(path)["ids"] for path in latents.LATENTS.glob("*.pt")}
    shutil.rmtree(latents.LATENTS)
    flags = f"{SAMPLER} --log_dir two --train_steps 1 --horizontal_flip"
    assert on_processes(2, train_sampler.main, flags) == [0, 0]
    for name, theirs in ids.items():
        assert torch.equal(load_file(latents.LATENTS / name)["ids"], theirs)
    assert not list(latents.LATENTS.glob("*part*"))


@pytest.mark.parametrize("script", [calc_approximate_ELBO, inpaint, generate_big_samples])
def test_what_cannot_be_divided_says_so(script, two_runs, monkeypatch):
    flags = {inpaint: "--box 0 0 8 8", generate_big_samples: "--shape 8 8"}.get(script, "")
    for name, value in as_torchrun(0, 2).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start it without torchrun"):
        script.main(f"--load_dir prior --load_step 2 --no_visdom {flags}".split())


def run_torchrun(script, flags):
    """What `torchrun --nproc_per_node=2` of a script prints and returns."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", str(ROOT / script), *flags.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_torchrun(two_runs):
    flags = f"{SAMPLER} {EXACT} --log_dir run --train_steps 4"
    done = run_torchrun("train_sampler.py", flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained to step 4") == 1, done.stdout
    assert RunFolder("run").complete_steps() == [4]


@pytest.mark.slow
def test_torchrun_measures(two_runs):
    """With the extractor that is installed with its weights, and what is kept of real images."""
    flags = "--load_dir prior --load_step 2 --no_visdom --n_samples 70 --sample_steps 8"
    flags += " --feature_extractor efficientnet_lite0 --log_dir run"
    done = run_torchrun("experiments/calc_FID.py", flags)
    assert done.returncode == 0, done.stderr
    [result] = read_results(RunFolder("run").results).values()
    assert result["figures"]["images"] == 70 and result["figures"]["real images"] == 1797
    assert done.stdout.count("| FID |") == 1
    again = run_torchrun("experiments/calc_FID.py", f"{flags} --resume")
    assert again.returncode == 0, again.stderr
    [repeated] = read_results(RunFolder("run").results).values()
    assert repeated["figures"] == result["figures"]


@pytest.mark.slow
@pytest.mark.parametrize("flags, says", [
    ("--codebook_size 77", "contradicts codebook_size 16"),
    ("--load_dir prior --load_step 7", "absorbing is there at steps 2"),
])
def test_an_error_of_all_processes_is_said_once(flags, says, two_runs):
    done = run_torchrun("train_sampler.py", f"{SAMPLER} {flags} --train_steps 20")
    lines = [line for line in done.stderr.splitlines() if "error: " in line and "train_" in line]
    assert done.returncode != 0 and len(lines) == 1 and says in lines[0], done.stderr


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(two_runs, workplace):
    """The second process loses its data on the way."""
    script = workplace / "train_one_fails.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train_sampler\n"
        "from hparams import UserError\n"
        "from utils.runs.script import run_script\n"
        "from utils.training.loop import TrainingLoop\n"
        "end_step = TrainingLoop.end_step\n"
        "def failing(loop):\n"
        "    if os.environ['RANK'] == '1' and loop.step == 3:\n"
        "        raise UserError('the data is gone')\n"
        "    end_step(loop)\n"
        "TrainingLoop.end_step = failing\n"
        "run_script(train_sampler.main)\n"
    )
    done = run_torchrun(script, f"{SAMPLER} --train_steps 100000")
    assert done.returncode != 0 and "the data is gone" in done.stderr
    ours = [line for line in done.stderr.splitlines() if "train_one_fails.py: error: " in line]
    assert len(ours) <= 2 and "Traceback" not in done.stderr.split("the data is gone")[0]


@pytest.mark.parametrize("steps_per_log", [1, 2, 10])
def test_histories_are_those_of_the_whole_batch(steps_per_log, two_runs):
    """Also the EMA's copies, with an odd step after which no more is logged."""
    flags = f"{EXACT} --t_sampling uniform --train_steps 5 --steps_per_log"
    statuses = on_processes(
        2, train_sampler.main, f"{SAMPLER} {flags} {steps_per_log} --batch_size 4 --log_dir two"
    )
    assert statuses == [0, 0]
    sampler(f"{flags} 1 --batch_size 8 --log_dir one")
    for name in ("absorbing_5.th", "absorbing_ema_5.th"):
        two, one = (files_of(run, 5)[name] for run in ("two", "one"))
        assert torch.equal(two["Lt_count"], one["Lt_count"]) and float(one["Lt_count"].sum()) == 40
        assert float(one["Lt_count"].max()) > 5  # so some step has a time twice
        for history in ("loss_history", "Lt_history"):
            assert_near({"h": two[history]}, {"h": one[history]}, 1e-4 * one[history].max())


def test_a_step_has_no_collective_beside_that_of_the_gradients(
    two_runs, workplace, monkeypatch
):
    """But where something is due: the histories before a checkpoint, after steps 3 and 5."""
    calls, all_reduce = workplace / "calls", dist.all_reduce

    def counted(tensor, *arguments, **options):
        with calls.open("a") as file:
            file.write(f"{os.environ['RANK']} {list(tensor.shape)}\n")
        return all_reduce(tensor, *arguments, **options)

    monkeypatch.setattr(dist, "all_reduce", counted)
    flags = "--batch_size 4 --train_steps 5 --steps_per_log 20 --steps_per_checkpoint 3"
    command = f"{SAMPLER} {flags} --steps_per_eval 0 --log_dir two"
    assert on_processes(2, train_sampler.main, command) == [0, 0]
    for rank in "01":
        lines = [line[2:] for line in calls.read_text().splitlines() if line[0] == rank]
        assert lines == ["[3, 3, 17]", "[2, 3, 17]"]
