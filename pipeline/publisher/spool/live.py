"""The spool of a process that records: its slot, from the first delta until everything is acknowledged."""

from __future__ import annotations

import os
import sys
import threading
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.sequence import Sealed
from pipeline.errors import BufferFull, Invalid, PipelineError, Unavailable
from pipeline.publisher.batching import Pending
from pipeline.publisher.spool.database import FORMAT, Database, Rings, Root, create, encode_pending
from pipeline.publisher.spool.ring import (
    DEFINITION,
    END_BYTES,
    HEADER,
    SERIES,
    Ring,
    RingPosition,
    Segment,
    encode,
    segment_path,
)
from pipeline.publisher.spool.slot import explained, make_slot, open_folder, publish_slot, remove_slot, sweep, sync

T = TypeVar("T")
SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX = 2**17, 2**20
"""A segment has room for the longest text of a `last` view."""
_OWN = 0
"""The ring that definitions and series are recorded to; that of shard `n` is `n + 1`."""
_WAIT_S, _WAITS = 1.0, 60
"""Length in seconds, and number, of the waits of a thread for the disk."""


def run_uninterrupted(work: Callable[[], T]) -> T:
    """Do `work` in a thread of its own, where no signal handler runs, and return its result or raise its error.

    A signal handler or finaliser that runs in the calling thread meanwhile may need the same work: it finds nothing half
    done.
    """
    done, pid = allocate_lock(), os.getpid()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    done.acquire()
    try:
        start_new_thread(run, ())
    except RuntimeError:  # the interpreter is ending, or the system has no more threads
        return work()
    for _ in range(_WAITS):
        if done.acquire(timeout=_WAIT_S):
            break
        if os.getpid() != pid:  # a handler has forked
            raise Unavailable("this process was forked while it waited for its parent's spool")
    else:
        raise Unavailable(f"the disk does not answer for {_WAITS * _WAIT_S:.0f} s")
    if errors:
        raise errors[0]
    return results[0]


def _ring_lock() -> AbstractContextManager[Any]:
    """Return what guards a `Ring`: nothing where the GIL does."""
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    return nullcontext() if has_gil else threading.RLock()


