"""Encoding of batches, entries and positions. The first byte of each is a version; golden files keep one of each for ever.

    batch       0x02 crc32c(4) partition(4) msgpack([producer_id, epoch, sequence, floor, created_at_ms, closing, origin,
                                                     controls, groups])
                origin  = nil, or [producer_id, sequence]
                control = [action, view, kind, labels or nil]
                group   = [definition, [suffix, ...], [column, ...]]
    series      0x02 msgpack([kind, expires_at_ms, one value of each column of the state]); 0: it never expires
    definition  0x02 msgpack([definition, series_count, defined_at_ms, expired_before_ms]), without the last if it is 0
    producer    0x02 msgpack([epoch, next_sequence, beyond, seen_at_ms, seen_offset, closed])
    position    0x02 msgpack([next_offset, committed_at_ms, source_at_ms, source_id, definitions_version, leader_epoch,
                              records_end_offset, begin_offset, previous_end_offset, owner_id])
    fence       0x02 msgpack([owner_id, at_ms])
    dead letter 0x02 msgpack([partition, offset, at_ms, reason, view, value])

A definition is [view, kind, labels, window_s, monotone, retention_s, parameters], without the last of them that are 0, false
or empty. The checksum is CRC-32C (RFC 3720, appendix B.4), big endian, over everything behind it.

Ints beyond 64 bits travel as extension type 1: signed, big endian; extension type 2 is for states that are bytes. Decoding
arbitrary bytes yields a value or `BadRecord`, in time proportional to their length and in at most `MEMORY_FACTOR` times
their memory. Entries and positions of a later version, which only a newer program writes, raise `NewerFormat`, because they
must not be thrown away; anybody can send batches, so a batch of a later version is just a bad record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar, cast

import google_crc32c
import msgspec

from pipeline.core.groups import PackedGroup, Scalar, WireGroup, check_rows, decode_group, decode_suffixes, packed
from pipeline.core.kinds import KIND_NAMES, KINDS, Kind, State, to_wire
from pipeline.core.record import (
    CONTROL_ACTIONS,
    NAME,
    NAME_BYTES_MAX,
    TAG_DEFINITION,
    TAG_PRODUCER,
    TAG_SERIES,
    Batch,
    Control,
    Definition,
    Fence,
    Group,
    Origin,
    Position,
    canonical,
    check_definition,
    travelling,
)
from pipeline.core.sequence import Counter, Folded
from pipeline.errors import BadRecord, Invalid, NewerFormat

VERSION = b"\x02"
FORMAT = VERSION[0]
"""Format that this program writes, and the newest that it reads."""
_NEWEST = b"\x1f"
"""Highest number that a format will ever have; a higher first byte is noise."""
PRODUCER_ID_BYTES_MAX = 100
GROUP_COUNT_MAX = 10_000
CONTROL_COUNT_MAX = 1_000
MEMORY_FACTOR = 80
"""Upper bound of the memory that decoding takes for each byte of a value: a group that is refused takes 7 and 500."""
HEAD_BYTES = 9
"""Version, checksum and partition of a batch."""

_PAIR = 2
_NEVER = b"\x00"
"""Expiry field of an entry that never expires. The field follows the kind."""
_EXPIRES = b"\xcf"
"""First byte of an expiry field with a time in the eight bytes behind it, a fixed place that needs no decoding."""
_EXPIRY_BYTES = 9
_KIND_AT = 2
"""Index of the kind in an entry: behind the version and the length of the array."""


class WireBatch(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A batch as it travels, decoded and not checked yet."""

    producer_id: str
    epoch: Counter
    sequence: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 2)]  # the one behind it must be a Counter too
    floor: Counter
    created_at_ms: Counter
    closing: bool
    origin: Origin | None
    controls: Annotated[list[Control], msgspec.Meta(max_length=CONTROL_COUNT_MAX)]
    groups: Annotated[list[WireGroup], msgspec.Meta(max_length=GROUP_COUNT_MAX)]


class _BatchHead(msgspec.Struct, array_like=True, frozen=True):
    producer_id: str


class RefusedGroup(msgspec.Struct, frozen=True):
    """A group that can't be folded; the other groups of its batch can."""

    index: int
    """Index of the group in the batch."""
    view: str
    reason: str


class Received(msgspec.Struct, frozen=True):
    """A batch as it came from outside. `batch.groups[i]` stood at `indexes[i]`; `refused` are the groups that are wrong."""

    batch: Batch
    indexes: list[int]
    refused: list[RefusedGroup]
    wire: WireBatch


