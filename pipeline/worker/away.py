"""What the loops do while the log is away: say so now and then, and wait a moment."""

from __future__ import annotations

import logging
import threading

from pipeline.errors import Unavailable
from pipeline.ports import Clock

_AWAY_S = 0.2
_COMPLAIN_S = 10.0


class Away:
    """Warns on `log`, at most every ten seconds, of what follows from it. `stop` ends a wait. Owned by one thread."""

    def __init__(self, log: logging.Logger, clock: Clock, stop: threading.Event, what_follows: str) -> None:
        self._log = log
        self._clock = clock
        self._stop = stop
        self._what_follows = what_follows
        self._warned_s = -_COMPLAIN_S
        self.last_s = -_COMPLAIN_S
        """When it was away last, on `clock`."""

    def wait(self, error: Unavailable) -> None:
        """Until it is time to try again what failed with `error`."""
        now_s = self.last_s = self._clock.monotonic_s()
        if now_s - self._warned_s >= _COMPLAIN_S:
            self._warned_s = now_s
            self._log.warning("%s: %s", self._what_follows, error)
        self._stop.wait(_AWAY_S)
