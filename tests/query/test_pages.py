"""Pages of answers: together they are one answer of one moment, and a cursor never leads to a wrong page."""

import asyncio
import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.metrics as m
from pipeline.adapters.http import HttpReader
from pipeline.adapters.http_async import AsyncHttpReader
from pipeline.core.answer import Answer
from pipeline.core.query import Matcher, Query
from pipeline.core.record import Definition
from pipeline.errors import CursorGone, Invalid, NotFound, NotReady
from pipeline.query.found import FoundAnswer
from pipeline.query.media import ARROW, CSV, NDJSON
from pipeline.query.pages import AnswerPages, PageLists
from pipeline.settings import QuerySettings
from tests.query.support import Server, World, serving, wait_until
from tests.support import HandClock

SALES = Definition("sales", "sum", ("region", "product"))
MINUTES = Definition("minutes", "sum", ("x",), window_s=60)


@pytest.fixture(scope="module")
def shop() -> Iterator[Server]:
    with serving(World()) as server:
        server.world.publish(SALES, {(f"r{i % 3}", f"p{i:02}"): 2**70 + i for i in range(25)})
        server.world.append(0, MINUTES, {(f"{i}",): i for i in range(7)}, 600_000)
        server.world.fold()
        yield server


def lost(server: Server, why: str) -> float:
    return server.world.metrics.registry.get_sample_value(m.CURSORS_LOST.name, {"why": why}) or 0.0


