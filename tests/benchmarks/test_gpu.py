"""`make gpu-check`: every part runs at tiny sizes on the CPU, and says what it has found."""

import contextlib
import json
import os
import subprocess
import sys
import time

import gpu
import gpu_advice
import gpu_checks
import gpu_speed
import pytest
import torch
from gpu_report import Report
from gpu_setup import Operations, Setup

from helpers import ROOT

CPU = torch.device("cpu")


def gpu_check(flags, **environment):
    command = [sys.executable, "benchmarks/gpu.py", *flags.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_a_card_it_says_so_in_a_sentence():
    output = gpu_check("", CUDA_VISIBLE_DEVICES="")
    assert output.returncode == 0, output.stderr
    assert output.stdout.count("\n") == 1
    assert output.stdout.startswith("No CUDA card can be used here, so nothing was checked")


def test_every_part_runs_at_tiny_sizes(tmp_path):
    parts = [name for name in gpu.PARTS if name != "scripts"]
    output = gpu_check(f"--device cpu --tiny --out {tmp_path} --parts {' '.join(parts)}")
    assert output.returncode == 0, output.stdout[-3000:] + output.stderr[-3000:]
    [path] = tmp_path.glob("gpu_*.json")
    found = json.loads(path.read_text())
    assert {name: part["state"] for name, part in found["parts"].items()} == dict.fromkeys(
        parts, "done"
    )
    assert found["torch"] == torch.__version__ and found["words"]
    assert all(figure["unit"] for figure in found["figures"])
    measured = {figure["what"] for figure in found["figures"]}
    assert measured >= {"training", "peak memory", "launches of a step", "attention both ways",
                        "sampling", "features", "encoding", "decoding"}
    assert "| check | holds |" in output.stdout and "The fastest attention" in output.stdout


def test_the_scripts_train_resume_and_measure(tmp_path):
    output = gpu_check(f"--device cpu --tiny --out {tmp_path} --parts scripts --minutes 15")
    assert output.returncode == 0, output.stdout[-3000:] + output.stderr[-3000:]
    [path] = tmp_path.glob("gpu_*.json")
    checks = json.loads(path.read_text())["checks"]
    assert [check["what"] for check in checks].count("scripts train and resume") == 2
    assert [check["what"] for check in checks].count("scripts measure") == 1


def test_computed_memory_is_less_in_half_precision_and_least_with_checkpoints():
    """In a process of its own: tables that models keep would be without content afterwards."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    script = """
import torch, gpu_memory
from gpu_memory import computed
small = computed("sampler", "float32", "--bert_n_layers 1 --batch_size 1 --bert_n_emb 64")
parameters = 1024 * 64 + 1025 * 64 + 256 * 64 + 64  # head, embeddings, positions, start token
parameters += 64 * 64 * 12 + (3 + 1 + 4 + 1) * 64 + 3 * 2 * 64  # the block, biases, norms
assert small["weights"] == 4 * parameters, (small, 4 * parameters)
kept = [
    computed("sampler", case[0], f"{case[1]} --bert_n_layers 4")["kept for the backward pass"]
    for case in gpu_memory.CASES
]
assert kept == sorted(kept, reverse=True) and kept[2] < kept[0] / 4, kept
"""
    output = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr


@pytest.fixture
def report(tmp_path):
    return Report(Setup(CPU, tiny=True), tmp_path, minutes=1)


def test_a_part_that_raises_is_kept_and_the_others_go_on(report, capsys):
    report.run("attention", lambda setup, report: {}["missing"])
    report.run("waits", lambda setup, report: report.check("waits", False, "1 nonzero"))
    report.run("matmul", lambda setup, report: report.figure("product", 2.5, "TFLOP/s"))
    states = {name: part["state"] for name, part in report.parts.items()}
    assert states == {"attention": "failed", "waits": "failed", "matmul": "done"}
    kept = json.loads(report.path.read_text())
    assert "KeyError: 'missing'" in kept["parts"]["attention"]["why"]
    assert "KeyError" in capsys.readouterr().out
    assert "| waits | 0 of 1 |" in report.table()


def test_parts_are_skipped_when_the_time_is_spent(report):
    report.began = time.perf_counter() - 61
    report.run("matmul", lambda setup, report: report.figure("product", 1, "TFLOP/s"))
    assert report.parts["matmul"]["state"] == "skipped" and not report.figures


def test_a_wrong_backend_does_not_pass(report):
    def run(backend, dtype, device):
        torch.manual_seed(0)
        factor = 1 if dtype == torch.float64 else 1.001
        return [factor * torch.randn(8, dtype=torch.float64), torch.ones(3)]

    gpu_checks.check_case(Setup(CPU), report, ("a case of this test", run), "flex", torch.float32)
    [check] = report.checks
    assert not check["holds"] and "1.0e-03" in check["detail"]


def test_operations_that_wait_are_counted():
    x = torch.rand(4)
    with Operations() as operations:
        x[x > 0.5].sum().item()
        x.view(2, 2).mean()
    assert operations.waits == {"index": 1, "_local_scalar_dense": 1}
    assert operations.total == 5  # gt, index, sum, _local_scalar_dense, mean; no view


def measured(*figures, memory=None, checks=(), **facts):
    """A report with these figures."""
    report = Report.__new__(Report)
    report.facts = {"card": "a card", "memory_bytes": memory, "amp": "bfloat16", **facts}
    report.figures, report.checks, report.parts = list(figures), list(checks), {}
    report.passed_over = []
    return report


def training(precision, speed, compiled=False, graphs=False, **other):
    figure = dict(what="training", stage="sampler", precision=precision, compiled=compiled)
    return {**figure, "graphs": graphs, "value": speed, "unit": "steps/s", **other}


def test_advice_follows_from_the_figures():
    report = measured(
        training("float32", 5.0), training("tf32", 8.0), training("bfloat16", 10.0),
        training("bfloat16", 20.0, compiled=True),
        training("bfloat16", 30.0, compiled=True, what="preparation"),
        training("bfloat16", 40.0, compiled=True, graphs=True),
    )
    words = " ".join(gpu_advice.advice(report))
    assert "Give --amp for the sampler: 10 steps/s with it, 8 without." in words
    assert "Leave TF32 on where the sampler" in words
    assert "Leave --cuda_graphs on for the sampler: 40 steps/s with them, 20 without." in words
    del report.figures[5]
    words = " ".join(gpu_advice.advice(report))
    assert "more than 600 steps: 20 steps/s compiled after 30 s" in words  # 30 / (1/10 - 1/20)
    report.figures[3]["value"] = 10.1
    assert "Give --no_compile for the sampler" in " ".join(gpu_advice.advice(report))


def test_advice_compares_ways_with_cuda_graphs():
    of_autoencoder = dict(graphs=True, stage="autoencoder")
    report = measured(
        training("bfloat16", 20.0, **of_autoencoder),
        training("bfloat16", 5.0, what="preparation", **of_autoencoder),
        training("bfloat16", 40.0, True, **of_autoencoder),
        training("bfloat16", 25.0, True, what="preparation", **of_autoencoder),
    )
    words = " ".join(gpu_advice.advice(report))
    assert "more than 800 steps: 40 steps/s compiled after 25 s, 20 not." in words


def failed(detail, compiled=False, graphs=True, precision="bfloat16"):
    return dict(part="training", what="trains at published sizes", holds=False, detail=detail,
                stage="sampler", precision=precision, compiled=compiled, graphs=graphs)


def test_advice_blames_a_flag_only_where_the_way_without_it_worked():
    detail = "a compiler is missing"
    words = " ".join(gpu_advice.advice(measured(
        training("bfloat16", 10.0, graphs=True), training("bfloat16", 20.0, compiled=True),
        training("bfloat16", 5.0), checks=[failed(detail, compiled=True)],
    )))
    assert "Give --no_compile for the sampler, which fails without here (a compiler" in words
    assert "or leave it on" not in words
    words = " ".join(gpu_advice.advice(measured(
        training("bfloat16", 20.0, compiled=True),
        checks=[failed(detail), failed(detail, compiled=True)],
    )))
    assert "Give --no_cuda_graphs for the sampler, which fails without here" in words
    words = " ".join(gpu_advice.advice(measured(
        training("float32", 20.0, graphs=True),
        checks=[failed(detail), failed(detail, compiled=True, graphs=False)],
    )))
    assert "--no_" not in words


def test_advice_on_memory_that_is_short_blames_no_flag():
    detail = "CUDA out of memory. Tried to allocate 2.00 GiB."
    words = " ".join(gpu_advice.advice(measured(
        training("bfloat16", 10.0), training("bfloat16", 20.0, compiled=True),
        checks=[failed(detail, compiled=True), failed(detail, precision="float32", graphs=False)],
    )))
    assert "runs out of memory here in bfloat16, compiled, with CUDA graphs; in float32: " in words
    assert "which fails without" not in words and "Give --compile for the sampler" in words


def test_advice_for_a_card_without_bfloat16_is_of_float16():
    """Also where the figures hold bfloat16, which such a card emulates."""
    report = measured(
        training("float32", 5.0), training("bfloat16", 1.0), training("float16", 9.0),
        training("float16", 18.0, compiled=True),
        training("float16", 30.0, compiled=True, what="preparation"),
        amp="float16", compute_capability="7.5",
    )
    words = " ".join(gpu_advice.advice(report))
    assert "no bfloat16 (compute capability 7.5; 8.0 has it): --amp computes in float16" in words
    assert "Give --amp for the sampler: 9 steps/s with it, 5 without." in words
    assert "18 steps/s compiled after 30 s, 9 not" in words
    report.facts["amp"] = "bfloat16"
    words = " ".join(gpu_advice.advice(report))
    assert "float16" not in words and "Leave out --amp for the sampler: 1 steps/s with it" in words


@pytest.mark.parametrize("capability, amp", [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_what_is_measured_is_what_amp_takes_on_the_card(capability, amp, monkeypatch):
    """Training, memory, and what the report says of the card."""
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(Setup, "clean", lambda setup, code=False: None)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0)
    )
    setup, report, asked = Setup(torch.device("cuda")), measured(), []
    assert setup.half == setup.precision("half") == amp and setup.precision("tf32") == "tf32"
    monkeypatch.setattr(gpu_speed, "flops_of", lambda *arguments: 1)
    monkeypatch.setattr(gpu_speed, "time_training", lambda *case: asked.append(case[3]))
    monkeypatch.setattr(gpu_checks, "peak_of_training", lambda *case: asked.append(case[2]))
    report.began, report.seconds, report.part = time.perf_counter(), 60, ""
    gpu_speed.training(setup, report)
    gpu_checks.memory(setup, report)
    assert set(asked) == {amp, "tf32", "float32"}


def test_advice_on_batches_draws_a_line_through_two():
    def peak(batch, value, precision="bfloat16"):
        return dict(what="peak memory", stage="sampler", precision=precision, flags="",
                    batch=batch, value=value, unit="MB")

    report = measured(
        peak(20, 3000), peak(40, 5000), peak(20, None, "float32"), peak(40, None, "float32"),
        memory=10000 * 2**20,
    )
    words = " ".join(gpu_advice.memory_words(report, "sampler"))
    assert "that fit: 82 in bfloat16 (3000 MB for 20, 100 MB for each more)" in words
    assert "does not fit: 20 in float32; give --accumulate or --checkpoint_blocks" in words


@pytest.mark.parametrize("chosen, verdict", [(1.1, "takes the fastest"), (2.0, "takes a slower")])
def test_advice_on_attention_names_the_fastest(chosen, verdict):
    figures = [
        dict(what="attention both ways", side=16, kernels="7", bias=False, backend=backend,
             value=value, unit="ms")
        for backend, value in (("None", chosen), ("flex", 1.0), ("dense", 2.0))
    ]
    words = " ".join(gpu_advice.attention_words(measured(*figures)))
    assert "16x16, kernels 7: flex, 1 ms" in words and verdict in words


def test_places_in_the_code_are_named():
    with pytest.raises(RuntimeError) as caught:
        torch.nn.Linear(2, 3)(torch.ones(1, 4))
    assert "(test_gpu.py, line " in gpu_checks.where(caught.value)
