"""Whether a newer program has written to the changelog, found out before anything is fenced."""

from __future__ import annotations

import logging

from pipeline.core.record import POSITION_KEY
from pipeline.errors import NewerFormat, PipelineError
from pipeline.ports import Log
from pipeline.topics import CHANGELOG
from pipeline.worker.foreign import Lineage, not_entries

_log = logging.getLogger(__name__)
TAIL_COUNT = 8
"""Offsets at the end of a changelog that hold a position or a fence record, behind which are markers."""
_TAIL_POLLS_MAX = 10
_TAIL_BYTES = 64 * 2**20


def check_format(log: Log) -> None:
    """Raise `NewerFormat` if the newest that a changelog partition holds was written by a newer program.

    Before anything is fenced: a program that can't go on must not stop one that can. What it does not see, a start does.
    """
    starts, ends = log.start_offsets(CHANGELOG), log.end_offsets(CHANGELOG)
    tails = {number: max(starts.get(number, 0), end - TAIL_COUNT) for number, end in ends.items()}
    left = {number: ends[number] for number, first in tails.items() if first < ends[number]}
    if not left:
        return
    reader = log.reader(CHANGELOG)
    try:
        reader.assign({number: tails[number] for number in left})
        for _ in range(_TAIL_POLLS_MAX):
            for records in reader.poll(record_count_max=1_000, bytes_max=_TAIL_BYTES, timeout_s=0.5):
                lineage = Lineage(records.partition, 0)
                for index in not_entries(records.keys):
                    if records.keys[index] == POSITION_KEY:
                        lineage.take_position(records.offsets[index], records.values[index])
                if records.next_offset >= left.get(records.partition, 0):
                    left.pop(records.partition, None)
            if not left:
                return
    except NewerFormat:
        raise
    except PipelineError as error:
        _log.info("whether the changelog is of a newer format is not known yet: %s", error)
    finally:
        reader.close()
