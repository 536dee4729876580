"""The schedule of commits: when the next commit of a partition is due."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.core.commit import Counts
from pipeline.core.record import Records
from pipeline.metrics import NO_METRICS
from pipeline.settings import WorkerSettings
from pipeline.worker.active import ActivePartition
from pipeline.worker.commits import Commits
from tests.support import HandClock


class _Scheduled:
    """One partition by a clock that stands still, and the schedule of its commits, with an interval of 100 ms."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.task = SimpleNamespace(dirty=False, full=False, counts=Counts(), next_offset=1)
        partition: Any = SimpleNamespace(
            number=0, task=self.task, needs_commit=lambda *_: False, finish=lambda _: None, fold=self._fold
        )
        self.active = ActivePartition(partition, 10.0)
        self.active.end_start()
        settings = WorkerSettings(commit_interval_ms=100)
        self.commits = Commits(self.clock, settings, NO_METRICS, time_max_s=10.0, lost=lambda *_: False)
        self.under_way: Future[Any] = Future()
        self.active.begin_commit(self.under_way)
        assert not self.commits.begin([self.active])
        assert self.active.due_s is None, "nothing was folded since the freeze"

    def _fold(self, _: Records) -> None:
        self.task.dirty = True

    def fold(self) -> float:
        """Fold something while the commit is under way; return when the next commit is due by the interval."""
        self.active.take(Records(0, [0], [0], [None], [b""], 1))
        assert self.active.fold()
        assert not self.commits.begin([self.active])
        return self.clock.s + 0.1

    def end_commit(self) -> None:
        self.under_way.set_result(None)
        actives: Any = SimpleNamespace(all={0: self.active})
        self.commits.finish(actives)
        assert not self.active.is_committing


def test_the_interval_begins_when_something_is_folded() -> None:
    """Records that are folded during a commit wait `commit_interval_ms` for the next one, not that long after its end."""
    it = _Scheduled()
    it.clock.s += 0.02
    due_s = it.fold()
    it.clock.s += 0.05
    assert not it.commits.begin([it.active])
    assert it.active.due_s == due_s
    it.end_commit()
    assert not it.commits.begin([it.active])
    assert it.active.due_s == due_s
    it.task.dirty = False
    assert not it.commits.begin([it.active])
    assert it.active.due_s is None, "there is nothing to commit after all"
    it.commits.shutdown()


@pytest.mark.parametrize("asked", [False, True])
def test_a_commit_leaves_kafka_time_for_its_markers(asked: bool) -> None:
    """A commit that is due at the end of the last one waits 5 ms for Kafka's markers; one that was asked for does not."""
    it = _Scheduled()
    it.fold()
    it.clock.s += 0.3
    if asked:
        it.active.flush()
    it.end_commit()
    assert it.active.is_urgent is asked
    assert it.active.due_s is not None
    assert asked or it.active.due_s == it.clock.s + 0.005
    it.commits.shutdown()
