"""Media types of answers: which one a request prefers, and how an answer is written in it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from pipeline.budget import checked
from pipeline.core.answer import Answer, Answers
from pipeline.core.tables import columns, to_arrow_stream, value_text
from pipeline.query.codings import qualities_of
from pipeline.query.found import SERIES_RUN
from pipeline.query.problems import Refused

JSON = "application/json"
CSV = "text/csv"
NDJSON = "application/x-ndjson"
ARROW = "application/vnd.apache.arrow.stream"
_KNOWN = (JSON, CSV, NDJSON, ARROW)
_CONTENT_TYPES = {
    JSON: JSON.encode(),
    CSV: f"{CSV}; charset=utf-8; header=present".encode(),
    NDJSON: NDJSON.encode(),
    ARROW: ARROW.encode(),
}
_encode = msgspec.json.Encoder().encode
_NO_SERIES = b'"series":[]'
_NO_ANSWERS = b'"answers":[]'
Header = tuple[bytes, bytes]
_VARY = (b"vary", b"Accept, Accept-Encoding")
_NO_STORE = (b"cache-control", b"no-store")
"""A browser that keeps answers by itself would show an old body's staleness with a 304."""


class Encoded(NamedTuple):
    """The body of a response in parts, its headers, and its status."""

    parts: Sequence[bytes]
    headers: list[Header]
    status: int = 200


def preferred(accept: str) -> str:
    """Return the media type that an Accept header prefers; JSON if it prefers none of ours, or can't be read.

    Raises `Refused` if it takes nothing but Arrow, and pyarrow is not installed.
    """
    if "csv" not in accept and "ndjson" not in accept and "arrow" not in accept:
        return JSON
    wanted = qualities_of(accept)

    def quality_of(name: str) -> float:
        kind = name.partition("/")[0]
        return wanted.get(name, wanted.get(f"{kind}/*", wanted.get("*/*", 0.0)))

    known = _KNOWN if has_arrow() else _KNOWN[:-1]
    best = max(known, key=quality_of)  # of equals, the first
    if quality_of(best) <= 0 < wanted.get(ARROW, 0.0):
        raise Refused(406, f"{ARROW} needs pyarrow at the server: pip install pyarrow; {', '.join(known)} need nothing")
    return best if quality_of(best) > 0 else JSON


@cache
def has_arrow() -> bool:
    """Return whether pyarrow is installed; it is loaded at the first answer that needs it."""
    return find_spec("pyarrow") is not None


def split(answer: Answer, media_type: str) -> tuple[Answer, bytes]:
    """Return an answer without its series, and the start of its body, up to the end of the series."""
    head = replace(answer, series=[])
    return head, _json_start(answer, head) if media_type == JSON else encode_body(answer, media_type)


def end_of(head: Answer, media_type: str) -> bytes:
    """Return what follows the series in the body of an answer, given the answer without its series."""
    return _encode(head).partition(_NO_SERIES)[2] if media_type == JSON else b""


def encode_body(answer: Answer, media_type: str) -> bytes:
    """Return an answer in one of our media types."""
    if media_type == JSON:
        if not _is_long(answer):
            return _encode(answer)
        head = replace(answer, series=[])
        return _json_start(answer, head) + end_of(head, JSON)
    if media_type == ARROW:
        return to_arrow_stream(answer)
    return to_csv(answer) if media_type == CSV else to_ndjson(answer)


def encode_answers(answers: Answers) -> bytes:
    """Return several answers as JSON."""
    if not any(map(_is_long, answers.answers)):
        return _encode(answers)
    start, _, end = _encode(replace(answers, answers=[])).partition(_NO_ANSWERS)
    parts = [encode_body(it, JSON) for it in answers.answers]
    return b"".join([start, _NO_ANSWERS[:-1], b",".join(parts), b"]", end])


def _is_long(answer: Answer) -> bool:
    series: Any = answer.series
    return not isinstance(series, msgspec.Raw) and len(series) > SERIES_RUN


