"""Applies a changelog to a store: restore today; standbys and query replicas are the same thing running on.

A follower's store is always exactly at a commit boundary, that is, just behind a position record. Compaction removes old
position records, so while catching up there may be none for a long stretch: then entries are applied all the same and
the store is marked as between boundaries, which nobody serves or folds into, until the next position record ends it.
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
    """What a store says of itself; written in the same batch as the entries."""

    version: int = 1
    changelog_next_offset: int = 0
    between_boundaries: bool = False
    topic_id: str = ""
    """Of which changelog the offset is; see `ports.Log.topic_id`."""
    position_offset: int = -1
    """The offset of the store's position record; -1 if that is not known."""
    caught_up: bool = False
    """Whether the changelog is known to have held no entries behind that record once. Then the store has all that was
    committed by then, whatever others have written since."""


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

    It reads the store's last commit once more before it goes on, from `next_offset`: a changelog that has lost that commit
    can have gone on without it, and be longer than the store knows. So it does with what a store that was left between
    boundaries has taken in behind that commit. `buffer_entries_max` and `buffer_bytes_max` bound what
    is held back for a commit boundary. `on_between` is called before a store that was at a boundary is written without being
    at one again: nobody may read it then.
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
        """What the store held when it was opened, or when all there was had been read the last time."""
        (self._position,) = store.get([POSITION_KEY])
        """Its position record as it was then; what is wrong with it later is damage, and says nothing of the changelog."""
        self._holed = False
        """Whether compaction has removed some of what was read since then."""
        self._read_at_ms: int | None = 0
        """When the log took in the newest of what was read since the store was opened; None once that was all there was."""
        self._bytes = self._counted = 0
        """Bytes of the first so many entries that are held back."""
        self.next_offset = self.stored_offset = self._meta.changelog_next_offset
        """`stored_offset`: up to where what is read was in the store when it was opened."""
        self.is_proven = False
        """Whether the store's last commit was read from the changelog, or one that names it as one before."""
        self._differing: set[bytes] = set()
        """Keys of which the store has something else than was read of what it has taken in behind its last commit."""
        place = self._meta.position_offset
        if not self._meta.between_boundaries:  # what stood behind the last commit was not ours, and can be others' by now
            if place >= 0:
                self.stored_offset = place + 1
            elif self._since == NO_POSITION:
                self.next_offset = self.stored_offset = min(self.next_offset, start_offset)
        self.lineage = Lineage(partition, place + 1 if self._meta.between_boundaries else self.stored_offset)
        if place >= 0 and self._since.begin_offset >= start_offset:
            self.next_offset = min(self.next_offset, self._since.begin_offset)
        self._reads_anew = self.next_offset < self.stored_offset
        """Whether what it reads first is the store's last commit."""
        self.foreign = Foreign(partition, metrics)
        self._sieve = Sieve(self.lineage, self.foreign)
        self._caught_up = self._had_all = self._meta.caught_up

    @property
    def had_all(self) -> bool:
        """Whether the store had all that is committed before anything was read."""
        return self._had_all and not self.lineage.committed

    @property
    def at_boundary(self) -> bool:
        """Whether the store reflects whole commits only, and everything that was read is in it."""
        return not self._sieve and not self._meta.between_boundaries and self.next_offset >= self.stored_offset

    def apply(self, records: Records) -> None:
        """Apply what was read next of this partition: up to its last position record now, the rest with the next one.

        Raises `Discontinuous` if the records stand below those that were read before, `NewerFormat` if a newer program has
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
        self.entries_total += len(records.keys) - [*records.keys].count(FENCE_KEY)
        if sieve.whole:
            # What others wrote behind a commit, and its owner has not repaired, is read again after a restart.
            last = sieve.whole == len(sieve) and not self.foreign.keys
            self._write(sieve.whole, self.next_offset if last else sieve.whole_end, between=False)
            self._check_away()
        self._bytes += sieve.bytes_from(self._counted)
        self._counted = len(sieve)
        full = len(sieve) >= self._entries_max or self._bytes >= self._bytes_max
        if full or (sieve and self._meta.between_boundaries):  # there it is: to hold anything back helps nobody
            self._write(len(sieve), records.next_offset, between=True)
        elif sieve.fenced:  # so that nothing is behind after a restart of a partition that only changes its owner
            self.save()

    def _take_known(self, records: Records) -> Records:
        """Take in records that the store has, of its last commit or behind it; what is left are those behind them all.

        Raises `StoreAhead` if others stand in the place of the commit. Compaction can have taken it; it puts nothing there.
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
        """Raise if the records that a store between boundaries has taken in behind its last commit are not these.

        `StoreCorrupt` where the changelog holds that commit: what the store has beyond it is no whole one.
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
        """Raise `StoreAhead` if the first commit that follows was made by an owner who did not know the store's last one."""
        place = self._meta.position_offset
        if not self.is_proven and self.lineage.first_previous_end <= place:
            what = f"the changelog has gone on from {self.lineage.first_previous_end} without the last commit of the store"
            raise StoreAhead(f"partition {self.partition}: {what}, which ended at {place}")
        self.is_proven = True

    def settle(self, end_offset: int) -> None:
        """Take note that all below `end_offset` was read, and that the log held no more when it had been.

        So compaction can't have taken the position record that would end what is held back: it never was, and what is held
        back is foreign. Raises `StoreCorrupt` if some of it is in the store already, `StoreAhead` if the changelog holds
        neither the store's last commit nor one that follows it.
        """
        if self._reads_anew and not self.is_proven and self.next_offset >= self.stored_offset:
            what = f"the changelog ends at {end_offset} without the last commit of the store"
            raise StoreAhead(f"partition {self.partition}: {what}, which ended at {self._meta.position_offset}")
        if self._meta.between_boundaries:
            raise StoreCorrupt(f"changelog-{self.partition} ends within a commit; something else has written to it")
        self._since, self._holed = read_position(self.store), False
        self._read_at_ms = None  # from here on it is there, and not away
        self._sieve.drop(0, end_offset)
        self._bytes = self._counted = 0  # counted anew with the next records
        self._caught_up = self._caught_up or not self.foreign.keys

    def _check_away(self) -> None:
        """Raise `StoreCorrupt` if tombstones can have been removed before they were read.

        `check_restorable` asks the clocks of this machine and of whoever committed, and one may be wrong; here that of the
        log says how much later it took in what was read now than the newest delta that the store had. (A commit is later
        than its deltas, by as much as they waited; so the store can have been away for less than that, never for longer.)
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
        """Write to the store how far the changelog was read, if it is at a boundary there."""
        if self.at_boundary and not self.foreign.keys and self._meta.changelog_next_offset < self.next_offset:
            self._write(0, self.next_offset, between=False)

    def _write(self, count: int, next_offset: int, *, between: bool) -> None:
        """Write the first entries that are held back, and that the store reflects the changelog up to `next_offset`."""
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
        _, keys, values = self._sieve.pop(count)
        latest = dict(zip(keys, values, strict=True))
        write_entries(self.store, [*latest], [*latest.values()], self._meta)
        self._bytes = self._counted = 0


def check_order(where: str, records: Records) -> None:
    """Raise `Discontinuous` if the offsets do not rise, or reading would go on below them."""
    offsets = records.offsets
    span = offsets[-1] + 1 - offsets[0] if offsets else 0
    if span != len(offsets) and not all(map(lt, offsets, offsets[1:])):
        raise Discontinuous(f"{where}: offsets from {offsets[0]} to {offsets[-1]} are not in order")
    if offsets and records.next_offset <= offsets[-1]:
        raise Discontinuous(f"{where} went back from {offsets[-1]} to {records.next_offset}")
