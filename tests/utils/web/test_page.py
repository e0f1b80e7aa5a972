"""The page in a real browser, and its server before visitors who mean no good.

Needs gradio, for the first also playwright and Chromium; see tests/page_visit.py.
"""

import contextlib
import http.client
import importlib.util
import io
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import threading
import urllib.parse
import zipfile
from pathlib import Path

import numpy as np
import pytest
from page_visit import Visit, browser_path, seconds_to_first_picture, visit
from PIL import Image

from helpers import ROOT, free_port, wait_until
from utils.web.records import as_png

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None,
                       reason="there is no gradio: `make test-page` installs it and runs this"),
]
needs_browser = pytest.mark.skipif(
    browser_path() is None or importlib.util.find_spec("playwright") is None,
    reason="there is no chromium (`apt-get install chromium`) or no playwright (`make test-page`)",
)
LONG = "--sample_type remdm --sample_steps 1024 --n_samples 64"  # lasts until it is looked at


class Server:
    """The page of a run in a process of its own, with its files in `folder`."""

    def __init__(self, folder, flags="", password=None):
        self.port, self.folder = free_port(), folder
        script = ROOT / "experiments" / "web_demo.py"
        command = [sys.executable, str(script), *flags.split(), "--port", str(self.port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if password:
            environment["HYDRA_PASSWORD"] = password
        self.output = open(folder / "output.txt", "wb")
        self.process = subprocess.Popen(command, cwd=folder, env=environment,
                                        stdout=self.output, stderr=subprocess.STDOUT)
        wait_until(self.answers, seconds=120)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def answers(self):
        assert self.process.poll() is None, (self.folder / "output.txt").read_text()
        with contextlib.suppress(OSError):
            return self.ask("GET", "/")[0] > 0

    def ask(self, method, path, body=None, **headers):
        """(status, content) of one request, its path sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body=body, headers={
                name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            self.headers = answer.headers
            return answer.status, answer.read()
        finally:
            connection.close()

    def json(self, method, path, content=None, **headers):
        body = None if content is None else json.dumps(content)
        status, answer = self.ask(method, path, body, Content_Type="application/json", **headers)
        return status, json.loads(answer or b"null")

    def upload(self, name, content, **headers):
        head = (f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
                f"Content-Type: application/octet-stream\r\n\r\n").encode()
        return self.ask("POST", "/gradio_api/upload", head + content + b"\r\n--edge--\r\n",
                        Content_Type="multipart/form-data; boundary=edge", **headers)

    def press(self, button, data, session=None):
        """What a press of the first button of a name gives, JSON, asked for without a browser by
        the visitor `session` (None: a new one)."""
        config = self.json("GET", "/config")[1]
        buttons = [part["id"] for part in config["components"] if part["type"] == "button"
                   and part["props"].get("value") == button]
        [click] = [event["id"] for event in config["dependencies"]
                   if [buttons[0], "click"] in [list(at) for at in event["targets"]]]
        [index] = [event["id"] for event in config["dependencies"]
                   if event["trigger_after"] == click]  # the click itself only says to wait
        session = session or secrets.token_hex(8)
        status, answer = self.json("POST", "/gradio_api/queue/join", {
            "data": data, "fn_index": index, "session_hash": session})
        if status != 200:
            return f"{status} {answer}"
        status, events = self.ask("GET", f"/gradio_api/queue/data?session_hash={session}")
        lines = [json.loads(line[6:]) for line in events.decode().splitlines()
                 if line.startswith("data: ")]
        assert lines[-1]["msg"] == "close_stream" and lines[-2]["msg"] == "process_completed"
        return json.dumps(lines[:-1])

    def gradio_files(self):
        """The files that visitors have left."""
        return [path for path in self.folder.glob("logs/web_demo/page_*/**/*") if path.is_file()]

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        self.output.close()


@pytest.fixture(scope="module")
def server(trained):
    server = Server(trained, LONG)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def visitor(server):
    """A Visit of the page that ends without errors and without a request to elsewhere."""
    with visit(server.address) as visitor:
        yield visitor
    assert visitor.complaints == []


def of_png(path):
    return np.asarray(Image.open(path))


def kept_pixels(mask, size):
    """Which pixels [h, w] of an image of `size` (width, height) nothing of a mask touches."""
    hidden = Image.fromarray((mask > 0).astype(np.float32)).resize(size, Image.Resampling.BOX)
    return np.asarray(hidden) == 0


# --- in a browser


@needs_browser
def test_samples_appear_step_by_step_and_are_saved(server, visitor, trained, tmp_path):
    visitor.note_all()
    visitor.press("Draw")
    visitor.wait_for("images in")
    lines, pictures = visitor.seen()
    visitor.press("Stop")
    visitor.page.wait_for_timeout(1000)
    assert "images in" in visitor.told()  # what is finished is not called stopped
    assert len([line for line in lines if " of 1,024 network calls" in line]) > 2
    assert len(pictures) > 4
    png = visitor.saved("Save the picture", tmp_path)
    assert of_png(visitor.saved("Save the ids", tmp_path)).std() > 10
    record = json.loads(visitor.saved("Save how", tmp_path).read_text())
    assert record["samples"]["sample_type"] == "remdm" and len(record["ids"]) == 64
    _, script, *flags = shlex.split(record["command"])
    subprocess.run([sys.executable, str(ROOT / script), *flags, "--no_visdom"], cwd=trained,
                   check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert np.array_equal(of_png(png), of_png(trained / "logs/samples/images/samples_2.png"))


@needs_browser
def test_the_time_to_the_first_picture_is_measured(trained, tmp_path):
    (tmp_path / "logs").symlink_to(trained / "logs")
    seconds = seconds_to_first_picture(
        free_port(), [*LONG.split(), "--log_dir", "page_that_starts"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    assert list(seconds) == ["the page", "the first picture", "all images"]
    page, first, last = seconds.values()
    assert 0 < page < first < last


@needs_browser
def test_work_can_be_stopped(visitor):
    visitor.press("Draw")
    visitor.press_at(" of 1,024 network calls", "Stop")
    visitor.wait_for("Stopped")
    visitor.page.wait_for_timeout(1500)
    assert visitor.told() == "Stopped."


@needs_browser
def test_who_waits_for_a_turn_is_told_so_and_can_stop(server, visitor):
    visitor.press("Draw")
    visitor.panel.locator(".told .bar").wait_for()
    other = Visit(visitor.page.context.browser, server.address)
    other.press("Draw")
    other.wait_for("Waiting for the model")
    other.press("Stop")
    other.wait_for("Stopped")
    visitor.press("Stop")
    visitor.wait_for("Stopped")
    other.page.wait_for_timeout(1500)  # in which its turn would come
    assert other.told() == "Stopped." and other.complaints == []


@needs_browser
def test_wrong_numbers_get_a_sentence(visitor):
    for seed in ("-1", "1.5"):
        visitor.panel.get_by_label("Seed").fill(seed)
        visitor.press("Draw")
        visitor.wait_for("The seed must be a whole number from 0 to")
        assert seed in visitor.told()
        visitor.panel.get_by_label("Seed").fill("3")


@needs_browser
def test_a_part_of_an_image_is_filled_in(visitor, tmp_path):
    values = np.random.RandomState(0).randint(0, 255, (40, 40, 3)).astype(np.uint8)
    path = tmp_path / "mine.png"
    Image.fromarray(values).save(path)
    visitor.open("Fill in")
    visitor.paint()
    visitor.press("Fill in")
    visitor.wait_for("completions of 16x16 pixels")
    visitor.give(path)
    visitor.wait_for("An image of 40x40 pixels")
    visitor.paint()
    visitor.press("Fill in")
    visitor.wait_for("completions of 40x40 pixels")
    archive = zipfile.ZipFile(visitor.saved("Save the completions", tmp_path))
    mask = np.asarray(Image.open(io.BytesIO(archive.read("mask.png"))))
    kept = kept_pixels(mask, (40, 40))
    assert 0.05 < kept.mean() < 0.95
    completions = [np.asarray(Image.open(io.BytesIO(archive.read(name))))
                   for name in archive.namelist() if name.startswith("completion_")]
    assert len(completions) == 8
    for completion in completions:
        assert np.array_equal(completion[kept], values[kept])
        assert not np.array_equal(completion, values)
    record = json.loads(archive.read("record.json"))
    assert record["size"] == [40, 40] and "--image mine.png" in record["command"]


@needs_browser
def test_wrong_files_get_a_sentence(visitor, tmp_path):
    image = as_png(Image.fromarray(np.random.RandomState(0).randint(
        0, 255, (64, 64, 3)).astype(np.uint8)))
    visitor.open("Fill in")
    for name, content, says in (("text.txt", b"no image", "no image of a known format"),
                                ("cut.png", image[:3000], "Cannot read the image cut.png")):
        (tmp_path / name).write_bytes(content)
        visitor.give(tmp_path / name)
        visitor.wait_for(says)
        visitor.panel.get_by_label("Clear").first.click()
    visitor.press("Fill in")
    visitor.wait_for("Paint over what is to be filled in first")


@needs_browser
def test_a_file_that_is_too_large_is_refused_in_words(server, tmp_path):
    (tmp_path / "large.png").write_bytes(b"0" * 20_000_000)
    with visit(server.address) as visitor:
        visitor.open("Fill in")
        visitor.give(tmp_path / "large.png")
        toast = visitor.page.get_by_test_id("toast-body").first
        toast.wait_for()
        assert "size" in toast.inner_text().lower()
        visitor.page.wait_for_timeout(500)
        for complaint in visitor.complaints:
            assert re.match("console: Failed to load resource: .* 413 ", complaint), complaint


@needs_browser
def test_the_other_tabs(visitor, tmp_path):
    visitor.open("Canvas")
    visitor.press("Draw")
    visitor.wait_for("canvas of 32x32 pixels")
    record = json.loads(visitor.saved("Save how", tmp_path).read_text())
    assert record["shape"] == [16, 16] and "generate_big_samples" in record["command"]
    visitor.open("Compare")
    visitor.press("Compare")
    visitor.wait_for("fast.")
    record = json.loads(visitor.saved("Save how", tmp_path).read_text())
    assert record["A"]["samples"]["temp"] != record["B"]["samples"]["temp"]
    visitor.open("Look inside")
    visitor.press("Look")
    visitor.wait_for("PSNR")
    assert len(json.loads(visitor.saved("Save how", tmp_path).read_text())["neighbours"]) == 7
    archive = zipfile.ZipFile(visitor.saved("Save the pictures", tmp_path))
    assert {"codes_in_use.png", "nearest.png", "record.json"} < set(archive.namelist())


# --- without a browser, and without manners

SAMPLE = [4, "halton", 8, 0.8, 3]


def test_ten_requests_at_once_are_served(server):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(server.press("Draw", SAMPLE)),
                                daemon=True) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(answers) == 10 and all("4 images in" in answer for answer in answers)


def resident(process):
    """Memory of a process in bytes."""
    pages = int((Path("/proc") / str(process.pid) / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="there is no /proc")
def test_memory_stays_as_it_is(server):
    for seed in range(20):
        server.press("Draw", [*SAMPLE[:4], seed], "visitor")
    before = resident(server.process)
    for seed in range(100):
        assert "4 images in" in server.press("Draw", [*SAMPLE[:4], seed], "visitor")
    assert resident(server.process) - before < 30 * 2**20


@pytest.mark.parametrize("data, says", [
    ([10**6, "halton", 8, 0.8, 3], "Value 1000000 is greater than maximum value 64"),
    ([4, "halton", 10**9, 0.8, 3], "Value 1000000000 is greater than maximum value 1024"),
    ([4, "magic", 8, 0.8, 3], "Value: magic is not in the list of choices"),
    ([4, "halton", 8, 0.8, 2**40], "The seed must be a whole number from 0 to 4294967295"),
    (["x", None, {}, [], "y"], '"success": false'),  # which no browser sends
])
def test_wrong_requests_are_refused(server, data, says):
    answer = server.press("Draw", data)
    assert "images in" not in answer and "Traceback" not in answer
    assert says in answer
    assert "4 images in" in server.press("Draw", SAMPLE)


def test_large_uploads_are_refused(server):
    status, answer = server.upload("large.png", b"0" * 20_000_000)
    assert status == 413 and len(answer) < 1000
    assert all(path.stat().st_size <= 10_000_000 for path in server.gradio_files())


@pytest.mark.parametrize("name", ["../../../evil.png", "/tmp/evil.png", "..\\\\evil.png",
                                  "%2e%2e%2fevil.png", ".", "a" * 5000 + ".png"])
def test_names_of_uploads_stay_in_their_folder(server, name):
    before = {path for path in server.folder.parent.rglob("*evil*")}
    status, answer = server.upload(name, b"1234")
    assert status in (200, 400, 413, 422)
    for path in {path for path in server.folder.parent.rglob("*evil*")} - before:
        assert path in server.gradio_files()
    assert not os.path.exists("/tmp/evil.png")


@pytest.mark.parametrize("path", [
    "/etc/passwd", "../../../../../../etc/passwd", "..%2f..%2f..%2f..%2fetc/passwd",
    "%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/proc/self/environ", "file:///etc/passwd",
    "logs/demo_absorbing/hparams.yaml", "{folder}/logs/demo_absorbing/hparams.yaml",
    "{folder}/logs/web_demo/log.txt", "{folder}/logs/web_demo/page_/../log.txt",
])
def test_no_file_is_read_outside_its_folder(server, path):
    path = path.format(folder=server.folder)
    for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/",
                  "/theme.css/../", "/gradio_api/"):
        for quoted in (path, urllib.parse.quote(path, safe="")):
            status, content = server.ask("GET", route + quoted)
            assert status >= 400 or b"<!doctype html>" in content[:100].lower(), route + quoted
            assert b"root:x:0" not in content and b"codebook_size:" not in content


@pytest.mark.parametrize("path", ["/etc/passwd", "logs/demo_absorbing/hparams.yaml",
                                  "http://127.0.0.1:{port}/config"])
def test_no_file_of_the_servers_is_taken_for_an_upload(server, path):
    path = path.format(port=server.port)
    given = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
    answer = server.press("Look", ["an image of the dataset or a file", 0, 3, given])
    assert "PSNR" not in answer and "root:x" not in answer
    assert '"success": false' in answer or "annot read the image" in answer


def test_who_has_no_password_gets_nothing(trained, tmp_path):
    (tmp_path / "logs").symlink_to(trained / "logs")
    server = Server(tmp_path, "--log_dir page_with_password", password="sesame")
    try:
        for method, path in (("GET", "/config"), ("GET", "/gradio_api/info"),
                             ("GET", "/gradio_api/file=/etc/passwd"),
                             ("POST", "/gradio_api/queue/join"),
                             ("GET", "/gradio_api/queue/data?session_hash=a"),
                             ("POST", "/gradio_api/run/0")):
            assert server.ask(method, path, "{}", Content_Type="application/json")[0] in (
                401, 404, 405, 422), path
        assert server.upload("a.png", b"1")[0] == 401
        assert b"demo_absorbing" not in server.ask("GET", "/")[1]
        form = "application/x-www-form-urlencoded"
        for password in ("", "Sesame", "sesame ", "é"):
            body = urllib.parse.urlencode({"username": "a", "password": password})
            assert server.ask("POST", "/login", body, Content_Type=form)[0] in (400, 422)
        body = urllib.parse.urlencode({"username": "a", "password": "sesame"})
        assert server.ask("POST", "/login", body, Content_Type=form)[0] == 200
        cookies = "; ".join(cookie.partition(";")[0]
                            for cookie in server.headers.get_all("set-cookie"))
        assert server.ask("GET", "/config", Cookie=cookies)[0] == 200
        assert "sesame" not in (tmp_path / "output.txt").read_text()
        assert "sesame" not in (tmp_path / "logs/page_with_password/log.txt").read_text()
    finally:
        server.close()
    assert not list(tmp_path.glob("logs/page_with_password/page_*"))  # what visitors left is gone
