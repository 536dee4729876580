"""The base of loops that follow the changelog: they take step after step, and wait while the log is away."""

from __future__ import annotations

import logging
from collections.abc import Callable

from pipeline.errors import Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock
from pipeline.threads import LoopThread


class PeriodicThread:
    """A loop in a thread of its own, until it is stopped. Subclasses say what a step is.

    `thread` is its name; `at_end` and `while_away` are what is logged when it can't go on and while the log is away.
    `on_fatal` is called once, from that thread, if it can't go on.
    """

    def __init__(
        self,
        log: logging.Logger,
        clock: Clock,
        on_fatal: Callable[[BaseException], None],
        *,
        thread: str,
        at_end: str,
        while_away: str,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._thread = LoopThread(
            thread,
            self.step,
            log=log,
            clock=clock,
            metrics=metrics,
            while_away=while_away,
            put_off=self._put_off,
            on_fatal=on_fatal,
            at_end=at_end,
            on_end=self.close,
        )
        self._stop = self._thread.stopping

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End; return whether that was done in time. Twice is fine."""
        return self._thread.stop(timeout_s)

    def step(self) -> None:
        """Do what the thread does again and again. `Unavailable`: it is tried again later."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what is open. The thread calls it at its end; whoever drives `step` without a thread calls it too."""
        raise NotImplementedError

    def _put_off(self, error: Unavailable) -> None:
        """Wait, after a step that failed with `error`, until it is time to try again."""
        self._thread.away.wait(error)
