"""Clients that send without end, send nothing, or read nothing: each connection, and all together, are bounded."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from urllib.parse import quote

import pytest

from tests.attack.support import attacked, connect, flood, request, up_process
from tests.support import LONG, UpProcess, wait_until

PART = b"x" * 65_536
HOST = b"Host: localhost\r\n"
GROWN_BYTES_MAX = 100_000_000
"""Memory that an attack below may cost: the server has at most a few MB of a connection, and a few KB of an idle one."""
COUNT = 1_100
"""Connections of an attack; the system's usual limit on open files is 1,024."""


def test_headers_without_end(up: UpProcess) -> None:
    """600 MB of headers on a connection cost nothing: it is closed after 64 KB."""
    assert_cut_off(up, b"GET / HTTP/1.1\r\n" + HOST, b"name: " + PART + b"\r\n", 600_000_000)


def test_one_header_without_end(up: UpProcess) -> None:
    """A header value that never ends is cut off in the same way."""
    assert_cut_off(up, b"GET / HTTP/1.1\r\nname: ", PART, 600_000_000)


def test_trailers_without_end(up: UpProcess) -> None:
    """Trailers behind a chunked body are bounded as heads are."""
    head = b"POST /v1/deltas HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n[\r\n0\r\n"
    assert_cut_off(up, head, b"name: " + PART + b"\r\n", 600_000_000)


def test_a_url_without_end(up: UpProcess) -> None:
    """A URL of 108 MB is cut off after 64 KB."""
    assert_cut_off(up, b"GET /", PART, 108_000_000)


def test_chunks_without_bytes(up: UpProcess) -> None:
    """An extension of a chunk that never ends is cut off too, though none of it is kept."""
    head = b"POST /v1/deltas HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n1;name="
    assert_cut_off(up, head, PART, 600_000_000)


def assert_cut_off(up: UpProcess, head: bytes, part: bytes, bytes_max: int) -> None:
    with attacked(up) as bystander, connect(up.port) as client:
        client.sendall(head)
        sent = flood(client, part, bytes_max)
        time.sleep(0.2)
    bystander.check(grown_bytes_max=GROWN_BYTES_MAX)
    assert sent < 20_000_000, "what the kernel's buffers took"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    """A server as under `ulimit -n 1024`, hard limit and all."""
    with up_process(tmp_path_factory.mktemp("narrow") / "data", descriptors=1_024) as started:
        yield started


def test_idle_connections(narrow: UpProcess) -> None:
    """More idle connections than descriptors: RocksDB opens its files, and others are served."""
    with attacked(narrow) as bystander, ExitStack() as stack:
        for _ in range(COUNT):
            stack.enter_context(connect(narrow.port))
        time.sleep(60 if LONG else 1.6)
    bystander.check(grown_bytes_max=GROWN_BYTES_MAX, rounds_min=3)
    assert narrow.program.stderr().count("has at most 464 connections") == 1


def test_stalled_heads(narrow: UpProcess) -> None:
    """A connection whose head never ends holds no place that others need."""
    with attacked(narrow) as bystander, ExitStack() as stack:
        for _ in range(COUNT):
            stack.enter_context(connect(narrow.port)).sendall(b"GET /v1/views HTTP/1.1\r\nHost: ")
        time.sleep(60 if LONG else 1.6)
    bystander.check(grown_bytes_max=GROWN_BYTES_MAX, rounds_min=3)


def stalled_body(length: int) -> bytes:
    return b"POST /v1/deltas HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n[" % length


def test_stalled_bodies(up: UpProcess) -> None:
    """Requests whose bodies never come hold no place among the open requests."""
    with attacked(up) as bystander, ExitStack() as stack:
        for _ in range(COUNT):
            stack.enter_context(connect(up.port)).sendall(stalled_body(1_000))
        time.sleep(60 if LONG else 1)
    bystander.check(grown_bytes_max=GROWN_BYTES_MAX, rounds_min=3)


def test_stalled_large_bodies(up: UpProcess) -> None:
    """Bodies of 16 MB that lack their last byte lock nobody out, and the server holds a few of them only."""
    with attacked(up) as bystander, ExitStack() as stack:
        for _ in range(12):
            client = stack.enter_context(connect(up.port))
            client.sendall(stalled_body(16_777_216))
            client.sendall(b" " * (16_777_216 - 2))
        time.sleep(60 if LONG else 1)
        rounds = len(bystander.round_s)
        time.sleep(1)
        assert len(bystander.round_s) > rounds
    bystander.check(grown_bytes_max=130_000_000, rounds_min=3)


@pytest.mark.parametrize("path", ["/v1/views", "/v1/status", "/healthz"])
def test_pipelining_without_reading(up: UpProcess, path: str) -> None:
    """A client that sends requests and reads no answers is not read either, once its answers fill the buffers."""
    with attacked(up) as bystander, ExitStack() as stack:
        threads = []
        for _ in range(8):
            client = stack.enter_context(connect(up.port, receive_bytes=4_096))
            one = b"GET %s HTTP/1.1\r\n%s\r\n" % (path.encode(), HOST)
            threads.append(Thread(target=flood, args=(client, one * 1_000, 100_000_000, 60.0 if LONG else 2.0)))
            threads[-1].start()
        for thread in threads:
            thread.join()
    bystander.check(grown_bytes_max=GROWN_BYTES_MAX, rounds_min=1)


@pytest.fixture
def large(tmp_path: Path) -> Iterator[UpProcess]:
    """A server with a view whose answer is 10 MB, and a quarter of the usual room for answers that nobody takes."""
    bound = () if LONG else ("--set", "buffered_bytes_max=67108864")
    with up_process(tmp_path / "data", *bound) as up:
        value = "x" * 1_000
        for begin in range(0, 10_000, 2_000):
            series = [
                {"view": "large", "kind": "last", "labels": {"n": str(begin + n)}, "value": value} for n in range(2_000)
            ]
            headers = {"content-type": "application/json"}
            reply = request(up.port, "POST", "/v1/deltas", json.dumps(series).encode(), headers, timeout_s=30)
            assert reply.status == 200, reply
        reply = request(up.port, "GET", f"/v1/views/large?after={quote(reply.json()['token'])}", timeout_s=30)
        assert len(reply.body) > 10_000_000
        yield up


def test_clients_that_never_read(large: UpProcess) -> None:
    """300 clients that ask for 10 MB, each in another way, and read nothing are held to a number of bytes together."""
    with attacked(large) as bystander, ExitStack() as stack:
        for n in range(300 if LONG else 14):
            client = stack.enter_context(connect(large.port, receive_bytes=4_096))
            client.sendall(b"GET /v1/views/large?limit=%d HTTP/1.1\r\n%s\r\n" % (10_000 + n, HOST))
            time.sleep(0.1 if LONG else 0.2)  # each costs a scan
        time.sleep(60 if LONG else 0)
        cut = 'pipeline_http_connections_cut_total{limit="%s"} 0.0'
        limits = [cut % limit for limit in ("buffered_bytes_max", "write_timeout_ms")]
        wait_until(lambda: any(it not in metrics_text(large) for it in limits), "cut off")
    bystander.check(grown_bytes_max=700_000_000 if LONG else 250_000_000, rounds_min=3)


def metrics_text(up: UpProcess) -> str:
    return request(up.port, "GET", "/metrics", timeout_s=30).body.decode()
