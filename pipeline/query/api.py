"""The HTTP API of DESIGN section 8, as routes of Starlette: `params` reads requests, `service` reads views.

The hot path, `GET /v1/views/{view}`, makes no Request and no Response.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Protocol

import msgspec
from msgspec import UNSET
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from pipeline.core.answer import Changed, Status
from pipeline.core.frames import decode_frames
from pipeline.core.gathered import STATES_PATH, STATES_TYPE
from pipeline.core.grants import Bounds, Grant
from pipeline.core.token import Token
from pipeline.errors import NotReady, PipelineError
from pipeline.left_out import LeftOut
from pipeline.metrics import Metrics
from pipeline.ports import Clock, Ingest
from pipeline.query.access import Access, needed_of
from pipeline.query.bodies import BATCHES_TYPE, BodyRoom, RequestBodies
from pipeline.query.controls import ControlService, parse_control
from pipeline.query.dead_letters import DeadLetters
from pipeline.query.dead_letters_api import letter_routes
from pipeline.query.deltas import parse_deltas
from pipeline.query.fairness import PRODUCER_HEADER, FairTurns, is_gone_of, writer_of
from pipeline.query.gather import GatherService
from pipeline.query.guard import Guard, Scoped, note_refusal, show_problem
from pipeline.query.idempotency import HEADER as KEY_HEADER
from pipeline.query.idempotency import UsedKeys, parse_key
from pipeline.query.media import JSON, NDJSON, Encoded
from pipeline.query.openapi import READ_PATH, STREAM_PATH, docs_routes, openapi_document
from pipeline.query.otlp_api import Exports, ExportTaking
from pipeline.query.page import page_routes
from pipeline.query.params import QUERY_BYTES_MAX, parse_read, parse_scrape, read_headers
from pipeline.query.problems import Refused, problem
from pipeline.query.push_api import ParsePushed, Pushes, Take, Work
from pipeline.query.reader import ViewReader
from pipeline.query.remote_reads import REQUEST_BYTES_MAX, REQUEST_TYPE
from pipeline.query.responses import Accepted, BatchesAccepted
from pipeline.query.service import ReadService, RenderViews
from pipeline.query.several import parse_several
from pipeline.query.streams import Streams
from pipeline.query.streams_api import StreamView
from pipeline.query.tenants import check_deltas, status_within
from pipeline.settings import QuerySettings

_log = logging.getLogger(__name__)
_INGEST_THREADS = 16
_encode = msgspec.json.Encoder().encode
_TICK_S = 5.0
_ORDER_BYTES_MAX = 2**18
"""Largest body of an order about a view, of a replay of dead letters, and of a request for states."""


class ExposedMetrics(Metrics, Protocol):
    """Metrics that can also be read."""

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the body of `/metrics` and its media type, for an Accept header."""
        ...


def create_operations_app(
    settings: QuerySettings,
    metrics: ExposedMetrics,
    clock: Clock,
    status: Callable[[], Status],
    ready: Callable[[], bool],
    access: Access | None = None,
) -> Starlette:
    """Return the application of a process that answers no reads: metrics, health and status."""
    return make_application(operation_routes(metrics, status, ready), settings, metrics, clock, access=access)


