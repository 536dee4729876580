"""Clients of the HTTP API: a log that takes batches, and a reader of views."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack
from urllib.parse import quote

import msgspec

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http_client import AnswerTooLarge, Client, HttpClient, error_of, is_ours
from pipeline.adapters.read_parameters import QueryKeywords, WatchKeywords, json_query, view_path
from pipeline.core.answer import Answer, Answers, Changed, Status, View, known
from pipeline.core.codec import producer_of
from pipeline.core.frames import encode_frames
from pipeline.core.record import Control, producer_id_of
from pipeline.core.times import Length, Time
from pipeline.core.token import Token
from pipeline.errors import BadRecord, GroupsForbidden, Invalid, PipelineError, Unavailable
from pipeline.ports import MESSAGE_BYTES_MAX, Clock, Message
from pipeline.settings import ClientSettings
from pipeline.topics import DELTAS

if TYPE_CHECKING:
    from pipeline.adapters.watch import Watch, WatchLink

REQUEST_BYTES_MAX = 4 * 2**20
"""Size up to which batches share a request; a server accepts at least one batch of `batch_bytes_max`."""
REQUEST_BATCHES_MAX = 1_000
"""Batches that share a request at most: as many as a server takes, unless its `batches_max` is another."""
PARTITION_COUNT_TTL_S = 30.0
_STATUS_S = 10.0
T = TypeVar("T")


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


def _producer_of(message: Message) -> str:
    """Return the producer id of a batch, or nothing if the message is no batch: the server will say so."""
    try:
        return producer_of(message.value or b"")
    except BadRecord:
        return ""


class HttpLogWriter:
    """A `ports.LogWriter` that sends batches to a server's `POST /v1/batches`."""

    def __init__(self, url: str, clock: Clock | None = None, settings: ClientSettings | None = None) -> None:
        self._clock = clock or SystemClock()
        self._client = HttpClient(url, self._clock, settings)
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
                raise error_of(self._client.url, status, body)
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
                end = min(len(own), start + REQUEST_BATCHES_MAX)
                while stop < end and (stop == start or size + len(own[stop].value or b"") < REQUEST_BYTES_MAX):
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
        refusal = error_of(self._client.url, status, answer)
        # Only a refusal of our own server is final: a proxy may refuse what the server would accept.
        refused = isinstance(refusal, GroupsForbidden) or (status in (400, 413) and isinstance(refusal, Invalid | BadRecord))
        for_good = refused and is_ours(answer)  # without a token that counts, batches wait
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


