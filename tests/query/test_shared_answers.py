"""Answers that equal reads share: one computation a commit, and never an older commit's answer or an older time."""

import asyncio
import gzip
import json
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import cramjam
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.metrics as m
from pipeline.adapters.prometheus import PrometheusMetrics
from pipeline.core.record import TAG_SERIES, Definition
from pipeline.errors import Unavailable
from pipeline.ports import StoreView
from pipeline.query.codings import GZIP, ZSTD, encode_end, encode_start, preferred_coding
from pipeline.query.media import CSV, JSON, NDJSON
from pipeline.query.params import ReadHeaders, parse_read
from pipeline.query.service import ReadService
from pipeline.settings import QuerySettings
from tests.query.support import Server, World, serving, wait_until
from tests.support import HandClock

SALES = Definition("sales", "sum", ("region", "product"))
MINUTES = Definition("minutes", "sum", ("region",), window_s=60)


def counted(metrics: PrometheusMetrics, how: str) -> float:
    return metrics.registry.get_sample_value(m.ANSWERS.name, {"how": how}) or 0.0


def kept_bytes(metrics: PrometheusMetrics) -> float:
    return metrics.registry.get_sample_value(m.ANSWERS_KEPT.name) or 0.0


def without_clock(body: bytes) -> Any:
    """Return an answer without its times."""
    answer = json.loads(body)
    del answer["as_of"]["staleness_ms"]
    answer.pop("final_before_ms", None)
    return answer


@pytest.fixture(scope="module")
def shop() -> Iterator[Server]:
    with serving(World(settings=QuerySettings(compress_bytes_min=200))) as server:
        server.world.publish(SALES, {(f"r{i % 3}", f"p{i}"): i for i in range(60)})
        server.world.append(0, MINUTES, {("eu",): 1, ("us",): 2}, 600_000)
        server.world.fold()
        yield server


def test_equal_reads_of_one_commit_are_computed_once(shop: Server) -> None:
    """The second read gets the kept answer; after a commit it is computed anew, once."""
    before = counted(shop.world.metrics, "computed")
    for i in range(3):
        answers = [shop.view("sales", ("by", "region")) for _ in range(4)]
        assert {answer["series"][0]["value"] for answer in answers} == {570 + i}
        assert counted(shop.world.metrics, "computed") == before + i + 1
        shop.world.publish(SALES, {("r0", "p0"): 1})


def test_a_kept_answer_says_anew_how_stale_it_is() -> None:
    """A kept answer has the present staleness when the clock goes on and the log grows."""
    clock = HandClock()
    world = World(partition_count=1, clock=clock)
    world.publish(SALES, {("eu", "tea"): 1})
    with serving(world) as server:
        fresh = server.view("sales", ("by", ""))
        world.append(0, SALES, {("eu", "tea"): 1})
        clock.s += 5
        stale = server.view("sales", ("by", ""))
        assert (counted(world.metrics, "computed"), counted(world.metrics, "kept")) == (1, 1)
        assert stale["series"] == fresh["series"]
        assert fresh["as_of"]["staleness_ms"] <= 1
        assert stale["as_of"]["staleness_ms"] >= 5_000


