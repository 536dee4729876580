"""Reading over HTTP: every parameter, every limit, every error; nothing but problem JSON when something is wrong."""

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.record import TAG_SERIES, Definition
from pipeline.errors import StoreCorrupt
from pipeline.ports import StoreView
from pipeline.query import api
from pipeline.settings import QuerySettings
from tests.query.support import Reply, Server, World, serving, wait_until

REVENUE = Definition("revenue", "sum", ("region", "product"))


@pytest.fixture(scope="module")
def shop(server: Server) -> Server:
    """A server with some revenue."""
    server.world.publish(
        REVENUE,
        {("eu", "tea"): 12.5, ("eu", "coffee"): 1, ("us", "tea"): 2**70, ("us", "cof/fee"): -3, ("asia", ""): 0},
    )
    server.world.publish(Definition("total", "sum"), {(): 7})
    server.world.publish(
        Definition("state", "last", ("host",)), {("a",): (1, 0, "up"), ("b",): (2, 0, None), ("c",): (3, 0, True)}
    )
    server.world.publish(Definition("load", "mean", ("host",)), {("a",): (3, 2), ("b",): (1, 4)})
    return server


def pairs(answer: Any, *labels: str) -> list[tuple[Any, ...]]:
    return [(*(series["labels"][label] for label in labels), series["value"]) for series in answer["series"]]


def test_an_answer_has_the_documented_shape(shop: Server) -> None:
    """An answer has view, kind, by, series, as_of, and nothing else; `by` is null when each series stands by itself."""
    answer = shop.view("revenue", ("by", "region"), ("where", "region=eu"))
    assert answer == {
        "view": "revenue",
        "kind": "sum",
        "by": ["region"],
        "series": [{"labels": {"region": "eu"}, "value": 13.5}],
        "as_of": {"staleness_ms": answer["as_of"]["staleness_ms"], "next_offsets": answer["as_of"]["next_offsets"]},
    }
    assert 0 <= answer["as_of"]["staleness_ms"] < 5_000
    assert sorted(answer["as_of"]["next_offsets"]) == ["0", "1", "2", "3"]
    assert shop.view("revenue")["by"] is None
    assert shop.view("revenue", ("by", ""))["by"] == []


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ([], [("asia", "", 0), ("us", "cof/fee", -3), ("eu", "coffee", 1), ("eu", "tea", 12.5), ("us", "tea", 2**70)]),
        ([("where", "region=eu")], [("eu", "coffee", 1), ("eu", "tea", 12.5)]),
        ([("where", "region!=eu"), ("where", "product=~..*")], [("us", "cof/fee", -3), ("us", "tea", 2**70)]),
        ([("where", "region!~e.|us")], [("asia", "", 0)]),
        ([("where", "product=")], [("asia", "", 0)]),
        ([("where", "region=us"), ("where", "product=cof/fee")], [("us", "cof/fee", -3)]),
        ([("where", "region=us"), ("where", "product=none")], []),
        ([("where", "region=us"), ("where", "region=eu"), ("where", "product=tea")], []),
        ([("top", 2)], [("us", "tea", 2**70), ("eu", "tea", 12.5)]),
        ([("bottom", 2)], [("us", "cof/fee", -3), ("asia", "", 0)]),
        ([("limit", 1)], [("asia", "", 0)]),
        ([("where", "region=eu"), ("where", "product=tea"), ("by", "product"), ("by", "region")], [("eu", "tea", 12.5)]),
    ],
)
def test_where_by_top_and_limit(shop: Server, query: list[tuple[str, object]], expected: list[tuple[Any, ...]]) -> None:
    """Each parameter does what it says, alone and together with others."""
    assert pairs(shop.view("revenue", *query), "region", "product") == expected


def test_by_keeps_labels_in_its_own_order(shop: Server) -> None:
    """Repeated labels count once; empty ones count only if there is no other."""
    answer = shop.view("revenue", ("by", "product"), ("by", ""), ("by", "region"), ("by", "product"))
    assert answer["by"] == ["product", "region"]
    assert pairs(answer, "product", "region")[:2] == [("", "asia", 0), ("cof/fee", "us", -3)]
    assert pairs(shop.view("revenue", ("by", "product"), ("where", "region!=us")), "product") == [
        ("", 0),
        ("coffee", 1),
        ("tea", 12.5),
    ]
    assert pairs(shop.view("revenue", ("by", ""), ("where", "region=us"))) == [(2**70 - 3,)]


