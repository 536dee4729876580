"""How a test records to a spool, and what a task would make of what is sent."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

from pipeline.core.codec import decode_batch
from pipeline.core.merge import KINDS, State
from pipeline.core.record import Definition, series_prefix, series_suffix
from pipeline.core.sequence import Folded, Sealed
from pipeline.producer.sealing import Merged
from pipeline.producer.spool.leftover import Leftover
from pipeline.producer.spool.live import Drained, Spool
from pipeline.producer.spool.ring import VOID, head_of

VIEW = Definition("hits", "sum", ("page",))


def suffix(name: object) -> bytes:
    return series_suffix([str(name)])


def merged(name: object, state: State, delta_count: int = 1, definition: Definition = VIEW) -> Merged:
    key = suffix(name)
    return Merged(definition, key, crc32(series_prefix(definition.view) + key), state, delta_count)


def new_spool(folder: Path, producer_id: str = "p", bytes_max: int = 2**20, segment_bytes: int = 4096) -> Spool:
    return Spool(folder, producer_id, bytes_max=bytes_max, segment_bytes=segment_bytes)


def record(spool: Spool, series_id: int, value: float) -> None:
    """What a cell does."""
    is_int = type(value) is int
    head = head_of(series_id, is_int=is_int)
    while True:
        segment = spool.segment
        i = segment.next()
        try:
            if is_int:
                segment.ints[i] = value
            else:
                segment.values[i] = value
            segment.heads[i] = head
            return
        except IndexError:
            spool.rotate(segment)
        except BaseException:
            segment.heads[i] = VOID
            raise


def total(drained: Sequence[Drained]) -> dict[int, State]:
    """Sums by series."""
    out: dict[int, State] = {}
    for item in drained:
        out[item.series_id] = out.get(item.series_id, 0) + (sum(item.values) if item.values is not None else item.state)
    return out


def left_in(leftover: Leftover) -> dict[bytes, State]:
    """What a slot holds, in batches and beside them."""
    out = {item.suffix: item.state for item in leftover.pending}
    for sealed in loaded(leftover):
        for group in decode_batch(sealed.value).groups:
            for key, state in zip(group.suffixes, group.states, strict=True):
                out[key] = out.get(key, 0) + state
    return out


def claim(path: Path) -> Leftover:
    leftover = Leftover.claim(path)
    assert leftover is not None
    return leftover


def as_kill_leaves_it(path: Path, folder: Path) -> Path:
    """A slot as it would be found if its process were killed now: the same bytes, and nobody's lock."""
    folder.mkdir(exist_ok=True)
    shutil.copy(path.parent / "VERSION", folder / "VERSION")
    copy = folder / path.name
    shutil.copytree(path, copy)
    (copy / "LOCK").write_text(str((copy / "LOCK").stat().st_ino))
    return copy


class Task:
    """What a task does with batches: each once, none of an epoch that is over."""

    def __init__(self) -> None:
        self.states: dict[bytes, State] = {}
        self._folded: dict[tuple[str, int], Folded] = {}

    def fold(self, value: bytes) -> None:
        batch = decode_batch(value)
        key = batch.producer_id, batch.partition
        folded = self._folded.get(key, Folded())
        if batch.epoch < folded.epoch:
            return
        if folded.has(batch.sequence):
            self._folded[key] = Folded(max(folded.epoch, batch.epoch), folded.next_sequence, folded.beyond)
            return
        self._folded[key] = folded.with_folded(batch.sequence, batch.floor, batch.epoch, 0)
        for group in batch.groups:
            merge = KINDS[group.definition.kind].merge
            for suffix_, state in zip(group.suffixes, group.states, strict=True):
                old = self.states.get(suffix_)
                self.states[suffix_] = state if old is None else merge(old, state)

    def take(self, batches: Sequence[Sealed]) -> None:
        for sealed in batches:
            self.fold(sealed.value)


def loaded(leftover: Leftover) -> list[Sealed]:
    """Its batches, with their bytes."""
    return [
        Sealed(batch.partition, batch.sequence, leftover.load(batch.partition, batch.sequence), batch.entry_count)
        for batch in leftover.batches
    ]
