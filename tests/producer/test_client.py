"""Flushing and closing: what they promise, in whatever state they are called."""

import _thread
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial

import pytest

import pipeline.metrics as m
from pipeline.core.codec import decode_batch
from pipeline.core.token import Token
from pipeline.errors import Invalid, Unavailable
from pipeline.publisher.client import BasePublisher
from pipeline.publisher.views import SumSeries, SumView
from tests.producer.support import FaultyLog, Meter, batches, fold, in_threads, memory_log, publisher, wait_until


def threads_of(pub: BasePublisher) -> list[threading.Thread]:
    return [*pub._running.threads.values()]


def test_an_unused_publisher_starts_no_thread() -> None:
    """Making views, flushing nothing and closing are quick and need no log."""
    log = FaultyLog()
    log.away = True
    pub = publisher(log)
    cell = pub.sum("v", labels=("a",)).labels("x")
    started = time.monotonic()
    assert pub.flush() == pub.close() == pub.close() == Token({})
    assert time.monotonic() - started < 1
    assert not threads_of(pub)
    assert log.closed_count == 1
    with pytest.raises(Invalid, match="closed"):
        cell.add(1)
    assert not threads_of(pub)


def test_a_flush_of_nothing_is_quick_and_needs_no_log() -> None:
    """Once all is acknowledged the token stands, whether the log is there or not."""
    log = FaultyLog()
    pub = publisher(log, flush_interval_ms=3_600_000)
    pub.sum("v").add(1)
    token = pub.flush()
    assert str(token)
    log.away = True
    started = time.monotonic()
    for _ in range(20):
        assert pub.flush() == token
    assert time.monotonic() - started < 2
    pub.close()


def test_a_flush_covers_what_was_recorded_before_it() -> None:
    """Every flush of every thread, at any time: its token is beyond all that the thread had recorded."""
    log = memory_log()
    with publisher(log, flush_interval_ms=1, series_idle_ms=1) as pub:
        view = pub.sum("v", labels=("a",))

        def work(i: int) -> None:
            cell = view.labels(str(i))
            for n in range(1, 60):
                cell.add(1)
                token = pub.flush(20)
                total = 0
                for batch_partition, end in token.next_offsets.items():
                    reader = log.reader("deltas")
                    reader.assign({batch_partition: 0})
                    for records in reader.poll(record_count_max=10**6, bytes_max=10**9, timeout_s=0):
                        for offset, value in zip(records.offsets, records.values, strict=True):
                            if offset < end:
                                for group in decode_batch(value or b"").groups:
                                    found = dict(zip(group.suffixes, group.states, strict=True))
                                    total += found.get(cell.suffix, 0)
                assert total == n

        in_threads(4, work)


def test_a_flush_waits_for_what_is_on_its_way() -> None:
    """Deltas that another flush has sealed, but nobody has acknowledged, count as recorded before."""
    log = FaultyLog()
    pub = publisher(log, flush_interval_ms=1)
    log.gate.clear()
    pub.sum("v").add(1)
    wait_until(lambda: log.attempts)
    with pytest.raises(Unavailable, match=r"not acknowledged within 0.05 s: 1 batches and 1 buffered series wait"):
        pub.flush(0.05)
    log.gate.set()
    assert pub.flush().next_offsets
    pub.close()


def test_a_flush_that_times_out_loses_nothing() -> None:
    """`Unavailable` says why; the deltas stay, and a later flush sends them once."""
    log = FaultyLog()
    log.away = True
    pub = publisher(log)
    view = pub.sum("v", labels=("a",))
    for i in range(5):
        view.add(1, a=str(i))
        with pytest.raises(
            Unavailable, match=r"not acknowledged within 0.03 s: 0 batches and . buffered series wait; the log is away"
        ):
            pub.flush(0.03)
    log.away = False
    log.fate = lambda n, batch: Unavailable("overloaded")
    with pytest.raises(Unavailable, match="the last error: overloaded"):
        pub.flush(0.2)
    log.fate = lambda n, batch: "kept"
    pub.flush()
    pub.close()
    views = fold(log.log)
    assert views.total("v") == 5
    assert views.duplicates == 0
    assert not pub._running.flushes


def test_close_drains_and_lets_go() -> None:
    """Threads end, the writer is closed once, closing again returns the same token."""
    log = FaultyLog()
    pub = publisher(log, flush_interval_ms=3_600_000)
    view = pub.sum("v", labels=("a",))
    for i in range(100):
        view.add(1, a=str(i))
    token = pub.close()
    assert token.next_offsets
    assert not [thread for thread in threads_of(pub) if thread.is_alive()]
    assert pub.close() == token
    assert log.closed_count == 1
    assert fold(log.log).total("v") == 100


