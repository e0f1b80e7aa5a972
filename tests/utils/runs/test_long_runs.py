"""A week of training in small: memory and open files stay what they are."""

import os

import pytest

from helpers import at_the_end_of_steps
from test_training import sampler, trained, two_runs, workplace

__all__ = ["trained", "two_runs", "workplace"]  # fixtures of this file too


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_and_open_files_stay_flat_over_20000_steps(two_runs, monkeypatch, capsys):
    seen = {}

    def watch(loop):
        if loop.step in (1000, 5000, 10000, 20000):
            seen[loop.step] = resident_bytes(), len(os.listdir("/proc/self/fd"))

    at_the_end_of_steps(monkeypatch, watch)
    sampler(
        "--log_dir long --train_steps 20000 --bert_n_emb 16 --bert_n_head 4 --bert_n_layers 1 "
        "--kernel_sizes 3 --optimizer adam --ema --batch_size 4 --steps_per_log 10 "
        "--steps_per_eval 5000 "
        "--steps_per_checkpoint 500 --keep_checkpoints 2 --steps_per_save_output 2500"
    )
    with capsys.disabled():
        print()
        for step, (size, files) in seen.items():
            print(f"step {step:6}: {size / 2**20:7.1f} MiB resident, {files} open files")
    assert seen[20000][0] - seen[1000][0] < 16 * 2**20
    assert seen[20000][1] <= seen[1000][1]
