"""A scrape in Prometheus' protobuf format, the only one that has native histograms.

It is a row of `io.prometheus.client.MetricFamily` messages, each behind its length. A histogram has its classic buckets, for
a Prometheus that takes those, and its own buckets as a native one: these have the same bases as ours, and an index that is
one higher, because Prometheus names a bucket by its upper bound. The coarsest schema of ours is too coarse for Prometheus:
a view in which one histogram has that, because its numbers come from all ends of the floats, has classic buckets only.
Prometheus takes a family for native or classic by its first histogram, so that a view is one of both as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, nextafter

from pipeline.core.classic import ClassicHistogram, joined
from pipeline.core.exposition import (
    OMITTED,
    OMITTED_HELP,
    STALENESS,
    STALENESS_HELP,
    ClassicBuckets,
    Exposed,
    Exposition,
    about,
    family_name,
    sample_value,
)
from pipeline.core.kinds import KINDS, State
from pipeline.core.kinds.histogram import LEAST, Buckets, count_of
from pipeline.core.protobuf import (
    bytes_field,
    double_field,
    int_field,
    packed_doubles,
    packed_sints,
    sint_field,
    text_field,
    varint,
)
from pipeline.metrics import NAMES

MEDIA_TYPE = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
_TEXT_TYPES = ("application/openmetrics-text", "text/plain")
_COUNTER, _GAUGE, _HISTOGRAM, _GAUGE_HISTOGRAM = 0, 1, 4, 5
"""Types of families."""
SCHEMA_LEAST = -4
"""Coarsest schema of native histograms."""
ZERO_THRESHOLD = nextafter(LEAST, 0)
"""Largest number that is counted as zero."""
_INT64_MAX = 2**63 - 1


def is_preferred(accept: str) -> bool:
    """Return whether an Accept header prefers this format to text."""
    protobuf = text = 0.0
    for item in accept.lower().split(","):
        name, *rest = [part.strip() for part in item.split(";")]
        parameters = dict(part.partition("=")[::2] for part in rest)
        try:
            quality = float(parameters.get("q", "1"))
        except ValueError:
            quality = 0.0
        if name in _TEXT_TYPES:
            text = max(text, quality)
        elif (
            name == "application/vnd.google.protobuf"
            and parameters.get("proto") == "io.prometheus.client.metricfamily"
            and parameters.get("encoding") == "delimited"
        ):
            protobuf = max(protobuf, quality)
    return protobuf > 0 and protobuf >= text


def encode_families(exposition: Exposition) -> bytes:
    """Return the scrape."""
    omitted = [_metric(("view", "reason"), pair, bytes_field(2, double_field(1, 1))) for pair in exposition.omitted.items()]
    families = [
        _family(
            STALENESS, STALENESS_HELP, _GAUGE, [_metric((), (), bytes_field(2, double_field(1, exposition.staleness_s)))]
        ),
        _family(OMITTED, OMITTED_HELP, _GAUGE, omitted),
        *[_classic(it) if isinstance(it, ClassicHistogram) else _of_view(it) for it in joined(exposition, NAMES)],
    ]
    return b"".join([varint(len(family)) + family for family in families])


def _family(name: str, text: str, kind: int, metrics: Sequence[bytes]) -> bytes:
    head = text_field(1, name) + text_field(2, text) + int_field(3, kind)
    return head + b"".join([bytes_field(4, metric) for metric in metrics])


def _metric(names: Sequence[str], labels: Sequence[str], value: bytes) -> bytes:
    pairs = zip(names, labels, strict=True)
    return b"".join([bytes_field(1, text_field(1, name) + text_field(2, label)) for name, label in pairs]) + value


def _classic(histogram: ClassicHistogram) -> bytes:
    metrics = []
    for it in histogram.series:
        parts = [double_field(4, it.buckets[-1][2]), *([] if it.sum is None else [double_field(2, it.sum)])]
        parts += [bytes_field(3, double_field(4, count) + double_field(2, bound)) for _, bound, count in it.buckets]
        metrics.append(_metric(histogram.labels, it.labels, bytes_field(7, b"".join(parts))))
    return _family(histogram.name, histogram.about, _HISTOGRAM, metrics)


def _of_view(exposed: Exposed) -> bytes:
    definition = exposed.definition
    if definition.kind == "histogram":
        kind = _GAUGE_HISTOGRAM if definition.window_s else _HISTOGRAM
        classic = ClassicBuckets(exposed.values)
        native = all(state[3] >= SCHEMA_LEAST for state in exposed.values)
        values = [bytes_field(7, _histogram(state, classic, native=native)) for state in exposed.values]
        metrics = [_metric(definition.labels, *row) for row in zip(exposed.labels, values, strict=True)]
        return _family(definition.view, about(definition), kind, metrics)
    kind, number = (_COUNTER, 3) if definition.monotone else (_GAUGE, 2)
    metrics = [
        _metric(definition.labels, labels, bytes_field(number, double_field(1, value)))
        for labels, answer in zip(exposed.labels, exposed.values, strict=True)
        if (value := sample_value(KINDS[definition.kind].number(answer))) is not None
    ]
    # Here a family of counters has the name of its samples, as in the older text format.
    name = f"{family_name(definition)}_total" if definition.monotone else definition.view
    return _family(name, about(definition), kind, metrics)


def _histogram(state: State, classic: ClassicBuckets, *, native: bool) -> bytes:
    total, _, _, schema, zeros, positive, negative = state
    as_floats = count_of(state) > _INT64_MAX
    count = double_field(4, float(count_of(state))) if as_floats else int_field(1, count_of(state))
    parts = [count, double_field(2, sample_value(KINDS["sum"].answer(total)) or 0)]
    for bound, up_to in zip((*classic.bounds, inf), classic.counts(state), strict=True):
        cumulative = double_field(4, float(up_to)) if as_floats else int_field(1, up_to)
        parts.append(bytes_field(3, cumulative + double_field(2, bound)))
    if native:
        parts += sint_field(5, schema), double_field(6, ZERO_THRESHOLD)
        parts.append(double_field(8, float(zeros)) if as_floats else int_field(7, zeros))
        for spans, buckets in ((9, negative), (12, positive)):
            parts += [bytes_field(spans, sint_field(1, gap) + int_field(2, length)) for gap, length in _spans(buckets)]
            counts = [count for _, count in sorted(buckets.items())]
            if as_floats:
                parts.append(packed_doubles(spans + 2, [*map(float, counts)]))
            else:
                parts.append(packed_sints(spans + 1, [b - a for a, b in zip((0, *counts), counts, strict=False)]))
    return b"".join(parts)


def _spans(buckets: Buckets) -> Iterator[tuple[int, int]]:
    """Yield each run of buckets that are in use: how many before it are not, since the last run or index 0; its length."""
    end = length = 0
    offset = 0
    for index in sorted(buckets):
        upper = index + 1
        if length and upper == end:
            length, end = length + 1, end + 1
            continue
        if length:
            yield offset, length
        offset, length, end = upper - end, 1, upper + 1
    if length:
        yield offset, length
