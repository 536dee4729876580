"""Memory is bounded: by series, not by deltas, and the account says how much."""

import gc
import threading
import time
import tracemalloc

import pytest

import pipeline.metrics as m
from pipeline.errors import BufferFull, Invalid
from pipeline.publisher.account import Account
from pipeline.publisher.client import BasePublisher
from pipeline.settings import PublisherSettings
from tests.producer.support import FaultyLog, Meter, fold, in_threads, memory_log, publisher, wait_until


class Traced:
    """Bytes that were allocated in the `with` block and are still held; `peak`: at most held in it."""

    def __enter__(self) -> "Traced":
        gc.collect()
        tracemalloc.start()
        return self

    def __exit__(self, *exc: object) -> None:
        gc.collect()
        self.held, self.peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()


@pytest.mark.parametrize("on_full", ["block", "drop_newest"])
def test_an_outage_is_survived_in_bounded_memory(on_full: str) -> None:
    """1,000 series and millions of deltas while the log is away: no more memory than the account says; nothing is lost."""
    log, meter = FaultyLog(), Meter()
    log.away = True
    pub = publisher(log, meter, buffer_bytes_max=3_000_000, on_full=on_full, flush_interval_ms=20)
    view = pub.sum("v", labels=("a",))
    cells = [view.labels(str(i)) for i in range(1_000)]
    for cell in cells:
        cell.add(0.5)
    with Traced() as traced:
        stop = time.monotonic() + 1
        rounds = 0
        while time.monotonic() < stop:
            for cell in cells:
                cell.add(0.5 + rounds)
                cell.add(0.25)
                cell.add(0.25)
            rounds += 1
    assert rounds > 10
    assert traced.peak < 3_000_000
    assert pub.stats()["waiting"] <= 64 + 4
    log.away = False
    pub.flush(20)
    expected = 0.5 + sum(1.0 + i for i in range(rounds))
    assert fold(log.log).of("v") == {(str(i),): expected for i in range(1_000)}
    assert not meter.of(m.PUBLISHER_DROPPED, "buffer_full")
    pub.close()


def test_the_log_going_away_in_the_middle_piles_up_no_batches() -> None:
    """What is sealed when the log goes away is sent again; from then on deltas pile up as merged series, few as batches."""
    log = FaultyLog()
    pub = publisher(log, flush_interval_ms=1, retry_backoff_ms=1)
    view = pub.sum("v", labels=("a",))
    log.fate = lambda n, batch: unavailable()
    deadline = time.monotonic() + 1.5
    count = 0
    while time.monotonic() < deadline:
        for i in range(50):
            view.add(1, a=str(i))
            count += 1
        time.sleep(0.001)
    assert 0 < pub.stats()["waiting"] <= 4 * 16
    log.fate = lambda n, batch: "kept"
    pub.close()
    assert fold(log.log).total("v") == count
    assert pub._running.account.used_bytes == 0


def unavailable() -> Exception:
    from pipeline.errors import Unavailable

    return Unavailable("away")


def test_everything_comes_back_when_all_is_acknowledged() -> None:
    """The account is never negative, and returns to zero once cells are let go of, whatever was recorded."""
    log = FaultyLog(lambda n, batch: ["kept", "unheard", unavailable(), "kept"][n % 4])  # type: ignore[list-item, return-value]
    pub = publisher(log, flush_interval_ms=1, series_idle_ms=1)
    sums, last = pub.sum("s", labels=("a",)), pub.last("l", labels=("a",))
    lowest = [0]
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            lowest[0] = min(lowest[0], pub.stats()["buffer_bytes"])

    watcher = threading.Thread(target=watch)
    watcher.start()

    def work(i: int) -> None:
        for j in range(300):
            for _ in range(j % 40):
                sums.add(1, a=str(j % 50))
            sums.add(2 ** (j * 10), a="big")
            last.set("x" * (j * 30), a=str(j % 7))
            if j % 50 == i:
                pub.flush()

    in_threads(6, work)
    pub.flush()
    wait_until(lambda: pub.stats()["series"] == 0)
    assert pub.stats()["buffer_bytes"] == 0
    stop.set()
    watcher.join()
    assert lowest[0] == 0
    pub.close()
    assert pub.stats()["buffer_bytes"] == 0


# At the limit

SMALL = {"buffer_bytes_max": 65_536}


def storm(pub: BasePublisher, count: int) -> int:
    """Unique series, one delta each; how many calls returned."""
    view = pub.sum("v", labels=("a",))
    done = 0
    for i in range(count):
        view.add(1, a=str(i))
        done += 1
    return done


def test_raise_refuses_what_does_not_fit() -> None:
    """`BufferFull` at once, naming the setting; what was taken before is sent, and there is room again."""
    log = FaultyLog()
    log.away = True
    pub = publisher(log, on_full="raise", **SMALL)
    view = pub.sum("v", labels=("a",))
    taken = 0
    refused = None
    while refused is None:
        try:
            view.add(1, a=str(taken))
            taken += 1
        except BufferFull as error:
            refused = error
    assert "buffer_bytes_max" in str(refused)
    assert 20 < taken < 400
    view.add(1, a="0")  # a series that is there takes more all the same
    for _ in range(2_000):
        view.add(1, a="1")
    assert pub.stats()["buffer_bytes"] <= 65_536
    log.away = False
    pub.flush()
    view.add(1, a="new")
    pub.close()
    assert fold(log.log).total("v") == taken + 1 + 2_000 + 1


