"""Threads' own handles: nothing is checked, locked or lost when they record, and nothing stays when the threads are gone."""

from __future__ import annotations

import gc
import logging
import os
import random
import threading
import time
from fractions import Fraction
from typing import Any

import pytest

import pipeline.metrics as m
import pipeline.producer.handle as handle_module
from pipeline.errors import BufferFull, Invalid, Unavailable
from pipeline.producer.client import BasePublisher
from pipeline.producer.handle import THREAD_BYTES, ThreadObserveCell, ThreadSumCell
from pipeline.settings import PublisherSettings
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
    wait_until,
)


def lists_of(pub: BasePublisher) -> Any:
    """The lists of all handles of a publisher."""
    return pub._running.buffering._lists  # type: ignore[attr-defined]


def test_ints_are_exact_and_floats_are_floats() -> None:
    """What a thread's own handle takes is what its cell would have taken, number by number."""
    log = memory_log()
    with publisher(log) as pub:
        big = pub.sum("big").labels().for_this_thread()
        mixed = pub.sum("mixed").labels().for_this_thread()
        low = pub.min("low").labels().for_this_thread()
        mean = pub.mean("mean").labels().for_this_thread()
        assert isinstance(big, ThreadSumCell)
        assert isinstance(low, ThreadObserveCell)
        for i in range(100):
            big.add(2**70 + i)
            mixed.add(0.5)
            mixed.add(True)
            mixed.add(Fraction(1, 4))  # type: ignore[arg-type]
            low.observe(-i)
            mean.observe(i)
    views = fold(log)
    assert views.of("big") == {(): 100 * 2**70 + 4_950}
    assert views.of("mixed") == {(): 175.0}
    assert views.of("low") == {(): -99}
    assert views.of("mean") == {(): 49.5}


class Angry:
    """An object that answers with an error when it is asked for its number."""

    def __index__(self) -> int:
        raise RuntimeError("not today")

    __float__ = __index__


