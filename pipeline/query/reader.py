"""Reads merged views from this process's stores: every answer is at one commit boundary in each partition.

What to read is `core.query.Query`. A read notes where the log ends, then looks at each store: the position it reports and
the entries it merges are of one moment of that store, so `as_of` says exactly what is in the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache, partial
from itertools import compress
from math import inf
from typing import Any, NamedTuple, TypeVar

import pipeline.metrics as m
from pipeline.core import codec
from pipeline.core.answer import Answer, AsOf, PartitionState, Series, View, Views
from pipeline.core.exposition import SERIES_MAX, UNREADABLE, Exposed, Exposition, choose
from pipeline.core.kinds import KINDS, Kind
from pipeline.core.query import (
    Labels,
    Listed,
    MergedDefinition,
    Query,
    Selected,
    TopN,
    chain_blocks,
    decode_labels,
    fold,
    group_key,
    is_complete,
    label_index,
    listed,
    merge_sorted_blocks,
    merged,
    narrow,
    pinned_labels,
    widen,
)
from pipeline.core.record import (
    NO_POSITION,
    POSITION_KEY,
    TAG_DEFINITION,
    WINDOW_NONE,
    Definition,
    Position,
    definitions_prefix,
    prefix_end,
    series_prefix,
    series_suffix,
)
from pipeline.errors import BadRecord, Invalid, NotFound, NotReady, StoreCorrupt, Unavailable, Unreadable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, ReadableStore, StoreView
from pipeline.query.damage import OnDamage, decode_all, decode_stored, find_unreadable, report_damage
from pipeline.query.ends import LogEnds
from pipeline.query.matchers import Test, compile_matcher
from pipeline.query.staleness import EndOffsetHistory, bound_ms, seen_ms
from pipeline.settings import QuerySettings

_BLOCK = 2_000
"""Entries that are decoded together; the deadline is checked between blocks."""
_PLANS_MAX = 10_000
_POINT_TRIES = 3
"""Attempts of a point read at finding the definitions of a view, if they change meanwhile."""

T = TypeVar("T")
_log = logging.getLogger(__name__)
_decode_definition = lru_cache(maxsize=4_096)(codec.decode_definition)
_decode_position = lru_cache(maxsize=4_096)(codec.decode_position)


class _Heads(NamedTuple):
    """Positions of all stores and the definitions of one view, each partition at one moment."""

    positions: dict[int, Position]
    entries: list[codec.DefinitionEntry]


class _Plan(NamedTuple):
    """The definitions that a read of a view merges, and the versions of each partition's definitions they were found in."""

    stores: Mapping[int, object]  # a rebuilt store counts the versions of its definitions from 0 again
    versions: dict[int, int]
    merged: MergedDefinition


