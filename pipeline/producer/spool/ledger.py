"""What the records of a journal mean, one after the other: which deltas and batches wait. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Annotated, Any, NamedTuple, TypeVar
from zlib import crc32

import msgspec

from pipeline.core.codec import (
    GROUP_COUNT_MAX,
    PRODUCER_ID_BYTES_MAX,
    decode_batch,
    decode_states,
    encode_batch,
    encode_states,
)
from pipeline.core.merge import KIND_NAMES, KINDS, State, kind_of
from pipeline.core.record import Batch, Definition, Group, check_definition, check_suffix, series_prefix
from pipeline.core.sequence import Counter, Sealed
from pipeline.errors import BadRecord, Invalid
from pipeline.producer.sealing import Merged
from pipeline.producer.spool.ring import Cursor, Place

HEADER, DEFINE, STATE, COMMIT, ACK, EPOCH = range(1, 7)
SERIES_ID_MAX = 2**62
SERIES_BYTES = 96
"""What the definition of a series takes in a journal beyond its names, about."""

_PENDING_ENTRIES = 10_000
_SIZE = 4

Small = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Partition = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
T = TypeVar("T")


class Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The first record of a journal, followed by a snapshot of what was alive when it was begun."""

    producer_id: str
    generation: Counter
    epoch: Counter
    snapshot_count: Counter = 0
    """How many records the snapshot has: a file with fewer is not complete."""
    lossy: bool = False
    """Whether an older journal was corrupt, so that deltas that may or may not have been sent were left to a human."""


