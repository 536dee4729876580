"""`POST /api/v1/read`: the samples and errors that Prometheus gets for views with windows."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cramjam
import pytest

import pipeline.query.view_series as view_series
from pipeline.core.exposition import ClassicBuckets
from pipeline.core.kinds import KINDS
from pipeline.core.kinds.histogram import relative_error
from pipeline.core.record import Definition, definition_key
from pipeline.settings import QuerySettings
from tests.prompb import remote
from tests.query.support import Reply, Server, World, serving
from tests.support import HandClock

HEADERS = {
    "Content-Encoding": "snappy",
    "Accept-Encoding": "snappy",
    "Content-Type": "application/x-protobuf",
    "X-Prometheus-Remote-Read-Version": "0.1.0",
}
OPS = ("=", "!=", "=~", "!~")
HITS = Definition("hits", "sum", ("path", "zone"), window_s=60, monotone=True)
LATENCY = Definition("latency", "histogram", ("route",), window_s=60)
EVER = (-(2**63), 2**63 - 1)
MINUTE_MS = 60_000


def read_body(*queries: tuple[int, int, Sequence[tuple[str, str, str]]]) -> bytes:
    asked = [
        {
            "start_timestamp_ms": start_ms,
            "end_timestamp_ms": end_ms,
            "matchers": [{"type": OPS.index(op), "name": name, "value": value} for name, op, value in matchers],
        }
        for start_ms, end_ms, matchers in queries
    ]
    return bytes(cramjam.snappy.compress_raw(remote["ReadRequest"](queries=asked).SerializeToString()))


def post(server: Server, body: bytes, headers: Mapping[str, str] = HEADERS) -> Reply:
    return server.request("POST", "/api/v1/read", body, headers)


def results(reply: Reply) -> list[dict[str, dict[int, float]]]:
    """Return for each query the values by time of each series, written as in PromQL; NaN where a series ends."""
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "application/x-protobuf"
    assert reply.headers["content-encoding"] == "snappy"
    answer = remote["ReadResponse"].FromString(bytes(cramjam.snappy.decompress_raw(reply.body)))
    return [
        {
            written({it.name: it.value for it in series.labels}): {it.timestamp: it.value for it in series.samples}
            for series in result.timeseries
        }
        for result in answer.results
    ]


def written(labels: dict[str, str]) -> str:
    name = labels.pop("__name__")
    return name + ",".join(f"{{{label}={value}}}" for label, value in labels.items())


def read(server: Server, *matchers: tuple[str, str, str], start_ms: int = EVER[0], end_ms: int = EVER[1]) -> Any:
    (found,) = results(post(server, read_body((start_ms, end_ms, matchers))))
    return found


def refused(reply: Reply, status: int) -> str:
    """Return the text of an error, as Prometheus shows it."""
    assert reply.status == status, (reply.status, reply.body)
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    assert "Traceback" not in reply.body.decode()
    return reply.body.decode()


@pytest.fixture(scope="module")
def clock() -> HandClock:
    return HandClock()


@pytest.fixture(scope="module")
def now_ms(clock: HandClock) -> int:
    return clock.now_ms() // MINUTE_MS * MINUTE_MS


@pytest.fixture(scope="module")
def server(clock: HandClock, now_ms: int) -> Iterator[Server]:
    """Serve views of each kind, each with windows in two partitions."""
    world = World(2, clock=clock)
    world.append(0, HITS, {("/", "a"): 1, ("/", ""): 2}, now_ms - 3 * MINUTE_MS)
    world.append(1, HITS, {("/", "a"): 4, ("/cart", "b"): 8}, now_ms - 3 * MINUTE_MS)
    world.append(1, HITS, {("/", "a"): 16}, now_ms - MINUTE_MS)
    world.append(0, HITS, {("/", "a"): 32}, now_ms)
    collect = KINDS["histogram"].collect
    world.append(0, LATENCY, {("/",): collect([1, 3, -2, 0])}, now_ms - 2 * MINUTE_MS)
    world.append(1, LATENCY, {("/",): collect([1])}, now_ms - 2 * MINUTE_MS)
    users = KINDS["distinct"].collect([*map(KINDS["distinct"].check, "ab")])
    world.append(0, Definition("users", "distinct", (), window_s=60), {(): users}, now_ms)
    world.append(0, Definition("best", "topk", (), window_s=60), {(): KINDS["topk"].collect([("a", 1)])}, now_ms)
    state = Definition("state", "last", ("host",), window_s=60)
    world.append(0, state, {("t",): (1, 0, "up"), ("n",): (1, 0, 2.5), ("b",): (1, 0, True)}, now_ms)
    world.append(0, Definition("pace", "mean", (), window_s=3_600), {(): (3, 2)}, now_ms // 3_600_000 * 3_600_000)
    world.append(0, Definition("le_peak", "max", ("le",), window_s=60), {("x",): 10**400}, now_ms)
    world.append(0, Definition("total", "sum"), {(): 5})
    world.append(0, Definition("hidden", "sum", ("__x",), window_s=60), {("1",): 1}, now_ms)
    world.fold()
    with serving(world) as running:
        yield running


def test_a_window_is_a_sample_at_its_last_millisecond(server: Server, now_ms: int) -> None:
    """Partitions are merged; a series ends at a final window without a value, and goes on with the next value."""
    (no_zone, root, cart) = read(server, ("__name__", "=", "hits")).items()
    assert root[0] == "hits{path=/},{zone=a}"
    assert {at: value for at, value in root[1].items() if not math.isnan(value)} == {
        now_ms - 2 * MINUTE_MS - 1: 5,
        now_ms - 1: 16,
        now_ms + MINUTE_MS - 1: 32,
    }
    assert [at for at, value in root[1].items() if math.isnan(value)] == [now_ms - MINUTE_MS - 1]
    assert no_zone[0] == "hits{path=/}"
    assert cart[0] == "hits{path=/cart},{zone=b}"
    assert [*cart[1]] == [now_ms - 2 * MINUTE_MS - 1, now_ms - MINUTE_MS - 1]
    first_ms = now_ms - 2 * MINUTE_MS - 1
    assert [*read(server, ("zone", "=", "b"), start_ms=first_ms, end_ms=first_ms)] == [cart[0]]
    assert read(server, ("zone", "=", "b"), start_ms=first_ms, end_ms=first_ms)[cart[0]] == {first_ms: 8}
    assert read(server, ("zone", "=", "b"), start_ms=first_ms + 1) == {}
    assert read(server, ("zone", "=", "b"), end_ms=first_ms - 1) == {}


@pytest.mark.parametrize(
    ("matchers", "found"),
    [
        ([("__name__", "=", "hits"), ("path", "=", "/"), ("zone", "=", "a")], {"hits{path=/},{zone=a}"}),
        ([("__name__", "=", "hits"), ("zone", "=", "")], {"hits{path=/}"}),
        ([("__name__", "=", "hits"), ("zone", "!=", "")], {"hits{path=/},{zone=a}", "hits{path=/cart},{zone=b}"}),
        ([("__name__", "=", "hits"), ("path", "=~", "/c.*")], {"hits{path=/cart},{zone=b}"}),
        ([("__name__", "=", "hits"), ("path", "=~", "c")], set()),
        ([("__name__", "=", "hits"), ("path", "!~", "/c.*"), ("zone", "!~", "a|x")], {"hits{path=/}"}),
        (
            [("__name__", "=", "hits"), ("job", "=", "")],
            {"hits{path=/},{zone=a}", "hits{path=/}", "hits{path=/cart},{zone=b}"},
        ),
        ([("__name__", "=", "hits"), ("job", "=", "x")], set()),
        ([("__name__", "=~", "use.*|stat.")], {"users", "state{host=b}", "state{host=n}"}),
        ([("__name__", "!~", "hits|.*latency.*|state|.*_.*")], {"pace", "users"}),
        ([("host", "=~", ".+")], {"state{host=b}", "state{host=n}"}),
        ([("le", "=", "x")], {"le_peak{le=x}"}),
        ([("__name__", "=", "total")], set()),
        ([("__name__", "=", "hidden")], set()),
        ([("__name__", "=", "up")], set()),
        ([("__name__", "=", "hits"), ("__name__", "=", "users")], set()),
        ([("__name__", "=~", "latency.*"), ("le", "=", "")], {"latency_gcount{route=/}", "latency_gsum{route=/}"}),
        ([("__name__", "=", "latency_bucket"), ("le", "=", "+Inf")], {"latency_bucket{le=+Inf},{route=/}"}),
        ([("__name__", "=", "latency")], set()),
    ],
)
def test_matchers_are_those_of_prometheus(server: Server, matchers: list[tuple[str, str, str]], found: set[str]) -> None:
    """All four kinds of matchers apply to names and labels; a missing label is empty; expressions match the whole value."""
    assert {*read(server, *matchers)} == found


def test_one_series_is_that_of_a_scan(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matchers that name one series get its windows by their keys; the samples are the same, also of a long range."""
    of_all = read(server, ("__name__", "=", "hits"), start_ms=1_699_990_000_000, end_ms=1_700_010_000_000)
    for keys_max in 100_000_000, 0:
        monkeypatch.setattr(view_series, "KEYS_MAX", keys_max)
        for path, zone in ("/", "a"), ("/", ""), ("/cart", "b"), ("/cart", "a"):
            name = f"hits{{path={path}}}" + f",{{zone={zone}}}" * bool(zone)
            pinned = ("__name__", "=", "hits"), ("path", "=", path), ("zone", "=", zone)
            found = read(server, *pinned, start_ms=1_699_990_000_000, end_ms=1_700_010_000_000)
            assert str(found) == str({name: of_all[name]} if name in of_all else {})
            assert read(server, *pinned, ("path", "!=", path), start_ms=1_699_990_000_000, end_ms=1_700_010_000_000) == {}


