"""The staleness of an answer: an upper bound on the age of anything that the log had accepted and the answer lacks.

Two things bound it:

- End offsets. If the log ended at offset e at time t, and the position has reached e, then everything accepted before t is
  in the answer: nothing that is missing is older than now - t.
- The last folded record. The log's times never fall within a partition, so everything that is missing was accepted no
  earlier than the last record that is folded in. This compares the log's wall clock with ours, and clocks can be set, so it
  counts only where no end offset was seen.

The time that windows have reached is bounded from below by the log's times alone: `LogTime` and `final_before_ms`.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable
from math import ceil, floor

from pipeline.core.record import Position

OBSERVATIONS_MAX = 1_000
SPACING_S = 0.01


class EndOffsetHistory:
    """End offsets of one partition and when they were seen, over a minute or more. Safe from any thread.

    To forget an observation makes the bound looser, never wrong: old ones are thinned out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at_s: list[float] = []
        self._offsets: list[int] = []

    def observe(self, at_s: float, end_offset: int) -> None:
        """Note that the log ended at `end_offset`, at or after `at_s` on the monotonic clock."""
        with self._lock:
            times, offsets = self._at_s, self._offsets
            if times and at_s <= times[-1]:
                return  # of a slower thread: there is a newer observation
            if offsets and end_offset < offsets[-1]:
                times.clear()  # a log made anew
                offsets.clear()
            same = offsets and end_offset == offsets[-1]
            if same or (len(times) > 1 and times[-1] - times[-2] < SPACING_S):
                times[-1], offsets[-1] = at_s, end_offset
                return
            times.append(at_s)
            offsets.append(end_offset)
            if len(times) > OBSERVATIONS_MAX:
                del times[1:-1:2], offsets[1:-1:2]

    def reached_s(self, next_offset: int) -> float | None:
        """Return the latest time at which the log ended at `next_offset` or below; None if unknown."""
        with self._lock:
            i = bisect_right(self._offsets, next_offset)
            return self._at_s[i - 1] if i else None


def seen_ms(reached_s: float, now_s: float) -> int:
    """Return the first bound, rounded up: everything accepted before `reached_s` is in the answer."""
    return max(0, ceil((now_s - reached_s) * 1000))


def bound_ms(position: Position, reached_s: float | None, *, now_s: float, now_ms: int) -> int | None:
    """Return the bound, rounded up, of one partition's entries at `position`; None if nothing is known.

    `reached_s` is the latest time at which the log ended at or below the position; `now_s` and `now_ms` are one moment on
    the monotonic and on the wall clock.
    """
    if reached_s is not None:
        return seen_ms(reached_s, now_s)
    if 0 < position.source_at_ms <= now_ms:  # from the future: the clocks disagree, so that they bound nothing
        return now_ms - position.source_at_ms + 1
    return None


class LogTime:
    """The newest record time that this process has seen, and when it saw that first. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest_ms = 0
        self._seen_s = 0.0

    def observe(self, record_at_ms: int, now_s: float) -> None:
        """Note that a record has this time; it was read at or before `now_s` on the monotonic clock."""
        with self._lock:
            if record_at_ms > self._newest_ms:
                self._newest_ms, self._seen_s = record_at_ms, now_s

    def reached_ms(self, at_s: float) -> int:
        """Return a time that no record has to fall short of which the log accepts after `at_s`; 0 before a first record."""
        with self._lock:
            if not self._newest_ms:
                return 0
            # Below 0 if the record was seen later: it can be newer than the moment that is asked for.
            return max(0, self._newest_ms + floor((at_s - self._seen_s) * 1_000))


def final_before_ms(folded_ms: Iterable[int | None], reached_ms: int) -> int:
    """Return the time that all partitions have reached: no record with an earlier time will be folded.

    `folded_ms` has for each partition the time of its last folded record, 0 without one, or None if everything is folded
    that the log accepted before the moment at which its time was `reached_ms`.
    """
    return min((reached_ms if it is None else it for it in folded_ms), default=0)
