"""The watchdog ends a worker that stands still, and spares one that waits for the log, restores, or is idle."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

import pytest

import pipeline.metrics as m
from pipeline.adapters.memory import MemoryStores
from pipeline.errors import Stalled
from pipeline.threads import PeriodicThread
from pipeline.worker.restore import RestoreProgress
from pipeline.worker.watchdog import AWAY_S, WAIT_S, Observation, Since, Watchdog, judge, observe, stacks
from tests.support import HandClock, wait_until
from tests.worker.support import ChangingLog, Recorder, Worker, new_partition

STALL_S, COMMIT_S = 15.0, 30.0


class Course:
    """A course of looks, a second apart by default."""

    def __init__(self) -> None:
        self.s = 100.0
        self.since: Mapping[int, Since] = {}
        self.stalled: list[int] = []

    def look(self, seen: Mapping[int, Observation], *, after_s: float = 1.0) -> list[int]:
        asked_s, self.s = self.s, self.s + after_s
        self.since, stalls = judge(self.since, seen, asked_s, self.s, stall_s=STALL_S, commit_s=COMMIT_S)
        return [it.partition for it in stalls]

    def looks(self, seen: Mapping[int, Observation], count: int) -> int | None:
        """Look so many times at the same, and return the first look that finds a stall."""
        for number in range(count):
            if self.look(seen):
                return number
        return None


STILL = Observation((7,), 3)


def test_lag_and_a_position_that_stands_still_is_a_stall() -> None:
    """A partition with lag and an unmoved position is stalled after the whole timeout, and no other partition."""
    course = Course()
    moving = iter(range(100))
    for _ in range(15):
        assert course.look({0: Observation((next(moving),), 9), 1: STILL, 2: Observation((5,), 0)}) == []
    assert course.look({0: Observation((next(moving),), 9), 1: STILL, 2: Observation((5,), 0)}) == [1]


def test_a_restore_that_the_log_holds_up_is_no_stall() -> None:
    """A restore behind a foreign open transaction is no stall, nor is a partition that waits for its thread: a restart would
    wait for the same. A restore that stands still for no known reason is a stall.
    """
    clock = HandClock()
    log = ChangingLog(3, clock)
    held, queued = (new_partition(number, log, MemoryStores(), clock) for number in (1, 2))
    partitions, ends = {1: held, 2: queued}, {1: 50, 2: 50}
    told = RestoreProgress(1, 500, 1_500, 1.0, waiting="a transaction of somebody else is open there")
    course = Course()
    assert course.looks(observe(partitions, ends, {1: told}, {1, 2}), 300) is None
    silent = observe(partitions, ends, {1: RestoreProgress(1, 500, 1_500, 1.0)}, {1, 2})
    assert course.looks(silent, 300) == STALL_S - 1


def test_any_move_begins_anew() -> None:
    """Any progress, however small, begins the timeout anew, however large the lag stays."""
    course = Course()
    assert course.looks({0: STILL}, 15) is None
    assert course.look({0: Observation((8,), 10_000)}) == []
    assert course.looks({0: Observation((8,), 10_000)}, 14) is None
    assert course.look({0: Observation((8,), 10_000)}) == [0]


def test_without_lag_nothing_stands_still() -> None:
    """Without lag nothing is stalled, and lag that comes after hours has the whole timeout."""
    course = Course()
    assert course.looks({0: Observation((7,), 0)}, 10_000) is None
    assert course.looks({0: STILL}, 30) == 14


def test_a_log_that_was_away_is_no_stall() -> None:
    """After an absent log, or a pause of this process, every partition has the whole timeout again."""
    course = Course()
    assert course.looks({0: STILL}, 15) is None
    assert course.look({0: STILL}, after_s=AWAY_S + 0.1) == []
    assert course.looks({0: STILL}, 30) == 14


def test_a_log_that_only_dawdles_hides_no_stall() -> None:
    """A log that answers late hides no stall."""
    course = Course()
    looks = [course.look({0: STILL}, after_s=AWAY_S) for _ in range(4)]
    assert looks == [[], [], [], [0]]


def test_a_commit_has_its_own_time() -> None:
    """Other partitions wait for an undecided commit, too; beyond `commit_timeout_ms` a commit is no excuse any more."""
    course = Course()
    seen = {0: Observation((7,), 3, committing=True), 1: STILL}
    first = course.looks(seen, 100)
    assert first is not None
    assert COMMIT_S < first <= COMMIT_S + STALL_S + 1


def test_commits_that_come_to_an_end_excuse_nobody() -> None:
    """A partition that stands still is noticed though another commits all the time."""
    course = Course()
    found = [course.look({0: Observation((n,), 3, committing=True), 1: STILL}) for n in range(16)]
    assert found == [[]] * 15 + [[1]]


def test_a_short_commit_is_no_excuse() -> None:
    """A commit excuses a stall only if it takes over a third of the timeout: then the log is at fault."""
    course = Course()
    found = [course.look({0: Observation((n // 5,), 3, committing=n % 5 > 0), 1: STILL}) for n in range(16)]
    assert found == [[]] * 15 + [[1]]


def test_a_partition_that_goes_is_forgotten() -> None:
    """A partition that was taken away and given back has the whole timeout."""
    course = Course()
    course.looks({0: STILL}, 15)
    course.look({})
    assert course.looks({0: STILL}, 30) == 15


def test_what_partitions_look_like() -> None:
    """A folding partition shows position, lag and commit; a restoring one its progress; another one nothing to judge."""
    clock = HandClock()
    log = ChangingLog(4, clock)
    worker = Worker(log, clock)
    worker.commit(0, {"a": 1})
    worker.append(0, {"a": 1})
    worker.partition(3)
    waiting, restoring = (new_partition(number, log, MemoryStores(), clock) for number in (1, 2))
    partitions = {0: worker.partition(0), 1: waiting, 2: restoring, 3: worker.partition(3)}
    restore = RestoreProgress(2, 500, 1_500, 1.0)
    ends = dict(log.end_offsets("deltas"))
    seen = observe(partitions, ends, {2: restore})
    assert seen == {0: Observation((1,), 1), 2: Observation((500, 1_500), 1_500), 3: Observation((0,), 0)}
    worker.partition(0).task.freeze()
    assert observe(partitions, ends, {})[0].committing
    assert observe({2: restoring}, ends, {2: RestoreProgress(2, 2_000, 0, 2.0, done=True)}) == {}


def test_a_restore_that_gets_on_is_no_stall() -> None:
    """A restore that makes progress is no stall, however long it takes; one that makes none is."""
    course = Course()
    for n in range(100):
        assert course.look({0: Observation((n, 1_000 - n), 1_000 - n)}) == []
    assert course.looks({0: Observation((99, 901), 901)}, 30) == 14


class Watched:
    """A watchdog of one partition that stands still, and a log that answers on demand."""

    def __init__(
        self, stall_timeout_ms: int = 15_000, interval_s: float = 0.5, threads: Sequence[PeriodicThread] = ()
    ) -> None:
        self.clock = HandClock()
        self.metrics = Recorder()
        self.told: tuple[float, Mapping[int, int]] = (self.clock.s, {0: 10})
        self.position = 7
        self.errors: list[BaseException] = []
        self.watchdog = Watchdog(
            lambda: self.told,
            lambda ends: {0: Observation((self.position,), ends[0] - self.position)},
            clock=self.clock,
            stall_timeout_ms=stall_timeout_ms,
            commit_timeout_ms=30_000,
            on_fatal=self.errors.append,
            threads=threads,
            interval_s=interval_s,
            metrics=self.metrics,
        )

    def tell(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.s += 1
            self.told = (self.clock.s, {0: 10})
            self.watchdog.step()


def test_a_stall_is_told_with_all_stacks(caplog: pytest.LogCaptureFixture) -> None:
    """A stall is counted, logged with the place of every thread, and fatal."""
    it = Watched()
    release, here = threading.Event(), threading.Event()

    def stand_in_the_way() -> None:
        here.set()
        release.wait(60)

    thread = threading.Thread(target=stand_in_the_way, name="the-culprit")
    thread.start()
    try:
        assert here.wait(60)
        assert it.metrics.of(m.STALLS) == 0
        it.tell(16)
    finally:
        release.set()
        thread.join()
    assert [type(error) for error in it.errors] == [Stalled]
    assert "0 (3 records behind, for 15.0 s)" in str(it.errors[0])
    assert it.metrics.of(m.STALLS) == 1
    assert it.watchdog.stalled
    (record,) = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    for what in ("the-culprit", "stand_in_the_way", "MainThread", "test_watchdog.py"):
        assert what in record.getMessage()


def test_without_a_new_answer_of_the_log_nothing_is_judged() -> None:
    """Neither time alone nor an answer that was seen before makes a stall."""
    it = Watched()
    it.tell(14)
    it.clock.s += 1_000
    for _ in range(100):
        it.watchdog.step()
    assert not it.errors
    it.tell(16)
    assert it.errors


def test_stopped_it_ends_nobody() -> None:
    """A partition that stands still because the worker stops is no stall."""
    it = Watched()
    it.tell(15)
    it.watchdog.stop()
    it.tell(20)
    assert not it.errors


def test_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread checks by itself, reports once, and ends then."""
    it = Watched(interval_s=0.001)
    step = it.watchdog.step

    def go_on() -> None:
        it.clock.s += 1
        it.told = (it.clock.s, {0: 10})
        step()

    monkeypatch.setattr(it.watchdog.thread, "_step", go_on)
    it.watchdog.start()
    wait_until(lambda: not it.watchdog.thread.alive, "its end", 60)
    assert len(it.errors) == 1


