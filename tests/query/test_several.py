"""Several queries in one call: one moment of each partition for all, and one wrong query refuses all."""

import asyncio
import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

import pipeline.query.found as found_answers
import pipeline.query.media as media
from pipeline.adapters.http import HttpReader
from pipeline.adapters.http_async import AsyncHttpReader
from pipeline.adapters.read_parameters import QueryKeywords
from pipeline.core.codec import Batch, encode_batch
from pipeline.core.record import Definition, Group, producer_id_of, series_suffix
from pipeline.errors import Invalid, NotFound, NotReady
from pipeline.ports import Message
from pipeline.query.params import QUERY_BYTES_MAX
from pipeline.settings import QuerySettings
from pipeline.topics import DELTAS
from tests.query.support import SECRET, Reply, Server, World, serving

LEFT, RIGHT = Definition("left", "sum", ("x",)), Definition("right", "sum", ("x",))
MINUTES = Definition("minutes", "sum", ("x",), window_s=60)
LATENCY = Definition("load", "mean", ("x",))


@pytest.fixture(scope="module")
def shop() -> Iterator[Server]:
    with serving(World(settings=QuerySettings(queries_max=4, compress_bytes_min=100))) as server:
        server.world.publish(LEFT, {(name,): i for i, name in enumerate("abc")})
        server.world.publish(RIGHT, {("a",): 7})
        server.world.append(0, MINUTES, {("a",): 1}, 600_000)
        server.world.fold()
        yield server


def post(server: Server, body: Any, content_type: str = "application/json", **headers: str) -> Reply:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.request("POST", "/v1/query", data, {"Content-Type": content_type, **headers})


QUERIES: list[tuple[dict[str, Any], str]] = [
    ({"view": "left"}, "left"),
    ({"view": "left", "by": []}, "left?by="),
    ({"view": "left", "by": ["x"], "where": ["x!=a", "x=~b|c"], "top": 1}, "left?by=x&where=x!=a&where=x=~b|c&top=1"),
    ({"view": "left", "where": "x=b", "limit": "1", "fn": None}, "left?where=x=b&limit=1"),
    (
        {"view": "minutes", "start": 540000, "end": "720000", "step": "2m", "fill": "null"},
        "minutes?start=540000&end=720000&step=2m&fill=null",
    ),
    ({"view": "minutes", "where": ["x=a"], "at": 660_000}, "minutes?where=x=a&at=660000"),
    ({"view": "right", "where": ["x=none"]}, "right?where=x=none"),
]


