"""Work for one request: its CPU time is bounded, and it ends soon after its client has gone."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

import pipeline.ingest.openmetrics as openmetrics
import pipeline.ingest.otlp as otlp
from pipeline.adapters.clock import SystemClock
from pipeline.budget import Budget, ClientGone, Spent, check_budget, checked
from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Definition, Group, producer_id_of, series_suffix
from pipeline.errors import Invalid
from pipeline.ports import RawDelta
from pipeline.query.deltas import parse_deltas
from pipeline.settings import QuerySettings
from tests.query.support import SECRET, Server, World, serving, wait_until

HITS = Definition("hits", "sum", ("path",))
MINUTES = Definition("minutes", "sum", ("path",), window_s=60)
JSON = {"content-type": "application/json"}
TEXT = {"content-type": "text/plain; version=0.0.4"}


class Spinning(SystemClock):
    """A clock by which each look at it has cost a thread some CPU time."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self._cpu_s = 0.0

    def thread_cpu_s(self) -> float:
        self._cpu_s += self.step_s
        return self._cpu_s


def a_budget(clock: Any, ms: int) -> Budget:
    return Budget(clock, ms, lambda: Invalid("used up"), Spent())


def test_cpu_time_of_threads_counts_and_waiting_does_not() -> None:
    """Work that computes ends at its budget, work that sleeps does not; several pieces of one request add up."""

    def compute() -> None:
        while True:
            check_budget()

    def sleep() -> str:
        time.sleep(0.15)
        check_budget()
        return "slept"

    assert a_budget(SystemClock(), 100).work(sleep) == "slept"
    with pytest.raises(Invalid, match="used up"):
        a_budget(SystemClock(), 20).work(compute)
    spent, clock = Spent(), Spinning(0.01)
    pieces = [Budget(clock, 100, lambda: Invalid("used up"), spent) for _ in range(4)]
    for piece in pieces[:3]:
        piece.work(check_budget)  # each costs three looks at the clock
    with pytest.raises(Invalid, match="used up"):
        pieces[3].work(check_budget)
    check_budget()  # of no request: nothing is bounded


def test_abandoned_work_ends_at_its_next_check() -> None:
    """Work of which nobody wants the result ends between two slices, or does not begin."""
    budget = a_budget(SystemClock(), 10_000)
    done: list[int] = []

    def work() -> None:
        for number in checked(range(10)):
            done.append(number)
            if number == 3:
                budget.abandon()

    with pytest.raises(ClientGone):
        budget.work(work)
    assert done == [0, 1, 2, 3]
    with pytest.raises(ClientGone):
        budget.work(lambda: done.append(99))
    assert done == [0, 1, 2, 3]


def many_series(clock: SystemClock, **settings: int) -> World:
    """Return a world of two views of 24,000 series, all of them folded."""
    world = World(2, clock=clock, settings=QuerySettings(**settings))
    for number in range(2):
        world.append(number, HITS, {(f"/{i}",): 1 for i in range(12_000)})
        world.append(number, MINUTES, {(f"/{i}",): 1 for i in range(12_000)})
    world.fold()
    return world


@pytest.fixture(scope="module")
def busy() -> Iterator[Server]:
    """A server on whose clock each check costs a second of CPU, of four that a request has."""
    clock = Spinning(0.0)
    with serving(many_series(clock, cpu_ms_max=4_000)) as server:
        clock.step_s = 1.0
        yield server


def counted(server: Server, metric: str) -> float:
    text = server.request("GET", "/metrics").body.decode()
    (line,) = [it for it in text.splitlines() if it.startswith(f'{metric}{{limit="cpu_ms_max"}}')]
    return float(line.rpartition(" ")[2])


READS: dict[str, tuple[str, str, Any]] = {
    "a scan": ("GET", "/v1/views/hits?limit=40000", None),
    "groups": ("GET", "/v1/views/hits?by=", None),
    "a scan of windows": ("GET", "/v1/views/minutes?start=0&end=60000&limit=40000", None),
    "pages": ("GET", "/v1/views/hits?limit=100&cursor=", None),
    "several": ("POST", "/v1/query", b'{"queries": [{"view": "hits"}]}'),
    "a scrape": ("GET", "/v1/openmetrics", None),
}


@pytest.mark.parametrize("what", READS)
def test_a_read_that_uses_up_its_cpu_time_is_refused(busy: Server, what: str) -> None:
    """A read that needs more CPU than `cpu_ms_max` is 400 with words, and counted; small reads are served."""
    method, path, body = READS[what]
    before = counted(busy, "pipeline_reads_refused_total")
    detail = busy.problem(400, busy.request(method, path, body, JSON if body else {}))
    assert "4000 ms of CPU (setting cpu_ms_max)" in detail
    assert counted(busy, "pipeline_reads_refused_total") == before + 1
    assert busy.request("GET", "/v1/views/hits?where=path=/1").status == 200


def deltas(count: int) -> list[bytes]:
    return [b'{"view":"w","kind":"sum","labels":{"x":"%d"},"value":1}' % i for i in range(count)]


