"""Finds the offset from which a log that has lost its tail holds records that were never folded.

The election of a leader that lacks the newest records takes them out of the log, and the records that are appended next take
their offsets. Then neither the offset identifies a record, nor its time, as clocks differ, nor its producer, which may be
forgotten. The epoch of its leader does: a leader gives out an offset once, and epochs never fall along a log (KIP-101). So
of the folded offsets, the log still holds the same records below the first one of a later epoch, and none of them from there
on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pipeline.core.record import EPOCH_NONE
from pipeline.errors import NotReady, RecordsLost, Unavailable
from pipeline.ports import Clock, Log, LogReader
from pipeline.topics import DELTAS

_PROBE_S = 2.0
_WAIT_MAX_S = 60.0
"""Upper limit of the wait for one record of the log."""


class LastRecord(NamedTuple):
    """Last record of a history: its leader's epoch, and the offset behind it."""

    leader_epoch: int
    end_offset: int


def what_is_gone(next_offset: int, start: int, end: int, *, anew: bool) -> str:
    """Return in words what a log that goes from `start` to `end` lacks of a position; empty if it lacks nothing."""
    if anew:
        return f"the topic was made anew: the position, {next_offset}, is in the one that is gone"
    if next_offset < start:
        return f"{start - next_offset} records ({next_offset} to {start - 1}) were deleted before they were folded"
    if next_offset <= end:
        return ""
    return f"the position is {next_offset}, but the topic ends at {end}: it was truncated or made anew"


def why_lost(log: Log, partition: int, last: LastRecord) -> str:
    """Return why `last` belongs to a history that the log has lost; empty if it does not, or the log is silent."""
    if last.leader_epoch == EPOCH_NONE:
        return ""
    reader = log.reader(DELTAS)
    try:
        reader.assign({partition: last.end_offset}, {partition: last.leader_epoch})
        reader.poll(record_count_max=1, bytes_max=1, timeout_s=_PROBE_S)
    except RecordsLost as error:
        return str(error)
    finally:
        reader.close()
    return ""


def last_common(
    log: Log, clock: Clock, partition: int, last: LastRecord, *, start: int, end: int, stopping: Callable[[], bool]
) -> LastRecord:
    """Return the last record that the log, from `start` to `end`, shares with the history that ends with `last`.

    Its end offset is `start` if they share no record. Without epochs that is the result, too: then only the memories of
    producers find duplicates. Raises `Unavailable` if the log can't be read, `NotReady` if `stopping` turns true.
    """
    found, low, high = EPOCH_NONE, start, min(end, last.end_offset)
    if last.leader_epoch == EPOCH_NONE:
        return LastRecord(EPOCH_NONE, start)
    reader = log.reader(DELTAS)
    try:
        while low < high:
            middle = (low + high) // 2
            record = _first_from(reader, clock, partition, middle, end, stopping)
            if record is None or record.leader_epoch > last.leader_epoch or record.end_offset > high:
                high = middle
            else:
                found, low = record
    finally:
        reader.close()
    return LastRecord(found, low)


def _first_from(
    reader: LogReader, clock: Clock, partition: int, offset: int, end: int, stopping: Callable[[], bool]
) -> LastRecord | None:
    """Return the first record at or behind an offset; None if there is none below `end`."""
    reader.assign({partition: offset})
    deadline_s = clock.monotonic_s() + _WAIT_MAX_S
    while True:
        for records in reader.poll(record_count_max=1, bytes_max=1, timeout_s=_PROBE_S):
            if records.offsets:
                return LastRecord(records.leader_epoch, records.offsets[-1] + 1)
            if records.next_offset >= end:
                return None
        if stopping():
            raise NotReady(f"partition {partition}: its start was stopped")
        if clock.monotonic_s() >= deadline_s:
            raise Unavailable(f"deltas-{partition} can't be read from {offset} on within {_WAIT_MAX_S:.0f} s")
