"""Builds the points of a range of windows: entries are merged to buckets as they are read, buckets to points at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from operator import itemgetter
from typing import Any

import msgspec

from pipeline.core.answer import Series
from pipeline.core.codec import DefinitionEntry
from pipeline.core.derive import check_function, derived, totals
from pipeline.core.kinds import KINDS, State
from pipeline.core.query import Labels, MergedDefinition, Query, TopN, fold
from pipeline.core.record import WINDOW_NONE, Definition, series_prefix, window_bytes
from pipeline.core.span import NO_RANGE, AskedRange, Point, check_range, filled, merge_points, multiple_ms, span_of
from pipeline.core.times import length_text, time_text
from pipeline.errors import Invalid
from pipeline.settings import QuerySettings

_CHECK_EVERY = 256
"""Series that are built between two checks of the deadline."""


def check_unwindowed(query: Query) -> None:
    """Raise `Invalid` if a read of a view without windows asks for a range."""
    if query.fn is not None or (query.range is not NO_RANGE and query.range != NO_RANGE):
        names = "start, end, at, step, over, fill, compare and fn"
        raise Invalid(f"view {query.view} has no windows: {names} are for views that have")


def expired_before(entries: Iterable[DefinitionEntry]) -> dict[Definition, int]:
    """Return for each definition the start of the oldest window that is kept: the latest of all partitions."""
    found: dict[Definition, int] = {}
    for entry in entries:
        found[entry.definition] = max(entry.expired_before_ms, found.get(entry.definition, 0))
    return found


Buckets = Sequence[tuple[int, State]]
"""Index and state of each bucket of a series that has data."""


class Points:
    """Points of one read, which are made of the entries that are added."""

    def __init__(self, query: Query, merged: MergedDefinition, settings: QuerySettings, now_ms: int) -> None:
        check_range(query.range)
        definition = merged.definition
        self._query = query
        self._merged = merged
        self._settings = settings
        self._kind = KINDS[definition.kind]
        self._answer = self._kind.answerer(query.quantiles)
        self._window_ms = definition.window_s * 1_000
        points_max = min(settings.points_max, settings.answer_points_max)
        self.span = span_of(query.range, window_ms=self._window_ms, now_ms=now_ms, points_max=points_max)
        check_function(query.fn, definition.kind, self.span)
        if query.fn == "delta" and (query.top is not None or query.bottom is not None):
            raise Invalid("fn=delta: top and bottom order by totals of the range; read all series, and order the answer")
        if query.range.fill == "zero" and definition.kind != "sum":
            raise Invalid(
                f"fill=zero: a {definition.kind} of nothing is not 0; fill=null and fill=previous are for every kind"
            )
        self.earlier = None if query.range.compare_ms is None else self._earlier(query.range.compare_ms)
        """Points of the range that is shown beside this one."""
        self._expired: Mapping[Definition, int] = {}
        self._groups: dict[tuple[int, Labels], State] = {}

    def _earlier(self, compare_ms: int) -> Points:
        span = self.span.earlier(multiple_ms("compare", compare_ms, self._window_ms))
        if span.start_ms < 0:
            raise Invalid(f"compare: {length_text(compare_ms)} before {time_text(self.span.start_ms)} is before 1970")
        fill = self._query.range.fill
        asked = AskedRange(span.start_ms, span.end_ms, step_ms=span.step_ms, over_ms=span.over_ms, fill=fill)
        return Points(msgspec.structs.replace(self._query, range=asked), self._merged, self._settings, span.end_ms)

    def hide_expired(self, expired: Mapping[Definition, int]) -> None:
        """Leave out windows that start before these times; call this before entries are added."""
        self._expired = expired
        if self.earlier is not None:
            self.earlier.hide_expired(expired)

    @property
    def expired_before_ms(self) -> int:
        """Start of the oldest window that is kept of every definition of the read."""
        return max(self._expired.get(part, 0) for part in self._merged.parts)

    def windows(self, part: Definition) -> range:
        """Return the starts of the windows of a definition that the points cover and that have not expired."""
        first_ms = max(0, self.span.covered_ms, self._expired.get(part, 0))
        return range(-(-first_ms // self._window_ms) * self._window_ms, self.span.end_ms, self._window_ms)

    def buckets(self, keys: Sequence[bytes], skip: int) -> list[int]:
        """Return the bucket of each key, whose window starts behind `skip` bytes; neighbours often are of one window."""
        found: list[int] = []
        last, bucket = b"", 0
        end, span = skip + len(WINDOW_NONE), self.span
        for key in keys:
            window = key[skip:end]
            if window != last:
                last, bucket = window, span.bucket(int.from_bytes(window, "big"))
            found.append(bucket)
        return found

    def add(self, buckets: Iterable[int], groups: Sequence[Labels], states: Sequence[State]) -> None:
        """Merge entries into the points. Raises `Invalid` for more than an answer may have."""
        fold(self._kind, self._groups, zip(buckets, groups, strict=True), states)
        self._check_count(len(self._groups))

    def add_found(
        self, parts: Sequence[Definition], keys: Sequence[bytes], groups: Sequence[Labels], states: Sequence[State]
    ) -> None:
        """Merge entries that were found by keys made before `hide_expired`, but for those whose windows have expired."""
        for part in parts:
            prefix = series_prefix(part)
            first = prefix + window_bytes(self.windows(part).start)
            there = [i for i, key in enumerate(keys) if key.startswith(prefix) and key >= first]
            buckets = self.buckets([keys[i] for i in there], len(prefix))
            self.add(buckets, [groups[i] for i in there], [states[i] for i in there])

    def states(self) -> Mapping[tuple[int, Labels], State]:
        """Return what was merged so far, by bucket and group."""
        return self._groups

    def _check_count(self, count: int) -> None:
        most = self._settings.answer_points_max
        if count > most:
            raise Invalid(
                f"view {self._query.view}: over {most} points of all series (setting answer_points_max): ask for a shorter "
                "range or a longer step, keep fewer labels, or narrow `where`"
            )

    def answer_fields(self) -> dict[str, Any]:
        """Return the fields of an `Answer` that describe its range."""
        return {
            **msgspec.structs.asdict(self.span),
            "compare_ms": self._query.range.compare_ms,
            "fn": self._query.fn,
            "expired_before_ms": self.expired_before_ms or None,
        }

    def series(self, names: Sequence[str], check: Callable[[], None]) -> tuple[list[Series], int]:
        """Return the series that the read selects, in their order, and how many there are. `check` may raise."""
        found = self._found()
        before = {} if self.earlier is None else self.earlier._found()
        chosen = self._chosen(found, before)
        built = self._count_built(found, chosen)
        if self.earlier is not None:  # both sides have a point wherever one of them has
            built += self.earlier._count_built(before, chosen)
            built = 2 * min(built, self.span.point_count * len(chosen))
        self._check_count(built)
        total = self._totals(found, check)
        total_before = {} if self.earlier is None else self.earlier._totals(before, check)
        series = []
        for labels in self._checked(chosen, check):
            points = self._points(found.get(labels, ()), total)
            compare: list[Point] = []
            if self.earlier is not None:
                points, compare = self._beside(points, self.earlier._points(before.get(labels, ()), total_before))
            series.append(Series(dict(zip(names, labels, strict=True)), points=points, compare=compare))
        return series, len(found.keys() | before.keys())

    def _found(self) -> dict[Labels, Buckets]:
        """Return the buckets of each series, in their order."""
        found: dict[Labels, list[tuple[int, State]]] = {}
        for (bucket, labels), state in self._groups.items():
            found.setdefault(labels, []).append((bucket, state))
        for buckets in found.values():
            buckets.sort(key=itemgetter(0))  # partition after partition, they were in order
        return {**found}

    def _totals(self, found: Mapping[Labels, Buckets], check: Callable[[], None]) -> Mapping[int, Any]:
        """Return the total of all series at each point, if the function of the read needs it."""
        if self._query.fn != "share":
            return {}
        return totals([self._values(found[labels]) for labels in self._checked(found, check)])

    def _beside(self, points: Sequence[Point], earlier: Sequence[Point]) -> tuple[list[Point], list[Point]]:
        """Return points of both ranges at the same places: wherever one of them has a point, the other has null at least."""
        starts, by_ms = self.span.starts(), self._query.range.compare_ms or 0
        now = dict(points)
        before = {start_ms + by_ms: value for start_ms, value in earlier}
        there = [it for it in starts if it in now or it in before]
        return [(it, now.get(it)) for it in there], [(it - by_ms, before.get(it)) for it in there]

    def _checked(self, labels: Iterable[Labels], check: Callable[[], None]) -> Iterable[Labels]:
        for i, it in enumerate(labels):
            if i % _CHECK_EVERY == 0:
                check()
            yield it

    def _chosen(self, found: Mapping[Labels, Buckets], before: Mapping[Labels, Buckets]) -> Sequence[Labels]:
        """Return the series that the read selects; where they are ranked, those of the earlier range only come last."""
        query = self._query
        if query.top is None and query.bottom is None:
            return sorted(found.keys() | before.keys())[: query.limit]
        choice = TopN(self._kind, query)
        choice.offer({labels: reduce(self._kind.merge, [it for _, it in buckets]) for labels, buckets in found.items()})
        most = min(query.limit, query.top or query.bottom or 0)
        return [*choice.selected().labels, *sorted(before.keys() - found.keys())][:most]

    def _count_built(self, found: Mapping[Labels, Buckets], chosen: Sequence[Labels]) -> int:
        """Return how many points the chosen series can have: counted before any is built."""
        count, span = self.span.point_count, self.span
        if self._query.range.fill is not None or self._query.fn in ("cumulative", "share"):
            return count * len(chosen)
        each = -(-span.point_buckets // span.step_buckets) + (self._query.fn == "delta")
        return sum(min(count, each * len(found.get(labels, ()))) for labels in chosen)

    def _values(self, buckets: Buckets) -> dict[int, Any]:
        answer = self._answer
        return {i: answer(state) for i, state in merge_points(self.span, buckets, self._kind.merge)}

    def _points(self, buckets: Buckets, total: Mapping[int, Any]) -> list[Point]:
        values: Mapping[int, Any] = self._values(buckets)
        zero_from_ms = self.expired_before_ms
        if self._query.fn is not None:
            kept = -((self.span.covered_ms - self.expired_before_ms) // self.span.step_ms)
            values = derived(self._query.fn, dict(values), self.span, window_ms=self._window_ms, total=total, kept=kept)
            if self._query.fn == "delta":  # a first point has none, as nothing is known of the one before
                zero_from_ms = self.span.covered_ms + (max(0, kept) + 1) * self.span.step_ms
        return filled(self.span, values, self._query.range.fill, zero_from_ms=zero_from_ms)
