"""Scans of stores: entries of one moment of each, decoded in blocks, filtered, and merged to what a query asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from itertools import compress, islice
from typing import Any, Protocol

from pipeline.core import codec
from pipeline.core.codec import DefinitionEntry
from pipeline.core.kinds import KINDS, Kind, State
from pipeline.core.query import (
    Labels,
    MergedDefinition,
    Query,
    Selected,
    TopN,
    chain_blocks,
    decode_labels,
    fold,
    group_key,
    is_complete,
    merge_sorted_blocks,
    widen,
)
from pipeline.core.record import (
    NAME_BYTES_MAX,
    TAG_DEFINITION,
    WINDOW_NONE,
    Definition,
    definition_key,
    expires_silent,
    prefix_end,
    series_prefix,
    window_bytes,
)
from pipeline.errors import BadRecord, Invalid
from pipeline.ports import StoreView
from pipeline.query.damage import decode_stored, find_unreadable
from pipeline.query.grouping import Grouping
from pipeline.query.matchers import Test

_BLOCK = 2_000
"""Entries that are decoded together; the deadline is checked between blocks."""
_NAMES_MAX = 2_000
"""Views that are compared with a name that is unknown."""
Check = Callable[[], None]
"""Raises if the scan must end."""


def select(
    query: Query,
    merged: MergedDefinition,
    snapshots: Mapping[int, StoreView],
    tests: Sequence[tuple[int, Test]],
    check: Check,
    groups_max: int,
    window_start_ms: int = 0,
    answer: Callable[[State], Any] | None = None,
) -> Selected:
    """Return what the query selects of all series without windows, or of those of one window; see `TopN` for `answer`."""
    choice = TopN(KINDS[merged.definition.kind], query, answer=answer)
    scan_groups(query, merged, snapshots, tests, check, groups_max, choice.offer, window_start_ms)
    return choice.selected()


def scan_groups(
    query: Query,
    merged: MergedDefinition,
    snapshots: Mapping[int, StoreView],
    tests: Sequence[tuple[int, Test]],
    check: Check,
    groups_max: int,
    offer: Callable[[Mapping[Labels, State]], None],
    window_start_ms: int = 0,
) -> None:
    """Merge all series without windows, or of one window, to groups, and offer each group once."""
    group = group_key(merged.definition, query.by)
    kind = KINDS[merged.definition.kind]
    # Series of several definitions with the same labels are not neighbours in the order of keys.
    complete = is_complete(merged.definition, query.by) and len(merged.parts) == 1
    grouping = Grouping(kind, merged.definition.labels if query.by is None else query.by, natively=not tests)
    for part in merged.parts:
        prefix = series_prefix(part) + window_bytes(window_start_ms)
        scans = [_scan(part, number, snapshot, prefix) for number, snapshot in snapshots.items()]
        block = _Block(merged, part, tests, snapshots)

        def decode(
            keys: Sequence[bytes], values: Sequence[bytes], block: _Block = block
        ) -> tuple[Sequence[Labels], Sequence[State]]:
            rows, states, _ = block.decode(keys, values, ())
            return group(rows), states

        if complete:
            for keys, values in merge_sorted_blocks(scans, _BLOCK):
                check()
                groups: dict[Labels, State] = {}
                fold(kind, groups, *decode(keys, values))
                offer(groups)
            continue
        for scan in scans:
            while entries := [*islice(scan, _BLOCK)]:
                check()
                grouping.add(part, len(prefix), entries, decode)
                if len(grouping) > groups_max:
                    raise Invalid(f"over {groups_max} groups: keep fewer labels, or narrow `where`")
    offer(grouping.take())
    check()


def _scan(part: Definition, number: int, snapshot: StoreView, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Return the entries of one partition that have not expired."""
    expired_before_ms = 0
    if expires_silent(part):
        (value,) = snapshot.get([definition_key(part)])
        expired_before_ms = decode_stored(number, codec.decode_definition, value).expired_before_ms if value else 0
    entries = snapshot.scan(prefix, prefix_end(prefix))
    return codec.alive(entries, expired_before_ms) if expired_before_ms else entries


