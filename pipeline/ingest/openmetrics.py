"""Parses pushed metrics, in OpenMetrics or in the Prometheus text format, line by line.

A wrong line is left out with a reason, and stops no other line. This module keeps what spans lines: the types of families,
and the `# EOF` that ends OpenMetrics. Exemplars are cut off unread. The work is linear in the length of the text: the
patterns never give back what they have matched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import inf, isnan
from typing import NamedTuple

from pipeline.budget import CHECK_EVERY, check_budget
from pipeline.core.exposition import bound_text
from pipeline.ingest.totals import stream_digest
from pipeline.ports import RawDelta, Refusal
from pipeline.pushed import Pushed, RunningTotal

OPENMETRICS = "application/openmetrics-text"
_ADD, _BUCKET, _NEWEST, _NEWEST_BUCKET, _CREATED, _QUANTILE, _NONE = (
    "add", "bucket", "newest", "newest bucket", "created", "quantile", "none",
)  # fmt: skip
_DISTRIBUTION = {"_sum": _ADD, "_count": _ADD, "_created": _CREATED}
_VALUE = {"": _NEWEST}
_ROLES = {
    "counter": {"_total": _ADD, "_created": _CREATED},
    "histogram": {**_DISTRIBUTION, "_bucket": _BUCKET, "": _NONE},
    "summary": {**_DISTRIBUTION, "": _QUANTILE},
    "gaugehistogram": {"_bucket": _NEWEST_BUCKET, "_gsum": _NEWEST, "_gcount": _NEWEST},
    "gauge": _VALUE,
    "info": _VALUE,
    "stateset": _VALUE,
    "unknown": _VALUE,
    "untyped": _VALUE,
}
"""By type of family, the role of a sample by its suffix. A sample of no family is the newest value of a view of its name."""
_DETAIL_MAX = 200
_LINE = re.compile(rb"\s*+(?:#(?![ \t]*+(?:TYPE|EOF))[^\n]*+\s*+)*+([^\n]*+)")
"""Blank lines and comments, and a line behind them."""
_NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*+"
_LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*+)[ \t]*+=[ \t]*+"([^"\\]*+(?:\\.[^"\\]*+)*+)"[ \t]*+'
_UNCAPTURED = _LABEL.replace("([", "(?:[")
_SAMPLE = re.compile(
    rf"({_NAME})[ \t]*+(?:\{{[ \t]*+((?:{_UNCAPTURED}(?:,[ \t]*+|(?=\}})))*+)\}}[ \t]*+|(?<=[ \t]))"
    r"([^ \t]++)(?:[ \t]++([^ \t#]++))?+[ \t]*+(?:#.*+)?+\Z",
    re.DOTALL,
)
"""Name, labels, value and timestamp, and behind them an exemplar."""
_LABELS = re.compile(_LABEL)
_TYPE = re.compile(rf"#[ \t]*+TYPE[ \t]++({_NAME})[ \t]++([a-z]++)\Z")
_IS_TYPE = re.compile(r"#[ \t]*+TYPE(?![^ \t])")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_ESCAPES = {"n": "\n", '"': '"', "\\": "\\"}
_INT = re.compile(r"[+-]?+[0-9]{1,2400}+\Z", re.ASCII)
_FLOAT = re.compile(r"[+-]?+(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++)(?:[eE][+-]?+[0-9]++)?+\Z", re.ASCII)
_NOT_FINITE = re.compile(r"[+-]?+(?:nan|inf(?:inity)?+)\Z", re.IGNORECASE | re.ASCII)
_NUMBER_LENGTH_MAX = 2_400
_CREATED_MAX = 2**33
"""Seconds since 1970 that no time of creation reaches."""
_UNCREATED = "a total without _created: it may repeat what was pushed before; POST /v1/openmetrics takes increases"
_Key = tuple[str, tuple[tuple[str, str], ...]]
"""Name of a family, and labels."""


class _Wrong(Exception):
    """A line that is left out."""

    def __init__(self, reason: str, detail: object) -> None:
        self.reason = reason
        self.detail = str(detail)[:_DETAIL_MAX]


class _Role(NamedTuple):
    name: str
    """Name of the view."""
    does: str


def parse_pushed(
    body: bytes,
    content_type: str,
    samples_max: int,
    line_bytes_max: int,
    grouping: Mapping[str, str] | None = None,
) -> Pushed:
    """Parse a text line by line, up to `samples_max` samples and as many declarations of types.

    The media type decides between OpenMetrics and the Prometheus text format, which is the default.

    With a `grouping` the text is of a group of a Pushgateway: each sample gets these labels, in place of labels of its own
    with these names, and what would be a sum's delta is a total since the time of its creation.
    """
    reader = _Reader(openmetrics=content_type.partition(";")[0].strip().lower() == OPENMETRICS, grouped=bool(grouping))
    deltas: list[RawDelta] = []
    lines: list[int] = []
    refused: list[Refusal] = []
    number = 0
    for number, line in _lines(body):
        if number % CHECK_EVERY == 0:
            check_budget()
        try:
            if len(line) > line_bytes_max:
                raise _Wrong("line_long", f"{len(line)} bytes; at most {line_bytes_max}")
            delta = reader.read(line)
        except _Wrong as wrong:
            refused.append(Refusal(number, wrong.reason, wrong.detail))
        else:
            if delta is not None:
                deltas.append(delta)
                lines.append(number)
        if max(len(deltas) + len(refused), reader.type_count) > samples_max:
            return Pushed(deltas, lines, refused, whole=False)
    if reader.unended and number:
        refused.append(Refusal(number, "eof", "there is no # EOF: some of it may be missing"))
    pushed = Pushed(deltas, lines, refused)
    return _grouped(pushed, grouping, reader.created) if grouping else pushed


def _grouped(pushed: Pushed, grouping: Mapping[str, str], created: Mapping[_Key, float]) -> Pushed:
    deltas: list[RawDelta] = []
    lines: list[int] = []
    totals: list[RunningTotal] = []
    refused = [*pushed.refused]
    group = tuple(sorted(grouping.items()))
    for delta, line in zip(pushed.deltas, pushed.lines, strict=True):
        of_group = {**delta.labels, **grouping}
        grouped = RawDelta(delta.view, delta.kind, of_group, delta.value, delta.ts_ms, monotone=delta.monotone)
        if delta.kind != "sum":
            deltas.append(grouped)
            lines.append(line)
            continue
        family, _, suffix = delta.view.rpartition("_")
        series = labels = _present(delta.labels)
        if suffix == "bucket":
            series = tuple([label for label in labels if label[0] != "le"])
        start_s = created.get((family, series))
        if start_s is None:
            refused.append(Refusal(line, "created", f"{delta.view[:80]}: {_UNCREATED}"))
        else:
            start_ns = round(start_s * 1e9)
            stream = stream_digest(group, delta.view, labels, start_ns)
            totals.append(RunningTotal(line, stream, start_ns, 0, [grouped]))
    return Pushed(deltas, lines, refused, totals=totals)


def _present(labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the labels in order, without empty ones, which are none."""
    return tuple(sorted([label for label in labels.items() if label[1]] if "" in labels.values() else labels.items()))


