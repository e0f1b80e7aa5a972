"""Records name the command that makes a picture again."""

import sys
from types import SimpleNamespace

from utils.web.records import command_for


def test_the_command_names_the_step_that_best_stood_for(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no environment is
    H = SimpleNamespace(
        load_step=70, ae_load_step=30,
        command="web_demo.py --load_dir prior --load_step best --ae_load_step=best --temp 0.5",
    )
    assert command_for(H, "get_samples", shape=[8, 16], seed=3, temp=None) == (
        "python experiments/get_samples.py --load_dir prior --load_step 70 --ae_load_step 30 "
        "--shape 8 16 --seed 3"
    )


def test_the_command_names_the_python_of_the_documentation(monkeypatch, tmp_path):
    H = SimpleNamespace(load_step=70, command="web_demo.py --load_dir prior --load_step 70")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert command_for(H, "get_samples").startswith(".venv/bin/python experiments/get_samples.py ")
