"""The outermost layer of the HTTP application: counts, times and bounds requests, and answers errors with problems."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import pipeline.metrics as m
from pipeline.budget import ClientGone
from pipeline.core.grants import EVERYTHING, NOTHING
from pipeline.errors import NotReady, PipelineError, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock
from pipeline.query.access import READ_NEEDED, Access, check_grant, is_open, keeps_bounds, needed_of
from pipeline.query.cross_origin import ALWAYS, CrossOriginProtection
from pipeline.query.openapi import READ_PATH
from pipeline.query.problems import Refused, problem
from pipeline.query.streams_api import EVENT_STREAM
from pipeline.settings import QuerySettings

_log = logging.getLogger(__name__)
_CLIENT_GONE = 499
_VIEWS = READ_PATH.partition("{")[0]
OPERATIONS = frozenset(("/healthz", "/readyz", "/metrics"))
"""Paths that are answered beyond all limits on connections and requests."""


class ReadApp(Protocol):
    """The application that answers reads of views."""

    async def answer(self, view: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a read of a view. Raises what the read raises."""
        ...


def _refused(error: HTTPException, request: Request) -> Refused:
    headers: Mapping[str, str] = error.headers or {}
    if error.status_code == 404:
        return Refused(404, f"nothing is at {request.url.path[:200]!r}; /docs says what there is", headers)
    if error.status_code == 405:
        return Refused(405, f"{request.method[:20]} is not for {request.url.path[:200]!r}", headers)
    return Refused(error.status_code, str(error.detail), headers)


async def show_problem(request: Request, error: Exception) -> Response:
    """Return the response that says what is wrong with a request."""
    if isinstance(error, HTTPException):
        error = _refused(error, request)
    return _problem_response(request.scope, error)


def note_refusal(scope: Scope, error: Exception) -> None:
    """Count an error by which a request is refused for want of rights."""
    access: Access | None = scope.get("access")
    if access is not None:
        access.note(error)


def _problem_response(scope: Scope, error: Exception) -> Response:
    note_refusal(scope, error)
    answer = problem(error)
    if not isinstance(error, PipelineError | Refused):
        _log.exception("%s %s", scope["method"], scope["path"])
    elif answer.status >= 500 and not isinstance(error, Refused | NotReady | Unavailable):
        _log.error("%s %s: %s: %s", scope["method"], scope["path"], type(error).__name__, error)
    return Response(answer.body, answer.status, headers=answer.headers)


class Scoped:
    """A route's application, for those only whose grant has a scope that the route needs."""

    def __init__(self, app: ASGIApp, path: str, methods: Iterable[str]) -> None:
        self._app = app
        self._needed = {it: (needed_of(it, path), keeps_bounds(it, path)) for it in methods}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        needed, bounds = self._needed[scope["method"]]
        check_grant(scope["grant"], needed, keeps_bounds=bounds)
        await self._app(scope, receive, send)


class Guard:
    """Counts, times and bounds the requests of the application, and turns unexpected errors into problems.

    It answers reads of views itself, because the way through Starlette's router costs more than a point read.
    """

    def __init__(
        self,
        app: ASGIApp,
        read: ReadApp | None,
        paths: Mapping[Any, str],
        settings: QuerySettings,
        metrics: Metrics,
        clock: Clock,
        access: Access | None = None,
    ) -> None:
        self._app = app
        self._read = read
        self._paths = paths
        self._connections_max = settings.connections_max
        self._protection = CrossOriginProtection(settings, metrics)
        self._metrics = metrics
        metrics.inc(m.READS_REFUSED, 0, "connections_max")
        self._clock = clock
        self._access = access
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = self._clock.monotonic_s()
        status = _CLIENT_GONE
        counted = True
        waiting = body_is_there = False
        more = ALWAYS

        def done() -> None:
            nonlocal counted
            if counted:
                counted = False
                self._open -= not waiting
                # Not the path of the request: a client could make any number of them.
                path = self._paths.get(scope.get("endpoint"), "unmatched")
                self._metrics.inc(m.REQUESTS, 1, path, status)
                self._metrics.observe(m.REQUEST_SECONDS, self._clock.monotonic_s() - started_s, path)

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *more]
                if (b"content-type", EVENT_STREAM.encode()) in message["headers"]:
                    done()  # `streams_max` bounds streams, which stay open
            await send(message)

        async def receiving() -> Message:
            nonlocal waiting, body_is_there
            if body_is_there or not counted:
                return await receive()
            waiting = True  # `body_timeout_ms` and `sockets_max` bound requests whose bodies are not there
            self._open -= 1
            try:
                message = await receive()
                body_is_there = not message.get("more_body")
                return message
            finally:
                waiting = False
                self._open += counted

        self._open += 1
        try:
            if self._open > self._connections_max and scope["path"] not in OPERATIONS:
                self._metrics.inc(m.READS_REFUSED, 1, "connections_max")
                raise Unavailable(f"{self._open - 1} requests are open; no more are taken")
            headers = dict(scope["headers"])
            more = self._protection.check(scope, headers)
            if (preflight := self._protection.preflight(scope, headers)) is not None:
                await Response(status_code=204, headers=preflight)(scope, receive, noting)
                return
            view = self._viewed(scope)
            self._admit(scope)
            if view and self._read is not None:
                scope["endpoint"] = self._read
                check_grant(scope["grant"], READ_NEEDED, keeps_bounds=True)
                await self._read.answer(view, scope, receive, noting)
            else:
                await self._app(scope, receiving, noting)
        except (ClientDisconnect, ClientGone):
            pass
        except Exception as error:
            response = _problem_response(scope, error)
            if status != _CLIENT_GONE:
                raise  # a part of the answer is sent: the server must break off the connection
            await response(scope, receive, noting)
        finally:
            done()

    def _admit(self, scope: Scope) -> None:
        """Put into the scope what the request may do. Raises `Unauthenticated` if that needs a token, and it has none."""
        if self._access is None:
            scope["grant"] = EVERYTHING
            return
        scope["access"] = self._access
        scope["grant"] = NOTHING if is_open(scope["path"]) else self._access.grant_of(scope["headers"])

    @staticmethod
    def _viewed(scope: Scope) -> str:
        """Return the view that `READ_PATH` has in a path; empty if this is no read of one."""
        path: str = scope["path"]
        view = path.removeprefix(_VIEWS) if scope["method"] == "GET" and path.startswith(_VIEWS) else ""
        return "" if "/" in view else view
