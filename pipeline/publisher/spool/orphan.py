"""The slot of a process that is gone: read, repaired, claimed, and sent under the producer id of that process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import msgspec

from pipeline.core.codec import decode_batch, encode_batch
from pipeline.core.kinds import KINDS, kind_of
from pipeline.core.record import Definition, fingerprint
from pipeline.core.sequence import Sealed
from pipeline.errors import BadRecord, Invalid
from pipeline.folders import read_file
from pipeline.publisher.batching import Pending
from pipeline.publisher.spool.database import (
    FORMAT,
    LOG,
    NAME,
    SEAL,
    Contents,
    Database,
    Root,
    create,
    encode_pending,
)
from pipeline.publisher.spool.ring import (
    DEFINITION,
    DELTA,
    HEADER,
    SERIES,
    scan,
    segment_header,
    segment_name,
    segment_path,
)
from pipeline.publisher.spool.slot import (
    CORRUPT,
    SlotInfo,
    explained,
    is_live,
    lock_slot,
    open_folder,
    remove_slot,
    slots,
    sweep,
)

_RUN = 1_000_000
"""Records that are held in memory at a time."""
_ATTEMPTS = 5
"""Number of tries to read a slot that its owner changes meanwhile."""
_decode_series = msgspec.msgpack.Decoder(tuple[int, bytes]).decode
_decode_definition = msgspec.msgpack.Decoder(Definition).decode
_BAD = (BadRecord, Invalid, msgspec.MsgspecError, ValueError, TypeError, OverflowError)


class SlotReport(msgspec.Struct):
    """The damages that were found in a slot."""

    torn_bytes: int = 0
    """Bytes of records that were half written when the process died. No caller was told that these were recorded."""
    corrupt: list[str] = []
    """Files that are damaged or were set aside, with the reason. Some deltas can be lost then; the files are kept."""
    bad_count: int = 0
    """Number of records that are lost: of series that are not known, or with values that the series can't have."""
    lossy: bool = False
    """True if deltas were set aside for a human, because it is not known whether they were sent."""


class Recorded:
    """The deltas of a slot that are in no batch, merged by series. Reading changes nothing."""

    def __init__(self, contents: Contents) -> None:
        self.report = SlotReport(corrupt=[*contents.damages])
        self.merged: dict[tuple[Definition, bytes], Pending] = {}
        self.stale: list[Path] = []
        """Segments that no transaction names any more, or yet. Nothing in them is to be sent."""
        self._definitions: dict[int, Definition] = {}
        self.series: dict[int, tuple[int, bytes]] = {}
        self.report.corrupt += [f"{kept.name}: set aside before" for kept in sorted(contents.folder.glob(f"*{CORRUPT}"))]
        if contents.root is None or contents.lost:
            self.report.lossy = True
            return
        for pending in contents.pending:
            self._merge(pending)
        for number, (kind, payload) in contents.names.items():
            self._name(number, kind, payload)
        self._look_around(contents.folder, contents.root)
        deltas: dict[int, list[bytes]] = {}
        for i, (word, payload) in enumerate(self._records(contents.folder, contents.owner, contents.root), 1):
            if word & 3 == DELTA:
                deltas.setdefault(word >> 2, []).append(payload)
            else:  # of ring 0, which is read first
                self._name(word >> 2, word & 3, payload)
            if i % _RUN == 0:
                self._take_all(deltas)
        self._take_all(deltas)

    def _take_all(self, deltas: dict[int, list[bytes]]) -> None:
        for series_id, payloads in deltas.items():
            self._take(series_id, payloads)
        deltas.clear()

    def _name(self, number: int, kind: int, payload: bytes) -> None:
        try:
            if kind == DEFINITION:
                self._definitions[number] = _decode_definition(payload)
            elif kind == SERIES:
                self.series[number] = _decode_series(payload)
        except _BAD:
            self.report.bad_count += 1

    def _look_around(self, folder: Path, root: Root) -> None:
        for path in sorted(folder.glob("ring-*")):
            ring, number = segment_name(path) or (-1, 0)
            first, _, end = root.rings.get(ring, (0, 0, 0))
            if ring < 0 and not path.name.endswith(CORRUPT):
                self.report.corrupt.append(f"{path.name}: a foreign file")
            elif ring >= 0 and not first <= number < end:
                self.stale.append(path)
                if number >= end and any(self._read(path, root.segment_bytes)[0][HEADER.size :]):
                    self.report.corrupt.append(f"{path.name}: a segment that the database does not know")

    def _read(self, path: Path, bytes_max: int) -> tuple[bytes, int]:
        """Return the bytes of a segment, and the size of its file; none, which is reported, if they can't be read."""
        try:
            data, size = read_file(path, bytes_max)
        except (FileNotFoundError, Invalid) as error:
            missing = isinstance(error, FileNotFoundError)
            self.report.corrupt.append(f"{path.name}: {'missing' if missing else 'no regular file'}")
            return b"", 0
        if not data:
            self.report.corrupt.append(f"{path.name}: empty")
        return data, size

    def _records(self, folder: Path, owner: bytes, root: Root) -> Iterator[tuple[int, bytes]]:
        for ring, (first, offset, end) in sorted(root.rings.items()):
            goes_on = True
            for number in range(first, end):
                path = segment_path(folder, ring, number)
                header, seed = segment_header(owner, ring, number, root.segment_bytes)
                data, size = self._read(path, root.segment_bytes)
                if not data:
                    continue
                start = max(len(header), offset if number == first else 0)
                found = scan(data, seed, start)
                damages = found.damages
                if size != root.segment_bytes:
                    damages.append(f"{size} bytes, not {root.segment_bytes}")
                if data[: len(header)] != header:
                    damages.append("a wrong header")
                if not goes_on and (found.records or found.ended):
                    damages.append("the segment before it has no end")
                self.report.corrupt += [f"{path.name}: {damage}" for damage in damages]
                self.report.torn_bytes += found.torn_bytes
                goes_on = found.ended or (goes_on and found.end == len(header))  # one that was never used can lie between
                yield from found.records

    def _merge(self, part: Pending) -> None:
        key = part.definition, part.suffix
        old = self.merged.get(key)
        if old is not None:
            state = KINDS[part.definition.kind].merge(old.state, part.state)
            part = part._replace(state=state, delta_count=old.delta_count + part.delta_count)
        self.merged[key] = part

    def _take(self, series_id: int, payloads: list[bytes]) -> None:
        try:
            if series_id not in self.series or self.series[series_id][0] not in self._definitions:
                raise BadRecord("a series that is not known")
            number, suffix = self.series[series_id]
            definition = self._definitions[number]
            kind = kind_of(definition)
            deltas = kind.decode_deltas(b"\xdd" + len(payloads).to_bytes(4, "big") + b"".join(payloads))
            if len(deltas) != len(payloads):
                raise BadRecord("not a delta each")
            self._merge(Pending(definition, suffix, kind.collect(deltas), len(deltas)))
        except _BAD:
            if len(payloads) == 1:
                self.report.bad_count += 1
            else:
                for payload in payloads:
                    self._take(series_id, [payload])