def _lines(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the content of each line that is neither blank nor a comment."""
    number, end = 1, 0
    for found in _LINE.finditer(body):
        if found[1]:
            number += body.count(b"\n", end, found.start(1))
            end = found.end()
            yield number, found[1]


class _Reader:
    def __init__(self, *, openmetrics: bool, grouped: bool) -> None:
        self._openmetrics = openmetrics
        self._grouped = grouped
        self._ended = False
        self._roles: dict[str, _Role] = {}
        self._type_text = ""
        """The last declaration of a type: a repeat changes nothing."""
        self.type_count = 0
        """Number of declarations of types that were read."""
        self.created: dict[_Key, float] = {}
        """Times of creation, in seconds since 1970, of the series of a group."""

    @property
    def unended(self) -> bool:
        """True if the `# EOF` that OpenMetrics demands has not come."""
        return self._openmetrics and not self._ended

    def read(self, line: bytes) -> RawDelta | None:
        """Return the delta of a line, or None for a comment, a blank line and a creation time."""
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise _Wrong("utf8", error) from None
        if self._ended and text:
            raise _Wrong("eof", "a line behind # EOF")
        if text == "# EOF":
            self._ended = self._openmetrics
        elif text.startswith("#"):
            if text != self._type_text and _IS_TYPE.match(text):
                self._note_type(text)
                self._type_text = text
        elif text:
            return self._delta(text)
        return None

    def _note_type(self, text: str) -> None:
        self.type_count += 1
        found = _TYPE.match(text)
        roles = _ROLES.get(found[2]) if found else None
        if found is None or roles is None:
            raise _Wrong("type", text)
        name = found[1]
        if found[2] == "counter":  # a sample has the declared name, or that with the suffix, or both of them have it
            name = name.removesuffix("_total") or name
            total = _Role(f"{name}_total", _ADD)
            self._roles |= {found[1]: total, total.name: total, f"{name}_created": _Role("", _CREATED)}
            return
        for suffix, does in roles.items():
            before = self._roles.get(name + suffix)
            if does == _NEWEST and before is not None and before.does == _CREATED:
                continue  # the text format declares creation times as a gauge
            self._roles[name + suffix] = _Role(name + suffix, does)

    def _delta(self, text: str) -> RawDelta | None:
        found = _SAMPLE.match(text)
        if found is None:
            raise _Wrong("syntax", f"not a sample: {text}")
        name, labels_text, value_text, ts_text = found.groups()
        labels = _labels(labels_text) if labels_text else {}
        value = _value(value_text)
        role = self._roles.get(name) or _Role(name, _NEWEST)
        if role.does == _CREATED:
            if self._grouped and 0 < value < _CREATED_MAX:
                self.created[name.removesuffix("_created"), _present(labels)] = value
            return None
        if role.does == _QUANTILE:
            raise _Wrong("quantile", f"{name}: quantiles can't be added up")
        if role.does == _NONE:
            raise _Wrong("suffix", f"{name} is a histogram: it has _bucket, _sum and _count")
        if role.does in (_BUCKET, _NEWEST_BUCKET):
            labels["le"] = _boundary(name, labels)
        if role.does in (_NEWEST, _NEWEST_BUCKET):
            return RawDelta(role.name, "last", labels, value, self._ts_ms(ts_text))
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return RawDelta(role.name, "sum", labels, value, monotone=True)

    def _ts_ms(self, text: str | None) -> int | None:
        if text is None:
            return None
        try:
            if not self._openmetrics:
                return int(text) if _INT.match(text) else round(_number(text))
            return int(text) * 1_000 if _INT.match(text) else round(_number(text) * 1_000)
        except (ValueError, OverflowError):
            raise _Wrong("timestamp", text) from None


def _labels(text: str) -> dict[str, str]:
    pairs = _LABELS.findall(text)
    labels = dict(pairs)
    if len(labels) < len(pairs):
        raise _Wrong("syntax", "a label stands twice")
    if "\\" in text:
        return {name: _ESCAPED.sub(_unescaped, value) for name, value in labels.items()}
    return labels


def _unescaped(found: re.Match[str]) -> str:
    return _ESCAPES.get(found[1], found[0])


def _number(text: str) -> float:
    if len(text) > _NUMBER_LENGTH_MAX or not (_FLOAT.match(text) or _NOT_FINITE.match(text)):
        raise ValueError(text)
    return float(text)


def _value(text: str) -> int | float:
    if _INT.match(text):
        return int(text)
    try:
        return _number(text)
    except ValueError:
        raise _Wrong("syntax", f"not a number: {text}") from None


def _boundary(name: str, labels: Mapping[str, str]) -> str:
    """Return the upper bound of a bucket, spelled as prometheus_client spells it."""
    try:
        bound = _number(labels["le"])
        if isnan(bound):
            raise ValueError
        return "-Inf" if bound == -inf else bound_text(bound)
    except (KeyError, ValueError):
        raise _Wrong("le", f"{name}: a bucket needs le, its upper bound") from None
