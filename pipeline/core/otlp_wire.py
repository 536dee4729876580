"""Reads an export of OTLP metrics, in Protocol Buffers or JSON, point by point.

The messages are those of opentelemetry-proto, version 1. Points are read one at a time, so that what a body takes in memory
is in proportion to its own size. Fields that are not known are skipped, as both encodings demand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from struct import Struct, unpack
from typing import Any, NamedTuple

import msgspec

from pipeline.core.distribution import NO_RUN, ExponentialBuckets, Run
from pipeline.core.protobuf import BYTES, FIXED64, VARINT, Value, fields, read_varint, signed, zigzagged
from pipeline.errors import BadRecord, Invalid

GAUGE, SUM, HISTOGRAM, EXPONENTIAL, SUMMARY = "gauge", "sum", "histogram", "exponential_histogram", "summary"
DELTA, CUMULATIVE = 1, 2
"""Temporalities."""
NO_VALUE = 1
"""Flag of a point without a value."""
_DATA = {5: GAUGE, 7: SUM, 9: HISTOGRAM, 10: EXPONENTIAL, 11: SUMMARY}
"""Types of data by their field in a metric."""
_DOUBLE = Struct("<d")
_LENGTH_MAX = 1_000
"""Most attributes of a point or resource, and buckets of a point, that are read."""

Attribute = str | bool | int | float | None
"""Value of an attribute; None if it is of a type that no label can have."""


class OtlpPoint(NamedTuple):
    """A point of a metric. What its type does not have is left as it is here."""

    attributes: Sequence[tuple[str, Attribute]]
    start_ns: int
    at_ns: int
    flags: int
    value: int | float | None = None
    observations: int = 0
    sum: float | None = None
    buckets: Sequence[int] = ()
    bounds: Sequence[float] = ()
    exponential: ExponentialBuckets | None = None


class OtlpMetric(NamedTuple):
    """A metric of a resource."""

    resource: Sequence[tuple[str, Attribute]]
    scope: tuple[str, str]
    """Name and version."""
    name: str
    type: str
    temporality: int
    monotone: bool
    points: Iterator[OtlpPoint]
    """Points, which are read while this is iterated; of a summary without its content."""


# Protocol Buffers


def read_protobuf(body: bytes, groups_max: int) -> Iterator[OtlpMetric]:
    """Yield the metrics of an ExportMetricsServiceRequest, of up to `groups_max` resources, scopes and metrics.

    Raises `BadRecord` where the bytes are none.
    """
    left = count(groups_max, -1)
    for resource_metrics in _groups(body, 1, left):
        resource: Sequence[tuple[str, Attribute]] = ()
        for message in _messages(resource_metrics, 1):
            resource = _attributes(message, 1)
        for scope_metrics in _groups(resource_metrics, 2, left):
            scope = "", ""
            for message in _messages(scope_metrics, 1):
                scope = _text(message, 1), _text(message, 2)
            for metric in _groups(scope_metrics, 2, left):
                yield from _metric(metric, resource, scope, groups_max)


def _groups(message: bytes, wanted: int, left: Iterator[int]) -> Iterator[bytes]:
    for value in _messages(message, wanted):
        if next(left) <= 0:
            raise BadRecord("too many resources, scopes and metrics")
        yield value


def _messages(message: bytes, wanted: int) -> Iterator[bytes]:
    """Yield the values of a field that has messages."""
    for number, wire_type, value in fields(message):
        if number == wanted:
            if wire_type != BYTES or not isinstance(value, bytes):
                raise BadRecord(f"protobuf: field {number} is no message")
            yield value


def _text(message: bytes, wanted: int) -> str:
    texts = [*_messages(message, wanted)]
    return _decoded(texts[-1]) if texts else ""


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise BadRecord("protobuf: text that is not UTF-8") from None


def _metric(
    message: bytes, resource: Sequence[tuple[str, Attribute]], scope: tuple[str, str], points_max: int
) -> Iterator[OtlpMetric]:
    name, type_, data = b"", "", b""
    for number, wire_type, value in fields(message):
        if wire_type == BYTES and isinstance(value, bytes):
            if number == 1:
                name = value
            elif number in _DATA:
                type_, data = _DATA[number], value
    if not type_:
        return
    temporality, monotone = 0, False
    point_count = 0
    for number, _, value in fields(data):
        if number == 1:
            point_count += 1
            if point_count > points_max:
                break  # more than may be read: the rest does not matter
        elif number == 2 and isinstance(value, int):
            temporality = value
        elif number == 3 and isinstance(value, int):
            monotone = bool(value)
    yield OtlpMetric(resource, scope, _decoded(name), type_, temporality, monotone, _points(data, type_))


def _points(data: bytes, type_: str) -> Iterator[OtlpPoint]:
    for message in _messages(data, 1):
        if type_ in (GAUGE, SUM):
            yield _number_point(message)
        elif type_ == HISTOGRAM:
            yield _histogram_point(message)
        elif type_ == EXPONENTIAL:
            yield _exponential_point(message)
        else:
            yield OtlpPoint((), 0, 0, 0)


def _number_point(message: bytes) -> OtlpPoint:
    attributes: list[tuple[str, Attribute]] = []
    start_ns = at_ns = flags = 0
    number_: int | float | None = None
    for number, wire_type, value in fields(message):
        if number == 7:
            _add_attribute(attributes, wire_type, value)
        elif number == 2:
            start_ns = _fixed(value)
        elif number == 3:
            at_ns = _fixed(value)
        elif number == 4:
            number_ = _double(value)
        elif number == 6:
            number_ = signed(_fixed(value))
        elif number == 8 and isinstance(value, int):
            flags = value
    return OtlpPoint(attributes, start_ns, at_ns, flags, number_)


def _histogram_point(message: bytes) -> OtlpPoint:
    attributes: list[tuple[str, Attribute]] = []
    start_ns = at_ns = flags = observations = 0
    sum_: float | None = None
    buckets: list[int] = []
    bounds: list[float] = []
    for number, wire_type, value in fields(message):
        if number == 9:
            _add_attribute(attributes, wire_type, value)
        elif number == 2:
            start_ns = _fixed(value)
        elif number == 3:
            at_ns = _fixed(value)
        elif number == 4:
            observations = _fixed(value)
        elif number == 5:
            sum_ = _double(value)
        elif number == 6:
            buckets += _packed("Q", value)
        elif number == 7:
            bounds += _packed("d", value)
        elif number == 10 and isinstance(value, int):
            flags = value
        if len(buckets) > _LENGTH_MAX or len(bounds) > _LENGTH_MAX:
            raise BadRecord(f"a histogram of over {_LENGTH_MAX} buckets")
    return OtlpPoint(attributes, start_ns, at_ns, flags, None, observations, sum_, buckets, bounds)


def _exponential_point(message: bytes) -> OtlpPoint:
    attributes: list[tuple[str, Attribute]] = []
    found: dict[int, Any] = {}
    for number, wire_type, value in fields(message):
        if number == 1:
            _add_attribute(attributes, wire_type, value)
        elif number in (2, 3, 4, 7):
            found[number] = _fixed(value)
        elif number in (5, 12, 13, 14):
            found[number] = _double(value)
        elif number == 6 and isinstance(value, int):
            found[number] = zigzagged(value)
        elif number in (8, 9) and isinstance(value, bytes):
            found[number] = _run(value)
        elif number == 10 and isinstance(value, int):
            found[number] = value
    buckets = ExponentialBuckets(
        found.get(6, 0),
        found.get(7, 0),
        found.get(8, NO_RUN),
        found.get(9, NO_RUN),
        found.get(12),
        found.get(13),
        found.get(14, 0.0),
    )
    start_ns, at_ns, observations, flags = (found.get(number, 0) for number in (2, 3, 4, 10))
    return OtlpPoint(attributes, start_ns, at_ns, flags, None, observations, found.get(5), exponential=buckets)


def _run(message: bytes) -> Run:
    """Return the buckets of one sign."""
    offset, counts = 0, list[int]()
    for number, wire_type, value in fields(message):
        if number == 1 and isinstance(value, int):
            offset = zigzagged(value)
        elif number == 2 and isinstance(value, int):
            counts.append(value)
        elif number == 2 and wire_type == BYTES and isinstance(value, bytes):
            at = 0
            while at < len(value) and len(counts) <= _LENGTH_MAX:
                count_, at = read_varint(value, at)
                counts.append(count_)
        if len(counts) > _LENGTH_MAX:
            raise BadRecord(f"a histogram of over {_LENGTH_MAX} buckets")
    return offset, counts


def _fixed(value: Value) -> int:
    if not isinstance(value, bytes) or len(value) != 8:
        raise BadRecord("protobuf: a number of 64 bits is needed")
    return int.from_bytes(value, "little")


def _double(value: Value) -> float:
    if not isinstance(value, bytes) or len(value) != 8:
        raise BadRecord("protobuf: a double is needed")
    return float(_DOUBLE.unpack(value)[0])


def _packed(code: str, value: Value) -> Sequence[Any]:
    if not isinstance(value, bytes) or len(value) % 8 or len(value) > 8 * _LENGTH_MAX:
        raise BadRecord(f"protobuf: up to {_LENGTH_MAX} numbers of 64 bits are needed")
    return unpack(f"<{len(value) // 8}{code}", value)


def _attributes(message: bytes, wanted: int) -> Sequence[tuple[str, Attribute]]:
    found: list[tuple[str, Attribute]] = []
    for value in _messages(message, wanted):
        _add_attribute(found, BYTES, value)
    return found


def _add_attribute(attributes: list[tuple[str, Attribute]], wire_type: int, value: Value) -> None:
    if wire_type != BYTES or not isinstance(value, bytes):
        raise BadRecord("protobuf: an attribute is no message")
    if len(attributes) >= _LENGTH_MAX:
        raise BadRecord(f"over {_LENGTH_MAX} attributes")
    key, found = b"", b""
    for number, kind, part in fields(value):
        if kind == BYTES and isinstance(part, bytes):
            if number == 1:
                key = part
            elif number == 2:
                found = part
    attributes.append((_decoded(key), _any_value(found)))


def _any_value(message: bytes) -> Attribute:
    found: Attribute = None
    for number, wire_type, value in fields(message):
        if number == 1 and isinstance(value, bytes) and wire_type == BYTES:
            found = _decoded(value)
        elif number == 2 and isinstance(value, int):
            found = bool(value)
        elif number == 3 and isinstance(value, int) and wire_type == VARINT:
            found = signed(value)
        elif number == 4 and wire_type == FIXED64:
            found = _double(value)
        else:
            found = None
    return found


# JSON

_Int = int | str
_Float = float | str
_EnumNumber = int | str


class _AnyValue(msgspec.Struct, rename="camel", gc=False):
    string_value: str | None = None
    bool_value: bool | None = None
    int_value: _Int | None = None
    double_value: _Float | None = None


class _KeyValue(msgspec.Struct, gc=False):
    key: str = ""
    value: _AnyValue | None = None


class _JsonRun(msgspec.Struct, rename="camel"):
    offset: int = 0
    bucket_counts: list[_Int] = []


class _JsonPoint(msgspec.Struct, rename="camel"):
    attributes: list[_KeyValue] = []
    start_time_unix_nano: _Int = 0
    time_unix_nano: _Int = 0
    flags: int = 0
    as_int: _Int | None = None
    as_double: _Float | None = None
    count: _Int = 0
    sum: _Float | None = None
    bucket_counts: list[_Int] = []
    explicit_bounds: list[_Float] = []
    scale: int = 0
    zero_count: _Int = 0
    zero_threshold: _Float = 0.0
    positive: _JsonRun | None = None
    negative: _JsonRun | None = None
    min: _Float | None = None
    max: _Float | None = None


class _Data(msgspec.Struct, rename="camel"):
    data_points: list[_JsonPoint] = []
    aggregation_temporality: _EnumNumber = 0
    is_monotonic: bool = False


class _JsonMetric(msgspec.Struct, rename="camel"):
    name: str = ""
    gauge: _Data | None = None
    sum: _Data | None = None
    histogram: _Data | None = None
    exponential_histogram: _Data | None = None
    summary: _Data | None = None


class _Attributed(msgspec.Struct):
    attributes: list[_KeyValue] = []


class _Scope(msgspec.Struct):
    name: str = ""
    version: str = ""


class _ScopeMetrics(msgspec.Struct):
    scope: _Scope | None = None
    metrics: list[_JsonMetric] = []


class _ResourceMetrics(msgspec.Struct, rename="camel"):
    resource: _Attributed | None = None
    scope_metrics: list[_ScopeMetrics] = []


class _Request(msgspec.Struct, rename="camel"):
    resource_metrics: list[_ResourceMetrics] = []


_decode = msgspec.json.Decoder(_Request).decode
_TEMPORALITIES: Mapping[object, int] = {
    "AGGREGATION_TEMPORALITY_DELTA": DELTA,
    "AGGREGATION_TEMPORALITY_CUMULATIVE": CUMULATIVE,
}


def read_json(body: bytes) -> Iterator[OtlpMetric]:
    """Yield the metrics of an export in JSON. Raises `Invalid` where it is none."""
    try:
        request = _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid(f"not an export of metrics in JSON: {error}") from None
    for resource_metrics in request.resource_metrics:
        resource = _json_attributes(resource_metrics.resource.attributes if resource_metrics.resource else [])
        for scope_metrics in resource_metrics.scope_metrics:
            named = scope_metrics.scope or _Scope()
            scope = named.name, named.version
            for it in scope_metrics.metrics:
                of_type = {
                    GAUGE: it.gauge,
                    SUM: it.sum,
                    HISTOGRAM: it.histogram,
                    EXPONENTIAL: it.exponential_histogram,
                    SUMMARY: it.summary,
                }
                for type_, data in of_type.items():
                    if data is not None:
                        temporality = _temporality(data.aggregation_temporality)
                        points = map(_json_exponential if type_ == EXPONENTIAL else _json_point, data.data_points)
                        yield OtlpMetric(resource, scope, it.name, type_, temporality, data.is_monotonic, points)


def _temporality(value: _EnumNumber) -> int:
    return value if isinstance(value, int) else _TEMPORALITIES.get(value, 0)


def _json_point(it: _JsonPoint) -> OtlpPoint:
    value: int | float | None = None
    if it.as_int is not None:
        value = _int(it.as_int)
    elif it.as_double is not None:
        value = _float(it.as_double)
    return OtlpPoint(
        _json_attributes(it.attributes),
        _int(it.start_time_unix_nano),
        _int(it.time_unix_nano),
        it.flags,
        value,
        _int(it.count),
        None if it.sum is None else _float(it.sum),
        [*map(_int, it.bucket_counts[: _LENGTH_MAX + 1])],
        [*map(_float, it.explicit_bounds[: _LENGTH_MAX + 1])],
    )


def _json_exponential(it: _JsonPoint) -> OtlpPoint:
    least, most = (None if end is None else _float(end) for end in (it.min, it.max))
    positive, negative = (
        (run.offset, [*map(_int, run.bucket_counts)]) if run is not None else NO_RUN for run in (it.positive, it.negative)
    )
    if max(len(positive[1]), len(negative[1])) > _LENGTH_MAX:
        raise Invalid(f"a histogram of over {_LENGTH_MAX} buckets")
    buckets = ExponentialBuckets(it.scale, _int(it.zero_count), positive, negative, least, most, _float(it.zero_threshold))
    return _json_point(it)._replace(exponential=buckets)


def _json_attributes(attributes: Sequence[_KeyValue]) -> list[tuple[str, Attribute]]:
    return [(it.key, None if it.value is None else _json_value(it.value)) for it in attributes]


def _json_value(it: _AnyValue) -> Attribute:
    if it.int_value is not None:
        return _int(it.int_value)
    if it.double_value is not None:
        return _float(it.double_value)
    return it.string_value if it.string_value is not None else it.bool_value


def _int(value: _Int) -> int:
    """Return an int of 64 bits, which JSON has as text or as a number."""
    try:
        found = value if isinstance(value, int) else int(value) if len(value) <= 20 else 2**64
    except ValueError:
        found = 2**64
    if not -(2**63) <= found < 2**64:
        raise Invalid(f"an int of 64 bits is needed, got {str(value)[:50]}")
    return found


def _float(value: _Float) -> float:
    """Return a float, for which JSON has text where it is not finite."""
    try:
        return float(value)
    except ValueError:
        raise Invalid(f"a number is needed, got {str(value)[:50]}") from None
