"""Why a restore does not come to its end: what is between it and the fence record of its owner."""

from __future__ import annotations

import logging

from pipeline.errors import Discontinuous
from pipeline.ports import Clock, Log
from pipeline.topics import CHANGELOG
from pipeline.worker.foreign import Barrier

_log = logging.getLogger(__name__)
PATIENCE_S = 10.0
"""How long a restore waits for its own fence record before it says so."""


class Patience:
    """Says why a restore does not come to its end, once nothing has come for a while."""

    def __init__(self, partition: int, log: Log, clock: Clock, topic_id: str) -> None:
        self._partition = partition
        self._log = log
        self._clock = clock
        self._topic_id = topic_id
        self._since_s = clock.monotonic_s()
        self.waiting = ""
        """For what it waits; empty as long as records come."""

    def look(self, *, came: bool, next_offset: int, barrier: Barrier) -> None:
        """Take note whether records came since the last look. Raises `Discontinuous` if the topic was made anew."""
        now_s = self._clock.monotonic_s()
        if came:
            self._since_s, self.waiting = now_s, ""
        elif now_s - self._since_s > PATIENCE_S:
            if self._log.topic_id(CHANGELOG) != self._topic_id:
                raise Discontinuous(f"changelog-{self._partition} was made anew while it was read")
            self._since_s = now_s
            if self._log.watermarks(CHANGELOG, self._partition).end_offset > barrier.offset:
                self.waiting = ""  # the log lets it be read: if nothing comes, the reader stands still
                return
            self.waiting = (
                f"changelog-{self._partition} can be read up to {next_offset} only, not up to this worker's own record at"
                f" {barrier.offset}: a transaction of somebody else is open there, or a leader that was deposed answers."
                " Find it with kafka-transactions.sh find-hanging, and end it with kafka-transactions.sh abort"
            )
            _log.warning("partition %d is not ready: %s", self._partition, self.waiting)
