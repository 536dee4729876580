"""Streams of answers: their events add up to the answer of a read, however slow a reader is or often it comes back."""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import pytest

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.prometheus import PrometheusMetrics
from pipeline.core.answer import Answer, AsOf, Series
from pipeline.core.query import Query
from pipeline.core.record import Definition
from pipeline.core.updates import Update, updated
from pipeline.query.service import _PositionWaiter
from pipeline.query.streams import UPDATES_MAX, Streams
from pipeline.settings import QuerySettings
from tests.query.support import Server, World, serving, wait_until

HITS = Definition("hits", "sum", ("region", "path"), monotone=True)
FAST = {"stream_interval_ms": 10, "stream_heartbeat_ms": 300}


class Stream:
    """A reader of one stream, which takes events when it is told to."""

    def __init__(self, server: Server, path: str, last_id: str = "", address: str = "127.0.0.1") -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20, source_address=(address, 0))
        self.connection.request("GET", path, headers={"Last-Event-ID": last_id} if last_id else {})
        self.response = self.connection.getresponse()
        self.last_id = last_id
        self.names: list[str] = []
        self.answer: Answer | None = None

    def take(self) -> str:
        """Take the next event, and return its name."""
        fields: dict[str, str] = {}
        while line := self.response.readline().decode().rstrip("\n"):
            name, _, value = line.partition(": ")
            fields[name] = value
        if not fields:
            raise EOFError
        self.last_id = fields.get("id", self.last_id)
        self.names.append(fields["event"])
        if fields["event"] == "answer":
            self.answer = msgspec.json.decode(fields["data"], type=Answer)
        elif fields["event"] == "update":
            assert self.answer is not None
            self.answer = updated(self.answer, msgspec.json.decode(fields["data"], type=Update))
        else:
            self.problem: Mapping[str, Any] = json.loads(fields["data"])
        return fields["event"]

    def values(self) -> dict[str, Any]:
        """Return the values of the answer by the first label."""
        assert self.answer is not None
        return {next(iter(it.labels.values()), ""): it.value for it in self.answer.series}

    def take_until(self, values: Mapping[str, Any]) -> None:
        """Take events until the answer has these values; a problem is an error."""
        while not self.names or self.values() != values:
            assert self.take() != "problem", self.problem

    def close(self) -> None:
        self.connection.close()


@contextmanager
def world_serving(**settings: Any) -> Iterator[tuple[World, Server]]:
    world = World(settings=QuerySettings(**{**FAST, **settings}))
    world.publish(HITS, {("eu", "/"): 1, ("us", "/"): 2})
    with serving(world) as server:
        yield world, server


@pytest.fixture
def hits() -> Iterator[tuple[World, Server]]:
    with world_serving() as it:
        yield it


BY_REGION = "/v1/views/hits/stream?by=region"


def test_the_answer_then_what_changes(hits: tuple[World, Server]) -> None:
    """The first event is what a read answers; the next has only the series that changed."""
    world, server = hits
    stream = Stream(server, BY_REGION)
    assert stream.response.getheader("content-type") == "text/event-stream"
    assert stream.take() == "answer"
    assert stream.values() == {"eu": 1, "us": 2}
    world.publish(HITS, {("eu", "/a"): 10})
    stream.take_until({"eu": 11, "us": 2})
    assert stream.names[1:] == ["update"] * (len(stream.names) - 1)
    world.publish(HITS, {("ap", "/"): 5})
    stream.take_until({"eu": 11, "us": 2, "ap": 5})
    assert stream.answer is not None
    read = server.view("hits", ("by", "region"))
    assert [[it.labels["region"], it.value] for it in stream.answer.series] == [
        [it["labels"]["region"], it["value"]] for it in read["series"]
    ]
    stream.close()


def test_a_heartbeat_says_how_stale_the_answer_is(hits: tuple[World, Server]) -> None:
    """Without news there is an event at least each `stream_heartbeat_ms`, with positions and staleness and nothing else."""
    _, server = hits
    stream = Stream(server, BY_REGION)
    stream.take()
    assert [stream.take(), stream.take()] == ["update", "update"]
    assert stream.answer is not None
    assert (stream.values(), stream.answer.as_of.staleness_ms is not None) == ({"eu": 1, "us": 2}, True)
    stream.close()


