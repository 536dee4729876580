"""From merged deltas to sealed batches: route, cut to size, number, encode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from zlib import crc32

from pipeline.core.codec import GROUP_COUNT_MAX, encode_batch
from pipeline.core.merge import KINDS, State
from pipeline.core.record import Batch, Definition, Group, series_prefix
from pipeline.core.sequence import Outbox, Sealed

BATCH_BYTES = 256
"""What a batch takes without its series, at most."""
GROUP_BYTES = 64
"""What a view takes in a batch beyond its names, at most."""
ENTRY_BYTES = 32
"""What a series takes in a batch beyond its suffix and `value_bytes`, at most."""
LONG_VALUE = 32
"""Bytes of a text or int that is charged by its length."""


class Merged(NamedTuple):
    """Merged deltas of one series, `delta_count` of them; `crc` is the CRC-32 of the series' key, which routes it."""

    definition: Definition
    suffix: bytes
    crc: int
    state: State
    delta_count: int = 1


class Run:
    """Merged deltas of series of one view, column by column: so that a hundred thousand of them are five objects.

    (Tuples would be as many more for the garbage collector to look through, with the interpreter's lock held.)
    """

    __slots__ = ("counts", "crcs", "definition", "states", "suffixes")

    def __init__(self, definition: Definition) -> None:
        self.definition = definition
        self.suffixes: list[bytes] = []
        self.crcs: list[int] = []
        self.states: list[State] = []
        self.counts: list[int] = []
        """How many deltas each state has."""

    def __len__(self) -> int:
        return len(self.suffixes)

    def add(self, suffix: bytes, crc: int, state: State, delta_count: int) -> None:
        """Add a series."""
        self.suffixes.append(suffix)
        self.crcs.append(crc)
        self.states.append(state)
        self.counts.append(delta_count)

    def pop(self) -> None:
        """Take the last one out again."""
        for column in (self.suffixes, self.crcs, self.states, self.counts):
            del column[-1]

    def even(self, most: int | None = None) -> None:
        """Take out what was added in part only, because memory ran out in the midst, and what is beyond `most` series."""
        columns: tuple[list[Any], ...] = (self.suffixes, self.crcs, self.states, self.counts)
        count = min([*map(len, columns), len(self) if most is None else most])
        for column in columns:
            del column[count:]

    def merged(self) -> Iterator[Merged]:
        """Series by series."""
        for row in zip(self.suffixes, self.crcs, self.states, self.counts, strict=True):
            yield Merged(self.definition, *row)


def runs_of(merged: Iterable[Merged]) -> list[Run]:
    """Merged deltas as runs, in their order."""
    runs: list[Run] = []
    for definition, suffix, crc, state, delta_count in merged:
        if not runs or runs[-1].definition != definition:
            runs.append(Run(definition))
        runs[-1].add(suffix, crc, state, delta_count)
    return runs


class Refused(NamedTuple):
    """Series that could not be encoded, and why."""

    runs: list[Run]
    error: Exception


class _Draft:
    """A batch of one partition that still grows. `suffixes` and `states` are the columns of the view that it is at."""

    __slots__ = ("bytes_total", "definition", "partition", "states", "suffixes", "views")

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.bytes_total = BATCH_BYTES
        self.views: dict[str, tuple[Definition, list[bytes], list[State]]] = {}
        self.definition: Definition | None = None
        self.suffixes: list[bytes] = []
        self.states: list[State] = []

    def turn_to(self, definition: Definition, size: int, bytes_max: int) -> bool:
        """Go on with this view, if there is room for it with a series of `size` bytes, or for nothing."""
        known = self.views.get(definition.view)
        if known is None:
            more = GROUP_BYTES + len(definition.view) + sum([3 + len(label) for label in definition.labels])
            full = self.bytes_total + more + size > bytes_max or len(self.views) == GROUP_COUNT_MAX
            if full and self.views:
                return False
            self.bytes_total += more
            known = self.views[definition.view] = definition, [], []
        elif self.bytes_total + size > bytes_max:
            return False
        self.definition, self.suffixes, self.states = known
        return True

    def groups(self) -> list[Group]:
        """By view, each series once."""
        groups = []
        for definition, suffixes, states in self.views.values():
            if len(set(suffixes)) == len(suffixes):
                groups.append(Group(definition, suffixes, states))
                continue
            merge = KINDS[definition.kind].merge
            once: dict[bytes, State] = {}
            for suffix, state in zip(suffixes, states, strict=True):
                old = once.get(suffix)
                once[suffix] = state if old is None else merge(old, state)
            groups.append(Group(definition, [*once], [*once.values()]))
        return groups

    def runs(self) -> list[Run]:
        """What it was made from, but for how many deltas that was."""
        runs = []
        for definition, suffixes, states in self.views.values():
            run, prefix = Run(definition), series_prefix(definition.view)
            for suffix, state in zip(suffixes, states, strict=True):
                run.add(suffix, crc32(prefix + suffix), state, 1)
            runs.append(run)
        return runs


