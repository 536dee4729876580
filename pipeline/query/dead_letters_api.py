"""Routes of `/v1/dead-letters`, on servers that take deltas: list, show and replay what tasks refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pipeline.core.codec import decode_letter
from pipeline.core.description import describe_letter
from pipeline.core.grants import Bounds
from pipeline.errors import Forbidden, Invalid, NotFound, Unavailable
from pipeline.json_errors import Field, object_error
from pipeline.query.dead_letters import DeadLetters, LetterCursor, LetterFilter
from pipeline.query.media import JSON
from pipeline.query.params import single_parameters, whole_number
from pipeline.query.responses import LettersReplayed
from pipeline.settings import QuerySettings

LIST_MAX = 10_000
REPLAY_MAX = 10_000
SERIES_MAX = 100_000
_LIST_DEFAULT, _REPLAY_DEFAULT, _SERIES_DEFAULT = 100, 1_000, 1_000
_AT_ONCE_MAX = 4
"""Most requests that read the topic at once: each can have a few letters of the largest size in memory."""
_OFFSET_MAX = 10**15
_PARTITION_MAX = 1_000_000
_encode = msgspec.json.Encoder().encode
Take = Callable[..., Coroutine[Any, Any, Response]]
"""Answers a request with a body. Arguments: the request, the work, and the media types that the body may have."""
T = TypeVar("T")


class ReplayOrder(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /v1/dead-letters/replay`."""

    keys: list[str] = []
    view: str = ""
    reason: str = ""
    partition: int | None = None
    since_ms: int = 0
    after: str = ""
    limit: int = _REPLAY_DEFAULT
    timeout_ms: int | None = None
    dry_run: bool = False
    forgotten: bool = False


_decode_order = msgspec.json.Decoder(ReplayOrder).decode
_TEXT = Field("a text", lambda it: isinstance(it, str), required=False)
_BOOL = Field("true or false", lambda it: isinstance(it, bool), required=False)
_ORDER = {
    "keys": Field(
        "an array of texts", lambda it: isinstance(it, list) and all(isinstance(key, str) for key in it), required=False
    ),
    "view": _TEXT,
    "reason": _TEXT,
    "partition": Field("an int or null", lambda it: it is None or type(it) is int, required=False),
    "since_ms": Field("an int", lambda it: type(it) is int, required=False),
    "after": _TEXT,
    "limit": Field("an int", lambda it: type(it) is int, required=False),
    "timeout_ms": Field("an int or null", lambda it: it is None or type(it) is int, required=False),
    "dry_run": _BOOL,
    "forgotten": _BOOL,
}


class _LetterService:
    """The three operations. They block: call them in a thread."""

    def __init__(self, letters: DeadLetters, settings: QuerySettings) -> None:
        self._letters = letters
        self._settings = settings
        self._room = threading.BoundedSemaphore(_AT_ONCE_MAX)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        if not self._room.acquire(blocking=False):
            raise Unavailable(f"{_AT_ONCE_MAX} requests read the dead letters already")
        try:
            yield
        finally:
            self._room.release()

    def listing(self, query_string: bytes, bounds: Bounds | None) -> bytes:
        single = single_parameters(query_string, ("view", "reason", "partition", "since_ms", "limit"))
        only = LetterFilter(
            view=single.get("view", ""),
            reason=single.get("reason", ""),
            partition=whole_number(single, "partition", _PARTITION_MAX, least=0),
            since_ms=whole_number(single, "since_ms", _OFFSET_MAX, least=0) or 0,
            bounds=_of_views(bounds),
        )
        limit = whole_number(single, "limit", LIST_MAX) or _LIST_DEFAULT
        with self._reading():
            return _encode(self._letters.listing(only, limit))

    def show(self, query_string: bytes, key: str, bounds: Bounds | None) -> bytes:
        only = LetterFilter(bounds=_of_views(bounds))
        series_max = whole_number(single_parameters(query_string, ("series",)), "series", SERIES_MAX) or _SERIES_DEFAULT
        with self._reading():
            try:
                value = self._letters.get(key)
            except NotFound:
                if bounds is not None:  # a letter that was replayed has no view any more
                    raise _no_letter(key) from None
                raise
        if not only.matches(key, decode_letter(value)):
            raise _no_letter(key)
        return _encode(describe_letter(key.encode(), value, series_max=series_max))

    def replay(self, body: bytes, _: Headers) -> LettersReplayed:
        order = _parse_replay(body)
        timeout_ms = self._settings.timeout_ms_default if order.timeout_ms is None else order.timeout_ms
        _check("timeout_ms", timeout_ms, self._settings.timeout_ms_max)
        with self._reading():
            done = self._letters.replay(
                _letter_filter(order),
                limit=order.limit,
                timeout_s=timeout_ms / 1000,
                dry_run=order.dry_run,
                forgotten=order.forgotten,
            )
        return LettersReplayed(done.outcomes, None if done.after is None else str(done.after))


def letter_routes(letters: DeadLetters, settings: QuerySettings, threads: ThreadPoolExecutor, take: Take) -> list[Route]:
    """Return the routes of the three operations. `take` reads a body and does what is to be done with it in a thread."""
    service = _LetterService(letters, settings)

    async def answered(work: Callable[..., bytes], *args: Any) -> Response:
        body = await asyncio.get_running_loop().run_in_executor(threads, work, *args)
        return Response(body, media_type=JSON)

    async def list_letters(request: Request) -> Response:
        return await answered(service.listing, request.scope["query_string"], request.scope["grant"].bounds)

    async def show_letter(request: Request) -> Response:
        asked = request.scope["query_string"], request.path_params["key"], request.scope["grant"].bounds
        return await answered(service.show, *asked)

    async def replay_letters(request: Request) -> Response:
        return await take(request, service.replay, JSON)

    return [
        Route("/v1/dead-letters", list_letters),
        Route("/v1/dead-letters/replay", replay_letters, methods=["POST"]),
        Route("/v1/dead-letters/{key}", show_letter),
    ]


def _of_views(bounds: Bounds | None) -> Bounds | None:
    """Return the bounds, if they are of views only: a letter can have series of any labels."""
    if bounds is not None and bounds.labels:
        raise Forbidden("a dead letter can have series of others; the access token is bound to some labels")
    return bounds


def _no_letter(key: str) -> NotFound:
    return NotFound(f"there is no dead letter {key[:100]}")


def _parse_replay(body: bytes) -> ReplayOrder:
    try:
        order = _decode_order(body or b"{}")
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Invalid(object_error(body, _ORDER, others=False) or str(error)) from None
    _check("limit", order.limit, REPLAY_MAX)
    if len(order.keys) > REPLAY_MAX:
        raise Invalid(f"{len(order.keys)} keys; at most {REPLAY_MAX}")
    if order.since_ms < 0 or (order.partition is not None and order.partition < 0):
        raise Invalid("since_ms and partition are whole numbers from 0")
    return order


def _letter_filter(order: ReplayOrder) -> LetterFilter:
    after = LetterCursor.parse(order.after) if order.after else None
    return LetterFilter(frozenset(order.keys), order.view, order.reason, order.partition, order.since_ms, after)


def _check(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise Invalid(f"{name}: a whole number from 1 to {most} is needed, got {value}")
