"""The run logger, its image files, and its plots on a real visdom server that comes and goes."""

import base64
import io
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

import utils.logging.visdom_server as visdom_server
from helpers import free_port, wait_until, with_small_files
from hparams import get_vqgan_hparams
from utils.data.pixels import to_uint8
from utils.errors import SettingsError, UserError
from utils.logging.images import image_grid, panels, save_image, save_images_individually
from utils.logging.logger import RunLogger
from utils.logging.visdom_board import MAX_POINTS, Outage, VisdomBoard
from utils.runs.folder import RunFolder
from utils.runs.resume import record_settings
from utils.runs.script import start_run
from utils.training.processes import Processes

ROOT = Path(__file__).resolve().parents[3]
FAST = {"interval": 0.1, "retry": 0.2, "timeout": 0.5}
FOR_A_SERVER = {**FAST, "timeout": 5.0}  # which may be slow while others compute
pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' method")  # visdom's own client
CALL_SECONDS = 0.45  # what a call of the logger may take, whatever the server does


@pytest.fixture
def folder(tmp_path):
    return RunFolder("run", tmp_path)


class TimedLogger(RunLogger):
    """Fails when a call takes long."""

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name not in ("metrics", "bars", "images", "info"):
            return found

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = found(*args, **kwargs)
            assert time.perf_counter() - start < CALL_SECONDS
            return result

        return timed


def curve(window, group="training"):
    """(steps, values) of a trace in the window data of visdom."""
    trace = next(trace for trace in window["content"]["data"] if trace["name"] == group)
    return trace["x"], trace["y"]


def warnings_in(folder):
    return [line for line in folder.log.read_text().splitlines() if " WARNING " in line]


def lines_of(folder):
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


# Images


def test_uint8_round_trip_through_a_file_is_exact(tmp_path):
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    colour = torch.stack([grey[0], grey[0].flip(0), grey[0].T])
    for image in (grey, colour):
        assert torch.equal(to_uint8(image.float() / 255), image)
        save_image(image.float() / 255, tmp_path / "image.png")
        pixels = np.asarray(Image.open(tmp_path / "image.png"))
        expected = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        assert np.array_equal(pixels, expected.numpy())
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]


def test_uint8_rounds_and_clamps():
    values = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 2.0, float("nan")])
    assert to_uint8(values).tolist() == [0, 0, 1, 255, 255, 0]
    assert to_uint8(torch.ones(1, dtype=torch.float16, requires_grad=True)).tolist() == [255]


def test_grid_places_images_row_by_row_with_white_between():
    images = torch.arange(5).float().reshape(5, 1, 1, 1).expand(5, 3, 64, 96) / 10
    grid = image_grid(images, columns=3)
    assert grid.shape == (3, 2 * 66 + 2, 3 * 98 + 2)
    for index in range(5):
        top, left = 2 + index // 3 * 66, 2 + index % 3 * 98
        assert (grid[:, top : top + 64, left : left + 96] == index / 10).all()
    assert (grid[:, 68:132, 198:294] == 1).all()  # the sixth place is empty
    for offset in (0, 1):
        assert (grid[:, offset::66] == 1).all() and (grid[:, :, offset::98] == 1).all()


def test_grid_enlarges_small_images_to_be_seen():
    digit = torch.rand(1, 1, 32, 32)
    inside = image_grid(digit)[:, 2:-2, 2:-2]
    assert torch.equal(inside[:, ::2, ::2], digit[0])
    assert torch.equal(inside[:, 1::2, 1::2], digit[0])
    assert image_grid(torch.rand(4, 3, 64, 64)).shape == (3, 134, 134)
    assert image_grid(torch.rand(3, 3, 100, 80), columns=9).shape == (3, 104, 3 * 82 + 2)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 4, 4), (2, 2, 4, 4)])
def test_grid_refuses_other_shapes(shape):
    with pytest.raises(ValueError):
        image_grid(torch.zeros(shape))


