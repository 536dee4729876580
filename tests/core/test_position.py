"""Position and fence records: their bytes are fixed for good, and noise is neither, nor a newer program's record."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.codec import (
    FORMAT,
    VERSION,
    decode_fence,
    decode_position,
    encode_fence,
    encode_position,
    newer_position,
)
from pipeline.core.record import EPOCH_NONE, Fence, Position
from pipeline.errors import BadRecord, NewerFormat

OFFSETS = st.integers(0, 2**63 - 1)
POSITIONS = st.builds(
    Position,
    *(OFFSETS, OFFSETS, OFFSETS, st.text(), OFFSETS),
    *(st.integers(EPOCH_NONE, 2**31 - 1), OFFSETS, OFFSETS, OFFSETS, st.text()),
)
LATER = bytes((FORMAT + 1,))


def test_the_bytes_of_both() -> None:
    """The bytes of both stand in changelogs and never change."""
    position = Position(42, 1_700_000_000_123, 1_700_000_000_000, "topic", 7, 3, 42, 100, 98, "pipeline-0:x")
    assert encode_position(position).hex() == (
        "029a2acf0000018bcfe5687bcf0000018bcfe56800a5746f70696307032a6462ac706970656c696e652d303a78"
    )
    assert encode_fence(Fence("pipeline-0:x", 1_700_000_000_123)).hex() == "0292ac706970656c696e652d303a78cf0000018bcfe5687b"


@given(POSITIONS)
def test_what_is_written_is_read(position: Position) -> None:
    """A record is read by this program, and recognised as a newer program's by an older one, whatever fields follow."""
    value = encode_position(position)
    assert decode_position(value) == position
    assert newer_position(value) is None
    more = msgspec.msgpack.encode([*msgspec.structs.astuple(position), "more", {"and": ["more"]}])
    for later in (LATER + value[1:], LATER + more):
        assert newer_position(later) == position
        with pytest.raises(NewerFormat):
            decode_position(later)
    with pytest.raises(BadRecord):
        decode_position(VERSION + more)


@given(POSITIONS, st.data())
def test_a_part_of_one_is_none(position: Position, data: st.DataObject) -> None:
    """A part of a record is none, nor is a record with extra bytes or missing fields."""
    value = encode_position(position)
    for broken in (value[: data.draw(st.integers(0, len(value) - 1))], value + b"\x00"):
        with pytest.raises(BadRecord):
            decode_position(broken)
        assert newer_position(LATER + broken[1:]) is None
    fields = msgspec.structs.astuple(position)[: data.draw(st.integers(0, 8))]
    with pytest.raises(BadRecord):
        decode_position(VERSION + msgspec.msgpack.encode(fields))
    assert newer_position(LATER + msgspec.msgpack.encode(fields)) is None


@given(st.binary(max_size=60))
def test_noise_is_nothing(noise: bytes) -> None:
    """Noise is no record, with a version in front of it or not; whatever is read encodes to the same bytes."""
    for value in (noise, VERSION + noise):
        for decode, encode in ((decode_position, encode_position), (decode_fence, encode_fence)):
            try:
                found = decode(value)
            except BadRecord:
                continue
            assert decode(encode(found)) == found  # type: ignore[operator]


@pytest.mark.parametrize("field", range(9))
def test_numbers_out_of_range(field: int) -> None:
    """An offset below 0 or beyond 63 bits is refused."""
    good = [*msgspec.structs.astuple(Position(1, 2, 3, "s", 4, 5, 6, 7, "o"))]
    for bad in (-2, 2**63, None, 1.5, b"x", []):
        with pytest.raises(BadRecord):
            decode_position(VERSION + msgspec.msgpack.encode([*good[:field], bad, *good[field + 1 :]]))
