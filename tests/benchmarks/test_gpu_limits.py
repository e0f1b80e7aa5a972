"""`make gpu-check` on cards with little memory, little time, or faults: what it cannot do is passed
over, and the rest goes on."""

import json
import time

import pytest
import torch
from gpu_report import Report
from gpu_setup import Setup

CPU = torch.device("cpu")


@pytest.fixture
def report(tmp_path):
    return Report(Setup(CPU, tiny=True), tmp_path, minutes=5)


def out_of_memory(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def spend(report):
    """Let no time be left."""
    report.began = time.perf_counter() - report.seconds - 1


def cases_of(report):
    """[(what, why)] of what was passed over."""
    return [(case["what"], case["why"]) for case in report.passed_over]


# --- the report ----------------------------------------------------------------------------------


def test_results_are_kept_where_the_card_breaks_and_no_other_part_runs(report, monkeypatch):
    def broken(code=False):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    report.run("matmul", lambda setup, report: report.figure("product", 2.5, "TFLOP/s"))
    monkeypatch.setattr(report.setup, "clean", broken)
    report.run("training", lambda setup, report: report.figure("training", 3.0, "steps/s"))
    report.run("memory", lambda setup, report: report.figure("memory", 4.0, "MB"))
    kept = json.loads(report.path.read_text())
    assert [figure["value"] for figure in kept["figures"]] == [2.5, 3.0]
    states = {name: part["state"] for name, part in report.parts.items()}
    assert states == {"matmul": "done", "training": "failed", "memory": "not run"}
    assert "illegal memory access" in kept["parts"]["training"]["why"]
    assert "after training" in report.parts["memory"]["why"]


def test_a_case_that_raises_is_in_the_table_and_an_interrupt_ends_the_part(report):
    def part(setup, report):
        for side in (16, 32):
            with report.going_on("attention", side=side):
                if side == 16:
                    raise ValueError("out of resource: shared memory\nand more lines")
                report.figure("attention", 1.0, "ms", side=side)

    report.run("backends", part)
    assert report.parts["backends"]["state"] == "done" and len(report.figures) == 1
    line = "| attention, side 16 | ValueError: out of resource: shared memory |"
    assert line in report.table()
    assert json.loads(report.path.read_text())["passed_over"][0]["side"] == 16

    def interrupted(setup, report):
        with report.going_on("attention"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.run("sampling", interrupted)


def test_a_part_of_which_all_is_passed_over_is_skipped(report):
    report.run("images", lambda setup, report: report.spent("decoding", needed=10**6))
    assert report.parts["images"]["state"] == "skipped"
    assert cases_of(report) == [("decoding", "passed over for time")]
    assert not report.spent("decoding", needed=1)