@pytest.mark.parametrize(("query", "path"), QUERIES)
def test_each_answer_is_that_of_a_read_alone(shop: Server, query: dict[str, Any], path: str) -> None:
    """Names and meanings of parameters are those of `GET /v1/views/{view}`; `as_of` is one for all."""
    reply = post(shop, {"queries": [{"view": "right"}, query]})
    assert reply.status == 200, reply.body
    found = reply.json()
    assert found["answers"][0]["view"] == "right"
    assert [answer["as_of"] for answer in found["answers"]] == [found["as_of"]] * 2
    alone = shop.get(f"/v1/views/{path}").json()
    for answer in (found["answers"][1], alone):
        del answer["as_of"]
        answer.pop("final_before_ms", None)
    assert found["answers"][1] == alone
    assert reply.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"\xff{}", 400, "not JSON"),
        (b'{"queries":[{"view":"left","top":NaN}]}', 400, "not JSON"),
        (b'{"queries":[{"view":"left","top":' + b"9" * 5_000 + b"}]}", 400, "not JSON"),
        (b'{"queries":[{"view":"left","view":"right"}]}', 400, "field 'view' stands twice"),
        (b'{"queries":[],"queries":[]}', 400, "field 'queries' stands twice"),
        (b"x" * (QUERY_BYTES_MAX * 4 + 1), 413, "bytes"),
        ([], 400, "a JSON object with an array"),
        ({}, 400, "a JSON object with an array"),
        ({"queries": {}}, 400, "a JSON object with an array"),
        ({"queries": []}, 400, "0 queries; from 1 to 4 (setting queries_max)"),
        ({"queries": [{"view": "left"}] * 5}, 400, "5 queries"),
        ({"queries": [{"view": "left"}], "limit": 1}, 400, "unknown field 'limit'"),
        ({"queries": [{"view": "left"}], "timeout_ms": 0}, 400, "timeout_ms: "),
        ({"queries": [{"view": "left"}], "timeout_ms": [1]}, 400, "timeout_ms: a text or a number"),
        ({"queries": [{"view": "left"}], "max_staleness_ms": 1.5}, 400, "max_staleness_ms: "),
        ({"queries": [{"view": "left"}], "after": "x"}, 400, "not a token"),
        ({"queries": [{"view": "left"}, "right"]}, 400, "query 1: a JSON object is needed"),
        ({"queries": [{"view": "left"}, {}]}, 400, "query 1: view: the name"),
        ({"queries": [{"view": "left"}, {"view": 7}]}, 400, "query 1: view: the name"),
        ({"queries": [{"view": "left"}, {"view": "left", "after": ""}]}, 400, "query 1: unknown parameter 'after'"),
        ({"queries": [{"view": "left"}, {"view": "left", "top": True}]}, 400, "query 1: top: a text or a number"),
        ({"queries": [{"view": "left"}, {"view": "left", "top": [1]}]}, 400, "query 1: top: a text or a number is needed"),
        ({"queries": [{"view": "left"}, {"view": "left", "where": {"x": "a"}}]}, 400, "query 1: where: a text"),
        ({"queries": [{"view": "left"}, {"view": "left", "by": ["x"] * 65}]}, 400, "query 1: by: 65 items"),
        ({"queries": [{"view": "left"}, {"view": "left", "by": ["y"]}]}, 400, "query 1: view left has no label 'y'"),
        ({"queries": [{"view": "left"}, {"view": "left", "start": 1}]}, 400, "query 1: view left has no windows"),
        ({"queries": [{"view": "left"}, {"view": "minutes", "start": 0, "end": 10**12}]}, 400, "query 1: "),
        ({"queries": [{"view": "left"}, {"view": "lift"}]}, 404, "query 1: no view 'lift'; is it left?"),
    ],
)  # fmt: skip
def test_one_wrong_query_refuses_all(shop: Server, body: Any, status: int, said: str) -> None:
    """The problem names the index of the query, from 0, and what is wrong with it."""
    assert said in shop.problem(status, post(shop, body))


def test_only_json_is_taken(shop: Server) -> None:
    """415, so that a browser asks this server before it sends a query from another site's page."""
    assert "application/json" in shop.problem(415, post(shop, {"queries": [{"view": "left"}]}, "text/plain"))
    shop.problem(405, shop.get("/v1/query"))


def test_answers_are_compressed(shop: Server) -> None:
    """Answers are compressed as those to single reads are."""
    reply = post(shop, {"queries": [{"view": "left"}] * 4}, **{"Accept-Encoding": "gzip"})
    assert len(json.loads(gzip.decompress(reply.body))["answers"]) == 4


def test_several_wait_for_a_token(shop: Server) -> None:
    """`after` holds for all answers; what does not come in time is 503."""
    next_offset = shop.world.append(1, LEFT, {("a",): 1})
    token = str(shop.world.token({1: next_offset}))
    queries = [{"view": "left", "by": []}, {"view": "right"}]
    reply = post(shop, {"queries": queries, "after": token, "timeout_ms": 50})
    assert "partition 1 is at" in shop.problem(503, reply)
    with shop.world.folding():
        found = post(shop, {"queries": queries, "after": token, "max_staleness_ms": 60_000}).json()
    assert found["answers"][0]["series"][0]["value"] == 4


