"""`make gpu-check` on cards with little memory, little time, or faults: what it cannot do is passed
over, and the rest goes on."""

import contextlib
import itertools
import json
import subprocess
import time
from types import SimpleNamespace

import gpu_checks
import gpu_scripts
import gpu_speed
import pytest
import torch
from gpu_report import Report
from gpu_setup import STAGES, Setup
from gpu_steps import STEPS

from utils.training.cuda_graphs import CaptureFailed

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


@pytest.mark.parametrize("part", ["training", "graphs", "memory"])
def test_nothing_runs_after_a_capture_that_failed(part, report, monkeypatch):
    def fail(step):
        raise CaptureFailed("the networks' kernels cannot be captured: give --no_cuda_graphs "
                            "(CUDA out of memory)")  # after which it can do no more either

    monkeypatch.setattr(Setup, "on_gpu", True)
    monkeypatch.setattr(gpu_checks, "capture_problem", lambda H, processes: None)
    monkeypatch.setattr(gpu_checks, "peak_megabytes", lambda function, device: function())
    for stage in STEPS.values():
        monkeypatch.setattr(stage, "capture", fail)
    parts = {"training": gpu_speed.training, "graphs": gpu_checks.graphs,
             "memory": gpu_checks.memory}
    monkeypatch.setattr(Setup, "wait", lambda setup: None)
    monkeypatch.setattr(Setup, "clean", lambda setup, code=False: None)
    monkeypatch.setattr(Setup, "precision", lambda setup, name: "float32")
    report.run(part, parts[part])
    report.run("sampling", gpu_speed.sampling)
    states = {name: (found["state"], found["why"]) for name, found in report.parts.items()}
    assert states[part][0] == "failed" and "--no_cuda_graphs" in states[part][1]
    assert states["sampling"][0] == "not run" and f"after {part}" in states["sampling"][1]


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


# --- the checks ----------------------------------------------------------------------------------


def test_a_gradient_that_is_not_a_number_does_not_pass(report):
    def run(backend, dtype, device):
        gradients = [torch.ones(3), torch.ones(3)]
        if dtype != torch.float64:
            gradients[1] = torch.tensor([1.0, float("nan"), 1.0])
        return [torch.ones(3, dtype=torch.float64), *gradients]

    gpu_checks.check_case(report.setup, report, ("not a number", run), "flex", torch.float32)
    [check] = report.checks
    assert not check["holds"] and "nan" in check["detail"]


class Step:
    """A training step whose values are `rows`, one after another."""

    H = processes = number = None

    def __init__(self, rows=((1.0,), (2.0,), (3.0,)), capture=lambda: None):
        self.rows, self.capture = iter(rows), capture

    def __call__(self):
        return SimpleNamespace(values=torch.tensor(next(self.rows)))


def give(monkeypatch, step):
    """Let parts have what `step(stage, precision, flags)` gives, on a card that captures."""
    monkeypatch.setattr(
        Setup, "step", lambda setup, stage, precision, flags="": step(stage, precision, flags)
    )
    monkeypatch.setattr(gpu_checks, "capture_problem", lambda H, processes: None)


def test_memory_goes_on_where_a_batch_does_not_fit(report, monkeypatch):
    def step(stage, precision, flags):
        def capture():
            if "--batch_size 4" in flags:
                out_of_memory()
            if "--checkpoint_blocks" in flags:  # CUDA's own error, which is no class of torch's
                raise RuntimeError("CUDA error: out of memory")

        return Step(capture=capture)

    give(monkeypatch, step)
    gpu_checks.memory(report.setup, report)
    fits = [(figure["value"] is not None) for figure in report.figures]
    assert fits == 2 * [True, False, True, False, False]  # half at 2 and 4, float32, checkpoints


