"""Limits of what a task holds in memory and of what a partition may have."""

from __future__ import annotations

import msgspec

SPREAD_MAX = 1_024
"""Most partitions over which a view can be spread."""


class TaskLimits(msgspec.Struct, frozen=True):
    """Limits of a task, each with what happens at the limit."""

    overlay_entries_max: int = 50_000
    """With so many entries `Task.full` turns true: the shell commits before it folds on. One batch can go beyond it."""
    overlay_bytes_max: int = 32 * 2**20
    """`Task.full` also turns true when the records that were folded into the overlay have so many bytes."""
    cache_entries_max: int = 100_000
    """Number of committed states that are kept; the least recently committed half makes room."""
    cache_bytes_max: int = 64 * 2**20
    """Bytes of the suffixes and encodings of cached states. One commit can go beyond either limit of the cache.
    The native core counts the memory of both, and takes up to a quarter more for hashes of all series of new definitions."""
    producer_ttl_ms: int = 7 * 86_400_000
    """Time after which a silent producer is forgotten; a batch that it sends again later would count again."""
    closed_producer_ttl_ms: int = 3_600_000
    """Time after which a producer is forgotten that has closed: until then a copy of a batch may still be on its way."""
    letter_ttl_ms: int = 90 * 86_400_000
    """Time after which the replay of a dead letter is forgotten: longer than anybody can keep that letter."""
    producers_max: int = 100_000
    """Number of producers that are kept in memory; the store has all of them."""
    views_max: int = 10_000
    """Number of definitions in a partition; a group that would add another is refused."""
    series_max: int = 1_000_000
    """Number of a definition's series in a partition; more merge into the series whose labels are all `__overflow__`."""
    ts_ahead_max_ms: int = 3_600_000
    """Time by which a `last` value's timestamp, or the start of a window, may be ahead of the record's own time; a group
    with a later one is refused."""
    expired_entries_max: int = 500
    """Number of entries that a commit examines to delete those that have expired; more if the commit before has added more
    series."""
