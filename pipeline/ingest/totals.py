"""Publishes the increases of running totals, of which each export or push repeats what it had before.

What is published of each stream is known to one process, and to its memory on disk if it has one. So all totals of a stream
must come here. The first total of a stream that may have been counted in part, because it has begun before anything is
known here, is no increase that could be counted: it is refused, and those that follow count from it.

With a memory a crash at any moment neither loses nor doubles an increase:

- before increases are sent they are saved, with their key, and with the totals that they lead to. After a crash they are
  sent again before anything else; tasks count a key once, so it does not matter whether they were sent before;
- a request that ends before is not saved, and its totals come again, greater or not;
- increases that are so old that tasks may have forgotten the key are not sent again: they may be lost, but not doubled.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from math import inf, isfinite
from typing import Any

import pipeline.metrics as m
from pipeline.budget import uninterrupted
from pipeline.core.distribution import Distribution
from pipeline.core.grants import Bounds
from pipeline.core.token import Token
from pipeline.errors import Invalid, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, Fitted, Ingest, RawDelta, Refusal, RequestKey
from pipeline.pushed import RunningTotal, SavedTotals, SentIncreases, StreamTotals, TotalsMemory

_log = logging.getLogger(__name__)
_WAIT_S = 5.0
"""Longest wait for other requests: a burst of pushes is worked on one by one, while clients of pushes do not try again."""
_BEGAN_BEFORE = "began before this server knew totals: they count from here on, what it had before may not be counted"
_STARTS_NOW = "starts at its own time, so its start is not known: totals count from here on"
"""OTLP's mark of a stream that is resumed, as the Collector does for each target that it begins to scrape."""


