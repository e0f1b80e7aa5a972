"""What a kill, a full disk and damaged files leave of a run, and what --resume makes of it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

import train_sampler
import train_vqgan
from helpers import ROOT, with_small_files
from test_training import (
    SAMPLER, VQGAN, assert_identical, files_of, lines_of, sampler, sentence, trained, two_runs,
    vqgan, workplace,
)
from utils.data import latents
from utils.errors import DiskError
from utils.files import HOST, is_running, load_file, remove_leftovers, save_file, whole_file
from utils.logging.logger import NoLogger
from utils.runs.folder import RunFolder
from utils.runs.manifest import damage
from utils.training.checkpoints import Checkpoints

__all__ = ["trained", "two_runs", "workplace"]  # fixtures of this file too

EVERY_2 = "--steps_per_checkpoint 2 --steps_per_log 1 --ema"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- --resume ----------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [vqgan, sampler])
def test_resuming_repeatedly_equals_one_uninterrupted_run(train, two_runs):
    train(f"{EVERY_2} --log_dir through --train_steps 6")
    for last in (1, 3, 6, 6):  # from nothing, from 1, from 3, from the end
        train(f"{EVERY_2} --log_dir parts --train_steps {last} --resume")
    assert_identical(files_of("through", 6), files_of("parts", 6))
    steps = [line["step"] for line in lines_of("parts") if line["group"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    log = RunFolder("parts").log.read_text()
    assert "has no complete checkpoint, training begins" in log
    assert "going on from step 3" in log and "trained to step 6" in log
    assert not list(RunFolder("parts").path.glob("*_until_*"))


def test_resume_prefers_the_runs_own_checkpoint_to_load_dir(two_runs):
    flags = f"{EVERY_2} --log_dir b --load_dir ae --load_step 2 --no_load_optim --resume"
    vqgan(f"{flags} --train_steps 4")
    vqgan(f"{flags} --train_steps 6")
    vqgan(f"{EVERY_2} --log_dir c --load_dir ae --load_step 2 --no_load_optim --train_steps 6")
    assert_identical(files_of("c", 6), files_of("b", 6))


def content_of(run):
    """{path: bytes} of a run's folder, but for what every command writes into it."""
    return {str(path.relative_to(run.path)): path.read_bytes() for path in run.path.rglob("*")
            if path.is_file() and path.name not in ("log.txt", ".lock")}


def test_a_resumed_runs_settings_are_its_defaults(two_runs):
    flags = "--lr 0.01 --ema --ema_beta 0.9 --seed 3 --clip_grad_norm 2 --steps_per_checkpoint 2"
    vqgan(f"{flags} --log_dir a --train_steps 4")
    vqgan(f"{flags} --log_dir b --train_steps 2")
    train_vqgan.main("--log_dir b --resume --train_steps 4".split())
    assert_identical(files_of("a", 4), files_of("b", 4))
    settings = [yaml.safe_load(RunFolder(run).hparams.read_text()) for run in "ab"]
    assert settings[0] | {"log_dir": "b", "resume": True, "load_dir": "b", "load_step": 2,
                          "no_visdom": False} == settings[1]
    train_vqgan.main("--log_dir b --resume --train_steps 5 --lr 0.02".split())
    assert yaml.safe_load(RunFolder("b").hparams.read_text())["lr"] == 0.02
    assert "lr is now 0.02, was 0.01" in RunFolder("b").log.read_text()
    sampler("--log_dir c --train_steps 2 --optimizer muon --lr 0.01")
    train_sampler.main("--log_dir c --resume --train_steps 3".split())
    settings = yaml.safe_load(RunFolder("c").hparams.read_text())
    assert (settings["optimizer"], settings["lr"], settings["ae_load_dir"]) == ("muon", 0.01, "ae")


@pytest.mark.parametrize("flags", [
    "--resume --train_steps 4", "--resume --train_steps 2", "--resume --train_steps 4 --lr 1",
    "--load_dir a --load_step 4 --train_steps 4 --resume",
])
def test_a_command_that_trains_nothing_writes_nothing(flags):
    vqgan(f"{EVERY_2} --log_dir a --train_steps 4")
    before = content_of(RunFolder("a"))
    vqgan(f"{EVERY_2} --log_dir a {flags}")
    assert content_of(RunFolder("a")) == before