class ViewReader:
    """Answers from the stores that `stores` returns, by partition. Safe from any thread.

    `stores` raises `NotReady` while they are restored. It is called again after each access to stores, and must not return a
    store that was taken away meanwhile; a rebuilt store is another object. `ends` returns where the topic of deltas ends.
    `on_damage` rebuilds a store that a read finds damaged; the read raises `NotReady` then.
    """

    def __init__(
        self,
        *,
        stores: Callable[[], Mapping[int, ReadableStore]],
        ends: Callable[[], LogEnds],
        clock: Clock,
        settings: QuerySettings,
        metrics: Metrics = NO_METRICS,
        on_damage: OnDamage | None = None,
    ) -> None:
        self.clock = clock
        self._stores = stores
        self._ends = ends
        self._settings = settings
        self._metrics = metrics
        self._on_damage = on_damage
        self._end_offsets: dict[int, EndOffsetHistory] = {}
        self._seen: LogEnds | None = None
        self._plans: dict[tuple[str, str | None, int | None], _Plan] = {}
        self._closed = False

    @property
    def topic_id(self) -> str:
        """Id of the topic of deltas as the log last answered it; empty before a first answer."""
        return self._ends().source_id

    @property
    def seen_s(self) -> float:
        """Time on `clock` at which the log was asked for `topic_id`."""
        return self._ends().at_s

    def close(self) -> None:
        """End all running reads: they raise `Unavailable`."""
        self._closed = True

    # Answers

    def definition(self, view: str) -> Definition:
        """Return the merged definition of a view, from memory after the first call; `NotFound` if there is no such view."""
        query = Query(view)
        return (self._plans.get(_shape(query)) or self._load_plan(query)).merged.definition

    def _load_plan(self, query: Query) -> _Plan:
        """Read from the stores which definitions to merge."""
        stores = self._stores()
        heads = self._from(stores, _read_heads, query.view)
        self._check_unchanged(stores)
        return self._plan(query, stores, heads)

    def _plan(self, query: Query, stores: Mapping[int, ReadableStore], heads: _Heads) -> _Plan:
        shape = _shape(query)
        try:
            found = merged(query.view, heads.entries, kind=query.kind, window_s=query.window_s)
        except NotFound:
            self._plans.pop(shape, None)
            raise
        if len(self._plans) >= _PLANS_MAX:
            self._plans.clear()
        plan = self._plans[shape] = _Plan(dict(stores), _versions(heads.positions), found)
        return plan

    def point(self, query: Query) -> Answer | None:
        """Return the answer if `where` pins every label, so that a few keys of each partition hold it; else None."""
        for _ in range(_POINT_TRIES):
            plan = self._plans.get(_shape(query)) or self._load_plan(query)
            labels = pinned_labels(plan.merged.definition, query.where)
            if labels is None:
                return None
            answer = self._point(query, plan, labels)
            if answer is not None:
                return answer
            self._plans.pop(_shape(query), None)
        return None

    def _point(self, query: Query, plan: _Plan, labels: Labels) -> Answer | None:
        """Return the answer from the series with these labels; None if the definitions are no longer those of `plan`."""
        definition = plan.merged.definition
        kind = KINDS[definition.kind]
        # As many conditions as pinned labels: each is an equality, and nothing is left to test.
        exact = len(query.where) == len(labels)
        tests = [] if exact else self._tests(definition, query, lambda: None)
        group = group_key(definition, query.by)
        keys = [POSITION_KEY]
        for part in plan.merged.parts:
            own = narrow(plan.merged, part, labels)
            if own is not None:
                keys.append(series_prefix(part) + series_suffix(own))
        stores = self._stores()
        seen = self._note_ends()
        positions: dict[int, Position] = {}
        values: list[bytes] = []
        holders: list[int] = []
        try:
            for number, store in stores.items():
                position, *found = store.get(keys)
                positions[number] = decode_stored(number, _position, position)
                for value in filter(None, found):
                    values.append(value)
                    holders.append(number)
            states = decode_all(holders, partial(codec.decode_states, kind), values)
        except StoreCorrupt as error:
            raise report_damage(self._on_damage, stores, error) from None
        self._check_unchanged(stores)
        if _versions(positions) != plan.versions or any(plan.stores[number] is not it for number, it in stores.items()):
            return None
        groups: dict[Labels, Any] = {}
        if states and all(test([labels[index]])[0] for index, test in tests):
            fold(kind, groups, group([labels] * len(states)), states)
        choice = TopN(kind, top=query.top, limit=query.limit)
        choice.offer(groups)
        return self._answer(query, plan.merged, choice.selected(), positions, seen)

    def read(self, query: Query, *, deadline_s: float) -> Answer:
        """Return the answer, by a scan if need be; `Unavailable` if it takes beyond `deadline_s` on the monotonic clock."""
        answer = self.point(query)
        return self._from(self._stores(), self._scan, query, deadline_s) if answer is None else answer

    def _from(self, stores: Mapping[int, ReadableStore], read: Callable[..., T], *arguments: Any) -> T:
        """Return `read(stores, *arguments)`; a store in which it meets damage is rebuilt."""
        try:
            return read(stores, *arguments)
        except StoreCorrupt as error:
            raise report_damage(self._on_damage, stores, error) from None

    def _scan(self, stores: Mapping[int, ReadableStore], query: Query, deadline_s: float) -> Answer:
        seen = self._note_ends()
        snapshots = {number: store.snapshot() for number, store in stores.items()}
        self._check_unchanged(stores)
        heads = _read_heads(snapshots, query.view)
        plan = self._plan(query, stores, heads)
        check = partial(self._check, query.view, deadline_s, stores)
        selected = self._select(query, plan.merged, snapshots, check)
        return self._answer(query, plan.merged, selected, heads.positions, seen)

    def _select(
        self, query: Query, merged: MergedDefinition, snapshots: Mapping[int, StoreView], check: Callable[[], None]
    ) -> Selected:
        definition = merged.definition
        kind = KINDS[definition.kind]
        group = group_key(definition, query.by)
        tests = self._tests(definition, query, check)
        # Series of several definitions with the same labels are not neighbours in the order of keys.
        complete = is_complete(definition, query.by) and len(merged.parts) == 1
        choice = TopN(kind, top=query.top, limit=query.limit)
        groups: dict[Labels, Any] = {}
        for part in merged.parts:
            prefix = series_prefix(part)
            skip, width, wide = len(prefix) + len(WINDOW_NONE), len(part.labels), widen(merged, part)
            scans = [snapshot.scan(prefix, prefix_end(prefix)) for snapshot in snapshots.values()]
            for keys, values in (merge_sorted_blocks if complete else chain_blocks)(scans, _BLOCK):
                check()
                try:
                    rows, matching = wide(decode_labels(keys, skip, width)), values
                    for index, test in tests:
                        fits = test([row[index] for row in rows])
                        rows, matching = [*compress(rows, fits)], [*compress(matching, fits)]
                    states = codec.decode_states(kind, matching)
                except BadRecord:
                    raise find_unreadable(snapshots, keys, values, partial(_decode_one, kind, skip, width)) from None
                fold(kind, groups, group(rows), states)
                if complete:
                    choice.offer(groups)
                    groups.clear()
                elif len(groups) > self._settings.limit_max:
                    raise Invalid(f"over {self._settings.limit_max} groups: keep fewer labels, or narrow `where`")
        choice.offer(groups)
        check()
        return choice.selected()

    def _tests(self, definition: Definition, query: Query, check: Callable[[], None]) -> list[tuple[int, Test]]:
        longest = self._settings.regex_bytes_max
        return [
            (label_index(definition, matcher.label), compile_matcher(matcher, regex_bytes_max=longest, check=check))
            for matcher in query.where
        ]

    def _check(
        self,
        view: str,
        deadline_s: float,
        stores: Mapping[int, ReadableStore],
        advice: str = "narrow `where`, or give it more time",
    ) -> None:
        if self._closed:
            raise Unavailable("the server is stopping")
        self._check_unchanged(stores)  # a scan must not hold files that a rebuild deletes
        if self.clock.monotonic_s() > deadline_s:
            raise Unavailable(f"view {view}: not read within timeout_ms; {advice}")

    def _answer(
        self, query: Query, merged: MergedDefinition, selected: Selected, positions: Mapping[int, Position], seen: LogEnds
    ) -> Answer:
        definition = merged.definition
        names = definition.labels if query.by is None else query.by
        rows = zip(selected.labels, selected.values, strict=True)
        series = [Series(dict(zip(names, labels, strict=True)), value) for labels, value in rows]
        cut = selected.series_total > len(series)
        return Answer(
            view=query.view,
            kind=definition.kind,
            by=query.by,
            series=series,
            as_of=self._as_of(positions, seen),
            truncated=cut,
            series_total=selected.series_total if cut else None,
            also=merged.also,
        )

    def views(self) -> Views:
        """Return all definitions, by view, and the state that they are of."""
        found, as_of = self.definitions()
        return Views([View.of(it) for it in found], as_of)

    def definitions(self) -> tuple[list[Listed], AsOf]:
        """Return all definitions with their counts of series, and the state that they are of."""
        return self._from(self._stores(), self._list_stored)

    def _list_stored(self, stores: Mapping[int, ReadableStore]) -> tuple[list[Listed], AsOf]:
        seen = self._note_ends()
        snapshots = {number: store.snapshot() for number, store in stores.items()}
        self._check_unchanged(stores)
        positions = _read_positions(snapshots)
        entries: list[codec.DefinitionEntry] = []
        for number, snapshot in snapshots.items():
            for _, value in snapshot.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION)):
                entries.append(decode_stored(number, codec.decode_definition, value))
        return listed(entries), self._as_of(positions, seen)

    def scrape(self, views: Collection[str] = (), *, deadline_s: float) -> Exposition:
        """Return all views, or these, each whole or not at all, at one moment of each store.

        At most `openmetrics_series_max` series are returned, in the order of names. Views that can't be shown are named as
        omitted. Raises `NotFound` for an unknown view, `Unavailable` if it takes beyond `deadline_s`.
        """
        return self._from(self._stores(), self._scrape, views, deadline_s)

    def _scrape(self, stores: Mapping[int, ReadableStore], views: Collection[str], deadline_s: float) -> Exposition:
        seen = self._note_ends()
        snapshots = {number: store.snapshot() for number, store in stores.items()}
        self._check_unchanged(stores)
        positions = _read_positions(snapshots)
        found: dict[str, list[codec.DefinitionEntry]] = {}
        broken: dict[str, str] = {}
        for number, snapshot in snapshots.items():
            for key, value in snapshot.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION)):
                view = key[len(TAG_DEFINITION) :].partition(b"\x00")[0].decode(errors="replace")
                if views and view not in views:
                    continue
                try:
                    found.setdefault(view, []).append(decode_stored(number, _decode_definition, value))
                except Unreadable as error:
                    broken[view] = self._unreadable(view, stores, error)
        if unknown := set(views) - found.keys():
            raise NotFound(f"no view {min(unknown)[:100]!r}")
        whole = {view: merged(view, entries) for view, entries in found.items() if view not in broken}
        chosen, omitted = choose({view: it.definition for view, it in whole.items()})
        omitted |= broken
        exposed: list[Exposed] = []
        left = self._settings.openmetrics_series_max
        for definition in chosen:
            view = definition.view
            check = partial(self._check, view, deadline_s, stores, "ask for fewer views")
            if max(entry.series_count for entry in found[view]) > left:  # not read at all, so that the work is bounded, too
                omitted[view] = SERIES_MAX
                continue
            try:
                selected = self._select(Query(view, limit=left or 1), whole[view], snapshots, check)
            except Unreadable as error:
                omitted[view] = self._unreadable(view, stores, error)
                continue
            if selected.series_total > left:
                omitted[view] = SERIES_MAX
                continue
            left -= selected.series_total
            exposed.append(Exposed(definition, selected.labels, selected.values))
        return Exposition(exposed, dict(sorted(omitted.items())), self._as_of(positions, seen).staleness_ms)

    def _unreadable(self, view: str, stores: Mapping[int, ReadableStore], error: Unreadable) -> str:
        """Return the reason for leaving a view out that a rebuild has not mended; raise `error` if a rebuild may mend it."""
        damage = report_damage(self._on_damage, stores, error)
        if isinstance(damage, NotReady):
            raise error  # the caller that handles it holds no scan, and a scan holds files that a rebuild deletes
        _log.error("view %s is left out of a scrape: %s", view, damage)
        return UNREADABLE

    # Positions and staleness

    def partitions(self) -> list[PartitionState]:
        """Return the position, lag and staleness of each partition; sets their gauges."""
        try:
            stores = self._stores()
        except NotReady:
            for number in self._end_offsets:
                self._metrics.set(m.STALENESS, inf, number)
            raise
        seen = self._note_ends()
        for number in seen.end_offsets.keys() - stores.keys():  # a new partition without a store
            self._metrics.set(m.STALENESS, inf, number)
        positions = self._from(stores, _read_positions)
        self._check_unchanged(stores)
        now_s, now_ms = self.clock.monotonic_s(), self.clock.now_ms()
        states = []
        for number, position in positions.items():
            next_offset = _reached(position, seen)
            staleness_ms = self._staleness_ms(number, position, seen, now_s, now_ms)
            end_offset = max(seen.end_offsets[number], next_offset) if number in seen.end_offsets else None
            lag = None if end_offset is None else end_offset - next_offset
            if lag is not None:
                self._metrics.set(m.LAG, lag, number)
                self._metrics.set(m.RETENTION_MARGIN, next_offset - seen.start_offsets.get(number, 0), number)
            self._metrics.set(m.STALENESS, inf if staleness_ms is None else staleness_ms / 1000, number)
            at_ms, of = position.committed_at_ms, position.source_id
            states.append(PartitionState(number, next_offset, end_offset, lag, staleness_ms, at_ms, of))
        return states

    def _check_unchanged(self, stores: Mapping[int, ReadableStore]) -> None:
        """Raise `NotReady` if one of these stores was taken away since it was read."""
        now = self._stores()
        if any(now.get(number) is not store for number, store in stores.items()):
            raise NotReady("a store was made anew during the read; ask again")

    def _note_ends(self) -> LogEnds:
        seen = self._ends()
        if seen is not self._seen:
            for number, end_offset in seen.end_offsets.items():
                known = self._end_offsets.get(number)
                if known is None:
                    known = self._end_offsets.setdefault(number, EndOffsetHistory())
                known.observe(seen.at_s, end_offset)
            self._seen = seen
        return seen

    def _staleness_ms(self, number: int, position: Position, seen: LogEnds, now_s: float, now_ms: int) -> int | None:
        reached_s: float | None = None
        if _caught_up(number, position, seen):
            reached_s = seen.at_s
        elif number in self._end_offsets:
            reached_s = self._end_offsets[number].reached_s(_reached(position, seen))
        return bound_ms(position, reached_s, now_s=now_s, now_ms=now_ms)

    def _as_of(self, positions: Mapping[int, Position], seen: LogEnds) -> AsOf:
        now_s, now_ms = self.clock.monotonic_s(), self.clock.now_ms()
        staleness_ms: int | None = seen_ms(seen.at_s, now_s)
        for number in positions.keys() | seen.end_offsets.keys():
            position = positions.get(number, NO_POSITION)  # a new partition without a store
            if not _caught_up(number, position, seen):
                bound = self._staleness_ms(number, position, seen, now_s, now_ms)
                staleness_ms = None if bound is None or staleness_ms is None else max(staleness_ms, bound)
        return AsOf(staleness_ms, {str(number): _reached(position, seen) for number, position in positions.items()})


