"""The worker's loop restores and commits side by side within its limits, and ends when anything goes wrong."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.memory import MemoryLog, MemoryStores
from pipeline.core.codec import encode_batch
from pipeline.core.record import POSITION_KEY, Batch, Definition, Group, series_prefix, series_suffix
from pipeline.errors import NotReady, PipelineError, RecordsLost, Unavailable
from pipeline.ports import NO_BEGINS, Begins, Message, Transaction
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.active import ActivePartition
from pipeline.worker.loop import WorkerLoop
from pipeline.worker.partition import OwnedPartition
from tests.support import wait_until
from tests.worker.support import VIEW, is_fence


class _Hanging:
    """A transaction that waits for `release`, like one whose disk has gone."""

    def __init__(self, inner: Transaction, release: threading.Event) -> None:
        self._inner = inner
        self._release = release

    marker_count = 0

    def commit(self, messages: Sequence[Message], *, timeout_s: float, begins: Begins = NO_BEGINS) -> list[int]:
        if not is_fence(messages):
            self._release.wait(60)
        return self._inner.commit(messages, timeout_s=timeout_s, begins=begins)

    def close(self) -> None:
        self._inner.close()


class _HangingLog(MemoryLog):
    """A log whose commits hang until `release` is set."""

    def __init__(self, release: threading.Event) -> None:
        super().__init__({DELTAS: 1, CHANGELOG: 1, DEAD_LETTERS: 1}, SystemClock().now_ms)
        self._release = release

    def transaction(self, transactional_id: str) -> Transaction:
        return _Hanging(super().transaction(transactional_id), self._release)


def test_a_commit_that_hangs_ends_the_worker() -> None:
    """After `commit_timeout_ms` the loop says so and ends, though the commit's thread still hangs."""
    release, failed = threading.Event(), threading.Event()
    errors: list[BaseException] = []
    clock, log = SystemClock(), _HangingLog(release)
    settings = WorkerSettings(commit_interval_ms=1, commit_timeout_ms=100)
    partition = OwnedPartition(
        0, log=log, stores=MemoryStores(), clock=clock, settings=settings, delete_retention_ms=86_400_000
    )

    def on_fatal(error: BaseException) -> None:
        errors.append(error)
        failed.set()

    loop = WorkerLoop(lambda _: partition, log=log, clock=clock, settings=settings, on_fatal=on_fatal)
    loop.assign([0])
    loop.start()
    try:
        log.append([Message(DELTAS, 0, None, b"junk")], timeout_s=1)
        assert failed.wait(30)
        assert isinstance(errors[0], Unavailable)
        assert "commit_timeout_ms" in str(errors[0])
        assert not loop.ready
        assert not loop.stop(10), "what a hanging commit works in must not be closed"
        assert log.watermarks(CHANGELOG, 0).end_offset == 1, "the fence record"
    finally:
        release.set()


def test_a_commit_that_fails_ends_the_worker_once() -> None:
    """The loop reports an error of a commit once, and folds no more."""
    errors: list[BaseException] = []
    failed = threading.Event()
    clock = SystemClock()
    log = MemoryLog({DELTAS: 1, CHANGELOG: 1, DEAD_LETTERS: 1}, clock.now_ms)
    settings = WorkerSettings(commit_interval_ms=1)
    partition = OwnedPartition(
        0, log=log, stores=MemoryStores(), clock=clock, settings=settings, delete_retention_ms=86_400_000
    )
    loop = WorkerLoop(
        lambda _: partition,
        log=log,
        clock=clock,
        settings=settings,
        on_fatal=lambda error: (errors.append(error), failed.set()),
    )
    loop.assign([0])
    loop.start()
    assert loop.wait_ready(30)
    log.transaction("pipeline-0")  # a newer owner
    log.append([Message(DELTAS, 0, None, b"junk")], timeout_s=1)
    assert failed.wait(30)
    assert loop.stop(10)
    assert [type(error).__name__ for error in errors] == ["Fenced"]
    assert isinstance(errors[0], PipelineError)
    assert log.watermarks(CHANGELOG, 0).end_offset == 1, "the fence record"


class _Pool:
    """A worker's loop over partitions that may take their time, or fail, to start."""

    def __init__(self, partition_count: int, *, first: int | None = None, **settings: int) -> None:
        self.clock = SystemClock()
        self.log = _TimedLog(partition_count, self.clock)
        self.stores = MemoryStores()
        self.settings = WorkerSettings(**settings)
        self.errors: list[BaseException] = []
        self.failed = threading.Event()
        first_count = partition_count if first is None else first
        self.partitions = [self.partition(number) for number in range(partition_count)]
        self.loop = WorkerLoop(
            self.partitions.__getitem__,
            log=self.log,
            clock=self.clock,
            settings=self.settings,
            on_fatal=lambda error: (self.errors.append(error), self.failed.set()),
        )
        self.loop.assign(range(first_count))

    def partition(self, number: int) -> _Slow:
        return _Slow(
            number,
            log=self.log,
            stores=self.stores,
            clock=self.clock,
            settings=self.settings,
            delete_retention_ms=86_400_000,
        )

    def send(self, number: int) -> None:
        self.log.append([Message(DELTAS, number, None, b"junk")], timeout_s=1)

    def committed(self, number: int) -> int:
        return self.log.watermarks(DEAD_LETTERS, number).end_offset


