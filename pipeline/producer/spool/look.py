"""What is in a spool folder, read without a change, also while processes record to it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from pipeline.errors import BadRecord
from pipeline.producer.spool.journal import Found, find
from pipeline.producer.spool.leftover import oldest_ms
from pipeline.producer.spool.ring import Place, Records, read_file, segment_numbers, segment_path
from pipeline.producer.spool.slot import explained, is_live, open_folder, slots

_ATTEMPTS = 5


class SlotInfo(msgspec.Struct, frozen=True):
    """One slot, at a glance."""

    producer_id: str
    live: bool
    """Whether the process that records to it, or one that sends what is left, holds its lock."""
    epoch: int
    bytes_total: int
    batch_count: int
    """Batches that are not acknowledged."""
    entry_count: int
    """Entries in them."""
    series_count: int
    delta_count: int
    """Deltas that are in no batch yet."""
    oldest_ms: int | None
    """When the oldest of those batches was sealed; None without one."""
    torn_bytes: int
    corrupt: str
    """What is wrong with the journal, or which files were put aside; empty: nothing."""


def inspect(folder: Path) -> list[SlotInfo]:
    """All slots of a spool folder. Raises `Invalid` if it is none, or of another version."""
    open_folder(folder, make=False)
    found = [_inspect(path) for path in slots(folder)]
    return [info for info in found if info is not None]


def _inspect(path: Path) -> SlotInfo | None:
    """None for a slot that is being removed."""
    for _ in range(_ATTEMPTS):
        try:
            live = is_live(path)
            found = find(path)
            try:
                return _info(path, found, live=live)
            finally:
                if found.fd >= 0:
                    os.close(found.fd)
        except FileNotFoundError:  # its owner wrote the journal anew, or deleted a segment
            continue
        except OSError:
            with explained(f"reading {path}"):
                raise
    return None


def _info(path: Path, found: Found, *, live: bool) -> SlotInfo:
    ledger, tail = found.ledger, found.tail
    kept = sorted([file.name for file in path.glob("*.corrupt")])
    firsts: dict[int, int] = {}
    for partition, sequence in sorted(ledger.batches, reverse=True):
        firsts[partition] = sequence
    ages = [oldest_ms(os.pread(found.fd, *reversed(ledger.batches[key].where))) for key in firsts.items()]
    return SlotInfo(
        producer_id=ledger.header.producer_id if ledger.header else path.name,
        live=live,
        epoch=ledger.epoch,
        bytes_total=sum([file.stat().st_size for file in path.iterdir()]),
        batch_count=len(ledger.batches),
        entry_count=sum([waiting.entry_count for waiting in ledger.batches.values()]),
        series_count=len(ledger.series),
        delta_count=_delta_count(path, found),
        oldest_ms=min([age for age in ages if age is not None], default=None),
        torn_bytes=0 if live else tail.torn_bytes,  # a record that is just being written
        corrupt=tail.corrupt or ", ".join(kept),
    )


def _delta_count(path: Path, found: Found) -> int:
    ledger = found.ledger
    if ledger.header is None or ledger.header.lossy:
        return 0
    count = sum([sum(item.delta_counts) for item in ledger.pending])
    for where in ledger.states:
        try:
            count += ledger.state_of(os.pread(found.fd, where.size, where.place)).delta_count
        except BadRecord:  # it was replaced while we read
            continue
    records: Records = {}
    places = {place.number: place for place in ledger.cursor}
    last = max(places, default=-1)
    for number in segment_numbers(path):
        if number in places or number > last:
            read_file(segment_path(path, number), places.get(number, Place(number, 0)), records)
    return count + sum(map(len, records.values()))