def _caught_up(number: int, position: Position, seen: LogEnds) -> bool:
    return number in seen.end_offsets and seen.end_offsets[number] <= _reached(position, seen)


def _reached(position: Position, seen: LogEnds) -> int:
    """Return the offset up to which the present topic is folded: 0 if the position is of an earlier topic of its name."""
    foreign = position.source_id and seen.source_id and position.source_id != seen.source_id
    return 0 if foreign else position.next_offset


def _decode_one(kind: Kind, skip: int, width: int, key: bytes, value: bytes) -> None:
    decode_labels([key], skip, width)
    codec.decode_states(kind, [value])


def _position(value: bytes | None) -> Position:
    return NO_POSITION if value is None else _decode_position(value)


def _read_positions(stores: Mapping[int, StoreView]) -> dict[int, Position]:
    return {n: decode_stored(n, _position, store.get([POSITION_KEY])[0]) for n, store in stores.items()}


def _shape(query: Query) -> tuple[str, str | None, int | None]:
    return query.view, query.kind, query.window_s


def _versions(positions: Mapping[int, Position]) -> dict[int, int]:
    return {number: position.definitions_version for number, position in positions.items()}


def _read_heads(stores: Mapping[int, StoreView], view: str) -> _Heads:
    # Before the definitions: if they change in between, the positions have the old version, and the plan is made again.
    positions = _read_positions(stores)
    prefix = definitions_prefix(view)
    scans = [(number, store.scan(prefix, prefix_end(prefix))) for number, store in stores.items()]
    entries = [decode_stored(number, _decode_definition, value) for number, scan in scans for _, value in scan]
    return _Heads(positions, entries)
