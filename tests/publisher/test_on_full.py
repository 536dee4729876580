"""A log that is away for long, and buffers that are full: memory and disk stay within their limits, and nothing is lost."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import pipeline.metrics as m
from pipeline.errors import BufferFull, Unavailable
from pipeline.metrics import Metric
from pipeline.publisher.client import BasePublisher
from pipeline.publisher.memory import MemoryAccount
from pipeline.publisher.spool.orphan import inspect
from pipeline.settings import ON_FULL, PublisherSettings
from tests.publisher.modes import MODES, settings_of
from tests.publisher.support import FaultyLog, Meter, fold, in_threads, publisher, same, wait_until
from tests.support import LONG

BUFFER = 2**17
SPOOL = 2**22
TURNS = 600 if LONG else 200
LONG_SPOOL = 2**23
"""Bytes of a ring that fewer than so many turns over 1,000 series would fill."""
AWAY = Unavailable("the log is down")


class Down:
    """A log that knows its partitions and accepts nothing, until it is back."""

    def __init__(self) -> None:
        self.is_down = True
        self.log = FaultyLog(lambda n, batch: AWAY if self.is_down else "kept")


def spool_bytes(folder: Path) -> int:
    return sum(slot.bytes_total for slot in inspect(folder))


@pytest.fixture
def down() -> Iterator[Down]:
    down = Down()
    yield down
    down.is_down = False


@pytest.mark.parametrize("away", ["away", "down"])
@pytest.mark.parametrize("mode", MODES)
def test_a_log_that_is_away_for_long_costs_what_its_series_cost(tmp_path: Path, mode: str, away: str, down: Down) -> None:
    """200,000 deltas over 1,000 series: memory does not grow with deltas, the spool is committed as series, all arrive."""
    down.is_down = away == "down"
    down.log.away = away == "away"
    settings, folder = settings_of(mode, tmp_path), tmp_path / "spool"
    with publisher(down.log, spool_bytes_max=LONG_SPOOL, buffer_bytes_max=2**23, **settings) as pub:
        cells = [pub.sum("v", labels=("n",)).labels(str(n)) for n in range(1_000)]
        used = []
        for turn in range(TURNS):
            for cell in cells:
                cell.add(float(turn))
            if turn % 40 == 39:
                used.append(pub.stats()["buffer_bytes"])
                assert not settings or spool_bytes(folder) <= LONG_SPOOL
                # On a loaded machine the flusher, which commits what was recorded as series, is slower than this thread.
                wait_until(lambda: not settings or spool_bytes(folder) <= LONG_SPOOL // 2)
        assert max(used) <= 2**23
        assert settings or pub.stats()["waiting"] <= 64 + 4
        down.is_down = down.log.away = False
        pub.flush(60)
        same(fold(down.log.log).of("v"), {(str(n),): sum(range(TURNS)) for n in range(1_000)})


def test_everything_comes_back_when_all_is_acknowledged() -> None:
    """The account is never negative, and returns to zero once series are evicted."""
    log = FaultyLog(lambda n, batch: ["kept", "unheard", AWAY, "kept"][n % 4])  # type: ignore[return-value]
    pub = publisher(log, flush_interval_ms=1, series_idle_ms=1)
    sums, last = pub.sum("s", labels=("a",)), pub.last("l", labels=("a",))
    seen: list[int] = []

    def work(i: int) -> None:
        for j in range(300):
            sums.labels(str(j % 50)).add_many([1] * (j % 40))
            sums.add(2 ** (j * 10), a="big")
            last.set("x" * (j * 30), a=str(j % 7))
            if j % 50 == i:
                pub.flush()
                pub.record_batch(sums, {"a": ["big", "y", "big"], "value": [2**400, 1, 2**4_000]})
                pub.record_batch(last, {"a": ["0", "1"], "value": ["l" * 5_000, "s"]})
            seen.append(pub.stats()["buffer_bytes"])

    in_threads(6, work)
    pub.flush()
    wait_until(lambda: pub.stats()["series"] == pub.stats()["buffer_bytes"] == 0)
    assert min(seen) >= 0 < max(seen)
    pub.close()
    assert fold(log.log).of("s")["big",] == 6 * sum(2 ** (j * 10) for j in range(300)) + 36 * (2**400 + 2**4_000)


# What `on_full` says


def fill(pub: BasePublisher, way: str, count: int) -> tuple[int, str]:
    """Record 1 to so many new series, until one is refused; return the reported number, and the text of the refusal."""
    view = pub.sum("v", labels=("n",))
    if way == "columns":
        try:
            return pub.record_batch(view, {"n": [str(n) for n in range(count)], "value": 1}), ""
        except BufferFull as error:
            return int(re.findall(rf"(\d+) of the batch of {count} deltas were recorded before", str(error))[0]), str(error)
    for n in range(count):
        try:
            view.add(1, n=str(n))
        except BufferFull as error:
            return n, str(error)
    return count, ""


@pytest.mark.parametrize("way", ["one by one", "columns"])
@pytest.mark.parametrize("on_full", ON_FULL)
def test_a_full_buffer(on_full: str, way: str) -> None:
    """`BufferFull`, at once or after `block_timeout_ms`, or new series are dropped and counted; known series go on.

    No delta recorded before is lost, and there is room again once the log is back.
    """
    log, meter = FaultyLog(), Meter()
    log.away = True
    with publisher(log, meter, on_full=on_full, block_timeout_ms=50, buffer_bytes_max=BUFFER) as pub:
        started = time.monotonic()
        recorded, said = fill(pub, way, 2_000)
        dropped = meter.of(m.PUBLISHER_DROPPED, "buffer_full")
        if on_full == "drop_newest" and way == "one by one":
            recorded -= int(dropped)
        assert ("buffer_bytes_max" in said) == (on_full != "drop_newest")
        assert 50 < recorded == pub.stats()["series"] < 800
        assert dropped == (2_000 - recorded if on_full == "drop_newest" else 0)
        with suppress(BufferFull):
            pub.last("l").set("x" * 65_530)  # this can never fit, so it is not waited for
        assert meter.of(m.PUBLISHER_DROPPED, "buffer_full") == dropped + (on_full == "drop_newest")
        assert meter.of(m.PUBLISHER_REFUSED) == (0 if on_full == "drop_newest" else 2)
        assert meter.of(m.PUBLISHER_BLOCKED) == (on_full == "block")
        assert time.monotonic() - started < 50
        view = pub.sum("v", labels=("n",))
        for _ in range(2_000):
            view.add(1, n="0")
        assert pub.record_batch(view, {"n": "0", "value": [1] * 50}) == 50
        assert pub.stats()["buffer_bytes"] <= BUFFER
        log.away = False
        pub.flush(60)
        wait_until(lambda: pub.record_batch(pub.sum("w"), {"value": [7]}) == 1)
    found = fold(log.log)
    assert (len(found.of("v")), found.total("v")) == (recorded, recorded + 2_050)
    assert (found.of("w"), found.of("l")) == ({(): 7}, {})


@pytest.mark.parametrize("away", [False, True])
def test_block_waits_for_room(down: Down, away: bool) -> None:
    """Far more series than fit flow through: a thread without memory wakes the flusher, and sent series are evicted."""
    meter = Meter()
    down.is_down = away
    settings = {"buffer_bytes_max": BUFFER, "block_timeout_ms": 60_000, "flush_interval_ms": 3_600_000}
    with publisher(down.log, meter, **settings) as pub:
        view = pub.sum("v", labels=("a",))

        def work(i: int) -> None:
            if i == 4:
                wait_until(lambda: meter.of(m.PUBLISHER_BLOCKED))
                assert not away or not fold(down.log.log).answers
                down.is_down = False
            elif i == 3:
                assert pub.record_batch(view, {"a": [f"{i}-{j}" for j in range(2_000)], "value": 1}) == 2_000
            else:
                for j in range(2_000):
                    view.add(1, a=f"{i}-{j}")

        in_threads(5, work)
    found = fold(down.log.log).of("v")
    assert (len(found), set(found.values())) == (8_000, {1})
    assert not meter.of(m.PUBLISHER_REFUSED)


class Flushes(Meter):
    """Counts the flushes."""

    count = 0

    def set(self, metric: Metric, value: float, *labels: object) -> None:
        self.count += metric is m.PUBLISHER_SNAPSHOT_AGE
        super().set(metric, value, *labels)


def test_whoever_is_starved_does_not_keep_the_flusher_busy() -> None:
    """Threads that run into the limit again and again wake the flusher, which does not spend all its time on them."""
    log, meter = FaultyLog(), Flushes()
    log.away = True
    pub = publisher(log, meter, on_full="drop_newest", flush_interval_ms=100, buffer_bytes_max=2_000_000)
    fill(pub, "one by one", 3_000)
    before, deadline = meter.count, time.monotonic() + 0.5
    while time.monotonic() < deadline:
        fill(pub, "one by one", 3_000)
    assert meter.count - before < 200
    log.away = False
    pub.close()


def test_who_waits_for_room_on_the_disk_holds_nothing_meanwhile() -> None:
    """A thread that writes to the spool may charge the account, in a finaliser, so nobody there waits for the spool.

    The publisher's own threads never wait for anything.
    """
    spool_lock = threading.RLock()
    account = MemoryAccount(PublisherSettings(block_timeout_ms=2_000), Meter())
    tries, charged, found = threading.Semaphore(0), threading.Event(), []

    def attempt() -> bool:
        tries.release()
        if not tries_left:
            with spool_lock:
                return True
        tries_left.pop()
        raise BufferFull("the disk is full")

    tries_left = [1]
    with spool_lock:
        waiter = threading.Thread(target=lambda: found.append(account.wait_for_disk(attempt)), daemon=True)
        waiter.start()
        assert tries.acquire(timeout=10)
        assert tries.acquire(timeout=10)  # now it tries again, and waits for the spool
        threading.Thread(target=lambda: (account.force(1), charged.set()), daemon=True).start()
        assert charged.wait(5)
    waiter.join(10)
    assert found == [True]
    account.own_threads.add(threading.get_ident())
    started, tries_left = time.monotonic(), [1] * 1_000
    for own in (lambda: account.make_room(1, 1, lambda: False), lambda: account.wait_for_disk(attempt)):
        with pytest.raises(BufferFull):
            own()
    assert time.monotonic() - started < 10


def test_a_thread_asks_again_if_others_take_the_room() -> None:
    """A thread that waits for memory calls the flusher until there is room for itself: others can be quicker."""
    account = MemoryAccount(PublisherSettings(block_timeout_ms=20_000), Meter())
    drains = []

    def flush() -> None:
        for _ in range(3):
            wait_until(lambda: account.exhausted)
            account.drained()
            drains.append(1)
            account.freed()

    flusher = threading.Thread(target=flush, daemon=True)
    flusher.start()
    assert account.make_room(1, 1, lambda: len(drains) == 3)
    flusher.join(10)
    refusing = MemoryAccount(PublisherSettings(on_full="raise"), Meter())
    with pytest.raises(BufferFull):
        refusing.make_room(1, 1, lambda: False)
    assert refusing.exhausted, "the flusher comes although no thread waits"


# With a spool


@pytest.mark.parametrize("durability", [pytest.param("memory", marks=pytest.mark.long), "process"])
def test_batches_on_disk_are_bounded_by_the_disk_alone(tmp_path: Path, down: Down, durability: str) -> None:
    """Many times more than memory holds is recorded while the log is down; at `spool_bytes_max` it waits, then raises.

    All deltas recorded before arrive.
    """
    meter, count, most = Meter(), 0, 0
    settings = {"buffer_bytes_max": BUFFER, "durability": durability, "spool_dir": str(tmp_path), "spool_bytes_max": SPOOL}
    with publisher(down.log, meter, block_timeout_ms=2_000, batch_bytes_max=4_096, **settings) as pub:
        small, large = pub.sum("small", labels=("n",)), pub.last("large", labels=("n",))
        for n in range(3_000):
            small.add(1.0, n=str(n))
            most = max(most, pub.stats()["buffer_bytes"])
        assert most <= BUFFER * 1.1  # a batch is sealed from series that were charged before
        assert meter.of(m.PUBLISHER_SPILLED) > 0
        with suppress(BufferFull):
            while count < 10_000:
                large.set("x" * 2_000, n=str(count))
                count += 1
        assert 5 * BUFFER < count * 2_000 < 10_000 * 2_000, "it was never full"
        assert spool_bytes(tmp_path) <= SPOOL
        down.is_down = False
        pub.flush(60)
    found = fold(down.log.log)
    same(found.of("small"), {(str(n),): 1 for n in range(3_000)})
    same(found.of("large"), {(str(n),): "x" * 2_000 for n in range(count)})
    assert inspect(tmp_path) == []