@given(
    data=st.data(),
    size=st.integers(1, 7),
    query=st.sampled_from(
        ["", "by=region", "by=", "top=7", "bottom=3", "where=region=r1", "where=product=none", "top=7&by=product"]
    ),
)
def test_pages_together_are_one_answer(shop: Server, data: st.DataObject, size: int, query: str) -> None:
    """All pages, in their order, have the series of one answer, whatever commits come between them."""
    with HttpReader(shop.url) as reader:
        view, parameters = "sales", [part.partition("=")[::2] for part in query.split("&") if part]
        options: dict[str, Any] = {name: int(value) for name, value in parameters if name in ("top", "bottom")}
        if ("by", "") in parameters:
            options["by"] = []
        elif by := [value for name, value in parameters if name == "by"]:
            options["by"] = by
        if where := [value for name, value in parameters if name == "where"]:
            options["where"] = where
        whole = reader.get(view, **options)
        found: list[Any] = []
        pages: list[Answer] = []
        for page in reader.pages(view, page_size=size, **options):
            assert len(page.series) <= size
            pages.append(page)
            found += page.series
            if data.draw(st.booleans()):
                shop.world.publish(SALES, {("r1", data.draw(st.sampled_from(["p01", "p99", "p00"]))): 1})
        assert found == whole.series
        assert len(pages) == max(1, -(-len(found) // size))
        assert {page.as_of.next_offsets == whole.as_of.next_offsets for page in pages} == {True}
        assert [page.next_cursor is None for page in pages] == [False] * (len(pages) - 1) + [True]
        assert [page.truncated for page in pages[:-1]] == [True] * (len(pages) - 1)
        assert pages[-1].truncated == whole.truncated


def test_pages_of_points(shop: Server) -> None:
    """A page has whole series, with all their points, over the range of the first page."""
    with HttpReader(shop.url) as reader:
        pages = [*reader.pages("minutes", page_size=3, start=600_000, end=720_000, fill="zero")]
        whole = reader.get("minutes", start=600_000, end=720_000, fill="zero")
    assert [len(page.series) for page in pages] == [3, 3, 1]
    assert [series for page in pages for series in page] == whole.series
    assert {(page.start_ms, page.end_ms) for page in pages} == {(600_000, 720_000)}


@pytest.mark.parametrize("accept", [CSV, NDJSON, ARROW])
def test_rows_have_the_cursor_in_a_header(shop: Server, accept: str) -> None:
    """A page is complete in its media type, and another page may be asked for in another one."""

    def values(body: bytes) -> list[Any]:
        if accept == ARROW:
            return [int(value) for value in pa.ipc.open_stream(body).read_all().column("value").to_pylist()]
        if accept == NDJSON:
            return [json.loads(line)["value"] for line in body.splitlines()]
        return [int(row["value"]) for row in csv.DictReader(io.StringIO(body.decode()))]

    cursor, found = "", []
    while cursor is not None:
        reply = shop.request("GET", f"/v1/views/sales?limit=10&cursor={cursor}", headers={"Accept": accept})
        assert reply.status == 200, reply.body
        found += values(reply.body)
        assert reply.headers["pipeline-series-total"] == str(len(shop.view("sales")["series"]))
        assert "etag" not in reply.headers
        last, cursor = cursor, reply.headers.get("pipeline-next-cursor")
    whole = shop.view("sales")["series"]
    assert found == [row["value"] for row in whole]
    again = shop.get(f"/v1/views/sales?limit=10&cursor={last}").json()
    assert [row["value"] for row in again["series"]] == found[20:]


def test_an_answer_that_fits_is_one_page(shop: Server) -> None:
    """Nothing is kept for it, and it says nothing of pages."""
    before = shop.world.metrics.registry.get_sample_value(m.CURSOR_BYTES.name)
    answer = shop.view("sales", ("cursor", ""))
    assert answer.keys() == shop.view("sales").keys()
    assert shop.world.metrics.registry.get_sample_value(m.CURSOR_BYTES.name) == before


def first_cursor(server: Server, query: str = "limit=10") -> str:
    cursor: str = server.get(f"/v1/views/sales?{query}&cursor=").json()["next_cursor"]
    return cursor


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        (lambda it: "x", 400, "not a cursor of this API"),
        (lambda it: it + "0" * 90, 400, "not a cursor"),
        (lambda it: it.rpartition(".")[0] + ".-1", 400, "not a cursor"),
        (lambda it: it.rpartition(".")[0] + ".%D9%A1", 400, "not a cursor"),
        (lambda it: it.rpartition(".")[0] + ".3", 400, "no such page"),
        (lambda it: it.rpartition(".")[0] + ".999999999", 400, "no such page"),
        (lambda it: it.split(".")[0] + ".99999.1", 400, "no such page"),
        (lambda it: "other." + it.partition(".")[2], 410, "of another server"),
        (lambda it: it + "&where=region=r1", 400, "of another query"),
        (lambda it: it + "&by=region", 400, "of another query"),
        (lambda it: it + "&limit=10", 400, "limit stands twice"),
        (lambda it: it + "&cursor=", 400, "cursor stands twice"),
        (lambda it: it + "&after=", 400, "for the first page"),
        (lambda it: it + "&max_staleness_ms=5000", 400, "for the first page"),
    ],
)  # fmt: skip
def test_a_bad_cursor_leads_nowhere(shop: Server, change: Any, status: int, said: str) -> None:
    """400 for what never was a cursor or is of another query, 410 for what this server can't know: never a wrong page."""
    reply = shop.get(f"/v1/views/sales?limit=10&cursor={change(first_cursor(shop))}")
    assert said in shop.problem(status, reply)
    if status == 410:
        assert reply.json()["type"] == "urn:pipeline:error:CursorGone"


def test_a_cursor_is_of_its_view_and_page_size(shop: Server) -> None:
    """The view in the path and the limit belong to the query."""
    cursor = first_cursor(shop)
    assert "another query" in shop.problem(400, shop.get(f"/v1/views/minutes?limit=10&cursor={cursor}"))
    assert "another query" in shop.problem(400, shop.get(f"/v1/views/sales?limit=11&cursor={cursor}"))
    shop.problem(404, shop.get("/v1/views/nothing?cursor="))


def test_a_long_query_counts() -> None:
    """The texts of a query are a part of what is kept with its pages."""
    query, answer = found(4, 10)
    long = msgspec.structs.replace(query, where=(Matcher("x", "!=", "x" * 50_000), Matcher("x", "!=", "\u00e9" * 1_000)))
    more = AnswerPages(long, answer).size_bytes - AnswerPages(query, answer).size_bytes
    assert 54_000 < more < 55_000