def test_other_kinds_answer_in_their_own_way(shop: Server) -> None:
    """Means are divided, `last` keeps texts, nulls and bools; big ints are exact JSON numbers."""
    assert pairs(shop.view("load"), "host") == [("a", 1.5), ("b", 0.25)]
    assert pairs(shop.view("load", ("by", ""))) == [(4 / 6,)]
    assert pairs(shop.view("state"), "host") == [("a", "up"), ("b", None), ("c", True)]
    assert pairs(shop.view("total")) == [(7,)]
    assert b"1180591620717411303424" in shop.get("/v1/views/revenue", ("where", "region=us")).body


def test_a_sum_beyond_all_floats_is_an_int(shop: Server) -> None:
    """A sum beyond all floats is an exact int: JSON has no infinity, and needs none."""
    shop.world.publish(Definition("flood", "sum", ("x",)), {("a",): 1.7e308, ("b",): 1.7e308})
    assert pairs(shop.view("flood", ("by", ""))) == [(2 * int(1.7e308),)]


def test_views_are_listed(shop: Server) -> None:
    """The list has name, kind, labels, window_s (null without windows), series_count and monotone, and its staleness."""
    reply = shop.get("/v1/views").json()
    for it in reply["views"]:
        assert (it.pop("defined_at_ms") > 0, it.pop("answers")) == (True, True)
    revenue = {"name": "revenue", "kind": "sum", "labels": ["product", "region"], "window_s": None, "series_count": 5}
    revenue["series_count_max"] = 3  # of the fullest partition
    assert {**revenue, "monotone": False, "retention_s": None} in reply["views"]
    assert reply["as_of"]["staleness_ms"] is not None


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("limit=0", "limit: a whole number from 1 to 1000000"),
        ("limit=1000001", "limit: "),
        ("limit=1e3", "limit: "),
        ("kind=median", "kind: one of sum, min, max, mean, last, histogram, distinct, topk is needed"),
        ("kind=", "kind: "),
        ("window_s=-1", "window_s: a whole number from 0 to 1000000000"),
        ("limit=-1", "limit: "),
        ("limit=%D9%A1", "limit: "),
        ("limit=", "limit: "),
        ("limit=1&limit=1", "limit stands twice"),
        ("limit=" + "9" * 5_000, "limit: "),
        ("top=0", "top: "),
        ("top=x", "top: "),
        ("bottom=0", "bottom: "),
        ("bottom=1&bottom=1", "bottom stands twice"),
        ("top=1&bottom=1", "top and bottom: only one"),
        ("timeout_ms=60001", "timeout_ms: "),
        ("max_staleness_ms=0", "max_staleness_ms: "),
        ("max_staleness_ms=1.5", "max_staleness_ms: "),
        ("after=x", "not a token"),
        ("where=region", "where: 'region'"),
        ("where=", "where: ''"),
        ("where=region=~(", "not a regular expression"),
        ("where=region=~((a%7B100%7D)%7B100%7D)%7B100%7D", "not a regular expression"),
        ("where=region=~" + "a" * 1_001, "over 1000 bytes"),
        ("where=country=eu", "no label 'country'; its labels: product, region"),
        ("by=country", "no label 'country'"),
        ("by=region,product", "no label 'region,product'"),
        ("start=1", "view revenue has no windows"),
        ("step=0", "step: a length above 0"),
        ("step=5x", "step: a length above 0"),
        ("over=-1", "over: a length above 0"),
        ("start=tomorrow", "start: ms since 1970 or RFC 3339"),
        ("end=30000-01-01T00:00:00Z", "end: ms since 1970 or RFC 3339"),
        ("at=884541340800000", "at: a time from 1970 to the year 9999"),
        ("fill=null&fill=zero", "fill stands twice"),
        ("wher=region=eu", "unknown parameter 'wher'"),
        ("nonsense", "unknown parameter 'nonsense'"),
        ("&".join(["by=region"] * 65), "`where`, `by` and `q`"),
        ("&".join(["by=region"] * 3_000), "`where`, `by` and `q`"),
        ("where=region=%FF", "not UTF-8"),
        ("where=region=%ED%A0%80", "not UTF-8"),
    ],
)
def test_a_wrong_query_is_told(shop: Server, query: str, said: str) -> None:
    """A wrong query is answered with 400 and what is wrong with it."""
    assert said in shop.problem(400, shop.get(f"/v1/views/revenue?{query}"))


