"""`make watch`: curves as a picture, without a server."""

import threading
import time

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from utils.errors import UserError
from utils.logging.curves import plots
from utils.logging.logger import RunLogger, read_metrics
from utils.logging.watch import draw, main
from utils.runs.folder import RunFolder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("run")
    with RunLogger(folder) as log:
        for step in range(10, 110, 10):
            log.metrics(step, {"loss": 1 / step, "l1": 0.1, "codebook_loss": 0.01, "$x_{": 1.0})
        log.metrics(100, {"loss": 0.5, "psnr": 21.0}, group="validation")
    return folder


def test_the_picture_has_the_words_and_units_of_the_dashboard(folder):
    figure = draw("run", plots(read_metrics(folder.metrics), {}), 100)
    found = [(axes.get_title(), axes.get_ylabel()) for axes in figure.axes if axes.lines]
    assert found == [("Loss", "loss"), ("Parts of the loss", "loss, before its weight"),
                     ("Reconstruction PSNR, dB", "dB"), ("$x_{", "")]
    loss, parts = figure.axes[:2]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [
        "training", "validation, reconstruction alone"
    ]
    assert loss.lines[0].get_xydata().tolist()[:2] == [[10, 0.1], [20, 0.05]]
    assert parts.get_yscale() == "log"


def test_a_run_is_drawn_once(folder, capsys):
    main(["logs/run"])
    assert capsys.readouterr().out == "logs/run/curves.png: the curves until step 100\n"
    picture = np.asarray(Image.open(folder.path / "curves.png").convert("L"))
    assert picture.shape[0] > 600 and picture.std() > 10
    assert not list(folder.path.glob("*.tmp"))


def test_it_draws_again_until_the_run_has_ended(folder, capsys):
    lock = FileLock(folder.lock, thread_local=False)
    lock.acquire()
    thread = threading.Thread(target=main, args=(["run", "--every", "0.2"],), daemon=True)
    thread.start()
    try:
        time.sleep(1)
        with open(folder.metrics, "a") as file:
            file.write('{"step": 110, "group": "train", "loss": 0.1}\n')
        assert thread.is_alive()
    finally:
        lock.release()
        thread.join(20)
    assert not thread.is_alive()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("step 100") and lines[-1].endswith("step 110") and len(lines) > 1


@pytest.mark.parametrize("run, sentence", [
    ("ruin", "logs/ruin holds no metrics.jsonl: runs under logs/ are empty, run"),
    ("", "name the run to draw: runs under logs/ are empty, run"),
    ("../elsewhere", "logs/../elsewhere holds no metrics.jsonl: runs under logs/ are empty, run"),
    ("empty", "logs/empty/metrics.jsonl holds no curve yet"),
])
def test_a_wrong_run_gets_one_sentence(run, sentence, folder):
    RunFolder("empty").create().metrics.touch()
    with pytest.raises(UserError) as error:
        main([run])
    assert str(error.value) == sentence


def test_an_experiments_run_names_its_page(folder):
    with RunLogger(RunFolder("measures")) as log:
        log.metrics(100, {"FID": 20.0}, group="FID")
    with pytest.raises(UserError) as error:
        main(["measures"])
    assert str(error.value) == (
        "logs/measures is the run of an experiment, which has figures instead of curves: they are "
        "on its page, logs/measures/report.html")


def test_without_any_run_the_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^logs/a holds no metrics.jsonl, and no run under logs/ "):
        main(["a"])
