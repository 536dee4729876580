"""Promises of flush and close, in whatever state they are called."""

import _thread
import gc
import logging
import signal
import threading
import time
import weakref

import pytest

import pipeline.metrics as m
from pipeline.core.codec import decode_batch
from pipeline.core.token import Token
from pipeline.errors import Invalid, PipelineError, Unavailable
from pipeline.metrics import Metric
from tests.publisher.support import FaultyLog, Meter, fold, in_threads, memory_log, publisher, wait_until

HOUR_MS = 3_600_000


def own_threads() -> set[threading.Thread]:
    """Return the threads of all publishers of this process."""
    return {thread for thread in threading.enumerate() if thread.name in ("pipeline-flusher", "pipeline-sender")}


def test_what_has_nothing_to_send_needs_no_log() -> None:
    """Making views, flushing nothing and closing are quick, start no thread, and return the present token."""
    log, before = FaultyLog(), own_threads()
    log.away = True
    pub = publisher(log, flush_interval_ms=HOUR_MS)
    cell = pub.sum("v", labels=("a",)).labels("x")
    assert pub.flush() == Token({})
    assert own_threads() <= before
    log.away = False
    cell.add(1)
    token = pub.flush()
    log.away, started = True, time.monotonic()
    assert {pub.flush() for _ in range(20)} == {token} != {Token({})}
    assert time.monotonic() - started < 30
    pub.close()
    with publisher(log) as unused:
        unused.sum("v")
    assert unused.close() == Token({})
    assert log.closed_count == 2


def test_a_flush_covers_what_was_recorded_before_it() -> None:
    """The token of any flush of any thread is beyond everything that the thread had recorded."""
    log = memory_log()
    with publisher(log, flush_interval_ms=1, series_idle_ms=1) as pub:
        view = pub.sum("v", labels=("a",))

        def total_before(token: Token, suffix: bytes) -> int:
            total = 0
            for partition, end in token.next_offsets.items():
                reader = log.reader("deltas")
                reader.assign({partition: 0})
                for records in reader.poll(record_count_max=10**6, bytes_max=10**9, timeout_s=0):
                    for offset, value in zip(records.offsets, records.values, strict=True):
                        for group in decode_batch(value or b"").groups if offset < end else ():
                            total += dict(zip(group.suffixes, group.states, strict=True)).get(suffix, 0)
            return total

        def work(i: int) -> None:
            cell = view.labels(str(i))
            for n in range(1, 60):
                cell.add(1)
                assert total_before(pub.flush(20), cell.suffix) == n

        in_threads(4, work)


def test_a_flush_that_times_out_loses_nothing() -> None:
    """`Unavailable` gives the reason, also for batches on their way; the deltas stay, and a later flush sends them once."""
    log = FaultyLog()
    log.gate.clear()
    pub = publisher(log, flush_interval_ms=1)
    view = pub.sum("v", labels=("a",))
    view.add(1, a="0")
    wait_until(lambda: log.attempts)
    with pytest.raises(Unavailable, match=r"not acknowledged within 0.05 s: 1 batches and 1 buffered series wait"):
        pub.flush(0.05)
    log.gate.set()
    assert pub.flush().next_offsets
    log.away = True
    view.add(1, a="1")
    with pytest.raises(Unavailable, match=r"0 batches and . buffered series wait; the log is away"):
        pub.flush(0.03)
    log.away, log.fate = False, lambda n, batch: Unavailable("overloaded")
    with pytest.raises(Unavailable, match="the last error: overloaded"):
        pub.flush(0.2)
    log.fate = lambda n, batch: "kept"
    pub.flush()
    pub.close()
    views = fold(log.log)
    assert (views.total("v"), views.duplicates) == (2, 0)