def test_top_of_texts_is_refused(shop: Server) -> None:
    """`top` of a view of texts is refused: texts do not rank."""
    assert "numbers" in shop.problem(400, shop.get("/v1/views/state?top=2"))


def test_a_query_string_is_bounded(shop: Server) -> None:
    """A query string far longer than needed is 414."""
    path = "/v1/views/revenue?where=region=" + "x" * 60_000
    assert "60000" in shop.problem(414, shop.get(path))


@pytest.mark.parametrize("name", ["nothing", "revenue%00", "%C3%A9", "a" * 5_000, "..", "%FF", "revenue%0A"])
def test_an_unknown_view_is_not_found(shop: Server, name: str) -> None:
    """Any name of an unknown view is 404."""
    assert "no view" in shop.problem(404, shop.get(f"/v1/views/{name}"))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/views/", 404),
        ("GET", "/v1/views/revenue/", 404),
        ("GET", "/v1/views/a%2Fb", 404),
        ("GET", "/%00", 404),
        ("POST", "/v1/views/revenue", 405),
        ("DELETE", "/v1/views", 405),
        ("GET", "/v1/deltas", 405),
        ("PUT", "/healthz", 405),
        ("PATCH", "/v1/status", 405),
        ("OPTIONS", "/metrics", 405),
    ],
)
def test_wrong_paths_and_methods_are_problems_too(shop: Server, method: str, path: str, status: int) -> None:
    """Unknown paths and wrong methods are problem JSON of 404 and 405, and 405 names the methods that are allowed."""
    reply = shop.request(method, path)
    shop.problem(status, reply)
    assert ("allow" in reply.headers) is (status == 405)


ODD = ["\0", "a\0b", "é ü", "=&?#%+/\\", '"<>', " ", "\U0001f600", "x" * 4_096, "\n\r\t", "~x", "~"]


@pytest.mark.parametrize("value", ODD)
def test_any_label_value_can_be_asked_for(shop: Server, value: str) -> None:
    """NUL, separators, blanks and 4 KB of text go through a URL and come back the same."""
    shop.world.publish(Definition("odd", "sum", ("x",)), {(value,): 1, ("other",): 2})
    answer = shop.view("odd", ("where", f"x=~{quote_regex(value)}" if value.startswith("~") else f"x={value}"))
    assert pairs(answer, "x")[0][0] == value
    assert (value,) in [labels[:1] for labels in pairs(shop.view("odd"), "x")]


def quote_regex(value: str) -> str:
    return "".join(f"[{c}]" for c in value)