def test_close_without_a_log_gives_up_in_time_and_says_what_is_lost() -> None:
    """`Unavailable` after the timeout, threads and writer let go of all the same, the loss counted."""
    log, meter = FaultyLog(), Meter()
    log.away = True
    pub = publisher(log, meter)
    pub.sum("v").add(1)
    pub.sum("w").add(1)
    started = time.monotonic()
    with pytest.raises(Unavailable, match="the log is away"):
        pub.close(0.1)
    assert time.monotonic() - started < 4
    assert not [thread for thread in threads_of(pub) if thread.is_alive()]
    assert log.closed_count == 1
    assert meter.of(m.PUBLISHER_DROPPED, "closed") == 2
    pub.close()


def test_close_says_once_that_batches_were_rejected() -> None:
    """`Invalid`, after letting go."""
    log = FaultyLog(lambda n, batch: Invalid("too large"))
    pub = publisher(log)
    pub.sum("v").add(1)
    with pytest.raises(Invalid, match="rejected"):
        pub.close()
    assert log.closed_count == 1
    pub.close()


def test_close_from_many_threads_at_once() -> None:
    """One does it, the others wait for it; all get the token."""
    log = FaultyLog()
    pub = publisher(log, flush_interval_ms=3_600_000)
    pub.sum("v").add(3)
    tokens: list[Token] = []
    in_threads(8, lambda i: tokens.append(pub.close()))
    assert len(tokens) == 8
    assert len(set(tokens)) == 1
    assert tokens[0].next_offsets
    assert log.closed_count == 1
    assert fold(log.log).of("v") == {(): 3}


def record_until_closed(pub: BasePublisher, view: SumView, cells: list[SumSeries], done: list[int], i: int) -> None:
    if i == 4:
        time.sleep(0.003)
        pub.close()
    try:
        while i < 4:
            cells[done[i] % 3].add(1)
            done[i] += 1
            view.add(1, a="y")
            done[i] += 1
    except Invalid:
        pass


def test_recording_while_closing_is_counted_or_refused() -> None:
    """A call returns, and its delta is sent, or it raises `Invalid`; one caught in the very moment is counted as lost."""
    for _ in range(30):
        log, meter = FaultyLog(), Meter()
        pub = publisher(log, meter, flush_interval_ms=1)
        view = pub.sum("v", labels=("a",))
        cells = [view.labels(str(i)) for i in range(3)]
        done = [0] * 5

        in_threads(5, partial(record_until_closed, pub, view, cells, done))
        assert fold(log.log).total("v") + meter.of(m.PUBLISHER_DROPPED, "closed") == sum(done)


def test_a_flush_in_another_thread_ends_with_close() -> None:
    """It does not wait for what nobody will send any more."""
    log = FaultyLog()
    log.away = True
    pub = publisher(log)
    pub.sum("v").add(1)
    errors: list[BaseException] = []

    def flush() -> None:
        try:
            pub.flush(60)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=flush)
    thread.start()
    wait_until(lambda: pub._running.flushes)
    with pytest.raises(Unavailable):
        pub.close(0.05)
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(errors[0], Unavailable)
    assert "closed" in str(errors[0])