def test_waits_and_graphs_pass_over_what_does_not_fit(report, monkeypatch):
    def step(stage, precision, flags):
        return Step(capture=out_of_memory if stage == "autoencoder" else lambda: None)

    give(monkeypatch, step)
    report.run("graphs", lambda setup, report: gpu_checks.graphs(setup, report))
    assert report.parts["graphs"]["state"] == "done"
    assert [(check["stage"], check["holds"]) for check in report.checks] == [("sampler", True)]
    what = "CUDA graphs compute the same"
    assert cases_of(report) == [(what, "does not fit, passed over")]
    monkeypatch.setattr(Setup, "step", out_of_memory)
    report.run("waits", lambda setup, report: gpu_checks.waits(setup, report))
    assert report.parts["waits"]["state"] == "skipped" and len(report.checks) == 1
    assert cases_of(report)[1:] == 8 * [("a step without waits", "does not fit, passed over")]


def test_memory_that_is_short_is_no_wait(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    with pytest.raises(torch.OutOfMemoryError):
        gpu_checks.waits_of(out_of_memory, Setup(torch.device("cuda")))


INF, NAN = float("inf"), float("nan")
OVERFLOWS = [[1.0, INF], [1.0, INF], [1.0, INF]]  # float16's scale is too large; nothing changes


@pytest.mark.parametrize("plain, replayed, holds, found", [
    ([[1.0, 4.0], [0.9, 5.0]], [[1.0, 4.0], [0.9, 5.0]], True, "equal to the bit"),
    ([[1.0, 4.0], [0.9, 5.0]], [[1.0, 4.001], [0.8, 6.0]], True, "step 4: errors of 2.5e-04"),
    ([[1.0, 4.0], [0.9, 5.0]], [[1.0, 4.4], [0.9, 5.0]], False, "step 4: errors of 1.0e-01"),
    ([[1.0, 4.0], [0.9, 5.0]], [[1.0, 4.0], [1.0, 4.0]], False, "step 4: errors of 0.0e+00"),
    ([[1.0, 4.0], [0.9, 5.0]], [[1.0, NAN], [0.9, 5.0]], False, "step 4: errors of nan"),
    (20 * [[1.0, INF]], 20 * [[1.0, INF]], False,
     "none of the first 20 steps has finite losses and gradients"),
])
def test_graphs_are_compared_after_the_overflows_of_float16(
    plain, replayed, holds, found, report, monkeypatch
):
    rows = itertools.cycle((OVERFLOWS + plain, OVERFLOWS + replayed))  # of each stage
    give(monkeypatch, lambda stage, precision, flags: Step(next(rows)))
    gpu_checks.graphs(report.setup, report)
    assert [(check["holds"], check["detail"]) for check in report.checks] == 2 * [(holds, found)]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_a_card_is_asked_for_the_types_that_it_has(capability, report, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(Setup, "clean", lambda setup, code=False: None)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0)
    )
    setup, dtypes, ways = Setup(torch.device("cuda")), set(), []
    monkeypatch.setattr(gpu_checks, "check_case", lambda *case: dtypes.add(case[4]))
    monkeypatch.setattr(
        gpu_checks, "waits_of_stage",
        lambda setup, stage, precision, graphs: ways.append((precision, graphs)),
    )
    gpu_checks.attention(setup, report)
    gpu_checks.waits(setup, report)
    halves = {torch.float16} if capability < (8, 0) else {torch.bfloat16, torch.float16}
    assert dtypes == {torch.float32, *halves}
    amp = "float16" if capability < (8, 0) else "bfloat16"
    assert ("bfloat16", False) in ways or amp == "float16"
    assert {"float32", amp, "float16"} == {precision for precision, _ in ways}
    assert {precision for precision, graphs in ways if graphs} == {amp}


