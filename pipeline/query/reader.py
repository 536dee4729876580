"""Reads merged views from this process's stores: every answer is at one commit boundary in each partition.

What to read is `core.view.Query`. A read notes where the log ends, then looks at each store: the position it reports and
the entries it merges are of one moment of that store, so `as_of` says exactly what is in the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial
from itertools import compress
from math import inf
from typing import Any, NamedTuple, TypeVar

import msgspec

import pipeline.metrics as m
from pipeline.core import codec
from pipeline.core.exposition import SERIES_MAX, UNREADABLE, Exposed, Exposition, choose
from pipeline.core.merge import KINDS
from pipeline.core.record import (
    NO_POSITION,
    POSITION_KEY,
    TAG_DEFINITION,
    WINDOW_NONE,
    Definition,
    Position,
    definition_key,
    prefix_end,
    series_prefix,
    series_suffix,
)
from pipeline.core.view import (
    Choice,
    Labels,
    Query,
    Selected,
    agree,
    decode_labels,
    fold,
    group_key,
    in_step,
    in_turn,
    is_complete,
    label_index,
    pinned_labels,
)
from pipeline.errors import BadRecord, Invalid, NotFound, NotReady, StoreCorrupt, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, ReadableStore, StoreView
from pipeline.query.ends import Seen
from pipeline.query.matchers import Test, compile_matcher
from pipeline.query.staleness import EndOffsets, bound_ms, seen_ms
from pipeline.settings import QuerySettings

_BLOCK = 2_000
"""Entries that are decoded together; the deadline is looked at between blocks."""
_DEFINITIONS_MAX = 10_000

T = TypeVar("T")
_log = logging.getLogger(__name__)
_decode_view = lru_cache(maxsize=4_096)(codec.decode_view)
_decode_position = lru_cache(maxsize=4_096)(codec.decode_position)


class AsOf(msgspec.Struct, frozen=True):
    """What an answer reflects: see `adapters.http.AsOf`, its other end."""

    staleness_ms: int | None
    next_offsets: dict[str, int]


class Series(msgspec.Struct, frozen=True):
    """One row of an answer."""

    labels: dict[str, str]
    value: Any


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A merged view, in the shape of the HTTP API."""

    view: str
    kind: str
    by: Labels | None
    series: list[Series]
    as_of: AsOf
    truncated: bool = False
    series_total: int | None = None


class View(msgspec.Struct, frozen=True):
    """A view's definition, and how many series of it there are, summed over partitions."""

    name: str
    kind: str
    labels: Labels
    window_s: int | None
    series_count: int
    monotone: bool


class Views(msgspec.Struct, frozen=True):
    """All views. One that partitions define differently stands there once for each definition."""

    views: list[View]
    as_of: AsOf


class PartitionState(msgspec.Struct, frozen=True):
    """How far one partition is."""

    partition: int
    next_offset: int
    end_offset: int | None
    """None: the log is away."""
    lag: int | None
    staleness_ms: int | None
    committed_at_ms: int


class _Heads(NamedTuple):
    """What the stores say of themselves and of one view, each partition at one moment."""

    positions: dict[int, Position]
    definitions: dict[int, Definition]


