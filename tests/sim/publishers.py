"""Publishers of the simulator: the deltas they record, the sequences they give them, and what survives a crash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any
from zlib import crc32

import msgspec

from pipeline.core.codec import encode_batch
from pipeline.core.kinds import KINDS
from pipeline.core.record import Batch, Control, Definition, Group, series_prefix, series_suffix
from pipeline.core.sequence import Outbox, Sealed
from pipeline.ports import Message
from pipeline.topics import DELTAS
from tests.sim.auditor import Auditor
from tests.sim.clocks import NodeClock
from tests.sim.count import AHEAD_MS_MAX, Delta, Order, Sent, SentGroup
from tests.sim.entries import Place, View
from tests.sim.laws import Set

LABEL_VALUES = ("", "a", "b", "a\x00b", "ü", "x" * 40)

Recorded = tuple[View, Place, Any]
"""A definition, label values and window, and a delta as the auditor knows it."""


def some_views(rng: Random) -> list[View]:
    """Return views of all kinds, some without labels."""
    kinds = rng.sample([*KINDS], len(KINDS)) if rng.random() < 0.5 else rng.choices([*KINDS], k=rng.randint(1, 4))
    return [
        View(f"v{i}", kind, ("l", "m")[: rng.choice((0, 1, 1, 2))], kind == "sum" and rng.random() < 0.5)
        for i, kind in enumerate(kinds)
    ]


def in_time(rng: Random, view: View, *, expires: bool) -> View:
    """Return the view with windows, or with a retention, or with both."""
    window_s = rng.choice((0, 1, 2, 2, 7, 60))
    return replace(view, window_s=window_s, retention_s=rng.choice((0, 1, 3, 3, 20, 600)) if expires else 0)


def other_definition(rng: Random, view: View) -> View:
    """Return another definition of the view: other labels, another kind, or a counter."""
    if view.kind == "sum" and rng.random() < 0.4:
        return replace(view, monotone=not view.monotone)
    if rng.random() < 0.5:
        return replace(view, labels=rng.choice([labels for labels in _LABELS if labels != view.labels]))
    return View(view.name, rng.choice([k for k in KINDS if k != view.kind]), view.labels)


_LABELS: tuple[tuple[str, ...], ...] = ((), ("l",), ("l", "m"), ("k", "l"))


def some_number(rng: Random, view: View, *, floats: bool = False) -> int | float:
    """Return a number that the view takes."""
    number = _signed_number(rng, view, floats=floats)
    return abs(number) if view.monotone else number


def _signed_number(rng: Random, view: View, *, floats: bool) -> int | float:
    """Return an int, for every other view perhaps beyond 64 bits, or a float whose sums are exact in any order.

    With `floats` these are so large and so small that their sums are exact only together with their rounding errors.
    """
    if view.name[-1] in "02468":
        bits = rng.choice((3, 3, 3, 31, 63, 64, 65, 200))
        return rng.randint(-(2**bits), 2**bits)
    if floats and rng.random() < 0.4:
        scale = rng.choice((2**53, 2**60, 2**80))
        return rng.choice((float, float, int))(rng.randint(-9, 9) * scale)
    return rng.randint(-4000, 4000) / 8 if rng.random() < 0.8 else rng.randint(-9, 9)


class SimPublisher:
    """One life of a publisher. Its buffers are lists of raw deltas; a batch merges them as the real one would."""

    def __init__(
        self,
        producer_id: str,
        auditor: Auditor,
        rng: Random,
        views: Sequence[View],
        partition_count: int,
        clock: NodeClock,
        *,
        ties: bool = False,
        floats: bool = False,
        epoch: int = 0,
    ) -> None:
        self.producer_id = producer_id
        self.outbox = Outbox(producer_id, epoch=epoch)
        self.spool: dict[tuple[int, int], tuple[Batch, Sent]] | None = None
        """Sealed batches by partition and sequence, if they survive a crash."""
        self.views = views
        self.clock = clock
        self._auditor = auditor
        self._rng = rng
        self._partition_count = partition_count
        self._ties = ties
        self._floats = floats
        self._buffer: dict[int, list[Recorded]] = {}
        self._sets = 0
        self._recorded_ns = 0
        self._turn = 0

    def record(self, count: int) -> None:
        """Record some deltas of few series, so that deltas merge."""
        for _ in range(count):
            view, place, delta = self._some_recorded()
            partition = self._partition_of(view, place)
            self._buffer.setdefault(partition, []).append((view, place, delta))

    def _partition_of(self, view: View, place: Place) -> int:
        """Return the partition of a series, of one that is spread the next; publishers disagree about how far it is."""
        self._turn += 1
        spread = 1 + crc32(self.producer_id.encode()) % 3 if view.is_spread else 1
        first = crc32(series_prefix(_definition(view)) + series_suffix(*place))
        return (first + self._turn % min(spread, self._partition_count)) % self._partition_count

    def _some_recorded(self) -> Recorded:
        rng = self._rng
        view = rng.choice(self.views)
        labels = tuple(rng.choice(LABEL_VALUES[:3] if rng.random() < 0.9 else LABEL_VALUES) for _ in view.labels)
        return view, (labels, self._some_window(view)), self.some_delta(view)

    def _some_window(self, view: View) -> int:
        """Return the start of the present window, of one that is soon to expire or has, or, rarely, of one far ahead."""
        rng = self._rng
        if not view.window_s:
            return 0
        kept_ms = view.window_ms + view.retention_s * 1_000
        late_ms = rng.choice((0, 0, 0, rng.randint(0, kept_ms), rng.randint(0, 2 * kept_ms)))
        ts_ms = self.clock.now_ms() - late_ms
        if rng.random() < 0.02:
            ts_ms += rng.choice((view.window_ms, 2 * AHEAD_MS_MAX))
        return ts_ms // view.window_ms * view.window_ms

    def some_groups(self, count: int) -> tuple[SentGroup, ...]:
        """Return the content of a batch of so many deltas."""
        return tuple(grouped([self._some_recorded() for _ in range(count)]))

    def some_delta(self, view: View) -> Any:
        """Return a delta of the view; for a `last` the next set of this process, perhaps in the millisecond of another's."""
        rng = self._rng
        if view.kind == "distinct":
            return rng.choice((1, -1)) * 2 ** rng.choice((3, 40, 61)) + rng.randint(0, 1)  # a hash
        if view.kind == "topk":
            return rng.choice(("", "a", "b", "\u00fc")), rng.randint(1, 9)
        if view.kind != "last":
            return some_number(rng, view, floats=self._floats)
        number = some_number(rng, view), some_number(rng, view)
        value = rng.choice((None, True, False, "", "text", "ü", *number))
        self._sets += 1
        ts_ms = self._sets
        if self._ties:
            ts_ms = rng.randint(0, 6) if rng.random() < 0.8 else self.clock.now_ms()
        recorded_ns = self.clock.now_ms() * 1_000_000 if self._sets == 1 else self._recorded_ns + rng.choice((1, 1, 10**6))
        self._recorded_ns = recorded_ns
        return Set(f"{self.producer_id}/{self.outbox.epoch}", self._sets, ts_ms, value, recorded_ns)

    def seal(self, *, closing: bool = False) -> list[Sealed]:
        """Make a batch of all that is buffered for each partition, and expect it to be sent."""
        buffered, self._buffer = self._buffer, {}
        return [self._seal(partition, deltas, closing=closing) for partition, deltas in buffered.items()]

    def seal_for(self, partition: int) -> Sealed:
        """Seal a batch without deltas."""
        return self._seal(partition, [])

    def seal_order(self, order: Order) -> list[Sealed]:
        """Seal the order for every partition, ahead of what is buffered for it."""
        buffered, self._buffer = self._buffer, {}
        return [
            self._seal(partition, buffered.get(partition, []), orders=(order,)) for partition in range(self._partition_count)
        ]

    def seal_bad(self) -> Sealed:
        """Seal a batch with a group that no partition may fold: a series does not fit its view, or a counter falls."""
        rng = self._rng
        view = rng.choice(self.views)
        labels, delta = ("a",) * len(view.labels), self.some_delta(view)
        if view.monotone and rng.random() < 0.5:
            flaw, delta = "negative", -1 - delta
        else:
            flaw, labels = "labels", (*labels, "a")
        partition = rng.randrange(self._partition_count)
        deltas = (((labels, self._some_window(view)), delta),)
        return self._seal(partition, self._buffer.pop(partition, []), SentGroup(view, deltas, flaw))

    def _seal(
        self,
        partition: int,
        deltas: list[Recorded],
        bad: SentGroup | None = None,
        *,
        closing: bool = False,
        orders: tuple[Order, ...] = (),
    ) -> Sealed:
        rng = self._rng
        sequence, floor = self.outbox.next_numbers(partition)
        parts = [deltas]
        if rng.random() < 0.1:  # a view may come in several groups
            cut = rng.randint(0, len(deltas))
            parts = [deltas[:cut], deltas[cut:]]
        groups = [group for part in parts for group in grouped(part)]
        if bad is not None:
            groups.insert(rng.randint(0, len(groups)), bad)
        if rng.random() < 0.1:  # a view may be defined before it has a series
            groups.append(SentGroup(rng.choice(self.views), ()))
        numbers = self.outbox.epoch, partition, sequence, floor
        sent = Sent(self.producer_id, *numbers, tuple(groups), closing=closing, orders=orders)
        batch = batch_of(sent, self.clock.now_ms())
        sealed = self._encode(batch, sent)
        self.outbox.add(sealed)
        if self.spool is not None:
            self.spool[partition, sequence] = batch, sent
        return sealed

    def _encode(self, batch: Batch, sent: Sent) -> Sealed:
        value = encode_batch(batch)
        self._auditor.sealed(value, sent)
        return Sealed(batch.partition, batch.sequence, value, sum(len(group.suffixes) for group in batch.groups))

    def acknowledge(self, sealed: Sealed, *, accepted: bool) -> None:
        """Note that the log has taken the batch, or never will."""
        if self.outbox.acknowledge(sealed.partition, sealed.sequence) is not None and accepted:
            self._auditor.acknowledged(sealed.value)
        if self.spool is not None and (not accepted or self._rng.random() < 0.8):  # what is sent again does no harm
            self.spool.pop((sealed.partition, sealed.sequence), None)

    def outlived(self) -> SimPublisher:
        """Let a process pause for so long that it may not send earlier batches again."""
        for sealed in [*self.outbox.pending()]:
            self.outbox.acknowledge(sealed.partition, sealed.sequence)
        if self.spool is not None:
            self.spool = {}
        return self

    def reopened(self) -> SimPublisher:
        """Return another process on the same spool: the same identity, the next epoch; spooled batches are sent again."""
        assert self.spool is not None
        new = SimPublisher(
            self.producer_id,
            self._auditor,
            self._rng,
            self.views,
            self._partition_count,
            self.clock,
            ties=self._ties,
            floats=self._floats,
            epoch=self.outbox.epoch + 1,
        )
        new.spool = {}
        for (partition, sequence), (batch, sent) in sorted(self.spool.items(), key=lambda item: item[0]):
            epoch = new.outbox.epoch
            batch, sent = msgspec.structs.replace(batch, epoch=epoch), replace(sent, epoch=epoch)
            new.spool[partition, sequence] = batch, sent
            new.outbox._next[partition] = sequence
            new.outbox.add(new._encode(batch, sent))
        new.outbox._next = dict(self.outbox._next)
        return new


