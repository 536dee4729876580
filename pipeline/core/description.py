"""Descriptions, for a person, of the bytes in the three topics and in stores; every description can be encoded as JSON.

Producers are named by their fingerprints, never by their ids, which are rights to send. All bytes can be described: the
description of bytes that can't be decoded is the reason, and the first `RAW_BYTES_MAX` of them in hex.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Literal

import msgspec

from pipeline.core import codec
from pipeline.core.codec import Received
from pipeline.core.kinds import State, kind_of
from pipeline.core.letters import letter_key
from pipeline.core.record import (
    FENCE_KEY,
    POSITION_KEY,
    TAG_DEFINITION,
    TAG_PRODUCER,
    TAG_SERIES,
    Definition,
    Group,
    check_suffix,
    definition_id,
    definition_key,
    definitions_prefix,
    fingerprint,
    parse_suffix,
    split_key,
)
from pipeline.errors import BadRecord, NewerFormat

RAW_BYTES_MAX = 16
"""Number of bytes that are shown if they can't be decoded: enough to see which program wrote them, and too few to hold the
producer id of a damaged batch."""


class SeriesText(msgspec.Struct, frozen=True, omit_defaults=True):
    """A series and a state of it."""

    labels: dict[str, str]
    state: State
    answer: Any
    """Answer of that state by itself."""
    window_start_ms: int = 0
    expires_at_ms: int = 0
    """Time at which an entry expires, unless a delta comes before; 0: never."""


class DefinitionText(msgspec.Struct, frozen=True, omit_defaults=True):
    """A definition."""

    view: str
    kind: str
    labels: tuple[str, ...]
    definition_id: str
    """Id as it stands in keys, in hex."""
    window_s: int = 0
    monotone: bool = False
    retention_s: int = 0
    parameters: tuple[tuple[str, int | float | str], ...] = ()


class GroupText(msgspec.Struct, frozen=True, omit_defaults=True):
    """A group of a batch."""

    index: int
    view: str
    definition: DefinitionText | None = None
    """None: the group is refused, and the reason says why."""
    series_count: int = 0
    series: list[SeriesText] = []
    reason: str = ""


class OriginText(msgspec.Struct, frozen=True):
    """Batch that a replayed one stands for."""

    producer: str
    sequence: int


class OrderText(msgspec.Struct, frozen=True):
    """An order to drop or reset definitions of a view."""

    action: str
    view: str
    kind: str
    """Kind of the definitions; empty: any kind."""
    labels: tuple[str, ...] | None
    """Labels of the definitions; None: any labels."""


class BatchText(msgspec.Struct, frozen=True, omit_defaults=True):
    """A batch."""

    producer: str
    """Fingerprint of the producer."""
    epoch: int
    partition: int
    sequence: int
    floor: int
    created_at_ms: int
    groups: list[GroupText]
    controls: list[OrderText] = []
    closing: bool = False
    origin: OriginText | None = None
    letter: str = ""
    """Key of the dead letter that the batch replays; empty: the batch replays none."""


class RecordText(msgspec.Struct, frozen=True, omit_defaults=True):
    """A record of the deltas topic."""

    partition: int
    offset: int
    at_ms: int
    """When the log accepted it."""
    size_bytes: int
    batch: BatchText | None = None
    reason: str = ""
    """Reason why the record is no batch; empty: the record is a batch."""
    raw: str = ""
    """Bytes of a record that is no batch, in hex."""


class LetterText(msgspec.Struct, frozen=True, omit_defaults=True):
    """A dead letter."""

    key: str
    partition: int
    offset: int
    at_ms: int
    reason: str
    view: str = ""
    batch: BatchText | None = None
    """Refused batch, if it can be decoded."""
    raw: str = ""
    """Bytes that can't be decoded, in hex; empty: they did not fit into the topic."""
    raw_size_bytes: int = 0


What = Literal["series", "definition", "producer", "position", "fence", "meta", "foreign"]


