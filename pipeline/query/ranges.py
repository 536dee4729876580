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
from pipeline.core.span import NO_RANGE, Point, check_range, filled, merge_points, span_of
from pipeline.errors import Invalid
from pipeline.settings import QuerySettings

_CHECK_EVERY = 256
"""Series that are built between two checks of the deadline."""


def check_unwindowed(query: Query) -> None:
    """Raise `Invalid` if a read of a view without windows asks for a range."""
    if query.fn is not None or (query.range is not NO_RANGE and query.range != NO_RANGE):
        raise Invalid(f"view {query.view} has no windows: start, end, at, step, over, fill and fn are for views that have")


def expired_before(entries: Iterable[DefinitionEntry]) -> dict[Definition, int]:
    """Return for each definition the start of the oldest window that is kept: the latest of all partitions."""
    found: dict[Definition, int] = {}
    for entry in entries:
        found[entry.definition] = max(entry.expired_before_ms, found.get(entry.definition, 0))
    return found


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
        if query.range.fill == "zero" and definition.kind != "sum":
            raise Invalid(
                f"fill=zero: a {definition.kind} of nothing is not 0; fill=null and fill=previous are for every kind"
            )
        self._expired: Mapping[Definition, int] = {}
        self._groups: dict[tuple[int, Labels], State] = {}

    def hide_expired(self, expired: Mapping[Definition, int]) -> None:
        """Leave out windows that start before these times; call this before entries are added."""
        self._expired = expired

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
            "fn": self._query.fn,
            "expired_before_ms": self.expired_before_ms or None,
        }

    def series(self, names: Sequence[str], check: Callable[[], None]) -> tuple[list[Series], int]:
        """Return the series that the read selects, in their order, and how many there are. `check` may raise."""
        found: dict[Labels, list[tuple[int, State]]] = {}
        for (bucket, labels), state in self._groups.items():
            found.setdefault(labels, []).append((bucket, state))
        for buckets in found.values():
            buckets.sort(key=itemgetter(0))  # partition after partition, they were in order
        chosen = self._chosen(found)
        self._check_built(found, chosen)
        total = {}
        if self._query.fn == "share":
            total = totals([self._values(found[labels]) for labels in self._checked(found, check)])
        series = [
            Series(dict(zip(names, labels, strict=True)), points=self._points(found[labels], total))
            for labels in self._checked(chosen, check)
        ]
        return series, len(found)

    def _checked(self, labels: Iterable[Labels], check: Callable[[], None]) -> Iterable[Labels]:
        for i, it in enumerate(labels):
            if i % _CHECK_EVERY == 0:
                check()
            yield it

    def _chosen(self, found: Mapping[Labels, list[tuple[int, State]]]) -> Sequence[Labels]:
        query = self._query
        if query.top is None and query.bottom is None:
            return sorted(found)[: query.limit]
        choice = TopN(self._kind, query)
        choice.offer({labels: reduce(self._kind.merge, [it for _, it in buckets]) for labels, buckets in found.items()})
        return choice.selected().labels

    def _check_built(self, found: Mapping[Labels, list[tuple[int, State]]], chosen: Sequence[Labels]) -> None:
        """Raise `Invalid` if the chosen series can have too many points: counted before any is built."""
        count, span = self.span.point_count, self.span
        if self._query.range.fill is not None or self._query.fn in ("cumulative", "share"):
            self._check_count(count * len(chosen))
        else:
            each = -(-span.point_buckets // span.step_buckets) + (self._query.fn == "delta")
            self._check_count(sum(min(count, each * len(found[labels])) for labels in chosen))

    def _values(self, buckets: Sequence[tuple[int, State]]) -> dict[int, Any]:
        answer = self._answer
        return {i: answer(state) for i, state in merge_points(self.span, buckets, self._kind.merge)}

    def _points(self, buckets: Sequence[tuple[int, State]], total: Mapping[int, Any]) -> list[Point]:
        values: Mapping[int, Any] = self._values(buckets)
        if self._query.fn is not None:
            values = derived(self._query.fn, dict(values), self.span, window_ms=self._window_ms, total=total)
        return filled(self.span, values, self._query.range.fill, zero_from_ms=self.expired_before_ms)
