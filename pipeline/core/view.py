"""Reading a view: which series match, what they merge to, which of them make the answer.

A series may live in several partitions, so an answer is a fold over all of them with the same `merge` that buffers and
overlays use: the order of partitions and of entries does not matter. Rows travel column by column: `labels[i]` are the
label values, in the definition's order, of the series whose state is `states[i]`.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any

import msgspec

from pipeline.core.merge import Kind, State
from pipeline.core.record import Definition
from pipeline.errors import BadRecord, Invalid, NotFound

Labels = tuple[str, ...]
Entry = tuple[bytes, bytes]
"""A key and its value, as a store scans them."""

_MATCHER = re.compile(r"([a-zA-Z_][a-zA-Z0-9_]*)(=~|!~|!=|=)(.*)", re.DOTALL)
_decode_rows = msgspec.msgpack.Decoder(list[Labels]).decode


class Matcher(msgspec.Struct, frozen=True):
    """A condition on one label's value, as in Prometheus: `=`, `!=`, or a regular expression `=~`, `!~`."""

    label: str
    op: str
    pattern: str


class Query(msgspec.Struct, frozen=True):
    """What to read of a view."""

    view: str
    where: tuple[Matcher, ...] = ()
    """All must match."""
    by: Labels | None = None
    """Labels to keep; series that agree in them merge. Empty: one total. None: each series by itself."""
    top: int | None = None
    """Only so many, those with the largest answers, largest first. None: all, in the order of their labels."""
    limit: int = 10_000
    """Most series in the answer."""


class Selected(msgspec.Struct, frozen=True):
    """The rows of an answer, and how many there were before `top` and `limit` cut."""

    labels: list[Labels]
    values: list[Any]
    series_total: int


def parse_matcher(text: str) -> Matcher:
    """`region=eu`, `region!=eu`, `region=~e.*` or `region!~e.*`; `Invalid` for anything else."""
    match = _MATCHER.fullmatch(text)
    if match is None:
        raise Invalid(f"where: {text[:100]!r} is not label=value, label!=value, label=~regex or label!~regex")
    return Matcher(match[1], match[2], match[3])


def describe(definition: Definition) -> str:
    """A definition in short, for messages: `sum(region, product)`, `monotone sum(region)`."""
    return f"{'monotone ' * definition.monotone}{definition.kind}({', '.join(definition.labels)})"


def agree(view: str, definitions: Mapping[int, Definition]) -> Definition:
    """The one definition of `view` among those of partitions. `NotFound` if there is none, `Invalid` if they differ."""
    found = [*definitions.values()]
    if not found:
        raise NotFound(f"no view {view[:100]!r}")
    if found.count(found[0]) < len(found):
        where: dict[Definition, int] = {}
        for partition, definition in sorted(definitions.items()):
            where.setdefault(definition, partition)
        said = " but ".join(f"{describe(d)} in partition {p}" for d, p in where.items())
        raise Invalid(f"view {view} is {said}: it was published with different definitions and cannot be merged")
    return found[0]


def label_index(definition: Definition, label: str) -> int:
    """Where `label` stands in the view's label values; `Invalid`, naming the view's labels, if it has no such label."""
    try:
        return definition.labels.index(label)
    except ValueError:
        raise Invalid(
            f"view {definition.view} has no label {label[:100]!r}; its labels: {', '.join(definition.labels) or 'none'}"
        ) from None


def pinned_labels(definition: Definition, where: Sequence[Matcher]) -> Labels | None:
    """The label values of the only series that can match, if `where` has an equality for every label of the view."""
    pinned = {matcher.label: matcher.pattern for matcher in where if matcher.op == "="}
    try:
        return tuple(pinned[label] for label in definition.labels)
    except KeyError:
        return None


def is_complete(definition: Definition, by: Sequence[str] | None) -> bool:
    """Whether each group is one series, because every label is kept."""
    return by is None or set(by) >= set(definition.labels)


def group_key(definition: Definition, by: Sequence[str] | None) -> Callable[[Sequence[Labels]], Sequence[Labels]]:
    """A function from rows of label values to the label values of their groups."""
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


def fold(kind: Kind, groups: dict[Labels, State], keys: Sequence[Labels], states: Sequence[State]) -> None:
    """Merge `states[i]` into `groups[keys[i]]`."""
    merge, get = kind.merge, groups.get
    for key, state in zip(keys, states, strict=True):
        old = get(key)
        groups[key] = state if old is None else merge(old, state)


def decode_labels(keys: Sequence[bytes], skip: int, width: int) -> list[Labels]:
    """The `width` label values of each key, which begin behind `skip` bytes; `BadRecord` if these are not label values.

    One call decodes all, so bytes that are missing in one key and left over in another can make up for each other: the
    keys must have been checked when they were folded, as those of a store were.
    """
    try:
        rows = _decode_rows(b"\xdd" + len(keys).to_bytes(4, "big") + b"".join([key[skip:] for key in keys]))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRecord(f"series key: {error}") from None
    if not {width}.issuperset(map(len, rows)):
        raise BadRecord(f"series key: not {width} label values")
    return rows


def in_turn(scans: Sequence[Iterator[Entry]], size: int) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """The entries of all scans, as columns of at most `size`."""
    for scan in scans:
        while block := list(islice(scan, size)):
            yield [key for key, _ in block], [value for _, value in block]


def in_step(scans: Sequence[Iterator[Entry]], size: int) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """The entries of all scans, as columns, so that no key stands in two blocks; each scan is sorted by key.

    So a block's series are complete, whichever partitions they live in, and need not be held until the end.
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


class Choice:
    """Keeps what `top` and `limit` select from groups that are offered once each; holds little more than those."""

    def __init__(self, kind: Kind, *, top: int | None, limit: int) -> None:
        self._kind = kind
        self._top = top
        self._most = limit if top is None else min(top, limit)
        self._rows: list[tuple[Any, State]] = []
        self._bound: Any = None
        """What ranks behind it has lost."""
        self._total = 0

    def offer(self, groups: Mapping[Labels, State]) -> None:
        """Take part; `Invalid` if `top` was asked for and an answer is no number."""
        self._total += len(groups)
        rows: Any = groups.items()
        if self._top is not None:
            rows = zip(map(self._rank, groups, groups.values()), groups.values(), strict=True)
        if self._bound is not None:
            rows = [row for row in rows if row[0] < self._bound]
        self._rows += rows
        if len(self._rows) > self._most + max(self._most // 4, 4_096):
            self._cut()

    def _rank(self, labels: Labels, state: State) -> tuple[bool, int | float, Labels]:
        value = self._kind.answer(state)
        if value is None:  # a sum or mean beyond the range of floats, or `last` of nothing: behind all numbers
            return True, 0, labels
        if type(value) is not int and type(value) is not float:
            raise Invalid(f"top needs answers that are numbers; {list(labels)} has a {type(value).__name__}")
        return False, -value, labels

    def _cut(self) -> None:
        self._rows.sort(key=itemgetter(0))
        del self._rows[self._most :]
        if len(self._rows) == self._most:
            self._bound = self._rows[-1][0]

    def selected(self) -> Selected:
        """The rows chosen from all that was offered, in their order."""
        self._cut()
        ranks = [rank for rank, _ in self._rows]
        labels = ranks if self._top is None else [rank[-1] for rank in ranks]
        return Selected(labels, [self._kind.answer(state) for _, state in self._rows], self._total)