def test_checks_begin_nothing_when_the_time_is_spent(report, monkeypatch):
    begun = []
    monkeypatch.setattr(Setup, "step", lambda *case: begun.append(case))
    monkeypatch.setattr(gpu_checks, "check_case", lambda *case: begun.append(case))
    monkeypatch.setattr(gpu_checks, "peak_of_training", lambda *case: begun.append(case))
    monkeypatch.setattr(gpu_checks, "capture_problem", lambda H, processes: None)
    spend(report)
    for part in (gpu_checks.attention, gpu_checks.waits, gpu_checks.graphs, gpu_checks.memory):
        part(report.setup, report)
    assert not begun and not report.figures and not report.checks
    assert {why for _, why in cases_of(report)} == {"passed over for time"}
    assert {what for what, _ in cases_of(report)} == {
        "a step without waits", "CUDA graphs compute the same", "peak memory",
    }


# --- the figures ---------------------------------------------------------------------------------


def test_training_is_timed_where_its_operations_cannot_be_counted(report, monkeypatch):
    timed = []
    with monkeypatch.context() as context:
        context.setattr(Setup, "step", out_of_memory)
        context.setattr(gpu_speed, "time_training", lambda *case: timed.append(case[-1]))
        gpu_speed.training(report.setup, report)
    assert timed == len(gpu_speed.WAYS) * [None]
    assert [what for what, _ in cases_of(report)] == 2 * ["operations of a step"]
    report.figure("matrix product", 1.0, "TFLOP/s", precision="float32")
    gpu_speed.time_training(report.setup, report, "sampler", "float32", False, False, None)
    found = {figure["what"] for figure in report.figures}
    assert "training" in found and "model flops utilisation" not in found


@pytest.mark.parametrize("stage", STAGES)
def test_launches_are_those_of_a_step_without_updates(stage, report):
    step = report.setup.step(stage, "float32")
    step()
    for number in (8, 9, 10, 11):  # each tenth step updates the EMA
        step.number = number
        gpu_speed.launches(step, report.setup, report, {})
    assert len({figure["value"] for figure in report.figures}) == 1


def test_kernels_that_the_profiler_does_not_see_are_no_figure(report, monkeypatch):
    monkeypatch.setattr(gpu_speed, "kernels_of", lambda step, setup: [])
    gpu_speed.launches(Step(), Setup(torch.device("cuda")), report, {"stage": "sampler"})
    assert not report.figures and "CUPTI" in report.passed_over[0]["why"]


def test_matrices_are_multiplied_in_the_types_that_a_card_has(report, monkeypatch):
    """One that cannot be multiplied, as none on a card that is not there, does not end the rest."""
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch, "randn", out_of_memory)
    gpu_speed.matmul(Setup(torch.device("cuda"), tiny=True), report)
    asked = [case["precision"] for case in report.passed_over]
    assert asked == ["float16", "tf32", "float32"]


def out_of_resource(*arguments, **options):
    raise ArithmeticError("out of resource: shared memory, Required: 163840\nHint: more")


def test_cases_that_a_compiler_cannot_do_do_not_end_the_others(report, monkeypatch):
    hydra_attention = gpu_speed.hydra_attention

    def attention(*arguments, backend):
        return (out_of_resource if backend == "flex" else hydra_attention)(
            *arguments, backend=backend
        )

    def sample(count, sample_steps, sample_type):
        if sample_type == "raster":
            out_of_resource()

    monkeypatch.setattr(gpu_speed, "hydra_attention", attention)
    model = torch.nn.Identity()
    model.sample = sample
    monkeypatch.setattr(Setup, "sampler", lambda setup: model)
    for name in ("backends", "sampling"):
        report.run(name, getattr(gpu_speed, name))
        assert report.parts[name]["state"] == "done"
    why = "ArithmeticError: out of resource: shared memory, Required: 163840"
    assert cases_of(report) == [("attention both ways", why)] * 2 + [("sampling", why)]
    backends = {x["backend"] for x in report.figures if x["what"] == "attention both ways"}
    assert backends >= {"None", "dense", "tiled"}
    assert len(report.values("sampling")) == len(gpu_speed.SAMPLERS) - 1