class RunningTotals:
    """A `pushed.TotalsPublisher`, with the streams of totals and what is published of them.

    One request at a time is worked on.
    """

    def __init__(
        self,
        ingest: Ingest,
        clock: Clock,
        streams_max: int,
        memory: TotalsMemory | None = None,
        *,
        resend_ms: float = inf,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        """Increases that are older than `resend_ms` are not sent again: tasks may have forgotten their key."""
        self._ingest = ingest
        self._clock = clock
        self._streams_max = streams_max
        self._memory = memory
        self._resend_ms = resend_ms
        self._metrics = metrics
        self._lock = threading.Lock()
        saved = memory.load() if memory is not None else None
        self._known, self._known_from_ns, self._sent = saved or SavedTotals({}, clock.now_ms() * 1_000_000)
        self._unsaved: dict[bytes, StreamTotals | None] = {}
        """Changes of what is known since it was saved."""
        if saved is None:
            self._save(None)
        metrics.set(m.TOTAL_STREAMS, len(self._known))

    def _save(self, sent: SentIncreases | None) -> None:
        if self._memory is not None:
            self._memory.save(self._unsaved, self._known_from_ns, sent)
            self._unsaved = {}

    def publish(self, totals: Sequence[RunningTotal], key: RequestKey, bounds: Bounds | None = None) -> Fitted:
        """Publish the increases; see `pushed.TotalsPublisher`."""
        if not self._lock.acquire(timeout=_WAIT_S):
            raise Unavailable("other totals are being published")
        try:
            with uninterrupted():  # it is sent for another request, perhaps
                done = self._send_again(key)
            sent, refused = self._increases(totals, key, bounds)
            with uninterrupted():
                token, unfit = self._send(sent)
            return token if token.next_offsets else done[0], done[1] + refused + unfit
        finally:
            self._lock.release()

    def _send_again(self, key: RequestKey) -> tuple[Token, list[Refusal]]:
        """Send the increases whose outcome is not known; return what `_send` does if they are those of this request."""
        nothing = Token(), list[Refusal]()
        unsure = self._sent
        if unsure is None:
            return nothing
        if self._clock.now_ms() - unsure.at_ms > self._resend_ms:
            _log.warning("%s increases of totals are too old to be sent again; they may be lost", len(unsure.deltas))
            self._sent = None
            self._learn(unsure)
            return nothing
        again = self._send(unsure)
        return again if unsure.key == key else nothing

    def _increases(
        self, totals: Sequence[RunningTotal], key: RequestKey, bounds: Bounds | None
    ) -> tuple[SentIncreases, list[Refusal]]:
        sent, refused = SentIncreases([], [], key, {}, self._clock.now_ms(), bounds), list[Refusal]()
        for it in totals:
            values: tuple[Any, ...] = tuple([delta.value for delta in it.deltas])
            if not all(map(_is_finite, values)):
                refused.append(Refusal(it.line, "value", "a total that is not finite, or too large"))
                continue
            here = sent.known.get(it.stream)
            if here is not None and it.at_ns == here.at_ns:
                refused.append(Refusal(it.line, "twice", "one stream has two totals: which one is right can't be told"))
                continue
            before = here or self._known.get(it.stream)
            increases = [*values] if before is None else [*map(_increase, values, before.values)]
            steps = [_step(by) for by, delta in zip(increases, it.deltas, strict=True) if not _may_fall(it, delta)]
            if before is not None and it.at_ns and it.at_ns <= before.at_ns and max(steps, default=0) <= 0:
                continue  # a repeat, or one that was overtaken: what is published covers it
            falls = min(steps, default=0) < 0
            if falls and not it.at_ns:
                refused.append(Refusal(it.line, "falls", "a total below an earlier one of this start: it was overtaken"))
                continue
            sent.known[it.stream] = StreamTotals(it.start_ns, it.at_ns, values)
            unknown = it.start_ns < self._known_from_ns or it.start_ns == it.at_ns
            if before is None and unknown:
                why = _STARTS_NOW if it.start_ns == it.at_ns else _BEGAN_BEFORE
                refused.append(Refusal(it.line, "baseline", why))
                continue
            if falls:
                refused.append(Refusal(it.line, "falls", "a total that falls without another start: it counts from here on"))
                continue
            for by, delta in zip(increases, it.deltas, strict=True):
                if _step(by) or (before is None and not isinstance(by, Distribution)):
                    sent.deltas.append(delta._replace(value=by))
                    sent.lines.append(it.line)
        return sent, refused

    def _send(self, sent: SentIncreases) -> tuple[Token, list[Refusal]]:
        """Append increases, and note what is published by now; return their token, and those that were left out."""
        token, refused = Token(), list[Refusal]()
        if sent.deltas:
            again = self._sent is not None
            if not again:
                self._save(sent)
            self._sent = sent
            try:
                token, unfit = self._ingest.fitting(sent.deltas, sent.key, sent.bounds)
                refused = [it._replace(line=sent.lines[it.line]) for it in unfit]
            except Invalid as error:
                self._sent = None
                if not again:
                    with suppress(Unavailable):
                        self._save(None)
                    raise
                refused = [Refusal(line, "refused", f"not known whether it counts: {error}") for line in {*sent.lines}]
        self._sent = None
        self._learn(sent)
        if sent.known and not sent.deltas:
            with suppress(Unavailable):  # else it is saved with the next increases
                self._save(None)
        return token, refused

    def _learn(self, sent: SentIncreases) -> None:
        """Note what is published by now."""
        for stream, known in sent.known.items():
            self._known.pop(stream, None)
            self._known[stream] = known
        changes: dict[bytes, StreamTotals | None] = {**sent.known}
        while len(self._known) > self._streams_max:
            stream = next(iter(self._known))
            self._known_from_ns = max(self._known_from_ns, self._known.pop(stream).start_ns + 1)
            changes[stream] = None
        if self._memory is not None:
            self._unsaved |= changes
        self._metrics.set(m.TOTAL_STREAMS, len(self._known))


def _increase(now: Any, then: Any) -> Any:
    """Return what is added to a total to get another one; of a distribution None if a count of it has fallen."""
    return now.since(then) if isinstance(now, Distribution) else now - then


def _step(increase: Any) -> int | float:
    """Return a number that is above, at or below 0 as an increase is."""
    if isinstance(increase, Distribution):
        return increase.count
    return -1 if increase is None else increase


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Distribution) or isfinite(value)
    except OverflowError:
        return False


def _may_fall(total: RunningTotal, delta: RawDelta) -> bool:
    """Return whether a total can fall without a new start: the sum of a histogram does by negative observations.

    Without a time that would look as if the total had been overtaken.
    """
    return delta.view.endswith("_sum") and total.at_ns > 0


def stream_digest(*parts: object) -> bytes:
    """Return what stands for some texts and numbers: they can be long, and a stream is remembered."""
    return sha256(repr(parts).encode()).digest()
