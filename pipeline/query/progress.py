"""Progress of partitions, as readers see it: positions, how stale they can be, and the time that they have reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from math import inf

import pipeline.metrics as m
from pipeline.core import codec
from pipeline.core.answer import AsOf, PartitionState
from pipeline.core.owners import owner_name
from pipeline.core.record import NO_POSITION, POSITION_KEY, Position
from pipeline.metrics import Metrics
from pipeline.ports import Clock, StoreView
from pipeline.query.damage import decode_stored
from pipeline.query.ends import LogEnds
from pipeline.query.staleness import EndOffsetHistory, LogTime, bound_ms, final_before_ms, seen_ms

_decode_position = lru_cache(maxsize=4_096)(codec.decode_position)


def position_of(value: bytes | None) -> Position:
    """Return the position that a store holds; `NO_POSITION` before its first commit."""
    return NO_POSITION if value is None else _decode_position(value)


def read_positions(stores: Mapping[int, StoreView]) -> dict[int, Position]:
    """Return the position of each store. Raises `Unreadable` for one that no worker wrote."""
    return {n: decode_stored(n, position_of, store.get([POSITION_KEY])[0]) for n, store in stores.items()}


def _reached(position: Position, seen: LogEnds) -> int:
    """Return the offset up to which the present topic is folded: 0 if the position is of an earlier topic of its name."""
    mine, log = position.source_id, seen.source_id
    return 0 if mine != log and mine and log else position.next_offset


def _caught_up(number: int, position: Position, seen: LogEnds) -> bool:
    return number in seen.end_offsets and seen.end_offsets[number] <= _reached(position, seen)


class Progress:
    """Knowledge of the log's ends and of the times of its records. Safe from any thread."""

    def __init__(self, ends: Callable[[], LogEnds], clock: Clock, metrics: Metrics) -> None:
        self._ends = ends
        self._clock = clock
        self._metrics = metrics
        self._histories: dict[int, EndOffsetHistory] = {}
        self._seen: LogEnds | None = None
        self._time = LogTime()

    def note_ends(self) -> LogEnds:
        """Return where the log ends, and remember it. Call this before stores are read."""
        seen = self._ends()
        if seen is not self._seen:
            for number, end_offset in seen.end_offsets.items():
                known = self._histories.get(number)
                if known is None:
                    known = self._histories.setdefault(number, EndOffsetHistory())
                known.observe(seen.at_s, end_offset)
            self._seen = seen
        return seen

    def show_unknown(self) -> None:
        """Set the gauges of staleness to infinity: no store can be read."""
        for number in self._histories:
            self._metrics.set(m.STALENESS, inf, number)

    def partitions(self, positions: Mapping[int, Position], seen: LogEnds) -> list[PartitionState]:
        """Return the state of each partition; sets their gauges."""
        for number in seen.end_offsets.keys() - positions.keys():  # a new partition without a store
            self._metrics.set(m.STALENESS, inf, number)
        now_s, now_ms = self._clock.monotonic_s(), self._clock.now_ms()
        self._observe(positions, seen, now_s)
        states = []
        for number, position in positions.items():
            next_offset = _reached(position, seen)
            staleness_ms = self._staleness_ms(number, position, seen, now_s, now_ms)
            end_offset = max(seen.end_offsets[number], next_offset) if number in seen.end_offsets else None
            lag = None if end_offset is None else end_offset - next_offset
            if lag is not None:
                self._metrics.set(m.LAG, lag, number)
                start_offset = seen.start_offsets.get(number, 0)
                self._metrics.set(m.START_OFFSET, start_offset, number)
                self._metrics.set(m.RETENTION_MARGIN, next_offset - start_offset, number)
            self._metrics.set(m.STALENESS, inf if staleness_ms is None else staleness_ms / 1000, number)
            at_ms, of = position.committed_at_ms, position.source_id
            owner = owner_name(position.owner_id)
            states.append(PartitionState(number, next_offset, end_offset, lag, staleness_ms, at_ms, of, owner))
        return states

    def _staleness_ms(self, number: int, position: Position, seen: LogEnds, now_s: float, now_ms: int) -> int | None:
        reached_s: float | None = None
        if _caught_up(number, position, seen):
            reached_s = seen.at_s
        elif number in self._histories:
            reached_s = self._histories[number].reached_s(_reached(position, seen))
        return bound_ms(position, reached_s, now_s=now_s, now_ms=now_ms)

    def as_of(self, positions: Mapping[int, Position], seen: LogEnds) -> AsOf:
        """Return what stores at these positions reflect; the ends were noted before the positions were read."""
        ends = seen.end_offsets
        next_offsets: dict[str, int] = {}
        behind: list[int] = []
        for number, position in positions.items():
            next_offsets[str(number)] = offset = _reached(position, seen)
            if ends.get(number, inf) > offset:
                behind.append(number)
        behind += ends.keys() - positions.keys()  # new partitions without a store
        now_s, now_ms = self._clock.monotonic_s(), self._clock.now_ms()
        bounds: list[int | None] = [seen_ms(seen.at_s, now_s)]
        for number in behind:
            bounds.append(self._staleness_ms(number, positions.get(number, NO_POSITION), seen, now_s, now_ms))
        known = [it for it in bounds if it is not None]
        return AsOf(max(known) if len(known) == len(bounds) else None, next_offsets, sorted(seen.elsewhere))

    def final_before_ms(self, positions: Mapping[int, Position], seen: LogEnds) -> int:
        """Return the time that all partitions have reached; the ends were noted before the positions were read.

        It is 0 for a server that does not follow all partitions: it can't know of the others.
        """
        self._observe(positions, seen, self._clock.monotonic_s())
        folded_ms: list[int | None] = []
        for number in positions.keys() | seen.end_offsets.keys():
            position = positions.get(number, NO_POSITION)
            caught_up = _caught_up(number, position, seen)
            folded_ms.append(None if caught_up else position.source_at_ms if _reached(position, seen) else 0)
        return 0 if seen.elsewhere else final_before_ms(folded_ms, self._time.reached_ms(seen.at_s))

    def _observe(self, positions: Mapping[int, Position], seen: LogEnds, now_s: float) -> None:
        """Note the newest time of a record of the present topic."""
        times = [position.source_at_ms for position in positions.values() if _reached(position, seen)]
        self._time.observe(max(times, default=0), now_s)
