"""Local snapshots: what this process has recorded, as of a moment that is no older than they say."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.record import Definition, canonical, series_suffix
from pipeline.publisher.local import LocalView
from tests.producer.support import (
    CLOCK,
    FaultyLog,
    fold,
    hurried_threads,
    in_threads,
    memory_log,
    publisher,
    stalled,
    wait_until,
)

MODES: tuple[Mapping[str, Any], ...] = (
    {},
    {"durability": "process", "spool_dir": "spool"},
)


@pytest.mark.parametrize("away", [False, True], ids=["log there", "log away"])
@pytest.mark.parametrize("mode", MODES, ids=["memory", "process"])
def test_a_snapshot_is_as_old_as_it_says_at_most(
    mode: Mapping[str, Any], away: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each thread and series, it has all that was recorded when it was taken, and nothing that was begun after."""
    monkeypatch.chdir(tmp_path)
    log = FaultyLog()
    log.away = away
    pub = publisher(log, snapshot_interval_ms=2, flush_interval_ms=5, series_idle_ms=5, **mode)
    view = pub.sum("v", labels=("thread",))
    thread_count = 4
    begun = [0] * (2 * thread_count)
    done: list[list[tuple[float, int]]] = [[(0.0, 0)] for _ in begun]
    stop = threading.Event()

    def record(i: int) -> None:
        cell = view.labels(str(i))
        own = view.labels(str(i + thread_count))
        rng = random.Random(i)
        while not stop.is_set():
            for s, handle in ((i, cell), (i + thread_count, own)):
                begun[s] += 1
                handle.add(1)
                done[s].append((time.monotonic(), begun[s]))
            if rng.random() < 0.05:
                time.sleep(rng.random() * 0.01)

    def check(_: int) -> None:
        last = dict.fromkeys(map(str, range(len(begun))), 0)
        for _ in range(150):
            local = view.local()
            taken_s = local.taken_s
            assert time.monotonic() - taken_s >= local.age_ms / 1_000 - 0.5
            for (s,), total in local.items():
                assert last[s] <= total <= begun[int(s)]  # never falls
                last[s] = total
            for i, history in enumerate(done):
                sure = next((count for at_s, count in reversed([*history]) if at_s <= taken_s), 0)
                assert local.get((str(i),), 0) >= sure
                history[:] = history[-20_000:]
            time.sleep(0.001)
        stop.set()

    def work(i: int) -> None:
        try:
            check(i) if i == thread_count else record(i)
        finally:
            stop.set()

    with hurried_threads():
        in_threads(thread_count + 1, work)
    log.away = False
    pub.flush()
    assert {s: total for (s,), total in view.local().items()} == {str(i): count for i, count in enumerate(begun) if count}
    pub.close()
    assert fold(log.log).of("v") == view.local()


def test_it_never_changes_and_the_next_one_is_another() -> None:
    """A snapshot is the reader's for ever; the view answers with a newer one."""
    with publisher(memory_log()) as pub:
        view = pub.sum("v", labels=("a",))
        empty = view.local()
        view.add(1, a="x")
        pub.flush()
        one = view.local()
        view.add(1, a="x")
        view.add(1, a="y")
        pub.flush()
        assert dict(empty) == {}
        assert dict(one) == {("x",): 1}
        assert dict(view.local()) == {("x",): 2, ("y",): 1} == dict(pub.local()["v"])
        assert one.taken_s < view.local().taken_s
        with pytest.raises(TypeError):
            one["x",] = 5  # type: ignore[index]


def test_after_a_flush_or_close_it_has_everything() -> None:
    """Who flushes sees what was recorded before, however rarely snapshots are taken; so does who has closed."""
    pub = publisher(memory_log(), snapshot_interval_ms=3_600_000)
    view = pub.sum("v")
    for i in range(1, 4):
        view.add(1)
        pub.flush()
        assert view.local()[()] == i
    view.labels().add(5)
    pub.close()
    assert view.local()[()] == 8
    before = view.local().age_ms
    assert 0 <= before <= view.local().age_ms  # nobody takes them any more, and it says so
    with publisher(memory_log()) as other:
        other.sum("v")
    assert dict(other.local()["v"]) == {}


def test_all_kinds_answer_as_reads_do() -> None:
    """Each value is what a read of the view would show of this process alone."""
    log = memory_log()
    pub = publisher(log)
    pub.sum("sum").add(2**70)
    for value in (3, 1.5, 9):
        pub.min("min").observe(value)
        pub.max("max").observe(value)
        pub.mean("mean").observe(value)
    pub.last("last").set("old", ts_ms=5)
    pub.last("last").set("new", ts_ms=6)
    pub.last("last").set("older", ts_ms=4)
    pub.sum("huge").add(1e308)
    pub.sum("huge").add(1e308)
    pub.close()
    found = {name: local[()] for name, local in pub.local().items()}
    assert found == {"sum": 2**70, "min": 1.5, "max": 9, "mean": 4.5, "last": "new", "huge": 2 * int(1e308)}
    assert {(name, ()): value for name, value in found.items()} == fold(log).answers