def test_a_range_that_ends_now_moves_on() -> None:
    """A read without `end` is not answered with a kept one whose range ends earlier; `final_before_ms` is made anew."""
    clock = HandClock()
    clock.s += 30  # between two minutes
    world = World(partition_count=1, clock=clock)
    world.append(0, MINUTES, {("eu",): 1}, clock.now_ms() // 60_000 * 60_000)
    world.fold()
    with serving(world) as server:
        first = server.view("minutes", ("by", ""))
        clock.s += 1
        same = server.view("minutes", ("by", ""))
        assert counted(world.metrics, "kept") == 1
        clock.s += 60
        later = server.view("minutes", ("by", ""))
        assert counted(world.metrics, "computed") == 2
    assert (same["end_ms"], later["end_ms"]) == (first["end_ms"], first["end_ms"] + 60_000)
    assert first["final_before_ms"] < same["final_before_ms"] < later["final_before_ms"]


@pytest.mark.parametrize("accept", [JSON, CSV, NDJSON])
@pytest.mark.parametrize("where", [[], [("where", "region=r1"), ("where", "product=p1")]], ids=["scan", "point"])
def test_a_client_that_has_the_answer_is_told_so(shop: Server, accept: str, where: list[tuple[str, str]]) -> None:
    """`If-None-Match` is 304 with staleness in the headers until the next commit; a tag is of its query and media type."""
    path = "/v1/views/sales?" + "&".join(f"{name}={value}" for name, value in where)
    reply = shop.request("GET", path, headers={"Accept": accept})
    etag = reply.headers["etag"]
    assert etag.startswith('W/"')
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["vary"] == "Accept, Accept-Encoding"
    computed = counted(shop.world.metrics, "computed")
    for known in (etag, etag.removeprefix("W/"), f'"other", {etag}', "*"):
        again = shop.request("GET", path, headers={"Accept": accept, "If-None-Match": known})
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", etag)
        assert int(again.headers["pipeline-staleness-ms"]) < 5_000
    assert counted(shop.world.metrics, "computed") == computed
    known = {"If-None-Match": etag}
    assert shop.request("GET", path, headers={"Accept": accept, "If-None-Match": '"other"'}).status == 200
    assert shop.request("GET", path, headers={"Accept": JSON if accept != JSON else CSV, **known}).status == 200
    assert shop.request("GET", f"{path}&limit=7", headers={"Accept": accept, **known}).status == 200
    shop.world.publish(SALES, {("r1", "p1"): 1})
    changed = shop.request("GET", path, headers={"Accept": accept, **known})
    assert changed.status == 200
    assert changed.headers["etag"] != etag


def test_an_unchanged_answer_with_points_says_what_is_final(shop: Server) -> None:
    """A 304 carries `final_before_ms`, which moves on without a commit."""
    path = "/v1/views/minutes?start=600000&end=660000"
    etag = shop.get(path).headers["etag"]
    found = [shop.request("GET", path, headers={"If-None-Match": etag}) for _ in range(2)]
    assert [reply.status for reply in found] == [304, 304]
    assert all(int(reply.headers["pipeline-final-before-ms"]) > 0 for reply in found)


def test_a_token_is_waited_for_before_anything_kept_is_answered(shop: Server) -> None:
    """A kept answer is of the commit at which the store is once the token is reached."""
    definition = Definition("own", "sum", ("x",))
    shop.world.publish(definition, {("a",): 1})
    with shop.world.folding(0.01):
        for i in range(10):
            next_offset = shop.world.append(2, definition, {("a",): 1})
            answer = shop.view("own", ("by", ""), ("after", shop.world.token({2: next_offset})))
            assert answer["series"][0]["value"] == 2 + i


class _Gated:
    """A store whose scans of series wait for a gate; counts them."""

    def __init__(self, store: Any) -> None:
        self.gate = threading.Event()
        self.scans = 0
        self._snapshot = store.snapshot
        store.snapshot = self.snapshot

    def snapshot(self) -> StoreView:
        view, gated = self._snapshot(), self

        class View:
            get = staticmethod(view.get)

            @staticmethod
            def scan(start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
                if start.startswith(TAG_SERIES):
                    gated.scans += 1
                    assert gated.gate.wait(20)
                yield from view.scan(start, end)

        return View()


def request(query: bytes = b"by=region", **headers: Any) -> Any:
    return parse_read("sales", query, QuerySettings(), ReadHeaders(**headers))


def test_reads_of_one_commit_that_are_under_way_share_one_computation() -> None:
    """A thousand reads at once make one scan, however few may run; a commit in between makes a second one, and no third."""
    world = World(partition_count=1, settings=QuerySettings(reads_waiting_max=2))
    world.publish(SALES, {("eu", "tea"): 1})
    gated = _Gated(world.partitions[0].store)

    async def run() -> list[list[Any]]:
        service = ReadService(world.reader, world.settings, world.metrics)
        try:
            first = [asyncio.create_task(service.answer(request())) for _ in range(1_000)]
            await asyncio.to_thread(wait_until, lambda: gated.scans > 0)
            world.publish(SALES, {("eu", "tea"): 1})
            second = [asyncio.create_task(service.answer(request())) for _ in range(1_000)]
            await asyncio.sleep(0.05)
            with pytest.raises(Unavailable, match="2 reads are waiting or running"):
                await service.answer(request(b"by=product"))
            first[0].cancel()  # a client that goes away takes nothing from the others
            gated.gate.set()
            done = [await asyncio.gather(*tasks, return_exceptions=True) for tasks in (first[1:], second)]
            return [[json.loads(b"".join(it.parts))["series"][0]["value"] for it in its] for its in done]  # type: ignore[union-attr]
        finally:
            service.close()

    values = asyncio.run(run())
    assert gated.scans == 2
    assert values == [[1] * 999, [2] * 1_000]
    assert counted(world.metrics, "computed") == 1  # the read that began the first computation was cancelled
    assert counted(world.metrics, "joined") == 999 + 999


def test_a_read_with_more_time_outlives_the_one_that_it_joined() -> None:
    """A read that waits for the answer of another one, whose time runs out, computes it again."""
    world = World(partition_count=1)
    world.publish(SALES, {("eu", "tea"): 1})
    gated = _Gated(world.partitions[0].store)

    async def run() -> Any:
        service = ReadService(world.reader, world.settings, world.metrics)
        try:
            short = asyncio.create_task(service.answer(request(b"by=region&timeout_ms=50")))
            await asyncio.sleep(0.01)
            long = asyncio.create_task(service.answer(request(b"by=region&timeout_ms=20000")))
            with pytest.raises(Unavailable, match="timeout_ms"):
                await short
            gated.gate.set()
            return json.loads(b"".join((await long).parts))
        finally:
            service.close()

    assert asyncio.run(run())["series"] == [{"labels": {"region": "eu"}, "value": 1}]


def test_kept_answers_are_bounded() -> None:
    """Kept answers stay below `answer_cache_bytes`: the least recently used make room, and a large one is not kept."""
    world = World(settings=QuerySettings(answer_cache_bytes=20_000))
    world.publish(SALES, {(f"r{i}", f"p{i}"): i for i in range(400)})
    with serving(world) as server:
        for limit in range(1, 40):
            server.view("sales", ("limit", limit))
            assert kept_bytes(world.metrics) <= 20_000
        computed = counted(world.metrics, "computed")
        server.view("sales", ("limit", 39))
        server.view("sales", ("limit", 1))
        assert counted(world.metrics, "computed") == computed + 1
        kept = kept_bytes(world.metrics)
        server.view("sales", ("limit", 400))
        assert kept_bytes(world.metrics) == kept
        computed = counted(world.metrics, "computed")
        for number in (0, 1, 2, 3, 4, 0):  # long queries are a part of what is kept: there is room for two
            server.view("sales", ("by", ""), ("where", f"region!={number}{'x' * 5_000}"))
        assert counted(world.metrics, "computed") == computed + 6
    with serving(World(settings=QuerySettings(answer_cache_bytes=0))) as server:
        server.world.publish(SALES, {("eu", "tea"): 1})
        assert [server.view("sales", ("by", ""))["series"][0]["value"] for _ in range(3)] == [1, 1, 1]
        assert (counted(server.world.metrics, "computed"), kept_bytes(server.world.metrics)) == (3, 0)


QUERIES = [
    "by=region",
    "by=",
    "top=2",
    "limit=1",
    "by=product&top=1",
    "where=region=eu",
    "where=region=eu&where=product=tea",
]


@given(data=st.data())
def test_a_shared_answer_is_what_a_computed_one_would_be(data: st.DataObject) -> None:
    """Each answer is that of a computation of its own, whatever commits come between reads, and whichever run at once."""
    world = World(partition_count=2)
    world.publish(SALES, {("eu", "tea"): 1, ("us", "tea"): 2})
    settings = QuerySettings(answer_cache_bytes=data.draw(st.sampled_from([0, 10_000, 2**20])))

    async def run() -> None:
        service = ReadService(world.reader, settings, world.metrics)
        alone = ReadService(world.reader, QuerySettings(answer_cache_bytes=0), world.metrics)
        known: dict[tuple[str, str], tuple[bytes, bytes]] = {}
        try:
            for _ in range(data.draw(st.integers(1, 8))):
                if data.draw(st.booleans()):
                    region = data.draw(st.sampled_from(["eu", "us", "asia"]))
                    world.append(data.draw(st.integers(0, 1)), SALES, {(region, "tea"): data.draw(st.integers(1, 9))})
                if data.draw(st.booleans()):
                    world.fold(data.draw(st.integers(0, 1)))
                query, accept = data.draw(st.sampled_from(QUERIES)), data.draw(st.sampled_from([JSON, CSV]))
                etag, body = known.get((query, accept), (b"", b""))
                asked = request(query.encode(), accept=accept, if_none_match=etag)
                replies = await asyncio.gather(*[service.answer(asked) for _ in range(data.draw(st.integers(1, 3)))])
                expected = b"".join((await alone.answer(request(query.encode(), accept=accept))).parts)
                for reply in replies:
                    found = b"".join(reply.parts) if reply.status == 200 else body
                    assert same(found, expected, accept)
                    known[query, accept] = dict(reply.headers)[b"etag"], found
        finally:
            service.close()
            alone.close()

    asyncio.run(run())


def same(found: bytes, expected: bytes, accept: str) -> bool:
    return found == expected if accept == CSV else without_clock(found) == without_clock(expected)


def test_reads_while_commits_go_on_are_exact() -> None:
    """Two series that change together agree in every answer, kept or not, and no reader sees them fall."""
    world = World(partition_count=1)
    twins = Definition("twins", "sum", ("side",))
    world.append(0, twins, {("left",): 1, ("right",): 1})
    world.fold()
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            world.append(0, twins, {("left",): 1, ("right",): 1})
            world.fold(0)
            time.sleep(0.002)

    with serving(world) as server:
        writer = threading.Thread(target=write)
        writer.start()
        seen: list[list[tuple[int, int]]] = [[], [], []]

        def read(mine: list[tuple[int, int]]) -> None:
            for _ in range(60):
                left, right = [row["value"] for row in server.view("twins")["series"]]
                mine.append((left, right))

        readers = [threading.Thread(target=read, args=[mine]) for mine in seen]
        for it in readers:
            it.start()
        for it in readers:
            it.join()
        stop.set()
        writer.join()
    for mine in seen:
        assert len(mine) == 60
        assert all(left == right for left, right in mine)
        assert mine == sorted(mine)


# Compression


@given(start=st.binary(min_size=1, max_size=1_500), end=st.binary(max_size=100), repeat=st.sampled_from([1, 250]))
def test_both_parts_are_one_stream(start: bytes, end: bytes, repeat: int) -> None:
    """A compressed start and an end make one member, or one frame, also with an end of no bytes, or of 150 KB."""
    whole = start * repeat + end * (repeat * 6)
    for coding in (GZIP, ZSTD):
        coded = encode_start(coding, start * repeat)
        found = coded.start + encode_end(coded, end * (repeat * 6))
        assert (gzip.decompress(found) if coding == GZIP else bytes(cramjam.zstd.decompress(found))) == whole


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        ("gzip", GZIP),
        ("gzip, zstd", ZSTD),
        ("gzip, deflate, br, zstd", ZSTD),
        ("zstd;q=0.5, GZIP", GZIP),
        ("gzip;q=0", ""),
        ("gzip;q=0, *", ZSTD),
        ("*;q=0.1", ZSTD),
        ("*;q=0", ""),
        ("identity, gzip;q=0.5", ""),
        ("identity;q=0, gzip;q=0.1", GZIP),
        ("br", ""),
        ("", ""),
        ("gzip;q=x", ""),
        ("gzip;q=nan", ""),
        ("gzip;q=5", ""),
        ("zstd;q=1;q=0", ""),
        (",;=,gzip", GZIP),
        ("x" * 5_000 + ",gzip", GZIP),
    ],
)
def test_the_coding_that_the_client_prefers(accept: str, coding: str) -> None:
    """Quality values decide; among equals zstd wins; a header that can't be read means no coding."""
    assert preferred_coding(accept) == coding


