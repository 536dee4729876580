"""OTLP metrics over HTTP: each point counts once, whatever its temporality; what can't be taken is told."""

from __future__ import annotations

import gzip
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from google.rpc.status_pb2 import Status
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.sdk.metrics import Counter as SdkCounter
from opentelemetry.sdk.metrics import Histogram, MeterProvider, ObservableCounter
from opentelemetry.sdk.metrics.export import AggregationTemporality, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation
from opentelemetry.sdk.resources import Resource

from pipeline.core.token import Token
from pipeline.errors import Invalid, Unavailable
from pipeline.ingest.otlp import parse_export
from pipeline.ingest.totals import RunningTotals
from pipeline.ports import RawDelta, RequestKey
from pipeline.pushed import RunningTotal
from pipeline.query.fairness import FairTurns
from pipeline.settings import QuerySettings
from tests.query.support import Reply, Server, World, serving
from tests.support import LONG, HandClock

PROTOBUF, JSON = "application/x-protobuf", "application/json"
DELTA, CUMULATIVE = AggregationTemporality.DELTA, AggregationTemporality.CUMULATIVE
NOW_NS = 1_700_000_000_000_000_000


def export(metric: dict[str, Any], **resource: str) -> dict[str, Any]:
    attributes = [{"key": key, "value": {"stringValue": value}} for key, value in resource.items()]
    return {"resourceMetrics": [{"resource": {"attributes": attributes}, "scopeMetrics": [{"metrics": [metric]}]}]}


def sum_of(name: str, *points: dict[str, Any], temporality: int = 1, monotone: bool = True) -> dict[str, Any]:
    of = {"dataPoints": points, "aggregationTemporality": temporality, "isMonotonic": monotone}
    return export({"name": name, "sum": of})


def point(value: object, at: int = 1, start: int = 0, **attributes: Any) -> dict[str, Any]:
    named = [{"key": key, "value": value} for key, value in attributes.items()]
    return {"asInt": str(value), "timeUnixNano": str(NOW_NS + at), "startTimeUnixNano": start, "attributes": named}


def as_protobuf(request: dict[str, Any]) -> bytes:
    return ParseDict(request, ExportMetricsServiceRequest()).SerializeToString()


def post(server: Server, body: dict[str, Any] | bytes, media_type: str = JSON, **headers: str) -> Reply:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.request("POST", "/v1/metrics", content, {"Content-Type": media_type, **headers})


def series(server: Server, view: str, *labels: str) -> dict[tuple[str, ...], Any]:
    server.world.fold()
    rows = server.view(view)["series"]
    return {tuple(row["labels"].get(label) for label in labels): row["value"] for row in rows}


def left_out(server: Server) -> Counter[str]:
    """Return the points that were left out until now, by reason."""
    found = server.get("/v1/status").json()["ingest_left_out"]
    return Counter({it["reason"]: it["count"] for it in found if it["protocol"] == "otlp"})


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("temporality", [DELTA, CUMULATIVE])
def test_the_sdk_exports(server: Server, temporality: AggregationTemporality, compression: str) -> None:
    """Counters, gauges and histograms of two processes, each with several exports, by the SDK's own exporter."""
    prefix = f"sdk.{temporality.name}.{compression}".lower()
    view = prefix.replace(".", "_")
    kinds = dict.fromkeys((SdkCounter, Histogram, ObservableCounter), temporality)
    for process in (1, 2):
        exporter = OTLPMetricExporter(
            f"{server.url}/v1/metrics", preferred_temporality=kinds, compression=Compression(compression)
        )
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=3_600_000)
        provider = MeterProvider([reader], Resource({"service.name": "shop", "host.name": "not a label"}))
        meter = provider.get_meter("test")
        counter, took = meter.create_counter(f"{prefix}.jobs"), meter.create_histogram(f"{prefix}.took")
        level, running = meter.create_gauge(f"{prefix}.level"), meter.create_up_down_counter(f"{prefix}.running")
        for _ in range(3):
            counter.add(process, {"queue.name": "mail", "ok": True, "n": 3})
            counter.add(0.5, {"queue.name": "print"})
            took.record(7)
            took.record(7_000)
            level.set(process)
            running.add(process)
            assert provider.force_flush()
        provider.shutdown()
    jobs = series(server, f"{view}_jobs", "service_name", "queue_name", "ok", "n")
    assert jobs == {("shop", "mail", "true", "3"): 9, ("shop", "print", "", ""): 3}
    buckets = series(server, f"{view}_took_bucket", "le")
    assert (buckets["5.0",], buckets["10.0",], buckets["5000.0",], buckets["+Inf",]) == (0, 6, 6, 12)
    assert series(server, f"{view}_took_count") == {(): 12}
    assert series(server, f"{view}_took_sum") == {(): 42_042}
    assert series(server, f"{view}_level") == {(): 2}
    assert series(server, f"{view}_running") == {(): 6}
    found = {it["name"]: it for it in server.get("/v1/views").json()["views"]}
    assert found[f"{view}_jobs"]["monotone"] is found[f"{view}_took_bucket"]["monotone"] is True
    assert found[f"{view}_jobs"]["labels"] == ["n", "ok", "queue_name", "service_name"]


