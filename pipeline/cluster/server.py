"""A query server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pipeline.cluster.role import Role
from pipeline.core.record import Definition
from pipeline.errors import NotFound
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Ingest, ReadableStore
from pipeline.producer.gateway import Gateway
from pipeline.query.ends import EndsPolled
from pipeline.query.reader import ViewReader
from pipeline.settings import KafkaSettings, LogSettings, PublisherSettings, QuerySettings, WorkerSettings
from pipeline.topics import DELTAS
from pipeline.worker.follower import Progress
from pipeline.worker.replica import ReplicaLoop


class ClusterServer(Role):
    """Answers from stores that follow the changelog of a Kafka log. As many as wanted, each with a data directory.

    With `ingest` it is a gateway too. `start` returns at once. Raises as `ClusterWorker` does.
    """

    def __init__(
        self,
        url: str,
        log_settings: LogSettings,
        *,
        kafka_settings: KafkaSettings | None = None,
        worker_settings: WorkerSettings | None = None,
        query_settings: QuerySettings | None = None,
        publisher_settings: PublisherSettings | None = None,
        ingest: bool = False,
        metrics: Metrics = NO_METRICS,
        on_fatal: Callable[[BaseException], None] = lambda _: None,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        publisher, query = publisher_settings or PublisherSettings(), query_settings or QuerySettings()
        super().__init__(url, log_settings, kafka_settings or KafkaSettings(), publisher, on_fatal)
        self._replicas = ReplicaLoop(
            log=self.log,
            stores=self._stores,
            clock=self.clock,
            settings=worker_settings or WorkerSettings(),
            delete_retention_ms=self._delete_retention_ms,
            on_fatal=self._fail,
            on_progress=on_progress,
            metrics=metrics,
        )
        self._ends = EndsPolled(
            partial(self.log.end_offsets, DELTAS),
            partial(self.log.start_offsets, DELTAS),
            self.clock,
            interval_ms=query.end_offsets_interval_ms,
            source_id=partial(self.log.topic_id, DELTAS),
        )
        self.reader = ViewReader(
            stores=self._replicas.stores, ends=self._ends, clock=self.clock, settings=query, metrics=metrics
        )
        self.ingest: Ingest | None = (
            Gateway(self.log, self.clock, publisher, self._definition_of, metrics) if ingest else None
        )

    @property
    def ready(self) -> bool:
        """Whether views can be read."""
        return self._replicas.ready

    def start(self) -> None:
        """Begin to follow."""
        self._ends.start()
        self._replicas.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until views can be read, or for so long."""
        return self._replicas.wait_ready(timeout_s)

    def stop(self) -> bool:
        """Close everything; whether it was done in time. Twice is fine."""
        self._ends.stop()
        self.log.close()
        done = self._replicas.stop()
        if done:
            self._close()
        return done

    def stores(self) -> Mapping[int, ReadableStore]:
        """The stores, by partition; see `ReplicaLoop.stores`."""
        return self._replicas.stores()

    def status(self) -> dict[str, Any]:
        """What `/v1/status` says of the process; the reader adds how stale it is."""
        return {
            "role": "server",
            "app": self.log.address.app,
            "ready": self.ready,
            "partition_count": self.log.partition_count(DELTAS),
            "partitions": self._replicas.status(),
        }

    def _definition_of(self, view: str) -> Definition | None:
        try:
            return self.reader.definition(view)
        except NotFound:
            return None