@pytest.mark.parametrize("thread_count", [1, 8])
@pytest.mark.parametrize(("fate", "error"), [("kept", None), ("away", Unavailable), ("rejected", Invalid)])
def test_close(fate: str, error: type[PipelineError] | None, thread_count: int) -> None:
    """Threads end in time, the writer is closed once, a loss is counted and logged once; then every delta is refused."""
    log, meter, before = FaultyLog(), Meter(), own_threads()
    log.fate = lambda n, batch: Invalid("too large") if fate == "rejected" else "kept"
    log.away = fate == "away"
    pub = publisher(log, meter, flush_interval_ms=HOUR_MS, close_timeout_ms=100 if log.away else 10_000)
    view = pub.sum("v", labels=("a",))
    cell = view.labels("x")
    cell.add(1)
    view.add(1, a="y")
    tokens: list[Token] = []
    errors: list[PipelineError] = []

    def close(_: int) -> None:
        try:
            tokens.append(pub.close())
        except PipelineError as failed:
            errors.append(failed)

    started = time.monotonic()
    in_threads(thread_count, close)
    assert time.monotonic() - started < 40
    assert [type(failed) for failed in errors] == ([error] if error else [])
    assert len({*tokens, pub.close()}) == 1
    assert bool(pub.close().next_offsets) == (fate == "kept")
    wait_until(lambda: own_threads() <= before)
    assert log.closed_count == 1
    assert meter.of(m.PUBLISHER_DROPPED, "closed") == (2 if log.away else 0)
    assert fold(log.log).total("v") == (2 if fate == "kept" else 0)
    for _ in range(20):
        for refused in (lambda: cell.add(1), lambda: view.add(1, a="x"), lambda: pub.sum("w"), pub.flush):
            with pytest.raises(Invalid, match="closed"):
                refused()


@pytest.mark.parametrize("ended_by", ["close", "signal"])
def test_a_flush_that_ends_early_leaves_no_trace(ended_by: str) -> None:
    """A flush ends when the publisher is closed; after Ctrl-C the publisher goes on as if there had been no flush."""
    log = FaultyLog(lambda n, batch: Unavailable("away"))
    pub = publisher(log, flush_interval_ms=HOUR_MS, retry_backoff_ms=500, retry_backoff_max_ms=500)
    pub.sum("v").add(1)
    main, ended, interrupts, failed = threading.get_ident(), threading.Event(), [], []

    def interrupt(*_: object) -> None:
        if not interrupts:
            interrupts.append(1)
            raise KeyboardInterrupt

    def end_it() -> None:
        wait_until(lambda: log.attempts)  # which there are none of before the flush
        if ended_by == "close":
            try:
                pub.close(0.05)
            except Unavailable as error:
                failed.append(error)
            return
        while not ended.wait(0.05):  # again: one that comes just before the wait is only seen after it
            signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=end_it)
    thread.start()
    with pytest.raises(Unavailable if ended_by == "close" else KeyboardInterrupt, match=r"closed|^$"):
        pub.flush(60)
    ended.set()
    thread.join(10)
    signal.signal(signal.SIGUSR1, before)
    assert len(failed) == (ended_by == "close")
    log.fate = lambda n, batch: "kept"
    pub.close()
    assert fold(log.log).of("v") == ({(): 1} if ended_by == "signal" else {})


def test_leaving_the_block_closes(caplog: pytest.LogCaptureFixture) -> None:
    """The end of a `with` block closes the publisher, and an error of the block is not hidden by one of closing."""
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