def test_heartbeats_go_on_while_an_answer_is_computed(hits: tuple[World, Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that takes longer than heartbeats are apart holds none of them up; the last one grows staler with each."""
    world, server = hits
    stream = Stream(server, BY_REGION)
    stream.take()
    read, computed = world.reader.read, threading.Event()
    monkeypatch.setattr(world.reader, "read", lambda *a, **b: computed.wait(20) and read(*a, **b))
    world.publish(HITS, {("eu", "/"): 1})
    staleness = []
    for _ in range(3):
        assert stream.take() == "update"
        assert stream.answer is not None
        staleness.append(stream.answer.as_of.staleness_ms or 0)
    assert (stream.values(), staleness[2] >= staleness[1] + 300) == ({"eu": 1, "us": 2}, True)
    computed.set()
    stream.take_until({"eu": 2, "us": 2})
    stream.close()


def test_a_reader_that_comes_back_gets_what_it_missed(hits: tuple[World, Server]) -> None:
    """With the id of its last event, one update brings it up to date; with an id that is unknown, the whole answer does."""
    world, server = hits
    other = Stream(server, BY_REGION)  # keeps the channel
    stream = Stream(server, BY_REGION)
    stream.take()
    stream.close()
    for number in range(3):
        world.publish(HITS, {("eu", "/"): 10**number})
        other.take_until({"eu": int("1" * (number + 1)) + 1, "us": 2})
    back = Stream(server, BY_REGION, stream.last_id)
    back.answer = stream.answer
    assert back.take() == "update"
    assert back.values() == {"eu": 112, "us": 2}
    for strange in ("x", "é", "0-0", f"{stream.last_id}9", stream.last_id.replace("-", "--"), "9" * 5_000):
        fresh = Stream(server, BY_REGION, strange.encode().decode("latin-1"))
        assert fresh.take() == "answer"
        assert fresh.values() == {"eu": 112, "us": 2}
        fresh.close()
    for _ in range(UPDATES_MAX + 1):
        world.publish(HITS, {("eu", "/"): 1})
        before = other.values()["eu"]
        while other.values()["eu"] == before:
            other.take()
    late = Stream(server, BY_REGION, stream.last_id)
    assert late.take() == "answer"
    assert late.values() == other.values()
    for it in (late, back, other):
        it.close()


def streamed(server: Server) -> float:
    """Return the number of answers that were computed for streams, as the metric has it."""
    lines = server.request("GET", "/metrics").body.decode().splitlines()
    return next(float(it.split()[1]) for it in lines if it.startswith('pipeline_answers_total{how="streamed"}'))


def test_equal_reads_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many readers watch a read, it is computed once for each commit that changed something."""
    with world_serving(stream_heartbeat_ms=60_000) as (world, server), ExitStack() as stack:
        streams = []
        for _ in range(50):
            stream = Stream(server, BY_REGION)
            stack.callback(stream.close)
            stream.take()
            streams.append(stream)
        count = 0
        read = world.reader.read

        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            return read(*arguments, **options)

        monkeypatch.setattr(world.reader, "read", counting)
        before = streamed(server)
        world.publish(HITS, {("eu", "/"): 1})
        for stream in streams:
            stream.take_until({"eu": 2, "us": 2})
        assert count == streamed(server) - before
        assert count <= 2
        assert server.request("GET", "/metrics").body.count(b"\npipeline_streams_open 50.0") == 1
    wait_until(lambda: threading.active_count() < 50)


def test_the_last_reader_leaves_at_a_commit() -> None:
    """A wait that is cancelled in the moment in which what it waits for comes is cancelled: the read is streamed no more."""

    async def run() -> None:
        waiter = _PositionWaiter(list)
        waiting = asyncio.create_task(waiter.until(lambda _: False, 60))
        await asyncio.sleep(0)
        (future,) = waiter._waiters
        future.set_result(None)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await waiter.until(lambda _: True, 60)
        assert not await waiter.until(lambda _: False, 0)
        assert waiter._waiters == {}

    asyncio.run(run())


def test_only_the_work_for_an_answer_is_followed_by_a_pause() -> None:
    """Time in which an answer waits for an event loop that is busy sending holds up no later answer."""

    class Source:
        count = 0

        async def moved(self, since: Any, timeout_s: float) -> Any:
            return object()

        async def read(self, query: Query) -> tuple[Answer, float]:
            await asyncio.sleep(0.1)
            self.count += 1
            return Answer("v", "sum", (), [Series({}, value=self.count)], AsOf(0, {})), 0.0

    async def run() -> None:
        source = Source()
        streams = Streams(source, QuerySettings(**FAST), PrometheusMetrics(), SystemClock())
        async with streams.open(Query("v")) as events, asyncio.timeout(20):
            begun = time.monotonic()
            async for _ in events:
                if source.count == 5:
                    break
        assert time.monotonic() - begun < 1.5

    asyncio.run(run())


def test_a_slow_reader_gets_everything_at_once(hits: tuple[World, Server]) -> None:
    """A reader that takes nothing while thousands of series change costs no memory, and then has the newest answer."""
    world, server = hits
    wide = {(f"{i:04}" + "w" * 2_000, "/"): 1 for i in range(400)}
    stream = Stream(server, BY_REGION)
    quick = Stream(server, BY_REGION)
    for number in range(1, 13):
        world.publish(HITS, wide)
        quick.take_until({"eu": 1, "us": 2} | {region: number for region, _ in wide})
    stream.take_until(quick.values())
    assert len(stream.names) < len(quick.names)
    for it in (stream, quick):
        it.close()


def test_a_reader_that_never_reads_is_cut_off() -> None:
    """After `stream_stalled_ms` its stream ends, and is counted."""
    with world_serving(stream_stalled_ms=200) as (world, server):
        wide = {(f"{i:04}" + "w" * 4_000, "/"): 1 for i in range(2_000)}
        world.publish(HITS, wide)
        stream = Stream(server, BY_REGION)
        wait_until(lambda: b"\npipeline_streams_stalled_total 1.0" in server.request("GET", "/metrics").body, timeout_s=30)
        assert b"\npipeline_streams_open 0.0" in server.request("GET", "/metrics").body
        stream.close()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/views/nothing/stream", 404),
        ("/v1/views/hits/stream?by=nothing", 400),
        ("/v1/views/hits/stream?top=x", 400),
        ("/v1/views/hits/stream?start=0", 400),
        ("/v1/views/hits/stream?unknown=1", 400),
        ("/v1/views/hits/stream?after=rubbish", 400),
        ("/v1/views/hits/stream?after=0-999999&timeout_ms=50", 503),
    ],
)
def test_a_stream_of_a_wrong_read_is_refused(hits: tuple[World, Server], path: str, status: int) -> None:
    """Problems come with the status that a read has, before anything is streamed; nothing is left open."""
    world, server = hits
    if "999999" in path:
        path = path.replace("0-999999", str(world.token({0: 999_999})))
    server.problem(status, server.request("GET", path))
    assert b"\npipeline_streams_open 0.0" in server.request("GET", "/metrics").body