@pytest.mark.parametrize("flags, says", [
    ("--seed 9", "holds a run (the last checkpoint is that of step 4): go on with it by --resume"),
    ("--load_dir ae --load_step 2", "logs/a holds a run"),
    ("--load_dir a --load_step 2", "holds checkpoints after step 2 (4), which this run would over"),
])
def test_a_run_is_not_overwritten_by_another_one(flags, says, two_runs, capsys, monkeypatch):
    vqgan(f"{EVERY_2} --log_dir a --train_steps 4")
    before = content_of(RunFolder("a"))
    command = f"{VQGAN} {EVERY_2} --log_dir a --train_steps 6 {flags}"
    assert says in sentence(train_vqgan.main, command, capsys, monkeypatch)
    assert content_of(RunFolder("a")) == before


def test_published_models_are_not_overwritten(capsys, monkeypatch):
    """Models without settings and manifests, as the original programs leave them."""
    vqgan(f"{EVERY_2} --log_dir a --train_steps 4")
    run = RunFolder("a")
    for path in (run.hparams, run.metrics, *run.saved_stats.iterdir()):
        path.unlink()
    before = content_of(run)
    for flags, says in (
        ("", "logs/a holds a run"), ("--resume", "go on with --load_dir a --load_step 4"),
        ("--load_dir a --load_step 2", "holds checkpoints after step 2 (4)"),
    ):
        command = f"{VQGAN} --log_dir a --train_steps 6 {flags}"
        assert says in sentence(train_vqgan.main, command, capsys, monkeypatch)
        assert content_of(run) == before | {"metrics.jsonl": b""}
    vqgan("--log_dir a --load_dir a --load_step 4 --train_steps 5")
    assert run.trained_steps() == [2, 4, 5]


@pytest.mark.parametrize("linked", [False, True])
def test_overwrite_moves_the_old_run_aside_whole(linked, workplace):
    if linked:  # to another disk
        (workplace / "disk" / "a").mkdir(parents=True)
        (workplace / "logs").mkdir()
        (workplace / "logs" / "a").symlink_to(workplace / "disk" / "a")
    vqgan(f"{EVERY_2} --log_dir a --train_steps 4")
    run = RunFolder("a")
    before, log = content_of(run), run.log.read_text()
    vqgan(f"{EVERY_2} --log_dir a --train_steps 3 --seed 1 --overwrite")
    assert run.path.is_symlink() == linked
    [aside] = (workplace / ("disk" if linked else "logs")).glob("a_until_*")
    [known] = (workplace / "logs").glob("a_until_*")  # a link where the run was one
    assert known.is_symlink() == linked and known.resolve() == aside
    assert content_of(SimpleNamespace(path=aside)) == before
    assert (aside / "log.txt").read_text() == log
    text = run.log.read_text()
    assert "command: " in text and f"the run that was here is now {aside}" in text
    vqgan(f"{EVERY_2} --log_dir b --train_steps 3 --seed 1")
    assert run.complete_steps() == [2, 3]
    assert_identical(files_of("b", 3), files_of("a", 3))
    steps = [line["step"] for line in lines_of("a") if line["group"] == "train"]
    assert steps == [1, 2, 3]
    vqgan("--log_dir a --resume --train_steps 4")  # the lock of the new folder was released


def test_overwrite_moves_nothing_before_a_step_is_trained(capsys, monkeypatch, workplace):
    vqgan(f"{EVERY_2} --log_dir a --train_steps 2")
    before = content_of(RunFolder("a"))
    flags = f"{VQGAN} --log_dir a --train_steps 4 --overwrite --load_dir nowhere --load_step 3"
    assert "nowhere" in sentence(train_vqgan.main, flags, capsys, monkeypatch)
    assert content_of(RunFolder("a")) == before and len([*(workplace / "logs").iterdir()]) == 1
    vqgan(f"{EVERY_2} --log_dir a --train_steps 4 --resume")
    vqgan(f"{EVERY_2} --log_dir b --train_steps 4")
    assert_identical(files_of("b", 4), files_of("a", 4))


