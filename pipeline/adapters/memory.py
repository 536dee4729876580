"""Log and stores in memory: for tests and the simulator, held to the same contract suites as the real ones."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from pipeline.core.record import Records
from pipeline.errors import Fenced, Invalid, PipelineError, RecordsLost
from pipeline.ports import MESSAGE_BYTES_MAX, Message, Store, StoreView, Watermarks


class _Row(msgspec.Struct, frozen=True, gc=False):
    offset: int
    at_ms: int
    key: bytes | None
    value: bytes | None


class _Partition:
    def __init__(self) -> None:
        self.rows: list[_Row] = []
        self.start_offset = 0
        self.end_offset = 0
        self.at_ms = 0


class MemoryLog:
    """A `ports.Log` that lives as long as the object."""

    def __init__(self, topics: Mapping[str, int], now_ms: Callable[[], int]) -> None:
        self._topics = {name: [_Partition() for _ in range(count)] for name, count in topics.items()}
        self._now_ms = now_ms
        self._changed = threading.Condition()
        self._owners: dict[str, int] = {}

    def _partition(self, topic: str, partition: int) -> _Partition:
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
            at = self._partition(topic, partition)
            return Watermarks(at.start_offset, at.end_offset)

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
        partitions = [self._partition(message.topic, message.partition) for message in messages]
        out = []
        for at, message in zip(partitions, messages, strict=True):
            at.at_ms = max(self._now_ms(), at.at_ms)
            at.rows.append(_Row(at.end_offset, at.at_ms, message.key, message.value))
            at.end_offset += 1
            out.append(at.end_offset)
        self._changed.notify_all()
        return out

    def end_offsets(self, topic: str) -> Mapping[int, int]:
        return {n: self.watermarks(topic, n).end_offset for n in range(self.partition_count(topic))}

    def start_offsets(self, topic: str) -> Mapping[int, int]:
        return {n: self.watermarks(topic, n).start_offset for n in range(self.partition_count(topic))}

    def message_bytes_max(self, topic: str) -> int:
        return MESSAGE_BYTES_MAX

    def topic_id(self, topic: str) -> str:
        self.partition_count(topic)
        return ""

    def reader(self, topic: str) -> _MemoryReader:
        self.partition_count(topic)
        return _MemoryReader(self, topic)

    def transaction(self, transactional_id: str) -> _MemoryTransaction:
        with self._changed:
            self._owners[transactional_id] = owner = self._owners.get(transactional_id, 0) + 1
        return _MemoryTransaction(self, transactional_id, owner)

    def truncate(self, topic: str, partition: int, start_offset: int) -> None:
        """What retention does: forget the records below `start_offset`."""
        with self._changed:
            at = self._partition(topic, partition)
            at.start_offset = max(at.start_offset, min(start_offset, at.end_offset))
            at.rows = [row for row in at.rows if row.offset >= at.start_offset]

    def compact(
        self, topic: str, partition: int, end_offset: int, *, drop_tombstones: bool = False, young_offset: int | None = None
    ) -> None:
        """What compaction does below `end_offset`: keep the newest record of each key, there and above.

        Records from `young_offset` on are younger than the compaction lag: they stay, and so does what only they supersede.
        """
        with self._changed:
            at = self._partition(topic, partition)
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

    def assign(self, next_offsets: Mapping[int, int]) -> None:
        for partition in next_offsets:
            self._log._partition(self._topic, partition)
        self._next = dict(next_offsets)

    def poll(self, *, record_count_max: int, bytes_max: int, timeout_s: float) -> list[Records]:
        changed = self._log._changed
        with changed:
            changed.wait_for(self._behind, timeout_s)
            out = [
                self._read(partition, record_count_max, bytes_max)
                for partition, next_offset in self._next.items()
                if next_offset < self._log._partition(self._topic, partition).end_offset
            ]
        self._next.update((records.partition, records.next_offset) for records in out)  # only when all were read
        return out

    def _behind(self) -> bool:
        return any(n < self._log._partition(self._topic, p).end_offset for p, n in self._next.items())

    def _read(self, partition: int, record_count_max: int, bytes_max: int) -> Records:
        at = self._log._partition(self._topic, partition)
        next_offset = self._next[partition]
        if next_offset < at.start_offset:
            raise RecordsLost(
                f"{self._topic}-{partition}: {at.start_offset - next_offset} records from {next_offset} on are gone"
            )
        rows: list[_Row] = []
        size = 0
        start = bisect_left(at.rows, next_offset, key=lambda row: row.offset)
        for row in at.rows[start : start + record_count_max]:
            if rows and size >= bytes_max:
                break
            rows.append(row)
            size += len(row.key or b"") + len(row.value or b"")
        whole = start + len(rows) == len(at.rows)
        return Records(
            partition=partition,
            offsets=[row.offset for row in rows],
            at_ms=[row.at_ms for row in rows],
            keys=[row.key for row in rows],
            values=[row.value for row in rows],
            next_offset=at.end_offset if whole else rows[-1].offset + 1,
        )

    def close(self) -> None:
        self._next = {}


class _MemoryTransaction:
    def __init__(self, log: MemoryLog, transactional_id: str, owner: int) -> None:
        self._log = log
        self._id = transactional_id
        self._owner = owner

    def commit(self, messages: Sequence[Message], *, timeout_s: float) -> list[int]:
        with self._log._changed:
            if self._log._owners[self._id] != self._owner:
                raise Fenced(f"transactional id {self._id} has a newer owner")
            return self._log._append(messages)

    def close(self) -> None:
        """Nothing to give back."""


class _Snapshot:
    def __init__(self, entries: dict[bytes, bytes]) -> None:
        self._entries = entries

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [*map(self._entries.get, keys)]

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        return iter(sorted(item for item in self._entries.items() if start <= item[0] < end))


class MemoryStore(_Snapshot):
    """A `ports.Store` that outlives `close`, as long as its `MemoryStores` does."""

    def __init__(self) -> None:
        super().__init__({})

    def write(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        entries = dict(self._entries)
        for key, value in zip(keys, values, strict=True):
            if value is None:
                entries.pop(key, None)
            else:
                entries[key] = value
        self._entries = entries  # one assignment: a reader sees the store before the write or after it

    def snapshot(self) -> StoreView:
        return _Snapshot(self._entries)

    def close(self) -> None:
        """Nothing to give back."""


class MemoryStores:
    """A `ports.Stores`."""

    def __init__(self) -> None:
        self._stores: dict[int, MemoryStore] = {}

    def open(self, partition: int) -> Store:
        return self._stores.setdefault(partition, MemoryStore())

    def destroy(self, partition: int) -> None:
        self._stores.pop(partition, None)

    def close(self) -> None:
        """Nothing to give back."""
