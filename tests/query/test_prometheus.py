"""A real Prometheus reads views with windows: PromQL equals the query API, late deltas included."""

from __future__ import annotations

import json
import random
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import yaml

from pipeline.core.kinds import KINDS
from pipeline.core.record import Definition
from tests.prometheus import Prometheus, program
from tests.query.support import Server, World, serving
from tests.support import ROOT, wait_until

PAGE = ROOT / "pipeline" / "docs" / "prometheus.md"
MINUTE_MS, DAY_MS = 60_000, 86_400_000
HITS = Definition("hits", "sum", ("path", "zone"), window_s=60, monotone=True)
LATENCY = Definition("latency", "histogram", ("route",), window_s=60)
SIZES = Definition("sizes", "histogram", ("of",))
BURST = Definition("burst", "histogram", (), window_s=86_400)
PEAK = Definition("peak", "max", (), window_s=60)
EVERYWHERE = KINDS["histogram"].collect([sign * 2.0**power for power in range(-1_022, 1_024, 3) for sign in (1, -1)])
"""A histogram whose schema is too coarse for native ones."""


class Running(NamedTuple):
    """A server, and a Prometheus that reads from it."""

    server: Server
    prometheus: Prometheus
    end_ms: int
    """End of the newest window with data, a multiple of 10 minutes."""


def fill(world: World, end_ms: int) -> None:
    """Put three hours of windows into all partitions, some windows left out; half of the deltas come late, in reverse."""
    rng = random.Random(7)
    starts = range(end_ms - 180 * MINUTE_MS, end_ms, MINUTE_MS)
    late: list[tuple[int, Definition, dict[Sequence[str], Any], int]] = []
    for start_ms in starts:
        for path in ("/", "/cart", "/päy"):
            if rng.random() < 0.3:
                continue
            part = {(path, rng.choice(("a", ""))): rng.randrange(100)}
            late.append((rng.randrange(len(world.partitions)), HITS, part, start_ms))
        values = [rng.lognormvariate(-3, 1) for _ in range(rng.randrange(40))]
        if values:
            part = {(rng.choice(("/", "/cart")),): KINDS["histogram"].collect(values)}
            late.append((rng.randrange(len(world.partitions)), LATENCY, part, start_ms))
        late.append((0, PEAK, {(): rng.randrange(-50, 50)}, start_ms))
    for once in late[::2], late[1::2][::-1]:
        for number, definition, series, start_ms in once:
            world.append(number, definition, series, start_ms)
        world.fold()


def sizes() -> dict[tuple[str], list[float]]:
    """Return observations of histograms that are scraped: wide and narrow ones, of both signs, and very many."""
    rng = random.Random(11)
    return {
        ("latency",): [rng.lognormvariate(-3, 2) for _ in range(5_000)],
        ("narrow",): [rng.uniform(0.99, 1.01) for _ in range(500)],
        ("signed",): [rng.gauss(0, 10) for _ in range(500)] + [0] * 20,
    }


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    program("prometheus")
    world = World(3)
    world.publish(Definition("current", "sum"), {(): 1})
    world.publish(SIZES, {of: KINDS["histogram"].collect(values) for of, values in sizes().items()})
    world.publish(SIZES, {("many",): (0, 1.5, 8, 0, 0, {0: 2**63, 2: 2**62}, {})})
    world.publish(Definition("everywhere", "histogram"), {(): EVERYWHERE})
    world.publish(Definition("own", "sum", ("instance", "job")), {("i", "j"): 4})
    world.publish(Definition("up", "sum", ("zone",)), {("b",): 0})
    world.publish(Definition("pipeline_info", "sum", ("role",)), {("queen",): 0})
    world.append(
        0,
        Definition("ALERTS", "sum", ("alertname",), window_s=60),
        {("Fire",): 1},
        world.clock.now_ms() // MINUTE_MS * MINUTE_MS,
    )
    yesterday_ms = (world.clock.now_ms() // DAY_MS - 1) * DAY_MS
    world.append(0, BURST, {(): KINDS["histogram"].collect([3] * 7)}, yesterday_ms)
    end_ms = world.clock.now_ms() // (10 * MINUTE_MS) * 10 * MINUTE_MS
    fill(world, end_ms)
    with serving(world) as server:
        (documented,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.S | re.M)
        config = yaml.safe_load(documented.replace("server:8080", f"127.0.0.1:{server.port}"))
        config["global"] = {"external_labels": {"cluster": "test"}, "scrape_interval": "500ms", "scrape_timeout": "500ms"}
        (job,) = config["scrape_configs"]
        windows = {"job_name": "windows", "params": {"view": ["burst"]}}  # a view that is scraped although it can be read
        config["scrape_configs"].append({**job, **windows})
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), config, "--enable-feature=native-histograms")
        try:
            wait_until(prometheus.healthy, "a first scrape")
            yield Running(server, prometheus, end_ms)
        finally:
            prometheus.close()


