"""What the launcher of several processes says in the environment rather than by flags."""

import os

TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def process_count():
    """How many processes torchrun has started, 1 without it.

    Some clusters set one of its variables themselves: only all of them together mean torchrun.
    """
    return int(os.environ["WORLD_SIZE"]) if TORCHRUN <= {*os.environ} else 1


def is_first_process():
    """Whether this is the process that speaks for all of torchrun's."""
    return process_count() == 1 or int(os.environ["RANK"]) == 0
