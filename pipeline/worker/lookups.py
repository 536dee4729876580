"""Reads from a partition's store what its task needs for the next commit."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

from pipeline.core.commit import Lookup
from pipeline.core.expiry import Entry
from pipeline.core.record import TAG_PRODUCER, prefix_end, runs
from pipeline.ports import ReadableStore

PRODUCERS_SWEPT = 200
"""Number of producer entries that each commit examines, to find producers that may be forgotten."""


class LookedUp(NamedTuple):
    """Content of a store that a `Lookup` asks for: see `Task.prepare_commit`."""

    values: list[bytes | None]
    existing: list[bytes]
    swept: list[list[Entry]]


def look_up(store: ReadableStore, lookup: Lookup) -> LookedUp:
    """Read what a task asks for."""
    values: list[bytes | None] = []
    for run in runs(lookup.keys):
        values += store.get(run)
    existing = [key for prefix in lookup.prefixes for key, _ in store.scan(prefix, prefix_end(prefix))]
    swept: list[list[Entry]] = []
    left = lookup.swept_max
    for sweep in lookup.sweeps:
        if left <= 0:
            break
        swept.append([*islice(store.scan(sweep.start, sweep.end), left)])
        left -= len(swept[-1])
    return LookedUp(values, existing, swept)


class ProducerSweep:
    """Goes round all producers of a store, a few at a time."""

    def __init__(self) -> None:
        self._next = TAG_PRODUCER

    def read(self, store: ReadableStore) -> list[Entry]:
        """Return the next entries."""
        entries = [*islice(store.scan(self._next, prefix_end(TAG_PRODUCER)), PRODUCERS_SWEPT)]
        self._next = entries[-1][0] + b"\x00" if len(entries) == PRODUCERS_SWEPT else TAG_PRODUCER
        return entries
