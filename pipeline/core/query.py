"""Queries of views: which series match, what they merge to, which of them make the answer; and orders about views.

A series may live in several partitions, so an answer is a fold over all of them with the same `merge` that buffers and
overlays use: the order of partitions and of entries does not matter. Rows travel column by column: `labels[i]` are the
label values, in the definition's order, of the series whose state is `states[i]`.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, TypeVar

import msgspec

from pipeline.core.codec import DefinitionEntry
from pipeline.core.grants import Bounds
from pipeline.core.kinds import KIND_NAMES, Kind, State
from pipeline.core.record import CONTROL_ACTIONS, NAME, NAME_BYTES_MAX, Control, Definition
from pipeline.core.span import NO_RANGE, AskedRange
from pipeline.errors import BadRecord, Invalid, NotFound

Labels = tuple[str, ...]
Entry = tuple[bytes, bytes]
"""Key and value of an entry."""

K = TypeVar("K")
R = TypeVar("R")
_MATCHER = re.compile(r"([a-zA-Z_][a-zA-Z0-9_]*)(=~|!~|!=|=)(.*)", re.DOTALL)
_decode_rows = msgspec.msgpack.Decoder(list[Labels]).decode


class Matcher(msgspec.Struct, frozen=True):
    """A condition on one label's value, as in Prometheus: `=`, `!=`, or a regular expression `=~`, `!~`."""

    label: str
    op: str
    pattern: str


class Query(msgspec.Struct, frozen=True):
    """A read of a view."""

    view: str
    where: tuple[Matcher, ...] = ()
    """Matchers, all of which a series must satisfy."""
    by: Labels | None = None
    """Labels to keep; series that agree in them merge. Empty: one total. None: each series by itself."""
    top: int | None = None
    """Number of series to return, those with the largest answers first; None: all, in the order of their labels. Histograms
    are ordered by the first of `quantiles`, or without any by their counts."""
    limit: int = 10_000
    """Upper limit of the series in the answer."""
    kind: str | None = None
    """Kind to read, if a view has definitions of several; None: the kind that was defined first."""
    window_s: int | None = None
    """Length of windows to read, likewise; 0: no windows."""
    range: AskedRange = NO_RANGE
    """AskedRange of a view with windows."""
    fn: str | None = None
    """Function of points, one of `core.derive.FUNCTIONS`."""
    quantiles: tuple[float, ...] = ()
    """Quantiles of a histogram, checked by `check_quantiles`; empty: those of every answer."""
    bottom: int | None = None
    """Number of series to return, those with the smallest answers first."""
    bounds: Bounds | None = None
    """Bounds of the access token: other definitions are not seen. The matchers of its labels are in `where`, too."""

    def within(self, bounds: Bounds | None) -> Query:
        """Return the query as a token with these bounds may ask it."""
        if bounds is None:
            return self
        where = (*self.where, *(Matcher(label, "=", value) for label, value in bounds.labels))
        return msgspec.structs.replace(self, where=where, bounds=bounds)


class Alternative(msgspec.Struct, frozen=True):
    """Another kind and window that a view has, beside those of the answer."""

    kind: str
    window_s: int
    """Length of a window; 0: no windows."""


class MergedDefinition(msgspec.Struct, frozen=True):
    """All definitions of a view that have one kind and window, which a read merges."""

    definition: Definition
    """Definition with the labels of all parts, which is monotone if each part is."""
    parts: tuple[Definition, ...]
    also: tuple[Alternative, ...] = ()
    """Other kinds and windows of the view."""
    defined_at_ms: int = 0
    """Time at which the log accepted the first batch of any of these."""


class Listed(msgspec.Struct, frozen=True):
    """A definition of a view, in all partitions together."""

    definition: Definition
    series_count: int
    """Number of series; one that is in two partitions counts twice."""
    defined_at_ms: int
    """Time at which the log accepted the definition's first batch."""
    answers: bool
    """True if a read that chooses no kind and no window merges this definition."""
    series_count_max: int = 0
    """Largest number of its series in one partition."""


class Selected(msgspec.Struct, frozen=True):
    """Rows of an answer, and how many there were before `top`, `bottom` and `limit` were applied."""

    labels: list[Labels]
    values: list[Any]
    series_total: int


def parse_matcher(text: str) -> Matcher:
    """Parse `region=eu`, `region!=eu`, `region=~e.*` or `region!~e.*`. Raises `Invalid` for anything else."""
    match = _MATCHER.fullmatch(text)
    if match is None:
        raise Invalid(f"where: {text[:100]!r} is not label=value, label!=value, label=~regex or label!~regex")
    return Matcher(match[1], match[2], match[3])


