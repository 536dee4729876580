"""Start and end offsets of the log: asked at each read where that is cheap, else by a thread at an interval.

The clock is read before the log is asked, and the log is asked before the stores are read: so whatever the log accepted
before that time is below the end offsets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from pipeline.errors import PipelineError, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock
from pipeline.threads import PeriodicThread

_log = logging.getLogger(__name__)
_SHARED_S = 0.001
"""Reads that begin within this time share one answer of the log."""
_START_OFFSETS_S = 10.0
"""Interval of asking for start offsets, which only metrics need."""

Offsets = Callable[[], Mapping[int, int]]


class LogEnds(NamedTuple):
    """End and start offsets by partition, as of `at_s` or later on the monotonic clock; empty: the log did not answer."""

    at_s: float
    end_offsets: Mapping[int, int]
    start_offsets: Mapping[int, int]
    source_id: str = ""
    """Id of the topic; see `ports.Log.topic_id`."""
    elsewhere: frozenset[int] = frozenset()
    """Partitions of the topic that this process does not follow."""


class EndsNow:
    """Asks a log in this process when it is called. Safe from any thread."""

    def __init__(self, end_offsets: Offsets, start_offsets: Offsets, clock: Clock, *, source_id: str = "") -> None:
        self._end_offsets = end_offsets
        self._start_offsets = start_offsets
        self._clock = clock
        self._source_id = source_id
        self._seen: LogEnds | None = None

    def __call__(self) -> LogEnds:
        """Return what the log answers now."""
        at_s = self._clock.monotonic_s()
        seen = self._seen
        if seen is None or not seen.end_offsets or at_s - seen.at_s >= _SHARED_S:
            try:
                seen = LogEnds(at_s, self._end_offsets(), self._start_offsets(), self._source_id)
            except Unavailable:
                seen = LogEnds(at_s, {}, {}, self._source_id)  # reads go on: earlier answers still bound their staleness
            self._seen = seen
        return seen


class EndsPolled:
    """Asks a log behind a network every `interval_ms` in a thread, so that no read waits for it.

    While the log is away, its last answer is returned, with the time of that answer. Safe from any thread.
    """

    def __init__(
        self,
        end_offsets: Offsets,
        start_offsets: Offsets,
        clock: Clock,
        *,
        interval_ms: int,
        source_id: Callable[[], str] = lambda: "",
        metrics: Metrics = NO_METRICS,
        partitions: frozenset[int] | None = None,
        partition_count: int = 0,
    ) -> None:
        self._end_offsets = end_offsets
        self._followed = partitions
        self._start_offsets = start_offsets
        self._source_id = source_id
        self._clock = clock
        self._starts: Mapping[int, int] = {}
        self._next_starts_s = 0.0
        self._away = False
        self._seen = LogEnds(clock.monotonic_s(), {}, {}, "", self._elsewhere(range(partition_count)))
        self.thread = PeriodicThread(
            "pipeline-ends", self.step, log=_log, clock=clock, metrics=metrics, interval_s=interval_ms / 1000
        )

    def __call__(self) -> LogEnds:
        """Return what the log answered last."""
        return self._seen

    def _elsewhere(self, numbers: Iterable[int]) -> frozenset[int]:
        return frozenset() if self._followed is None else frozenset(numbers) - self._followed

    def start(self) -> None:
        """Begin to ask."""
        self.thread.start()

    def stop(self) -> None:
        """Ask no more, without waiting for an answer under way. May be called twice."""
        self.thread.stop()

    def step(self) -> None:
        """Ask once."""
        at_s = self._clock.monotonic_s()
        try:
            if at_s >= self._next_starts_s:
                self._starts = self._start_offsets()
                self._next_starts_s = at_s + _START_OFFSETS_S
                at_s = self._clock.monotonic_s()
            ends = self._end_offsets()
            elsewhere = self._elsewhere(ends)
            if elsewhere:
                ends = {number: end for number, end in ends.items() if number not in elsewhere}
            self._seen = LogEnds(at_s, ends, self._starts, self._source_id(), elsewhere)
            self._away = False
        except PipelineError as error:
            if not self._away and not self.thread.stopping.is_set():
                _log.warning("staleness grows: nobody says where the log ends: %s", error)
            self._away = True