def of_api(running: Running, view: str, *query: tuple[str, str]) -> dict[frozenset[tuple[str, str]], dict[int, Any]]:
    """Return the value of each point by the time at which its range ends, by labels."""
    answer = running.server.view(view, *query)
    return {
        frozenset((name, text) for name, text in series["labels"].items() if text): {
            start_ms + answer["over_ms"]: point for start_ms, point in series["points"]
        }
        for series in answer["series"]
    }


def spans(running: Running, step: str, over: str) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Two hours as our API and as Prometheus are asked for them: points stand at their ends there."""
    start_ms, end_ms = running.end_ms - 120 * MINUTE_MS, running.end_ms
    asked = [("start", str(start_ms)), ("end", str(end_ms)), ("step", step), ("over", over)]
    return asked, {"start_ms": start_ms + int(step[:-1]) * MINUTE_MS, "end_ms": end_ms, "step": step}


@pytest.mark.parametrize(("step", "over"), [("10m", "10m"), ("1m", "1m"), ("5m", "1h"), ("1m", "2m")])
def test_sums_over_time_are_those_of_the_api(running: Running, step: str, over: str) -> None:
    """Each point of a range read is PromQL's sum over the same time, in tumbling and in sliding steps."""
    asked, span = spans(running, step, over)
    expected = of_api(running, "hits", *asked)
    assert len(expected) == 6
    assert running.prometheus.matrix(f"sum_over_time(hits[{over}])", **span) == expected
    by_path = of_api(running, "hits", *asked, ("by", "path"), ("where", "zone!=a"))
    assert running.prometheus.matrix(f'sum by (path) (sum_over_time(hits{{zone!="a"}}[{over}]))', **span) == by_path
    peaks = of_api(running, "peak", *asked)
    assert running.prometheus.matrix(f"max_over_time(peak[{over}])", **span) == peaks


def test_a_window_is_drawn_where_it_ends_and_no_further(running: Running) -> None:
    """The value of a window stands at its end; where the next window has no data, nothing is drawn."""
    asked, span = spans(running, "1m", "1m")
    expected = of_api(running, "hits", *asked)
    named = {labels | {("__name__", "hits")}: values for labels, values in expected.items()}
    assert running.prometheus.matrix("hits", **span) == named


def test_deltas_that_come_later_still_are_there_at_once(running: Running) -> None:
    """Prometheus asks again for what it has answered before, and so shows late deltas."""
    asked, span = spans(running, "1h", "1h")
    (before,) = of_api(running, "hits", *asked, ("by", "")).values()
    running.server.world.append(1, HITS, {("/late", ""): 1_000}, running.end_ms - 90 * MINUTE_MS)
    running.server.world.fold()
    span |= {"start_ms": running.end_ms - 60 * MINUTE_MS}
    (after,) = running.prometheus.matrix("sum(sum_over_time(hits[1h]))", **span).values()
    assert after == before | {span["start_ms"]: before[span["start_ms"]] + 1_000}


def test_quantiles_are_those_of_the_api_within_a_bucket(running: Running) -> None:
    """Classic buckets of windows add up; both quantiles lie in one bucket, of a schema with 8 bounds from 1 to 2 here."""
    asked, span = spans(running, "10m", "10m")
    (expected,) = of_api(running, "latency", *asked, ("by", ""), ("q", "0.5"), ("q", "0.95")).values()
    for quantile in "0.5", "0.95":
        expr = f"histogram_quantile({quantile}, sum by (le) (sum_over_time(latency_bucket[10m])))"
        (found,) = running.prometheus.matrix(expr, **span).values()
        assert found.keys() == expected.keys()
        for at, value in found.items():
            assert value == pytest.approx(expected[at]["quantiles"][quantile], rel=2 ** (1 / 8) - 1)
    counts = {at: it["count"] for at, it in expected.items()}
    (found,) = running.prometheus.matrix("sum(sum_over_time(latency_gcount[10m]))", **span).values()
    assert found == counts


