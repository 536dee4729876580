"""Messages of remote read, with Google's library as the oracle, and bytes that are no message."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import protobuf
from pipeline.core.query import Matcher
from pipeline.core.remote_read import STALE, SeriesEncoder, SeriesQuery, decode_request, encode_response, with_ends
from pipeline.errors import BadRecord, Invalid
from tests.prompb import DecodeError, remote

OPS = ("=", "!=", "=~", "!~")
int64 = st.integers(-(2**63), 2**63 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
queries = st.fixed_dictionaries(
    {
        "start_timestamp_ms": int64,
        "end_timestamp_ms": int64,
        "matchers": st.lists(st.fixed_dictionaries({"type": st.integers(0, 3), "name": texts, "value": texts}), max_size=4),
        "hints": st.fixed_dictionaries(
            {
                "step_ms": int64,
                "func": st.sampled_from(["", "series", "rate"]),
                "grouping": st.lists(texts),
                "by": st.booleans(),
            }
        ),
    }
)


@given(st.lists(queries, max_size=3), st.sampled_from([[], [0], [0, 1], [1, 0]]))
def test_requests_are_those_of_the_library(asked: list[dict[str, Any]], accepted: list[int]) -> None:
    """Requests that the library encodes are decoded to the same values, and unknown fields are skipped."""
    body = remote["ReadRequest"](queries=asked, accepted_response_types=accepted).SerializeToString()
    assert decode_request(body, matchers_max=64) == [
        SeriesQuery(
            it["start_timestamp_ms"],
            it["end_timestamp_ms"],
            tuple(Matcher(of["name"], OPS[of["type"]], of["value"]) for of in it["matchers"]),
            it["hints"]["func"] == "series",
        )
        for it in asked
    ]


@given(
    st.lists(st.dictionaries(texts, texts, max_size=3), max_size=3),
    st.dictionaries(
        st.integers(0, 2**40), st.floats(allow_nan=False) | st.none() | st.integers(-(2**64), 2**64), max_size=5
    ),
)
def test_answers_are_read_by_the_library(series: list[dict[str, str]], values: dict[int, Any]) -> None:
    """Labels are sorted and none is empty; samples have the last millisecond of their windows; each query has its result."""
    encoder = SeriesEncoder(1_000)
    windows = {at * 1_000: value for at, value in sorted(values.items())}
    body = encode_response([[encoder.series(labels, windows.items()) for labels in series], []])
    results = remote["ReadResponse"].FromString(body).results
    assert [len(it.timeseries) for it in results] == [len(series), 0]
    for labels, found in zip(series, results[0].timeseries, strict=True):
        assert [(it.name, it.value) for it in found.labels] == sorted((a, b) for a, b in labels.items() if b)
        assert [it.timestamp for it in found.samples] == [at + 999 for at in windows]
        for value, sample in zip(windows.values(), found.samples, strict=True):
            if value is None:
                assert struct.pack("<d", sample.value)[:7] == STALE[:7]
                assert math.isnan(sample.value)
            else:
                assert sample.value == float(value)


@given(st.integers(1, 2**29 - 1), int64, st.integers(-(2**63), 2**63 - 1), st.binary(max_size=300))
def test_fields_come_back(number: int, value: int, zigzag: int, data: bytes) -> None:
    """Fields are read as they were written."""
    message = protobuf.int_field(number, value) + protobuf.sint_field(number, zigzag) + protobuf.bytes_field(number, data)
    (_, _, a), (_, _, b), (_, _, c) = protobuf.fields(message)
    assert isinstance(a, int)
    assert isinstance(b, int)
    assert (protobuf.signed(a), (b >> 1) ^ -(b & 1), c) == (value, zigzag, data)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_request_or_are_refused(body: bytes) -> None:
    """Bytes that the library refuses are refused, and only with `BadRecord` or `Invalid`."""
    try:
        decode_request(body, matchers_max=64)
    except (BadRecord, Invalid):
        return
    try:
        remote["ReadRequest"].FromString(body)
    except DecodeError:
        pytest.fail("the library refuses it")


def request(**fields: Any) -> bytes:
    body: bytes = remote["ReadRequest"](**fields).SerializeToString()
    return body


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"\x0a\x05\x08", "5 bytes, of which 1"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "bytes, of which 0"),
        (b"\x0a\x02\x08\xff", "cut off"),
        (b"\x0a" + b"\x80" * 20, "over 64 bits"),
        (b"\x0a\x0b\x08" + b"\xff" * 9 + b"\x02", "over 64 bits"),
        (b"\x00\x00", "number 0"),
        (b"\x0b\x0c", "wire type 3"),
        (b"\x08\x01", "bytes are needed"),
        (b"\x0a\x02\x0a\x00", "an int is needed"),
        (request(queries=[{"matchers": [{"type": 4}]}]), "matcher of type 4"),
        (request(queries=[{"matchers": [{"name": "x"}]}]).replace(b"x", b"\xff"), "not UTF-8"),
        (request(queries=[{"matchers": [{"name": "x"}] * 64}]), "over 64 queries and matchers"),
        (request(queries=[{"matchers": [{"name": "x"}] * 30_000}]), "over 64 queries and matchers"),
        (request(queries=[{}] * 65), "over 64 queries and matchers"),
        (request(accepted_response_types=[1]), "SAMPLES"),
    ],
)
def test_wrong_requests_are_told(body: bytes, said: str) -> None:
    with pytest.raises((BadRecord, Invalid), match=said):
        decode_request(body, matchers_max=64)


@given(int64, int64, st.sampled_from([1_000, 60_000, 86_400_000]))
def test_windows_are_those_whose_samples_are_in_the_range(start_ms: int, end_ms: int, window_ms: int) -> None:
    """Both ends of a range belong to it; times before 1970 and beyond the year 9999 have no windows."""
    found = SeriesQuery(start_ms, end_ms, ()).windows(window_ms)
    assert all(start_ms <= at + window_ms - 1 <= end_ms for at in (*found[:1], *found[-1:]))
    if found:
        assert found[0] - 1 < max(start_ms, 0)
        assert end_ms < found[-1] + 2 * window_ms - 1 or found[-1] > 253_402_000_000_000
    if 0 <= start_ms < end_ms - 2 * window_ms and start_ms < 2**40:
        assert found


def test_an_end_is_told_once_and_never_of_what_may_come() -> None:
    """The first window without a value behind one with a value is marked as the end, unless it may still get a value."""
    values = [(0, 1.0), (10, 2.0), (40, 3.0)]
    assert dict(with_ends(values, 10, 100)) == {0: 1.0, 10: 2.0, 20: None, 40: 3.0, 50: None}
    assert dict(with_ends(values, 10, 50)) == {0: 1.0, 10: 2.0, 20: None, 40: 3.0}
    assert [*with_ends(values, 10, 20)] == values
    assert [*with_ends([], 10, 20)] == []
