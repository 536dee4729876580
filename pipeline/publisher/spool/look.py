"""What is in a spool folder, read without a change, also while processes record to it."""

from __future__ import annotations

from contextlib import closing, suppress
from pathlib import Path

from pipeline.core.codec import decode_batch
from pipeline.core.record import fingerprint
from pipeline.errors import BadRecord
from pipeline.publisher.spool.database import FORMAT, Contents
from pipeline.publisher.spool.leftover import Recorded
from pipeline.publisher.spool.slot import SlotInfo, explained, is_live, open_folder, slots

_ATTEMPTS = 5


def inspect(folder: Path) -> list[SlotInfo]:
    """Return all slots of a spool folder. Raises `Invalid` if it is none, or of another version."""
    open_folder(folder, FORMAT, make=False)
    found = [_inspect(path) for path in slots(folder)]
    return [info for info in found if info is not None]


def _inspect(path: Path) -> SlotInfo | None:
    """Return what is in a slot; None for one that is being removed."""
    info = None
    for _ in range(_ATTEMPTS):
        with explained(f"reading {path}"), suppress(FileNotFoundError):
            live = is_live(path)
            with closing(Contents(path)) as contents:
                info = _info(path, contents, live=live)
            if not (live and info.corrupt):  # its owner can have written meanwhile
                break
    return info if path.exists() else None


def _info(path: Path, contents: Contents, *, live: bool) -> SlotInfo:
    recorded = Recorded(contents)
    root, report = contents.root, recorded.report
    firsts: dict[int, int] = {}
    for partition, sequence in sorted(contents.batches, reverse=True):
        firsts[partition] = sequence
    return SlotInfo(
        slot=path.name,
        producer=fingerprint(root.producer_id) if root else "",
        live=live,
        epoch=root.epoch if root else 0,
        bytes_total=sum([file.stat().st_size for file in path.iterdir()]),
        batch_count=len(contents.batches),
        entry_count=sum([kept.entry_count for kept in contents.batches.values()]),
        series_count=len(recorded.series),
        delta_count=sum([pending.delta_count for pending in recorded.merged.values()]),
        oldest_ms=min([ms for ms in (_sealed_ms(contents, *key) for key in firsts.items()) if ms], default=None),
        torn_bytes=0 if live else report.torn_bytes,  # of a record that is just being written
        corrupt="; ".join([*report.corrupt, *([f"{report.bad_count} bad records"] if report.bad_count else [])]),
    )


def _sealed_ms(contents: Contents, partition: int, sequence: int) -> int | None:
    try:
        return decode_batch(contents.load(partition, sequence)).created_at_ms
    except BadRecord:
        return None
