"""How the page starts: which run it loads, what it refuses, what it does not write down."""

import errno
import socket
import sys
from pathlib import Path

import pytest

from experiments import web_demo
from hparams import UserError, get_page_hparams
from hparams.environment import is_loopback
from utils.runs.folder import RunFolder


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_PASSWORD", raising=False)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE",
                 "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # what the page sets is gone after the test


def run_of(name, steps):
    folder = Path("logs") / name / "saved_stats"
    folder.mkdir(parents=True)
    for step in steps:
        (folder / f"manifest_{step}.json").touch()


def test_the_demos_newest_step_is_the_default():
    run_of("demo_absorbing", [500, 1600, 1000])
    run_of("other", [7])
    demo = ["--load_dir", "demo_absorbing"]
    assert web_demo.with_run([]) == [*demo, "--load_step", "1600"]
    assert web_demo.with_run(["--load_step", "500"]) == [*demo, "--load_step", "500"]
    assert web_demo.with_run(["--load_dir", "other", "--ema"]) == [
        "--load_step", "7", "--load_dir", "other", "--ema"]
    named = ["--load_dir=other", "--load_step=3"]
    assert web_demo.with_run(named) == named


def test_without_a_run_one_sentence_says_what_makes_one():
    with pytest.raises(UserError, match="no trained run in logs/demo_absorbing: `make demo` makes"):
        web_demo.main([])
    with pytest.raises(UserError, match="no trained run in logs/mine"):
        web_demo.main(["--load_dir", "mine"])


def test_a_run_that_the_page_cannot_show_gets_a_sentence_with_those_that_it_can():
    for name, model in (("ae", "vqgan_ema"), ("mine", "absorbing_ema")):
        run_of(name, [7])
        folder = RunFolder(name).create()
        folder.model(model, 7).touch()
        folder.metrics.touch()
    with pytest.raises(UserError, match="^there is no trained run in logs/nothing: .*are mine$"):
        web_demo.with_run(["--load_dir", "nothing"])
    with pytest.raises(UserError, match="^logs/ae holds an autoencoder, .*there are mine$"):
        web_demo.with_run(["--load_dir", "ae"])


def test_a_port_that_is_taken_gets_a_sentence_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^port {port} of 127.0.0.1 cannot be used \(Address "
                                            r"already in use\): give another one with --port$"):
            web_demo.check_port("127.0.0.1", port)
    web_demo.check_port("127.0.0.1", port)


@pytest.mark.parametrize("host, sentence", [
    ("no.such.host", r"^port 7861 of no.such.host cannot be used \(.+\): give .* with --host$"),
    ("192.0.2.1", r"^port 7861 of 192.0.2.1 cannot be used \(.+\): give .* with --host$"),
    ("a..b", "^a..b is no name of a machine: give another one with --host$"),
    ("a" * 70, "^a{70} is no name of a machine: give another one with --host$"),
])
def test_a_host_that_is_not_this_machine_gets_a_sentence(host, sentence):
    with pytest.raises(UserError, match=sentence):
        web_demo.check_port(host, 7861)


def test_why_the_server_does_not_start_is_told():
    error = PermissionError(errno.EACCES, "Permission denied")
    assert str(web_demo.cannot_listen("127.0.0.1", 80, error)) == (
        "port 80 of 127.0.0.1 cannot be used (Permission denied): give another one with --port")
    error = OSError("Cannot find empty port in range: 80-80. You can specify one by a variable")
    assert str(web_demo.cannot_listen("127.0.0.1", 80, error)) == (
        "port 80 of 127.0.0.1 cannot be used (Cannot find empty port in range: 80-80): give "
        "another one with --port")


LOAD = ["--load_dir", "prior", "--load_step", "2", "--sampler", "absorbing", "--dataset", "digits",
        "--ae_load_dir", "ae", "--ae_load_step", "2"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_others_are_let_in_with_a_password_only(host, capsys, monkeypatch):
    Path("logs/prior").mkdir(parents=True)
    for password in ([], ["--password", ""]):
        with pytest.raises(SystemExit) as stop:
            get_page_hparams([*LOAD, "--host", host, *password])
        assert stop.value.code == 2 and "set a password" in capsys.readouterr().err
    assert get_page_hparams([*LOAD, "--host", host, "--password", "s"]).password == "s"
    monkeypatch.setenv("HYDRA_PASSWORD", "t")
    assert get_page_hparams([*LOAD, "--host", host]).password == "t"


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.example.org")))
    Path("logs/prior").mkdir(parents=True)
    H = get_page_hparams(LOAD)
    assert (H.host, H.password, H.no_visdom) == ("127.0.0.1", None, True)


def test_the_password_is_not_written_down():
    for flags in ("--password 'a b'", "--password=ab", "'--password=a b'"):
        command = web_demo.without_password(f"experiments/web_demo.py {flags} --port 1")
        assert command.endswith("... --port 1") and "a b" not in command and "ab" not in command


def test_without_gradio_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "utils.web.page", None)
    with pytest.raises(ModuleNotFoundError):  # another module that is missing is an error of ours
        web_demo.show_page(None, "folder")
    monkeypatch.delitem(sys.modules, "utils.web.page")
    for name in ("utils.web.tabs", "utils.web.parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="`make web` installs it"):
        web_demo.show_page(None, "folder")
