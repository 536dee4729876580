"""Parses the deltas of a body: a JSON array, or one JSON object a line. `Invalid` says which delta is wrong.

A short body is decoded in one call. A long one is cut into deltas first, and a few hundred are decoded at a time: so a body
of too many is refused before they are built, what is built stays small, and other threads get their turn in between.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NoReturn

import msgspec

from pipeline.budget import CHECK_EVERY, check_budget
from pipeline.core.record import LABEL_COUNT_MAX
from pipeline.errors import Invalid
from pipeline.json_errors import Field, is_scalar, json_error, object_error
from pipeline.ports import RawDelta
from pipeline.query.media import NDJSON
from pipeline.query.problems import Refused

WHOLE_BYTES_MAX = 65_536
"""Longest array that is decoded in one call."""
DELTA_BYTES_MAX = 2**20
"""Longest delta; one of valid labels and a valid value is shorter, however it is escaped."""
_RUN_COUNT, _RUN_BYTES = 500, 2**20
"""Deltas, and bytes of them, that are decoded in one call."""
_FIRST = re.compile(rb"[ \t\r\n]*(.?)", re.DOTALL)
_LINE = re.compile(rb"[^\s][^\n]*")
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_FLAT = rb'(?:[^"{}\[\]]++|' + _STRING + rb")*+"
_ITEM = re.compile(rb"[ \t\r\n]*+(\{" + _FLAT + rb"(?:\{" + _FLAT + rb"\}" + _FLAT + rb")*+\})[ \t\r\n]*+([,\]])", re.DOTALL)
"""A delta in an array, and what follows it: an object, with objects in it that have none."""
_EMPTY = re.compile(rb"[ \t\r\n]*+\][ \t\r\n]*+\Z")


class _Delta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    view: str
    kind: str
    value: int | float | str | bool | None
    labels: dict[str, str] = {}
    ts_ms: int | None = None
    window_s: int | None = None
    monotone: bool | None = None
    retention_s: int | None = None
    spread: int | None = None


_decode_delta = msgspec.json.Decoder(_Delta).decode
_decode_array = msgspec.json.Decoder(list[_Delta]).decode
_split_array = msgspec.json.Decoder(list[msgspec.Raw]).decode
_MALFORMED = (msgspec.MsgspecError, ValueError, RecursionError)
_TEXT = Field("a text", lambda it: isinstance(it, str))
_INT = Field("an int or null", lambda it: it is None or type(it) is int, required=False)
_FIELDS = {
    "view": _TEXT,
    "kind": _TEXT,
    "value": Field("a text, a number, true, false or null", is_scalar),
    "labels": Field(
        "an object of texts",
        lambda it: isinstance(it, dict) and all(isinstance(value, str) for value in it.values()),
        required=False,
    ),
    "ts_ms": _INT,
    "window_s": _INT,
    "monotone": Field("true, false or null", lambda it: it is None or isinstance(it, bool), required=False),
    "retention_s": _INT,
    "spread": _INT,
}


def _fault(delta: bytes, error: Exception) -> str:
    return object_error(delta, _FIELDS, others=False) or str(error)


def parse_deltas(body: bytes, content_type: str, deltas_max: int) -> list[RawDelta]:
    """Return the deltas of a body. Raises `Refused` if there are more than `deltas_max`."""
    match = _FIRST.match(body)
    first = match[1] if match else b""
    lines = content_type.partition(";")[0].strip().lower() == NDJSON or first == b"{"
    if not lines and first != b"[":
        raise Invalid("deltas: a JSON array of objects is needed, or one JSON object a line")
    if lines:
        return _lines(body, deltas_max)
    if len(body) > WHOLE_BYTES_MAX:
        return _long_array(body, deltas_max)
    deltas = _array(body)
    if len(deltas) > deltas_max:
        _refuse_more(deltas_max)
    return deltas


def _refuse_more(deltas_max: int) -> NoReturn:
    raise Refused(413, f"too many deltas in one request; at most {deltas_max}")


def _raw(deltas: Sequence[_Delta], first: int = 0, what: str = "delta") -> list[RawDelta]:
    for number, it in enumerate(deltas, start=first):
        if len(it.labels) > LABEL_COUNT_MAX:
            raise Invalid(f"{what} {number}: {len(it.labels)} labels; at most {LABEL_COUNT_MAX}")
    return [
        RawDelta(d.view, d.kind, d.labels, d.value, d.ts_ms, d.window_s, d.monotone, d.retention_s, d.spread) for d in deltas
    ]


def _lines(body: bytes, deltas_max: int) -> list[RawDelta]:
    deltas: list[RawDelta] = []
    number, counted = 1, 0
    for match in _LINE.finditer(body):
        if len(deltas) >= deltas_max:
            _refuse_more(deltas_max)
        if len(deltas) % CHECK_EVERY == 0:
            check_budget()
        number += body.count(b"\n", counted, match.start())
        counted = match.start()
        line = match[0]
        if len(line) > DELTA_BYTES_MAX:
            raise Invalid(f"line {number}: {len(line)} bytes; at most {DELTA_BYTES_MAX}")
        try:
            delta = _decode_delta(line)
        except _MALFORMED as error:
            raise Invalid(f"line {number}: {_fault(line, error)}") from None
        deltas += _raw([delta], number, "line")
    return deltas


def _array(body: bytes, first: int = 0) -> list[RawDelta]:
    """Return the deltas of a short array. `first` is the number of its first delta in messages."""
    try:
        return _raw(_decode_array(body), first)
    except _MALFORMED as error:
        whole = error
    try:
        parts = _split_array(body)
    except _MALFORMED as error:
        raise Invalid(f"deltas: not a JSON array: {json_error(body) or error}") from None
    for number, part in enumerate(parts, start=first):
        try:
            _decode_delta(part)
        except _MALFORMED as error:
            raise Invalid(f"delta {number}: {_fault(bytes(part), error)}") from None
    raise Invalid(f"deltas: {whole}")


def _long_array(body: bytes, deltas_max: int) -> list[RawDelta]:
    deltas: list[RawDelta] = []
    begin = at = body.index(b"[") + 1
    if _EMPTY.match(body, at):
        return deltas
    count, ended = 0, False
    while not ended:
        item = _ITEM.match(body, at, at + DELTA_BYTES_MAX)
        if item is None:
            raise Invalid(f"delta {count}: {_why_not(body[at : at + WHOLE_BYTES_MAX])}")
        if count >= deltas_max:
            _refuse_more(deltas_max)
        count, at, ended = count + 1, item.end(), item[2] == b"]"
        if ended or count - len(deltas) >= _RUN_COUNT or at - begin >= _RUN_BYTES:
            check_budget()
            deltas += _array(b"[" + body[begin : at - 1] + b"]", len(deltas))
            begin = at
    if body[at:].strip(b" \t\r\n"):
        raise Invalid(f"deltas: not a JSON array: not JSON from byte {at} on")
    return deltas


def _why_not(begin: bytes) -> str:
    """Return why no delta begins here, as far as a part of the body tells."""
    text = begin.decode(errors="ignore").lstrip()
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return f"not a JSON object with the fields of a delta, or over {DELTA_BYTES_MAX} bytes"
    item = text[:end].encode(errors="replace")
    return object_error(item, _FIELDS, others=False) or "not followed by a comma or the end of the array"
