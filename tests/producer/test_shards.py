"""Sharded buffering: exact, bounded by shards and not by threads, and helped along by whoever has time."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import pipeline.metrics as m
import pipeline.producer.shards as shards_module
from pipeline.errors import Invalid, Unavailable
from pipeline.producer.client import BasePublisher
from pipeline.producer.shards import TABLE_SIZE, ShardedBuffering, ShardedSumCell
from tests.producer.support import (
    FaultyLog,
    FileLog,
    Meter,
    fold,
    hurried_threads,
    in_threads,
    memory_log,
    publisher,
    run_script,
    stalled,
    wait_until,
)
from tests.producer.test_cells import Interrupted, interrupted


def sharded(log: Any, metrics: Meter | None = None, **settings: Any) -> BasePublisher:
    """A publisher whose deltas wait in shards, which are small."""
    return publisher(log, metrics, **{"buffering": "sharded", "shard_deltas_max": 16, "flush_interval_ms": 2, **settings})


def shards_of(pub: BasePublisher) -> ShardedBuffering:
    """The shards of a publisher."""
    buffering = pub._running.buffering
    assert isinstance(buffering, ShardedBuffering)
    return buffering


@pytest.mark.parametrize("drain_threads", [1, 3])
def test_totals_are_exact(drain_threads: int) -> None:
    """Many threads, many series, all kinds, shards that are full all the time, with helpers and without: nothing is lost."""
    log = memory_log()
    pub = sharded(log, drain_threads=drain_threads, snapshot_interval_ms=1, series_idle_ms=1)
    adds = pub.sum("adds", labels=("a",))
    counter = pub.sum("counter", monotone=True)
    low, high, mean = pub.min("low"), pub.max("high"), pub.mean("mean")
    newest = pub.last("newest")

    def work(i: int) -> None:
        rng = random.Random(i)
        for j in range(600):
            adds.add(j, a=str(rng.randrange(30)))
            counter.labels().add(0.5)
            low.observe(i * 1_000 + j)
            high.observe(i * 1_000 + j)
            mean.observe(j)
            newest.set(f"{i} {j}", ts_ms=j)
            if j % 200 == 100 and i < 2:
                pub.flush()

    with hurried_threads():
        in_threads(8, work)
    assert {f"pipeline-drainer-{i}" for i in range(1, drain_threads)} <= {t.name for t in threading.enumerate()}
    pub.close()
    views = fold(log)
    assert views.total("adds") == 8 * sum(range(600))
    expected = {"counter": 2_400.0, "low": 0, "high": 7_599, "mean": 299.5, "newest": "7 599"}
    assert {name: views.of(name)[()] for name in expected} == expected


def test_what_comes_while_a_shard_is_drained_is_for_the_next_time() -> None:
    """Only the prefix that was counted is cut off: not what another thread appends meanwhile."""

    class Late(ShardedSumCell):
        """Another thread's delta comes in when the drainer looks up where the first one goes."""

        __slots__ = ()

        def __hash__(self) -> int:
            if draining and late:
                shards._shards[0].items.append((self, late.pop()))
            return id(self)

    log = memory_log()
    pub = sharded(log, flush_interval_ms=3_600_000, snapshot_interval_ms=3_600_000)
    shards = shards_of(pub)
    view = pub.sum("v")
    view.cell_type = Late
    draining, late = False, [10, 20, 30]
    cell = view.labels()
    cell.add(0)
    pub.flush()
    shards._shards[0].items.extend([(cell, 1), (cell, 2)])
    draining = True
    assert shards._drain_shard(shards._shards[0]) == 2
    draining = False
    assert shards.waiting_count() == 3
    pub.close()
    assert fold(log).of("v") == {(): 63}


