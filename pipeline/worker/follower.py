"""Applies a changelog to a store: for a restore, and without end for standbys and query replicas.

A follower's store is always exactly at a commit boundary, that is, just behind a position record. Compaction removes old
position records, so while catching up there may be none for a long stretch. Then entries are applied all the same, and the
store is marked as between boundaries until the next position record; nothing serves or folds into such a store.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from operator import lt

import msgspec

from pipeline.core.codec import decode_position
from pipeline.core.record import FENCE_KEY, NO_POSITION, POSITION_KEY, STORE_META_KEY, Position, Records
from pipeline.errors import (
    BadRecord,
    Discontinuous,
    StoreAhead,
    StoreCorrupt,
)
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Store
from pipeline.worker.foreign import Foreign, Lineage, Sieve, not_entries

FETCH_BYTES_MAX = 64 * 2**20
MARKERS_MAX = 1
"""Offsets at the end of a changelog that can hold no tombstone: a transaction's marker, or a position record by itself."""


class StoreMeta(msgspec.Struct, frozen=True, array_like=True):
    """Record of a store about itself, written in the same batch as the entries."""

    version: int = 1
    changelog_next_offset: int = 0
    between_boundaries: bool = False
    topic_id: str = ""
    """Id of the changelog that the offset is of; see `ports.Log.topic_id`."""
    position_offset: int = -1
    """Offset of the store's position record; -1 if it is not known."""
    caught_up: bool = False
    """True if the changelog once held no entries behind that record. Then the store has all that was committed by then,
    whatever others have written since."""


def read_meta(store: Store) -> StoreMeta:
    """Return the meta record of a store. Raises `StoreCorrupt` if it can't be decoded."""
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
    """Return the position of a store that is at a boundary."""
    (value,) = store.get([POSITION_KEY])
    try:
        return NO_POSITION if value is None else decode_position(value)
    except BadRecord as error:
        raise StoreCorrupt(str(error)) from None


def write_entries(store: Store, keys: list[bytes], values: list[bytes | None], meta: StoreMeta) -> None:
    """Write entries and the meta record that belongs to them, in one atomic batch."""
    store.write([*keys, STORE_META_KEY], [*values, msgspec.msgpack.encode(meta)])


