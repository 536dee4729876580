"""Foreign records: those in a changelog that no owner of the partition wrote.

Every commit says where it begins and where the commit before it ended (`record.Position`). Its records stand without a gap
from its beginning to its position record: the transaction is aborted otherwise. So between two commits there are only fence
records, transaction markers and foreign records. Followers leave foreign records out. The owner writes the committed
value of each of their keys anew, so that compaction, which keeps the newest record of a key whoever wrote it, keeps ours.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

import pipeline.metrics as m
from pipeline.core import codec
from pipeline.core.owners import is_owner_of, is_placed_at
from pipeline.core.record import FENCE_KEY, POSITION_KEY, TAG_DEFINITION, TAG_PRODUCER, TAG_SERIES, Position, Records
from pipeline.errors import BadRecord, NewerFormat, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Log
from pipeline.topics import DEAD_LETTERS

_log = logging.getLogger(__name__)
_ENTRY_TAGS = frozenset(tag[0] for tag in (TAG_DEFINITION, TAG_SERIES, TAG_PRODUCER))


def not_entries(keys: Iterable[bytes | None]) -> list[int]:
    """Return the indices of keys that are not those of entries: positions, fences, and keys that can't be ours."""
    firsts = [key[0] if key else -1 for key in keys]
    if _ENTRY_TAGS.issuperset(firsts):
        return []
    return [index for index, first in enumerate(firsts) if first not in _ENTRY_TAGS]


class Barrier(NamedTuple):
    """Offset and owner of a fence record."""

    offset: int
    owner_id: str


def hides_letters(log: Log, partition: int) -> bool:
    """Return whether dead letters of a partition stand behind an open transaction, which none of a fenced owner's is.

    False if the log does not tell, as while any partition of their topic has no leader: a start goes on without them.
    """
    try:
        high = log.high_watermarks(DEAD_LETTERS)  # first: it must not be newer than the last stable offset
        return log.watermarks(DEAD_LETTERS, partition).end_offset < high.get(partition, 0)
    except Unavailable as error:
        _log.warning("partition %d: whether all its dead letters can be read is not known: %s", partition, error)
        return False


class Foreign:
    """Foreign records that a reader has found in the changelog of one partition."""

    def __init__(self, partition: int, metrics: Metrics = NO_METRICS) -> None:
        self.partition = partition
        self.count = 0
        self.keys: set[bytes] = set()
        """Keys whose newest record, as far as was read, is foreign and was not repaired."""
        self._metrics = metrics
        metrics.inc(m.CHANGELOG_FOREIGN, 0, partition)

    def note(self, offset: int, what: str) -> None:
        """Count a foreign record; log the first one."""
        if not self.count:
            _log.error(
                "changelog-%d: the record at %d was not written by an owner of the partition (%s). It is left out, as others"
                " of its kind will be; find out who can write to the topic, and take the permission away (kafka-acls)",
                self.partition,
                offset,
                what,
            )
        self.count += 1
        self._metrics.inc(m.CHANGELOG_FOREIGN, 1, self.partition)

    def note_entry(self, offset: int, key: bytes) -> None:
        """Count a foreign record of an entry, and keep its key for the repair."""
        self.note(offset, "it stands between two commits")
        self.keys.add(key)


class Lineage:
    """Chain of our commits: decides which position records of a changelog belong to it, in the order of the log."""

    def __init__(self, partition: int, end_offset: int) -> None:
        self.partition = partition
        self.end_offset = end_offset
        """Offset behind the last commit; no later commit begins below it."""
        self.committed = False
        """True once a commit was read."""
        self.first_previous_end = 0
        """Offset behind the commit before the first one that was read."""
        self.fence: Barrier | None = None
        """Last fence record."""
        self.awaited: Barrier | None = None
        """Fence record whose reading ends a restore."""
        self.passed = False
        """True once the awaited fence record was read."""

    def take_fence(self, offset: int, value: bytes | None) -> bool:
        """Take in a record with the key of fence records; return whether it is one of ours."""
        try:
            fence = codec.decode_fence(value or b"")
        except BadRecord:
            return False
        if not is_owner_of(self.partition, fence.owner_id):
            return False
        self.fence = Barrier(offset, fence.owner_id)
        self.passed = self.passed or self.fence == self.awaited
        return True

    def take_position(self, offset: int, value: bytes | None) -> Position | None:
        """Take in a record with the key of position records; return the position, or None if it ends no commit of ours.

        Raises `NewerFormat` if it ends a commit, and a newer program wrote it.
        """
        try:
            position = codec.decode_position(value or b"")
        except NewerFormat as error:
            newer = codec.newer_position(value or b"")
            if newer is not None and self._follows(offset, newer):
                raise NewerFormat(f"changelog-{self.partition}: {error}") from None
            return None
        except BadRecord:
            return None
        if not self._follows(offset, position):
            return None
        if not self.committed:
            self.first_previous_end = position.previous_end_offset
        self.end_offset, self.committed = offset + 1, True
        return position

    def _follows(self, offset: int, position: Position) -> bool:
        """Return whether a position at `offset` can be that of the next commit, or of a later one.

        `previous_end_offset` can be lower than our end: then this reader took a forgery for a commit. This commit repairs
        that: it writes the entries of the forgery anew. A copy of the position of a commit that the broker has aborted
        after all would follow, but stands at another offset than it says.
        """
        in_order = position.previous_end_offset <= position.begin_offset <= offset
        is_next = in_order and position.begin_offset >= self.end_offset
        return is_next and is_owner_of(self.partition, position.owner_id) and is_placed_at(position.owner_id, offset)


