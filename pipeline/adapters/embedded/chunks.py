"""The layout of records in the embedded log: chunks, like Kafka's record batches.

A chunk holds the records of a range of offsets of one partition. Its key has the last offset of the range, so that a seek to
any offset finds the chunk that covers it. Its value is:

    msgpack([begin, at_ms, offsets, keys, values, lost])

The chunks of a partition are a chain: `begin` is the offset at which the range of the chunk before it ends. Compaction keeps
the chain: the chunk that it makes of several covers the offsets of all of them, even those without a record. So a missing
file shows as a range of offsets that no chunk covers.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import msgspec

from pipeline.topics import Topic

_RECORD_KEY = struct.Struct(">cBIQ")
_META_KEY = struct.Struct(">cBI")
CHUNK_RECORDS_MAX = 2_000
CHUNK_BYTES = 262_144
"""Size at which a chunk ends, with the record that reaches it."""


class Meta(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Bounds and counts of a partition. Only the cleaner writes them: an append changes what its chunk tells, too."""

    start_offset: int = 0
    end_offset: int = 0
    clean_end_offset: int = 0
    clean_count: int = 0
    """Number of records below `clean_end_offset`."""
    newest_ms: int = 0
    """Time at which the newest record was accepted; retention may have removed the record since."""
    horizon_offset: int = 0
    """Readers that begin after `horizon_ms` find no value that a tombstone below this offset has deleted."""
    horizon_ms: int = 0


class Partition:
    """One partition of the log: its keys in RocksDB, and its bounds."""

    def __init__(self, topic: Topic, topic_number: int, number: int, meta: Meta) -> None:
        self.topic = topic
        self.topic_number = topic_number
        self.number = number
        self.meta = meta
        self.flushed_offset = 0
        """See `checkpoint.CheckpointOffsets`."""

    @property
    def name(self) -> str:
        """Topic and partition, as Kafka's tools write them."""
        return f"{self.topic.name}-{self.number}"

    def key(self, last_offset: int) -> bytes:
        """Return the key of the chunk whose last offset is `last_offset`."""
        return _RECORD_KEY.pack(b"r", self.topic_number, self.number, last_offset)

    @property
    def end_key(self) -> bytes:
        """Key after those of all chunks."""
        return _META_KEY.pack(b"r", self.topic_number, self.number + 1)

    @property
    def meta_key(self) -> bytes:
        """Key of the partition's `Meta`."""
        return _META_KEY.pack(b"m", self.topic_number, self.number)


def last_offset_of(key: bytes) -> int:
    """Return the last offset of the range of the chunk with this key."""
    last_offset: int = _RECORD_KEY.unpack(key)[3]
    return last_offset


class Chunk(msgspec.Struct, array_like=True, frozen=True):
    """Records of a range of offsets of one partition."""

    begin: int
    """First offset of the range. The last one is in the chunk's key."""
    at_ms: int | list[int]
    offsets: list[int] | None
    """None: there is a record at every offset of the range."""
    keys: list[bytes | None] | None
    """None: no record has a key."""
    values: list[bytes | None]
    lost: bool = False
    """True if records of the range were lost, and an operator has accepted that."""

    @property
    def newest_ms(self) -> int:
        """Time at which the last record was accepted; 0 if there is no record."""
        return self.at_ms if isinstance(self.at_ms, int) else self.at_ms[-1] if self.at_ms else 0

    def columns(self, last_offset: int) -> tuple[Sequence[int], list[int], list[bytes | None]]:
        """Return offsets, times and keys of all records."""
        count = len(self.values)
        offsets = range(last_offset + 1 - count, last_offset + 1) if self.offsets is None else self.offsets
        at_ms = [self.at_ms] * count if isinstance(self.at_ms, int) else self.at_ms
        return offsets, at_ms, [None] * count if self.keys is None else self.keys


def lost_chunk(begin: int, at_ms: int) -> Chunk:
    """Return a chunk for lost records from `begin` on; `at_ms` is when the loss was accepted."""
    return Chunk(begin, at_ms, [], None, [], lost=True)


encode = msgspec.msgpack.Encoder().encode
decode_chunk = msgspec.msgpack.Decoder(Chunk).decode


def record_sizes(keys: Iterable[bytes | None], values: Iterable[bytes | None]) -> list[int]:
    """Return the bytes of each record."""
    return [len(key or b"") + len(value or b"") for key, value in zip(keys, values, strict=True)]


def cut(
    start: int, at_ms: int, keys: Sequence[bytes | None], values: Sequence[bytes | None], sizes: Sequence[int]
) -> Iterator[tuple[int, Chunk]]:
    """Yield new records from offset `start` on as chunks, each with the offset of its last record."""
    ends = [*accumulate(sizes)]
    first = 0
    while first < len(values):
        full = (ends[first - 1] if first else 0) + CHUNK_BYTES
        end = min(first + CHUNK_RECORDS_MAX, bisect_left(ends, full, lo=first) + 1, len(values))
        part = keys[first:end]
        some_keys = None if part.count(None) == len(part) else [*part]
        yield start + end - 1, Chunk(start + first, at_ms, None, some_keys, [*values[first:end]])
        first = end
