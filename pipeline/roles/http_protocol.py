"""One HTTP/1.1 connection of uvicorn, with bounds on what its client can send and leave unread.

Bytes are counted before they are kept: a head, and the trailers behind a chunked body, up to `head_bytes_max`. A connection
handles one request at a time; what a client sends before its turn waits unparsed, and is not read beyond a bound.
`connections` bounds how long a client may take, and all connections together.
"""

from __future__ import annotations

import asyncio
import re
import socket
import sys
from contextlib import suppress
from enum import Enum, auto
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from pipeline.query.clients import address_group
from pipeline.query.fairness import IS_GONE
from pipeline.query.guard import OPERATIONS
from pipeline.query.problems import Refused, problem
from pipeline.roles.connections import Connections, Waits

_END_OF_LINES = b"\r\n\r\n"
_HELD_BYTES = 16_384
"""Bytes that are read ahead of a request's turn, about; reading goes on meanwhile, to notice that the client has gone."""
_THROWN_BYTES_MAX = 1_048_576
"""Bytes that a client may still send while it could read why its connection is closed."""
_HOST = re.compile(rb"(?:\[[0-9A-Za-z:.%_~-]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?")
"""A valid Host: RFC 9110 section 7.2, with the syntax of RFC 3986."""
_CHUNKS_FREE = 1_024
_CHUNK_BYTES_MIN = 16
"""A chunked body has at least so many bytes a chunk on average, after the first chunks."""


_TCP_INFO: int | None = getattr(socket, "TCP_INFO", None) if sys.platform == "linux" else None
_TCP_CLOSED = (7, 8)
"""States of a socket whose other end has closed it: CLOSE and CLOSE_WAIT."""


class _Stage(Enum):
    HEAD = auto()
    """Between requests, or within a head."""
    BODY = auto()
    """Within a body; its answer may be under way, or even sent."""
    WORK = auto()
    """A request is there as a whole, and its answer is not."""
    CLOSING = auto()
    """The last answer is sent, and all that comes is thrown away."""


_HEAD, _BODY, _WORK, _CLOSING = _Stage


class _TooLargeError(Exception):
    """Trailers beyond the limit."""


class _Trailers(list[tuple[bytes, bytes]]):
    """Trailers, which are counted and thrown away: a header that was checked can't be added behind a body."""

    def __init__(self, bytes_left: int) -> None:
        super().__init__()
        self._bytes_left = bytes_left

    def append(self, header: tuple[bytes, bytes]) -> None:
        """Count one trailer, as a line."""
        self._bytes_left -= len(header[0]) + len(header[1]) + 4
        if self._bytes_left < 0:
            raise _TooLargeError


