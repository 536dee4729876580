"""Bytes of batches, entries and positions. The first byte of each is a version; golden files hold every version for ever.

    batch       0x01 partition(4, big endian) msgpack([producer_id, epoch, sequence, floor, created_at_ms, groups])
                group = [definition, [suffix, ...], [column, ...]]
    series      0x01 msgpack([kind, expires_at_ms, one value of each column of the state])
    definition  0x01 msgpack([[view, kind, labels, window_s], series_count]), with a fifth `true` if it is monotone
    producer    0x01 msgpack([epoch, next_sequence, beyond, seen_at_ms])
    position    0x01 msgpack([next_offset, committed_at_ms, source_at_ms]), with source_id behind if there is one

Ints beyond 64 bits travel as extension type 1: signed, big endian. Decoding arbitrary bytes yields a value or
`BadRecord`, in memory and time proportional to their length. State of a version that is still to come, which only a newer
program writes, is `NewerFormat` and not to be thrown away; batches come from anybody, so one of them is just a bad record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar

import msgspec

from pipeline.core.merge import BATCH_INT_BYTES_MAX, KIND_NAMES, KINDS, Kind, State, kind_of, to_wire
from pipeline.core.record import Batch, Definition, Group, Position, check_definition
from pipeline.core.sequence import Counter, Folded
from pipeline.errors import BadRecord, Invalid, NewerFormat

VERSION = b"\x01"
FORMAT = VERSION[0]
"""What this program writes, and the newest that it reads."""
_NEWEST = b"\x1f"
"""No format will ever be higher: what is only noise is not taken for one."""
PRODUCER_ID_BYTES_MAX = 100
GROUP_COUNT_MAX = 10_000

_Scalar = int | float | str | bool | msgspec.msgpack.Ext | None  # nothing that nests: a byte must not become a dict


class _WireBatch(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    producer_id: str
    epoch: Counter
    sequence: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 2)]  # the one behind it must be a Counter too
    floor: Counter
    created_at_ms: Counter
    groups: list[tuple[Definition, list[bytes], list[list[_Scalar]]]]


class ViewEntry(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What a partition keeps about a view: its definition, and how many series of it live in that partition."""

    definition: Definition
    series_count: Counter


_encode = msgspec.msgpack.Encoder().encode
_decode_batch = msgspec.msgpack.Decoder(_WireBatch).decode
_decode_entries = msgspec.msgpack.Decoder(list[tuple[_Scalar, ...]]).decode
_decode_position = msgspec.msgpack.Decoder(Position).decode
_decode_view = msgspec.msgpack.Decoder(ViewEntry).decode
_decode_folded = msgspec.msgpack.Decoder(Folded).decode

T = TypeVar("T")


def check_version(value: bytes, what: str) -> None:
    """Raise `NewerFormat` if state was written by a newer program, `BadRecord` if its first byte is no version."""
    if VERSION < value[:1] <= _NEWEST:
        raise NewerFormat(
            f"{what}: it has format {value[0]}, and this program reads {FORMAT}: start the newer program that wrote it"
        )
    if value[:1] != VERSION:
        raise BadRecord(f"{what}: version byte {value[:1].hex() or 'missing'}; this version reads {VERSION.hex()}")


def _decode_state(decode: Callable[[memoryview], T], value: bytes, what: str) -> T:
    check_version(value, what)
    return _decode(decode, value, 1, what)


def _decode(decode: Callable[[memoryview], T], value: bytes, skip: int, what: str) -> T:
    if value[:1] != VERSION:
        raise BadRecord(f"{what}: version byte {value[:1].hex() or 'missing'}; this version reads {VERSION.hex()}")
    try:
        return decode(memoryview(value)[skip:])
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise BadRecord(f"{what}: {error}") from None


def _check(definition: Definition, what: str) -> None:
    try:
        check_definition(definition, KIND_NAMES)
    except Invalid as error:
        raise BadRecord(f"{what}: {error}") from None


def _wire(definition: Definition) -> tuple[Any, ...]:
    """As it travels: `monotone` only where it is true, so that all others keep the bytes that they had without it."""
    plain = (definition.view, definition.kind, definition.labels, definition.window_s)
    return (*plain, True) if definition.monotone else plain


def encode_batch(batch: Batch) -> bytes:
    """The bytes of a batch, as they go to the log."""

    def wire(column: Callable[[list[Any]], list[Any]]) -> bytes:
        groups = [
            (_wire(g.definition), g.suffixes, [column(c) for c in KINDS[g.definition.kind].to_columns(g.states)])
            for g in batch.groups
        ]
        return _encode((batch.producer_id, batch.epoch, batch.sequence, batch.floor, batch.created_at_ms, groups))

    try:
        body = wire(list)
    except OverflowError:
        body = wire(to_wire)
    return VERSION + batch.partition.to_bytes(4, "big") + body


