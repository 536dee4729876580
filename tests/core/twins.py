"""A task on the native core beside a plain one: every step of both must come to the same, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.core.commit import Commit, Lookup, Reading
from pipeline.core.expiry import Entry
from pipeline.core.limits import TaskLimits
from pipeline.core.record import Position, Records
from pipeline.core.task import Task


class TwinTask(Task):
    """A native task. Its plain twin keeps no committed states, so what the native one keeps is held against the store.

    The shell is asked for what the twin needs, which is all that the native one can need.
    """

    def __init__(self, partition: int, limits: TaskLimits, source_id: str = "", native: Any = None) -> None:
        super().__init__(partition, limits, source_id, native)
        self._twin = Task(partition, limits, source_id)
        self._twin._cache.update = lambda merged: None  # type: ignore[method-assign]
        self._twin_reading: Reading | None = None
        self._asked: list[bytes] = []
        self._twin_asked: list[bytes] = []

    def _compare(self) -> None:
        mine, twins = ((it.counts, it.next_offset, it.position, it.phase, it.full, it.dirty) for it in (self, self._twin))
        assert mine == twins

    def restored(self, position: Position, definitions: Iterable[bytes], *, next_offset: int | None = None) -> None:
        definitions = [*definitions]
        super().restored(position, definitions, next_offset=next_offset)
        self._twin.restored(position, definitions, next_offset=next_offset)

    def pass_hole(self) -> None:
        super().pass_hole()
        self._twin.pass_hole()

    def skip_to(self, next_offset: int) -> None:
        super().skip_to(next_offset)
        self._twin.skip_to(next_offset)

    def read(self, records: Records) -> Reading:
        reading, self._twin_reading = super().read(records), self._twin.read(records)
        for one, other in zip(reading.received, self._twin_reading.received, strict=True):
            assert type(one) is type(other)
            assert str(one) == str(other) if isinstance(one, Exception) else True
        assert reading.producer_keys == self._twin_reading.producer_keys
        return reading

    def fold(self, reading: Reading, values: Sequence[bytes | None], *, now_ms: int) -> None:
        assert self._twin_reading is not None
        super().fold(reading, values, now_ms=now_ms)
        self._twin.fold(self._twin_reading, values, now_ms=now_ms)
        self._compare()

    def sweep(self, entries: Iterable[tuple[bytes, bytes]], *, now_ms: int) -> None:
        entries = [*entries]
        super().sweep(entries, now_ms=now_ms)
        self._twin.sweep(entries, now_ms=now_ms)

    def freeze(self) -> Lookup:
        mine, twins = super().freeze(), self._twin.freeze()
        assert mine.keys == [key for key in twins.keys if key in {*mine.keys}]
        assert mine[1:] == twins[1:]
        self._asked, self._twin_asked = mine.keys, twins.keys
        return twins

    def prepare_commit(
        self,
        values: Sequence[bytes | None],
        existing: Sequence[bytes] = (),
        swept: Sequence[Sequence[Entry]] = (),
        *,
        now_ms: int,
    ) -> Commit:
        twins = self._twin.prepare_commit(values, existing, swept, now_ms=now_ms)
        found = dict(zip(self._twin_asked, values, strict=True))
        mine = super().prepare_commit([found[key] for key in self._asked], existing, swept, now_ms=now_ms)
        assert mine == twins
        return mine

    def committed(self) -> None:
        super().committed()
        self._twin.committed()
        self._compare()
