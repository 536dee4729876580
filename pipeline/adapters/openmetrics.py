"""Parses pushed metrics, in OpenMetrics or in the Prometheus text format, with prometheus_client's parsers.

Those parsers stop at the first wrong line. So each line is parsed by itself, and this module keeps what spans lines: the
types of families, and the `# EOF` that ends OpenMetrics. Exemplars are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as _parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as _parse_plain
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from pipeline.ports import Pushed, RawDelta, Refusal

OPENMETRICS = "application/openmetrics-text"
_ADD, _BUCKET, _NEWEST, _CREATED, _QUANTILE, _NONE = "add", "bucket", "newest", "created", "quantile", "none"
_DISTRIBUTION = {"_sum": _ADD, "_count": _ADD, "_created": _CREATED}
_ROLES = {
    "counter": {"_total": _ADD, "_created": _CREATED},
    "histogram": {**_DISTRIBUTION, "_bucket": _BUCKET, "": _NONE},
    "summary": {**_DISTRIBUTION, "": _QUANTILE},
}
"""By type of family, the role of a sample by its suffix. In other families each sample is a value of its own."""
_EXEMPLAR = " # {"
_LINE = re.compile(rb"[^\s][^\n]*")
_LINES_A_SAMPLE = 4
"""A family has a type, a unit and a help, which are lines, too."""
_DETAIL_MAX = 200


class _Wrong(Exception):
    """A line that is left out."""

    def __init__(self, reason: str, detail: object) -> None:
        self.reason = reason
        self.detail = str(detail)[:_DETAIL_MAX]


class _Role(NamedTuple):
    name: str
    """Name of the view."""
    does: str


def parse_pushed(body: bytes, content_type: str, samples_max: int, line_bytes_max: int) -> Pushed:
    """Parse a text line by line, up to `samples_max` samples, as many declared types, and a few times as many lines.

    The media type decides between OpenMetrics and the Prometheus text format, which is the default.
    """
    reader = _Reader(openmetrics=content_type.partition(";")[0].strip().lower() == OPENMETRICS)
    deltas: list[RawDelta] = []
    lines: list[int] = []
    refused: list[Refusal] = []
    number = 0
    for count, (number, line) in enumerate(_lines(body), start=1):
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
        if max(len(deltas) + len(refused), reader.type_count, count // _LINES_A_SAMPLE) > samples_max:
            return Pushed(deltas, lines, refused, whole=False)
    if reader.unended and number:
        refused.append(Refusal(number, "eof", "there is no # EOF: some of it may be missing"))
    return Pushed(deltas, lines, refused)


def _lines(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each line that is not blank, and the line from its first character on."""
    number, counted = 1, 0
    for match in _LINE.finditer(body):
        number += body.count(b"\n", counted, match.start())
        counted = match.start()
        yield number, match[0]


class _Reader:
    def __init__(self, *, openmetrics: bool) -> None:
        self._openmetrics = openmetrics
        self._ended = False
        self._roles: dict[str, _Role] = {}
        self.type_count = 0
        """Number of declared types."""

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
            if text[1:].split(None, 1)[:1] == ["TYPE"]:
                self._note_type(text)
        elif text:
            return self._delta(self._sample(text))
        return None

    def _note_type(self, text: str) -> None:
        self.type_count += 1
        try:
            (family,) = self._families(text)
        except Exception as error:
            raise _Wrong("type", str(error) or text) from None
        name, roles = family.name, _ROLES.get(family.type, {"": _NEWEST})
        for suffix, does in roles.items():
            before = self._roles.get(name + suffix)
            if does == _NEWEST and before is not None and before.does == _CREATED:
                continue  # the text format declares creation times as a gauge
            self._roles[name + suffix] = _Role(name + suffix, does)
        if family.type == "counter" and not self._openmetrics:  # there the sample has the family's name, as it is written
            self._roles[text.split(None, 3)[2]] = _Role(f"{name}_total", _ADD)

    def _sample(self, text: str) -> Sample:
        try:
            return self._parse(text)
        except Exception as error:
            if self._openmetrics and _EXEMPLAR in text:
                try:
                    return self._parse(text.rpartition(_EXEMPLAR)[0])
                except Exception:  # nosec B110  # the first error says more
                    pass
            raise _Wrong("syntax", str(error) or "not a sample") from None

    def _parse(self, text: str) -> Sample:
        ((sample,),) = [family.samples for family in self._families(text)]
        return sample

    def _families(self, text: str) -> Iterable[Metric]:
        if not self._openmetrics:
            return _parse_plain(text)
        families: Iterable[Metric] = _parse_openmetrics(f"{text}\n# EOF\n")  # type: ignore[no-untyped-call]  # prometheus_client has no types
        return families

    def _delta(self, sample: Sample) -> RawDelta | None:
        role = self._roles.get(sample.name) or _Role(sample.name, _NEWEST)
        labels = dict(sample.labels)
        if role.does == _CREATED:
            return None
        if role.does == _QUANTILE:
            raise _Wrong("quantile", f"{sample.name}: quantiles can't be added up")
        if role.does == _NONE:
            raise _Wrong("suffix", f"{sample.name} is a histogram: it has _bucket, _sum and _count")
        if role.does == _NEWEST:
            return RawDelta(role.name, "last", labels, sample.value, _ts_ms(sample))
        if role.does == _BUCKET:
            labels["le"] = _boundary(sample)
        value: Any = sample.value  # an int, too
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return RawDelta(role.name, "sum", labels, value, monotone=True)


def _boundary(sample: Sample) -> str:
    """Return the upper bound of a bucket, spelled as prometheus_client spells it."""
    try:
        return str(floatToGoString(float(sample.labels["le"])))  # type: ignore[no-untyped-call]  # it has no types
    except (KeyError, ValueError):
        raise _Wrong("le", f"{sample.name}: a bucket needs le, its upper bound") from None


def _ts_ms(sample: Sample) -> int | None:
    if sample.timestamp is None:
        return None
    try:
        return round(float(sample.timestamp) * 1_000)
    except (ValueError, OverflowError):
        raise _Wrong("timestamp", f"{sample.name}: {sample.timestamp}") from None