def message_of(sealed: Sealed, producer_id: str) -> Message:
    """Return a sealed batch as a message; the protocol does not use the key."""
    return Message(DELTAS, sealed.partition, producer_id.encode(), sealed.value)


def grouped(deltas: list[Recorded]) -> list[SentGroup]:
    """Return a group for each definition, in the order of their first deltas."""
    by_view: dict[View, list[Delta]] = {}
    for view, place, delta in deltas:
        by_view.setdefault(view, []).append((place, delta))
    return [SentGroup(view, tuple(found)) for view, found in by_view.items()]


def batch_of(sent: Sent, created_at_ms: int) -> Batch:
    """Return the real batch with this content."""
    groups = [_group(group) for group in sent.groups]
    return Batch(
        sent.producer_id,
        sent.epoch,
        sent.partition,
        sent.sequence,
        sent.floor,
        created_at_ms,
        groups,
        closing=sent.closing,
        controls=[Control(order.action, order.view, order.kind, order.labels) for order in sent.orders],
    )


def _group(group: SentGroup) -> Group:
    columns: dict[bytes, list[Any]] = {}
    for place, delta in group.deltas:
        columns.setdefault(series_suffix(*place), []).append(_raw(group.view, delta))
    kind = KINDS[group.view.kind]
    return Group(_definition(group.view), [*columns], [kind.collect(raw) for raw in columns.values()])


def _raw(view: View, delta: Any) -> Any:
    """Return a delta in the form in which its kind collects it."""
    return (delta.ts_ms, delta.recorded_ns, delta.value) if view.kind == "last" else delta


def _definition(view: View) -> Definition:
    return Definition(view.name, view.kind, view.labels, view.window_s, view.monotone, view.retention_s)