def find_slots(folder: Path) -> list[Path]:
    """Return the slots of a spool folder, those of living processes included: `Orphan.claim` tells them apart.

    Raises `Invalid` for a folder that is no spool, or of another version.
    """
    open_folder(folder, FORMAT, make=False)
    sweep(folder)
    return slots(folder)


class Orphan:
    """The slot of a process that is gone. One thread at a time.

    Make an outbox from `producer_id`, `epoch`, `next_sequences` and `batches`; seal `pending` with it, and `commit` that
    before anything new is sent; `acknowledge` what the log has accepted; at the end, `remove`.
    """

    def __init__(self, path: Path, lock_fd: int, *, fsync: bool) -> None:
        self.path, self._lock_fd = path, lock_fd
        contents = Contents(path)
        try:
            recorded = Recorded(contents)
            if contents.damages:
                _set_aside(contents, whole=not recorded.report.lossy, fsync=fsync)
        finally:
            contents.close()
        self.report = recorded.report
        self._database = Database(path, fsync=fsync)
        for stale in recorded.stale:
            stale.unlink(missing_ok=True)
        root = self._database.root
        self.producer_id, self.secret, self.epoch = root.producer_id, root.secret, root.epoch + 1
        with self._database.transaction(epoch=self.epoch):  # a task refuses what an earlier owner sends late
            self.next_sequences: dict[int, int] = dict(root.next_sequences)
        kept = sorted(self._database.batches.items())
        self.batches = [Sealed(key[0], key[1], b"", item.entry_count) for key, item in kept]
        """Committed and not acknowledged, without their bytes, which can be more than memory holds: `load` has them."""
        self.pending = [*recorded.merged.values()]
        """Everything that was recorded and is in no batch, each series once."""

    @classmethod
    def claim(cls, path: Path, *, fsync: bool = False) -> Orphan | None:
        """Take over a slot; None if its owner lives, or it is gone. Raises `Fenced` for a copy of one.

        A claim that ends without `remove`, by a crash or `release`, leaves a slot for the next one.
        """
        lock_fd = lock_slot(path)
        if lock_fd is None:
            return None
        try:
            with explained(f"claiming {path}"):
                return cls(path, lock_fd, fsync=fsync)
        except BaseException:
            os.close(lock_fd)
            raise

    def load(self, partition: int, sequence: int) -> bytes:
        """Return the bytes of a batch that is not acknowledged, with the new epoch."""
        batch = decode_batch(self._database.load(partition, sequence))
        return encode_batch(msgspec.structs.replace(batch, epoch=self.epoch))

    def size_of(self, partition: int, sequence: int) -> int:
        """Return how many bytes such a batch has, about."""
        return self._database.batches[partition, sequence].size

    def commit(self, batches: Sequence[Sealed], pending: Sequence[Pending] = ()) -> None:
        """Write that everything in `self.pending` is now in `batches` or in the new `pending`; see `Spool.commit`."""
        rings = self._database.root.rings
        self._database.commit(batches, encode_pending(pending), {key: (end, 0, end) for key, (_, _, end) in rings.items()})
        self.pending = [*pending]
        with explained("deleting segments"):
            for path in self.path.glob("ring-*"):
                if not self.report.corrupt and not self.report.bad_count:
                    path.unlink(missing_ok=True)
                elif not path.name.endswith(CORRUPT):
                    path.rename(path.with_name(path.name + CORRUPT))

    def acknowledge(self, batches: Sequence[tuple[int, int]]) -> None:
        """Forget batches, each a partition and a sequence: the log has them, or never will."""
        self._database.acknowledge(batches)

    def remove(self) -> None:
        """Remove the slot, which must be empty, and unlock it. A slot with damaged files is only set aside."""
        batches = self._database.batches
        if batches or self.pending:
            raise Invalid(f"slot {self.path.name} is not empty: {len(batches)} batches, {len(self.pending)} series")
        self._database.close()
        remove_slot(self.path, aside=bool(self.report.corrupt or self.report.bad_count))
        self.release()

    def release(self) -> None:
        """Unlock the slot; what is left in it waits for the next claim."""
        self._database.close()
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)


