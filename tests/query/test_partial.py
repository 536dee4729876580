"""Servers of some partitions answer from these alone, and name the missing ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.adapters.http import HttpReader
from pipeline.core.record import Definition
from pipeline.errors import Invalid
from tests.query.support import Part, Server, World, serving

HITS = Definition("hits", "sum", ("n",))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    world = World(4)
    for number in range(4):
        world.append(number, HITS, {("a",): 10**number, (str(number),): 1})
    world.fold()
    with serving(world.part(1, 2)) as it:
        yield it


def whole_of(server: Server) -> World:
    assert isinstance(server.world, Part)
    return server.world.world


def test_an_answer_names_what_it_lacks(server: Server) -> None:
    """Positions, status and answers cover the partitions that the server follows; the others are named as missing."""
    with HttpReader(server.url) as reader:
        answer = reader.get("hits", where={"n": "a"})
        assert answer.value() == 110
        assert answer.as_of.next_offsets.keys() == {"1", "2"}
        assert answer.as_of.missing_partitions == [0, 3]
        assert {it.labels["n"] for it in reader.get("hits")} == {"a", "1", "2"}
        status = reader.status()
    assert [it["partition"] for it in status["partitions"]] == [1, 2]
    assert status["partition_count"] == 4
    assert server.get("/v1/views").json()["as_of"]["missing_partitions"] == [0, 3]
    csv = server.request("GET", "/v1/views/hits?by=", headers={"Accept": "text/csv"})
    assert csv.headers["pipeline-missing-partitions"] == "0,3"
    assert 'partition="0"' not in server.get("/metrics").body.decode()


def test_a_whole_server_lacks_nothing() -> None:
    """An answer of a server of all partitions names no missing ones."""
    world = World(2)
    world.append(0, HITS, {("a",): 1})
    world.fold()
    with serving(world) as it:
        assert "missing_partitions" not in it.view("hits")["as_of"]


def test_a_token_of_other_partitions_is_refused(server: Server) -> None:
    """A read waits for a token if the server follows all of its partitions, and is refused otherwise."""
    with HttpReader(server.url) as reader:
        world = whole_of(server)
        assert reader.get("hits", after=world.token({1: 1, 2: 1}), by=[]).value() == 112
        with pytest.raises(Invalid, match="partition 3, which this server does not follow"):
            reader.get("hits", after=world.token({1: 1, 3: 1}), timeout_ms=60_000)


def test_a_scrape_of_a_part_is_refused(server: Server) -> None:
    """A scrape of a server of some partitions is refused, as Prometheus would take the values for totals."""
    assert "lacks partition 0" in server.problem(400, server.get("/v1/openmetrics"))
