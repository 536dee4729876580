"""Carries out the protocol of one task: what the core decides, in the order that it decides, through the ports.

It has no thread and no loop, so the simulator drives exactly this code, with a crash between any two durable steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import repeat
from typing import Any

import msgspec

import pipeline.metrics as m
from pipeline.core.record import TAG_DEFINITION, TAG_PRODUCER, Records, prefix_end, runs
from pipeline.core.task import Commit, Counts, DeadLetter, Task
from pipeline.errors import LogCorrupt, NotReady, RecordsLost, StoreCorrupt
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, Log, Message, Store, Stores, Transaction
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.follower import (
    Progress,
    StoreMeta,
    check_restorable,
    read_meta,
    read_position,
    restore,
    write_entries,
)

_log = logging.getLogger(__name__)


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
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self.number = number
        self._log = log
        self._stores = stores
        self._clock = clock
        self._settings = settings
        self._source_id = self._topic_id = ""
        self._committed_end = 0
        """Where the changelog ended behind our last commit."""
        self._committed = False
        """Whether that was one of this object's: then the transaction knows too where to go on."""
        self.task = self._new_task()
        self._delete_retention_ms = delete_retention_ms
        self._app = app
        self._metrics = metrics
        for metric in _COUNTED:
            metrics.inc(metric, 0, number)  # there from the start: Prometheus sees a rise only from a value it has seen
        self._exported = Counts()
        self._transaction: Transaction | None = None
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """The store, once `start` has returned: at a commit boundary at any time."""
        if self._store is None:
            raise NotReady(f"partition {self.number} is being restored")
        return self._store

    @property
    def started(self) -> bool:
        """Whether `start` has returned: what the task says is true."""
        return self._store is not None

    def start(
        self, progress: Callable[[Progress], None] = lambda _: None, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        """Take the partition over: fence the old owner, restore, load the position. Blocks until it can fold.

        Raises `RecordsLost` if records between position and log start are gone and `accept_loss` is off, `NotReady` if
        `stopping` turned true.
        """
        self._source_id, self._topic_id = self._log.topic_id(DELTAS), self._log.topic_id(CHANGELOG)
        if stopping():  # as late as can be: who is fenced by one that gives up has lost time for nothing
            raise NotReady(f"partition {self.number}: its start was stopped")
        self._transaction = self._log.transaction(f"{self._app}-{self.number}")
        corrupt = ""
        try:
            store = self._restore(progress, stopping)
        except StoreCorrupt as error:
            corrupt = str(error)
        if corrupt:  # only here: as long as the error is there, it holds scans that hold the store's files
            _log.warning("partition %d: rebuilding the store: %s", self.number, corrupt)
            self._metrics.inc(m.STORES_REBUILT, 1, self.number)
            self._stores.destroy(self.number)
            store = self._restore(progress, stopping)
        self._store = store
        self._check_position()

    def _restore(self, progress: Callable[[Progress], None], stopping: Callable[[], bool]) -> Store:
        store = self._stores.open(self.number)
        try:
            check_restorable(self.number, store, self._log, self._clock, self._delete_retention_ms)
            count = restore(
                self.number,
                store,
                self._log,
                self._clock,
                fetch_count_max=self._settings.restore_fetch_count_max,
                buffer_entries_max=self._settings.restore_buffer_entries_max,
                progress=progress,
                stopping=stopping,
            )
            self._load(store)
        except BaseException:
            store.close()
            raise
        self._metrics.inc(m.RESTORE_ENTRIES, count, self.number)
        return store

    def _new_task(self) -> Task:
        return Task(self.number, self._settings.task_limits(), self._source_id)

    def _load(self, store: Store) -> None:
        """A new task, from the store's entries."""
        self.task = self._new_task()
        self._committed_end = read_meta(store).changelog_next_offset
        self.task.restored(
            read_position(store),
            (value for _, value in store.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION))),
            ((key[1:].decode(), value) for key, value in store.scan(TAG_PRODUCER, prefix_end(TAG_PRODUCER))),
        )

    def _check_position(self) -> None:
        start, end = self._log.watermarks(DELTAS, self.number)
        next_offset, source_id = self.task.next_offset, self.task.position.source_id
        anew = bool(source_id) and source_id != self._source_id
        if start <= next_offset <= end and not anew:
            return
        if anew:
            what = f"the topic was made anew: the position, {next_offset}, is in the one that is gone"
        elif next_offset < start:
            what = f"{start - next_offset} records ({next_offset} to {start - 1}) were deleted before they were folded"
        else:
            what = f"the position is {next_offset}, but the topic ends at {end}: it was truncated or made anew"
        if not self._settings.accept_loss:
            raise RecordsLost(f"partition {self.number}: {what}; start with --accept-loss to go on without them")
        _log.error("partition %d: %s; going on without them", self.number, what)
        self.task.skip_to(start)

    def fold(self, records: Records) -> None:
        """Fold records of this partition into the overlay."""
        self.task.fold(records)

    def prepare(self) -> Commit:
        """Freeze the overlay and work out its commit: to be called only when no commit is under way."""
        keys, found = self.task.freeze(), list[bytes | None]()
        try:
            for run in runs(keys):
                found += self.store.get(run)
            return self.task.prepare_commit(found, now_ms=self._clock.now_ms())
        except StoreCorrupt:
            self._discard_store()
            raise

    def _discard_store(self) -> None:
        """So that the next start rebuilds it: what is corrupt may be an entry that a start does not read."""
        store, self._store = self.store, None
        try:
            store.close()
        finally:
            self._stores.destroy(self.number)

    def make_durable(self, commit: Commit) -> None:
        """The two durable steps, in their order. Safe from another thread while `fold` goes on.

        Any error means that the process must end without acknowledging anything more (DESIGN section 5, invariant 6).
        """
        if self._transaction is None:
            raise NotReady(f"partition {self.number} was not started")
        messages = self._dead_letters(commit)
        for run in runs(map(Message, repeat(CHANGELOG), repeat(self.number), commit.keys, commit.values)):
            messages += run
        if not self._committed and self._log.topic_id(CHANGELOG) != self._topic_id:
            raise LogCorrupt(f"changelog-{self.number} was made anew since it was restored from")
        offsets = self._transaction.commit(messages, timeout_s=self._settings.commit_timeout_ms / 1000)
        begins = offsets[-1] - len(commit.keys)
        if begins < self._committed_end:
            went = f"from {self._committed_end} to {begins}"
            raise LogCorrupt(f"changelog-{self.number} went back {went}: it was made anew or truncated")
        self._committed_end, self._committed = offsets[-1], True
        meta = StoreMeta(changelog_next_offset=offsets[-1], topic_id=self._topic_id)
        write_entries(self.store, commit.keys, commit.values, meta)

    def _dead_letters(self, commit: Commit) -> list[Message]:
        """The dead letters as messages; a letter that its topic can't take goes without the bytes of its record."""
        if not commit.dead_letters:
            return []
        bytes_max = self._log.message_bytes_max(DEAD_LETTERS)
        messages = []
        for key, value in commit.dead_letters:
            if len(value) > bytes_max:
                letter = msgspec.msgpack.decode(value, type=DeadLetter)
                reason = (
                    f"{letter.reason}; left out: its {len(letter.value or b'')} bytes, too many for the dead-letter topic"
                )
                value = msgspec.msgpack.encode(msgspec.structs.replace(letter, reason=reason, value=None))
            messages.append(Message(DEAD_LETTERS, self.number, key, value))
        return messages

    def finish(self, commit: Commit) -> None:
        """The commit is durable: let the task know, and count."""
        self.task.committed()
        inc, number = self._metrics.inc, self.number
        inc(m.COMMITS, 1, number)
        inc(m.ENTRIES_COMMITTED, commit.series_count, number)
        inc(m.DEAD_LETTERS, len(commit.dead_letters), number)
        if commit.dead_letters:
            letter = msgspec.msgpack.decode(commit.dead_letters[-1][1], type=DeadLetter)
            count = len(commit.dead_letters)
            _log.warning("partition %d: %d dead letters; the last, at %d: %s", number, count, letter.offset, letter.reason)
        counts = self.task.counts
        for metric, name in _EXPORTED.items():
            inc(metric, getattr(counts, name) - getattr(self._exported, name), number)
        self._exported = msgspec.structs.replace(counts)
        self._metrics.set(m.NEXT_OFFSET, self.task.position.next_offset, number)

    def commit(self) -> Commit:
        """All of a commit, in this thread."""
        commit = self.prepare()
        self.make_durable(commit)
        self.finish(commit)
        return commit

    def close(self) -> None:
        """Let go of the store and of the right to commit. What is in the overlay is dropped; it will be folded again."""
        if self._transaction is not None:
            self._transaction.close()
        if self._store is not None:
            self._store.close()
            self._store = None


def partition_status(partition: Partition, end_offset: int | None, progress: Progress | None) -> dict[str, Any]:
    """What `/v1/status` says of a partition that is folded here. Without `end_offset` the log is away."""
    next_offset = partition.task.position.next_offset
    status: dict[str, Any] = {
        "partition": partition.number,
        "phase": partition.task.phase.value,
        "next_offset": next_offset,
        "end_offset": end_offset,
        "lag": None if end_offset is None else max(0, end_offset - next_offset),
        "committed_at_ms": partition.task.position.committed_at_ms,
    }
    if progress is not None and not progress.done:
        status["restore"] = progress.status()
    return status


_EXPORTED = {
    m.BATCHES_FOLDED: "batches_folded",
    m.ENTRIES_FOLDED: "entries_folded",
    m.BATCHES_DUPLICATE: "batches_duplicate",
    m.BATCHES_STALE: "batches_stale",
    m.PRODUCERS_EVICTED: "producers_evicted",
}
_COUNTED = (
    *_EXPORTED,
    m.COMMITS,
    m.ENTRIES_COMMITTED,
    m.DEAD_LETTERS,
    m.OVERLAY_FULL,
    m.RESTORE_ENTRIES,
    m.STORES_REBUILT,
)
"""All counters of a partition."""
