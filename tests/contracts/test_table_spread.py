"""Series that are spread: which partition takes a series at which drain, of both tables."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import pytest

from pipeline.core.record import canonical, series_prefix, series_suffix
from tests.contracts.tables import JOURNALS, WAYS, Lab, every_table, states_of


def first_of(view: Any, region: str, partition_count: int) -> int:
    """The partition that the key of a series names."""
    return crc32(series_prefix(canonical(view.definition)) + series_suffix((region,))) % partition_count


@every_table
@pytest.mark.parametrize("spread", [1, 2, 3, 7, 9])
def test_a_series_takes_turns_among_its_partitions(way: str, spread: int) -> None:
    """With each turn a series goes to the next of `spread` partitions, of which the key names the first; nothing is lost."""
    lab = Lab(way)
    view, plain = lab.define(spread=spread), lab.define(view="plain")
    assert view.spread == spread
    width = min(spread, 7)
    total = 0
    for turn in range(2 * width):
        for region in ("eu", "us"):
            view.add(turn + 1, region=region)
        plain.add(1, region="eu")
        drafts = lab.drain(7, turn=turn)
        total += turn + 1
        states = {draft.partition: states_of([draft]) for draft in drafts}
        for region in ("eu", "us"):
            partition = (first_of(view, region, 7) + turn % width) % 7
            assert states[partition]["sum", (region,)] == turn + 1
        assert states[first_of(plain, "eu", 7)]["plain", ("eu",)] == 1
        assert sum(draft.series_count for draft in drafts) == 3
    lab.table.snapshot()
    local = lab.table.local(view)
    assert {local[suffix] for suffix in local} == {total}


@pytest.mark.parametrize("way", [way for way in WAYS if way not in JOURNALS])
def test_a_busy_partition_is_passed_over(way: str) -> None:
    """If the partition whose turn it is is busy, the next of the series' partitions takes it; if all are, it waits."""
    lab = Lab(way)
    view = lab.define(spread=3)
    first = first_of(view, "eu", 5)
    view.add(1, region="eu")

    def busy(*numbers: int) -> bytes:
        return bytes([(partition - first) % 5 in numbers for partition in range(5)])

    assert lab.drain(5, busy(0, 1, 2)) == []
    assert lab.table.waiting_count == 1
    (draft,) = lab.drain(5, busy(1, 2), turn=1)
    assert draft.partition == first
    view.add(1, region="eu")
    (draft,) = lab.drain(5, busy(0, 1), turn=1)
    assert draft.partition == (first + 2) % 5
    assert lab.table.waiting_count == 0
