"""Parses exports of OTLP metrics: the deltas that their points are.

    sum, monotonic      NAME               sum, monotone
    sum, not monotonic  NAME               sum of its deltas; last where its temporality is cumulative
    gauge               NAME               last, by its time
    histogram           NAME_bucket{le}    sum, monotone; so are NAME_count and NAME_sum, as a scrape has them
    its exponential form  NAME             histogram

Totals (cumulative temporality) are handed on as such. Summaries are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, pairwise
from math import isfinite
from operator import itemgetter
from typing import NamedTuple

from pipeline.budget import check_budget
from pipeline.core.distribution import distribution_of
from pipeline.core.exposition import bound_text
from pipeline.core.otlp_wire import (
    CUMULATIVE,
    DELTA,
    EXPONENTIAL,
    GAUGE,
    HISTOGRAM,
    NO_VALUE,
    SUM,
    SUMMARY,
    Attribute,
    OtlpMetric,
    OtlpPoint,
    read_json,
    read_protobuf,
)
from pipeline.core.statsd import prometheus_name
from pipeline.errors import BadRecord, Invalid
from pipeline.ingest.totals import stream_digest
from pipeline.ports import RawDelta, Refusal
from pipeline.pushed import Pushed, RunningTotal

JSON = "application/json"
_BRACES_A_POINT = 16
"""Most objects in JSON for each point that may be taken, so that memory is bounded before they are made."""


class _WrongPoint(Exception):
    """A point that is left out."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail[:200]


class _Named(NamedTuple):
    """Names that all points of a metric have in common."""

    view: str | None
    labels: dict[str, str]
    stream: bytes
    """Digest of what the streams of the metric have in common."""


def parse_export(body: bytes, content_type: str, deltas_max: int, resource_attributes: Collection[str]) -> Pushed:
    """Parse an export, up to `deltas_max` deltas. `Invalid` if it is none.

    The attributes of a point are its labels, and so are those of its resource that `resource_attributes` names, unless the
    point has an attribute of that name.
    """
    is_json = content_type.partition(";")[0].strip().lower() == JSON
    if is_json and body.count(b"{") > _BRACES_A_POINT * deltas_max:
        return Pushed([], [], [], whole=False)
    reader = _ExportReader(frozenset(resource_attributes), deltas_max)
    try:
        for metric in read_json(body) if is_json else read_protobuf(body, deltas_max):
            if not reader.take(metric):
                return Pushed([], [], [], whole=False)
    except BadRecord as error:
        raise Invalid(f"not an export of metrics: {error}") from None
    return Pushed(reader.deltas, reader.lines, reader.refused, totals=reader.totals)


class _ExportReader:
    def __init__(self, resource_attributes: frozenset[str], deltas_max: int) -> None:
        self._resource_attributes = resource_attributes
        self._deltas_max = deltas_max
        self._number = 0
        self._size = 0
        self._source: tuple[Sequence[tuple[str, Attribute]], tuple[str, str]] = (), ("", "")
        """Resource and scope of the last metric."""
        self._source_digest = stream_digest(*self._source)
        self._sources: dict[str, str] = {}
        """By view, the name of the metric that it belongs to in this export."""
        self.deltas: list[RawDelta] = []
        self.lines: list[int] = []
        self.refused: list[Refusal] = []
        self.totals: list[RunningTotal] = []

    def take(self, metric: OtlpMetric) -> bool:
        """Take in a metric; return False if there are too many deltas."""
        named = self._named(metric)
        for point in metric.points:
            check_budget()
            self._number += 1
            if point.flags & NO_VALUE:
                continue
            try:
                self._size += self._take_point(metric, named, point)
            except _WrongPoint as wrong:
                self.refused.append(Refusal(self._number, wrong.reason, f"{metric.name[:100]}: {wrong.detail}"))
            if self._size + len(self.refused) > self._deltas_max:
                return False
        return self._number <= self._deltas_max

    def _named(self, metric: OtlpMetric) -> _Named:
        view = prometheus_name(metric.name)
        labels = {}
        for key, value in metric.resource:
            name = prometheus_name(key)
            if key in self._resource_attributes and name is not None and value is not None:
                labels[name] = _text(value)
        resource, scope = self._source
        if metric.resource is not resource or metric.scope is not scope:  # once for all metrics that have them in common
            self._source = metric.resource, metric.scope
            self._source_digest = stream_digest(_sorted(metric.resource), metric.scope)
        return _Named(view, labels, stream_digest(self._source_digest, metric.name))

    def _take_point(self, metric: OtlpMetric, named: _Named, point: OtlpPoint) -> int:
        if metric.type == SUMMARY:
            raise _WrongPoint(SUMMARY, "quantiles can't be added up")
        if named.view is None:
            raise _WrongPoint("name", "no view can have this name")
        if not point.at_ns:
            raise _WrongPoint("timestamp", "a point without a time")
        if metric.type != GAUGE and metric.temporality not in (DELTA, CUMULATIVE):
            raise _WrongPoint("temporality", f"no temporality: {metric.temporality}")
        labels = named.labels | _labels(point.attributes)
        deltas = [*_deltas(metric, named.view, labels, point)]
        for view in {it.view for it in deltas}:
            if self._sources.setdefault(view, metric.name) != metric.name:
                raise _WrongPoint("collision", f"its view {view[:50]} is that of {self._sources[view][:100]}")
        if metric.type == GAUGE or metric.temporality == DELTA or deltas[0].kind == "last":
            if metric.type == EXPONENTIAL and not point.observations:
                return 0
            self.deltas += deltas
            self.lines += [self._number] * len(deltas)
        else:
            if not point.start_ns:
                raise _WrongPoint("start", "a total without the time of its start")
            parts = metric.type, _sorted(point.attributes), [*point.bounds], point.start_ns, len(deltas)
            stream = stream_digest(named.stream, *parts)
            self.totals.append(RunningTotal(self._number, stream, point.start_ns, point.at_ns, deltas))
        return len(deltas)