def test_values_are_floats(server: Server) -> None:
    """Values are as in a scrape: estimates, true as 1, an int beyond all floats as infinity; texts are left out."""
    found = {name: next(iter(samples.values())) for name, samples in read(server, ("__name__", "!=", "hits")).items()}
    assert {name: value for name, value in found.items() if not name.startswith("latency")} == {
        "users": 2,
        "state{host=b}": 1,
        "state{host=n}": 2.5,
        "pace": 1.5,
        "le_peak{le=x}": math.inf,
    }


def test_histograms_are_classic_buckets_of_each_window(server: Server, now_ms: int) -> None:
    """Counts up to each bound are exact, also below zero; sum and count have the names of a scrape."""
    found = read(server, ("route", "=", "/"))
    at = now_ms - MINUTE_MS - 1
    assert (found.pop("latency_gcount{route=/}")[at], found.pop("latency_gsum{route=/}")[at]) == (5, 3)
    bounds = {float(name.split("le=")[1].split("}")[0]): samples[at] for name, samples in found.items()}
    assert bounds == {bound: sum(value <= bound for value in (1, 3, -2, 0, 1)) for bound in bounds}
    assert max(bounds) == math.inf
    assert min(bounds) < -2


def test_bounds_are_as_fine_as_there_is_room_for() -> None:
    """Bounds have the finest schema that all windows have; a long range gets coarser ones before it is refused."""
    rng = random.Random(3)
    values = [[rng.lognormvariate(0, 1) for _ in range(100)] for _ in range(20)]
    states = [*map(KINDS["histogram"].collect, values)]
    world = World(1, settings=QuerySettings(answer_points_max=1_000))
    for minute, state in enumerate(states):
        world.append(0, LATENCY, {("/",): state}, minute * MINUTE_MS)
    world.fold()
    with serving(world) as running:
        fine = read(running, ("__name__", "=", "latency_bucket"), end_ms=2 * MINUTE_MS)
        coarse = read(running, ("__name__", "=", "latency_bucket"))
        assert 80 < len(fine) <= 161
        assert 11 <= len(coarse) <= 50
        assert ClassicBuckets(states[:2], bounds_max=160, schema_max=8).schema >= 4
        assert relative_error(4) < 0.03
        for samples in fine, coarse:
            assert samples["latency_bucket{le=+Inf},{route=/}"][MINUTE_MS - 1] == 100
        world.append(0, LATENCY, {(str(n),): states[0] for n in range(100)}, 0)
        world.fold()
        assert "answer_points_max" in refused(
            post(running, read_body((0, MINUTE_MS, [("__name__", "=", "latency_bucket")]))), 400
        )
        assert len(read(running, ("__name__", "=", "latency_gcount"), end_ms=MINUTE_MS)) == 101


