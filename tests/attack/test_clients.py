"""Hostile servers: an answer without end, a bomb, a redirect, and bytes that never come do no harm to a client."""

from __future__ import annotations

import asyncio
import gzip
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from pipeline import AsyncReader, Publisher, Reader
from pipeline.errors import Invalid, PipelineError, Unavailable
from tests.attack.support import rss_bytes
from tests.support import pipeline

BYTES_MAX = 1_000_000
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM = OK + b"Content-Type: text/event-stream\r\n\r\n"
Serve = Callable[[socket.socket], None]


@contextmanager
def serving(serve: Serve) -> Iterator[str]:
    """Yield the URL of a server that reads a request and then does `serve`, until the context ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = threading.Event()

        def one(client: socket.socket) -> None:
            with client, suppress(OSError):
                client.settimeout(10)
                client.recv(100_000)
                serve(client)

        def accept() -> None:
            with suppress(OSError):
                while not ended.is_set():
                    client, _ = listener.accept()
                    threading.Thread(target=one, args=(client,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()
            listener.shutdown(socket.SHUT_RDWR)


def endless(head: bytes, part: bytes, pause_s: float = 0.0) -> Serve:
    """Return a server's side that sends `head` and then `part` again and again, at most 2 GB and 20 s long."""

    def serve(client: socket.socket) -> None:
        client.sendall(head)
        ends_s, left = time.monotonic() + 20, 2_000_000_000
        while left > 0 and time.monotonic() < ends_s:
            client.sendall(part)
            left -= len(part)
            time.sleep(pause_s)

    return serve


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


ENDLESS = {
    "chunks": endless(CHUNKED, chunk(b" " * 100_000)),
    "to the end of the connection": endless(OK + b"\r\n", b"[" * 100_000),
    "announced": endless(OK + b"Content-Length: 900000000\r\n\r\n", b" " * 100_000),
    "an error": endless(b"HTTP/1.1 503 No\r\n\r\n", b"x" * 100_000),
}


@pytest.mark.parametrize("how", ENDLESS)
def test_an_answer_without_end(how: str) -> None:
    """Reading stops at `answer_bytes_max` with an error that says what to do, and memory stays about there."""
    with serving(ENDLESS[how]) as url, Reader(url, answer_bytes_max=BYTES_MAX) as reader:
        before = rss_bytes(os.getpid())
        with pytest.raises(Invalid, match="over 1000000 bytes: ask for less, or raise answer_bytes_max"):
            reader.get("v")
        assert rss_bytes(os.getpid()) - before < 50 * BYTES_MAX
        assert isinstance(_error_of_publisher(url), Unavailable)


def _error_of_publisher(url: str) -> PipelineError | None:
    """Return what a flush says: a batch is never given up because of a server's answer."""
    publisher = Publisher(url, answer_bytes_max=BYTES_MAX, retry_backoff_max_ms=100)
    publisher.sum("v").add(1)
    try:
        publisher.flush(timeout_s=1)
    except PipelineError as error:
        return error
    finally:
        with suppress(Unavailable):
            publisher.close(timeout_s=0)
    return None


@pytest.mark.parametrize("part", [b"x" * 100_000, b"data: x\n" * 10_000, b"id: x\n" * 10_000])
def test_an_event_without_end(part: bytes) -> None:
    """A watch ends with an error at an event that is larger than `answer_bytes_max`."""
    with (
        serving(endless(STREAM + b"event: answer\ndata: ", part)) as url,
        Reader(url, answer_bytes_max=BYTES_MAX) as reader,
        pytest.raises(Invalid, match="an event of over 1000000 bytes"),
    ):
        next(reader.watch("v"))


def test_an_event_without_end_for_an_event_loop() -> None:
    """An `AsyncReader` has the same bounds."""

    async def read(url: str) -> None:
        async with AsyncReader(url, answer_bytes_max=BYTES_MAX) as reader:
            with pytest.raises(Invalid, match="answer_bytes_max"):
                await reader.get("v")

    with serving(ENDLESS["chunks"]) as url:
        asyncio.run(read(url))


def test_a_bomb_is_not_unpacked() -> None:
    """A client asks for no compression, and does not unpack an answer that is compressed all the same."""
    bomb = gzip.compress(b" " * 50_000_000)
    head = OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    with (
        serving(lambda client: client.sendall(head + bomb)) as url,
        Reader(url) as reader,
        pytest.raises(Unavailable, match="not an answer of this API"),
    ):
        reader.get("v")


def test_a_redirect_is_not_followed() -> None:
    """A redirect is an error, and no request goes to its target."""
    asked: list[bytes] = []
    with serving(lambda client: asked.append(b"")) as target:
        moved = b"HTTP/1.1 307 Moved\r\nLocation: %s/\r\nContent-Length: 0\r\n\r\n" % target.encode()
        with (
            serving(lambda client: client.sendall(moved)) as url,
            Reader(url) as reader,
            pytest.raises(Unavailable, match="HTTP 307"),
        ):
            reader.get("v")
    assert not asked


SLOW = {
    "a body": endless(OK + b"Content-Length: 100000\r\n\r\n", b"x", 0.2),
    "chunks": endless(CHUNKED, b"1\r\nx\r\n", 0.2),
    "interim responses": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
    "headers": endless(OK, b"a: b\r\n"),
    "a header": endless(OK, b"a" * 1_000),
}


@pytest.mark.parametrize("how", SLOW)
def test_an_answer_that_does_not_come(how: str) -> None:
    """An answer that comes byte by byte, and one behind headers without end, is given up at the time-out."""
    with serving(SLOW[how]) as url, Reader(url, timeout_s=1.5) as reader:
        began_s = time.monotonic()
        with pytest.raises(Unavailable):
            reader.views()
        assert time.monotonic() - began_s < 5


def test_the_command_line_has_the_same_bounds() -> None:
    """`pipeline get` ends with exit code 2 and one line."""
    with serving(ENDLESS["chunks"]) as url:
        done = pipeline("get", "v", "--from", url, env={"PIPELINE_ANSWER_BYTES_MAX": "1000000"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "raise answer_bytes_max" in done.stderr
    assert done.stderr.count("\n") == 1
