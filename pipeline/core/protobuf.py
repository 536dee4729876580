"""The wire format of Protocol Buffers, as far as the messages of Prometheus need it: no groups, no generated code.

A message is the concatenation of its fields, so the functions that write a field return bytes to be joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct

from pipeline.errors import BadRecord

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types of fields."""
_FIXED = {FIXED64: 8, FIXED32: 4}
_DOUBLE = Struct("<d")
_VARINT_BYTES_MAX = 10

Value = int | bytes
"""Value of a field: the 64 bits of a varint, or bytes."""


def varint(value: int) -> bytes:
    """Return an int as a varint; a negative one as its two's complement of 64 bits."""
    value &= 2**64 - 1
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def zigzag(value: int) -> bytes:
    """Return an int as a varint of the types `sint32` and `sint64`."""
    return varint(value << 1 if value >= 0 else ~(value << 1))


def int_field(number: int, value: int) -> bytes:
    """Return a field of an integral type, of an enum or of a bool."""
    return varint(number << 3 | VARINT) + varint(value)


def sint_field(number: int, value: int) -> bytes:
    """Return a field of type `sint32` or `sint64`."""
    return varint(number << 3 | VARINT) + zigzag(value)


def double_field(number: int, value: float) -> bytes:
    """Return a field of type `double`."""
    return varint(number << 3 | FIXED64) + _DOUBLE.pack(value)


def bytes_field(number: int, value: bytes) -> bytes:
    """Return a field of type `bytes`, `string` or of a message, or a packed repeated one."""
    return varint(number << 3 | BYTES) + varint(len(value)) + value


def packed_sints(number: int, values: Sequence[int]) -> bytes:
    """Return a packed repeated field of type `sint32` or `sint64`; nothing without values."""
    return bytes_field(number, b"".join(map(zigzag, values))) if values else b""


def packed_doubles(number: int, values: Sequence[float]) -> bytes:
    """Return a packed repeated field of type `double`; nothing without values."""
    return bytes_field(number, b"".join(map(_DOUBLE.pack, values))) if values else b""


def text_field(number: int, value: str) -> bytes:
    """Return a field of type `string`."""
    return bytes_field(number, value.encode())


def fields(message: bytes) -> Iterator[tuple[int, int, Value]]:
    """Yield number, wire type and value of each field of untrusted bytes. Raises `BadRecord` where they are no message.

    Nested messages are values of type `BYTES`, so nothing here recurses.
    """
    at, end = 0, len(message)
    while at < end:
        key, at = read_varint(message, at)
        number, wire_type = key >> 3, key & 7
        if not 0 < number < 2**29:
            raise BadRecord(f"protobuf: a field with number {number}")
        value: Value
        if wire_type == VARINT:
            value, at = read_varint(message, at)
        else:
            if wire_type == BYTES:
                size, at = read_varint(message, at)
            elif wire_type in _FIXED:
                size = _FIXED[wire_type]
            else:
                raise BadRecord(f"protobuf: field {number} has wire type {wire_type}")
            if size > end - at:
                raise BadRecord(f"protobuf: field {number} has {size} bytes, of which {end - at} are there")
            value = message[at : at + size]
            at += size
        yield number, wire_type, value


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint at a place of untrusted bytes, and the place behind it. Raises `BadRecord` if there is none."""
    value = shift = 0
    for byte in data[at : at + _VARINT_BYTES_MAX]:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            if value >= 2**64:
                break
            return value, at + shift // 7
    raise BadRecord("protobuf: a number that is cut off, or of over 64 bits")


def signed(value: int) -> int:
    """Return the `int64` that the 64 bits of a varint stand for."""
    return value - 2**64 if value >= 2**63 else value


def zigzagged(value: int) -> int:
    """Return the `sint32` or `sint64` that a varint stands for."""
    return value >> 1 ^ -(value & 1)
