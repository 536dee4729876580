"""Request bodies: each, and all together, are bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.requests import Request

from pipeline.errors import Unavailable
from pipeline.query.problems import Refused

BATCHES_TYPE = "application/octet-stream"
PUSH_TYPES = ("text/plain; version=0.0.4", "application/openmetrics-text")
"""Media types of pushed metrics."""
_BODIES_HELD_MAX = 4
"""Request bodies in memory at once, counted in bodies of the largest size."""


class _Coming:
    """A body of which a part is in memory."""

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self.size = 0
        self.timeout = timeout


class RequestBodies:
    """Reads request bodies of one encoding: each, and all together, are bounded.

    Where memory is short, the body that has been coming for longest makes room, so that clients that stop within a body
    keep nobody out.
    """

    def __init__(self, bytes_max: int, encoding: str = "identity") -> None:
        self._bytes_max = bytes_max
        self._encoding = encoding
        self._held = 0
        self._coming: dict[_Coming, None] = {}

    @asynccontextmanager
    async def of(self, request: Request, *types: str) -> AsyncIterator[bytes]:
        """Yield the body, which counts as in memory until the context ends. Its type must be one of `types`."""
        check_type(request.headers.get("content-type", ""), types)
        if request.headers.get("content-encoding", "identity") != self._encoding:
            raise Refused(415, self._wrong_encoding())
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._bytes_max:
            raise self._too_large()
        timeout = asyncio.timeout(None)
        coming = _Coming(timeout)
        self._coming[coming] = None
        try:
            parts: list[bytes] = []
            try:
                async with timeout:
                    async for part in request.stream():
                        self._add(coming, len(part))
                        parts.append(part)
            except TimeoutError:
                raise Unavailable("too many request bodies are coming, and this one for longest") from None
            finally:
                self._coming.pop(coming, None)
            yield b"".join(parts)
        finally:
            self._held -= coming.size

    def _add(self, coming: _Coming, size: int) -> None:
        coming.size += size
        self._held += size
        if coming.size > self._bytes_max:
            raise self._too_large()
        while self._held > self._bytes_max * _BODIES_HELD_MAX:
            longest = next(iter(self._coming), coming)
            if longest is coming:
                raise Unavailable("too many request bodies are being worked on")
            del self._coming[longest]
            self._held -= longest.size
            longest.size = 0
            longest.timeout.reschedule(0)

    def _wrong_encoding(self) -> str:
        if self._encoding == "identity":
            return "compressed bodies are not understood"
        return f"a body with Content-Encoding: {self._encoding} is needed"

    def _too_large(self) -> Refused:
        return Refused(413, f"a body of over {self._bytes_max} bytes")


def check_type(content_type: str, types: Sequence[str]) -> None:
    """Raise `Refused` unless a Content-Type is one of these; of a parameter in `types` only the name counts.

    No type in `types` may be one that an HTML form can send, so that no page of another site can make a browser send a write
    without asking the server before. A form sends text/plain, but not with a parameter `version`.
    """
    essence, *parameters = [part.strip().lower() for part in content_type.split(";")]
    given = {it.partition("=")[0] for it in parameters}
    for known in types:
        name, _, parameter = known.partition("; ")
        if essence == name and (not parameter or parameter.partition("=")[0] in given):
            return
    said = f"not {content_type[:200]!r}" if content_type else "there is none"
    raise Refused(415, f"Content-Type must be {' or '.join(types)}, {said}; for curl: -H 'Content-Type: {types[0]}'")