def describe(definition: Definition) -> str:
    """Return a definition in short, for messages: `monotone sum(region) in windows of 60 s, kept for 3600 s`."""
    window = f" in windows of {definition.window_s} s" if definition.window_s else ""
    kept = f", kept for {definition.retention_s} s" if definition.retention_s else ""
    return f"{'monotone ' * definition.monotone}{definition.kind}({', '.join(definition.labels)}){window}{kept}"


def seen_within(bounds: Bounds | None, entries: Iterable[DefinitionEntry]) -> Iterable[DefinitionEntry]:
    """Return the definition entries that a token with these bounds may see."""
    return entries if bounds is None else [it for it in entries if bounds.has(it.definition)]


def merged(
    view: str,
    entries: Iterable[DefinitionEntry],
    *,
    kind: str | None = None,
    window_s: int | None = None,
    bounds: Bounds | None = None,
) -> MergedDefinition:
    """Return the definitions that a read of `view` merges, given the definition entries of all partitions.

    Without `kind` and `window_s` they are those of the kind and window that were defined first, so that nobody can disturb a
    view that exists. Definitions outside the `bounds` are as if they were not there. Raises `NotFound` if there is no such
    view, or none of the kind and window that were asked for.
    """
    entries = seen_within(bounds, entries)
    first: dict[tuple[str, int], tuple[int, tuple[str, int]]] = {}
    parts: dict[tuple[str, int], set[Definition]] = {}
    for entry in entries:
        shape = entry.definition.kind, entry.definition.window_s
        first[shape] = min(first.get(shape, (entry.defined_at_ms, shape)), (entry.defined_at_ms, shape))
        parts.setdefault(shape, set()).add(entry.definition)
    if not parts:
        raise NotFound(f"no view {view[:100]!r}")
    fitting = [shape for shape in parts if kind in (None, shape[0]) and window_s in (None, shape[1])]
    if not fitting:
        known = ", ".join(f"{name}{f' in windows of {length} s' if length else ''}" for name, length in sorted(parts))
        raise NotFound(f"view {view} has no definition of this kind and window; it is {known}")
    chosen = min(fitting, key=lambda shape: first[shape])
    also = tuple(Alternative(*shape) for shape in sorted(parts) if shape != chosen)
    return merge_definitions(parts[chosen], also, first[chosen][0])


def merge_definitions(
    parts: Iterable[Definition], also: tuple[Alternative, ...] = (), defined_at_ms: int = 0
) -> MergedDefinition:
    """Return definitions of one view, kind and window as one."""
    found = sorted(parts, key=lambda it: (it.labels, it.monotone, it.retention_s, it.parameters))
    labels = tuple(sorted({label for it in found for label in it.labels}))
    first = found[0]
    together = Definition(first.view, first.kind, labels, first.window_s, all(it.monotone for it in found))
    return MergedDefinition(together, tuple(found), also, defined_at_ms)


def listed(entries: Iterable[DefinitionEntry], bounds: Bounds | None = None) -> list[Listed]:
    """Return all definitions of all partitions within bounds, by view; those that answer for a view come first."""
    entries = seen_within(bounds, entries)
    counts: dict[Definition, int] = {}
    most: dict[Definition, int] = {}
    since: dict[Definition, int] = {}
    views: dict[str, list[DefinitionEntry]] = {}
    for entry in entries:
        definition = entry.definition
        counts[definition] = counts.get(definition, 0) + entry.series_count
        most[definition] = max(most.get(definition, 0), entry.series_count)
        since[definition] = min(since.get(definition, entry.defined_at_ms), entry.defined_at_ms)
        views.setdefault(definition.view, []).append(entry)
    answering = {it for view, its in views.items() for it in merged(view, its).parts}
    found = [Listed(it, count, since[it], it in answering, most[it]) for it, count in counts.items()]
    return sorted(
        found,
        key=lambda it: (
            it.definition.view,
            not it.answers,
            it.definition.kind,
            it.definition.window_s,
            it.definition.labels,
        ),
    )


def widen(merged: MergedDefinition, part: Definition) -> Callable[[list[Labels]], list[Labels]]:
    """Return a function from label values of one part to label values of the merged definition; missing labels are empty."""
    if part.labels == merged.definition.labels:
        return lambda rows: rows
    place = [part.labels.index(label) if label in part.labels else len(part.labels) for label in merged.definition.labels]
    return lambda rows: [tuple([padded[i] for i in place]) for row in rows for padded in [(*row, "")]]


def narrow(merged: MergedDefinition, part: Definition, labels: Labels) -> Labels | None:
    """Return the label values, in one part, of the series with `labels` in the merged definition; None: there is none."""
    if part.labels == merged.definition.labels:
        return labels
    named = dict(zip(merged.definition.labels, labels, strict=True))
    own = tuple([named.pop(label) for label in part.labels])
    return None if any(named.values()) else own


