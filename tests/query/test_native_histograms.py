"""A scrape in protobuf: native histograms beside classic buckets, and every other family with what its text has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from pipeline.adapters.prometheus import render_views
from pipeline.adapters.prometheus_protobuf import MEDIA_TYPE, ZERO_THRESHOLD, is_preferred
from pipeline.core.exposition import Exposed, Exposition
from pipeline.core.kinds import KINDS, State
from pipeline.core.kinds.histogram import LEAST
from pipeline.core.record import Definition
from tests.core import strategies as some
from tests.prompb import families
from tests.query.support import World, serving

PROTOBUF = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
OF_PROMETHEUS_2 = f"{PROTOBUF},application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
OF_PROMETHEUS_3 = f"{PROTOBUF};q=0.6,application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,*/*;q=0.2"
LATENCY = Definition("latency", "histogram", ("route",))


def state(values: Sequence[Any]) -> State:
    return KINDS["histogram"].collect(values)


def histogram(of: State) -> Any:
    """Return the message of one histogram, as Google's library reads it."""
    body, media_type = render_views(Exposition([Exposed(LATENCY, [("/",)], [of])], {}, 0), OF_PROMETHEUS_2)
    assert media_type == MEDIA_TYPE
    (metric,) = families(body)["latency"].metric
    assert [(it.name, it.value) for it in metric.label] == [("route", "/")]
    return metric.histogram


def buckets(spans: Sequence[Any], deltas: Sequence[int], counts: Sequence[float]) -> dict[int, float]:
    """Return the counts of buckets by their index, as Prometheus reads spans."""
    absolute: list[float] = [*counts]
    for delta in deltas:
        absolute.append(delta + (absolute[-1] if absolute else 0))
    indexes: list[int] = []
    index = 0
    for span in spans:
        index += span.offset
        indexes += range(index, index + span.length)
        index += span.length
    return dict(zip(indexes, absolute, strict=True))


def fraction_bits(schema: int, index: int) -> tuple[int, int]:
    """Return the exponent of two of a bound, base**index, as a fraction."""
    return (index, 1 << schema) if schema >= 0 else (index << -schema, 1)


def is_up_to(value: float, schema: int, index: int) -> bool:
    """Return whether a number is at most base**index: exactly, by integers."""
    power, root = fraction_bits(schema, index)
    numerator, denominator = value.as_integer_ratio()
    numerator, denominator = numerator**root, denominator**root
    return numerator <= denominator << power if power >= 0 else numerator << -power <= denominator


numbers = st.lists(some.close | st.integers(-(2**70), 2**70) | st.floats(-1e300, 1e300), min_size=1, max_size=30)


@given(numbers)
def test_buckets_are_those_of_prometheus(values: list[Any]) -> None:
    """Bucket i counts the numbers above base**(i - 1) up to base**i, of negative ones by their absolute value."""
    of = state(values)
    found = histogram(of)
    assert (found.schema, found.sample_count, found.zero_threshold) == (of[3], len(values), ZERO_THRESHOLD)
    assert found.zero_count == sum(abs(value) <= ZERO_THRESHOLD for value in values)
    positive = buckets(found.positive_span, found.positive_delta, found.positive_count)
    negative = buckets(found.negative_span, found.negative_delta, found.negative_count)
    assert sum(positive.values()) + sum(negative.values()) + found.zero_count == len(values)
    for sign, its in ((1, positive), (-1, negative)):
        for index, count in its.items():
            inside = [
                it
                for it in values
                if sign * it >= LEAST and is_up_to(sign * it, of[3], index) and not is_up_to(sign * it, of[3], index - 1)
            ]
            assert len(inside) == count > 0
    assert found.sample_sum == pytest.approx(float(sum(values)), rel=1e-9, abs=1e300 * 1e-9)


@given(numbers)
def test_classic_buckets_are_there_too(values: list[Any]) -> None:
    """The classic buckets are those of the text, for a Prometheus that takes no native histograms."""
    of = state(values)
    body, _ = render_views(Exposition([Exposed(Definition("d", "histogram"), [()], [of])], {}, 0))
    text = next(it for it in parse_plain(body.decode()) if it.name == "d")
    expected = [(float(it.labels["le"]), it.value) for it in text.samples if it.name == "d_bucket"]
    found = [(it.upper_bound, it.cumulative_count) for it in histogram(of).bucket]
    assert [count for _, count in found] == [count for _, count in expected]
    assert [bound for bound, _ in found] == pytest.approx([bound for bound, _ in expected])


def test_the_coarsest_schema_has_classic_buckets_only() -> None:
    """Prometheus ends at schema -4; numbers from both ends of the floats, of both signs, need one that is coarser.

    Then the whole view is classic: Prometheus takes a family for what its first histogram is, and would refuse the scrape.
    """
    coarsest = state([sign * 2.0**exponent for exponent in range(-1_022, 1_024, 3) for sign in (1, -1)])
    less = state([sign * 2.0**exponent for exponent in range(-600, 600, 3) for sign in (1, -1)])
    assert (coarsest[3], less[3]) == (-5, -4)
    for states, native in ([less], True), ([coarsest], False), ([less, coarsest], False), ([coarsest, less], False):
        labels = [(str(n),) for n in range(len(states))]
        body, _ = render_views(Exposition([Exposed(LATENCY, labels, states)], {}, 0), PROTOBUF)
        for metric in families(body)["latency"].metric:
            found = metric.histogram
            assert (len(found.positive_span) > 0, found.zero_threshold > 0) == (native, native)
            assert found.bucket[-1].upper_bound == math.inf
            assert found.bucket[-1].cumulative_count == found.sample_count


