"""The HTTP API of DESIGN section 8. What reads is `service`, what is read from a request `params`; here they are joined.

The hot path, `GET /v1/views/{view}`, is a plain Starlette route that goes around FastAPI's parameter machinery.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Protocol

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

import pipeline.metrics as m
import pipeline.query.openapi as docs
from pipeline.core.answer import Changed, Status
from pipeline.core.codec import decode_frames
from pipeline.core.exposition import OMITTED
from pipeline.core.token import Token
from pipeline.errors import Invalid, NotReady, PipelineError, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock, Ingest, Pushed, Refusal
from pipeline.query.dead_letters import DeadLetters
from pipeline.query.idempotency import HEADER as KEY_HEADER
from pipeline.query.idempotency import UsedKeys, parse_key
from pipeline.query.letters_api import add_letters
from pipeline.query.orders import OrderService, parse_order
from pipeline.query.params import parse_deltas, parse_read, parse_scrape
from pipeline.query.problems import Refused, problem
from pipeline.query.reader import ViewReader
from pipeline.query.service import ReadService, RenderViews
from pipeline.settings import QuerySettings

_log = logging.getLogger(__name__)
_INGEST_THREADS = 16
_BODIES_HELD_MAX = 4
"""Request bodies that are in memory at once, counted as bodies of the largest size."""
_CLIENT_GONE = 499
_JSON_HEADER = (b"content-type", docs.JSON.encode())
_encode = msgspec.json.Encoder().encode
_PUSH = "openmetrics"
_REFUSED_SHOWN_MAX = 10
_Work = Callable[[bytes, Headers], Any]
"""What is done with a body that was sent, in a thread."""
_Take = Callable[[Request, _Work], Coroutine[Any, Any, Response]]
ParsePushed = Callable[[bytes, str, int, int], Pushed]
"""Reads a text of metrics of a media type, until there are more samples than a limit; lines have one too, in bytes."""


class ExposedMetrics(Metrics, Protocol):
    """Metrics that can also be read."""

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """What `/metrics` answers, and its media type, for an Accept header."""
        ...


def create_operations_app(
    settings: QuerySettings,
    metrics: ExposedMetrics,
    clock: Clock,
    status: Callable[[], Status],
    ready: Callable[[], bool],
) -> FastAPI:
    """The application of a process that answers no reads: metrics, health and status."""
    app = _new_app("What a worker says of itself.", None)
    _add_operations(app, metrics, status, ready)
    return _finished(app, settings, metrics, clock)


def create_app(
    reader: ViewReader,
    ingest: Ingest | None,
    settings: QuerySettings,
    metrics: ExposedMetrics,
    status: Callable[[], Status],
    ready: Callable[[], bool],
    render_views: RenderViews | None = None,
    parse_pushed: ParsePushed | None = None,
    letters: DeadLetters | None = None,
) -> FastAPI:
    """The application: an ASGI app with a lifespan, which the server must run.

    Without `ingest` it only reads. `status` says what `/v1/status` shows, with `partition_count`, `partitions` and
    `ready`; what the reader knows of each partition is added. `ready` says whether reads can be answered.
    `render_views` writes `GET /v1/openmetrics`, which is not there without it; `parse_pushed` reads what is posted to it.
    With `ingest`, `letters` are shown and replayed.
    """
    service = ReadService(reader, settings, metrics)
    ingest_threads = ThreadPoolExecutor(_INGEST_THREADS, thread_name_prefix="pipeline-ingest")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        observing = asyncio.create_task(service.observe())
        try:
            yield
        finally:
            observing.cancel()
            with suppress(asyncio.CancelledError):
                await observing
            service.close()
            ingest_threads.shutdown(wait=False)

    app = _new_app("Merged views of deltas, each answer with a bound on how stale it is.", lifespan)
    app.router.routes.insert(0, Route(docs.READ_PATH, _ReadView(service, settings), methods=["GET"]))
    _add_reads(app, service)
    _add_operations(app, metrics, lambda: _with_staleness(status(), reader), ready)
    if render_views is not None:
        _add_scrape(app, service, settings, render_views)
    if ingest is not None:
        keys = UsedKeys(settings.idempotency_keys_max)
        take = _add_writes(app, ingest, settings, ingest_threads, keys)
        if letters is not None:
            add_letters(app, letters, settings, ingest_threads, take)
        _add_orders(app, OrderService(reader, ingest), take, keys)
        if parse_pushed is not None:
            _add_push(app, partial(_take_pushed, ingest, parse_pushed, settings, metrics, keys), take)
    return _finished(app, settings, metrics, reader.clock)


def _new_app(description: str, lifespan: Lifespan[FastAPI] | None) -> FastAPI:
    return FastAPI(
        title="pipeline",
        version="1",
        description=description,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )


def _finished(app: FastAPI, settings: QuerySettings, metrics: ExposedMetrics, clock: Clock) -> FastAPI:
    _document(app, settings)
    for kind in (PipelineError, Refused, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _problem)
    paths = {route.endpoint: route.path_format for route in app.routes if isinstance(route, Route)}
    app.add_middleware(_Guard, paths=paths, connections_max=settings.connections_max, metrics=metrics, clock=clock)
    return app


class _ReadView:
    """`GET /v1/views/{view}`, without so much as a Request or a Response."""

    def __init__(self, service: ReadService, settings: QuerySettings) -> None:
        self._service = service
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = parse_read(scope["path_params"]["view"], scope["query_string"], self._settings)
        body = await self._service.answer(asked)
        headers = [_JSON_HEADER, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _json(body: bytes) -> Response:
    return Response(body, media_type=docs.JSON)


def _add_reads(app: FastAPI, service: ReadService) -> None:
    views = docs.answers("Views", 503, description="All views.")

    @app.get("/v1/views", tags=["read"], summary="All views", responses=views, response_class=Response)
    async def list_views() -> Response:
        return _json(await service.views())


def _add_operations(
    app: FastAPI,
    metrics: ExposedMetrics,
    status: Callable[[], Status],
    ready: Callable[[], bool],
) -> None:
    state = docs.answers("Status")

    @app.get("/v1/status", tags=["operate"], summary="How the server is", responses=state, response_class=Response)
    async def show_status() -> Response:
        return _json(_encode(status()))

    @app.get("/healthz", tags=["operate"], summary="Whether the process is alive", response_class=Response)
    async def health() -> Response:
        return _json(b'{"alive":true}')

    @app.get(
        "/readyz",
        tags=["operate"],
        summary="Whether views can be read",
        responses={503: docs.answers("Status", 503)[503]},
        response_class=Response,
    )
    async def readiness() -> Response:
        if not ready():
            raise NotReady("the state is being restored; /v1/status shows how far it is")
        return _json(b'{"ready":true}')

    @app.get(
        "/metrics",
        tags=["operate"],
        summary="The server's own metrics, for Prometheus",
        responses={200: {"content": {"text/plain": {}}}},
        response_class=Response,
    )
    async def show_metrics(request: Request) -> Response:
        body, media_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": media_type})


def _add_scrape(app: FastAPI, service: ReadService, settings: QuerySettings, render: RenderViews) -> None:
    @app.get(
        "/v1/openmetrics",
        tags=["read"],
        summary="All views, for Prometheus",
        description=(
            "Monotone sums are counters, everything else gauges; series whose value is text or null are left out. "
            f"A view that can't be shown is named in `{OMITTED}`, with the reason."
        ),
        responses=docs.scrape_answers(),
        openapi_extra=docs.scrape_parameters(settings),
        response_class=Response,
    )
    async def scrape(request: Request) -> Response:
        views = parse_scrape(request.scope["query_string"], settings)
        body, media_type = await service.scrape(views, render, request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": media_type})


def _with_staleness(status: Status, reader: ViewReader) -> Status:
    """Add to a status what the reader knows of each partition."""
    try:
        states = {state.partition: state for state in reader.partitions()}
    except PipelineError:
        states = {}
    for it in status.partitions:
        state = states.get(it.partition)
        it.staleness_ms = None if state is None else state.staleness_ms
        if state is not None:
            it.next_offset, it.end_offset, it.lag = state.next_offset, state.end_offset, state.lag
            it.committed_at_ms, it.topic_id = state.committed_at_ms, state.topic_id
    return status


def _add_writes(app: FastAPI, ingest: Ingest, settings: QuerySettings, threads: ThreadPoolExecutor, keys: UsedKeys) -> _Take:
    bodies = _Bodies(settings.body_bytes_max)

    def take_deltas(body: bytes, headers: Headers) -> docs.Accepted:
        with keys.using("/v1/deltas", parse_key(headers.getlist(KEY_HEADER)), body) as key:
            deltas = parse_deltas(body, headers.get("content-type", ""), settings.deltas_max)
            return docs.Accepted(len(deltas), str(ingest.deltas(deltas, key)))

    def take_batches(body: bytes, headers: Headers) -> docs.BatchesAccepted:
        batches = decode_frames(body)
        next_offsets, token = ingest.batches(batches, headers.get(docs.PRODUCER_HEADER, ""))
        return docs.BatchesAccepted(next_offsets, str(token))

    async def take(request: Request, work: _Work) -> Response:
        async with bodies.of(request) as body:
            done = await asyncio.get_running_loop().run_in_executor(threads, work, body, request.headers)
        return _json(_encode(done))

    @app.post(
        "/v1/deltas",
        tags=["write"],
        summary="Publish deltas",
        description=(
            "A JSON array, or one JSON object a line. The log has them when this answers; if one is wrong, none of this "
            "request is taken. A request without an answer, or with 503, may have been taken, on Kafka also in part: sent "
            "again it counts twice, unless it has an `Idempotency-Key`. If the repeat with a key is refused, what was taken "
            "of an earlier try is counted all the same. What a worker would refuse is refused here already."
        ),
        responses=docs.answers("Accepted", 400, 413, 415, 422, 503),
        openapi_extra=docs.DELTAS_BODY,
        response_class=Response,
    )
    async def post_deltas(request: Request) -> Response:
        return await take(request, take_deltas)

    @app.post(
        "/v1/batches",
        tags=["write"],
        summary="Take a publisher's sealed batches",
        description=(
            "Each behind its length, four bytes, big endian. Sending one again is safe: it counts once. If some groups of a "
            "batch can't be taken, the problem names them, and nothing is taken: the batch can be sent again without them, "
            "under the same sequence."
        ),
        responses=docs.answers("BatchesAccepted", 400, 413, 415, 503),
        openapi_extra=docs.BATCHES_BODY,
        response_class=Response,
    )
    async def post_batches(request: Request) -> Response:
        return await take(request, take_batches)

    return take


def _add_orders(app: FastAPI, orders: OrderService, take: _Take, keys: UsedKeys) -> None:
    def add(action: str, summary: str, description: str) -> None:
        def carry_out(view: str, body: bytes, headers: Headers) -> Changed:
            with keys.using(f"/v1/views/{view}/{action}", parse_key(headers.getlist(KEY_HEADER)), body) as key:
                return orders.give(parse_order(action, view, body, headers.get("content-type", "")), key)

        @app.post(
            f"/v1/views/{{view}}/{action}",
            tags=["write"],
            summary=summary,
            description=f"{description} {docs.ORDER_NOTE}",
            responses=docs.answers("Changed", 400, 404, 413, 415, 422, 503),
            openapi_extra=docs.order_operation(action),
            response_class=Response,
        )
        async def change_view(request: Request) -> Response:
            return await take(request, partial(carry_out, request.path_params["view"]))

    add("drop", "Drop a view", "Its definitions and series go.")
    add("reset", "Reset a view", "Its series go, its definitions stay.")


def _take_pushed(
    ingest: Ingest,
    parse: ParsePushed,
    settings: QuerySettings,
    metrics: Metrics,
    keys: UsedKeys,
    body: bytes,
    headers: Headers,
) -> docs.MetricsAccepted:
    """Take a text of metrics in; `Invalid` if there is nothing in it that can be taken."""
    with keys.using("/v1/openmetrics", parse_key(headers.getlist(KEY_HEADER)), body) as key:
        content_type = headers.get("content-type", "")
        pushed = parse(body, content_type, settings.deltas_max, settings.openmetrics_line_bytes_max)
        if not pushed.whole:
            raise Refused(413, f"too many samples in one request; at most {settings.deltas_max}")
        token, unfit = ingest.fitting(pushed.deltas, key) if pushed.deltas else (Token(), [])
        return _told(pushed, token, unfit, metrics)


def _told(pushed: Pushed, token: Token, unfit: list[Refusal], metrics: Metrics) -> docs.MetricsAccepted:
    refused = [*pushed.refused, *[it._replace(line=pushed.lines[it.line]) for it in unfit]]
    reasons = Counter([it.reason for it in refused])
    accepted = len(pushed.deltas) - len(unfit)
    metrics.inc(m.INGEST_LINES, accepted + len(refused), _PUSH)
    for reason, count in reasons.items():
        metrics.inc(m.INGEST_MALFORMED, count, _PUSH, reason)
    if refused and not accepted:
        raise Invalid(f"nothing could be taken; line {refused[0].line}: {refused[0].reason}: {refused[0].detail}")
    first = [docs.LeftOut(it.line, it.reason, it.detail) for it in sorted(refused)[:_REFUSED_SHOWN_MAX]]
    return docs.MetricsAccepted(accepted, len(refused), dict(reasons), first, str(token))


def _add_push(app: FastAPI, work: _Work, take: _Take) -> None:
    @app.post(
        "/v1/openmetrics",
        tags=["write"],
        summary="Publish metrics as text",
        description=(
            "Values are what has happened since the client's last push, as of a batch job that pushes once: counters, "
            "buckets, sums and counts are added to monotone sums, everything else is the newest value, by its timestamp. A "
            "line that can't be taken is left out, and told. A request without an answer, or with 503, may have been taken, "
            "on Kafka also in part: sending it again counts twice, unless it has an `Idempotency-Key`."
        ),
        responses=docs.answers("MetricsAccepted", 400, 413, 415, 422, 503),
        openapi_extra=docs.METRICS_BODY,
        response_class=Response,
    )
    async def push(request: Request) -> Response:
        return await take(request, work)


class _Bodies:
    """Reads request bodies, within a limit for each and a limit for all."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._held = 0

    @asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[bytes]:
        """The body, which counts as held until the context ends."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "compressed bodies are not understood")
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

    def _too_large(self) -> Refused:
        return Refused(413, f"a body of over {self._bytes_max} bytes")


def _document(app: FastAPI, settings: QuerySettings) -> None:
    plain = app.openapi
    made: list[dict[str, Any]] = []

    def openapi() -> dict[str, Any]:
        if not made:
            made.append(docs.complete(plain(), settings))
        return made[0]

    async def page(_: Request) -> Response:
        headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return Response(docs.docs_page(app.openapi()), media_type="text/html", headers=headers)

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way of extending it
    app.add_route("/docs", page, include_in_schema=False)


def _refused(error: HTTPException, request: Request) -> Refused:
    headers: Mapping[str, str] = error.headers or {}
    if error.status_code == 404:
        return Refused(404, f"nothing is at {request.url.path[:200]!r}; /docs says what there is", headers)
    if error.status_code == 405:
        return Refused(405, f"{request.method[:20]} is not for {request.url.path[:200]!r}", headers)
    return Refused(error.status_code, str(error.detail), headers)


async def _problem(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = _refused(error, request)
    elif isinstance(error, RequestValidationError):
        error = Refused(422, str(error))
    answer = problem(error)
    if answer.status >= 500 and not isinstance(error, Refused | NotReady | Unavailable):
        _log.error("%s %s: %s: %s", request.method, request.url.path, type(error).__name__, error)
    return Response(answer.body, answer.status, headers=answer.headers)


class _Guard:
    """Around everything: counts and times requests, bounds how many are open, and answers for what goes wrong inside."""

    def __init__(
        self, app: ASGIApp, *, paths: Mapping[Any, str], connections_max: int, metrics: Metrics, clock: Clock
    ) -> None:
        self._app = app
        self._paths = paths
        self._connections_max = connections_max
        self._metrics = metrics
        metrics.inc(m.READS_REFUSED, 0, "connections_max")
        self._clock = clock
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = self._clock.monotonic_s()
        status = _CLIENT_GONE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._open += 1
        try:
            if self._open > self._connections_max:
                self._metrics.inc(m.READS_REFUSED, 1, "connections_max")
                raise Unavailable(f"{self._open - 1} requests are open; no more are taken")
            await self._app(scope, receive, noting)
        except ClientDisconnect:
            pass
        except Exception as error:
            if not isinstance(error, PipelineError):
                _log.exception("%s %s", scope["method"], scope["path"])
            if status != _CLIENT_GONE:
                raise  # half an answer is sent: the server must break the connection off
            answer = problem(error)
            await Response(answer.body, answer.status, headers=answer.headers)(scope, receive, noting)
        finally:
            self._open -= 1
            path = self._paths.get(scope.get("endpoint"), "unmatched")  # never what the client wrote
            self._metrics.inc(m.REQUESTS, 1, path, status)
            self._metrics.observe(m.REQUEST_SECONDS, self._clock.monotonic_s() - started_s, path)
