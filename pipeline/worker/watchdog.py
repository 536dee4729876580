"""Ends a process that stands still: partitions with lag whose position does not move although the log is there, and threads.

The cause is a bug, or a disk or a lock that never comes back; a restart is the way out of all of them. A partition that only
waits for the log goes on by itself.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import pipeline.metrics as m
from pipeline.core.task import Phase
from pipeline.errors import PipelineError, Stalled
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock
from pipeline.threads import PeriodicThread
from pipeline.worker.partition import OwnedPartition
from pipeline.worker.restore import RestoreProgress

_log = logging.getLogger(__name__)
INTERVAL_S = 0.5
WAIT_S = 120.0
"""Seconds that a partition may wait while no other makes progress, and that a step of a thread may take.

More than all calls of a start take together if they fail.
"""
CALLS_OF_A_STEP = 4
"""Upper limit of the calls, each with the timeout `kafka_timeout_ms`, that a thread makes between two beats."""
AWAY_S = 5.0
"""Silence of the log, or of our own process, after which every stall timeout begins again."""


class Observation(NamedTuple):
    """State of one partition when it is checked."""

    mark: tuple[int, ...]
    """Value that changes whenever the partition makes progress: its position, or how far its restore is."""
    behind: int
    """Number of records to fold or to restore; 0: the partition can't stall."""
    committing: bool = False
    waiting: bool = False
    """True if it waits for a call, or for another partition, before it can restore."""


class Since(NamedTuple):
    """Memory of a partition between two checks."""

    mark: tuple[int, ...]
    moved_s: float
    """Time at which the mark was first seen."""
    committing_s: float | None
    """Time at which the commit that is under way was first seen; None: there is none."""


class Stall(NamedTuple):
    """A partition that stands still."""

    partition: int
    behind: int
    for_s: float


def judge(
    before: Mapping[int, Since],
    seen: Mapping[int, Observation],
    asked_s: float,
    now_s: float,
    *,
    stall_s: float,
    commit_s: float,
) -> tuple[dict[int, Since], list[Stall]]:
    """Return the memory for the next check, and the partitions that have made no progress for `stall_s`.

    `now_s` is when the log answered with its ends for this check, `asked_s` for the last one. The log counts as away, which
    is no stall, if it was silent for over `AWAY_S`; and, within the `commit_s` that a commit may take, if it leaves a commit
    undecided for over a third of `stall_s`. That holds up all partitions: none is read on while one has a full overlay.
    """
    after: dict[int, Since] = {}
    for number, it in seen.items():
        last = before.get(number)
        if last is None or last.mark != it.mark or not it.behind:
            after[number] = Since(it.mark, now_s, now_s if it.committing else None)
        else:
            committing_s = _first(last.committing_s, now_s) if it.committing else None
            after[number] = Since(it.mark, last.moved_s, committing_s)
    waits_s = [now_s - it.committing_s for it in after.values() if it.committing_s is not None]
    if now_s - asked_s > AWAY_S or any(stall_s / 3 < wait_s <= commit_s for wait_s in waits_s):
        return {number: it._replace(moved_s=now_s) for number, it in after.items()}, []
    stalls = [
        Stall(number, seen[number].behind, now_s - it.moved_s)
        for number, it in after.items()
        # A partition that is not behind has `moved_s` of this check.
        if now_s - it.moved_s >= (max(stall_s, WAIT_S) if seen[number].waiting else stall_s)
    ]
    return after, stalls


def _first(committing_s: float | None, now_s: float) -> float:
    return now_s if committing_s is None else committing_s


def observe(
    partitions: Mapping[int, OwnedPartition],
    ends: Mapping[int, int],
    progress: Mapping[int, RestoreProgress],
    assigned: Collection[int] = (),
) -> dict[int, Observation]:
    """Return the observations of partitions.

    An assigned partition that neither folds nor restores waits for a call, which has its own limit, or for a thread, for the
    close of a standby copy, or for the close of its earlier life. A restore that waits for the log, behind a foreign
    transaction, can't stall, and neither can a partition that waits for the thread of such a restore: a restart would wait
    for the same, and stop the partitions that fold.
    """
    seen: dict[int, Observation] = {}
    held_up = False
    for number, partition in partitions.items():
        if partition.started:
            next_offset = partition.task.position.next_offset
            committing = partition.task.phase in (Phase.FROZEN, Phase.COMMITTING)
            seen[number] = Observation((next_offset,), max(0, ends.get(number, 0) - next_offset), committing)
        elif (restore := progress.get(number)) is not None and not restore.done:
            held_up = held_up or bool(restore.waiting)
            seen[number] = Observation((restore.entries, restore.remaining), 0 if restore.waiting else restore.remaining)
    others = (sum(it.started for it in partitions.values()), sum(it.entries for it in [*progress.values()]))
    for number in assigned:
        if number not in seen:
            seen[number] = Observation(others, 0 if held_up else ends.get(number, 0), waiting=True)
    return seen


