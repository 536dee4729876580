"""Runs the partitions of one process: reads, folds, commits on time, and ends the process when a commit fails.

One thread reads and folds; a small pool carries commits out, so that folding goes on while one is under way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import pipeline.metrics as m
from pipeline.core.task import Commit
from pipeline.errors import NotReady, PipelineError, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, Log, LogReader
from pipeline.settings import WorkerSettings
from pipeline.topics import DELTAS
from pipeline.worker.follower import Progress
from pipeline.worker.partition import Partition

_log = logging.getLogger(__name__)
_LOOK_S = 0.1
"""How often a wait for commits looks at their deadlines."""


class WorkerLoop:
    """Folds partitions until it is told to stop.

    `on_fatal` is called once, from the loop's thread, when the loop can't go on: a commit failed, or records are lost.
    Whoever owns the process must then end it with exit code 3; nothing that was not committed has been acknowledged.
    """

    def __init__(
        self,
        partitions: Sequence[Partition],
        *,
        log: Log,
        clock: Clock,
        settings: WorkerSettings,
        on_fatal: Callable[[BaseException], None],
        on_progress: Callable[[Progress], None] = lambda _: None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._partitions = {partition.number: partition for partition in partitions}
        self._log = log
        self._clock = clock
        self._settings = settings
        self._on_fatal = on_fatal
        self._on_progress = on_progress
        self._metrics = metrics
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pipeline-worker", daemon=True)
        self._commits: dict[Future[Commit], Partition] = {}
        self._deadlines: dict[Future[Commit], float] = {}
        self._stuck = False
        self._due: dict[int, float] = {}

    @property
    def ready(self) -> bool:
        """Whether every partition is restored and folding."""
        return self._ready.is_set()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until `ready`, or for so long."""
        return self._ready.wait(timeout_s)

    def start(self) -> None:
        """Begin in a thread of its own: restore first, then fold."""
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> bool:
        """Commit what is folded and end; whether that was done in time. May be called twice."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive() and not self._stuck

    def _run(self) -> None:
        pool = ThreadPoolExecutor(self._settings.commit_thread_count, thread_name_prefix="pipeline-commit")
        try:
            for partition in self._partitions.values():
                partition.start(self._progress, self._stop.is_set)
            self._ready.set()
            reader = self._log.reader(DELTAS)
            try:
                self._fold_until_stopped(reader, pool)
            finally:
                reader.close()
        except BaseException as error:  # whatever it was: never acknowledge and go on
            if isinstance(error, NotReady) and self._stop.is_set():
                _log.info("stopped: %s", error)
            else:
                _log.critical("the worker ends: %s", error, exc_info=not isinstance(error, PipelineError))
                self._on_fatal(error)
        finally:
            self._ready.clear()
            # Who waits for a commit that hangs, hangs too; and what it works in must not be closed under it.
            pool.shutdown(wait=not self._stuck, cancel_futures=True)
            if not self._stuck:
                self._close_partitions()

    def _close_partitions(self) -> None:
        for partition in self._partitions.values():
            try:
                partition.close()
            except PipelineError as error:
                _log.error("closing partition %d: %s", partition.number, error)

    def _progress(self, progress: Progress) -> None:
        self._metrics.set(m.RESTORE_REMAINING, progress.remaining, progress.partition)
        self._on_progress(progress)

    def _fold_until_stopped(self, reader: LogReader, pool: ThreadPoolExecutor) -> None:
        settings = self._settings
        reader.assign({number: partition.task.next_offset for number, partition in self._partitions.items()})
        while not self._stop.is_set():
            try:
                fetched = reader.poll(
                    record_count_max=settings.fetch_record_count_max,
                    bytes_max=settings.fetch_bytes_max,
                    timeout_s=self._poll_timeout_s(),
                )
            except Unavailable as error:
                _log.warning("the log is away: %s", error)
                self._stop.wait(0.2)
                fetched = []
            for records in fetched:
                partition = self._partitions[records.partition]
                partition.fold(records)
                if partition.task.full:
                    self._metrics.inc(m.OVERLAY_FULL, 1, partition.number)
                    self._commit_now(partition, pool)
            self._finish_commits()
            self._begin_due_commits(pool)
        for partition in self._partitions.values():
            if partition.task.dirty:
                self._commit_now(partition, pool)
        self._wait_for(list(self._commits))

    def _poll_timeout_s(self) -> float:
        """Until the next commit is due; short while commits are under way, so that their end is noticed."""
        if self._commits:
            return 0.002
        wait_s = min(self._due.values(), default=1e9) - self._clock.monotonic_s()
        return min(max(wait_s, 0.0), self._settings.commit_interval_ms / 1000, 0.1)

    def _begin_due_commits(self, pool: ThreadPoolExecutor) -> None:
        now = self._clock.monotonic_s()
        busy = {partition.number for partition in self._commits.values()}
        for number, partition in self._partitions.items():
            if number in busy or not partition.task.dirty:
                continue
            due = self._due.setdefault(number, now + self._settings.commit_interval_ms / 1000)
            if now >= due:
                self._begin_commit(partition, pool)

    def _begin_commit(self, partition: Partition, pool: ThreadPoolExecutor) -> None:
        self._due.pop(partition.number, None)
        started = self._clock.monotonic_s()
        commit = partition.prepare()

        def make_durable() -> Commit:
            partition.make_durable(commit)
            self._metrics.observe(m.COMMIT_SECONDS, self._clock.monotonic_s() - started)
            return commit

        future = pool.submit(make_durable)
        self._commits[future] = partition
        self._deadlines[future] = started + self._settings.commit_timeout_ms / 1000

    def _finish_commits(self) -> None:
        for future in [future for future in self._commits if future.done()]:
            del self._deadlines[future]
            self._commits.pop(future).finish(future.result())
        if self._deadlines and self._clock.monotonic_s() > min(self._deadlines.values()):
            self._stuck = True
            raise Unavailable(f"a commit is undecided after {self._settings.commit_timeout_ms} ms (commit_timeout_ms)")

    def _wait_for(self, futures: list[Future[Commit]]) -> None:
        while futures:
            wait(futures, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
            self._finish_commits()
            futures = [future for future in futures if future in self._commits]

    def _commit_now(self, partition: Partition, pool: ThreadPoolExecutor) -> None:
        """Backpressure: nothing more is read until this partition's overlay is empty."""
        self._wait_for([future for future, owner in self._commits.items() if owner is partition])
        self._begin_commit(partition, pool)
        self._wait_for([future for future, owner in self._commits.items() if owner is partition])