def create_app(
    reader: ViewReader,
    ingest: Ingest | None,
    settings: QuerySettings,
    metrics: ExposedMetrics,
    status: Callable[[], Status],
    ready: Callable[[], bool],
    render_views: RenderViews | None = None,
    parse_pushed: ParsePushed | None = None,
    exports: ExportTaking | None = None,
    letters: DeadLetters | None = None,
    access: Access | None = None,
) -> Starlette:
    """Return the application: an ASGI app with a lifespan, which the server must run.

    Without `ingest` it only reads. `status` returns what `/v1/status` shows; what the reader knows of each partition is
    added. `ready` says whether reads can be answered. `render_views` writes `GET /v1/openmetrics`, which is not there
    without it; `parse_pushed` reads what is posted to it, and `exports` OTLP. With `ingest`, `letters` are shown and
    replayed. With `access` requests need access tokens.
    """
    service = ReadService(reader, settings, metrics)
    left_out = LeftOut(_log, reader.clock, metrics)
    ingest_threads = ThreadPoolExecutor(_INGEST_THREADS, thread_name_prefix="pipeline-ingest")

    def close() -> None:
        service.close()
        ingest_threads.shutdown(wait=False)
        left_out.close()

    read, room = ReadEndpoint(service, settings), BodyRoom(settings, metrics, reader.clock)
    streams = Streams(service, settings, metrics, reader.clock)
    routes = [
        Route(READ_PATH, read, methods=["GET"]),
        Route(STREAM_PATH, StreamView(streams, service, settings, metrics), methods=["GET"]),
        Route("/v1/views", ListEndpoint(service), methods=["GET"]),
        Route("/v1/query", QueryEndpoint(service, settings, room), methods=["POST"]),
        *page_routes(),
    ]
    routes += operation_routes(metrics, lambda: _completed(status(), reader, left_out), ready)
    routes.append(_states_route(service, room))
    if render_views is not None:
        routes += [scrape_route(service, settings, render_views), _remote_read_route(service, room)]
    if ingest is not None:
        keys = UsedKeys(settings.idempotency_keys_max)
        turns = FairTurns(reader.partitions, reader.clock, settings, metrics)
        small = RequestBodies(room, min(settings.body_bytes_max, _ORDER_BYTES_MAX))
        take = partial(_take, room, RequestBodies(room, settings.body_bytes_max), ingest_threads, turns)
        order = partial(_take, room, small, ingest_threads, None)
        routes += _write_routes(ingest, settings, keys, take)
        routes += _order_routes(ControlService(reader, ingest), keys, order)
        if letters is not None:
            routes += letter_routes(letters, settings, ingest_threads, order)
        if parse_pushed is not None:
            totals = None if exports is None else exports.totals
            routes += Pushes(ingest, parse_pushed, settings, metrics, keys, left_out, totals).routes(take)
        if exports is not None:
            routes.append(Exports(exports, ingest, settings, metrics, left_out).route(room, ingest_threads, turns))
    app = make_application(routes, settings, metrics, reader.clock, observing(service, close, left_out.tick), read, access)
    app.state.before_stop = streams.close
    return app


def observing(
    service: ReadService | GatherService, close: Callable[[], None], tick: Callable[[], None] = lambda: None
) -> Lifespan[Starlette]:
    """Return the lifespan of an application that observes from its start, and in the end calls `close`.

    Meanwhile `tick` is called again and again.
    """

    async def tick_again_and_again() -> None:
        while True:
            tick()
            await asyncio.sleep(_TICK_S)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(it) for it in (service.observe(), tick_again_and_again())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            close()

    return lifespan


def make_application(
    routes: Sequence[Route],
    settings: QuerySettings,
    metrics: ExposedMetrics,
    clock: Clock,
    lifespan: Lifespan[Starlette] | None = None,
    read: ReadEndpoint | None = None,
    access: Access | None = None,
) -> Starlette:
    """Return the application of these routes, with its documentation, and guarded.

    Raises `KeyError` for a route of which `query.access` does not say who may use it.
    """
    operations = {(method.lower(), it.path) for it in routes for method in it.methods or ()}
    needed = {operation: needed_of(operation[0].upper(), operation[1]) for operation in operations}
    routes = [*routes, *docs_routes(openapi_document(operations, settings, None if access is None else needed))]
    for it in routes if access is not None else ():
        it.app = Scoped(it.app, it.path, it.methods or ())
    paths = {it.endpoint: it.path for it in routes}
    handlers = dict.fromkeys((PipelineError, Refused, HTTPException), show_problem)

    class App(Starlette):
        def build_middleware_stack(self) -> ASGIApp:
            """Return the router within a `Guard`, which does what Starlette's own outermost layer would do."""
            routed = ExceptionMiddleware(self.router, handlers=handlers)
            return Guard(routed, read, paths, settings, metrics, clock, access)

    app = App(routes=routes, lifespan=lifespan)
    app.router.redirect_slashes = False
    return app