def label_index(definition: Definition, label: str) -> int:
    """Return the index of `label` in label values. Raises `Invalid`, naming the view's labels, for any other name."""
    try:
        return definition.labels.index(label)
    except ValueError:
        raise Invalid(
            f"view {definition.view} has no label {label[:100]!r}; its labels: {', '.join(definition.labels) or 'none'}"
        ) from None


def pinned_labels(definition: Definition, where: Sequence[Matcher]) -> Labels | None:
    """Return the label values of the only series that can match, if `where` has an equality for every label of the view."""
    pinned = {matcher.label: matcher.pattern for matcher in where if matcher.op == "="}
    try:
        return tuple([pinned[label] for label in definition.labels])
    except KeyError:
        return None


def is_complete(definition: Definition, by: Sequence[str] | None) -> bool:
    """Return whether each group is one series, because every label is kept."""
    return by is None or set(by) >= set(definition.labels)


def group_key(definition: Definition, by: Sequence[str] | None) -> Callable[[Sequence[Labels]], Sequence[Labels]]:
    """Return a function from rows of label values to the label values of their groups."""
    if by is None or tuple(by) == definition.labels:
        return lambda rows: rows
    index = [label_index(definition, label) for label in by]
    if not index:
        return lambda rows: [()] * len(rows)
    if len(index) == 1:
        only = index[0]
        return lambda rows: [(row[only],) for row in rows]
    pick = itemgetter(*index)
    return lambda rows: [*map(pick, rows)]


def fold(kind: Kind, groups: dict[K, State], keys: Iterable[K], states: Sequence[State]) -> None:
    """Merge `states[i]` into `groups[keys[i]]`."""
    merge, get = kind.merge, groups.get
    for key, state in zip(keys, states, strict=True):
        old = get(key)
        groups[key] = state if old is None else merge(old, state)


def decode_labels(keys: Sequence[bytes], skip: int, width: int) -> list[Labels]:
    """Return the `width` label values of each key, which begin behind `skip` bytes. Raises `BadRecord` for anything else.

    One call decodes all keys, so bytes that are missing in one and left over in another can make up for each other: call
    this only for keys that were checked when they were folded, as those of a store were.
    """
    try:
        rows = _decode_rows(b"\xdd" + len(keys).to_bytes(4, "big") + b"".join([key[skip:] for key in keys]))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRecord(f"series key: {error}") from None
    if not {width}.issuperset(map(len, rows)):
        raise BadRecord(f"series key: not {width} label values")
    return rows


def chain_blocks(scans: Sequence[Iterator[Entry]], size: int) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """Yield the entries of all scans, as columns of at most `size`."""
    for scan in scans:
        while block := list(islice(scan, size)):
            yield [key for key, _ in block], [value for _, value in block]


def merge_sorted_blocks(scans: Sequence[Iterator[Entry]], size: int) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """Yield the entries of all scans, each of which is sorted by key, as columns, so that no key is in two blocks.

    So the series of a block are complete, whichever partitions have them, and need not be held until the end.
    """
    buffers: list[tuple[list[bytes], list[bytes], Iterator[Entry]]] = [([], [], scan) for scan in scans]
    while buffers:
        ends = []
        for keys, values, scan in buffers:
            more = list(islice(scan, size - len(keys)))
            keys += [key for key, _ in more]
            values += [value for _, value in more]
            if len(keys) == size:  # a scan that yields less has ended, and holds nothing back
                ends.append(keys[-1])
        end = min(ends, default=None)
        out_keys: list[bytes] = []
        out_values: list[bytes] = []
        for keys, values, _ in buffers:
            count = len(keys) if end is None else bisect_right(keys, end)
            out_keys += keys[:count]
            out_values += values[:count]
            del keys[:count], values[:count]
        if out_keys:
            yield out_keys, out_values
        if end is None:
            return


_SLICE = 20_000
"""Rows that one call sorts, makes or frees: the interpreter's lock is held during a call, and others wait for it."""


