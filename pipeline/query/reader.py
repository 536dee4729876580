"""Reads merged views from this process's stores: every answer is at one commit boundary in each partition.

What to read is `core.query.Query`. A read notes where the log ends, then looks at each store: the position it reports and
the entries it merges are of one moment of that store, so `as_of` says exactly what is in the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache, partial
from math import inf
from typing import Any, NamedTuple, TypeVar

from pipeline.core import codec
from pipeline.core.answer import Answer, AsOf, PartitionState, Series, View, Views
from pipeline.core.exposition import (
    SERIES_MAX,
    UNREADABLE,
    Exposed,
    Exposition,
    choose,
    exposed_as,
    newest_final_ms,
    samples_of,
    state_exposed,
)
from pipeline.core.kinds import KINDS
from pipeline.core.query import (
    Labels,
    Listed,
    MergedDefinition,
    Query,
    Selected,
    TopN,
    fold,
    group_key,
    label_index,
    listed,
    merged,
    narrow,
    pinned_labels,
)
from pipeline.core.record import (
    POSITION_KEY,
    TAG_DEFINITION,
    WINDOW_NONE,
    Definition,
    Position,
    definition_key,
    definitions_prefix,
    expires_silent,
    prefix_end,
    series_prefix,
    series_suffix,
)
from pipeline.errors import NotFound, NotReady, StoreCorrupt, Unavailable, Unreadable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, ReadableStore, StoreView
from pipeline.query.cuts import Cut
from pipeline.query.damage import OnDamage, decode_all, decode_stored, report_damage
from pipeline.query.ends import LogEnds
from pipeline.query.matchers import Test, compile_matcher
from pipeline.query.progress import Progress, position_of, read_positions
from pipeline.query.ranges import Points, check_unwindowed, expired_before, window_bytes
from pipeline.query.scans import alive_of, scan_windows, select, similar, view_of
from pipeline.settings import QuerySettings

_PLANS_MAX = 10_000
_POINT_KEYS_MAX = 500
"""Upper limit of the keys that a read gets in the caller's thread, which may be an event loop's; a millisecond's work."""
_KEYS_MAX = 100_000
"""Upper limit of the keys that a read gets one by one; one that needs more walks through all series of its windows."""
_POINT_TRIES = 3
"""Attempts of a point read at finding the definitions of a view, if they change meanwhile."""

T = TypeVar("T")
_log = logging.getLogger(__name__)
_decode_definition = lru_cache(maxsize=4_096)(codec.decode_definition)


class _Heads(NamedTuple):
    """Positions of all stores and the definitions of one view, each partition at one moment."""

    positions: dict[int, Position]
    entries: list[codec.DefinitionEntry]


