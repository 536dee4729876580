"""Carries out, through the ports, what the task of one partition decides.

This module has no thread and no loop: the simulator drives exactly this code, with a crash between any two durable steps.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import chain
from threading import Lock

import msgspec

import pipeline.metrics as m
from pipeline import native
from pipeline.core import codec
from pipeline.core.commit import Commit
from pipeline.core.letters import no_letter_key, shorten
from pipeline.core.owners import owner_id, with_offset
from pipeline.core.record import (
    EPOCH_NONE,
    FENCE_KEY,
    POSITION_KEY,
    TAG_DEFINITION,
    Fence,
    Position,
    Records,
    prefix_end,
    runs,
)
from pipeline.core.task import Task
from pipeline.core.transitions import next_state
from pipeline.errors import BadRecord, Displaced, LogCorrupt, NotReady, PipelineError, RecordsLost, StoreCorrupt, Unreadable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, Log, Message, MessageRun, ReadableStore, Store, Stores, Transaction
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.covered import check_recoverable, find_traces, foreign_keys
from pipeline.worker.figures import Figures
from pipeline.worker.follower import StoreMeta, check_order, read_position, write_entries
from pipeline.worker.foreign import Barrier, hides_letters
from pipeline.worker.history import LastRecord, last_common, what_is_gone, why_lost
from pipeline.worker.lookups import ProducerSweep, look_up
from pipeline.worker.restore import RestoreProgress, StoreOpener, check_restorable, restore
from pipeline.worker.stage import TRANSITIONS, Stage, StageEvent

_log = logging.getLogger(__name__)
_ATTEMPTS_MAX = 3
"""Number of tries of a commit while others write to the changelog."""
_MARKER_MAX_S = 5.0
"""Seconds after a commit within which the broker writes its transaction's marker, if it has not left it out."""


