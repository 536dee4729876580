"""Log and stores in memory, for tests and the simulator. They pass the same contract suites as the durable ones."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count

import msgspec

from pipeline.core.record import EPOCH_NONE, Records
from pipeline.errors import Fenced, Invalid, LogCorrupt, PipelineError, RecordsLost
from pipeline.ports import (
    MESSAGE_BYTES_MAX,
    NO_BEGINS,
    NO_EPOCHS,
    Begins,
    Message,
    Store,
    StoreView,
    Watermarks,
    check_begins,
)

_made = count(1)
"""Numbers for the logs of this process."""


class _MemoryRecord(msgspec.Struct, frozen=True, gc=False):
    offset: int
    at_ms: int
    key: bytes | None
    value: bytes | None


class MemoryPartition:
    """A partition of a topic; tests read and change its rows."""

    def __init__(self) -> None:
        self.rows: list[_MemoryRecord] = []
        self.start_offset = 0
        self.end_offset = 0
        self.at_ms = 0
        self.markers: set[int] = set()
        """Offsets that the log uses itself, such as those of transaction markers."""
        self.compacted = False
        self.epochs = [0]
        """Start offset of each leader epoch, by epoch."""
        self.open: list[int] = []
        """Start offsets of open transactions."""

    @property
    def stable_offset(self) -> int:
        """Last stable offset, at which readers stop."""
        return min(self.open, default=self.end_offset)


class MemoryLog:
    """A `ports.Log` in memory. `log_id` is part of its topic ids, and must be unique."""

    def __init__(self, topics: Mapping[str, int], now_ms: Callable[[], int], *, log_id: str = "") -> None:
        self._log_id = log_id or f"memory-{next(_made)}"
        self._topics = {name: [MemoryPartition() for _ in range(count)] for name, count in topics.items()}
        self._now_ms = now_ms
        self._changed = threading.Condition()
        self._owners: dict[str, int] = {}
        self.marker_count = 0
        """Number of offsets that the end of a transaction takes in each partition that it wrote to."""

    def partition(self, topic: str, partition: int) -> MemoryPartition:
        """Return a partition of a topic."""
        partitions = self._topics.get(topic)
        if partitions is None or not 0 <= partition < len(partitions):
            raise Invalid(f"no partition {partition} of topic {topic}")
        return partitions[partition]

    def partition_count(self, topic: str) -> int:
        if topic not in self._topics:
            raise Invalid(f"no topic {topic}")
        return len(self._topics[topic])

    def watermarks(self, topic: str, partition: int) -> Watermarks:
        with self._changed:
            at = self.partition(topic, partition)
            return Watermarks(at.start_offset, at.stable_offset)

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        out: list[int | PipelineError] = []
        with self._changed:
            for message in messages:
                try:
                    out += self._append([message])
                except Invalid as error:
                    out.append(error)
        return out

    def _append(self, messages: Sequence[Message]) -> list[int]:
        partitions = [self.partition(message.topic, message.partition) for message in messages]
        out = []
        for at, message in zip(partitions, messages, strict=True):
            at.at_ms = max(self._now_ms(), at.at_ms)
            at.rows.append(_MemoryRecord(at.end_offset, at.at_ms, message.key, message.value))
            at.end_offset += 1
            out.append(at.end_offset)
        self._changed.notify_all()
        return out

    def end_offsets(self, topic: str) -> Mapping[int, int]:
        return {n: self.watermarks(topic, n).end_offset for n in range(self.partition_count(topic))}

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        with self._changed:
            return {n: self.partition(topic, n).end_offset for n in range(self.partition_count(topic))}

    def start_offsets(self, topic: str) -> Mapping[int, int]:
        return {n: self.watermarks(topic, n).start_offset for n in range(self.partition_count(topic))}

    def message_bytes_max(self, topic: str) -> int:
        return MESSAGE_BYTES_MAX

    def topic_id(self, topic: str) -> str:
        self.partition_count(topic)
        return f"{self._log_id}-{[*self._topics].index(topic)}"

    def reader(self, topic: str) -> _MemoryReader:
        self.partition_count(topic)
        return _MemoryReader(self, topic)

    def transaction(self, transactional_id: str) -> _MemoryTransaction:
        with self._changed:
            self._owners[transactional_id] = owner = self._owners.get(transactional_id, 0) + 1
        return _MemoryTransaction(self, transactional_id, owner)

    def leave_open(self, messages: Sequence[Message]) -> OpenTransaction:
        """Append messages in a transaction that stays open, like that of a foreign producer that hangs."""
        with self._changed:
            return OpenTransaction(self, messages)

    def skip(self, topic: str, partition: int, count: int = 1) -> None:
        """Use `count` offsets that hold no record, as transaction markers do."""
        with self._changed:
            at = self.partition(topic, partition)
            at.markers.update(range(at.end_offset, at.end_offset + count))
            at.end_offset += count
            self._changed.notify_all()

    def lose_tail(self, topic: str, partition: int, end_offset: int) -> None:
        """Drop the records from `end_offset` on and start a new leader epoch, as the election of a lagging leader does."""
        with self._changed:
            at = self.partition(topic, partition)
            at.rows = [row for row in at.rows if row.offset < end_offset]
            at.end_offset = end_offset
            at.markers = {offset for offset in at.markers if offset < end_offset}
            at.epochs.append(end_offset)
            at.epochs = [min(begin, end_offset) for begin in at.epochs]

    def commit(self, transactional_id: str, owner: int, messages: Sequence[Message], begins: Begins) -> list[int]:
        """Append messages in one transaction if `owner` still owns the id."""
        with self._changed:
            if self._owners[transactional_id] != owner:
                raise Fenced(f"transactional id {transactional_id} has a newer owner")
            places = {(message.topic, message.partition): None for message in messages}
            check_begins(begins, {place: self.partition(*place).end_offset for place in places})
            out = self._append(messages)
            for place in places:
                self.skip(*place, self.marker_count)
            return out

    def truncate(self, topic: str, partition: int, start_offset: int) -> None:
        """Delete the records below `start_offset`, as retention does."""
        with self._changed:
            at = self.partition(topic, partition)
            at.start_offset = max(at.start_offset, min(start_offset, at.end_offset))
            at.rows = [row for row in at.rows if row.offset >= at.start_offset]

    def compact(
        self, topic: str, partition: int, end_offset: int, *, drop_tombstones: bool = False, young_offset: int | None = None
    ) -> None:
        """Keep the newest record of each key below `end_offset`, as compaction does.

        Records from `young_offset` on are younger than the compaction lag: they stay, and so do those that only they
        supersede.
        """
        with self._changed:
            at = self.partition(topic, partition)
            at.compacted = True
            young_offset = at.end_offset if young_offset is None else young_offset
            end_offset = min(end_offset, young_offset)
            newest = {row.key: row.offset for row in at.rows if row.offset < young_offset}
            at.rows = [
                row
                for row in at.rows
                if row.offset >= end_offset
                or (newest[row.key] == row.offset and not (drop_tombstones and row.value is None))
            ]

    def close(self) -> None:
        """Nothing to give back."""


class _MemoryReader:
    def __init__(self, log: MemoryLog, topic: str) -> None:
        self._log = log
        self._topic = topic
        self._next: dict[int, int] = {}
        self._epochs: dict[int, int] = {}

    def assign(self, next_offsets: Mapping[int, int], leader_epochs: Mapping[int, int] = NO_EPOCHS) -> None:
        for partition in next_offsets:
            self._log.partition(self._topic, partition)
        self._next, self._epochs = dict(next_offsets), dict(leader_epochs)

    def poll(self, *, record_count_max: int, bytes_max: int, timeout_s: float) -> list[Records]:
        changed = self._log._changed
        with changed:
            for partition in self._next:  # as Kafka does, which finds it out before it fetches anything
                self._check_history(self._log.partition(self._topic, partition), partition)
            if timeout_s:
                changed.wait_for(self._behind, timeout_s)
            out = [
                self._read(partition, record_count_max, bytes_max)
                for partition, next_offset in self._next.items()
                if next_offset < self._log.partition(self._topic, partition).stable_offset
            ]
        self._next.update((records.partition, records.next_offset) for records in out)  # only when all were read
        self._epochs.update((records.partition, records.leader_epoch) for records in out)
        return out

    def _behind(self) -> bool:
        return any(n < self._log.partition(self._topic, p).stable_offset for p, n in self._next.items())

    def _read(self, partition: int, record_count_max: int, bytes_max: int) -> Records:
        at = self._log.partition(self._topic, partition)
        next_offset = self._next[partition]
        if next_offset < at.start_offset:
            raise RecordsLost(
                f"{self._topic}-{partition}: {at.start_offset - next_offset} records from {next_offset} on are gone"
            )
        self._check_history(at, partition)
        rows: list[_MemoryRecord] = []
        size = 0
        start = bisect_left(at.rows, next_offset, key=lambda row: row.offset)
        end = bisect_left(at.rows, at.stable_offset, key=lambda row: row.offset)
        for row in at.rows[start : min(start + record_count_max, end)]:
            if rows and size >= bytes_max:
                break
            rows.append(row)
            size += len(row.key or b"") + len(row.value or b"")
        complete = start + len(rows) == end
        self._check_holes(at, partition, rows, at.stable_offset if complete else rows[-1].offset + 1)
        return Records(
            partition=partition,
            offsets=[row.offset for row in rows],
            at_ms=[row.at_ms for row in rows],
            keys=[row.key for row in rows],
            values=[row.value for row in rows],
            next_offset=at.stable_offset if complete else rows[-1].offset + 1,
            leader_epoch=bisect_right(at.epochs, rows[-1].offset) - 1 if rows else self._epochs.get(partition, EPOCH_NONE),
        )

    def _check_history(self, at: MemoryPartition, partition: int) -> None:
        """Raise `RecordsLost` if the leader epoch of the last record that was read ended below the cursor."""
        epoch, next_offset = self._epochs.get(partition, EPOCH_NONE), self._next[partition]
        if 0 <= epoch < len(at.epochs) - 1 and at.epochs[epoch + 1] < next_offset:
            raise RecordsLost(
                f"{self._topic}-{partition}: what was read below {next_offset}, of leader epoch {epoch}, is not in the log"
            )

    def _check_holes(self, at: MemoryPartition, partition: int, rows: list[_MemoryRecord], next_offset: int) -> None:
        begin = self._next[partition]
        if not at.compacted and len(rows) < next_offset - begin:
            missing = {*range(begin, next_offset)} - {row.offset for row in rows} - at.markers
            if missing:
                raise LogCorrupt(f"{self._topic}-{partition}: {len(missing)} records from {min(missing)} on are missing")

    def close(self) -> None:
        self._next = {}


class _MemoryTransaction:
    def __init__(self, log: MemoryLog, transactional_id: str, owner: int) -> None:
        self._log = log
        self._id = transactional_id
        self._owner = owner

    @property
    def marker_count(self) -> int:
        return self._log.marker_count

    def commit(self, messages: Sequence[Message], *, timeout_s: float, begins: Begins = NO_BEGINS) -> list[int]:
        return self._log.commit(self._id, self._owner, messages, begins)

    def close(self) -> None:
        """Nothing to give back."""


class OpenTransaction:
    """A transaction whose records become readable only by `commit`, and at which all reading ends until then."""

    def __init__(self, log: MemoryLog, messages: Sequence[Message]) -> None:
        self._log = log
        partitions = dict.fromkeys(log.partition(message.topic, message.partition) for message in messages)
        self._begins = {at: at.end_offset for at in partitions}
        log._append(messages)
        self._ends = {at: at.end_offset for at in partitions}
        for at, offset in self._begins.items():
            at.open.append(offset)

    def commit(self) -> None:
        """Make the records readable."""
        self._end(keep=True)

    def abort(self) -> None:
        """Discard the records; their offsets stay as holes."""
        self._end(keep=False)

    def _end(self, *, keep: bool) -> None:
        with self._log._changed:
            for at, begin in self._begins.items():
                at.open.remove(begin)
                if not keep:
                    at.rows = [row for row in at.rows if not begin <= row.offset < self._ends[at]]
                    at.markers.update(range(begin, self._ends[at]))
                at.markers.add(at.end_offset)  # it says how the transaction ended
                at.end_offset += 1
            self._log._changed.notify_all()


class _Snapshot:
    def __init__(self, entries: dict[bytes, bytes]) -> None:
        self.entries = entries

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [*map(self.entries.get, keys)]

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        return iter(sorted(item for item in self.entries.items() if start <= item[0] < end))


class MemoryStore(_Snapshot):
    """A `ports.Store` that survives `close`, as long as its `MemoryStores` exists."""

    def __init__(self) -> None:
        super().__init__({})

    def write(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        entries = dict(self.entries)
        for key, value in zip(keys, values, strict=True):
            if value is None:
                entries.pop(key, None)
            else:
                entries[key] = value
        self.entries = entries  # one assignment: a reader sees the store before the write or after it

    def snapshot(self) -> StoreView:
        return _Snapshot(self.entries)

    def close(self) -> None:
        """Nothing to give back."""


class MemoryStores:
    """A `ports.Stores`."""

    def __init__(self) -> None:
        self._stores: dict[int, MemoryStore] = {}
        self.aside: dict[str, MemoryStore] = {}
        """By its new name, each store that was set aside."""

    def open(self, partition: int) -> Store:
        return self._stores.setdefault(partition, MemoryStore())

    def destroy(self, partition: int) -> None:
        self._stores.pop(partition, None)

    def set_aside(self, partition: int, reason: str) -> str:
        name = f"{partition}.lost-{len(self.aside)}"
        self.aside[name] = self._stores.pop(partition)
        return name

    def close(self) -> None:
        """Nothing to give back."""