class Define(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Series `series_id` is this one."""

    series_id: Annotated[int, msgspec.Meta(ge=1, lt=SERIES_ID_MAX)]
    definition: Definition
    suffix: bytes


class StateOf(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Deltas of a series, merged: what no record of the ring can hold."""

    series_id: Counter
    delta_count: Counter
    state: bytes
    """As `codec.encode_states` has it."""


class Commit(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Everything up to here is in batches, or in `pending`, which replaces all that was pending before.

    The bytes of the batches, and then those of `pending`, follow this head.
    """

    places: tuple[tuple[Counter, Counter, tuple[Counter, ...]], ...]
    """How far the ring was read; see `ring.Cursor`."""
    states_end: Counter
    """States that stand before this place of the file are in it."""
    next_sequences: dict[Partition, Counter]
    batches: tuple[tuple[Partition, Counter, Counter, Small], ...]
    """Partition, sequence, entries, bytes."""
    pending: tuple[tuple[Small, tuple[Counter, ...]], ...] = ()
    """Bytes of an encoded batch, and how many deltas each of its entries has."""


class Where(NamedTuple):
    """A part of a journal."""

    place: int
    size: int


class Waiting(NamedTuple):
    """A batch in a journal."""

    where: Where
    entry_count: int


class Pending(NamedTuple):
    """Merged deltas in a journal that are in no batch yet."""

    where: Where
    delta_counts: tuple[int, ...]


_encode = msgspec.msgpack.Encoder().encode
_decode_acks = msgspec.msgpack.Decoder(list[tuple[Partition, Counter]]).decode
_decode_epoch = msgspec.msgpack.Decoder(Counter).decode
_decode_header = msgspec.msgpack.Decoder(Header).decode
_decode_define = msgspec.msgpack.Decoder(Define).decode
_decode_state = msgspec.msgpack.Decoder(StateOf).decode
_decode_commit = msgspec.msgpack.Decoder(Commit).decode


def _decode(decode: Callable[[bytes], T], payload: bytes, what: str) -> T:
    try:
        return decode(payload)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise BadRecord(f"{what}: {error}") from None


encode = _encode
"""The payload of every record but a commit's."""


def encode_commit(commit: Commit, blobs: Sequence[bytes]) -> bytes:
    """The payload of a commit."""
    head = _encode(commit)
    return b"".join((len(head).to_bytes(_SIZE, "little"), head, *blobs))


def encode_pending(merged: Sequence[Merged]) -> tuple[list[tuple[int, tuple[int, ...]]], list[bytes]]:
    """Merged deltas as `Commit.pending` and the bytes that follow."""
    heads: list[tuple[int, tuple[int, ...]]] = []
    blobs: list[bytes] = []
    rest = iter(merged)
    while run := [*islice(rest, _PENDING_ENTRIES)]:
        for views in _by_definition(run):
            groups = [Group(d, [m.suffix for m in items], [m.state for m in items]) for d, items in views]
            blob = encode_batch(Batch("-", 0, 0, 0, 0, 0, groups))
            heads.append((len(blob), tuple([m.delta_count for _, items in views for m in items])))
            blobs.append(blob)
    return heads, blobs


def _by_definition(run: list[Merged]) -> list[list[tuple[Definition, list[Merged]]]]:
    views: dict[Definition, list[Merged]] = {}
    for merged in run:
        views.setdefault(merged.definition, []).append(merged)
    items = [*views.items()]
    return [items[i : i + GROUP_COUNT_MAX] for i in range(0, len(items), GROUP_COUNT_MAX)]


def decode_pending(blob: bytes, delta_counts: Sequence[int]) -> list[Merged]:
    """The inverse of `encode_pending`, for one blob."""
    counts = iter(delta_counts)
    batch = decode_batch(blob)
    if sum([len(group.suffixes) for group in batch.groups]) != len(delta_counts):
        raise BadRecord("pending: not one delta count for each entry")
    return [
        Merged(group.definition, suffix, crc32(series_prefix(group.definition.view) + suffix), state, next(counts))
        for group in batch.groups
        for suffix, state in zip(group.suffixes, group.states, strict=True)
    ]


class Ledger:
    """What a journal says, as of its last record."""

    def __init__(self) -> None:
        self.header: Header | None = None
        self.record_count = 0
        self.epoch = 0
        self.series: dict[int, tuple[Definition, bytes]] = {}
        self.series_bytes = 0
        self.next_sequences: dict[int, int] = {}
        self.batches: dict[tuple[int, int], Waiting] = {}
        self.batch_bytes = 0
        self.pending: list[Pending] = []
        self.pending_bytes = 0
        self.cursor: Cursor = ()
        self.states: list[Where] = []
        """Of the records of states that no commit has yet."""
        self.state_bytes = 0

    @property
    def live_bytes(self) -> int:
        """What a new generation of the journal would take, about."""
        return self.series_bytes + self.batch_bytes + self.pending_bytes + self.state_bytes

    def apply(self, kind: int, start: int, payload: bytes) -> None:
        """Take in a record whose payload is at `start`; `BadRecord` if it can't be what it says it is."""
        if (kind == HEADER) != (self.header is None):
            raise BadRecord("journal: the header is the first record, and only that")
        if kind == HEADER:
            self.header = _decode(_decode_header, payload, "header")
            if not 0 < len(self.header.producer_id.encode()) <= PRODUCER_ID_BYTES_MAX:
                raise BadRecord("header: no producer id")
            self.epoch = self.header.epoch
        elif kind == DEFINE:
            self._define(_decode(_decode_define, payload, "series"))
        elif kind == STATE:
            self.state_of(payload)
            self.add_state(start, len(payload))
        elif kind == COMMIT:
            self._commit(start, payload)
        elif kind == ACK:
            self.acknowledge(_decode(_decode_acks, payload, "acknowledgements"))
        elif kind == EPOCH:
            self.epoch = max(self.epoch, _decode(_decode_epoch, payload, "epoch"))
        else:
            raise BadRecord(f"journal: a record of type {kind}")
        self.record_count += 1

    @property
    def complete(self) -> bool:
        """Whether the snapshot that the journal begins with is all there."""
        return self.header is not None and self.record_count > self.header.snapshot_count

    def _define(self, define: Define) -> None:
        try:
            check_definition(define.definition, KIND_NAMES)
        except Invalid as error:
            raise BadRecord(f"series {define.series_id}: {error}") from None
        check_suffix(define.definition, define.suffix)
        self.add_series(define)

    def add_series(self, define: Define) -> None:
        """Know a series."""
        self.forget_series(define.series_id)
        self.series[define.series_id] = define.definition, define.suffix
        self.series_bytes += _series_bytes(define.definition, define.suffix)

    def forget_series(self, series_id: int) -> None:
        """The opposite of `add_series`."""
        known = self.series.pop(series_id, None)
        if known is not None:
            self.series_bytes -= _series_bytes(*known)

    def add_state(self, place: int, size: int) -> None:
        """Know of a state."""
        self.states.append(Where(place, size))
        self.state_bytes += size

    def state_of(self, payload: bytes) -> Merged:
        """What a record of a state holds."""
        record = _decode(_decode_state, payload, "state")
        known = self.series.get(record.series_id)
        if known is None:
            raise BadRecord(f"state: series {record.series_id} is not known")
        return self.merged(record.series_id, decode_states(kind_of(known[0]), [record.state])[0], record.delta_count)

    def merged(self, series_id: int, state: State, delta_count: int) -> Merged:
        """Deltas of a series that is known."""
        definition, suffix = self.series[series_id]
        return Merged(definition, suffix, crc32(series_prefix(definition.view) + suffix), state, delta_count)

    def _commit(self, start: int, payload: bytes) -> None:
        head_end = _SIZE + int.from_bytes(payload[:_SIZE], "little")
        commit = _decode(_decode_commit, payload[_SIZE:head_end], "commit")
        blobs = sum([batch[3] for batch in commit.batches]) + sum([size for size, _ in commit.pending])
        if head_end + blobs != len(payload):
            raise BadRecord(f"commit: {blobs} bytes announced, {len(payload) - head_end} there")
        self.committed(commit, start + head_end)

    def committed(self, commit: Commit, place: int) -> None:
        """Take in a commit whose blobs are at `place`."""
        for partition, sequence, entry_count, size in commit.batches:
            old = self.batches.get((partition, sequence))
            self.batches[partition, sequence] = Waiting(Where(place, size), entry_count)
            self.batch_bytes += size - (old.where.size if old else 0)
            place += size
        pending: list[Pending] = []
        for size, delta_counts in commit.pending:
            pending.append(Pending(Where(place, size), delta_counts))
            place += size
        self.pending = pending
        self.pending_bytes = sum([item.where.size for item in pending])
        self.next_sequences.update(commit.next_sequences)
        self.cursor = tuple([Place(*item) for item in commit.places])
        self.states = [where for where in self.states if where.place >= commit.states_end]
        self.state_bytes = sum([where.size for where in self.states])

    def acknowledge(self, batches: Sequence[tuple[int, int]]) -> None:
        """Forget batches."""
        for key in batches:
            waiting = self.batches.pop(key, None)
            if waiting is not None:
                self.batch_bytes -= waiting.where.size


def commit_of(
    cursor: Cursor,
    states_end: int,
    next_sequences: dict[int, int],
    batches: Sequence[Sealed],
    pending: list[tuple[int, tuple[int, ...]]],
) -> Commit:
    """The head of a commit."""
    return Commit(
        places=tuple([(place.number, place.next_index, place.holes) for place in cursor]),
        states_end=states_end,
        next_sequences=next_sequences,
        batches=tuple([(sealed.partition, sealed.sequence, sealed.entry_count, len(sealed.value)) for sealed in batches]),
        pending=tuple(pending),
    )


def encode_state(series_id: int, definition: Definition, state: State, delta_count: int) -> bytes:
    """The payload of a state's record."""
    return _encode(StateOf(series_id, delta_count, encode_states(KINDS[definition.kind], [state])[0]))


def _series_bytes(definition: Definition, suffix: bytes) -> int:
    names: Any = (definition.view, *definition.labels)
    return SERIES_BYTES + len(suffix) + sum(map(len, names))