def test_sampling_is_timed_after_a_short_call(report, monkeypatch):
    calls, model = [], torch.nn.Linear(2, 2)
    model.sample = lambda count, sample_steps, sample_type: calls.append(
        (sample_type, count, sample_steps)
    )
    monkeypatch.setattr(Setup, "sampler", lambda setup: model)
    monkeypatch.setattr(Setup, "half", "bfloat16")
    gpu_speed.sampling(Setup(CPU), report)
    assert model.weight.dtype == torch.bfloat16  # cast once, as experiments do
    assert calls == [
        (method, 64, steps) for method in gpu_speed.SAMPLERS for steps in (2, 16)
    ]


def test_images_go_through_the_autoencoder_as_many_as_fit(report, monkeypatch):
    asked = []

    def fits(device, each, least, most):
        asked.append((each, least, most))
        if len(asked) == 2:
            out_of_memory()
        return 3

    monkeypatch.setattr(gpu_speed, "number_that_fits", fits)
    monkeypatch.setattr(gpu_speed, "extractors", out_of_resource)
    gpu_speed.images(report.setup, report)
    assert len(asked) == 6 and {case[1:] for case in asked} == {(1, 64)}
    assert min(case[0] for case in asked) > 4 * 32**2
    assert [figure["batch"] for figure in report.figures] == 5 * [3]
    assert [what for what, _ in cases_of(report)] == ["features", "decoding"]


def test_figures_begin_nothing_when_the_time_is_spent(report, monkeypatch):
    begun = []
    monkeypatch.setattr(gpu_speed, "time_training", lambda *case: begun.append(case))
    monkeypatch.setattr(gpu_speed, "flops_of", lambda *case: begun.append(case))
    report.seconds = report.elapsed + 120
    gpu_speed.compiled_autoencoder(Setup(CPU), report)  # takes longer
    assert not begun and cases_of(report) == [("training", "passed over for time")]
    report.seconds += 60
    gpu_speed.compiled_autoencoder(Setup(CPU), report)
    assert len(begun) == 2
    monkeypatch.setattr(gpu_speed, "seconds_a_call", lambda *case: begun.append(case))
    monkeypatch.setattr(gpu_speed, "extractors", lambda setup: {"inception": None})
    spend(report)
    gpu_speed.images(report.setup, report)
    assert len(begun) == 2
    assert [what for what, _ in cases_of(report)[1:]] == ["features"] + 3 * ["encoding", "decoding"]


# --- the scripts ---------------------------------------------------------------------------------


def test_scripts_that_run_out_of_time_have_not_failed(report, monkeypatch):
    report.seconds = report.elapsed + 1  # in which Python has not imported torch
    report.run("scripts", lambda setup, report: gpu_scripts.scripts(setup, report))
    assert report.parts["scripts"]["state"] == "skipped" and not report.checks
    assert report.elapsed < report.seconds + 5
    about = [("scripts train and resume", "passed over for time, with what follows")]
    assert cases_of(report) == about
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: 1 / 0)  # none is begun
    place = gpu_scripts.Workplace(report.setup, "", report)
    gpu_scripts.check_case(place, "amp", gpu_scripts.CASES["amp"], at_once=False)
    gpu_scripts.check_script(place, "experiments/get_samples.py", "amp")
    assert cases_of(report)[1:] == [*about, ("scripts measure", "passed over for time")]


@pytest.mark.parametrize("memory, at_once", [
    (8e9, False), (12.6e9, False), (15.8e9, True), (85e9, True),
])
def test_scripts_run_at_once_on_large_cards_only(memory, at_once, report, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_scripts, "in_turn", lambda functions, at_once: asked.append(at_once))
    report.facts["memory_bytes"] = int(memory)
    gpu_scripts.scripts(Setup(CPU), report)
    gpu_scripts.scripts(report.setup, report)  # tiny
    assert asked == [at_once, False]
    report.facts["compute_mode"] = "Exclusive_Process"
    gpu_scripts.scripts(Setup(CPU), report)
    assert len(asked) == 2 and "takes no second process" in report.passed_over[0]["why"]