class Spool:
    """The files to which this process records. Safe from any thread, unless a method says otherwise.

    The table records to rings, one for each of its shards, in one `segment` after the other. The flusher drains and seals,
    and `commit` states in which batches everything is that was recorded before some positions. Only committed batches may
    be sent; those that the log has accepted are acknowledged. When the process dies, another one claims the slot as an
    `Orphan`.

    Recording is refused (`BufferFull`) beyond three quarters of `bytes_max`. The rest is for commits and acknowledgements,
    which `bytes_max` never refuses: a commit makes room, because the segments that it covers go.
    """

    def __init__(
        self,
        folder: Path,
        producer_id: str,
        *,
        bytes_max: int,
        ends: Callable[[], Mapping[int, tuple[int, int]]],
        segment_bytes: int = 0,
        fsync: bool = False,
        secret: str = "",
        name: str = "",
    ) -> None:
        """Make a slot for this process, which nobody else touches while the process lives.

        `ends` returns where the rings of shards end now. `secret` proves that the id is the producer's; `name` is the name
        of the slot, which others may see. With `fsync`, a commit is on the disk when it returns, and `sync` writes the rest.
        Raises
        `Invalid` for a folder that is no spool or of another version, and if there is a slot of this name; `BufferFull` if
        the disk is full.
        """
        size = segment_bytes or min(SEGMENT_BYTES_MAX, max(SEGMENT_BYTES_MIN, bytes_max // 64))
        size -= size % os.sysconf("SC_PAGESIZE")
        if not 0 < 4 * size <= bytes_max:
            raise Invalid(f"a spool of {bytes_max} bytes has no room for 4 segments of {size}")
        self._bytes_max, self._fsync, self._pid = bytes_max, fsync, os.getpid()
        self._closed = False
        self._shard_ends = ends
        self._last: dict[int, Segment] = {}
        """By ring, the segment that was made last and is used, or will be at once."""
        self._spares: dict[int, Segment] = {}
        self._synced: dict[int, int] = {}
        self._is_full = False
        """True once recording was refused, until there is room again."""
        self._ids = count(1)
        self._own = Ring()
        self._own_lock = _ring_lock()
        self._definitions: dict[bytes, int] = {}
        self._named: list[tuple[int, tuple[int, bytes]]] = []
        """Definitions and series since the last commit: numbers, types and payloads of their records."""
        open_folder(folder, FORMAT, make=True)
        with explained(f"sweeping {folder}"):
            sweep(folder)
        name = name or producer_id
        path, self._lock_fd = make_slot(folder, name)
        try:
            create(path, Root(producer_id, secret, size), fsync=fsync).close()
            self.path = publish_slot(path, fsync=fsync)
            self._database = Database(self.path, fsync=fsync)
            self._database.log_bytes_max = min(self._database.log_bytes_max, bytes_max // 16)
        except BaseException:
            with suppress(PipelineError):
                remove_slot(path if path.exists() else path.with_name(name))
            os.close(self._lock_fd)
            raise

    # Recording

    def define(self, definition: bytes, suffix: bytes) -> int:
        """Return a number for a series, by which it can be recorded from then on; never used again."""
        known = self._definitions.get(definition)
        if known is None:
            known = self._definitions.setdefault(definition, self._name(DEFINITION, definition))
        return self._name(SERIES, encode((known, suffix)))

    def _name(self, kind: int, payload: bytes) -> int:
        number = next(self._ids)
        named = [(number, (kind, payload))]
        while True:
            with self._own_lock:
                if self._own.append(number << 2 | kind, payload, self._named, named):
                    return number
            new = self._segment(_OWN, self._own.segment.number, len(payload))
            with self._own_lock:
                self._own.adopt(new)

    def segment(self, shard: int, full: int, length: int) -> Segment:
        """Return where a shard goes on behind segment `full` (-1: it has none yet), with a payload of so many bytes.

        Several threads may be given the same one. Raises `BufferFull` or `Unavailable` if there can't be another one now.
        """
        return self._segment(shard + 1, full, length)

    def prepare(self) -> None:
        """Make the first segments, so that a disk that is full is found out now. For the thread that made the spool."""
        for ring in (_OWN, 1):
            self._next_segment(ring, -1, 1)

    def _segment(self, ring: int, full: int, length: int) -> Segment:
        self._check_open()
        if self.is_held:  # by a finaliser, or a handler that has interrupted something else than recording
            raise Unavailable("this thread was interrupted while it writes to the spool")
        return run_uninterrupted(lambda: self._next_segment(ring, full, length))

    def _next_segment(self, ring: int, full: int, length: int) -> Segment:
        database = self._database
        with database.lock:
            last = self._last.get(ring)
            if last is not None and last.number > full:
                return last
            size = database.root.segment_bytes
            if HEADER.size + 16 + length > size - END_BYTES:
                raise Invalid(f"a value of {length} bytes does not fit into a segment of {size}")
            if ring not in self._spares:
                most = self._bytes_max - self._bytes_max // 4 - size
                if self.used_bytes > most:
                    database.shrink()  # else what was acknowledged would have it full for ever
                self._is_full = self.used_bytes > most
                if self._is_full:
                    raise BufferFull(f"{self.used_bytes} of {self._bytes_max} bytes of the spool are in use")
                self._spares[ring], rings = self._make(ring, database.root.rings)
                try:
                    with database.transaction(rings=rings):
                        pass
                except BaseException:
                    if database.root.rings != rings:
                        self._spares.pop(ring, None)
                    raise
            new = self._last[ring] = self._spares.pop(ring)
            return new

    def _make(self, ring: int, rings: Rings) -> tuple[Segment, Rings]:
        """Make a segment. Return it, and the rings that a transaction must write before it is used."""
        first, offset, number = rings.get(ring, (0, 0, 0))
        path = segment_path(self.path, ring, number)
        with explained("making a segment"):
            segment = Segment(path, self._database.owner, ring, number, self._database.root.segment_bytes)
            if self._fsync:
                sync(path)
                sync(self.path)
        return segment, {**rings, ring: (first, offset, number + 1)}

    def _ends(self) -> dict[int, RingPosition]:
        """Return where all rings end that were ever recorded to."""
        ends = {shard + 1: RingPosition(*end) for shard, end in self._shard_ends().items()}
        own = self._own.end()
        return ends if own is None else {_OWN: own, **ends}

    def _check_open(self) -> None:
        if self._pid != os.getpid():
            self.abandon()
        if self._closed:
            raise Invalid("the spool is closed")

    # Draining

    def commit(
        self,
        batches: Sequence[Sealed],
        pending: Iterable[Pending],
        positions: Mapping[int, tuple[int, int]],
        gone: Iterable[int] = (),
    ) -> None:
        """Write that everything recorded before `positions`, by shard, is in `batches`, earlier batches, or `pending`.

        `pending` replaces the pending deltas of before. `gone` are series whose records all lie before the positions, and
        to which nobody records any more. Atomic: after `Unavailable` or `BufferFull` nothing has happened, and the same
        call can be repeated. For the thread that drains.
        """
        waiting = encode_pending(pending)
        self._check_open()
        own = self._own.end()
        named = [*self._named]  # after the position: a series named in between is written twice, which does no harm
        read = {shard + 1: position for shard, position in positions.items()} | ({} if own is None else {_OWN: own})
        with self._database.lock:
            before = self._database.root.rings
            moved = {key: (*read.get(key, begin), end) for key, (*begin, end) in before.items()}
            after, spares = self._more(moved)
            dead = {*gone}
            new = {key: name for key, name in named if key not in dead}
            self._database.commit(batches, waiting, after, new, dead)
            self._spares.update(spares)
        del self._named[: len(named)]
        for key, (first, _, _) in before.items():
            for number in range(first, after[key][0]):
                with suppress(OSError):  # the next owner deletes segments that no transaction names
                    segment_path(self.path, key, number).unlink()

    def _more(self, rings: Rings) -> tuple[Rings, dict[int, Segment]]:
        """Make segments for rings that will soon need one, so that no recording thread waits for it."""
        spares: dict[int, Segment] = {}
        for key, (first, offset, end) in rings.items():
            if first == end - 1 and 4 * offset > self._database.root.segment_bytes and 2 * self.used_bytes < self._bytes_max:
                with suppress(PipelineError):  # then it is made when it is needed
                    spares[key], rings = self._make(key, rings)
        return rings, spares

    def acknowledge(self, batches: Sequence[tuple[int, int]]) -> None:
        """Forget committed batches, each a partition and a sequence: the log has them, or never will."""
        self._check_open()
        self._database.acknowledge(batches)

    def load(self, partition: int, sequence: int) -> bytes:
        """Return the bytes of a committed batch that is not acknowledged."""
        return self._database.load(partition, sequence)

    def sync(self) -> None:
        """Make everything that was recorded so far durable. For the thread that commits."""
        with explained("syncing the rings"):
            ends = self._ends()
            for key, (first, _, _) in sorted(self._database.root.rings.items()):
                current = ends[key].number if key in ends else first - 1
                for number in range(max(first, self._synced.get(key, 0)), current + 1):
                    sync(segment_path(self.path, key, number))
                self._synced[key] = current

    # What it takes

    @property
    def is_held(self) -> bool:
        """True if this thread was interrupted while it has the database, for which the others wait."""
        return bool(self._database.lock._is_owned())  # type: ignore[attr-defined]  # typeshed does not declare it

    @property
    def used_bytes(self) -> int:
        """The bytes of the slot on the disk."""
        root = self._database.root
        return self._database.used_bytes + root.segment_bytes * sum([end - first for first, _, end in root.rings.values()])

    @property
    def is_full_of_names(self) -> bool:
        """True if recording is refused, and names of series take most of the room: evicting series frees it."""
        if not self._is_full:
            return False
        with self._database.lock:
            others = sum([kept.size for kept in self._database.batches.values()]) + self.pending_bytes + self.ring_bytes
        return 2 * others < self.used_bytes

    @property
    def batch_count(self) -> int:
        """The number of committed batches that are not acknowledged."""
        return len(self._database.batches)

    def has(self, partition: int, sequence: int) -> bool:
        """Return whether a batch is committed and not acknowledged."""
        return (partition, sequence) in self._database.batches

    @property
    def ring_bytes(self) -> int:
        """The bytes, about, of records that no commit covers yet."""
        return sum(self._ring_bytes().values())

    def _ring_bytes(self) -> dict[int, int]:
        ends, sizes = self._ends(), {}
        root = self._database.root
        for key, end in ends.items():
            first, offset, _ = root.rings[key]
            sizes[key] = (end.number - first) * root.segment_bytes + end.offset - max(offset, HEADER.size)
        return sizes

    @property
    def pending_bytes(self) -> int:
        """The bytes of the pending deltas of the last commit."""
        return self._database.pending_bytes

    # The end

    def close(self) -> bool:
        """Remove the slot if nothing waits in it, else leave it for another process; return whether it was removed.

        No thread records to the rings any more.
        """
        with self._database.lock:
            if self._closed:
                return not self.path.exists()
            self._check_open()
            self._closed = True
            empty = not self._database.batches and not self._database.root.pending_count
            empty &= not any(size for key, size in self._ring_bytes().items() if key != _OWN)
            try:
                if self._fsync and not empty:
                    self.sync()
            finally:
                self._release()
                self._database.close()
                if empty:
                    remove_slot(self.path)
                os.close(self._lock_fd)
            return empty

    def _release(self) -> None:
        for segment in [*self._last.values()]:
            segment.limit = 0
        self._own = Ring()
        self._last.clear()
        self._spares.clear()

    def abandon(self) -> None:
        """Forget the parent's files, in a forked child, without a change to them."""
        if not self._closed:
            self._closed = True
            self._database.abandon()
            self._release()
            os.close(self._lock_fd)
