"""A query server of a Kafka log, which can be a gateway too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

from pipeline.adapters.kafka.checks import CompactionLag
from pipeline.core.answer import Status
from pipeline.errors import Invalid
from pipeline.ingest.gateway import Gateway
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Ingest, ReadableStore
from pipeline.query.dead_letters import DeadLetters
from pipeline.query.ends import EndsPolled
from pipeline.query.reader import ViewReader
from pipeline.query.stored_state import StoredState, find_definition, find_definitions
from pipeline.roles.kafka_role import KafkaRole, check_partitions
from pipeline.settings import KafkaSettings, LogSettings, PublisherSettings, QuerySettings, WorkerSettings
from pipeline.topics import DELTAS
from pipeline.worker.replicas import ReplicaLoop
from pipeline.worker.restore import RestoreProgress
from pipeline.worker.watchdog import CALLS_OF_A_STEP, WAIT_S, Watchdog


class ClusterServer(KafkaRole):
    """Answers reads from stores that follow the changelog. Any number can run, each with a data directory of its own.

    With `ingest` it is a gateway too. With `partitions` it follows only these, and has no stores of others. `start` returns
    at once. Raises as `ClusterWorker` does.
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
        partitions: Collection[int] | None = None,
        metrics: Metrics = NO_METRICS,
        on_fatal: Callable[[BaseException], None] = lambda _: None,
        on_progress: Callable[[RestoreProgress], None] = lambda _: None,
    ) -> None:
        publisher, query = publisher_settings or PublisherSettings(), query_settings or QuerySettings()
        worker = worker_settings or WorkerSettings()
        kafka = kafka_settings or KafkaSettings()
        self._series_max = worker.series_max
        if ingest and partitions is not None:
            raise Invalid("--ingest and --partitions: a gateway checks what it takes against the state of all partitions")
        super().__init__(url, log_settings, kafka, publisher, on_fatal)
        lag_max_s = CompactionLag(self.log, query.compaction_lag_ms)
        followed = None if partitions is None else frozenset(partitions)
        try:
            check_partitions(followed or (), self.partition_count)
            lag_max_s.check()
        except BaseException:
            self._close()
            raise
        self._replicas = ReplicaLoop(
            log=self.log,
            stores=self._stores,
            clock=self.clock,
            settings=worker,
            delete_retention_ms=self._delete_retention_ms,
            on_fatal=self._fail,
            on_progress=on_progress,
            ask_lag_max_s=lag_max_s,
            metrics=metrics,
            partitions=followed,
        )
        self._ends = self._poll_ends(query.end_offsets_interval_ms, followed, metrics)
        self._watchdog = Watchdog(
            lambda: (-1.0, {}),  # it folds nothing: only threads can stand still
            lambda _: {},
            clock=self.clock,
            stall_timeout_ms=worker.stall_timeout_ms,
            commit_timeout_ms=worker.commit_timeout_ms,
            on_fatal=self._fail,
            threads=[self._ends.thread],
            silent_s=max(WAIT_S, CALLS_OF_A_STEP * kafka.kafka_timeout_ms / 1000),
            metrics=metrics,
        )
        self.reader = ViewReader(
            stores=self._replicas.stores,
            ends=self._ends,
            clock=self.clock,
            settings=query,
            metrics=metrics,
            on_damage=self._replicas.distrust,
        )
        self.ingest: Ingest | None = None
        if ingest:
            self.ingest = self._gateway(publisher, worker, query.idempotent_partitions, metrics)

    def _poll_ends(self, interval_ms: int, followed: frozenset[int] | None, metrics: Metrics) -> EndsPolled:
        return EndsPolled(
            partial(self.log.high_watermarks, DELTAS),
            partial(self.log.start_offsets, DELTAS),
            self.clock,
            interval_ms=interval_ms,
            source_id=partial(self.log.topic_id, DELTAS),
            metrics=metrics,
            partitions=followed,
            partition_count=self.partition_count,
        )

    def _gateway(self, settings: PublisherSettings, worker: WorkerSettings, partitions: int, metrics: Metrics) -> Gateway:
        return Gateway(
            self.log,
            self.clock,
            settings,
            partial(find_definition, self.reader),
            metrics,
            limits=worker.task_limits(),
            facts=StoredState(self.stores),
            idempotent_partitions=partitions,
            definitions_of=partial(find_definitions, self.reader),
        )

    @property
    def letters(self) -> DeadLetters:
        """Dead letters of the log."""
        return DeadLetters(self.log, self.clock)

    @property
    def ready(self) -> bool:
        """Return whether views can be read."""
        return self._replicas.ready

    def start(self) -> None:
        """Begin to follow."""
        self._ends.start()
        self._replicas.start()
        self._watchdog.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until views can be read, at most `timeout_s`; return whether they can."""
        return self._replicas.wait_ready(timeout_s)

    def stop(self) -> bool:
        """Close everything; return whether it was done in time. May be called twice."""
        self._watchdog.stop()
        self._ends.stop()
        self.log.close()
        done = self._replicas.stop()
        if done:
            self._close()
        return done

    def stores(self) -> Mapping[int, ReadableStore]:
        """Return the stores by partition; see `ReplicaLoop.stores`."""
        return self._replicas.stores()

    def status(self) -> Status:
        """Return what `/v1/status` shows; the reader adds how stale it is."""
        return Status(
            role="server",
            app=self.log.address.app,
            ready=self.ready,
            partition_count=self.log.partition_count(DELTAS),
            series_max=self._series_max,
            topic_id=self._ends().source_id,
            partitions=self._replicas.status(),
        )
