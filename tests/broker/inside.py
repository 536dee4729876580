"""The roles as objects of this process, for tests that need a broker but no processes of roles."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.codec import decode_states
from pipeline.core.kinds import KINDS
from pipeline.core.record import parse_suffix, prefix_end, split_key, view_prefix
from pipeline.metrics import Metric
from pipeline.ports import Store
from pipeline.roles.server import ClusterServer
from pipeline.roles.worker import ClusterWorker
from pipeline.settings import KafkaSettings, LogSettings, WorkerSettings
from tests.broker.kafka import App
from tests.support import wait_until

READY_S = 30.0


class Counted:
    """Counters, by metric name."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def inc(self, metric: Metric, amount: float = 1, *labels: object) -> None:
        with self._lock:
            self.counts[metric.name] += int(amount)

    def set(self, metric: Metric, value: float, *labels: object) -> None:
        pass

    def observe(self, metric: Metric, value: float, *labels: object) -> None:
        pass

    def forget(self, partition: int) -> None:
        pass

    def of(self, metric: Metric) -> int:
        """Return the value of a counter."""
        return self.counts[metric.name]


def _kafka(given: Mapping[str, Any] | None) -> KafkaSettings:
    return KafkaSettings(**{"metadata_refresh_ms": 100, "kafka": {"fetch.wait.max.ms": 10}, **(given or {})})


def worker_at(
    app: App,
    data: Path,
    *,
    errors: list[BaseException] | None = None,
    kafka: Mapping[str, Any] | None = None,
    name: str = "",
    **settings: Any,
) -> ClusterWorker:
    """Return a worker that is not started yet. Errors that end it go to `errors`."""
    return ClusterWorker(
        app.url,
        LogSettings(data=str(data)),
        kafka_settings=_kafka(kafka),
        worker_settings=WorkerSettings(**{"commit_interval_ms": 10, "mirror_interval_ms": 0, **settings}),
        name=name,
        metrics=Counted(),
        on_fatal=(errors if errors is not None else []).append,
    )


@contextmanager
def folding(app: App, data: Path, **settings: Any) -> Iterator[ClusterWorker]:
    """Run a worker that folds, and commit at the end what it folded. An error that ended it before is raised."""
    errors: list[BaseException] = []
    worker = worker_at(app, data, errors=errors, **settings)
    try:
        worker.start()
        wait_until(lambda: worker.wait_ready(0.05) or errors, "a worker that folds", READY_S)
        if errors:
            raise errors[0]
        yield worker
    finally:
        worker.stop()
    if errors:
        raise errors[0]


def wait_folded(worker: ClusterWorker) -> None:
    """Wait until everything that is in deltas now is committed."""
    ends = worker.log.end_offsets("deltas")
    wait_until(
        lambda: all(worker.partitions[number].task.position.next_offset >= end for number, end in ends.items()), "all folded"
    )


@contextmanager
def serving(
    app: App,
    data: Path,
    metrics: Counted | None = None,
    *,
    kafka: Mapping[str, Any] | None = None,
    ready: bool = True,
    **settings: Any,
) -> Iterator[ClusterServer]:
    """Run a server whose stores can be read; without `ready`, one that was just started."""
    errors: list[BaseException] = []
    server = ClusterServer(
        app.url,
        LogSettings(data=str(data)),
        kafka_settings=_kafka(kafka),
        worker_settings=WorkerSettings(**settings),
        metrics=metrics or Counted(),
        on_fatal=errors.append,
    )
    try:
        server.start()
        wait_until(lambda: not ready or server.wait_ready(0.05) or errors, "a server that answers", READY_S)
        if errors:
            raise errors[0]
        yield server
    finally:
        server.stop()


def sums(stores: Mapping[int, Store], view: str) -> dict[tuple[str, ...], Any]:
    """Return the series of a view of kind sum: the states of all partitions, added."""
    prefix = view_prefix(view)
    totals: Counter[tuple[str, ...]] = Counter()
    for store in stores.values():
        for key, value in store.snapshot().scan(prefix, prefix_end(prefix)):
            totals[parse_suffix(split_key(key)[2])[1]] += decode_states(KINDS["sum"], [value])[0]  # type: ignore[assignment]
    return dict(totals)
