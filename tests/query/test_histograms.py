"""Histograms in reads and scrapes: quantiles by parameter, over partitions and windows; classic buckets."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain
from prometheus_client.utils import floatToGoString

from pipeline.adapters.http import HttpReader
from pipeline.adapters.prometheus import render_views
from pipeline.core.exposition import BOUNDS_LEAST, BOUNDS_MAX, ClassicBuckets, Exposed, Exposition, bound_text, choose
from pipeline.core.kinds import KINDS, State
from pipeline.core.kinds.histogram import BUCKETS_MAX, SCHEMA_MAX, bound_of
from pipeline.core.query import merge_definitions
from pipeline.core.record import Definition
from pipeline.errors import Invalid
from pipeline.settings import QuerySettings
from tests.core import strategies as some
from tests.query.support import Server, World, serving
from tests.support import HandClock

LATENCY = Definition("latency", "histogram", ("route",))
PARTS = {"/": [0.001 * i for i in range(1, 1_001)], "/cart": [2.0] * 10, "/pay": [-1, 0, 5]}
OPENMETRICS = "application/openmetrics-text;version=1.0.0"


def state(values: Sequence[Any]) -> State:
    return KINDS["histogram"].collect(values)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Serve a view whose series are spread over all partitions, and one of another kind."""
    world = World()
    for number in range(len(world.partitions)):
        parts = {(route,): values[number::4] for route, values in PARTS.items()}
        world.append(number, LATENCY, {labels: state(values) for labels, values in parts.items() if values})
    world.fold()
    world.publish(Definition("hits", "sum"), {(): 1})
    with serving(world) as running:
        yield running


def test_an_answer_is_that_of_all_deltas(server: Server) -> None:
    """The parts of a histogram in several partitions make the answer of a histogram of all deltas."""
    by_route = {it["labels"]["route"]: it["value"] for it in server.view("latency")["series"]}
    answer = KINDS["histogram"].answer
    for route, values in PARTS.items():
        expected = answer(state(values))
        nearly = {name: pytest.approx(expected[name]) for name in ("sum", "mean")}
        assert by_route[route] == {**expected, **nearly}
    error = by_route["/"]["relative_error"]
    assert by_route["/"]["quantiles"] == {str(q): pytest.approx(q, rel=error) for q in (0.5, 0.9, 0.99)}
    ((total,),) = [[it["value"] for it in server.view("latency", ("by", ""))["series"]]]
    assert total["count"] == 1_013
    (pinned,) = server.view("latency", ("where", "route=/cart"))["series"]
    assert pinned["value"] == by_route["/cart"]
    assert pinned["value"]["quantiles"] == {"0.5": 2, "0.9": 2, "0.99": 2}


def test_quantiles_are_those_that_are_asked_for(server: Server) -> None:
    """Quantiles are in the order of the query, each once, over HTTP and by the reader, for scans and single series."""
    for where in ((), (("where", "route=/"),)):
        asked = server.view("latency", ("q", "0.95"), ("q", "0"), ("q", ".95"), ("q", "1"), *where)
        (of,) = [it["value"]["quantiles"] for it in asked["series"] if it["labels"]["route"] == "/"]
        assert [*of] == ["0.95", "0", "1"]
        assert of == {"0.95": pytest.approx(0.95, rel=0.03), "0": 0.001, "1": 1.0}
    with HttpReader(server.url) as reader:
        assert reader.get("latency", {"route": "/cart"}, q=0.25).value()["quantiles"] == {"0.25": 2.0}
        assert [*reader.get("latency", by=[], q=(0.1, 0.2)).value()["quantiles"]] == ["0.1", "0.2"]
        with pytest.raises(Invalid, match="q: a number from 0 to 1"):
            reader.get("latency", q=[2])