def found(count: int, width: int) -> tuple[Query, FoundAnswer]:
    world = World(partition_count=1)
    world.publish(SALES, {("r", f"{i:03}" + "x" * width): i for i in range(count)})
    query = Query("sales", limit=1_000)
    return Query("sales", limit=2), world.reader.find(query, 0, deadline_s=1e18)


def test_kept_pages_are_bounded_in_bytes_and_time() -> None:
    """Lists not used for longest make room, those not used for `cursor_ttl_ms` go; a list that is too large is refused."""
    clock, world = HandClock(), World(partition_count=1)
    lists = PageLists(clock, QuerySettings(cursor_bytes_max=30_000, cursor_ttl_ms=1_000), world.metrics)
    pages = [AnswerPages(*found(4, 2_000)) for _ in range(4)]  # about 10 KB each
    cursors = [lists.cursor_after(lists.keep(it)) or "" for it in pages[:2]]
    assert lists.find(cursors[0], pages[0].query).number == 1
    cursors += [lists.cursor_after(lists.keep(pages[2])) or ""]
    with pytest.raises(CursorGone, match="made room"):
        lists.find(cursors[1], pages[1].query)
    assert lists.find(cursors[0], pages[0].query).pages is pages[0]
    size = world.metrics.registry.get_sample_value(m.CURSOR_BYTES.name)
    assert size == pages[0].size_bytes + pages[2].size_bytes <= 30_000
    clock.s += 0.9
    lists.find(cursors[0], pages[0].query)
    clock.s += 0.2
    with pytest.raises(CursorGone, match="cursor_ttl_ms=1000"):
        lists.find(cursors[2], pages[2].query)
    assert lists.find(cursors[0], pages[0].query).pages is pages[0]
    clock.s += 2
    lists.expire()
    assert world.metrics.registry.get_sample_value(m.CURSOR_BYTES.name) == 0
    values = {
        why: world.metrics.registry.get_sample_value(m.CURSORS_LOST.name, {"why": why}) for why in ("evicted", "expired")
    }
    assert values == {"evicted": 1, "expired": 2}
    with pytest.raises(Invalid, match="cursor_bytes_max"):
        lists.check(AnswerPages(*found(20, 2_000)))


def test_pages_expire_without_a_request() -> None:
    """Memory of pages that nobody fetches is given back; the cursor is 410, as it is after a start anew."""
    world = World(partition_count=1, settings=QuerySettings(cursor_ttl_ms=50))
    world.publish(SALES, {("r", f"{i}"): i for i in range(4)})
    with serving(world) as server:
        cursor = first_cursor(server, "limit=2")
        wait_until(lambda: not world.metrics.registry.get_sample_value(m.CURSOR_BYTES.name))
        assert lost(server, "expired") == 1
        assert "begin again" in server.problem(410, server.get(f"/v1/views/sales?limit=2&cursor={cursor}"))
        with HttpReader(server.url) as reader, pytest.raises(CursorGone, match="begin again"):
            reader.get("sales", limit=2, cursor=cursor)
        fresh = first_cursor(server, "limit=2")
    with serving(world) as server:
        assert "another server" in server.problem(410, server.get(f"/v1/views/sales?limit=2&cursor={fresh}"))


def test_pages_for_an_event_loop(shop: Server) -> None:
    """`AsyncReader.pages` is an async iterator of the same pages; errors come where they happen."""

    async def run() -> list[int]:
        async with AsyncHttpReader(shop.url) as reader:
            sizes = [
                len(page.series) async for page in reader.pages("sales", page_size=10, where={"region": "r0"}, by="product")
            ]
            with pytest.raises(NotFound):
                async for _ in reader.pages("nothing"):
                    pass
            with pytest.raises(NotReady):
                async for _ in reader.pages("sales", after=shop.world.token({0: 10**9}), timeout_ms=20):
                    pass
            return sizes

    assert asyncio.run(run()) == [9]
    with HttpReader(shop.url) as reader:
        waited = [*reader.pages("sales", page_size=20, max_staleness_ms=60_000)]
        assert len(waited) == 2
