"""Series are let go of, and recording is interrupted: no delta is lost or counted twice by it."""

import dis
import gc
import inspect
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest

from pipeline.errors import Invalid
from pipeline.publisher.spool.ring import Ring
from pipeline.threads import ReentrantCondition
from tests.producer.support import fold, hurried_threads, in_threads, memory_log, publisher, wait_until
from tests.support import traced


def test_silent_series_are_let_go_of_and_come_back() -> None:
    """A series that is kept comes in again when it is recorded to."""
    log = memory_log()
    with publisher(log, flush_interval_ms=1, series_idle_ms=1) as pub:
        view = pub.sum("v", labels=("a",))
        series = view.labels("x")
        for _ in range(5):
            series.add(1)
            wait_until(lambda: pub.stats()["series"] == 0)
            view.add(1, a="x")
            series.add(1)
    assert fold(log).of("v") == {("x",): 15}


def test_series_let_go_of_in_a_tight_race_are_exact() -> None:
    """Threads that add at just the pace at which series are let go of lose nothing, whether they keep handles or not."""
    log = memory_log()
    counts = [[0] * 6 for _ in range(8)]
    with publisher(log, flush_interval_ms=1, series_idle_ms=1) as pub:
        view = pub.sum("v", labels=("a",))
        shared = [view.labels(str(i)) for i in range(6)]

        def work(i: int) -> None:
            rng = random.Random(i)
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                for _ in range(rng.randrange(20)):
                    s = rng.randrange(6)
                    if rng.random() < 0.3:
                        view.add(1, a=str(s))
                    elif rng.random() < 0.3:
                        view.labels(str(s)).add(1)
                    else:
                        shared[s].add(1)
                    counts[i][s] += 1
                time.sleep(rng.random() * 0.004)

        with hurried_threads():
            in_threads(8, work)
    assert fold(log).of("v") == {(str(s),): sum(mine[s] for mine in counts) for s in range(6)}


# Interruptions


@pytest.mark.parametrize("waiting_count", [1, 3])
def test_who_wakes_others_may_be_interrupted_by_who_wakes_them(waiting_count: int) -> None:
    """At each line of it, in the same thread: all wake, and nothing is raised."""
    at = 0
    while _wake(waiting_count, at):
        at += 1
    assert at > 5


def _wake(waiting_count: int, at: int) -> bool:
    """Wake so many threads, and again in the midst of that, at one of its lines; return whether there is such a line."""
    condition, ready, woken = ReentrantCondition(threading.RLock()), threading.Semaphore(0), []

    def wait() -> None:
        with condition:
            ready.release()
            woken.append(condition.wait(30))

    threads = [threading.Thread(target=wait) for _ in range(waiting_count)]
    for thread in threads:
        thread.start()
        ready.acquire(timeout=30)
    lines = count()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code is not threading.Condition.notify.__code__:
            return None
        if event == "line" and next(lines) == at:
            condition.notify_all()
        return trace

    with condition, traced(trace):
        condition.notify_all()
    for thread in threads:
        thread.join(30)
    assert woken == [True] * waiting_count
    return next(lines) > at


@contextmanager
def interrupted(handler: Any) -> Iterator[list[int]]:
    """Send this thread signals, one after the other, as quickly as they can be taken; yields how many were taken."""
    taken = [0]

    def handle(number: int, frame: object) -> None:
        taken[0] += 1
        handler()

    main = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, handle)
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            seen = taken[0]
            signal.pthread_kill(main, signal.SIGUSR1)
            while taken[0] == seen and not stop.is_set():
                stop.wait(0.00002)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield taken
    finally:
        stop.set()
        sender.join()
        signal.signal(signal.SIGUSR1, before)


class Interrupted(Exception):
    """Raised by a signal handler, wherever the program happens to be."""