class Sieve:
    """Holds back records of a changelog until the position record that ends their commit, and leaves out foreign ones.

    `lineage.end_offset` must be where the reading begins, if that is at a commit boundary.
    """

    def __init__(self, lineage: Lineage, foreign: Foreign) -> None:
        self.lineage = lineage
        self.foreign = foreign
        self._offsets: list[int] = []
        self._keys: list[bytes] = []
        self._values: list[bytes | None] = []
        self.whole = self.whole_end = 0
        """Number of held back entries that belong to whole commits, and the offset behind those commits."""
        self.commits = 0
        """Number of those commits."""
        self.applied = False
        """True if entries behind the last whole commit were popped."""
        self.fences = 0
        """Number of records with the key of fence records among those that were taken in last."""

    def __len__(self) -> int:
        return len(self._keys)

    def take(self, records: Records) -> None:
        """Hold back the records that were read next. Raises `NewerFormat` if a newer program has committed them."""
        self.fences = 0
        start = 0
        for index in not_entries(records.keys):
            self._hold(records, start, index)
            self._take_special(records.offsets[index], records.keys[index], records.values[index])
            start = index + 1
        self._hold(records, start, len(records.keys))

    def _hold(self, records: Records, start: int, end: int) -> None:
        if start < end:
            self._offsets += records.offsets[start:end]
            self._keys += records.keys[start:end]  # type: ignore[arg-type]  # only special records can lack a key
            self._values += records.values[start:end]

    def _take_special(self, offset: int, key: bytes | None, value: bytes | None) -> None:
        if key == FENCE_KEY:
            self.fences += 1
            if not self.lineage.take_fence(offset, value):
                self.foreign.note(offset, "it is no fence record of this partition")
        elif key == POSITION_KEY:
            position = self.lineage.take_position(offset, value)
            if position is None:
                self.foreign.note(offset, "its position does not follow from the commits before")
                self.foreign.keys.add(POSITION_KEY)
            else:
                self.drop(position.previous_end_offset, position.begin_offset)
                self._note_repairs(position.begin_offset)
                self._offsets.append(offset)
                self._keys.append(POSITION_KEY)
                self._values.append(value)
                self.whole, self.whole_end = len(self._keys), offset + 1
                self.commits += 1
                self.applied = False
        else:
            self.foreign.note(offset, "its key is of no kind that this program knows")

    def _note_repairs(self, begin_offset: int) -> None:
        """Take the keys that a commit writes from those to repair, as its owner writes all that it has found.

        The owner has not found a record that stands where the broker has left out a marker: see `KafkaTransaction.commit`.
        The keys of a commit that was applied in part, before its position was read, are not known any more.
        """
        keys = self.foreign.keys
        if keys:
            start = max(self.whole, bisect_left(self._offsets, begin_offset))
            keys -= {POSITION_KEY, *(keys if self.applied else self._keys[start:])}

    def drop(self, first_offset: int, end_offset: int) -> None:
        """Leave out the entries from `first_offset` to below `end_offset`, which are part of no commit."""
        start = max(self.whole, bisect_left(self._offsets, first_offset))
        end = bisect_left(self._offsets, end_offset)
        for offset, key in zip(self._offsets[start:end], self._keys[start:end], strict=True):
            self.foreign.note_entry(offset, key)
        if start < end:
            del self._offsets[start:end], self._keys[start:end], self._values[start:end]

    def pop(self, count: int) -> tuple[list[int], list[bytes], list[bytes | None]]:
        """Remove the first entries that are held back; return their offsets, keys and values."""
        self.applied = self.applied or count > self.whole
        if count == len(self._keys):
            popped = self._offsets, self._keys, self._values
            self._offsets, self._keys, self._values = [], [], []
        else:
            popped = self._offsets[:count], self._keys[:count], self._values[:count]
            del self._offsets[:count], self._keys[:count], self._values[:count]
        self.whole = max(0, self.whole - count)
        self.commits = self.commits if self.whole else 0
        return popped

    def bytes_from(self, index: int) -> int:
        """Return how many bytes the entries from an index on take."""
        return sum(map(len, self._keys[index:])) + sum(map(len, filter(None, self._values[index:])))
