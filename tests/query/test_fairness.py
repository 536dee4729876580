"""Turns of writers: nobody is far ahead of the folding while others write."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

import pipeline.query.fairness as fairness
from pipeline.adapters.clock import SystemClock
from pipeline.budget import ClientGone
from pipeline.core.answer import PartitionState
from pipeline.errors import Unavailable
from pipeline.metrics import NO_METRICS
from pipeline.query.fairness import FairTurns
from pipeline.settings import QuerySettings

WAIT_S = 0.4


class Folding:
    """Positions of one partition, and the turns of its writers, which append 100 bytes at a time."""

    def __init__(self) -> None:
        self.next_offset = self.end_offset = 0
        self.gone = False
        settings = QuerySettings(fair_bytes_max=1_000, fair_wait_ms=int(WAIT_S * 1_000))
        self.turns = FairTurns(self.partitions, SystemClock(), settings, NO_METRICS)

    def partitions(self) -> Sequence[PartitionState]:
        return [PartitionState(0, self.next_offset, self.end_offset, 0, 0, 0, "t")]

    def append(self, writer: str, count: int = 1) -> None:
        for _ in range(count):
            self.end_offset += 1
            self.turns.note(writer, {0: self.end_offset}, 100)

    async def waited_s(self, writer: str) -> float:
        began_s = time.monotonic()
        await self.turns.wait(writer, lambda: self.gone)
        return time.monotonic() - began_s


def test_a_writer_that_is_ahead_waits_for_the_folding() -> None:
    """Beside another writer, one with more than its part waits until enough of it is folded; the other one never does."""

    async def run() -> None:
        folding = Folding()
        folding.append("flood", 20)
        assert await folding.waited_s("flood") < WAIT_S / 2  # alone, it waits for nobody
        assert await folding.waited_s("other") < WAIT_S / 2
        folding.append("other")
        await asyncio.sleep(0.03)
        waiting = asyncio.create_task(folding.waited_s("flood"))
        await asyncio.sleep(0.05)
        assert await folding.waited_s("other") < WAIT_S / 2
        assert not waiting.done()
        folding.next_offset = 16  # of 1,000 bytes each of two may have 500
        assert 0 < await waiting < WAIT_S

    asyncio.run(run())


def test_a_wait_ends_with_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose client has gone waits no more, and leaves its place to others."""

    async def run() -> None:
        monkeypatch.setattr(fairness, "_WAITING_MAX", 1)
        folding = Folding()
        folding.append("flood", 20)
        folding.append("other")
        waiting = asyncio.create_task(folding.waited_s("flood"))
        await asyncio.sleep(0.05)
        folding.gone = True
        with pytest.raises(ClientGone):
            await asyncio.wait_for(waiting, WAIT_S / 2)
        folding.gone = False
        waiting = asyncio.create_task(folding.waited_s("flood"))
        await asyncio.sleep(0.03)
        assert not waiting.done()
        folding.next_offset = folding.end_offset
        await waiting

    asyncio.run(run())


def test_a_wait_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer waits for `fair_wait_ms` at most, and only so many of its requests wait."""

    async def run() -> None:
        monkeypatch.setattr(fairness, "_WAITING_MAX", 2)
        folding = Folding()
        folding.append("flood", 20)
        folding.append("other")
        waits = [asyncio.create_task(folding.waited_s("flood")) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(Unavailable, match="2 requests of this writer wait"):
            await folding.turns.wait("flood", lambda: False)
        assert all([WAIT_S * 0.5 < await it < WAIT_S * 5 for it in waits])

    asyncio.run(run())


def test_nobody_waits_while_nothing_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While no worker folds, the log is a buffer for all; what is folded is forgotten, with writers that are silent."""

    async def run() -> None:
        folding = Folding()
        folding.append("flood", 20)
        folding.append("other")
        monkeypatch.setattr(fairness, "_MOVING_S", -1.0)
        assert await folding.waited_s("flood") < WAIT_S / 2
        monkeypatch.setattr(fairness, "_ACTIVE_S", -1.0)
        folding.next_offset = folding.end_offset
        await asyncio.sleep(0.03)
        folding.turns._look()
        assert (folding.turns._size, folding.turns._writers) == (0, {})

    asyncio.run(run())


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory grows neither with names that write nothing, nor with writes or writers while nothing is folded."""

    async def run() -> None:
        monkeypatch.setattr(fairness, "_WRITERS_MAX", 3)
        folding = Folding()
        for number in range(10):
            await folding.turns.wait(f"stranger {number}", lambda: False)
        assert not folding.turns._writers
        folding.append("flood", 10_000)
        kept = folding.turns._writers["flood"]
        assert (kept.size, sum(size for _, size in kept.unfolded)) == (1_000_000, 1_000_000)
        assert len(kept.unfolded) < 1_000
        for number in range(10):
            folding.append(f"writer {number}")
        assert [*folding.turns._writers] == ["flood", "writer 0", "writer 1", "others"]
        await asyncio.sleep(0.03)
        folding.next_offset = 5_000
        folding.turns._look()
        assert 500_000 <= kept.size < 500_000 + 1_000_000 // 32
        await asyncio.sleep(0.03)
        folding.next_offset = folding.end_offset
        folding.append("writer 9")
        assert len(folding.turns._writers) == 3
        assert "writer 9" in folding.turns._writers  # what is folded makes room

    asyncio.run(run())