def test_individual_images_are_numbered_from_the_start_index(tmp_path):
    images = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
    save_images_individually(images, tmp_path / "samples", start_index=9)
    names = sorted(file.name for file in (tmp_path / "samples").iterdir())
    assert names == ["000009.png", "000010.png"]
    assert np.asarray(Image.open(tmp_path / "samples" / "000010.png")).min() == 255


def test_unwritable_image_raises_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot write .*image.png: No such file"):
        save_image(torch.zeros(1, 2, 2), tmp_path / "missing" / "image.png")


# Files of the logger


def test_control_characters_in_messages_are_escaped(folder, capsys):
    with RunLogger(folder) as log:
        log.warning("passed over \x1b[2Jé\n2026-01-01 00:00:00,000 INFO all is well")
    (line,) = folder.log.read_text().splitlines()
    assert "\\x1b[2Jé\\n2026" in line and "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("server, shown", [
    ("http://me:secret@host:8000/x", "http://host:8000/x"),
    ("me:secret@host", "host"),
    ("http://me:sec@ret@host", "http://host"),
    ("http://localhost", "http://localhost"),
])
def test_no_credentials_of_the_visdom_server_are_written(server, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = f"--dataset digits --log_dir a --visdom_server={server} --visdom_port 1"
    monkeypatch.setattr(sys, "argv", ["x.py", *flags.split()])
    H = get_vqgan_hparams()
    with start_run(H, Processes()) as log:
        record_settings(H, log)
    written = "".join(path.read_text() for path in Path("logs").rglob("*") if path.is_file())
    assert f"visdom_server: {shown}" in written and f"--visdom_server={shown}" in written
    assert "secret" not in written and "sec@ret" not in written and "me:sec" not in written
    assert H.visdom_server == server  # which the board needs


def test_lines_refused_by_a_full_disk_are_written_later(folder, capsys):
    with RunLogger(folder) as log:
        log.metrics(0, {"loss": 0})
        log.info("before")

        def log_steps():
            for step in range(1, 4):
                log.metrics(step, {"loss": step})

        with_small_files(80, log_steps)  # takes a part of the second line of metrics.jsonl
        size = folder.metrics.stat().st_size
        assert size == 80 and not folder.metrics.read_bytes().endswith(b"\n")
        log.metrics(4, {"loss": 4})
        log.info("after")
    assert [line["step"] for line in lines_of(folder)] == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out.count("File too large") == 1
    lines = folder.log.read_text().splitlines()
    assert [line.split()[2] for line in lines] == ["INFO", "WARNING", "INFO"]


def test_messages_go_to_the_console_and_the_file_of_their_run(tmp_path, capsys):
    first, second = RunFolder("a", tmp_path), RunFolder("b", tmp_path)
    with RunLogger(first) as log_a, RunLogger(second) as log_b:
        log_a.info("50% of a")
        log_b.warning("beware b")
    assert "50% of a" in first.log.read_text() and "b" not in first.log.read_text()
    assert second.log.read_text().rstrip().endswith("WARNING beware b")
    assert second.log.read_text()[:4].isdigit()  # the year
    printed = capsys.readouterr().out
    assert printed.count("50% of a") == 1 and printed.count("beware b") == 1
    with RunLogger(first) as log:
        log.info("more of a")
    assert len(first.log.read_text().splitlines()) == 2


def test_metrics_are_lines_of_json(folder):
    with RunLogger(folder) as log:
        weight = torch.tensor(0.25, requires_grad=True)
        log.metrics(torch.tensor(3), {"loss": weight * 2, "lr": 1e-4, "codes": torch.tensor([7])})
        written = lines_of(folder)  # each line is there at once
        values = {"a": float("nan"), "b": float("inf"), "c": torch.tensor(-torch.inf)}
        log.metrics(4, values, group="validation")
        with pytest.raises(ValueError, match="'time'"):
            log.metrics(5, {"time": 1.0})
    time_of_line = written[0].pop("time")
    assert abs(time_of_line - time.time()) < 60
    assert written == [{"step": 3, "group": "train", "loss": 0.5, "lr": 1e-4, "codes": 7.0}]
    line = lines_of(folder)[1]
    assert (line["group"], line["a"], line["b"], line["c"]) == ("validation", "nan", "inf", "-inf")
    assert len(lines_of(folder)) == 2


class Recorder:
    """A board that keeps what it is told."""

    def __init__(self):
        self.curves, self.shown = {}, {}

    def start(self, on_info, on_warning):
        self.started = True

    def curve(self, name, step, value, group):
        self.curves.setdefault((name, group), []).append((step, value))

    def clear(self):
        self.curves.clear()
        self.shown.clear()

    def bars(self, name, step, values):
        self.shown[name] = step, *values

    def picture(self, name, step, picture):
        self.shown[name] = step, picture.convert("L").getpixel((9, 9))

    def table(self, name, rows):
        self.shown[name] = rows

    def health(self, step, sentences):
        self.shown["health"] = step, sentences

    def close(self, timeout):
        pass


def test_rewind_drops_later_lines_and_redraws_the_curves(folder):
    with RunLogger(folder) as log:
        for step in range(10, 60, 10):
            log.metrics(step, {"loss": step / 10})
        log.metrics(30, {"loss": 0.5}, group="validation")
        log.metrics(50, {"late": 1.0})
    with open(folder.metrics, "a") as file:
        file.write('{"step": 60, "group": "train", "loss": 6')  # a crash cut this off

    board = Recorder()
    with RunLogger(folder, board) as log:
        assert board.curves["loss", "train"] == [(s, s / 10) for s in range(10, 60, 10)]
        assert ("late", "train") in board.curves
        log.rewind(30)
        assert board.curves["loss", "train"] == [(10, 1.0), (20, 2.0), (30, 3.0)]
        assert board.curves["loss", "validation"] == [(30, 0.5)]
        assert ("late", "train") not in board.curves
        log.metrics(40, {"loss": 9.0})
        assert board.curves["loss", "train"][-1] == (40, 9.0)
    assert [(line["step"], line["loss"]) for line in lines_of(folder)] == [
        (10, 1.0), (20, 2.0), (30, 3.0), (30, 0.5), (40, 9.0)
    ]  # fmt: skip
    assert not list(folder.path.glob(".*")), "a temporary file was left"


@pytest.mark.parametrize(
    "torn", ['{"step": 2, "gro', '{"step": 2, "group": "train", "loss": 2.0}', "\0\0\0", "7\n",
             "[" * 200_000 + "\n", '{"step": 2, "group": "train", "loss": 1' + "0" * 400 + "}\n"]
)
def test_torn_last_line_is_dropped(folder, torn):
    with RunLogger(folder) as log:
        log.metrics(1, {"loss": 1.0})
    with open(folder.metrics, "a") as file:
        file.write(torn)  # the second is whole but for its end of line: it is written again
    with RunLogger(folder) as log:
        log.metrics(3, {"loss": 3.0})
    assert [line["step"] for line in lines_of(folder)] == [1, 3]


def test_non_finite_metrics_survive_a_restart(folder):
    with RunLogger(folder) as log:
        log.metrics(1, {"loss": float("inf")})
    board = Recorder()
    with RunLogger(folder, board):
        assert board.curves["loss", "train"] == [(1, float("inf"))]


def test_a_new_logger_shows_what_the_run_has_left(folder):
    with RunLogger(folder) as log:
        log.metrics(10, {"loss": 1.0})
        for step in (10, 20):
            log.images(step, "samples", torch.full((1, 1, 4, 4), step / 100))
            log.bars(step, "use", torch.tensor([step, torch.inf]))
            log.health(step, [f"well at {step}"])
        log.metrics(20, {"FID": 3.0}, group="FID")
    board = Recorder()
    with RunLogger(folder, board) as log:
        assert board.shown["health"] == (20, ["well at 20"])
        assert board.shown["use"] == (20, 20.0, None)
        assert board.shown["samples"] == (20, round(0.2 * 255))
        assert board.shown["FID"] == {"FID": "3"}
        log.rewind(10)
        assert board.shown == {"samples": (10, round(0.1 * 255)), "FID": {"FID": "3"}}
    folder.board.write_text("[")
    with RunLogger(folder, board) as log:
        log.bars(30, "use", [1.0])  # a damaged file is replaced
    kept = json.loads(folder.board.read_text())
    assert kept == {"pictures": {"samples": 20}, "bars": {"use": {"step": 30, "values": [1.0]}},
                    "health": None}


@pytest.mark.parametrize("damaged", [
    '{"bars": {"use": {"step": 1, "values": [NaN, Infinity, 1e999]}}, "health": null}',
    '{"bars": {"use": {"step": Infinity, "values": []}}, "health": null}',
    '{"bars": {}, "health": {"step": 1e999, "sentences": []}}',
    '{"bars": {}, "health": null, "pictures": ["samples"]}',
    '{"bars": {}, "health": null, "pictures": {"samples": 1e999}}',
    '{"bars": {"use": {"step": 1, "values": [1' + "0" * 400 + ']}}, "health": null}',
    "[" * 200_000, "\0", "[]", "7", "",
])
def test_a_damaged_board_file_does_not_stop_training(damaged, folder):
    folder.create().board.write_text(damaged)
    board = Recorder()
    with RunLogger(folder, board) as log:
        log.bars(2, "other", [1.0])
        log.health(2, ["training goes well"])
    kept = json.loads(folder.board.read_text())
    assert kept["bars"].pop("other") == {"step": 2, "values": [1.0]}
    assert kept["bars"] in ({}, {"use": {"step": 1, "values": [None, None, None]}})
    assert kept["health"] == {"step": 2, "sentences": ["training goes well"]}


def test_the_board_forgets_a_run_that_is_moved_aside(folder):
    board = Recorder()
    with RunLogger(folder, board, FileLock(folder.create().lock)) as log:
        log.metrics(10, {"loss": 1.0})
        aside = folder.path.rename(folder.path.with_name("aside"))
        log.begin_again(aside / "log.txt", FileLock(folder.create().lock))
        assert not board.curves
        log.metrics(1, {"loss": 2.0})
    assert board.curves == {("loss", "train"): [(1, 2.0)]} and len(lines_of(folder)) == 1


def test_a_full_disk_does_not_stop_what_the_dashboard_keeps(folder):
    with RunLogger(folder) as log:
        log.bars(1, "use", [1.0])
        with_small_files(20, lambda: log.bars(2, "use", [2.0]))
        assert json.loads(folder.board.read_text())["bars"]["use"]["step"] == 1


def test_panels_stand_side_by_side_below_their_titles():
    grey, small = torch.full((1, 40, 300), 9), torch.full((1, 20, 30), 9)
    picture = panels({"first": grey.to(torch.uint8), "a long title": small.to(torch.uint8)})
    pixels = np.asarray(picture)
    assert picture.mode == "L" and pixels.shape[0] == 52 + 40
    assert (pixels[52:, :300] == 9).all() and (pixels[72:, 324:] == 255).all()
    for part in (pixels[:52, :300], pixels[:52, 324:]):
        assert part.min() < 50 and part.max() == 255, "there is no title"
    assert (pixels[:, 300:324] == 255).all()


def test_images_are_saved_as_a_grid_or_one_by_one(folder):
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with RunLogger(folder) as log:
        log.images(50, "samples", images.float() / 255)
        log.images(60, "samples", images.float() / 255, individually=True)
        log.images(70, "samples", images.float() / 255, save=False)
    files = {str(file.relative_to(folder.images)) for file in folder.images.rglob("*.png")}
    numbered = {f"samples_60/00000{index}.png" for index in range(3)}
    assert files == {"samples_50.png"} | numbered
    grid = np.asarray(Image.open(folder.images / "samples_50.png"))
    assert np.array_equal(grid, image_grid(images).permute(1, 2, 0).numpy())
    single = np.asarray(Image.open(folder.images / "samples_60" / "000002.png"))
    assert np.array_equal(single, images[2].permute(1, 2, 0).numpy())


def test_unopenable_metrics_file_raises_user_error(folder):
    folder.create()
    folder.metrics.mkdir()
    with pytest.raises(UserError, match="metrics.jsonl"):
        RunLogger(folder)


# The board on a real server


def test_windows_arrive_at_a_visdom_server(server, folder):
    server.start()
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    board = VisdomBoard("127.0.0.1", server.port, env="group/run", **FOR_A_SERVER)
    with TimedLogger(folder, board) as log:
        for step in range(0, 50, 10):
            log.metrics(step, {"loss": torch.tensor(step / 8), "lr": 1e-4 if step else torch.nan})
        log.metrics(40, {"loss": 2.5}, group="validation")
        log.bars(40, "loss per step", torch.tensor([1.0, torch.nan, 3.0]))
        log.images(40, "samples", images.float() / 255, save=False)
        log.settings({"dataset": "<digits>", "kernel_sizes": [3, 5]}, {"kernel_sizes": [3, 7]})
    # Closing has sent what was left.
    windows = server.windows("group_run")
    assert len(windows) == 5
    assert curve(windows["metric: Loss"]) == ([0, 10, 20, 30, 40], [0, 1.25, 2.5, 3.75, 5])
    assert curve(windows["metric: Loss"], "validation, reconstruction alone") == ([40], [2.5])
    assert windows["metric: Loss"]["content"]["layout"]["showlegend"]
    assert curve(windows["metric: lr"])[1] == [None, 1e-4, 1e-4, 1e-4, 1e-4]
    bars = windows["bars: loss per step"]
    assert bars["title"] == "loss per step, step 40"
    assert bars["content"]["data"][0]["y"] == [1.0, None, 3.0]
    source = windows["image: samples"]["content"]["src"].removeprefix("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))
    assert np.array_equal(pixels[:, :, 1], image_grid(images)[0].numpy())
    table = windows["text: settings"]["content"]
    assert table.index(">3 5 (default 3 7)<") < table.index("&lt;digits&gt;")
    assert not warnings_in(folder)

    # A run that resumes finds the windows there; a curve that it takes back goes away.
    board = VisdomBoard(f"http://127.0.0.1:{server.port}/", env="group/run", **FOR_A_SERVER)
    with RunLogger(folder, board) as log:
        log.metrics(60, {"late": 1.0})
        wait_until(lambda: "metric: late" in server.windows("group_run"))
        log.rewind(20)
    windows = server.windows("group_run")
    assert "metric: late" not in windows
    assert curve(windows["metric: Loss"])[0] == [0, 10, 20]
    assert len(windows["metric: Loss"]["content"]["data"]) == 1


def test_plots_survive_the_death_of_the_server(server, folder):
    board = VisdomBoard("localhost", server.port, env="run", **FOR_A_SERVER)
    with TimedLogger(folder, board) as log:
        steps = []

        def log_one():
            steps.append(len(steps))
            log.metrics(steps[-1], {"loss": steps[-1] / 4})

        def arrived():
            windows = server.windows("run")
            return {"metric: Loss", "image: samples", "bars: use"} <= set(windows) and (
                curve(windows["metric: Loss"]) == (steps, [step / 4 for step in steps])
            )

        log.images(0, "samples", torch.rand(2, 3, 8, 8), save=False)
        log.bars(0, "use", [1, 2])
        for outage in (1, 2):  # the first from the start on
            for _ in range(20):
                log_one()
                time.sleep(0.02)
            wait_until(lambda: len(warnings_in(folder)) == outage)
            time.sleep(0.6)  # further attempts fail without a word
            log_one()
            assert len(warnings_in(folder)) == outage
            server.start()
            wait_until(lambda: folder.log.read_text().count("plots are sent") == outage)
            log_one()
            wait_until(arrived)  # with all that a dead server had, and the gap
            server.kill()
        assert all("connection refused" in warning for warning in warnings_in(folder))

        # A restart between two sendings goes unnoticed, but for the windows being complete.
        server.start()
        log_one()
        wait_until(arrived)
        assert len(warnings_in(folder)) == 2
    assert len(lines_of(folder)) == len(steps)


def test_windows_cleared_while_the_server_is_away_are_closed(server, monkeypatch):
    server.start()
    board = VisdomBoard("127.0.0.1", server.port, env="run", **FOR_A_SERVER)
    board.table("kept", {"a": "1"})
    board.table("cleared", {"a": "1"})
    board.send()
    board.clear()
    board.table("kept", {"a": "2"})
    with monkeypatch.context() as patch:
        patch.setattr(board, "_post", away)
        with pytest.raises(Outage):
            board.send(everything=False)
    board.send()
    assert list(server.windows("run")) == ["table: kept"]


def away(*arguments, **message):
    raise Outage("is away")


def test_training_does_not_wait_for_a_hung_server(folder):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # the kernel accepts, nobody answers
        board = VisdomBoard("127.0.0.1", silent.getsockname()[1], **FAST)
        log = TimedLogger(folder, board)
        end = time.monotonic() + 1.5
        step = 0
        while time.monotonic() < end:
            log.metrics(step, {"loss": 1.0})
            log.images(step, "samples", torch.rand(2, 3, 8, 8), save=False)
            step += 1
            time.sleep(0.01)
        start = time.monotonic()
        log.close(timeout=0.3)
        assert time.monotonic() - start < 0.8
    assert len(warnings_in(folder)) == 1
    assert "does not answer within 0.5 seconds" in warnings_in(folder)[0]
    assert len(lines_of(folder)) == step


def test_training_goes_on_without_a_server_and_keeps_the_login_secret(folder, capfd):
    address = f"http://someone:secret@127.0.0.1:{free_port()}"
    with TimedLogger(folder, VisdomBoard(address, env="run", **FAST)) as log:
        for step in range(60):
            log.metrics(step, {"loss": 1.0})
            time.sleep(0.02)
        start = time.monotonic()
    assert time.monotonic() - start < 2
    assert len(warnings_in(folder)) == 1 and "127.0.0.1" in warnings_in(folder)[0]
    captured = capfd.readouterr()
    assert "secret" not in folder.log.read_text() + captured.out + captured.err
    assert "Traceback" not in captured.out + captured.err


@pytest.mark.parametrize("status, reason", [(200, "as visdom does"), (502, "HTTP status 502")])
def test_foreign_server_on_the_port_gives_one_warning(folder, status, reason):
    class Other(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(status)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *args):
            pass

    other = HTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=other.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        with TimedLogger(folder, VisdomBoard(None, other.server_port, **FAST)) as log:
            log.metrics(1, {"loss": 1.0})
            time.sleep(0.8)
    finally:
        other.shutdown()
        thread.join()
        other.server_close()
    assert len(warnings_in(folder)) == 1 and reason in warnings_in(folder)[0]


def test_curves_are_thinned_evenly_and_keep_both_ends():
    board = VisdomBoard()  # never started: looks into its memory
    for step in range(50_001):
        board.curve("loss", step, step / 2)
    (curves,) = board._curves.values()
    steps, values = np.array(curves["loss", "train"].points).T
    assert MAX_POINTS / 2 <= len(steps) <= MAX_POINTS
    assert steps[0] == 0 and steps[-1] == 50_000
    assert len(set(np.diff(steps)[:-1])) == 1
    assert np.array_equal(values, steps / 2)


@pytest.mark.parametrize("server", ["ftp://host", "http://", "host:port", "http://[::1", "a b"])
def test_invalid_server_address_is_refused(server):
    with pytest.raises(SettingsError, match="--visdom_server"):
        VisdomBoard(server)


# The server command


def test_taken_port_raises_user_error(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"cannot serve port {port} .*in use"):
            visdom_server.main(["--no_download", "--port", port, "--env_path", str(tmp_path)])


def test_hung_download_is_given_up(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(visdom_server.sys, "executable", str(program))
    monkeypatch.setattr(visdom_server, "DOWNLOAD_SECONDS", 0.3)
    monkeypatch.setattr(visdom_server, "STATIC", tmp_path)
    start = time.monotonic()
    assert not visdom_server.download_scripts()
    assert time.monotonic() - start < 10


def test_scripts_from_npm_without_npm_raises_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(visdom_server, "STATIC", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install npm"):
        visdom_server.fetch_scripts_from_npm()
