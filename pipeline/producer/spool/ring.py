"""Segments of a ring: deltas as records of 16 bytes in shared memory, which outlives the process that wrote them.

A record is a value word and then a head word: the series and whether the value is an int, never 0. Whoever records takes
a number, stores the value, and stores the head last, so a record counts once its head is there. The reader passes over
numbers that were taken and have no head yet, remembers them, and looks at them again, so nobody waits for a thread that
was interrupted, and what it writes later is not lost.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import BufferFull, Invalid, Unavailable

RECORD_BYTES = 16
INT_FLAG = 1
"""The lowest bit of a head: the value is an int64, not a float64."""
VOID = 2**64 - 1
"""A head that says: nothing was recorded here."""
HOLED_MIN = 16
"""Segments that are kept, at least, only because a record in them was begun and not ended; see `Ring`."""
_RUN = 8_192
"""Records that are read at a time: no other thread runs meanwhile."""
FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def head_of(series_id: int, *, is_int: bool) -> int:
    """The head of records of a series."""
    return series_id << 1 | is_int


class Segment:
    """A part of the ring that is written now, or was. To record, in this order, with nothing between:

        i = segment.next(); segment.values[i] = value; segment.heads[i] = head

    (`ints` in place of `values` for an int64.) `IndexError`: it is full, and nothing was recorded; see `Spool.rotate`. After
    any other exception `segment.heads[i] = VOID`.
    """

    __slots__ = ("_count", "_map", "_parts", "capacity", "heads", "ints", "next", "number", "path", "values")

    def __init__(self, path: Path, number: int, size: int) -> None:
        self.path = path
        self.number = number
        self.capacity = size // RECORD_BYTES
        self._map = _reserve(path, size)
        words = memoryview(self._map)
        floats, ints, heads = words.cast("d"), words.cast("q"), words.cast("Q")
        self.values, self.ints, self.heads = floats[0::2], ints[0::2], heads[1::2]
        self._parts = (self.values, self.ints, self.heads, floats, ints, heads, words)
        self._count = count()
        self.next: Callable[[], int] = self._count.__next__
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            self.next = _locked(self.next)

    def reserved(self) -> int:
        """How many numbers were taken, at most `capacity`."""
        return min(int(repr(self._count)[6:-1]), self.capacity)  # the only way to look at a count without taking one

    def words(self) -> _Words:
        """What reading needs, also once it is retired."""
        return _Words(*self._parts[:3])

    def retire(self) -> None:
        """From now on whoever took a number here and has not stored its head finds it full, and records elsewhere."""
        self.heads = _NO_HEADS

    def flush(self) -> None:
        """Make it durable."""
        self._map.flush()

    def release(self) -> None:
        """Unmap it. Whoever still has it gets `ValueError`."""
        for part in self._parts:
            part.release()
        self._map.close()


_NO_HEADS = memoryview(bytearray()).cast("Q")


def _locked(take: Callable[[], int]) -> Callable[[], int]:
    lock = threading.RLock()

    def take_locked() -> int:
        with lock:
            return take()

    return take_locked


def _reserve(path: Path, size: int) -> mmap.mmap:
    """A file of zeros with all its blocks, mapped: a hole would be a bus error once the disk is full."""
    fd = -1
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(fd, 0, size)
        return mmap.mmap(fd, size)
    except BaseException as error:
        if fd >= 0:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            kind = BufferFull if error.errno in FULL_ERRNOS else Unavailable
            raise kind(f"the spool can't make a segment of {size} bytes: {error}") from error
        raise
    finally:
        if fd >= 0:
            os.close(fd)


def segment_path(folder: Path, number: int) -> Path:
    """Where a segment is."""
    return folder / f"ring-{number:08d}"


class Place(NamedTuple):
    """How far a segment was read: below `next_index` all but `holes`, which had no head yet."""

    number: int
    next_index: int
    holes: tuple[int, ...] = ()


Cursor = tuple[Place, ...]
"""How far a ring was read. A segment that is not named was read if a later one is, and not if none is."""

Records = dict[int, list[int | float]]
"""Values by series id."""


class _Words(NamedTuple):
    """What reading needs of a segment."""

    values: memoryview[float]
    ints: memoryview[int]
    heads: memoryview[int]


def read(words: _Words, place: Place, upper: int, records: Records) -> Place:
    """Add the records from `place` up to `upper`, and those of its holes that are no holes any more, to `records`."""
    groups: dict[int, list[int | float]] = defaultdict(list)
    holes: list[int] = []
    for i in place.holes:
        head = words.heads[i]
        if head:
            groups[head].append(words.ints[i] if head & INT_FLAG else words.values[i])
        else:
            holes.append(i)
    for start in range(place.next_index, upper, _RUN):
        run = slice(start, min(start + _RUN, upper))
        heads = words.heads[run].tolist()  # before the values: where there is a head, the value is there
        kinds = set(heads)
        if 0 in kinds:
            holes += [i for i, head in enumerate(heads, start) if not head]
        _group(heads, kinds, words, run, groups)
    groups.pop(0, None)
    groups.pop(VOID, None)
    for head, values in groups.items():
        known = records.setdefault(head >> 1, values)
        if known is not values:
            known += values
    return Place(place.number, max(upper, place.next_index), tuple(holes))


def _group(heads: list[int], kinds: set[int], words: _Words, run: slice, groups: dict[int, list[int | float]]) -> None:
    """Values by head. Most runs have floats only or ints only, and many only one series."""
    flags = {head & INT_FLAG for head in kinds - {0, VOID}}
    if len(flags) == 2:
        for head, value, whole in zip(heads, words.values[run].tolist(), words.ints[run].tolist(), strict=True):
            groups[head].append(whole if head & INT_FLAG else value)
        return
    values: list[Any] = words.ints[run].tolist() if INT_FLAG in flags else words.values[run].tolist()
    if len(kinds) == 1:
        groups[heads[0]] += values
    else:
        for head, value in zip(heads, values, strict=True):
            groups[head].append(value)


class Drain(NamedTuple):
    """What a read of the ring has found, and where it came to; `Ring.moved` makes that so."""

    records: Records
    places: tuple[Place, ...]


class Ring:
    """The segments of a process that records. `drain` is for one thread; `rotate` for any, also in signal handlers.

    A thread can be held up between taking a number and storing the head, for as long as many threads take their turns. Its
    segment is kept meanwhile, up to `holed_max` of them; the oldest beyond that is retired, and its holes are counted: a
    thread that goes on there after all finds it full, and records its delta anew.
    """

    def __init__(self, folder: Path, segment_bytes: int, holed_max: int = HOLED_MIN) -> None:
        self._holed_max = holed_max
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._numbers = count()
        self._segments: dict[int, Segment] = {}
        self._places: dict[int, Place] = {}
        self._committed: Cursor = ()
        self.given_up_count = 0
        """Records that were begun so long ago that nobody looks at them any more."""
        self.segment = self._make()

    def _make(self) -> Segment:
        number = next(self._numbers)
        segment = Segment(segment_path(self._folder, number), number, self._segment_bytes)
        self._segments[number] = segment
        self._places[number] = Place(number, 0)  # before anybody can record to it
        return segment

    @property
    def bytes_total(self) -> int:
        """Of all segments on disk."""
        return len(self._segments) * self._segment_bytes

    def rotate(self, full: Segment) -> None:
        """Publish a new segment in place of `full`, unless somebody did. The caller holds the spool's lock."""
        if self.segment is full:
            new = self._make()
            if self.segment is full:  # no call from here on: a signal handler can have been in `_make`
                self.segment = new

    def drain(self) -> Drain:
        """Read what is there. Nothing changes until `moved`."""
        records: Records = {}
        places: dict[int, Place] = {}
        for number, place in [*self._places.items()]:
            segment = self._segments[number]
            places[number] = read(segment.words(), place, segment.reserved(), records)
        holed = [place for place in places.values() if place.holes and self._is_past(place)]
        for place in holed[: max(0, len(holed) - self._holed_max)]:
            segment = self._segments[place.number]
            segment.retire()  # first: what is stored until then is read here, and what is not never will be
            behind = read(segment.words(), place, place.next_index, records)
            self.given_up_count += len(behind.holes)
            places[place.number] = behind._replace(holes=())
        return Drain(records, tuple(places.values()))

    def moved(self, drain: Drain) -> None:
        """What `drain` has found is in its caller's hands."""
        self._places.update({place.number: place for place in drain.places})

    def cursor(self) -> Cursor:
        """How far the ring was read: what a commit says."""
        places = [*self._places.values()]  # one call: others add segments meanwhile
        last = max([place.number for place in places])
        return tuple([place for place in places if place.number == last or not self._is_done(place)])

    def _is_past(self, place: Place) -> bool:
        return place.number < self.segment.number and place.next_index >= self._segments[place.number].reserved()

    def _is_done(self, place: Place) -> bool:
        return self._is_past(place) and not place.holes

    def committed(self, cursor: Cursor) -> None:
        """Delete what lies before a cursor that is durable."""
        self._committed = cursor
        kept = {place.number for place in cursor}
        last = max(kept, default=-1)
        for number in [number for number in [*self._segments] if number < last and number not in kept]:
            segment = self._segments.pop(number)  # whoever still has it finds it full
            self._places.pop(number, None)
            segment.path.unlink(missing_ok=True)

    def passed(self, number: int, index: int) -> bool:
        """Whether the committed cursor is beyond this place, holes included."""
        for place in self._committed:
            if place.number < number or (place.number == number and place.next_index < index):
                return False
            if place.number == number and any(hole < index for hole in place.holes):
                return False
        return max([place.number for place in self._committed], default=-1) >= number

    def segments(self) -> list[Segment]:
        """All that are not deleted."""
        return [*self._segments.values()]

    def waiting_count(self) -> int:
        """Records that are not committed, about."""
        committed = {place.number: place.next_index - len(place.holes) for place in self._committed}
        segments = [*self._segments.values()]
        return sum([max(0, segment.reserved() - committed.get(segment.number, 0)) for segment in segments])

    def sync(self) -> None:
        """Make all segments durable."""
        for segment in [*self._segments.values()]:
            segment.flush()

    def shut(self) -> None:
        """No more recording: whoever tries finds the segment full, and asks for another."""
        self.segment = _SHUT

    def release(self) -> None:
        """Unmap all segments."""
        for segment in [*self._segments.values()]:
            segment.release()
        self._segments, self._places = {}, {}
        self.segment = _SHUT


