"""Applies a changelog to a store: restore today; standbys and query replicas are the same thing running on.

A follower's store is always exactly at a commit boundary, that is, just behind a position record. Compaction removes old
position records, so while catching up there may be none for a long stretch: then entries are applied all the same and
the store is marked as between boundaries, which nobody serves or folds into, until the next position record ends it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from pipeline.core.codec import decode_position
from pipeline.core.record import NO_POSITION, POSITION_KEY, STORE_META_KEY, Position, Records
from pipeline.errors import BadRecord, NotReady, StoreCorrupt
from pipeline.ports import Clock, Log, LogReader, Store
from pipeline.topics import CHANGELOG

_log = logging.getLogger(__name__)


class StoreMeta(msgspec.Struct, frozen=True, array_like=True):
    """What a store says of itself; written in the same batch as the entries."""

    version: int = 1
    changelog_next_offset: int = 0
    between_boundaries: bool = False


class Progress(msgspec.Struct, frozen=True):
    """How far a restore is."""

    partition: int
    entries: int
    """Changelog records applied so far."""
    remaining: int
    """Offsets still to read; holes that compaction left count too, so it is an upper bound of records."""
    seconds: float
    done: bool = False

    @property
    def entries_per_s(self) -> float:
        """The rate so far."""
        return self.entries / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float:
        """At that rate; an upper bound, as `remaining` is."""
        return self.remaining / self.entries_per_s if self.entries else 0.0


def read_meta(store: Store) -> StoreMeta:
    """What the store says of itself; `StoreCorrupt` if that is not readable."""
    (value,) = store.get([STORE_META_KEY])
    if value is None:
        return StoreMeta()
    try:
        meta = msgspec.msgpack.decode(value, type=StoreMeta)
    except (msgspec.MsgspecError, ValueError) as error:
        raise StoreCorrupt(f"store meta: {error}") from None
    if meta.version != 1:
        raise StoreCorrupt(f"store meta of version {meta.version}; this version reads 1")
    return meta


def read_position(store: Store) -> Position:
    """The position of a store that is at a boundary."""
    (value,) = store.get([POSITION_KEY])
    try:
        return NO_POSITION if value is None else decode_position(value)
    except BadRecord as error:
        raise StoreCorrupt(str(error)) from None


def write_entries(store: Store, keys: list[bytes], values: list[bytes | None], meta: StoreMeta) -> None:
    """One atomic write of entries and of what part of the changelog the store reflects with them."""
    store.write([*keys, STORE_META_KEY], [*values, msgspec.msgpack.encode(meta)])


class Follower:
    """Follows one partition's changelog into its store. Owned by one thread."""

    def __init__(self, partition: int, store: Store, reader: LogReader, *, buffer_entries_max: int) -> None:
        self.partition = partition
        self.entries_total = 0
        self._store = store
        self._reader = reader
        self._buffer_max = buffer_entries_max
        self._meta = read_meta(store)
        self._keys: list[bytes] = []
        self._values: list[bytes | None] = []
        self.next_offset = self._meta.changelog_next_offset
        reader.assign({partition: self.next_offset})

    @property
    def at_boundary(self) -> bool:
        """Whether the store reflects whole commits only, and everything that was read is in it."""
        return not self._keys and not self._meta.between_boundaries

    def step(self, *, record_count_max: int, timeout_s: float) -> int:
        """Read and apply some records; how many were read."""
        count = 0
        for records in self._reader.poll(record_count_max=record_count_max, bytes_max=64 * 2**20, timeout_s=timeout_s):
            self._apply(records)
            count += len(records.offsets)
        self.entries_total += count
        return count

    def _apply(self, records: Records) -> None:
        keys = list(records.keys)
        if None in keys:
            raise StoreCorrupt(f"changelog-{self.partition}: a record without a key near {records.next_offset}")
        boundary = len(keys) - keys[::-1].index(POSITION_KEY) if POSITION_KEY in keys else 0
        self.next_offset = records.next_offset
        if boundary:
            self._keys += keys[:boundary]  # type: ignore[arg-type]
            self._values += records.values[:boundary]
            last = boundary == len(keys)
            self._write(records.next_offset if last else records.offsets[boundary - 1] + 1, between=False)
        self._keys += keys[boundary:]  # type: ignore[arg-type]
        self._values += records.values[boundary:]
        if len(self._keys) >= self._buffer_max:
            self._write(records.next_offset, between=True)

    def _write(self, next_offset: int, *, between: bool) -> None:
        self._meta = StoreMeta(changelog_next_offset=next_offset, between_boundaries=between)
        latest = dict(zip(self._keys, self._values, strict=True))
        write_entries(self._store, [*latest], [*latest.values()], self._meta)
        self._keys, self._values = [], []


def check_restorable(partition: int, store: Store, log: Log, clock: Clock, delete_retention_ms: int) -> None:
    """Raise `StoreCorrupt` if the changelog can't bring this store up to date, so that it must be rebuilt."""
    meta = read_meta(store)
    start, end = log.watermarks(CHANGELOG, partition)
    if meta.changelog_next_offset > end:
        raise StoreCorrupt(f"the store reflects the changelog up to {meta.changelog_next_offset}, but it ends at {end}")
    if 0 < meta.changelog_next_offset < start:
        raise StoreCorrupt(f"the changelog starts at {start}, beyond the store's {meta.changelog_next_offset}")
    position = read_position(store)
    if meta.changelog_next_offset and not position.committed_at_ms:
        raise StoreCorrupt("its first restore was never finished, and nothing in it says how long ago that was")
    if meta.changelog_next_offset < end and position.committed_at_ms:
        away_ms = clock.now_ms() - position.committed_at_ms
        if away_ms > delete_retention_ms:
            raise StoreCorrupt(f"the store is {away_ms} ms behind; tombstones are kept for {delete_retention_ms} ms")


def restore(
    partition: int,
    store: Store,
    log: Log,
    clock: Clock,
    *,
    fetch_count_max: int,
    buffer_entries_max: int,
    progress: Callable[[Progress], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> int:
    """Bring a store to the end of its changelog; how many records that took.

    Call it once nobody else can commit to the partition (the old owner is fenced), so that the end is a boundary. Raises
    `NotReady` if `stopping` turns true, `StoreCorrupt` if the changelog does not end with a whole commit.
    """
    end = log.watermarks(CHANGELOG, partition).end_offset
    reader = log.reader(CHANGELOG)
    started = clock.monotonic_s()
    try:
        follower = Follower(partition, store, reader, buffer_entries_max=buffer_entries_max)
        while follower.next_offset < end:
            follower.step(record_count_max=fetch_count_max, timeout_s=1.0)
            progress(
                Progress(
                    partition, follower.entries_total, max(0, end - follower.next_offset), clock.monotonic_s() - started
                )
            )
            if stopping():
                raise NotReady(f"partition {partition}: restore was stopped")
        if not follower.at_boundary:
            raise StoreCorrupt(f"changelog-{partition} ends within a commit; something else has written to it")
        progress(Progress(partition, follower.entries_total, 0, clock.monotonic_s() - started, done=True))
        return follower.entries_total
    finally:
        reader.close()
