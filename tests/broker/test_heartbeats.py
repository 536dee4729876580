"""A worker that has much to do stays in its group: its heartbeats are threads of the same Python."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.settings import KafkaSettings
from tests.bench.heartbeat import latest_ms
from tests.bench.workers import store
from tests.broker.inside import worker_at
from tests.broker.kafka import App, create_topics
from tests.support import LONG, wait_until

ENTRIES = 1_000_000 if LONG else 300_000
SESSION_MS = 6_000
"""Shortest session that brokers allow."""


@pytest.mark.timeout(180)
def test_a_member_that_restores_many_entries_stays_one(app: App, tmp_path: Path) -> None:
    """The generation is the same after the restore, and no thread waited for half a session."""
    create_topics(app.bootstrap, app.app, 1)
    log = KafkaLog(parse_url(app.url), KafkaSettings(), SystemClock())
    store(log, app.app, 0, ENTRIES)
    log.close()
    errors: list[BaseException] = []
    worker = worker_at(app, tmp_path / "worker", errors=errors, name="one", session_timeout_ms=SESSION_MS)
    assigned: list[tuple[float, int]] = []
    assign = worker._loop.assign

    def noting(actives: frozenset[int], standbys: frozenset[int] = frozenset(), generation: int = 0) -> None:
        assigned.append((time.monotonic(), generation))
        assign(actives, standbys, generation)

    worker._loop.assign = noting  # type: ignore[method-assign, assignment]

    def restore() -> None:
        worker.start()
        wait_until(lambda: worker.ready or errors, "the restore", 120)

    try:
        late_ms = latest_ms(restore)
        took_s = time.monotonic() - assigned[0][0]
        (partition,) = worker.status().partitions
        wait_until(lambda: time.monotonic() - assigned[0][0] > SESSION_MS / 1000 + 1 or errors, "the session to pass", 30)
        assert not errors
        assert len({generation for _, generation in assigned}) == 1, assigned
        assert partition.phase == "folding"
        assert worker._loop.partitions[0].store.get([b"\xff"]) != [None]
        print(f"restored {ENTRIES:,} entries in {took_s:.1f} s; a thread was {late_ms:.0f} ms late at most")
        assert late_ms < SESSION_MS / 2
    finally:
        worker.stop()
