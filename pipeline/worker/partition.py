"""Carries out the protocol of one task: what the core decides, in the order that it decides, through the ports.

It has no thread and no loop, so the simulator drives exactly this code, with a crash between any two durable steps.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Collection
from itertools import islice, repeat
from threading import Event

import msgspec

import pipeline.metrics as m
from pipeline.core import codec
from pipeline.core.record import (
    EPOCH_NONE,
    FENCE_KEY,
    POSITION_KEY,
    TAG_DEFINITION,
    TAG_PRODUCER,
    Fence,
    Position,
    Records,
    prefix_end,
    runs,
)
from pipeline.core.task import Commit, Task
from pipeline.core.transitions import next_state
from pipeline.errors import (
    BadRecord,
    Displaced,
    LogCorrupt,
    NotReady,
    PipelineError,
    RecordsLost,
    StoreAhead,
    StoreCorrupt,
    Unavailable,
    Unreadable,
)
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, Log, Message, ReadableStore, Store, Stores, Transaction
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DELTAS
from pipeline.worker.ahead import set_store_aside
from pipeline.worker.covered import check_told, find_traces
from pipeline.worker.figures import Figures
from pipeline.worker.follower import (
    Progress,
    StoreMeta,
    check_order,
    check_restorable,
    foreign_keys,
    read_position,
    restore,
    write_entries,
)
from pipeline.worker.foreign import Barrier, owner_id
from pipeline.worker.history import LastRecord, last_common, what_is_gone, why_lost
from pipeline.worker.letters import letter_messages
from pipeline.worker.stage import TRANSITIONS, Stage, Step

_log = logging.getLogger(__name__)
_OPEN_RETRY_S = 0.05
_OPEN_RETRIES = 400
_ATTEMPTS_MAX = 3
"""Of a commit, while others write to the changelog."""
PRODUCERS_SWEPT = 200
"""Producer entries that are looked at with each commit, to find those that may be forgotten."""


class Partition:
    """One partition that is ours: its task, its store and its right to commit."""

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
        ask_lag_max_s: Callable[[], float] = lambda: 0.0,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        """`ask_lag_max_s` says for how long a record of the changelog surely lets none give way to it."""
        self.number = number
        self._ask_lag_max_s = ask_lag_max_s
        self._log = log
        self._stores = stores
        self._clock = clock
        self._settings = settings
        self._source_id = self._topic_id = self._owner_id = ""
        self._swept = TAG_PRODUCER
        self._committed_end = 0
        """The offset behind the position record of the last commit."""
        self._begin = 0
        """The offset at which the next commit begins, if nobody else writes to the changelog."""
        self._leader_epoch = EPOCH_NONE
        """Of the last record that was folded."""
        self._records_end = 0
        """The offset behind that record."""
        self.task = self._new_task()
        self._delete_retention_ms = delete_retention_ms
        self._app = app
        self._metrics = metrics
        self._figures = Figures(number, metrics)
        self.stage = Stage.NEW
        self._transaction: Transaction | None = None
        self._store: Store | None = None
        self._foreign: set[bytes] = set()
        """Keys of the changelog whose newest record is not of an owner of the partition."""
        self._had_all = False
        """Whether the store that was restored had all that was ever committed before anything was read."""
        self._damage = ""
        """Why the store must be rebuilt; empty: it is trusted."""
        self._rebuilding = False
        """Whether the store was deleted, and readers may still have the one that was there before."""
        self._pause = Event()
        self._began_ms, self._began_s = clock.now_ms(), clock.monotonic_s()

    @property
    def store(self) -> Store:
        """The store, once `start` has returned: at a commit boundary at any time."""
        if self._store is None:
            raise NotReady(f"partition {self.number} is being restored")
        return self._store

    @property
    def started(self) -> bool:
        """Whether `start` has returned: what the task says is true."""
        return self.stage is Stage.OPEN

    def start(
        self, progress: Callable[[Progress], None] = lambda _: None, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        """Take the partition over: fence the old owner, restore, load the position. Blocks until it can fold.

        Raises `RecordsLost` if records between position and log start are gone, or the store is ahead of the changelog, and
        `accept_loss` is off; `NotReady` if `stopping` turned true.
        """
        self._source_id = self._log.topic_id(DELTAS)
        if stopping():  # as late as can be: who is fenced by one that gives up has lost time for nothing
            raise NotReady(f"partition {self.number}: its start was stopped")
        self.stage = next_state(TRANSITIONS, self.stage, Step.OWN, self.number)
        self._transaction = self._log.transaction(f"{self._app}-{self.number}")
        self._owner_id = owner_id(self._app, self.number, self._clock.new_id())
        barrier = self._fence()
        self._topic_id = self._log.topic_id(CHANGELOG)
        corrupt = ""
        try:
            store = self._restore(barrier, progress, stopping)
        except StoreAhead as error:
            accept_loss = self._settings.accept_loss
            set_store_aside(self.number, self._stores, error, accept_loss=accept_loss, metrics=self._metrics)
            store = self._restore(barrier, progress, stopping)
        except StoreCorrupt as error:
            corrupt = str(error)
        if corrupt:  # only here: as long as the error is there, it holds scans that hold the store's files
            self._discard_store(corrupt)
            store = self._restore(barrier, progress, stopping)
        self._store, self._rebuilding = store, False
        self._check_covered(barrier, stopping)
        self._check_position(stopping)
        self.stage = next_state(TRANSITIONS, self.stage, Step.OPEN, self.number)
        if self._foreign:
            self._commit_repairs()

    def _fence(self) -> Barrier:
        """Commit a fence record of our own. It stands behind everything that an owner before us has committed."""
        fence = codec.encode_fence(Fence(self._owner_id, self._clock.now_ms()))
        message = Message(CHANGELOG, self.number, FENCE_KEY, fence)
        (end,) = self._right.commit([message], timeout_s=self._settings.commit_timeout_ms / 1000)
        self._begin = end + self._right.marker_count
        return Barrier(end - 1, self._owner_id)

    @property
    def _right(self) -> Transaction:
        """The right to commit."""
        if self._transaction is None:
            raise NotReady(f"partition {self.number} was not started")
        return self._transaction

    def _restore(self, barrier: Barrier, progress: Callable[[Progress], None], stopping: Callable[[], bool]) -> Store:
        store = self._open_store(stopping)
        try:
            check_restorable(
                self.number, store, self._log, self._clock, self._delete_retention_ms, end_offset=barrier.offset
            )
            follower = restore(
                self.number,
                store,
                self._log,
                self._clock,
                barrier=barrier,
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
        except BaseException:
            store.close()
            raise
        self._metrics.inc(m.RESTORE_ENTRIES, follower.entries_total, self.number)
        return store

    def _open_store(self, stopping: Callable[[], bool]) -> Store:
        """Open the store. One that was just deleted can be open still: a scan of it ends when it looks up next."""
        for _ in range(_OPEN_RETRIES if self._rebuilding else 0):
            try:
                return self._stores.open(self.number)
            except Unavailable:
                if stopping():
                    raise
            self._pause.wait(_OPEN_RETRY_S)
        return self._stores.open(self.number)

    def _new_task(self) -> Task:
        return Task(self.number, self._settings.task_limits(), self._source_id)

    def _load(self, store: Store) -> None:
        """A new task, from the store's entries."""
        self.task = self._new_task()
        position = read_position(store)
        self._leader_epoch, self._records_end = position.leader_epoch, position.records_end_offset
        self.task.restored(
            position,
            (value for _, value in store.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION))),
            # A log that has lost the offsets behind the last record, which held none, can have records there by now.
            next_offset=None if self._leader_epoch == EPOCH_NONE else self._records_end,
        )

    def _check_covered(self, barrier: Barrier, stopping: Callable[[], bool]) -> None:
        """Raise `RecordsLost` if others have written over entries of which nobody can tell any more what they were."""
        if not self._foreign or self._had_all:
            return
        keys, young_s, accept_loss = self._foreign, self._ask_lag_max_s(), self._settings.accept_loss
        traces = find_traces(self.number, self._log, self._clock, keys, barrier, stopping)
        check_told(self.number, self.store, keys, traces, young_s=young_s, accept_loss=accept_loss)

    def _check_position(self, stopping: Callable[[], bool]) -> None:
        high = self._log.high_watermarks(DELTAS)  # which nobody's open transaction holds down, unlike the last stable offset
        start, end = self._log.watermarks(DELTAS, self.number)
        end = max(end, high.get(self.number, end))
        source_id = self.task.position.source_id
        anew = bool(source_id) and source_id != self._source_id
        if not anew:
            self.pass_hole()
        next_offset = self.task.next_offset
        history = self._lost_history() if start < next_offset <= end and not anew else ""
        if start <= next_offset <= end and not anew and not history:
            return
        what = history or what_is_gone(next_offset, start, end, anew=anew)
        if not self._settings.accept_loss:
            raise RecordsLost(f"partition {self.number}: {what}; start with --accept-loss to go on without them")
        common = LastRecord(EPOCH_NONE, start)
        if not anew and start < next_offset:  # a tail is gone: what is left below that was folded
            last = LastRecord(self._leader_epoch, self._records_end)
            common = last_common(self._log, self._clock, self.number, last, start=start, end=end, stopping=stopping)
        self._leader_epoch, self._records_end = common
        self.task.skip_to(self._records_end)
        _log.error("partition %d: %s; going on without them, at %d", self.number, what, self._records_end)

    def _lost_history(self) -> str:
        """Why the position belongs to a history that the log has lost; empty if it does not, or nobody would go on anyhow.

        Without `accept_loss` the first read finds it out, which waits for no probe.
        """
        last = LastRecord(self._leader_epoch, self._records_end)
        return why_lost(self._log, self.number, last) if self._settings.accept_loss else ""

    def pass_hole(self) -> bool:
        """Fold on from the position if the offsets below it, which held no record, are gone from the log; whether it did.

        Retention can take them between a start and its first read.
        """
        begin, end = self.task.next_offset, self.task.position.next_offset
        if begin >= end or not begin < self._log.watermarks(DELTAS, self.number).start_offset <= end:
            return False
        self.task.pass_hole()
        return True

    def resume(self) -> tuple[int, int]:
        """Return where to read `deltas` on, and the epoch of the leader that took the record right below, if it is known.

        A start begins behind the last record that is folded, even if offsets behind that one held none: so a log that has
        lost that record, and has others in its place, is found out.
        """
        next_offset = self.task.next_offset
        return next_offset, self._leader_epoch if self._records_end == next_offset else EPOCH_NONE

    def fold(self, records: Records) -> None:
        """Fold records of this partition into the overlay. Raises `Discontinuous` if they do not stand in order.
        Those from `task.next_offset` on are left for after the next commit; see `Task.fold`.

        Offsets that hold no record are counted, not refused: in Kafka the end of a transaction of others takes one, and what
        they have aborted takes more, and a reader is not told of either. A log that has no such things refuses them itself.
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
            self._records_end = records.offsets[end - 1] + 1
            # That of the run is its last record's. If folding stopped before that, it may be of a later leader than this
            # record's: what the log has lost shows all the same, because that leader began behind the record.
            self._leader_epoch = records.leader_epoch
        if holes := self.task.next_offset - before - count:
            self._metrics.inc(m.DELTAS_HOLES, holes, self.number)

    def prepare(self) -> Commit:
        """Freeze the overlay and work out its commit: to be called only when no commit is under way."""
        now_ms, lineage = self._clock.now_ms(), (self._leader_epoch, self._records_end)
        try:
            self.task.sweep(self._next_producers(), now_ms=min(now_ms, self._elapsed_ms()))
            lookup, found = self.task.freeze(), list[bytes | None]()
            for run in runs(lookup.keys):
                found += self.store.get(run)
            existing = [key for prefix in lookup.prefixes for key, _ in self.store.scan(prefix, prefix_end(prefix))]
            commit = self.task.prepare_commit(found, existing, now_ms=now_ms)
            return msgspec.structs.replace(commit, position=self._signed(commit.position, lineage))
        except StoreCorrupt as error:
            raise self._damaged(error) from None

    def _elapsed_ms(self) -> int:
        """What the wall clock would say if nobody had set it since this object was made: a jump ages no producer."""
        return self._began_ms + int((self._clock.monotonic_s() - self._began_s) * 1000)

    def _next_producers(self) -> list[tuple[bytes, bytes]]:
        """A few producer entries of the store, from where the last ones ended: so that all have their turn."""
        entries = [*islice(self.store.scan(self._swept, prefix_end(TAG_PRODUCER)), PRODUCERS_SWEPT)]
        self._swept = entries[-1][0] + b"\x00" if len(entries) == PRODUCERS_SWEPT else TAG_PRODUCER
        return entries

    def _damaged(self, error: StoreCorrupt) -> StoreCorrupt:
        """Delete the store in which `error` was met, so that the next start rebuilds it; what to raise."""
        self._discard_store(str(error))
        # The store says of which partition it is; the task, which could not decode an entry, does not.
        return Unreadable(str(error), self.number) if error.partition is None else error

    def has(self, store: ReadableStore) -> bool:
        """Whether this is the store that `start` opened, and it is trusted."""
        return self._store is store and not self._damage

    def distrust(self, why: str) -> None:
        """The store is damaged: `close` deletes it, so that the next start rebuilds it, whatever that start reads of it."""
        if self._store is not None:
            self._damage = why

    def _discard_store(self, why: str) -> None:
        _log.warning("partition %d: rebuilding the store: %s", self.number, why)
        self._metrics.inc(m.STORES_REBUILT, 1, self.number)
        store, self._store, self._damage, self._rebuilding = self._store, None, "", True
        self.stage = next_state(TRANSITIONS, self.stage, Step.DISCARD, self.number)
        try:
            if store is not None:
                store.close()
        except PipelineError as error:  # its newest writes can't be kept, and need not be
            _log.debug("partition %d: closing a damaged store: %s", self.number, error)
        self._stores.destroy(self.number)

    def make_durable(self, commit: Commit) -> None:
        """The two durable steps, in their order. Safe from another thread while `fold` goes on.

        Any error means that the process must end without acknowledging anything more (DESIGN section 5, invariant 6).
        """
        if commit.position.next_offset != self.task.position.next_offset:
            self._check_source()
        letters = letter_messages(self.number, commit.dead_letters, self._log) if commit.dead_letters else []
        keys, values = commit.keys[:-1], commit.values[:-1]
        for attempt in range(_ATTEMPTS_MAX):
            position = msgspec.structs.replace(
                commit.position, begin_offset=self._begin, previous_end_offset=self._committed_end
            )
            try:
                self._make_durable(letters, [*keys, POSITION_KEY], [*values, codec.encode_position(position)])
                return
            except Displaced as error:
                _log.warning("partition %d: looking at what was written to its changelog: %s", self.number, error)
                if attempt + 1 == _ATTEMPTS_MAX:
                    raise
            self._look_behind()
            repairs = self._repairs(without=commit.keys)
            keys, values = [*repairs, *commit.keys[:-1]], [*repairs.values(), *commit.values[:-1]]

    def _check_source(self) -> None:
        """Raise `LogCorrupt` if some of what is folded can be of a topic that was made anew since the start.

        It is read before this is asked, and an id never comes back. So while the topic has the id that it had at the start,
        all that is folded is of that topic; a reader does not notice another one that is as long.
        """
        if self._log.topic_id(DELTAS) != self._source_id:
            raise LogCorrupt(f"partition {self.number}: topic {DELTAS} was made anew while it was folded: start again")

    def _make_durable(self, letters: list[Message], keys: list[bytes], values: list[bytes | None]) -> None:
        messages = letters.copy()
        for run in runs(map(Message, repeat(CHANGELOG), repeat(self.number), keys, values)):
            messages += run
        offsets = self._right.commit(
            messages,
            timeout_s=self._settings.commit_timeout_ms / 1000,
            begins={(CHANGELOG, self.number): self._begin},
        )
        self._committed_end, self._begin = offsets[-1], offsets[-1] + self._right.marker_count
        self._foreign.clear()
        meta = StoreMeta(
            changelog_next_offset=offsets[-1], topic_id=self._topic_id, position_offset=offsets[-1] - 1, caught_up=True
        )
        write_entries(self.store, keys, values, meta)

    # What others write to the changelog

    def is_displaced(self, end_offset: int) -> bool:
        """Whether somebody else has written behind our last commit, if the changelog ended there before now.

        To be asked only when no commit is under way.
        """
        return end_offset > self._begin

    def _look_behind(self) -> None:
        """Find the end of the changelog anew, and what others have written behind our last commit."""
        barrier = self._fence()
        self._foreign |= foreign_keys(
            self.number,
            self._log,
            self._clock,
            next_offset=self._committed_end,
            barrier=barrier,
            timeout_s=self._settings.commit_timeout_ms / 1000,
            metrics=self._metrics,
        )

    def _repairs(self, without: Collection[bytes]) -> dict[bytes, bytes | None]:
        """The committed values of those keys of which the changelog's newest record is of others.

        Raises `StoreCorrupt` if one can't be read, which would make the changelog as damaged as the store is.
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
        """Commit nothing but the committed values that others have covered up, so that compaction keeps ours."""
        _log.warning("partition %d: writing %d entries anew that others have written over", self.number, len(self._foreign))
        repairs = self._repairs(without=[POSITION_KEY])
        position = self._signed(self.task.position, (self._leader_epoch, self._records_end))
        position = msgspec.structs.replace(position, committed_at_ms=self._clock.now_ms())
        self.make_durable(Commit([*repairs, POSITION_KEY], [*repairs.values(), None], [], position, 0))

    def _signed(self, position: Position, lineage: tuple[int, int]) -> Position:
        epoch, end = lineage
        return msgspec.structs.replace(position, leader_epoch=epoch, records_end_offset=end, owner_id=self._owner_id)

    def finish(self, commit: Commit) -> None:
        """The commit is durable: let the task know, and count."""
        self.task.committed()
        self._figures.committed(commit, self.task.counts, self.task.position)

    def commit(self) -> Commit:
        """All of a commit, in this thread."""
        commit = self.prepare()
        self.make_durable(commit)
        self.finish(commit)
        return commit

    def close(self) -> None:
        """Let go of the store and of the right to commit. What is in the overlay is dropped; it will be folded again."""
        self.stage = next_state(TRANSITIONS, self.stage, Step.CLOSE, self.number)
        if self._transaction is not None:
            self._transaction.close()
        if self._damage:
            self._discard_store(self._damage)
        if self._rebuilding:
            self.task = self._new_task()  # only here: a commit that was under way has come to its end
        if self._store is not None:
            self._store.close()
            self._store = None
