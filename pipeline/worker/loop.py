"""Runs the partitions of one process: restores, reads, folds, commits on time, and ends the process when a commit fails.

One thread reads and folds. Small pools restore and close partitions and carry commits out, so that folding goes on
meanwhile. Any thread may call `assign`, `revoking` and `distrust` at any time; the loop's thread acts on them.

While partitions move, from `revoking` to the next `assign`, folding and committing go on: an owner that takes a partition
over fences us first and restores what we had committed by then. So a fence during a move means that the partition is lost.
At any other time it means that another process folds what it should not, and this process ends.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import ExitStack
from typing import NamedTuple

import pipeline.metrics as m
from pipeline.errors import Fenced, NotReady, RecordsLost, StoreCorrupt, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, Log, LogReader, ReadableStore
from pipeline.settings import WorkerSettings
from pipeline.threads import POLL_INTERVAL_S, PeriodicThread
from pipeline.topics import DELTAS
from pipeline.worker.active import ActivePartition, ActivePartitions, NoStandbys, Standbys
from pipeline.worker.commits import Commits
from pipeline.worker.partition import OwnedPartition
from pipeline.worker.restore import DamageHistory, RestoreProgress

_log = logging.getLogger(__name__)
_COMMITTED_S = 15.0
"""Seconds after a commit by which it has shown whether its marker is missing; see `OwnedPartition.needs_commit`."""
_ENDS_INTERVAL_S = 5.0
"""Seconds between two questions for the ends of the changelog while nothing is committed: compaction begins much later."""


class _Assigned(NamedTuple):
    actives: frozenset[int]
    standbys: frozenset[int]
    generation: int


class _Revoking(NamedTuple):
    partitions: frozenset[int]
    done: threading.Event


class _Damaged(NamedTuple):
    partition: int
    store: ReadableStore
    why: str


class WorkerLoop:
    """Folds the partitions that are assigned to it until it is stopped.

    `make` returns the `OwnedPartition` to start when a partition is taken over. `on_fatal` is called once, from the
    loop's thread, when the loop can't go on: a commit failed, or records are lost. The owner of the process must then end it
    with exit code 3; nothing that was not committed has been acknowledged. `on_moved` is called from the loop's thread when
    other partitions fold than before. For `settle_s` after an assignment, and after the partitions that it added have
    started, a fence may still come from an owner of the assignment before: then the partition is taken over again.
    """

    def __init__(
        self,
        make: Callable[[int], OwnedPartition],
        *,
        log: Log,
        clock: Clock,
        settings: WorkerSettings,
        on_fatal: Callable[[BaseException], None],
        on_progress: Callable[[RestoreProgress], None] = lambda _: None,
        on_moved: Callable[[], None] = lambda: None,
        standbys: Standbys | None = None,
        settle_s: float = 0.0,
        transaction_timeout_ms: int | None = None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._log = log
        self._clock = clock
        self._settings = settings
        self._on_progress = on_progress
        self._on_moved = on_moved
        self._standbys: Standbys = standbys or NoStandbys()
        self._settle_s = settle_s
        self._metrics = metrics
        self._ready = threading.Event()
        self._thread = PeriodicThread(
            "pipeline-worker",
            self._step,
            log=_log,
            clock=clock,
            metrics=metrics,
            on_unavailable=self._give_up,
            on_fatal=on_fatal,
            fatal_message="the worker ends",
            on_end=self._finish,
        )
        self._stop = self._thread.stopping
        time_max_s = min(settings.commit_timeout_ms, transaction_timeout_ms or settings.commit_timeout_ms) / 1000
        self._actives = ActivePartitions(
            make,
            standbys=self._standbys,
            thread_count=settings.restore_thread_count,
            stopping=self._stop.is_set,
            on_progress=self._progress,
            commit_time_max_s=time_max_s,
            metrics=metrics,
        )
        self._commits = Commits(clock, settings, metrics, time_max_s=time_max_s, lost=self._lost_by)
        self._lock = threading.Lock()
        self._posts: deque[_Assigned | _Revoking | _Damaged] = deque()
        """Calls on which the loop's thread has not acted yet."""
        self._posted = threading.Event()
        self._revoking: list[_Revoking] = []
        """Revocations whose commits are under way."""
        self._moving = False
        self._settled_s = 0.0
        self._new: set[int] = set()
        """Partitions that the assignment added and that do not fold yet."""
        self._damages = DamageHistory()
        self._rebuilding: set[int] = set()
        """Partitions whose stores are damaged, until they fold again with new stores."""
        self._assignment: _Assigned | None = None
        self._reader: LogReader | None = None
        self._reading = False
        """True while the reader reads exactly the partitions that fold, from where each one folds."""
        self.fenced_count = 0
        """Number of partitions that were lost by a fence."""

    # From any thread

    @property
    def ready(self) -> bool:
        """True once every partition of the first assignment folds, and while no store is being rebuilt."""
        return self._ready.is_set() and not self._rebuilding

    @property
    def partitions(self) -> Mapping[int, OwnedPartition]:
        """Partitions that are ours, `started` or not, as far as the loop has acted on the assignment."""
        return {active.number: active.partition for active in [*self._actives.all.values()] if active.is_ours}

    @property
    def assigned(self) -> frozenset[int]:
        """Partitions that are assigned to us, taken over or not; none while partitions move."""
        assignment = self._assignment
        return frozenset() if assignment is None or self._moving else assignment.actives

    @property
    def away_s(self) -> float:
        """Time at which a read last found the log away, on `clock`."""
        return self._thread.outage.last_s

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until `ready`, or for so long."""
        return self._ready.wait(timeout_s)

    def start(self) -> None:
        """Begin in a thread of its own: restore first, then fold."""
        self._thread.start()

    def assign(self, actives: Iterable[int], standbys: Iterable[int] = (), generation: int = 0) -> None:
        """Fold these partitions and no others. Returns at once; partitions that were ours before go on.

        If a generation was skipped, all are taken over again: another member may have had them meanwhile.
        """
        self._post(_Assigned(frozenset(actives), frozenset(standbys), generation))

    def revoking(self, partitions: Iterable[int], timeout_s: float) -> bool:
        """Commit what these partitions, which may move soon, have folded; return whether that was done in time."""
        post = _Revoking(frozenset(partitions), threading.Event())
        self._post(post)
        return post.done.wait(timeout_s)

    def distrust(self, partition: int, store: ReadableStore, error: StoreCorrupt) -> None:
        """Rebuild a partition's store, in which a reader found `error`: close the partition and take it over again.

        Does not block; `ready` is false until that is done. Does nothing if the partition does not fold into `store` any
        more. Raises `LogCorrupt` if a rebuild has not helped before.
        """
        with self._lock:
            active = self._actives.all.get(partition)
            if active is None or not active.is_ours or not active.partition.has(store) or partition in self._rebuilding:
                return
            self._damages.note(partition, error)
            self._rebuilding.add(partition)
        self._post(_Damaged(partition, store, str(error)))  # not the error, which holds scans that hold the store's files

    def wants_changelog_ends(self, now_s: float) -> bool:
        """Return whether it is time to ask for the ends of the changelog's partitions, for `note_changelog_ends`.

        For some time after a commit, whose marker can be missing, it is at each call; while nothing is committed, every few
        seconds.
        """
        asked_s, _ = self._commits.changelog_ends
        return now_s - self._commits.ended_s < _COMMITTED_S or now_s - asked_s >= _ENDS_INTERVAL_S

    def note_changelog_ends(self, asked_s: float, ends: Mapping[int, int]) -> None:
        """Take note of the ends of the changelog's partitions, asked for at a time by the monotonic clock.

        So foreign records are repaired soon, and commits that nobody can read become readable.
        """
        self._commits.changelog_ends = asked_s, ends

    def _post(self, post: _Assigned | _Revoking | _Damaged) -> None:
        with self._lock:
            self._posts.append(post)
        self._posted.set()
        if self._thread.started and not self._thread.alive:
            self._release_callers()

    def stop(self, timeout_s: float = 30.0) -> bool:
        """Commit what is folded and end; return whether that was done in time. May be called twice."""
        self._stop.set()
        self._posted.set()
        return self._thread.stop(timeout_s) and not self._commits.stuck

    # The loop

    def _give_up(self, error: Unavailable) -> None:
        """End the loop: reads wait by themselves for a log that is away, and nothing else that fails may be tried again."""
        raise error

    def _finish(self) -> None:
        """Commit what is folded, unless the loop failed; then close everything, whatever fails on the way."""
        with ExitStack() as stack:
            stack.callback(self._release_callers)
            # A wait for a commit that hangs would hang, too; and its partition must not be closed under it.
            stack.callback(lambda: self._actives.shutdown(close=not self._commits.stuck))
            stack.callback(self._commits.shutdown)
            stack.callback(self._close_reader)
            if not self._thread.failed:
                self._commit_rest()
            self._ready.clear()
            self._stop.set()  # ends the restores that are under way

    def _commit_rest(self) -> None:
        try:
            for active in self._actives.folding():
                active.flush()
            while self._commits.begin(self._actives.folding()) or self._commits.under_way:
                self._commits.wait(POLL_INTERVAL_S)
                self._commits.finish(self._actives)
        except NotReady as error:
            _log.info("stopped: %s", error)
        except BaseException as error:
            self._thread.fail(error)

    def _release_callers(self) -> None:
        """Release callers of `revoking`, which would wait for a loop that has ended."""
        for post in [*self._revoking, *self._posts]:
            if isinstance(post, _Revoking):
                post.done.set()

    def _step(self) -> None:
        try:
            self._turn()
        except NotReady as error:
            if not self._stop.is_set():
                raise
            _log.info("stopped: %s", error)

    def _turn(self) -> None:
        self._act_on_posts()
        self._move()
        self._read()
        self._commits.finish(self._actives)
        self._commits.begin(self._actives.folding())
        if not any(active.is_flushing for active in self._actives.all.values()):
            for post in self._revoking:
                post.done.set()
            self._revoking = []

    # Which partitions

    def _act_on_posts(self) -> None:
        self._posted.clear()
        while self._posts:
            post = self._posts[0]
            if isinstance(post, _Revoking):
                self._moving = True
                self._revoking.append(post)
                for active in self._actives.folding():
                    if active.number in post.partitions:
                        active.flush()
            elif isinstance(post, _Damaged):
                found = self._actives.all.get(post.partition)
                if found is not None and found.is_ours and found.partition.has(post.store):
                    self._rebuild(found, post.why)
            else:
                self._act_on(post)
            with self._lock:  # only now: `_lost_by` considers posts that are still to be acted upon
                self._posts.popleft()

    def _act_on(self, post: _Assigned) -> None:
        before, self._assignment = self._assignment, post
        skipped = before is not None and post.generation - before.generation not in (0, 1)
        for active in self._actives.all.values():
            if active.number not in post.actives or skipped:
                self._lose(active, f"generation {post.generation}")
        self._moving = False
        with self._lock:
            self._rebuilding &= post.actives
        self._settled_s = self._clock.monotonic_s() + self._settle_s
        self._new = {*post.actives} - {active.number for active in self._actives.folding()}
        self._follow()

    def _follow(self) -> None:
        """Let standbys follow what was assigned, except partitions that are still active, whose stores are open here."""
        if self._assignment is not None:
            self._standbys.follow(self._assignment.standbys - self._actives.all.keys())

    def _lose(self, active: ActivePartition, why: str) -> None:
        moved = active.is_folding
        active.lose(why)
        if moved:
            self._reading = False
            self._on_moved()

    def _rebuild(self, active: ActivePartition, why: str) -> None:
        """Lose a partition whose store is damaged: `_move` takes it over again with a new store."""
        active.partition.distrust(why)
        with self._lock:
            self._rebuilding.add(active.number)
        self._lose(active, "its store is damaged")

    def _lost_by(self, active: ActivePartition, error: BaseException) -> bool:
        """Return whether an error of a commit or start only means that the partition is lost; else the process must end."""
        if active.is_ours:
            if (
                isinstance(error, StoreCorrupt) and active.is_folding
            ):  # a partition that does not even start can't be rebuilt
                self._damages.note(active.number, error)
                self._rebuild(active, str(error))
                return True
            if isinstance(error, Fenced):
                self.fenced_count += 1
                self._metrics.inc(m.FENCED)
            with self._lock:
                moving = self._moving or any(self._takes(post, active.number) for post in self._posts)
            settling = isinstance(error, Fenced) and self._clock.monotonic_s() < self._settled_s
            if not settling and not (moving and isinstance(error, Fenced | Unavailable)):
                return False
            self._lose(active, str(error))
        return True

    @staticmethod
    def _takes(post: _Assigned | _Revoking | _Damaged, partition: int) -> bool:
        """Return whether a partition may be another's by a post that is still to be acted upon."""
        return isinstance(post, _Revoking) or (isinstance(post, _Assigned) and partition not in post.actives)

    def _move(self) -> None:
        """Start partitions that are ours and not active, let restored ones fold, close lost ones."""
        if closed := self._actives.close_lost():
            for number in closed:  # only now: a commit that was under way has set its position
                self._metrics.forget(number)
            self._follow()
        if self._assignment is None:
            return
        if not self._moving:  # the next assignment tells whether a partition that is lost meanwhile is ours again
            self._actives.begin(self._assignment.actives - self._actives.all.keys())
        if not self._actives.folding() and (starting := self._actives.starting()):
            wait(starting, timeout=POLL_INTERVAL_S, return_when=FIRST_COMPLETED)
        if self._actives.finish_starts(self._lost_by):
            self._reading = False
            folding = {active.number for active in self._actives.folding()}
            with self._lock:
                told = {post.partition for post in self._posts if isinstance(post, _Damaged)}
                self._rebuilding -= folding - told
            if self._new & folding:  # once for each partition, so that two workers that fence each other come to an end
                self._new -= folding
                self._settled_s = self._clock.monotonic_s() + self._settle_s
            self._on_moved()
        if not self._actives.starting():
            self._ready.set()

    def _progress(self, progress: RestoreProgress) -> None:
        self._metrics.set(m.RESTORE_REMAINING, progress.remaining, progress.partition)
        self._on_progress(progress)

    # Folding

    def _read(self) -> None:
        folding = self._actives.folding()
        if not folding:
            self._close_reader()
            if not self._actives.starting():
                self._posted.wait(POLL_INTERVAL_S)
            return
        if waiting := [active for active in folding if active.has_unfolded]:
            for active in waiting:
                self._fold(active)
            folding = self._actives.folding()  # without partitions whose store was found damaged
            if not folding:
                return
        if any(active.is_full for active in folding):  # backpressure: nothing more is read until a commit has made room
            self._commits.wait(POLL_INTERVAL_S)
            return
        try:
            reader = self._reader = self._reader or self._log.reader(DELTAS)
            if not self._reading:
                for active in folding:
                    active.drop_unfolded()  # the records are read again
                begins = {active.number: active.partition.resume() for active in folding}
                reader.assign(
                    {number: offset for number, (offset, _) in begins.items()},
                    {number: epoch for number, (_, epoch) in begins.items()},
                )
                self._reading = True
            fetched = reader.poll(
                record_count_max=self._settings.fetch_record_count_max,
                bytes_max=self._settings.fetch_bytes_max,
                timeout_s=self._commits.poll_timeout_s(folding),
            )
        except Unavailable as error:
            self._thread.outage.wait(error)
            return
        except RecordsLost:
            passed = [active for active in folding if active.partition.pass_hole()]
            if not passed:
                raise
            self._reading = False
            return
        for records in fetched:
            active = self._actives.all[records.partition]
            if active.is_folding:  # else the records before have shown that its store is damaged
                active.take(records)
                self._fold(active)

    def _fold(self, active: ActivePartition) -> None:
        try:
            folded = active.fold()
        except StoreCorrupt as error:
            if not self._lost_by(active, error):
                raise
            return
        if folded and active.partition.task.full:
            self._metrics.inc(m.OVERLAY_FULL, 1, active.number)

    def _close_reader(self) -> None:
        reader, self._reader, self._reading = self._reader, None, False
        if reader is not None:
            reader.close()