def stacks() -> str:
    """Return the stacks of all threads."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts.append(f"thread {names.get(ident, '?')} ({ident}):\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


def silent(
    threads: Sequence[PeriodicThread], since_s: float, now_s: float, *, silent_s: float
) -> list[tuple[PeriodicThread, float]]:
    """Return which of the threads that run took no step for `silent_s` after `since_s`, and for how long.

    A thread that has died is one of them, and one whose steps all fail with unexpected errors.
    """
    waits = [(it, now_s - max(it.beat_s, since_s)) for it in threads if it.started and not it.stopping.is_set()]
    return [(it, wait_s) for it, wait_s in waits if wait_s >= silent_s]


class Watchdog:
    """A thread that checks partitions each time the log has answered with its ends, and ends the process when one stalls.

    `ends` returns when the log last answered, on `clock`, and the ends; `observe` returns observations of partitions, given
    the ends. `threads` are watched, too: those that this check needs, such as the one that asks for the ends; each of their
    steps takes less than `silent_s`. `on_fatal` is called once, from this thread, after the stacks of all threads were
    logged.
    """

    def __init__(
        self,
        ends: Callable[[], tuple[float, Mapping[int, int]]],
        observe: Callable[[Mapping[int, int]], Mapping[int, Observation]],
        *,
        clock: Clock,
        stall_timeout_ms: int,
        commit_timeout_ms: int,
        on_fatal: Callable[[BaseException], None],
        threads: Sequence[PeriodicThread] = (),
        silent_s: float = WAIT_S,
        interval_s: float = INTERVAL_S,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self.stalled = False
        """True once the watchdog has ended the process: a thread that stalls may not stop either."""
        self._ends = ends
        self._observe = observe
        self._stall_s = stall_timeout_ms / 1000
        self._commit_s = commit_timeout_ms / 1000 + AWAY_S
        self._on_fatal = on_fatal
        self._metrics = metrics
        self._since: dict[int, Since] = {}
        self._clock = clock
        self._threads = threads
        self._silent_s = silent_s
        self._checked_s = self._awake_s = clock.monotonic_s()
        """Time of the last check of threads, and the time since when there was no break of the whole process."""
        self._answered_s = clock.monotonic_s()
        self.thread = PeriodicThread(
            "pipeline-watchdog", self.step, log=_log, clock=clock, metrics=metrics, interval_s=interval_s
        )
        metrics.inc(m.STALLS, 0)

    def start(self) -> None:
        """Begin, unless `stall_timeout_ms` is 0."""
        if self._stall_s:
            self.thread.start()

    def stop(self) -> None:
        """End, without waiting. Twice is fine."""
        self.thread.stop()

    def step(self) -> None:
        """Check the threads, and the partitions if the log has answered since the last check."""
        self._check_threads()
        if not self.stalled:
            self._check_partitions()

    def _check_threads(self) -> None:
        before_s, now_s = self._checked_s, self._clock.monotonic_s()
        self._checked_s = now_s
        if now_s - before_s > AWAY_S:
            self._awake_s = now_s
        found = silent(self._threads, self._awake_s, now_s, silent_s=max(self._stall_s, self._silent_s))
        if found:
            what = ", ".join(f"{it.name} (for {wait_s:.1f} s)" for it, wait_s in found)
            self._end(len(found), Stalled(f"threads stand still: {what}"))

    def _check_partitions(self) -> None:
        told_s, ends = self._ends()
        if told_s <= self._answered_s:
            return
        seen = self._observe(ends)
        asked_s, self._answered_s = self._answered_s, told_s
        self._since, stalls = judge(self._since, seen, asked_s, told_s, stall_s=self._stall_s, commit_s=self._commit_s)
        if stalls:
            what = ", ".join(f"{it.partition} ({it.behind} records behind, for {it.for_s:.1f} s)" for it in stalls)
            self._end(len(stalls), Stalled(f"the log is there, but partitions stand still: {what} (stall_timeout_ms)"))

    def _end(self, count: int, error: PipelineError) -> None:
        if self.thread.stopping.is_set():
            return
        self.stalled = True
        self.thread.stopping.set()
        self._metrics.inc(m.STALLS, count)
        _log.critical("%s; all threads:\n%s", error, stacks())
        self._on_fatal(error)
