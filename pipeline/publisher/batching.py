"""Batches made of merged states: by partition, cut to size, numbered, and encoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

import msgspec

from pipeline.core.codec import GROUP_COUNT_MAX, encode_drafted, encode_groups
from pipeline.core.kinds import KINDS, State
from pipeline.core.record import Batch, Definition, Group, series_prefix, travelling
from pipeline.core.sequence import Outbox, Sealed

BATCH_BYTES = 280
"""The most bytes that a batch takes without its groups."""
GROUP_BYTES = 32
"""The most bytes that a group takes in a batch beyond its definition."""
ENTRY_BYTES = 32
"""The most bytes that a series takes in a batch beyond its suffix and `Kind.size` of its state."""
encode = lru_cache(maxsize=10_000)(lambda definition: msgspec.msgpack.encode(travelling(definition)))
"""Return the bytes of a definition in a batch."""


def partition_of(prefix: bytes, suffix: bytes, partition_count: int, spread: int = 1, turn: int = 0) -> int:
    """Return the partition that takes a series this time.

    It is the one that the series' key names (as librdkafka's `consistent` partitioner has it) or, of a view that is spread
    over several, one of those that follow it: with each `turn` the next.
    """
    return (crc32(prefix + suffix) + turn % min(spread, partition_count)) % partition_count


class Routed(NamedTuple):
    """Merged deltas of one series, for a partition. `definition` is the same object for all series of a view."""

    partition: int
    definition: Definition
    suffix: bytes
    state: State
    delta_count: int = 1


class Pending(NamedTuple):
    """Merged deltas of one series that are recorded, and in no batch."""

    definition: Definition
    suffix: bytes
    state: State
    delta_count: int = 1


class Draft(NamedTuple):
    """A batch without a number: states drained for one partition. `codec.encode_drafted` makes a batch of it."""

    partition: int
    groups: bytes
    """The groups as a batch carries them."""
    group_count: int
    series_count: int
    delta_count: int


def cut(merged: Iterable[Routed], bytes_max: int) -> list[Draft]:
    """Return drafts of up to `bytes_max`, by partition. A series that is larger by itself gets a draft of its own."""
    growing: dict[int, list[_GrowingDraft]] = {}
    for item in merged:
        size = ENTRY_BYTES + len(item.suffix) + KINDS[item.definition.kind].size(item.state)
        drafts = growing.setdefault(item.partition, [])
        if not drafts or not drafts[-1].fits(item.definition, size, bytes_max):
            drafts.append(_GrowingDraft())
        drafts[-1].add(item, size)
    return [draft.done(partition) for partition in sorted(growing) for draft in growing[partition]]


class _GrowingDraft:
    def __init__(self) -> None:
        self._size = BATCH_BYTES
        self._groups: dict[int, Group] = {}  # by the id of the definition, which is quicker than its hash
        self._delta_count = 0

    def fits(self, definition: Definition, size: int, bytes_max: int) -> bool:
        """Return whether there is room for one series more."""
        if id(definition) in self._groups:
            return self._size + size <= bytes_max
        size += GROUP_BYTES + len(encode(definition))
        return self._size + size <= bytes_max and len(self._groups) < GROUP_COUNT_MAX

    def add(self, item: Routed, size: int) -> None:
        """Add a series."""
        group = self._groups.get(id(item.definition))
        if group is None:
            self._size += GROUP_BYTES + len(encode(item.definition))
            group = self._groups[id(item.definition)] = Group(item.definition, [], [])
        self._size += size
        group.suffixes.append(item.suffix)
        group.states.append(item.state)
        self._delta_count += item.delta_count

    def done(self, partition: int) -> Draft:
        """Return the draft."""
        groups = [*self._groups.values()]
        series_count = sum([len(group.suffixes) for group in groups])
        return Draft(partition, encode_groups(groups), len(groups), series_count, self._delta_count)


def number(draft: Draft, outbox: Outbox, now_ms: int) -> Sealed:
    """Return a draft as the next batch of a producer; the caller adds it to the outbox."""
    sequence, floor = outbox.next_numbers(draft.partition)
    batch = Batch(outbox.producer_id, outbox.epoch, draft.partition, sequence, floor, now_ms, [])
    return Sealed(draft.partition, sequence, encode_drafted(batch, draft.groups), draft.series_count)


def drafts_of(
    items: Iterable[Pending],
    *,
    partition_count: int,
    batch_bytes_max: int,
    spreads: Mapping[Definition, int] = {},
    turn: int = 0,
) -> list[Draft]:
    """Put series, each of them once, into drafts of at most `batch_bytes_max`.

    A series that is larger by itself gets a draft of its own. `spreads` has the definitions that are spread, and `turn`
    chooses among the partitions of their series; see `partition_of`.
    """
    known: dict[Definition, tuple[Definition, bytes]] = {}
    routed = []
    for item in items:
        definition, prefix = known.setdefault(item.definition, (item.definition, series_prefix(item.definition)))
        partition = partition_of(prefix, item.suffix, partition_count, spreads.get(item.definition, 1), turn)
        routed.append(Routed(partition, definition, item.suffix, item.state))
    return cut(routed, batch_bytes_max)


def seal(drafts: Iterable[Draft], outbox: Outbox, *, now_ms: int) -> list[Sealed]:
    """Return drafts as batches that are numbered by `outbox`, which keeps them. If anything fails, nothing is sealed."""
    out: list[Sealed] = []
    try:
        for draft in drafts:
            out.append(number(draft, outbox, now_ms))
            outbox.add(out[-1])
    except BaseException:
        for sealed in out:
            outbox.acknowledge(sealed.partition, sealed.sequence)
        raise
    return out