def test_overwrite_does_not_go_with_resume(capsys, monkeypatch):
    line = sentence(train_vqgan.main, f"{VQGAN} --overwrite --resume", capsys, monkeypatch)
    assert "--overwrite begins a run anew and --resume goes on with it" in line


@pytest.mark.parametrize("train, flags", [
    (train_vqgan, f"{VQGAN} --load_dir ae --load_step 2"), (train_sampler, SAMPLER),
])
@pytest.mark.parametrize("run", ["ae", "alias"])
def test_overwrite_does_not_move_aside_what_the_run_loads(
    train, flags, run, two_runs, workplace, capsys, monkeypatch
):
    (workplace / "logs" / "alias").symlink_to("ae")
    before = content_of(RunFolder("ae"))
    command = f"{flags} --log_dir {run} --train_steps 3 --overwrite"
    line = sentence(train.main, command, capsys, monkeypatch)
    assert "--overwrite would move ae aside, from which this run loads" in line
    assert content_of(RunFolder("ae")) == before


def test_resume_in_the_folder_of_another_kind_of_run_is_refused(two_runs, capsys, monkeypatch):
    line = sentence(train_sampler.main, f"{SAMPLER} --log_dir ae --resume", capsys, monkeypatch)
    assert "logs/ae holds no absorbing: it is a run of another kind" in line


def test_resume_may_start_the_optimiser_afresh(two_runs, capsys, monkeypatch):
    sampler("--log_dir a --train_steps 2 --optimizer adam")
    flags = "--log_dir a --resume --train_steps 3 --optimizer muon --no_visdom"
    assert "--no_load_optim" in sentence(train_sampler.main, flags, capsys, monkeypatch)
    train_sampler.main(f"{flags} --no_load_optim".split())
    assert RunFolder("a").complete_steps() == [2, 3]


def test_a_half_written_first_checkpoint_is_none(two_runs):
    """A kill in the first save leaves a file without its name; the command's settings count."""
    vqgan("--log_dir a --train_steps 2")
    run = RunFolder("a")
    run.manifest(2).unlink()
    run.stats(2).rename(run.saved_stats / ".stats_2.host.99999.tmp")
    vqgan("--log_dir a --train_steps 2 --resume --emb_dim 16")
    assert yaml.safe_load(run.hparams.read_text())["emb_dim"] == 16


def test_a_checkpoint_without_its_manifest_is_resumed_and_not_trained_over():
    """The manifest is written last: a kill may come just before."""
    vqgan(f"{EVERY_2} --log_dir a --train_steps 2")
    RunFolder("a").manifest(2).unlink()
    vqgan(f"{EVERY_2} --log_dir a --train_steps 4 --resume")
    vqgan(f"{EVERY_2} --log_dir b --train_steps 4")
    assert_identical(files_of("b", 4), files_of("a", 4))
    assert "manifest_2.json is not there: step 2 is taken" in RunFolder("a").log.read_text()


def test_resume_restarts_a_run_killed_before_its_first_checkpoint():
    flags = f"{EVERY_2} --log_dir a --train_steps 6"
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpoints, "save", lambda *_, **__: interrupt())
        vqgan(flags)
    vqgan(f"{flags} --resume")
    vqgan(f"{EVERY_2} --log_dir b --train_steps 6")
    assert_identical(files_of("b", 6), files_of("a", 6))
    assert "holds another" not in RunFolder("a").log.read_text()


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["after", "amid"])
def test_saving_removes_older_files_of_the_same_step(moment, monkeypatch):
    """A run with an EMA whose last checkpoint is damaged goes on without one, and saves that step
    again or is killed doing so."""
    vqgan(f"{EVERY_2} --log_dir a --train_steps 4")
    run, flags = RunFolder("a"), "--no_ema --log_dir a --train_steps 4 --resume"
    flip_a_bit(run.model("vqgan", 4))
    if moment == "after":
        vqgan(flags)
    else:
        saved = []

        def save(content, path):
            if saved:
                raise KeyboardInterrupt
            saved.append(path)
            return save_file(content, path)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("utils.training.checkpoints.save_file", save)
            vqgan(flags)
    names = {path.name for path in run.models.glob("*_4.th")}
    assert names == {"vqgan_4.th"} | ({"ae_optim_4.th", "disc_optim_4.th"} if moment == "after"
                                      else set())
    assert run.stats(4).exists() == (moment == "after")


