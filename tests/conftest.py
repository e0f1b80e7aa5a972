"""Fixtures of several test files."""

import pytest

from helpers import VisdomServer


@pytest.fixture
def server(tmp_path):
    """A visdom server on loopback, not started yet; it is gone after the test."""
    server = VisdomServer(tmp_path / "visdom")
    try:
        yield server
    finally:
        server.kill()