def test_the_zero_bucket_ends_where_other_buckets_begin() -> None:
    """The least number that has a bucket is not among the zeros; the largest one that has none is."""
    found = histogram(state([LEAST, math.nextafter(LEAST, 0), 0, -math.nextafter(LEAST, 0), -LEAST]))
    assert found.zero_threshold == math.nextafter(LEAST, 0)
    assert (found.zero_count, [*found.positive_delta], [*found.negative_delta]) == (3, [1], [1])


def test_counts_beyond_64_bits_are_floats() -> None:
    """A count that no int64 holds makes the histogram one of floats, as a whole."""
    of = (5.0, -3, 8, 0, 2**70, {0: 2**64, 2: 3}, {1: 2**63})
    found = histogram(of)
    assert (found.sample_count, found.sample_count_float) == (0, float(2**70 + 2**64 + 3 + 2**63))
    assert (found.zero_count, found.zero_count_float) == (0, float(2**70))
    assert (buckets(found.positive_span, (), found.positive_count), [*found.positive_delta]) == ({1: 2.0**64, 3: 3}, [])
    assert buckets(found.negative_span, (), found.negative_count) == {2: 2.0**63}
    assert found.bucket[-1].cumulative_count_float == found.sample_count_float
    most = histogram((5.0, 1, 8, 0, 0, {0: 2**63 - 1}, {}))
    assert (most.sample_count, [*most.positive_delta]) == (2**63 - 1, [2**63 - 1])


def test_every_other_family_is_that_of_the_text() -> None:
    """Names, types, labels and values are equal; a counter has the name of its samples."""
    world = World(1)
    world.publish(Definition("hits", "sum", ("path",), monotone=True), {("/",): 3, ("é",): 10**400})
    world.publish(Definition("errors_total", "sum", (), monotone=True), {(): 1.5})
    world.publish(Definition("state", "last", ("host",)), {("n",): (1, 0, 2.5), ("t",): (1, 0, "up")})
    world.publish(Definition("users", "distinct"), {(): KINDS["distinct"].collect([*map(KINDS["distinct"].check, "ab")])})
    world.publish(Definition("best", "topk"), {(): KINDS["topk"].collect([("a", 1)])})
    world.publish(Definition("bad", "sum", ("__x",)), {("1",): 1})
    with serving(world) as server:
        reply = server.request("GET", "/v1/openmetrics", headers={"Accept": OF_PROMETHEUS_3})
        text = {it.name: it for it in parse_plain(server.get("/v1/openmetrics").body.decode())}
    assert reply.headers["content-type"] == MEDIA_TYPE
    found = families(reply.body)
    assert found.keys() == {f"{name}_total" if it.type == "counter" else name for name, it in text.items()}
    for name, family in text.items():
        message = found[f"{name}_total" if family.type == "counter" else name]
        assert (message.type, message.help) == ({"counter": 0, "gauge": 1}[family.type], family.documentation)
        if name != "pipeline_view_staleness_seconds":
            of_text = {frozenset(it.labels.items()): it.value for it in family.samples}
            assert of_text == {labels_of(it): it.counter.value + it.gauge.value for it in message.metric}
    (omitted,) = found["pipeline_view_omitted"].metric
    assert labels_of(omitted) == {("view", "bad"), ("reason", "reserved_label")}


def labels_of(metric: Any) -> frozenset[tuple[str, str]]:
    return frozenset((it.name, it.value) for it in metric.label)


def test_histograms_in_windows_are_gauges() -> None:
    """The counts of a window do not go on in the next one, so Prometheus must not see resets."""
    for window_s, kind in ((0, 4), (60, 5)):
        definition = Definition("d", "histogram", (), window_s=window_s)
        body, _ = render_views(Exposition([Exposed(definition, [()], [state([1])])], {}, 0), PROTOBUF)
        assert families(body)["d"].type == kind


@pytest.mark.parametrize(
    ("accept", "preferred"),
    [
        (OF_PROMETHEUS_2, True),
        (OF_PROMETHEUS_3, True),
        (PROTOBUF, True),
        (PROTOBUF.replace(";", " ; ").upper(), True),
        (f"text/plain;q=0.5,{PROTOBUF};q=0.4", False),
        (f"{PROTOBUF};q=0", False),
        (f"{PROTOBUF};q=x", False),
        (PROTOBUF.replace("delimited", "text"), False),
        ("application/vnd.google.protobuf", False),
        ("application/vnd.google.protobuf;proto=other;encoding=delimited", False),
        ("*/*", False),
        ("", False),
        (";;;,,,=;q", False),
    ],
)
def test_protobuf_is_for_those_who_prefer_it(accept: str, preferred: bool) -> None:
    """Any other Accept header, a malformed one too, gets text as before."""
    assert is_preferred(accept) is preferred
