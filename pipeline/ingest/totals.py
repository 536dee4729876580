"""Publishes the increases of running totals, of which each export repeats what it had before.

What is published of each stream is known to this process alone. So all totals of a stream must come here, and after a
restart the first total of a stream that is older than the process is no increase that could be counted: it is refused, and
those that follow count from it.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from math import isfinite
from typing import Any, NamedTuple

from pipeline.core.token import Token
from pipeline.errors import Invalid, Unavailable
from pipeline.ports import Clock, Ingest, RawDelta, Refusal, RequestKey, RunningTotal

_WAIT_S = 1.0


class _StreamTotals(NamedTuple):
    start_ns: int
    at_ns: int
    values: tuple[Any, ...]


class _SentIncreases(NamedTuple):
    """Increases whose outcome is not known: they are sent again, under the same key, before any others."""

    deltas: list[RawDelta]
    lines: list[int]
    key: RequestKey
    known: dict[Hashable, _StreamTotals]


class RunningTotals:
    """Streams of totals and what is published of them. Safe from any thread; one request at a time is worked on."""

    def __init__(self, ingest: Ingest, clock: Clock, streams_max: int) -> None:
        self._ingest = ingest
        self._streams_max = streams_max
        self._lock = threading.Lock()
        self._known: dict[Hashable, _StreamTotals] = {}
        """By stream, what is published of it; the one that has not come for longest is the first."""
        self._known_from_ns = clock.now_ms() * 1_000_000
        """Streams that have begun before, and are not known, may have been counted in part."""
        self._sent: _SentIncreases | None = None

    def publish(self, totals: Sequence[RunningTotal], key: RequestKey) -> tuple[Token, list[Refusal]]:
        """Publish the increases; return their token, and what was left out. `key` identifies the request and its repeats.

        Raises `Unavailable` if they may be published: the request can be repeated, and counts once.
        """
        if not self._lock.acquire(timeout=_WAIT_S):
            raise Unavailable("other totals are being published")
        try:
            if self._sent is not None:
                self._send(self._sent)
            sent, refused = self._increases(totals, key)
            token, unfit = self._send(sent)
            return token, refused + unfit
        finally:
            self._lock.release()

    def _increases(self, totals: Sequence[RunningTotal], key: RequestKey) -> tuple[_SentIncreases, list[Refusal]]:
        sent, refused = _SentIncreases([], [], key, {}), list[Refusal]()
        for it in totals:
            values: tuple[Any, ...] = tuple([delta.value for delta in it.deltas])
            if not all(map(isfinite, values)):
                refused.append(Refusal(it.line, "value", "a total that is not finite"))
                continue
            before = sent.known.get(it.stream) or self._known.get(it.stream)
            if before is not None and it.at_ns <= before.at_ns:
                continue  # a repeat, or one that was overtaken: what is published covers it
            sent.known[it.stream] = _StreamTotals(it.start_ns, it.at_ns, values)
            if before is None and it.start_ns < self._known_from_ns:
                why = "began before this server did: totals count from here on, what it had before may not be counted"
                refused.append(Refusal(it.line, "baseline", why))
                continue
            was = before.values if before is not None else (0,) * len(values)
            if any(now < then for now, then, delta in zip(values, was, it.deltas, strict=True) if not _may_fall(delta)):
                refused.append(Refusal(it.line, "falls", "a total that falls without another start: it counts from here on"))
                continue
            for now, then, delta in zip(values, was, it.deltas, strict=True):
                if now != then or before is None:
                    sent.deltas.append(delta._replace(value=now - then))
                    sent.lines.append(it.line)
        return sent, refused

    def _send(self, sent: _SentIncreases) -> tuple[Token, list[Refusal]]:
        """Append increases, and note what is published by now; return their token, and those that were left out."""
        token, refused = Token(), list[Refusal]()
        if sent.deltas:
            again, self._sent = self._sent is not None, sent
            try:
                token, unfit = self._ingest.fitting(sent.deltas, sent.key)
                refused = [it._replace(line=sent.lines[it.line]) for it in unfit]
            except Invalid:
                self._sent = None
                if not again:
                    raise
        self._sent = None
        for stream, known in sent.known.items():
            self._known.pop(stream, None)
            self._known[stream] = known
        while len(self._known) > self._streams_max:
            gone = self._known.pop(next(iter(self._known)))
            self._known_from_ns = max(self._known_from_ns, gone.start_ns + 1)
        return token, refused


def _may_fall(delta: RawDelta) -> bool:
    """Return whether a total can fall without a new start: the sum of a histogram does by negative observations."""
    return delta.view.endswith("_sum")