def _json_start(answer: Answer, head: Answer) -> bytes:
    """Return the JSON of an answer up to the end of its series; a part at a time, so that other threads get their turn."""
    start = _encode(head).partition(_NO_SERIES)[0] + _NO_SERIES[:-1]
    series = answer.series
    if not _is_long(answer):
        return start + _encode(series)[1:]
    parts = [start]
    for i in checked(range(0, len(series), SERIES_RUN)):
        parts += [_encode(series[i : i + SERIES_RUN])[1:-1], b","]
    parts[-1] = b"]"
    return b"".join(parts)


def encoded(
    answer: Answer, media_type: str, etag: bytes, parts: Sequence[bytes], coding: str = "", *, unchanged: bool = False
) -> Encoded:
    """Return a response with the headers of an answer; rows say in headers what JSON says beside its series.

    A page has no entity tag. `unchanged`: the client has the body already, and needs to know only how stale that is.
    """
    headers = [_VARY, _NO_STORE, (b"etag", etag)] if etag else [_VARY, _NO_STORE]
    if unchanged:
        return Encoded((), headers + _said(answer), 304)
    headers += [(b"content-type", _CONTENT_TYPES[media_type]), (b"content-length", b"%d" % sum(map(len, parts)))]
    if coding:
        headers.append((b"content-encoding", coding.encode()))
    return Encoded(parts, headers if media_type == JSON else headers + _said(answer))


def plain_json(parts: Sequence[bytes], coding: str) -> Encoded:
    """Return a response of JSON that is no answer of a view."""
    headers = [(b"content-type", _CONTENT_TYPES[JSON]), (b"content-length", b"%d" % sum(map(len, parts)))]
    headers += [(b"vary", b"Accept-Encoding"), _NO_STORE]
    return Encoded(parts, [*headers, (b"content-encoding", coding.encode())] if coding else headers)


def _said(answer: Answer) -> list[Header]:
    """Return what an answer says beside its rows, as headers."""
    said = {
        "staleness-ms": answer.as_of.staleness_ms,
        "series-total": answer.series_total,
        "final-before-ms": answer.final_before_ms,
        "expired-before-ms": answer.expired_before_ms,
    }
    found = [(f"pipeline-{name}".encode(), b"%d" % value) for name, value in said.items() if value is not None]
    if missing := answer.as_of.missing_partitions:
        found.append((b"pipeline-missing-partitions", ",".join(map(str, missing)).encode()))
    if answer.next_cursor is not None:
        found.append((b"pipeline-next-cursor", answer.next_cursor.encode()))
    return found


def to_csv(answer: Answer) -> bytes:
    """Return the rows as CSV (RFC 4180), in UTF-8, with a head; starts are ms since 1970, in a column `start_ms`."""
    it = columns(answer)
    out = io.StringIO()
    write = csv.writer(out)
    starts = [] if it.start is None else [f"{it.start}_ms"]
    write.writerow([*it.labels, *starts, *(name for name, _ in it.measures())])
    cells: list[list[Any]] = [*it.labels.values()]
    if it.start is not None:
        cells.append(it.starts)
    write.writerows(zip(*cells, *(map(value_text, values) for _, values in it.measures()), strict=True))
    return out.getvalue().encode()


def to_ndjson(answer: Answer) -> bytes:
    """Return the rows as JSON objects, one a line: `labels`, `start_ms` where there are points, `value`, and `compare`."""
    if answer.step_ms is None:
        lines = [_encode({"labels": series.labels, "value": series.value}) for series in answer]
    elif answer.compare_ms is not None:
        lines = [
            _encode({"labels": series.labels, "start_ms": start_ms, "value": value, "compare": before})
            for series in answer
            for (start_ms, value), (_, before) in zip(series.points, series.compare, strict=True)
        ]
    else:
        lines = [
            _encode({"labels": series.labels, "start_ms": start_ms, "value": value})
            for series in answer
            for start_ms, value in series.points
        ]
    return b"".join([line + b"\n" for line in lines])
