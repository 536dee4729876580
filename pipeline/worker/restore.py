"""Opens the stores of partitions and restores them from the changelog: nothing else opens, checks or rebuilds a store.

A store that can't be trusted (`StoreCorrupt`) is destroyed and restored from the changelog. A store that is ahead of its
changelog (`StoreAhead`) is the better copy of what the log has lost, so it is never destroyed. It can't be used either:
every owner, standby and server restores from the changelog, and once others have gone on from there, store and changelog are
two histories; a mixture of both would count twice what is in both. A person decides: with `accept_loss` the changelog
counts, and the store is kept under another name, for `pipeline inspect`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

import msgspec

import pipeline.metrics as m
from pipeline.core.answer import RestoreStatus
from pipeline.core.record import POSITION_KEY
from pipeline.errors import (
    Discontinuous,
    Fenced,
    LogCorrupt,
    NewerFormat,
    NotReady,
    PipelineError,
    RecordsLost,
    StoreAhead,
    StoreCorrupt,
    Unavailable,
    Unreadable,
)
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, Log, Store, Stores
from pipeline.topics import CHANGELOG
from pipeline.worker.follower import FETCH_BYTES_MAX, MARKERS_MAX, Follower, read_meta, read_position
from pipeline.worker.foreign import Barrier, Lineage, not_entries

_log = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE_S = 10.0
"""Seconds that a restore waits for its own fence record before it logs that."""
TAIL_COUNT = 8
"""Number of offsets at the end of a changelog that surely hold a position or a fence record."""
_TAIL_POLLS_MAX = 10
_TAIL_BYTES = 64 * 2**20
_HINT = (
    "bring the changelog back, or start with --accept-loss to keep the store aside and go on with what the changelog says"
)
_OPEN_RETRY_S = 0.05
_OPEN_RETRIES = 400


class StoreOpener:
    """Opens the stores of partitions, and rebuilds those that can't be trusted. One thread at a time."""

    def __init__(self, stores: Stores, *, accept_loss: bool = False, metrics: Metrics = NO_METRICS, what: str = "") -> None:
        """`what` is put before the partition where the log speaks of a store."""
        self._stores = stores
        self._accept_loss = accept_loss
        self._metrics = metrics
        self._what = what
        self._destroyed: set[int] = set()
        """Partitions whose store was destroyed and not opened since: readers can have the old one open."""
        self._pause = threading.Event()

    def open(self, partition: int, load: Callable[[Store], T], stopping: Callable[[], bool] | None = None) -> T:
        """Open a store and return what `load` makes of it; if `load` raises, the store is closed.

        After `StoreCorrupt` the store is destroyed, and after `StoreAhead`, with `accept_loss`, set aside; then a new store
        is opened and loaded. With `stopping` this waits until readers have closed a store that was destroyed.
        """
        damage = ""
        try:
            return self._open(partition, load, stopping)
        except StoreAhead as error:
            self.set_aside(partition, error)
        except StoreCorrupt as error:
            damage = str(error)
        if damage:  # only here: as long as the error is there, it holds scans that hold the store's files
            self.destroy(partition, damage)
        return self._open(partition, load, stopping)

    def _open(self, partition: int, load: Callable[[Store], T], stopping: Callable[[], bool] | None) -> T:
        if stopping is not None and partition in self._destroyed:
            store = self._open_destroyed(partition, stopping)
        else:
            store = self._stores.open(partition)
        self._destroyed.discard(partition)
        try:
            return load(store)
        except BaseException:
            store.close()
            raise

    def _open_destroyed(self, partition: int, stopping: Callable[[], bool]) -> Store:
        """Open a store that was destroyed; a scan of the old one that is under way ends with its next look-up."""
        for _ in range(_OPEN_RETRIES):
            try:
                return self._stores.open(partition)
            except Unavailable:
                if stopping():
                    raise
            self._pause.wait(_OPEN_RETRY_S)
        return self._stores.open(partition)

    def destroy(self, partition: int, damage: str) -> None:
        """Delete a store that can't be trusted, so that `open` makes a new one."""
        _log.warning("%spartition %d: rebuilding the store: %s", self._what, partition, damage)
        self._metrics.inc(m.STORES_REBUILT, 1, partition)
        self._destroyed.add(partition)
        self._stores.destroy(partition)

    def set_aside(self, partition: int, error: StoreAhead) -> None:
        """Keep a store, which is closed, under another name, so that `open` makes a new one.

        Raises the error again, with what can be done, unless a person has decided with `accept_loss`.
        """
        if not self._accept_loss:
            raise StoreAhead(f"{error}; {_HINT}") from None
        kept = self._stores.set_aside(partition, str(error))
        self._metrics.inc(m.STORES_SET_ASIDE, 1, partition)
        _log.error("%s; the store is kept as %s, and the changelog counts", error, kept)


