"""A worker that stands still on a real broker ends itself; one whose broker does not answer waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pipeline.metrics as m
from pipeline import Publisher
from pipeline.errors import Stalled
from tests.broker.inside import Counted, folding, wait_folded, worker_at
from tests.broker.kafka import App, create_topics
from tests.support import wait_until

pytestmark = pytest.mark.timeout(120)


def test_a_fold_that_hangs_ends_the_worker(app: App, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The worker logs where it hangs, and stops without waiting for the hanging thread."""
    create_topics(app.bootstrap, app.app, 2)
    errors: list[BaseException] = []
    worker = worker_at(app, tmp_path / "worker", errors=errors, stall_timeout_ms=3_000)
    release = threading.Event()

    def hang_here(fold: Callable[[Any], Any], records: Any) -> Any:
        release.wait(100)
        return fold(records)  # else the loop, which is told to stop between folds, would try again for ever

    try:
        worker.start()
        assert worker.wait_ready(30)
        for partition in worker.partitions.values():
            partition.fold = partial(hang_here, partition.fold)  # type: ignore[method-assign]
        with Publisher(app.url) as publisher:
            publisher.sum("v").add(1)
        wait_until(lambda: errors, "the end", 30)
        assert [type(error) for error in errors] == [Stalled]
        assert isinstance(worker._metrics, Counted)
        assert worker._metrics.of(m.STALLS) == 1
        assert "hang_here" in caplog.text
        began_s = time.monotonic()
        assert not worker.stop()
        assert time.monotonic() - began_s < 60
    finally:
        release.set()
        assert worker._loop.stop(30)


def test_a_worker_that_is_restored_and_idle_is_let_alone(app: App, tmp_path: Path) -> None:
    """A restored or idle worker runs on for longer than the timeout, before and after it has folded."""
    create_topics(app.bootstrap, app.app, 2)
    with folding(app, tmp_path / "worker", stall_timeout_ms=1_000) as worker:
        for _ in range(2):
            with Publisher(app.url) as publisher:
                publisher.sum("v").add(1)
            wait_folded(worker)
            answered_s = worker._mirror.last_answer[0]
            wait_until(
                lambda answered_s=answered_s: worker._mirror.last_answer[0] > answered_s + 2, "the log to tell its ends"
            )
        assert not worker._watchdog.stalled
