"""HTTP requests with the standard library alone, and the errors that a server's problem documents stand for.

Connections are kept alive and shared by all threads, one request at a time on each. A forked child opens its own.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from http.client import (
    HTTPConnection,
    HTTPException,
    HTTPResponse,
    HTTPSConnection,
    IncompleteRead,
    RemoteDisconnected,
)
from ssl import SSLEOFError
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

import pipeline.errors as errors
from pipeline.adapters.credentials import Credentials, headers_of
from pipeline.adapters.tls import FollowedContext, client_context, explained
from pipeline.errors import GroupsRefused, Invalid, PipelineError, Unauthenticated, Unavailable
from pipeline.ports import Clock
from pipeline.printable import printable
from pipeline.secret import Secret, redacted_url
from pipeline.settings import ClientSettings

IDLE_CONNECTIONS_MAX = 64
EVENT_STREAM = "text/event-stream"
HEARTBEAT_HEADER = "pipeline-heartbeat-ms"
"""Header of a stream: the usual longest time without an event."""
_CONNECT_S = 5.0
_HEADS_MAX = 10
_SILENCE_S = 30.0
"""Longest time without a byte of a stream that does not say how often it has an event."""
_OURS = "urn:pipeline:"
_OUR_ERRORS = "urn:pipeline:error:"
_CLOSED_BY_PEER = (RemoteDisconnected, BrokenPipeError, ConnectionResetError, ConnectionAbortedError, SSLEOFError)
_TLS_ONLY = ("ca_file", "client_cert_file")
"""Settings that promise TLS."""
_log = logging.getLogger(__name__)


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
    live: bool
    """False: answers stay as they are."""

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

    def stream(self, path: str, *, timeout_s: float, last_id: str) -> EventStream:
        """Open the stream of a read, at the event after `last_id` if there is one; raise as the read does."""
        ...

    def close(self) -> None:
        """Give up what is open."""
        ...


class AnswerTooLarge(Unavailable):
    """Ask for less, or allow more: an answer is larger than `answer_bytes_max`, or has no end."""


class _Response(HTTPResponse):
    """A response that does not wait for ever behind interim responses, each of which begins the time-out anew."""

    _heads = 0

    def _read_status(self) -> tuple[str, int, str]:
        self._heads += 1
        if self._heads > _HEADS_MAX:
            raise HTTPException(f"over {_HEADS_MAX} interim responses")
        found: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
        return found


class EventStream:
    """Bytes of one response as they come, on a connection of its own. `interrupt` may be called from any thread."""

    def __init__(self, url: str, response: HTTPResponse, sock: socket.socket, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        """Size of the largest event."""
        self._url = url
        self._response = response
        self._socket = sock
        heartbeat_ms = response.getheader(HEARTBEAT_HEADER, "")
        known = heartbeat_ms.isascii() and heartbeat_ms.isdecimal() and len(heartbeat_ms) < 10
        self._silence_s = 1 + 3 * int(heartbeat_ms) / 1000 if known else _SILENCE_S
        sock.settimeout(self._silence_s)

    def read(self) -> bytes:
        """Return the next bytes; none at the end. `Unavailable` if the connection is lost, or silent for too long."""
        try:
            return self._response.read1(2**16)
        except TimeoutError:
            raise Unavailable(f"{self._url}: no event for {self._silence_s:g} s") from None
        except IncompleteRead:
            raise Unavailable(f"{self._url}: the connection was lost") from None
        except (OSError, HTTPException, ValueError) as error:  # ValueError: a chunk without a length
            raise Unavailable(f"{self._url}: {type(error).__name__}: {error}") from None

    def interrupt(self) -> None:
        """End the connection, also for a thread that waits in `read`."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self._response.close()
        self._socket.close()