class DamageHistory:
    """Remembers damage found in the stores of one process, to end rebuilds that do not help. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: set[tuple[int, str]] = set()

    def note(self, partition: int, error: StoreCorrupt) -> None:
        """Note damage. Raises `LogCorrupt` if a rebuild for this damage was noted before: then the changelog holds it, too.

        Only entries that can't be decoded count. Damage that RocksDB's checksums find is mended by a rebuild, and comes back
        only with a disk that goes on to change bytes.
        """
        if not isinstance(error, Unreadable):
            return
        with self._lock:
            if (partition, str(error)) in self._found:
                raise LogCorrupt(f"{error}; the store was rebuilt for that before, so the changelog holds it too")
            self._found.add((partition, str(error)))


class RestoreProgress(msgspec.Struct, frozen=True):
    """Progress of a restore."""

    partition: int
    entries: int
    """Number of changelog records that were applied."""
    remaining: int
    """Number of offsets still to read; with the holes that compaction left, an upper bound of records."""
    seconds: float
    done: bool = False
    waiting: str = ""
    """Reason why the restore does not go on; empty if it does."""

    @property
    def entries_per_s(self) -> float:
        """Entries a second so far."""
        return self.entries / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float:
        """Time left at that rate; an upper bound, as `remaining` is."""
        return self.remaining / self.entries_per_s if self.entries_per_s else 0.0

    def status(self) -> RestoreStatus:
        """Return the restore as `/v1/status` shows it."""
        rates = round(self.entries_per_s), round(self.seconds_left, 1)
        return RestoreStatus(self.entries, self.remaining, *rates, self.waiting)


def check_restorable(
    partition: int, store: Store, log: Log, clock: Clock, delete_retention_ms: int, end_offset: int | None = None
) -> int:
    """Raise `StoreCorrupt` if the changelog can't bring this store up to date, so that it must be rebuilt.

    Returns where the changelog begins. Raises `StoreAhead` if the store holds what the changelog does not, `RecordsLost` if
    the changelog's beginning is gone. `end_offset` is an end of the changelog that is known for certain, such as the offset
    of the caller's own record; without it the log is asked.
    """
    meta = read_meta(store)
    topic_id = log.topic_id(CHANGELOG)
    if meta.changelog_next_offset and meta.topic_id != topic_id:
        raise StoreAhead(
            f"partition {partition}: the store is of another changelog, {meta.topic_id!r}, than there is now, {topic_id!r}"
        )
    start, end = log.watermarks(CHANGELOG, partition)
    end = end if end_offset is None else end_offset
    if meta.changelog_next_offset > end:
        raise StoreAhead(
            f"partition {partition}: the store has the changelog up to {meta.changelog_next_offset}, but it ends at {end}"
        )
    if 0 < meta.changelog_next_offset < start:
        gone = f"{start - meta.changelog_next_offset} records from {meta.changelog_next_offset} on are gone"
        raise RecordsLost(f"changelog-{partition}: {gone}: nothing can be restored from what is left, bring it back")
    position = read_position(store)
    if meta.changelog_next_offset and not position.committed_at_ms and meta.between_boundaries:
        raise StoreCorrupt("its first restore was never finished, and nothing in it says how long ago that was")
    if meta.changelog_next_offset < end - MARKERS_MAX and position.committed_at_ms:
        away_ms = clock.now_ms() - position.committed_at_ms
        if away_ms > delete_retention_ms:
            raise StoreCorrupt(f"the store is {away_ms} ms behind; tombstones are kept for {delete_retention_ms} ms")
    return start


class RestoreWait:
    """Diagnosis of a restore in which nothing was read for a while."""

    def __init__(self, partition: int, log: Log, clock: Clock, topic_id: str) -> None:
        self._partition = partition
        self._log = log
        self._clock = clock
        self._topic_id = topic_id
        self._since_s = clock.monotonic_s()
        self._own: set[int] = set()
        """Offsets of the fence records that were waited for."""
        self.waiting = ""
        """Reason of the wait; empty as long as records come."""

    def note(self, *, came: bool, next_offset: int, barrier: Barrier) -> bool:
        """Note whether records came since the last call; return whether the owner is to write a further fence record.

        It is, if the last stable offset is that of one of its fence records, whose marker is missing then, and once in any
        case: the marker of the last owner's commit can be missing, too. Raises `Discontinuous` if the topic is another one
        by now.
        """
        now_s = self._clock.monotonic_s()
        if came:
            self._since_s, self.waiting = now_s, ""
        elif now_s - self._since_s > PATIENCE_S:
            if self._log.topic_id(CHANGELOG) != self._topic_id:
                raise Discontinuous(f"changelog-{self._partition} was made anew while it was read")
            self._since_s = now_s
            end_offset = self._log.watermarks(CHANGELOG, self._partition).end_offset
            if end_offset > barrier.offset:
                self.waiting = ""  # the log lets it be read: the reader stands still
                return False
            is_first = not self._own
            self._own.add(barrier.offset)
            is_marker_missing = is_first or end_offset in self._own
            self.waiting = (
                f"changelog-{self._partition} can be read up to {next_offset} only, not up to this worker's own record at"
                f" {barrier.offset}: "
            ) + (
                "the broker may have left out a marker, so one more is written"
                if is_marker_missing
                else "a transaction of somebody else is open there, or a leader that was deposed answers."
                " Find it with kafka-transactions.sh find-hanging, and end it with kafka-transactions.sh abort"
            )
            _log.warning("partition %d is not ready: %s", self._partition, self.waiting)
            return is_marker_missing
        return False


def restore(
    partition: int,
    store: Store,
    log: Log,
    clock: Clock,
    *,
    barrier: Barrier,
    fence: Callable[[], Barrier],
    fetch_count_max: int,
    buffer_entries_max: int,
    delete_retention_ms: int | None = None,
    progress: Callable[[RestoreProgress], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
    metrics: Metrics = NO_METRICS,
) -> Follower:
    """Bring a store to the end of its changelog, which is where this owner's own fence record stands.

    Call it once the old owner is fenced, so that the end is a boundary. The end that the log reports counts for nothing: a
    deposed leader that does not know it yet reports an old one, and so does every leader while a foreign transaction is
    open. The broker can have left out the marker of the fence record, or of what is before it (see
    `KafkaTransaction.commit`): `fence` writes one more, whose marker stands for all, and which is awaited then.

    Returns the follower, which knows where the last commit ended and which foreign records it has left out. Raises
    `NotReady` if `stopping` turns true, `StoreCorrupt` if the changelog does not end with a whole commit, `StoreAhead` if it
    does not hold the store's last one, `Discontinuous` if it lost the fence record.
    """
    topic_id = log.topic_id(CHANGELOG)
    follower = Follower(
        partition,
        store,
        buffer_entries_max=buffer_entries_max,
        topic_id=topic_id,
        metrics=metrics,
        delete_retention_ms=delete_retention_ms,
        start_offset=log.watermarks(CHANGELOG, partition).start_offset,
    )
    follower.lineage.awaited = barrier
    reader = log.reader(CHANGELOG)
    wait = RestoreWait(partition, log, clock, topic_id)
    started = clock.monotonic_s()

    def report(*, done: bool = False) -> None:
        remaining = 0 if done else max(0, barrier.offset + 1 - follower.next_offset)
        seconds = clock.monotonic_s() - started
        waiting = "" if done else wait.waiting
        progress(RestoreProgress(partition, follower.entries_total, remaining, seconds, done=done, waiting=waiting))

    try:
        reader.assign({partition: follower.next_offset})
        while not follower.lineage.passed:
            fetched = reader.poll(record_count_max=fetch_count_max, bytes_max=FETCH_BYTES_MAX, timeout_s=1.0)
            for records in fetched:
                follower.apply(records)
            _check_not_missed(follower, barrier)
            if not follower.lineage.passed:
                is_open = wait.note(came=bool(fetched), next_offset=follower.next_offset, barrier=barrier)
                if is_open:
                    follower.lineage.awaited = barrier = fence()
            report()
            if stopping():
                raise NotReady(f"partition {partition}: restore was stopped{wait.waiting and f'; {wait.waiting}'}")
        if not follower.lineage.committed:
            _check_last_commit(follower)
        follower.settle(barrier.offset + 1)
        follower.save()
        report(done=True)
        return follower
    finally:
        reader.close()


def _check_last_commit(follower: Follower) -> None:
    """Raise `StoreAhead` unless the changelog holds the last commit of the store.

    If nothing was committed since, the length of the changelog proves little: it may have lost its end, and owners that
    noticed that and gave up have written their fence records in its place.
    """
    if follower.store.get([POSITION_KEY]) != [None] and not follower.is_proven:
        what = f"the changelog does not hold the last commit of the store, which ended below {follower.stored_offset}"
        raise StoreAhead(f"partition {follower.partition}: {what}")


def _check_not_missed(follower: Follower, barrier: Barrier) -> None:
    """Raise if records behind the fence record were read, and the fence record was not."""
    if follower.lineage.passed or follower.next_offset <= barrier.offset:
        return
    fence = follower.lineage.fence
    if fence is not None and fence.offset > barrier.offset:  # compaction keeps the newest fence record
        raise Fenced(f"partition {follower.partition}: {fence.owner_id} has taken it over")
    what = f"changelog-{follower.partition} does not hold the fence record at {barrier.offset} any more"
    raise Discontinuous(f"{what}: it was truncated or made anew")


def check_format(log: Log) -> None:
    """Raise `NewerFormat` if a newer program wrote the newest position of a changelog partition.

    Call it before anything is fenced: a program that can't go on must not stop one that can. A start finds what this misses.
    """
    starts, ends = log.start_offsets(CHANGELOG), log.end_offsets(CHANGELOG)
    tails = {number: max(starts.get(number, 0), end - TAIL_COUNT) for number, end in ends.items()}
    left = {number: ends[number] for number, first in tails.items() if first < ends[number]}
    if not left:
        return
    reader = log.reader(CHANGELOG)
    try:
        reader.assign({number: tails[number] for number in left})
        for _ in range(_TAIL_POLLS_MAX):
            for records in reader.poll(record_count_max=1_000, bytes_max=_TAIL_BYTES, timeout_s=0.5):
                lineage = Lineage(records.partition, 0)
                for index in not_entries(records.keys):
                    if records.keys[index] == POSITION_KEY:
                        lineage.take_position(records.offsets[index], records.values[index])
                if records.next_offset >= left.get(records.partition, 0):
                    left.pop(records.partition, None)
            if not left:
                return
    except NewerFormat:
        raise
    except PipelineError as error:
        _log.info("whether the changelog is of a newer format is not known yet: %s", error)
    finally:
        reader.close()
