"""Fixtures of several test files."""

import signal

import pytest
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from helpers import TinyExtractor, VisdomServer
from utils.evaluation import features
from utils.signals import SIGNALS


def pytest_configure(config):
    """Let tests and the processes that they start have the signals that `make test &` or `nohup`
    has ignored, which the tests themselves go on to ignore."""
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


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