class ViewReader:
    """Answers from the stores that `stores` returns, by partition. Safe from any thread.

    `stores` raises `NotReady` while they are being restored. A store may be taken away, and come back, as another object;
    `stores` must say so before it is touched: it is asked again after each look at them. `ends` says where the topic of
    deltas ends.
    """

    def __init__(
        self,
        *,
        stores: Callable[[], Mapping[int, ReadableStore]],
        ends: Callable[[], Seen],
        clock: Clock,
        settings: QuerySettings,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self.clock = clock
        self._stores = stores
        self._ends = ends
        self._settings = settings
        self._metrics = metrics
        self._end_offsets: dict[int, EndOffsets] = {}
        self._seen: Seen | None = None
        self._definitions: dict[str, Definition] = {}
        self._closed = False

    def close(self) -> None:
        """End the reads that are under way: they raise `Unavailable`."""
        self._closed = True

    # Answers

    def definition(self, view: str) -> Definition:
        """What the view is; `NotFound` if nobody has published it. Quick once it is known."""
        known = self._definitions.get(view)
        if known is None:
            key = definition_key(view)
            heads = _Heads({}, {})
            stores = self._stores()
            for number, store in stores.items():
                _add_head(heads, number, *store.get([POSITION_KEY, key]))
            self._check_unchanged(stores)
            known = self._agreed(view, heads)
        return known

    def point(self, query: Query) -> Answer | None:
        """The answer, if `where` pins every label, so that it is in one key of each partition; None: `read` it."""
        definition = self.definition(query.view)
        labels = pinned_labels(definition, query.where)
        if labels is None:
            return None
        kind = KINDS[definition.kind]
        # All labels pinned, by as many conditions: those are equalities, one for each, and nothing is left to test.
        exact = len(query.where) == len(labels)
        tests = [] if exact else self._tests(definition, query, _unlimited)
        group = group_key(definition, query.by)
        stores = self._stores()
        seen = self._note_ends()
        keys = [POSITION_KEY, definition_key(query.view), series_prefix(query.view) + series_suffix(labels)]
        heads = _Heads({}, {})
        values = []
        for number, store in stores.items():
            position, entry, value = store.get(keys)
            _add_head(heads, number, position, entry)
            if value is not None:
                values.append(value)
        self._check_unchanged(stores)
        if self._agreed(query.view, heads) != definition:  # a store made anew, and in it another view of this name
            return None
        groups: dict[Labels, Any] = {}
        if values and all(test([labels[index]])[0] for index, test in tests):
            fold(kind, groups, group([labels] * len(values)), _decode_states(kind, values))
        choice = Choice(kind, top=query.top, limit=query.limit)
        choice.offer(groups)
        return self._answer(query, definition, choice.selected(), heads, seen)

    def read(self, query: Query, *, deadline_s: float) -> Answer:
        """The answer, whatever it takes; `Unavailable` if that is not done by `deadline_s` on the monotonic clock."""
        answer = self.point(query)
        return self._scan(query, deadline_s) if answer is None else answer

    def _scan(self, query: Query, deadline_s: float) -> Answer:
        stores = self._stores()
        seen = self._note_ends()
        snapshots = {number: store.snapshot() for number, store in stores.items()}
        self._check_unchanged(stores)
        key = definition_key(query.view)
        heads = _Heads({}, {})
        for number, snapshot in snapshots.items():
            _add_head(heads, number, *snapshot.get([POSITION_KEY, key]))
        definition = self._agreed(query.view, heads)
        check = partial(self._check, query.view, deadline_s)
        selected = self._select(query, definition, [*snapshots.values()], check)
        return self._answer(query, definition, selected, heads, seen)

    def _select(
        self, query: Query, definition: Definition, snapshots: Sequence[StoreView], check: Callable[[], None]
    ) -> Selected:
        kind = KINDS[definition.kind]
        group = group_key(definition, query.by)
        tests = self._tests(definition, query, check)
        prefix = series_prefix(query.view)
        skip, width = len(prefix) + len(WINDOW_NONE), len(definition.labels)
        scans = [snapshot.scan(prefix, prefix_end(prefix)) for snapshot in snapshots]
        complete = is_complete(definition, query.by)
        choice = Choice(kind, top=query.top, limit=query.limit)
        groups: dict[Labels, Any] = {}
        for keys, values in (in_step if complete else in_turn)(scans, _BLOCK):
            check()
            rows = _decode_labels(keys, skip, width)
            for index, test in tests:
                fits = test([row[index] for row in rows])
                rows, values = [*compress(rows, fits)], [*compress(values, fits)]
            fold(kind, groups, group(rows), _decode_states(kind, values))
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

    def _agreed(self, view: str, heads: _Heads) -> Definition:
        try:
            definition = agree(view, heads.definitions)
        except Invalid:
            self._definitions.pop(view, None)
            raise
        if self._definitions.get(view) != definition:
            if len(self._definitions) >= _DEFINITIONS_MAX:
                self._definitions.clear()
            self._definitions[view] = definition
        return definition

    def _check(self, view: str, deadline_s: float, advice: str = "narrow `where`, or give it more time") -> None:
        if self._closed:
            raise Unavailable("the server is stopping")
        if self.clock.monotonic_s() > deadline_s:
            raise Unavailable(f"view {view}: not read within timeout_ms; {advice}")

    def _answer(self, query: Query, definition: Definition, selected: Selected, heads: _Heads, seen: Seen) -> Answer:
        names = definition.labels if query.by is None else query.by
        rows = zip(selected.labels, selected.values, strict=True)
        series = [Series(dict(zip(names, labels, strict=True)), value) for labels, value in rows]
        cut = selected.series_total > len(series)
        return Answer(
            view=query.view,
            kind=definition.kind,
            by=query.by,
            series=series,
            as_of=self._as_of(heads.positions, seen),
            truncated=cut,
            series_total=selected.series_total if cut else None,
        )

    def views(self) -> Views:
        """All views, by name."""
        stores = self._stores()
        seen = self._note_ends()
        snapshots = {number: store.snapshot() for number, store in stores.items()}
        self._check_unchanged(stores)
        heads = _Heads({}, {})
        counts: dict[Definition, int] = {}
        for number, snapshot in snapshots.items():
            _add_head(heads, number, snapshot.get([POSITION_KEY])[0], None)
            for _, value in snapshot.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION)):
                entry = _trust(number, codec.decode_view, value)
                counts[entry.definition] = counts.get(entry.definition, 0) + entry.series_count
        views = [View(d.view, d.kind, d.labels, d.window_s or None, count, d.monotone) for d, count in counts.items()]
        return Views(sorted(views, key=lambda view: (view.name, view.kind)), self._as_of(heads.positions, seen))

    def scrape(self, views: Collection[str] = (), *, deadline_s: float) -> Exposition:
        """All views, or these, each whole or not at all, at one moment of each store.

        In all at most `openmetrics_series_max` series, in the order of names. A view that can't be shown is named as
        omitted. `NotFound` for an unknown view, `Unavailable` if it is not done by `deadline_s`.
        """
        stores = self._stores()
        seen = self._note_ends()
        snapshots = {number: store.snapshot() for number, store in stores.items()}
        self._check_unchanged(stores)
        heads = _Heads({}, {})
        found: dict[str, list[codec.ViewEntry]] = {}
        broken: dict[str, str] = {}
        for number, snapshot in snapshots.items():
            _add_head(heads, number, snapshot.get([POSITION_KEY])[0], None)
            for key, value in snapshot.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION)):
                view = key[len(TAG_DEFINITION) :].decode(errors="replace")
                if views and view not in views:
                    continue
                try:
                    found.setdefault(view, []).append(_decode_view(value))
                except BadRecord as error:
                    broken[view] = _unreadable(view, error)
        if unknown := set(views) - found.keys():
            raise NotFound(f"no view {min(unknown)[:100]!r}")
        chosen, omitted = choose({v: {it.definition for it in entries} for v, entries in found.items() if v not in broken})
        omitted |= broken
        exposed: list[Exposed] = []
        left = self._settings.openmetrics_series_max
        for definition in chosen:
            view = definition.view
            check = partial(self._check, view, deadline_s, "ask for fewer views")
            if max(entry.series_count for entry in found[view]) > left:  # not even looked at: so reading is bounded, too
                omitted[view] = SERIES_MAX
                continue
            try:
                selected = self._select(Query(view, limit=left or 1), definition, [*snapshots.values()], check)
            except StoreCorrupt as error:
                omitted[view] = _unreadable(view, error)
                continue
            if selected.series_total > left:
                omitted[view] = SERIES_MAX
                continue
            left -= selected.series_total
            exposed.append(Exposed(definition, selected.labels, selected.values))
        return Exposition(exposed, dict(sorted(omitted.items())), self._as_of(heads.positions, seen).staleness_ms)

    # Positions and staleness

    def partitions(self) -> list[PartitionState]:
        """How far each partition is now; sets the gauges of lag and staleness."""
        try:
            stores = self._stores()
        except NotReady:
            for number in self._end_offsets:
                self._metrics.set(m.STALENESS, inf, number)
            raise
        seen = self._note_ends()
        for number in seen.end_offsets.keys() - stores.keys():  # so new that there is no store of it
            self._metrics.set(m.STALENESS, inf, number)
        positions = {n: _trust(n, _position, store.get([POSITION_KEY])[0]) for n, store in stores.items()}
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
            states.append(PartitionState(number, next_offset, end_offset, lag, staleness_ms, position.committed_at_ms))
        return states

    def _check_unchanged(self, stores: Mapping[int, ReadableStore]) -> None:
        """After a look at stores: raise `NotReady` if one of them was taken away meanwhile."""
        now = self._stores()
        if any(now.get(number) is not store for number, store in stores.items()):
            raise NotReady("a store was made anew during the read; ask again")

    def _note_ends(self) -> Seen:
        seen = self._ends()
        if seen is not self._seen:
            for number, end_offset in seen.end_offsets.items():
                known = self._end_offsets.get(number)
                if known is None:
                    known = self._end_offsets.setdefault(number, EndOffsets())
                known.observe(seen.at_s, end_offset)
            self._seen = seen
        return seen

    def _staleness_ms(self, number: int, position: Position, seen: Seen, now_s: float, now_ms: int) -> int | None:
        reached_s: float | None = None
        if _caught_up(number, position, seen):
            reached_s = seen.at_s
        elif number in self._end_offsets:
            reached_s = self._end_offsets[number].reached_s(_reached(position, seen))
        return bound_ms(position, reached_s, now_s=now_s, now_ms=now_ms)

    def _as_of(self, positions: Mapping[int, Position], seen: Seen) -> AsOf:
        now_s, now_ms = self.clock.monotonic_s(), self.clock.now_ms()
        staleness_ms: int | None = seen_ms(seen.at_s, now_s)
        for number in positions.keys() | seen.end_offsets.keys():
            position = positions.get(number, NO_POSITION)  # a partition so new that there is no store of it
            if not _caught_up(number, position, seen):
                bound = self._staleness_ms(number, position, seen, now_s, now_ms)
                staleness_ms = None if bound is None or staleness_ms is None else max(staleness_ms, bound)
        return AsOf(staleness_ms, {str(number): _reached(position, seen) for number, position in positions.items()})