def test_top_is_by_count_or_by_the_first_quantile(server: Server) -> None:
    """`top` ranks by the first quantile, or, without `q`, by the number of observations."""
    assert [it["labels"]["route"] for it in server.view("latency", ("top", "2"))["series"]] == ["/", "/cart"]
    asked = server.view("latency", ("top", "2"), ("q", "1"), ("q", "0.1"))
    assert [it["labels"]["route"] for it in asked["series"]] == ["/pay", "/cart"]
    least = server.view("latency", ("bottom", "1"), ("q", "1"))
    assert least["series"][0]["labels"]["route"] not in ("/pay", "/cart")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("latency?q=", "q: a number from 0 to 1"),
        ("latency?q=x", "q: a number from 0 to 1"),
        ("latency?q=1.5", "q: a number from 0 to 1"),
        ("latency?q=nan", "q: a number from 0 to 1"),
        ("latency?q=0.5,0.9", "q: a number from 0 to 1"),
        ("latency?" + "&".join(["q=0.5"] * 65), "65 `where`, `by` and `q` parameters; at most 64"),
        ("latency?" + "&".join(["q=0.5"] * 3_000), "`where`, `by` and `q`"),
        ("hits?q=0.5", "q: a sum has no quantiles"),
        ("hits?q=0.5&by=", "q: a sum has no quantiles"),
    ],
)
def test_wrong_quantiles_are_told(server: Server, path: str, said: str) -> None:
    """A wrong quantile is answered with 400, what is wrong, and the kind of the view."""
    assert said in server.problem(400, server.get(f"/v1/views/{path}"))


def test_deltas_over_http_make_histograms(server: Server) -> None:
    """A single delta of kind histogram is a number; a text and an int beyond all floats are refused."""
    body = [{"view": "sizes", "kind": "histogram", "value": value, "labels": {}} for value in (1, 2.5, 10)]
    assert server.request("POST", "/v1/deltas", json.dumps(body)).status == 200
    server.world.fold()
    assert server.view("sizes")["series"][0]["value"]["count"] == 3
    for bad in ("x", None, 2**1_024):
        reply = server.request("POST", "/v1/deltas", json.dumps([{**body[0], "value": bad}]))
        assert "delta 0" in server.problem(400, reply)


def test_points_are_histograms_of_their_windows() -> None:
    """Windows merge to points; a view with windows takes `q` too, and another kind refuses it."""
    clock = HandClock()
    world = World(2, clock=clock)
    windowed = Definition("slow", "histogram", ("route",), window_s=60)
    present = clock.now_ms() // 60_000 * 60_000
    for number, values in enumerate(([1, 2, 3], [4], [5, 6])):
        world.append(number % 2, windowed, {("/",): state(values)}, present - 60_000 * (number + 1))
    world.append(0, Definition("hits", "sum", (), window_s=60), {(): 3}, present - 60_000)
    world.fold()
    exposition = world.reader.scrape(("slow",), deadline_s=world.clock.monotonic_s() + 30)
    with serving(world) as running:
        span = ("start", str(present - 180_000)), ("end", str(present))
        (series,) = running.view("slow", *span, ("q", "1"))["series"]
        found = [(start_ms - present, it["count"], it["quantiles"]) for start_ms, it in series["points"]]
        assert found == [(-180_000, 2, {"1": 6}), (-120_000, 1, {"1": 4}), (-60_000, 3, {"1": 3})]
        ((_, merged),) = running.view("slow", *span, ("step", "3m"), ("by", ""))["series"][0]["points"]
        assert merged == KINDS["histogram"].answer(state([1, 2, 3, 4, 5, 6]))
        assert "q: a sum has no quantiles" in running.problem(400, running.get("/v1/views/hits?q=0.5"))
        csv = running.request("GET", "/v1/views/slow", headers={"Accept": "text/csv"}).body.decode()
        assert csv.splitlines()[0] == "route,start_ms,value"
    for accept, parse in ((OPENMETRICS, parse_openmetrics), ("", parse_plain)):
        body = render_views(exposition, accept)[0].decode()
        values = {sample.name: sample.value for family in parse(body) for sample in family.samples}
        assert values["slow_gcount"] == 3, "of the newest window that is final; no counter, because the next begins anew"
        assert values["slow_gsum"] == 6
        assert values["slow_bucket"] == 3


