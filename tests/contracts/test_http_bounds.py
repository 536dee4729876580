"""Bounds of one connection, byte by byte, over raw sockets; and of all connections together."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from select import select
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

import pipeline.roles.http_server as http_server
from pipeline.adapters.prometheus import PrometheusMetrics
from pipeline.metrics import NO_METRICS
from pipeline.query.clients import address_group
from pipeline.query.fairness import IS_GONE
from pipeline.roles.connections import Connections
from pipeline.roles.descriptors import sockets_within
from pipeline.roles.http_protocol import BoundedProtocol
from pipeline.settings import QuerySettings
from tests.attack.support import connect, flood, read_to_end
from tests.broker.tls import make as make_certificates
from tests.query.support import running
from tests.support import HandClock, wait_until

HEAD_BYTES = 2_048
LARGE_BYTES = 10_000_000
"""More than the system's buffers take."""
SETTINGS = {
    "head_bytes_max": HEAD_BYTES,
    "head_timeout_ms": 400,
    "body_timeout_ms": 600,
    "idle_timeout_ms": 500,
    "write_timeout_ms": 500,
}


class Site:
    """A server of a small application on this process' loopback address."""

    def __init__(self, port: int, metrics: PrometheusMetrics) -> None:
        self.port = port
        self._metrics = metrics
        self.gate, self.gone = threading.Event(), threading.Event()

    def connect(self, **options: Any) -> socket.socket:
        return connect(self.port, **options)

    def ask(self, sent: bytes, timeout_s: float = 5.0) -> list[tuple[int, bytes]]:
        """Return status and body of all answers until the server closes the connection."""
        with self.connect() as client:
            client.sendall(sent)
            received = read_to_end(client, timeout_s)
            assert received is not None, "the connection is still open"
            return answers(received)

    def cut(self, limit: str) -> int:
        """Number of connections that were closed at a limit."""
        value = self._metrics.registry.get_sample_value("pipeline_http_connections_cut_total", {"limit": limit})
        return int(value or 0)

    @property
    def open_count(self) -> int:
        return int(self._metrics.registry.get_sample_value("pipeline_http_connections_open") or 0)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer with what was asked: path, headers, body; or as the path says."""
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        body, more = b"", True
        if scope["path"] == "/gone":
            for _ in range(500):
                await asyncio.sleep(0.01)
                if scope["extensions"][IS_GONE]():
                    self.gone.set()
                    return
        if scope["path"] == "/early":
            more = False
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        if scope["path"] == "/wait":
            await asyncio.to_thread(self.gate.wait)
        if scope["path"].startswith("/large"):
            answer = bytes([48 + len(scope["query_string"]) % 10]) * LARGE_BYTES
        else:
            names = [name.decode() for name, _ in scope["headers"]]
            answer = json.dumps({"path": scope["path"], "headers": names, "body": len(body)}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
        await send({"type": "http.response.body", "body": answer})


@contextmanager
def site(tls: ssl.SSLContext | None = None, **settings: int) -> Iterator[Site]:
    metrics = PrometheusMetrics()
    made = Site(0, metrics)
    with running(made, 0, QuerySettings(**{**SETTINGS, **settings}), metrics, tls and (lambda: tls)) as port:  # type: ignore[arg-type]
        made.port = port
        try:
            yield made
        finally:
            made.gate.set()


@pytest.fixture(scope="module")
def bounded() -> Iterator[Site]:
    with site() as made:
        yield made


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def either(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A site on either event loop."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "asyncio":
            patch.setattr(http_server, "_loop_factory", lambda: None)
        with site() as made:
            yield made


def answers(received: bytes) -> list[tuple[int, bytes]]:
    found = []
    while received:
        head, end, rest = received.partition(b"\r\n\r\n")
        assert end, received
        status = int(head.split()[1])
        length = next((int(it.split(b":")[1]) for it in head.lower().split(b"\r\n") if it.startswith(b"content-length")), 0)
        found.append((status, rest[:length]))
        received = rest[length:]
    return found


def get(size: int, path: bytes = b"/") -> bytes:
    """A GET whose head has `size` bytes, and closes the connection."""
    head = b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nPad: \r\n\r\n" % path
    assert size >= len(head)
    return head.replace(b"Pad: ", b"Pad: " + b"x" * (size - len(head)))


def test_the_edge_of_a_head(either: Site) -> None:
    """A head of exactly `head_bytes_max` bytes is answered, one of a byte more is 431, in one piece or in many."""
    assert either.ask(get(HEAD_BYTES))[0][0] == 200
    before = either.cut("head_bytes_max")
    [(status, body)] = either.ask(get(HEAD_BYTES + 1))
    assert (status, json.loads(body)["status"]) == (431, 431)
    assert either.cut("head_bytes_max") == before + 1
    for size, expected in ((HEAD_BYTES, 200), (HEAD_BYTES + 1, 431)):
        with either.connect() as client:
            sent = get(size)
            for at in range(0, len(sent), 97):
                client.sendall(sent[at : at + 97])
                time.sleep(0.001)
            received = read_to_end(client)
            assert received is not None
            assert answers(received)[0][0] == expected


def test_a_head_may_end_anywhere(either: Site) -> None:
    """The body behind a head never counts for it, wherever the two pieces are parted."""
    body = b"x" * (2 * HEAD_BYTES)
    sent = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    for parted in range(len(sent) - 5, len(sent) + 2):
        with either.connect() as client:
            client.sendall((sent + body)[:parted])
            time.sleep(0.03)
            client.sendall((sent + body)[parted:])
            assert json.loads(answers(read_to_end(client) or b"")[0][1])["body"] == len(body), parted


def test_the_edge_of_a_url(bounded: Site) -> None:
    """A URL that is larger than a head may be is 414, one that fits with the rest of its head is answered."""
    assert bounded.ask(get(HEAD_BYTES, b"/" + b"x" * 1_900))[0][0] == 200
    assert bounded.ask(b"GET /" + b"x" * HEAD_BYTES)[0][0] == 414
    assert bounded.ask(b"GET /" + b"x" * HEAD_BYTES + b" HTTP/1.1\r\n\r\n")[0][0] == 414
    assert bounded.ask(b"GET /" + b"x" * 2_000 + b" HTTP/1.1\r\nHost: " + b"x" * 99)[0][0] == 431


CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("piece", [1, 7, 100_000])
def test_chunks_and_trailers(bounded: Site, piece: int) -> None:
    """Chunked bodies arrive whole, in pieces of any size; trailers are read, bounded, and never become headers."""
    body = b"".join(b"%x\r\n%s\r\n" % (size, b"\r\n\r\n" * (size // 4)) for size in (4, 8, 400)) + b"0\r\n"
    small, large = b"Tenant: other\r\n\r\n", b"T: " + b"x" * (HEAD_BYTES - 10) + b"\r\nTail: x\r\n\r\n"
    for sent, expected in ((body + b"\r\n", 200), (body + small, 200), (body + large, 431)):
        with bounded.connect() as client:
            sent = CHUNKED + sent
            for at in range(0, len(sent), piece):
                client.sendall(sent[at : at + piece])
            received = read_to_end(client)
            assert received is not None
            [(status, answer)] = answers(received)
            assert status == expected
            if status == 200:
                assert json.loads(answer)["body"] == 412
                assert "tenant" not in json.loads(answer)["headers"]


def test_trailers_do_not_become_headers_of_the_next_request(bounded: Site) -> None:
    """A trailer is a header of no request."""
    keep = CHUNKED.replace(b"Connection: close\r\n", b"")
    first, second = bounded.ask(keep + b"1\r\nx\r\n0\r\nTenant: other\r\n\r\n" + get(200))
    assert (json.loads(first[1])["body"], first[0], second[0]) == (1, 200, 200)
    assert "tenant" not in json.loads(second[1])["headers"]


def test_chunks_that_carry_nothing(bounded: Site) -> None:
    """Endless extensions of chunks are 431, and bodies in chunks of a byte are 400 after a while."""
    assert bounded.ask(CHUNKED + b"1;" + b"x" * 9_000)[0][0] == 431
    assert bounded.ask(CHUNKED + b"1\r\nx\r\n" * 1_000 + b"0\r\n\r\n")[0][0] == 200
    assert bounded.ask(CHUNKED + b"1\r\nx\r\n" * 2_000)[0][0] == 400


def test_what_is_no_http_is_refused(bounded: Site) -> None:
    """Bytes that are no request get 400 and a closed connection."""
    assert bounded.ask(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")[0][0] == 400
    assert bounded.ask(b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n")[0][0] == 400
    assert bounded.ask(CHUNKED + b"z\r\n")[0][0] == 400


@pytest.mark.parametrize(
    ("hosts", "status"),
    [
        *((it, 200) for it in (["x"], ["x:1"], ["[::1]:1"], ["a-b.example."], [""])),
        *((it, 400) for it in ([], ["x", "x"], ["x", "evil"], ["x, evil"], ["user@x"], ["x/y"], ["x:y"], ["[x"], ["\xe4"])),
    ],
)
def test_a_request_has_one_valid_host(bounded: Site, hosts: list[str], status: int) -> None:
    """Without a Host, with two, or with one that is no name or address, a request is 400."""
    lines = "".join([f"Host: {it}\r\n" for it in hosts]).encode("latin-1")
    assert bounded.ask(b"GET / HTTP/1.1\r\n%sConnection: close\r\n\r\n" % lines)[0][0] == status
    if not hosts:
        assert bounded.ask(b"GET / HTTP/1.0\r\n\r\n")[0][0] == 200


@pytest.mark.parametrize("sent_bytes", [0, 120_000])
@pytest.mark.parametrize("reset", [False, True])
def test_an_application_learns_that_its_client_has_gone(sent_bytes: int, reset: bool) -> None:
    """While a body is not read, also once reading from the socket has stopped, the end of the connection is seen."""
    with site(body_timeout_ms=60_000) as patient, patient.connect() as client:
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        client.sendall(b"POST /gone HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"x" * sent_bytes)
        assert not patient.gone.wait(0.2)
        client.close()
        assert patient.gone.wait(5)


def test_expect_100_continue(bounded: Site) -> None:
    """A client that waits for leave to send its body gets it."""
    with bounded.connect() as client:
        client.sendall(
            b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
        )
        assert client.recv(1_000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc")
        received = read_to_end(client)
        assert received is not None
        assert json.loads(answers(received)[0][1])["body"] == 3


def test_an_upgrade_is_an_ordinary_request(bounded: Site) -> None:
    """A request that asks for another protocol is answered in this one."""
    asked = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    with bounded.connect() as client:
        client.sendall(asked + b"PRI * HTTP/2.0")
        received = read_to_end(client)
        assert received is not None
        assert [status for status, _ in answers(received)] == [200]
        assert b"connection: close" in received


def test_a_request_with_a_body_that_asks_for_an_upgrade_is_refused(bounded: Site) -> None:
    """A body that the parser would leave out is no empty body: its deltas would be acknowledged and lost."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"
    for rest in (b"Content-Length: 5\r\n\r\nabcde", b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"):
        [(status, body)] = bounded.ask(head + rest)
        assert status == 400
        assert b"Upgrade" in body
    assert bounded.ask(head + b"Content-Length: 0\r\n\r\n")[0][0] == 200


class Wire(asyncio.Transport):
    """A transport whose client takes everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        """Do nothing: the test sends what it wants."""

    def resume_reading(self) -> None:
        """Do nothing."""


def test_what_comes_between_two_turns_keeps_its_place() -> None:
    """Bytes that come after an answer and before the requests that were held for it are taken behind those."""
    protocols: list[BoundedProtocol] = []
    done = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        said = b"%s %s;" % (scope["path"].encode(), body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": said})
        if scope["path"] == "/1":  # at once, as from a loop that reads sockets before it goes on with what is to be done
            protocols[0].data_received(b"cde")
        else:
            done.set()

    async def run() -> bytes:
        loop, wire = asyncio.get_running_loop(), Wire()
        config = uvicorn.Config(app, log_config=None, lifespan="off")
        connections = Connections(QuerySettings(), NO_METRICS, 10, loop.time)
        protocols.append(protocol := BoundedProtocol(config, ServerState(), {}, connections, "127.0.0.1"))
        protocol.connection_made(wire)
        held = b"POST /2 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab"
        protocol.data_received(b"GET /1 HTTP/1.1\r\nHost: x\r\n\r\n" + held)
        await asyncio.wait_for(done.wait(), 5.0)
        return wire.sent

    assert b"/2 abcde;" in asyncio.run(run())


def test_pipelined_requests_are_answered_in_order(either: Site) -> None:
    """Requests that are sent ahead, bodies and all, are answered one after the other."""
    post = b"POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabcde"
    chunked = b"POST /%d HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"
    sent = b"".join((b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n", post, chunked)[n % 3] % n for n in range(600)) + get(200)
    got = either.ask(sent)
    assert [status for status, _ in got] == [200] * 601
    assert [json.loads(body)["path"] for _, body in got[:-1]] == [f"/{n}" for n in range(600)]
    assert [json.loads(body)["body"] for _, body in got[:3]] == [0, 5, 5]


def test_reading_stops_while_a_request_is_under_way() -> None:
    """Requests before their turn are read up to a bound; the rest waits in the system of its client."""
    with site() as slow, slow.connect() as client:
        client.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        assert flood(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10_000, 60_000_000, 2.0) < 20_000_000


def test_an_early_answer(bounded: Site) -> None:
    """A request that is answered before its body is there leaves the connection usable, and a body that stalls closes it."""
    head = b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"
    assert [status for status, _ in bounded.ask(head + b"abcde" + get(200))] == [200, 200]
    assert [status for status, _ in bounded.ask(head + b"abc")] == [200]


LATE: dict[str, tuple[bytes, list[int]]] = {
    "a connection without a byte": (b"", []),
    "a head that stops": (b"GET / HTTP/1.1\r\nHo", [408]),
    "a body that stops": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabc", [408]),
    "a chunked body that stops": (CHUNKED + b"5\r\nab", [408]),
    "a second head that stops": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET ", [200, 408]),
    "a connection without a second request": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
}


def test_late_clients_are_told_and_closed(bounded: Site) -> None:
    """A connection whose client does nothing is closed in time, with 408 if a request had begun."""
    with ExitStack() as stack:
        began_s = time.monotonic()
        clients = [stack.enter_context(bounded.connect()) for _ in LATE]
        for client, (sent, _) in zip(clients, LATE.values(), strict=True):
            client.sendall(sent)
        for client, (what, (_, expected)) in zip(clients, LATE.items(), strict=True):
            received = read_to_end(client)
            assert received is not None, what
            assert [status for status, _ in answers(received)] == expected, what
        assert 0.3 < time.monotonic() - began_s < 3


def test_a_head_that_trickles_is_late(bounded: Site) -> None:
    """The time for a head is for the whole of it: a byte now and then does not stretch it."""
    with bounded.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: ")
        for _ in range(100):
            client.sendall(b"x")
            if select([client], [], [], 0.05)[0]:
                break
        else:
            pytest.fail("nothing came while the head went on")
        received = read_to_end(client)
        assert received is not None
        assert answers(received)[0][0] == 408


def test_a_long_request_is_no_idle_connection() -> None:
    """While a request is under way no time of its connection runs out, and its answer comes whole."""
    with site() as slow, slow.connect() as client:
        client.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_to_end(client, 1.2) is None
        slow.gate.set()
        assert [status for status, _ in answers(read_to_end(client) or b"")] == [200]


def test_slow_legal_clients_are_served() -> None:
    """Clients that are slow within the bounds get their answers: heads by the byte, bodies and answers in pieces."""
    times = dict.fromkeys(("head_timeout_ms", "body_timeout_ms", "write_timeout_ms"), 10_000)
    with site(**times) as patient:
        with patient.connect() as client:
            for byte in b"GET / HTTP/1.1\r\nHost: x\r\n\r\nPOST / HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\n":
                client.sendall(bytes([byte]))
                time.sleep(0.004)
            for _ in range(10):
                client.sendall(b"abc")
                time.sleep(0.04)
            client.sendall(get(200))
            received = read_to_end(client)
            assert received is not None
            assert [status for status, _ in answers(received)] == [200] * 3
        with patient.connect(receive_bytes=65_536) as client:
            client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            size = 0
            while part := client.recv(262_144):
                size += len(part)
                time.sleep(0.03)  # the server's part is sent long before: an idle connection it is not
            assert size > LARGE_BYTES


def test_a_client_that_reads_nothing_is_cut_off(either: Site) -> None:
    """An answer that nobody takes is given up after `write_timeout_ms`, whether or not the connection is to go on."""
    for last in (b"", b"Connection: close\r\n"):
        before = either.cut("write_timeout_ms")
        with either.connect(receive_bytes=4_096) as client:
            client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n" + last + b"\r\n")
            wait_until(lambda: either.cut("write_timeout_ms") == before + 1, "cut off", 5)  # noqa: B023
            received = read_to_end(client)
            assert received is not None
            assert len(received) < LARGE_BYTES


def test_unread_answers_are_bounded_together() -> None:
    """Beyond `buffered_bytes_max` of answers that nobody takes, the slowest reader is cut off, and not the quick one."""
    with site(buffered_bytes_max=25_000_000, write_timeout_ms=60_000) as many, ExitStack() as stack:
        for n in range(8):
            client = stack.enter_context(many.connect(receive_bytes=4_096))
            client.sendall(b"GET /large?%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * n))
        wait_until(lambda: many.cut("buffered_bytes_max") >= 5, "cut off", 10)
        before = many.cut("buffered_bytes_max")
        with ThreadPoolExecutor(4) as threads:
            quick = [threads.submit(many.ask, get(200, b"/large")) for _ in range(4)]
            assert [len(it.result()[0][1]) for it in quick] == [LARGE_BYTES] * 4
        assert many.cut("buffered_bytes_max") - before <= 3


class Taker:
    """A connection whose client has some bytes to take."""

    address, reserved = "127.0.0.1", False

    def __init__(self, unsent_bytes: int) -> None:
        self.unsent_bytes = unsent_bytes
        self.is_cut = False

    def cut(self) -> None:
        self.is_cut = True

    def late(self, limit: str) -> None:
        raise AssertionError(limit)


def test_quick_readers_are_spared() -> None:
    """A client that takes 1 MB a second, or has just begun, is cut off beyond twice `buffered_bytes_max` only."""
    clock = HandClock()
    connections = Connections(QuerySettings(buffered_bytes_max=10_000_000), NO_METRICS, 100, clock.monotonic_s)
    first, second, third = takers = [Taker(8_000_000) for _ in range(3)]
    connections.unsent(first)
    connections.sweep()
    clock.s += 2
    first.unsent_bytes = 5_000_000
    connections.unsent(second)
    assert not any(it.is_cut for it in takers)
    connections.unsent(third)
    assert [it.is_cut for it in takers] == [True, False, False]
    connections.sweep()
    clock.s += 2
    third.unsent_bytes = 4_000_000
    connections.sweep()
    assert [it.is_cut for it in takers] == [True, True, False]


def test_the_longest_waiting_connection_makes_room() -> None:
    """At `sockets_max` a new connection takes the place of that which has waited longest, also within a body or a head."""
    starts = (b"", b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabc")
    times = {"head_timeout_ms": 60_000, "body_timeout_ms": 60_000, "idle_timeout_ms": 60_000}
    with site(sockets_max=6, **times) as full, ExitStack() as stack:
        clients = []
        for n in range(12):
            clients.append(stack.enter_context(full.connect()))
            clients[-1].sendall(starts[n % 3])
            time.sleep(0.02)
        assert full.ask(get(200))[0][0] == 200
        assert full.cut("sockets_max") == 7
        wait_until(lambda: full.open_count <= 6, "closed")
        for client in clients[:7]:
            assert read_to_end(client) == b""
        clients[11].sendall(b"de" + get(200))
        received = read_to_end(clients[11])
        assert received is not None
        assert [status for status, _ in answers(received)] == [200, 200]


def test_operators_are_answered_where_no_connection_waits() -> None:
    """When all connections have requests under way, a few more are taken for health and metrics, and nothing else."""
    with site(sockets_max=4) as full, ExitStack() as stack:
        for _ in range(4):
            client = stack.enter_context(full.connect())
            client.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: full.open_count == 4, "connected")
        time.sleep(0.1)
        for _ in range(40):  # more than there are places in the reserve: those without a request make room
            stack.enter_context(full.connect())
        for path in (b"/healthz", b"/metrics"):
            assert full.ask(get(200, path))[0][0] == 200
        [(status, body)] = full.ask(get(200))
        assert (status, json.loads(body)["status"]) == (503, 503)
        full.gate.set()
        wait_until(lambda: full.ask(get(200))[0][0] == 200, "served again")


def test_an_address_has_its_share() -> None:
    """One address can't take all connections: beyond its share its own make room, and others are served."""
    with site(sockets_max=20, sockets_per_address_max=5, head_timeout_ms=60_000) as shared, ExitStack() as stack:
        other = stack.enter_context(shared.connect(address="127.0.0.3"))
        for _ in range(12):
            stack.enter_context(shared.connect(address="127.0.0.2"))
        wait_until(lambda: shared.cut("sockets_per_address_max") == 7, "cut off")
        other.sendall(get(200))
        received = read_to_end(other)
        assert received is not None
        assert answers(received)[0][0] == 200


def test_a_crowd_from_one_address_pays_first() -> None:
    """At `sockets_max` the address with the most connections gives one up, though another's has waited longer."""
    with site(sockets_max=6, head_timeout_ms=60_000) as crowded, ExitStack() as stack:
        first = stack.enter_context(crowded.connect(address="127.0.0.3"))
        time.sleep(0.05)
        for _ in range(20):
            stack.enter_context(crowded.connect(address="127.0.0.2"))
        wait_until(lambda: crowded.cut("sockets_max") == 15, "cut off")
        first.sendall(get(200))
        received = read_to_end(first)
        assert received is not None
        assert answers(received)[0][0] == 200


@pytest.mark.parametrize(
    ("host", "group"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8::1:2:3:4", "2001:db8::"),
        ("fe80::1%eth0", "fe80::"),
        ("", ""),
    ],
)
def test_what_an_address_counts_for(host: str, group: str) -> None:
    """IPv6 clients count by their network of 64 bits, in which one client has as many addresses as it likes."""
    assert address_group(host) == group


def test_bounds_hold_within_tls(tmp_path: Path) -> None:
    """Over TLS a connection counts from its start: one without a handshake is closed in time, or makes room for others."""
    certificates = make_certificates(tmp_path)
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(certificates.server)
    trusting = ssl.create_default_context(cafile=certificates.authority)
    with site(served, sockets_max=4, head_timeout_ms=2_000) as secure, ExitStack() as stack:

        def ask(sent: bytes) -> list[tuple[int, bytes]]:
            with trusting.wrap_socket(secure.connect(), server_hostname="127.0.0.1") as client:
                client.sendall(sent)
                received = read_to_end(client)
                assert received is not None
                return answers(received)

        silent = [stack.enter_context(secure.connect()) for _ in range(9)]
        [(status, body)] = ask(get(200, b"/large"))
        assert (status, len(body)) == (200, LARGE_BYTES)
        assert secure.cut("sockets_max") == 6
        assert ask(get(HEAD_BYTES + 1))[0][0] == 431
        with trusting.wrap_socket(secure.connect(), server_hostname="127.0.0.1") as client:
            client.sendall(b"GET / HT")
            assert [status for status, _ in answers(read_to_end(client) or b"")] == [408]
        wait_until(lambda: secure.open_count == 0, "all closed")
        assert read_to_end(silent[-1]) == b""


def test_sockets_leave_descriptors_to_files(caplog: pytest.LogCaptureFixture) -> None:
    """Sockets take at most half of the files that a process may open, and a bound that is lowered for it is logged."""
    assert sockets_within(0, 4_096) == 4_096
    assert sockets_within(65_536, 4_096) == 4_096
    assert not caplog.records
    assert 400 < sockets_within(1_024, 4_096) < 512
    assert "ulimit -n" in caplog.text
    assert sockets_within(64, 4_096) >= 1


@pytest.mark.long  # in a process of many other things; tests/attack/test_sockets.py has a process of its own
def test_without_descriptors_the_longest_waiting_makes_room() -> None:
    """Connections that wait give up their descriptors when the system has none for a new connection."""
    with site(head_timeout_ms=60_000) as tight, ExitStack() as stack:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        clients = [stack.enter_context(socket.socket()) for _ in range(10)]
        taken = {int(name) for name in os.listdir("/proc/self/fd")}
        free = [number for number in range(max(taken) + 10) if number not in taken]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[4], limits[1]))
        try:
            for client in clients:
                client.connect(("127.0.0.1", tight.port))
            clients[-1].sendall(get(200))
            assert answers(read_to_end(clients[-1]) or b"")[0][0] == 200
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert tight.cut("sockets_max") >= 1  # how many depends on what else is open just then
