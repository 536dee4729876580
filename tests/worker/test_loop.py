"""The worker's loop when a commit goes wrong: it ends, says why, and never goes on."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.memory import MemoryLog, MemoryStores
from pipeline.errors import PipelineError, Unavailable
from pipeline.ports import Message, Transaction
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.loop import WorkerLoop
from pipeline.worker.partition import Partition


class _Hanging:
    """A transaction that waits for `release`, as one does whose disk has gone."""

    def __init__(self, inner: Transaction, release: threading.Event) -> None:
        self._inner = inner
        self._release = release

    def commit(self, messages: Sequence[Message], *, timeout_s: float) -> list[int]:
        self._release.wait(60)
        return self._inner.commit(messages, timeout_s=timeout_s)

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
    partition = Partition(0, log=log, stores=MemoryStores(), clock=clock, settings=settings, delete_retention_ms=86_400_000)

    def on_fatal(error: BaseException) -> None:
        errors.append(error)
        failed.set()

    loop = WorkerLoop([partition], log=log, clock=clock, settings=settings, on_fatal=on_fatal)
    loop.start()
    try:
        log.append([Message(DELTAS, 0, None, b"junk")], timeout_s=1)
        assert failed.wait(30)
        assert isinstance(errors[0], Unavailable)
        assert "commit_timeout_ms" in str(errors[0])
        assert not loop.ready
        assert not loop.stop(10), "what a hanging commit works in must not be closed"
        assert log.watermarks(CHANGELOG, 0).end_offset == 0
    finally:
        release.set()


def test_a_commit_that_fails_ends_the_worker_once() -> None:
    """Whatever a commit raises, the loop reports it once and folds no more."""
    errors: list[BaseException] = []
    failed = threading.Event()
    clock = SystemClock()
    log = MemoryLog({DELTAS: 1, CHANGELOG: 1, DEAD_LETTERS: 1}, clock.now_ms)
    settings = WorkerSettings(commit_interval_ms=1)
    partition = Partition(0, log=log, stores=MemoryStores(), clock=clock, settings=settings, delete_retention_ms=86_400_000)
    loop = WorkerLoop(
        [partition], log=log, clock=clock, settings=settings, on_fatal=lambda error: (errors.append(error), failed.set())
    )
    loop.start()
    assert loop.wait_ready(30)
    log.transaction("pipeline-0")  # a newer owner
    log.append([Message(DELTAS, 0, None, b"junk")], timeout_s=1)
    assert failed.wait(30)
    assert loop.stop(10)
    assert [type(error).__name__ for error in errors] == ["Fenced"]
    assert isinstance(errors[0], PipelineError)
    assert log.watermarks(CHANGELOG, 0).end_offset == 0
