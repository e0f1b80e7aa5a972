"""Run folders: where files lie, and names that would leave the folder of runs."""

import pytest

from utils.errors import SettingsError
from utils.runs.folder import RunFolder


@pytest.mark.parametrize("name", ["/etc", "..", "a/../..", ".", "", "a\0b"])
def test_run_names_outside_logs_are_refused(name):
    with pytest.raises(SettingsError, match="lies outside"):
        RunFolder(name)


def test_complete_steps_are_those_with_a_manifest(tmp_path):
    run = RunFolder("a", root=tmp_path)
    assert run.complete_steps() == run.steps("vqgan") == []
    run.create()
    for step in (2, 10, 9):
        run.manifest(step).touch()
    run.model("vqgan", 11).touch()  # was not written to its end
    run.model("vqgan_ema", 12).touch()
    assert run.complete_steps() == [2, 9, 10] and run.steps("vqgan") == [11]
    assert run.last_saved() == "the last checkpoint is that of step 10"
