"""Both tables stay exact while threads, signal handlers and finalisers record."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from pipeline.publisher.table import SERIES_BYTES
from tests.contracts.tables import Lab, every_table, states_of
from tests.contracts.test_table_forks import busy
from tests.publisher.support import hurried_threads, in_threads, wait_until
from tests.support import LONG

THREADS = 4
EACH = 4_000 if LONG else 1_500


def together(*bodies: Callable[[], object]) -> None:
    """Run each in a thread; raise the error of one of them."""
    in_threads(len(bodies), lambda i: bodies[i]())


@every_table
def test_nothing_is_lost_and_nothing_twice(way: str) -> None:
    """All deltas come out once, of threads that record in each way, while others drain, evict, take snapshots and look."""
    lab = Lab(way)
    view, mean = lab.define(series_max=30), lab.define("mean")
    hot = view.labels("hot")
    drafts: list[Any] = []

    def record(number: int) -> None:
        for i in range(EACH):
            hot.add(1)
            view.add(1, region=str(i % 50))
            mean.observe(number, region="one")
            if not i % 100:
                view.add_many(["many"], [1] * 10)
                view.labels(f"{number}-{i}").add(1)

    def drain() -> None:
        busy = None if lab.journal else bytes([number := len(drafts) % 2, 1 - number, 0])
        drafts.extend(lab.drain(3, busy, 2_000))

    def disturb() -> None:
        lab.table.evict(0)
        lab.table.snapshot()
        assert len(lab.table.local(view)) >= 0
        assert lab.table.used_bytes >= 0
        assert lab.table.waiting_count >= 0
        lab.table.hold()
        lab.table.release()

    with busy(drain, disturb):
        in_threads(THREADS, record)
    drafts += lab.drain(3)
    states = states_of(drafts)
    hundreds = EACH // 100
    recorded = THREADS * (2 * EACH + 11 * hundreds)
    assert sum(state for key, state in states.items() if key[0] == "sum") == recorded
    assert states["mean", ("one",)] == (EACH * sum(range(THREADS)), EACH * THREADS)
    assert sum(draft.delta_count for draft in drafts) == recorded + EACH * THREADS
    lab.table.snapshot()
    assert sum(lab.table.local(view)[suffix] for suffix in lab.table.local(view)) == recorded
    assert lab.table.evict(0) >= 0
    assert lab.table.used_bytes == 0


@every_table
def test_threads_that_meet_the_limit(way: str) -> None:
    """Far more series than fit go through, `bytes_max` holds but for one series a thread, and nothing is lost."""
    lab = Lab(way, bytes_max=60_000)
    view = lab.define()
    drafts: list[Any] = []
    used: list[int] = []

    def drain() -> bool:
        used.append(lab.table.used_bytes)
        drafts.extend(lab.drain())
        lab.table.evict(0)
        return True

    lab.on_full = drain
    with hurried_threads():
        together(
            *(lambda n=n: [view.add(1, region=f"{n}-{i}") for i in range(500)] for n in range(3)),
            lambda: [view.record_columns([[str(i) for i in range(100)]], [1] * 100) for _ in range(5)],
        )
    drafts += lab.drain()
    assert sum(states_of(drafts).values()) == 2_000
    assert 50_000 < max(used) <= 60_000 + THREADS * (SERIES_BYTES + 50)


@every_table
def test_close_among_threads(way: str) -> None:
    """Deltas recorded without an exception are drained; refused ones are not."""
    lab = Lab(way)
    view = lab.define()
    bound = view.labels("eu")
    done: list[int] = []

    def record() -> None:
        count = 0
        with suppress(RuntimeError):
            while True:
                bound.add(1)
                count += 1
        done.append(count)

    def refuse() -> None:
        raise RuntimeError("closed")

    def close() -> None:
        wait_until(lambda: lab.table.waiting_count >= 1_000)
        lab.on_open = refuse
        lab.table.close()

    with hurried_threads():
        together(record, record, close)
    assert states_of(lab.drain()) == {("sum", ("eu",)): sum(done)}


@contextmanager
def interrupted(handler: Callable[[], object]) -> Iterator[None]:
    """Run a signal handler as often as the system lets it, also within itself, but not for ever."""
    depth = 0

    def handle(*_: object) -> None:
        nonlocal depth
        if depth < 3:
            depth += 1
            try:
                handler()
            finally:
                depth -= 1

    callbacks, gc.callbacks[:] = gc.callbacks[:], []  # hypothesis has one, in which what a handler raises is lost
    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.callbacks[:] = callbacks


@every_table
def test_signal_handlers_record(way: str) -> None:
    """A handler that records while its thread records, drains and evicts never waits, and no delta is lost."""
    lab = Lab(way)
    view = lab.define()
    bound = view.labels("eu")
    drafts: list[Any] = []
    handled = 0

    def handle() -> None:
        nonlocal handled
        handled += 3
        bound.add(1)
        view.add(1, region="eu")
        view.add(1, region=f"new-{handled}")
        drafts.extend(lab.drain())
        lab.table.evict(0)

    recorded = 0
    with interrupted(handle):
        deadline = time.monotonic() + 60
        while (handled < 600 or recorded < 20_000) and time.monotonic() < deadline:
            for _ in range(100):
                bound.add(1)
                view.add(1, region="eu")
                recorded += 2
            drafts.extend(lab.drain())
            lab.table.snapshot()
            lab.table.hold()
            lab.table.release()
    assert handled >= 600
    drafts += lab.drain()
    assert sum(states_of(drafts).values()) == recorded + handled


class Stop(Exception):
    pass


@every_table
@pytest.mark.parametrize("where", ["recording", "merging"])
def test_signal_handlers_raise(request: pytest.FixtureRequest, way: str, where: str) -> None:
    """A handler's exception loses at most the delta that was being recorded, and nothing during a merge."""
    lab = Lab(way)
    bound = lab.define().labels("eu")
    armed = False
    raised = recorded = 0

    def handle() -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Stop

    def work() -> None:
        nonlocal armed, recorded
        armed = True
        while armed:
            if where == "recording":
                bound.add(1.5)
                recorded += 1
            else:
                assert lab.table.waiting_count >= 0

    gc.disable()  # what is raised in a callback of a weak reference can't leave it
    request.addfinalizer(gc.enable)
    with interrupted(handle):
        deadline = time.monotonic() + 60
        while raised < 300 and time.monotonic() < deadline:
            for _ in range(400 if where == "merging" else 0):  # so few that nobody merges them yet
                bound.add(1.5)
                recorded += 1
            try:
                work()
            except Stop:
                raised += 1
    assert raised >= 300
    drafts = lab.drain()
    count = sum(draft.delta_count for draft in drafts)
    assert states_of(drafts) == {("sum", ("eu",)): 1.5 * count}
    assert recorded <= count <= recorded + (2 * raised if where == "recording" else 0)


