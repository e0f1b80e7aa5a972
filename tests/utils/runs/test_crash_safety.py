"""What a kill, a full disk and damaged files leave of a run, and what --resume makes of it."""

import json
import os
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import train_sampler
import train_vqgan
from helpers import ROOT, with_small_files
from test_training import (
    SAMPLER, VQGAN, assert_identical, files_of, lines_of, sampler, sentence, trained, two_runs,
    vqgan, workplace,
)
from utils.data import latents
from utils.errors import DiskError
from utils.files import is_running, load_file, remove_leftovers, save_file, whole_file
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


def test_resume_ignores_checkpoints_of_an_earlier_run_in_the_folder():
    vqgan(f"{EVERY_2} --log_dir a --train_steps 6")
    vqgan(f"{EVERY_2} --log_dir a --train_steps 3 --seed 1")
    assert RunFolder("a").complete_steps() == [2, 3]
    vqgan(f"{EVERY_2} --log_dir a --train_steps 4 --seed 1 --resume")
    vqgan(f"{EVERY_2} --log_dir b --train_steps 4 --seed 1")
    assert_identical(files_of("b", 4), files_of("a", 4))


def test_resume_restarts_a_run_killed_before_its_first_checkpoint():
    flags = f"{EVERY_2} --log_dir a --train_steps 6"
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpoints, "save", lambda *arguments: interrupt())
        vqgan(flags)
    vqgan(f"{flags} --resume")
    vqgan(f"{EVERY_2} --log_dir b --train_steps 6")
    assert_identical(files_of("b", 6), files_of("a", 6))
    assert "holds another" not in RunFolder("a").log.read_text()


@pytest.mark.parametrize("steps", [6, 2])
def test_resume_restarts_a_run_killed_before_it_wrote_hparams_yaml(steps, two_runs, monkeypatch):
    """Killed while it caches, in a folder where an earlier run has checkpoints, then resumed."""
    sampler(f"{EVERY_2} --log_dir a --train_steps {steps} --bert_n_layers 1")
    flags = f"{EVERY_2} --log_dir a --train_steps 4 --seed 1"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train_sampler, "load_latents", lambda *arguments: interrupt())
        sampler(flags)
    sampler(f"{flags} --resume")  # with the default of two layers, as the command says
    sampler(f"{EVERY_2} --log_dir b --train_steps 4 --seed 1")
    assert_identical(files_of("b", 4), files_of("a", 4))
    assert RunFolder("a").complete_steps() == [2, 4]
    assert len(list(RunFolder("a").path.glob("hparams_until_*"))) == 1


def test_a_run_can_be_resumed_after_a_command_that_failed(capsys, monkeypatch):
    vqgan(f"{EVERY_2} --log_dir a --train_steps 2")
    flags = f"{VQGAN} --log_dir a --train_steps 4 --load_dir nowhere --load_step 3"
    assert "nowhere" in sentence(train_vqgan.main, flags, capsys, monkeypatch)
    vqgan(f"{EVERY_2} --log_dir a --train_steps 4 --resume")
    vqgan(f"{EVERY_2} --log_dir b --train_steps 4")
    assert_identical(files_of("b", 4), files_of("a", 4))


def test_loading_another_run_drops_the_folders_old_manifests(two_runs):
    vqgan(f"{EVERY_2} --log_dir a --train_steps 4 --seed 1")
    vqgan("--log_dir a --load_dir ae --load_step 2 --train_steps 3")
    assert RunFolder("a").complete_steps() == [3]


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["after", "amid"])
def test_saving_removes_an_earlier_runs_files_of_the_same_step(moment, monkeypatch):
    """A run with an EMA, then in the same folder one without, which saves or is killed doing so."""
    vqgan(f"{EVERY_2} --log_dir a --train_steps 2 --seed 1")
    run, flags = RunFolder("a"), f"{EVERY_2} --no_ema --log_dir a --train_steps 2"
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
    names = {path.name for path in run.models.iterdir()}
    assert names == {"vqgan_2.th"} | ({"ae_optim_2.th", "disc_optim_2.th"} if moment == "after"
                                      else set())
    assert run.stats(2).exists() == (moment == "after")


def test_a_locked_run_folder_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("utils.runs.script.LOCK_SECONDS", 1)
    folder = RunFolder("a").create()
    code = (f"import fcntl, time; f = open({str(folder.lock)!r}, 'a'); fcntl.lockf(f, "
            "fcntl.LOCK_EX); print('locked', flush=True); time.sleep(60)")
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
    H = SimpleNamespace(load_dir="a", load_step=1, load_optim=True)
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
        "stats_8", "stats_9", "manifest_8.json", "manifest_9.json"
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


def test_remove_leftovers_spares_files_of_running_processes(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    assert is_running(os.getpid()) and not is_running(process.pid)
    names = [f".a.th.{process.pid}.tmp", f".a.th.{os.getpid()}.tmp", ".mine.tmp", "a.1.tmp"]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])


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

    def save(self, step, stats):
        limit = 1000 if step in (4, 6) else before[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        real(self, step, stats)

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
    def save(self, step, stats):
        if step == 4:
            raise DiskError("cannot write a.th: No space left on device")
        real(self, step, stats)

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
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", logs],
                      capture_output=True).returncode:
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

    def interrupted(dataset, *arguments):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(dataset))
        return encode(dataset, *arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(latents, "encode", interrupted)
        sampler("--log_dir parts --train_steps 1")
    flip_a_bit(path.with_suffix(".part_512_512"))
    encoded = []
    monkeypatch.setattr(
        latents, "encode", lambda part, *how: encoded.append(len(part)) or encode(part, *how)
    )
    sampler("--log_dir parts --train_steps 1")
    assert encoded == [512, 512, 82]  # the first part is there, the second one was spoilt
    assert_identical(whole, load_file(path))
    assert not list(path.parent.glob("*.part_*"))


# --- kill -9 -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vqgan", "sampler", "latents", "experiment"])
def test_kill_9_at_any_moment_changes_no_bit(stage, workplace):
    command = [sys.executable, str(ROOT / "tests" / "pull_the_plug.py"), "--stage", stage]
    done = subprocess.run(
        [*command, "--kills", "12"], capture_output=True, text=True, timeout=580,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 kills" in done.stdout and "bit-identical" in done.stdout
