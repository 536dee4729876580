"""Recording to a spool in a test, and a task that folds the batches that are sent."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

from pipeline.core.codec import decode_batch, encode_batch
from pipeline.core.kinds import KINDS, State, add
from pipeline.core.record import Batch, Definition, Group, canonical, series_prefix, series_suffix
from pipeline.core.sequence import Folded, Outbox, Sealed
from pipeline.publisher.batching import Pending, encode
from pipeline.publisher.spool.live import Spool
from pipeline.publisher.spool.orphan import Orphan
from pipeline.publisher.spool.ring import DELTA, Ring, RingPosition, encode_delta

VIEW = Definition("hits", "sum", ("page",))
SHARDS = 2


def suffix(name: object) -> bytes:
    return series_suffix([str(name)])


class Recorder:
    """A minimal table: deltas recorded to each shard are in the ring and in memory, until they are drained."""

    def __init__(self, folder: Path, name: str = "p", **options: Any) -> None:
        self.rings: dict[int, Ring] = {}
        self.spool = Spool(folder, name, **{"bytes_max": 2**20, "segment_bytes": 4096, "ends": self.ends, **options})
        self.ids: dict[object, int] = {}
        self.outbox = Outbox(name, 0)
        self.waiting: dict[object, Pending] = {}

    def ends(self) -> dict[int, RingPosition]:
        return {shard: end for shard, ring in self.rings.items() if (end := ring.end())}

    def append(self, series: int, payload: bytes, shard: int = 0, kind: int = DELTA) -> None:
        ring = self.rings.setdefault(shard, Ring())
        while not ring.append(series << 2 | kind, payload):
            ring.adopt(self.spool.segment(shard, ring.segment.number, len(payload)))

    def define(self, name: object, definition: Definition = VIEW) -> int:
        return self.spool.define(encode(canonical(definition)), suffix(name))

    def add(self, name: object, value: float = 1, shard: int = 0) -> None:
        if name not in self.ids:
            self.ids[name] = self.define(name)
        self.append(self.ids[name], encode_delta(value), shard)
        old = self.waiting.get(name)
        self.waiting[name] = Pending(
            VIEW, suffix(name), add(old.state, value) if old else value, old.delta_count + 1 if old else 1
        )

    def commit(self, seal_count: int = 10**9, gone: Iterable[object] = ()) -> None:
        """Seal some series, and leave the others pending."""
        names = [*self.waiting][:seal_count]
        batches = sealed([self.waiting.pop(name) for name in names], self.outbox)
        self.spool.commit(batches, [*self.waiting.values()], self.ends(), [self.ids.pop(name) for name in gone])

    def acknowledge(self, batch: Sealed) -> None:
        self.outbox.acknowledge(batch.partition, batch.sequence)
        self.spool.acknowledge([(batch.partition, batch.sequence)])


def sealed(items: list[Pending], outbox: Outbox) -> list[Sealed]:
    """Return one batch for each partition."""
    out = []
    by_partition: dict[int, list[Pending]] = {}
    for item in items:
        by_partition.setdefault(crc32(series_prefix(item.definition) + item.suffix) % 2, []).append(item)
    for partition, part in by_partition.items():
        sequence, floor = outbox.next_numbers(partition)
        groups = [Group(item.definition, [item.suffix], [item.state]) for item in part]
        value = encode_batch(Batch(outbox.producer_id, outbox.epoch, partition, sequence, floor, 1, groups))
        out.append(Sealed(partition, sequence, value, len(part)))
        outbox.add(out[-1])
    return out


def end(spool: Spool) -> None:
    """Let go of everything, as the end of a process does: `abandon` leaves files open, which are the parent's."""
    connection = spool._database._connection
    spool.abandon()
    if connection is not None:
        connection.close()
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(connection))


def claim(path: Path) -> Orphan:
    orphan = Orphan.claim(path)
    assert orphan is not None
    return orphan


def as_kill_leaves_it(path: Path, folder: Path) -> Path:
    """Copy a slot as kill -9 would leave it now: the same bytes, and nobody's lock."""
    folder.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(path.parent / "VERSION", folder / "VERSION")
    copy = folder / path.name
    shutil.copytree(path, copy)
    (copy / "LOCK").write_text(str((copy / "LOCK").stat().st_ino))
    return copy


class Task:
    """A task that folds each batch once, and none of an earlier epoch."""

    def __init__(self) -> None:
        self.states: dict[Any, State] = {}
        self.refused = 0
        self._folded: dict[tuple[str, int], Folded] = {}

    def fold(self, value: bytes) -> None:
        batch = decode_batch(value)
        key = batch.producer_id, batch.partition
        folded = self._folded.get(key, Folded())
        if batch.epoch < folded.epoch:
            self.refused += 1
            return
        if folded.has(batch.sequence):
            self._folded[key] = Folded(max(folded.epoch, batch.epoch), folded.next_sequence, folded.beyond)
            return
        self._folded[key] = folded.with_folded(batch.sequence, batch.floor, batch.epoch, 0)
        for group in batch.groups:
            merge = KINDS[group.definition.kind].merge
            for suffix_, state in zip(group.suffixes, group.states, strict=True):
                series = self.series(group.definition, suffix_)
                old = self.states.get(series)
                self.states[series] = state if old is None else merge(old, state)

    def series(self, definition: Definition, suffix: bytes) -> Any:
        """Return the key of a series in `states`."""
        return suffix

    def outbox_of(self, orphan: Orphan) -> Outbox:
        return Outbox.restored(orphan.producer_id, orphan.epoch, orphan.next_sequences, orphan.batches)

    def finish(self, orphan: Orphan) -> None:
        """Fold everything in a slot, and remove it."""
        outbox = self.outbox_of(orphan)
        if orphan.pending:
            orphan.commit(sealed(orphan.pending, outbox))
        for batch in [*outbox.pending()]:
            self.fold(orphan.load(batch.partition, batch.sequence))
            orphan.acknowledge([(batch.partition, batch.sequence)])
        orphan.remove()
