"""How the embedded log lays records out: in chunks, as Kafka stores record batches.

A chunk is one value for some neighbouring records of a partition, under the offset of the last of them, so that a seek to
any offset finds the chunk that covers it:

    msgpack([at_ms, offsets, keys, values])
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import msgspec

CHUNK_RECORDS_MAX = 2_000
CHUNK_BYTES = 262_144
"""A chunk ends with the record that reaches this."""


class Chunk(msgspec.Struct, array_like=True, frozen=True):
    """Some records of one partition."""

    at_ms: int | list[int]
    offsets: list[int] | None
    """None: without holes up to the offset in the chunk's key."""
    keys: list[bytes | None] | None
    """None: no record has a key."""
    values: list[bytes | None]

    @property
    def newest_ms(self) -> int:
        """When its last record was accepted."""
        return self.at_ms if isinstance(self.at_ms, int) else self.at_ms[-1]

    def columns(self, last_offset: int) -> tuple[Sequence[int], list[int], list[bytes | None]]:
        """Offsets, times and keys, written out."""
        count = len(self.values)
        offsets = range(last_offset + 1 - count, last_offset + 1) if self.offsets is None else self.offsets
        at_ms = [self.at_ms] * count if isinstance(self.at_ms, int) else self.at_ms
        return offsets, at_ms, [None] * count if self.keys is None else self.keys


encode = msgspec.msgpack.Encoder().encode
decode_chunk = msgspec.msgpack.Decoder(Chunk).decode


def record_sizes(keys: Iterable[bytes | None], values: Iterable[bytes | None]) -> list[int]:
    """Bytes of each record."""
    return [len(key or b"") + len(value or b"") for key, value in zip(keys, values, strict=True)]


def cut(
    start: int, at_ms: int, keys: Sequence[bytes | None], values: Sequence[bytes | None], sizes: Sequence[int]
) -> Iterator[tuple[int, Chunk]]:
    """New records from offset `start` on, as chunks, each behind the offset of its last record."""
    ends = [*accumulate(sizes)]
    first = 0
    while first < len(values):
        full = (ends[first - 1] if first else 0) + CHUNK_BYTES
        end = min(first + CHUNK_RECORDS_MAX, bisect_left(ends, full, lo=first) + 1, len(values))
        part = keys[first:end]
        yield start + end - 1, Chunk(at_ms, None, None if part.count(None) == len(part) else [*part], [*values[first:end]])
        first = end
