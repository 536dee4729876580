"""Where the log begins and ends: asked at each read where that is cheap, else again and again by a thread.

Either way the time is noted before the log is asked, and the log before the stores are looked at: whatever was accepted
before that time is below the end offsets, in every partition that there was.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pipeline.errors import PipelineError, Unavailable
from pipeline.ports import Clock

_log = logging.getLogger(__name__)
_SHARED_S = 0.001
"""Reads that begin so close to each other share one look."""
_START_OFFSETS_S = 10.0
"""How often start offsets are asked for: they are for metrics only."""

Offsets = Callable[[], Mapping[int, int]]


class Seen(NamedTuple):
    """Where the log ended and began, by partition, at or after `at_s` on the monotonic clock; empty: it did not say."""

    at_s: float
    end_offsets: Mapping[int, int]
    start_offsets: Mapping[int, int]
    source_id: str = ""
    """Of which topic, or of a newer one of its name; see `ports.Log.topic_id`."""


class EndsNow:
    """Asks when it is called: for a log in this process. Safe from any thread."""

    def __init__(self, end_offsets: Offsets, start_offsets: Offsets, clock: Clock) -> None:
        self._end_offsets = end_offsets
        self._start_offsets = start_offsets
        self._clock = clock
        self._seen: Seen | None = None

    def __call__(self) -> Seen:
        """What the log says now."""
        at_s = self._clock.monotonic_s()
        seen = self._seen
        if seen is None or not seen.end_offsets or at_s - seen.at_s >= _SHARED_S:
            try:
                seen = Seen(at_s, self._end_offsets(), self._start_offsets())
            except Unavailable:
                seen = Seen(at_s, {}, {})  # reads go on without the log; what was seen earlier still bounds them
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
    ) -> None:
        self._end_offsets = end_offsets
        self._start_offsets = start_offsets
        self._source_id = source_id
        self._clock = clock
        self._interval_s = interval_ms / 1000
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pipeline-ends", daemon=True)
        self._seen = Seen(clock.monotonic_s(), {}, {})

    def __call__(self) -> Seen:
        """What the log said last."""
        return self._seen

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more. Does not wait for an answer that is under way. Twice is fine."""
        self._stop.set()

    def _run(self) -> None:
        starts: Mapping[int, int] = {}
        next_starts_s = 0.0
        away = False
        while not self._stop.is_set():
            at_s = self._clock.monotonic_s()
            try:
                if at_s >= next_starts_s:
                    starts = self._start_offsets()
                    next_starts_s = at_s + _START_OFFSETS_S
                    at_s = self._clock.monotonic_s()
                ends = self._end_offsets()
                self._seen = Seen(at_s, ends, starts, self._source_id())
                away = False
            except PipelineError as error:
                if not away and not self._stop.is_set():
                    _log.warning("staleness grows: nobody says where the log ends: %s", error)
                away = True
            self._stop.wait(self._interval_s)