@pytest.mark.parametrize("path", ["/v1/views/sales", "/v1/views/sales?where=region=r0&where=product=~p.*"])
@pytest.mark.parametrize("accept", [JSON, CSV, NDJSON])
def test_bodies_are_compressed_for_who_accepts_that(shop: Server, path: str, accept: str) -> None:
    """gzip and zstd unpack to the plain body; each answer says its coding, and that it depends on the header."""
    plain = shop.request("GET", path, headers={"Accept": accept})
    assert "content-encoding" not in plain.headers
    for coding, unpack in ((GZIP, gzip.decompress), (ZSTD, lambda body: bytes(cramjam.zstd.decompress(body)))):
        for _ in range(2):
            reply = shop.request("GET", path, headers={"Accept": accept, "Accept-Encoding": coding})
            assert reply.headers["content-encoding"] == coding
            assert "Accept-Encoding" in reply.headers["vary"]
            assert len(reply.body) == int(reply.headers["content-length"]) < len(plain.body)
            if reply.headers["content-type"].startswith(JSON):
                assert without_clock(unpack(reply.body)) == without_clock(plain.body)
            else:
                assert unpack(reply.body) == plain.body


def test_the_list_of_views_is_compressed(shop: Server) -> None:
    """The list of views is compressed as answers are, from the same size on."""
    for i in range(5):
        shop.world.publish(Definition(f"listed_{i}", "sum"), {(): 1})
    plain = shop.get("/v1/views")
    reply = shop.request("GET", "/v1/views", headers={"Accept-Encoding": "gzip"})
    assert (reply.headers["content-encoding"], reply.headers["vary"]) == (GZIP, "Accept-Encoding")
    assert json.loads(gzip.decompress(reply.body))["views"] == plain.json()["views"]


