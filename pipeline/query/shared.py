"""Answers that equal reads share: each is computed once a commit, for all that ask for it meanwhile or later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

import pipeline.metrics as m
from pipeline.budget import Spent
from pipeline.core.query import Query
from pipeline.core.record import Position
from pipeline.errors import Unavailable
from pipeline.metrics import Metrics
from pipeline.query.codings import Coded
from pipeline.query.found import Asked
from pipeline.query.kept import AnswerCache, AnswerKey, EntityTags, KeptAnswer
from pipeline.query.read_pool import Asker, SharedWork, while_connected
from pipeline.query.reader import ViewReader

Compress = Callable[[str, bytes], Coroutine[Any, Any, Coded]]
InSlot = Callable[[Callable[[], KeptAnswer], Query, Spent], "asyncio.Task[KeptAnswer]"]
"""Starts the computation of a query in a thread; raises `Unavailable` at once if too many run."""


class _Flight(SharedWork[KeptAnswer]):
    """An answer that is being computed."""

    def __init__(self, asked: Asked | None) -> None:
        super().__init__()
        self._asked = asked
        self._positions = None if asked is None else asked.positions
        self.started = False
        """True before the stores are read."""

    def note(self, positions: Mapping[int, Position]) -> None:
        """Note the commits that are read."""
        self._positions = positions

    def answers(self, asked: Asked) -> bool:
        """Return whether an equal query that is asked now is answered by this: of no older commit, over the same range."""
        same = not self.is_dropped and self._asked is not None and self._asked.span == asked.span
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

    async def get(self, key: AnswerKey, asked: Asked | None, deadline_s: float, asker: Asker) -> KeptAnswer:
        """Return an answer of the present commit: kept, under way for another read, or computed now.

        `asked` is the query as it is asked now; None if that is not known. `Unavailable` after `deadline_s`. A computation
        ends when no read waits for it.
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
                flight = self._start(key, asked, deadline_s, asker.spent)
            try:
                async with while_connected(asker.receive):
                    kept = await flight.result(deadline_s - clock.monotonic_s())
            except TimeoutError:
                raise Unavailable(f"view {key[0].view}: not read within timeout_ms; give it more time") from None
            except Unavailable:
                if not joined or clock.monotonic_s() >= deadline_s:
                    raise
                asked = self._reader.asked(key[0])  # the read that computed it had less time
                continue
            self._metrics.inc(m.ANSWERS, 1, "joined" if joined else "computed")
            return kept

    def _start(self, key: AnswerKey, asked: Asked | None, deadline_s: float, spent: Spent) -> _Flight:
        """Begin to compute an answer, and count the CPU as `spent`."""
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

        flight.task = self._in_slot(compute, key[0], spent)
        flight.task.add_done_callback(done)
        self._flights[key] = flight
        return flight

    async def coded(self, kept: KeptAnswer, coding: str, compress: Compress, asker: Asker) -> Coded:
        """Return the compressed start of a kept answer, which is compressed once."""
        found = kept.coded.get(coding)
        if found is not None:
            return found
        work = kept.coding.get(coding)
        if work is None or work.is_dropped:
            work = kept.coding[coding] = SharedWork[Coded]()
            work.task = asyncio.create_task(compress(coding, kept.start))
            work.task.add_done_callback(partial(self._coded, kept, coding, work))
        async with while_connected(asker.receive):
            return await work.result()

    def _coded(self, kept: KeptAnswer, coding: str, work: SharedWork[Coded], task: asyncio.Task[Coded]) -> None:
        if kept.coding.get(coding) is work:
            del kept.coding[coding]
        if not task.cancelled() and task.exception() is None:
            kept.coded[coding] = task.result()
            self._cache.grown(kept)
