"""The active partitions of a process, each from its start until its store is closed again.

A partition is active once at a time. One that is lost while it starts, or while a commit of it is under way, stays until
that has ended: a store is never opened twice, and never closed under somebody's hands.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import ceil
from typing import Protocol

from msgspec.structs import asdict, replace

from pipeline.core.record import Records
from pipeline.core.task import Commit
from pipeline.errors import PipelineError
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.threads import Failures
from pipeline.worker.bound import CommitBound
from pipeline.worker.follower import Progress
from pipeline.worker.partition import Partition

_log = logging.getLogger(__name__)


class Standbys(Protocol):
    """Who keeps copies of partitions warm that others fold."""

    def follow(self, partitions: frozenset[int]) -> None:
        """Keep copies of these and no others. None of their stores is open elsewhere. Does not block."""
        ...

    def take(self, partition: int, stopping: Callable[[], bool]) -> None:
        """Wait until its store is not open any more; `NotReady` if `stopping` turns true before."""
        ...


class NoStandbys:
    """For whoever folds all there is."""

    def follow(self, partitions: frozenset[int]) -> None:
        """There are no copies."""

    def take(self, partition: int, stopping: Callable[[], bool]) -> None:
        """It is open nowhere."""


class ActivePartition:
    """A partition that is starting, folding, or lost and about to be closed. Owned by the loop's thread."""

    def __init__(self, partition: Partition, commit_time_max_s: float) -> None:
        self.partition = partition
        self.number = partition.number
        self.lost = False
        """Whether it is ours no longer. Set once; what is in its overlay is dropped."""
        self.folding = False
        self.commit: Future[Commit] | None = None
        self.begun_s: float | None = None
        """When a thread began with the commit that is under way; None: it waits for one."""
        self.bound = CommitBound(commit_time_max_s)
        self.unfolded: deque[Records] = deque()
        """What was read and waits for a commit to make room."""
        self._frozen_count = 0
        self._per_record = 1
        """Entries of a record, about."""
        self.due_s: float | None = None
        """When the next commit is due; None if there is nothing to commit."""
        self.full = False
        """Whether nothing may be read until a commit has made room."""
        self.flush = False
        """Whether to commit at once what is dirty."""
        self.flushing = False
        """Whether that commit is under way."""
        self.work: Future[None] | None = None
        """Its start, or its closing."""
        self.closing = False

    @property
    def folded_count(self) -> int:
        """Entries that were folded since the last freeze, at most so many different ones."""
        return self._count() - self._frozen_count

    def _count(self) -> int:
        counts = self.partition.task.counts
        entries = counts.entries_folded + counts.series_cleared
        return entries + counts.batches_folded + counts.records_bad + counts.groups_refused

    @property
    def is_full(self) -> bool:
        """Whether the next commit is as large as it may be."""
        return self.partition.task.full or self.folded_count >= self.bound.entries_max

    def note_frozen(self) -> int:
        """Begin to count anew; return how many entries the overlay that was frozen is of."""
        count = self.folded_count
        self._frozen_count += count
        return count

    def fold_waiting(self) -> None:
        """Fold what was read, until nothing is left of it or the next commit is as large as it may be."""
        while self.unfolded and not self.full:
            records = self.unfolded.popleft()
            room = self.bound.entries_max - self.folded_count
            count = max(1, room // self._per_record)
            if count < len(records.offsets):
                self.unfolded.appendleft(_part(records, count, None))
                records = _part(records, 0, count)
            before = self.folded_count
            self.partition.fold(records)
            if self.partition.task.next_offset < records.next_offset:
                self.unfolded.appendleft(records)  # what is folded of it by now is skipped
            if records.offsets:
                self._per_record = max(1, ceil((self.folded_count - before) / len(records.offsets)))
            self.full = self.is_full


def _part(records: Records, begin: int, end: int | None) -> Records:
    """Return the records from index `begin` to `end`, which are not all of them."""
    columns = {name: it[begin:end] for name, it in asdict(records).items() if isinstance(it, Sequence)}
    next_offset = records.next_offset if end is None else records.offsets[end]
    return replace(records, **columns, next_offset=next_offset)


class ActivePartitions:
    """All of them, by number. Starts and closes them in threads of a pool; everything else is the loop's thread's."""

    def __init__(
        self,
        make: Callable[[int], Partition],
        *,
        standbys: Standbys,
        thread_count: int,
        stopping: Callable[[], bool],
        on_progress: Callable[[Progress], None],
        commit_time_max_s: float,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._make = make
        self._commit_time_max_s = commit_time_max_s
        self._failures = Failures(_log, "pipeline-restore", metrics)
        """Those at which nobody looks: of partitions that are lost."""
        self._standbys = standbys
        self._stopping = stopping
        self._on_progress = on_progress
        self._pool = ThreadPoolExecutor(thread_count, thread_name_prefix="pipeline-restore")
        self.all: dict[int, ActivePartition] = {}

    def folding(self) -> list[ActivePartition]:
        """Those that fold."""
        return [active for active in self.all.values() if active.folding]

    def starting(self) -> list[Future[None]]:
        """What there is to wait for before all that are ours fold."""
        return [active.work for active in self.all.values() if active.work is not None and not active.lost]

    def begin(self, numbers: Iterable[int]) -> None:
        """Take partitions over that are not held."""
        for number in sorted(numbers):
            active = self.all[number] = ActivePartition(self._make(number), self._commit_time_max_s)
            active.work = self._pool.submit(self._start, active)

    def _start(self, active: ActivePartition) -> None:
        def stopping() -> bool:
            return active.lost or self._stopping()

        self._standbys.take(active.number, stopping)
        active.partition.start(self._on_progress, stopping)

    def finish_starts(self, excused: Callable[[ActivePartition, BaseException], bool]) -> bool:
        """Let those fold that are restored; whether there are any. Raises what keeps one from it, unless that is excused."""
        begun = False
        for active in self.all.values():
            if active.work is None or active.closing or not active.work.done():
                continue
            work, active.work = active.work, None
            error = work.exception()
            if active.lost:
                if isinstance(error, PipelineError):
                    _log.info("partition %d was lost while it started: %s", active.number, error)
                elif error is not None:
                    self._failures.note(error, consequence=f"partition {active.number} is lost by now")
            elif error is None:
                active.folding = begun = True
            elif not excused(active, error):
                raise error
        return begun

    def lose(self, active: ActivePartition, why: str) -> None:
        """It is another's: drop its overlay, and close it when nothing works in it any more."""
        if not active.lost:
            _log.info("partition %d is let go of: %s", active.number, why)
        active.lost, active.folding = True, False
        active.full = active.flush = active.flushing = False
        active.due_s = None
        active.unfolded.clear()
        if active.work is not None and not active.closing and active.work.cancel():
            active.work = None

    def close_lost(self) -> list[int]:
        """Close those that are lost; return the numbers of those that are closed now, and so active no longer."""
        closed = [it for it in self.all.values() if it.closing and it.work is not None and it.work.done()]
        for active in closed:
            del self.all[active.number]
        for active in self.all.values():
            if active.lost and active.work is None and active.commit is None:
                active.closing = True
                active.work = self._pool.submit(self._close, active.partition)
        return [active.number for active in closed]

    def shutdown(self, *, close: bool) -> None:
        """End the starts, which `stopping` does, and close everything unless a commit hangs in it."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if close:
            for active in self.all.values():
                self._close(active.partition)

    def _close(self, partition: Partition) -> None:
        try:
            partition.close()
        except PipelineError as error:
            _log.error("closing partition %d: %s", partition.number, error)
        except Exception as error:
            self._failures.note(error, consequence=f"partition {partition.number} is not closed in order")