class _Shut(Segment):
    """A segment in which nothing can be recorded."""

    __slots__ = ()

    def __init__(self) -> None:
        self.number = 2**62
        self.capacity = 0
        nothing = memoryview(bytearray())
        self.values = self.ints = self.heads = nothing.cast("Q")  # type: ignore[assignment]
        self._parts = ()  # type: ignore[assignment]
        self._count = count()
        self.next = self._count.__next__


_SHUT = _Shut()


def read_file(path: Path, place: Place, records: Records) -> tuple[int, Place]:
    """The records that a process left in a segment: what `read` does, for all of it. How many holes, and the place behind.

    Numbers that were taken and never got a head lie between records; nobody was told that they were recorded.
    """
    with path.open("rb") as file:
        data = memoryview(file.read())
    data = data[: len(data) // RECORD_BYTES * RECORD_BYTES]
    words = _Words(data.cast("d")[0::2], data.cast("q")[0::2], data.cast("Q")[1::2])
    size = len(words.heads)
    index = min(place.next_index, size)
    upper = max(index, -(-len(data.tobytes().rstrip(b"\0")) // RECORD_BYTES))
    holes = tuple([i for i in place.holes if i < size])
    behind = read(words, Place(place.number, index, holes), upper, records)
    return len(behind.holes), behind


def segment_numbers(folder: Path) -> Sequence[int]:
    """The segments of a slot, in order."""
    numbers = [path.name.removeprefix("ring-") for path in folder.glob("ring-*")]
    return sorted([int(number) for number in numbers if number.isdecimal()])


def segment_size(size: int) -> int:
    """`size` as a whole number of pages; `Invalid` if it is none."""
    pages = size // mmap.PAGESIZE
    if pages < 1:
        raise Invalid(f"a segment has at least {mmap.PAGESIZE} bytes, got {size}")
    return pages * mmap.PAGESIZE
