"""Counters of a partition that is folded here, and its part of `/v1/status`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

import pipeline.metrics as m
from pipeline.core.answer import PartitionStatus
from pipeline.core.codec import decode_letter
from pipeline.core.commit import Commit, Counts
from pipeline.core.record import Position
from pipeline.metrics import Metrics
from pipeline.worker.restore import RestoreProgress

if TYPE_CHECKING:
    from pipeline.worker.partition import OwnedPartition

_log = logging.getLogger(__name__)
_EXPORTED = {
    m.BATCHES_FOLDED: "batches_folded",
    m.ENTRIES_FOLDED: "entries_folded",
    m.BATCHES_DUPLICATE: "batches_duplicate",
    m.BATCHES_STALE: "batches_stale",
    m.GROUPS_REFUSED: "groups_refused",
    m.ENTRIES_EXPIRED: "entries_expired",
    m.SERIES_EXPIRED: "series_expired",
    m.SERIES_OVERFLOWED: "series_overflowed",
    m.PRODUCERS_FORGOTTEN: "producers_forgotten",
}
_COUNTED = (
    *_EXPORTED,
    m.COMMITS,
    m.ENTRIES_COMMITTED,
    m.DEAD_LETTERS,
    m.OVERLAY_FULL,
    m.RESTORE_ENTRIES,
    m.STORES_REBUILT,
    m.CHANGELOG_FOREIGN,
    m.DELTAS_HOLES,
    m.STORES_SET_ASIDE,
)
"""All counters of a partition."""


class Figures:
    """Exports the counters of one partition's task."""

    def __init__(self, partition: int, metrics: Metrics) -> None:
        self._partition = partition
        self._metrics = metrics
        self._exported = Counts()
        """Counters of the task at the last commit."""
        for metric in _COUNTED:  # exported from the start: Prometheus sees a rise only from a value that it has seen
            metrics.inc(metric, 0, partition)

    def committed(self, commit: Commit, counts: Counts, position: Position) -> None:
        """Export the counters after a commit has become durable."""
        inc, partition = self._metrics.inc, self._partition
        inc(m.COMMITS, 1, partition)
        inc(m.ENTRIES_COMMITTED, commit.series_count, partition)
        letters = [value for _, value in commit.dead_letters if value is not None]
        inc(m.DEAD_LETTERS, len(letters), partition)
        if letters:
            last, count = decode_letter(letters[-1]), len(letters)
            _log.warning("partition %d: %d dead letters; the last, at %d: %s", partition, count, last.offset, last.reason)
        for metric, name in _EXPORTED.items():
            inc(metric, getattr(counts, name) - getattr(self._exported, name), partition)
        self._exported = msgspec.structs.replace(counts)
        self._metrics.set(m.NEXT_OFFSET, position.next_offset, partition)


def partition_status(partition: OwnedPartition, end_offset: int | None, progress: RestoreProgress | None) -> PartitionStatus:
    """Return the status of a partition that is folded here. `end_offset` is None while the log is away."""
    next_offset = partition.task.position.next_offset
    status = PartitionStatus(
        partition=partition.number,
        phase=partition.task.phase.value,
        next_offset=next_offset,
        end_offset=end_offset,
        lag=None if end_offset is None else max(0, end_offset - next_offset),
        committed_at_ms=partition.task.position.committed_at_ms,
    )
    if progress is not None and not progress.done:
        status.restore = progress.status()
    return status
