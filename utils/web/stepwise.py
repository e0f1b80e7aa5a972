"""Work in a thread that a generator follows step by step, and that ends when the generator does."""

import contextlib
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


class Work:
    """`function(progress)` in a thread of its own, and what it tells its one follower."""

    def __init__(self, function, network, lock):
        self.told, self.given_up = queue.Queue(), threading.Event()
        self.is_looked_at, self.next_due = False, 0.0
        arguments = (function, network, lock)
        self.thread = threading.Thread(target=self.run, args=arguments, daemon=True)

    def run(self, function, network, lock):
        """Do the work while holding the lock; its result, or its error, is told last."""
        try:
            with lock, counted_calls(network) as calls:
                self.began = time.perf_counter()
                result = function(self.progress)
                self.told.put(Finished(result, time.perf_counter() - self.began, len(calls)))
        except BaseException as error:
            self.told.put(error)

    def progress(self, done, total, ids=None):
        """Tell a Step where the follower is ready for one, or where it is the last."""
        if self.given_up.is_set():
            raise Cancelled
        now = time.perf_counter()
        is_due = not self.is_looked_at and self.told.empty() and now >= self.next_due
        if done == total or is_due:
            self.next_due = now + EVERY
            ids = None if ids is None else ids.cpu().clone()
            self.told.put(Step(done, total, now - self.began, ids))

    def follow(self):
        """Iterator of the Steps and of the Finished work."""
        self.thread.start()
        try:
            while True:
                item = self.told.get()
                if isinstance(item, BaseException):
                    raise item
                taken, self.is_looked_at = time.perf_counter(), True
                yield item
                if isinstance(item, Finished):
                    return
                now = time.perf_counter()
                self.next_due, self.is_looked_at = now + PAUSE * (now - taken), False
        finally:
            self.given_up.set()
            self.thread.join()


def stepwise(function, network, lock):
    """Iterator of the Steps of `function(progress)`, which runs in a thread, and of its Finished.

    `progress` is that of `models.sampling.samplers`. Steps that come while the last one is looked
    at, and for a while after that, are left out, but for the last of all. The `lock` is held while
    the function runs: one piece of work at a time. Closing the iterator ends the work at its next
    call; errors are raised here.
    """
    return Work(function, network, lock).follow()
