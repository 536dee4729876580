"""The active partitions of a process, each from its start until its store is closed again.

A partition is active once at a time. One that is lost while a thread starts it, or commits it, stays until that thread has
ended: a store is never opened twice, and never closed while it is in use.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from math import ceil, inf
from typing import Any, Protocol

from msgspec.structs import asdict, replace

from pipeline.core.record import Records
from pipeline.core.transitions import next_state
from pipeline.errors import PipelineError
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.threads import Failures
from pipeline.worker.bound import CommitBound
from pipeline.worker.partition import OwnedPartition
from pipeline.worker.restore import RestoreProgress

_log = logging.getLogger(__name__)
_AT_ONCE_S = -inf


class ActiveState(Enum):
    """State of an active partition: whether it is ours, and what another thread does with it."""

    STARTING = "starting"
    FOLDING = "folding"
    COMMITTING = "committing"
    """Folding goes on while a thread commits what was folded before."""
    LOST_STARTING = "lost while starting"
    LOST_COMMITTING = "lost while committing"
    LOST = "lost"
    """No thread works in it: it can be closed."""
    CLOSING = "closing"
    CLOSED = "closed"


class ActiveEvent(Enum):
    """Event in the life of an active partition."""

    START_ENDED = "end of the start"
    COMMIT = "commit"
    COMMIT_ENDED = "end of the commit"
    LOSE = "loss"
    CLOSE = "close"
    CLOSE_ENDED = "end of the close"


TRANSITIONS: Mapping[tuple[ActiveState, ActiveEvent], ActiveState] = {
    (ActiveState.STARTING, ActiveEvent.START_ENDED): ActiveState.FOLDING,
    (ActiveState.STARTING, ActiveEvent.LOSE): ActiveState.LOST_STARTING,
    (ActiveState.LOST_STARTING, ActiveEvent.START_ENDED): ActiveState.LOST,
    (ActiveState.FOLDING, ActiveEvent.COMMIT): ActiveState.COMMITTING,
    (ActiveState.FOLDING, ActiveEvent.LOSE): ActiveState.LOST,
    (ActiveState.COMMITTING, ActiveEvent.COMMIT_ENDED): ActiveState.FOLDING,
    (ActiveState.COMMITTING, ActiveEvent.LOSE): ActiveState.LOST_COMMITTING,
    (ActiveState.LOST_COMMITTING, ActiveEvent.COMMIT_ENDED): ActiveState.LOST,
    (ActiveState.LOST, ActiveEvent.CLOSE): ActiveState.CLOSING,
    (ActiveState.CLOSING, ActiveEvent.CLOSE_ENDED): ActiveState.CLOSED,
}
"""Every legal event; any other raises `IllegalTransition`."""
_OURS = frozenset((ActiveState.STARTING, ActiveState.FOLDING, ActiveState.COMMITTING))
_FOLDING = frozenset((ActiveState.FOLDING, ActiveState.COMMITTING))
_STARTING = frozenset((ActiveState.STARTING, ActiveState.LOST_STARTING))
_COMMITTING = frozenset((ActiveState.COMMITTING, ActiveState.LOST_COMMITTING))


class Standbys(Protocol):
    """The stores that this process keeps up to date for partitions that others fold."""

    def follow(self, partitions: frozenset[int]) -> None:
        """Keep copies of these partitions and no others. None of their stores is open elsewhere. Does not block."""
        ...

    def take(self, partition: int, stopping: Callable[[], bool]) -> None:
        """Wait until a partition's store is closed here; raise `NotReady` if `stopping` turns true before."""
        ...


class NoStandbys:
    """The standbys of a process that has none."""

    def follow(self, partitions: frozenset[int]) -> None:
        """Do nothing."""

    def take(self, partition: int, stopping: Callable[[], bool]) -> None:
        """Do nothing: no store is open here."""


