"""The only module that reads clocks and random numbers of the machine."""

from __future__ import annotations

import os
import time

_STARTED_NS = time.time_ns() - time.monotonic_ns()


class SystemClock:
    """A `ports.Clock` on the machine's clocks."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    now_ns = staticmethod(time.time_ns)
    """`now_ms` in nanoseconds, for those that read it for each delta: one call of C."""

    def rising_ns(self) -> int:
        return _STARTED_NS + time.monotonic_ns()

    def monotonic_s(self) -> float:
        return time.monotonic()

    def thread_cpu_s(self) -> float:
        return time.thread_time()

    def new_id(self) -> str:
        return os.urandom(16).hex()  # a random UUID's worth; the uuid module takes longer to import than all of this