# Scrapes


near = st.lists(some.close | st.integers(-(2**70), 2**70) | st.floats(-1e300, 1e300), min_size=1, max_size=30)


@pytest.mark.parametrize(("bounds_max", "schema_max"), [(BOUNDS_MAX, 0), (BUCKETS_MAX, SCHEMA_MAX), (BOUNDS_LEAST, 3)])
@given(runs=st.lists(near, min_size=1, max_size=4))
def test_classic_buckets_count_exactly(bounds_max: int, schema_max: int, runs: list[list[Any]]) -> None:
    """Each classic bucket counts exactly the numbers up to its bound, and bounds are few."""
    if schema_max:  # bounds are floats below powers that no float is; an int may lie between
        runs = [[float(value) for value in run] for run in runs]
    states = [state(run) for run in runs]
    classic = ClassicBuckets(states, bounds_max=bounds_max, schema_max=schema_max)
    assert classic.bounds == sorted(set(classic.bounds))
    assert len(classic.bounds) <= bounds_max
    assert all(math.isfinite(bound) for bound in classic.bounds)
    for run, of in zip(runs, states, strict=True):
        zeros = [0.0 if abs(value) < 2.0**-1022 else value for value in run]
        expected = [sum(value <= bound for value in zeros) for bound in classic.bounds]
        assert classic.counts(of) == [*expected, len(run)]


@given(st.floats(allow_nan=False) | st.integers(-1_074, 1_023).map(lambda power: 2.0**power))
def test_bounds_are_written_as_go_writes_them(bound: float) -> None:
    """Scrapes and remote reads have the same texts of bounds, which are those of prometheus_client."""
    if bound > -math.inf:
        assert bound_text(bound) == floatToGoString(bound)


@given(st.integers(-1_000, 1_000), st.integers(0, SCHEMA_MAX))
def test_a_bound_parts_neighbouring_floats(power: int, schema: int) -> None:
    """The largest float up to a power of a base is counted by its bound, and the next float is not."""
    bound = bound_of(power, schema)
    either = [state([bound]), state([math.nextafter(bound, math.inf)])]
    narrow = [(*it[:3], schema, it[4], {i >> SCHEMA_MAX - schema: n for i, n in it[5].items()}, {}) for it in either]
    classic = ClassicBuckets(narrow, bounds_max=BUCKETS_MAX, schema_max=schema)
    at = classic.bounds.index(bound)
    assert [classic.counts(it)[at] for it in narrow] == [1, 0]


def test_classic_buckets_of_the_widest_range() -> None:
    """Numbers from one end of the floats to the other make few buckets, and no number at all makes one."""
    values = [sign * 2.0**exponent for exponent in range(-1_022, 1_024, 7) for sign in (1, -1)]
    classic = ClassicBuckets([state(values), state([1]), state([0])])
    assert 3 <= len(classic.bounds) <= BOUNDS_MAX
    assert classic.counts(state([0]))[-1] == 1
    assert (ClassicBuckets([]).bounds, ClassicBuckets([state([0])]).bounds) == ([], [0.0])
    assert ClassicBuckets([state([1, 3])]).bounds == [0.5, 1, 2, 4]
    assert ClassicBuckets([state([1, 3])]).counts(state([1, 3])) == [0, 1, 1, 2, 2]


def classic_quantile(quantile: float, buckets: list[tuple[float, float]]) -> float:
    """Compute `histogram_quantile` of Prometheus for one series."""
    rank = quantile * buckets[-1][1]
    at = next(i for i, (_, count) in enumerate(buckets) if count >= rank)
    if math.isinf(buckets[at][0]):
        return buckets[at - 1][0]
    start, before = buckets[at - 1] if at else (0.0 if buckets[0][0] > 0 else buckets[0][0], 0)
    return start + (buckets[at][0] - start) * (rank - before) / ((buckets[at][1] - before) or 1)