def _caught_up(number: int, position: Position, seen: Seen) -> bool:
    return number in seen.end_offsets and seen.end_offsets[number] <= _reached(position, seen)


def _reached(position: Position, seen: Seen) -> int:
    """Up to where the topic that is there now is folded: if the position is of one that is gone, nothing of it is."""
    foreign = position.source_id and seen.source_id and position.source_id != seen.source_id
    return 0 if foreign else position.next_offset


def _unreadable(view: str, error: Exception) -> str:
    _log.error("view %s is left out of a scrape: %s", view, error)
    return UNREADABLE


def _unlimited() -> None:
    """A point read matches few values."""


def _trust(number: int | None, decode: Callable[..., T], *arguments: Any) -> T:
    """Decode what a store holds: it was checked before it was written."""
    try:
        return decode(*arguments)
    except BadRecord as error:
        raise StoreCorrupt(f"partition {number}: {error}" if number is not None else str(error)) from None


_decode_labels = partial(_trust, None, decode_labels)
_decode_states = partial(_trust, None, codec.decode_states)


def _position(value: bytes | None) -> Position:
    return NO_POSITION if value is None else _decode_position(value)


def _add_head(heads: _Heads, number: int, position: bytes | None, definition: bytes | None) -> None:
    try:
        heads.positions[number] = NO_POSITION if position is None else _decode_position(position)
        if definition is not None:
            heads.definitions[number] = _decode_view(definition).definition
    except BadRecord as error:
        raise StoreCorrupt(f"partition {number}: {error}") from None