def alive_of(entries: list[tuple[bytes, bytes]], definitions: Iterable[DefinitionEntry]) -> list[tuple[bytes, bytes]]:
    """Return those entries of one partition, without windows, that have not expired by its definitions' own entries."""
    for it in definitions:
        if expires_silent(it.definition):
            prefix = series_prefix(it.definition)
            alive = dict(codec.alive((entry for entry in entries if entry[0].startswith(prefix)), it.expired_before_ms))
            entries = [entry for entry in entries if not entry[0].startswith(prefix) or entry[0] in alive]
    return entries


class Windowed(Protocol):
    """Takes the entries of windows that a scan finds."""

    def windows(self, part: Definition) -> range:
        """Return the starts of the windows of a definition that are needed and have not expired."""
        ...

    def buckets(self, keys: Sequence[bytes], skip: int) -> Sequence[int]:
        """Return what stands for the window of each key, which starts behind `skip` bytes."""
        ...

    def add(self, buckets: Iterable[int], groups: Sequence[Labels], states: Sequence[State]) -> None:
        """Merge entries, given what stands for their windows, and their groups."""
        ...


def scan_windows(
    query: Query,
    merged: MergedDefinition,
    points: Windowed,
    snapshots: Mapping[int, StoreView],
    tests: Sequence[tuple[int, Test]],
    check: Check,
) -> None:
    """Add to the points the entries of all windows that they cover."""
    group = group_key(merged.definition, query.by)
    for part in merged.parts:
        prefix, windows = series_prefix(part), points.windows(part)
        if not windows:
            continue
        first, end = prefix + window_bytes(windows.start), prefix + window_bytes(windows.stop)
        scans = [snapshot.scan(first, end) for snapshot in snapshots.values()]
        block = _Block(merged, part, tests, snapshots)
        for keys, values in chain_blocks(scans, _BLOCK):
            check()
            rows, states, buckets = block.decode(keys, values, points.buckets(keys, len(prefix)))
            points.add(buckets, group(rows), states)


class _Block:
    """Decodes blocks of entries of one definition: label values in the order of the merged definition, and states."""

    def __init__(
        self,
        merged: MergedDefinition,
        part: Definition,
        tests: Sequence[tuple[int, Test]],
        snapshots: Mapping[int, StoreView],
    ) -> None:
        self._kind = KINDS[part.kind]
        self._skip, self._width = len(series_prefix(part)) + len(WINDOW_NONE), len(part.labels)
        self._widen = widen(merged, part)
        self._tests = tests
        self._snapshots = snapshots

    def decode(
        self, keys: Sequence[bytes], values: Sequence[bytes], column: Sequence[int]
    ) -> tuple[list[Labels], list[Any], Sequence[int]]:
        """Return labels and states of the entries that match, and what `column` has of them, which may be empty."""
        kind, skip, width = self._kind, self._skip, self._width
        try:
            rows, matching = self._widen(decode_labels(keys, skip, width)), values
            for index, test in self._tests:
                fits = test([row[index] for row in rows])
                rows, matching, column = [*compress(rows, fits)], [*compress(matching, fits)], [*compress(column, fits)]
            return rows, codec.decode_states(kind, matching), column
        except BadRecord:
            raise find_unreadable(self._snapshots, keys, values, partial(_decode_one, kind, skip, width)) from None


def similar(snapshots: Mapping[int, StoreView], view: str) -> str:
    """Return the end of a message that names the views whose names are nearest; empty if none is near."""
    names: set[str] = set()
    for snapshot in snapshots.values():
        for key, _ in snapshot.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION)):
            names.add(view_of(key))
            if len(names) >= _NAMES_MAX:
                break
    near = get_close_matches(view[:NAME_BYTES_MAX], names)
    return f"; is it {' or '.join(near)}?" if near else ""


def view_of(key: bytes) -> str:
    """Return the view of a definition's key."""
    return key[len(TAG_DEFINITION) :].partition(b"\x00")[0].decode(errors="replace")


def _decode_one(kind: Kind, skip: int, width: int, key: bytes, value: bytes) -> None:
    decode_labels([key], skip, width)
    codec.decode_states(kind, [value])
