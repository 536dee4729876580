"""Which partition commits when, and what becomes of it: on time, in turn, side by side, within a deadline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import pipeline.metrics as m
from pipeline.core.task import Commit
from pipeline.errors import PipelineError, StoreCorrupt, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock
from pipeline.settings import WorkerSettings
from pipeline.threads import POLL_INTERVAL_S, Failures
from pipeline.worker.active import ActivePartition, ActivePartitions

_log = logging.getLogger(__name__)
_HANG_S = 10.0
"""How much longer than its deadline a commit of a lost partition may hang in a thread that is needed."""


class Commits:
    """The commits of the partitions of one loop, whose thread calls everything here.

    `lost` says of an error of a commit whether it only means that its partition is lost, and if so loses it.
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
        """How long a commit may take before it fails."""
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self._lost = lost
        self._failures = Failures(_log, "pipeline-commit", metrics)
        """Those at which nobody looks: of partitions that are lost."""
        self._pool = ThreadPoolExecutor(settings.commit_thread_count, thread_name_prefix="pipeline-commit")
        self._under_way: set[Future[Commit]] = set()
        self.changelog_ends: Mapping[int, int] = {}
        """Where the partitions of the changelog ended when somebody looked last."""
        self._next_s = 0.0
        """When `transactions_per_s_max` allows the next commit."""
        self.stuck = False
        """Whether a thread hangs in a commit."""

    @property
    def under_way(self) -> bool:
        """Whether there is a commit that has not been finished."""
        return bool(self._under_way)

    def wait(self, timeout_s: float) -> None:
        """Wait for one to end, or for so long."""
        if self._under_way:
            wait(self._under_way, timeout_s, FIRST_COMPLETED)

    def poll_timeout_s(self, folding: Iterable[ActivePartition]) -> float:
        """Until the next commit is due; short while commits are under way, so that their end is noticed."""
        if self._under_way:
            return 0.002
        due_s = max(min((active.due_s for active in folding if active.due_s is not None), default=1e9), self._next_s)
        wait_s = due_s - self._clock.monotonic_s()
        return min(max(wait_s, 0.0), self._settings.commit_interval_ms / 1000, POLL_INTERVAL_S)

    def begin(self, folding: Sequence[ActivePartition]) -> bool:
        """Begin those that are due; whether there were any. What can't wait does not wait for its turn.

        A partition behind whose last commit somebody else has written commits also if it has nothing to say: that writes
        anew what was covered up, while this owner still has it, and before compaction takes it out of the changelog.
        """
        now = self._clock.monotonic_s()
        idle = [active for active in folding if not active.is_committing]
        for active in idle:
            if active.partition.is_displaced(self.changelog_ends.get(active.number, 0)):
                active.flush()
            else:
                active.schedule(now + self._settings.commit_interval_ms / 1000)
        urgent = [active for active in idle if active.is_urgent]
        for active in urgent:
            self._begin(active)
        # The longest due first: at `transactions_per_s_max` every partition has its turn.
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
                self._tell_size(active.number, error, entries, records, clock.monotonic_s() - begun_s)
                raise
            ended_s = clock.monotonic_s()
            active.bound.note(entries, ended_s - begun_s)
            self._metrics.observe(m.COMMIT_SECONDS, ended_s - started)
            self._metrics.set(m.COMMIT_BOUND, active.bound.entries_max, active.number)
            return commit

        work = self._pool.submit(make_durable)
        self._under_way.add(work)
        active.begin_commit(work)

    def _tell_size(self, number: int, error: PipelineError, entries: int, records: int, took_s: float) -> None:
        """Say of a commit that failed late what its size has to do with it."""
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
        """Note those that are durable. Raises what another failed with, unless its partition is lost."""
        now = self._clock.monotonic_s()
        for active in [*actives.all.values()]:
            future = active.commit_future()
            if future is None:
                continue
            if not future.done():
                self._check_deadline(active, now)
                continue
            self._under_way.discard(future)
            error = future.exception()
            if error is None:
                active.partition.finish(future.result())
            elif not self._lost(active, error):
                raise error
            active.end_commit()
            if error is None:
                continue
            if isinstance(error, PipelineError):
                _log.info("partition %d was lost with a commit under way: %s", active.number, error)
            else:
                self._failures.note(error, consequence=f"partition {active.number} is lost by now")

    def _check_deadline(self, active: ActivePartition, now: float) -> None:
        error = Unavailable(f"a commit is undecided after {self._settings.commit_timeout_ms} ms (commit_timeout_ms)")
        if active.commit_begun_s is None:
            return  # it waits for a thread, behind commits that have a deadline
        deadline_s = active.commit_begun_s + self._settings.commit_timeout_ms / 1000 + POLL_INTERVAL_S
        if now > deadline_s and (now > deadline_s + _HANG_S or not self._lost(active, error)):
            self.stuck = True
            raise error

    def shutdown(self) -> None:
        """End, waiting for none that hangs."""
        self._pool.shutdown(wait=not self.stuck, cancel_futures=True)
