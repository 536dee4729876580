"""Values that pass between a task and its shell: see `core.task`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from pipeline.core.codec import Received
from pipeline.core.expiry import Sweep
from pipeline.core.record import Position, Records
from pipeline.core.sequence import Folded
from pipeline.errors import BadRecord


class Counts(msgspec.Struct):
    """Counters of a task since it was made."""

    batches_folded: int = 0
    entries_folded: int = 0
    entries_expired: int = 0
    """Entries of batches that were dead-lettered, because their windows have expired."""
    series_expired: int = 0
    """Committed series that were deleted: their windows have expired, or they were silent for too long."""
    batches_duplicate: int = 0
    batches_stale: int = 0
    """Batches that were refused because a newer process has opened their producer."""
    records_bad: int = 0
    """Records that were dead-lettered as a whole, stale batches included."""
    groups_refused: int = 0
    """Groups that were dead-lettered, of batches whose other groups were folded."""
    series_cleared: int = 0
    """Committed series of definitions that were dropped or reset: the next commit has about as many tombstones."""
    series_overflowed: int = 0
    """Entries that were merged into an overflow series, because their definition has `series_max` series."""
    producers_forgotten: int = 0


class Commit(msgspec.Struct, frozen=True):
    """Entries and dead letters that become durable together. `keys[-1]` is the position record."""

    keys: list[bytes]
    values: list[bytes | None]
    dead_letters: list[tuple[bytes, bytes | None]]
    """Dead letters by key; None: the batch in the letter has been folded since."""
    position: Position
    series_count: int
    """Number of series entries among the keys."""


class Reading(NamedTuple):
    """Decoded records, and the keys to look up before they can be folded."""

    records: Records
    received: list[Received | BadRecord]
    producers: dict[str, Folded | None]
    """Memories of producers that are known without the store."""
    producer_keys: list[bytes]
    """Keys of the entries of all other producers."""


class Lookup(NamedTuple):
    """Keys and prefixes to look up in the store before a commit can be prepared."""

    keys: list[bytes]
    """Keys of series whose committed values are needed."""
    prefixes: list[bytes]
    """Prefixes of definitions that were dropped or reset, whose existing keys are needed."""
    sweeps: Sequence[Sweep] = ()
    """Ranges whose entries are needed, in this order, up to `swept_max` in all."""
    swept_max: int = 0