@every_table
def test_finalisers_record(way: str) -> None:
    """Objects may record when they are collected, which can be in the midst of anything."""
    lab = Lab(way)
    view = lab.define()
    bound = view.labels("eu")
    count = 0

    class Late:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            nonlocal count
            count += 2
            bound.add(1)
            view.add(1, region=f"late-{count}")

    before = gc.get_threshold()
    gc.set_threshold(5, 2, 2)
    drafts: list[Any] = []
    try:
        for i in range(2_000):
            Late()
            bound.add(1)
            view.add(1, region=str(i % 7))
            if not i % 50:
                drafts += lab.drain()
    finally:
        gc.set_threshold(*before)
    gc.collect()
    drafts += lab.drain()
    assert count == 4_000
    assert sum(states_of(drafts).values()) == 4_000 + count


@every_table
def test_while_a_table_is_held_nobody_else_drains(way: str) -> None:
    """Only the holding thread drains; others go on recording to known series until there is a `release` for each `hold`.

    With a journal the plain table lets them wait.
    """
    lab = Lab(way)
    view = lab.define()
    view.add(1, region="us")
    drained: list[Any] = []
    other = threading.Thread(target=lambda: drained.extend(lab.drain()))
    lab.table.hold()
    lab.table.hold()
    view.add(1, region="eu")
    if way == "plain-journal":
        view.add(1, region="us")
    else:
        together(lambda: view.add(1, region="us"))
    assert states_of(lab.drain()) == {("sum", ("us",)): 2, ("sum", ("eu",)): 1}
    view.add(1, region="late")
    other.start()
    other.join(0.05)
    assert other.is_alive()
    assert not drained
    lab.table.release()
    lab.table.release()
    other.join()
    assert states_of(drained) == {("sum", ("late",)): 1}


@every_table
def test_a_table_is_collected_with_its_publisher(way: str) -> None:
    """A table in a cycle through its callbacks is collected."""

    class Owner:
        def __init__(self) -> None:
            self.lab = Lab(way)
            self.lab.on_open = self.opening
            self.series = self.lab.define().labels("eu")

        def opening(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            gone.append(1)

    alive: list[int] = []
    gone: list[int] = []
    owner = Owner()
    owner.series.add(1)
    del owner
    gc.collect()
    assert (alive, gone) == ([1], [1])
