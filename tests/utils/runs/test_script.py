"""How scripts start and end: signals, threads, launchers, consoles, other checkouts."""

import io
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

import train_vqgan
from helpers import ROOT, as_torchrun, free_port, one_thread, started, wait_until
from models import AbsorbingDiffusion
from test_training import (
    VQGAN, assert_identical, files_of, lines_of, sampler, sentence, trained, two_runs, vqgan,
    workplace,
)
from utils.logging.logger import ProgressBar
from utils.runs.folder import RunFolder
from utils.runs.script import run_script, try_lock
from utils.signals import SIGNALS, Stopped, handle_signals
from utils.training.loop import TrainingLoop

__all__ = ["trained", "two_runs", "workplace"]  # fixtures of this file too

SCRIPT = [sys.executable, str(ROOT / "train_vqgan.py"), *VQGAN.split()]


FAULTS = """
import resource, sys, torch
from utils.runs.script import run_script

def main():
    for _ in range(20):
        torch.ones(2**24)  # 64 MiB, or 16,384 pages
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

run_script(main, keep_memory=sys.argv[1] == "keep")
"""


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.skipif(HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(),
                    reason="with huge pages there are few faults to count")
def test_memory_of_freed_tensors_is_used_again():
    faults = {
        way: int(subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True,
                                cwd=ROOT, check=True).stdout) for way in ("keep", "leave")
    }
    assert faults["leave"] - faults["keep"] > 15 * 2**14 * 4096 // resource.getpagesize()


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS[1:])
def test_a_signal_before_training_ends_the_script_with_one_sentence(
    number, capsys, monkeypatch, workplace
):
    def interrupted(*arguments):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(train_vqgan, "load_dataset", interrupted)
    monkeypatch.setattr(sys, "argv", ["script.py", *VQGAN.split()])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        run_script(train_vqgan.main)
    assert stop.value.code == 128 + number
    assert f"script.py: stopped by {number.name}" in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_nohup_is_respected():
    """A signal that is ignored when the program starts stays ignored."""
    with started([*SCRIPT, "--log_dir", "a", "--steps_per_log", "1"],
                 preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        wait_until(lambda: lines_of("a") or process.poll() is not None, seconds=120)
        process.send_signal(signal.SIGHUP)
        steps = len(lines_of("a"))
        wait_until(lambda: len(lines_of("a")) > steps + 5 or process.poll() is not None)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_shell_does_not_go_on_after_an_interrupted_run(workplace):
    command = " ".join([*SCRIPT, "--log_dir", "a", "--steps_per_log", "1"])
    with started(["bash", "-c", f"{command} && touch went_on"]) as process:
        wait_until(lambda: lines_of("a") or process.poll() is not None, seconds=120)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert not (workplace / "went_on").exists() and RunFolder("a").complete_steps()


def test_a_repeated_signal_does_not_cut_a_save_but_a_repeated_ctrl_c_does(workplace, monkeypatch):
    numbers = []

    def twice(loop):
        loop.interrupt(numbers[0], None)
        loop.interrupt(numbers[0], None)

    end_step = TrainingLoop.end_step
    monkeypatch.setattr(TrainingLoop, "end_step", lambda loop: (twice(loop), end_step(loop)))
    numbers[:] = [signal.SIGHUP]  # as a closing terminal sends it
    with pytest.raises(Stopped, match="interrupted: saved step 1"):
        vqgan("--log_dir a --train_steps 5")
    numbers[:] = [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        vqgan("--log_dir b --train_steps 5")
    monkeypatch.setattr(TrainingLoop, "PATIENCE", -1)
    numbers[:] = [signal.SIGTERM]
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        vqgan("--log_dir c --train_steps 5")


def test_a_worker_that_is_killed_ends_the_run_with_one_sentence(workplace):
    """Wherever the main process is at that moment."""
    command = [*SCRIPT, "--log_dir", "a", "--steps_per_log", "1", "--num_workers", "2"]
    with started(command) as process:
        wait_until(lambda: lines_of("a") or process.poll() is not None, seconds=120)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "Traceback" not in output
    sentence = "a process that reads images has ended, killed or out of memory: lower --num_workers"
    assert sentence in output.splitlines()[-1] and sentence in RunFolder("a").log.read_text()


def test_a_finished_run_has_status_0_though_it_is_interrupted_in_its_last_step(monkeypatch):
    end_step = TrainingLoop.end_step
    monkeypatch.setattr(
        TrainingLoop, "end_step", lambda loop: (loop.interrupt(signal.SIGTERM, None),
                                                end_step(loop)),
    )
    vqgan("--log_dir a --train_steps 1")
    assert RunFolder("a").complete_steps() == [1]


def test_a_signal_ends_the_drawing_of_samples_and_the_run_is_saved(monkeypatch, two_runs):
    asked = []

    def sample(model, n, temp, progress):
        for number in range(5):
            progress(number + 1, 5, None)
            asked.append(number)
            loops[0].interrupt(signal.SIGTERM, None)

    loops, enter = [], TrainingLoop.__enter__
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "__enter__", lambda loop: loops.append(loop) or enter(loop))
        patch.setattr(AbsorbingDiffusion, "sample", sample)
        with pytest.raises(Stopped, match="interrupted: saved step 2"):
            sampler("--log_dir a --train_steps 5 --steps_per_save_output 1")
    assert asked == [0] and not list(RunFolder("a").images.glob("*"))
    log = RunFolder("a").log.read_text()
    assert "step 1: drawing samples is given up for the signal" in log
    with monkeypatch.context() as patch:  # the last step's are drawn all the same
        patch.setattr(TrainingLoop, "__enter__", lambda loop: (
            loop.interrupt(signal.SIGTERM, None), enter(loop))[1])
        sampler("--log_dir last --train_steps 1 --steps_per_save_output 1")
    assert list(RunFolder("last").images.glob("samples_1*"))
    sampler("--log_dir a --train_steps 5 --steps_per_save_output 1 --resume")
    sampler("--log_dir b --train_steps 5 --steps_per_save_output 1")
    assert_identical(files_of("a", 5), files_of("b", 5))


def test_the_bar_says_how_far_the_drawing_of_samples_is(monkeypatch, two_runs):
    shown = []
    monkeypatch.setattr(ProgressBar, "set_postfix_str", lambda bar, text: shown.append(text))
    begin = ProgressBar.__init__
    monkeypatch.setattr(ProgressBar, "__init__", lambda bar, **options: begin(
        bar, **options | {"mininterval": -1}))
    sampler("--log_dir a --train_steps 1 --steps_per_save_output 1")
    drawn = [text for text in shown if text.startswith("drawing samples")]
    assert drawn[0] == f"drawing samples: 1 of {len(drawn)}" and len(drawn) > 1
    assert shown[-1] == ""  # what the bar said before


def test_training_runs_in_a_thread(workplace):
    """As in a web application: only the main thread may handle signals."""
    thread = threading.Thread(target=vqgan, args=["--log_dir a --train_steps 2"], daemon=True)
    thread.start()
    thread.join(120)
    assert RunFolder("a").complete_steps() == [2]


def test_handlers_are_as_before_after_the_block():
    before = [signal.getsignal(number) for number in SIGNALS]
    with handle_signals(lambda number, frame: None):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in SIGNALS] == before


