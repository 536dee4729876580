"""`GET /v1/views/{view}/stream`: the events of `streams` over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.types import Receive, Scope, Send

import pipeline.metrics as m
from pipeline.errors import Invalid
from pipeline.metrics import Metrics
from pipeline.query.access import Access
from pipeline.query.clients import client_of
from pipeline.query.gather import GatherService
from pipeline.query.params import parse_read
from pipeline.query.service import ReadService
from pipeline.query.streams import Streams
from pipeline.settings import QuerySettings

EVENT_STREAM = "text/event-stream"
_LOOK_S = 1.0
"""Time between two looks at whether the access token of a stream is still good."""
HEARTBEAT_HEADER = b"pipeline-heartbeat-ms"
"""Name of the header with the usual longest time without an event, which a reader that waits for longer may act on."""
_HEADERS = [
    (b"content-type", EVENT_STREAM.encode()),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


class StreamView:
    """The route, as a plain ASGI application."""

    def __init__(
        self, streams: Streams, service: ReadService | GatherService, settings: QuerySettings, metrics: Metrics
    ) -> None:
        self._streams = streams
        self._service = service
        self._settings = settings
        self._metrics = metrics
        self._headers = [*_HEADERS, (HEARTBEAT_HEADER, str(settings.stream_heartbeat_ms).encode())]
        metrics.inc(m.STREAMS_STALLED, 0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = parse_read(
            scope["path_params"]["view"], scope["query_string"], self._settings, bounds=scope["grant"].bounds
        )
        if request.query.range.compare_ms is not None or request.cursor is not None or request.allow_partial:
            raise Invalid("compare, cursor and allow_partial are not for streams")
        last_id = b"".join([value for name, value in scope["headers"] if name == b"last-event-id"]).decode("latin-1")
        await self._service.wait(request, receive)
        async with self._streams.open(request.query, last_id, client_of(scope)) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self._headers})
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b""})
                return
            sending = asyncio.create_task(self._send(events, send))
            leaving = asyncio.create_task(_disconnected(receive))
            try:
                await self._until_done(scope, {sending, leaving})
            finally:
                sending.cancel()
                leaving.cancel()
                await asyncio.gather(sending, leaving, return_exceptions=True)

    @staticmethod
    async def _until_done(scope: Scope, tasks: set[asyncio.Task[None]]) -> None:
        """Wait until one of the tasks is done, or the access token is revoked or has expired."""
        access: Access | None = scope.get("access")
        while True:
            done, _ = await asyncio.wait(
                tasks, timeout=None if access is None else _LOOK_S, return_when=asyncio.FIRST_COMPLETED
            )
            if done or (access is not None and not access.holds(scope["grant"])):
                return

    async def _send(self, events: AsyncIterator[bytes], send: Send) -> None:
        stalled_s = self._settings.stream_stalled_ms / 1000
        async for event in events:
            try:
                async with asyncio.timeout(stalled_s):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except TimeoutError:
                self._metrics.inc(m.STREAMS_STALLED)
                return  # without an end: the server breaks the connection off
        await send({"type": "http.response.body", "body": b""})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