def test_drop_newest_drops_and_counts() -> None:
    """The call returns, the delta is gone, and the metric says how many are."""
    log, meter = FaultyLog(), Meter()
    log.away = True
    pub = publisher(log, meter, on_full="drop_newest", **SMALL)
    assert storm(pub, 1_000) == 1_000
    dropped = meter.of(m.PUBLISHER_DROPPED, "buffer_full")
    assert 600 < dropped < 1_000
    pub.last("l").set("x" * 60_000, 1)
    assert meter.of(m.PUBLISHER_DROPPED, "buffer_full") == dropped + 1
    log.away = False
    pub.close()
    views = fold(log.log)
    assert views.total("v") == 1_000 - dropped
    assert views.of("l") == {}


def test_block_waits_for_room() -> None:
    """Callers wait until bytes come back, and go on; nothing is lost."""
    log, meter = FaultyLog(), Meter()
    log.away = True
    pub = publisher(log, meter, block_timeout_ms=20_000, **SMALL)
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(storm(pub, 3_000)))
    thread.start()
    wait_until(lambda: meter.of(m.PUBLISHER_BLOCKED))
    assert not done
    log.away = False
    thread.join(30)
    assert done == [3_000]
    pub.close()
    assert fold(log.log).total("v") == 3_000


def test_block_gives_up_after_its_timeout() -> None:
    """`BufferFull` when no room came in time; the publisher is as usable as before."""
    log, meter = FaultyLog(), Meter()
    log.away = True
    pub = publisher(log, meter, block_timeout_ms=50, **SMALL)
    started = time.monotonic()
    with pytest.raises(BufferFull):
        storm(pub, 1_000)
    assert time.monotonic() - started < 5
    assert meter.of(m.PUBLISHER_BLOCKED) == 1
    with pytest.raises(BufferFull):  # this can never fit, so it is not waited for
        pub.last("l").set("x" * 65_530)
    log.away = False
    pub.flush()
    assert storm(pub, 20) == 20
    pub.close()


def test_a_storm_of_unique_series_flows_through_a_small_account() -> None:
    """Whoever runs out of memory wakes the flusher; what it has sent is let go of; so any number of series passes."""
    log, meter = FaultyLog(), Meter()
    pub = publisher(log, meter, buffer_bytes_max=200_000, flush_interval_ms=3_600_000)
    view = pub.sum("v", labels=("a",))
    started = time.monotonic()
    in_threads(4, lambda i: [view.add(1, a=f"{i}-{j}") for j in range(2_000)])
    assert time.monotonic() - started < 20
    assert meter.of(m.PUBLISHER_BLOCKED) > 0
    pub.close()
    assert fold(log.log).total("v") == 8_000
    assert pub._running.account.used_bytes == 0


def test_whoever_is_starved_does_not_keep_the_flusher_busy() -> None:
    """Threads that run into the limit again and again wake the flusher, which does not spend all its time on them."""
    log = FaultyLog()
    log.away = True
    pub = publisher(log, on_full="drop_newest", flush_interval_ms=100, buffer_bytes_max=2_000_000)
    storm(pub, 3_000)
    drained = [0]
    drain = pub._running.flusher.drain

    def counted(now_s: float, *, parked: bool, seal: bool) -> bool:
        drained[0] += 1
        return drain(now_s, parked=parked, seal=seal)

    pub._running.flusher.drain = counted  # type: ignore[method-assign]
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        storm(pub, 3_000)
    assert drained[0] < 200
    log.away = False
    pub.close()


def refuse(why: str) -> None:
    raise BufferFull(why)


def test_the_publishers_own_threads_never_wait_for_room() -> None:
    """A log handler that records in the flusher's thread gets `BufferFull`, not a deadlock."""
    lock = threading.RLock()
    account = Account(PublisherSettings(buffer_bytes_max=65_536), Meter(), lock, threading.Condition(lock))
    account.own_threads.add(threading.get_ident())
    started = time.monotonic()
    with pytest.raises(BufferFull):
        account.make_room(1, 1, lambda: False)
    with pytest.raises(BufferFull):
        account.insist(lambda: refuse("the disk is full"))
    assert time.monotonic() - started < 1


def test_a_closed_publisher_refuses_to_record() -> None:
    """`Invalid` from handles and views alike, so that nothing is recorded that nobody will send."""
    log = memory_log()
    pub = publisher(log)
    view = pub.sum("v", labels=("a",))
    cell = view.labels("x")
    cell.add(1)
    pub.close()
    for _ in range(20):
        with pytest.raises(Invalid, match="closed"):
            cell.add(1)
        with pytest.raises(Invalid, match="closed"):
            view.add(1, a="x")
    with pytest.raises(Invalid, match="closed"):
        pub.sum("w")
    with pytest.raises(Invalid, match="closed"):
        pub.flush()
    assert pub._running.account.used_bytes == 0
    assert fold(log).total("v") == 1


def test_who_waits_for_the_disk_holds_nothing_meanwhile() -> None:
    """A thread that writes to the spool can come to the account, in a finaliser: then nobody there waits for the spool."""
    lock, spool_lock = threading.RLock(), threading.RLock()
    account = Account(PublisherSettings(block_timeout_ms=2_000), Meter(), lock, threading.Condition(lock))
    tried, charged = threading.Event(), threading.Event()

    def attempt() -> bool:
        first = not tried.is_set()
        tried.set()
        if first:
            raise BufferFull("the disk is full")
        with spool_lock:
            return True

    found: list[object] = []
    with spool_lock:
        waiter = threading.Thread(target=lambda: found.append(account.insist(attempt)), daemon=True)
        waiter.start()
        assert tried.wait(10)
        time.sleep(0.1)  # now it tries again, and waits for the spool

        def charge() -> None:
            account.force(1)
            charged.set()

        threading.Thread(target=charge, daemon=True).start()
        assert charged.wait(5)
    waiter.join(10)
    assert found == [True]
