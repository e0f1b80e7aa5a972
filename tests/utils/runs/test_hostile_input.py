"""Broken and hostile files in a process of its own, which they may not bring down: see fuzz.py."""

import os
import subprocess
import sys

import pytest

from helpers import ROOT


@pytest.mark.timeout(600)
@pytest.mark.parametrize("files", [130, pytest.param(2000, marks=pytest.mark.slow)])
def test_broken_files_are_refused_in_one_sentence(files):
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), "--files", str(files)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=580,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{files} mutated files" in done.stdout