@given(st.permutations(["c", "a", "d", "b"]))
def test_labels_stand_as_declared(order: list[str]) -> None:
    """By position in the order in which this process names them, to iterate over and to look up."""
    declared = Definition("v", "sum", tuple(order), 0)
    definition = canonical(declared)
    states = {series_suffix([f"value of {name}" for name in definition.labels]): 7}
    local = LocalView(declared, definition, states, 0.0, CLOCK.monotonic_s, complete=True)
    labels = tuple(f"value of {name}" for name in order)
    assert local.labels == tuple(order)
    assert [*local] == [labels]
    assert local[labels] == 7


def test_what_is_no_series_is_not_in_it() -> None:
    """A tuple of as many texts as there are labels is looked up; anything else is not there."""
    with publisher(memory_log()) as pub:
        view, bare = pub.sum("v", labels=("a",)), pub.sum("bare")
        view.add(1, a="x")
        bare.add(1)
        pub.flush()
        assert ("x",) in view.local()
        for wrong in ("x", "y", ("y",), (), ("x", "x"), (1,), (None,), 5, None, ("\ud800",), ["x"], b"x"):
            assert wrong not in view.local()
            assert view.local().get(wrong) is None  # type: ignore[arg-type]
        assert () in bare.local()
        assert ("x",) not in bare.local()
        assert "1 series" in repr(bare.local())


def test_at_its_limit_it_says_that_it_is_not_complete() -> None:
    """Beyond `local_series_max`, over all views, further series are left out; those that are in stay right."""
    log = memory_log()
    pub = publisher(log, local_series_max=10)
    one, two, three = (pub.sum(name, labels=("a",)) for name in ("one", "two", "three"))
    for i in range(7):
        one.add(1, a=str(i))
    pub.flush()
    assert one.local().complete
    for i in range(7):
        two.add(1, a=str(i))
        one.add(1, a=str(i))
    three.add(1, a="x")
    pub.flush()
    assert len(one.local()) == 7
    assert len(two.local()) + len(three.local()) == 3
    assert set(one.local().values()) == {2}
    assert (one.local().complete, two.local().complete) == (True, False)
    assert three.local().complete == (len(three.local()) == 1)
    pub.close()
    assert fold(log).total("two") == 7
    with publisher(memory_log(), local_series_max=0) as none:
        none.sum("v").add(1)
        none.flush()
        assert not none.sum("v").local().complete
        assert len(none.sum("v").local()) == 0


def test_the_limit_holds_while_the_log_is_away() -> None:
    """Series that nothing could be sealed of count as well."""
    log = FaultyLog()
    log.away = True
    pub = publisher(log, local_series_max=10, snapshot_interval_ms=1)
    one, two = pub.sum("one", labels=("a",)), pub.sum("two", labels=("a",))
    for i in range(50):
        one.add(1, a=str(i))
        two.add(1, a=str(i))
    wait_until(lambda: not one.local().complete and not two.local().complete)
    for _ in range(20):
        assert len(one.local()) + len(two.local()) <= 20
        time.sleep(0.001)
    log.away = False
    pub.close()
    assert len(one.local()) + len(two.local()) == 10
    assert fold(log.log).total("one") == 50


def test_it_is_fresh_in_quiet_and_old_when_nobody_takes_it() -> None:
    """While the flusher runs its age stays small, also without new deltas; held up, it grows, and so does the age."""
    log = FaultyLog()
    pub = publisher(log, snapshot_interval_ms=5)
    view = pub.sum("v")
    view.add(1)
    pub.flush()
    first = view.local()
    wait_until(lambda: view.local().taken_s > first.taken_s + 0.05)
    assert dict(view.local()) == {(): 1}
    with stalled(pub) as held:
        view.add(1)
        assert held.wait(10)
        stuck_s = view.local().taken_s
        wait_until(lambda: view.local().age_ms > 100)
        assert view.local().taken_s == stuck_s
        assert dict(view.local()) == {(): 1}
    wait_until(lambda: dict(view.local()) == {(): 2})
    pub.close()


def test_series_that_were_let_go_of_are_in_it_while_the_log_is_away() -> None:
    """What was sent before, and what can't be now, is known, once."""
    log = FaultyLog()
    pub = publisher(log, series_idle_ms=1, flush_interval_ms=1, snapshot_interval_ms=1)
    view = pub.sum("v", labels=("a",))
    cells = [view.labels(str(i)) for i in range(4)]
    for cell in cells:
        cell.add(1)
    wait_until(lambda: not pub.stats()["series"])
    log.away = True
    for cell in cells:
        cell.add(2)
    wait_until(lambda: sum(view.local().values()) == 12)
    first = view.local()
    wait_until(lambda: view.local().taken_s > first.taken_s + 0.02)
    assert sum(view.local().values()) == 12
    log.away = False
    pub.close()
    assert sum(view.local().values()) == 12
    assert fold(log.log).total("v") == 12
