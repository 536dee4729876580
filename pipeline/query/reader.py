"""Reads merged views from this process's stores: every answer is at one commit boundary in each partition.

What to read is `core.query.Query`. A read notes where the log ends, then looks at each store: the position it reports and
the entries it merges are of one moment of that store, so `as_of` says exactly what is in the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, TypeVar

from msgspec.structs import replace

from pipeline.budget import check_budget
from pipeline.core import codec
from pipeline.core.answer import Answer, AsOf, PartitionState, View, Views
from pipeline.core.exposition import UNREADABLE, Exposition
from pipeline.core.gathered import StatesAsked, StatesFound
from pipeline.core.grants import Bounds
from pipeline.core.kinds import KINDS
from pipeline.core.query import (
    Labels,
    Listed,
    MergedDefinition,
    Query,
    Selected,
    fold,
    group_key,
    label_index,
    listed,
    merged,
    narrow,
    select_one,
)
from pipeline.core.record import TAG_DEFINITION, Definition, Position, definition_key, expires_silent, prefix_end
from pipeline.errors import Invalid, NotFound, NotReady, StoreCorrupt, Unavailable, Unreadable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, ReadableStore, StoreView
from pipeline.query.cuts import Cut
from pipeline.query.damage import OnDamage, decode_stored, report_damage
from pipeline.query.ends import LogEnds
from pipeline.query.found import Asked, FoundAnswer, answer_of, points_answer
from pipeline.query.lookups import keys_of, look_up
from pipeline.query.matchers import Test, compile_matcher
from pipeline.query.plans import ReadPlan, Shape, ViewHeads, count_series, key_count, pinned, read_heads, shape, versions
from pipeline.query.progress import Progress, read_positions
from pipeline.query.ranges import Points, check_unwindowed, expired_before
from pipeline.query.scans import scan_windows, select, similar
from pipeline.query.scrapes import scrape_cut
from pipeline.query.states import StatesReader
from pipeline.settings import QuerySettings

_PLANS_MAX = 10_000
_POINT_KEYS_MAX = 500
"""Upper limit of the keys that a read gets in the caller's thread, which may be an event loop's; a millisecond's work."""
_KEYS_MAX = 100_000
"""Upper limit of the keys that a read gets one by one; one that needs more walks through all series of its windows."""
_POINT_TESTS_MAX = 4
"""Conditions beside pinned labels that such a read tests: a regular expression takes a millisecond to compile."""
_POINT_TRIES = 3
"""Attempts of a point read at finding the definitions of a view, if they change meanwhile."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


def _ignore(_: Mapping[int, Position]) -> None:
    """Take no note of positions."""


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
        self._plans: dict[Shape, ReadPlan] = {}
        self._closed = False

    @property
    def topic_id(self) -> str:
        """Id of the topic of deltas as the log last answered it; empty before a first answer."""
        return self._ends().source_id

    @property
    def seen_s(self) -> float:
        """Time on `clock` at which the log was asked for `topic_id`."""
        return self._ends().at_s

    @property
    def elsewhere(self) -> frozenset[int]:
        """Partitions of the topic that this process does not follow, so that no answer has them."""
        return self._ends().elsewhere

    def close(self) -> None:
        """End all running reads: they raise `Unavailable`."""
        self._closed = True

    # Answers

    def definition(self, view: str, bounds: Bounds | None = None) -> Definition:
        """Return the merged definition of a view within bounds, from memory after the first call; `NotFound` without one."""
        query = Query(view, bounds=bounds)
        return (self._plans.get(shape(query)) or self._load_plan(query)).merged.definition

    def definitions_of(self, view: str, kind: str, window_s: int | None, bounds: Bounds | None) -> tuple[Definition, ...]:
        """Return the definitions that a read of this kind and window merges, as `definition` does."""
        query = Query(view, kind=kind, window_s=window_s, bounds=bounds)
        return (self._plans.get(shape(query)) or self._load_plan(query)).merged.parts

    def _load_plan(self, query: Query) -> ReadPlan:
        """Read from the stores which definitions to merge."""
        stores = self._stores()
        heads = self._from(stores, read_heads, query.view)
        self._check_unchanged(stores)
        return self._plan(query, stores, heads)

    def _plan(self, query: Query, stores: Mapping[int, ReadableStore], heads: ViewHeads) -> ReadPlan:
        key = shape(query)
        try:
            found = merged(query.view, heads.entries, kind=query.kind, window_s=query.window_s, bounds=query.bounds)
        except NotFound:
            self._plans.pop(key, None)
            raise
        if len(self._plans) >= _PLANS_MAX:
            self._plans.clear()
        expires = bool(found.definition.window_s) or any(map(expires_silent, found.parts))
        dated_by = tuple(map(definition_key, found.parts)) if expires else ()
        plan = self._plans[key] = ReadPlan(dict(stores), versions(heads.positions), found, dated_by)
        return plan

    def asked(self, query: Query) -> Asked | None:
        """Return what a read of now is answered by; None if there is no such view, or its definitions change meanwhile."""
        for _ in range(_POINT_TRIES):
            try:
                plan = self._plans.get(shape(query)) or self._load_plan(query)
            except NotFound:
                return None
            stores = self._stores()
            positions = self._from(stores, read_positions)
            self._check_unchanged(stores)
            if plan.holds(stores, positions):
                now_ms = self.clock.now_ms()
                points = self._new_points(query, plan.merged, now_ms)
                return Asked(query, now_ms, None if points is None else points.span, positions)
            self._plans.pop(shape(query), None)
        return None

    def series_count(self, query: Query) -> int:
        """Return how many entries of series, of all windows, the definitions have that a query merges."""
        try:
            plan = self._plans.get(shape(query)) or self._load_plan(query)
        except NotFound:
            return 0
        return self._from(self._stores(), count_series, plan)

    def renewed(self, answer: Answer, positions: Mapping[int, Position]) -> Answer:
        """Return the answer, which was read at these positions, with what the clock says of it now."""
        seen = self._progress.note_ends()
        as_of = self._progress.as_of(positions, seen)
        if answer.step_ms is None:
            return replace(answer, as_of=as_of)
        return replace(answer, as_of=as_of, final_before_ms=self._progress.final_before_ms(positions, seen))

    def point(self, query: Query, *, keys_max: int = _POINT_KEYS_MAX) -> Answer | None:
        """Return the answer of `find_point`."""
        found = self.find_point(query, self.clock.now_ms(), keys_max=keys_max)
        return None if found is None else found.answer

    def find_point(self, query: Query, now_ms: int, *, keys_max: int = _POINT_KEYS_MAX) -> FoundAnswer | None:
        """Return the answer if `where` pins every label, so that a few keys of each partition hold it; else None.

        None, too, for over `keys_max` keys of all partitions, for many conditions, and if there is no such view.
        """
        for _ in range(_POINT_TRIES):
            try:
                plan = self._plans.get(shape(query)) or self._load_plan(query)
            except NotFound:
                return None  # `read` knows which views there are
            labels = pinned(query, plan)
            if labels is None or (keys_max <= _POINT_KEYS_MAX and len(query.where) > len(labels) + _POINT_TESTS_MAX):
                return None
            points = self._new_points(query, plan.merged, now_ms)
            if key_count(plan, points) > keys_max:
                return None
            stores = self._stores()
            found = self._point(query, plan, labels, points, stores, stores, self._progress.note_ends())
            if found is not None:
                return found
            self._plans.pop(shape(query), None)
        return None

    def _new_points(self, query: Query, merged: MergedDefinition, now_ms: int) -> Points | None:
        """Return the points of a read, without any entry yet; None for a view without windows."""
        if merged.definition.window_s:
            return Points(query, merged, self._settings, now_ms)
        check_unwindowed(query)
        return None

    def _point(
        self,
        query: Query,
        plan: ReadPlan,
        labels: Labels,
        points: Points | None,
        stores: Mapping[int, ReadableStore],
        views: Mapping[int, StoreView],
        seen: LogEnds,
    ) -> FoundAnswer | None:
        """Return the answer from the series with these labels; None if the definitions are no longer those of `plan`.

        `views` are the stores, or snapshots of them. Where the log ends was `seen` before they are read.
        """
        definition = plan.merged.definition
        kind = KINDS[definition.kind]
        # As many conditions as pinned labels: each is an equality, and nothing is left to test.
        exact = len(query.where) == len(labels)
        tests = [] if exact else self._tests(definition, query, lambda: None)
        group = group_key(definition, query.by)
        fits = exact or all(test([labels[index]])[0] for index, test in tests)
        parts = [(part, own) for part in plan.merged.parts if (own := narrow(plan.merged, part, labels)) is not None]
        keys = keys_of(parts, points)
        try:
            looked = look_up(plan, kind, keys, points is not None, views)
        except StoreCorrupt as error:
            raise report_damage(self._on_damage, stores, error) from None
        self._check_unchanged(stores)
        if not plan.holds(stores, looked.positions):
            return None
        rows = group([labels] * len(looked.states)) if fits else []
        if points is not None:
            points.hide_expired(expired_before(looked.entries))
            if fits:
                points.add_found([part for part, _ in parts], looked.keys, rows, looked.states)
            return self._points_found(query, plan.merged, points, looked.positions, seen, lambda: None)
        groups: dict[Labels, Any] = {}
        if fits:
            fold(kind, groups, rows, looked.states)
        as_of = self._progress.as_of(looked.positions, seen)
        return FoundAnswer(answer_of(query, plan.merged, select_one(kind, query, groups), as_of), looked.positions)

    def read(self, query: Query, *, deadline_s: float) -> Answer:
        """Return the answer of `find`."""
        answer = self.find(query, self.clock.now_ms(), deadline_s=deadline_s).answer
        return replace(answer, series=[*answer.series])

    def find(
        self, query: Query, now_ms: int, *, deadline_s: float, at: Callable[[Mapping[int, Position]], None] = _ignore
    ) -> FoundAnswer:
        """Return the answer, by a scan if need be; `Unavailable` if it takes beyond `deadline_s` on the monotonic clock.

        `now_ms` is the end of a range without one. A scan calls `at` with its positions as soon as it has them.
        """
        found = self.find_point(query, now_ms, keys_max=_KEYS_MAX)
        return self._from(self._stores(), self._scan, query, now_ms, deadline_s, at) if found is None else found

    def _from(self, stores: Mapping[int, ReadableStore], read: Callable[..., T], *arguments: Any) -> T:
        """Return `read(stores, *arguments)`; a store in which it meets damage is rebuilt."""
        try:
            return read(stores, *arguments)
        except StoreCorrupt as error:
            raise report_damage(self._on_damage, stores, error) from None

    def _scan(
        self,
        stores: Mapping[int, ReadableStore],
        query: Query,
        now_ms: int,
        deadline_s: float,
        at: Callable[[Mapping[int, Position]], None],
    ) -> FoundAnswer:
        return self._find_in(self._cut(stores, deadline_s), query, now_ms, at, keys_max=-1)

    def find_all(self, queries: Sequence[Query], now_ms: int, *, deadline_s: float) -> list[FoundAnswer]:
        """Return the answer to each query, all of one moment of each store. Raises as `find`, naming the query's index."""
        return self._from(self._stores(), self._find_all, queries, now_ms, deadline_s)

    def _find_all(
        self, stores: Mapping[int, ReadableStore], queries: Sequence[Query], now_ms: int, deadline_s: float
    ) -> list[FoundAnswer]:
        cut = self._cut(stores, deadline_s)
        found: list[FoundAnswer] = []
        count, most = 0, self._settings.limit_max
        for i, query in enumerate(queries):
            try:
                cut.check(query.view)
                found.append(self._find_in(cut, query, now_ms, _ignore, keys_max=_KEYS_MAX))
                count += sum([max(1, len(it.points)) for it in found[-1].answer.series])
                if count > most:
                    raise Invalid(f"the answers up to this one have {count} series and points; at most {most} (limit_max)")
            except (Invalid, Unavailable) as error:
                raise type(error)(f"query {i}: {error}") from None
        return found

    def _find_in(
        self, cut: Cut, query: Query, now_ms: int, at: Callable[[Mapping[int, Position]], None], *, keys_max: int
    ) -> FoundAnswer:
        """Return the answer from snapshots of the stores: from at most `keys_max` keys of all, or by a scan."""
        heads = read_heads(cut.snapshots, query.view)
        at(heads.positions)
        try:
            plan = self._plan(query, cut.stores, heads)
        except NotFound as error:
            if heads.entries or query.bounds is not None:  # names are not for those who may not see their views
                raise
            raise NotFound(f"{error}{similar(cut.snapshots, query.view)}") from None
        points = self._new_points(query, plan.merged, now_ms)
        labels = pinned(query, plan)
        if labels is not None and key_count(plan, points) <= keys_max:
            found = self._point(query, plan, labels, points, cut.stores, cut.snapshots, cut.seen)
            if found is not None:
                return found
        check = partial(cut.check, query.view)
        if points is None:
            selected = self._select(query, plan.merged, cut.snapshots, check)
            as_of = self._progress.as_of(heads.positions, cut.seen)
            return FoundAnswer(answer_of(query, plan.merged, selected, as_of), heads.positions)
        points.hide_expired(expired_before(heads.entries))
        tests = self._tests(plan.merged.definition, query, check)
        for it in filter(None, (points, points.earlier)):
            scan_windows(query, plan.merged, it, cut.snapshots, tests, check)
        return self._points_found(query, plan.merged, points, heads.positions, cut.seen, check)

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
        check_budget()
        if self._closed:
            raise Unavailable("the server is stopping")
        self._check_unchanged(stores)  # a scan must not hold files that a rebuild deletes
        if self.clock.monotonic_s() > deadline_s:
            raise Unavailable(f"view {view}: not read within timeout_ms; {advice}")

    def _points_found(
        self,
        query: Query,
        merged: MergedDefinition,
        points: Points,
        positions: Mapping[int, Position],
        seen: LogEnds,
        check: Callable[[], None],
    ) -> FoundAnswer:
        as_of = partial(self._progress.as_of, positions, seen)
        final_before_ms = self._progress.final_before_ms(positions, seen)
        return FoundAnswer(points_answer(query, merged, points, as_of, final_before_ms, check), positions)

    def views(self, bounds: Bounds | None = None) -> Views:
        """Return all definitions within bounds, by view, and the state that they are of."""
        found, as_of = self.definitions(bounds)
        return Views([View.of(it, bounds) for it in found], as_of)

    def definitions(self, bounds: Bounds | None = None) -> tuple[list[Listed], AsOf]:
        """Return all definitions within bounds with their counts of series, and the state that they are of."""
        return self._from(self._stores(), self._list_stored, bounds)

    def _list_stored(self, stores: Mapping[int, ReadableStore], bounds: Bounds | None) -> tuple[list[Listed], AsOf]:
        cut = self._cut(stores, inf)
        entries: list[codec.DefinitionEntry] = []
        for number, snapshot in cut.snapshots.items():
            for _, value in snapshot.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION)):
                entries.append(decode_stored(number, codec.decode_definition, value))
        return listed(entries, bounds), self._progress.as_of(cut.positions, cut.seen)

    def scrape(
        self, views: Collection[str] = (), *, windowed: bool = True, deadline_s: float, bounds: Bounds | None = None
    ) -> Exposition:
        """Return all views within bounds, or these, each whole or not at all, at one moment of each store.

        Views with windows are left out if not `windowed`. At most `openmetrics_series_max` series are returned, in the order
        of names. Views that can't be shown are named as omitted. Raises `NotFound` for an unknown view, `Unavailable` beyond
        `deadline_s`, `Invalid` without all partitions.
        """
        self._check_whole("scrape one that has all, or one with --gather")
        return self._from(self._stores(), partial(self._scrape, windowed=windowed), views, deadline_s, bounds)

    def _scrape(
        self,
        stores: Mapping[int, ReadableStore],
        views: Collection[str],
        deadline_s: float,
        bounds: Bounds | None,
        *,
        windowed: bool,
    ) -> Exposition:
        cut = self._cut(stores, deadline_s)

        def read(
            query: Query, merged: MergedDefinition, window_start_ms: int, answer: Callable[[Any], Any] | None
        ) -> Selected:
            check = partial(self._check, query.view, deadline_s, stores, "ask for fewer views")
            return self._select(query, merged, cut.snapshots, check, window_start_ms, answer)

        unreadable = partial(self._unreadable, stores)
        series_max = self._settings.openmetrics_series_max
        exposed, omitted = scrape_cut(cut, views, read, unreadable, windowed=windowed, series_max=series_max, bounds=bounds)
        return Exposition(exposed, omitted, self._progress.as_of(cut.positions, cut.seen).staleness_ms)

    def _unreadable(self, stores: Mapping[int, ReadableStore], view: str, error: Unreadable) -> str:
        """Return the reason for leaving a view out that a rebuild has not mended; raise `error` if a rebuild may mend it."""
        damage = report_damage(self._on_damage, stores, error)
        if isinstance(damage, NotReady):
            raise error  # the caller that handles it holds no scan, and a scan holds files that a rebuild deletes
        _log.error("view %s is left out of a scrape: %s", view, damage)
        return UNREADABLE

    def _check_whole(self, advice: str) -> None:
        if elsewhere := self.elsewhere:
            raise Invalid(f"this server lacks partition {min(elsewhere)}: {advice}")

    def on_cut(self, read: Callable[[Cut], T], *, deadline_s: float) -> T:
        """Return what `read` makes of one moment of each store. Its checks raise `Unavailable` beyond `deadline_s`.

        Raises `Invalid` without all partitions.
        """
        self._check_whole("remote reads need one that has all")
        return self._from(self._stores(), lambda stores: read(self._cut(stores, deadline_s)))

    def states(self, asked: StatesAsked, *, arrived_s: float, deadline_s: float) -> StatesFound:
        """Return what a server that merges several asks for. The request arrived at `arrived_s` on the monotonic clock."""

        def read(stores: Mapping[int, ReadableStore]) -> StatesFound:
            cut = self._cut(stores, deadline_s)
            states = partial(self._progress.partitions, cut.positions, cut.seen)
            reader = StatesReader(asked, cut, self._settings, self._tests)
            return reader.found(states, self.topic_id, arrived_s, self.clock.monotonic_s)

        return self._from(self._stores(), read)

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
        if now != stores and any(now.get(number) is not store for number, store in stores.items()):
            raise NotReady("a store was made anew during the read; ask again")