def test_a_locked_run_folder_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("utils.runs.script.LOCK_SECONDS", 1)
    folder = RunFolder("a").create()
    code = (f"import filelock, time; lock = filelock.FileLock({str(folder.lock)!r}); "
            "lock.acquire(); print('locked', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        line = sentence(train_vqgan.main, f"{VQGAN} --log_dir a --train_steps 1", capsys,
                        monkeypatch)
        assert "another program is using logs/a" in line
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    vqgan("--log_dir a --train_steps 1")


def test_resume_logs_no_credentials():
    server = "--visdom_server http://somebody:secret@localhost"
    vqgan(f"{server} --log_dir a --train_steps 1")
    vqgan(f"{server} --log_dir a --train_steps 2 --resume")
    for path in (RunFolder("a").log, RunFolder("a").hparams):
        text = path.read_text()
        assert "secret" not in text and "somebody" not in text


def test_restore_loads_the_gradient_scaler(workplace):
    run, scaler = RunFolder("a").create(), torch.amp.GradScaler("cpu", init_scale=64.0)
    model = torch.nn.Linear(2, 2)
    Checkpoints(run, {"thing": model}, {}, scaler).save(1, {})
    other = torch.amp.GradScaler("cpu")
    H = SimpleNamespace(load_dir="a", load_step=1, load_optim=True, log_dir="a")
    Checkpoints(run, {"thing": model}, {}, other).restore(H, NoLogger(run))
    assert other.get_scale() == 64.0


# --- damaged checkpoints -----------------------------------------------------------------------


def spoilt(kind, run):
    """Damage step 4 of a run; returns the name of the file that is damaged."""
    path = {"manifest": run.manifest(4), "stats": run.stats(4)}.get(kind, run.model("vqgan", 4))
    if kind == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "lost":
        path.unlink()
    elif kind == "manifest":
        path.write_text(path.read_text()[:-3])
    else:
        flip_a_bit(path)
    return path.name


@pytest.mark.parametrize("kind", ["bit", "shorter", "stats", "manifest", "lost"])
def test_a_damaged_checkpoint_is_refused_and_an_earlier_one_offered(
    kind, capsys, monkeypatch
):
    vqgan(f"{EVERY_2} --log_dir a --train_steps 4")
    vqgan(f"{EVERY_2} --log_dir b --train_steps 6")
    name = spoilt(kind, RunFolder("a"))
    if kind != "lost":
        flags = f"{VQGAN} {EVERY_2} --log_dir a --load_dir a --load_step 4 --train_steps 6"
        line = sentence(train_vqgan.main, flags, capsys, monkeypatch)
        assert f"{name} is damaged" in line and "step 2 is whole" in line
    vqgan(f"{EVERY_2} --log_dir a --train_steps 6 --resume")
    log = RunFolder("a").log.read_text()
    assert name in log and "takes the checkpoint before step 4" in log
    assert_identical(files_of("b", 6), files_of("a", 6))


def test_a_damaged_autoencoder_is_refused(capsys, monkeypatch, workplace):
    vqgan("--log_dir ae --train_steps 2")
    flip_a_bit(RunFolder("ae").model("vqgan", 2))
    from train_sampler import main

    line = sentence(main, f"{SAMPLER} --train_steps 1", capsys, monkeypatch)
    assert "vqgan_2.th is damaged" in line and "no earlier checkpoint is whole" in line


