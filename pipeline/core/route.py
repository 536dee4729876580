"""Which partition a series goes to. A matter of balance, never of correctness: every read merges all partitions."""

from __future__ import annotations

from zlib import crc32


def route(key: bytes, partition_count: int) -> int:
    """The partition of a series' key: CRC-32 modulo, as librdkafka's `consistent` partitioner."""
    return crc32(key) % partition_count