class _Plan(NamedTuple):
    """The definitions that a read of a view merges, and the versions of each partition's definitions they were found in."""

    stores: Mapping[int, object]  # a rebuilt store counts the versions of its definitions from 0 again
    versions: dict[int, int]
    merged: MergedDefinition
    dated_by: tuple[bytes, ...]
    """Keys of the definition entries that say what has expired; empty if nothing of the view can expire."""


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
        self._on_damage = on_damage
        self._progress = Progress(ends, clock, metrics)
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

    def definitions_of(self, view: str, kind: str, window_s: int | None) -> tuple[Definition, ...]:
        """Return the definitions that a read of this kind and window merges, as `definition` does."""
        query = Query(view, kind=kind, window_s=window_s)
        return (self._plans.get(_shape(query)) or self._load_plan(query)).merged.parts

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
        expires = bool(found.definition.window_s) or any(map(expires_silent, found.parts))
        dated_by = tuple(map(definition_key, found.parts)) if expires else ()
        plan = self._plans[shape] = _Plan(dict(stores), _versions(heads.positions), found, dated_by)
        return plan

    def point(self, query: Query, *, keys_max: int = _POINT_KEYS_MAX) -> Answer | None:
        """Return the answer if `where` pins every label, so that a few keys of each partition hold it; else None.

        None, too, if these are over `keys_max` keys of all partitions, or if there is no such view.
        """
        for _ in range(_POINT_TRIES):
            try:
                plan = self._plans.get(_shape(query)) or self._load_plan(query)
            except NotFound:
                return None  # `read` knows which views there are
            labels = pinned_labels(plan.merged.definition, query.where)
            if labels is None:
                return None
            points = self._new_points(query, plan.merged)
            if points is not None and sum(len(points.windows(it)) for it in plan.merged.parts) * len(plan.stores) > keys_max:
                return None
            answer = self._point(query, plan, labels, points)
            if answer is not None:
                return answer
            self._plans.pop(_shape(query), None)
        return None

    def _new_points(self, query: Query, merged: MergedDefinition) -> Points | None:
        """Return the points of a read, without any entry yet; None for a view without windows."""
        if merged.definition.window_s:
            return Points(query, merged, self._settings, self.clock.now_ms())
        check_unwindowed(query)
        return None

    def _point(self, query: Query, plan: _Plan, labels: Labels, points: Points | None) -> Answer | None:
        """Return the answer from the series with these labels; None if the definitions are no longer those of `plan`."""
        definition = plan.merged.definition
        kind = KINDS[definition.kind]
        # As many conditions as pinned labels: each is an equality, and nothing is left to test.
        exact = len(query.where) == len(labels)
        tests = [] if exact else self._tests(definition, query, lambda: None)
        group = group_key(definition, query.by)
        fits = exact or all(test([labels[index]])[0] for index, test in tests)
        parts = [(part, own) for part in plan.merged.parts if (own := narrow(plan.merged, part, labels)) is not None]
        keys: list[bytes] = []
        for part, own in parts:
            prefix, suffix = series_prefix(part), series_suffix(own)
            if points is None:
                keys.append(prefix + suffix)
            else:
                packed = suffix[len(WINDOW_NONE) :]
                keys += [prefix + window_bytes(start_ms) + packed for start_ms in points.windows(part)]
        stores = self._stores()
        seen = self._progress.note_ends()
        positions: dict[int, Position] = {}
        sought = [POSITION_KEY, *plan.dated_by, *keys]
        entries: list[codec.DefinitionEntry] = []
        found: list[bytes] = []
        found_keys: list[bytes] = []
        """Keys of what is found, if anything of the view can expire."""
        holders: list[int] = []
        try:
            for number, store in stores.items():
                position, *values = store.get(sought)
                positions[number] = decode_stored(number, position_of, position)
                if plan.dated_by:
                    dates = filter(None, values[: len(plan.dated_by)])
                    of_store = [decode_stored(number, _decode_definition, value) for value in dates]
                    there = [(key, value) for key, value in zip(keys, values[len(plan.dated_by) :], strict=True) if value]
                    there = there if points is not None else alive_of(there, of_store)
                    entries += of_store
                    found_keys += [key for key, _ in there]
                    values = [value for _, value in there]
                for value in filter(None, values):
                    found.append(value)
                    holders.append(number)
            states = decode_all(holders, partial(codec.decode_states, kind), found)
        except StoreCorrupt as error:
            raise report_damage(self._on_damage, stores, error) from None
        self._check_unchanged(stores)
        if _versions(positions) != plan.versions or any(plan.stores[number] is not it for number, it in stores.items()):
            return None
        rows = group([labels] * len(states)) if fits else []
        if points is not None:
            points.hide_expired(expired_before(entries))
            if fits:
                points.add_found([part for part, _ in parts], found_keys, rows, states)
            return self._points_answer(query, plan.merged, points, positions, seen, lambda: None)
        groups: dict[Labels, Any] = {}
        if fits:
            fold(kind, groups, rows, states)
        choice = TopN(kind, top=query.top, limit=query.limit, quantiles=query.quantiles)
        choice.offer(groups)
        return self._answer(query, plan.merged, choice.selected(), positions, seen)

    def read(self, query: Query, *, deadline_s: float) -> Answer:
        """Return the answer, by a scan if need be; `Unavailable` if it takes beyond `deadline_s` on the monotonic clock."""
        answer = self.point(query, keys_max=_KEYS_MAX)
        return self._from(self._stores(), self._scan, query, deadline_s) if answer is None else answer

    def _from(self, stores: Mapping[int, ReadableStore], read: Callable[..., T], *arguments: Any) -> T:
        """Return `read(stores, *arguments)`; a store in which it meets damage is rebuilt."""
        try:
            return read(stores, *arguments)
        except StoreCorrupt as error:
            raise report_damage(self._on_damage, stores, error) from None

    def _scan(self, stores: Mapping[int, ReadableStore], query: Query, deadline_s: float) -> Answer:
        seen = self._progress.note_ends()
        snapshots = {number: store.snapshot() for number, store in stores.items()}
        self._check_unchanged(stores)
        heads = _read_heads(snapshots, query.view)
        try:
            plan = self._plan(query, stores, heads)
        except NotFound as error:
            raise error if heads.entries else NotFound(f"{error}{similar(snapshots, query.view)}") from None
        check = partial(self._check, query.view, deadline_s, stores)
        points = self._new_points(query, plan.merged)
        if points is None:
            selected = self._select(query, plan.merged, snapshots, check)
            return self._answer(query, plan.merged, selected, heads.positions, seen)
        points.hide_expired(expired_before(heads.entries))
        scan_windows(query, plan.merged, points, snapshots, self._tests(plan.merged.definition, query, check), check)
        return self._points_answer(query, plan.merged, points, heads.positions, seen, check)

    def _select(
        self,
        query: Query,
        merged: MergedDefinition,
        snapshots: Mapping[int, StoreView],
        check: Callable[[], None],
        window_start_ms: int = 0,
        answer: Callable[[Any], Any] | None = None,
    ) -> Selected:
        tests = self._tests(merged.definition, query, check)
        return select(query, merged, snapshots, tests, check, self._settings.limit_max, window_start_ms, answer)

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
            as_of=self._progress.as_of(positions, seen),
            truncated=cut,
            series_total=selected.series_total if cut else None,
            also=merged.also,
        )

    def _points_answer(
        self,
        query: Query,
        merged: MergedDefinition,
        points: Points,
        positions: Mapping[int, Position],
        seen: LogEnds,
        check: Callable[[], None],
    ) -> Answer:
        definition, span = merged.definition, points.span
        names = definition.labels if query.by is None else query.by
        series, total = points.series(names, check)
        cut = total > len(series)
        return Answer(
            view=query.view,
            kind=definition.kind,
            by=query.by,
            series=series,
            as_of=self._progress.as_of(positions, seen),
            truncated=cut,
            series_total=total if cut else None,
            also=merged.also,
            start_ms=span.start_ms,
            end_ms=span.end_ms,
            step_ms=span.step_ms,
            over_ms=span.over_ms,
            fn=query.fn,
            final_before_ms=self._progress.final_before_ms(positions, seen),
            expired_before_ms=points.expired_before_ms or None,
        )

    def views(self) -> Views:
        """Return all definitions, by view, and the state that they are of."""
        found, as_of = self.definitions()
        return Views([View.of(it) for it in found], as_of)

    def definitions(self) -> tuple[list[Listed], AsOf]:
        """Return all definitions with their counts of series, and the state that they are of."""
        return self._from(self._stores(), self._list_stored)

    def _list_stored(self, stores: Mapping[int, ReadableStore]) -> tuple[list[Listed], AsOf]:
        cut = self._cut(stores, inf)
        entries: list[codec.DefinitionEntry] = []
        for number, snapshot in cut.snapshots.items():
            for _, value in snapshot.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION)):
                entries.append(decode_stored(number, codec.decode_definition, value))
        return listed(entries), self._progress.as_of(cut.positions, cut.seen)

    def scrape(self, views: Collection[str] = (), *, windowed: bool = True, deadline_s: float) -> Exposition:
        """Return all views, or these, each whole or not at all, at one moment of each store.

        Views with windows are left out if not `windowed`. At most `openmetrics_series_max` series are returned, in the order of names. Views that can't be shown are named as
        omitted. Raises `NotFound` for an unknown view, `Unavailable` if it takes beyond `deadline_s`.
        """
        return self._from(self._stores(), partial(self._scrape, windowed=windowed), views, deadline_s)

    def _scrape(
        self, stores: Mapping[int, ReadableStore], views: Collection[str], deadline_s: float, *, windowed: bool
    ) -> Exposition:
        cut = self._cut(stores, deadline_s)
        found: dict[str, list[codec.DefinitionEntry]] = {}
        broken: dict[str, str] = {}
        for number, snapshot in cut.snapshots.items():
            for key, value in snapshot.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION)):
                view = view_of(key)
                if views and view not in views:
                    continue
                try:
                    found.setdefault(view, []).append(decode_stored(number, _decode_definition, value))
                except Unreadable as error:
                    broken[view] = self._unreadable(view, stores, error)
        if unknown := set(views) - found.keys():
            raise NotFound(f"no view {min(unknown)[:100]!r}")
        whole = {view: merged(view, entries) for view, entries in found.items() if view not in broken}
        chosen, omitted = choose({view: exposed_as(it.definition) for view, it in whole.items()})
        omitted |= broken
        exposed: list[Exposed] = []
        left = self._settings.openmetrics_series_max
        for definition in chosen:
            view = definition.view
            check = partial(self._check, view, deadline_s, stores, "ask for fewer views")
            window_start_ms = newest_final_ms(definition, cut.final_before_ms)
            if definition.window_s and not (windowed and window_start_ms >= max(expired_before(found[view]).values())):
                continue  # not asked for, or the window is gone, or there is none yet
            room = left // samples_of(definition)
            # Of a view without windows too many series are not read at all, so that the work is bounded, too.
            if not definition.window_s and max(entry.series_count for entry in found[view]) > room:
                omitted[view] = SERIES_MAX
                continue
            try:
                asked, answer = Query(view, limit=room or 1), state_exposed(definition)
                selected = self._select(asked, whole[view], cut.snapshots, check, window_start_ms, answer)
            except Unreadable as error:
                omitted[view] = self._unreadable(view, stores, error)
                continue
            if selected.series_total > room:
                omitted[view] = SERIES_MAX
                continue
            left -= selected.series_total * samples_of(definition)
            exposed.append(Exposed(definition, selected.labels, selected.values))
        return Exposition(exposed, dict(sorted(omitted.items())), self._progress.as_of(cut.positions, cut.seen).staleness_ms)

    def _unreadable(self, view: str, stores: Mapping[int, ReadableStore], error: Unreadable) -> str:
        """Return the reason for leaving a view out that a rebuild has not mended; raise `error` if a rebuild may mend it."""
        damage = report_damage(self._on_damage, stores, error)
        if isinstance(damage, NotReady):
            raise error  # the caller that handles it holds no scan, and a scan holds files that a rebuild deletes
        _log.error("view %s is left out of a scrape: %s", view, damage)
        return UNREADABLE

    def on_cut(self, read: Callable[[Cut], T], *, deadline_s: float) -> T:
        """Return what `read` makes of one moment of each store. Its checks raise `Unavailable` beyond `deadline_s`."""
        return self._from(self._stores(), lambda stores: read(self._cut(stores, deadline_s)))

    def _cut(self, stores: Mapping[int, ReadableStore], deadline_s: float) -> Cut:
        seen = self._progress.note_ends()
        snapshots = {number: store.snapshot() for number, store in stores.items()}
        self._check_unchanged(stores)
        positions = read_positions(snapshots)
        final_before_ms = self._progress.final_before_ms(positions, seen)
        check = partial(self._check, deadline_s=deadline_s, stores=stores)
        return Cut(stores, snapshots, positions, seen, final_before_ms, check)

    # Positions and staleness

    def partitions(self) -> list[PartitionState]:
        """Return the position, lag and staleness of each partition; sets their gauges."""
        try:
            stores = self._stores()
        except NotReady:
            self._progress.show_unknown()
            raise
        seen = self._progress.note_ends()
        positions = self._from(stores, read_positions)
        self._check_unchanged(stores)
        return self._progress.partitions(positions, seen)

    def _check_unchanged(self, stores: Mapping[int, ReadableStore]) -> None:
        """Raise `NotReady` if one of these stores was taken away since it was read."""
        now = self._stores()
        if any(now.get(number) is not store for number, store in stores.items()):
            raise NotReady("a store was made anew during the read; ask again")


def _shape(query: Query) -> tuple[str, str | None, int | None]:
    return query.view, query.kind, query.window_s


def _versions(positions: Mapping[int, Position]) -> dict[int, int]:
    return {number: position.definitions_version for number, position in positions.items()}


def _read_heads(stores: Mapping[int, StoreView], view: str) -> _Heads:
    # Before the definitions: if they change in between, the positions have the old version, and the plan is made again.
    positions = read_positions(stores)
    prefix = definitions_prefix(view)
    scans = [(number, store.scan(prefix, prefix_end(prefix))) for number, store in stores.items()]
    entries = [decode_stored(number, _decode_definition, value) for number, scan in scans for _, value in scan]
    return _Heads(positions, entries)
