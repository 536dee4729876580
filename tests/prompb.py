"""Messages of Prometheus as Google's library for Protocol Buffers has them: the oracle of our own encoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("google.protobuf", reason="pip install -c constraints.txt -e '.[dev]'")
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.internal.decoder import _DecodeVarint
from google.protobuf.message import DecodeError

__all__ = ["DecodeError", "families", "remote"]
Field = descriptor_pb2.FieldDescriptorProto
TYPES = {
    "double": Field.TYPE_DOUBLE,
    "int64": Field.TYPE_INT64,
    "uint64": Field.TYPE_UINT64,
    "uint32": Field.TYPE_UINT32,
    "sint32": Field.TYPE_SINT32,
    "sint64": Field.TYPE_SINT64,
    "bool": Field.TYPE_BOOL,
    "string": Field.TYPE_STRING,
    "int32": Field.TYPE_INT32,  # for enums, which are encoded alike
}

# By message, its fields: number, name, type; `*` marks a repeated one. From prometheus/prompb/{remote,types}.proto.
REMOTE = {
    "ReadRequest": ("1 queries Query*", "2 accepted_response_types int32*"),
    "ReadResponse": ("1 results QueryResult*",),
    "Query": ("1 start_timestamp_ms int64", "2 end_timestamp_ms int64", "3 matchers LabelMatcher*", "4 hints ReadHints"),
    "QueryResult": ("1 timeseries TimeSeries*",),
    "TimeSeries": ("1 labels Label*", "2 samples Sample*"),
    "Label": ("1 name string", "2 value string"),
    "Sample": ("1 value double", "2 timestamp int64"),
    "LabelMatcher": ("1 type int32", "2 name string", "3 value string"),
    "ReadHints": (
        *("1 step_ms int64", "2 func string", "3 start_ms int64", "4 end_ms int64", "5 grouping string*", "6 by bool"),
        "7 range_ms int64",
    ),
}

# From io/prometheus/client/metrics.proto.
METRICS = {
    "LabelPair": ("1 name string", "2 value string"),
    "Gauge": ("1 value double",),
    "Counter": ("1 value double",),
    "Histogram": (
        *(
            "1 sample_count uint64",
            "4 sample_count_float double",
            "2 sample_sum double",
            "3 bucket Bucket*",
            "5 schema sint32",
        ),
        *("6 zero_threshold double", "7 zero_count uint64", "8 zero_count_float double"),
        *("9 negative_span BucketSpan*", "10 negative_delta sint64*", "11 negative_count double*"),
        *("12 positive_span BucketSpan*", "13 positive_delta sint64*", "14 positive_count double*"),
    ),
    "Bucket": ("1 cumulative_count uint64", "4 cumulative_count_float double", "2 upper_bound double"),
    "BucketSpan": ("1 offset sint32", "2 length uint32"),
    "Metric": ("1 label LabelPair*", "2 gauge Gauge", "3 counter Counter", "7 histogram Histogram"),
    "MetricFamily": ("1 name string", "2 help string", "3 type int32", "4 metric Metric*"),
}


def messages(package: str, fields: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The classes of messages, by name."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    for name, its in fields.items():
        message = file.message_type.add(name=name)
        for it in its:
            number, label, kind = it.split()
            field = message.field.add(name=label, number=int(number))
            field.label = Field.LABEL_REPEATED if kind.endswith("*") else Field.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            if kind in TYPES:
                field.type = TYPES[kind]
            else:
                field.type, field.type_name = Field.TYPE_MESSAGE, f".{package}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in fields}


remote = messages("prometheus", REMOTE)
client = messages("io.prometheus.client", METRICS)


def families(body: bytes) -> dict[str, Any]:
    """Return the families of a scrape in protobuf by their names, of which none stands twice."""
    found: dict[str, Any] = {}
    at = 0
    while at < len(body):
        size, at = _DecodeVarint(body, at)
        family = client["MetricFamily"].FromString(body[at : at + size])
        assert family.name not in found
        found[family.name] = family
        at += size
    assert at == len(body)
    return found
