"""The spool of a process that records: its slot, from the first delta until everything is acknowledged."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

from pipeline.core.merge import State
from pipeline.core.record import Definition
from pipeline.core.sequence import Sealed
from pipeline.errors import BufferFull, Invalid, PipelineError
from pipeline.producer.sealing import Merged
from pipeline.producer.spool import ledger as records
from pipeline.producer.spool.journal import REWRITE_BYTES_MIN, Journal
from pipeline.producer.spool.ledger import Define, Header, encode_state
from pipeline.producer.spool.ring import HOLED_MIN, RECORD_BYTES, Place, Records, Ring, Segment, read, segment_size
from pipeline.producer.spool.slot import explained, make_slot, open_folder, publish_slot, remove_slot, sweep, sync_folder

BYTES_MAX_MIN = 4
"""How many segments a spool has room for, at least."""


class Drained(NamedTuple):
    """Deltas of one series: `values` as they were recorded, or else their merged `state`."""

    series_id: int
    values: list[int | float] | None
    state: State
    delta_count: int


class _Leaving(NamedTuple):
    """A series that nobody can record to any more, and where records of it can still be."""

    series_id: int
    number: int
    next_index: int
    drain_count: int


class Spool:
    """What this process records, in files. Safe from any thread, unless something else is said.

    The caller records to `segment`; drains, seals, and says with `commit` what became of everything that was drained;
    sends what is committed, and nothing else; and acknowledges what the log has accepted. When the process dies instead, the
    next to look finds a `Leftover`.

    Recording (`rotate`, `define`, `append_state`) leaves a quarter of `bytes_max` to commits, and raises `BufferFull` beyond
    it. Writing the journal anew needs room for what is alive in it, for a moment, beyond `bytes_max`.
    """

    def __init__(
        self, folder: Path, producer_id: str, *, bytes_max: int, segment_bytes: int = 2**20, fsync: bool = False
    ) -> None:
        """Make a slot for this process, which nobody else touches while the process lives.

        `fsync`: a commit is on the disk when it returns; call `sync` now and then for the rest. Raises `Invalid` for a
        folder that is no spool or of another version, and if there is a slot of this name; `BufferFull` on a full disk.
        """
        segment_bytes = segment_size(segment_bytes)
        if bytes_max < BYTES_MAX_MIN * segment_bytes:
            raise Invalid(f"a spool of {bytes_max} bytes has no room for {BYTES_MAX_MIN} segments of {segment_bytes}")
        self.producer_id = producer_id
        self._bytes_max = bytes_max
        self._segment_bytes = segment_bytes
        self._fsync = fsync
        self._closed = False
        self._ids = count(1)
        self._waiting: list[Drained] = []
        self._leaving: deque[_Leaving] = deque()
        self._drain_count = 0
        open_folder(folder, make=True)
        with explained(f"sweeping {folder}"):
            sweep(folder)
        path, self._lock_fd = make_slot(folder, producer_id)
        try:
            self.path = publish_slot(path)
            self._journal = Journal.create(self.path, Header(producer_id, 0, 0), fsync=fsync)
            self._journal.rewrite_bytes_min = min(REWRITE_BYTES_MIN, bytes_max // 8)
            self._ring = Ring(self.path, segment_bytes, max(HOLED_MIN, bytes_max // 4 // segment_bytes))
            self.segment: Segment = self._ring.segment
            """Where to record now; see `Segment`. Read it for each delta."""
            self._journal.commit(self._ring.cursor(), (), (), room=bytes_max)
            if fsync:
                self.sync()
        except BaseException:
            with suppress(PipelineError):
                remove_slot(path if path.exists() else path.with_name(producer_id))
            os.close(self._lock_fd)
            raise

    # Recording

    def define(self, definition: Definition, suffix: bytes) -> int:
        """A number for a series, by which it can be recorded from then on; never used again."""
        with self._journal.lock:
            self._check_room(records.SERIES_BYTES + len(suffix))
            define = Define(next(self._ids), definition, suffix)
            self._journal.append(records.DEFINE, records.encode(define))
            self._journal.ledger.add_series(define)
            return define.series_id

    def undefine(self, series_id: int) -> None:
        """Forget a series, to which nobody can record any more, once all that was recorded to it is committed."""
        with self._journal.lock:
            segment = self._ring.segment
            self._leaving.append(_Leaving(series_id, segment.number, segment.reserved(), self._drain_count))

    def rotate(self, full: Segment) -> None:
        """Put a new segment in place of `full`, unless that was done. Raises `BufferFull` if there is no room for one."""
        with self._journal.lock:
            self._check_open()
            if self._ring.segment is full:
                self._check_room(self._segment_bytes)
                self._ring.rotate(full)
            self.segment = self._ring.segment

    def append_state(self, series_id: int, state: State, delta_count: int) -> None:
        """Record merged deltas that no record of the ring can hold. They survive this process when this returns."""
        with self._journal.lock:
            self._check_open()
            known = self._journal.ledger.series.get(series_id)
            if known is None:
                raise Invalid(f"the spool has no series {series_id}")
            payload = encode_state(series_id, known[0], state, delta_count)
            self._check_room(len(payload))
            place = self._journal.append(records.STATE, payload)
            drained = Drained(series_id, None, state, delta_count)
            ledger = self._journal.ledger
            ledger.add_state(place, len(payload))
            self._waiting.append(drained)

    def _check_open(self) -> None:
        if self._closed:
            raise Invalid("the spool is closed")

    def _check_room(self, size: int) -> None:
        most = self._bytes_max - self._bytes_max // 4
        if self.used_bytes + size > most:
            self._journal.tidy(pressed=True)
            if self.used_bytes + size > most:
                raise BufferFull(f"{size} bytes needed, {self.used_bytes} of {self._bytes_max} of the spool in use")

    # Draining

    def drain(self) -> list[Drained]:
        """What was recorded since the last call, each series' values together. For one thread, the one that commits.

        Until a commit, all of it is what a crash would bring back.
        """
        drain = self._ring.drain()
        series = self._journal.ledger.series
        out = [Drained(key, values, None, len(values)) for key, values in drain.records.items() if key in series]
        with self._journal.lock:
            while True:
                end = self._journal.end
                states = [*self._waiting]
                if self._journal.end == end:  # else a finaliser has recorded in between
                    break
            out += states
            self._ring.moved(drain)
            self._drain_count += 1
            self._journal.drained_end = end
            del self._waiting[: len(states)]
        return out

    def commit(self, batches: Sequence[Sealed], pending: Sequence[Merged]) -> None:
        """Write where everything that was drained so far is now: in `batches`, earlier ones, or `pending`.

        `pending` replaces what was pending before. Atomic: after `Unavailable` (no room, a failing disk) nothing has
        happened, and the same call can be repeated. For the thread that drains.
        """
        cursor = self._ring.cursor()
        drain_count = self._drain_count
        self._journal.commit(cursor, batches, pending, room=self._bytes_max - self.used_bytes)
        with self._journal.lock:
            with explained("deleting a segment"):
                self._ring.committed(cursor)
            while self._leaving:
                first = self._leaving[0]
                if first.drain_count >= drain_count or not self._ring.passed(first.number, first.next_index):
                    break
                self._leaving.popleft()
                self._journal.ledger.forget_series(first.series_id)
        self._journal.tidy()

    def acknowledge(self, batches: Sequence[tuple[int, int]]) -> None:
        """Forget committed batches, each a partition and a sequence: the log has them, or never will."""
        self._journal.acknowledge(batches)

    def load(self, partition: int, sequence: int) -> bytes:
        """The bytes of a committed batch that is not acknowledged."""
        return self._journal.load(partition, sequence)

    def sync(self) -> None:
        """Make everything that was recorded so far durable. For the thread that commits."""
        self._journal.sync()
        with explained("syncing the ring"):
            self._ring.sync()
            sync_folder(self.path)

    # What it takes

    @property
    def is_held(self) -> bool:
        """Whether this thread is just writing here: it was interrupted, and the others wait for it."""
        return self._journal.held_count > 0

    @property
    def used_bytes(self) -> int:
        """What the slot takes on the disk."""
        return self._journal.end + self._ring.bytes_total

    @property
    def ring_bytes(self) -> int:
        """What was recorded and is in no commit yet."""
        return self._ring.waiting_count() * RECORD_BYTES + self._journal.ledger.state_bytes

    @property
    def pending_bytes(self) -> int:
        """What the pending deltas of the last commit take."""
        return self._journal.ledger.pending_bytes

    @property
    def given_up_count(self) -> int:
        """Records that a thread began, and was interrupted in, so long ago that nobody waits for them any more."""
        return self._ring.given_up_count

    # The end

    def close(self) -> bool:
        """End recording. Removes the slot if nothing waits in it, or leaves it to be found; whether it was removed."""
        with self._journal.lock:
            if self._closed:
                return not self.path.exists()
            self._closed = True
            self._ring.shut()
            self.segment = self._ring.segment
            empty = self._is_empty()
            try:
                if empty:
                    remove_slot(self.path)
                elif self._fsync:
                    self.sync()
            finally:
                self._let_go()
            return empty

    def _is_empty(self) -> bool:
        ledger = self._journal.ledger
        if self._waiting or ledger.states or ledger.pending or ledger.batches:
            return False
        left: Records = {}
        places = {place.number: place for place in ledger.cursor}
        for segment in self._ring.segments():
            segment.retire()
            place = read(segment.words(), places.get(segment.number, Place(segment.number, 0)), segment.reserved(), left)
            if place.holes or left:
                return False
        return True

    def _let_go(self) -> None:
        self._journal.close()
        with suppress(BufferError):  # a thread is just recording
            self._ring.release()
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def abandon(self) -> None:
        """What a forked child does first: let go of the parent's files, without a trace in them."""
        self._journal.lock = threading.RLock()  # another thread of the parent can have held it
        self._closed = True
        self._let_go()
        self.segment = self._ring.segment