def test_a_client_has_its_share_of_streams() -> None:
    """One address gets `streams_per_client_max` streams of `stream_queries_per_client_max` reads; others get theirs."""
    path = "/v1/views/hits/stream"
    with world_serving(streams_per_client_max=3, stream_queries_per_client_max=2) as (_, server):
        own = [Stream(server, path), Stream(server, BY_REGION)]
        assert "setting stream_queries_per_client_max" in server.problem(503, server.request("GET", f"{path}?by="))
        own.append(Stream(server, path))
        assert "address 127.0.0.1" in server.problem(503, server.request("GET", path))
        others = [Stream(server, it, address="127.0.0.2") for it in (path, f"{path}?by=", f"{path}?by=path")]
        assert {it.take() for it in [*own, *others]} == {"answer"}
        text = server.request("GET", "/metrics").body.decode()
        for limit in ("streams_per_client_max", "stream_queries_per_client_max"):
            assert f'pipeline_reads_refused_total{{limit="{limit}"}} 1.0' in text
        own[1].close()  # gives a stream and a read back, but the read that the other address watches, too, stays
        wait_until(lambda: b"\npipeline_streams_open 5.0" in server.request("GET", "/metrics").body)
        own[1] = Stream(server, f"{path}?by=&top=1")
        assert own[1].take() == "answer"
        for it in [*own, *others]:
            it.close()