@pytest.mark.parametrize("accept", [OPENMETRICS, ""])
def test_a_scrape_has_what_histogram_quantile_expects(accept: str) -> None:
    """A scrape has cumulative buckets up to +Inf, `_count` and `_sum`, from which Prometheus' formula finds quantiles."""
    world = World()
    rng = random.Random(5)
    values = sorted(rng.lognormvariate(-3, 1) for _ in range(3_000))
    world.publish(LATENCY, {("/",): state(values), ("/cart",): state([0.25])})
    exposition = world.reader.scrape((), deadline_s=world.clock.monotonic_s() + 30)
    parse = parse_openmetrics if accept else parse_plain
    found = {family.name: family for family in parse(render_views(exposition, accept)[0].decode())}
    family = found["latency"]
    assert (family.type, family.documentation) == ("histogram", "View of kind histogram.")
    buckets: dict[str, list[tuple[float, float]]] = {"/": [], "/cart": []}
    for sample in family.samples:
        if sample.name == "latency_bucket":
            buckets[sample.labels["route"]].append((float(sample.labels["le"]), sample.value))
    assert [bound for bound, _ in buckets["/"]] == [bound for bound, _ in buckets["/cart"]]
    assert buckets["/"][-1] == (math.inf, 3_000)
    values_of = {(sample.name, sample.labels["route"]): sample.value for sample in family.samples}
    assert values_of["latency_count", "/"] == 3_000
    assert values_of["latency_sum", "/"] == pytest.approx(sum(values))
    for quantile in (0.1, 0.5, 0.9, 0.99):
        exact = values[math.ceil(quantile * 3_000) - 1]
        assert exact / 2 <= classic_quantile(quantile, buckets["/"]) <= exact * 2, "within the buckets' factor of two"


@pytest.mark.parametrize("accept", [OPENMETRICS, ""])
def test_negative_numbers_in_a_scrape(accept: str) -> None:
    """A histogram with numbers below zero has buckets and no sum, which OpenMetrics forbids."""
    exposed = Exposed(Definition("d", "histogram"), [()], [state([-4, -3, 0, 1])])
    body = render_views(Exposition([exposed], {}, 0), accept)[0].decode()
    (family,) = [it for it in (parse_openmetrics if accept else parse_plain)(body) if it.name == "d"]
    found = [(float(sample.labels["le"]), sample.value) for sample in family.samples]
    below = [math.nextafter(-bound, -math.inf) for bound in (4.0, 2.0)]
    assert found == [(below[0], 0), (below[1], 2), (0, 3), (0.5, 3), (1, 4), (math.inf, 4)]


def test_a_histogram_counts_as_its_samples() -> None:
    """The limit of a scrape counts samples, of which a histogram has up to 33."""
    world = World(settings=QuerySettings(openmetrics_series_max=70))
    world.publish(Definition("a", "histogram", ("n",)), {(str(n),): state([n]) for n in range(2)})
    world.publish(Definition("b", "histogram", ("n",)), {("0",): state([1])})
    world.publish(Definition("c", "sum", ("n",)), {(str(n),): n for n in range(4)})
    found = world.reader.scrape((), deadline_s=world.clock.monotonic_s() + 30)
    assert [it.definition.view for it in found.views] == ["a", "c"]
    assert found.omitted == {"b": "series_max"}


def test_names_of_histograms() -> None:
    """A histogram takes up the names of its samples, and its label must not be `le`."""
    definitions = [
        Definition("d", "histogram"),
        Definition("d_count", "sum"),
        Definition("d_bucket", "sum"),
        Definition("e", "histogram", ("le",)),
    ]
    chosen, omitted = choose({it.view: merge_definitions([it]) for it in definitions})
    assert [it.view for it in chosen] == ["d"]
    assert omitted == {"d_bucket": "name_collision", "d_count": "name_collision", "e": "reserved_label"}
