"""Applies a changelog to a store: restore today; standbys and query replicas are the same thing running on.

A follower's store is always exactly at a commit boundary, that is, just behind a position record. Compaction removes old
position records, so while catching up there may be none for a long stretch: then entries are applied all the same and
the store is marked as between boundaries, which nobody serves or folds into, until the next position record ends it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from pipeline.core.codec import check_version, decode_position
from pipeline.core.record import NO_POSITION, POSITION_KEY, STORE_META_KEY, Position, Records
from pipeline.errors import BadRecord, NewerFormat, NotReady, PipelineError, StoreCorrupt
from pipeline.ports import Clock, Log, Store
from pipeline.topics import CHANGELOG

_log = logging.getLogger(__name__)
FETCH_BYTES_MAX = 64 * 2**20


class StoreMeta(msgspec.Struct, frozen=True, array_like=True):
    """What a store says of itself; written in the same batch as the entries."""

    version: int = 1
    changelog_next_offset: int = 0
    between_boundaries: bool = False
    topic_id: str = ""
    """Of which changelog the offset is; see `ports.Log.topic_id`."""


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
        return self.remaining / self.entries_per_s if self.entries_per_s else 0.0

    def status(self) -> dict[str, float]:
        """What `/v1/status` says of it."""
        return {
            "entries": self.entries,
            "remaining": self.remaining,
            "entries_per_s": round(self.entries_per_s),
            "seconds_left": round(self.seconds_left, 1),
        }


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
    """Applies what is read of one partition's changelog to its store. Owned by one thread.

    `buffer_entries_max` and `buffer_bytes_max` bound what is held back for a commit boundary. `on_between` is called
    before a store that was at a boundary is written without being at one again: nobody may read it then.
    """

    def __init__(
        self,
        partition: int,
        store: Store,
        *,
        buffer_entries_max: int,
        buffer_bytes_max: int = 64 * 2**20,
        topic_id: str = "",
        on_between: Callable[[], None] = lambda: None,
    ) -> None:
        self.partition = partition
        self.entries_total = 0
        self.store = store
        self._entries_max = buffer_entries_max
        self._bytes_max = buffer_bytes_max
        self._topic_id = topic_id
        self._on_between = on_between
        self._meta = read_meta(store)
        self._keys: list[bytes] = []
        self._values: list[bytes | None] = []
        self._bytes = 0
        self.next_offset = self._meta.changelog_next_offset

    @property
    def at_boundary(self) -> bool:
        """Whether the store reflects whole commits only, and everything that was read is in it."""
        return not self._keys and not self._meta.between_boundaries

    def apply(self, records: Records) -> None:
        """Apply what was read next of this partition: up to its last position record now, the rest with the next one."""
        keys = list(records.keys)
        if None in keys:
            raise StoreCorrupt(f"changelog-{self.partition}: a record without a key near {records.next_offset}")
        boundary = len(keys) - keys[::-1].index(POSITION_KEY) if POSITION_KEY in keys else 0
        self.next_offset = records.next_offset
        self.entries_total += len(keys)
        if boundary:
            self._keys += keys[:boundary]  # type: ignore[arg-type]
            self._values += records.values[:boundary]
            last = boundary == len(keys)
            self._write(records.next_offset if last else records.offsets[boundary - 1] + 1, between=False)
        rest_keys, rest_values = keys[boundary:], records.values[boundary:]
        self._keys += rest_keys  # type: ignore[arg-type]
        self._values += rest_values
        self._bytes += sum(map(len, rest_keys)) + sum(map(len, filter(None, rest_values)))  # type: ignore[arg-type]
        full = len(self._keys) >= self._entries_max or self._bytes >= self._bytes_max
        if full or (self._keys and self._meta.between_boundaries):  # there it is: to hold anything back helps nobody
            self._write(records.next_offset, between=True)

    def _write(self, next_offset: int, *, between: bool) -> None:
        if between and not self._meta.between_boundaries:
            self._on_between()
        self._meta = StoreMeta(changelog_next_offset=next_offset, between_boundaries=between, topic_id=self._topic_id)
        latest = dict(zip(self._keys, self._values, strict=True))
        write_entries(self.store, [*latest], [*latest.values()], self._meta)
        self._keys, self._values, self._bytes = [], [], 0


MARKERS_MAX = 1
"""Offsets at the end of a changelog that can hold no tombstone: a transaction's marker, or a position record by itself."""


def check_restorable(partition: int, store: Store, log: Log, clock: Clock, delete_retention_ms: int) -> None:
    """Raise `StoreCorrupt` if the changelog can't bring this store up to date, so that it must be rebuilt."""
    meta = read_meta(store)
    topic_id = log.topic_id(CHANGELOG)
    if meta.changelog_next_offset and meta.topic_id != topic_id:
        raise StoreCorrupt(f"the store reflects another changelog, of id {meta.topic_id!r}; this one has {topic_id!r}")
    start, end = log.watermarks(CHANGELOG, partition)
    if meta.changelog_next_offset > end:
        raise StoreCorrupt(f"the store reflects the changelog up to {meta.changelog_next_offset}, but it ends at {end}")
    if 0 < meta.changelog_next_offset < start:
        raise StoreCorrupt(f"the changelog starts at {start}, beyond the store's {meta.changelog_next_offset}")
    position = read_position(store)
    if meta.changelog_next_offset and not position.committed_at_ms:
        raise StoreCorrupt("its first restore was never finished, and nothing in it says how long ago that was")
    if meta.changelog_next_offset < end - MARKERS_MAX and position.committed_at_ms:
        away_ms = clock.now_ms() - position.committed_at_ms
        if away_ms > delete_retention_ms:
            raise StoreCorrupt(f"the store is {away_ms} ms behind; tombstones are kept for {delete_retention_ms} ms")


TAIL_COUNT = 3
"""Offsets at the end of a changelog that hold its last position record, behind which is a marker."""
_TAIL_POLLS_MAX = 10


def check_format(log: Log) -> None:
    """Raise `NewerFormat` if the newest that a changelog partition holds was written by a newer program.

    Before anything is fenced: a program that can't go on must not stop one that can. What it does not see, a start does.
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
            for records in reader.poll(record_count_max=1_000, bytes_max=FETCH_BYTES_MAX, timeout_s=0.5):
                for value in filter(None, records.values):
                    _check_one(records.partition, value)
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


def _check_one(partition: int, value: bytes) -> None:
    try:
        check_version(value, f"changelog-{partition}")
    except NewerFormat:
        raise
    except BadRecord as error:
        _log.debug("%s", error)  # whoever restores it says more


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
    topic_id = log.topic_id(CHANGELOG)
    follower = Follower(partition, store, buffer_entries_max=buffer_entries_max, topic_id=topic_id)
    reader = log.reader(CHANGELOG)
    started = clock.monotonic_s()
    try:
        reader.assign({partition: follower.next_offset})
        while follower.next_offset < end:
            for records in reader.poll(record_count_max=fetch_count_max, bytes_max=FETCH_BYTES_MAX, timeout_s=1.0):
                follower.apply(records)
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