def test_small_bodies_are_not_compressed(shop: Server) -> None:
    """Below `compress_bytes_min` compression would cost more than it saves."""
    for path in ("/v1/views/sales?by=", "/v1/views/sales?where=region=r0&where=product=p0"):
        assert "content-encoding" not in shop.request("GET", path, headers={"Accept-Encoding": "gzip"}).headers


def test_a_large_answer_is_compressed_once_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many reads at once share the compression as they share the computation, and the event loop goes on meanwhile."""
    world = World(partition_count=1)
    world.publish(SALES, {(f"r{i}", f"{random.Random(i).random()}"): i for i in range(2_000)})
    threads: list[str] = []

    def noting(coding: str, start: bytes) -> Any:
        threads.append(threading.current_thread().name)
        time.sleep(0.05)
        return encode_start(coding, start)

    monkeypatch.setattr("pipeline.query.read_pool.encode_start", noting)

    async def run() -> set[int]:
        service = ReadService(world.reader, world.settings, world.metrics)
        try:
            asked = request(b"", encoding="zstd")
            replies = await asyncio.gather(*[service.answer(asked) for _ in range(50)])
            replies.append(await service.answer(asked))
            return {len(json.loads(bytes(cramjam.zstd.decompress(b"".join(it.parts))))["series"]) for it in replies}
        finally:
            service.close()

    assert asyncio.run(run()) == {2_000}
    assert len(threads) == 1
    assert threads[0].startswith("pipeline-read")