# --- launchers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variables, says", [
    ({"RANK": "2"}, "RANK=2, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_ADDR=127.0.0.1, MASTER_PORT=0 in"),
    ({"MASTER_PORT": "abc"}, "MASTER_PORT=abc"),
    ({"RANK": "-1"}, "RANK=-1"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
    ({"LOCAL_RANK": ""}, "LOCAL_RANK="),
])
def test_launchers_variables_that_make_no_sense_are_named(
    variables, says, capsys, monkeypatch, workplace
):
    for name, value in {**as_torchrun(0, 2), **variables}.items():
        monkeypatch.setenv(name, value)
    assert says in sentence(train_vqgan.main, f"{VQGAN} --log_dir a", capsys, monkeypatch)


def test_an_incomplete_launch_is_one_process_and_said(monkeypatch, workplace):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    vqgan("--log_dir a --train_steps 1")
    assert RunFolder("a").complete_steps() == [1]
    assert ("RANK, WORLD_SIZE set in the environment without LOCAL_RANK, MASTER_ADDR, MASTER_PORT: "
            "this runs as one process") in RunFolder("a").log.read_text()


def test_processes_that_do_not_come_are_waited_for_aloud_and_interruptibly(workplace):
    variables = as_torchrun(0, 2, str(free_port()))
    with started([*SCRIPT, "--log_dir", "a"], env={**os.environ, **variables}) as process:
        lines = iter(process.stdout.readline, "")
        line = next(line for line in lines if "waiting for" in line)  # torch may warn before
        assert "waiting for 2 processes at 127.0.0.1:" in line and "unset them" in line
        process.terminate()
        assert process.wait(timeout=10) == -signal.SIGTERM


