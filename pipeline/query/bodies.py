"""Request bodies: each, and all together, are bounded."""

from __future__ import annotations

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


class RequestBodies:
    """Reads request bodies of one encoding: each, and all together, are bounded."""

    def __init__(self, bytes_max: int, encoding: str = "identity") -> None:
        self._bytes_max = bytes_max
        self._encoding = encoding
        self._held = 0

    @asynccontextmanager
    async def of(self, request: Request, *types: str) -> AsyncIterator[bytes]:
        """Yield the body, which counts as in memory until the context ends. Its type must be one of `types`."""
        check_type(request.headers.get("content-type", ""), types)
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
