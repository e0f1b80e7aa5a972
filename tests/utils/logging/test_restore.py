"""Finished runs come back on a visdom server that starts anew, in order and once each."""

import dataclasses
import json
import math
import os
import shutil
from unittest.mock import Mock

import dashboard_screenshot
import pytest
import torch
from filelock import FileLock
from PIL import Image

from helpers import wait_until
from hparams import get_vqgan_hparams
from utils.files import whole_file
from utils.logging.logger import RunLogger, read_metrics
from utils.logging.replay import replay
from utils.logging.restore import draw_run, wait_for_server
from utils.logging.visdom_board import Outage, VisdomBoard
from utils.logging.visdom_server import scripts_are_there
from utils.runs.folder import RunFolder, run_names

pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' method")  # visdom's own client
FAST = {"interval": 0.1, "retry": 0.2, "timeout": 5.0}
WINDOWS = [
    "image: reconstructions", "metric: Loss", "metric: Reconstruction PSNR, dB", "text: health",
    "metric: Codes in use", "bars: codebook_use", "metric: Steps per second", "text: settings",
]
TITLES = [
    "Images, each beside its reconstruction, step 20", "Loss", "Reconstruction PSNR, dB",
    "Is it going well? Step 20", "Codes in use of 16", "How often each code is used, step 20",
    "Steps per second", "Settings",
]


def finished_run(logs, name, board=None):
    """A run that has trained 20 steps; its windows come in another order than one looks."""
    folder = RunFolder(name, logs)
    flags = f"--dataset digits --codebook_size 16 --log_dir {name} --ema"
    H = get_vqgan_hparams(flags.split())
    with RunLogger(folder, board) as log:
        with whole_file(folder.hparams) as file:
            file.write(H.as_yaml().encode())
        log.settings(dataclasses.asdict(H), {})
        for step in (10, 20):
            log.metrics(step, {"loss": 1 / step, "steps_per_second": 2.0, "g_loss": 0.0})
        log.health(20, ["training goes well"])
        log.bars(20, "codebook_use", torch.rand(16))
        figures = {"psnr": 20.0, "codes_used": 12, "loss": 0.5}
        log.metrics(20, figures, group="validation")
        for step in (10, 20):
            log.images(step, "reconstructions", torch.rand(4, 1, 8, 8))
    return folder


@pytest.fixture
def logs(tmp_path):
    return tmp_path / "logs"


def test_three_finished_runs_come_back_when_the_server_starts_anew(server, logs):
    for name in ("first", "group/second", "third"):
        finished_run(logs, name)
    broken = RunFolder("broken", logs).create()
    broken.metrics.write_text('{"step": 1, "group": "train", "loss": 1.0}\nnothing\n')
    broken.hparams.write_text("{")
    broken.board.write_text('{"bars": {"a": {"step": 1, "values": ["b"]}}, "health": 3}')
    (broken.images / "samples_1.png").write_bytes(b"no picture")
    server.logs = logs
    for _ in range(2):
        server.start()
        wait_until(lambda: "metric: Loss" in windows(server, "broken"), seconds=60)
        for env in ("first", "group_second", "third"):
            wait_for_windows(server, env)
            found = server.windows(env)
            assert list(found) == WINDOWS
            assert [window["title"] for window in found.values()] == TITLES
        assert list(server.windows("broken")) == ["metric: Loss"]
        server.kill()


def windows(server, env):
    """The windows of an environment, none where there is no such one yet."""
    try:
        return server.windows(env)
    except ValueError:
        return {}


def wait_for_windows(server, env):
    """Wait until all windows of a finished run are there."""
    wait_until(lambda: len(windows(server, env)) == len(WINDOWS), seconds=60)


def test_a_resumed_run_is_drawn_once_and_in_order(server, logs):
    server.start()
    board = VisdomBoard("127.0.0.1", server.port, env="run", **FAST)
    finished_run(logs, "run", board)
    before = server.windows("run")
    assert list(before) == WINDOWS
    board = VisdomBoard("127.0.0.1", server.port, env="run", **FAST)
    with RunLogger(RunFolder("run", logs), board) as log:
        log.rewind(10)
        log.metrics(20, {"loss": 7.0})
    after = server.windows("run")  # which asserts that no window is there twice
    # those of validations and pictures after step 10 are gone, but for the picture of step 10
    assert list(after) == [WINDOWS[0], WINDOWS[1], WINDOWS[6], WINDOWS[7]]
    assert after["metric: Loss"]["content"]["data"][0]["y"] == [0.1, 7.0]
    assert after["image: reconstructions"]["title"].endswith("step 10")
    address = f"http://127.0.0.1:{server.port}/env/run"
    assert draw_run("run", logs, "127.0.0.1", server.port) == address
    assert list(server.windows("run")) == list(after)


def test_what_is_rewound_does_not_come_back(server, logs):
    folder = finished_run(logs, "run")
    with RunLogger(folder) as log:
        log.rewind(10)
    assert json.loads(folder.board.read_text()) == {
        "pictures": {"reconstructions": 10}, "bars": {}, "health": None}
    server.start()
    draw_run("run", logs, "127.0.0.1", server.port)
    windows = server.windows("run")
    assert list(windows) == [WINDOWS[0], WINDOWS[1], WINDOWS[6], WINDOWS[7]]
    assert windows["image: reconstructions"]["title"].endswith("step 10")