def test_leaving_the_block_closes(caplog: pytest.LogCaptureFixture) -> None:
    """Also when an error leaves it, which is not hidden by what closing has to say."""
    log = FaultyLog()

    def fail(**settings: int) -> None:
        with publisher(log, **settings) as pub:
            pub.sum("v").add(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert fold(log.log).of("v") == {(): 1}
    log.away = True
    with pytest.raises(ZeroDivisionError):
        fail(close_timeout_ms=50)
    assert "closing after another error" in caplog.text
    with pytest.raises(Unavailable), publisher(log, close_timeout_ms=50) as pub:
        pub.sum("v").add(1)


def test_an_interrupted_flush_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the midst of the wait: the publisher goes on as if that flush had not been."""
    log = FaultyLog()
    log.away = True
    pub = publisher(log)
    pub.sum("v").add(1)
    wait_for, main = pub._running.changed.wait_for, threading.current_thread()

    def interrupted(predicate: Callable[[], object], timeout: float | None = None) -> bool:
        if threading.current_thread() is main:
            raise KeyboardInterrupt
        return bool(wait_for(predicate, timeout))

    monkeypatch.setattr(pub._running.changed, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pub.flush()
    monkeypatch.undo()
    assert not pub._running.flushes
    log.away = False
    pub.close()
    assert fold(log.log).of("v") == {(): 1}


def test_a_publisher_that_cannot_start_threads_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`Unavailable` from the call that records, which then has recorded nothing; or they are started by a later call."""
    log = FaultyLog()
    pub = publisher(log)
    start = threading.Thread.start

    def fail(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    def fail_sender(thread: threading.Thread) -> None:
        if thread.name == "pipeline-sender":
            fail()
        start(thread)

    monkeypatch.setattr(_thread, "start_new_thread", fail)
    with pytest.raises(Unavailable, match="can't start new thread"):
        pub.sum("v").add(1)
    assert not threads_of(pub)
    monkeypatch.undo()
    for broken in (fail, fail_sender):
        monkeypatch.setattr(threading.Thread, "start", broken)
        pub._running._started = False
        pub.sum("v").add(2)
        wait_until(lambda: not pub._running._started)
        monkeypatch.undo()
    assert "threads can't be started" in caplog.text
    pub.flush()
    assert len(threads_of(pub)) == 2
    pub.close()
    assert fold(log.log).of("v") == {(): 4}


def test_a_publisher_that_rests_goes_on() -> None:
    """No thread of it runs then, nor is any taken for one of its own; the next flush has them run again."""
    log = memory_log()
    pub = publisher(log)
    cell = pub.sum("v").labels()
    for number in range(3):
        cell.add(10**number)
        pub.flush()
        assert not pub._running.rests()
        began = threads_of(pub)
        assert pub._running.rest()
        assert len(began) == 2
        assert not any(thread.is_alive() for thread in began)
        assert not pub._running.account.own_threads
        assert pub._running.rests()
    pub.close()
    assert fold(log).of("v") == {(): 111}


def test_a_publisher_does_not_rest_while_somebody_waits() -> None:
    """The flush goes on, and the threads with it."""
    log = FaultyLog()
    log.fate = lambda n, batch: Unavailable("away") if not away.is_set() else "kept"
    away = threading.Event()
    with publisher(log) as pub:
        pub.sum("v").add(1)
        waiting = threading.Thread(target=pub.flush)
        waiting.start()
        wait_until(lambda: pub._running.flushes and pub._running.threads)
        assert not pub._running.rest()
        away.set()
        waiting.join(10)
        assert not waiting.is_alive()
        assert fold(log.log).of("v") == {(): 1}


def test_a_log_handler_may_record(caplog: pytest.LogCaptureFixture) -> None:
    """What the publisher logs can be counted with it: no thread waits for a lock that it holds."""
    log = FaultyLog()
    log.fate = lambda n, batch: Invalid("too large") if n < 30 else "kept"
    pub = publisher(log, flush_interval_ms=1)
    errors = pub.sum("errors", labels=("logger",))
    handled = [0]

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            handled[0] += 1
            errors.add(1, logger=record.name)

    handler = Counting()
    root = logging.getLogger("pipeline")
    root.addHandler(handler)
    try:
        cell = pub.sum("v").labels()

        def work(i: int) -> None:
            for _ in range(2_000):
                cell.add(1)

        in_threads(4, work)
        wait_until(lambda: len(log.attempts) > 30)
        with pytest.raises(Invalid, match="rejected"):
            pub.flush()
        pub.flush()
    finally:
        root.removeHandler(handler)
    assert handled[0] > 0
    pub.close()


def test_a_flusher_that_fails_complains_seldom(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that stays is logged once in a while, not with every attempt."""
    log = FaultyLog()
    pub = publisher(log, flush_interval_ms=1)
    pub.sum("v").add(1)
    pub.flush()
    calls = [0]

    def fail(now_ms: int) -> object:
        calls[0] += 1
        raise RuntimeError("a bug")

    room = pub._running.delivery.room
    monkeypatch.setattr(pub._running.delivery, "room", fail)
    pub.sum("v").add(1)
    wait_until(lambda: calls[0] > 20)
    monkeypatch.setattr(pub._running.delivery, "room", room)
    pub.close()
    assert caplog.text.count("a flush failed") == 1
    assert fold(log.log).of("v") == {(): 2}


def test_metrics_and_stats_say_what_happened() -> None:
    """Deltas drained, batches and entries acknowledged, bytes and series that are buffered."""
    log, meter = FaultyLog(), Meter()
    pub = publisher(log, meter, flush_interval_ms=1, series_idle_ms=1)
    view = pub.sum("v", labels=("a",))
    for i in range(100):
        view.add(1, a=str(i % 10))
    pub.flush()
    assert meter.of(m.PUBLISHER_DELTAS) == pub.stats()["deltas"] == 100
    assert meter.of(m.PUBLISHER_BATCHES) == pub.stats()["batches"] == len(batches(log.log))
    assert pub.stats()["entries"] >= 10
    wait_until(lambda: meter.of(m.PUBLISHER_SERIES) == 0)
    wait_until(lambda: meter.of(m.PUBLISHER_BYTES) == 0)
    assert pub.stats() | {"batches": 0, "entries": 0} == {
        "deltas": 100,
        "batches": 0,
        "entries": 0,
        "rejected": 0,
        "waiting": 0,
        "series": 0,
        "buffer_bytes": 0,
    }
    pub.close()


def test_a_publisher_nobody_used_or_holds_is_freed() -> None:
    """Nothing but the user keeps it alive until it has something to send."""
    pub = publisher(memory_log())
    pub.sum("v").labels()
    ref = weakref.ref(pub)
    del pub
    gc.collect()
    assert ref() is None
