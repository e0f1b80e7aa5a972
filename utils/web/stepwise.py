"""Work in one thread for all, which a generator follows step by step and ends when it is closed."""

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


class Worker:
    """A thread that does one piece of work after another, until the process ends.

    Always the same one: memory that a thread has had is not given back for others to use.
    """

    def __init__(self):
        self.waiting = queue.SimpleQueue()
        threading.Thread(target=self.run, daemon=True, name="model").start()

    def run(self):
        while True:
            self.waiting.get()()

    def do(self, function):
        """Call a function, which raises nothing, after those before it."""
        self.waiting.put(function)


class Work:
    """`function(progress)` in a Worker's thread, and what it tells its one follower."""

    def __init__(self, function, network):
        self.function, self.network = function, network
        self.told, self.given_up = queue.SimpleQueue(), threading.Event()
        self.is_looked_at, self.next_due = False, 0.0

    def run(self):
        """Do the work; its result, or its error, is told last."""
        if self.given_up.is_set():
            return
        try:
            with counted_calls(self.network) as calls:
                self.began = time.perf_counter()
                result = self.function(self.progress)
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


def stepwise(function, network, worker):
    """Iterator of the Steps of `function(progress)`, which a Worker calls, and of its Finished.

    `progress` is that of `models.sampling.samplers`. Steps that come while the last one is looked
    at, and for a while after that, are left out, but for the last of all. Closing the iterator ends
    the work at its next call; errors are raised here.
    """
    work = Work(function, network)
    worker.do(work.run)
    yield from work.follow()
