"""The HTTP API of a server that merges what other servers have."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pipeline.query.access import Access
from pipeline.query.api import (
    ExposedMetrics,
    ListEndpoint,
    QueryEndpoint,
    ReadEndpoint,
    make_application,
    observing,
    operation_routes,
    scrape_route,
)
from pipeline.query.bodies import BodyRoom
from pipeline.query.gather import GatherService
from pipeline.query.openapi import READ_PATH, STREAM_PATH
from pipeline.query.page import page_routes
from pipeline.query.problems import Refused
from pipeline.query.push_api import GATEWAY_PATH
from pipeline.query.service import RenderViews
from pipeline.query.streams import Streams
from pipeline.query.streams_api import StreamView
from pipeline.settings import QuerySettings

_WRITE_PATHS = ("/v1/deltas", "/v1/batches", "/v1/openmetrics", "/v1/metrics", f"{READ_PATH}/drop", f"{READ_PATH}/reset")


def create_gather_app(
    service: GatherService,
    settings: QuerySettings,
    metrics: ExposedMetrics,
    render_views: RenderViews,
    access: Access | None = None,
) -> Starlette:
    """Return the application of a server that merges what other servers have. It takes no writes."""

    def refused(path: str, status: int, why: str, *more_methods: str) -> Route:
        async def refuse(_: Request) -> Response:
            raise Refused(status, why)

        return Route(path, refuse, methods=["POST", *more_methods])

    no_writes = "this server only merges what others have: write to a server that runs with --ingest, or as `pipeline up`"
    streams = Streams(service, settings, metrics, service.clock)
    routes = [
        Route(READ_PATH, ReadEndpoint(service, settings), methods=["GET"]),
        Route(STREAM_PATH, StreamView(streams, service, settings, metrics), methods=["GET"]),
        Route("/v1/views", ListEndpoint(service), methods=["GET"]),
        Route("/v1/query", QueryEndpoint(service, settings, BodyRoom(settings, metrics, service.clock)), methods=["POST"]),
        *page_routes(),
        *operation_routes(metrics, service.status, lambda: service.ready),
        scrape_route(service, settings, render_views),
        *[refused(path, 405, no_writes) for path in _WRITE_PATHS],
        refused(GATEWAY_PATH, 405, no_writes, "PUT"),
        refused("/api/v1/read", 501, "remote reads need a server that follows all partitions"),
    ]
    app = make_application(routes, settings, metrics, service.clock, observing(service, service.close), access=access)
    app.state.before_stop = streams.close
    return app
