"""A real Prometheus reads views with windows: PromQL equals the query API, late deltas included."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest

from pipeline.core.kinds import KINDS
from pipeline.core.record import Definition
from tests.prometheus import Prometheus, program
from tests.query.support import Server, World, serving
from tests.support import wait_until

MINUTE_MS = 60_000
HITS = Definition("hits", "sum", ("path", "zone"), window_s=60, monotone=True)
LATENCY = Definition("latency", "histogram", ("route",), window_s=60)
PEAK = Definition("peak", "max", (), window_s=60)


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


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    program("prometheus")
    world = World(3)
    world.publish(Definition("current", "sum"), {(): 1})
    end_ms = world.clock.now_ms() // (10 * MINUTE_MS) * 10 * MINUTE_MS
    fill(world, end_ms)
    with serving(world) as server:
        config = {
            "global": {"external_labels": {"cluster": "test"}},
            "remote_read": [{"url": f"{server.url}/api/v1/read", "read_recent": True, "filter_external_labels": False}],
        }
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), config)
        try:
            wait_until(prometheus.ready, "Prometheus")
            yield Running(server, prometheus, end_ms)
        finally:
            prometheus.close()


def of_api(running: Running, view: str, *query: tuple[str, str], value: str = "") -> dict[frozenset[tuple[str, str]], Any]:
    """By labels, the value of each point by the time at which what it covers ends."""
    answer = running.server.view(view, *query)
    return {
        frozenset((name, text) for name, text in series["labels"].items() if text): {
            start_ms + answer["over_ms"]: point for start_ms, point in series["points"]
        }
        for series in answer["series"]
    }


def test_sums_over_time_are_those_of_the_api(running: Running) -> None:
    """Each point of a range read is what PromQL sums over the same time, in tumbling and in sliding steps."""
    for step, over in (("10m", "10m"), ("1m", "1m"), ("5m", "1h"), ("1m", "2m")):
        start_ms, end_ms = running.end_ms - 120 * MINUTE_MS, running.end_ms
        range_of = ("start", str(start_ms)), ("end", str(end_ms)), ("step", step), ("over", over)
        expected = of_api(running, "hits", *range_of)
        assert expected
        step_ms = int(step[:-1]) * MINUTE_MS
        found = running.prometheus.matrix(
            f"sum_over_time(hits[{over}])", start_ms=start_ms + step_ms, end_ms=end_ms, step=step
        )
        assert found == expected
        print(len(found), sum(map(len, found.values())))
