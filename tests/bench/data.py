"""Input of the benchmarks: one view of two labels, as the sealed batches of one publisher."""

from __future__ import annotations

import random
from collections.abc import Iterator
from zlib import crc32

from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Definition, Group, producer_id_of, series_prefix, series_suffix
from pipeline.publisher.batching import partition_of

SECRET = "bench"
PRODUCER_ID = producer_id_of(SECRET)
VIEW = Definition("sales", "sum", ("product", "region"))
REGION_COUNT = 16
BATCH_ENTRIES = 10_000
"""About the number of entries that fit a publisher's `batch_bytes_max`."""


def labels(i: int) -> tuple[str, str]:
    """Return the label values of series `i`."""
    return f"product-{i:07d}", f"region-{i % REGION_COUNT}"


def value(i: int) -> float:
    """Return the value that is added to series `i` each time."""
    return i % 1000 / 4


def batches(
    entry_count: int, series_count: int, partition_count: int, batch_entries: int = BATCH_ENTRIES
) -> Iterator[tuple[int, bytes]]:
    """Return partition and bytes of batches that hold `entry_count` deltas in random order.

    Each series comes once before any comes again, so nothing merges within a batch.
    """
    order = [*range(series_count)]
    rng = random.Random(1)
    prefix = series_prefix(VIEW)
    sequences = [0] * partition_count
    groups = [Group(VIEW, [], []) for _ in range(partition_count)]

    def seal(partition: int) -> tuple[int, bytes]:
        group, groups[partition] = groups[partition], Group(VIEW, [], [])
        sequence = sequences[partition]
        sequences[partition] += 1
        return partition, encode_batch(Batch(PRODUCER_ID, 0, partition, sequence, sequence, 0, [group]))

    for _ in range(entry_count // series_count):
        rng.shuffle(order)
        for i in order:
            suffix = series_suffix(labels(i))
            partition = crc32(prefix + suffix) % partition_count
            group = groups[partition]
            group.suffixes.append(suffix)
            group.states.append(value(i))
            if len(group.suffixes) == batch_entries:
                yield seal(partition)
        for partition in range(partition_count):
            if groups[partition].suffixes:
                yield seal(partition)


def hot(count: int, spread: int, partition_count: int) -> Iterator[tuple[int, bytes]]:
    """Partition and bytes of batches of one delta each to one series, as publishers with this `spread` send them."""
    prefix, suffix = series_prefix(VIEW), series_suffix(labels(0))
    sequences = [0] * partition_count
    for turn in range(count):
        partition = partition_of(prefix, suffix, partition_count, spread, turn)
        sequence, sequences[partition] = sequences[partition], sequences[partition] + 1
        group = Group(VIEW, [suffix], [value(turn)])
        yield partition, encode_batch(Batch(PRODUCER_ID, 0, partition, sequence, sequence, 0, [group]))
