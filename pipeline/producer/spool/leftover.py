"""What a process has left in its slot: claimed, and sent under its own producer id until nothing is left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import msgspec

from pipeline.core.codec import decode_batch, encode_batch
from pipeline.core.merge import KINDS, kind_of
from pipeline.core.record import Definition
from pipeline.core.sequence import Sealed
from pipeline.errors import BadRecord, Invalid
from pipeline.producer.sealing import Merged
from pipeline.producer.spool import ledger as records
from pipeline.producer.spool.journal import payloads, recover
from pipeline.producer.spool.ledger import Ledger, decode_pending
from pipeline.producer.spool.ring import (
    Cursor,
    Place,
    Records,
    read_file,
    segment_numbers,
    segment_path,
)
from pipeline.producer.spool.slot import lock_slot, open_folder, remove_slot, slots, sweep

_ROOM = 2**62


class Report(msgspec.Struct):
    """What was not as it should be in a slot."""

    torn_bytes: int = 0
    """Of a write that had not returned when the process died."""
    corrupt: str = ""
    """What is wrong in the midst of the journal; empty: nothing. Then some deltas can be lost, and the files are kept."""
    hole_count: int = 0
    """Records that were begun and not ended when the process died; nobody was told that they were recorded."""
    bad_count: int = 0
    """Records of series that are not known, or with values that the series can't have. Lost."""


def leftovers(folder: Path) -> list[Path]:
    """The slots of a spool folder, those of living processes included: `Leftover.claim` tells them apart.

    Raises `Invalid` for a folder that is no spool, or of another version.
    """
    open_folder(folder, make=False)
    sweep(folder)
    return slots(folder)


class Leftover:
    """The slot of a process that is gone. One thread at a time.

    Make an outbox from `producer_id`, `epoch`, `next_sequences` and `batches`; seal `pending` with it, and `commit` that
    before anything new is sent; `acknowledge` what the log has accepted; at the end, `remove`.
    """

    def __init__(self, path: Path, lock_fd: int, *, fsync: bool) -> None:
        self.path = path
        self._lock_fd = lock_fd
        self._journal, tail = recover(path, path.name, fsync=fsync)
        ledger = self._journal.ledger
        assert ledger.header is not None
        self.lossy = ledger.header.lossy
        """Whether deltas were left aside, for a human, because nobody can say whether they were sent."""
        self.producer_id = ledger.header.producer_id
        self.epoch = ledger.epoch + 1
        """Rises with each claim, so that a task refuses what an earlier owner sends late."""
        self._journal.append(records.EPOCH, records.encode(self.epoch))
        ledger.epoch = self.epoch
        self._journal.sync()
        self.report = Report(tail.torn_bytes, tail.corrupt or ("it was, when it was claimed before" if self.lossy else ""))
        self.next_sequences: dict[int, int] = dict(ledger.next_sequences)
        self.batches: list[Sealed] = [Sealed(*key, b"", ledger.batches[key].entry_count) for key in sorted(ledger.batches)]
        """Committed and not acknowledged, without their bytes, which can be more than memory holds: `load` has them."""
        self.pending: list[Merged] = []
        """Everything that was recorded and is in no batch, each series once."""
        self._cursor: Cursor = ledger.cursor
        if not self.lossy:
            self.pending = self._collect(ledger)
        self._journal.drained_end = self._journal.end

    @classmethod
    def claim(cls, path: Path, *, fsync: bool = False) -> Leftover | None:
        """Take over a slot; None if its owner lives, or it is gone. Raises `Fenced` for a copy of one.

        A claim that ends without `remove`, by a crash or `release`, leaves a slot for the next one.
        """
        lock_fd = lock_slot(path)
        if lock_fd is None:
            return None
        try:
            return cls(path, lock_fd, fsync=fsync)
        except BaseException:
            os.close(lock_fd)
            raise

    def load(self, partition: int, sequence: int) -> bytes:
        """The bytes of a batch that is not acknowledged, with the new epoch."""
        batch = decode_batch(self._journal.load(partition, sequence))
        return encode_batch(msgspec.structs.replace(batch, epoch=self.epoch))

    def size_of(self, partition: int, sequence: int) -> int:
        """The bytes of such a batch, about."""
        return self._journal.ledger.batches[partition, sequence].where.size

    # Before the first commit

    def _collect(self, ledger: Ledger) -> list[Merged]:
        merged: dict[tuple[Definition, bytes], Merged] = {}
        for item in ledger.pending:
            for part in decode_pending(self._journal.read(item.where), item.delta_counts):
                _merge(merged, part)
        for payload in payloads(self._journal):
            _merge(merged, ledger.state_of(payload))
        for series_id, values in self._read_ring(ledger.cursor).items():
            recorded = self._collected(ledger, series_id, values)
            if recorded is not None:
                _merge(merged, recorded)
        return [*merged.values()]

    def _read_ring(self, cursor: Cursor) -> Records:
        found: Records = {}
        places = {place.number: place for place in cursor}
        last = max(places, default=-1)
        behind = []
        for number in segment_numbers(self.path):
            if number in places or number > last:
                hole_count, place = read_file(segment_path(self.path, number), places.get(number, Place(number, 0)), found)
                self.report.hole_count += hole_count
                behind.append(place._replace(holes=()))
        self._cursor = tuple(behind) or cursor
        return found

    def _collected(self, ledger: Ledger, series_id: int, values: list[int | float]) -> Merged | None:
        known = ledger.series.get(series_id)
        if known is None or known[0].kind == "last":
            self.report.bad_count += len(values)
            return None
        kind = kind_of(known[0])
        if not all(map(isfinite, values)) or (known[0].monotone and min(values) < 0):
            good = [value for value in values if isfinite(value) and not (known[0].monotone and value < 0)]
            self.report.bad_count += len(values) - len(good)
            values = good
        return ledger.merged(series_id, kind.collect(values), len(values)) if values else None

    # Sending

    def commit(self, batches: Sequence[Sealed], pending: Sequence[Merged] = ()) -> None:
        """Write that all of `pending`, as it was, is in `batches` now, or in `pending`. As `Spool.commit`."""
        self._journal.commit(self._cursor, batches, pending, room=_ROOM)
        self.pending = [*pending]

    def acknowledge(self, batches: Sequence[tuple[int, int]]) -> None:
        """Forget batches, each a partition and a sequence: the log has them, or never will."""
        self._journal.acknowledge(batches)
        self._journal.tidy()

    def remove(self) -> None:
        """Remove the slot, which must be empty, and let go. If something in it is for a human, it is only put aside."""
        ledger = self._journal.ledger
        if ledger.batches or self.pending:
            raise Invalid(f"slot {self.path.name} is not empty: {len(ledger.batches)} batches, {len(self.pending)} series")
        aside = self.lossy or any(self.path.glob("*.corrupt"))
        remove_slot(self.path, aside=aside)
        self.release()

    def release(self) -> None:
        """Let go of the slot; what is left in it waits for the next claim."""
        self._journal.close()
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)


def _merge(merged: dict[tuple[Definition, bytes], Merged], part: Merged) -> None:
    key = part.definition, part.suffix
    old = merged.get(key)
    if old is not None:
        state = KINDS[part.definition.kind].merge(old.state, part.state)
        part = part._replace(state=state, delta_count=old.delta_count + part.delta_count)
    merged[key] = part


def oldest_ms(value: bytes) -> int | None:
    """When a batch was sealed; None if it can't be read."""
    try:
        return decode_batch(value).created_at_ms
    except BadRecord:
        return None