class _Slow(OwnedPartition):
    """A partition whose start waits for `gate`, and fails with `error`."""

    gate: threading.Event | None = None
    error: Exception | None = None
    closed = False
    starting: ClassVar[set[int]] = set()
    most: ClassVar[list[int]] = [0]

    def start(self, progress: Any = lambda _: None, stopping: Any = lambda: False) -> None:
        _Slow.starting.add(self.number)
        _Slow.most[0] = max(_Slow.most[0], len(_Slow.starting))
        try:
            while self.gate is not None and not self.gate.wait(0.005):
                if stopping():
                    raise NotReady("stopped")
            if self.error is not None:
                raise self.error
            super().start(progress, stopping)
        finally:
            _Slow.starting.discard(self.number)

    def close(self) -> None:
        self.closed = True
        super().close()


class _TimedLog(MemoryLog):
    """A log that notes when each transaction was committed."""

    def __init__(self, partition_count: int, clock: SystemClock) -> None:
        super().__init__(dict.fromkeys((DELTAS, CHANGELOG, DEAD_LETTERS), partition_count), clock.now_ms)
        self.clock = clock
        self.commits: list[tuple[float, str]] = []

    def transaction(self, transactional_id: str) -> Transaction:
        return _Timed(self, super().transaction(transactional_id), transactional_id)


class _Timed:
    def __init__(self, log: _TimedLog, inner: Transaction, transactional_id: str) -> None:
        self._log = log
        self._inner = inner
        self._id = transactional_id

    marker_count = 0

    def commit(self, messages: Sequence[Message], *, timeout_s: float, begins: Begins = NO_BEGINS) -> list[int]:
        if not is_fence(messages):
            self._log.commits.append((self._log.clock.monotonic_s(), self._id))
        return self._inner.commit(messages, timeout_s=timeout_s, begins=begins)

    def close(self) -> None:
        self._inner.close()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    _Slow.starting.clear()
    _Slow.most[0] = 0


@pytest.mark.parametrize("value", [b"noise", None])
def test_an_idle_owner_repairs_what_others_cover_up(value: bytes | None) -> None:
    """An idle owner repairs covered entries once, at its first look at the changelog's end, so compaction keeps them."""
    pool = _Pool(2, commit_interval_ms=1)
    batch = encode_batch(Batch("p", 0, 0, 0, 0, 1, [Group(VIEW, [series_suffix(("a",))], [1])]))
    key = series_prefix(VIEW) + series_suffix(("a",))

    def rows() -> list[tuple[bytes | None, bytes | None]]:
        return [(row.key, row.value) for row in pool.log.partition(CHANGELOG, 0).rows]

    def settled() -> bool:
        partition = pool.loop.partitions[0]
        return partition.task.position.next_offset == 1 and not partition.needs_commit(len(rows()), 0.0)

    pool.loop.start()
    try:
        assert pool.loop.wait_ready(60)
        pool.log.append([Message(DELTAS, 0, None, batch)], timeout_s=1)
        wait_until(settled, "a commit")
        ours = dict(rows())
        for _ in range(3):
            pool.log.append([Message(CHANGELOG, 0, key, value)], timeout_s=1)
            pool.log.append([Message(CHANGELOG, 0, POSITION_KEY, value)], timeout_s=1)
            assert dict(rows())[key] == value
            told = pool.log.end_offsets(CHANGELOG)
            pool.loop.note_changelog_ends(0.0, told)
            wait_until(lambda: dict(rows())[key] == ours[key], "the repair")
            wait_until(settled, "the repair's commit")
            count = len(pool.log.commits)
            pool.loop.note_changelog_ends(0.0, told)
            pool.loop.note_changelog_ends(0.0, pool.log.end_offsets(CHANGELOG))
            pool.send(1)
            wait_until(lambda count=count: len(pool.log.commits) > count, "what is folded of another partition")
            assert [it for _, it in pool.log.commits[count:]] == ["pipeline-1"], "what is repaired is repaired"
        end_offset = len(rows())
        pool.log.compact(CHANGELOG, 0, end_offset)
        assert dict(rows())[key] == ours[key]
        assert pool.log.watermarks(CHANGELOG, 1).end_offset > 1
    finally:
        assert pool.loop.stop(30)
    assert not pool.errors