def test_a_signal_handler_that_raises_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception can come between any two instructions: what was recorded before it is counted, and counted once."""
    monkeypatch.setattr(sys, "unraisablehook", deque(maxlen=0).append)  # it can come within a finaliser, too
    log = memory_log()
    pub = publisher(log, flush_interval_ms=1, series_idle_ms=1)
    view = pub.sum("v", labels=("a",))
    cell = view.labels("0")
    low = high = 0

    def interrupt() -> None:
        if armed:
            raise Interrupted

    def record(i: int) -> None:  # a call of its own: later Pythons leave the jumps of a loop out of the `try` around it
        nonlocal armed, low, high
        armed = True
        for j in range(60):
            high += 1
            cell.add(1)
            low += 1
            if j % 20 == 0:
                high += 1
                view.add(1, a=str(i % 7))
                low += 1
        armed = False

    armed = False
    with hurried_threads(), interrupted(interrupt) as taken:
        for i in count():
            try:
                record(i)
            except Interrupted:
                armed = False
            if taken[0] > 3_000 or (taken[0] > 300 and i >= 3_000):
                break
    pub.flush()
    total = fold(log).total("v")
    assert low <= total <= high
    assert high - low <= taken[0]
    for _ in range(3):  # and nothing is stuck
        in_threads(4, lambda i: [cell.add(1) for _ in range(100)])
    pub.close()
    assert fold(log).total("v") == total + 1_200


def test_a_signal_handler_may_record_and_flush() -> None:
    """A handler that records to the series that it interrupted, or flushes, is exact and never waits for its own thread."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=2, series_idle_ms=1)
    view = pub.sum("v", labels=("a",))
    cell = view.labels("0")
    handled = 0

    def record() -> None:
        nonlocal handled
        handled += 1
        cell.add(1)
        view.add(1, a=str(handled % 5))
        if handled % 10 == 0:
            pub.flush(5)

    with hurried_threads(), interrupted(record) as taken:
        count = 0
        while taken[0] < 400:
            cell.add(1)
            view.add(1, a="1")
            count += 2
    pub.close()
    assert fold(log).total("v") == count + 2 * handled


def test_a_finaliser_may_record() -> None:
    """The garbage collector can run one anywhere, also in the flusher: no deadlock, no delta lost."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=1, series_idle_ms=1)
    view = pub.sum("v", labels=("a",))
    cell = view.labels("0")
    finalised = [0]

    class Trash:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            cell.add(1)
            view.add(1, a="1")
            with lock:
                finalised[0] += 1

    lock = threading.RLock()
    threshold = gc.get_threshold()
    gc.set_threshold(20)

    def work(i: int) -> None:
        for _ in range(1_000):
            Trash()
            cell.add(1)
            view.labels(str(i)).add(1)

    try:
        in_threads(4, work)
        gc.collect()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    pub.close()
    assert finalised[0] == 4_000
    assert fold(log).total("v") == 4 * 2_000 + 2 * 4_000


def test_a_publisher_closed_by_a_finaliser_in_its_own_thread_is_drained() -> None:
    """The collector can run a finaliser in the flusher's thread, which cannot wait for itself."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=1)
    pub.sum("v").add(5)
    closed = threading.Event()
    looked = pub._running.delivery.room

    def close_here(now_ms: int) -> Any:
        pub._running.delivery.room = looked  # type: ignore[method-assign]
        assert threading.current_thread().name == "pipeline-flusher"
        with pytest.raises(Invalid, match="own threads"):
            pub.flush()
        pub.close()
        closed.set()
        return looked(now_ms)

    pub.flush()
    pub._running.delivery.room = close_here  # type: ignore[method-assign]
    pub.sum("v").add(7)
    assert closed.wait(10)
    wait_until(lambda: pub._closed)
    wait_until(lambda: not any(thread.is_alive() for thread in pub._running.threads.values()))
    assert fold(log).of("v") == {(): 12}


@pytest.mark.parametrize(
    ("function", "start", "end"),
    [(Ring.append, "if end > segment.limit", "return True"), (Ring.adopt, "if self.segment is old", "self.segment = new")],
)
def test_what_changes_together_cannot_be_interrupted(function: Callable[..., object], start: str, end: str) -> None:
    """Signals, finalisers and other threads come in at calls, jumps back and allocations: there are none in these lines."""
    lines, first = inspect.getsourcelines(function)
    from_line = next(i for i, line in enumerate(lines) if start in line)
    to_line = next(i for i, line in enumerate(lines) if i > from_line and line.strip() == end)
    within = range(first + from_line, first + to_line + 1)
    found = {i.opname for i in dis.get_instructions(function) if i.positions and i.positions.lineno in within}
    assert "STORE_ATTR" in found
    assert not [name for name in found if name.startswith(("CALL", "PRECALL", "JUMP_BACKWARD", "BUILD", "FORMAT"))]