@pytest.mark.parametrize("broken", ["first", "all", "sender"])
def test_a_publisher_that_cannot_start_threads_says_so(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The recording call raises `Unavailable`, and has recorded nothing; or a later call starts the threads."""
    log, start = memory_log(), threading.Thread.start

    def fail(thread: object = None, *_: object) -> None:
        if broken != "sender" or (isinstance(thread, threading.Thread) and thread.name == "pipeline-sender"):
            raise RuntimeError("can't start new thread")
        assert isinstance(thread, threading.Thread)
        start(thread)

    pub = publisher(log)
    view = pub.sum("v", labels=("a",))
    monkeypatch.setattr(*((_thread, "start_new_thread") if broken == "first" else (threading.Thread, "start")), fail)
    if broken == "first":
        with pytest.raises(Unavailable, match="can't start new thread"):
            view.add(1, a="x")
    else:
        view.add(1, a="x")
        wait_until(lambda: "threads can't be started" in caplog.text)
    monkeypatch.undo()
    view.add(1, a="y")
    pub.flush()
    pub.close()
    assert fold(log).total("v") == (1 if broken == "first" else 2)


def test_a_publisher_rests_and_goes_on() -> None:
    """A publisher at rest runs no thread, and the next flush starts them again. It does not rest while somebody waits."""
    log, before = FaultyLog(), own_threads()
    with publisher(log, flush_interval_ms=HOUR_MS) as pub:
        cell = pub.sum("v").labels()
        for _ in range(3):
            cell.add(1)
            pub.flush()
            assert pub._runtime.rest()
            assert own_threads() <= before
        log.fate = lambda n, batch: Unavailable("away")
        cell.add(1)
        waiting = threading.Thread(target=pub.flush)
        waiting.start()
        wait_until(lambda: len(log.attempts) > 4)  # which there would not be without the flush
        assert not pub._runtime.rest()
        log.fate = lambda n, batch: "kept"
        waiting.join(10)
        assert fold(log.log).of("v") == {(): 4}


def test_a_log_handler_may_record() -> None:
    """A handler may count the lines that the publisher logs: no thread waits for a lock that it holds itself."""
    log = FaultyLog(lambda n, batch: Invalid("too large") if n < 30 else "kept")
    pub = publisher(log, flush_interval_ms=1)
    errors = pub.sum("errors", labels=("logger",))
    handled = [0]

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            handled[0] += 1
            errors.add(1, logger=record.name)

    handler, root = Counting(), logging.getLogger("pipeline")
    root.addHandler(handler)
    try:
        cell = pub.sum("v").labels()
        in_threads(4, lambda i: [cell.add(1) for _ in range(2_000)])
        wait_until(lambda: len(log.attempts) > 30)
        with pytest.raises(Invalid, match="rejected"):
            pub.flush()
        pub.flush()
    finally:
        root.removeHandler(handler)
    assert handled[0] > 0
    pub.close()


class Broken(Meter):
    """Metrics that fail while they are told to."""

    fails, failed_count = False, 0

    def set(self, metric: Metric, value: float, *labels: object) -> None:
        if self.fails:
            self.failed_count += 1
            raise RuntimeError("a bug")
        super().set(metric, value, *labels)


def test_a_flusher_that_fails_complains_seldom(caplog: pytest.LogCaptureFixture) -> None:
    """An error that stays is logged once in a while, not with every attempt."""
    log, meter = memory_log(), Broken()
    with publisher(log, meter, flush_interval_ms=1) as pub:
        pub.sum("v").add(1)
        pub.flush()
        meter.fails = True
        pub.sum("v").add(1)
        wait_until(lambda: meter.failed_count > 20)
        meter.fails = False
    assert caplog.text.count("a flush failed") == 1
    assert fold(log).of("v") == {(): 2}


def test_a_publisher_nobody_used_or_holds_is_freed() -> None:
    """A publisher without unsent deltas is freed once the user drops it."""
    pub = publisher(memory_log())
    pub.sum("v").labels()
    ref = weakref.ref(pub)
    del pub
    gc.collect()
    assert ref() is None


def test_a_batch_that_is_full_is_sent_early() -> None:
    """New series that fill a batch do not wait for the interval."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=3_600_000, batch_bytes_max=10_000)
    view = pub.sum("v", labels=("a",))
    for i in range(1_000):
        view.labels(f"label value {i}").add(1)
    wait_until(lambda: pub.stats()["entries"] >= 500)
    pub.close()
    assert fold(log).total("v") == 1_000
