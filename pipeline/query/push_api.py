"""Routes that take metrics as other programs push them: as text, also at the paths of a Pushgateway."""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import pipeline.metrics as m
from pipeline.core.grants import Bounds
from pipeline.core.record import NAME
from pipeline.core.token import Token
from pipeline.errors import Invalid
from pipeline.left_out import LeftOut
from pipeline.metrics import Metrics
from pipeline.ports import Ingest, Refusal, RequestKey
from pipeline.pushed import Pushed, TotalsPublisher
from pipeline.query.bodies import PUSH_TYPES
from pipeline.query.idempotency import HEADER as KEY_HEADER
from pipeline.query.idempotency import UsedKeys, parse_key, path_within
from pipeline.query.problems import Refused
from pipeline.query.responses import LeftOutLine, MetricsAccepted
from pipeline.query.tenants import pushed_within
from pipeline.settings import QuerySettings

OPENMETRICS_PATH = "/v1/openmetrics"
GATEWAY_PATH = "/metrics/{grouping:path}"
"""Path of a Pushgateway, whose clients name labels in it."""
_TEXT = "openmetrics"
_REFUSED_SHOWN_MAX = 10
_TOTALS = (
    "totals at the paths of a Pushgateway are taken by `pipeline up`, or with otlp_totals; else push increases to "
    f"{OPENMETRICS_PATH}"
)
Work = Callable[[bytes, Headers], Any]
"""Makes the answer to a body, in a thread."""
Take = Callable[..., Coroutine[Any, Any, Response]]
"""Answers a request with a body. Arguments: the request, the work, and the media types that the body may have."""
ParsePushed = Callable[[bytes, str, int, int, Mapping[str, str]], Pushed]
"""Parses a text of metrics. Arguments: body, media type, most samples, most bytes of a line, labels of a group or none."""


class Pushes:
    """Publishes pushed metrics, and counts what it leaves out.

    A push to a path of a Pushgateway has totals, because the next one of its group would replace it there.
    """

    def __init__(
        self,
        ingest: Ingest,
        parse: ParsePushed,
        settings: QuerySettings,
        metrics: Metrics,
        keys: UsedKeys,
        left_out: LeftOut,
        totals: TotalsPublisher | None = None,
    ) -> None:
        """Without `totals`, those of groups are refused."""
        self._ingest = ingest
        self._parse = parse
        self._totals = totals
        self._settings = settings
        self._metrics = metrics
        self._keys = keys
        self._left_out = left_out

    def routes(self, take: Take) -> list[Route]:
        """Return the routes; `take` answers a request by what is made of its body."""

        async def push_text(request: Request) -> Response:
            work = partial(self._take_text, OPENMETRICS_PATH, request.scope["grant"].bounds)
            return await take(request, work, *PUSH_TYPES)

        async def push_group(request: Request) -> Response:
            path = request.scope["raw_path"].decode("ascii", "replace")
            return await take(request, partial(self._take_text, path, request.scope["grant"].bounds), *PUSH_TYPES)

        return [
            Route(OPENMETRICS_PATH, push_text, methods=["POST"]),
            Route(GATEWAY_PATH, push_group, methods=["POST", "PUT"]),
        ]

    def _take_text(self, path: str, bounds: Bounds | None, body: bytes, headers: Headers) -> MetricsAccepted:
        """Publish a text of metrics; `Invalid` or `Forbidden` if no line of it can be taken."""
        grouping = {} if path == OPENMETRICS_PATH else parse_grouping(path)
        with self._keys.using(path, parse_key(headers.getlist(KEY_HEADER)), body, bounds) as key:
            content_type = headers.get("content-type", "")
            most = self._settings.deltas_max
            pushed = self._parse(body, content_type, most, self._settings.openmetrics_line_bytes_max, grouping)
            if not pushed.whole:
                raise Refused(413, f"too many samples or types in one request; at most {most}")
            pushed = pushed_within(pushed, bounds, whole=key is not None)
            request = RequestKey(path_within(path, bounds), "", sha256(body).digest())
            token, unfit = self._publish(pushed, request, key, bounds)
            return self._answer(pushed, token, unfit)

    def _publish(
        self, pushed: Pushed, request: RequestKey, key: RequestKey | None, bounds: Bounds | None
    ) -> tuple[Token, list[Refusal]]:
        """Publish totals and deltas; return the token, and what was left out, by line.

        Totals have a key of their own, `request`, which no header can have.
        """
        token, refused = Token(), list[Refusal]()
        if pushed.totals and self._totals is None:
            refused = [Refusal(it.line, "cumulative", _TOTALS) for it in pushed.totals]
        elif pushed.totals and self._totals is not None:
            token, refused = self._totals.publish(pushed.totals, request, bounds)
        if pushed.deltas:
            newer, unfit = self._ingest.fitting(pushed.deltas, key, bounds)
            token, refused = token | newer, refused + [it._replace(line=pushed.lines[it.line]) for it in unfit]
        return token, refused

    def _answer(self, pushed: Pushed, token: Token, unfit: Sequence[Refusal]) -> MetricsAccepted:
        refused = sorted([*pushed.refused, *unfit])
        reasons = Counter([it.reason for it in refused])
        accepted = len(pushed.deltas) + len(pushed.totals) - len(unfit)
        self._metrics.inc(m.INGEST_LINES, accepted + len(refused), _TEXT)
        firsts = {it.reason: it for it in reversed(refused)}
        for reason, count in reasons.items():
            self._left_out.add(_TEXT, reason, f"line {firsts[reason].line}: {firsts[reason].detail}", count)
        if refused and not accepted:
            raise Invalid(f"nothing could be taken; line {refused[0].line}: {refused[0].reason}: {refused[0].detail}")
        first = [LeftOutLine(it.line, it.reason, it.detail) for it in refused[:_REFUSED_SHOWN_MAX]]
        return MetricsAccepted(accepted, len(refused), dict(reasons), first, str(token))


def parse_grouping(path: str) -> dict[str, str]:
    """Return the labels of a path `/metrics/job/NAME/LABEL/VALUE...`, as a Pushgateway reads it; `Invalid` if it can't.

    A value of a label `LABEL@base64` is in the alphabet for URLs, with or without its padding.
    """
    parts = path.removesuffix("/").split("/")[2:]
    if not parts or len(parts) % 2 or parts[0].partition("@")[0] != "job":
        raise Invalid("the path of a push is /metrics/job/NAME, and then perhaps pairs of /LABEL/VALUE")
    labels: dict[str, str] = {}
    for part, text in zip(parts[::2], parts[1::2], strict=True):
        name, at, encoding = unquote(part).partition("@")
        if not NAME.match(name) or (at and encoding != "base64") or name in labels or name == "le":
            raise Invalid(f"no name of a label, one that stands twice in the path, or that of buckets: {part!r:.200}")
        try:
            labels[name] = _decoded(text) if at else unquote(text, errors="strict")
        except ValueError:
            raise Invalid(f"label {name}: {text!r:.200} is not UTF-8 text{' in base64' * bool(at)}") from None
    if not labels["job"]:
        raise Invalid("the job of a push has a name")
    return labels


def _decoded(text: str) -> str:
    """Return the text of unpadded or padded base64; `ValueError` if it is none."""
    text = text.rstrip("=")
    if not text.replace("-", "a").replace("_", "a").isalnum() and text:
        raise ValueError(text)
    try:
        return urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    except binascii.Error as error:
        raise ValueError(text) from error
