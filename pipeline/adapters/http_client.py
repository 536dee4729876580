"""HTTP requests with the standard library alone, and the errors that a server's problem documents stand for.

Connections are kept alive and shared by all threads, one request at a time on each. A forked child opens its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from http.client import (
    HTTPConnection,
    HTTPException,
    HTTPResponse,
    HTTPSConnection,
    IncompleteRead,
    RemoteDisconnected,
)
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

import pipeline.errors as errors
from pipeline.errors import GroupsRefused, Invalid, PipelineError, Unavailable
from pipeline.ports import Clock

IDLE_CONNECTIONS_MAX = 64
_OURS = "urn:pipeline:"
_OUR_ERRORS = "urn:pipeline:error:"
_CLOSED_BY_PEER = (RemoteDisconnected, BrokenPipeError, ConnectionResetError, ConnectionAbortedError)


class _WrongGroup(msgspec.Struct):
    group: int
    view: str = ""
    reason: str = ""


class _Problem(msgspec.Struct):
    type: str = ""
    title: str = ""
    detail: str = ""
    groups: list[_WrongGroup] = []


class Client(Protocol):
    """A server, or what stands for one, as readers ask it."""

    url: str

    def request(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        body: bytes | None = None,
        content_type: str = "",
        more_headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """Return status and body of the answer; `Unavailable` if there is none in time."""
        ...

    def close(self) -> None:
        """Give up what is open."""
        ...


class HttpClient:
    """HTTP requests to one server. Safe from any thread, and after a fork."""

    def __init__(self, url: str, clock: Clock) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise Invalid(f"not a URL: {url!r:.200}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
            raise Invalid(f"not a server's address: {url!r:.200}; it looks like http://host:8080")
        self.url = url.rstrip("/")
        self._make = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port, self._prefix = parts.hostname, port, parts.path.rstrip("/")
        self._clock = clock
        self._idle: list[HTTPConnection] = []
        self._pid = os.getpid()

    def request(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        body: bytes | None = None,
        content_type: str = "",
        more_headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """Return status and body of the answer; `Unavailable` if there is none in time."""
        deadline = self._clock.monotonic_s() + timeout_s
        headers = {"Accept": "application/json"} | ({"Content-Type": content_type} if content_type else {})
        headers.update(more_headers or {})
        if self._pid != os.getpid():
            self._pid, self._idle = os.getpid(), []  # a child shares its parent's sockets: two writers, one stream
        while True:
            idle = self._idle
            try:
                connection, reused = idle.pop(), True
            except IndexError:
                connection, reused = self._make(self._host, self._port), False
            try:
                status, answer, keep = self._exchange(connection, method, self._prefix + path, body, headers, deadline)
            except (OSError, HTTPException) as error:
                connection.close()
                if reused and isinstance(error, _CLOSED_BY_PEER):
                    continue  # it was closed while idle; every request of this module may be carried out twice
                raise Unavailable(f"{self.url}: {type(error).__name__}: {error}") from None
            except BaseException:
                connection.close()
                raise
            if keep and len(idle) < IDLE_CONNECTIONS_MAX:
                idle.append(connection)
            else:
                connection.close()
            return status, answer

    def _exchange(
        self,
        connection: HTTPConnection,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
        deadline: float,
    ) -> tuple[int, bytes, bool]:
        self._limit(connection, deadline)
        try:
            connection.request(method, path, body, headers)
        except (BrokenPipeError, ConnectionResetError) as error:
            try:  # the server may have answered with a refusal before it had the whole body
                response = connection.getresponse()
            except (OSError, HTTPException):
                raise error from None
            return response.status, self._read(connection, response, deadline), False
        self._limit(connection, deadline)
        response = connection.getresponse()
        return response.status, self._read(connection, response, deadline), not response.will_close

    def _read(self, connection: HTTPConnection, response: HTTPResponse, deadline: float) -> bytes:
        parts = []
        while part := response.read(2**18):
            parts.append(part)
            self._limit(connection, deadline)
        if response.length:  # not so if the server sends chunks
            raise IncompleteRead(b"", response.length)
        return b"".join(parts)

    def _limit(self, connection: HTTPConnection, deadline: float) -> None:
        left_s = deadline - self._clock.monotonic_s()
        if left_s <= 0:
            raise TimeoutError("no answer in time")
        connection.timeout = left_s
        if connection.sock is not None:
            connection.sock.settimeout(left_s)

    def close(self) -> None:
        """Close the idle connections."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def error_of(url: str, status: int, body: bytes) -> PipelineError:
    """Return the error that a problem document names; `Unavailable` for any other error response."""
    try:
        problem = msgspec.json.decode(body, type=_Problem)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return Unavailable(f"{url}: HTTP {status}: {body[:200].decode(errors='replace')}")
    ours = problem.type.startswith(_OUR_ERRORS)
    named = getattr(errors, problem.type.removeprefix(_OUR_ERRORS), None) if ours else None
    detail = problem.detail or problem.title or f"HTTP {status}"
    if named is GroupsRefused:
        return GroupsRefused(detail, [(it.group, it.view, it.reason) for it in problem.groups])
    if isinstance(named, type) and issubclass(named, PipelineError):
        return named(detail)
    return Invalid(detail) if status in (400, 409, 413, 414, 422) else Unavailable(f"{url}: HTTP {status}: {detail}")


def is_ours(body: bytes) -> bool:
    """Return whether a problem document comes from a server of this package and not from a proxy."""
    try:
        return msgspec.json.decode(body, type=_Problem).type.startswith(_OURS)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