def test_what_is_no_number_is_refused() -> None:
    """A shard takes only what its cell would take."""
    log = memory_log()
    with sharded(log, flush_interval_ms=100_000) as pub:
        plain, counter, high = pub.sum("v").labels(), pub.sum("c", monotone=True).labels(), pub.max("h").labels()
        for _ in range(3):
            plain.add(2**70)
            counter.add(1)
            high.observe(1)
            for wrong in ("1", None, float("nan"), float("inf"), [1]):
                for record in (plain.add, counter.add, high.observe):
                    with pytest.raises(Invalid):
                        record(wrong)  # type: ignore[arg-type]
            with pytest.raises(Invalid):
                counter.add(-1)
    views = fold(log)
    assert {name: views.of(name)[()] for name in ("v", "c", "h")} == {"v": 3 * 2**70, "c": 3, "h": 1}


def test_threads_are_spread_over_all_shards() -> None:
    """Identities are addresses in steps of large powers of two, or close to them: that must not bring them together."""
    with sharded(memory_log(), shards_max=64) as pub:
        shards = shards_of(pub)
        for shard_count in (4, 16, 64):
            shards.shard_count = shard_count
            shards._lay_out()
            assert min(Counter(map(id, shards.table)).values()) >= TABLE_SIZE // shard_count - 2
            for step in (4_096, 0x24000, 0x81000, 0x800000, 0x801000, 0x1000000, 0x1001000, 0x1004000):
                load = Counter(id(shards.table[(0x7F12_345F_F700 - i * step) % TABLE_SIZE]) for i in range(256))
                assert len(load) >= 0.9 * shard_count
                assert max(load.values()) <= 4 * max(1, 256 // shard_count)
        assert len(shards._shards) == 64


def test_shards_double_under_contention_and_halve_in_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number goes up to `shards_max` while threads find theirs full, down to one when they do not, and is charged."""
    monkeypatch.setattr(shards_module, "_SHRINK_AFTER", 3)
    meter = Meter()
    with sharded(memory_log(), meter, shards_max=16, flush_interval_ms=1, series_idle_ms=100_000) as pub:
        shards, account = shards_of(pub), pub._running.account
        cell = pub.sum("v").labels()
        cell.add(1)
        assert account.used_bytes == cell.charge + 4 * 16 * 120
        seen = 0

        def push() -> bool:
            nonlocal seen
            for _ in range(200):
                cell.add(1)
            seen = max(seen, shards.shard_count)
            return seen == 16

        wait_until(push)
        assert meter.of(m.PUBLISHER_CONTENDED) <= shards.gauges.contended_count
        assert shards.gauges.contended_count > 0
        wait_until(lambda: shards.shard_count == 1)
        wait_until(lambda: account.used_bytes == cell.charge + 16 * 120)
        wait_until(lambda: meter.of(m.PUBLISHER_SHARDS) == 1)


def test_memory_is_bounded_by_shards_not_by_threads() -> None:
    """Thousands of threads that come and go leave nothing behind: neither in the account nor in any list."""
    log = memory_log()
    with sharded(log, shards_max=8, series_idle_ms=100_000) as pub:
        cell = pub.sum("v").labels()
        cell.add(1)
        account, shards = pub._running.account, shards_of(pub)
        for _ in range(40):
            threads = [threading.Thread(target=cell.add, args=(1,)) for _ in range(50)]
            for thread in threads:
                thread.start()
            assert account.used_bytes <= cell.charge + 8 * 16 * 120 + 2_000  # and batches on their way
            for thread in threads:
                thread.join()
        assert len(shards._shards) <= 8
        assert shards.waiting_count() <= 8 * 16 + 50
        assert cell.charge < 1_000
    assert fold(log).of("v") == {(): 2_001}


def test_full_shards_go_on_in_the_cells() -> None:
    """When nobody drains, a thread waits for a moment and then merges in the cell: memory stays bounded, nothing is lost."""
    log = FaultyLog()
    pub = sharded(log, flush_interval_ms=1)
    cell = pub.sum("v").labels()
    cell.add(1)
    with stalled(pub) as held:
        cell.add(1)
        assert held.wait(10)
        for _ in range(500):
            cell.add(1)
        shards = shards_of(pub)
        assert shards.waiting_count() <= 16 + 1
        assert shards.gauges.utilisation <= 1
        assert len(cell._values) + cell.pending_count >= 480
    pub.close()
    assert fold(log.log).of("v") == {(): 502}


def test_an_idle_drainer_helps_the_fullest_shard() -> None:
    """One of several drainers has its own shards; when these are empty it empties the fullest of all."""
    log = memory_log()
    with sharded(log, flush_interval_ms=100_000, snapshot_interval_ms=100_000) as pub:
        shards = shards_of(pub)
        cell = pub.sum("v").labels()
        cell.add(0)
        pub.flush()
        shards.drain_threads = 2
        for i, size in enumerate((3, 6, 12, 16)):
            shards._shards[i].items.extend([(cell, 1)] * size)
        assert shards.help_out(1) == 6 + 16  # its own: the second and the fourth
        assert shards.help_out(1) == 12  # the fullest
        assert shards.help_out(1) == 0
        assert cell.pending == 34
        assert shards.waiting_count() == 3
    assert fold(log).of("v") == {(): 37}


def test_drainers_help_without_being_flushed() -> None:
    """A flusher that is held up elsewhere does not keep the shards full where there are further drainers."""
    log = FaultyLog()
    pub = sharded(log, flush_interval_ms=1, drain_threads=3)
    cell = pub.sum("v").labels()
    cell.add(1)
    with stalled(pub) as held:
        cell.add(1)
        assert held.wait(10)
        before = cell.pending_count
        for _ in range(12):
            cell.add(1)
        wait_until(lambda: cell.pending_count > before and shards_of(pub).waiting_count() == 0)
    pub.close()
    assert fold(log.log).of("v") == {(): 14}


def test_what_is_stuck_in_a_shard_is_delivered_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lack of memory in the midst of a drain keeps what was taken out of the shard, once."""
    log = memory_log()
    pub = sharded(log, flush_interval_ms=1, drain_threads=2)
    view = pub.sum("v", labels=("a",))
    kind, rng, failures = view.kind, random.Random(1), [0]

    class Failing(type(kind)):  # type: ignore[misc]
        def collect(self, deltas: Any) -> Any:
            if threading.current_thread().name.startswith("pipeline-") and rng.random() < 0.5:
                failures[0] += 1
                raise MemoryError
            return super().collect(deltas)

    monkeypatch.setattr(view, "kind", Failing())
    for i in range(2_000):
        view.add(1, a=str(i % 5))
    wait_until(lambda: failures[0] > 10)
    monkeypatch.setattr(view, "kind", kind)
    pub.close()
    assert fold(log).of("v") == {(str(i),): 400 for i in range(5)}


def test_the_newest_value_wins_across_threads() -> None:
    """A last view has no shards, and its own order: by timestamp."""
    log = memory_log()
    with sharded(log) as pub:
        view = pub.last("v", labels=("a",))
        with hurried_threads():
            in_threads(6, lambda i: [view.set(ts, ts_ms=ts, a="x") for ts in range(i, 600, 6)])
    assert fold(log).of("v") == {("x",): 599}


def test_no_delta_is_taken_in_silence_after_close() -> None:
    """Each add of threads that race with `close` is sent, or refused with `Invalid`."""
    for _ in range(5):
        log = memory_log()
        pub = sharded(log)
        cell = pub.sum("v").labels()
        taken = [0] * 4
        started = threading.Barrier(5)

        def work(i: int, cell: Any = cell, taken: list[int] = taken, started: threading.Barrier = started) -> None:
            started.wait(10)
            try:
                while True:
                    cell.add(1)
                    taken[i] += 1
            except Invalid:
                pass

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        started.wait(10)
        wait_until(lambda taken=taken: min(taken) > 20)
        pub.close()
        for thread in threads:
            thread.join(10)
        assert fold(log).of("v") == {(): sum(taken)}
        assert pub._running.account.used_bytes == 0


def test_what_is_left_at_close_is_counted() -> None:
    """Deltas that a close without a log leaves behind are counted as dropped, wherever they wait."""
    log, meter = FaultyLog(), Meter()
    log.away = True
    pub = sharded(log, meter, flush_interval_ms=100_000)
    cell = pub.sum("v").labels()
    for _ in range(10):
        cell.add(1)
    with pytest.raises(Unavailable):
        pub.close(0.05)
    assert meter.of(m.PUBLISHER_DROPPED, "closed") == 10


def test_a_signal_handler_that_raises_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception can come anywhere in `add`, also while it waits: all before it counts once, and no lock stays taken."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    log = memory_log()
    pub = sharded(log, shard_deltas_max=8, shards_max=1, flush_interval_ms=1, series_idle_ms=1)
    cell = pub.sum("v").labels()
    low = high = 0
    armed = False

    def interrupt() -> None:
        if armed:
            raise Interrupted

    with hurried_threads(), interrupted(interrupt) as taken:
        while taken[0] < 1_500:
            try:
                armed = True
                for _ in range(60):
                    high += 1
                    cell.add(1)
                    low += 1
                armed = False
            except Interrupted:
                armed = False
    pub.flush()
    total = fold(log).total("v")
    assert low <= total <= high
    in_threads(4, lambda i: [cell.add(1) for _ in range(100)])
    pub.close()
    assert fold(log).total("v") == total + 400


def test_a_signal_handler_may_record_and_flush() -> None:
    """Also when it comes in while its thread waits for a full shard: `flush` never waits for that thread."""
    log = memory_log()
    pub = sharded(log, shard_deltas_max=8, shards_max=1)
    cell = pub.sum("v").labels()
    handled = 0
    busy = False

    def record() -> None:
        nonlocal handled, busy
        if busy:  # signals come more quickly than a full shard is emptied: handlers would pile up
            return
        busy = True
        handled += 1
        cell.add(1)
        if handled % 10 == 0:
            pub.flush(5)
        busy = False

    count = 0
    with hurried_threads(), interrupted(record):
        while handled < 300:
            cell.add(1)
            count += 1
    pub.close()
    assert fold(log).total("v") == count + handled


@contextmanager
def handled(handler: Any) -> Iterator[None]:
    """A handler of SIGUSR1 for the block."""
    before = signal.signal(signal.SIGUSR1, lambda *_: handler())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_flush_from_a_thread_that_waits_for_room_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that flushes while its thread is in the midst of waiting for a shard gets its token."""
    log = memory_log()
    pub = sharded(log, flush_interval_ms=1)
    cell = pub.sum("v").labels()
    cell.add(1)
    shards = shards_of(pub)
    flushed = []

    def until() -> bool:
        signal.raise_signal(signal.SIGUSR1)
        return True

    with handled(lambda: flushed.append(pub.flush(5))):
        assert pub._running.account.pause(until, 1)
    assert flushed
    assert shards.waiting_count() == 0
    pub.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_clean(tmp_path: Any) -> None:
    """What waits in shards at a fork is the parent's to send; the child has shards of its own."""
    path = tmp_path / "log"
    done = run_script(
        path,
        """
pub = publisher(log, buffering="sharded", shard_deltas_max=16, drain_threads=2)
view = pub.sum("v", labels=("who",))
parent, child = view.labels("parent"), view.labels("child")
child.add(100)
stop = threading.Event()
counts = [0]
def work():
    while not stop.is_set():
        parent.add(1)
        counts[0] += 1
thread = threading.Thread(target=work)
thread.start()
for i in range(5):
    parent.add(0)
    pid = os.fork()
    if pid == 0:
        for _ in range(50):
            child.add(1)
        pub.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
stop.set()
thread.join()
pub.close()
print(counts[0])
""",
    )
    views = fold(FileLog(path).read())
    assert views.of("v") == {("child",): 350, ("parent",): int(done.stdout)}
    assert not views.duplicates
