"""Request bodies: each, and all together, are bounded; few large ones are worked on at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar
from zlib import decompressobj
from zlib import error as ZlibError

from starlette.requests import ClientDisconnect, Request

import pipeline.metrics as m
from pipeline.budget import Budget, Spent
from pipeline.errors import Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock
from pipeline.query.problems import Refused
from pipeline.settings import QuerySettings

BATCHES_TYPE = "application/octet-stream"
OTLP_TYPES = ("application/x-protobuf", "application/json")
PUSH_TYPES = ("text/plain; version=0.0.4", "application/openmetrics-text")
"""Media types of pushed metrics."""
_TURN_S = 10.0
"""Longest wait of a large body for its turn."""
T = TypeVar("T")


class _Held:
    """A body of which a part, or all, is in memory."""

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self.size = 0
        self.timeout = timeout


class BodyRoom:
    """Memory for the request bodies of an event loop, on which it must be used, and turns for the work on large ones.

    Large bodies have three quarters of the memory, and the others the rest, so that large ones keep no others out. Where
    memory is short, the body that has been coming for longest makes room, so that clients that stop within a body keep
    nobody out.
    """

    def __init__(self, settings: QuerySettings, metrics: Metrics, clock: Clock) -> None:
        self._metrics = metrics
        self._large_from = settings.large_body_bytes
        large_max = settings.bodies_bytes_max * 3 // 4
        self._most = {True: large_max, False: settings.bodies_bytes_max - large_max}
        self._bytes = {True: 0, False: 0}
        """Bytes in memory of large bodies, and of the others."""
        self._coming: dict[_Held, None] = {}
        """Bodies that have not come as a whole; the first one has been coming for longest."""
        self._turns = asyncio.Semaphore(settings.large_bodies_max)
        metrics.inc(m.BODIES_REFUSED, 0, "bodies_bytes_max")
        metrics.inc(m.BODIES_REFUSED, 0, "large_bodies_max")
        metrics.inc(m.BODIES_REFUSED, 0, "cpu_ms_max")
        self._clock = clock
        self._cpu_ms_max = settings.cpu_ms_max

    def begin(self, held: _Held) -> None:
        """Note that a body is coming."""
        self._coming[held] = None

    def grow(self, held: _Held, more: int) -> None:
        """Make room for more bytes of a body; `Unavailable` without room."""
        before, held.size = held.size, held.size + more
        self._bytes[self._is_large(before)] -= before
        large = self._is_large(held.size)
        self._bytes[large] += held.size
        while self._bytes[large] > self._most[large]:
            longest = next((it for it in self._coming if it.size and self._is_large(it.size) is large), held)
            self._metrics.inc(m.BODIES_REFUSED, 1, "bodies_bytes_max")
            if longest is held:
                raise Unavailable("too many request bodies are being worked on (bodies_bytes_max)")
            self.end(longest)
            longest.timeout.reschedule(0)

    def _is_large(self, size: int) -> bool:
        return size > self._large_from

    def come(self, held: _Held) -> None:
        """Note that a body has come as a whole, or will not."""
        self._coming.pop(held, None)

    def end(self, held: _Held) -> None:
        """Note that a body is not needed any more."""
        self.come(held)
        self._bytes[self._is_large(held.size)] -= held.size
        held.size = 0

    async def work(
        self, request: Request, body: bytes, threads: ThreadPoolExecutor, work: Callable[[], T], *, large: bool = False
    ) -> T:
        """Return what `work` on a body returns, done in a thread. Large bodies wait for their turn; with `large` it is one.

        `Unavailable` if it does not come soon; nothing is done for a client that has gone meanwhile. `Refused` for work
        that uses up its CPU time.
        """
        loop, budget = asyncio.get_running_loop(), Budget(self._clock, self._cpu_ms_max, self._cpu_used_up, Spent())
        if not (large or self._is_large(len(body))):
            return await loop.run_in_executor(threads, budget.work, work)
        try:
            async with asyncio.timeout(_TURN_S):
                await self._turns.acquire()
        except TimeoutError:
            self._metrics.inc(m.BODIES_REFUSED, 1, "large_bodies_max")
            raise Unavailable("other large requests are being worked on (large_bodies_max)") from None
        try:
            if await request.is_disconnected():
                raise ClientDisconnect
            return await loop.run_in_executor(threads, budget.work, work)
        finally:
            self._turns.release()

    def _cpu_used_up(self) -> Refused:
        self._metrics.inc(m.BODIES_REFUSED, 1, "cpu_ms_max")
        return Refused(
            413, f"the request has used {self._cpu_ms_max} ms of CPU (setting cpu_ms_max): send it in smaller parts"
        )


class RequestBodies:
    """Reads request bodies of one encoding: each is bounded, and all together by the room."""

    def __init__(self, room: BodyRoom, bytes_max: int, *encodings: str) -> None:
        self._room = room
        self._bytes_max = bytes_max
        self._encodings = encodings or ("identity",)

    @asynccontextmanager
    async def of(self, request: Request, *types: str) -> AsyncIterator[bytes]:
        """Yield the body, which counts as in memory until the context ends. Its type must be one of `types`."""
        check_type(request.headers.get("content-type", ""), types)
        if request.headers.get("content-encoding", "identity") not in self._encodings:
            raise Refused(415, self._wrong_encoding())
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._bytes_max:
            raise self._too_large()
        timeout = asyncio.timeout(None)
        held = _Held(timeout)
        self._room.begin(held)
        parts: list[bytes] = []
        try:
            try:
                async with timeout:
                    async for part in request.stream():
                        if held.size + len(part) > self._bytes_max:
                            raise self._too_large()
                        self._room.grow(held, len(part))
                        parts.append(part)
            except TimeoutError:
                raise Unavailable("too many request bodies are coming, and this one for longest") from None
            finally:
                self._room.come(held)
            body = b"".join(parts)
            parts.clear()  # else the memory were taken twice while the body is worked on
            yield body
        finally:
            self._room.end(held)

    def _wrong_encoding(self) -> str:
        if self._encodings == ("identity",):
            return "compressed bodies are not understood"
        return f"a body with Content-Encoding: {' or '.join(self._encodings)} is needed"

    def _too_large(self) -> Refused:
        return Refused(413, f"a body of over {self._bytes_max} bytes")


class TooLargeUnzipped(Refused):
    """The body is too large once it is decompressed."""


def unzipped(body: bytes, bytes_max: int) -> bytes:
    """Return what gzip has compressed; `Refused` if it is more than `bytes_max` bytes, or no such thing."""
    unzip = decompressobj(wbits=31)
    try:
        found = unzip.decompress(body, bytes_max + 1)
    except ZlibError as error:
        raise Refused(400, f"the body is not what gzip makes: {error}") from None
    if len(found) > bytes_max:
        raise TooLargeUnzipped(413, f"a body of over {bytes_max} bytes once it is decompressed")
    if not unzip.eof or unzip.unused_data:
        raise Refused(400, "the body is not one whole file of gzip")
    return found


def check_type(content_type: str, types: Sequence[str]) -> None:
    """Raise `Refused` unless a Content-Type is one of these; of a parameter in `types` only the name counts.

    No type in `types` may be one that an HTML form can send, so that no page of another site can make a browser send a write
    without asking the server before. A form sends text/plain, but not with a parameter `version`; a script could, and is
    refused by its Origin (`cross_origin`).
    """
    essence, *parameters = [part.strip().lower() for part in content_type.split(";")]
    given = {it.partition("=")[0] for it in parameters}
    for known in types:
        name, _, parameter = known.partition("; ")
        if essence == name and (not parameter or parameter.partition("=")[0] in given):
            return
    said = f"not {content_type[:200]!r}" if content_type else "there is none"
    raise Refused(415, f"Content-Type must be {' or '.join(types)}, {said}; for curl: -H 'Content-Type: {types[0]}'")
