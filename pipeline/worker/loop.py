"""Runs the partitions of one process: restores, reads, folds, commits on time, and ends the process when a commit fails.

One thread reads and folds. Small pools restore partitions and carry commits out, so that folding goes on meanwhile.
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
from pipeline.worker.away import Away
from pipeline.worker.follower import Progress
from pipeline.worker.partition import Partition

_log = logging.getLogger(__name__)
_LOOK_S = 0.1
"""How often a wait for commits or for restores looks up."""
_DISCOVER_S = 0.5


class WorkerLoop:
    """Folds partitions until it is told to stop.

    `discover` returns the partitions that have come into being since it was last asked, if there can be such. `on_fatal` is
    called once, from the loop's thread, when the loop can't go on: a commit failed, or records are lost. Whoever owns the
    process must then end it with exit code 3; nothing that was not committed has been acknowledged.
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
        discover: Callable[[], Sequence[Partition]] = lambda: (),
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._partitions: dict[int, Partition] = {}
        """Those that fold."""
        self._to_start = [*partitions]
        self._starting: dict[Future[None], Partition] = {}
        self._log = log
        self._clock = clock
        self._settings = settings
        self._on_fatal = on_fatal
        self._on_progress = on_progress
        self._discover = discover
        self._metrics = metrics
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pipeline-worker", daemon=True)
        self._commits: dict[Future[Commit], Partition] = {}
        self._deadlines: dict[Future[Commit], float] = {}
        self._stuck = False
        self._due: dict[int, float] = {}
        self._next_commit_s = 0.0
        """When `transactions_per_s_max` allows the next commit."""
        self._away = Away(_log, clock, self._stop, "the log is away")

    @property
    def ready(self) -> bool:
        """Whether every partition that there was at the start is restored and folding."""
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
        starters = ThreadPoolExecutor(self._settings.restore_thread_count, thread_name_prefix="pipeline-restore")
        try:
            self._begin_starts(starters)
            reader = self._log.reader(DELTAS)
            try:
                self._fold_until_stopped(reader, pool, starters)
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
            self._stop.set()  # ends the restores that are under way
            starters.shutdown(wait=True, cancel_futures=True)
            # Who waits for a commit that hangs, hangs too; and what it works in must not be closed under it.
            pool.shutdown(wait=not self._stuck, cancel_futures=True)
            if not self._stuck:
                self._close_partitions()

    def _close_partitions(self) -> None:
        for partition in [*self._partitions.values(), *self._starting.values(), *self._to_start]:
            try:
                partition.close()
            except PipelineError as error:
                _log.error("closing partition %d: %s", partition.number, error)

    # Restoring

    def _begin_starts(self, starters: ThreadPoolExecutor) -> None:
        while self._to_start:
            partition = self._to_start[0]
            self._starting[starters.submit(partition.start, self._progress, self._stop.is_set)] = partition
            del self._to_start[0]

    def _finish_starts(self, reader: LogReader) -> None:
        """Begin to fold the partitions that are restored."""
        done = [future for future in self._starting if future.done()]
        for future in done:
            future.result()
            partition = self._starting.pop(future)
            self._partitions[partition.number] = partition
        if done:
            self._assign(reader)
        if not self._starting:
            self._ready.set()

    def _assign(self, reader: LogReader) -> None:
        while not self._stop.is_set():
            try:
                reader.assign({number: partition.task.next_offset for number, partition in self._partitions.items()})
                return
            except Unavailable as error:
                self._away.wait(error)

    def _progress(self, progress: Progress) -> None:
        self._metrics.set(m.RESTORE_REMAINING, progress.remaining, progress.partition)
        self._on_progress(progress)

    # Folding

    def _fold_until_stopped(self, reader: LogReader, pool: ThreadPoolExecutor, starters: ThreadPoolExecutor) -> None:
        settings = self._settings
        next_look_s = 0.0
        while not self._stop.is_set():
            if self._starting:
                if not self._partitions:
                    wait(self._starting, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
                self._finish_starts(reader)
            try:
                fetched = reader.poll(
                    record_count_max=settings.fetch_record_count_max,
                    bytes_max=settings.fetch_bytes_max,
                    timeout_s=self._poll_timeout_s() if self._partitions else 0.0,
                )
            except Unavailable as error:
                self._away.wait(error)
                fetched = []
            for records in fetched:
                partition = self._partitions[records.partition]
                partition.fold(records)
                if partition.task.full:
                    self._metrics.inc(m.OVERLAY_FULL, 1, partition.number)
                    self._commit_now(partition, pool)
            self._finish_commits()
            self._begin_due_commits(pool)
            if self._clock.monotonic_s() >= next_look_s:
                next_look_s = self._clock.monotonic_s() + _DISCOVER_S
                self._to_start += self._discover()
                self._begin_starts(starters)
        for partition in self._partitions.values():
            if partition.task.dirty:
                self._commit_now(partition, pool)
        self._wait_for(list(self._commits))

    def _poll_timeout_s(self) -> float:
        """Until the next commit is due; short while commits are under way, so that their end is noticed."""
        if self._commits:
            return 0.002
        due_s = max(min(self._due.values(), default=1e9), self._next_commit_s)
        wait_s = due_s - self._clock.monotonic_s()
        return min(max(wait_s, 0.0), self._settings.commit_interval_ms / 1000, _LOOK_S)

    def _begin_due_commits(self, pool: ThreadPoolExecutor) -> None:
        now = self._clock.monotonic_s()
        busy = {partition.number for partition in self._commits.values()}
        for number, partition in self._partitions.items():
            if number not in busy and partition.task.dirty:
                self._due.setdefault(number, now + self._settings.commit_interval_ms / 1000)
        # The longest due first: at `transactions_per_s_max` every partition has its turn.
        for number, due_s in sorted(self._due.items(), key=lambda item: item[1]):
            if now < max(due_s, self._next_commit_s):
                break
            if number not in busy:
                self._begin_commit(self._partitions[number], pool)

    def _begin_commit(self, partition: Partition, pool: ThreadPoolExecutor) -> None:
        self._due.pop(partition.number, None)
        started = self._clock.monotonic_s()
        self._next_commit_s = max(self._next_commit_s + 1 / self._settings.transactions_per_s_max, started - _LOOK_S)
        commit = partition.prepare()

        def make_durable() -> Commit:
            partition.make_durable(commit)
            self._metrics.observe(m.COMMIT_SECONDS, self._clock.monotonic_s() - started)
            return commit

        future = pool.submit(make_durable)
        self._commits[future] = partition
        self._deadlines[future] = started + self._settings.commit_timeout_ms / 1000 + _LOOK_S

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