@pytest.mark.parametrize(
    "wrong",
    ["7", None, float("nan"), float("inf"), [1], 1 << 9_000, Angry(), object(), b"1"],
    ids=["text", "None", "NaN", "infinity", "list", "long int", "angry", "object", "bytes"],
)
def test_what_is_no_number_is_said_once_and_nothing_else_is_lost(wrong: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is counted, logged with its view, and raised by the next flush; the deltas beside it are sent all the same."""
    log, meter = memory_log(), Meter()
    pub = publisher(log, meter)
    handle = pub.sum("paid").labels().for_this_thread()
    with caplog.at_level(logging.ERROR):
        for value in (1, wrong, 2, wrong, 4):
            handle.add(value)
        with pytest.raises(Invalid, match="2 deltas were no numbers"):
            pub.flush()
    assert "paid" in caplog.text
    assert meter.of(m.PUBLISHER_DROPPED, "no_number") == 2
    handle.add(8)
    pub.flush()  # and no more of it
    pub.close()
    assert fold(log).of("paid") == {(): 15}


def test_a_negative_number_in_a_monotone_view_is_none() -> None:
    """A handle of a monotone view lets it through; merging does not."""
    log = memory_log()
    pub = publisher(log)
    handle = pub.sum("v", monotone=True).labels().for_this_thread()
    for value in (1, -3, 2.5, -0.5):
        handle.add(value)
    with pytest.raises(Invalid, match="2 deltas were no numbers"):
        pub.close()
    assert fold(log).of("v") == {(): 3.5}


def test_an_object_that_turns_angry_in_a_cell_stops_nobody() -> None:
    """A cell checks what it takes; what answers otherwise when it is merged is lost and said, and the flusher goes on."""

    class Turning:
        calm = True

        def __float__(self) -> float:
            if self.calm:
                return 1.0
            raise RuntimeError("not any more")

    log = memory_log()
    pub = publisher(log, flush_interval_ms=100_000, snapshot_interval_ms=100_000)
    cell = pub.sum("v").labels()
    cell.add(1)
    cell._values.append(turning := Turning())
    turning.calm = False
    cell.add(2)
    with pytest.raises(Invalid, match="1 deltas were no numbers"):
        pub.flush()
    pub.close()
    assert fold(log).of("v") == {(): 3}


def test_a_method_without_its_handle_records() -> None:
    """`add = cell.for_this_thread().add` keeps the list alive, though not the handle."""
    log = memory_log()
    with publisher(log) as pub:
        add = pub.sum("v").labels().for_this_thread().add
        for _ in range(3):
            gc.collect()
            add(5)
            pub.flush()
        assert len(lists_of(pub)) == 1
        del add
        pub.flush()
        assert len(lists_of(pub)) == 0
    assert fold(log).of("v") == {(): 15}


def test_handles_of_ended_threads_are_drained_and_freed() -> None:
    """When threads are gone their deltas are sent, and the account is back to where it was: also of kept methods."""
    log = memory_log()
    pub = publisher(log, series_idle_ms=1)
    view = pub.sum("v", labels=("a",))
    pub.flush()
    before = pub._running.account.used_bytes

    def work(i: int) -> None:
        handles = [view.labels(str(i % 3)).for_this_thread() for _ in range(10)]
        add = view.labels("m").for_this_thread().add
        for _ in range(100):
            for handle in handles:
                handle.add(1)
            add(1)

    for _ in range(3):
        with hurried_threads():
            in_threads(8, work)
    pub.flush()
    gc.collect()
    wait_until(lambda: len(lists_of(pub)) == 0 and pub._running.account.used_bytes == before)
    pub.close()
    assert fold(log).of("v") == {("0",): 9_000, ("1",): 9_000, ("2",): 6_000, ("m",): 2_400}


def test_a_long_list_that_nobody_has_any_more_leaves_the_flusher_idle() -> None:
    """The last list that was drained was long, and is gone: nothing is due."""
    with publisher(memory_log(), thread_deltas_max=8, flush_interval_ms=100_000) as pub:
        handle = pub.sum("v").labels().for_this_thread()
        for _ in range(1_000):
            handle.add(1)
        del handle
        pub.flush()
        wait_until(lambda: len(lists_of(pub)) == 0)
        wait_until(lambda: not pub._running.buffering.due)


def test_a_handle_may_be_used_by_other_threads_too() -> None:
    """It is not checked whose it is; an append is atomic from any thread."""
    log = memory_log()
    with publisher(log, flush_interval_ms=1) as pub:
        handle = pub.sum("v").labels().for_this_thread()
        with hurried_threads():
            in_threads(6, lambda i: [handle.add(1) for _ in range(5_000)])
    assert fold(log).of("v") == {(): 30_000}


def test_what_comes_while_a_list_is_drained_is_for_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the prefix that was counted is cut off: not what the thread appends meanwhile."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=1)
    handle = pub.sum("v").labels().for_this_thread()
    late = [*range(100)]

    def length(value: Any) -> int:
        if late and threading.current_thread().name == "pipeline-flusher":
            handle.add(late.pop())
        return len(value)

    monkeypatch.setattr(handle_module, "len", length, raising=False)
    wait_until(lambda: not late)
    monkeypatch.undo()
    pub.close()
    assert fold(log).of("v") == {(): 4_950}


def test_closed_handles_refuse() -> None:
    """After `close` a handle raises, and none is to be had; all that was recorded before is sent."""
    log = memory_log()
    pub = publisher(log)
    cell = pub.sum("v").labels()
    handle = cell.for_this_thread()
    observe = pub.max("w").labels().for_this_thread()
    handle.add(1)
    observe.observe(3)
    pub.close()
    for refused in (lambda: handle.add(1), lambda: observe.observe(1), cell.for_this_thread):
        with pytest.raises(Invalid, match="closed"):
            refused()
    assert fold(log).answers == {("v", ()): 1, ("w", ()): 3}


def test_a_handle_opened_while_the_publisher_closes_is_refused_or_closed() -> None:
    """There is no moment at which a handle comes to life that goes on taking deltas of a closed publisher."""
    for _ in range(30):
        log = memory_log()
        pub = publisher(log)
        cell = pub.sum("v").labels()
        cell.add(1)
        handles: list[Any] = []
        stop = threading.Event()

        def work(i: int, cell: Any = cell, handles: list[Any] = handles, stop: threading.Event = stop) -> None:
            try:
                while not stop.is_set():
                    handles.append(cell.for_this_thread())
            except Invalid:
                pass

        thread = threading.Thread(target=work, args=(0,))
        with hurried_threads():
            thread.start()
            wait_until(lambda handles=handles: handles)
            pub.close()
            stop.set()
            thread.join()
        for handle in handles:
            with pytest.raises(Invalid):
                handle.add(1)


def test_the_cell_is_let_go_of_while_its_handle_lives() -> None:
    """A silent series gives its memory back; its handle brings it back."""
    log = memory_log()
    with publisher(log, flush_interval_ms=1, series_idle_ms=1) as pub:
        view = pub.sum("v", labels=("a",))
        handle = view.labels("x").for_this_thread()
        for _ in range(5):
            handle.add(1)
            wait_until(lambda: len(view) == 0 and not handle.cell.charge and not lists_of(pub).waiting_count())
        view.add(1, a="x")
        handle.add(1)
    assert fold(log).of("v") == {("x",): 7}


def test_thousands_of_handles_are_flushed_and_closed() -> None:
    """A flush takes in what each of them has, in one entry for each series."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=100_000)
    view = pub.sum("v", labels=("a",))
    handles = [view.labels(str(i % 10)).for_this_thread() for i in range(5_000)]
    for handle in handles:
        handle.add(1)
    pub.flush()
    assert pub.stats()["entries"] == 10
    assert pub._running.account.used_bytes >= 5_000 * THREAD_BYTES
    for handle in handles:
        handle.add(1)
    pub.close()
    assert fold(log).of("v") == {(str(s),): 1_000 for s in range(10)}


def test_a_full_account_has_no_handles() -> None:
    """A handle is charged: without room for it the caller is told, and no delta is counted as dropped."""
    for on_full in ("raise", "drop_newest"):
        meter = Meter()
        with publisher(memory_log(), meter, on_full=on_full, buffer_bytes_max=65_536) as pub:
            cell = pub.sum("v").labels()
            handles: list[Any] = []
            with pytest.raises(BufferFull):
                handles += iter(cell.for_this_thread, None)  # until it raises
            assert 65_536 // THREAD_BYTES - 20 < len(handles) <= 65_536 // THREAD_BYTES
            assert meter.of(m.PUBLISHER_DROPPED, "buffer_full") == 0
            handles.clear()
            pub.flush()
            cell.for_this_thread().add(1)


def test_long_lists_bring_the_flusher_early() -> None:
    """However rarely a publisher flushes, a thread's list stays short: the flusher empties it, and seals nothing for it."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=3_600_000, snapshot_interval_ms=3_600_000, thread_deltas_max=1_000)
    handle = pub.sum("v").labels().for_this_thread()
    pub.flush()
    for _ in range(5_000):
        handle.add(1)
    wait_until(lambda: not lists_of(pub).waiting_count())
    handle.add(1)
    wait_until(lambda: not lists_of(pub).waiting_count())
    assert handle.cell.pending == 5_001
    assert pub.stats()["batches"] == 0
    pub.close()
    assert fold(log).of("v") == {(): 5_001}


def test_a_lack_of_memory_while_merging_keeps_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on its way from a list into its cell when memory ends is there for the next try."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=1)
    view = pub.sum("v", labels=("a",))
    handles = [view.labels(str(i)).for_this_thread() for i in range(5)]
    kind = view.kind
    failures = [0]

    class Failing(type(kind)):  # type: ignore[misc]
        def collect(self, deltas: Any) -> Any:
            if rng.random() < 0.5:
                failures[0] += 1
                raise MemoryError
            return super().collect(deltas)

    rng = random.Random(1)
    monkeypatch.setattr(view, "kind", Failing())
    for _ in range(100):
        for handle in handles:
            handle.add(1)
        time.sleep(0.0005)
    wait_until(lambda: failures[0] > 20)
    monkeypatch.setattr(view, "kind", kind)
    pub.close()
    assert fold(log).of("v") == {(str(i),): 100 for i in range(5)}


def test_what_is_left_at_close_is_counted() -> None:
    """Deltas in lists that a close without a log leaves behind are among those that it counts as dropped."""
    log, meter = FaultyLog(), Meter()
    log.away = True
    pub = publisher(log, meter, flush_interval_ms=100_000)
    handle = pub.sum("v").labels().for_this_thread()
    for _ in range(10):
        handle.add(1)
    with pytest.raises(Unavailable):
        pub.close(0.05)
    assert meter.of(m.PUBLISHER_DROPPED, "closed") == 10


def test_interruptions_between_threads_lose_nothing() -> None:
    """Threads with handles that come and go, flushes and snapshots, as often as the interpreter can switch: exact totals."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=1, snapshot_interval_ms=1, series_idle_ms=1, thread_deltas_max=50)
    view = pub.sum("v", labels=("a",))
    mean = pub.mean("w")

    def work(i: int) -> None:
        rng = random.Random(i)
        for _ in range(15):
            add = view.labels(str(rng.randrange(3))).for_this_thread().add
            observe = mean.labels().for_this_thread().observe
            for j in range(200):
                add(1)
                observe(j)
            if i == 0:
                pub.flush()
                view.local()

    with hurried_threads():
        in_threads(8, work)
    pub.close()
    views = fold(log)
    assert views.total("v") == 8 * 15 * 200
    assert views.of("w") == {(): 99.5}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_records_for_itself_only(tmp_path: Any) -> None:
    """An inherited handle works in the child, from nothing, without any other call; the parent's deltas are sent once."""
    path = tmp_path / "log"
    run_script(
        path,
        """
pub = publisher(log, flush_interval_ms=3_600_000, snapshot_interval_ms=50)
view = pub.sum("v", labels=("who",))
handle = view.labels("parent").for_this_thread()
mine = view.labels("child").for_this_thread()
handle.add(1)
mine.add(100)
pid = os.fork()
if pid == 0:
    assert pub._running.account.used_bytes < 5_000
    mine.add(10)
    add = view.labels("child").for_this_thread().add
    add(1_000)
    wait_until(lambda: view.local().get(("child",)) == 1_010)
    pub.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
handle.add(1)
pub.close()
""",
    )
    assert fold(FileLog(path).read()).of("v") == {("parent",): 2, ("child",): 1_110}


def test_modes_without_own_lists_give_the_cell() -> None:
    """In sharded mode a handle of a thread's own is the cell itself: code that asks for one works in each mode."""
    assert "sharded" in PublisherSettings.__dataclass_fields__["buffering"].metadata["doc"]
    log = memory_log()
    with publisher(log, buffering="sharded") as pub:
        cell = pub.sum("v").labels()
        assert cell.for_this_thread() is cell
        cell.for_this_thread().add(2)
    assert fold(log).of("v") == {(): 2}
