"""The route that takes exports of OTLP metrics, as the OTLP/HTTP specification has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from typing import NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import pipeline.metrics as m
from pipeline.core.grants import Bounds
from pipeline.core.protobuf import bytes_field, int_field, text_field
from pipeline.errors import PipelineError
from pipeline.left_out import LeftOut
from pipeline.metrics import Metrics
from pipeline.ports import Ingest, Refusal, RequestKey
from pipeline.pushed import Pushed, TotalsPublisher
from pipeline.query.bodies import OTLP_TYPES, BodyRoom, RequestBodies, TooLargeUnzipped, unzipped
from pipeline.query.fairness import FairTurns, is_gone_of, writer_of
from pipeline.query.guard import note_refusal
from pipeline.query.idempotency import path_within
from pipeline.query.problems import Refused, problem
from pipeline.query.tenants import pushed_within
from pipeline.settings import QuerySettings

OTLP_PATH = "/v1/metrics"
_PROTOCOL = "otlp"
_PROTOBUF, _JSON = OTLP_TYPES
_EXPANDED_MAX = 1_048_576
"""Most bytes that a small compressed body may become without waiting for a turn."""
_CODES = {400: 3, 401: 16, 403: 7, 408: 4, 413: 8, 415: 3, 429: 8, 503: 14}
"""Codes of google.rpc by HTTP status."""
_TOTALS = (
    "totals (cumulative temporality) are taken by `pipeline up`, or with otlp_totals; else export deltas: "
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=delta"
)


class ExportTaking(NamedTuple):
    """Parts that take exports."""

    parse: Callable[[bytes, str, int, Collection[str]], Pushed]
    """Parses an export. Arguments: body, media type, most deltas, resource attributes that become labels."""
    totals: TotalsPublisher | None
    """None: totals are refused."""


class _Taken(NamedTuple):
    answer: bytes
    next_offsets: Mapping[int, int]
    """The offsets behind what was appended, by partition."""
    size: int
    """Bytes of the export, decompressed."""


class _PartialSuccess(msgspec.Struct, rename="camel"):
    rejected_data_points: str
    error_message: str


class _ExportAnswer(msgspec.Struct, rename="camel", omit_defaults=True):
    partial_success: _PartialSuccess | None = None


class _RpcStatus(msgspec.Struct):
    code: int
    message: str


class Exports:
    """Takes exports, and counts the points that it leaves out.

    The bytes of an export identify it, because each has its own times: so a repeat, after 503 or without an answer, counts
    once.
    """

    def __init__(
        self, taking: ExportTaking, ingest: Ingest, settings: QuerySettings, metrics: Metrics, left_out: LeftOut
    ) -> None:
        self._taking = taking
        self._ingest = ingest
        self._settings = settings
        self._metrics = metrics
        self._left_out = left_out
        self._resource_attributes = [it.strip() for it in settings.otlp_resource_attributes.split(",") if it.strip()]

    def route(self, room: BodyRoom, threads: ThreadPoolExecutor, turns: FairTurns) -> Route:
        """Return the route."""
        bodies = RequestBodies(room, self._settings.body_bytes_max, "identity", "gzip")

        async def export(request: Request) -> Response:
            media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            take = partial(self._take, media_type, request.scope["grant"].bounds)
            writer = writer_of(request.scope, request.headers)
            try:
                await turns.wait(writer, is_gone_of(request.scope))
                async with bodies.of(request, *OTLP_TYPES) as body:
                    taken = await self._work(room, request, body, threads, take)
            except (PipelineError, Refused) as error:
                note_refusal(request.scope, error)
                return _refusal(error, media_type)
            turns.note(writer, taken.next_offsets, taken.size)
            return Response(taken.answer, media_type=media_type)

        return Route(OTLP_PATH, export, methods=["POST"])

    async def _work(
        self, room: BodyRoom, request: Request, body: bytes, threads: ThreadPoolExecutor, take: Callable[[bytes], _Taken]
    ) -> _Taken:
        """Return what became of a body. One that is large once it is decompressed waits for its turn, as large ones do."""
        if request.headers.get("content-encoding", "identity") == "identity":
            return await room.work(request, body, threads, partial(take, body))
        most = self._settings.body_bytes_max
        small = min(most, _EXPANDED_MAX)
        try:
            return await room.work(request, body, threads, lambda: take(unzipped(body, small)))
        except TooLargeUnzipped:
            if small == most:
                raise
        return await room.work(request, body, threads, lambda: take(unzipped(body, most)), large=True)

    def _take(self, media_type: str, bounds: Bounds | None, body: bytes) -> _Taken:
        """Publish an export."""
        most = self._settings.deltas_max
        pushed = self._taking.parse(body, media_type, most, self._resource_attributes)
        if not pushed.whole:
            raise Refused(413, f"too many points in one request; at most {most}")
        pushed = pushed_within(pushed, bounds, whole=True)
        path, digest = path_within(OTLP_PATH, bounds), sha256(body).digest()
        next_offsets, refused = dict[int, int](), [*pushed.refused]
        if pushed.totals and self._taking.totals is None:
            refused += [Refusal(it.line, "cumulative", _TOTALS) for it in pushed.totals]
        elif pushed.totals and self._taking.totals is not None:
            token, unfit = self._taking.totals.publish(pushed.totals, RequestKey(path, "totals", digest), bounds)
            next_offsets.update(token.next_offsets)
            refused += unfit
        added = [i for i, it in enumerate(pushed.deltas) if it.kind != "last"]
        newest = [i for i, it in enumerate(pushed.deltas) if it.kind == "last"]
        # A repeat of the newest changes nothing, and one of totals neither: no error comes behind what can count twice.
        for numbers, key in ((newest, None), (added, RequestKey(path, "deltas", digest))):
            if numbers:
                token, unfit = self._ingest.fitting([pushed.deltas[i] for i in numbers], key, bounds)
                next_offsets.update(token.next_offsets)
                refused += [it._replace(line=pushed.lines[numbers[it.line]]) for it in unfit]
        return _Taken(self._answer(media_type, pushed, refused), next_offsets, len(body))

    def _answer(self, media_type: str, pushed: Pushed, refused: Sequence[Refusal]) -> bytes:
        points = {*pushed.lines, *[it.line for it in pushed.totals], *[it.line for it in refused]}
        self._metrics.inc(m.INGEST_LINES, len(points), _PROTOCOL)
        firsts = {it.line: it for it in sorted(refused, reverse=True)}  # one of each point
        examples: dict[str, Refusal] = {}
        for it in firsts.values():
            examples[it.reason] = it
        for reason, count in Counter([it.reason for it in firsts.values()]).items():
            self._left_out.add(_PROTOCOL, reason, examples[reason].detail, count)
        message = "; ".join([f"{reason}: {it.detail}" for reason, it in sorted(examples.items())])
        if media_type == _JSON:
            partial_success = _PartialSuccess(str(len(firsts)), message) if firsts else None
            return msgspec.json.encode(_ExportAnswer(partial_success))
        return bytes_field(1, int_field(1, len(firsts)) + text_field(2, message)) if firsts else b""


def _refusal(error: Exception, media_type: str) -> Response:
    """Return an error as the clients of OTLP read it: a google.rpc.Status in the encoding of the request."""
    it = problem(error)
    code = _CODES.get(it.status, 2)
    if media_type == _PROTOBUF:
        content, shown = int_field(1, code) + text_field(2, it.detail), _PROTOBUF
    else:
        content, shown = msgspec.json.encode(_RpcStatus(code, it.detail)), _JSON
    return Response(content, it.status, {name: value for name, value in it.headers.items() if name != "Content-Type"}, shown)