def _sorted(attributes: Sequence[tuple[str, Attribute]]) -> list[tuple[str, Attribute]]:
    """Return attributes in one order: they are a set, and a program between a client and here may turn them around."""
    return sorted(attributes, key=itemgetter(0))


def _deltas(metric: OtlpMetric, view: str, labels: dict[str, str], point: OtlpPoint) -> Iterator[RawDelta]:
    ts_ms = point.at_ns // 1_000_000
    if metric.type == HISTOGRAM:
        yield from _histogram(view, labels, point, ts_ms)
    elif point.exponential is not None:
        try:
            observed = distribution_of(point.observations, point.sum, point.exponential)
        except Invalid as error:
            raise _WrongPoint("buckets", str(error)) from None
        yield RawDelta(view, "histogram", labels, observed, ts_ms)
    elif point.value is None:
        raise _WrongPoint("value", "a point without a value")
    elif metric.type == SUM and (metric.monotone or metric.temporality == DELTA):
        yield RawDelta(view, "sum", labels, _plain(point.value), ts_ms, monotone=metric.monotone)
    else:
        yield RawDelta(view, "last", labels, point.value, ts_ms)


def _histogram(view: str, labels: dict[str, str], point: OtlpPoint, ts_ms: int) -> Iterator[RawDelta]:
    counts, bounds = point.buckets, point.bounds
    if "le" in labels:
        raise _WrongPoint("labels", "le is the label of a bucket's upper bound")
    rising = all(a < b for a, b in pairwise(bounds)) and all(map(isfinite, bounds))
    if len(counts) != len(bounds) + bool(counts) or not rising or (counts and sum(counts) != point.observations):
        raise _WrongPoint("buckets", "counts, bounds and count of its buckets do not fit together")
    for bound, count in zip([*map(bound_text, bounds), "+Inf"], [*accumulate(counts)] or [point.observations], strict=True):
        yield RawDelta(f"{view}_bucket", "sum", {**labels, "le": bound}, count, ts_ms, monotone=True)
    yield RawDelta(f"{view}_count", "sum", labels, point.observations, ts_ms, monotone=True)
    if point.sum is not None:
        yield RawDelta(f"{view}_sum", "sum", labels, _plain(point.sum), ts_ms, monotone=True)


def _labels(attributes: Sequence[tuple[str, Attribute]]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for key, value in attributes:
        name = prometheus_name(key)
        if name is None or name in labels:
            raise _WrongPoint("labels", f"attribute {key[:100]}: no label can have this name, or it stands twice")
        if value is None:
            raise _WrongPoint("labels", f"attribute {key[:100]}: text, a number or a boolean is needed")
        labels[name] = _text(value)
    return labels


def _text(value: str | bool | int | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plain(value: int | float) -> int | float:
    return int(value) if isinstance(value, float) and value.is_integer() else value
