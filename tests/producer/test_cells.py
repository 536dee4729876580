"""Cells are let go of, held, dropped and interrupted: no delta is lost or counted twice by any of it."""

import dis
import gc
import inspect
import random
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest

import pipeline.producer.cell as cell_module
from pipeline.errors import Invalid, Unavailable
from pipeline.producer.buffer import View
from pipeline.producer.cell import Cell, SumCell
from pipeline.producer.client import BasePublisher
from pipeline.producer.views import SumView
from tests.producer.support import FaultyLog, fold, hurried_threads, in_threads, memory_log, publisher, wait_until


@pytest.fixture
def small_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that are full after a few deltas, so that threads merge all the time."""
    monkeypatch.setattr(cell_module, "CELL_LIMIT_MAX", 8)


def let_go(pub: BasePublisher, *cells: Cell) -> None:
    """Wait until the flusher has let go of these cells."""
    wait_until(lambda: not any(cell.charge for cell in cells))


def append_late(cell: SumCell, value: float) -> None:
    """What a thread does that looked at the limit before the cell was let go of, and was held up until now."""
    cell._values.append(value)


def test_silent_cells_are_let_go_of_and_come_back() -> None:
    """A handle that is kept registers its series again; its labels find it, or another cell of the same series."""
    log = memory_log()
    with publisher(log, flush_interval_ms=1, series_idle_ms=1) as pub:
        view = pub.sum("v", labels=("a",))
        cell = view.labels("x")
        for _ in range(5):
            cell.add(1)
            let_go(pub, cell)
            assert len(view) == 0
            view.add(1, a="x")  # another cell of the same series
            cell.add(1)
    assert fold(log).of("v") == {("x",): 15}


def test_a_delta_that_comes_late_is_found_by_the_next_flush() -> None:
    """A cell that was let go of, but is held, is looked into."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=1, series_idle_ms=1)
    cell = pub.sum("v").labels()
    cell.add(1)
    let_go(pub, cell)
    append_late(cell, 2)
    pub.flush()
    assert fold(log).of("v") == {(): 3}
    append_late(cell, 4)
    cell.add(8)  # registers again, and takes the late one with it
    let_go(pub, cell)
    append_late(cell, 16)
    wait_until(lambda: fold(log).of("v") == {(): 31}, 5)  # also without a flush, in a second or so
    pub.close()
    assert fold(log).of("v") == {(): 31}


def test_a_delta_that_comes_late_while_the_log_is_away_waits() -> None:
    """A flush that can send nothing merges it all the same; the next one finds it."""
    log = FaultyLog()
    pub = publisher(log, flush_interval_ms=1, series_idle_ms=1)
    cell = pub.sum("v").labels()
    cell.add(1)
    let_go(pub, cell)
    log.away = True
    append_late(cell, 2)
    with pytest.raises(Unavailable):
        pub.flush(0.05)
    assert not cell._values
    log.away = False
    pub.flush()
    assert fold(log.log).of("v") == {(): 3}
    pub.close()


def test_a_delta_that_comes_late_outlives_its_handle() -> None:
    """A cell that was let go of, and that nobody holds any more, leaves what it has to the view."""
    log = FaultyLog()
    pub = publisher(log, flush_interval_ms=1, series_idle_ms=1)
    view = pub.sum("v", labels=("a",))
    cells = [view.labels(str(i)) for i in range(10)]
    for cell in cells:
        cell.add(1)
    let_go(pub, *cells)
    log.away = True
    for cell in cells[:5]:
        append_late(cell, 2)
    looked = threading.Event()
    threading.Timer(1.3, looked.set).start()
    looked.wait()  # the flusher has looked into them, and could send nothing
    for cell in cells[5:]:
        append_late(cell, 2)
    refs = [weakref.ref(cell) for cell in cells]
    del cell, cells
    gc.collect()
    assert all(ref() is None for ref in refs)
    log.away = False
    pub.flush()
    assert fold(log.log).of("v") == {(str(i),): 3 for i in range(10)}
    pub.close()


def test_cells_let_go_of_in_a_tight_race_are_exact() -> None:
    """Threads that add at just the pace at which cells are let go of lose nothing, whether they keep handles or not."""
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


def test_lists_grow_with_heat_and_shrink_under_pressure() -> None:
    """A hot series gets a longer list, which is charged; when memory is short it gives it back, sent or not."""
    log = FaultyLog()
    pub = publisher(log, flush_interval_ms=3_600_000, buffer_bytes_max=100_000)
    view = pub.sum("v", labels=("a",))
    hot = view.labels("hot")
    for _ in range(1_000):
        hot.add(1)
    assert hot._limit == 512
    used = pub._running.account.used_bytes
    assert used == hot.charge > 512 * hot.delta_bytes
    for i in range(40):
        view.labels(str(i)).add(1)
    assert pub._running.account.pressed
    log.away = True
    with pytest.raises(Unavailable):
        pub.flush(0.05)
    assert hot._limit == 8
    assert hot.charge < 2_000
    log.away = False
    for i in range(40, 60):
        view.labels(str(i)).add(1)
    pub.flush()
    assert pub._running.account.used_bytes == hot.charge == hot._limit == 0
    for _ in range(1_000):
        hot.add(1)
    pub.close()
    assert fold(log.log).of("v")["hot",] == 2_000


def test_numbers_that_are_not_constant_take_the_slow_path_until_one_is() -> None:
    """The fast path keeps what it is given, so it is closed to objects that could change."""

    class Changing:
        def __float__(self) -> float:
            return 1.0

    with publisher(memory_log(), flush_interval_ms=100_000) as pub:
        cell = pub.sum("v").labels()
        for _ in range(20):
            cell.add(Changing())  # type: ignore[arg-type]
            assert cell._limit == 0
            assert all(type(value) is float for value in cell._values)
        cell.add(1)
        assert cell._limit == 8
        used = pub._running.account.used_bytes
        assert used == cell.charge


# Interruptions


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


@pytest.mark.usefixtures("small_lists")
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


@pytest.mark.usefixtures("small_lists")
def test_a_signal_handler_may_record_and_flush() -> None:
    """A handler that records to the cell that it interrupted, or flushes, is exact and never waits for its own thread."""
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


@pytest.mark.usefixtures("small_lists")
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


def test_two_cells_of_one_series_merge_into_one_entry() -> None:
    """Handles that were made before the first delta are cells of their own; a batch has each series once."""
    log = memory_log()
    with publisher(log, flush_interval_ms=100_000) as pub:
        view = pub.sum("v", labels=("a",))
        cells = [view.labels("x") for _ in range(3)]
        assert len(set(map(id, cells))) == 3
        for cell in cells:
            cell.add(1)
        assert isinstance(view, SumView)
        assert len(view) == 3
        pub.flush()
        assert pub.stats()["entries"] == 1
    assert fold(log).of("v") == {("x",): 3}


@pytest.mark.parametrize(
    ("function", "start", "end"),
    [
        (Cell.merge_values, "if self.merges == merges", "return"),
        (Cell.take, "if self.merges == merges", "return"),
        (Cell.take_single, "if self.merges == merges", "return True"),
        (Cell.merge_state, "if self.merges == merges", "return"),
        (Cell.record_run, "was = self.extra", "self.extra = held"),
        (Cell.room, "if self._limit == was", "self._limit = limit"),
        (Cell._record_long, "was = self.extra", "self.extra = held"),
        (View.register, "if not cell.charge", "cell._limit = CELL_LIMIT_FIRST"),
    ],
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