@pytest.mark.parametrize("temporality", [DELTA, CUMULATIVE])
def test_the_sdk_exports_exponential_histograms(server: Server, temporality: AggregationTemporality) -> None:
    """Count, sum and extremes are exact, and quantiles as near as their bound says, though resolutions differ."""
    name = f"exponential.{temporality.name}".lower()
    exact: list[float] = []
    for process, scale in ((1, 20), (2, 3)):
        aggregation = ExponentialBucketHistogramAggregation(max_size=160, max_scale=scale)
        exporter = OTLPMetricExporter(
            f"{server.url}/v1/metrics",
            preferred_temporality={Histogram: temporality},
            preferred_aggregation={Histogram: aggregation},
        )
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=3_600_000)
        provider = MeterProvider([reader], Resource({"service.name": "shop"}))
        took = provider.get_meter("test").create_histogram(name)
        draw = random.Random(process)
        for number in range(4):
            for _ in range(250):
                exact.append(draw.choice([0, 1, 1, 1]) * draw.lognormvariate(number, number))
                took.record(exact[-1])
            assert provider.force_flush()
        provider.shutdown()
    quantiles = [0, 0.01, 0.1, 0.5, 0.9, 0.999, 1]
    server.world.fold()
    (found,) = server.view(name.replace(".", "_"), *[("q", q) for q in quantiles])["series"]
    value = found["value"]
    assert (value["count"], value["min"], value["max"]) == (len(exact), min(exact), max(exact))
    assert value["sum"] == pytest.approx(math.fsum(exact))
    for quantile, of in zip(quantiles, value["quantiles"].values(), strict=True):
        true = sorted(exact)[max(1, math.ceil(quantile * len(exact))) - 1]
        assert of == pytest.approx(true, rel=value["relative_error"]), quantile
    assert value["relative_error"] < 0.1


@pytest.mark.parametrize("temporality", [1, 2])
def test_exponential_totals_and_deltas(server: Server, temporality: int) -> None:
    """A repeat counts once, a point without observations makes nothing, and a total of which a bucket falls is refused."""
    name = f"buckets_{temporality}"

    def send(at: int, *counts: int) -> Any:
        buckets = {"count": sum(counts), "sum": 2.0 * sum(counts), "positive": {"offset": 0, "bucketCounts": counts}}
        of = {**point(0, at, 10**18 * 4), "scale": 0, **buckets}
        of.pop("asInt")
        request = export({"name": name, "exponentialHistogram": {"dataPoints": [of], "aggregationTemporality": temporality}})
        replies = [post(server, as_protobuf(request), PROTOBUF) for _ in range(2)]
        assert {reply.status for reply in replies} == {200}
        return replies[0].body

    assert send(1) == send(2, 1, 0, 2) == b""
    assert send(3, 1, 0, 2) == send(4, 1, 1, 3) == b""
    found = series(server, name)[()]
    assert (found["count"], found["sum"]) == ((11, 22) if temporality == 1 else (5, 10))
    assert (1 < found["min"] <= 2, 4 < found["max"] <= 8) == (True, True)
    assert (b"falls" in send(5, 0, 9, 3)) == (temporality == 2)
    assert send(6, 0, 9, 4) == b""
    assert series(server, name)[()]["count"] == (11 + 12 + 13 if temporality == 1 else 6)