def test_percent_and_plus_in_a_url(shop: Server) -> None:
    """Queries are decoded as from HTML forms: `+` is a blank, `%2B` a plus, and UTF-8 may be raw."""
    shop.world.publish(Definition("urls", "sum", ("x",)), {("a b",): 1, ("a+b",): 2, ("é",): 3})
    for text, expected in (("a+b", 1), ("a%20b", 1), ("a%2Bb", 2), ("%c3%A9", 3), ("%C3%A9", 3)):
        (row,) = shop.get(f"/v1/views/urls?where=x={text}").json()["series"]
        assert row["value"] == expected
    with socket.create_connection(("127.0.0.1", shop.port), 10) as raw:
        raw.sendall("GET /v1/views/urls?where=x=é HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65_536), b""))
    assert b'"value":3' in answer or b" 400 " in answer


def test_a_long_label_value_matches_nothing(shop: Server) -> None:
    """A value that no series can have is not an error."""
    assert shop.view("revenue", ("where", "region=" + "x" * 50_000), ("where", "product=tea"))["series"] == []


def test_head_is_answered_without_a_body(shop: Server) -> None:
    """HEAD has the headers of GET and no body."""
    reply = shop.request("HEAD", "/v1/views/revenue")
    assert (reply.status, reply.body) == (200, b"")


def test_health_readiness_and_status(shop: Server) -> None:
    """A server that can answer is alive and ready, and its status shows each partition with offsets, lag and staleness."""
    assert shop.get("/healthz").json() == {"alive": True}
    assert shop.get("/readyz").json() == {"ready": True}
    status = shop.get("/v1/status").json()
    assert (status["ready"], status["partition_count"], len(status["partitions"])) == (True, 4, 4)
    for number, partition in enumerate(status["partitions"]):
        assert partition["partition"] == number
        assert partition["phase"] == "folding"
        assert partition["lag"] == partition["end_offset"] - partition["next_offset"] == 0
        assert partition["staleness_ms"] <= 5_000


def test_while_restoring() -> None:
    """A restoring server is alive: reads and readiness are 503 with a time to come back, status and metrics answer."""
    world = World()
    world.ready = False
    with serving(world) as server:
        for path in ("/readyz", "/v1/views", "/v1/views/revenue", "/v1/views/revenue?max_staleness_ms=5"):
            reply = server.get(path)
            assert "restor" in server.problem(503, reply)
            assert int(reply.headers["retry-after"]) >= 1
        assert server.get("/healthz").status == 200
        status = server.get("/v1/status")
        assert (status.status, status.json()["ready"]) == (200, False)
        assert status.json()["partitions"][0]["staleness_ms"] is None
        assert server.get("/metrics").status == 200


def test_metrics_are_exposed(shop: Server) -> None:
    """Metrics are in Prometheus' text format and count requests by route template, never by raw path."""
    shop.get("/v1/views/revenue?top=1")
    shop.get("/v1/views/some_secret_name")
    shop.get("/some_secret_path")
    reply = shop.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    text = reply.body.decode()
    assert 'pipeline_http_requests_total{path="/v1/views/{view}",status="200"}' in text
    assert 'pipeline_http_requests_total{path="/v1/views/{view}",status="404"}' in text
    assert 'pipeline_http_requests_total{path="unmatched",status="404"}' in text
    assert 'pipeline_http_request_seconds_count{path="/v1/views/{view}"}' in text
    assert "secret" not in text
    for name in ("pipeline_lag_records", "pipeline_staleness_seconds"):
        assert f'{name}{{partition="3"}}' in text
    reply = shop.request("GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    assert reply.body.endswith(b"# EOF\n")


def test_docs_need_no_internet(shop: Server) -> None:
    """The page is Swagger UI; scripts and styles come from this server, and the browser may ask no other."""
    page = shop.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    text = page.body.decode()
    assert "//" not in text
    assets = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert len(assets) == 3
    for asset in assets:
        reply = shop.get(f"/{asset}")
        assert reply.headers["content-type"].startswith("text/css" if asset.endswith("css") else "text/javascript")
        assert reply.body
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "//" not in policy
    shop.problem(404, shop.request("GET", "/docs/redoc.js"))


def test_docs_without_their_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Assets of the documentation page are not found without Swagger UI's package, and no file of the process is shown."""
    monkeypatch.setattr("pipeline.query.openapi.find_spec", lambda _: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "swagger_bundle.js").write_text("mine")
    with serving(World()) as server:
        assert "offapi" in server.problem(404, server.request("GET", "/docs/swagger_bundle.js"))


def test_an_unforeseen_error_says_nothing_of_the_inside(shop: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unforeseen error and a damaged store are 500 as problem JSON without a trace, and the server goes on."""

    def fail(*_: object) -> None:
        raise RuntimeError("secret at line 7")

    monkeypatch.setattr(api, "parse_read", fail)
    detail = shop.problem(500, shop.get("/v1/views/revenue"))
    assert "secret" not in detail
    monkeypatch.undo()

    def corrupt(*_: object) -> None:
        raise StoreCorrupt("secret bytes")

    monkeypatch.setattr(api, "parse_read", corrupt)
    assert "secret" not in shop.problem(500, shop.get("/v1/views/revenue"))
    monkeypatch.undo()
    assert shop.view("total")["series"]


def test_a_token_makes_a_read_wait_for_what_was_written(server: Server) -> None:
    """A read with `after` waits until every position of the token is reached, for points and for scans."""
    definition = Definition("waited", "sum", ("x",))
    server.world.publish(definition, {("a",): 1})
    with server.world.folding(0.02):
        for i in range(10):
            body = json.dumps([{"view": "waited", "kind": "sum", "labels": {"x": "a"}, "value": 1}]).encode()
            token = server.request("POST", "/v1/deltas", body).json()["token"]
            for query in ([("where", "x=a")], [("by", "")]):
                assert server.view("waited", ("after", token), *query)["series"][0]["value"] == 2 + i


def test_what_does_not_come_in_time_is_503(server: Server) -> None:
    """A read whose token or maximal age is not reached is NotReady after `timeout_ms`, and not before."""
    definition = Definition("late", "sum", ("x",))
    server.world.publish(definition, {("a",): 1})
    next_offset = server.world.append(2, definition, {("a",): 1})
    try:
        for query, said in (
            (("after", server.world.token({2: next_offset})), "partition 2 is at"),
            (("after", server.world.token({99: 1})), "there is no partition 99 yet"),  # a publisher may see new ones first
            (("max_staleness_ms", 1), "max_stale"),
        ):
            started = time.monotonic()
            reply = server.get("/v1/views/late", query, ("timeout_ms", 100), ("by", ""))
            assert said in server.problem(503, reply)
            assert reply.json()["type"] == "urn:pipeline:error:NotReady"
            assert reply.headers["retry-after"] == "1"
            assert 0.1 <= time.monotonic() - started < 25
    finally:
        server.world.fold()


def test_max_staleness_waits_for_a_fresh_answer(server: Server) -> None:
    """A read with `max_staleness_ms` waits until the state has caught up, and the answer keeps that bound."""
    definition = Definition("fresh", "sum")
    server.world.publish(definition, {(): 1})
    server.world.append(0, definition, {(): 1})
    time.sleep(0.06)
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(server.view("fresh", ("max_staleness_ms", 50))))
    thread.start()
    time.sleep(0.05)
    assert not done
    server.world.fold()
    thread.join(10)
    assert done[0]["series"][0]["value"] == 2
    assert done[0]["as_of"]["staleness_ms"] <= 50


def test_many_wait_at_once_without_a_thread_each(server: Server) -> None:
    """A hundred readers wait for one commit without a thread for each, and all get it."""
    definition = Definition("crowd", "sum")
    server.world.publish(definition, {(): 1})
    next_offset = server.world.append(1, definition, {(): 1})
    before = threading.active_count()
    values: list[int] = []

    def wait() -> None:
        values.append(server.view("crowd", ("after", server.world.token({1: next_offset})))["series"][0]["value"])

    threads = [threading.Thread(target=wait) for _ in range(100)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert threading.active_count() - before <= 100
    server.world.fold()
    for thread in threads:
        thread.join(20)
    assert values == [2] * 100


class _Slow:
    """A store view whose scans wait until they may go on."""

    def __init__(self, view: StoreView, gate: threading.Event) -> None:
        self._view = view
        self._gate = gate

    def get(self, keys: Any) -> Any:
        return self._view.get(keys)

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        assert self._gate.wait(20)
        yield from self._view.scan(start, end)


def test_reads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond `reads_waiting_max` a scan is 503 at once; point reads still get through, even with every thread busy."""
    world = World(settings=QuerySettings(read_thread_count=1, reads_waiting_max=2))
    world.publish(REVENUE, {("eu", "tea"): 1})
    gate = threading.Event()
    for partition in world.partitions:
        store: Any = partition.store
        snapshot = store.snapshot
        monkeypatch.setattr(store, "snapshot", lambda snapshot=snapshot: _Slow(snapshot(), gate))
    with serving(world) as server:
        replies: list[Reply] = []
        read = [lambda i=i: replies.append(server.get("/v1/views/revenue", ("limit", 9 + i))) for i in range(3)]
        threads = [threading.Thread(target=it) for it in read]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: bool(replies))  # of three, one is too many
            assert "2 reads are waiting or running" in server.problem(503, replies[0])
            assert replies[0].headers["retry-after"] == "1"
            server.problem(503, server.get("/v1/views"))
            point = server.view("revenue", ("where", "region=eu"), ("where", "product=tea"))
            assert point["series"][0]["value"] == 1
        finally:
            gate.set()
        for thread in threads:
            thread.join(20)
        assert [reply.status for reply in replies] == [503, 200, 200]
        assert server.get("/v1/views/revenue").status == 200
        assert 'pipeline_reads_refused_total{limit="reads_waiting_max"}' in server.get("/metrics").body.decode()


def test_a_scan_that_takes_too_long_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout_ms` bounds the work as well as the wait, and the thread is free again."""
    world = World(settings=QuerySettings(read_thread_count=1))
    world.publish(REVENUE, {("eu", "tea"): 1})

    def endless(store: Any) -> Any:
        snapshot = store.snapshot

        class Endless:
            get = staticmethod(snapshot().get)

            @staticmethod
            def scan(start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
                for item in snapshot().scan(start, end):
                    yield item
                    while start.startswith(TAG_SERIES):
                        yield item

        return Endless

    with serving(world) as server:
        for partition in world.partitions:
            monkeypatch.setattr(partition.store, "snapshot", endless(partition.store))
        reply = server.get("/v1/views/revenue", ("timeout_ms", 60), ("by", ""))
        assert "timeout_ms" in server.problem(503, reply)
        monkeypatch.undo()
        assert server.view("revenue", ("by", ""))["series"][0]["value"] == 1


@pytest.mark.parametrize(("slow_scans", "timeout_ms"), [(1, 20_000), (10**9, 400)])
def test_an_answer_that_grew_old_while_it_was_made_is_not_given(
    slow_scans: int, timeout_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`max_staleness_ms` holds for the finished answer: the read is made again, or fails when time is up."""
    world = World(partition_count=1)
    world.publish(REVENUE, {("eu", "tea"): 1})
    world.publish(Definition("other", "sum"), {(): 1})
    store: Any = world.partitions[0].store
    snapshot = store.snapshot
    scans: list[StoreView] = []

    class Slow:
        def __init__(self) -> None:
            self._view = snapshot()
            self.get = self._view.get

        def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
            if start.startswith(TAG_SERIES):
                scans.append(self._view)
                if len(scans) <= slow_scans:
                    world.append(0, REVENUE, {("eu", "tea"): 1})  # of which the answer knows nothing
                    time.sleep(0.15)
            yield from self._view.scan(start, end)

    monkeypatch.setattr(store, "snapshot", Slow)
    with serving(world) as server, world.folding(0.05):
        reply = server.get("/v1/views/revenue", ("by", ""), ("max_staleness_ms", 100), ("timeout_ms", timeout_ms))
        assert len(scans) > 1
        if slow_scans == 1:
            assert reply.status == 200
            assert reply.json()["as_of"]["staleness_ms"] <= 100
        else:
            server.problem(503, reply)


def test_open_requests_are_bounded() -> None:
    """Beyond `connections_max` a request is 503, as problem JSON; health and metrics are answered all the same."""
    world = World(settings=QuerySettings(connections_max=1))
    definition = Definition("v", "sum")
    world.publish(definition, {(): 1})
    next_offset = world.append(0, definition, {(): 1})
    with serving(world) as server:
        waiting = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        waiting.request("GET", f"/v1/views/v?after={world.token({0: next_offset})}")
        wait_until(lambda: server.get("/v1/status").status == 503)
        server.problem(503, server.get("/v1/status"))
        assert [server.get(path).status for path in ("/healthz", "/readyz", "/metrics")] == [200] * 3
        world.fold()
        assert waiting.getresponse().read()
        waiting.close()
        assert server.get("/v1/status").status == 200


def test_answers_are_at_commit_boundaries_over_http(server: Server) -> None:
    """While another thread publishes and commits, two series that change together agree in every answer."""
    definition = Definition("twins", "sum", ("side",))
    server.world.append(3, definition, {("left",): 1, ("right",): 1})
    server.world.fold()
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            server.world.append(3, definition, {("left",): 1, ("right",): 1})
            server.world.fold(3)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        seen = {tuple(row["value"] for row in server.view("twins")["series"]) for _ in range(100)}
    finally:
        stop.set()
        thread.join()
    assert all(left == right for left, right in seen)
    assert len(seen) > 5
