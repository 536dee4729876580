"""Clients of the HTTP API that need only the standard library.

Connections are kept alive and shared by all threads, one request at a time on each. A forked child opens its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from http.client import (
    HTTPConnection,
    HTTPException,
    HTTPResponse,
    HTTPSConnection,
    IncompleteRead,
    RemoteDisconnected,
)
from itertools import groupby
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

import pipeline.errors as errors
from pipeline.adapters.clock import SystemClock
from pipeline.core.answer import Answer, Changed, Status, View, known
from pipeline.core.codec import producer_of
from pipeline.core.frames import encode_frames
from pipeline.core.record import Control, producer_id_of
from pipeline.core.token import Token
from pipeline.errors import BadRecord, GroupsRefused, Invalid, PipelineError, Unavailable
from pipeline.ports import MESSAGE_BYTES_MAX, Clock, Message
from pipeline.topics import DELTAS

REQUEST_BYTES_MAX = 4 * 2**20
"""Size up to which batches share a request; a server accepts at least one batch of `batch_bytes_max`."""
_OURS = "urn:pipeline:"
_OUR_ERRORS = "urn:pipeline:error:"
PARTITION_COUNT_TTL_S = 30.0
_STATUS_S = 10.0
IDLE_CONNECTIONS_MAX = 64
T = TypeVar("T")
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


class _Accepted(msgspec.Struct):
    next_offsets: list[int]
    token: str


class _TopicStatus(msgspec.Struct):
    """The part of `Status` that a publisher needs. It decodes no more, so that it can send to servers of other versions."""

    partition_count: int
    topic_id: str | None = None
    """None: the role takes no batches."""
    role: str = ""


class _ViewList(msgspec.Struct):
    views: list[View]


class _HttpClient:
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


def _error(url: str, status: int, body: bytes) -> PipelineError:
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


def _producer_of(message: Message) -> str:
    """Return the producer id of a batch, or nothing if the message is no batch: the server will say so."""
    try:
        return producer_of(message.value or b"")
    except BadRecord:
        return ""


def _is_ours(body: bytes) -> bool:
    """Return whether a problem document comes from a server of this package and not from a proxy."""
    try:
        return msgspec.json.decode(body, type=_Problem).type.startswith(_OURS)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False


class HttpLogWriter:
    """A `ports.LogWriter` that sends batches to a server's `POST /v1/batches`."""

    def __init__(self, url: str, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._client = _HttpClient(url, self._clock)
        self._partition_count: tuple[float, int] | None = None
        self._secrets: dict[str, str] = {}
        """By producer id, the secret to send with its batches."""
        self._topic_id = ""
        """Id of the server's deltas topic, as of the last answer."""
        self._acknowledged: dict[int, int] = {}
        """By partition, the offset after the last record that this topic has acknowledged."""

    def introduce(self, secret: str) -> None:
        """Send this producer's secret with its batches from now on, as the server demands."""
        self._secrets[producer_id_of(secret)] = secret

    def dismiss(self, secret: str) -> None:
        """Forget this producer's secret: it sends no more batches."""
        self._secrets.pop(producer_id_of(secret), None)

    def partition_count(self, topic: str) -> int:
        if topic != DELTAS:
            raise Invalid(f"topic {topic} cannot be written over HTTP")
        cached, now = self._partition_count, self._clock.monotonic_s()
        if cached is not None and now - cached[0] < PARTITION_COUNT_TTL_S:
            return cached[1]
        try:
            found = self._status()
        except Unavailable:
            if cached is not None:
                return cached[1]
            raise
        self._partition_count = now, found.partition_count
        return found.partition_count

    def _status(self) -> _TopicStatus:
        try:
            status, body = self._client.request("GET", "/v1/status", timeout_s=_STATUS_S)
            if status != 200:
                raise _error(self._client.url, status, body)
            found = msgspec.json.decode(body, type=_TopicStatus)
        except (PipelineError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Unavailable(f"{self._client.url}/v1/status: {error}") from None
        if found.topic_id is None:
            raise Unavailable(f"{self._client.url}: a {found.role} takes no batches")
        return found

    def topic_id(self, topic: str) -> str:
        """Return the id of the server's deltas topic, which comes with each acknowledgement."""
        self._topic_id = self._topic_id or self._status().topic_id or ""
        if not self._topic_id:
            raise Unavailable(f"{self._client.url}: the server does not know its topic yet")
        return self._topic_id

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        """Return the offsets after the last acknowledged record: this writer can't know of others."""
        return dict(self._acknowledged)

    def message_bytes_max(self, topic: str) -> int:
        """Return a limit beyond that of the server, which is never below `batch_bytes_max`."""
        return MESSAGE_BYTES_MAX

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        deadline = self._clock.monotonic_s() + timeout_s
        out: list[int | PipelineError] = []
        for producer_id, run in groupby(messages, key=_producer_of):
            own, secret = [*run], self._secrets.get(producer_id, "")
            start = 0
            while start < len(own):
                stop, size = start, 0
                while stop < len(own) and (stop == start or size + len(own[stop].value or b"") < REQUEST_BYTES_MAX):
                    size += len(own[stop].value or b"")
                    stop += 1
                out += self._send(own[start:stop], secret, deadline)
                start = stop
        return out

    def _send(self, messages: Sequence[Message], secret: str, deadline: float) -> list[int | PipelineError]:
        if any(message.topic != DELTAS or message.value is None for message in messages):
            raise Invalid("only batches for the deltas topic can be sent over HTTP")
        count = len(messages)
        body = encode_frames([message.value or b"" for message in messages])
        try:
            status, answer = self._client.request(
                "POST",
                "/v1/batches",
                timeout_s=deadline - self._clock.monotonic_s(),
                body=body,
                content_type="application/octet-stream",
                more_headers={"Pipeline-Producer": secret} if secret else {},
            )
        except Unavailable as error:
            return [error] * count
        if status == 200:
            try:
                accepted = msgspec.json.decode(answer, type=_Accepted)
                topic_id = Token.parse(accepted.token).topic_id
            except (msgspec.MsgspecError, UnicodeDecodeError, Invalid):
                accepted, topic_id = _Accepted([], ""), ""
            if len(accepted.next_offsets) == count:
                self._note(topic_id, messages, accepted.next_offsets)
                return list(accepted.next_offsets)
            return [Unavailable(f"{self._client.url}: not an answer to batches: {answer[:200]!r}")] * count
        refusal = _error(self._client.url, status, answer)
        # Only a refusal of our own server is final: a proxy may refuse what the server would accept.
        for_good = status in (400, 413) and isinstance(refusal, Invalid | BadRecord) and _is_ours(answer)
        if count > 1 and (for_good or status == 413):
            half = count // 2  # the server takes all or none: find the ones that it will not take
            return self._send(messages[:half], secret, deadline) + self._send(messages[half:], secret, deadline)
        if for_good or isinstance(refusal, Unavailable):
            return [refusal] * count
        return [Unavailable(f"{self._client.url}: HTTP {status}: {refusal}")] * count

    def _note(self, topic_id: str, messages: Sequence[Message], next_offsets: Sequence[int]) -> None:
        if topic_id != self._topic_id:
            self._topic_id, self._acknowledged = topic_id, {}
        for message, next_offset in zip(messages, next_offsets, strict=True):
            self._acknowledged[message.partition] = max(next_offset, self._acknowledged.get(message.partition, 0))

    def close(self) -> None:
        self._client.close()


def _condition(label: str, value: str) -> str:
    if value.startswith("~"):  # `label=~...` would be read as a regular expression
        return f"{label}=~{re.escape(value)}"
    return f"{label}={value}"


def view_path(
    view: str, where: Mapping[str, str] | Sequence[str] | None, by: Sequence[str] | None, **options: object
) -> str:
    """Return path and query of a read; options that are None are left out."""
    conditions = [_condition(*item) for item in where.items()] if isinstance(where, Mapping) else where or ()
    query = [("where", text) for text in ([conditions] if isinstance(conditions, str) else conditions)]
    if by is not None:
        query += [("by", label) for label in ([by] if isinstance(by, str) else by)] or [("by", "")]
    query += [(name, str(value)) for name, value in options.items() if value is not None]
    return f"/v1/views/{quote(view, safe='')}" + (f"?{urlencode(query, quote_via=quote)}" if query else "")


class HttpReader:
    """Reads merged views from a server. Safe from any thread.

        reader = Reader("http://localhost:8080")
        reader.get("revenue", where={"region": "eu"}, by=["product"], after=publisher.flush())

    Raises `NotFound` for a view nobody has published, `Invalid` for a wrong request, `NotReady` if the server is
    restoring or what was asked to be waited for did not come in time, `Unavailable` if it does not answer.
    """

    def __init__(self, url: str, *, timeout_s: float = 30.0, clock: Clock | None = None) -> None:
        self._client = _HttpClient(url, clock or SystemClock())
        self._timeout_s = timeout_s

    def get(
        self,
        view: str,
        where: Mapping[str, str] | Sequence[str] | None = None,
        by: Sequence[str] | None = None,
        *,
        kind: str | None = None,
        window_s: int | None = None,
        top: int | None = None,
        limit: int | None = None,
        after: Token | str | None = None,
        max_staleness_ms: int | None = None,
        timeout_ms: int | None = None,
    ) -> Answer:
        """Return the merged view.

        `where`: label values that must be equal, or conditions such as `region!=eu` and `region=~e.*`; all must hold. `by`:
        labels to keep; empty for one total, None for each series by itself. `after`: wait for the deltas of a flush, given
        its token. `max_staleness_ms`: fail, after a wait, rather than answer with older data. `kind`, `window_s`: which
        definition of a view that has several; None: kind and window of the first one.
        """
        path = view_path(
            view,
            where,
            by,
            kind=kind,
            window_s=window_s,
            top=top,
            limit=limit,
            after=after,
            max_staleness_ms=max_staleness_ms,
            timeout_ms=timeout_ms,
        )
        timeout_s = self._timeout_s if timeout_ms is None else timeout_ms / 1000 + 5
        return self._get(path, Answer, timeout_s)

    def views(self) -> list[View]:
        """Return the definitions of all views."""
        return self._get("/v1/views", _ViewList, self._timeout_s).views

    def status(self) -> dict[str, Any]:
        """Return the server's partitions, their lag and staleness, and whether it is ready."""
        return self._get("/v1/status", dict[str, Any], self._timeout_s)

    def fetch(
        self, path: str, *, timeout_s: float | None = None, body: bytes | None = None, key: str | None = None
    ) -> bytes:
        """Return the body of the answer. JSON in `body` is posted, with the idempotency key `key`. Raises as `get` does."""
        status, answer = self._client.request(
            "GET" if body is None else "POST",
            path,
            timeout_s=self._timeout_s if timeout_s is None else timeout_s,
            body=body,
            content_type="" if body is None else "application/json",
            more_headers=None if key is None else {"Idempotency-Key": key},
        )
        if status != 200:
            raise _error(self._client.url, status, answer)
        return answer

    def _get(self, path: str, kind: type[T], timeout_s: float) -> T:
        return self._decoded(self.fetch(path, timeout_s=timeout_s), kind)

    def _decoded(self, body: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Unavailable(f"{self._client.url}: not an answer of this API: {error}") from None

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HttpViews(HttpReader):
    """A `roles.view_admin.ViewAdmin` behind a server of this package."""

    def change(self, control: Control, key: str) -> Changed:
        """Drop or reset views; `NotFound` if there are none. A repeated call with the same `key` has no further effect."""
        labels = None if control.labels is None else list(control.labels)
        path = f"/v1/views/{quote(control.view, safe='')}/{control.action}"
        body = msgspec.json.encode({"kind": control.kind or None, "labels": labels})
        return self._decoded(self.fetch(path, body=body, key=key), Changed)

    def folded(self, token: Token) -> bool:
        """Return whether the server has folded everything up to the token."""
        states = {it.partition: it for it in self._get("/v1/status", Status, self._timeout_s).partitions}
        return all(
            number in states
            and states[number].topic_id == token.topic_id
            and (known(states[number].next_offset) or 0) >= next_offset
            for number, next_offset in token.next_offsets.items()
        )
