"""What loops that follow the changelog share: a thread that takes step after step, and waits while the log is away."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pipeline.errors import PipelineError, Unavailable
from pipeline.ports import Clock
from pipeline.worker.away import Away


class Stepping:
    """Takes steps in a thread of its own, until it is stopped. Subclasses say what a step is.

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
    ) -> None:
        self._stop = threading.Event()
        self._away = Away(log, clock, self._stop, while_away)
        self._thread = threading.Thread(target=self._run, name=thread, daemon=True)
        self._logger = log
        self._on_fatal = on_fatal
        self._at_end = at_end

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End; whether that was done in time. Twice is fine."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def step(self) -> None:
        """What the thread does again and again. `Unavailable`: try again later."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what was open. The thread does it at its end; it is for whoever drives `step` without one."""
        raise NotImplementedError

    def _put_off(self, error: Unavailable) -> None:
        """A step failed: wait until it is time to try again."""
        self._away.wait(error)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self.step()
                except Unavailable as error:
                    self._put_off(error)
        except BaseException as error:
            self._logger.critical("%s: %s", self._at_end, error, exc_info=not isinstance(error, PipelineError))
            self._on_fatal(error)
        finally:
            self.close()