def _set_aside(contents: Contents, *, whole: bool, fsync: bool) -> None:
    """Replace a damaged database by one with all rows that are whole. The damaged one is kept beside it.

    If it is not `whole`, the rings are set aside, too, because it is not known which of their deltas were sent.
    """
    folder, base, lost = contents.folder, contents.root or Root("unknown", "", 0), max(0, contents.lost)
    new = folder / ".new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    nothing = {"batch_count": 0, "batch_sum": 0, "pending_count": 0, "rings": {}}
    start = msgspec.structs.replace(base, number=base.number + lost, epoch=base.epoch + lost, **nothing)
    database = create(new, start, fsync=fsync)
    batches = []
    for key, kept in contents.batches.items():
        with suppress(BadRecord):
            batches.append(Sealed(key[0], key[1], contents.load(*key), kept.entry_count))
    if whole:
        database.commit(batches, encode_pending(contents.pending), base.rings, contents.names)
    else:
        database.commit(batches, (), {})
        for path in folder.glob("ring-*[0-9]"):
            path.rename(path.with_name(path.name + CORRUPT))
    database.close()
    with suppress(FileNotFoundError):  # the log first: it must never meet another database
        (folder / LOG).rename(folder / f"{LOG}{CORRUPT}")
    for name in (NAME, SEAL):
        with suppress(FileNotFoundError, FileExistsError):
            os.link(folder / name, folder / f"{name}{CORRUPT}")
        (new / name).rename(folder / name)
    new.rmdir()


def inspect(folder: Path) -> list[SlotInfo]:
    """Return what is in all slots of a spool folder, and change nothing, also while processes record to it.

    Raises `Invalid` if it is no spool folder, or of another version.
    """
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
    sealed_ms = []
    for partition, sequence in firsts.items():
        with suppress(BadRecord):
            sealed_ms.append(decode_batch(contents.load(partition, sequence)).created_at_ms)
    return SlotInfo(
        slot=path.name,
        producer=fingerprint(root.producer_id) if root else "",
        live=live,
        epoch=root.epoch if root else 0,
        bytes_total=sum([file.lstat().st_size for file in path.iterdir()]),
        batch_count=len(contents.batches),
        entry_count=sum([kept.entry_count for kept in contents.batches.values()]),
        series_count=len(recorded.series),
        delta_count=sum([pending.delta_count for pending in recorded.merged.values()]),
        oldest_ms=min([ms for ms in sealed_ms if ms], default=None),
        torn_bytes=0 if live else report.torn_bytes,  # of a record that is just being written
        corrupt="; ".join([*report.corrupt, *([f"{report.bad_count} bad records"] if report.bad_count else [])]),
    )
