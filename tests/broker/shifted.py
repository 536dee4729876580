"""`pipeline` on a machine whose clock is wrong: `python -m tests.broker.shifted worker ...`.

`SHIFTED_MS` is how far its wall clock is ahead. The monotonic clock is right: nobody can set that.
"""

from __future__ import annotations

import os
import time

from pipeline.adapters.clock import SystemClock
from pipeline.cli import main

SHIFTED_MS = "SHIFTED_MS"


def shift(ahead_ms: int) -> None:
    """Set the wall clock of this process ahead, or back."""
    started_ns = time.time_ns() - time.monotonic_ns() + ahead_ms * 1_000_000
    SystemClock.now_ms = lambda _: time.time_ns() // 1_000_000 + ahead_ms  # type: ignore[method-assign]
    SystemClock.rising_ns = lambda _: started_ns + time.monotonic_ns()  # type: ignore[method-assign]


if __name__ == "__main__":
    shift(int(os.environ[SHIFTED_MS]))
    main()
