"""Media types of answers: which one a request prefers, and how an answer is written in it."""

from __future__ import annotations

import csv
import io
from typing import Any, NamedTuple

import msgspec

from pipeline.core.answer import Answer
from pipeline.core.tables import columns, value_text

JSON = "application/json"
CSV = "text/csv"
NDJSON = "application/x-ndjson"
_KNOWN = (JSON, CSV, NDJSON)
_encode = msgspec.json.Encoder().encode
Header = tuple[bytes, bytes]


class Encoded(NamedTuple):
    """The body of an answer, and its headers."""

    body: bytes
    headers: list[Header]


def preferred(accept: str) -> str:
    """Return the media type that an Accept header prefers; JSON if it prefers none of ours, or can't be read."""
    if "csv" not in accept and "ndjson" not in accept:
        return JSON
    wanted: dict[str, float] = {}
    for item in accept.lower().split(","):
        name, *parameters = [part.strip() for part in item.split(";")]
        quality = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "q":
                try:
                    quality = float(value)
                except ValueError:
                    quality = 0.0
        wanted[name] = max(quality, wanted.get(name, 0.0))

    def quality_of(name: str) -> float:
        kind = name.partition("/")[0]
        return wanted.get(name, wanted.get(f"{kind}/*", wanted.get("*/*", 0.0)))

    best = max(_KNOWN, key=quality_of)  # of equals, the first
    return best if quality_of(best) > 0 else JSON


def encode_answer(answer: Answer, media_type: str) -> Encoded:
    """Return an answer in one of our media types; rows say in headers what JSON says beside its series."""
    if media_type == JSON:
        body = _encode(answer)
        return Encoded(body, [(b"content-type", JSON.encode()), (b"content-length", b"%d" % len(body))])
    body = to_csv(answer) if media_type == CSV else to_ndjson(answer)
    charset = b"; charset=utf-8; header=present" if media_type == CSV else b""
    headers = [(b"content-type", media_type.encode() + charset), (b"content-length", b"%d" % len(body))]
    return Encoded(body, headers + _said(answer))


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
    return found


def to_csv(answer: Answer) -> bytes:
    """Return the rows as CSV (RFC 4180), in UTF-8, with a head; starts are ms since 1970, in a column `start_ms`."""
    it = columns(answer)
    out = io.StringIO()
    write = csv.writer(out)
    starts = [] if it.start is None else [f"{it.start}_ms"]
    write.writerow([*it.labels, *starts, it.value])
    cells: list[list[Any]] = [*it.labels.values()]
    if it.start is not None:
        cells.append(it.starts)
    write.writerows(zip(*cells, map(value_text, it.values), strict=True))
    return out.getvalue().encode()


def to_ndjson(answer: Answer) -> bytes:
    """Return the rows as JSON objects, one a line: `labels`, `start_ms` where there are points, and `value`."""
    if answer.step_ms is None:
        lines = [_encode({"labels": series.labels, "value": series.value}) for series in answer]
    else:
        lines = [
            _encode({"labels": series.labels, "start_ms": start_ms, "value": value})
            for series in answer
            for start_ms, value in series.points
        ]
    return b"".join([line + b"\n" for line in lines])
