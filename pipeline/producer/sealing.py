"""From merged deltas to sealed batches: route, cut to size, number, encode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from pipeline.core.codec import GROUP_COUNT_MAX, encode_batch
from pipeline.core.merge import KINDS, State
from pipeline.core.record import Batch, Definition, Group
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


class Refused(NamedTuple):
    """Series that could not be encoded, and why."""

    merged: list[Merged]
    error: Exception


class _Draft:
    """A batch of one partition that still grows."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.merged: list[Merged] = []
        self.views: set[str] = set()
        self.bytes_total = BATCH_BYTES

    def add(self, merged: Merged, bytes_max: int) -> bool:
        """Take a series in, if there is room for it or for nothing."""
        definition = merged.definition
        size = ENTRY_BYTES + len(merged.suffix) + value_bytes(merged.state)
        new = definition.view not in self.views
        if new:
            size += GROUP_BYTES + len(definition.view) + sum([3 + len(label) for label in definition.labels])
        full = self.bytes_total + size > bytes_max or (new and len(self.views) == GROUP_COUNT_MAX)
        if full and self.merged:
            return False
        self.merged.append(merged)
        self.bytes_total += size
        if new:
            self.views.add(definition.view)
        return True

    def groups(self) -> list[Group]:
        """By view, each series once."""
        views: dict[str, tuple[Definition, dict[bytes, State]]] = {}
        for definition, suffix, _, state, _ in self.merged:
            found = views.get(definition.view)
            if found is None:
                found = views[definition.view] = definition, {}
            states = found[1]
            old = states.get(suffix)
            states[suffix] = state if old is None else KINDS[definition.kind].merge(old, state)
        return [Group(definition, [*states], [*states.values()]) for definition, states in views.values()]


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
    refused: list[Refused] | None = None,
) -> list[Sealed]:
    """Put merged deltas into batches of at most `batch_bytes_max`, numbered by `outbox`, which keeps them.

    A series that is larger by itself gets a batch by itself. A batch that can't be encoded goes into `refused`, and the
    others are sealed all the same; without `refused`, and when something else fails, nothing is sealed, and it raises.
    """
    drafts: list[_Draft] = []
    growing: dict[int, _Draft] = {}
    for item in merged:
        partition = item.crc % partition_count
        draft = growing.get(partition)
        if draft is None or not draft.add(item, batch_bytes_max):
            draft = growing[partition] = _Draft(partition)
            drafts.append(draft)
            draft.add(item, batch_bytes_max)
    out: list[Sealed] = []
    for draft in drafts:
        try:
            out.append(_seal_draft(outbox, draft, now_ms))
        except Exception as error:
            if refused is None:
                for sealed in out:
                    outbox.acknowledge(sealed.partition, sealed.sequence)
                raise
            refused.append(Refused(draft.merged, error))
    return out


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