def value_bytes(value: Any) -> int:
    """What a raw delta or state takes in a batch beyond `ENTRY_BYTES`, at most: more than 0 for texts and ints."""
    kind = type(value)
    size = 0
    if kind is int:
        size = (value.bit_length() + 7) // 8
    elif kind is str:
        size = len(value) if value.isascii() else 4 * len(value)
    elif kind is tuple:
        size = sum([value_bytes(part) for part in value])
    return size


def long_bytes(value: Any) -> int:
    """`value_bytes`, if they are more than any number or short text has; else 0."""
    size = value_bytes(value)
    return size if size > LONG_VALUE else 0


def seal(
    merged: Iterable[Merged],
    outbox: Outbox,
    *,
    partition_count: int,
    batch_bytes_max: int,
    now_ms: int,
) -> list[Sealed]:
    """As `seal_runs`, of single series, all or nothing."""
    return seal_runs(
        runs_of(merged), outbox, partition_count=partition_count, batch_bytes_max=batch_bytes_max, now_ms=now_ms
    )


def seal_runs(
    runs: Iterable[Run],
    outbox: Outbox,
    *,
    partition_count: int,
    batch_bytes_max: int,
    now_ms: int,
    refused: list[Refused] | None = None,
) -> list[Sealed]:
    """Put merged deltas into batches of at most `batch_bytes_max`, numbered by `outbox`, which keeps them.

    A series that is larger by itself gets a batch by itself. A batch that can't be encoded goes into `refused`, and the
    others are sealed all the same; without `refused`, and when something else fails, nothing is sealed, and it raises.
    """
    out: list[Sealed] = []
    for draft in _drafts(runs, partition_count, batch_bytes_max):
        try:
            out.append(_seal_draft(outbox, draft, now_ms))
        except Exception as error:
            try:
                if refused is None:
                    raise
                refused.append(Refused(draft.runs(), error))
            except BaseException:
                for sealed in out:
                    outbox.acknowledge(sealed.partition, sealed.sequence)
                raise
    return out


def _drafts(runs: Iterable[Run], partition_count: int, bytes_max: int) -> list[_Draft]:
    drafts: list[_Draft] = []
    growing: dict[int, _Draft] = {}
    for run in runs:
        definition = run.definition
        for suffix, crc, state in zip(run.suffixes, run.crcs, run.states, strict=True):
            partition = crc % partition_count
            size = ENTRY_BYTES + len(suffix)
            if type(state) is not float:
                size += value_bytes(state)
            draft = growing.get(partition)
            if draft is None or (
                (draft.definition is not definition or draft.bytes_total + size > bytes_max)
                and not draft.turn_to(definition, size, bytes_max)
            ):
                draft = growing[partition] = _Draft(partition)
                drafts.append(draft)
                draft.turn_to(definition, size, bytes_max)
            draft.suffixes.append(suffix)
            draft.states.append(state)
            draft.bytes_total += size
    return drafts


def _seal_draft(outbox: Outbox, draft: _Draft, now_ms: int) -> Sealed:
    sequence, floor = outbox.next_numbers(draft.partition)
    groups = draft.groups()
    batch = Batch(
        producer_id=outbox.producer_id,
        epoch=outbox.epoch,
        partition=draft.partition,
        sequence=sequence,
        floor=floor,
        created_at_ms=now_ms,
        groups=groups,
    )
    sealed = Sealed(draft.partition, sequence, encode_batch(batch), sum([len(group.suffixes) for group in groups]))
    outbox.add(sealed)
    return sealed