def test_resume_fails_where_all_checkpoints_are_damaged(capsys, monkeypatch):
    vqgan("--log_dir a --train_steps 2")
    flip_a_bit(RunFolder("a").model("vqgan", 2))
    flags = f"{VQGAN} --log_dir a --train_steps 4 --resume"
    line = sentence(train_vqgan.main, flags, capsys, monkeypatch)
    assert "every checkpoint of logs/a is damaged" in line


# --- how many are kept -------------------------------------------------------------------------


def test_keep_checkpoints_removes_only_old_checkpoints():
    run = RunFolder("a").create()
    mine = run.models / "vqgan_2_mine.th"
    mine.write_text("not the run's")
    vqgan(f"{EVERY_2} --log_dir a --train_steps 9 --keep_checkpoints 2")
    assert run.complete_steps() == [8, 9]
    names = {path.name for path in run.models.iterdir()}
    kept = {f"{name}_{step}.th" for step in (8, 9)
            for name in ("vqgan", "vqgan_ema", "ae_optim", "disc_optim")}
    assert names == kept | {mine.name}
    assert {path.name for path in run.saved_stats.iterdir()} == {
        "stats_8", "stats_9", "manifest_8.json", "manifest_9.json", "best.json"
    }


class Thing:
    """A model to Checkpoints."""

    def state_dict(self):
        return {"weight": torch.arange(1000.0)}


class Scaler:
    def state_dict(self):
        return {}


def test_an_old_checkpoint_is_kept_where_the_new_one_is_damaged(monkeypatch):
    run = RunFolder("a").create()
    checkpoints = Checkpoints(run, {"thing": Thing()}, {}, Scaler(), keep=1)
    checkpoints.save(1, {})
    with monkeypatch.context() as patched:
        patched.setattr("utils.training.checkpoints.damage", lambda run, step: "a bad disk")
        checkpoints.save(2, {})
    assert run.complete_steps() == [1, 2]
    checkpoints.save(3, {})
    assert run.complete_steps() == [3]


def test_a_manifest_cannot_remove_files_outside_the_run(workplace):
    run = RunFolder("a").create()
    checkpoints = Checkpoints(run, {"thing": Thing()}, {}, Scaler(), keep=1)
    checkpoints.save(1, {})
    precious = workplace / "precious_1"
    precious.write_text("not the run's")
    manifest = json.loads(run.manifest(1).read_text())
    manifest["files"]["../../../precious_1"] = {"size": 13, "sha256": ""}
    run.manifest(1).write_text(json.dumps(manifest))
    checkpoints.save(2, {})
    assert precious.exists() and run.complete_steps() == [2]


# --- half-written files ------------------------------------------------------------------------


def test_whole_file_replaces_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), whole_file(path) as file:
        file.write(b"ne")
        file.flush()
        assert path.read_text() == "old"
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with whole_file(path) as file:
        file.write(b"new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(DiskError, match="cannot write .*nowhere/file"):
        with whole_file(tmp_path / "nowhere" / "file"):
            pass


def test_remove_leftovers_spares_files_of_running_processes_and_other_machines(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    assert is_running(os.getpid()) and not is_running(process.pid)
    names = [f".a.th.{HOST}.{process.pid}.tmp", f".b.th.elsewhere.{process.pid}.tmp",
             f".a.th.{HOST}.{os.getpid()}.tmp", f".a.th.elsewhere.{process.pid}.tmp", ".mine.tmp",
             "a.1.tmp"]
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / names[1], (0, 0))  # of another machine, given up long ago
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[2:])


# --- a full disk -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, 5000, 300_000])
def test_save_file_on_a_full_disk_raises_disk_error_and_keeps_the_old_file(size, tmp_path):
    path = tmp_path / "a.th"
    save_file({"weight": torch.zeros(10)}, path)
    with pytest.raises(DiskError, match="cannot write .*a.th: File too large"):
        with_small_files(size, lambda: save_file({"weight": torch.ones(100_000)}, path))
    assert torch.equal(load_file(path)["weight"], torch.zeros(10))
    assert list(tmp_path.iterdir()) == [path]


