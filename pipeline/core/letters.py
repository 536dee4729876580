"""The identities of dead letters: what was refused has a key, and is replayed under an id of that key.

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
from pipeline.core.record import Origin, fingerprint
from pipeline.errors import BadRecord

_PRODUCER = "letter:"
KEY_PATTERN = r"([0-9a-f]{8}[.])?(0|[1-9][0-9]{0,9})-(0|[1-9][0-9]{0,18})(-(0|[1-9][0-9]{0,18})){0,2}"
_KEY = re.compile(KEY_PATTERN + r"\Z")


def record_key(partition: int, offset: int, source_id: str = "") -> bytes:
    """The key of a record that was refused as a whole, of the topic with this id."""
    topic = f"{fingerprint(source_id)}." if source_id else ""
    return f"{topic}{partition}-{offset}".encode()


def group_key(record: bytes, index: int) -> bytes:
    """The key of one group of a record, or of a letter, of this key."""
    return b"%b-%d" % (record, index)


def letter_producer(key: bytes) -> str:
    """The id under which the dead letter of this key is replayed."""
    return _PRODUCER + key.decode()


def is_letter_producer(producer_id: str) -> bool:
    """Whether only what replays a dead letter has such an id."""
    return producer_id.startswith(_PRODUCER)


def letter_key(producer_id: str, partition: int) -> bytes | None:
    """The key of the dead letter of `partition` that a producer of this id replays; None if it replays none."""
    key = producer_id.removeprefix(_PRODUCER)
    if key == producer_id or partition_of_key(key) != partition:
        return None
    return key.encode()


def partition_of_key(key: str) -> int | None:
    """The partition that the letter of this key is of; None if no letter has such a key."""
    match = _KEY.match(key)
    return int(match[2]) if match else None


def refused_key(received: Received | BadRecord, partition: int, offset: int, source_id: str) -> bytes:
    """The key under which a record that was received is refused: what replays a letter keeps that letter's."""
    replayed = None if isinstance(received, BadRecord) else letter_key(received.batch.producer_id, partition)
    return replayed or record_key(partition, offset, source_id)


def replaying(key: bytes, letter: DeadLetter, *, forgotten: bool = False) -> bytes:
    """Return the batch that replays a letter; `BadRecord`, saying why, if the letter can't be replayed.

    What was refused as a whole names the batch that it was, so that the task leaves it out if that one was counted after
    all. If the task has forgotten who sent it, it can't tell, and refuses the letter again; with `forgotten` the letter
    does not name it, and counts.
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
    return codec.with_producer(received, producer_id, None if forgotten else origin)


class Held(msgspec.Struct, frozen=True):
    """What a letter holds, in short."""

    producer: str
    """The fingerprint of who sent it."""
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
    """Return what the batch in a letter holds, without decoding its series; None if there is none."""
    try:
        codec.check_sealed(value or b"")
        batch = _decode(memoryview(value or b"")[codec.HEAD_BYTES :])
    except (BadRecord, msgspec.MsgspecError, ValueError, RecursionError):
        return None
    sender = batch.producer_id if batch.origin is None else batch.origin.producer_id
    return Held(fingerprint(sender), len(batch.groups), sum([_array_size(bytes(it[1])) for it in batch.groups]))


def _array_size(encoded: bytes) -> int:
    """How many items an encoded array says that it has."""
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