def decode_batch(value: bytes) -> Batch:
    """The inverse of `encode_batch`, from untrusted bytes. Suffixes are not checked; see `record.check_suffix`."""
    wire = _decode(_decode_batch, value, 5, "batch")
    if not 0 < len(wire.producer_id.encode()) <= PRODUCER_ID_BYTES_MAX:
        raise BadRecord(f"batch: producer id of {len(wire.producer_id)} characters; 1 to {PRODUCER_ID_BYTES_MAX}")
    if wire.floor > wire.sequence:
        raise BadRecord(f"batch: floor {wire.floor} is above sequence {wire.sequence}")
    if len(wire.groups) > GROUP_COUNT_MAX:
        raise BadRecord(f"batch: {len(wire.groups)} groups; at most {GROUP_COUNT_MAX}")
    groups = []
    for definition, suffixes, columns in wire.groups:
        _check(definition, "batch")
        states = kind_of(definition).from_columns(columns, len(suffixes), BATCH_INT_BYTES_MAX)
        groups.append(Group(definition, suffixes, states))
    return Batch(
        producer_id=wire.producer_id,
        epoch=wire.epoch,
        partition=int.from_bytes(value[1:5], "big"),
        sequence=wire.sequence,
        floor=wire.floor,
        created_at_ms=wire.created_at_ms,
        groups=groups,
    )


@cache
def _entry_head(kind: Kind) -> tuple[bytes, int]:
    """What every series entry of a kind starts with, and how many values follow."""
    width = len(kind.to_columns([]))
    return VERSION + bytes((0x92 + width,)) + _encode(kind.name) + _encode(0), width


def encode_states(kind: Kind, states: list[State]) -> list[bytes]:
    """The values of series entries, one for each state."""
    columns = kind.to_columns(states)
    head, _ = _entry_head(kind)
    try:
        return _rows(head, columns)
    except OverflowError:
        return _rows(head, [to_wire(column) for column in columns])


def _rows(head: bytes, columns: list[list[Any]]) -> list[bytes]:
    encode = _encode
    if len(columns) == 1:
        return [head + encode(v) for v in columns[0]]
    return [head + b"".join(map(encode, row)) for row in zip(*columns, strict=True)]


def decode_states(kind: Kind, values: Sequence[bytes]) -> list[State]:
    """The inverse of `encode_states`; `BadRecord` if a value is not a series entry of this kind."""
    if not values:
        return []
    head, width = _entry_head(kind)
    skip = len(head)
    if {value[:skip] for value in values} != {head}:
        for value in values:
            check_version(value, "series entry")
        raise BadRecord(f"series entry: not of kind {kind.name}, of another version, or one that expires")
    # One call decodes all. Each state is wrapped in an array, so that one of the wrong length shifts the next one's array
    # to where only a number or a text may stand, or leaves bytes over.
    wrap = bytes((0x90 + width,))
    body = wrap.join([value[skip:] for value in values])
    try:
        rows = _decode_entries(b"\xdd" + len(values).to_bytes(4, "big") + wrap + body)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise BadRecord(f"series entry: {error}") from None
    if set(map(len, rows)) != {width}:
        raise BadRecord(f"series entry: not {width} values")
    return kind.from_columns([[row[i] for row in rows] for i in range(width)], len(rows))


def encode_view(entry: ViewEntry) -> bytes:
    """The value of a definition entry."""
    return VERSION + _encode((_wire(entry.definition), entry.series_count))


def decode_view(value: bytes) -> ViewEntry:
    """The inverse of `encode_view`."""
    entry = _decode_state(_decode_view, value, "definition entry")
    _check(entry.definition, "definition entry")
    return entry


def encode_folded(folded: Folded) -> bytes:
    """The value of a producer entry."""
    return VERSION + _encode(folded)


def decode_folded(value: bytes) -> Folded:
    """The inverse of `encode_folded`."""
    return _decode_state(_decode_folded, value, "producer entry")


def encode_position(position: Position) -> bytes:
    """The value of a position record."""
    plain = (position.next_offset, position.committed_at_ms, position.source_at_ms)
    return VERSION + _encode((*plain, position.source_id) if position.source_id else plain)


def decode_position(value: bytes) -> Position:
    """The inverse of `encode_position`."""
    return _decode_state(_decode_position, value, "position")


def encode_frames(batches: Sequence[bytes]) -> bytes:
    """Encoded batches as one request body: each behind its length, four bytes, big endian."""
    return b"".join(part for batch in batches for part in (len(batch).to_bytes(4, "big"), batch))


def decode_frames(body: bytes) -> list[bytes]:
    """The inverse of `encode_frames`; `BadRecord` if a length goes beyond the body."""
    batches: list[bytes] = []
    start = 0
    while start < len(body):
        size = int.from_bytes(body[start : start + 4], "big")
        start += 4 + size
        if size == 0 or start > len(body):
            raise BadRecord(f"frame {len(batches)}: {size} bytes announced, {max(0, len(body) - start + size)} there")
        batches.append(body[start - size : start])
    return batches


def partition_of(batch: bytes) -> int:
    """The partition that an encoded batch was sealed for, without decoding the rest."""
    if batch[:1] != VERSION or len(batch) < 5:
        raise BadRecord(f"batch: version byte {batch[:1].hex() or 'missing'}; this version reads 01")
    return int.from_bytes(batch[1:5], "big")
