"""Messages of Prometheus' remote read, and the time series that a view with windows is there.

The protocol is that of `prometheus.ReadRequest` and `prometheus.ReadResponse` (prometheus/prompb/remote.proto), with answers
of type SAMPLES. A window is one sample, which has the time of the window's last millisecond. So, at a multiple of the
window, the samples of the last 10 minutes are those of the windows in these 10 minutes, whether the time at which a range of
PromQL begins belongs to it (Prometheus 2) or not (Prometheus 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from struct import Struct

import msgspec

from pipeline.core.protobuf import BYTES, VARINT, Value, bytes_field, fields, int_field, read_varint, signed, text_field
from pipeline.core.query import Matcher
from pipeline.core.times import TIME_MS_MAX
from pipeline.errors import BadRecord, Invalid

NAME_LABEL = "__name__"
_OPS = ("=", "!=", "=~", "!~")
"""By the number that a type of matchers has in the protocol."""
_SAMPLES = 0
"""The response type with samples, which is the default."""
_SERIES = "series"
"""Function, in the hints of a query, that needs the labels of series only."""
_pack = Struct("<d").pack
STALE = bytes.fromhex("020000000000f07f")
"""A not-a-number that tells Prometheus that a series ends here: it does not draw the last value on."""

Sample = tuple[int, float | int | None]
"""Start of a window, and its value; None: the series has none from there on."""


class SeriesQuery(msgspec.Struct, frozen=True):
    """One query of a request: all series that satisfy the matchers, with their samples of a range of time."""

    start_ms: int
    end_ms: int
    """End of the range, which belongs to it."""
    matchers: tuple[Matcher, ...]
    labels_only: bool = False
    """True if only the labels of series are needed."""

    def windows(self, window_ms: int) -> range:
        """Return the starts of the windows whose samples are in the range."""
        start_ms, end_ms = max(0, self.start_ms), min(self.end_ms, TIME_MS_MAX)
        return range(start_ms // window_ms * window_ms, (end_ms + 1) // window_ms * window_ms, window_ms)


def decode_request(message: bytes, *, matchers_max: int) -> list[SeriesQuery]:
    """Return the queries of a request. Raises `BadRecord` if the bytes are none, `Invalid` if it can't be answered."""
    found: list[SeriesQuery] = []
    accepted: set[int] = set()
    count = 0
    for number, wire_type, value in fields(message):
        if number == 1:
            found.append(_query(_bytes(value, wire_type), matchers_max - count))
            count += 1 + len(found[-1].matchers)
            _check_count(count, matchers_max)
        elif number == 2:  # of a repeated enum, packed or not
            accepted |= _packed(value) if isinstance(value, bytes) else {value}
    if accepted and _SAMPLES not in accepted:
        raise Invalid("the answer is of type SAMPLES, which accepted_response_types leaves out")
    return found


def _check_count(count: int, matchers_max: int) -> None:
    if count > matchers_max:
        raise Invalid(f"over {matchers_max} queries and matchers in one request (setting matchers_max)")


def _packed(value: bytes) -> set[int]:
    found: set[int] = set()
    at = 0
    while at < len(value):
        one, at = read_varint(value, at)
        found.add(one)
    return found


def _query(message: bytes, matchers_max: int) -> SeriesQuery:
    start_ms = end_ms = 0
    matchers: list[Matcher] = []
    labels_only = False
    for number, wire_type, value in fields(message):
        if number == 1:
            start_ms = signed(_int(value, wire_type))
        elif number == 2:
            end_ms = signed(_int(value, wire_type))
        elif number == 3:
            matchers.append(_matcher(_bytes(value, wire_type)))
            _check_count(len(matchers), matchers_max)
        elif number == 4:
            labels_only = _function(_bytes(value, wire_type)) == _SERIES
    return SeriesQuery(start_ms, end_ms, tuple(matchers), labels_only)


def _matcher(message: bytes) -> Matcher:
    op = 0
    label = pattern = ""
    for number, wire_type, value in fields(message):
        if number == 1:
            op = _int(value, wire_type)
        elif number == 2:
            label = _text(value, wire_type)
        elif number == 3:
            pattern = _text(value, wire_type)
    if op >= len(_OPS):
        raise BadRecord(f"a matcher of type {op}; 0 to {len(_OPS) - 1}")
    return Matcher(label, _OPS[op], pattern)


def _function(hints: bytes) -> str:
    function = ""
    for number, wire_type, value in fields(hints):
        if number == 2:
            function = _text(value, wire_type)
    return function


def _int(value: Value, wire_type: int) -> int:
    if wire_type != VARINT or not isinstance(value, int):
        raise BadRecord("protobuf: an int is needed")
    return value


def _bytes(value: Value, wire_type: int) -> bytes:
    if wire_type != BYTES or not isinstance(value, bytes):
        raise BadRecord("protobuf: bytes are needed")
    return value


def _text(value: Value, wire_type: int) -> str:
    try:
        return _bytes(value, wire_type).decode()
    except UnicodeDecodeError:
        raise BadRecord("protobuf: a text that is not UTF-8") from None


class SeriesEncoder:
    """Encodes the series of views with windows of one length."""

    def __init__(self, window_ms: int) -> None:
        self._window_ms = window_ms
        self._samples: dict[int, tuple[bytes, bytes]] = {}
        """By start of a window, what stands in a sample before and behind the value."""

    def series(self, labels: Mapping[str, str], samples: Iterable[Sample]) -> bytes:
        """Return a `prometheus.TimeSeries` as a field of a result.

        Labels that are empty are none. Samples are in order; their values fit into floats.
        """
        parts = [
            bytes_field(1, text_field(1, name) + text_field(2, value)) for name, value in sorted(labels.items()) if value
        ]
        around = self._samples
        for start_ms, value in samples:
            head, tail = around.get(start_ms) or self._sample(start_ms)
            parts += head, STALE if value is None else _pack(value), tail
        return bytes_field(1, b"".join(parts))

    def _sample(self, start_ms: int) -> tuple[bytes, bytes]:
        tail = int_field(2, start_ms + self._window_ms - 1)
        whole = bytes_field(2, b"\x09" + bytes(8) + tail)
        found = self._samples[start_ms] = whole[: -len(tail) - 8], tail
        return found


def encode_response(results: Iterable[Iterable[bytes]]) -> bytes:
    """Return a `prometheus.ReadResponse` of the series of each query."""
    return b"".join([bytes_field(1, b"".join(series)) for series in results])


def with_ends(values: Iterable[tuple[int, float | int]], window_ms: int, stop_ms: int) -> Iterator[Sample]:
    """Yield the values of windows, which are in order, and None for the first window without one behind each.

    None stands only for windows that begin before `stop_ms`: later ones may get a value yet, or were not asked for.
    """
    expected: int | None = None
    for sample in values:
        if expected != sample[0] and expected is not None and expected < stop_ms:
            yield expected, None
        yield sample
        expected = sample[0] + window_ms
    if expected is not None and expected < stop_ms:
        yield expected, None