def test_an_idle_worker_asks_for_the_ends_of_the_changelog_every_few_seconds_only() -> None:
    """An idle worker asks every five seconds, one that has committed each time. It looks at each answer once."""
    loop = _Pool(1).loop
    loop._commits.ended_s = -15.0
    assert loop.wants_changelog_ends(5.0)
    loop.note_changelog_ends(5.0, {0: 7})
    assert [loop.wants_changelog_ends(at_s) for at_s in (5.0, 9.9, 10.0)] == [False, False, True]
    loop._commits.ended_s = 5.0
    assert [loop.wants_changelog_ends(at_s) for at_s in (6.0, 19.9)] == [True, True]
    asked: list[int] = []
    partition = SimpleNamespace(number=0, needs_commit=lambda end_offset, _: bool(asked.append(end_offset) or end_offset))
    active = ActivePartition(cast("OwnedPartition", partition), 1.0)
    answers = [(1.0, {0: 7}), (1.0, {0: 7}), (2.0, {})]
    assert [active.needs_commit(ends) for ends in answers for _ in range(2)] == [True, False, True, False, False, False]
    assert asked == [7, 7, 0]


def test_partitions_that_come_later_are_folded_too() -> None:
    """Partitions that come later are restored while the first ones go on folding, and nothing of theirs is lost."""
    pool = _Pool(3, first=1, commit_interval_ms=1)
    gate = pool.partitions[2].gate = threading.Event()
    pool.loop.start()
    try:
        assert pool.loop.wait_ready(60)
        for number in (0, 1, 2):
            pool.send(number)
        pool.loop.assign(range(3), generation=1)
        wait_until(lambda: pool.committed(1) == 1, "partition 1", 60)
        pool.send(0)
        wait_until(lambda: pool.committed(0) == 2, "partition 0 goes on", 60)
        assert pool.committed(2) == 0
        assert pool.loop.ready
        gate.set()
        wait_until(lambda: pool.committed(2) == 1, "partition 2", 60)
    finally:
        gate.set()
        assert pool.loop.stop(60)
    assert not pool.errors
    assert all(partition.closed for partition in [*pool.partitions])
    assert [pool.committed(number) for number in range(3)] == [2, 1, 1], "each record once"


def test_a_partition_that_comes_later_and_fails_to_start_ends_the_worker() -> None:
    """An error in a later partition's start ends the worker, so that no partition is left out silently."""
    pool = _Pool(2, first=1, commit_interval_ms=1)
    pool.partitions[1].error = RecordsLost("records were deleted before they were folded")
    late = pool.partitions[1]
    pool.loop.start()
    assert pool.loop.wait_ready(60)
    pool.loop.assign(range(2), generation=1)
    assert pool.failed.wait(60)
    assert pool.loop.stop(60)
    assert [type(error) for error in pool.errors] == [RecordsLost]
    assert late.closed
    assert pool.partitions[0].closed


def test_restores_run_side_by_side() -> None:
    """At most `restore_thread_count` restores run at once; restored partitions fold while others are not restored."""
    pool = _Pool(5, commit_interval_ms=1, restore_thread_count=2)
    gates = [threading.Event() for _ in range(5)]
    for partition, gate in zip(pool.partitions, gates, strict=True):
        partition.gate = gate
    pool.loop.start()
    try:
        wait_until(lambda: _Slow.starting == {0, 1}, "two restores", 60)
        gates[1].set()
        wait_until(lambda: _Slow.starting == {0, 2}, "the next one", 60)
        pool.send(1)
        wait_until(lambda: pool.committed(1) == 1, "partition 1 folds", 60)
        assert not pool.loop.ready
        for gate in gates:
            gate.set()
        assert pool.loop.wait_ready(60)
    finally:
        assert pool.loop.stop(60)
    assert _Slow.most == [2]
    assert not pool.errors


def test_a_start_that_fails_ends_the_worker() -> None:
    """A start that fails closes all other partitions, restored or not, and nothing more is committed."""
    pool = _Pool(3, commit_interval_ms=1, restore_thread_count=3)
    pool.partitions[1].error = Unavailable("no answer")
    pool.partitions[2].gate = threading.Event()
    pool.loop.start()
    assert pool.failed.wait(60)
    wait_until(lambda: not pool.loop._thread.alive, "its end, without a stop", 60)
    assert pool.loop.stop(60)
    assert [str(error) for error in pool.errors] == ["no answer"]
    assert not pool.loop.ready
    assert [partition.closed for partition in pool.partitions] == [True] * 3


def test_stopped_while_it_restores() -> None:
    """A loop that is stopped while it restores ends soon, and that is no failure."""
    pool = _Pool(3, restore_thread_count=2)
    for partition in pool.partitions:
        partition.gate = threading.Event()
    pool.loop.start()
    wait_until(lambda: len(_Slow.starting) == 2, "two restores", 60)
    assert pool.loop.stop(60)
    assert not pool.errors
    assert [partition.closed for partition in pool.partitions] == [True] * 3