def test_a_timeout_of_0_watches_nothing() -> None:
    """A timeout of 0 starts no thread, and can be stopped all the same."""
    it = Watched(stall_timeout_ms=0)
    it.watchdog.start()
    assert not it.watchdog.thread.started
    it.watchdog.stop()


def test_stacks_names_threads() -> None:
    """`stacks` has this thread, too."""
    assert "MainThread" in stacks()
    assert "test_stacks_names_threads" in stacks()


def test_nobody_waits_for_ever_for_what_is_ours() -> None:
    """A partition that waits to be restored has more time, while no other makes progress; then it is a stall."""
    course = Course()
    assert course.looks({0: Observation((1, 500), 3, waiting=True)}, 300) == WAIT_S
    for entries in range(300):
        assert course.look({0: Observation((1, entries), 3, waiting=True)}) == []


def test_what_waits_looks_like() -> None:
    """A waiting partition makes progress whenever another does; a partition of another worker does not wait."""
    clock = HandClock()
    log = ChangingLog(3, clock)
    worker = Worker(log, clock)
    worker.append(2, {"a": 1})
    unstarted = {number: new_partition(number, log, MemoryStores(), clock) for number in (0, 1)}
    ends = dict(log.end_offsets("deltas"))
    progress = {0: RestoreProgress(0, 500, 1_500, 1.0)}
    assert observe(unstarted, ends, progress, {0, 1, 2}) == {
        0: Observation((500, 1_500), 1_500),
        1: Observation((0, 500), 0, waiting=True),
        2: Observation((0, 500), 1, waiting=True),  # its last life has not ended
    }
    unstarted[0].start()
    assert observe(unstarted, ends, progress, {0, 2})[2] == Observation((1, 500), 1, waiting=True)
    assert observe(unstarted, ends, progress).keys() == {0}