class OwnedPartition:
    """A partition that this process folds: its task, its store and its right to commit."""

    def __init__(
        self,
        number: int,
        *,
        log: Log,
        stores: Stores,
        clock: Clock,
        settings: WorkerSettings,
        delete_retention_ms: int,
        app: str = "pipeline",
        name: str = "",
        ask_lag_max_s: Callable[[], float] = lambda: 0.0,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        """`ask_lag_max_s` returns for how long a new record of the changelog surely removes no older one of its key.

        Commits carry `name`, the name of the process.
        """
        self.number = number
        self._ask_lag_max_s = ask_lag_max_s
        self._log = log
        self._opener = StoreOpener(stores, accept_loss=settings.accept_loss, metrics=metrics)
        self._clock = clock
        self._settings = settings
        self._source_id = self._topic_id = self._owner_id = ""
        self._producers = ProducerSweep()
        self._committed_end = 0
        """Offset behind the position record of the last commit."""
        self._begin = 0
        """Offset at which the next commit begins, if nobody else writes to the changelog."""
        self._barrier = Barrier(0, "")
        """The newest fence record of this owner."""
        self._committed_begin = -1
        """Offset at which the last commit of this owner begins; -1 before there is one."""
        self._committed_s = 0.0
        """Time at which the last commit was acknowledged."""
        self._has_letters = False
        """True if the last commit of this owner has dead letters."""
        self._marker_missing = False
        """True if the broker has left out the marker of the last commit, so that nobody can read it."""
        self._undo_offset: int | None = None
        """Offset of `deltas` where folding goes on if the broker aborts the last commit; None if it can't any more.

        `KafkaTransaction.commit` says how that comes about.
        """
        self._last = LastRecord(EPOCH_NONE, 0)
        """The last record that was folded."""
        self.task = self._new_task()
        self._delete_retention_ms, self._app, self._name = delete_retention_ms, app, name
        self._metrics, self._figures = metrics, Figures(number, metrics)
        self._stage = Stage.NEW
        self._stage_lock = Lock()  # a commit's thread can find damage while the loop's discards the store
        self._transaction: Transaction | None = None
        self._store: Store | None = None
        self._foreign: set[bytes] = set()
        """Keys whose newest record in the changelog was not written by an owner of the partition."""
        self._had_all = False
        """True if the store held all that was ever committed before its restore read anything."""
        self._damage = ""
        """Why the store is distrusted."""
        self._began_ms, self._began_s = clock.now_ms(), clock.monotonic_s()

    @property
    def store(self) -> Store:
        """Store at a commit boundary. Raises `NotReady` before it is restored."""
        if self._store is None:
            raise NotReady(f"partition {self.number} is being restored")
        return self._store

    @property
    def stage(self) -> Stage:
        """Stage of the partition."""
        return self._stage

    @property
    def started(self) -> bool:
        """True if `start` has returned, and the store was not deleted since."""
        return self._stage in (Stage.OPEN, Stage.DISTRUSTED)

    def _step(self, event: StageEvent) -> Stage:
        """Go on to the stage that follows; return the one before."""
        with self._stage_lock:
            before = self._stage
            self._stage = next_state(TRANSITIONS, before, event, self.number)
            return before

    def start(
        self, progress: Callable[[RestoreProgress], None] = lambda _: None, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        """Take the partition over: fence the old owner, restore, load the position. Return once `fold` may be called.

        Raises `RecordsLost` if records between position and log start are gone, or the store is ahead of the changelog, and
        `accept_loss` is off; `NotReady` if `stopping` turned true.
        """
        self._source_id = self._log.topic_id(DELTAS)
        if stopping():  # as late as can be: an owner that is fenced by one that gives up has lost time for nothing
            raise NotReady(f"partition {self.number}: its start was stopped")
        self._step(StageEvent.OWN)
        self._transaction = self._log.transaction(f"{self._app}-{self.number}")
        self._owner_id = owner_id(self._app, self.number, self._clock.new_id(), self._name)
        self._fence(in_letters=hides_letters(self._log, self.number))
        self._topic_id = self._log.topic_id(CHANGELOG)
        self._store = self._opener.open(self.number, lambda store: self._restore(store, progress, stopping), stopping)
        self._check_covered(stopping)
        self._check_position(stopping)
        self._step(StageEvent.OPEN)
        if self._foreign:
            self._commit_repairs()

    def _fence(self, *, in_letters: bool = False) -> Barrier:
        """Commit a fence record of our own, which stands behind all that earlier owners have committed.

        With `in_letters` it also writes a record without a meaning to the dead letters. Its marker there stands for one that
        the broker has left out: nobody could read those letters, and they could be aborted.
        """
        fence = Message(CHANGELOG, self.number, FENCE_KEY, codec.encode_fence(Fence(self._owner_id, self._clock.now_ms())))
        messages = [Message(DEAD_LETTERS, self.number, no_letter_key(self.number), None)] if in_letters else []
        *_, end = self._right.commit([*messages, fence], timeout_s=self._settings.commit_timeout_ms / 1000)
        self._begin = end + self._right.marker_count
        self._barrier = Barrier(end - 1, self._owner_id)
        return self._barrier

    @property
    def _right(self) -> Transaction:
        if self._transaction is None:
            raise NotReady(f"partition {self.number} was not started")
        return self._transaction

    def _restore(self, store: Store, progress: Callable[[RestoreProgress], None], stopping: Callable[[], bool]) -> Store:
        barrier, log, clock = self._barrier, self._log, self._clock
        check_restorable(self.number, store, log, clock, self._delete_retention_ms, end_offset=barrier.offset)
        follower = restore(
            self.number,
            store,
            log,
            clock,
            barrier=barrier,
            fence=partial(self._fence, in_letters=True),
            fetch_count_max=self._settings.restore_fetch_count_max,
            buffer_entries_max=self._settings.restore_buffer_entries_max,
            delete_retention_ms=self._delete_retention_ms,
            progress=progress,
            stopping=stopping,
            metrics=self._metrics,
        )
        self._committed_end, self._foreign = follower.lineage.end_offset, set(follower.foreign.keys)
        self._had_all = follower.had_all
        self._load(store)
        self._metrics.inc(m.RESTORE_ENTRIES, follower.entries_total, self.number)
        return store

    def _new_task(self) -> Task:
        return Task(self.number, self._settings.task_limits(), self._source_id, native.extension())

    def _load(self, store: Store) -> None:
        self.task = self._new_task()
        position = read_position(store)
        self._last = LastRecord(position.leader_epoch, position.records_end_offset)
        self.task.restored(
            position,
            (value for _, value in store.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION))),
            # A log that has lost the offsets behind the last record, which held none, can have records there by now.
            next_offset=None if self._last.leader_epoch == EPOCH_NONE else self._last.end_offset,
        )

    def _check_covered(self, stopping: Callable[[], bool]) -> None:
        """Raise `RecordsLost` if others have written over entries whose committed values nothing tells any more."""
        if not self._foreign or self._had_all:
            return
        young_s, accept_loss = self._ask_lag_max_s(), self._settings.accept_loss
        traces = find_traces(self.number, self._log, self._clock, self._foreign, self._barrier, stopping)
        check_recoverable(self.number, self.store, self._foreign, traces, young_s=young_s, accept_loss=accept_loss)

    def _check_position(self, stopping: Callable[[], bool]) -> None:
        """Raise `RecordsLost` if the log lost records that are not folded; with `accept_loss` skip them."""
        high = self._log.high_watermarks(DELTAS)  # which nobody's open transaction holds down, unlike the last stable offset
        start, end = self._log.watermarks(DELTAS, self.number)
        end = max(end, high.get(self.number, end))
        source_id = self.task.position.source_id
        anew = bool(source_id) and source_id != self._source_id
        if not anew:
            self.pass_hole()
        next_offset, accept_loss = self.task.next_offset, self._settings.accept_loss
        what = what_is_gone(next_offset, start, end, anew=anew)
        if not what and accept_loss and start < next_offset:  # else the first read finds it out, which waits for no probe
            what = why_lost(self._log, self.number, self._last)
        if not what:
            return
        if not accept_loss:
            raise RecordsLost(f"partition {self.number}: {what}; start with --accept-loss to go on without them")
        if not anew and start < next_offset:  # a tail is gone: what is left below that was folded
            log, clock = self._log, self._clock
            self._last = last_common(log, clock, self.number, self._last, start=start, end=end, stopping=stopping)
        else:
            self._last = LastRecord(EPOCH_NONE, start)
        self.task.skip_to(self._last.end_offset)
        _log.error("partition %d: %s; going on without them, at %d", self.number, what, self._last.end_offset)

    def pass_hole(self) -> bool:
        """Fold on from the position if the offsets below it, which held no record, are gone from the log.

        Return whether they are. Retention can take them between a start and its first read.
        """
        begin, end = self.task.next_offset, self.task.position.next_offset
        if begin >= end or not begin < self._log.watermarks(DELTAS, self.number).start_offset <= end:
            return False
        self.task.pass_hole()
        return True

    def resume(self) -> tuple[int, int]:
        """Return the offset to read `deltas` from, and the epoch of the leader that took the record below it, if known.

        A start reads from behind the last folded record, even if the position is further: so it notices a log that has lost
        that record and has others in its place.
        """
        next_offset = self.task.next_offset
        return next_offset, self._last.leader_epoch if self._last.end_offset == next_offset else EPOCH_NONE

    def fold(self, records: Records) -> None:
        """Fold records of this partition into the overlay. Raises `Discontinuous` if they are not in order.

        Records from `task.next_offset` on are to be folded again after the next commit; see `Task.fold`. Offsets without a
        record are counted, not refused: in Kafka markers and aborted records of other producers' transactions take offsets,
        and readers are not told of them. A log that has no transactions of others refuses holes itself.
        """
        before = self.task.next_offset
        check_order(f"deltas-{self.number}", records)
        try:
            reading = self.task.read(records)
            found = self.store.get(reading.producer_keys) if reading.producer_keys else []
            self.task.fold(reading, found, now_ms=self._clock.now_ms())
        except StoreCorrupt as error:
            raise self._damaged(error) from None
        end = bisect_left(records.offsets, self.task.next_offset)
        count = end - bisect_left(records.offsets, before)
        if count:
            # The epoch is that of the last record that was read. If folding stopped before it, this record's can be earlier:
            # what the log has lost shows all the same, because the later leader began behind this record.
            self._last = LastRecord(records.leader_epoch, records.offsets[end - 1] + 1)
        if holes := self.task.next_offset - before - count:
            self._metrics.inc(m.DELTAS_HOLES, holes, self.number)

    def prepare(self) -> Commit:
        """Freeze the overlay and return its commit. Call it only when no commit is under way."""
        now_ms, last = self._clock.now_ms(), self._last
        try:
            self.task.sweep(self._producers.read(self.store), now_ms=min(now_ms, self._elapsed_ms()))
            commit = self.task.prepare_commit(*look_up(self.store, self.task.freeze()), now_ms=now_ms)
            return msgspec.structs.replace(commit, position=self._signed(commit.position, last))
        except StoreCorrupt as error:
            raise self._damaged(error) from None

    def _elapsed_ms(self) -> int:
        """Return the wall clock as it would be if nobody had set it since this object was made: a jump ages no producer."""
        return self._began_ms + int((self._clock.monotonic_s() - self._began_s) * 1000)

    def _damaged(self, error: StoreCorrupt) -> StoreCorrupt:
        """Delete the store in which `error` was met, so that the next start rebuilds it; return the error to raise."""
        self._discard_store(str(error))
        # The store says of which partition it is; the task, which could not decode an entry, does not.
        return Unreadable(str(error), self.number) if error.partition is None else error

    def has(self, store: ReadableStore) -> bool:
        """Return whether `store` is the one that `start` opened, and is trusted."""
        return self._store is store and self._stage is Stage.OPEN

    def distrust(self, why: str) -> None:
        """Note that the store is damaged: `close` deletes it, so that the next start rebuilds it."""
        self._damage = why
        self._step(StageEvent.DISTRUST)

    def _discard_store(self, why: str) -> None:
        store, self._store = self._store, None
        self._step(StageEvent.DISCARD)
        try:
            if store is not None:
                store.close()
        except PipelineError as error:  # its newest writes can't be kept, and need not be
            _log.debug("partition %d: closing a damaged store: %s", self.number, error)
        self._opener.destroy(self.number, why)

    def make_durable(self, commit: Commit) -> None:
        """Write a commit to the changelog, then to the store. Safe from another thread while `fold` goes on.

        After any error the process must end, without acknowledging anything more (DESIGN section 5, invariant 8).
        """
        if commit.position.next_offset != self.task.position.next_offset:
            self._check_source()
        letters = self._letters(commit) if commit.dead_letters else []
        keys, values = commit.keys[:-1], commit.values[:-1]
        is_displaced = self._marker_missing
        for attempt in range(_ATTEMPTS_MAX):
            if is_displaced:
                self._find_foreign()
                repairs = self._repairs(without=commit.keys)
                keys, values = [*repairs, *commit.keys[:-1]], [*repairs.values(), *commit.values[:-1]]
            position = msgspec.structs.replace(
                commit.position,
                begin_offset=self._begin,
                previous_end_offset=self._committed_end,
                owner_id=with_offset(self._owner_id, self._begin + len(keys)),
            )
            try:
                self._make_durable(letters, [*keys, POSITION_KEY], [*values, codec.encode_position(position)])
                return
            except Displaced as error:
                _log.warning("partition %d: looking at what was written to its changelog: %s", self.number, error)
                if attempt + 1 == _ATTEMPTS_MAX:
                    raise
                is_displaced = True

    def _letters(self, commit: Commit) -> list[Message]:
        bytes_max = self._log.message_bytes_max(DEAD_LETTERS)
        return [Message(DEAD_LETTERS, self.number, key, shorten(value, bytes_max)) for key, value in commit.dead_letters]

    def _check_source(self) -> None:
        """Raise `LogCorrupt` if `deltas` was deleted and created again since the start.

        All that is folded was read before this asks for the topic's id, and an id never comes back: as long as it is the id
        of the start, all that is folded is of one topic. A reader does not notice a new topic that is as long.
        """
        if self._log.topic_id(DELTAS) != self._source_id:
            raise LogCorrupt(f"partition {self.number}: topic {DELTAS} was made anew while it was folded: start again")

    def _make_durable(self, letters: list[Message], keys: list[bytes], values: list[bytes | None]) -> None:
        messages: Sequence[Message] = MessageRun(CHANGELOG, self.number, keys, values)
        if letters:
            messages = [*letters, *chain.from_iterable(runs(messages))]
        offsets = self._right.commit(
            messages,
            timeout_s=self._settings.commit_timeout_ms / 1000,
            begins={(CHANGELOG, self.number): self._begin},
        )
        self._has_letters = bool(letters)
        self._committed_begin, self._committed_s = self._begin, self._clock.monotonic_s()
        self._committed_end, self._begin = offsets[-1], offsets[-1] + self._right.marker_count
        self._undo_offset = self.task.position.next_offset
        self._foreign.clear()
        meta = StoreMeta(
            changelog_next_offset=offsets[-1], topic_id=self._topic_id, position_offset=offsets[-1] - 1, caught_up=True
        )
        write_entries(self.store, keys, values, meta)

    # Foreign records in the changelog

    def needs_commit(self, end_offset: int, asked_s: float) -> bool:
        """Return whether the changelog needs a commit even if nothing is folded, given the end that it had at a time.

        It does if others have written behind our last commit, and if the broker has left out that commit's marker: then
        nobody can read it, and the next transaction's marker stands for both (see `KafkaTransaction.commit`). Call this
        only when no commit is under way. False while folding, which began behind the last record, has not come back to the
        position: a commit would let that fall.
        """
        if self.task.next_offset < self.task.position.next_offset:
            return False
        is_open = end_offset == self._committed_begin < self._committed_end
        self._marker_missing = is_open and asked_s > self._committed_s + _MARKER_MAX_S
        if self._marker_missing:
            _log.warning("partition %d: the broker has left out the marker of the last commit: writing one", self.number)
        return end_offset > self._begin or self._marker_missing

    def _find_foreign(self) -> None:
        """Find the new end of the changelog, and the keys that others have written behind our last commit.

        Raises `StoreCorrupt` if the changelog has lost that commit: folding begins anew where the changelog ends.
        """
        barrier = self._fence(in_letters=self._has_letters)
        timeout_s, end = self._settings.commit_timeout_ms / 1000, self._committed_end
        log, clock, undo, young, metrics = self._log, self._clock, self._undo_offset, self._ask_lag_max_s, self._metrics
        try:
            self._foreign |= foreign_keys(
                self.number, log, clock, end, undo, barrier, ask_young_s=young, timeout_s=timeout_s, metrics=metrics
            )
        except StoreCorrupt as error:
            self.distrust(str(error))
            raise
        self._undo_offset, self._marker_missing = None, False

    def _repairs(self, without: Collection[bytes]) -> dict[bytes, bytes | None]:
        """Return the committed values of keys whose newest record in the changelog is foreign.

        Raises `StoreCorrupt` if one can't be decoded: writing it would make the changelog as damaged as the store is.
        """
        keys = sorted(self._foreign.difference(without))
        repairs = dict(zip(keys, self.store.get(keys), strict=True))
        try:
            for key, value in repairs.items():
                if value is not None:
                    codec.check_entry(key, value)
        except BadRecord as error:
            self.distrust(str(error))
            raise Unreadable(f"partition {self.number}: {error}", self.number) from None
        return repairs

    def _commit_repairs(self) -> None:
        """Write the committed values of foreign keys once more, so that compaction keeps ours."""
        _log.warning("partition %d: writing %d entries anew that others have written over", self.number, len(self._foreign))
        repairs = self._repairs(without=[POSITION_KEY])
        position = self._signed(self.task.position, self._last)
        position = msgspec.structs.replace(position, committed_at_ms=self._clock.now_ms())
        self.make_durable(Commit([*repairs, POSITION_KEY], [*repairs.values(), None], [], position, 0))

    def _signed(self, position: Position, last: LastRecord) -> Position:
        return msgspec.structs.replace(position, leader_epoch=last.leader_epoch, records_end_offset=last.end_offset)

    def finish(self, commit: Commit) -> None:
        """Note that the commit is durable."""
        self.task.committed()
        self._figures.committed(commit, self.task.counts, self.task.position)

    def commit(self) -> Commit:
        """Carry out a whole commit in this thread."""
        commit = self.prepare()
        self.make_durable(commit)
        self.finish(commit)
        return commit

    def close(self) -> None:
        """Give back the store and the right to commit. The overlay is dropped; its records will be folded again."""
        if self._transaction is not None:
            self._transaction.close()
        if self._stage is Stage.DISTRUSTED:
            self._discard_store(self._damage)
        if self._step(StageEvent.CLOSE) is Stage.DISCARDED:
            self.task = self._new_task()  # only here: a commit that was under way has come to its end
        if self._store is not None:
            self._store.close()
            self._store = None
