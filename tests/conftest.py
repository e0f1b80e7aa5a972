"""Fixtures of several test files."""

import atexit
import os
import signal

# The tests run on the CPU, some in forks of this process, which a GPU would not survive: set before
# anything asks for one. Who sets the variable runs the tests that need one.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
from hypothesis import HealthCheck, settings
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from helpers import TinyExtractor, VisdomServer
from utils.evaluation import features
from utils.runs.script import kill_workers
from utils.signals import SIGNALS

os.environ["no_proxy"] = "127.0.0.1,localhost"  # the servers of the tests are on this machine
settings.register_profile("the same in every run", derandomize=True,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("the same in every run")


def pytest_configure(config):
    """Let tests and the processes that they start have the signals that `make test &` or `nohup`
    has ignored, which the tests themselves go on to ignore."""
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    atexit.register(kill_workers)  # those that a failed test still holds ignore what would end them


@pytest.fixture
def server(tmp_path):
    """A visdom server on loopback, not started yet; it is gone after the test."""
    server = VisdomServer(tmp_path / "visdom")
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """In an empty folder, where --feature_extractor inception is a `TinyExtractor`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "tiny", TinyExtractor)
    monkeypatch.setitem(features.NAMES, "inception", "tiny")