def test_readers_ask_several(shop: Server) -> None:
    """`Reader.query` and `AsyncReader.query` take the arguments of `get`, and raise as it does."""
    minute = datetime.fromtimestamp(600, UTC)
    queries: list[QueryKeywords] = [
        {"view": "left", "where": {"x": "b"}, "by": "x"},
        {"view": "left", "by": ()},
        {"view": "minutes", "start": minute, "end": 660_000, "step": 60},
    ]
    with HttpReader(shop.url) as reader:
        found = reader.query(queries)
        assert found[0].series == reader.get("left", where={"x": "b"}, by="x").series
        assert found[1].value() == reader.get("left", by=()).value()
        assert found[2].series == reader.get("minutes", start=minute, end=660_000, step=60).series
        with pytest.raises(NotFound, match="query 0"):
            reader.query([{"view": "nothing"}])
        with pytest.raises(Invalid, match="queries_max"):
            reader.query([])
        with pytest.raises(Invalid, match="unknown parameter 'wher'"):
            reader.query([{"view": "left", "wher": "x"}])  # type: ignore[typeddict-unknown-key]
        with pytest.raises(NotReady):
            reader.query(queries, after=shop.world.token({2: 10**9}), timeout_ms=20)

    async def run() -> list[Any]:
        async with AsyncHttpReader(shop.url) as asking:
            return [answer.series for answer in await asking.query(queries, max_staleness_ms=60_000)]

    assert asyncio.run(run()) == [answer.series for answer in found]


def test_views_that_change_together_are_never_seen_apart() -> None:
    """One publisher's batches change two views: while commits go on, all pairs of answers agree in each partition."""
    world = World(partition_count=2)
    stop, count = threading.Event(), 0

    def batch(partition: int, sequence: int) -> bytes:
        suffix = [series_suffix((str(partition),))]
        groups = [Group(LEFT, suffix, [1]), Group(RIGHT, suffix, [1])]
        return encode_batch(Batch(producer_id_of(SECRET), 0, partition, sequence, 0, world.clock.now_ms(), groups))

    def write() -> None:
        sequence = 0
        while not stop.is_set():
            for partition in range(2):
                world.log.append([Message(DELTAS, partition, None, batch(partition, sequence))], timeout_s=1)
            sequence += 1
            world.fold()
            time.sleep(0.001)

    for partition in range(2):
        world.append(partition, LEFT, {(str(partition),): 0})
        world.append(partition, RIGHT, {(str(partition),): 0})
    world._sequences.clear()
    world.fold()
    with serving(world) as server:
        writer = threading.Thread(target=write)
        writer.start()
        seen = set()
        try:
            for scan in range(80):
                pinned = {"where": [f"x={scan % 2}"]} if scan % 4 < 2 else {}
                found = post(server, {"queries": [{"view": "left", **pinned}, {"view": "right", **pinned}]}).json()[
                    "answers"
                ]
                assert found[0]["series"] == found[1]["series"]
                seen.add(str(found[0]["series"]))
                count += 1
        finally:
            stop.set()
            writer.join()
    assert count == 80
    assert len(seen) > 20


def test_answers_of_one_request_are_bounded_together() -> None:
    """Queries of one request may not have more series together than one answer; the query that has too many is named."""
    world = World(1, settings=QuerySettings(limit_max=5))
    world.publish(LEFT, {(name,): i for i, name in enumerate("abc")})
    with serving(world) as server:
        assert post(server, {"queries": [{"view": "left"}]}).status == 200
        said = server.problem(400, post(server, {"queries": [{"view": "left"}, {"view": "left", "limit": 3}]}))
        assert said.startswith("query 1: the answers up to this one have 6 series")


def test_large_answers_are_encoded_as_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is made and encoded a few series at a time is the same, to the byte but for its staleness."""
    world = World(1, settings=QuerySettings(answer_cache_bytes=0))
    world.publish(LEFT, {(name,): i for i, name in enumerate("abcdefg")})
    queries = {"queries": [{"view": "left"}, {"view": "left", "top": 3}]}
    with serving(world) as server:

        def bodies() -> list[bytes]:
            found = [post(server, queries).body]
            for accept in ("application/json", "text/csv", "application/x-ndjson"):
                found.append(server.request("GET", "/v1/views/left", headers={"Accept": accept}).body)
            return [re.sub(rb'"staleness_ms":[0-9]+', b"", body) for body in found]

        whole = bodies()
        monkeypatch.setattr(found_answers, "SERIES_RUN", 2)
        monkeypatch.setattr(media, "SERIES_RUN", 2)
        assert bodies() == whole
