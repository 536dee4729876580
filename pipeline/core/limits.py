"""How much a task may hold in memory, and how much of everything a partition may have."""

from __future__ import annotations

import msgspec


class TaskLimits(msgspec.Struct, frozen=True):
    """Bounds on what a task holds in memory, each with its behaviour at the bound."""

    overlay_entries_max: int = 50_000
    """`Task.full` turns true: the shell commits before it folds on. One batch can go beyond it."""
    overlay_bytes_max: int = 32 * 2**20
    """The same in bytes of the records that were folded into it."""
    cache_entries_max: int = 100_000
    """Committed states that are kept; the least recently committed half makes room."""
    cache_bytes_max: int = 64 * 2**20
    """The same, counted in bytes of their suffixes and encodings. One commit can go beyond either."""
    producer_ttl_ms: int = 7 * 86_400_000
    """A producer that was silent for so long is forgotten; a batch that it sends again later would count again."""
    closed_producer_ttl_ms: int = 3_600_000
    """The same for a producer that has said that it sends nothing more: a copy of a batch may be on its way still."""
    letter_ttl_ms: int = 90 * 86_400_000
    """The same for a dead letter that was replayed: for longer than anybody can have that letter, to replay it again."""
    producers_max: int = 100_000
    """Producers that are kept in memory; the store remembers all of them."""
    views_max: int = 10_000
    """Definitions of a partition; a group that would add another is refused."""
    series_max: int = 1_000_000
    """Series of a definition in a partition; what is beyond merges into the series whose labels are all `__overflow__`."""
    ts_ahead_max_ms: int = 3_600_000
    """How far the timestamp of a `last` value may be ahead of the record's own; a group with a later one is refused."""