@pytest.mark.parametrize("temporality", [1, 2])
def test_a_repeat_counts_once(server: Server, temporality: int) -> None:
    """A request with the same bytes, compressed or not, is a repeat; with other times it is not."""
    name = f"repeated_{temporality}"
    start = 10**18 * 4
    for at, value in ((1, 5), (2, 7)):
        body = json.dumps(sum_of(name, point(value, at, start), temporality=temporality)).encode()
        for _ in range(2):
            assert post(server, body).json() == {}
            assert post(server, gzip.compress(body), JSON, **{"Content-Encoding": "gzip"}).json() == {}
    assert series(server, name) == {(): 12 if temporality == 1 else 7}


@pytest.mark.parametrize("temporality", [1, 2])
def test_an_export_takes_its_turn(server: Server, temporality: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are among the writes of which a writer may not be far ahead, with what they are once decompressed."""
    waited: list[str] = []
    noted: list[tuple[str, int, int]] = []

    async def wait(_: FairTurns, name: str, _is_gone: object) -> None:
        waited.append(name)

    def note(_: FairTurns, name: str, next_offsets: dict[int, int], size: int) -> None:
        noted.append((name, len(next_offsets), size))

    monkeypatch.setattr(FairTurns, "wait", wait)
    monkeypatch.setattr(FairTurns, "note", note)
    body = json.dumps(sum_of(f"turns_{temporality}", point(5, 1, 10**18 * 4), temporality=temporality)).encode()
    assert post(server, gzip.compress(body), JSON, **{"Content-Encoding": "gzip"}).json() == {}
    assert (waited, noted) == (["address 127.0.0.1"], [("address 127.0.0.1", 1, len(body))])


def test_what_is_left_out_is_told(server: Server) -> None:
    """A partial success says how many points were rejected and why; the others count; the status has them by reason."""
    wrong = {
        "value": [{**point(1), "asInt": "-1"}],
        "labels": [point(1, le={"arrayValue": {}}), point(1, **{"a.b": {"intValue": 1}, "a_b": {"intValue": 2}})],
        "timestamp": [{"asInt": 1}],
    }
    points = [it for them in wrong.values() for it in them]
    request = sum_of("told", point(4), *points, {"timeUnixNano": 1, "flags": 1})
    metrics = request["resourceMetrics"][0]["scopeMetrics"][0]["metrics"]
    unfit = {**point(1), "count": 3, "bucketCounts": [1, 1], "explicitBounds": [1]}
    quantiles = {"dataPoints": [{"timeUnixNano": 1}]}
    metrics += [
        {"name": "told.x", "summary": quantiles},
        {"name": "told.y", "exponentialHistogram": quantiles},
        {"name": "told.e", "exponentialHistogram": {"dataPoints": [unfit], "aggregationTemporality": 1}},
        {"name": "1/-é", "gauge": {"dataPoints": [point(1)]}},
        {"name": "told/z", "sum": {"dataPoints": [point(1)]}},
        {"name": "told.a_b", "gauge": {"dataPoints": [point(1)]}},
        {"name": "told.a.b", "gauge": {"dataPoints": [point(1)]}},
        {"name": "told.h", "histogram": {"dataPoints": [unfit], "aggregationTemporality": 1}},
        {"name": "told.s", "sum": {"dataPoints": [point(1)], "aggregationTemporality": 2, "isMonotonic": True}},
    ]  # fmt: skip
    expected = {"value": 1, "labels": 2, "timestamp": 1, "summary": 1, "name": 1}
    expected |= {"temporality": 2, "collision": 1, "buckets": 2, "start": 1}
    before = left_out(server)
    answer = post(server, request).json()["partialSuccess"]
    assert answer["rejectedDataPoints"] == str(sum(expected.values()))
    assert all(f"{reason}: " in answer["errorMessage"] for reason in expected)
    assert left_out(server) - before == expected
    assert series(server, "told") == {(): 4}
    body = ExportMetricsServiceRequest()
    body.resource_metrics.add().scope_metrics.add().metrics.add(name="t").summary.data_points.add()
    reply = post(server, body.SerializeToString(), PROTOBUF)
    partial = ExportMetricsServiceResponse.FromString(reply.body).partial_success
    assert (reply.headers["content-type"], partial.rejected_data_points) == (PROTOBUF, 1)
    assert "quantiles" in partial.error_message


def test_errors_are_what_clients_of_otlp_read() -> None:
    """A body that is no export is 400, too much is 413, with a Status in the encoding of the request; no log is 503."""
    world = World(settings=QuerySettings(body_bytes_max=2_000_000, deltas_max=3))
    with serving(world) as server:
        for body, media_type in (
            (b"\x0a", PROTOBUF),
            (b"{", JSON),
            (b'{"resourceMetrics":7}', JSON),
            (b"\x0a\x02\x12\x05", PROTOBUF),
        ):
            reply = post(server, body, media_type)
            assert (reply.status, reply.headers["content-type"]) == (400, media_type)
            status = Status.FromString(reply.body) if media_type == PROTOBUF else reply.json()
            assert "not an export" in (status.message if isinstance(status, Status) else status["message"])
        assert post(server, sum_of("much", *[point(1, at) for at in range(1, 5)])).status == 413
        zipped = {"Content-Encoding": "gzip"}
        for body, status in ((b"x", 400), (gzip.compress(b"{}")[:-3], 400), (gzip.compress(b"{}") + b"x", 400)):
            assert post(server, body, JSON, **zipped).status == status
        assert post(server, gzip.compress(b" " * 2_000_001), JSON, **zipped).status == 413
        assert post(server, gzip.compress(b" " * 1_999_998 + b"{}"), JSON, **zipped).json() == {}
        assert post(server, b"{}", "text/plain").status == 415
    world.ingest = _Away()  # type: ignore[assignment]
    with serving(world) as server:
        reply = post(server, sum_of("away", point(1)))
        assert (reply.status, reply.json()["code"]) == (503, 14)
        assert "retry-after" in reply.headers


class _Away:
    def fitting(self, deltas: Any, key: Any = None, bounds: Any = None) -> Any:
        raise Unavailable("the log is away")


class _Log:
    """An ingest that counts each key once, and can be away, before or after it has counted."""

    def __init__(self) -> None:
        self.counted: dict[RequestKey, int] = {}
        self.away = ""

    def fitting(self, deltas: Any, key: Any = None, bounds: Any = None) -> Any:
        if self.away == "before":
            raise Unavailable("away")
        total = sum(delta.value for delta in deltas)
        assert self.counted.setdefault(key, total) == total
        if self.away == "after":
            raise Unavailable("away")
        return Token(), []


@pytest.mark.parametrize("away", ["before", "after"])
@pytest.mark.parametrize("repeated", [True, False])
def test_totals_whose_outcome_is_not_known(away: str, repeated: bool) -> None:
    """An increase that may be counted is sent again, unchanged, before the next: nothing is lost and nothing is twice."""
    log, clock = _Log(), HandClock()
    totals = RunningTotals(log, clock, 10)  # type: ignore[arg-type]
    start = clock.now_ms() * 1_000_000 + 1

    def publish(value: int, at: int) -> None:
        total = RunningTotal(1, "a", start, at, [RawDelta("v", "sum", {}, value, monotone=True)])
        assert totals.publish([total], RequestKey("", "", str(at).encode())) == (Token(), [])

    publish(5, 1)
    log.away = away
    for value, at in ((7, 2), (7, 2) if repeated else (9, 3)):
        with pytest.raises(Unavailable):
            publish(value, at)
    log.away = ""
    for value, at in ((7, 2), (9, 3), (10, 4), (9, 3)):
        publish(value, at)
    assert sum(log.counted.values()) == 10


def test_totals_that_can_not_be_told(server: Server) -> None:
    """A stream that began before the server, that was forgotten, or that falls counts from its next total, and is told.

    A total that is larger is newer, whatever its time.
    """
    log, clock = _Log(), HandClock()
    totals = RunningTotals(log, clock, 2)  # type: ignore[arg-type]
    began = clock.now_ms() * 1_000_000

    def publish(stream: str, value: float, at: int, start: int) -> list[str]:
        total = RunningTotal(1, stream, start, at, [RawDelta("v", "sum", {}, value, monotone=True)])
        return [it.reason for it in totals.publish([total], RequestKey("", stream, str(at).encode()))[1]]

    assert publish("old", 100, 1, began - 1) == ["baseline"]
    assert publish("old", 103, 2, began - 1) == []
    assert publish("new", 5, 1, began + 5) == []
    assert publish("new", 4, 2, began + 5) == ["falls"]
    assert publish("new", 6, 3, began + 5) == []
    assert publish("new", float("nan"), 4, began + 5) == ["value"]
    assert sum(log.counted.values()) == 3 + 5 + 2
    assert publish("third", 1, 1, began + 9) == []  # `old` is forgotten
    assert publish("fourth", 1, 1, began + 9) == []  # and `new`
    for value, at in ((9, 2**60), (9, 2**60), (10, 3), (9, 2)):  # its clock was put back
        assert publish("third", value, at, began + 9) == []
    assert publish("new", 7, 5, began + 5) == ["baseline"]
    assert publish("resumed", 1_000, began + 20, began + 20) == ["baseline"]
    assert publish("resumed", 1_001, began + 21, began + 20) == []
    assert publish("new", 8, 6, began + 5) == []
    assert sum(log.counted.values()) == 10 + 10 + 1 + 1 + 1


def test_a_stream_is_what_its_attributes_say(server: Server) -> None:
    """Attributes in another order are the same stream; 1 and true, or two versions of a scope, are two; if two totals are
    of one stream all the same, the second is refused.
    """
    start = 10**18 * 4
    one, two = {"intValue": 1}, {"intValue": 2}
    for at, attributes in ((1, {"a": one, "b": two}), (2, {"b": two, "a": one})):
        assert post(server, sum_of("ordered", point(5, at, start, **attributes), temporality=2)).json() == {}
    assert series(server, "ordered") == {(): 5}
    points = [point(5, 1, start, a=one), point(6, 1, start, a={"boolValue": True})]
    assert post(server, sum_of("typed", *points, temporality=2)).json() == {}
    assert series(server, "typed", "a") == {("1",): 5, ("true",): 6}
    request = sum_of("scoped", point(5, 1, start), temporality=2)
    (scope,) = request["resourceMetrics"][0]["scopeMetrics"]
    request["resourceMetrics"][0]["scopeMetrics"] = [{**scope, "scope": {"version": version}} for version in ("1", "2", "2")]
    for media_type, body in ((JSON, json.dumps(request).encode()), (PROTOBUF, as_protobuf(request))):
        totals = parse_export(body, media_type, 10, []).totals
        assert [totals[0].stream == it.stream for it in totals] == [True, False, False]
        assert totals[1].stream == totals[2].stream
    answer = post(server, request).json()["partialSuccess"]
    assert (answer["rejectedDataPoints"], answer["errorMessage"].partition(":")[0]) == ("1", "twice")
    assert series(server, "scoped") == {(): 10}


def test_views_of_two_metrics_never_mix(server: Server) -> None:
    """A counter with the name of a histogram's count is refused, and not added to it."""
    observed = {**point(0), "count": 3, "sum": 4}
    del observed["asInt"]
    request = export({"name": "mix", "histogram": {"dataPoints": [observed], "aggregationTemporality": 1}})
    counter = {"name": "mix.count", "sum": {"dataPoints": [point(7)], "aggregationTemporality": 1, "isMonotonic": True}}
    request["resourceMetrics"][0]["scopeMetrics"][0]["metrics"].append(counter)
    assert "collision" in post(server, request).json()["partialSuccess"]["errorMessage"]
    assert series(server, "mix_count") == {(): 3}


def test_totals_need_a_server_that_gets_all_of_them() -> None:
    """A parsed export has totals apart, so that a server that may not get all of them can refuse them."""
    pushed = parse_export(json.dumps(sum_of("t", point(5, 1, 7), temporality=2)).encode(), JSON, 10, [])
    assert not pushed.deltas
    assert len(pushed.totals) == 1


NAMES = st.sampled_from(["a", "a.b", "é", "le", ""])
VALUES = st.one_of(
    st.builds(lambda it: {"stringValue": it}, st.text(max_size=3)),
    st.builds(lambda it: {"intValue": str(it)}, st.integers(-(2**63), 2**63 - 1)),
    st.builds(lambda it: {"doubleValue": it}, st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(lambda it: {"boolValue": it}, st.booleans()),
    st.just({"arrayValue": {"values": []}}),
)
ATTRIBUTES = st.lists(st.builds(lambda key, value: {"key": key, "value": value}, NAMES, VALUES), max_size=3)
TIMES = st.sampled_from(["0", "1", str(NOW_NS)])
NUMBERS = st.one_of(
    st.builds(lambda it: {"asInt": str(it)}, st.integers(-(2**63), 2**63 - 1)),
    st.builds(lambda it: {"asDouble": it}, st.floats(allow_nan=False, allow_infinity=False)),
    st.just({}),
)
BUCKETS = st.builds(
    lambda count, counts: {
        "count": str(count),
        "sum": 1.5,
        "bucketCounts": counts,
        "explicitBounds": [1, 2][: len(counts) - 1],
    },
    st.integers(0, 5),
    st.lists(st.sampled_from(["0", "1"]), max_size=3),
)

RUNS = st.none() | st.builds(
    lambda offset, counts: {"offset": offset, "bucketCounts": counts},
    st.integers(-9, 9),
    st.lists(st.integers(0, 2), max_size=3),
)
EXPONENTIAL = st.builds(
    lambda count, scale, zeros, positive, negative, ends: {
        **{key: value for key, value in (("positive", positive), ("negative", negative)) if value},
        "count": str(count),
        "sum": 1.5,
        "scale": scale,
        "zeroCount": zeros,
        **ends,
    },
    st.integers(0, 3),
    st.integers(-6, 20),
    st.sampled_from(["0", "1"]),
    RUNS,
    RUNS,
    st.sampled_from([{}, {"min": 0, "max": 0}, {"zeroThreshold": 0.5, "min": "Infinity"}]),
)


def drawn(kind: str, points: list[tuple[Any, Any, str, str]], temporality: int, monotone: bool) -> dict[str, Any]:
    """Return the data of a metric."""
    found = [
        {**value, "attributes": attributes, "timeUnixNano": at, "startTimeUnixNano": start}
        for value, attributes, at, start in points
    ]
    more = {"gauge": {}, **{it: {"aggregationTemporality": temporality} for it in ("histogram", "exponentialHistogram")}}
    return {kind: {"dataPoints": found, **more.get(kind, {"aggregationTemporality": temporality, "isMonotonic": monotone})}}


DATA = st.builds(
    drawn,
    st.sampled_from(["gauge", "sum", "histogram", "exponentialHistogram"]),
    st.lists(st.tuples(NUMBERS | BUCKETS | EXPONENTIAL, ATTRIBUTES, TIMES, TIMES), max_size=3),
    st.integers(0, 2),
    st.booleans(),
)


@pytest.mark.timeout(1_800)  # of 10,000 examples on a busy machine
@settings(max_examples=10_000 if LONG else 60, deadline=None)
@given(NAMES, DATA, ATTRIBUTES)
def test_both_encodings_mean_the_same(name: str, data: dict[str, Any], resource: list[Any]) -> None:
    """An export that opentelemetry-proto encodes is read alike from protobuf and from JSON."""

    of = {
        "resourceMetrics": [{"resource": {"attributes": resource}, "scopeMetrics": [{"metrics": [{"name": name, **data}]}]}]
    }
    message = ParseDict(of, ExportMetricsServiceRequest(), ignore_unknown_fields=True)
    found = parse_export(message.SerializeToString(), PROTOBUF, 100, ["a.b"])
    assert found == parse_export(json.dumps(MessageToDict(message)).encode(), JSON, 100, ["a.b"])


def streams_of(*points: dict[str, Any], **resource: str) -> list[Any]:
    of = {"dataPoints": points, "aggregationTemporality": 2, "isMonotonic": True}
    body = json.dumps(export({"name": "t", "sum": of}, **resource)).encode()
    return [it.stream for it in parse_export(body, JSON, 10, []).totals]


def test_a_stream_is_remembered_by_its_digest() -> None:
    """Long attributes are not kept; the order of attributes makes no stream, and each type of a value makes another."""
    one, two = {"stringValue": "1"}, {"stringValue": "2"}
    assert streams_of(point(1, start=7, a=one, b=two)) == streams_of(point(1, start=7, b=two, a=one))
    values: list[Any] = [one, {"intValue": "1"}, {"boolValue": True}, {"doubleValue": 1.0}, {"stringValue": "x" * 9_999}]
    found = [stream for value in values for stream in streams_of(point(1, start=7, a=value))]
    found += streams_of(point(1, start=7, a=one), host="x" * 99_999) + streams_of(point(1, start=8, a=one))
    assert len({*found}) == len(found) == 7
    assert {len(it) for it in found} == {32}


EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=4)), max_size=4)