class HttpClient:
    """HTTP requests to one server. Safe from any thread, and after a fork."""

    live = True

    def __init__(self, url: str, clock: Clock, settings: ClientSettings | None = None) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise Invalid(f"not a URL: {redacted_url(url)!r:.200}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
            raise Invalid(f"not a server's address: {redacted_url(url)!r:.200}; it looks like http://host:8080")
        self.url = url.rstrip("/")
        self._host, self._port, self._prefix = parts.hostname, port, parts.path.rstrip("/")
        self._settings = settings = settings or ClientSettings()
        self._bytes_max = settings.answer_bytes_max
        self._tls = self._follow_files(settings, clock) if parts.scheme == "https" else None
        if self._tls is None and (name := next((it for it in _TLS_ONLY if getattr(settings, it)), None)):
            raise Invalid(f"{name} is for https://, but {self.url} would be spoken to without TLS")
        self._credentials = Credentials(settings)
        self._clock = clock
        self._idle: list[HTTPConnection] = []
        self._pid = os.getpid()

    def _follow_files(self, settings: ClientSettings, clock: Clock) -> FollowedContext:
        def complain(error: Invalid) -> None:
            _log.warning("%s: %s; connections go on with what was read before", self.url, error)

        paths = [settings.ca_file, settings.client_cert_file, settings.client_key_file]
        return FollowedContext(partial(client_context, settings), paths, clock, complain)

    def _new_connection(self) -> HTTPConnection:
        if self._tls is None:
            connection = HTTPConnection(self._host, self._port)
        else:
            connection = HTTPSConnection(self._host, self._port, context=self._tls())
        connection.response_class = _Response
        return connection

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
        """Return status and body of the answer; `Unavailable` if there is none in time.

        A redirect is an answer, and not followed: so the access token goes to no other server.
        """
        deadline = self._clock.monotonic_s() + timeout_s
        headers = {"Accept": "application/json"} | ({"Content-Type": content_type} if content_type else {})
        headers.update(more_headers or {})
        while True:
            token = self._credentials.token
            status, answer = self._exchange_once(method, path, body, headers | headers_of(token), deadline)
            if status != 401 or not self._credentials.renew(token):
                return status, answer

    def _exchange_once(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], deadline: float
    ) -> tuple[int, bytes]:
        if self._pid != os.getpid():
            self._pid, self._idle = os.getpid(), []  # a child shares its parent's sockets: two writers, one stream
        while True:
            idle = self._idle
            try:
                connection, reused = idle.pop(), True
            except IndexError:
                connection, reused = self._new_connection(), False
            try:
                status, answer, keep = self._exchange(connection, method, self._prefix + path, body, headers, deadline)
            except (OSError, HTTPException) as error:
                connection.close()
                if reused and isinstance(error, _CLOSED_BY_PEER):
                    continue  # it was closed while idle; every request of this module may be carried out twice
                raise Unavailable(
                    f"{self.url}: {explained(error, self._settings, over_tls=self._tls is not None)}"
                ) from None
            except BaseException:
                connection.close()
                raise
            if keep and len(idle) < IDLE_CONNECTIONS_MAX:
                idle.append(connection)
            else:
                connection.close()
            return status, answer

    def stream(self, path: str, *, timeout_s: float, last_id: str) -> EventStream:
        """Open the stream of a read, at the event after `last_id` if there is one; raise as the read does."""
        deadline = self._clock.monotonic_s() + timeout_s
        while True:
            token = self._credentials.token
            try:
                return self._open_stream(path, timeout_s, deadline, last_id, token)
            except Unauthenticated:
                if not self._credentials.renew(token):
                    raise

    def _open_stream(self, path: str, timeout_s: float, deadline: float, last_id: str, token: Secret) -> EventStream:
        connection = self._new_connection()
        connection.timeout = min(timeout_s, _CONNECT_S)
        headers = {"Accept": EVENT_STREAM, "Last-Event-ID": last_id} | headers_of(token)
        try:
            connection.connect()
            sock = connection.sock
            self._limit(connection, deadline)
            connection.request("GET", self._prefix + path, headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                raise error_of(self.url, response.status, self._read(connection, response, deadline))
            if (kind := response.getheader("content-type", "")).partition(";")[0].strip() != EVENT_STREAM:
                raise Unavailable(f"{self.url}: not a stream of events but {kind!r:.100}")
            return EventStream(self.url, response, sock, self._bytes_max)
        except (OSError, HTTPException) as error:
            connection.close()
            raise Unavailable(f"{self.url}: {explained(error, self._settings, over_tls=self._tls is not None)}") from None
        except BaseException:
            connection.close()
            raise

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
        parts, size = [], response.length or 0
        if size <= self._bytes_max:
            size = 0
            while size <= self._bytes_max and (part := response.read1(2**18)):  # one read of the socket, within its time-out
                parts.append(part)
                size += len(part)
                self._limit(connection, deadline)
        if size > self._bytes_max:
            connection.close()
            raise AnswerTooLarge(
                f"{self.url}: the answer has over {self._bytes_max} bytes: ask for less, or raise answer_bytes_max"
            )
        if response.length:  # not so if the server sends chunks
            raise IncompleteRead(b"", response.length)
        response.close()  # or the connection could not take another request
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
        return Unavailable(f"{url}: HTTP {status}: {printable(body[:200].decode(errors='replace'))}")
    ours = problem.type.startswith(_OUR_ERRORS)
    named = getattr(errors, problem.type.removeprefix(_OUR_ERRORS), None) if ours else None
    detail = printable(problem.detail or problem.title or f"HTTP {status}")  # an app may log it
    if isinstance(named, type) and issubclass(named, GroupsRefused):
        return named(detail, [(it.group, it.view, it.reason) for it in problem.groups])
    if isinstance(named, type) and issubclass(named, PipelineError):
        return named(detail)
    return Invalid(detail) if status in (400, 409, 413, 414, 422) else Unavailable(f"{url}: HTTP {status}: {detail}")


def is_ours(body: bytes) -> bool:
    """Return whether a problem document comes from a server of this package and not from a proxy."""
    try:
        return msgspec.json.decode(body, type=_Problem).type.startswith(_OURS)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
