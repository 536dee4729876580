"""Lookups of a few entries by their keys, each partition at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from pipeline.core import codec
from pipeline.core.kinds import Kind
from pipeline.core.query import Labels
from pipeline.core.record import POSITION_KEY, WINDOW_NONE, Definition, Position, series_prefix, series_suffix, window_bytes
from pipeline.ports import StoreView
from pipeline.query.damage import decode_all, decode_stored
from pipeline.query.plans import ReadPlan, decode_definition
from pipeline.query.progress import position_of
from pipeline.query.scans import Windowed, alive_of


class Looked(NamedTuple):
    """Entries that were found, and where each partition stood."""

    positions: dict[int, Position]
    entries: list[codec.DefinitionEntry]
    """Definition entries that say what has expired; empty if nothing of the view can expire."""
    keys: list[bytes]
    """Keys of the states, if anything of the view can expire."""
    states: list[Any]


def keys_of(parts: Sequence[tuple[Definition, Labels]], points: Windowed | None, window_start_ms: int = 0) -> list[bytes]:
    """Return the keys of one series, given its label values in each definition: one of each window of `points`.

    Without `points` it is one key, of the window that starts at `window_start_ms`; 0 if the definition has no windows.
    """
    keys: list[bytes] = []
    for part, own in parts:
        prefix, suffix = series_prefix(part), series_suffix(own, window_start_ms)
        if points is None:
            keys.append(prefix + suffix)
        else:
            packed = suffix[len(WINDOW_NONE) :]
            keys += [prefix + window_bytes(start_ms) + packed for start_ms in points.windows(part)]
    return keys


def look_up(plan: ReadPlan, kind: Kind, keys: Sequence[bytes], windowed: bool, stores: Mapping[int, StoreView]) -> Looked:
    """Return what the stores have under these keys. Raises `Unreadable` for an entry that no worker wrote."""
    positions: dict[int, Position] = {}
    sought = [POSITION_KEY, *plan.dated_by, *keys]
    entries: list[codec.DefinitionEntry] = []
    found: list[bytes] = []
    found_keys: list[bytes] = []
    holders: list[int] = []
    for number, store in stores.items():
        position, *values = store.get(sought)
        positions[number] = decode_stored(number, position_of, position)
        if plan.dated_by:
            dates = filter(None, values[: len(plan.dated_by)])
            of_store = [decode_stored(number, decode_definition, value) for value in dates]
            there = [(key, value) for key, value in zip(keys, values[len(plan.dated_by) :], strict=True) if value]
            there = there if windowed else alive_of(there, of_store)
            entries += of_store
            found_keys += [key for key, _ in there]
            values = [value for _, value in there]
        for value in filter(None, values):
            found.append(value)
            holders.append(number)
    return Looked(positions, entries, found_keys, decode_all(holders, partial(codec.decode_states, kind), found))
