"""Rings: deltas as records in files that are mapped into memory, which outlive the process that wrote them.

A ring is a sequence of segments, files of one size. All numbers are little endian. A segment begins with

    magic "PIPERNG3" | fingerprint, 8 bytes | ring u32 | size u32 | number u64 | crc32c u32 of all before | 0 u32

and records follow, each at a multiple of 8 bytes:

    header u64: length of the payload | crc32c << 32
    word   u64: series id << 2 | type (0 delta, 1 definition, 2 series, 3 end)
    payload, at least 1 byte; zeros up to a multiple of 8

The checksum is over offset u32, length u32, word and payload, and goes on from the checksum of the segment's beginning: so
no bytes are a record in any other place. The header is stored last, in one piece: a record counts once it is there. A header
of zero is where a ring ends; a header that does not fit its record is damage, never an unfinished write. The last record of
a segment that others follow says so: its word is 3, its payload C0.

Payloads are msgpack. Of a delta: a number (ints beyond 64 bits as in batches), or [ts_ms, recorded_ns, value]. Of a
definition, whose number is its word's id: the definition. Of a series: [number of its definition, suffix]. These two are in
ring 0 only.
"""

from __future__ import annotations

import mmap
import os
import re
from os import getpid
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple, Protocol

import msgspec
from google_crc32c import extend, value

from pipeline.core.kinds import to_wire

DELTA, DEFINITION, SERIES, _LAST = range(4)
MAGIC = b"PIPERNG3"
HEADER = Struct("<8s8sIIQII")
_COVERED = Struct("<IIQ")
_WORD = Struct("<Q")
_END_WORD, _END = _LAST, b"\xc0"
_END_BODY = _END_WORD.to_bytes(8, "little") + _END
END_BYTES = 24
encode = msgspec.msgpack.Encoder().encode


def encode_delta(delta: Any) -> bytes:
    """Return the payload of a delta: a number, or the triple of a `last` view."""
    try:
        return encode(delta)
    except OverflowError:
        return encode(to_wire([*delta]) if type(delta) is tuple else to_wire([delta])[0])


class RingPosition(NamedTuple):
    """A place in a ring: everything before it was recorded before."""

    number: int
    offset: int


def segment_path(folder: Path, ring: int, number: int) -> Path:
    """Return the path of a segment."""
    return folder / f"ring-{ring:03d}-{number:08d}"


def segment_name(path: Path) -> tuple[int, int] | None:
    """Return the ring and the number in a file's name; None if it is no segment's."""
    found = re.fullmatch(r"ring-(\d{3,})-(\d{8,})", path.name)
    return (int(found[1]), int(found[2])) if found else None


def segment_header(fingerprint: bytes, ring: int, number: int, size: int) -> tuple[bytes, int]:
    """Return the header of a segment, and the checksum in it, from which those of its records go on."""
    head = HEADER.pack(MAGIC, fingerprint, ring, size, number, 0, 0)[:-8]
    checksum = value(head)
    return HEADER.pack(MAGIC, fingerprint, ring, size, number, checksum, 0), checksum


class Segment:
    """A segment that is written, or will be: by a `Ring`, or by the native table. It is unmapped once nobody has it."""

    __slots__ = ("bytes", "limit", "number", "offset", "seed", "words")

    def __init__(self, path: Path, fingerprint: bytes, ring: int, number: int, size: int) -> None:
        """Make the file, with all its blocks: a hole would be a bus error once the disk is full. Raises `OSError`."""
        path.unlink(missing_ok=True)  # a file that is there was never used: no transaction has named it
        head, self.seed = segment_header(fingerprint, ring, number, size)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
                mapped = mmap.mmap(fd, size)
            finally:
                os.close(fd)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self.number = number
        self.bytes = memoryview(mapped)
        self.words = self.bytes.cast("Q")
        self.bytes[: len(head)] = head
        self.offset = len(head)
        """The place of the next record."""
        self.limit = size - END_BYTES
        """The end of the room for records; behind it is room for the one that ends the segment."""


class _NoSegment:
    """The segment of a ring that has none yet: no record fits."""

    number, offset, limit, seed = -1, 0, 0, 0


class _SeriesSlot(Protocol):
    out: bool
    """True once the series is not recorded by this number any more."""


