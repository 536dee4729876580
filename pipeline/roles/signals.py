"""SIGINT and SIGTERM: the first one stops in order, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNAL_INTERVAL_S = 0.05


class Stop:
    """A flag that a signal handler sets, for the main thread.

    It is no Event: a handler that sets one can run while the same thread holds the Event's lock, and would deadlock.
    """

    def __init__(self) -> None:
        self.number = 0
        """Number of the signal; 0: none has come."""
        self._never = threading.Event()

    def is_set(self) -> bool:
        """Return whether a signal has come."""
        return self.number != 0

    def wait(self, timeout_s: float) -> bool:
        """Wait for a signal, at most `timeout_s`; return whether one has come."""
        while not self.number and timeout_s > 0:
            self._never.wait(min(timeout_s, _SIGNAL_INTERVAL_S))
            timeout_s -= _SIGNAL_INTERVAL_S
        return self.number != 0

    @property
    def exit_code(self) -> int:
        """Exit code of a process that the signal kept from finishing its work."""
        return 128 + self.number


@contextmanager
def stopping_on_signals(stop: Callable[[], None] = lambda: None) -> Iterator[Stop]:
    """Call `stop`, which must not block, at SIGINT and SIGTERM; a second one ends the process at once, like kill -9.

    For the main thread only.
    """
    seen = Stop()

    def handle(number: int, _: object) -> None:
        if seen.number:
            os._exit(128 + number)
        seen.number = number
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
