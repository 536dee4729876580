"""Request bodies: each, and all together, are bounded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from pipeline.errors import Unavailable
from pipeline.query.problems import Refused

_BODIES_HELD_MAX = 4
"""Request bodies in memory at once, counted in bodies of the largest size."""


class RequestBodies:
    """Reads request bodies of one encoding: each, and all together, are bounded."""

    def __init__(self, bytes_max: int, encoding: str = "identity") -> None:
        self._bytes_max = bytes_max
        self._encoding = encoding
        self._held = 0

    @asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the body, which counts as in memory until the context ends."""
        if request.headers.get("content-encoding", "identity") != self._encoding:
            raise Refused(415, self._wrong_encoding())
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._bytes_max:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async for part in request.stream():
                size += len(part)
                self._held += len(part)
                if size > self._bytes_max:
                    raise self._too_large()
                if self._held > self._bytes_max * _BODIES_HELD_MAX:
                    raise Unavailable("too many request bodies are being worked on")
                parts.append(part)
            yield b"".join(parts)
        finally:
            self._held -= size

    def _wrong_encoding(self) -> str:
        if self._encoding == "identity":
            return "compressed bodies are not understood"
        return f"a body with Content-Encoding: {self._encoding} is needed"

    def _too_large(self) -> Refused:
        return Refused(413, f"a body of over {self._bytes_max} bytes")
