"""Schedule of commits: each in time, partitions in turn, several at once, each within a deadline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import pipeline.metrics as m
from pipeline.core.commit import Commit
from pipeline.errors import PipelineError, StoreCorrupt, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock
from pipeline.settings import WorkerSettings
from pipeline.threads import POLL_INTERVAL_S, Failures
from pipeline.worker.active import ActivePartition, ActivePartitions

_log = logging.getLogger(__name__)
_MARKERS_S = 0.005
"""Seconds between a commit's end and the next one of the partition, unless that is urgent: Kafka still writes the markers of
the last transaction then, and librdkafka tries again after 20 ms if it comes too early (measured: 6 of 10 at once, 1 of 30
after 5 ms)."""
_HANG_S = 10.0
"""Seconds beyond its deadline for which a commit of a lost partition may hang in a thread that is needed."""


class Commits:
    """Commits of the partitions of one loop, whose thread calls everything here.

    `lost(active, error)` returns whether a commit's error only means that its partition is lost, and if so loses it.
    """

    def __init__(
        self,
        clock: Clock,
        settings: WorkerSettings,
        metrics: Metrics,
        *,
        time_max_s: float,
        lost: Callable[[ActivePartition, BaseException], bool],
    ) -> None:
        self.time_max_s = time_max_s
        """Seconds that a commit may take before it fails."""
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self._lost = lost
        self._failures = Failures(_log, "pipeline-commit", metrics)
        """Unexpected errors of partitions that are lost; they end nothing."""
        self._pool = ThreadPoolExecutor(settings.commit_thread_count, thread_name_prefix="pipeline-commit")
        self._under_way: set[Future[Commit]] = set()
        self.changelog_ends: tuple[float, Mapping[int, int]] = 0.0, {}
        """Time at which the ends of the changelog's partitions were last asked for, and the answer."""
        self.ended_s = 0.0
        """Time at which a commit was last found to have ended."""
        self._next_s = 0.0
        """Time from which `transactions_per_s_max` allows the next commit."""
        self.stuck = False
        """True once a thread hangs in a commit."""

    @property
    def under_way(self) -> bool:
        """True if there is a commit that has not been finished."""
        return bool(self._under_way)

    def wait(self, timeout_s: float) -> None:
        """Wait for a commit to end, or for so long."""
        if self._under_way:
            wait(self._under_way, timeout_s, FIRST_COMPLETED)

    def poll_timeout_s(self, folding: Iterable[ActivePartition]) -> float:
        """Return the time until the next commit is due; less while commits are under way, so that their end is noticed."""
        if self._under_way:
            return 0.002
        due_s = max(min((active.due_s for active in folding if active.due_s is not None), default=1e9), self._next_s)
        wait_s = due_s - self._clock.monotonic_s()
        return min(max(wait_s, 0.0), self._settings.commit_interval_ms / 1000, POLL_INTERVAL_S)

    def begin(self, folding: Sequence[ActivePartition]) -> bool:
        """Begin the commits that are due; return whether there were any. Urgent ones do not wait for their turn.

        A partition commits even if nothing was folded when others have written to its changelog: such a commit writes the
        covered entries anew, while this owner has them, and before compaction takes them out of the changelog. It also does
        when nobody can read its last commit.
        """
        now = self._clock.monotonic_s()
        idle = [active for active in folding if not active.is_committing]
        for active in folding:
            if not active.is_committing and active.needs_commit(self.changelog_ends):
                active.flush()
            else:  # also during a commit: what is folded meanwhile does not wait for longer than the interval because of it
                active.schedule(now + self._settings.commit_interval_ms / 1000)
        urgent = [active for active in idle if active.is_urgent]
        for active in urgent:
            self._begin(active)
        # Longest due first, so that every partition has its turn at `transactions_per_s_max`.
        due = sorted((it.due_s, it.number, it) for it in idle if not it.is_committing and it.due_s is not None)
        for count, (due_s, _, active) in enumerate(due):
            if now < max(due_s, self._next_s):
                return bool(urgent or count)
            self._begin(active)
        return bool(urgent or due)

    def _begin(self, active: ActivePartition) -> None:
        started = self._clock.monotonic_s()
        self._next_s = max(self._next_s + 1 / self._settings.transactions_per_s_max, started - POLL_INTERVAL_S)
        partition, clock = active.partition, self._clock
        entries, records = active.freeze(), partition.task.next_offset - partition.task.position.next_offset
        try:
            commit = partition.prepare()
        except StoreCorrupt as error:
            if self._lost(active, error):
                return
            raise

        def make_durable() -> Commit:
            begun_s = clock.monotonic_s()
            active.note_commit_begun(begun_s)
            try:
                partition.make_durable(commit)
            except PipelineError as error:
                self._log_size(active.number, error, entries, records, clock.monotonic_s() - begun_s)
                raise
            ended_s = clock.monotonic_s()
            active.bound.note(entries, ended_s - begun_s)
            self._metrics.observe(m.COMMIT_SECONDS, ended_s - started)
            self._metrics.set(m.COMMIT_BOUND, active.bound.entries_max, active.number)
            return commit

        work = self._pool.submit(make_durable)
        self._under_way.add(work)
        active.begin_commit(work)

    def _log_size(self, number: int, error: PipelineError, entries: int, records: int, took_s: float) -> None:
        """Log, for a commit that failed late, how large it was and what the operator can do."""
        if took_s < self.time_max_s / 2:
            return
        _log.error(
            "partition %d: a commit of %d records with %d entries failed after %.1f s, where commit_timeout_ms and "
            "transaction_timeout_ms allow %.1f s: %s; %s",
            number,
            records,
            entries,
            took_s,
            self.time_max_s,
            error,
            "the next start begins with a smaller one"
            if records > 1
            else "a single batch can't be made smaller: unless the log was away, raise both settings",
        )

    def finish(self, actives: ActivePartitions) -> None:
        """Note commits that are durable. Raises the error of one that failed, unless its partition is lost."""
        now = self._clock.monotonic_s()
        for active in [*actives.all.values()]:
            future = active.commit_future()
            if future is None:
                continue
            if not future.done():
                self._check_deadline(active, now)
                continue
            self._under_way.discard(future)
            self.ended_s = now
            error = future.exception()
            if error is None:
                active.partition.finish(future.result())
            elif not self._lost(active, error):
                raise error
            active.end_commit()
            active.put_off(now + _MARKERS_S)
            if error is None:
                continue
            if isinstance(error, PipelineError):
                _log.info("partition %d was lost with a commit under way: %s", active.number, error)
            else:
                self._failures.note(error, consequence=f"partition {active.number} is lost by now")

    def _check_deadline(self, active: ActivePartition, now: float) -> None:
        error = Unavailable(f"a commit is undecided after {self._settings.commit_timeout_ms} ms (commit_timeout_ms)")
        if active.commit_begun_s is None:
            return  # the commit waits for a thread, behind commits that have a deadline
        deadline_s = active.commit_begun_s + self._settings.commit_timeout_ms / 1000 + POLL_INTERVAL_S
        if now > deadline_s and (now > deadline_s + _HANG_S or not self._lost(active, error)):
            self.stuck = True
            raise error

    def shutdown(self) -> None:
        """End the threads, without waiting for one that hangs."""
        self._pool.shutdown(wait=not self.stuck, cancel_futures=True)
