"""Publishers of the simulator: what they record, how they number it, and what is left of them after a crash."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from pipeline.core.codec import encode_batch
from pipeline.core.merge import KINDS
from pipeline.core.record import Batch, Definition, Group, series_prefix, series_suffix
from pipeline.core.route import route
from pipeline.core.sequence import Outbox, Sealed
from pipeline.ports import Message
from pipeline.topics import DELTAS
from tests.sim.auditor import Auditor, Sent, Series, View

LABEL_VALUES = ("", "a", "b", "a\x00b", "ü", "x" * 40)


def some_views(rng: Random) -> list[View]:
    """Views of all kinds, some without labels."""
    kinds = rng.sample([*KINDS], len(KINDS)) if rng.random() < 0.5 else rng.choices([*KINDS], k=rng.randint(1, 4))
    return [
        View(f"v{i}", kind, ("l", "m")[: rng.choice((0, 1, 1, 2))], kind == "sum" and rng.random() < 0.5)
        for i, kind in enumerate(kinds)
    ]


def some_number(rng: Random, view: View) -> int | float:
    """A number that the view takes."""
    number = _signed_number(rng, view)
    return abs(number) if view.monotone else number


def _signed_number(rng: Random, view: View) -> int | float:
    """Ints, some beyond 64 bits, in every other view; in the others floats whose sums are exact in any order."""
    if view.name[-1] in "02468":
        bits = rng.choice((3, 3, 3, 31, 63, 64, 65, 200))
        return rng.randint(-(2**bits), 2**bits)
    return rng.randint(-4000, 4000) / 8 if rng.random() < 0.8 else rng.randint(-9, 9)


def some_delta(rng: Random, view: View) -> Any:
    """A raw delta, as `Kind.check` returns it."""
    if view.kind != "last":
        return some_number(rng, view)
    value = rng.choice((None, True, False, "", "text", "ü", some_number(rng, view), some_number(rng, view)))
    return rng.randint(0, 6), value


class SimPublisher:
    """One life of a publisher. Its buffers are lists of raw deltas; a batch merges them as the real one would."""

    def __init__(self, producer_id: str, auditor: Auditor, rng: Random, views: list[View], partition_count: int) -> None:
        self.producer_id = producer_id
        self.outbox = Outbox(producer_id, epoch=0)
        self.spool: dict[tuple[int, int], tuple[Batch, Sent]] | None = None
        """Sealed batches by partition and sequence, if they survive a crash."""
        self._auditor = auditor
        self._rng = rng
        self._views = views
        self._partition_count = partition_count
        self._buffer: dict[int, list[tuple[View, Series, Any]]] = {}

    def record(self, count: int) -> None:
        """Some deltas, of few series, so that they meet."""
        rng = self._rng
        for _ in range(count):
            view = rng.choice(self._views)
            labels = tuple(rng.choice(LABEL_VALUES[:3] if rng.random() < 0.9 else LABEL_VALUES) for _ in view.labels)
            key = series_prefix(view.name) + series_suffix(labels)
            partition = route(key, self._partition_count)
            self._buffer.setdefault(partition, []).append((view, (view.name, labels), some_delta(rng, view)))

    def seal(self, now_ms: int) -> list[Sealed]:
        """Make batches of all that is buffered, one for each partition, and count on sending them."""
        buffered, self._buffer = self._buffer, {}
        return [self._seal(partition, deltas, now_ms) for partition, deltas in buffered.items()]

    def seal_bad(self, now_ms: int) -> Sealed:
        """A batch that no partition may fold.

        It contradicts a definition, or a series is not one of its view, or it takes from a view that only grows.
        """
        rng = self._rng
        view = rng.choice(self._views)
        labels = ("a",) * len(view.labels)
        delta = some_delta(rng, view)
        malformed = unreadable = False
        if view.monotone and rng.random() < 0.3:
            unreadable = True
            delta = -1 - delta
        elif rng.random() < 0.5:
            malformed = True
            labels += ("a",)
        elif view.kind == "sum" and rng.random() < 0.5:
            view = View(view.name, "sum", view.labels, not view.monotone)
            delta = abs(delta)
        else:
            view = View(view.name, rng.choice([k for k in KINDS if k != view.kind]), view.labels)
            delta = some_delta(rng, view)
        partition = rng.randrange(self._partition_count)
        # Good neighbours fall with it: a batch is folded whole or not at all. But they could make up for a negative delta.
        deltas = [] if unreadable else self._buffer.pop(partition, [])
        return self._seal(partition, [*deltas, (view, (view.name, labels), delta)], now_ms, malformed, unreadable)

    def _seal(
        self,
        partition: int,
        deltas: list[tuple[View, Series, Any]],
        now_ms: int,
        malformed: bool = False,
        unreadable: bool = False,
    ) -> Sealed:
        rng = self._rng
        sequence, floor = self.outbox.next_numbers(partition)
        parts = [deltas]
        if rng.random() < 0.1:  # a view may come in several groups
            cut = rng.randint(0, len(deltas))
            parts = [deltas[:cut], deltas[cut:]]
        groups = [group for part in parts for group in _groups(part)]
        views = [View(d.view, d.kind, d.labels, d.monotone) for d in (g.definition for g in groups)]
        if rng.random() < 0.1:  # a view may be defined before it has a series
            view = rng.choice(self._views)
            groups.append(Group(_definition(view), [], []))
            views.append(view)
        batch = Batch(self.producer_id, self.outbox.epoch, partition, sequence, floor, now_ms, groups)
        sent = Sent(
            self.producer_id,
            self.outbox.epoch,
            partition,
            sequence,
            floor,
            tuple(views),
            tuple((series, delta) for _, series, delta in deltas),
            malformed,
            unreadable,
        )
        sealed = self._encode(batch, sent)
        self.outbox.add(sealed)
        if self.spool is not None:
            self.spool[partition, sequence] = batch, sent
        return sealed

    def _encode(self, batch: Batch, sent: Sent) -> Sealed:
        value = encode_batch(batch)
        self._auditor.sealed(value, sent)
        return Sealed(batch.partition, batch.sequence, value, len(sent.deltas))

    def acknowledge(self, sealed: Sealed, *, accepted: bool) -> None:
        """The log has taken it, or never will."""
        if self.outbox.acknowledge(sealed.partition, sealed.sequence) is not None and accepted:
            self._auditor.acknowledged(sealed.value)
        if self.spool is not None and (not accepted or self._rng.random() < 0.8):  # what is sent again does no harm
            self.spool.pop((sealed.partition, sealed.sequence), None)

    def reopened(self) -> SimPublisher:
        """Another process on the same spool: the same identity, the next epoch; what is in the spool is sent again."""
        assert self.spool is not None
        new = SimPublisher(self.producer_id, self._auditor, self._rng, self._views, self._partition_count)
        new.outbox.epoch = epoch = self.outbox.epoch + 1
        new.spool = {}
        for (partition, sequence), (batch, sent) in sorted(self.spool.items(), key=lambda item: item[0]):
            batch = Batch(batch.producer_id, epoch, partition, sequence, batch.floor, batch.created_at_ms, batch.groups)
            sent = replace(sent, epoch=epoch)
            new.spool[partition, sequence] = batch, sent
            new.outbox._next[partition] = sequence
            new.outbox.add(new._encode(batch, sent))
        new.outbox._next = dict(self.outbox._next)
        return new


def message_of(sealed: Sealed, producer_id: str) -> Message:
    """A sealed batch on its way; the key is not the protocol's business."""
    return Message(DELTAS, sealed.partition, producer_id.encode(), sealed.value)


def _definition(view: View) -> Definition:
    return Definition(view.name, view.kind, view.labels, monotone=view.monotone)


def _groups(deltas: list[tuple[View, Series, Any]]) -> list[Group]:
    columns: dict[View, dict[bytes, list[Any]]] = {}
    for view, (_, labels), delta in deltas:
        columns.setdefault(view, {}).setdefault(series_suffix(labels), []).append(delta)
    return [
        Group(
            _definition(view),
            [*series],
            [KINDS[view.kind].collect(raw) for raw in series.values()],
        )
        for view, series in columns.items()
    ]