def test_views_without_windows_are_scraped_and_the_others_read(running: Running) -> None:
    """With the documented configuration each view comes one way, so that nothing counts twice."""
    assert [*running.prometheus.vector("current").values()] == [1]
    at = running.end_ms / 1_000
    series = running.prometheus.api("series", match='{__name__=~"hits|current"}', start=at - 3_600, end=at + 7_200)
    assert {it.get("job") for it in series if it["__name__"] == "hits"} == {None}
    assert {it.get("job") for it in series if it["__name__"] == "current"} == {"pipeline-views"}


def test_errors_are_shown(running: Running) -> None:
    """The text of an error comes through as a warning of Prometheus."""
    query = urllib.parse.urlencode({"query": 'hits{path=~"' + "x" * 1_001 + '"}'})
    with urllib.request.urlopen(f"{running.prometheus.url}/api/v1/query?{query}", timeout=30) as answer:
        warnings = json.load(answer)["warnings"]
    assert "400 Bad Request: where path: a regular expression of over 1000 bytes" in warnings[0]


def test_scraped_histograms_are_native_with_our_quantiles(running: Running) -> None:
    """`histogram_quantile` of a native histogram is within the error that our own answer states."""
    wait_until(lambda: running.prometheus.vector("histogram_count(sizes)"), "native histograms")
    for quantile in "0.01", "0.5", "0.95", "0.99":
        answer = running.server.view("sizes", ("q", quantile))
        expected = {it["labels"]["of"]: it["value"] for it in answer["series"]}
        found = by_label(running, f"histogram_quantile({quantile}, sizes)", "of")
        assert found.keys() == expected.keys()
        for of, value in found.items():
            own, error = expected[of]["quantiles"][quantile], expected[of]["relative_error"]
            assert value == pytest.approx(own, rel=error + 1e-6) or (of, quantile) == ("signed", "0.5")
    counts = by_label(running, "histogram_count(sizes)", "of")
    assert counts == {"latency": 5_000, "narrow": 500, "signed": 520, "many": 2.0**63 + 2.0**62}
    assert by_label(running, "histogram_sum(sizes)", "of")["narrow"] == pytest.approx(sum(sizes()["narrow",]))


def test_a_histogram_of_all_numbers_stays_classic(running: Running) -> None:
    """Prometheus has no schema that is as coarse; the classic buckets count everything."""
    assert [*running.prometheus.vector("everywhere_count").values()] == [2 * len(range(-1_022, 1_024, 3))]
    assert running.prometheus.vector("everywhere") == {}
    assert EVERYWHERE[3] < -4


def test_the_newest_window_of_a_histogram_is_a_native_one(running: Running) -> None:
    """A window is a gauge histogram, of which quantiles are taken without `rate`."""
    (found,) = running.prometheus.vector('histogram_quantile(0.5, burst{job="windows"})').values()
    assert found == pytest.approx(3, rel=0.003)


def by_label(running: Running, expr: str, label: str) -> dict[str, float]:
    """Return the samples of an instant query by one of their labels."""
    return {dict(labels)[label]: value for labels, value in running.prometheus.vector(expr).items()}


def test_names_of_prometheus_itself(running: Running) -> None:
    """Views with a name that Prometheus, its rules or this program's own metrics have reach it by no way, which is said."""
    prometheus = running.prometheus
    target = f"127.0.0.1:{running.server.port}"
    assert {dict(labels).get("zone") for labels in prometheus.vector("up")} == {None}
    for name in ("ALERTS", "pipeline_info"):
        assert prometheus.vector(f"last_over_time({name}[1h])") == {}
    out = {
        dict(labels)["view"]
        for labels in prometheus.vector('pipeline_view_omitted{reason="reserved_name",job="pipeline-views"}')
    }
    assert out == {"up", "pipeline_info", "ALERTS"}
    exported = {"exported_instance": "i", "exported_job": "j", "instance": target, "job": "pipeline-views"}
    assert prometheus.vector("own{job='pipeline-views'}") == {frozenset({"__name__": "own", **exported}.items()): 4}