class DefinitionEntry(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Entry of a definition in a partition."""

    definition: Definition
    series_count: Counter
    """Number of the definition's series in this partition."""
    defined_at_ms: Counter
    """Time at which the log accepted the first batch; a view answers with the kind and window that were defined first."""
    expired_before_ms: Counter = 0
    """Start of the oldest window that has not expired in this partition; all earlier ones are gone, or about to be. Without
    windows: of the series' entries here, those with an `expires_at_ms` up to this time are gone, or about to be."""


class DeadLetter(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A record, or one group of a batch, that was refused when it was folded."""

    partition: int
    offset: int
    at_ms: int
    reason: str
    view: str
    """View of the group that was refused; empty if the whole record was."""
    value: bytes | None
    """The record, or a batch with nothing but the group; None if that did not fit into the dead-letter topic."""


class _LaterPosition(Position, array_like=True, frozen=True, forbid_unknown_fields=False):
    """Fields with which the position of every later format begins."""


_encode = msgspec.msgpack.Encoder().encode
_POSITION_HEAD = bytes((0x90 + len(Position.__struct_fields__),))
"""First byte of an array with as many items as a position has."""
_decode_batch = msgspec.msgpack.Decoder(WireBatch).decode
_decode_head = msgspec.msgpack.Decoder(_BatchHead).decode
_decode_entries = msgspec.msgpack.Decoder(list[tuple[Scalar, ...]]).decode
_decode_position = msgspec.msgpack.Decoder(Position).decode
_decode_fence = msgspec.msgpack.Decoder(Fence).decode
_decode_later = msgspec.msgpack.Decoder(_LaterPosition).decode
_decode_definition = msgspec.msgpack.Decoder(DefinitionEntry).decode
_decode_letter = msgspec.msgpack.Decoder(DeadLetter).decode
_decode_folded = msgspec.msgpack.Decoder(Folded).decode

T = TypeVar("T")


def check_version(value: bytes, what: str) -> None:
    """Raise `NewerFormat` if a newer program wrote this entry or position, `BadRecord` if its first byte is no version."""
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
    if canonical(definition) is not definition:
        raise BadRecord(f"{what}: the labels of view {definition.view} are not in the order of their names")


def seal(partition: int, body: bytes) -> bytes:
    """Return the bytes of a batch with an encoded body."""
    rest = partition.to_bytes(4, "big") + body
    return VERSION + int(google_crc32c.value(rest)).to_bytes(4, "big") + rest


def encode_batch(batch: Batch) -> bytes:
    """Return the bytes of a batch, as they go to the log."""
    return encode_drafted(batch, encode_groups(batch.groups))


def encode_groups(groups: Sequence[Group]) -> bytes:
    """Encode the groups of a batch as the last item of its body."""

    def encoded(column: Callable[[list[Any]], list[Any]]) -> bytes:
        columns = [[column(c) for c in KINDS[g.definition.kind].to_columns(g.states)] for g in groups]
        return _encode([(travelling(g.definition), g.suffixes, c) for g, c in zip(groups, columns, strict=True)])

    try:
        return encoded(list)
    except OverflowError:
        return encoded(to_wire)


def encode_drafted(batch: Batch, groups: bytes) -> bytes:
    """Return the bytes of a batch with groups that `encode_groups` has encoded in place of its own."""
    numbers = batch.epoch, batch.sequence, batch.floor, batch.created_at_ms
    head = _encode((batch.producer_id, *numbers, batch.closing, batch.origin, batch.controls))
    # The head is the array of all fields but the groups, with a length that counts the groups, too.
    return seal(batch.partition, bytes((head[0] + 1,)) + head[1:] + groups)


def decode_batch(value: bytes) -> Batch:
    """Decode what `encode_batch` returned. Raises `BadRecord` if anything in it is wrong, even if that is one group only."""
    received = receive_batch(value)
    for refused in received.refused:
        raise BadRecord(f"group {refused.index}: {refused.reason}")
    return received.batch


def receive_batch(value: bytes, native: Any = None) -> Received:
    """Decode the batch in untrusted bytes. Raises `BadRecord` if they are no batch; a group that is wrong is only left out.

    Suffixes are not checked; see `check_group`. With `native`, the extension module, groups are `PackedGroup`s where it can
    read and check all of their rows.
    """
    check_sealed(value)
    wire = _decode(_decode_batch, value, HEAD_BYTES, "batch")
    _check_header(wire)
    groups: list[Group] = []
    indexes: list[int] = []
    refused: list[RefusedGroup] = []
    for index, wire_group in enumerate(wire.groups):
        definition, suffixes, columns = wire_group
        group = None if native is None else _packed(native, wire_group)
        if group is None:
            plain_suffixes = decode_suffixes(suffixes)
            try:
                _check(definition, "batch")
                group = decode_group(definition, plain_suffixes, columns)
            except BadRecord as error:
                refused.append(RefusedGroup(index, definition.view[:NAME_BYTES_MAX], str(error)))
                continue
        groups.append(cast("Group", group))  # a packed one reads as a `Group`
        indexes.append(index)
    batch = Batch(
        producer_id=wire.producer_id,
        epoch=wire.epoch,
        partition=partition_of(value),
        sequence=wire.sequence,
        floor=wire.floor,
        created_at_ms=wire.created_at_ms,
        groups=groups,
        closing=wire.closing,
        controls=wire.controls,
        origin=wire.origin,
    )
    return Received(batch, indexes, refused, wire)


def _packed(native: Any, group: WireGroup) -> PackedGroup | Group | None:
    try:
        _check(group[0], "batch")
    except BadRecord:
        return None
    return packed(native, *group)


def check_group(group: Group, at_ms: int, *, ts_ahead_max_ms: int) -> None:
    """Raise `BadRecord` unless the suffixes of a group are series of its definition, and its own times are not too far
    ahead of `at_ms`, when the log accepted it: what a task is certain to refuse.
    """
    check_rows(group, at_ms + ts_ahead_max_ms)


def _check_header(wire: WireBatch) -> None:
    for producer_id in (wire.producer_id, *((wire.origin.producer_id,) if wire.origin else ())):
        if not 0 < len(producer_id.encode()) <= PRODUCER_ID_BYTES_MAX:
            raise BadRecord(f"batch: producer id of {len(producer_id)} characters; 1 to {PRODUCER_ID_BYTES_MAX}")
    if wire.floor > wire.sequence:
        raise BadRecord(f"batch: floor {wire.floor} is above sequence {wire.sequence}")
    if wire.origin and wire.origin.producer_id == wire.producer_id:
        raise BadRecord("batch: it replays a batch of its own producer")
    if wire.origin and not 0 <= wire.origin.sequence <= 2**63 - 2:
        raise BadRecord("batch: the sequence of its origin is out of range")
    for control in wire.controls:
        if control.action not in CONTROL_ACTIONS or not NAME.match(control.view) or len(control.view) > NAME_BYTES_MAX:
            raise BadRecord(f"batch: a control record of {control.action[:20]!r} for view {control.view[:50]!r}")


@cache
def _entry_head(kind: Kind) -> tuple[bytes, int]:
    """Return the bytes with which every series entry of a kind starts, up to its expiry, and how many values follow that."""
    width = len(kind.to_columns([]))
    return VERSION + bytes((0x92 + width,)) + _encode(kind.name), width


def kind_of_entry(value: bytes) -> Kind:
    """Return the kind of a series entry by its first bytes. Raises `BadRecord` if no entry of this version has them."""
    for kind in KINDS.values():
        head = _entry_head(kind)[0]
        if value.startswith((head + _NEVER, head + _EXPIRES)):
            return kind
    check_version(value, "series entry")
    raise BadRecord("series entry: of a kind that this version does not know")


def entry_heads(kind: Kind, expires_at_ms: int = 0) -> tuple[bytes, bytes]:
    """Return the bytes with which all series entries of a kind start, and the same with the expiry of some of them."""
    head = _entry_head(kind)[0]
    return head, head + (_EXPIRES + expires_at_ms.to_bytes(8, "big") if expires_at_ms else _NEVER)


def encode_states(kind: Kind, states: list[State], expires_at_ms: int = 0) -> list[bytes]:
    """Return the values of series entries, one for each state. `expires_at_ms` is when all of them expire; 0: never."""
    columns = kind.to_columns(states)
    head = entry_heads(kind, expires_at_ms)[1]
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
    """Decode what `encode_states` returned. Raises `BadRecord` if a value is no series entry of this kind."""
    if not values:
        return []
    head, width = _entry_head(kind)
    skip = len(head) + 1
    if {value[:skip] for value in values} != {head + _NEVER}:
        values = [*map(_without_expiry, values)]
        if {value[:skip] for value in values} != {head + _NEVER}:
            for value in values:
                check_version(value, "series entry")
            raise BadRecord(f"series entry: not of kind {kind.name}, or of another version")
    # One call decodes all. Each state is wrapped in an array, so that one of the wrong length shifts the next one's array
    # to where only a number, a text or a pair of floats may stand, or leaves bytes over. An array of two, which could be a
    # pair, has a nil in front.
    pad = width == _PAIR
    wrap = bytes((0x90 + width + pad,)) + b"\xc0" * pad
    body = wrap.join([value[skip:] for value in values])
    try:
        rows = _decode_entries(b"\xdd" + len(values).to_bytes(4, "big") + wrap + body)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise BadRecord(f"series entry: {error}") from None
    if set(map(len, rows)) != {width + pad}:
        raise BadRecord(f"series entry: not {width} values")
    return kind.from_columns([[row[i] for row in rows] for i in range(pad, width + pad)], len(rows))


def _without_expiry(value: bytes) -> bytes:
    """Return a series entry as it would be if it never expired."""
    end = _kind_end(value)
    return value[:end] + _NEVER + value[end + _EXPIRY_BYTES :] if expires_at_ms(value) else value


def _kind_end(value: bytes) -> int:
    """Return the index behind the kind's name in a series entry; if the value is none, any index."""
    return 3 + (value[2] & 0x1F) if len(value) > _KIND_AT else 0


def expires_at_ms(value: bytes) -> int:
    """Return when a series entry expires; 0: never. The rest of the entry is not looked at."""
    end = _kind_end(value)
    return int.from_bytes(value[end + 1 : end + _EXPIRY_BYTES], "big") if value[end : end + 1] == _EXPIRES else 0


def alive(entries: Iterable[tuple[bytes, bytes]], expired_before_ms: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield those series entries of a partition, with their keys, that have not expired.

    `expired_before_ms` is that of the definition's entry in the same partition. Only a definition with a retention and
    without windows has entries that expire: answers leave those out, and the worker is about to delete them.
    """
    return (entry for entry in entries if not 0 < expires_at_ms(entry[1]) <= expired_before_ms)


def encode_definition(entry: DefinitionEntry) -> bytes:
    """Return the value of a definition entry."""
    fields = travelling(entry.definition), entry.series_count, entry.defined_at_ms
    return VERSION + _encode((*fields, entry.expired_before_ms) if entry.expired_before_ms else fields)


def decode_definition(value: bytes) -> DefinitionEntry:
    """Decode what `encode_definition` returned."""
    entry = _decode_state(_decode_definition, value, "definition entry")
    _check(entry.definition, "definition entry")
    return entry


def check_entry(key: bytes, value: bytes) -> None:
    """Raise `BadRecord` if the value of a definition's, series' or producer's entry can't be read."""
    tag = key[:1]
    if tag == TAG_DEFINITION:
        decode_definition(value)
    elif tag == TAG_PRODUCER:
        decode_folded(value)
    elif tag == TAG_SERIES:
        decode_states(kind_of_entry(value), [value])


def encode_letter(letter: DeadLetter) -> bytes:
    """Return the value of a dead letter."""
    return VERSION + _encode(letter)


def decode_letter(value: bytes) -> DeadLetter:
    """Decode what `encode_letter` returned."""
    return _decode_state(_decode_letter, value, "dead letter")


def encode_folded(folded: Folded) -> bytes:
    """Return the value of a producer entry."""
    return VERSION + _encode(folded)


def decode_folded(value: bytes) -> Folded:
    """Decode what `encode_folded` returned."""
    return _decode_state(_decode_folded, value, "producer entry")


def encode_position(position: Position) -> bytes:
    """Return the value of a position record."""
    return VERSION + _encode(position)


def decode_position(value: bytes) -> Position:
    """Decode what `encode_position` returned."""
    position = _decode_state(_decode_position, value, "position")
    if value[1:2] != _POSITION_HEAD:
        raise BadRecord("position: fields are missing")
    return position


def encode_fence(fence: Fence) -> bytes:
    """Return the value of a fence record."""
    return VERSION + _encode(fence)


def decode_fence(value: bytes) -> Fence:
    """Decode what `encode_fence` returned."""
    return _decode_state(_decode_fence, value, "fence")


def newer_position(value: bytes) -> Position | None:
    """Return the known fields of a position of a newer format; None if the bytes are no such position.

    One random byte in ten is the version of a later format, but noise is hardly ever a whole array that begins as a
    position.
    """
    if not VERSION < value[:1] <= _NEWEST or value[1:2] < _POSITION_HEAD:
        return None
    try:
        return Position(*msgspec.structs.astuple(_decode_later(memoryview(value)[1:])))
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        return None


def check_sealed(batch: bytes) -> None:
    """Raise `BadRecord` unless the version of an encoded batch is known and its checksum is right."""
    if batch[:1] != VERSION or len(batch) < HEAD_BYTES:
        raise BadRecord(f"batch: version byte {batch[:1].hex() or 'missing'}; this version reads {VERSION.hex()}")
    if google_crc32c.value(batch[5:]) != int.from_bytes(batch[1:5], "big"):
        raise BadRecord("batch: its checksum is wrong, so bytes of it were changed or lost on their way")


def partition_of(batch: bytes) -> int:
    """Return the partition that an encoded batch was sealed for, without decoding the rest."""
    if batch[:1] != VERSION or len(batch) < HEAD_BYTES:
        raise BadRecord(f"batch: version byte {batch[:1].hex() or 'missing'}; this version reads {VERSION.hex()}")
    return int.from_bytes(batch[5:9], "big")


def producer_of(batch: bytes) -> str:
    """Return the producer id of an encoded batch, without decoding the rest."""
    return _decode(_decode_head, batch, HEAD_BYTES, "batch").producer_id
