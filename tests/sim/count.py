"""The naive count of one partition: lists of deltas and sets of numbers, record by record in the order of the log."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.sim.entries import Place, Series, View, key_of

Delta = tuple[Place, Any]
"""Label values and window, and the delta recorded for them."""

AHEAD_MS_MAX = 3_600_000
"""Limit to how far a `last`, or a window, may be ahead of its record."""


NONE_LATE: Mapping[int, Container[bytes]] = {}


@dataclass(frozen=True)
class Order:
    """Content of a control record: drop or reset the definitions of a view, all of them or some."""

    action: str
    view: str
    kind: str = ""
    labels: tuple[str, ...] | None = None

    def concerns(self, view: View) -> bool:
        return view.name == self.view and self.kind in ("", view.kind) and self.labels in (None, view.labels)


@dataclass(frozen=True)
class Limits:
    """Settings of the workers of a history."""

    views_max: int
    series_max: int
    producer_ttl_ms: int
    closed_producer_ttl_ms: int


@dataclass(frozen=True)
class SentGroup:
    """The part of a batch that belongs to one definition."""

    view: View
    deltas: tuple[Delta, ...]
    flaw: str = ""
    """Why no partition may fold the group: `labels` that its view does not have, or a `negative` delta of a counter."""

    def is_bad(self, at_ms: int) -> bool:
        """Return whether the group is refused in a record that the log accepted at this time."""
        latest_ms = at_ms + AHEAD_MS_MAX
        ahead = self.view.kind == "last" and any(delta.ts_ms > latest_ms for _, delta in self.deltas)
        ahead |= any(start_ms > latest_ms for (_, start_ms), _ in self.deltas)
        return bool(self.flaw) or ahead or not self.deltas


@dataclass(frozen=True)
class Sent:
    """Content of a sealed batch. Two batches with one identity have the same, unless a zombie or a stranger made one."""

    producer_id: str
    epoch: int
    partition: int
    sequence: int
    floor: int
    groups: tuple[SentGroup, ...]
    closing: bool = False
    orders: tuple[Order, ...] = ()
    law: str = ""
    """`free`: the task may fold or refuse the batch. `jump`: the same, but it is refused if its producer is known."""

    @property
    def identity(self) -> tuple[str, int, int]:
        return self.producer_id, self.partition, self.sequence


@dataclass
class Producer:
    """Memory of one producer in one partition."""

    epoch: int = 0
    floor: int = 0
    seen_at_ms: int = 0
    """True time at which the log accepted its newest batch."""
    closed: bool = False
    accepted: set[int] = field(default_factory=set)

    def settled(self, sequence: int) -> bool:
        return sequence in self.accepted or sequence < self.floor

    def as_stored(self) -> list[Any]:
        """Return the entry that a partition must hold: all below the first gap as one number, the rest as ranges."""
        start = self.floor
        while start in self.accepted:
            start += 1
        ranges: list[list[int]] = []
        for sequence in sorted(s for s in self.accepted if s > start):
            if ranges and ranges[-1][1] == sequence:
                ranges[-1][1] += 1
            else:
                ranges.append([sequence, sequence + 1])
        return [self.epoch, start, ranges]


@dataclass(frozen=True)
class Row:
    """A record of the deltas topic, as the log accepted it; or an offset that the log uses for itself."""

    at_ms: int
    """Time of the record as the log states it."""
    true_ms: int
    value: bytes | None
    sent: Sent | None
    hole: bool = False


class Count:
    """Expected content of one partition, up to an offset."""

    def __init__(self, partition: int, limits: Limits) -> None:
        self.partition = partition
        self.next_offset = 0
        self.source_at_ms = 0
        self.verdicts: list[str] = []
        self.refused: dict[int, tuple[int, ...]] = {}
        """Indexes of the refused groups of each folded batch, by offset."""
        self.views: dict[View, set[bytes]] = {}
        """Definitions in the order of their first batches, and the keys of their series."""
        self.producers: dict[str, Producer] = {}
        """Producers that are remembered."""
        self.folded: set[tuple[str, int]] = set()
        """Producer and sequence of every batch that was ever folded."""
        self.series: dict[bytes, Series] = {}
        self.deltas: dict[bytes, list[Any]] = {}
        """Deltas of each series, by the key of its entry."""
        self.ghosts: dict[bytes, tuple[View, bytes | None]] = {}
        """Entries of series that have expired: they may still be there, unchanged."""
        self.touched_ms: dict[bytes, int] = {}
        """True time at which the log accepted the last delta of each series."""
        self.touched: set[View] = set()
        """Definitions whose series have changed since this set was last cleared."""
        self.had_loss = False
        self.unsure = False
        """True once the log holds a record that the law allows a task to fold or to refuse."""
        self._limits = limits

    def take(self, row: Row, *, lost: bool, refused: bool = False, late: Mapping[int, Container[bytes]] = NONE_LATE) -> str:
        """Count the next record and return its outcome. `refused` says how the task chose where the law leaves it free.

        `late` has, by the index of their group, the keys of series that the task refused because they have expired.
        """
        verdict = "lost" if lost else "hole" if row.hole else self._judge(row, refused)
        self.verdicts.append(verdict)
        self.next_offset += 1
        self.unsure |= bool(row.sent and row.sent.law)
        self.had_loss |= lost
        if lost or row.hole:
            return verdict
        self.source_at_ms = row.at_ms
        if verdict in ("folded", "duplicate"):
            assert row.sent is not None
            producer = self.producers.setdefault(row.sent.producer_id, Producer())
            if row.sent.law != "jump" or verdict == "folded":
                producer.epoch = max(producer.epoch, row.sent.epoch)
            if verdict == "folded":
                self._fold(producer, row, row.sent, late)
        return verdict

    def _fold(self, producer: Producer, row: Row, sent: Sent, late: Mapping[int, Container[bytes]]) -> None:
        producer.floor = max(producer.floor, sent.floor)
        producer.seen_at_ms = row.true_ms
        producer.closed = sent.closing
        producer.accepted.add(sent.sequence)
        self.folded.add((sent.producer_id, sent.sequence))
        for order in sent.orders:
            self._carry_out(order)
        refused = tuple(i for i, group in enumerate(sent.groups) if not self._fold_group(group, row, late.get(i, ())))
        if refused:
            self.refused[self.next_offset - 1] = refused

    def _fold_group(self, group: SentGroup, row: Row, late: Container[bytes]) -> bool:
        full = group.view not in self.views and len(self.views) >= self._limits.views_max
        if full or group.is_bad(row.at_ms):
            return False
        keys = self.views.setdefault(group.view, set())
        self.touched.add(group.view)
        for place, delta in group.deltas:
            key = key_of((group.view, place))
            if key in late:
                continue
            keys.add(key)
            self.series[key] = group.view, place
            self.deltas.setdefault(key, []).append(delta)
            self.touched_ms[key] = row.true_ms
            self.ghosts.pop(key, None)
        return True

    def expire(self, entries: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Expire these series: nothing merges with them from now on, while their entries may stay unchanged for a while."""
        for key, value in entries:
            if key in self.deltas:
                view, _ = self.series.pop(key)
                del self.deltas[key]
                self.ghosts[key] = view, value
                self.views[view].discard(key)

    def _carry_out(self, order: Order) -> None:
        for view in [view for view in self.views if order.concerns(view)]:
            for key in self.views[view]:
                del self.series[key], self.deltas[key]
            self.ghosts = {key: ghost for key, ghost in self.ghosts.items() if ghost[0] != view}
            self.touched.add(view)
            self.views[view] = set()
            if order.action == "drop":
                del self.views[view]

    def remembers(self, producer: Producer, now_ms: int) -> bool:
        """Return whether a partition has to remember the producer at this time, whatever its clocks say."""
        limits = self._limits
        ttl_ms = limits.closed_producer_ttl_ms if producer.closed else limits.producer_ttl_ms
        return now_ms - producer.seen_at_ms <= ttl_ms

    def _judge(self, row: Row, refused: bool) -> str:
        sent = row.sent
        if sent is None or sent.partition != self.partition:
            return "bad"
        producer = self.producers.get(sent.producer_id)
        if producer is None:
            return "bad" if sent.law and refused else "folded"
        if producer.settled(sent.sequence):
            return "duplicate"
        if sent.epoch < producer.epoch:
            return "stale"
        if sent.law == "jump" and self.remembers(producer, row.true_ms):
            return "bad"
        return "bad" if sent.law and refused else "folded"
