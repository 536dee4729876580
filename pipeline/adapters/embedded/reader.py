"""A cursor over partitions of one topic of the embedded log."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Protocol

from pipeline.adapters.embedded.chunks import Chunk, Partition
from pipeline.adapters.rocks import Cursor
from pipeline.core.record import Records
from pipeline.errors import Invalid, RecordsLost
from pipeline.ports import NO_EPOCHS, Watermarks
from pipeline.topics import DEAD_LETTERS

_log = logging.getLogger(__name__)


class ReadLog(Protocol):
    """The methods of `EmbeddedLog` that a reader calls."""

    passes_lost: bool

    def partitions(self, topic: str) -> list[Partition]: ...

    def poll(self, places: Mapping[Partition, int], timeout_s: float) -> list[tuple[Partition, Watermarks, Cursor]]: ...

    def chunks(
        self, cursor: Cursor, partition: Partition, next_offset: int, end_offset: int = 0
    ) -> Iterator[tuple[int, Chunk, int]]: ...


class EmbeddedReader:
    """A `ports.LogReader` of one topic."""

    def __init__(self, log: ReadLog, topic: str) -> None:
        self._log = log
        self._topic = topic
        self._partitions = log.partitions(topic)
        self._next: dict[Partition, int] = {}

    def assign(self, next_offsets: Mapping[int, int], leader_epochs: Mapping[int, int] = NO_EPOCHS) -> None:
        for number in next_offsets:
            if not 0 <= number < len(self._partitions):
                raise Invalid(f"no partition {number} of topic {self._topic}")
        self._next = {self._partitions[number]: next_offset for number, next_offset in next_offsets.items()}

    def poll(self, *, record_count_max: int, bytes_max: int, timeout_s: float) -> list[Records]:
        out = {
            partition: self._read(partition, watermarks, cursor, record_count_max, bytes_max)
            for partition, watermarks, cursor in self._log.poll(self._next, timeout_s)
        }
        # After all reads: if one partition fails, the records of the others must be returned again.
        self._next.update((partition, records.next_offset) for partition, records in out.items())
        return [*out.values()]

    def _read(
        self, partition: Partition, watermarks: Watermarks, cursor: Cursor, record_count_max: int, bytes_max: int
    ) -> Records:
        next_offset = self._next[partition]
        start, end = watermarks
        if next_offset < start:
            raise RecordsLost(f"{partition.name}: {start - next_offset} records from {next_offset} on are gone")
        offsets: list[int] = []
        at_ms: list[int] = []
        keys: list[bytes | None] = []
        values: list[bytes | None] = []
        size = 0
        for last_offset, chunk, chunk_size in self._log.chunks(cursor, partition, next_offset, end):
            if last_offset >= end:  # of a write that failed after all
                next_offset = end
                break
            if chunk.lost:
                self._pass(partition, chunk.begin, last_offset)
            some_offsets, some_at_ms, some_keys = chunk.columns(last_offset)
            skip = bisect_left(some_offsets, next_offset)
            stop = skip + record_count_max - len(offsets)
            offsets += some_offsets[skip:stop]
            at_ms += some_at_ms[skip:stop]
            keys += some_keys[skip:stop]
            values += chunk.values[skip:stop]
            size += chunk_size
            next_offset = last_offset + 1 if stop >= len(chunk.values) else offsets[-1] + 1
            if len(offsets) >= record_count_max or size >= bytes_max:
                break
        else:
            next_offset = end
        return Records(partition.number, offsets, at_ms, keys, values, next_offset)

    def _pass(self, partition: Partition, begin: int, last_offset: int) -> None:
        """Skip lost records if that is allowed. It always is for dead letters, from which nothing is counted."""
        what = f"{partition.name}: {last_offset + 1 - begin} records ({begin} to {last_offset}) were lost earlier"
        if not self._log.passes_lost and partition.topic.name != DEAD_LETTERS:
            raise RecordsLost(f"{what}; start with --accept-loss to go on without them")
        _log.warning("%s; going on without them", what)

    def close(self) -> None:
        self._next = {}
