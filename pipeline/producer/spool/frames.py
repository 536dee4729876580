"""Records in a file that is only appended to: each behind its length, checksums and type.

    [payload length u32][CRC-32 of the payload u32][CRC-32 of this head u32][type u8][payload], little endian

Both checksums start from the record's place in the file, so no bytes are a record anywhere else, whatever they hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from struct import Struct
from typing import NamedTuple
from zlib import crc32

from pipeline.errors import BadRecord

HEAD = Struct("<IIIB")
PAYLOAD_BYTES_MAX = 2**31
_BLOCK_BYTES = 2**20
_MAYBE_HEAD = re.compile(rb"(?s)(?=.{12}[\x01-\x1f])")


class Tail(NamedTuple):
    """Where the whole records of a file end, and what is behind them."""

    end: int
    torn_bytes: int = 0
    """Of a record whose writer died before it was whole: nobody was told that it was written."""
    corrupt: str = ""
    """What is wrong with a record that others follow; empty: nothing."""


def frame(kind: int, payload: bytes, place: int) -> bytes:
    """A record as it stands in the file at `place`."""
    if len(payload) >= PAYLOAD_BYTES_MAX:
        raise BadRecord(f"a record of {len(payload)} bytes; at most {PAYLOAD_BYTES_MAX}")
    return _head(len(payload), _checksum(payload, place), kind, place) + payload


def _head(length: int, crc: int, kind: int, place: int) -> bytes:
    check = crc32(b"%d %d %d %d" % (length, crc, kind, place))
    return HEAD.pack(length, crc, check, kind)


def _checksum(payload: bytes, place: int) -> int:
    return crc32(payload, place & 0xFFFFFFFF)


def scan(fd: int, take: Callable[[int, int, bytes], None]) -> Tail:
    """Call `take(kind, place of the payload, payload)` for each whole record, in order; where they end.

    Stops at the first that is not whole, or that `take` raises `BadRecord` for. Holds one record at a time.
    """
    size = os.fstat(fd).st_size
    place = 0
    while place < size:
        head = os.pread(fd, HEAD.size, place)
        if len(head) < HEAD.size:
            return Tail(place, size - place)
        length, crc, _, kind = HEAD.unpack(head)
        start = place + HEAD.size
        if head != _head(length, crc, kind, place) or length >= PAYLOAD_BYTES_MAX:
            return _broken(fd, place, size)
        if start + length > size:
            return Tail(place, size - place)
        payload = os.pread(fd, length, start)
        if _checksum(payload, place) != crc:
            return _broken(fd, place, size)
        try:
            take(kind, start, payload)
        except BadRecord as error:
            return Tail(place, 0, f"byte {place}: {error}")
        place = start + length
    return Tail(place)


def _broken(fd: int, place: int, size: int) -> Tail:
    """The last record, if no other begins behind its first byte. Reads that far once, block by block."""
    begin = place + 1
    while begin < size:
        block = os.pread(fd, _BLOCK_BYTES + HEAD.size - 1, begin)
        for found in _MAYBE_HEAD.finditer(block):
            head = block[found.start() : found.start() + HEAD.size]
            length, crc, _, kind = HEAD.unpack(head)
            if head == _head(length, crc, kind, begin + found.start()):
                return Tail(place, 0, f"byte {place}: wrong checksum")
        begin += _BLOCK_BYTES
    return Tail(place, size - place)
