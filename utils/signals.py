"""The signals that ask a program to end: Ctrl-C, a closed terminal, a scheduler."""

import contextlib
import signal
import threading

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Stopped(BaseException):
    """A signal ends the script; the message says what is kept.

    Like KeyboardInterrupt it is no Exception: nothing that reports errors may take it for one.
    """

    def __init__(self, number, message):
        super().__init__(message)
        self.exit_status = 128 + number  # as shells have it


@contextlib.contextmanager
def handle_signals(handler):
    """Let `handler(number, frame)`, or signal.SIG_DFL, handle SIGNALS within the block.

    A signal that is ignored stays so, as nohup wants it. Only the main thread has handlers: others
    do without.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def default_signals():
    """A block in which SIGNALS end the process without a word, as they do without Python."""
    return handle_signals(signal.SIG_DFL)


def stop_at_once(number, frame):
    """Handler that ends the script where it is."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(number, f"stopped by {signal.Signals(number).name}; the same command uses what "
                          f"is kept so far")
