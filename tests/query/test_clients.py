"""The HTTP clients: answers come back as values and errors; any failure on the way is `Unavailable`."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.adapters import http as clients
from pipeline.adapters.http import HttpLogWriter, HttpReader
from pipeline.adapters.http_async import AsyncHttpReader
from pipeline.core.answer import Series, View
from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Definition, Group, producer_id_of, series_suffix
from pipeline.errors import BadRecord, GroupsRefused, Invalid, NotFound, NotReady, PipelineError, Unavailable
from pipeline.ports import Message
from pipeline.settings import QuerySettings
from pipeline.topics import DELTAS
from tests.query.support import SECRET, Server, World, serving

DEFINITION = Definition("v", "sum", ("x", "y"))


def new_writer(url: str) -> HttpLogWriter:
    """A writer that can prove to be the producer of a world's batches."""
    made = HttpLogWriter(url)
    made.introduce(SECRET)
    return made


@pytest.fixture
def writer(server: Server) -> Iterator[HttpLogWriter]:
    made = new_writer(server.url)
    yield made
    made.close()


@pytest.fixture
def reader(server: Server) -> Iterator[HttpReader]:
    with HttpReader(server.url) as made:
        yield made


def messages(world: World, count: int, view: str = "v", partition: int = 0) -> list[Message]:
    definition = Definition(view, "sum", ("x", "y"))
    return [Message(DELTAS, partition, None, world.batch(partition, definition, {("a", str(i)): 1})) for i in range(count)]


# Writing


def test_batches_are_appended_in_order(server: Server, writer: HttpLogWriter, reader: HttpReader) -> None:
    """Each message gets the `next_offset` that covers it, as from any log."""
    assert writer.partition_count(DELTAS) == 4
    results = writer.append(messages(server.world, 5, "ordered", 2), timeout_s=10)
    start = results[0]
    assert isinstance(start, int)
    assert results == [start + i for i in range(5)]
    server.world.fold()
    assert reader.get("ordered", by=(), after=server.world.token({2: results[-1]})).value() == 5  # type: ignore[dict-item]
    assert writer.append([], timeout_s=1) == []


def test_a_bad_batch_is_found_among_good_ones(server: Server, writer: HttpLogWriter) -> None:
    """The server takes all batches or none; the client finds the ones to be refused, and appends the others in order."""
    world = server.world
    good = messages(world, 6, "picky", 1)
    bad = Message(DELTAS, 1, None, b"\x01\x00\x00\x00\x01rubbish")
    results = writer.append([*good[:2], bad, *good[2:5], bad, good[5]], timeout_s=10)
    assert [type(result) for result in results] == [int, int, BadRecord, int, int, int, BadRecord, int]
    taken = [result for result in results if isinstance(result, int)]
    assert taken == sorted(taken)
    world.fold()
    assert server.view("picky", ("by", ""))["series"][0]["value"] == 6


def test_a_batch_that_is_too_large_will_never_be_taken() -> None:
    """A 413 is an error of that message alone, and no reason to try again."""
    with serving(World(settings=QuerySettings(body_bytes_max=1_024))) as server:
        writer = new_writer(server.url)
        small = messages(server.world, 2)
        big = Message(DELTAS, 0, None, server.world.batch(0, DEFINITION, {("a" * 2_000, "b"): 1}))
        results = writer.append([small[0], big, small[1]], timeout_s=10)
        assert [type(result) for result in results] == [int, Invalid, int]
        writer.close()


def test_each_producer_is_proved_by_its_own_secret(server: Server, writer: HttpLogWriter) -> None:
    """Each producer's batches go in a request of their own; those of an unknown or dismissed producer are refused."""
    definition = Definition("proved", "sum")
    group = Group(definition, [series_suffix(())], [1])

    def message(secret: str, sequence: int) -> Message:
        return Message(DELTAS, 0, None, encode_batch(Batch(producer_id_of(secret), 0, 0, sequence, 0, 1, [group])))

    writer.introduce("one")
    writer.introduce("two")
    sent = [message(secret, i) for i in range(2) for secret in ("one", "two", "three")]
    results = writer.append(sent, timeout_s=10)
    assert [type(result) for result in results] == [int, int, BadRecord] * 2
    writer.dismiss("two")
    assert [type(it) for it in writer.append([message("one", 2), message("two", 2)], timeout_s=10)] == [int, BadRecord]
    server.world.fold()
    assert server.view("proved")["series"][0]["value"] == 5


