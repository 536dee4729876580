"""Commits are as large as they can be and still end in time; no commit is tried in vain for ever."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.metrics as m
from pipeline.adapters.memory import MemoryLog, MemoryStores
from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Group, series_suffix
from pipeline.errors import Unavailable
from pipeline.ports import NO_BEGINS, Begins, Message, Transaction
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.bound import CommitBound
from pipeline.worker.loop import WorkerLoop
from pipeline.worker.partition import OwnedPartition
from tests.support import HandClock, wait_until
from tests.worker.support import VIEW, Recorder, new_partition, series_of

TIMEOUT_S = 15.0


def course(seconds_of: Callable[[int], float], count: int = 40) -> list[tuple[int, float]]:
    """Return sizes and times of the commits of a partition that always has more; the last one fails."""
    bound = CommitBound(TIMEOUT_S)
    found = []
    for _ in range(count):
        entries = bound.entries_max
        found.append((entries, seconds_of(entries)))
        if found[-1][1] > TIMEOUT_S:
            break
        bound.note(*found[-1])
    return found


def test_commits_grow_as_fast_as_the_log_is() -> None:
    """The bound grows from one entry to a million in six commits: a start costs next to nothing."""
    sizes = [entries for entries, _ in course(lambda entries: 0.003 + entries * 2e-6)]
    assert sizes[:5] == [1, 16, 256, 4_096, 65_536]
    assert sizes[5] > 500_000


@given(st.floats(min_value=1e-6, max_value=TIMEOUT_S / 2), st.floats(min_value=0.0, max_value=TIMEOUT_S / 4))
def test_no_commit_fails_whose_time_is_due_to_its_size(per_entry_s: float, fixed_s: float) -> None:
    """The bound is met from below and stays in use, however slow the log is, if one entry alone can be committed."""
    found = course(lambda entries: fixed_s + entries * per_entry_s, 60)
    assert all(seconds <= TIMEOUT_S for _, seconds in found)
    assert found[-1][1] >= TIMEOUT_S * 0.2 or found[-1][0] > 1_000_000


def test_a_slow_log_is_given_smaller_commits() -> None:
    """A log that takes twice as long gets commits of half the size, and the bound rises again when the log is quick."""
    bound = CommitBound(TIMEOUT_S)
    bound.note(1_000, 6.0)
    assert bound.entries_max == 1_000
    bound.note(1_000, 12.0)
    assert bound.entries_max == 500
    bound.note(500, 6.0)
    assert bound.entries_max == 500
    bound.note(500, 0.1)
    assert bound.entries_max == 7_500


def test_time_that_no_size_saves_shrinks_nothing() -> None:
    """A log that needs 8 s for any commit gets large commits all the same."""
    bound = CommitBound(TIMEOUT_S)
    bound.note(100_000, 5.0)
    for _ in range(50):
        bound.note(bound.entries_max, 8.0)
    assert bound.entries_max == 60_000


def test_small_commits_of_a_quiet_time_lower_nothing() -> None:
    """Small commits don't change the bound: they say nothing of how long large ones take."""
    bound = CommitBound(TIMEOUT_S)
    bound.note(10_000, 1.0)
    large = bound.entries_max
    for _ in range(100):
        bound.note(1, 0.003)
    assert bound.entries_max == large


class RunningClock(HandClock):
    """A clock that moves a tenth of a millisecond with each look, so that due work is done."""

    def monotonic_s(self) -> float:
        self.s += 0.0001
        return self.s


class SlowLog(MemoryLog):
    """A log whose commits take time in proportion to their size; one that takes longer than its timeout is aborted."""

    def __init__(self, clock: HandClock, per_message_s: float) -> None:
        super().__init__(dict.fromkeys((DELTAS, CHANGELOG, DEAD_LETTERS), 1), clock.now_ms)
        self.clock = clock
        self.per_message_s = per_message_s
        self.commits: list[int] = []
        """Number of messages in each commit that was tried."""
        self.slower_at = (0, 0.0)
        """Commit, counted from 1, from which on the log is slower, and its time per message from then on."""

    def transaction(self, transactional_id: str) -> Transaction:
        return _Slow(self, super().transaction(transactional_id))


