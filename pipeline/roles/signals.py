"""SIGINT and SIGTERM: the first asks for an orderly end, a second one takes it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNAL_INTERVAL_S = 0.05


class Stop:
    """Whether a signal has come, for the main thread.

    Not an Event: a handler that sets one can run while the same thread holds the Event's lock, and would wait for itself.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal's; 0: none has come."""
        self._never = threading.Event()

    def is_set(self) -> bool:
        """Whether it has come."""
        return self.number != 0

    def wait(self, timeout_s: float) -> bool:
        """Wait until it comes, or for so long; whether it has come."""
        while not self.number and timeout_s > 0:
            self._never.wait(min(timeout_s, _SIGNAL_INTERVAL_S))
            timeout_s -= _SIGNAL_INTERVAL_S
        return self.number != 0

    @property
    def exit_code(self) -> int:
        """What a process ends with that the signal kept from finishing its work."""
        return 128 + self.number


@contextmanager
def stopping_on_signals(stop: Callable[[], None] = lambda: None) -> Iterator[Stop]:
    """SIGINT and SIGTERM call `stop`, which must not block; a second one ends the process at once, as kill -9 would.

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
