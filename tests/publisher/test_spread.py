"""Views that are spread: the same answers, from several partitions, whoever publishes with which spread."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.core.codec import decode_batch
from pipeline.core.query import Query
from pipeline.core.record import Definition
from pipeline.errors import Invalid
from pipeline.ports import RawDelta
from pipeline.topics import DELTAS
from tests.publisher.support import memory_log, publisher
from tests.query.support import World


def publish(world: World, spread: int | None, count: int) -> None:
    """Flush a delta of one series so many times, from a publisher of its own."""
    with publisher(world.log) as pub:
        hot = pub.sum("hot", labels=("region",), spread=spread)
        for _ in range(count):
            hot.add(1, region="eu")
            pub.flush()
        assert hot.local()["eu",] == count


def lengths(world: World) -> list[int]:
    """Return the number of batches with series in each partition of the log."""
    partitions = [world.log.partition(DELTAS, number).rows for number in range(4)]
    return [sum(bool(decode_batch(row.value or b"").groups) for row in rows) for rows in partitions]


def total(world: World) -> Any:
    world.fold()
    answer = world.reader.read(Query("hot"), deadline_s=2**60)
    assert len(answer.series) == 1
    point = world.reader.point(Query("hot", by=()))
    assert point is None or point.series[0].value == answer.series[0].value
    return answer.value()


def test_publishers_that_disagree_are_added_up() -> None:
    """One series of publishers with several spreads is one series of the answer, with all deltas in it."""
    world = World(4)
    publish(world, None, 3)
    assert sorted(lengths(world)) == [0, 0, 0, 3]
    publish(world, 2, 4)
    assert sorted(lengths(world)) == [0, 0, 2, 5]
    publish(world, 1_000, 8)
    assert sum(lengths(world)) == 15
    assert min(lengths(world)) == 2
    with publisher(world.log, spread=4) as pub:
        for _ in range(4):
            pub.sum("hot", labels=("region",)).add(1, region="eu")
            pub.flush()
    assert min(lengths(world)) == 3
    assert total(world) == 19


def test_a_gateway_spreads_requests() -> None:
    """Deltas of requests are spread as they say, or as the gateway's setting says."""
    world = World(4)
    assert world.ingest is not None
    for number in range(8):
        world.ingest.deltas([RawDelta("hot", "sum", {"region": "eu"}, number, spread=4)])
    assert lengths(world) == [2, 2, 2, 2]
    world.ingest.deltas([RawDelta("hot", "sum", {"region": "eu"}, 1)] * 2)
    assert total(world) == 30


@pytest.mark.parametrize("spread", [0, -1, 1_025, 2.0, "2", True, None.__class__])
def test_what_is_no_number_of_partitions_is_refused(spread: Any) -> None:
    """A spread is a whole number from 1 to 1024, at a publisher and at a gateway."""
    world = World(1)
    assert world.ingest is not None
    with pytest.raises(Invalid, match="view hot: spread is a whole number from 1 to 1024"):
        world.ingest.deltas([RawDelta("hot", "sum", {}, 1, spread=spread)])
    with publisher(memory_log()) as pub, pytest.raises(Invalid, match="spread is a whole number"):
        pub.sum("hot", spread=spread)


def test_a_series_that_expires_when_silent_is_in_one_partition() -> None:
    """Parts of it could expire while others are recorded to: so that is refused, and the setting does not concern it."""
    with publisher(memory_log(), spread=3) as pub:
        with pytest.raises(Invalid, match="spread needs windows where there is retention_s"):
            pub.sum("silent", retention_s=60, spread=2)
        silent: Any = pub.sum("silent", retention_s=60)
        assert silent.spread == 1
        other: Any = pub.define(Definition("other", "sum", (), 60, False, 600), spread=2)
        assert other.spread == 2
        default: Any = pub.sum("default")
        assert default.spread == 3


def test_a_view_has_one_spread_in_a_process() -> None:
    """A spread that is not that of the view before is an error; none is as before."""
    with publisher(memory_log()) as pub:
        view = pub.sum("v", spread=2)
        assert pub.sum("v") is view
        assert pub.sum("v", spread=2) is view
        with pytest.raises(Invalid, match="view v is spread over 2 partitions here; not 3"):
            pub.sum("v", spread=3)