def test_training_survives_a_full_disk_to_the_bit(monkeypatch):
    """Nothing can be written from before the save of step 4 to after that of step 6."""
    real = Checkpoints.save
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self, step, stats, *best, **extra):
        limit = 1000 if step in (4, 6) else before[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        real(self, step, stats, *best, **extra)

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    flags = f"{EVERY_2} --train_steps 9 --steps_per_save_output 1 --keep_checkpoints 2"
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Checkpoints, "save", save)
            vqgan(f"{flags} --log_dir full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    vqgan(f"{flags} --log_dir roomy")
    run = RunFolder("full")
    assert_identical(files_of("roomy", 9), files_of("full", 9))
    assert run.complete_steps() == run.steps("vqgan") == [8, 9] and not damage(run, 9)
    steps = [line["step"] for line in lines_of("full") if line["group"] == "train"]
    assert steps == [*range(1, 10)]
    assert not list(run.path.rglob("*.tmp"))


def test_failing_to_save_the_last_checkpoint_is_an_error(capsys, monkeypatch):
    def save(self, step, stats, *best, **extra):
        if step == 4:
            raise DiskError("cannot write a.th: No space left on device")
        real(self, step, stats, *best, **extra)

    real = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", save)
    flags = f"{VQGAN} {EVERY_2} --log_dir a --train_steps 4"
    assert "No space left" in sentence(train_vqgan.main, flags, capsys, monkeypatch)
    assert RunFolder("a").complete_steps() == [2]
    assert "ERROR cannot write" in RunFolder("a").log.read_text()


def test_a_full_file_system_keeps_whole_checkpoints(workplace):
    """The same on a file system of its own, which is nearly full, made by root."""
    logs = workplace / "logs"
    logs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", logs]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    try:
        (logs / "ballast").write_bytes(bytes(5_000_000))
        with pytest.raises(DiskError, match="No space left on device"):
            vqgan("--steps_per_checkpoint 1 --log_dir a --train_steps 8")
        run = RunFolder("a")
        steps = run.complete_steps()
        assert steps and steps[-1] < 8 and not any(damage(run, step) for step in steps)
        (logs / "ballast").unlink()
        vqgan(f"--steps_per_checkpoint 100 --log_dir a --train_steps {steps[-1] + 1} --resume")
        weights = files_of("a", steps[-1] + 1)
    finally:
        os.chdir("/")
        subprocess.run(["umount", logs], check=True)
        os.chdir(workplace)
    vqgan(f"--log_dir b --train_steps {steps[-1] + 1}")
    assert_identical(files_of("b", steps[-1] + 1), weights)


# --- cached ids --------------------------------------------------------------------------------


def test_interrupted_encoding_encodes_only_missing_parts(two_runs, workplace, monkeypatch):
    sampler("--log_dir whole --train_steps 1")
    path = max((workplace / "latents").glob("*.pt"), key=lambda path: path.stat().st_size)
    whole = load_file(path)
    path.unlink()
    monkeypatch.setattr(latents, "PART", 512)  # of 1,618 images: four parts
    encode, encoded = latents.encode, []

    def counted(*arguments):
        ids = encode(*arguments)
        encoded.append(len(ids))
        return ids

    def interrupted(*arguments):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return counted(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(latents, "encode", interrupted)
        sampler("--log_dir parts --train_steps 1")
    flip_a_bit(path.with_suffix(".part_512_512"))
    encoded.clear()
    monkeypatch.setattr(latents, "encode", counted)
    sampler("--log_dir parts --train_steps 1")
    assert encoded == [512, 512, 82]  # the first part is there, the second one was spoilt
    assert_identical(whole, load_file(path))
    assert not list(path.parent.glob("*.part_*"))


# --- kill -9 -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["vqgan", "sampler", "latents", "experiment"])
def test_kill_9_at_any_moment_changes_no_bit(stage, workplace):
    command = [sys.executable, str(ROOT / "tests" / "pull_the_plug.py"), "--stage", stage]
    done = subprocess.run(
        [*command, "--kills", "12"], capture_output=True, text=True, timeout=580,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 kills" in done.stdout and "bit-identical" in done.stdout