def test_what_has_expired_is_hidden_and_what_comes_late_is_there() -> None:
    """Expired windows are not read from the commit on that says so, in whatever partition they are."""
    world = World(2)
    world.append(0, HITS, {("/", ""): 1}, 0)
    world.append(1, HITS, {("/", ""): 2}, MINUTE_MS)
    world.fold()
    with serving(world) as running:
        values = [it for it in read(running)["hits{path=/}"].values() if not math.isnan(it)]
        assert values == [1, 2]
        world.append(0, HITS, {("/", ""): 5}, MINUTE_MS)
        world.fold()
        world.expire(HITS, MINUTE_MS, 1)
        values = [it for it in read(running)["hits{path=/}"].values() if not math.isnan(it)]
        assert values == [7]


def test_new_views_and_dropped_ones_are_known_at_once() -> None:
    """The list of views is kept only while no partition's definitions change."""
    world = World(2)
    world.append(0, HITS, {("/", ""): 1}, 0)
    world.fold()
    with serving(world) as running:
        assert {*read(running)} == {"hits{path=/}"}
        world.append(1, Definition("more", "min", (), window_s=1), {(): 1}, 0)
        world.append(0, Definition("hits", "sum", ("path", "shop"), window_s=60), {("/", "x"): 1}, 0)
        world.fold()
        assert {*read(running)} == {"hits{path=/}", "hits{path=/},{shop=x}", "more"}
        assert running.request("POST", "/v1/views/more/drop", b"{}", {"Content-Type": "application/json"}).status == 200
        world.fold()
        assert {*read(running)} == {"hits{path=/}", "hits{path=/},{shop=x}"}


