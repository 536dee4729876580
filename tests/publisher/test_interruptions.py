"""No delta is lost or counted twice when recording is interrupted. Laws of the table alone: see tests/contracts."""

from __future__ import annotations

import dis
import inspect
import threading
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from pipeline.errors import Invalid
from pipeline.publisher.spool.ring import Ring
from pipeline.threads import ReentrantCondition
from tests.contracts.test_table_threads import interrupted
from tests.publisher.support import fold, hurried_threads, in_threads, memory_log, publisher, wait_until
from tests.support import traced


@pytest.mark.parametrize("waiting_count", [1, 3])
def test_who_wakes_others_may_be_interrupted_by_who_wakes_them(waiting_count: int) -> None:
    """All threads wake, and nothing is raised, at whichever line of the waking the same thread wakes them again."""
    at = 0
    while _wake(waiting_count, at):
        at += 1
    assert at > 5


def _wake(waiting_count: int, at: int) -> bool:
    """Wake so many threads, and again at one line of that; return whether there is such a line."""
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


class Interrupted(Exception):
    """Raised by a signal handler, at any point of the program."""


def test_what_a_handler_raises_leaves_a_wait() -> None:
    """An exception of a handler leaves the wait, at each of its lines, and the lock is free for others afterwards."""
    at = 0
    while _interrupt_wait(at):
        at += 1
    assert at > 10


def _interrupt_wait(at: int) -> bool:
    """Raise at one line of a wait; return whether there is such a line."""
    condition, lines = ReentrantCondition(threading.RLock()), count()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code is not threading.Condition.wait.__code__:
            return None
        if event == "line" and next(lines) == at:
            raise Interrupted
        return trace

    raised = False
    try:
        with condition, traced(trace):
            condition.wait(0.001)
    except Interrupted:
        raised = True
    free = []
    taker = threading.Thread(target=lambda: free.append(condition.acquire(timeout=10)))
    taker.start()
    taker.join()
    assert free == [True]
    return raised


@pytest.mark.parametrize("raises", [False, True])
def test_a_signal_handler_may_record_and_flush_or_raise(raises: bool) -> None:
    """Totals are exact, the handler never waits for its own thread, and deltas recorded before it raises count once."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=2, series_idle_ms=1)
    view = pub.sum("v", labels=("a",))
    cell = view.labels("0")
    handled = low = maybe = 0
    armed = False

    def handle() -> None:
        nonlocal handled, armed
        handled += 1
        cell.add(1)
        view.add(1, a=str(handled % 5))
        if raises and armed:
            armed = False
            raise Interrupted
        if not raises and handled % 10 == 0:
            pub.flush(5)

    def record() -> None:
        nonlocal low, armed
        armed = True
        for _ in range(60):
            cell.add(1)
            low += 1
            view.add(1, a="1")
            low += 1
        armed = False

    with hurried_threads(), interrupted(handle):
        while handled < 400:
            try:
                record()
            except Interrupted:
                maybe += 1
    assert (maybe > 0) == raises
    in_threads(4, lambda i: [cell.add(1) for _ in range(100)])
    pub.close()
    assert low <= fold(log).total("v") - 2 * handled - 400 <= low + maybe


def test_a_publisher_closed_by_a_finaliser_in_its_own_thread_is_drained() -> None:
    """The collector can run a finaliser in the flusher's thread, which cannot wait for itself."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=1)
    pub.sum("v").add(5)
    pub.flush()
    closed, closers = threading.Event(), []
    asked = log.partition_count

    def close_here(topic: str) -> int:
        if threading.current_thread().name == "pipeline-flusher" and not closers:
            closers.append(threading.current_thread())
            with pytest.raises(Invalid, match="own threads"):
                pub.flush()
            pub.close()
            closed.set()
        return asked(topic)

    log.partition_count = close_here  # type: ignore[method-assign]
    pub.sum("v").add(7)
    assert closed.wait(10)
    wait_until(lambda: not closers[0].is_alive())
    with pytest.raises(Invalid, match="closed"):
        pub.sum("v").add(1)
    assert fold(log).of("v") == {(): 12}


@pytest.mark.parametrize(
    ("function", "start", "end"),
    [(Ring.append, "if end > segment.limit", "return True"), (Ring.adopt, "if self.segment is old", "self.segment = new")],
)
def test_what_changes_together_cannot_be_interrupted(function: Callable[..., object], start: str, end: str) -> None:
    """Signals, finalisers and other threads come in at calls, jumps back and allocations, of which these lines have none."""
    lines, first = inspect.getsourcelines(function)
    from_line = next(i for i, line in enumerate(lines) if start in line)
    to_line = next(i for i, line in enumerate(lines) if i > from_line and line.strip() == end)
    within = range(first + from_line, first + to_line + 1)
    found = {i.opname for i in dis.get_instructions(function) if i.positions and i.positions.lineno in within}
    assert "STORE_ATTR" in found
    assert not [name for name in found if name.startswith(("CALL", "PRECALL", "JUMP_BACKWARD", "BUILD", "FORMAT"))]
