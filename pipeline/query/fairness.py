"""Turns of writers: while a server's writes wait to be folded, a writer with more than its part of them waits, too.

A partition is a log: what is appended is folded in its order. So a writer that appends more than is folded makes every later
write of the same partition wait for all of its own. This bounds what one server appends ahead of the folding for each of
several writers. A writer that is alone waits for nobody, and nobody waits while nothing is folded: then the log is a buffer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pipeline.metrics as m
from pipeline.budget import ClientGone
from pipeline.core.answer import PartitionState
from pipeline.core.grants import Grant
from pipeline.core.record import producer_id_of
from pipeline.errors import NotReady, PipelineError, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock
from pipeline.query.clients import client_of
from pipeline.settings import QuerySettings

PRODUCER_HEADER = "Pipeline-Producer"
"""Header with the secret of a publisher."""
IS_GONE = "pipeline.is_gone"
"""Name of the extension of ASGI by which the server tells whether a client has gone."""
_LOOK_S = 0.02
"""Interval at which positions are looked at while a writer waits."""
_MOVING_S = 5.0
"""Time after which partitions whose positions stand still count as not folded."""
_ACTIVE_S = 60.0
"""Time for which a writer that is silent has its part."""
_WAITING_MAX = 8
"""Requests of one writer that may wait."""
_WRITERS_MAX = 4_096
"""Most writers that are told apart; others count as one."""
_OTHERS = "others"
IsGone = Callable[[], bool]
"""Returns whether a client has closed its connection."""
_PARTS = 64
"""Writes of one writer are kept in about so many parts: while nothing is folded there can be any number of them."""


class _Writer:
    def __init__(self) -> None:
        self.unfolded: deque[tuple[dict[int, int], int]] = deque()
        """Writes by the offsets behind them, with their bytes, that were not folded when they were last looked at."""
        self.size = 0
        self.seen_s = 0.0
        self.waiting = 0

    def add(self, next_offsets: Mapping[int, int], size: int, least: int) -> None:
        """Add a write, as a part of its own or to the last part, if they are small together, or less than `least` bytes."""
        self.size += size
        if self.unfolded:
            offsets, last = self.unfolded[-1]
            if last + size <= max(least, self.size) // _PARTS:
                offsets.update({it: max(end, offsets.get(it, 0)) for it, end in next_offsets.items()})
                self.unfolded[-1] = offsets, last + size
                return
        self.unfolded.append((dict(next_offsets), size))


class FairTurns:
    """Turns of the writers of one event loop, on which it must be used. `partitions` returns the positions of the stores."""

    def __init__(
        self, partitions: Callable[[], Sequence[PartitionState]], clock: Clock, settings: QuerySettings, metrics: Metrics
    ) -> None:
        self._partitions = partitions
        self._clock = clock
        self._metrics = metrics
        self._most = settings.fair_bytes_max
        self._wait_s = settings.fair_wait_ms / 1000
        self._writers: dict[str, _Writer] = {}
        self._size = 0
        self._positions: Mapping[int, int] = {}
        self._looked_s = self._moved_s = clock.monotonic_s()
        metrics.inc(m.WRITES_DELAYED, 0)
        metrics.inc(m.BODIES_REFUSED, 0, "fair_wait_ms")

    async def wait(self, name: str, is_gone: IsGone) -> None:
        """Wait until it is the turn of a writer, at most `fair_wait_ms`; `Unavailable` if many requests of it wait.

        The body of the request is not read yet, so `is_gone` has to tell when the client goes, which raises `ClientGone`.
        """
        writer = self._writers.get(name) or self._writers.get(_OTHERS)
        if writer is None:  # one that has written nothing is ahead of nobody
            return
        writer.seen_s = self._clock.monotonic_s()
        if not self._is_ahead(writer):
            return
        if writer.waiting >= _WAITING_MAX:
            self._metrics.inc(m.BODIES_REFUSED, 1, "fair_wait_ms")
            raise Unavailable(f"{writer.waiting} requests of this writer wait for what it wrote before to be folded")
        self._metrics.inc(m.WRITES_DELAYED)
        writer.waiting += 1
        try:
            for _ in range(int(self._wait_s / _LOOK_S)):
                if not self._is_ahead(writer):
                    return
                if is_gone():
                    raise ClientGone
                await asyncio.sleep(_LOOK_S)
        finally:
            writer.waiting -= 1

    def note(self, name: str, next_offsets: Mapping[int, int], size: int) -> None:
        """Note that a write was appended, up to these offsets."""
        if len(self._writers) >= _WRITERS_MAX and name not in self._writers:
            self._look()
            name = name if len(self._writers) < _WRITERS_MAX else _OTHERS
        writer = self._writers.setdefault(name, _Writer())
        writer.seen_s = self._clock.monotonic_s()
        writer.add(next_offsets, size, self._most)
        self._size += size
        if self._size > self._most:
            self._look()

    def _is_ahead(self, writer: _Writer) -> bool:
        """Return whether a writer has more than its part of what is not folded, beside others, and that is too much."""
        if self._size < self._most:
            return False
        self._look()
        now_s = self._clock.monotonic_s()
        if self._size < self._most or now_s - self._moved_s > _MOVING_S:
            return False
        active = sum([it.size > 0 or now_s - it.seen_s < _ACTIVE_S for it in self._writers.values()])
        return active > 1 and writer.size >= self._most // active

    def _look(self) -> None:
        """Forget what is folded, and writers that have nothing left."""
        now_s = self._clock.monotonic_s()
        if now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        try:
            positions = {it.partition: it.next_offset for it in self._partitions()}
        except (NotReady, PipelineError):
            return
        if positions != self._positions:
            self._positions, self._moved_s = positions, now_s
        for name, writer in [*self._writers.items()]:
            while writer.unfolded and all(positions.get(it, 0) >= end for it, end in writer.unfolded[0][0].items()):
                size = writer.unfolded.popleft()[1]
                writer.size -= size
                self._size -= size
            idle = not writer.size and not writer.waiting
            if idle and (now_s - writer.seen_s > _ACTIVE_S or len(self._writers) >= _WRITERS_MAX):
                del self._writers[name]


def is_gone_of(scope: Mapping[str, Any]) -> IsGone:
    """Return what tells whether the client of a request has gone; a server that does not know says that it is there."""
    found: IsGone = scope.get("extensions", {}).get(IS_GONE, lambda: False)
    return found


def writer_of(scope: Mapping[str, Any], headers: Mapping[str, str]) -> str:
    """Return who writes: an access token, without one the producer of batches, and else a client's address."""
    grant: Grant = scope["grant"]
    secret = "" if grant.name else headers.get(PRODUCER_HEADER, "")
    return f"producer {producer_id_of(secret)}" if secret else client_of(scope)