def test_a_broken_view_fails_only_reads_of_it() -> None:
    """A definition that can't be decoded is an error for a query that may be of it, never an empty answer."""
    world = World(1)
    for view in "good", "bad":
        world.append(0, Definition(view, "sum", (), window_s=60), {(): 1}, 0)
    world.fold()
    world.partitions[0].store.write([definition_key(Definition("bad", "sum", (), window_s=60))], [b"\x02\xc0"])
    with serving(world) as running:
        assert {*read(running, ("__name__", "=", "good"))} == {"good"}
        for matchers in [("__name__", "=", "bad")], [("__name__", "=", "bad_gsum")], [("x", "=", "")]:
            refused(post(running, read_body((*EVER, matchers))), 500)


def test_several_queries_have_a_result_each(server: Server) -> None:
    """All queries are answered from one moment; no query has no result; a series can be in two results."""
    query = (*EVER, [("__name__", "=", "users")])
    assert [[*it] for it in results(post(server, read_body(query, (0, 0, []), query)))] == [["users"], [], ["users"]]
    assert results(post(server, read_body())) == []
    with ThreadPoolExecutor(8) as threads:
        replies = [*threads.map(lambda _: post(server, read_body(query)), range(40))]
    assert all(results(reply) == results(replies[0]) for reply in replies)


def test_labels_only(server: Server) -> None:
    """A query for Prometheus' list of series is answered with labels and without samples."""
    asked = {"end_timestamp_ms": 2**62, "matchers": [{"name": "path", "value": "/"}], "hints": {"func": "series"}}
    body = bytes(cramjam.snappy.compress_raw(remote["ReadRequest"](queries=[asked]).SerializeToString()))
    assert results(post(server, body)) == [{"hits{path=/}": {}, "hits{path=/},{zone=a}": {}}]


def varint(value: int) -> bytes:
    return bytes([*(value >> shift & 127 | 128 for shift in range(0, 28, 7)), value >> 28])


GOOD = read_body((*EVER, [("__name__", "=", "hits")]))


