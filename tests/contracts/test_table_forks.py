"""A forked child begins anew, whatever its parent's threads were doing, or goes on if they were idle."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from pipeline.core.record import series_suffix
from tests.contracts.tables import WAYS, Lab, every_table, states_of
from tests.publisher.support import hurried_threads
from tests.support import LONG


def in_child(body: Callable[[], bool]) -> None:
    """Run code in a forked child, which must end, and report success."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with suppress(BaseException):
            signal.alarm(60)
            code = 0 if body() else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@contextmanager
def busy(*works: Callable[[], object]) -> Iterator[None]:
    """Threads that do their work again and again while the context lasts, and take turns as often as they can."""
    stop = threading.Event()

    def run(work: Callable[[], object]) -> None:
        while not stop.is_set():
            work()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    with hurried_threads():
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@every_table
@pytest.mark.parametrize("held", [True, False])
def test_forked_children_begin_anew(way: str, *, held: bool) -> None:
    """A forked child starts empty however busy the parent's threads are, with hooks around the fork or without."""
    lab = Lab(way)
    view = lab.define(series_max=200)
    bound = view.labels("eu")
    drafts: list[Any] = []
    recorded = [0, 0]

    def record(number: int) -> None:
        bound.add(1)
        view.add(1, region=f"{recorded[number] % 300}")
        recorded[number] += 2

    def disturb() -> None:
        drafts.extend(lab.drain())
        lab.table.snapshot()
        lab.table.evict(1)

    def child() -> bool:
        lab.table.forget()
        bound.add(1)
        view.add(2, region="child")
        view.labels("child").add(3)
        bound.add(4)
        lab.table.snapshot()
        mine = lab.table.local(view)
        return (
            states_of(lab.drain(2)) == {("sum", ("eu",)): 5, ("sum", ("child",)): 5}
            and mine[series_suffix(["eu"])] == 5
            and lab.table.series_count == 2
            and view.add_many(["eu"], [1]) == 1
        )

    with busy(lambda: record(0), lambda: record(1), disturb):
        for _ in range(10 if LONG else 4):
            if held:
                lab.table.hold()
            try:
                in_child(child)
            finally:
                if held:
                    lab.table.release()
    drafts += lab.drain()
    assert sum(states_of(drafts).values()) == sum(recorded)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])
def test_a_child_of_which_nobody_is_told_asks(way: str) -> None:
    """In a child that no hook has told, the native table is closed and empty, and asks before the first delta."""
    lab = Lab(way)
    view = lab.define()
    bound = view.labels("eu")

    def child(begin: Callable[[], None]) -> bool:
        opened, lab.on_open = lab.opened, begin
        bound.add(2)
        view.add(3, region="eu")
        return lab.opened > opened and states_of(lab.drain()) == {("sum", ("eu",)): 5}

    def grandchild() -> bool:
        in_child(lambda: child(lab.table.forget))
        return child(lab.table.forget)

    with busy(lambda: bound.add(1), lab.drain, lab.table.snapshot):
        for _ in range(5 if LONG else 2):
            in_child(lambda: child(lambda: None))
            in_child(grandchild)


@every_table
def test_a_child_goes_on_with_what_is_whole(way: str) -> None:
    """A child keeps its parent's deltas, unless a thread, which the child does not have, may have been changing them.

    A table with a journal never goes on, as the journal's files are the parent's.
    """
    lab = Lab(way)
    bound = lab.define().labels("eu")
    bound.add(1)

    def keeps() -> bool:
        if not lab.table.keep() or lab.opened != 1:
            return lab.journal is not None
        bound.add(2)
        return lab.journal is None and states_of(lab.drain()) == {("sum", ("eu",)): 3}

    in_child(keeps)
    lab.table.hold()
    in_child(keeps)
    lab.table.release()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        lab.table.hold()
        held.set()
        done.wait(30)
        lab.table.release()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(30)
        in_child(lambda: not lab.table.keep())
    finally:
        done.set()
        thread.join()
    assert states_of(lab.drain()) == {("sum", ("eu",)): 1}