WRITES: dict[str, tuple[str, Callable[[], bytes], dict[str, str]]] = {
    "an array": ("/v1/deltas", lambda: b"[" + b",".join(deltas(6_000)) + b"]", JSON),
    "lines": ("/v1/deltas", lambda: b"\n".join(deltas(6_000)), {"content-type": "application/x-ndjson"}),
    "a text": ("/v1/openmetrics", lambda: b"".join(b"w%d 1\n" % i for i in range(6_000)), TEXT),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_write_that_uses_up_its_cpu_time_is_refused(busy: Server, what: str) -> None:
    """A write that needs more CPU is 413 and counted, and nothing of it is taken; a smaller one is."""
    path, body, headers = WRITES[what]
    before, log = counted(busy, "pipeline_bodies_refused_total"), busy.world.log
    ends = log.high_watermarks("deltas")
    assert "cpu_ms_max" in busy.problem(413, busy.request("POST", path, body(), headers))
    assert counted(busy, "pipeline_bodies_refused_total") == before + 1
    assert log.high_watermarks("deltas") == ends
    assert busy.request("POST", "/v1/deltas", deltas(1)[0], JSON).status == 200


def points(count: int) -> bytes:
    of_metric = [{"timeUnixNano": "1", "asInt": "1"}] * count
    metric = {"name": "m", "gauge": {"dataPoints": of_metric}}
    return json.dumps({"resourceMetrics": [{"scopeMetrics": [{"metrics": [metric]}]}]}).encode()


def a_batch(number: int) -> bytes:
    group = Group(HITS, [series_suffix(("/",))], [1])
    return encode_batch(Batch(producer_id_of(SECRET), 0, 0, number, 0, 0, [group]))


INGEST = World(1).ingest
assert INGEST is not None
SLICED: dict[str, Callable[[], Any]] = {
    "lines": partial(parse_deltas, b"\n".join(deltas(1_000)), "application/x-ndjson", 10_000),
    "an array": partial(parse_deltas, b"[" + b",".join(deltas(2_000)) + b"]", "", 10_000),
    "a text": partial(openmetrics.parse_pushed, b"w 1\n" * 1_000, "text/plain", 10_000, 1_000),
    "points": partial(otlp.parse_export, points(10), "application/json", 10_000, ()),
    "deltas": partial(INGEST.deltas, [RawDelta("w", "sum", {}, 1)] * 1_000),
    "batches": partial(INGEST.batches, [a_batch(number) for number in range(3)], SECRET),
}


@pytest.mark.parametrize("what", SLICED)
def test_work_on_bodies_is_checked_between_slices(what: str) -> None:
    """Each kind of body is worked on in slices, between which the budget is checked."""
    a_budget(Spinning(0.0), 1).work(SLICED[what])
    with pytest.raises(Invalid, match="used up"):
        a_budget(Spinning(0.01), 25).work(SLICED[what])


class Slow(SystemClock):
    """A clock at which each look from within work takes a moment, and which counts these looks."""

    def __init__(self) -> None:
        self.looks = 0
        self.pause_s = 0.0

    def thread_cpu_s(self) -> float:
        self.looks += 1
        time.sleep(self.pause_s)
        return 0.0


ANSWERS = {**READS, "a compressed answer": ("GET", "/v1/views/hits?limit=39999", None)}


@pytest.fixture(scope="module")
def slow() -> Iterator[Server]:
    clock = Slow()
    with serving(many_series(clock)) as server:
        clock.pause_s = 0.15
        yield server


@pytest.mark.parametrize(
    "what",
    [
        it if it in ("a scan", "groups", "a compressed answer") else pytest.param(it, marks=pytest.mark.long)
        for it in ANSWERS
    ],
)
def test_work_ends_when_its_client_has_gone(slow: Server, what: str) -> None:
    """A scan, or an answer that is being made, ends soon after its client has gone, long before its time is over."""
    method, path, body = ANSWERS[what]
    clock: Any = slow.world.clock
    before = clock.looks
    client = socket.create_connection(("127.0.0.1", slow.port))
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nAccept-Encoding: gzip\r\n"
    client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body or b""), body or b""))
    wait_until(lambda: clock.looks >= before + 3)
    client.close()
    seen = 0
    while clock.looks != seen:
        seen = clock.looks
        time.sleep(0.4)
    assert clock.looks <= before + 10  # to its end it would be more


def test_an_answer_goes_on_while_somebody_waits_for_it(slow: Server) -> None:
    """If one client of two equal reads goes, the other gets the answer, of one scan."""
    clock: Any = slow.world.clock
    before = clock.looks
    path = "/v1/views/hits?limit=35000"
    client = socket.create_connection(("127.0.0.1", slow.port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    wait_until(lambda: clock.looks >= before + 2)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(slow.request, "GET", path)
        time.sleep(0.2)
        client.close()
        assert len(other.result().json()["series"]) == 12_000
    assert b'pipeline_answers_total{how="joined"} 1.0' in slow.request("GET", "/metrics").body


@pytest.mark.parametrize("looks", range(2, 9, 2))
def test_what_is_refused_can_be_sent_in_parts(looks: int) -> None:
    """An export that is refused for its CPU time has counted nothing of what a smaller one would count again."""
    clock = Spinning(0.0)
    point = {"timeUnixNano": "2000000000", "startTimeUnixNano": "1000000000", "asInt": "5"}
    metrics: list[dict[str, Any]] = [
        {"name": "hits", "sum": {"dataPoints": [point], "aggregationTemporality": 1, "isMonotonic": True}},
        {"name": "level", "gauge": {"dataPoints": [point]}},
    ]
    world = World(1, clock=clock, settings=QuerySettings(cpu_ms_max=looks * 1_000 + 500))
    with serving(world) as server:

        def export(step_s: float, *sent: dict[str, Any]) -> int:
            clock.step_s = step_s
            body = json.dumps({"resourceMetrics": [{"scopeMetrics": [{"metrics": sent}]}]}).encode()
            status = server.request("POST", "/v1/metrics", body, {"Content-Type": "application/json"}).status
            clock.step_s = 0.0
            return status

        if export(1.0, *metrics) == 413:
            assert [export(0.0, it) for it in metrics] == [200, 200]
        world.fold()
        answer = server.request("GET", "/v1/views/hits?by=").json()
        assert [it["value"] for it in answer["series"]] == [5]