@pytest.mark.timeout(1_800)  # of 10,000 examples on a busy machine
@settings(max_examples=10_000 if LONG else 60, deadline=None)
@given(NAMES, DATA, ATTRIBUTES, EDITS, st.sampled_from([PROTOBUF, JSON]))
def test_any_bytes_are_an_export_or_invalid(
    name: str, data: dict[str, Any], resource: list[Any], edits: list[tuple[float, int, bytes]], media_type: str
) -> None:
    """No bytes raise anything but `Invalid`: exports of which some are cut out, or replaced by others."""
    of = {"resource": {"attributes": resource}, "scopeMetrics": [{"metrics": [{"name": name, **data}]}]}
    message = ParseDict({"resourceMetrics": [of]}, ExportMetricsServiceRequest(), ignore_unknown_fields=True)
    body = message.SerializeToString() if media_type == PROTOBUF else json.dumps(MessageToDict(message)).encode()
    for place, count, more in edits:
        at = int(place * len(body))
        body = body[:at] + more + body[at + count :]
    with suppress(Invalid):
        parse_export(body, media_type, 10, [])


HOSTILE = {
    "attributes": (PROTOBUF, b"\x0a\x0c\x12\x0a\x12\x08\x3a\x06\x0a\x04\x3a\x02\x0a\x00"),
    "unknown fields": (PROTOBUF, b"\x78\x01"),
    "long numbers": (PROTOBUF, b"\x78" + b"\xff" * 9 + b"\x01"),
    "empty groups": (PROTOBUF, b"\x0a\x02\x12\x00"),
    "brackets": (JSON, b"["),
    "objects": (JSON, b'{"a":'),
    "quotes": (JSON, b'"\\u0000'),
    "digits": (JSON, b"9"),
    "keys": (JSON, b'{"resourceMetrics":[],"'),
}


