"""Keys of dead letters, and the producer ids under which they are replayed.

    [TOPIC.]PARTITION-OFFSET          a record that was refused as a whole
    [TOPIC.]PARTITION-OFFSET-INDEX    one group of a batch; of a letter with several groups that is replayed, one more index

TOPIC stands for the topic of the record: one that is made anew has the same offsets again, and other records at them. A
letter is replayed as a batch of its own producer, of one sequence, so that it counts once, however often that is done. A
letter that is refused again comes back under its own key, and leaves its producer as it was: it can be replayed again.
"""

from __future__ import annotations

import re

import msgspec

from pipeline.core import codec
from pipeline.core.codec import DeadLetter, Received
from pipeline.core.parts import with_producer
from pipeline.core.record import Origin, fingerprint
from pipeline.errors import BadRecord

_PRODUCER = "letter:"
KEY_PATTERN = r"([0-9a-f]{8}[.])?(0|[1-9][0-9]{0,9})-(0|[1-9][0-9]{0,18})(-(0|[1-9][0-9]{0,18})){0,2}"
_DASHES_MAX = 3
OFFSET_MAX = 2**63 - 1
"""Greatest offset of all, at which no log has a record."""
_KEY = re.compile(KEY_PATTERN + r"\Z")


def record_key(partition: int, offset: int, source_id: str = "") -> bytes:
    """Return the key of a record that was refused as a whole, in the topic with this id."""
    topic = f"{fingerprint(source_id)}." if source_id else ""
    return f"{topic}{partition}-{offset}".encode()


def group_key(record: bytes, index: int) -> bytes:
    """Return the key of one group of the record, or letter, that has this key."""
    return b"%b-%d" % (record, index)


def no_letter_key(partition: int) -> bytes:
    """Return a key that no letter has: a tombstone of it says nothing to any reader, of earlier versions either."""
    return record_key(partition, OFFSET_MAX)


def is_last_key(key: bytes) -> bool:
    """Return whether a letter of this key has so many indexes that no group of it has a key of its own."""
    return key.count(b"-") == _DASHES_MAX


def letter_producer(key: bytes) -> str:
    """Return the producer id under which the dead letter of this key is replayed."""
    return _PRODUCER + key.decode()


def is_letter_producer(producer_id: str) -> bool:
    """Return whether a producer id is one under which a dead letter is replayed."""
    return producer_id.startswith(_PRODUCER)


def letter_key(producer_id: str, partition: int) -> bytes | None:
    """Return the key of the dead letter of `partition` that a producer replays; None if the producer replays none."""
    key = producer_id.removeprefix(_PRODUCER)
    if key == producer_id or partition_of_key(key) != partition:
        return None
    return key.encode()


def partition_of_key(key: str) -> int | None:
    """Return the partition of the letter that has this key; None if no letter can have it."""
    match = _KEY.match(key)
    return int(match[2]) if match else None


def refused_key(received: Received | BadRecord, partition: int, offset: int, source_id: str) -> bytes:
    """Return the key of a record that is refused: its own, or that of the letter that it replays."""
    replayed = None if isinstance(received, BadRecord) else letter_key(received.batch.producer_id, partition)
    return replayed or record_key(partition, offset, source_id)


def replaying(key: bytes, letter: DeadLetter, *, forgotten: bool = False) -> bytes:
    """Return the batch that replays a letter. Raises `BadRecord` if the letter can't be replayed.

    The replay of a whole batch names that batch as its origin, so that the task leaves the replay out if it has counted the
    batch after all. A task that has forgotten the batch's producer can't know, and refuses the letter again; with
    `forgotten` the replay names no origin, and counts.
    """
    if letter.value is None:
        raise BadRecord("its bytes were too many for the dead-letter topic, and are not there")
    received = codec.receive_batch(letter.value)
    batch = received.batch
    if batch.controls:
        raise BadRecord("it is an order to drop or reset views, which would take effect now, not then: give it anew")
    if batch.partition != letter.partition:
        raise BadRecord(
            f"it was sealed for partition {batch.partition} and found in {letter.partition}: a copy, and whether the batch "
            "was counted in its own partition can't be told here"
        )
    match, producer_id, origin = _KEY.match(key.decode()), letter_producer(key), None
    if match is None:
        raise BadRecord("no letter has such a key")
    if batch.producer_id == producer_id:  # refused before when it was replayed
        origin = batch.origin
    elif match[4] is None:
        origin = Origin(batch.producer_id, batch.sequence)
    return with_producer(received, producer_id, None if forgotten else origin)


class Held(msgspec.Struct, frozen=True):
    """Summary of a letter."""

    producer: str
    """Fingerprint of the producer."""
    group_count: int
    series_count: int


class _Batch(msgspec.Struct, array_like=True, frozen=True):
    producer_id: str
    epoch: int
    sequence: int
    floor: int
    created_at_ms: int
    closing: bool
    origin: Origin | None
    controls: msgspec.Raw
    groups: list[tuple[msgspec.Raw, msgspec.Raw, msgspec.Raw]]


_decode = msgspec.msgpack.Decoder(_Batch).decode


def held(value: bytes | None) -> Held | None:
    """Return the summary of a letter, without decoding its series; None if it holds no batch."""
    try:
        codec.check_sealed(value or b"")
        batch = _decode(memoryview(value or b"")[codec.HEAD_BYTES :])
    except (BadRecord, msgspec.MsgspecError, ValueError, RecursionError):
        return None
    sender = batch.producer_id if batch.origin is None else batch.origin.producer_id
    return Held(fingerprint(sender), len(batch.groups), sum([_array_size(bytes(it[1])) for it in batch.groups]))


def _array_size(encoded: bytes) -> int:
    """Return the number of items that an encoded array declares."""
    first = encoded[0]
    if first in (0xDC, 0xDD):
        return int.from_bytes(encoded[1 : 3 if first == 0xDC else 5], "big")
    return first & 0x0F if first & 0xF0 == 0x90 else 0


def shorten(value: bytes | None, bytes_max: int) -> bytes | None:
    """Return an encoded dead letter, without the bytes of its record if it is longer than `bytes_max` with them."""
    if value is None or len(value) <= bytes_max:
        return value
    letter = codec.decode_letter(value)
    left_out = f"left out: its {len(letter.value or b'')} bytes, too many for the dead-letter topic"
    return codec.encode_letter(msgspec.structs.replace(letter, reason=f"{letter.reason}; {left_out}", value=None))
