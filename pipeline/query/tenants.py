"""Bounds of access tokens in what is written, and in answers that are not answers of views."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.answer import PartitionStatus, Status
from pipeline.core.grants import Bounds
from pipeline.errors import Forbidden
from pipeline.ports import RawDelta, Refusal
from pipeline.pushed import Pushed

OUTSIDE = "bounds"
"""Reason for leaving out a sample that is outside the bounds of the token."""


def check_deltas(deltas: Sequence[RawDelta], bounds: Bounds | None) -> None:
    """Raise `Forbidden`, naming the first one, if deltas are outside the bounds."""
    if bounds is None:
        return
    for number, delta in enumerate(deltas):
        if reason := bounds.refusal(delta.view, delta.labels):
            raise Forbidden(f"delta {number}: {reason}")


def pushed_within(pushed: Pushed, bounds: Bounds | None, *, whole: bool) -> Pushed:
    """Return pushed metrics with the samples outside the bounds among those that are refused.

    Raises `Forbidden` if no sample is within the bounds, or if one is outside and the request is taken as a `whole`: with
    other bounds a repeat of it would have other samples, which a task would take for those that it has counted.
    """
    if bounds is None:
        return pushed
    for total in pushed.totals:  # these are always taken as a whole
        for it in total.deltas:
            if reason := bounds.refusal(it.view, it.labels):
                raise Forbidden(f"line {total.line}: {reason}")
    reasons = [bounds.refusal(it.view, it.labels) for it in pushed.deltas]
    outside = [Refusal(line, OUTSIDE, reason) for line, reason in zip(pushed.lines, reasons, strict=True) if reason]
    if outside and (whole or len(outside) == len(reasons)):
        raise Forbidden(f"line {outside[0].line}: {outside[0].detail}")
    inside = [i for i, reason in enumerate(reasons) if not reason]
    return pushed._replace(
        deltas=[pushed.deltas[i] for i in inside],
        lines=[pushed.lines[i] for i in inside],
        refused=[*pushed.refused, *outside],
    )


def status_within(status: Status, bounds: Bounds | None) -> Status:
    """Return what a bound token may know of a process: how far each partition is, and nothing of who else there is."""
    if bounds is None:
        return status
    partitions = [
        PartitionStatus(
            partition=it.partition,
            phase=it.phase,
            next_offset=it.next_offset,
            lag=it.lag,
            committed_at_ms=it.committed_at_ms,
            staleness_ms=it.staleness_ms,
            topic_id=it.topic_id,
        )
        for it in status.partitions
    ]
    return Status(
        ready=status.ready,
        partition_count=status.partition_count,
        partitions=partitions,
        role=status.role,
        at_ms=status.at_ms,
        topic_id=status.topic_id,
    )