class EntryText(msgspec.Struct, frozen=True, omit_defaults=True):
    """A record of a changelog, or an entry of a store."""

    what: What
    """`foreign`: not written by this program, for the reason that the description names."""
    tombstone: bool = False
    """True if the record removes the entry with this key."""
    view: str = ""
    definition_id: str = ""
    series: SeriesText | None = None
    """Series with its state; state and answer of a tombstone are None."""
    definition: DefinitionText | None = None
    fields: dict[str, Any] = {}
    """Further fields of the value, by name."""
    producer: str = ""
    """Fingerprint of a producer."""
    reason: str = ""
    key: str = ""
    """Key of a foreign record, in hex."""
    value: str = ""


Definitions = Callable[[bytes], Definition | None]
"""Returns the definition whose entry has a key, None if it is not known."""


def raw(value: bytes) -> str:
    """Return the first `RAW_BYTES_MAX` bytes in hex."""
    return value[:RAW_BYTES_MAX].hex() + "..." * (len(value) > RAW_BYTES_MAX)


def describe_definition(definition: Definition) -> DefinitionText:
    """Return the description of a definition, with its id."""
    return DefinitionText(
        definition.view,
        definition.kind,
        definition.labels,
        definition_id(definition).hex(),
        definition.window_s,
        definition.monotone,
        definition.retention_s,
        definition.parameters,
    )


def describe_batch(value: bytes, *, series_max: int | None = None) -> BatchText:
    """Describe the batch in these bytes, with up to `series_max` series a group. Raises `BadRecord` if they are no batch."""
    received = codec.receive_batch(value)
    batch = received.batch
    origin = None if batch.origin is None else OriginText(fingerprint(batch.origin.producer_id), batch.origin.sequence)
    letter = letter_key(batch.producer_id, batch.partition)
    return BatchText(
        producer=fingerprint(batch.producer_id),
        epoch=batch.epoch,
        partition=batch.partition,
        sequence=batch.sequence,
        floor=batch.floor,
        created_at_ms=batch.created_at_ms,
        groups=sorted(_groups(received, series_max), key=lambda it: it.index),
        controls=[OrderText(it.action, it.view, it.kind, it.labels) for it in batch.controls],
        closing=batch.closing,
        origin=origin,
        letter="" if letter is None else letter.decode(),
    )


def _groups(received: Received, series_max: int | None) -> Iterator[GroupText]:
    for refused in received.refused:
        yield GroupText(refused.index, refused.view, reason=refused.reason)
    for index, group in zip(received.indexes, received.batch.groups, strict=True):
        definition = group.definition
        try:
            series = [*_series(group, series_max)]
        except BadRecord as error:
            yield GroupText(index, definition.view, reason=str(error))
            continue
        yield GroupText(index, definition.view, describe_definition(definition), len(group.suffixes), series)


def _series(group: Group, series_max: int | None) -> Iterator[SeriesText]:
    definition, answer = group.definition, kind_of(group.definition).answer
    for suffix, state in zip(group.suffixes[:series_max], group.states[:series_max], strict=True):
        check_suffix(definition, suffix)
        window_start_ms, values = parse_suffix(suffix)
        yield SeriesText(dict(zip(definition.labels, values, strict=True)), state, answer(state), window_start_ms)


def describe_record(
    partition: int, offset: int, at_ms: int, value: bytes | None, *, series_max: int | None = None
) -> RecordText:
    """Describe the record of the deltas topic that has this value, with up to `series_max` series a group."""
    held = value or b""
    try:
        batch = describe_batch(held, series_max=series_max)
    except BadRecord as error:
        return RecordText(partition, offset, at_ms, len(held), reason=str(error), raw=raw(held))
    if batch.partition != partition:
        return RecordText(partition, offset, at_ms, len(held), batch, f"it was sealed for partition {batch.partition}")
    return RecordText(partition, offset, at_ms, len(held), batch)


