"""Tells a partition that librdkafka reads no longer from one in which nothing happens: neither says anything.

librdkafka can leave a partition unread for good while its leader goes and comes back, as happens behind a broker that stood
still for some seconds: its statistics show fetch state "none" beside a leader that is there and an end beyond the cursor
(measured: 1 of 12 consumers within 7 such outages of 12 partitions, and a server; confluentinc/librdkafka#4492 reports the
like). No error is told, the connection is there, and all other partitions go on. Only the log knows better, so it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from pipeline.ports import Clock

ASK_S = 4.0
"""How often the log is asked where it ends: two answers make a partition silent, well before a worker counts as stalled."""
SILENT_S = 3.0
"""How long nothing may come of what the log has had all the time."""

AskEnds = Callable[[Iterable[int]], Mapping[int, "Future[Any]"]]


class _Asked(NamedTuple):
    at_s: float
    next_offsets: Mapping[int, int]
    """The cursors when the log was asked."""
    ends: Mapping[int, Future[Any]]


class _Behind(NamedTuple):
    next_offset: int
    since_s: float


class Silence:
    """What is known of the partitions of one reader. `ask_ends` returns futures of where they end, without waiting."""

    def __init__(self, ask_ends: AskEnds, clock: Clock) -> None:
        self._ask_ends = ask_ends
        self._clock = clock
        self._asked: _Asked | None = None
        self._behind: dict[int, _Behind] = {}
        self._next_ask_s = clock.monotonic_s() + ASK_S

    def forget(self) -> None:
        """Begin anew: the reader reads something else, or with another consumer."""
        self._asked, self._behind = None, {}
        self._next_ask_s = self._clock.monotonic_s() + ASK_S

    def look(self, next_offsets: Mapping[int, int]) -> dict[int, int]:
        """Return where each silent partition ends. To be called when librdkafka has nothing more to hand over.

        A partition is silent if the log said twice, `SILENT_S` apart or more, that it goes on behind the cursor, and the
        cursor has not moved. An answer also proves that the log is there: an outage makes nothing silent.
        """
        now_s = self._clock.monotonic_s()
        silent: dict[int, int] = {}
        if self._asked is not None and all(it.done() for it in self._asked.ends.values()):
            silent = self._judge(self._asked, next_offsets, now_s)
            self._asked = None
        if self._asked is None and next_offsets and now_s >= self._next_ask_s:
            self._next_ask_s = now_s + ASK_S
            self._asked = _Asked(now_s, dict(next_offsets), self._ask_ends(next_offsets))
        return silent

    def _judge(self, asked: _Asked, next_offsets: Mapping[int, int], now_s: float) -> dict[int, int]:
        silent = {}
        for partition, answer in asked.ends.items():
            cursor = asked.next_offsets[partition]
            if answer.cancelled() or answer.exception() is not None:
                continue  # nothing is known of it now: what was known before may hold
            end: int = answer.result().offset
            if end <= cursor or next_offsets.get(partition) != cursor:
                self._behind.pop(partition, None)
                continue
            before = self._behind.get(partition)
            if before is None or before.next_offset != cursor:
                self._behind[partition] = _Behind(cursor, now_s)
            elif asked.at_s - before.since_s >= SILENT_S:
                silent[partition] = end
        return silent