class Ring:
    """The writer of a ring. One thread at a time; with the GIL any, also in a signal handler that interrupts a write.

    A record is written by a few statements without a call. Between those the interpreter runs nothing else: no signal
    handler, finaliser or thread. A record that was written just before has moved the ring's end, which is checked first.
    """

    out = False

    def __init__(self) -> None:
        self.segment: Any = _NoSegment
        self._pid = getpid()

    def append(
        self, word: int, payload: bytes, queue: Any = None, items: Any = (None,), slot: _SeriesSlot | None = None
    ) -> bool:
        """Write a record and append the one of `items` to `queue`, both or neither.

        Return False if there is no room, or if `slot` is out.
        """
        whose = self if slot is None else slot
        queue = [] if queue is None else queue
        while True:
            segment = self.segment
            offset, length = segment.offset, len(payload)
            covered = _COVERED.pack(offset, length, word) + payload
            header = extend(segment.seed, covered) << 32 | length
            end, place, body = offset + 16 + length, slice(offset + 8, offset + 16 + length), covered[8:]
            is_own = getpid() == self._pid  # also of a fork that Python has not seen
            queue += items
            # From here on there is no call, and no new object that could start the garbage collector.
            if end > segment.limit or whose.out or not is_own:
                del queue[-1]
                return False
            if segment.offset == offset and self.segment is segment:
                segment.bytes[place] = body
                segment.words[offset >> 3] = header  # last: the header makes the record valid
                segment.offset = end + 7 & -8
                return True
            del queue[-1]

    def adopt(self, new: Segment) -> None:
        """Go on in another segment, unless it is an older one."""
        while self.segment.number < new.number:
            old = self.segment
            offset = old.offset
            header = extend(old.seed, _COVERED.pack(offset, len(_END), _END_WORD) + _END) << 32 | len(_END)
            place = slice(offset + 8, offset + 8 + len(_END_BODY))
            # As above.
            if self.segment is old and old.offset == offset:
                if old.limit:
                    old.bytes[place] = _END_BODY
                    old.words[offset >> 3] = header
                    old.limit = 0
                self.segment = new

    def end(self) -> RingPosition | None:
        """Return where the ring ends; None if nothing was ever recorded."""
        segment = self.segment
        number, offset = segment.number, segment.offset
        return RingPosition(number, offset) if number >= 0 else None


class Scan(NamedTuple):
    """The records of a segment from some place on."""

    records: list[tuple[int, bytes]]
    """Words and payloads, in order."""
    end: int
    """The place where the last one ends."""
    ended: bool
    """True if there is a record that ends the segment: others follow in the next one."""
    torn_bytes: int
    """Bytes of a record that was half written when the process died. No caller was told that it was recorded."""
    damages: list[str]


def scan(data: bytes, seed: int, start: int) -> Scan:
    """Read the records from `start`. Records behind damage are found again, because each has its own checksum."""
    records: list[tuple[int, bytes]] = []
    damages: list[str] = []
    offset, torn_bytes = start, 0
    written = len(data.rstrip(b"\0"))
    while offset < written:
        found = _record(data, seed, offset)
        if found is None:
            following = next((i for i in range(offset + 8, written, 8) if _record(data, seed, i) is not None), None)
            if following is None and offset + 8 <= len(data) and not _WORD.unpack_from(data, offset)[0]:
                torn_bytes = written - offset
                break
            damages.append(f"no record at byte {offset}, and none up to {following or len(data)}")
            if following is None:
                break
            offset = following
            continue
        word, payload, offset = found
        if word == _END_WORD:
            return Scan(records, offset, True, 0, damages)
        records.append((word, payload))
    return Scan(records, offset, False, torn_bytes, damages)


def _record(data: bytes, seed: int, offset: int) -> tuple[int, bytes, int] | None:
    """Return word and payload of a record, and where it ends; None if there is none."""
    if offset + 16 > len(data):
        return None
    header, word = _WORD.unpack_from(data, offset)[0], _WORD.unpack_from(data, offset + 8)[0]
    length = header & 0xFFFFFFFF
    end = offset + 16 + length
    if not header or end > len(data):
        return None
    payload = data[offset + 16 : end]
    if extend(seed, _COVERED.pack(offset, length, word) + payload) != header >> 32:
        return None
    return word, payload, end + 7 & -8