class ActivePartition:
    """A partition from the beginning of its start until its store is closed again.

    The loop's thread owns it, and alone changes its state. Any thread may ask `is_ours`; a commit's thread calls
    `note_commit_begun` and uses `bound`.
    """

    def __init__(self, partition: OwnedPartition, commit_time_max_s: float) -> None:
        self.partition = partition
        self.number = partition.number
        self.bound = CommitBound(commit_time_max_s)
        self._state = ActiveState.STARTING
        self._work: Future[Any] | None = None
        """The start, commit or close that a thread carries out, in the states that are named for it."""
        self._commit_begun_s: float | None = None
        self._is_flush = False
        """True if `flush` asked for the commit that is under way."""
        self._due_s: float | None = None
        self._is_clean = False
        """True if there was nothing to commit, and nothing has happened since that could change that."""
        self._full = False
        self._unfolded: deque[Records] = deque()
        self._ends_seen: object = None
        """Answer about the changelog's ends for which the partition was last asked whether it needs a commit."""
        self._frozen_count = 0
        self._entries_per_record = 1

    # Life

    @property
    def state(self) -> ActiveState:
        """State of the partition."""
        return self._state

    @property
    def is_ours(self) -> bool:
        """True until the partition is lost. Safe from any thread."""
        return self._state in _OURS

    @property
    def is_folding(self) -> bool:
        """True if the partition is ours and its start has ended."""
        return self._state in _FOLDING

    @property
    def is_committing(self) -> bool:
        """True while a commit is under way, also after the partition was lost."""
        return self._state in _COMMITTING

    def _step(self, event: ActiveEvent) -> None:
        self._state = next_state(TRANSITIONS, self._state, event, self.number)

    def begin_start(self, work: Future[None]) -> None:
        """Note that a thread starts the partition."""
        self._work = work

    def start_future(self) -> Future[None] | None:
        """Return the start that is under way, or has ended and was not noted; None if there is none."""
        return self._work if self._state in _STARTING else None

    def end_start(self) -> None:
        """Note that the start has ended: the partition folds, or can be closed if it was lost meanwhile."""
        self._step(ActiveEvent.START_ENDED)
        self._work, self._is_clean = None, False

    def lose(self, why: str) -> None:
        """Drop the overlay of a partition that is another's by now. Does nothing if it was lost before."""
        if not self.is_ours:
            return
        self._step(ActiveEvent.LOSE)
        _log.info("partition %d is lost: %s", self.number, why)
        self._due_s, self._full, self._is_flush = None, False, False
        self._unfolded.clear()
        if (start := self.start_future()) is not None and start.cancel():
            self.end_start()

    def begin_close(self, work: Future[None]) -> None:
        """Note that a thread closes the partition, which was lost."""
        self._step(ActiveEvent.CLOSE)
        self._work = work

    def end_close(self) -> bool:
        """Return whether the partition is closed, and note it."""
        if self._state is not ActiveState.CLOSING or self._work is None or not self._work.done():
            return False
        self._step(ActiveEvent.CLOSE_ENDED)
        return True

    # Folding

    @property
    def is_full(self) -> bool:
        """True if nothing may be folded before a commit has ended, because the next one is as large as it may be."""
        return self._full

    @property
    def folded_count(self) -> int:
        """Number of entries that were folded since the last freeze; at most so many different ones."""
        return self._count() - self._frozen_count

    def _count(self) -> int:
        counts = self.partition.task.counts
        entries = counts.entries_folded + counts.series_cleared
        return entries + counts.batches_folded + counts.records_bad + counts.groups_refused

    def _is_full(self) -> bool:
        return self.partition.task.full or self.folded_count >= self.bound.entries_max

    def take(self, records: Records) -> None:
        """Keep records that were read, for `fold`."""
        self._unfolded.append(records)

    def drop_unfolded(self) -> None:
        """Forget the records that were not folded; they are read again."""
        self._unfolded.clear()

    @property
    def has_unfolded(self) -> bool:
        """True if records wait to be folded."""
        return bool(self._unfolded)

    def fold(self) -> bool:
        """Fold the records that were read, until none is left or the next commit is as large as it may be.

        Return whether anything was folded.
        """
        folded = False
        while self._unfolded and not self._full:
            folded, self._is_clean = True, False
            records = self._unfolded.popleft()
            room = self.bound.entries_max - self.folded_count
            count = max(1, room // self._entries_per_record)
            if count < len(records.offsets):
                self._unfolded.appendleft(_part(records, count, None))
                records = _part(records, 0, count)
            before = self.folded_count
            self.partition.fold(records)
            if self.partition.task.next_offset < records.next_offset:
                self._unfolded.appendleft(records)  # the part of it that is folded by now is skipped
            if records.offsets:
                self._entries_per_record = max(1, ceil((self.folded_count - before) / len(records.offsets)))
            self._full = self._is_full()
        return folded

    # Committing

    @property
    def due_s(self) -> float | None:
        """Time at which the next commit is due; None if there is nothing to commit."""
        return self._due_s

    @property
    def is_urgent(self) -> bool:
        """True if the next commit waits neither for its time nor for its turn."""
        return self._full or self._due_s == _AT_ONCE_S

    @property
    def is_flushing(self) -> bool:
        """True while a commit that `flush` asked for has not ended."""
        return self._is_flush or self._due_s == _AT_ONCE_S

    def needs_commit(self, ends: tuple[float, Mapping[int, int]]) -> bool:
        """Return whether the changelog needs a commit, given the time at which its ends were asked for, and the answer.

        It can only come to need one with another answer, so each answer is looked at once.
        """
        if self._ends_seen is ends:
            return False
        self._ends_seen, self._is_clean = ends, False
        return self.partition.needs_commit(ends[1].get(self.number, 0), ends[0])

    def flush(self) -> None:
        """Ask for a commit at once, if there is anything to commit."""
        self._due_s, self._is_clean = _AT_ONCE_S, False

    def schedule(self, due_s: float) -> None:
        """Note when to commit what was folded, if that is not known yet; forget it if there is nothing to commit.

        A flush stays asked for while a commit is under way: what that commit writes is not durable yet.
        """
        if self._is_clean or (self.is_committing and self._due_s == _AT_ONCE_S):
            return
        if not self.partition.task.dirty:
            self._due_s, self._is_clean = None, True
        elif self._due_s is None:
            self._due_s = due_s

    def put_off(self, until_s: float) -> None:
        """Have the next commit wait until then, unless `flush` asked for it."""
        if self._due_s is not None and self._due_s != _AT_ONCE_S:
            self._due_s = max(self._due_s, until_s)

    def freeze(self) -> int:
        """Note that the overlay is frozen for a commit; return the number of entries that were folded into it."""
        self._is_flush, self._due_s = self._due_s == _AT_ONCE_S, None
        count = self.folded_count
        self._frozen_count += count
        return count

    def begin_commit(self, work: Future[Any]) -> None:
        """Note that a commit of what was frozen is handed to a thread."""
        self._step(ActiveEvent.COMMIT)
        self._work = work

    def note_commit_begun(self, now_s: float) -> None:
        """Note when a thread has begun with the commit."""
        self._commit_begun_s = now_s

    @property
    def commit_begun_s(self) -> float | None:
        """Time at which a thread began with the commit that is under way; None if the commit waits for a thread."""
        return self._commit_begun_s

    def commit_future(self) -> Future[Any] | None:
        """Return the commit that is under way, or has ended and was not noted; None if there is none."""
        return self._work if self.is_committing else None

    def end_commit(self) -> None:
        """Note that the commit has ended: there is room again, or the partition can be closed if it was lost."""
        self._step(ActiveEvent.COMMIT_ENDED)
        self._work = self._commit_begun_s = None
        self._is_flush = self._is_clean = False
        self._full = self.is_ours and self._is_full()


def _part(records: Records, begin: int, end: int | None) -> Records:
    """Return the records from index `begin` to `end`, which are not all of them."""
    columns = {name: it[begin:end] for name, it in asdict(records).items() if isinstance(it, Sequence)}
    next_offset = records.next_offset if end is None else records.offsets[end]
    return replace(records, **columns, next_offset=next_offset)


class ActivePartitions:
    """The active partitions by number. A pool of threads starts and closes them; the loop's thread does all else."""

    def __init__(
        self,
        make: Callable[[int], OwnedPartition],
        *,
        standbys: Standbys,
        thread_count: int,
        stopping: Callable[[], bool],
        on_progress: Callable[[RestoreProgress], None],
        commit_time_max_s: float,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._make = make
        self._commit_time_max_s = commit_time_max_s
        self._failures = Failures(_log, "pipeline-restore", metrics)
        """Unexpected errors of partitions that are lost; they end nothing."""
        self._standbys = standbys
        self._stopping = stopping
        self._on_progress = on_progress
        self._pool = ThreadPoolExecutor(thread_count, thread_name_prefix="pipeline-restore")
        self.all: dict[int, ActivePartition] = {}

    def folding(self) -> list[ActivePartition]:
        """Return the partitions that fold."""
        return [active for active in self.all.values() if active.is_folding]

    def starting(self) -> list[Future[None]]:
        """Return the starts that must end before all partitions that are ours fold."""
        works = [active.start_future() for active in self.all.values() if active.is_ours]
        return [work for work in works if work is not None]

    def begin(self, numbers: Iterable[int]) -> None:
        """Start partitions that are not active."""
        for number in sorted(numbers):
            active = self.all[number] = ActivePartition(self._make(number), self._commit_time_max_s)
            active.begin_start(self._pool.submit(self._start, active))

    def _start(self, active: ActivePartition) -> None:
        def stopping() -> bool:
            return not active.is_ours or self._stopping()

        self._standbys.take(active.number, stopping)
        active.partition.start(self._on_progress, stopping)

    def finish_starts(self, excused: Callable[[ActivePartition, BaseException], bool]) -> bool:
        """Let partitions fold whose start has ended; return whether there are any.

        Raises the error of a start that failed, unless its partition is lost or `excused` loses it for that error.
        """
        begun = False
        for active in self.all.values():
            start = active.start_future()
            if start is None or not start.done():
                continue
            error, was_ours = start.exception(), active.is_ours
            if error is not None and was_ours and not excused(active, error):
                raise error
            active.end_start()
            begun = begun or active.is_folding
            if was_ours:
                continue
            if isinstance(error, PipelineError):
                _log.info("partition %d was lost while it started: %s", active.number, error)
            elif error is not None:
                self._failures.note(error, consequence=f"partition {active.number} is lost by now")
        return begun

    def close_lost(self) -> list[int]:
        """Close lost partitions in which no thread works; return the numbers of those that are closed now."""
        closed = [number for number, active in self.all.items() if active.end_close()]
        for number in closed:
            del self.all[number]
        for active in self.all.values():
            if active.state is ActiveState.LOST:
                active.begin_close(self._pool.submit(self._close, active.partition))
        return closed

    def shutdown(self, *, close: bool) -> None:
        """Wait for starts, which `stopping` ends, and for closes; with `close`, close all partitions."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if close:
            for active in self.all.values():
                self._close(active.partition)

    def _close(self, partition: OwnedPartition) -> None:
        try:
            partition.close()
        except PipelineError as error:
            _log.error("closing partition %d: %s", partition.number, error)
        except Exception as error:
            self._failures.note(error, consequence=f"partition {partition.number} is not closed in order")
