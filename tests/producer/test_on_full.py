"""A log that is away for long, and buffers that are full: memory and disk stay within their limits, and nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import pipeline.metrics as m
from pipeline.adapters.memory import MemoryLog
from pipeline.errors import BufferFull, PipelineError, Unavailable
from pipeline.publisher.client import BasePublisher
from pipeline.publisher.rescue import drain
from pipeline.publisher.spool.look import inspect
from pipeline.settings import PublisherSettings
from tests.producer.support import CLOCK, FaultyLog, Meter, fold, publisher, same, wait_until
from tests.publisher.spool.support import as_kill_leaves_it

BUFFER = 2**17
SPOOL = 2**22
TURNS = 600
LONG_SPOOL = 2**23
"""Less than that many turns over 1,000 series take in a ring."""


class Down:
    """A log that knows its partitions and accepts nothing, until it is back."""

    def __init__(self) -> None:
        self.is_down = True
        self.log = FaultyLog(self._fate)

    def _fate(self, n: int, batch: object) -> PipelineError | str:
        return Unavailable("the log is down") if self.is_down else "kept"


def spool_bytes(folder: Path) -> int:
    return sum(slot.bytes_total for slot in inspect(folder))


@pytest.fixture
def down() -> Iterator[Down]:
    down = Down()
    yield down
    down.is_down = False


@pytest.mark.parametrize("away", ["away", "down"])
@pytest.mark.parametrize("durability", ["memory", "process"])
def test_a_log_that_is_away_for_long_costs_what_its_series_cost(tmp_path: Path, durability: str, away: str) -> None:
    """600,000 deltas over 1,000 series: memory does not grow with deltas, the spool is committed as series, all arrive."""
    down = Down()
    down.is_down = away == "down"
    down.log.away = away == "away"
    settings = {"durability": durability, "spool_dir": str(tmp_path)} if durability != "memory" else {}
    with publisher(down.log, spool_bytes_max=LONG_SPOOL, buffer_bytes_max=2**23, **settings) as pub:
        cells = [pub.sum("v", labels=("n",)).labels(str(n)) for n in range(1_000)]
        used = []
        for turn in range(TURNS):
            for cell in cells:
                cell.add(float(turn))
            if turn % 40 == 39:
                used.append(pub.stats()["buffer_bytes"])
                assert not settings or spool_bytes(tmp_path) <= LONG_SPOOL
                # On a loaded machine the flusher, which commits what was recorded as series, is slower than this thread.
                wait_until(lambda: not settings or spool_bytes(tmp_path) <= LONG_SPOOL // 2)
        assert max(used) <= 2**23
        down.is_down = down.log.away = False
        pub.flush(60)
        same(fold(down.log.log).of("v"), {(str(n),): sum(range(TURNS)) for n in range(1_000)})


# What `on_full` says


def fill(pub: BasePublisher, first: int = 0) -> int:
    """Record 1 to new series until that is refused; how many it was."""
    view = pub.sum("v", labels=("n",))
    for n in range(first, first + 10_000):
        try:
            view.add(1.0, n=str(n))
        except BufferFull:
            return n
    raise AssertionError("it was never full")


def arrived(log: MemoryLog) -> dict[tuple[str, ...], Any]:
    return fold(log).of("v")


def ones(count: int) -> dict[tuple[str, ...], Any]:
    return {(str(n),): 1 for n in range(count)}


@pytest.mark.parametrize(("on_full", "waited"), [("block", 1), ("raise", 0)])
def test_a_full_buffer_refuses(down: Down, on_full: str, waited: int) -> None:
    """`BufferFull`, at once or after `block_timeout_ms`; nothing that was recorded before is lost, and it goes on after."""
    meter = Meter()
    with publisher(down.log, meter, on_full=on_full, block_timeout_ms=50, buffer_bytes_max=BUFFER) as pub:
        count = fill(pub)
        assert count > 50
        assert pub.stats()["buffer_bytes"] <= BUFFER
        assert meter.of(m.PUBLISHER_REFUSED) == 1
        assert min(meter.of(m.PUBLISHER_BLOCKED), 1) == waited
        down.is_down = False
        pub.flush(60)
        pub.sum("v", labels=("n",)).add(1.0, n=str(count))
    same(arrived(down.log.log), ones(count + 1))


def test_a_thread_that_is_blocked_goes_on_when_there_is_room(down: Down) -> None:
    """It waits for the log, and records; nobody sees an error."""
    meter = Meter()
    with publisher(down.log, meter, block_timeout_ms=60_000, buffer_bytes_max=BUFFER) as pub:
        view = pub.sum("v", labels=("n",))
        thread = threading.Thread(target=lambda: [view.add(1, n=str(n)) for n in range(1_000)])
        thread.start()
        wait_until(lambda: meter.of(m.PUBLISHER_BLOCKED))
        down.is_down = False
        thread.join(60)
        assert not thread.is_alive()
    same(arrived(down.log.log), ones(1_000))
    assert not meter.of(m.PUBLISHER_REFUSED)


def test_the_newest_are_dropped_and_counted(down: Down) -> None:
    """`drop_newest`: recording never fails or waits; what arrives and what is counted as dropped make up all."""
    meter = Meter()
    with publisher(down.log, meter, on_full="drop_newest", buffer_bytes_max=BUFFER) as pub:
        view = pub.sum("v", labels=("n",))
        for n in range(1_000):
            view.add(1.0, n=str(n))
        dropped = meter.of(m.PUBLISHER_DROPPED, "buffer_full")
        assert dropped > 0
        down.is_down = False
    found = arrived(down.log.log)
    assert set(found.values()) == {1}
    assert len(found) + dropped == 1_000


# With a spool


@pytest.mark.parametrize("durability", ["memory", "process"])
def test_batches_on_disk_are_bounded_by_the_disk_alone(tmp_path: Path, down: Down, durability: str) -> None:
    """Many times more series than memory holds are recorded while the log is down, and all of them arrive."""
    meter = Meter()
    settings = {"buffer_bytes_max": BUFFER, "durability": durability, "spool_dir": str(tmp_path), "spool_bytes_max": 2**24}
    with publisher(down.log, meter, block_timeout_ms=60_000, batch_bytes_max=4_096, **settings) as pub:
        view = pub.sum("v", labels=("n",))
        most = 0
        for n in range(6_000):
            view.add(1.0, n=str(n))
            most = max(most, pub.stats()["buffer_bytes"])
        assert most <= BUFFER * 1.1  # a batch is sealed from series that were charged before
        assert meter.of(m.PUBLISHER_SPILLED) > 0
        assert spool_bytes(tmp_path) <= 2**24
        down.is_down = False
        pub.flush(60)
        wait_until(lambda: pub.stats()["buffer_bytes"] <= BUFFER)
    same(arrived(down.log.log), ones(6_000))
    assert inspect(tmp_path) == []


@pytest.mark.parametrize("durability", ["memory", "process"])
def test_a_spool_that_is_full_blocks(tmp_path: Path, down: Down, durability: str) -> None:
    """At `spool_bytes_max` recording waits, then raises; all that was recorded before arrives."""
    settings = {"buffer_bytes_max": BUFFER, "durability": durability, "spool_dir": str(tmp_path), "spool_bytes_max": SPOOL}
    with publisher(down.log, block_timeout_ms=300, batch_bytes_max=65_536, **settings) as pub:
        view = pub.last("v", labels=("n",))
        count = 0
        with suppress(BufferFull):
            while count < 10_000:
                view.set("x" * 2_000, n=str(count))
                count += 1
        assert count < 10_000, "it was never full"
        assert count * 2_000 > 5 * BUFFER
        assert spool_bytes(tmp_path) <= SPOOL
        down.is_down = False
        pub.flush(60)
    same(arrived(down.log.log), {(str(n),): "x" * 2_000 for n in range(count)})


@pytest.mark.parametrize("durability", ["memory", "process"])
def test_batches_on_disk_count_once_after_a_kill(tmp_path: Path, durability: str) -> None:
    """The log has accepted all and never said so; the process dies; what is sent from its spool is dropped as known."""
    log = FaultyLog(lambda n, batch: "unheard" if batch.sequence % 2 else Unavailable("the log is down"))
    settings = {"buffer_bytes_max": BUFFER, "durability": durability, "spool_dir": str(tmp_path / "spool")}
    pub = publisher(log, batch_bytes_max=4_096, **settings)
    view = pub.sum("v", labels=("n",))
    for n in range(2_000):
        view.add(1.0, n=str(n))
    wait_until(lambda: pub.stats()["waiting"] > 20 and len(log.attempts) > 5)
    [slot] = inspect(tmp_path / "spool")
    as_kill_leaves_it(tmp_path / "spool" / slot.slot, tmp_path / "left")
    assert slot.entry_count > 500
    log.fate = lambda n, batch: "kept"
    after = FaultyLog()
    after.log = log.log
    [drained] = drain(tmp_path / "left", after, CLOCK, PublisherSettings(), timeout_s=30)
    assert not drained.error
    found = fold(log.log)
    assert found.duplicates > 0
    assert set(found.of("v").values()) == {1}
    if durability == "process":
        same(found.of("v"), ones(2_000))
    assert len(found.of("v")) >= slot.entry_count
    pub.close()  # it lives on here only because it is not really killed: what it sends now is of an epoch that is over