class _Slow:
    def __init__(self, log: SlowLog, inner: Transaction) -> None:
        self._log = log
        self._inner = inner

    @property
    def marker_count(self) -> int:
        return self._inner.marker_count

    def commit(self, messages: Sequence[Message], *, timeout_s: float, begins: Begins = NO_BEGINS) -> list[int]:
        self._log.commits.append(len(messages))
        if len(self._log.commits) == self._log.slower_at[0]:
            self._log.per_message_s = self._log.slower_at[1]
        took_s = len(messages) * self._log.per_message_s
        self._log.clock.s += min(took_s, TIMEOUT_S)
        if took_s > TIMEOUT_S:
            raise Unavailable("the coordinator has aborted the transaction: transaction.timeout.ms")
        return self._inner.commit(messages, timeout_s=timeout_s, begins=begins)

    def close(self) -> None:
        self._inner.close()


class Supervised:
    """A worker that is started again whenever it ends, on the same stores."""

    def __init__(self, log: SlowLog) -> None:
        self.log = log
        self.stores = MemoryStores()
        self.metrics = Recorder()
        self.starts = 0
        self.failures: list[BaseException] = []
        self.partition: OwnedPartition | None = None

    def run(self, done: Callable[[], bool], starts_max: int = 50) -> None:
        while not done() and self.starts < starts_max:
            self.starts += 1
            ended = threading.Event()

            def on_fatal(error: BaseException, ended: threading.Event = ended) -> None:
                self.failures.append(error)
                ended.set()

            settings = WorkerSettings(commit_interval_ms=1)
            loop = WorkerLoop(
                self._make,
                log=self.log,
                clock=self.log.clock,
                settings=settings,
                on_fatal=on_fatal,
                transaction_timeout_ms=int(TIMEOUT_S * 1000),
                metrics=self.metrics,
            )
            loop.assign([0])
            loop.start()
            wait_until(lambda ended=ended: done() or ended.is_set(), "the end", 60)
            loop.stop(60)

    def _make(self, number: int) -> OwnedPartition:
        self.partition = new_partition(number, self.log, self.stores, self.log.clock, metrics=self.metrics)
        return self.partition

    @property
    def committed(self) -> int:
        return 0 if self.partition is None else self.partition.task.position.next_offset

    def total(self) -> dict[str, float]:
        with closing(self.stores.open(0)) as store:
            return series_of(store)


def fill(log: SlowLog, batches: int, entries: int) -> dict[str, float]:
    """Append batches of one producer, each of the same series, and return the sums."""
    names = [f"s{number}" for number in range(batches * entries)]
    for sequence in range(batches):
        mine = names[sequence * entries : (sequence + 1) * entries]
        group = Group(VIEW, [series_suffix((name,)) for name in mine], [1] * len(mine))
        batch = encode_batch(Batch("p", 0, 0, sequence, 0, log.clock.now_ms(), [group]))
        log.append([Message(DELTAS, 0, None, batch)], timeout_s=1)
    return dict.fromkeys(names, 1)


@pytest.mark.parametrize("per_message_s", [0.1, 0.01, 1.0])
def test_a_backlog_that_fits_no_commit_is_folded(per_message_s: float) -> None:
    """Two hundred batches, too many for one commit in time, are committed in parts: none fails, and all count once."""
    clock = RunningClock()
    log = SlowLog(clock, per_message_s)
    right = fill(log, 200, 5)
    worker = Supervised(log)
    worker.run(lambda: worker.committed == 200)
    assert worker.total() == right
    assert not worker.failures
    assert worker.metrics.of(m.COMMIT_BOUND, 0) < TIMEOUT_S / per_message_s


def test_a_log_that_becomes_slow_at_once_ends_one_worker() -> None:
    """A commit that was sized before the log became slow fails; the next start begins small, and gets through."""
    log = SlowLog(RunningClock(), 0.000_01)
    right = fill(log, 60, 100)
    log.slower_at = (4, 0.05)
    worker = Supervised(log)
    worker.run(lambda: worker.committed == 60)
    assert log.commits[3] * 0.05 > TIMEOUT_S, log.commits
    assert [type(error) for error in worker.failures] == [Unavailable]
    assert worker.starts == 2
    assert worker.total() == right


def test_a_batch_that_is_too_large_alone_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """The log says which limit to raise for a batch that is too large by itself, once for each try."""
    clock = RunningClock()
    log = SlowLog(clock, 1.0)
    fill(log, 1, 100)
    worker = Supervised(log)
    with caplog.at_level(logging.ERROR):
        worker.run(lambda: worker.committed == 1, starts_max=3)
    assert len(worker.failures) == 3
    assert caplog.text.count("a single batch can't be made smaller") == 3
    assert "transaction_timeout_ms" in caplog.text
    log.per_message_s = 0.1
    worker.run(lambda: worker.committed == 1)
    assert len(worker.total()) == 100