class Follower:
    """Applies the records of one partition's changelog to its store. Owned by one thread.

    A follower first reads the store's last commit again, from `next_offset`: a changelog that has lost that commit can have
    gone on without it, and be longer than the store knows. It also reads again what a store that was left between boundaries
    has taken in behind that commit. `buffer_entries_max` and `buffer_bytes_max` bound what is held back for a commit
    boundary. `on_between` is called before a store leaves a boundary: nothing may read the store then.
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
        metrics: Metrics = NO_METRICS,
        delete_retention_ms: int | None = None,
        start_offset: int = 0,
    ) -> None:
        self.partition = partition
        self.entries_total = 0
        self.store = store
        self._entries_max = buffer_entries_max
        self._bytes_max = buffer_bytes_max
        self._topic_id = topic_id
        self._on_between = on_between
        self._meta = read_meta(store)
        self._delete_retention_ms = delete_retention_ms
        self._since = read_position(store)
        """Position of the store when it was opened, or when last the whole changelog had been read."""
        (self._position,) = store.get([POSITION_KEY])
        """Position record when the store was opened; if it differs later, the store is damaged, not the changelog."""
        self._holed = False
        """True if compaction has removed some of what was read since."""
        self._read_at_ms: int | None = 0
        """Time at which the log accepted the newest record read since the store was opened; None once all had been read."""
        self._bytes = self._counted = 0
        """Bytes of the entries that are held back, and the number of entries that are counted in them."""
        self.next_offset = self.stored_offset = self._meta.changelog_next_offset
        """Below `stored_offset` all records were in the store when it was opened."""
        self.is_proven = False
        """True if the changelog was seen to hold the store's last commit, or one that followed it."""
        self._differing: set[bytes] = set()
        """Keys whose values in the store differ from the changelog's, among those that it took in behind its last commit."""
        place = self._meta.position_offset
        if not self._meta.between_boundaries:  # records behind the last commit were foreign, and can be others by now
            if place >= 0:
                self.stored_offset = place + 1
            elif self._since == NO_POSITION:
                self.next_offset = self.stored_offset = min(self.next_offset, start_offset)
        self.lineage = Lineage(partition, place + 1 if self._meta.between_boundaries else self.stored_offset)
        if place >= 0 and self._since.begin_offset >= start_offset:
            self.next_offset = min(self.next_offset, self._since.begin_offset)
        self._reads_anew = self.next_offset < self.stored_offset
        """True if the follower reads the store's last commit again."""
        self.foreign = Foreign(partition, metrics)
        self._sieve = Sieve(self.lineage, self.foreign)
        self._caught_up = self._had_all = self._meta.caught_up

    @property
    def had_all(self) -> bool:
        """True if the store had all that is committed before anything was read."""
        return self._had_all and not self.lineage.committed

    @property
    def at_boundary(self) -> bool:
        """True if the store reflects whole commits only, and everything that was read is in it."""
        return not self._sieve and not self._meta.between_boundaries and self.next_offset >= self.stored_offset

    def apply(self, records: Records) -> None:
        """Apply the records that were read next: up to their last position record now, the rest with the next one.

        Raises `Discontinuous` if the records are below those that were read before, `NewerFormat` if a newer program has
        committed them.
        """
        first = records.offsets[0] if records.offsets else records.next_offset
        if min(first, records.next_offset) < self.next_offset:
            raise Discontinuous(f"changelog-{self.partition} went back from {self.next_offset} to {first}")
        if self.next_offset < self.stored_offset:
            records = self._take_known(records)
        sieve = self._sieve
        sieve.take(records)
        if sieve.whole:
            self._check_row()
        self._holed = self._holed or records.next_offset - self.next_offset > len(records.keys) + MARKERS_MAX
        if self._read_at_ms is not None:
            self._read_at_ms = max((self._read_at_ms, *records.at_ms[-1:]))
        self.next_offset = records.next_offset
        self.entries_total += len(records.keys) - sieve.fences
        if sieve.whole:
            # Foreign records behind a commit that its owner has not repaired are read again after a restart.
            last = sieve.whole == len(sieve) and not self.foreign.keys
            self._write(sieve.whole, self.next_offset if last else sieve.whole_end, between=False)
            self._check_away()
        self._bytes += sieve.bytes_from(self._counted)
        self._counted = len(sieve)
        full = len(sieve) >= self._entries_max or self._bytes >= self._bytes_max
        if full or (sieve and self._meta.between_boundaries):  # already between boundaries: holding back gains nothing
            self._write(len(sieve), records.next_offset, between=True)
        elif sieve.fences:  # so that a partition that only changes its owner is not behind after a restart
            self.save()

    def _take_known(self, records: Records) -> Records:
        """Check records that the store has, of its last commit or behind it; return the records behind them.

        Raises `StoreAhead` if other records are at the offsets of the commit. Compaction can remove it, but puts none there.
        """
        count, place = bisect_left(records.offsets, self.stored_offset), self._meta.position_offset
        for offset, key, value in zip(records.offsets[:count], records.keys[:count], records.values[:count], strict=True):
            if offset > place or (offset < place and key not in (POSITION_KEY, FENCE_KEY)):
                continue
            if offset < place or key != POSITION_KEY or value != self._position:
                what = f"the changelog has another record at {offset} than the last commit of the store"
                raise StoreAhead(f"partition {self.partition}: {what}, which ended at {place}")
            self.is_proven = True
        self._check_taken(records, bisect_left(records.offsets, place + 1), count)
        self.next_offset = min(records.next_offset, self.stored_offset)
        return Records(
            records.partition,
            records.offsets[count:],
            records.at_ms[count:],
            records.keys[count:],
            records.values[count:],
            max(records.next_offset, self.next_offset),
        )

    def _check_taken(self, records: Records, start: int, end: int) -> None:
        """Raise if these are not the records that a store between boundaries has taken in behind its last commit.

        `StoreCorrupt` if the changelog holds that commit, because the store has no whole commit beyond it; else
        `StoreAhead`.
        """
        special = {start + i for i in not_entries(records.keys[start:end])}
        taken = {key: records.values[i] for i, key in enumerate(records.keys[start:end], start) if key and i not in special}
        found = dict(zip(taken, self.store.get([*taken]), strict=True))
        self._differing = (self._differing - taken.keys()) | {key for key in taken if taken[key] != found[key]}
        positions = [i for i in special if records.keys[i] == POSITION_KEY]
        ended = any(self.lineage.take_position(records.offsets[i], records.values[i]) for i in positions)
        if ended or (self._differing and self.is_proven and records.next_offset >= self.stored_offset):
            what = f"the changelog has others up to {self.stored_offset} than the store took in behind its last commit"
            raise (StoreCorrupt if self.is_proven else StoreAhead)(f"partition {self.partition}: {what}")

    def _check_row(self) -> None:
        """Raise `StoreAhead` if the owner that made the first commit that follows did not know the store's last one."""
        place = self._meta.position_offset
        if not self.is_proven and self.lineage.first_previous_end <= place:
            what = f"the changelog has gone on from {self.lineage.first_previous_end} without the last commit of the store"
            raise StoreAhead(f"partition {self.partition}: {what}, which ended at {place}")
        self.is_proven = True

    def settle(self, end_offset: int) -> None:
        """Note that all below `end_offset` was read, and that the log held no more by then.

        So compaction can't have removed a position record behind the entries that are held back: there was none, and they
        are foreign. Raises `StoreCorrupt` if some of them are in the store already, `StoreAhead` if the changelog holds
        neither the store's last commit nor one that follows it.
        """
        if self._reads_anew and not self.is_proven and self.next_offset >= self.stored_offset:
            what = f"the changelog ends at {end_offset} without the last commit of the store"
            raise StoreAhead(f"partition {self.partition}: {what}, which ended at {self._meta.position_offset}")
        if self._meta.between_boundaries:
            raise StoreCorrupt(f"changelog-{self.partition} ends within a commit; something else has written to it")
        self._since, self._holed = read_position(self.store), False
        self._read_at_ms = None  # from here on the follower was never away
        self._sieve.drop(0, end_offset)
        self._bytes = self._counted = 0  # counted anew with the next records
        self._caught_up = self._caught_up or not self.foreign.keys

    def _check_away(self) -> None:
        """Raise `StoreCorrupt` if tombstones can have been removed before they were read.

        `check_restorable` compares the clocks of this machine and of the committing one, and one may be wrong. This compares
        times of the log only: when it accepted the records read now, and the newest delta that the store had. (A commit is
        later than its deltas, so the store was away for at most this long.)
        """
        if not self._holed or self._delete_retention_ms is None or not self._since.source_at_ms:
            return
        away_ms = max(self._read_at_ms or 0, read_position(self.store).source_at_ms) - self._since.source_at_ms
        if away_ms > self._delete_retention_ms:
            kept = f"tombstones are kept for {self._delete_retention_ms} ms"
            raise StoreCorrupt(
                f"changelog-{self.partition} has gone on for {away_ms} ms since the store was current; {kept}"
            )

    def save(self) -> None:
        """Write to the store how far the changelog was read, if the store is at a boundary."""
        if self.at_boundary and not self.foreign.keys and self._meta.changelog_next_offset < self.next_offset:
            self._write(0, self.next_offset, between=False)

    def _write(self, count: int, next_offset: int, *, between: bool) -> None:
        """Write the first entries that are held back, with a meta record that says how far the changelog was read."""
        if between and not self._meta.between_boundaries:
            self._on_between()
        place = self._sieve.whole_end - 1 if count and not between else self._meta.position_offset
        self._caught_up = self._caught_up and not count
        self._meta = StoreMeta(
            changelog_next_offset=next_offset,
            between_boundaries=between,
            topic_id=self._topic_id,
            position_offset=place,
            caught_up=self._caught_up,
        )
        is_one_commit = self._sieve.commits == 1 and not between
        _, keys, values = self._sieve.pop(count)
        if not is_one_commit:  # a commit has each key once
            latest = dict(zip(keys, values, strict=True))
            keys, values = [*latest], [*latest.values()]
        write_entries(self.store, keys, values, self._meta)
        self._bytes = self._counted = 0


def check_order(where: str, records: Records) -> None:
    """Raise `Discontinuous` if the offsets do not rise, or reading would go on below them."""
    offsets = records.offsets
    span = offsets[-1] + 1 - offsets[0] if offsets else 0
    if span != len(offsets) and not all(map(lt, offsets, offsets[1:])):
        raise Discontinuous(f"{where}: offsets from {offsets[0]} to {offsets[-1]} are not in order")
    if offsets and records.next_offset <= offsets[-1]:
        raise Discontinuous(f"{where} went back from {offsets[-1]} to {records.next_offset}")