def test_groups_that_are_refused_are_named(server: Server, writer: HttpLogWriter) -> None:
    """An error names the refused groups of a batch, so that its publisher can leave them out; good batches are appended."""
    world = server.world
    far = world.batch(0, Definition("far", "last"), {(): (2**53, 1, "x")})
    results = writer.append([*messages(world, 1, "near"), Message(DELTAS, 0, None, far)], timeout_s=10)
    assert isinstance(results[0], int)
    assert isinstance(results[1], GroupsRefused)
    ((index, view, reason),) = results[1].groups
    assert (index, view) == (0, "far")
    assert "timestamp" in reason


def test_much_is_sent_in_several_requests(server: Server, writer: HttpLogWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are split into requests of at most the size that a server takes, and no batch is split."""
    monkeypatch.setattr(clients, "REQUEST_BYTES_MAX", 200)
    results = writer.append(messages(server.world, 20, "parts", 3), timeout_s=10)
    start = results[0]
    assert isinstance(start, int)
    assert results == [start + i for i in range(20)]


def test_only_batches_can_be_sent(writer: HttpLogWriter) -> None:
    """A message for another topic than deltas is a programming error."""
    for message in (Message("changelog", 0, b"k", b"v"), Message(DELTAS, 0, None, None)):
        with pytest.raises(Invalid):
            writer.append([message], timeout_s=1)
    with pytest.raises(Invalid):
        writer.partition_count("changelog")


def test_threads_share_a_writer(server: Server, writer: HttpLogWriter) -> None:
    """Every batch of eight threads that share a writer is acknowledged once, under an offset of its own."""
    batches = [messages(server.world, 20, "shared", number % 4) for number in range(8)]
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda part=part: results.extend(writer.append([m], timeout_s=20)[0] for m in part))
        for part in batches
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(result, int) for result in results)
    server.world.fold()
    assert server.view("shared", ("by", ""))["series"][0]["value"] == 160


def test_a_connection_closed_while_idle_is_made_again(server: Server, writer: HttpLogWriter) -> None:
    """A connection that the server closed while it was idle costs no error, nor does a restart."""
    assert isinstance(writer.append(messages(server.world, 1), timeout_s=10)[0], int)
    for connection in writer._client._idle:
        connection.sock.shutdown(socket.SHUT_RDWR)
    assert isinstance(writer.append(messages(server.world, 1), timeout_s=10)[0], int)


def test_the_partition_count_is_remembered(free_port: int) -> None:
    """A known partition count outlives the server; an unknown one cannot be had without it."""
    with pytest.raises(Unavailable):
        HttpLogWriter(f"http://127.0.0.1:{free_port}").partition_count(DELTAS)
    with serving(World(partition_count=3)) as server:
        writer = new_writer(server.url)
        assert writer.partition_count(DELTAS) == 3
    writer._partition_count = (-1e9, 3)
    assert writer.partition_count(DELTAS) == 3
    writer.close()


def test_a_status_of_another_version_is_enough() -> None:
    """A publisher needs only two members of a server's status: others may have changed since."""
    with peer(http("200 OK", '{"ready":"new","partition_count":7,"partitions":{"p0":[]},"topic_id":"t","more":1}')) as url:
        writer = HttpLogWriter(url)
        assert (writer.partition_count(DELTAS), writer.topic_id(DELTAS)) == (7, "t")
        writer.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_never_uses_its_parents_connection(server: Server, writer: HttpLogWriter) -> None:
    """After a fork parent and child both go on, each on connections of its own."""
    assert isinstance(writer.append(messages(server.world, 1, "forked"), timeout_s=10)[0], int)
    (kept,) = writer._client._idle
    batch = messages(server.world, 1, "forked")
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            result = writer.append(batch, timeout_s=10)[0]
            fresh = all(connection is not kept for connection in writer._client._idle)
            os.write(write_end, b"ok" if isinstance(result, int) and fresh else b"no")
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        assert pipe.read() == b"ok"
    os.waitpid(pid, 0)
    assert writer._client._idle == [kept]
    assert isinstance(writer.append(messages(server.world, 1, "forked"), timeout_s=10)[0], int)
    server.world.fold()
    assert server.view("forked", ("by", ""))["series"][0]["value"] == 3


# Servers that are none


@contextmanager
def peer(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Yield the URL of a server that reads a request and then treats the connection as told."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def run() -> None:
            listener.settimeout(0.05)
            while not stop.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(5)
                    try:
                        connection.recv(65_536)
                        answer(connection)
                    except OSError:
                        pass

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            stop.set()
            thread.join()


def says(text: str) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(text.encode())


def http(status: str, body: str, headers: str = "") -> Callable[[socket.socket], None]:
    return says(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}Connection: close\r\n\r\n{body}")


def drip(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(100):
        connection.sendall(b" " * 300_000)
        time.sleep(0.05)


STRANGERS: list[Callable[[socket.socket], None]] = [
    says(""),
    says("SSH-2.0-OpenSSH_9.2\r\n"),
    says("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort"),
    says('HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"next_offsets":[1]}'),
    says("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"),
    says("HTTP/1.1 " + "x" * 70_000),
    http("200 OK", "<html>"),
    http("200 OK", '{"next_offsets":[1,2]}'),
    http("200 OK", '{"next_offsets":["x"]}'),
    http("301 Moved", "", "Location: /elsewhere\r\n"),
    http("401 Unauthorized", "who are you"),
    http("404 Not Found", "<html>nginx</html>"),
    http("429 Too Many", "slow down"),
    http("500 Oops", '{"type":"about:blank","title":"Oops","status":500,"detail":"bug"}'),
    http("502 Bad Gateway", "\xff"),
    http("503 No", '{"type":"urn:pipeline:error:NotReady","title":"","status":503,"detail":"restoring"}'),
    http("504 Late", ""),
    http("400 Bad", "<html>a proxy</html>"),
    http("400 Bad", '{"error":"a proxy that speaks JSON"}'),
    http("413 Too Large", "<html>nginx</html>"),
    http("503 No", '{"type":"urn:pipeline:error:Invalid","title":"","status":503,"detail":"odd"}'),
    lambda connection: time.sleep(0.5),
    drip,
]


@pytest.mark.parametrize("answer", STRANGERS)
def test_a_stranger_is_unavailable(answer: Callable[[socket.socket], None]) -> None:
    """An answer that is not this API's leaves the batch unsure: soon an error in the result, never an exception."""
    with peer(answer) as url:
        writer = HttpLogWriter(url)
        started = time.monotonic()
        (result,) = writer.append([Message(DELTAS, 0, None, b"\x01\x00\x00\x00\x00")], timeout_s=0.3)
        assert isinstance(result, Unavailable)
        assert time.monotonic() - started < 30
        writer.close()


def test_nobody_is_there(free_port: int) -> None:
    """A closed port and a name that does not exist are `Unavailable`, message by message."""
    for url in (f"http://127.0.0.1:{free_port}", "http://host.invalid:1"):
        results = HttpLogWriter(url).append([Message(DELTAS, 0, None, b"x")] * 2, timeout_s=5)
        assert [type(result) for result in results] == [Unavailable] * 2
        with pytest.raises(Unavailable):
            HttpReader(url).views()


@pytest.mark.parametrize("url", ["", "localhost:8080", "ftp://x", "http://", "http://x:99999", "http://a@b", "http://x/?q"])
def test_what_is_no_address_is_invalid(url: str) -> None:
    """A wrong address is refused before anything is sent."""
    with pytest.raises(Invalid):
        HttpReader(url)


# Reading


def test_a_reader_asks_for_everything_a_url_can(server: Server, reader: HttpReader) -> None:
    """Each parameter of a read arrives, and the answer is typed."""
    server.world.publish(
        Definition("asked", "sum", ("x", "y")), {("a", "1"): 1, ("a", "2"): 2, ("b", "1"): 2**70, ("~", "é&=\0"): 4}
    )
    everything = reader.get("asked")
    assert (everything.view, everything.kind, everything.by, len(everything.series)) == ("asked", "sum", None, 4)
    assert everything.series[2].value == 2**70
    assert everything.as_of.staleness_ms is not None
    assert set(everything.as_of.next_offsets) == {"0", "1", "2", "3"}
    assert reader.get("asked", {"x": "a", "y": "2"}).value() == 2
    assert reader.get("asked", {"x": "~", "y": "é&=\0"}).value() == 4
    assert reader.get("asked", ["x=~a|b", "y!=2"], by=["x"]).series == [
        Series({"x": "a"}, 1),
        Series({"x": "b"}, 2**70),
    ]
    assert reader.get("asked", "x=a", by=()).value() == 3
    assert reader.get("asked", {"x": "none"}, by=()).value() is None
    assert [series.labels for series in reader.get("asked", by="x").series] == [{"x": "a"}, {"x": "b"}, {"x": "~"}]
    top = reader.get("asked", top=1)
    assert (len(top.series), top.truncated, top.series_total) == (1, True, 4)
    assert reader.get("asked", bottom=1).series != top.series
    assert reader.get("asked", limit=3).truncated
    assert reader.get("asked", by=(), after=server.world.token({0: 0}), max_staleness_ms=60_000, timeout_ms=500).series
    with pytest.raises(Invalid, match="4 series"):
        everything.value()


def test_lists(server: Server, reader: HttpReader) -> None:
    """Views and status are listed."""
    server.world.publish(Definition("listed", "max", ("x",)), {("a",): 1})
    server.world.publish(Definition("rising", "sum", monotone=True), {(): 1})
    (listed,) = [it for it in reader.views() if it.name == "listed"]
    assert listed == View("listed", "max", ("x",), None, 1, defined_at_ms=listed.defined_at_ms, series_count_max=1)
    (rising,) = [it for it in reader.views() if it.name == "rising"]
    wanted = View("rising", "sum", (), None, 1, monotone=True, defined_at_ms=rising.defined_at_ms, series_count_max=1)
    assert rising == wanted
    assert reader.status()["partition_count"] == 4


def test_problems_come_back_as_errors(server: Server, reader: HttpReader) -> None:
    """A problem raises the error of the same name, with the server's text."""
    server.world.publish(Definition("w", "sum", ("x",)), {("a",): 1})
    with pytest.raises(NotFound, match=r"no view 'nothing'; .* pass the token that flush\(\) returned: after=token"):
        reader.get("nothing")
    with pytest.raises(NotFound, match=r"no view 'nothing'$"):
        reader.get("nothing", after=server.world.token({}))
    for name in ("a/b", "..", "é", "a?b#c", ""):
        with pytest.raises(PipelineError):
            reader.get(name)
    with pytest.raises(Invalid, match="no label 'country'"):
        reader.get("w", {"country": "eu"})
    with pytest.raises(Invalid, match="regular expression"):
        reader.get("w", ["x=~("])
    with pytest.raises(NotReady, match="partition 1 is at"):
        reader.get("w", after=server.world.token({1: 10**6}), timeout_ms=50)


def test_a_reader_survives_a_restart_of_the_server() -> None:
    """The first read after a restart of the server makes a new connection."""
    world = World()
    world.publish(DEFINITION, {("a", "1"): 1})
    with serving(world) as server:
        port = server.port
        reader = HttpReader(server.url)
        assert reader.get("v", by=()).value() == 1
    with pytest.raises(Unavailable):
        reader.get("v")
    world.reader = world.new_reader()
    with serving(world, port) as server:
        assert reader.get("v", by=()).value() == 1
    reader.close()


def test_clients_load_little() -> None:
    """Publishing and reading over HTTP loads msgspec and a few modules of the standard library."""
    code = "import sys; import pipeline.adapters.http; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True, timeout=60
    )
    loaded: Sequence[str] = done.stdout.split()
    assert not {"httpx", "requests", "starlette", "asyncio", "re2", "rocksdict"} & {*loaded}


@pytest.fixture(scope="module")
def hits(server: Server) -> Definition:
    """A view of four windows, one after the other, with 1, 2, 3 and 4 in them."""
    definition = Definition("hits", "sum", ("path",), window_s=60)
    for i in range(4):
        server.world.append(i % 2, definition, {("/",): i + 1}, 1_700_000_040_000 + i * 60_000)
    server.world.fold()
    return definition


def test_ranges_are_asked_for_in_any_form(reader: HttpReader, hits: Definition) -> None:
    """A range is given in ms, datetimes in any zone or RFC 3339; a step in seconds, timedeltas or texts."""
    ms = 1_700_000_040_000
    start, end = datetime.fromtimestamp(ms / 1_000, UTC), datetime.fromtimestamp(ms / 1_000 + 240, UTC)
    points = [(ms, 3), (ms + 120_000, 7)]
    for step in (120, "120", "2m", timedelta(minutes=2)):
        for first, last in ((ms, ms + 240_000), (start, end), (start.isoformat(), end.isoformat())):
            (series,) = reader.get("hits", start=first, end=last, step=step)
            assert series.points == points
    assert reader.get("hits", {"path": "/"}, at=end, step="1m", over="4m").value() == 10
    answer = reader.get("hits", start=ms, end=ms + 240_000, fill="zero", fn="rate", by=())
    assert [value for _, value in answer.series[0].points] == [1 / 60, 2 / 60, 3 / 60, 4 / 60]
    assert (answer.fn, answer.step_ms, answer.is_final(answer.series[0].points[0])) == ("rate", 60_000, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": datetime(2030, 1, 1, tzinfo=UTC).replace(tzinfo=None)}, "start: a datetime without a time zone"),
        ({"end": 1.5}, "end: ms since 1970, a datetime with its time zone, or RFC 3339"),
        ({"at": "noon"}, "at: ms since 1970 or RFC 3339"),
        ({"step": timedelta(milliseconds=1_500)}, "step: whole seconds"),
        ({"over": 0}, "over: a length above 0"),
        ({"step": 90}, "step: 90s is no multiple of the view's window of 1m; the nearest is 2m"),
        ({"fill": "none"}, "fill: one of null, zero, previous"),
        ({"fn": "median"}, "fn: one of rate, delta"),
        ({"start": 5, "end": 4}, "is not before end"),
        ({"start": 0}, "points in the range; at most 11000"),
    ],
)
def test_a_wrong_range_is_refused(reader: HttpReader, hits: Definition, options: dict[str, Any], said: str) -> None:
    """A wrong range is refused by the client where it can know, else by the server."""
    with pytest.raises(Invalid, match=said):
        reader.get("hits", **options)


def test_an_async_reader_reads_as_a_reader(server: Server, hits: Definition) -> None:
    """An async reader makes several calls at once, and raises the errors that a reader raises."""

    async def run() -> None:
        async with AsyncHttpReader(server.url) as reader:
            ends = [1_700_000_040_000 + i * 60_000 for i in range(1, 5)]
            answers = await asyncio.gather(*[reader.get("hits", by=(), at=end) for end in ends])
            assert [answer.value() for answer in answers] == [1, 2, 3, 4]
            assert "hits" in {view.name for view in await reader.views()}
            assert (await reader.status())["ready"]
            with pytest.raises(NotFound, match="is it hits"):
                await reader.get("hit")

    asyncio.run(run())


def test_media_types(server: Server, hits: Definition) -> None:
    """CSV and NDJSON come where they are preferred, with headers for what JSON says beside the series; else JSON."""
    path = "/v1/views/hits?start=1700000040000&end=1700000160000&limit=1"
    reply = server.request("GET", path, headers={"Accept": "text/csv"})
    assert reply.body == b"path,start_ms,value\r\n/,1700000040000,1\r\n/,1700000100000,2\r\n"
    assert reply.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert int(reply.headers["pipeline-final-before-ms"]) > 0
    assert "pipeline-series-total" not in reply.headers
    reply = server.request("GET", path, headers={"Accept": "application/x-ndjson, application/json;q=0.5"})
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert reply.body.count(b"\n") == 2
    for accept in ("", "*/*", "application/json, text/csv", "text/csv;q=0", "text/csv;q=x, text/html", "image/png"):
        reply = server.request("GET", path, headers={"Accept": accept})
        assert (reply.headers["content-type"], len(reply.json()["series"])) == ("application/json", 1)
    server.world.publish(Definition("plain", "sum", ("x",)), {("a",): 1, ("b",): 2})
    reply = server.request("GET", "/v1/views/plain?limit=1&max_staleness_ms=60000", headers={"Accept": "text/*, x/csv"})
    assert (reply.body, reply.headers["pipeline-series-total"]) == (b"x,value\r\na,1\r\n", "2")
    assert reply.headers["pipeline-staleness-ms"].isdigit()
    refused = server.request("GET", "/v1/views/nothing", headers={"Accept": "text/csv"})
    assert server.problem(404, refused)
