"""The values that the records of `deltas` add up to, folded in the plainest way, in the order of each partition's log alone.

The ledger is written beside the task, so that it does not share its mistakes. It has in common with it the codec and the
memory for sequences, which have tests of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from pipeline.core.codec import decode_batch
from pipeline.core.record import Batch, Definition, parse_suffix
from pipeline.core.sequence import Folded
from pipeline.errors import BadRecord
from pipeline.topics import DELTAS
from tests.broker.drive import records
from tests.broker.kafka import App

Labels = tuple[tuple[str, str], ...]
"""Non-empty labels of a series, by name, as reads of several definitions merge series."""
MERGE: Mapping[str, Any] = {"sum": lambda old, new: old + new, "max": max, "min": min}


class Kept(NamedTuple):
    """The series of one kind that a view has."""

    view: str
    kind: str


class PartitionLedger:
    """The values of the batches of one partition, given in the order of its log."""

    def __init__(self, views: Collection[str]) -> None:
        self._views = views
        self._folded: dict[str, Folded] = {}
        self.states: dict[Definition, dict[Labels, Any]] = {}
        self.control_count = 0
        """Number of orders carried out in this partition."""

    def fold(self, batch: Batch) -> None:
        """Count the batch that comes next in the log, unless it was counted before."""
        known = self._folded.get(batch.producer_id, Folded())
        if known.has(batch.sequence):
            return
        self._folded[batch.producer_id] = known.with_folded(batch.sequence, batch.floor, batch.epoch, 0)
        for control in batch.controls:
            self.control_count += 1
            for definition in [*self.states]:
                meant = control.kind in ("", definition.kind) and control.labels in (None, definition.labels)
                if definition.view == control.view and meant:
                    del self.states[definition]
        for group in batch.groups:
            definition = group.definition
            if definition.view not in self._views:
                continue
            merge, mine = MERGE[definition.kind], self.states.setdefault(definition, {})
            for suffix, state in zip(group.suffixes, group.states, strict=True):
                named = zip(definition.labels, parse_suffix(suffix)[1], strict=True)
                labels = tuple((name, value) for name, value in named if value)
                mine[labels] = merge(mine[labels], state) if labels in mine else state


class Ledger(NamedTuple):
    """The value of each series, by view and kind, and the number of orders carried out over all partitions."""

    values: Mapping[Kept, Mapping[Labels, Any]]
    control_count: int


def ledger(app: App, views: Collection[str]) -> Ledger:
    """Fold everything that `deltas` holds now. Records that are no batches, or of another partition, are left out."""
    partitions: dict[int, PartitionLedger] = defaultdict(lambda: PartitionLedger(views))
    for record in sorted(records(app, DELTAS), key=lambda it: (it.partition(), it.offset())):
        try:
            batch = decode_batch(record.value() or b"")
        except BadRecord:
            continue
        if batch.partition == record.partition():
            partitions[record.partition()].fold(batch)
    return Ledger(_together(partitions.values()), sum(it.control_count for it in partitions.values()))


def _together(partitions: Iterable[PartitionLedger]) -> dict[Kept, dict[Labels, Any]]:
    values: dict[Kept, dict[Labels, Any]] = defaultdict(dict)
    for partition in partitions:
        for definition, series in partition.states.items():
            mine, merge = values[Kept(definition.view, definition.kind)], MERGE[definition.kind]
            for labels, state in series.items():
                mine[labels] = merge(mine[labels], state) if labels in mine else state
    return values