def describe_letter(key: bytes, value: bytes, *, series_max: int | None = None) -> LetterText:
    """Describe the dead letter in these bytes. Raises `BadRecord` if they are none."""
    letter = codec.decode_letter(value)
    batch, held = None, letter.value or b""
    with suppress(BadRecord):
        batch = describe_batch(held, series_max=series_max)
    return LetterText(
        key.decode(errors="backslashreplace"),
        letter.partition,
        letter.offset,
        letter.at_ms,
        letter.reason,
        letter.view,
        batch,
        "" if batch else raw(held),
        len(held),
    )


def describe_entry(key: bytes | None, value: bytes | None, definitions: Definitions) -> EntryText:
    """Describe the changelog record, or store entry, of a key; a value of None is a tombstone."""
    try:
        if not key:
            raise BadRecord("it has no key")
        return _entry(key, value, definitions)
    except (BadRecord, NewerFormat, UnicodeDecodeError) as error:
        found = EntryText("foreign", value is None, reason=str(error), value=raw(value or b""))
        if key and key.startswith(TAG_PRODUCER):
            return msgspec.structs.replace(found, producer=fingerprint(key[1:].decode(errors="replace")))
        return msgspec.structs.replace(found, key=raw(key or b""))


def _entry(key: bytes, value: bytes | None, definitions: Definitions) -> EntryText:
    gone = value is None
    if key == POSITION_KEY:
        return EntryText(
            "position", gone, fields={} if value is None else msgspec.structs.asdict(codec.decode_position(value))
        )
    if key == FENCE_KEY:
        return EntryText("fence", gone, fields={} if value is None else msgspec.structs.asdict(codec.decode_fence(value)))
    if key[:1] == TAG_PRODUCER:
        name = fingerprint(key[1:].decode())
        fields = {} if value is None else msgspec.structs.asdict(codec.decode_folded(value))
        return EntryText("producer", gone, producer=name, fields=fields)
    if key[:1] not in (TAG_DEFINITION, TAG_SERIES):
        raise BadRecord("a key of nothing that this version knows")
    view, its_id, suffix = split_key(key)
    if key[:1] == TAG_DEFINITION:
        return _definition_entry(key, value, view, its_id)
    return _series_entry(value, view, its_id, suffix, definitions)


def _definition_entry(key: bytes, value: bytes | None, view: str, its_id: bytes) -> EntryText:
    if value is None:
        return EntryText("definition", True, view, its_id.hex())
    entry = codec.decode_definition(value)
    if definition_key(entry.definition) != key:
        raise BadRecord("its value is another definition than its key says")
    fields = {"series_count": entry.series_count, "defined_at_ms": entry.defined_at_ms}
    if entry.expired_before_ms:
        fields["expired_before_ms"] = entry.expired_before_ms
    definition = describe_definition(entry.definition)
    return EntryText("definition", view=view, definition_id=its_id.hex(), definition=definition, fields=fields)


def _series_entry(value: bytes | None, view: str, its_id: bytes, suffix: bytes, definitions: Definitions) -> EntryText:
    window_start_ms, values = parse_suffix(suffix)
    definition = definitions(definitions_prefix(view) + its_id)
    if definition is not None and len(definition.labels) != len(values):
        raise BadRecord(f"{len(values)} label values for labels {list(definition.labels)}")
    names = definition.labels if definition else tuple([str(number) for number in range(len(values))])
    labels = dict(zip(names, values, strict=True))
    if value is None:
        return EntryText("series", True, view, its_id.hex(), SeriesText(labels, None, None, window_start_ms))
    kind = codec.kind_of_entry(value)
    (state,) = codec.decode_states(kind, [value])
    series = SeriesText(labels, state, kind.answer(state), window_start_ms, codec.expires_at_ms(value))
    return EntryText("series", view=view, definition_id=its_id.hex(), series=series)