@pytest.mark.parametrize(
    ("body", "status", "said"),
    ids=itertools.count(),
    argvalues=[
        (b"", 400, "snappy"),
        (b"garbage", 400, "snappy"),
        (GOOD[:-3], 400, "snappy"),
        (GOOD[:1], 400, "snappy"),
        (varint(2**31) + b"\x00", 413, "over 262144 bytes"),
        (b"\xff" * 11, 400, "snappy"),
        (bytes(cramjam.snappy.compress_raw(bytes(2**24))), 413, "over 262144 bytes"),
        (bytes(cramjam.snappy.compress_raw(bytes(2**18))), 400, "number 0"),
        (bytes(cramjam.snappy.compress_raw(b"\x0a\x01" * 1_000)), 400, "protobuf"),
        (random.Random(1).randbytes(2**18 + 1), 413, "over 262144 bytes"),
        (bytes(cramjam.snappy.compress(b"framed")), 400, "snappy"),
        (read_body((0, 1, [("a", "=~", "(")])), 400, "not a regular expression"),
        (read_body((0, 1, [("a", "=~", "x" * 2_000)])), 400, "over 1000 bytes"),
        (read_body((0, 1, [("a", "=~", "(((x{100}){100}){100})")])), 400, "not a regular expression"),
        (read_body((0, 1, [("a", "=", "x")] * 64)), 400, "over 64"),
        (read_body((0, 1, [("a", "=", "x" * 15)] * 10_000)), 400, "over 64"),
        (read_body((0, 1, [("a", "=", "x" * 15)] * 1_000_000)), 413, "over 262144 bytes"),
    ],
)
def test_bad_requests_are_told_as_text(server: Server, body: bytes, status: int, said: str) -> None:
    """A bad request is 400 or 413, with a text that Prometheus shows; a declared size takes no memory."""
    assert said in refused(post(server, body), status)


def test_other_encodings_and_methods(server: Server) -> None:
    """A body must be compressed by snappy, and GET is refused."""
    for headers in {}, {"Content-Encoding": "gzip"}:
        assert "snappy" in refused(post(server, GOOD, headers), 415)
    assert server.get("/api/v1/read").status == 405


@pytest.mark.parametrize(
    "span", [(5, 4), (2**62, -(2**62)), (-10, -1), (900_000_000_000_000, 950_000_000_000_000), (2**63 - 1, 2**63 - 1)]
)
def test_ranges_without_windows_are_empty(server: Server, span: tuple[int, int]) -> None:
    """A range that ends before it begins, lies before 1970 or in the year 30,000 has no samples, and is no error."""
    assert results(post(server, read_body((*span, [("__name__", "!=", "x")])))) == [{}]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples, bytes and time are bounded; the text names the setting. A server that lacks partitions does not answer."""
    world = World(1, settings=QuerySettings(answer_points_max=10, remote_read_bytes_max=1_024))
    world.append(0, HITS, {(f"/{n}", ""): n for n in range(5)}, 0)
    world.fold()
    with serving(world) as running:
        assert len(read(running, end_ms=MINUTE_MS)) == 5
        body = read_body((0, 2**60, [("path", "!=", "")]))
        assert "answer_points_max" in refused(post(running, read_body(*[(0, 2**40, [("path", "!=", "")])] * 3)), 400)
        world.append(0, HITS, {("/" + "x" * 1_000, ""): 1}, MINUTE_MS)
        world.fold()
        assert "remote_read_bytes_max" in refused(post(running, read_body((MINUTE_MS + 1, 2 * MINUTE_MS, []))), 400)
        world.append(0, HITS, {(f"/{n}", ""): n for n in range(5)}, 2 * MINUTE_MS)
        world.fold()
        assert "answer_points_max" in refused(post(running, body), 400)
        world.ready = False
        assert "restoring" in refused(post(running, body), 503)
        world.ready = True
        some = world.reader._ends()._replace(elsewhere=frozenset({1}))
        monkeypatch.setattr(world.reader, "_ends", lambda: some)
        assert "lacks partition 1: remote reads need one that has all" in refused(post(running, body), 400)
    late = World(1, settings=QuerySettings(timeout_ms_default=1))
    late.append(0, HITS, {(str(n),) * 2: 1 for n in range(20_000)}, 0)
    late.fold()
    with serving(late) as running:
        assert "timeout_ms" in refused(post(running, read_body((*EVER, []))), 503)
