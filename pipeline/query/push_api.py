"""Routes that take metrics as other programs push them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import pipeline.metrics as m
from pipeline.core.grants import Bounds
from pipeline.core.token import Token
from pipeline.errors import Invalid
from pipeline.left_out import LeftOut
from pipeline.metrics import Metrics
from pipeline.ports import Ingest, Pushed, Refusal
from pipeline.query.bodies import PUSH_TYPES
from pipeline.query.idempotency import HEADER as KEY_HEADER
from pipeline.query.idempotency import UsedKeys, parse_key
from pipeline.query.problems import Refused
from pipeline.query.responses import LeftOutLine, MetricsAccepted
from pipeline.query.tenants import pushed_within
from pipeline.settings import QuerySettings

OPENMETRICS_PATH = "/v1/openmetrics"
_TEXT = "openmetrics"
_REFUSED_SHOWN_MAX = 10
Work = Callable[[bytes, Headers], Any]
"""Makes the answer to a body, in a thread."""
Take = Callable[..., Coroutine[Any, Any, Response]]
"""Answers a request with a body. Arguments: the request, the work, and the media types that the body may have."""
ParsePushed = Callable[[bytes, str, int, int], Pushed]
"""Parses a text of metrics. Arguments: body, media type, most samples, most bytes of a line."""


class Pushes:
    """Publishes pushed metrics, and counts what it leaves out."""

    def __init__(
        self,
        ingest: Ingest,
        parse: ParsePushed,
        settings: QuerySettings,
        metrics: Metrics,
        keys: UsedKeys,
        left_out: LeftOut,
    ) -> None:
        self._ingest = ingest
        self._parse = parse
        self._settings = settings
        self._metrics = metrics
        self._keys = keys
        self._left_out = left_out

    def routes(self, take: Take) -> list[Route]:
        """Return the routes; `take` answers a request by what is made of its body."""

        async def push_text(request: Request) -> Response:
            return await take(request, partial(self._take_text, request.scope["grant"].bounds), *PUSH_TYPES)

        return [Route(OPENMETRICS_PATH, push_text, methods=["POST"])]

    def _take_text(self, bounds: Bounds | None, body: bytes, headers: Headers) -> MetricsAccepted:
        """Publish a text of metrics; `Invalid` or `Forbidden` if no line of it can be taken."""
        with self._keys.using(OPENMETRICS_PATH, parse_key(headers.getlist(KEY_HEADER)), body, bounds) as key:
            content_type = headers.get("content-type", "")
            most = self._settings.deltas_max
            pushed = self._parse(body, content_type, most, self._settings.openmetrics_line_bytes_max)
            if not pushed.whole:
                raise Refused(413, f"too many samples in one request; at most {most}")
            pushed = pushed_within(pushed, bounds, whole=key is not None)
            token, unfit = self._ingest.fitting(pushed.deltas, key) if pushed.deltas else (Token(), [])
            return self._answer(pushed, token, unfit)

    def _answer(self, pushed: Pushed, token: Token, unfit: list[Refusal]) -> MetricsAccepted:
        refused = sorted([*pushed.refused, *[it._replace(line=pushed.lines[it.line]) for it in unfit]])
        reasons = Counter([it.reason for it in refused])
        accepted = len(pushed.deltas) - len(unfit)
        self._metrics.inc(m.INGEST_LINES, accepted + len(refused), _TEXT)
        firsts = {it.reason: it for it in reversed(refused)}
        for reason, count in reasons.items():
            self._left_out.add(_TEXT, reason, f"line {firsts[reason].line}: {firsts[reason].detail}", count)
        if refused and not accepted:
            raise Invalid(f"nothing could be taken; line {refused[0].line}: {refused[0].reason}: {refused[0].detail}")
        first = [LeftOutLine(it.line, it.reason, it.detail) for it in refused[:_REFUSED_SHOWN_MAX]]
        return MetricsAccepted(accepted, len(refused), dict(reasons), first, str(token))