# --- surroundings --------------------------------------------------------------------------------


def test_the_log_holds_the_arguments_that_a_notebook_gives(workplace, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    vqgan("--log_dir a --train_steps 1")
    text = RunFolder("a").log.read_text()
    assert "kernel" not in text and f"command: train_vqgan.py {VQGAN} --log_dir a" in text


def test_an_unexpected_error_leaves_its_traceback_in_the_log(monkeypatch, workplace):
    def fail(*arguments):
        raise ZeroDivisionError("a fault of the program")

    monkeypatch.setattr(train_vqgan.VQGANTraining, "validate", fail)
    with pytest.raises(ZeroDivisionError):
        vqgan("--log_dir a --train_steps 4")
    text = RunFolder("a").log.read_text()
    assert "ERROR unexpected ZeroDivisionError" in text and "a fault of the program" in text


def test_a_script_refuses_the_packages_of_another_checkout(workplace):
    clone = workplace / "clone"
    shutil.copytree(ROOT / "experiments", clone / "experiments")
    shutil.copytree(ROOT / "utils", clone / "utils")
    script = clone / "experiments" / "get_samples.py"
    run = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert f"{script} would run with the packages of {ROOT}" in run.stderr


def test_a_console_that_knows_only_ascii_is_no_error(monkeypatch):
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, name, stream)
    run_script(lambda: print("Fréchet"))
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == rb"Fr\xe9chet" + b"\n"


@pytest.mark.parametrize("name", ["a", "a/", "./a", "logs/a", "logs/a/", "{logs}/a", "b/../a"])
def test_names_of_runs_are_what_people_type(name, workplace):
    for steps in (1, 2):  # a new one, and one that is there
        vqgan(f"--log_dir {name.format(logs=workplace / 'logs')} --train_steps {steps} --resume")
    assert RunFolder("a").complete_steps() == [1, 2]
    assert [path.name for path in (workplace / "logs").iterdir()] == ["a"]


def test_a_run_may_be_a_link_to_another_disk(workplace):
    (workplace / "disk").mkdir()
    (workplace / "logs").mkdir()
    (workplace / "logs" / "a").symlink_to(workplace / "disk")
    vqgan("--log_dir a --train_steps 1")
    vqgan("--log_dir b --load_dir a --load_step 1 --train_steps 2")
    assert (workplace / "disk" / "saved_models" / "vqgan_1.th").exists()


def test_a_run_below_a_folder_that_is_called_logs(workplace):
    vqgan("--log_dir group/logs --train_steps 2")
    vqgan("--log_dir b --load_dir group/logs --load_step 2 --train_steps 3")
    assert RunFolder("b").complete_steps() == [3]


@pytest.mark.parametrize("name", ["..", "../a", "/tmp", ".", "a/../..", "logs/../.."])
@pytest.mark.parametrize("flag", ["log_dir", "load_dir"])
def test_names_that_leave_the_folder_of_runs_are_refused(
    name, flag, workplace, capsys, monkeypatch
):
    line = sentence(train_vqgan.main, f"{VQGAN} --{flag} {name}", capsys, monkeypatch)
    assert "lies outside logs/" in line and not (workplace / "logs").exists()


def test_a_run_is_locked_once_and_a_file_system_without_locks_does_without(tmp_path, monkeypatch):
    folder = RunFolder("run", tmp_path).create()
    lock = try_lock(folder)
    assert lock.is_locked and try_lock(folder) is None
    lock.release()
    monkeypatch.setattr(FileLock, "_acquire", no_locks)
    lock = try_lock(folder)
    assert not lock.is_locked
    lock.release()


def no_locks(lock):
    raise NotImplementedError


def test_log_txt_tells_losses_every_hundred_steps_and_each_validation(workplace):
    flags = "--train_steps 210 --steps_per_log 7 --steps_per_eval 100 --log_dir a"
    with one_thread():
        vqgan(flags)
    lines = RunFolder("a").log.read_text().splitlines()
    told = [line.split(" INFO ")[1].split(":")[0] for line in lines
            if " INFO step " in line and "goes well" not in line]
    assert told == ["step 100, validation", "step 105", "step 200, validation", "step 203",
                    "step 210, validation"]
    assert "psnr" in [line for line in lines if "validation" in line][-1]
