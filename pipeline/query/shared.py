"""Answers that equal reads share: each is computed once a commit, for all that ask for it meanwhile or later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import pipeline.metrics as m
from pipeline.core.query import Query
from pipeline.core.record import Position
from pipeline.errors import Unavailable
from pipeline.metrics import Metrics
from pipeline.query.codings import Coded
from pipeline.query.found import Asked
from pipeline.query.kept import AnswerCache, AnswerKey, EntityTags, KeptAnswer
from pipeline.query.read_pool import Receive, while_connected
from pipeline.query.reader import ViewReader

Compress = Callable[[str, bytes], Coroutine[Any, Any, Coded]]
InSlot = Callable[[Callable[[], KeptAnswer], Query], "asyncio.Task[KeptAnswer]"]
"""Starts the computation of a query in a thread; raises `Unavailable` at once if too many run."""


class _Flight:
    """An answer that is being computed."""

    task: asyncio.Task[KeptAnswer]

    def __init__(self, asked: Asked | None) -> None:
        self._asked = asked
        self._positions = None if asked is None else asked.positions
        self.started = False
        """True before the stores are read."""
        self.awaited = 0
        """Number of reads that wait for the answer."""
        self._is_dropped = False

    async def answer(self, timeout_s: float) -> KeptAnswer:
        """Wait for the answer. The last read that stops to wait cancels a computation that has not begun."""
        self.awaited += 1
        try:
            return await asyncio.wait_for(asyncio.shield(self.task), timeout_s)
        finally:
            self.awaited -= 1
            if not self.awaited and not self.started:
                self._is_dropped = True
                self.task.cancel()

    def note(self, positions: Mapping[int, Position]) -> None:
        """Note the commits that are read."""
        self._positions = positions

    def answers(self, asked: Asked) -> bool:
        """Return whether an equal query that is asked now is answered by this: of no older commit, over the same range."""
        same = not self._is_dropped and self._asked is not None and self._asked.span == asked.span
        return same and (not self.started or self._positions == asked.positions)


class SharedAnswers:
    """Finds answers for an event loop, on which it must be used."""

    def __init__(self, reader: ViewReader, bytes_max: int, metrics: Metrics, in_slot: InSlot) -> None:
        self._reader = reader
        self._metrics = metrics
        self._in_slot = in_slot
        self.tags = EntityTags()
        self._cache = AnswerCache(bytes_max, metrics)
        self._flights: dict[AnswerKey, _Flight] = {}
        """The newest computation of each answer that is under way."""

    async def get(
        self, key: AnswerKey, asked: Asked | None, deadline_s: float, receive: Receive | None = None
    ) -> KeptAnswer:
        """Return an answer of the present commit: kept, under way for another read, or computed now.

        `asked` is the query as it is asked now; None if that is not known. `Unavailable` after `deadline_s`. A computation
        that has not begun ends when no read waits for it; `receive` tells when the client of this one goes away.
        """
        clock = self._reader.clock
        while True:
            kept = self._cache.get(key, asked) if asked is not None else None
            if kept is not None:
                self._metrics.inc(m.ANSWERS, 1, "kept")
                return kept
            flight = self._flights.get(key)
            joined = flight is not None and asked is not None and flight.answers(asked)
            if not joined or flight is None:
                flight = self._start(key, asked, deadline_s)
            try:
                async with while_connected(receive):
                    kept = await flight.answer(deadline_s - clock.monotonic_s())
            except TimeoutError:
                raise Unavailable(f"view {key[0].view}: not read within timeout_ms; give it more time") from None
            except Unavailable:
                if not joined or clock.monotonic_s() >= deadline_s:
                    raise
                asked = self._reader.asked(key[0])  # the read that computed it had less time
                continue
            self._metrics.inc(m.ANSWERS, 1, "joined" if joined else "computed")
            return kept

    def _start(self, key: AnswerKey, asked: Asked | None, deadline_s: float) -> _Flight:
        """Begin to compute an answer; once it has begun, it goes on even if no read wants it any more."""
        now_ms = self._reader.clock.now_ms() if asked is None else asked.now_ms
        flight = _Flight(asked)

        def compute() -> KeptAnswer:
            flight.started = True
            found = self._reader.find(key[0], now_ms, deadline_s=deadline_s, at=flight.note)
            return KeptAnswer(found, key, self.tags)

        def done(task: asyncio.Task[KeptAnswer]) -> None:
            if self._flights.get(key) is flight:
                del self._flights[key]
            if not task.cancelled() and task.exception() is None and asked is not None:
                self._cache.put(task.result())

        flight.task = self._in_slot(compute, key[0])
        flight.task.add_done_callback(done)
        self._flights[key] = flight
        return flight

    async def coded(self, kept: KeptAnswer, coding: str, compress: Compress) -> Coded:
        """Return the compressed start of a kept answer, which is compressed once."""
        found = kept.coded.get(coding)
        if found is not None:
            return found
        task = kept.coding.get(coding)
        if task is None:

            def done(task: asyncio.Task[Coded]) -> None:
                del kept.coding[coding]
                if not task.cancelled() and task.exception() is None:
                    kept.coded[coding] = task.result()
                    self._cache.grown(kept)

            task = kept.coding[coding] = asyncio.create_task(compress(coding, kept.start))
            task.add_done_callback(done)
        return await asyncio.shield(task)