def test_streams_are_bounded() -> None:
    """One more than `streams_max`, or than `stream_queries_max` different reads, is 503 and counted; others go on."""
    with world_serving(streams_max=3, stream_queries_max=2) as (world, server):
        one, two = Stream(server, BY_REGION), Stream(server, "/v1/views/hits/stream")
        for it in (one, two):
            it.take()
        assert "stream_queries_max" in server.problem(503, server.request("GET", "/v1/views/hits/stream?by="))
        three = Stream(server, BY_REGION)
        three.take()
        assert "streams_max" in server.problem(503, server.request("GET", BY_REGION))
        world.publish(HITS, {("eu", "/"): 1})
        one.take_until({"eu": 2, "us": 2})
        for it in (one, two, three):
            it.close()
        wait_until(lambda: b"\npipeline_streams_open 0.0" in server.request("GET", "/metrics").body)
        again = Stream(server, BY_REGION)
        assert again.take() == "answer"
        again.close()


def test_streams_do_not_take_the_places_of_requests() -> None:
    """Open streams do not count as open requests."""
    with world_serving(connections_max=3) as (_, server), ExitStack() as stack:
        for _ in range(10):
            stream = Stream(server, BY_REGION)
            stack.callback(stream.close)
            stream.take()
        assert server.request("GET", BY_REGION.replace("/stream", "")).status == 200


def test_a_view_that_is_dropped_under_a_stream(hits: tuple[World, Server]) -> None:
    """Readers of the stream are told, and have the whole answer once it is there again, with other labels too."""
    world, server = hits
    stream = Stream(server, "/v1/views/hits/stream?by=")
    stream.take()
    body = json.dumps({"kind": None, "labels": None}).encode()
    dropped = server.request("POST", "/v1/views/hits/drop", body, {"Content-Type": "application/json"})
    assert dropped.status == 200, dropped.body
    with world.folding():
        while stream.take() != "problem":
            continue
        assert stream.problem["status"] == 404
        world.append(0, Definition("hits", "sum", ("zone",)), {("z",): 7})
        while stream.take() != "answer":
            continue
    assert stream.values() == {"": 7}
    stream.close()


def test_a_server_that_restores(hits: tuple[World, Server]) -> None:
    """A stream that is open is told, and goes on when the state is there; one that begins meanwhile is 503."""
    world, server = hits
    stream = Stream(server, BY_REGION)
    stream.take()
    world.ready = False
    while stream.take() != "problem":
        continue
    assert stream.problem["status"] == 503
    assert stream.take() == "problem"
    server.problem(503, server.request("GET", BY_REGION))
    world.ready = True
    while stream.take() != "answer":
        continue
    assert stream.values() == {"eu": 1, "us": 2}
    stream.close()


def test_a_range_moves_on(hits: tuple[World, Server]) -> None:
    """Only new points of a view with windows travel; with them the reader has what a read answers."""
    world, server = hits
    minutes = Definition("minutes", "sum", ("region",), window_s=60, retention_s=10**9)
    end = 1_700_000_040_000
    query = f"start={end - 600_000}&end={end}&by=region"
    world.append(0, minutes, {("eu",): 1}, end - 120_000)
    world.fold()
    stream = Stream(server, f"/v1/views/minutes/stream?{query}")
    stream.take()
    for number in range(5):
        world.append(0, minutes, {("eu",): 1, ("us",): 2}, end - 60_000 * (number % 3 + 1))
        world.fold()
    wanted = server.request("GET", f"/v1/views/minutes?{query}").json()["series"]
    deadline = time.monotonic() + 20
    while stream.answer is None or json.loads(msgspec.json.encode(stream.answer.series)) != wanted:
        assert time.monotonic() < deadline
        stream.take()
    stream.close()


def test_a_server_that_stops_ends_its_streams() -> None:
    """Readers see the end of the stream at once, and the server does not wait for them."""
    with world_serving() as (_, server):
        stream = Stream(server, BY_REGION)
        stream.take()
    with pytest.raises((EOFError, http.client.HTTPException, ConnectionError)):
        stream.take_until({})
    stream.close()