class HttpReader:
    """Reads merged views from a server. Safe from any thread.

        reader = Reader("http://localhost:8080")
        reader.get("revenue", where={"region": "eu"}, by=["product"], after=publisher.flush())

    Raises `NotFound` for a view nobody has published, `Invalid` for a wrong request, `NotReady` if the server is
    restoring or what was asked to be waited for did not come in time, `Unavailable` if it does not answer,
    `Unauthenticated` or `Forbidden` if it needs another access token.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 30.0,
        clock: Clock | None = None,
        settings: ClientSettings | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._client = self._connect(url, self._clock, settings)
        self._timeout_s = timeout_s
        self._links: set[WatchLink] = set()
        """Watches that have not ended."""

    @staticmethod
    def _connect(url: str, clock: Clock, settings: ClientSettings | None) -> Client:
        return HttpClient(url, clock, settings)

    def get(
        self,
        view: str,
        where: Mapping[str, str] | Sequence[str] | None = None,
        by: Sequence[str] | None = None,
        *,
        kind: str | None = None,
        window_s: int | None = None,
        top: int | None = None,
        bottom: int | None = None,
        limit: int | None = None,
        start: Time | None = None,
        end: Time | None = None,
        at: Time | None = None,
        step: Length | None = None,
        over: Length | None = None,
        compare: Length | None = None,
        fill: str | None = None,
        fn: str | None = None,
        q: Sequence[float] | float | None = None,
        cursor: str | None = None,
        after: Token | str | None = None,
        max_staleness_ms: int | None = None,
        timeout_ms: int | None = None,
    ) -> Answer:
        """Return the merged view.

        `where`: label values that must be equal, or conditions such as `region!=eu` and `region=~e.*`; all must hold. `by`:
        labels to keep; empty for one total, None for each series by itself. `after`: wait for the deltas of a flush, given
        its token. `max_staleness_ms`: fail, after a wait, rather than answer with older data. `kind`, `window_s`: which
        definition of a view that has several; None: kind and window of the first one.

        A view with windows answers with points of a range. `start`, `end`, `at`: ms since 1970, a datetime with its zone, or
        RFC 3339; without `end` the range ends now, without `start` 60 steps before, and `at` is the end of a single step.
        `step`, `over`: distance of points, and length of what each covers: seconds, a timedelta, or a text such as `5m`.
        `fill`: `null`, `zero` or `previous` for points without data. `fn`: a function of points, such as `rate`. `compare`:
        the same range so much earlier, in `compare` of each series.

        `q`: quantiles of a histogram, such as 0.95, in `quantiles` of each value; `top` and `bottom` order by the first of
        them, or by count.

        `cursor`: "" for the first page of `limit` series, then `next_cursor` of the page before; `pages` does that.
        """
        path = view_path(
            view,
            where=where,
            by=by,
            kind=kind,
            window_s=window_s,
            top=top,
            bottom=bottom,
            limit=limit,
            start=start,
            end=end,
            at=at,
            step=step,
            over=over,
            compare=compare,
            fill=fill,
            fn=fn,
            q=q,
            cursor=cursor,
            after=after,
            max_staleness_ms=max_staleness_ms,
            timeout_ms=timeout_ms,
        )
        return self._get(path, Answer, self._limit_s(timeout_ms))

    def pages(
        self,
        view: str,
        where: Mapping[str, str] | Sequence[str] | None = None,
        by: Sequence[str] | None = None,
        *,
        page_size: int = 10_000,
        after: Token | str | None = None,
        max_staleness_ms: int | None = None,
        **options: Any,
    ) -> Iterator[Answer]:
        """Yield all series that match, in answers of `page_size` series, all of one moment; the options are those of `get`.

        The server keeps the pages for a while (`cursor_ttl_ms`). Raises `CursorGone` if it has let go of them.
        """
        waits: dict[str, Any] = {"after": after, "max_staleness_ms": max_staleness_ms}
        cursor: str | None = ""
        while cursor is not None:
            answer = self.get(view, where, by, limit=page_size, cursor=cursor, **waits, **options)
            yield answer
            cursor, waits = answer.next_cursor, {}

    def watch(
        self,
        view: str,
        where: Mapping[str, str] | Sequence[str] | None = None,
        by: Sequence[str] | None = None,
        **options: Unpack[WatchKeywords],
    ) -> Watch:
        """Yield the merged view, and again when it has changed; options are those of `get` but for `cursor` and `compare`.

            for answer in reader.watch("revenue", by=["region"]):
                print(answer.series, answer.as_of.staleness_ms)

        Each answer is whole. One comes at least every few seconds (the server's `stream_heartbeat_ms`), so that its
        staleness is that of now; a caller that takes them slowly gets the newest. Raises as `get` does, also later, as
        when the view is dropped. But once there was an answer, a server that is away or restores is waited for: meanwhile
        the last answer comes again with a staleness that has grown, and `problem` of the iterator says why. A data
        directory that was stopped has one answer.
        """
        from pipeline.adapters.watch import Watch

        return Watch(self.watch_link(view, where, by, options))

    def watch_link(
        self, view: str, where: Mapping[str, str] | Sequence[str] | None, by: Sequence[str] | None, options: WatchKeywords
    ) -> WatchLink:
        """Return what a `Watch` or `AsyncWatch` takes its answers from, which ends with this reader's `close`."""
        from pipeline.adapters.watch import WatchLink  # a publisher to a server loads this module, and watches nothing

        if unknown := options.keys() - WatchKeywords.__annotations__:
            raise TypeError(f"watch() got an unexpected argument {', '.join(sorted(unknown))}")
        path = view_path(view, where=where, by=by, **options)
        limit_s = self._limit_s(options.get("timeout_ms"))
        link = WatchLink(self._client, path, self._clock, limit_s, self._links.discard)
        self._links.add(link)
        return link

    def query(
        self,
        queries: Iterable[QueryKeywords],
        *,
        after: Token | str | None = None,
        max_staleness_ms: int | None = None,
        timeout_ms: int | None = None,
    ) -> list[Answer]:
        """Return the answer to each query, all of one moment, so that views that change together are never seen apart.

            hits, errors = reader.query([{"view": "hits", "by": ["route"]}, {"view": "errors", "by": ["route"]}])

        A query is a dict of arguments of `get`. Within a partition of the log the moment is exact. An error names the index
        of its query, from 0, and there is no answer to the others.
        """
        request: dict[str, Any] = {"queries": [json_query(it) for it in queries]}
        waits = {"after": after and str(after), "max_staleness_ms": max_staleness_ms, "timeout_ms": timeout_ms}
        request.update({name: value for name, value in waits.items() if value is not None})
        body = self.fetch("/v1/query", body=msgspec.json.encode(request), timeout_s=self._limit_s(timeout_ms))
        return self._decoded(body, Answers).answers

    def _limit_s(self, timeout_ms: int | None) -> float:
        return self._timeout_s if timeout_ms is None else timeout_ms / 1000 + 5

    def views(self) -> list[View]:
        """Return the definitions of all views."""
        return self._get("/v1/views", _ViewList, self._timeout_s).views

    def status(self) -> dict[str, Any]:
        """Return the server's partitions, their lag and staleness, and whether it is ready."""
        return self._get("/v1/status", dict[str, Any], self._timeout_s)

    def fetch(
        self,
        path: str,
        *,
        timeout_s: float | None = None,
        body: bytes | None = None,
        key: str | None = None,
        accept: str | None = None,
    ) -> bytes:
        """Return the body of the answer, whose media type is to be `accept`. Raises as `get` does.

        JSON in `body` is posted, with the idempotency key `key`.
        """
        headers = {"Idempotency-Key": key, "Accept": accept}
        try:
            status, answer = self._client.request(
                "GET" if body is None else "POST",
                path,
                timeout_s=self._timeout_s if timeout_s is None else timeout_s,
                body=body,
                content_type="" if body is None else "application/json",
                more_headers={name: value for name, value in headers.items() if value is not None},
            )
        except AnswerTooLarge as error:
            raise Invalid(str(error)) from None
        if status != 200:
            raise error_of(self._client.url, status, answer)
        return answer

    def _get(self, path: str, kind: type[T], timeout_s: float) -> T:
        return self._decoded(self.fetch(path, timeout_s=timeout_s), kind)

    def _decoded(self, body: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Unavailable(f"{self._client.url}: not an answer of this API: {error}") from None

    def close(self) -> None:
        """End all watches, and close idle connections."""
        for link in list(self._links):
            link.close()
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
