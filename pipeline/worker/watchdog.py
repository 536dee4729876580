"""Ends a process that stands still: partitions with lag whose position does not move although the log is there, and threads.

What stands still is a bug, or a disk or a lock that never comes back; a restart is the way out of all of them. What only
waits for the log is none of that: it goes on by itself.
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
"""How long a partition of ours may wait without any other getting on, and a step of a thread may take.

It is more than all calls of a start take that fail.
"""
CALLS_OF_A_STEP = 4
"""Calls, each with the timeout `kafka_timeout_ms`, that a thread makes between two signs of life, at most."""
AWAY_S = 5.0
"""Silence of the log, or of our own process, behind which everything gets the whole time again."""


class Observation(NamedTuple):
    """One partition at one look."""

    mark: tuple[int, ...]
    """Changes whenever the partition gets on: its position, or how far its restore is."""
    behind: int
    """Records that it has still to fold, or to restore; 0: it owes nothing."""
    committing: bool = False
    waiting: bool = False
    """Whether it waits for a call, or for one of its kind, before it can restore."""


class Since(NamedTuple):
    """What is remembered of a partition."""

    mark: tuple[int, ...]
    moved_s: float
    """When it was first seen with this mark."""
    committing_s: float | None
    """When it was first seen with the commit that is under way; None: with none."""


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
    """What to remember at the next look, and what has stood still for `stall_s`.

    `now_s` is when the log told its ends for this look, `asked_s` for the last one. The log counts as away, which is no
    stall of ours, if it was silent for over `AWAY_S`; and, for as long as `commit_s` lets a commit take, if it leaves one
    undecided for over a third of `stall_s`. That holds up all partitions: one whose overlay is full lets none read on.
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
        # What owes nothing has just moved.
        if now_s - it.moved_s >= (max(stall_s, WAIT_S) if seen[number].waiting else stall_s)
    ]
    return after, stalls


def _first(committing_s: float | None, now_s: float) -> float:
    return now_s if committing_s is None else committing_s


def look_at(
    partitions: Mapping[int, OwnedPartition],
    ends: Mapping[int, int],
    progress: Mapping[int, RestoreProgress],
    assigned: Collection[int] = (),
) -> dict[int, Observation]:
    """What partitions look like. An assigned one that is neither folding nor restoring waits for a call, which has its own
    limit, or for others: for a thread that restores, a copy that is to be closed, or its own last life's end.

    A restore that waits for the log, behind a transaction of somebody else, owes nothing, and neither does what waits for
    its thread: a restart would wait for the same, and take the partitions that fold with it.
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
    """Where every thread is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts.append(f"thread {names.get(ident, '?')} ({ident}):\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


def silent(
    threads: Sequence[PeriodicThread], since_s: float, now_s: float, *, silent_s: float
) -> list[tuple[PeriodicThread, float]]:
    """Return which of the threads that run took no step for `silent_s` after `since_s`, and for how long.

    A thread whose steps all fail with what nobody expected is one of them, and one that has died.
    """
    waits = [(it, now_s - max(it.beat_s, since_s)) for it in threads if it.started and not it.stopping.is_set()]
    return [(it, wait_s) for it, wait_s in waits if wait_s >= silent_s]


class Watchdog:
    """A thread that looks each time the log has told its ends, and ends the process when a partition or a thread stalls.

    `ends` says when the log told them last, on `clock`, and up to where it can be read; `look` what the partitions look like
    then. `threads` are those without which nobody would notice anything, such as who asks for the ends; a step of them takes
    less than `silent_s`. `on_fatal` is called once, from this thread, behind a dump of all threads' stacks to the log.
    """

    def __init__(
        self,
        ends: Callable[[], tuple[float, Mapping[int, int]]],
        look: Callable[[Mapping[int, int]], Mapping[int, Observation]],
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
        """Whether it has ended the process: what stands still may not stop either."""
        self._ends = ends
        self._look = look
        self._stall_s = stall_timeout_ms / 1000
        self._commit_s = commit_timeout_ms / 1000 + AWAY_S
        self._on_fatal = on_fatal
        self._metrics = metrics
        self._since: dict[int, Since] = {}
        self._clock = clock
        self._threads = threads
        self._silent_s = silent_s
        self._looked_s = self._awake_s = clock.monotonic_s()
        """When it looked at threads last, and since when it has done so without a break of the whole process."""
        self._told_s = clock.monotonic_s()
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
        """Look at the threads, and at the partitions if the log has told something new."""
        self._look_at_threads()
        if not self.stalled:
            self._look_at_partitions()

    def _look_at_threads(self) -> None:
        before_s, now_s = self._looked_s, self._clock.monotonic_s()
        self._looked_s = now_s
        if now_s - before_s > AWAY_S:
            self._awake_s = now_s
        found = silent(self._threads, self._awake_s, now_s, silent_s=max(self._stall_s, self._silent_s))
        if found:
            what = ", ".join(f"{it.name} (for {wait_s:.1f} s)" for it, wait_s in found)
            self._end(len(found), Stalled(f"threads stand still: {what}"))

    def _look_at_partitions(self) -> None:
        told_s, ends = self._ends()
        if told_s <= self._told_s:
            return
        seen = self._look(ends)
        asked_s, self._told_s = self._told_s, told_s
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