def sorted_in_slices(rows: Sequence[R], key: Callable[[R], Any]) -> list[R]:
    """Return rows in the order of their keys, as `sorted` does, without a call that takes long.

    Slices are sorted each by itself. Then keys that split them all into parts of about one slice are taken from them at
    regular places, and the parts are sorted, part after part.
    """
    slices = [sorted(rows[i : i + _SLICE], key=key) for i in range(0, len(rows), _SLICE)]
    count = len(slices)
    if count < 2:
        return slices[0] if slices else []
    samples = sorted([key(it[len(it) * i // count]) for it in slices for i in range(count)])
    begins = [0] * count
    found: list[R] = []
    for end in [*samples[count::count], None]:
        part: list[R] = []
        for i, it in enumerate(slices):
            stop = len(it) if end is None else bisect_left(it, end, begins[i], key=key)
            part += it[begins[i] : stop]
            begins[i] = stop
        found += sorted(part, key=key)
    return found


def freed_in_slices(rows: list[R]) -> Iterator[list[R]]:
    """Yield all rows, a slice at a time, and forget each slice with the next: what is freed at once takes long."""
    rows.reverse()
    while rows:
        yield rows[: -_SLICE - 1 : -1]
        del rows[-_SLICE:]


class TopN:
    """Chooses what `top`, `bottom` and `limit` select of groups that are offered once each; holds little more."""

    def __init__(
        self,
        kind: Kind,
        query: Query,
        *,
        answer: Callable[[State], Any] | None = None,
    ) -> None:
        """`answer` is what is selected of a state, in place of its answer. Raises `Invalid` for quantiles of a kind
        that has none.
        """
        self._answer = answer or kind.answerer(query.quantiles)
        self._measure = kind.ranker(query.quantiles)
        self._sign = 1 if query.bottom is not None else -1
        count = query.top if query.bottom is None else query.bottom
        self._ranked = count is not None
        self._most = query.limit if count is None else min(count, query.limit)
        self._rows: list[tuple[Any, State]] = []
        self._bound: Any = None
        """Rank behind which no further group can be selected."""
        self._total = 0

    def offer(self, groups: Mapping[Labels, State]) -> None:
        """Consider groups. Raises `Invalid` if they are ranked and an answer is no number."""
        self._total += len(groups)
        rows: Any = groups.items()
        if self._ranked:
            rows = zip(map(self._rank, groups, groups.values()), groups.values(), strict=True)
        if self._bound is not None:
            rows = [row for row in rows if row[0] < self._bound]
        rest = iter(rows)
        while some := [*islice(rest, _SLICE)]:
            self._rows += some
        if len(self._rows) > self._most + max(self._most // 4, 4_096):
            self._cut()

    def _rank(self, labels: Labels, state: State) -> tuple[bool, int | float, Labels]:
        value = self._measure(state)
        if value is None:  # `last` of nothing: behind all numbers
            return True, 0, labels
        if type(value) is not int and type(value) is not float:
            raise Invalid(f"top and bottom need answers that are numbers; {list(labels)} has a {type(value).__name__}")
        return False, self._sign * value, labels

    def _cut(self) -> None:
        self._rows = sorted_in_slices(self._rows, itemgetter(0))
        while len(self._rows) > self._most:
            del self._rows[max(self._most, len(self._rows) - _SLICE) :]
        if len(self._rows) == self._most:
            self._bound = self._rows[-1][0]

    def selected(self) -> Selected:
        """Return the rows chosen from all groups that were offered, in their order."""
        self._cut()
        labels: list[Labels] = []
        values: list[Any] = []
        for rows in freed_in_slices(self._rows):
            labels += [rank[-1] if self._ranked else rank for rank, _ in rows]
            values += [self._answer(state) for _, state in rows]
        return Selected(labels, values, self._total)


def order(action: str, view: str, kind: str | None, labels: Sequence[str] | None) -> Control:
    """Return the order to `drop` or `reset` those definitions of a view that have this kind and exactly these labels.

    None means any. Raises `Invalid` for an action, view or kind that can't be.
    """
    if action not in CONTROL_ACTIONS:
        raise Invalid(f"unknown action {action:.50}; known: {', '.join(CONTROL_ACTIONS)}")
    if not NAME.match(view) or len(view) > NAME_BYTES_MAX:
        raise Invalid(f"not the name of a view: {view[:NAME_BYTES_MAX]!r}")
    if kind is not None and kind not in KIND_NAMES:
        raise Invalid(f"unknown kind {kind[:50]!r}; known: {', '.join(KIND_NAMES)}")
    return Control(action, view, kind or "", None if labels is None else tuple(sorted(labels)))


def concerned(control: Control, known: Iterable[Listed]) -> list[Listed]:
    """Return the known definitions that an order is about. Raises `NotFound`, naming what there is, if there are none."""
    of_view = [it for it in known if it.definition.view == control.view]
    if not of_view:
        raise NotFound(f"no view {control.view}")
    found = [it for it in of_view if control.concerns(it.definition)]
    if not found:
        there = ", ".join(describe(it.definition) for it in of_view)
        raise NotFound(f"view {control.view} has no definition of this kind and these labels; it has {there}")
    return found


def select_one(kind: Kind, query: Query, groups: Mapping[Labels, State]) -> Selected:
    """Return what `TopN` selects of at most one group, at less cost."""
    if query.top is None and query.bottom is None:
        answer = kind.answerer(query.quantiles)
        return Selected([*groups], [answer(state) for state in groups.values()], len(groups))
    choice = TopN(kind, query)
    choice.offer(groups)
    return choice.selected()
