"""Where the log begins and ends: asked at each read where that is cheap, else again and again by a thread.

Either way the time is noted before the log is asked, and the log before the stores are looked at: whatever was accepted
before that time is below the end offsets, in every partition that there was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pipeline.errors import PipelineError, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock
from pipeline.threads import PeriodicThread

_log = logging.getLogger(__name__)
_SHARED_S = 0.001
"""Reads that begin so close to each other share one look."""
_START_OFFSETS_S = 10.0
"""How often start offsets are asked for: they are for metrics only."""

Offsets = Callable[[], Mapping[int, int]]


class LogEnds(NamedTuple):
    """Where the log ended and began, by partition, at or after `at_s` on the monotonic clock; empty: it did not say."""

    at_s: float
    end_offsets: Mapping[int, int]
    start_offsets: Mapping[int, int]
    source_id: str = ""
    """Of which topic, or of a newer one of its name; see `ports.Log.topic_id`."""


class EndsNow:
    """Asks when it is called: for a log in this process, whose topic has one id. Safe from any thread."""

    def __init__(self, end_offsets: Offsets, start_offsets: Offsets, clock: Clock, *, source_id: str = "") -> None:
        self._end_offsets = end_offsets
        self._start_offsets = start_offsets
        self._clock = clock
        self._source_id = source_id
        self._seen: LogEnds | None = None

    def __call__(self) -> LogEnds:
        """What the log says now."""
        at_s = self._clock.monotonic_s()
        seen = self._seen
        if seen is None or not seen.end_offsets or at_s - seen.at_s >= _SHARED_S:
            try:
                seen = LogEnds(at_s, self._end_offsets(), self._start_offsets(), self._source_id)
            except Unavailable:
                seen = LogEnds(
                    at_s, {}, {}, self._source_id
                )  # reads go on without the log; what was seen earlier still bounds them
            self._seen = seen
        return seen


class EndsPolled:
    """Asks every `interval_ms` in a thread: for a log behind a network, which a read must not wait for.

    While the log is away, what it said last goes on to be told, with the time of then. Safe from any thread.
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
    ) -> None:
        self._end_offsets = end_offsets
        self._start_offsets = start_offsets
        self._source_id = source_id
        self._clock = clock
        self._starts: Mapping[int, int] = {}
        self._next_starts_s = 0.0
        self._away = False
        self._seen = LogEnds(clock.monotonic_s(), {}, {})
        self.thread = PeriodicThread(
            "pipeline-ends", self.step, log=_log, clock=clock, metrics=metrics, interval_s=interval_ms / 1000
        )

    def __call__(self) -> LogEnds:
        """What the log said last."""
        return self._seen

    def start(self) -> None:
        """Begin to ask."""
        self.thread.start()

    def stop(self) -> None:
        """Ask no more. Does not wait for an answer that is under way. Twice is fine."""
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
            self._seen = LogEnds(at_s, ends, self._starts, self._source_id())
            self._away = False
        except PipelineError as error:
            if not self._away and not self.thread.stopping.is_set():
                _log.warning("staleness grows: nobody says where the log ends: %s", error)
            self._away = True
