"""The two roles on Kafka, each as one object: a worker, which folds, and a query server, which follows and answers.

What they share with the embedded mode (`engine`) is everything but the log and who has which partition.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pipeline.topics as topics
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import DataDir
from pipeline.adapters.kafka.log import KafkaLog, check_changelog, check_topics
from pipeline.adapters.kafka.options import parse_url
from pipeline.adapters.rocks import RocksStores
from pipeline.core.record import Definition
from pipeline.errors import Invalid, LogCorrupt, NotFound
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Ingest, ReadableStore
from pipeline.producer.gateway import Gateway
from pipeline.query.ends import EndsPolled
from pipeline.query.reader import ViewReader
from pipeline.settings import KafkaSettings, LogSettings, PublisherSettings, QuerySettings, WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.follower import Progress
from pipeline.worker.loop import WorkerLoop
from pipeline.worker.mirror import Mirror
from pipeline.worker.partition import Partition, partition_status
from pipeline.worker.replica import ReplicaLoop

_TOPICS = (DELTAS, CHANGELOG, DEAD_LETTERS)


class _Role:
    """What both roles have: a data directory, stores, a connection, and at most one report of what ended them."""

    def __init__(
        self,
        url: str,
        log_settings: LogSettings,
        kafka_settings: KafkaSettings,
        publisher_settings: PublisherSettings,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.clock = SystemClock()
        self._on_fatal = on_fatal
        self._fatal_once = threading.Lock()
        address = parse_url(url)
        self._data = DataDir(log_settings.data, with_log=False)
        try:
            self.log = KafkaLog(
                address, kafka_settings, self.clock, request_timeout_ms=publisher_settings.request_timeout_ms
            )
            self.partition_count = check_topics(self.log, _TOPICS)
            self._delete_retention_ms = check_changelog(self.log, topics.load()[CHANGELOG])
            self._stores = RocksStores(self._data.stores, log_settings)
        except BaseException:
            self._data.close()
            raise

    def _fail(self, error: BaseException) -> None:
        if self._fatal_once.acquire(blocking=False):
            self._on_fatal(error)

    def _close(self) -> None:
        self._stores.close()
        self._data.close()


class ClusterWorker(_Role):
    """Folds partitions of a Kafka log: all of them, those that are added later too, or the ones that are listed.

    Whoever is started later for a partition fences who had it before. `start` returns at once. `on_fatal` is called at most
    once, from any thread: stop then, and end the process with exit code 3. Raises `Unavailable` if no broker answers or
    another process has the data directory, `Invalid` if topics or settings are wrong.
    """

    def __init__(
        self,
        url: str,
        log_settings: LogSettings,
        *,
        kafka_settings: KafkaSettings | None = None,
        worker_settings: WorkerSettings | None = None,
        partitions: Sequence[int] | None = None,
        metrics: Metrics = NO_METRICS,
        on_fatal: Callable[[BaseException], None] = lambda _: None,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        super().__init__(url, log_settings, kafka_settings or KafkaSettings(), PublisherSettings(), on_fatal)
        self._worker = worker_settings or WorkerSettings()
        self._metrics = metrics
        self._on_progress = on_progress
        self._progress: dict[int, Progress] = {}
        self._listed = partitions
        numbers = range(self.partition_count) if partitions is None else sorted({*partitions})
        try:
            if unknown := [number for number in numbers if not 0 <= number < self.partition_count]:
                raise Invalid(f"there is no partition {unknown[0]}; topic deltas has {self.partition_count}")
            self._topic_ids = self._ask_topic_ids()
        except BaseException:
            self._close()
            raise
        self.partitions: dict[int, Partition] = {number: self._partition(number) for number in numbers}
        self._loop = WorkerLoop(
            [*self.partitions.values()],
            log=self.log,
            clock=self.clock,
            settings=self._worker,
            on_fatal=self._fail,
            on_progress=self._note_progress,
            discover=self._discover,
            metrics=metrics,
        )
        self._mirror = Mirror(
            self._positions,
            end_offsets=self._end_offsets,
            start_offsets=partial(self.log.start_offsets, DELTAS),
            commit=self.log.mirror_positions,
            clock=self.clock,
            interval_ms=self._worker.mirror_interval_ms,
            metrics=metrics,
        )

    def _partition(self, number: int) -> Partition:
        return Partition(
            number,
            log=self.log,
            stores=self._stores,
            clock=self.clock,
            settings=self._worker,
            delete_retention_ms=self._delete_retention_ms,
            app=self.log.address.app,
            metrics=self._metrics,
        )

    def _discover(self) -> Sequence[Partition]:
        if self._listed is not None:
            return ()
        count = min(self.log.partition_count(topic) for topic in _TOPICS)
        new = {number: self._partition(number) for number in range(count) if number not in self.partitions}
        self.partitions = {**self.partitions, **new}
        return [*new.values()]

    def _ask_topic_ids(self) -> Mapping[str, str]:
        return {topic: self.log.topic_id(topic) for topic in (DELTAS, CHANGELOG)}

    def _end_offsets(self) -> Mapping[int, int]:
        """Of deltas, each second. A topic made anew shows in nothing else if it has grown as long as the old one."""
        for topic, topic_id in self._ask_topic_ids().items():
            if self._topic_ids[topic] != topic_id:
                error = LogCorrupt(
                    f"topic {self.log.address.topic(topic)} was made anew while this worker ran: start it again"
                )
                self._fail(error)
                raise error
        return self.log.end_offsets(DELTAS)

    def _positions(self) -> dict[int, int]:
        return {number: it.task.position.next_offset for number, it in self.partitions.items() if it.started}

    @property
    def ready(self) -> bool:
        """Whether every partition is restored and folding."""
        return self._loop.ready

    def start(self) -> None:
        """Begin to fence, to restore, then to fold."""
        self._loop.start()
        self._mirror.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until `ready`, or for so long."""
        return self._loop.wait_ready(timeout_s)

    def stop(self) -> bool:
        """Commit what is folded, close everything; whether all of it was done in time. Twice is fine."""
        self._mirror.stop()
        done = self._loop.stop()
        self.log.close()
        if done:  # a thread that still works in RocksDB must not lose it: the process is about to end anyway
            self._close()
        return done

    def status(self) -> dict[str, Any]:
        """What `/v1/status` says."""
        ends = self._mirror.end_offsets
        return {
            "role": "worker",
            "app": self.log.address.app,
            "ready": self.ready,
            "partition_count": self.log.partition_count(DELTAS),
            "partitions": [
                partition_status(partition, ends.get(number), self._progress.get(number))
                for number, partition in self.partitions.items()
            ],
        }

    def _note_progress(self, progress: Progress) -> None:
        self._progress[progress.partition] = progress
        self._on_progress(progress)


class ClusterServer(_Role):
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