class BoundedProtocol(HttpToolsProtocol):
    """The connection of one client. `address` is its host; see `connections.Connection`."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], connections: Connections, host: str
    ) -> None:
        super().__init__(config, server_state, app_state)
        self.address = address_group(host)
        self.reserved = False
        self._connections = connections
        self._head_bytes_max = connections.settings.head_bytes_max
        self._stage = _HEAD
        self._waits: Waits | None = None
        self._head_bytes = 0
        self._line_ended = False
        """True once the first line of the head is there as a whole."""
        self._tail = b""
        """Last bytes of a head, chunk or trailer of which more is to come: an end of lines may lie across them."""
        self._body_left: int | None = 0
        """Bytes of the body that are to come; None in a chunked body."""
        self._body_bytes = 0
        self._chunk_count = 0
        self._quiet_bytes = 0
        """Bytes within a chunked body since the last that belonged to the body itself."""
        self._thrown_bytes = 0
        self._held = b""
        self._held_at = 0
        self._extensions: dict[str, Any] = {IS_GONE: self.is_gone}
        self._accepted: socket.socket | None = None
        """The connection's socket until there is a transport."""

    @property
    def unsent_bytes(self) -> int:
        """Bytes of answers that the client has not taken."""
        return 0 if self.is_connecting else self.transport.get_write_buffer_size()

    @property
    def is_connecting(self) -> bool:
        """Return whether there is no transport yet."""
        return self._accepted is not None

    def is_gone(self) -> bool:
        """Return whether the client has closed the connection; Linux tells that also while nothing is read."""
        if self.transport.is_closing() or _TCP_INFO is None:
            return bool(self.transport.is_closing())
        state = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 1)[0]
        return state in _TCP_CLOSED

    def accepted(self, client: socket.socket) -> None:
        """Begin to wait for the first head; it comes after the TLS handshake, if there is one."""
        self._accepted = client
        self._wait(self._connections.heads)

    # What the transport calls

    def connection_made(self, transport: Any) -> None:
        """Take the transport."""
        super().connection_made(transport)
        self._accepted = None
        if self.reserved:
            self.app = _for_operators(self.app)
        if self._stage is _CLOSING:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give everything back."""
        self._connections.lost(self)
        self._release()
        self._stage = _CLOSING
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait for the client to take more of its answers."""
        super().pause_writing()
        self._connections.unsent(self)

    def resume_writing(self) -> None:
        """Go on with an answer."""
        super().resume_writing()
        self._connections.sent(self)
        if self._stage is _HEAD and self._waits is None:
            self._wait(self._connections.idle)

    def data_received(self, data: bytes) -> None:
        """Take the next bytes."""
        stage = self._stage
        if stage is _WORK or (stage is _HEAD and self._held):  # what is held came before, and is taken in a moment
            self._hold(data, 0)
        elif (
            stage is _HEAD and not self._head_bytes and data.find(_END_OF_LINES) == len(data) - 4 <= self._head_bytes_max - 4
        ):
            self._take_whole_head(data)
        elif stage is not _CLOSING:
            self._take(data, 0)
        else:
            self._thrown_bytes += len(data)
            if self._thrown_bytes > _THROWN_BYTES_MAX:
                self.transport.abort()

    # What comes in

    def _take_whole_head(self, data: bytes) -> None:
        """Take a head in one piece and nothing else, as most requests are."""
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._take_error(error)
        else:
            if self._stage is not _WORK:
                self._after_head(data, 0, len(data))

    def _take(self, data: bytes, at: int) -> None:
        try:
            while at < len(data):
                if self._stage is _HEAD:
                    at = self._feed_head(data, at)
                elif self._stage is _BODY:
                    at = self._feed_body(data, at)
                elif self._stage is _WORK:
                    self._hold(data, at)
                    return
                else:
                    return
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._take_error(error)

    def _take_error(self, error: Exception) -> None:
        if isinstance(error, httptools.HttpParserUpgrade):
            self.cycle.keep_alive = False  # its answer is an ordinary one, and the parser takes nothing after it
        elif isinstance(error.__context__, _TooLargeError):
            self._refuse_trailers()
        elif isinstance(error.__context__, Refused):
            self._refuse(error.__context__)
        else:
            self._refuse(Refused(400, "this is not HTTP/1.1"))

    def _feed_head(self, data: bytes, at: int) -> int:
        end = self._end_of_lines(data, at)
        stop = len(data) if end < 0 else end
        if self._head_bytes + stop - at > self._head_bytes_max:
            self._refuse_head(data, at, stop)
            return stop
        self._feed(data, at, stop)
        self._after_head(data, at, stop)
        return stop

    def _after_head(self, data: bytes, at: int, stop: int) -> None:
        if self._stage is _HEAD:  # more is to come; or this was an empty line in front of a request
            self._head_bytes += stop - at
            self._tail = (self._tail + data[max(at, stop - 3) : stop])[-3:]
            self._line_ended = self._line_ended or b"\n" in data[at:stop]
            if self._waits is not self._connections.heads:
                self._wait(self._connections.heads)
            return
        self._head_bytes = 0
        self._tail = b""
        self._line_ended = False
        if self._stage is _BODY:
            self._body_left = _body_length(self.headers)
            self._body_bytes = self._chunk_count = self._quiet_bytes = 0
            self.headers = _Trailers(self._head_bytes_max)
            self._wait(self._connections.bodies)

    def _feed_body(self, data: bytes, at: int) -> int:
        if self._body_left is not None:
            stop = min(len(data), at + self._body_left)
            self._body_left -= stop - at
            self._feed(data, at, stop)
            return stop
        end = self._end_of_lines(data, at)
        stop = len(data) if end < 0 else end
        before = self._body_bytes
        self._feed(data, at, stop)
        self._tail = b"" if end >= 0 else (self._tail + data[max(at, stop - 3) : stop])[-3:]
        if self._stage is _BODY:
            self._quiet_bytes = 0 if self._body_bytes > before else self._quiet_bytes + stop - at
            if self._quiet_bytes > self._head_bytes_max:
                self._refuse_trailers()
            elif self._chunk_count > _CHUNKS_FREE and self._body_bytes < self._chunk_count * _CHUNK_BYTES_MIN:
                self._refuse(Refused(400, f"chunks of less than {_CHUNK_BYTES_MIN} bytes on average"))
        return stop

    def _feed(self, data: bytes, at: int, stop: int) -> None:
        self.parser.feed_data(data if at == 0 and stop == len(data) else memoryview(data)[at:stop])

    def _end_of_lines(self, data: bytes, at: int) -> int:
        """Return the place behind the next empty line in `data`, from `at` on; -1 without one.

        A head ends there, and so do trailers; so no more than one request is ever given to the parser.
        """
        if self._tail:
            found = (self._tail + data[at : at + 3]).find(_END_OF_LINES)
            if found >= 0:
                return at + found + 4 - len(self._tail)
        found = data.find(_END_OF_LINES, at)
        return -1 if found < 0 else found + 4

    def _hold(self, data: bytes, at: int) -> None:
        """Keep what came before its turn, unparsed."""
        if not self._connections.hold(len(data) - at):
            self._connections.release(len(data) - at)
            self._connections.cut(self, "buffered_bytes_max")
            return
        if self._held:
            data, at = self._held[self._held_at :] + data[at:], 0
        self._held, self._held_at = data, at
        if len(data) - at > _HELD_BYTES:
            self.flow.pause_reading()

    def _release(self) -> None:
        self._connections.release(len(self._held) - self._held_at)
        self._held, self._held_at = b"", 0

    def _take_held(self) -> None:
        if self._stage is not _HEAD or self.transport.is_closing():
            return
        data, at = self._held, self._held_at
        self._release()
        self._take(data, at)
        if len(self._held) - self._held_at <= _HELD_BYTES:
            self.flow.resume_reading()

    # What the parser calls

    def on_headers_complete(self) -> None:
        """Begin with a request: as uvicorn does, without options of it that are not in use, and so in less time."""
        parser, scope = self.parser, self.scope
        if parser.should_upgrade() and _body_length(self.headers) != 0:  # the parser would leave the body out
            raise Refused(400, "a request with a body asks for another protocol: send it without the header Upgrade")
        version = parser.get_http_version()
        if version != "1.1":
            scope["http_version"] = version
        _check_host(self.headers, version)
        parsed = httptools.parse_url(self.url)
        path = parsed.path.decode("ascii")
        scope["method"] = parser.get_method().decode("ascii")
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = parsed.path
        scope["query_string"] = parsed.query or b""
        scope["extensions"] = self._extensions
        self.cycle = RequestResponseCycle(
            scope,
            self.transport,
            self.flow,
            self.logger,
            self.access_logger,
            False,
            self.server_state.default_headers,
            asyncio.Event(),
            self.expect_100_continue,
            version != "1.0" and parser.should_keep_alive(),
            self.on_response_complete,
        )
        self._start_asgi_task(self.cycle, self.app)
        self._stage = _BODY

    def on_body(self, body: bytes) -> None:
        """Count the bytes of a body."""
        self._body_bytes += len(body)
        self._chunk_count += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Work until the answer is there; read on where it is already."""
        cycle = self.cycle
        if self._waits is not None:
            self._waits.pop(self, None)
            self._waits = None
        if cycle.response_complete:
            self._next()
        else:
            self._stage = _WORK
            cycle.more_body = False
            cycle.message_event.set()

    # What the request's cycle calls

    def on_response_complete(self) -> None:
        """Go on with the next request, once the body of this one is there as a whole."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._connections.unsent(self)
        elif self._stage is _WORK:
            self._next()
        else:
            self.flow.resume_reading()

    def _next(self) -> None:
        connections = self._connections
        self._stage = _HEAD
        if not self.flow.write_paused:
            self._waits = waits = connections.idle
            waits[self] = connections.now_s()
        if self._held:
            self.loop.call_soon(self._take_held)
        else:
            self.flow.resume_reading()

    def _wait(self, waits: Waits | None) -> None:
        """Wait for something else, or for nothing."""
        if self._waits is not None:
            self._waits.pop(self, None)
        self._waits = waits
        if waits is not None:
            waits[self] = self._connections.now_s()

    # Ends

    def cut(self) -> None:
        """Close the connection at once."""
        self._stage = _CLOSING
        if self._accepted is None:
            self.transport.abort()
        else:
            with suppress(OSError):
                self._accepted.shutdown(socket.SHUT_RDWR)

    def late(self, limit: str) -> None:
        """Answer 408 to a client that is within a request; close the connection."""
        self._waits = None
        if self.is_connecting or self.unsent_bytes:
            self.cut()
        elif not (self._head_bytes or self._stage is _BODY):
            self.transport.close()
        else:
            self._refuse(Refused(408, f"the rest of the request did not come in time ({limit})"))

    def _refuse_head(self, data: bytes, at: int, stop: int) -> None:
        self._connections.count("head_bytes_max", self)
        first_line = data.find(b"\n", at, at + self._head_bytes_max - self._head_bytes)
        if self._line_ended or first_line >= 0:
            self._refuse(Refused(431, f"a head of over {self._head_bytes_max} bytes"))
        else:
            self._refuse(Refused(414, f"a URL of over {self._head_bytes_max} bytes"))

    def _refuse_trailers(self) -> None:
        self._connections.count("head_bytes_max", self)
        self._refuse(Refused(431, f"trailers, or what else is between chunks, of over {self._head_bytes_max} bytes"))

    def _refuse(self, error: Refused) -> None:
        """Answer with a problem, if an answer can still be given, and close the connection."""
        cycle, in_body = self.cycle, self._stage is _BODY
        self._stage = _CLOSING
        if in_body and not cycle.response_complete:
            cycle.disconnected = True  # the application must not answer any more
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.abort()
                return
        if not (in_body and cycle.response_complete):
            self.transport.write(_response(error))
        self._close()

    def _close(self) -> None:
        """Close the connection, and leave the client some time to read what was sent."""
        self._stage = _CLOSING
        self._wait(self._connections.closing)
        if self.transport.can_write_eof():
            self.flow.resume_reading()
            self.transport.write_eof()
        else:
            self.transport.close()