def test_transactions_are_staggered() -> None:
    """No more than `transactions_per_s_max` are committed in a second, but for a burst of a tenth, partitions in turn."""
    pool = _Pool(4, commit_interval_ms=1, transactions_per_s_max=40)
    pool.loop.start()
    assert pool.loop.wait_ready(60)
    done = threading.Event()

    def send() -> None:
        while not done.wait(0.001):
            for number in range(4):
                pool.send(number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        wait_until(lambda: len(pool.log.commits) >= 40, "forty commits", 60)
    finally:
        done.set()
        sender.join()
        assert pool.loop.stop(60)
    commits = pool.log.commits[:40]
    first, last = commits[0][0], commits[-1][0]
    # The burst is 4; what is between the log of a commit and its begin is a thread's start, and only makes it later.
    assert last - first >= (40 - 1 - 5) / 40 - 0.2
    turns = Counter(name for _, name in commits)
    assert max(turns.values()) - min(turns.values()) <= 3, turns


def test_what_is_folded_is_committed_at_the_end() -> None:
    """A stop commits everything folded without waiting for the interval. (The very first record is committed by itself.)"""
    pool = _Pool(2, commit_interval_ms=600_000)
    pool.loop.start()
    assert pool.loop.wait_ready(60)
    for number in (0, 1):
        pool.send(number)
    wait_until(lambda: [pool.committed(0), pool.committed(1)] == [1, 1], "the first commits", 60)
    for number in (0, 1, 1):
        pool.send(number)
    wait_until(lambda: [it.task.next_offset for it in pool.partitions] == [2, 3], "folding", 60)
    assert [pool.committed(0), pool.committed(1)] == [1, 1]
    assert pool.loop.stop(60)
    assert [pool.committed(0), pool.committed(1)] == [2, 3]
    assert not pool.errors


def test_a_full_overlay_is_committed_before_more_is_read() -> None:
    """A full overlay is committed before more is read, whatever the interval and the limit of transactions."""
    pool = _Pool(1, commit_interval_ms=600_000, transactions_per_s_max=1, overlay_entries_max=2, fetch_record_count_max=2)
    for _ in range(20):
        pool.send(0)
    pool.loop.start()
    wait_until(lambda: pool.committed(0) == 20, "all of them", 60)
    assert pool.loop.stop(60)
    assert len(pool.log.commits) in (10, 11)  # the first is of one record, or the first two


class _ShiftedClock(SystemClock):
    """A clock that a test can put forward."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.ahead_ms


def test_an_idle_partition_deletes_all_that_has_expired() -> None:
    """After one delta that shows the time, commits follow until everything expired is deleted, and then none."""
    clock, failed = _ShiftedClock(), list[BaseException]()
    log = MemoryLog({DELTAS: 1, CHANGELOG: 1, DEAD_LETTERS: 1}, clock.now_ms)
    settings = WorkerSettings(commit_interval_ms=1, expired_entries_max=1)
    partition = OwnedPartition(
        0, log=log, stores=MemoryStores(), clock=clock, settings=settings, delete_retention_ms=86_400_000
    )
    loop = WorkerLoop(lambda _: partition, log=log, clock=clock, settings=settings, on_fatal=failed.append)
    loop.assign([0])
    loop.start()
    assert loop.wait_ready(30)
    view = Definition("v", "sum", ("n",), window_s=60, retention_s=60)

    began_ms = clock.now_ms() // 60_000 * 60_000

    def send(sequence: int, series_count: int) -> None:
        start_ms = began_ms + clock.ahead_ms
        group = Group(view, [series_suffix((str(n),), start_ms) for n in range(series_count)], [1] * series_count)
        batch = encode_batch(Batch("p", 0, 0, sequence, 0, clock.now_ms(), [group]))
        log.append([Message(DELTAS, 0, None, batch)], timeout_s=1)
        wait_until(lambda: partition.task.position.next_offset == sequence + 1, "a commit")

    def left() -> int:
        prefix = series_prefix(view)
        return sum(key.startswith(prefix) for key, _ in partition.store.scan(b"", b"\xff"))

    send(0, 20)
    send(1, 20)
    clock.ahead_ms = 3_600_000
    send(2, 1)
    wait_until(lambda: left() == 1 and not partition.task.dirty, "the last tombstone")
    assert loop.stop(10)
    tombstones = [row for row in log.partition(CHANGELOG, 0).rows if row.value is None]
    commits = [row for row in log.partition(CHANGELOG, 0).rows if row.key == POSITION_KEY]
    assert len(tombstones) == 20
    assert 20 <= len(commits) <= 25
    assert not failed
