"""Work in a thread that a generator follows step by step, and that ends when the generator does."""

import contextlib
import math
import queue
import threading
import time
from typing import Any, NamedTuple

EVERY = 0.1  # seconds at least between two steps that are told of
PAUSE = 3  # times as long as a step was looked at, no further one is told of: looking costs time


class Step(NamedTuple):
    """How far the work is; `ids` int64 [n, N] on the CPU are those so far, None without any."""

    done: int
    total: int
    seconds: float
    ids: Any = None


class Finished(NamedTuple):
    """What the work has given, after so many seconds and calls of the network."""

    result: Any
    seconds: float
    calls: int


class Cancelled(Exception):
    """Nobody follows the work any more."""


@contextlib.contextmanager
def counted_calls(network):
    """Count the calls of a module; gives a list whose length is their number."""
    calls = []
    hook = network.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def stepwise(function, network, lock):
    """Iterator of the Steps of `function(progress)`, which runs in a thread, and of its Finished.

    `progress` is that of `models.sampling.samplers`. Steps that come while the last one is looked
    at, and for a while after that, are left out, but for the last of all. The `lock` is held while the function runs: one piece of work at a
    time. Closing the iterator ends the work at its next call; errors are raised here.
    """
    told, given_up, free = queue.Queue(), threading.Event(), [0.0]  # when the next step is due

    def work():
        try:
            with lock, counted_calls(network) as calls:
                began = last = time.perf_counter()

                def progress(done, total, ids=None):
                    nonlocal last
                    if given_up.is_set():
                        raise Cancelled
                    now = time.perf_counter()
                    if done == total or told.empty() and now - last >= EVERY and now >= free[0]:
                        last = now
                        ids = None if ids is None else ids.cpu().clone()
                        told.put(Step(done, total, now - began, ids))

                result = function(progress)
                told.put(Finished(result, time.perf_counter() - began, len(calls)))
        except BaseException as error:
            told.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item = told.get()
            if isinstance(item, BaseException):
                raise item
            taken = time.perf_counter()
            free[0] = math.inf
            yield item
            if isinstance(item, Finished):
                return
            now = time.perf_counter()
            free[0] = now + PAUSE * (now - taken)
    finally:
        given_up.set()
        thread.join()