def _check_host(headers: Any, version: str) -> None:
    """Raise `Refused` unless there is one valid Host (RFC 9112 section 3.2): a proxy may have gone by another one."""
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1 and (hosts or version == "1.1"):
        raise Refused(400, f"{len(hosts)} headers Host: a request has one")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise Refused(400, f"no valid Host: {hosts[0][:200].decode('latin-1')!r}")


def _body_length(headers: Any) -> int | None:
    length: int | None = 0
    for name, value in headers:
        if name == b"transfer-encoding":
            return None
        if name == b"content-length":
            length = int(value)
    return length


def _response(error: Refused) -> bytes:
    answer = problem(error)
    headers = {**answer.headers, "Content-Length": str(len(answer.body)), "Connection": "close"}
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return b"%s%s\r\n%s" % (STATUS_LINE[answer.status], lines.encode("latin-1"), answer.body)


def _for_operators(app: Any) -> Any:
    """Return an application that answers operators only."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] in OPERATIONS:
            await app(scope, receive, send)
            return
        refused = problem(Refused(503, "all connections are in use (sockets_max)"))
        headers = [(name.lower().encode(), value.encode()) for name, value in refused.headers.items()]
        headers += [(b"content-length", b"%d" % len(refused.body)), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await send({"type": "http.response.body", "body": refused.body})

    return answer
