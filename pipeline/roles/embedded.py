"""Everything of the embedded mode in one object: log, cleaner, stores, worker, reader and gateway on one data directory."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pipeline.topics as topics
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import DataDir
from pipeline.adapters.embedded.cleaner import END_OFFSET_MAX, Cleaner
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.adapters.rocks import RocksStores
from pipeline.adapters.totals_file import TotalsFile
from pipeline.core.answer import Status
from pipeline.errors import NotReady
from pipeline.ingest.gateway import Gateway
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Store
from pipeline.query.dead_letters import DeadLetters
from pipeline.query.ends import EndsNow
from pipeline.query.reader import ViewReader
from pipeline.query.stored_state import StoredState, find_definition, find_definitions
from pipeline.settings import LogSettings, PublisherSettings, QuerySettings, WorkerSettings
from pipeline.topics import CHANGELOG, DELTAS
from pipeline.worker.figures import partition_status
from pipeline.worker.loop import WorkerLoop
from pipeline.worker.partition import OwnedPartition
from pipeline.worker.restore import RestoreProgress


class Engine:
    """The whole pipeline in one process. `start` returns at once; `ready` turns true when all partitions are restored.

    `on_fatal` is called at most once, from any thread, with the error that ended the worker or the log: stop the engine then
    and end the process with `errors.exit_code`. Raises `Unavailable` if another process has the data directory, `Invalid` if
    it is no data directory, `LogCorrupt` if a part of the log is lost.
    """

    def __init__(
        self,
        log_settings: LogSettings,
        *,
        worker_settings: WorkerSettings | None = None,
        query_settings: QuerySettings | None = None,
        publisher_settings: PublisherSettings | None = None,
        metrics: Metrics = NO_METRICS,
        on_fatal: Callable[[BaseException], None] = lambda _: None,
        on_progress: Callable[[RestoreProgress], None] = lambda _: None,
    ) -> None:
        self.clock = SystemClock()
        self._on_fatal = on_fatal
        self._on_progress = on_progress
        self._fatal_once = threading.Lock()
        self._progress: dict[int, RestoreProgress] = {}
        self._data = DataDir(log_settings.data)
        described = topics.load()
        worker, query = worker_settings or WorkerSettings(), query_settings or QuerySettings()
        try:
            self.log = EmbeddedLog(
                self._data.log, described, log_settings, self.clock, metrics, self._fail, accept_loss=worker.accept_loss
            )
        except BaseException:
            self._data.close()
            raise
        self._series_max = worker.series_max
        counted_in = f"{self.log.topic_id(DELTAS)} {query.idempotent_partitions}"  # a repeat must come to the same partition
        self.totals = TotalsFile(self._data.totals, counted_in, self.clock.now_ms)
        self._cleaner = Cleaner(self.log, log_settings, self.clock, metrics, self._keep_from)
        self._stores = RocksStores(self._data.stores, log_settings, count=self.log.partition_count(DELTAS))
        self.partitions: Sequence[OwnedPartition] = [
            OwnedPartition(
                number,
                log=self.log,
                stores=self._stores,
                clock=self.clock,
                settings=worker,
                delete_retention_ms=described[CHANGELOG].delete_retention_ms,
                metrics=metrics,
            )
            for number in range(self.log.partition_count(DELTAS))
        ]
        self._loop = WorkerLoop(
            self.partitions.__getitem__,
            log=self.log,
            clock=self.clock,
            settings=worker,
            on_fatal=self._fail,
            on_progress=self._note_progress,
            metrics=metrics,
        )
        self._loop.assign(range(len(self.partitions)))
        self.reader = self._new_reader(query, metrics)
        self.ingest = Gateway(
            self.log,
            self.clock,
            publisher_settings or PublisherSettings(),
            partial(find_definition, self.reader),
            metrics,
            limits=worker.task_limits(),
            facts=StoredState(self.stores),
            idempotent_partitions=query.idempotent_partitions,
            definitions_of=partial(find_definitions, self.reader),
        )

    def _new_reader(self, settings: QuerySettings, metrics: Metrics) -> ViewReader:
        return ViewReader(
            stores=self.stores,
            ends=EndsNow(
                partial(self.log.high_watermarks, DELTAS),
                partial(self.log.start_offsets, DELTAS),
                self.clock,
                source_id=self.log.topic_id(DELTAS),
            ),
            clock=self.clock,
            settings=settings,
            metrics=metrics,
            on_damage=self._loop.distrust,
        )

    @property
    def letters(self) -> DeadLetters:
        """Dead letters of the log."""
        return DeadLetters(self.log, self.clock)

    @property
    def ready(self) -> bool:
        """Return whether every partition is restored and folding; False again while a damaged store is rebuilt."""
        return self._loop.ready

    def start(self) -> None:
        """Begin to restore, then to fold."""
        atexit.register(self.stop)  # a thread that is in RocksDB when the interpreter ends would abort the process
        self._cleaner.start()
        self._loop.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until `ready`, at most `timeout_s`; return whether it is."""
        return self._loop.wait_ready(timeout_s)

    def stop(self) -> bool:
        """Commit what is folded and close everything; return whether it was done in time. May be called twice."""
        atexit.unregister(self.stop)
        done = self._loop.stop()
        if done:  # a thread that still works in RocksDB needs it open; the process is about to end anyway
            self._cleaner.stop()
            self._stores.close()
            self.log.close()
            self.totals.close()
            self._data.close()
        return done

    def stores(self) -> Mapping[int, Store]:
        """The stores, by partition, each at a commit boundary; `NotReady` while any is being restored."""
        if not self.ready:
            remaining = sum(progress.remaining for progress in self._progress.values())
            raise NotReady(f"restoring: about {remaining} changelog records to go")
        return {partition.number: partition.store for partition in self.partitions}

    def status(self) -> Status:
        """Return what `/v1/status` shows; the reader adds how stale it is."""
        return Status(
            at_ms=self.clock.now_ms(),
            ready=self.ready,
            partition_count=len(self.partitions),
            series_max=self._series_max,
            topic_id=self.log.topic_id(DELTAS),
            partitions=[
                partition_status(it, self.log.watermarks(DELTAS, it.number).end_offset, self._progress.get(it.number))
                for it in self.partitions
            ],
        )

    def _keep_from(self, topic: str, partition: int) -> int:
        """Return the offset from which retention must keep records: deltas that are not in the state yet, however old."""
        if topic != DELTAS:
            return END_OFFSET_MAX
        return self.partitions[partition].task.position.next_offset if self.ready else 0

    def _note_progress(self, progress: RestoreProgress) -> None:
        self._progress[progress.partition] = progress
        self._on_progress(progress)

    def _fail(self, error: BaseException) -> None:
        if self._fatal_once.acquire(blocking=False):
            self._on_fatal(error)