class ReadEndpoint:
    """`GET /v1/views/{view}` as a plain ASGI application."""

    def __init__(self, service: ReadService | GatherService, settings: QuerySettings) -> None:
        self._service = service
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.answer(scope["path_params"]["view"], scope, receive, send)

    async def answer(self, view: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request whose path names `view`."""
        headers, bounds = read_headers(scope["headers"]), scope["grant"].bounds
        asked = parse_read(view, scope["query_string"], self._settings, headers, bounds)
        await _send(send, await self._service.answer(asked, receive))


class QueryEndpoint:
    """`POST /v1/query` as a plain ASGI application."""

    def __init__(self, service: ReadService | GatherService, settings: QuerySettings, room: BodyRoom) -> None:
        self._service = service
        self._settings = settings
        self._bodies = RequestBodies(room, min(settings.body_bytes_max, QUERY_BYTES_MAX * 4))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._bodies.of(Request(scope, receive), JSON) as body:
            asked = parse_several(body, self._settings, scope["grant"].bounds)
        await _send(send, await self._service.answers(asked, read_headers(scope["headers"]), receive))


class ListEndpoint:
    """`GET /v1/views` as a plain ASGI application."""

    def __init__(self, service: ReadService | GatherService) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _send(send, await self._service.views(read_headers(scope["headers"]), scope["grant"].bounds))


async def _send(send: Send, answer: Encoded) -> None:
    """Send a response without a copy of its parts."""
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    for part in answer.parts[:-1]:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": answer.parts[-1] if answer.parts else b""})


def bounds_of(request: Request) -> Bounds | None:
    """Return the bounds of the access token of a request."""
    grant: Grant = request.scope["grant"]
    return grant.bounds


def _json(body: bytes) -> Response:
    return Response(body, media_type=JSON)


def operation_routes(metrics: ExposedMetrics, status: Callable[[], Status], ready: Callable[[], bool]) -> list[Route]:
    """Return the routes that every process has: status, health and metrics."""

    async def show_status(request: Request) -> Response:
        return _json(_encode(status_within(status(), bounds_of(request))))

    async def health(_: Request) -> Response:
        return _json(b'{"alive":true}')

    async def readiness(_: Request) -> Response:
        if not ready():
            raise NotReady("the state is being restored; /v1/status shows how far it is")
        return _json(b'{"ready":true}')

    async def show_metrics(request: Request) -> Response:
        body, media_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": media_type})

    return [
        Route("/v1/status", show_status),
        Route("/healthz", health),
        Route("/readyz", readiness),
        Route("/metrics", show_metrics),
    ]


def scrape_route(service: ReadService | GatherService, settings: QuerySettings, render: RenderViews) -> Route:
    """Return the route that shows the views to Prometheus."""

    async def scrape(request: Request) -> Response:
        views, windowed = parse_scrape(request.scope["query_string"], settings)
        accept = request.headers.get("accept", "")
        body, media_type = await service.scrape(
            views, render, accept, windowed=windowed, bounds=bounds_of(request), receive=request.receive
        )
        return Response(body, headers={"Content-Type": media_type})

    return Route("/v1/openmetrics", scrape)


def _remote_read_route(service: ReadService, room: BodyRoom) -> Route:
    bodies = RequestBodies(room, REQUEST_BYTES_MAX, "snappy")

    async def remote_read(request: Request) -> Response:
        try:
            async with bodies.of(request, REQUEST_TYPE) as body:
                answer = await service.remote_read(body, bounds_of(request), request.receive)
        except (PipelineError, Refused) as error:  # Prometheus shows the text of an error as it is
            note_refusal(request.scope, error)
            it = problem(error)
            return PlainTextResponse(f"{it.detail}\n", it.status, it.headers | {"Content-Type": "text/plain; charset=utf-8"})
        return Response(answer, headers={"Content-Type": "application/x-protobuf", "Content-Encoding": "snappy"})

    return Route("/api/v1/read", remote_read, methods=["POST"])


def _states_route(service: ReadService, room: BodyRoom) -> Route:
    bodies = RequestBodies(room, _ORDER_BYTES_MAX)

    async def states(request: Request) -> Response:
        async with bodies.of(request, STATES_TYPE) as body:
            return Response(await service.states(body, request.receive), media_type=STATES_TYPE)

    return Route(STATES_PATH, states, methods=["POST"])


def _completed(status: Status, reader: ViewReader, left_out: LeftOut) -> Status:
    """Add to a status what the reader knows of each partition, and what was left out of requests."""
    if found := left_out.status():
        status.ingest_left_out = found
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
            it.owner = state.owner or UNSET
    return status


async def _take(
    room: BodyRoom,
    bodies: RequestBodies,
    threads: ThreadPoolExecutor,
    turns: FairTurns | None,
    request: Request,
    work: Work,
    *types: str,
) -> Response:
    """Read the body of a request, do `work` with it in a thread, and return what that answers; with `turns` in its turn."""
    writer = writer_of(request.scope, request.headers)
    if turns is not None:
        await turns.wait(writer, is_gone_of(request.scope))
    async with bodies.of(request, *types) as body:
        done = await room.work(request, body, threads, partial(work, body, request.headers))
        if turns is not None and done.token:
            turns.note(writer, Token.parse(done.token).next_offsets, len(body))
    return _json(_encode(done))


def _write_routes(ingest: Ingest, settings: QuerySettings, keys: UsedKeys, take: Take) -> list[Route]:
    def take_deltas(bounds: Bounds | None, body: bytes, headers: Headers) -> Accepted:
        with keys.using("/v1/deltas", parse_key(headers.getlist(KEY_HEADER)), body, bounds) as key:
            deltas = parse_deltas(body, headers.get("content-type", ""), settings.deltas_max)
            check_deltas(deltas, bounds)
            return Accepted(len(deltas), str(ingest.deltas(deltas, key, bounds)))

    def take_batches(bounds: Bounds | None, body: bytes, headers: Headers) -> BatchesAccepted:
        batches = decode_frames(body, settings.batches_max + 1)
        if len(batches) > settings.batches_max:
            raise Refused(413, f"too many batches in one request; at most {settings.batches_max}")
        next_offsets, token = ingest.batches(batches, headers.get(PRODUCER_HEADER, ""), bounds)
        return BatchesAccepted(next_offsets, str(token))

    async def post_deltas(request: Request) -> Response:
        return await take(request, partial(take_deltas, bounds_of(request)), JSON, NDJSON)

    async def post_batches(request: Request) -> Response:
        return await take(request, partial(take_batches, bounds_of(request)), BATCHES_TYPE)

    return [
        Route("/v1/deltas", post_deltas, methods=["POST"]),
        Route("/v1/batches", post_batches, methods=["POST"]),
    ]


def _order_routes(orders: ControlService, keys: UsedKeys, take: Take) -> list[Route]:
    def route(action: str) -> Route:
        def carry_out(view: str, bounds: Bounds | None, body: bytes, headers: Headers) -> Changed:
            with keys.using(f"/v1/views/{view}/{action}", parse_key(headers.getlist(KEY_HEADER)), body, bounds) as key:
                return orders.give(parse_control(action, view, body), key, bounds)

        async def change_view(request: Request) -> Response:
            return await take(request, partial(carry_out, request.path_params["view"], bounds_of(request)), JSON)

        return Route(f"/v1/views/{{view}}/{action}", change_view, methods=["POST"])

    return [route("drop"), route("reset")]
