"""Which definitions a read of a view merges, as the stores have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from pipeline.core import codec
from pipeline.core.grants import Bounds
from pipeline.core.query import Labels, MergedDefinition, Query, pinned_labels
from pipeline.core.record import TAG_DEFINITION, Position, definition_key, definitions_prefix, prefix_end
from pipeline.errors import Unreadable
from pipeline.ports import StoreView
from pipeline.query.damage import decode_stored
from pipeline.query.progress import read_positions
from pipeline.query.ranges import Points
from pipeline.query.scans import view_of

decode_definition = lru_cache(maxsize=4_096)(codec.decode_definition)


def all_definitions(stores: Mapping[int, StoreView]) -> Iterator[tuple[str, codec.DefinitionEntry | Unreadable]]:
    """Yield each definition entry of all partitions behind its view; in place of one that can't be decoded, the error."""
    for number, store in stores.items():
        for key, value in store.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION)):
            found: codec.DefinitionEntry | Unreadable
            try:
                found = decode_stored(number, decode_definition, value)
            except Unreadable as error:
                found = error.with_traceback(None)  # who handles it while this goes on must not clear this frame
            yield view_of(key), found


def is_seen(bounds: Bounds | None, view: str, entry: codec.DefinitionEntry | Unreadable) -> bool:
    """Return whether a token with these bounds may see a definition; of one that can't be decoded only its view is known."""
    if bounds is None:
        return True
    return bounds.has_view(view) if isinstance(entry, Unreadable) else bounds.has(entry.definition)


class ViewHeads(NamedTuple):
    """Positions of all stores and the definitions of one view, each partition at one moment."""

    positions: dict[int, Position]
    entries: list[codec.DefinitionEntry]


class ReadPlan(NamedTuple):
    """The definitions that a read of a view merges, and the versions of each partition's definitions they were found in."""

    stores: Mapping[int, object]  # a rebuilt store counts the versions of its definitions from 0 again
    versions: dict[int, int]
    merged: MergedDefinition
    dated_by: tuple[bytes, ...]
    """Keys of the definition entries that say what has expired; empty if nothing of the view can expire."""

    def holds(self, stores: Mapping[int, object], positions: Mapping[int, Position]) -> bool:
        """Return whether stores at these positions still have the definitions of the plan."""
        return versions(positions) == self.versions and self.stores == stores


def count_series(stores: Mapping[int, StoreView], plan: ReadPlan) -> int:
    """Return how many entries of series, of all windows, the definitions of a plan have in these stores."""
    keys = [definition_key(it) for it in plan.merged.parts]
    values = [(number, value) for number, store in stores.items() for value in store.get(keys) if value]
    return sum(decode_stored(number, decode_definition, value).series_count for number, value in values)


def pinned(query: Query, plan: ReadPlan) -> Labels | None:
    """Return the labels of the only series that can match; None if there can be several, or two ranges are read."""
    return None if query.range.compare_ms is not None else pinned_labels(plan.merged.definition, query.where)


def key_count(plan: ReadPlan, points: Points | None) -> int:
    """Return how many keys of all partitions hold the windows of one series; 0 without windows."""
    return 0 if points is None else sum(len(points.windows(it)) for it in plan.merged.parts) * len(plan.stores)


Shape = tuple[str, str | None, int | None, Bounds | None]


def shape(query: Query) -> Shape:
    """Return the part of a query that decides which definitions it merges."""
    return query.view, query.kind, query.window_s, query.bounds


def versions(positions: Mapping[int, Position]) -> dict[int, int]:
    """Return the version of each partition's definitions."""
    return {number: position.definitions_version for number, position in positions.items()}


def read_heads(stores: Mapping[int, StoreView], view: str) -> ViewHeads:
    """Read the positions and the definitions of a view."""
    # Before the definitions: if they change in between, the positions have the old version, and the plan is made again.
    positions = read_positions(stores)
    prefix = definitions_prefix(view)
    scans = [(number, store.scan(prefix, prefix_end(prefix))) for number, store in stores.items()]
    entries = [decode_stored(number, decode_definition, value) for number, scan in scans for _, value in scan]
    return ViewHeads(positions, entries)