@pytest.mark.parametrize("kind", [*HOSTILE])
def test_the_time_is_linear(kind: str) -> None:
    """A body of eight times the length takes no more than a few times as long, whatever it is made of."""
    media_type, part = HOSTILE[kind]
    times = []
    for size in (8_192, 65_536):
        body = part * (size // len(part))
        spent = []
        for _ in range(3):
            start_s = time.thread_time()
            with suppress(Invalid):
                parse_export(body, media_type, 100_000, [])
            spent.append(time.thread_time() - start_s)
        times.append(min(spent))
    assert times[1] < 24 * times[0] + 0.02, times


def test_groups_without_points_are_bounded() -> None:
    """Resources, metrics and objects without points are counted before memory is taken for them."""
    for body in (b"\x0a\x00" * 11, b"\x0a\x18\x12\x16" + b"\x12\x00" * 11):
        with pytest.raises(Invalid, match="too many"):
            parse_export(body, PROTOBUF, 10, [])
        assert parse_export(body, PROTOBUF, 13, []).whole
    text = b'{"resourceMetrics":[' + b"{}," * 200 + b"{}]}"
    assert not parse_export(text, JSON, 10, []).whole
    assert parse_export(text, JSON, 20, []).whole


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of this module's own, whose counts the tests read."""
    with serving(World()) as running:
        yield running