@pytest.mark.parametrize("older", [False, True])
def test_pictures_that_a_rewound_run_has_left_do_not_come_back(older, logs):
    """Before its next log entry, and where it has other pictures after that."""
    folder, shown = finished_run(logs, "run"), {}
    board = Mock(picture=lambda name, step, picture: shown.update({name: step}))
    if older:  # which named no pictures in board.json
        folder.board.write_text('{"bars": {}, "health": null}')
    with RunLogger(folder) as log:
        log.images(20, "late", torch.rand(1, 1, 8, 8))
        log.rewind(12)
        replay(folder, read_metrics(folder.metrics), board, math.inf)
        assert shown == {"reconstructions": 10}
        log.metrics(25, {"loss": 1.0})
        log.images(15, "reconstructions", torch.rand(4, 1, 8, 8))
    replay(folder, read_metrics(folder.metrics), board, math.inf)
    assert shown == {"reconstructions": 15}
    assert folder.picture("late", 20).exists()


def test_pictures_of_a_last_step_without_a_log_entry_are_drawn(server, logs):
    folder = finished_run(logs, "run")
    with RunLogger(folder) as log:
        log.images(25, "reconstructions", torch.rand(4, 1, 8, 8))
    server.start()
    draw_run("run", logs, "127.0.0.1", server.port)
    assert server.windows("run")["image: reconstructions"]["title"].endswith("step 25")


def test_waiting_for_the_server_leaves_a_run_called_main_alone(server, logs):
    finished_run(logs, "main")
    server.start()
    draw_run("main", logs, "127.0.0.1", server.port)
    wait_for_server("127.0.0.1", server.port)
    assert list(server.windows("main")) == WINDOWS


@pytest.mark.parametrize("answer", ["", "hello", "null", "3", "true", "[" * 100_000])
def test_a_foreign_answer_is_an_outage(answer, monkeypatch, logs):
    def post(board, endpoint, **message):
        return "true" if endpoint == "win_exists" else answer

    finished_run(logs, "run")
    monkeypatch.setattr(VisdomBoard, "_post", post)
    with pytest.raises(Outage, match="does not answer as visdom does"):
        draw_run("run", logs, "127.0.0.1", 1)


def test_a_window_that_comes_late_takes_its_place(server, logs):
    server.start()
    board = VisdomBoard("127.0.0.1", server.port, env="run", **FAST)
    with RunLogger(RunFolder("run", logs), board) as log:
        for name in ("zeta", "steps_per_second", "psnr", "loss"):
            log.metrics(1, {name: 1.0})
            wait_until(lambda: board._sent and not board._changed)
        log.images(1, "samples", torch.rand(1, 1, 8, 8), save=False)
    assert list(server.windows("run")) == [
        "image: samples", "metric: Loss", "metric: Reconstruction PSNR, dB",
        "metric: Steps per second", "metric: zeta",
    ]


def test_a_run_that_trains_is_left_to_draw_itself(server, logs):
    folder = finished_run(logs, "run")
    server.start()
    lock = FileLock(folder.lock)
    lock.acquire()
    try:
        assert not draw_run("run", logs, "127.0.0.1", server.port)
        text = folder.hparams.read_text()
        folder.hparams.write_text(text.replace("no_visdom: false", "no_visdom: true"))
        assert draw_run("run", logs, "127.0.0.1", server.port)  # which does not
    finally:
        lock.release()
    assert list(server.windows("run")) == WINDOWS


def test_a_run_may_be_used_while_its_windows_are_sent(logs, monkeypatch):
    """The server may take its time, and a training would not wait for it."""
    def send(board):
        with FileLock(folder.lock, timeout=0):
            sent.append(board._changed)

    folder, sent = finished_run(logs, "run"), []
    folder.lock.touch()
    monkeypatch.setattr(VisdomBoard, "send", send)
    draw_run("run", logs, "127.0.0.1", 1)
    assert len(sent) == 1 and sent[0]


def test_a_run_that_begins_to_train_while_its_windows_are_sent_is_not_drawn_twice(
    server, logs, monkeypatch
):
    folder, send = finished_run(logs, "run"), VisdomBoard.send
    lock = FileLock(folder.lock)
    server.start()

    def send_slowly(board, everything=True):
        send(board, everything)
        lock.acquire()  # once the windows are there, as a training does that starts meanwhile

    monkeypatch.setattr(VisdomBoard, "send", send_slowly)
    try:
        assert draw_run("run", logs, "127.0.0.1", server.port) is None
    finally:
        lock.release(force=True)
    assert not server.windows("run")


def test_runs_are_found_through_links_and_the_newest_comes_first(logs):
    for number, name in enumerate(("b", "group/a", "c")):
        metrics = RunFolder(name, logs).create().metrics
        metrics.touch()
        os.utime(metrics, (number, number))
    (logs / "group" / "circle").symlink_to(logs)
    elsewhere = logs.parent / "disk"
    shutil.move(logs / "b", elsewhere)
    (logs / "b").symlink_to(elsewhere)
    (RunFolder("c", logs).images / "metrics.jsonl").touch()
    RunFolder("without", logs).create()
    assert run_names(logs) == ["c", "group/a", "b"]
    assert run_names(logs / "nowhere") == []


@pytest.mark.skipif(
    not (shutil.which("chromium") and scripts_are_there()),
    reason="needs Debian's chromium and the scripts of visdom's page",
)
def test_a_browser_shows_the_windows_of_three_runs_after_a_restart(server, logs, tmp_path):
    runs = ("first", "group/second", "third")
    for name in runs:
        finished_run(logs, name)
    server.logs = logs
    server.start()
    wait_for_windows(server, "third")
    server.kill()
    server.start()
    for name in runs:
        wait_for_windows(server, name.replace("/", "_"))
        picture = tmp_path / "picture.png"
        address = f"http://127.0.0.1:{server.port}"
        assert dashboard_screenshot.take(address, name, picture, 3600) == TITLES
        assert Image.open(picture).width == 3600
