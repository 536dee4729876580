"""A bridge publishes the counts of a prometheus_client registry: each process its own part, each count once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, Metric, Summary
from prometheus_client.core import CounterMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

import pipeline.connect as connect
import pipeline.metrics as m
from pipeline import native
from pipeline.adapters.bridge import Bridge
from pipeline.errors import BufferFull, Invalid, Unavailable
from tests.publisher.support import (
    CLOCK,
    FaultyLog,
    FileLog,
    Meter,
    Views,
    fold,
    in_threads,
    publisher,
    run_script,
    wait_until,
)

HOUR_MS = 3_600_000


class World:
    """A publisher of the public class on a log in memory, and a registry of its own."""

    def __init__(self, **settings: Any) -> None:
        self.log = FaultyLog()
        self.meter = Meter()
        quick = {"flush_interval_ms": 5, "retry_backoff_ms": 1, "close_timeout_ms": 10_000, **settings}
        with writing_to(self.log):
            self.pub = connect.Publisher("memory:", metrics=self.meter, **quick)
        self.registry = CollectorRegistry()

    def bridge(self, **options: Any) -> Any:
        return self.pub.bridge(options.pop("registry", self.registry), **{"interval_ms": HOUR_MS, **options})

    def views(self) -> Views:
        self.pub.close()
        views = fold(self.log.log)
        assert not views.dead
        return views

    def refused(self, reason: str) -> float:
        return self.meter.of(m.INGEST_MALFORMED, "bridge", reason)


@contextmanager
def writing_to(log: Any) -> Iterator[None]:
    before = connect.log_writer
    connect.log_writer = lambda *_: log
    try:
        yield
    finally:
        connect.log_writer = before


def test_each_type_makes_its_views() -> None:
    """Counters, buckets, sums and counts are monotone sums, zeros included; other samples are the newest; none is twice."""
    world = World()
    counter = Counter("jobs", "x", ["kind", "a"], registry=world.registry)
    took = Histogram("took", "x", buckets=(1, 2.5), registry=world.registry)
    size = Summary("size", "x", registry=world.registry)
    queue = Gauge("queue", "x", registry=world.registry)
    Info("build", "x", registry=world.registry).info({"version": "1"})
    counter.labels(a="x", kind="import").inc(2)
    bridge = world.bridge()
    bridge.collect()
    bridge.collect()
    counter.labels(a="x", kind="import").inc(0.5)
    took.observe(2)
    size.observe(10)
    size.observe(2**60)
    queue.set(7)
    bridge.collect()
    queue.set(5)
    definitions = {name: view.definition for name, view in world.pub._views.items()}
    assert {name for name, it in definitions.items() if it.monotone} == {
        "jobs_total", "took_bucket", "took_sum", "took_count", "size_sum", "size_count",
    }  # fmt: skip
    assert {name for name, it in definitions.items() if it.kind == "last"} == {"queue", "build_info"}
    views = world.views()
    assert views.of("jobs_total") == {("x", "import"): 2.5}
    assert views.of("took_bucket") == {("1.0",): 0, ("2.5",): 1, ("+Inf",): 1}
    assert views.of("took_sum") == {(): 2}
    assert views.of("size_sum") == {(): 2**60}  # the registry's own floats know no better
    assert views.of("size_count") == {(): 2}
    assert views.of("queue") == {(): 5}
    assert views.of("build_info") == {("1",): 1}


def test_it_publishes_by_itself() -> None:
    """A bridge publishes every interval_ms, until it is closed; a second close, or one of the publisher, changes nothing."""
    world = World()
    counter = Counter("ticks", "x", registry=world.registry)
    bridge = world.bridge(interval_ms=5)
    for _ in range(3):
        before = world.pub.stats()["deltas"]
        counter.inc()
        wait_until(lambda before=before: world.pub.stats()["deltas"] > before)
    counter.inc()
    bridge.close()
    bridge.close()
    counter.inc(100)
    assert world.views().of("ticks_total") == {(): 4}


def test_the_publishers_close_takes_the_rest() -> None:
    """Counts since the last look are in the publisher's last flush."""
    world = World()
    counter = Counter("rest", "x", registry=world.registry)
    world.bridge()
    counter.inc(3)
    assert world.views().of("rest_total") == {(): 3}
    with pytest.raises(Invalid, match="closed"):
        world.bridge()


def test_options() -> None:
    """Gauges can be left out; from_now leaves out earlier counts; the default registry is the default."""
    world = World()
    counter = Counter("before", "x", registry=world.registry)
    Gauge("level", "x", registry=world.registry).set(1)
    counter.inc(5)
    world.bridge(gauges=False, from_now=True)
    default = Counter("of_the_default_registry", "x")
    try:
        default.inc(2)
        world.bridge(registry=None, gauges=False)
        counter.inc(7)
        answers = world.views().answers
    finally:
        REGISTRY.unregister(default)
    assert answers["before_total", ()] == 7
    assert answers["of_the_default_registry_total", ()] == 2
    assert ("level", ()) not in answers
    for wrong in ({"interval_ms": 0}, {"interval_ms": 1.5}, {"interval_ms": True}, {"registry": 7}):
        with pytest.raises(Invalid):
            World().bridge(**wrong)


def test_a_gauge_is_what_it_was_last() -> None:
    """A gauge has its last value, also when a look follows another within a millisecond."""
    world = World()
    level = Gauge("level", "x", registry=world.registry)
    bridge = world.bridge()
    for value in (9, 5, 8, 3):
        level.set(value)
        bridge.collect()
    assert world.views().of("level") == {(): 3}


def test_a_registry_is_not_counted_twice() -> None:
    """A second bridge is refused; once the first is closed, another may go on from there."""
    world = World()
    counter = Counter("c", "x", registry=world.registry)
    counter.inc(2)
    bridge = world.bridge()
    for _ in range(2):
        with pytest.raises(Invalid, match="bridged before"):
            world.bridge()
        bridge.close()
    world.bridge(from_now=True)
    counter.inc(3)
    assert world.views().of("c_total") == {(): 5}


def test_what_is_cleared_begins_anew() -> None:
    """A total that falls counts from 0, a histogram's as a whole; so does a series that was gone."""
    world = World()
    counter = Counter("c", "x", ["a"], registry=world.registry)
    took = Histogram("h", "x", ["b"], buckets=(1,), registry=world.registry)
    bridge = world.bridge()
    counter.labels("x").inc(5)
    for _ in range(3):
        took.labels("y").observe(0.5)
    bridge.collect()
    counter.clear()
    took.clear()
    took.labels("y").observe(100)  # the sum rises, the count falls
    counter.labels("x").inc(2)
    bridge.collect()
    counter.clear()
    bridge.collect()
    counter.labels("x").inc(7)
    views = world.views()
    assert views.of("c_total") == {("x",): 14}
    assert views.of("h_bucket") == {("y", "1.0"): 3, ("y", "+Inf"): 4}
    assert views.of("h_count") == {("y",): 4}
    assert views.of("h_sum") == {("y",): 101.5}


class Broken:
    """A collector that raises while it is told to, half way through."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.fails = True

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily("half", "x", value=10)
        if self.fails:
            raise RuntimeError("no connection")
        yield from self.counter.collect()


@pytest.mark.parametrize("first", [True, False])
def test_a_collector_that_raises_stops_nobody(first: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A collector's error is logged once and counted each time; later its counts are published, none of them twice."""
    world = World()
    broken = Broken(Counter("inner", "x", registry=None))
    if first:
        world.registry.register(broken)
    other = Counter("other", "x", registry=world.registry)
    if not first:
        world.registry.register(broken)
    bridge = world.bridge()
    for fails in (True, True, False, True, False):
        broken.fails = fails
        broken.counter.inc()
        other.inc()
        bridge.collect()
    broken.fails = False
    views = world.views()
    assert views.answers == {("other_total", ()): 5, ("half_total", ()): 10, ("inner_total", ()): 5}
    assert world.refused("collector") == 3
    assert caplog.text.count("no connection; it is left out") == 1


class Given:
    """A registry of any samples."""

    def __init__(self, *families: tuple[str, str, list[tuple[str, dict[str, str], float]]]) -> None:
        self.families = families

    def collect(self) -> Iterator[Metric]:
        for name, type_, samples in self.families:
            metric = Metric(name, "x", type_)
            for sample in samples:
                metric.add_sample(*sample)
            yield metric


def test_totals_of_all_processes_are_not_every_processes_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A MultiProcessCollector is refused, wherever it is, and one that is registered later is left out and counted."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    world = World()
    of_all = CollectorRegistry()
    MultiProcessCollector(of_all)
    for registry in (of_all, MultiProcessCollector(None), of_all.restricted_registry(["c_total"])):
        with pytest.raises(Invalid, match="bridge the registry that the metrics are in, in each process"):
            world.bridge(registry=registry)
    Counter("c", "x", registry=world.registry).inc(3)
    bridge = world.bridge()
    world.registry.register(MultiProcessCollector(None))
    for _ in range(3):
        bridge.collect()
    assert world.views().answers == {("c_total", ()): 3}
    assert world.refused("multiprocess") == 1


def test_a_series_that_stands_twice_is_refused() -> None:
    """Two values of one series, in a collector or in two of them, are none: nothing grows by itself, and it is counted."""
    world = World()
    given_ = Given(("rows", "counter", [("rows_total", {"a": "x"}, 5), ("rows_total", {"a": "y"}, 1)]))
    bridge = world.bridge(registry=given_)
    bridge.collect()
    twice = [("rows_total", {"a": "x"}, 7), ("rows_total", {"a": "x"}, 100), ("rows_total", {"a": "y"}, 2)]
    given_.families = (("rows", "counter", twice), ("same", "counter", [("same_total", {}, 4), ("same_total", {}, 4)]))
    for _ in range(3):
        bridge.collect()
    given_.families = (("rows", "counter", [("rows_total", {"a": "x"}, 8)]),)
    bridge.collect()
    views = world.views()
    assert views.of("rows_total") == {("x",): 8, ("y",): 2}
    assert views.of("same_total") == {(): 4}
    assert world.refused("twice") == 1


def test_a_series_of_two_collectors_is_that_of_the_first() -> None:
    """The second collector is left out for that series, also while the first one fails."""
    world = World()
    first, second = [Broken(Counter("inner", "x", registry=None)) for _ in range(2)]
    for it in (first, second):
        it.fails = False
        it.counter.inc()
        world.registry.register(it)
    bridge = world.bridge()
    bridge.collect()
    first.fails = True
    bridge.collect()
    first.fails = False
    assert world.views().answers == {("half_total", ()): 10, ("inner_total", ()): 1}
    assert world.refused("twice") == 2


def test_a_collector_that_is_away_for_a_while_goes_on() -> None:
    """Series of a collector that come back, or that were not finite meanwhile, count by their increase; less is a reset."""
    world = World()
    given_ = Given()
    bridge = world.bridge(registry=given_)
    nan = float("nan")
    for a, b in ((5, 5), (None, nan), (7, 7), (nan, None), (9, 1), (None, None), (9, 3)):
        samples = [("rows", {"n": name}, value) for name, value in (("a", a), ("b", b)) if value is not None]
        given_.families = (("rows", "counter", samples),)  # the sample has the family's own name
        bridge.collect()
    views = world.views()
    assert views.of("rows_total") == {("a",): 9, ("b",): 10}
    assert world.refused("value") == 1


def test_a_reset_that_grew_beyond_the_old_value() -> None:
    """The time of creation tells that a total began anew, even if it is larger."""
    world = World()
    counter = Counter("c", "x", ["a"], registry=world.registry)
    took = Histogram("h", "x", buckets=(1,), registry=world.registry)
    bridge = world.bridge()
    counter.labels("x").inc(5)
    took.observe(3)
    bridge.collect()
    counter.clear()
    took.clear()
    counter.labels("x").inc(7)
    took.observe(4)
    took.observe(5)
    bridge.collect()
    bridge.collect()
    views = world.views()
    assert views.of("c_total") == {("x",): 12}
    assert views.of("h_count") == {(): 3}
    assert views.of("h_sum") == {(): 12}


def test_a_time_of_creation_that_is_that_of_the_look_tells_nothing() -> None:
    """A collector that says at each look that its totals were created just now does not grow by itself."""

    class New:
        value = 5

        def collect(self) -> Iterator[Metric]:
            yield CounterMetricFamily("c", "x", value=self.value, created=time.time())

    world = World()
    bridge = world.bridge(registry=New())
    for New.value in (5, 6, 7):
        bridge.collect()
    assert world.views().of("c_total") == {(): 7}


def test_every_type_of_openmetrics() -> None:
    """Info, states and gauge histograms are newest values; what can't be published is counted by its reason."""
    world = World()
    world.registry.set_target_info({"service": "shop"})
    Enum("mode", "x", states=["on", "off"], registry=world.registry).state("off")
    world.registry.register(
        Given(
            ("depth", "gaugehistogram", [("depth_bucket", {"le": "+Inf"}, 3), ("depth_gsum", {}, -1)]),
            ("q", "summary", [("q", {"quantile": "0.5"}, 3), ("q_count", {}, 2)]),
            ("odd", "counter", [("odd_bucket", {}, 3)]),
        )
    )
    world.bridge()
    views = world.views()
    assert views.of("target_info") == {("shop",): 1}
    assert views.of("mode") == {("on",): 0, ("off",): 1}
    assert views.of("depth_bucket") == {("+Inf",): 3}
    assert views.of("depth_gsum") == {(): -1}
    assert ("odd_bucket", ()) not in views.answers
    assert [world.refused(reason) for reason in ("quantile", "suffix")] == [1, 1]


def test_what_no_view_can_be_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Invalid names, labels and values, changed labels, and another kind are logged and counted once a name."""
    world = World()
    world.pub.max("taken_total")
    given_ = Given(
        ("a:b", "counter", [("a:b_total", {}, 1)]),
        ("dot", "counter", [("dot_total", {"a.b": "x"}, 1)]),
        ("taken", "counter", [("taken_total", {}, 1)]),
        ("long", "counter", [("long_total", {"a": "x" * 5_000}, 1), ("long_total", {"a": "y"}, 2)]),
        ("mixed", "counter", [("mixed_total", {"a": "x"}, 1), ("mixed_total", {"b": "x"}, 1)]),
        ("nan", "gauge", [("nan", {}, float("nan"))]),
        ("inf", "counter", [("inf_total", {}, float("inf"))]),
        ("neg", "counter", [("neg_total", {}, -3)]),
        ("q", "summary", [("q", {"quantile": "0.5"}, 3), ("q_count", {}, 2), ("q_sum", {}, 4)]),
        ("fine", "counter", [("fine_total", {"le": "x"}, 1), ("fine_created", {"le": "x"}, 1.5e9)]),
    )
    bridge = world.bridge(registry=given_)
    for _ in range(3):
        bridge.collect()
    assert world.views().answers == {
        ("fine_total", ("x",)): 1,
        ("q_count", ()): 2,
        ("q_sum", ()): 4,
        ("mixed_total", ("x",)): 1,
        ("long_total", ("y",)): 2,
    }
    assert [world.refused(reason) for reason in ("view", "value", "negative")] == [5, 2, 1]
    for name in ("a:b_total", "dot_total", "taken_total", "long_total", "mixed_total", "neg_total"):
        assert caplog.text.count(f"{name} is not published") == 1


def test_negative_observations_have_no_monotone_sum() -> None:
    """The sum stays at its highest, which is logged once; count and buckets are exact."""
    world = World()
    size = Summary("size", "x", registry=world.registry)
    bridge = world.bridge()
    for value in (5, -3, 4):
        size.observe(value)
        bridge.collect()
    views = world.views()
    assert views.of("size_count") == {(): 3}
    assert views.of("size_sum") == {(): 6}
    assert world.refused("negative") == 1


def test_a_full_buffer_is_waited_for_once_a_look(caplog: pytest.LogCaptureFixture) -> None:
    """A look waits for room no longer than one series may, however many wait, and a close for as long as it may."""
    world = World(block_timeout_ms=200, buffer_bytes_max=65_536, close_timeout_ms=200)
    world.log.away = True
    counter = Counter("many", "x", ["n"], registry=world.registry)
    for n in range(400):
        counter.labels(str(n)).inc()
    bridge = world.bridge()
    bridge.collect()
    assert world.refused("buffer_full") == world.meter.of(m.PUBLISHER_BLOCKED) == 1
    with pytest.raises(Unavailable):
        world.pub.close()
    assert "the bridge's rest is lost: not acknowledged within 0." in caplog.text
    assert world.meter.of(m.PUBLISHER_BLOCKED) == 2


def test_a_signal_handler_may_close_while_it_holds_a_lock(tmp_path: Path) -> None:
    """A handler may close the bridge while its thread waits for the same lock: neither hangs, and nothing is lost."""
    world = World(durability="process", spool_dir=str(tmp_path))
    counter = Counter("c", "x", ["a"], registry=world.registry)
    bridge = world.bridge(interval_ms=1)
    with getattr(world.pub._table, "_lock", nullcontext()):  # as if this came in the midst of recording
        counter.labels("new").inc(3)  # a series that must be registered
        if not native.in_use():  # whose table has no lock that a thread could wait for here
            wait_until(lambda: bridge._collecting)
            time.sleep(0.05)  # for the thread to come to the lock; a pass without would be no error
        world.pub.close()
    assert world.views().of("c_total") == {("new",): 3}


def test_a_bridge_that_fails_does_not_keep_the_publisher_from_its_flush(caplog: pytest.LogCaptureFixture) -> None:
    """The error is logged, and recorded deltas are sent."""
    world = World()
    bridge = world.bridge()
    bridge.collect = lambda: 1 / 0
    world.pub.sum("own").add(3)
    assert world.views().of("own") == {(): 3}
    assert "closing a bridge" in caplog.text


class Room:
    """A buffer that takes so many deltas, and then is full."""

    def __init__(self) -> None:
        self.left = 1_000
        self.totals: dict[tuple[str, ...], float] = {}

    def sum(self, view: str, *, labels: tuple[str, ...], monotone: bool) -> Any:
        room = self

        class View:
            def labels(self, *values: str) -> Any:
                class Cell:
                    def add(self, value: float) -> None:
                        if not room.left:
                            raise BufferFull("no room")
                        room.left -= 1
                        key = (view, *values)
                        room.totals[key] = room.totals.get(key, 0) + value

                return Cell()

        return View()

    last = sum


@pytest.mark.parametrize("left", range(6))
def test_a_clear_that_is_half_published_is_not_published_twice(left: int) -> None:
    """Buckets, sum and count of a histogram are cleared together, wherever the room ends."""
    room = Room()
    registry = CollectorRegistry()
    took = Histogram("h", "x", ["b"], buckets=(1,), registry=registry)
    bridge = Bridge(room, registry, clock=CLOCK, interval_ms=HOUR_MS)
    for _ in range(5):
        took.labels("y").observe(0.5)
    bridge.collect()
    took.clear()
    took.labels("y").observe(0.5)
    took.labels("y").observe(0.5)
    room.left = left
    bridge.collect()
    room.left = 1_000
    bridge.close()
    assert room.totals == {
        ("h_bucket", "y", "1.0"): 7, ("h_bucket", "y", "+Inf"): 7, ("h_count", "y"): 7, ("h_sum", "y"): 3.5,
    }  # fmt: skip


def test_a_full_buffer_delays_and_loses_nothing() -> None:
    """A look counts only recorded deltas, also when a counter is cleared meanwhile."""
    world = World(on_full="raise", buffer_bytes_max=65_536)
    world.log.away = True
    counter = Counter("many", "x", ["n"], registry=world.registry)
    bridge = world.bridge()
    for _ in range(3):
        for n in range(300):
            counter.labels(str(n)).inc()
        bridge.collect()
    assert world.refused("buffer_full") > 0
    world.log.away = False
    world.pub.flush()
    for _ in range(20):
        bridge.collect()
        world.pub.flush()
    assert world.views().of("many_total") == {(str(n),): 3 for n in range(300)}


@settings(max_examples=25, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    st.lists(st.tuples(st.sampled_from(["inc", "observe", "clear", "collect", "remove"]), st.integers(0, 5)), max_size=30)
)
def test_any_history_is_exact(history: list[tuple[str, int]]) -> None:
    """Any history of counts, clears and looks is exact, if there is a look between counting and clearing."""
    world = World()
    counter = Counter("c", "x", ["a"], registry=world.registry)
    took = Histogram("h", "x", ["b"], buckets=(2, 4), registry=world.registry)
    bridge = world.bridge()
    added: dict[str, int] = {}
    observed: list[int] = []
    for what, n in history:
        if what == "inc":
            counter.labels(str(n)).inc(n)
            added[str(n)] = added.get(str(n), 0) + n
        elif what == "observe":
            took.labels("y").observe(n)
            observed.append(n)
        elif what == "clear":
            bridge.collect()
            counter.clear()
            took.clear()
            bridge.collect()
        elif what == "remove":
            bridge.collect()
            counter.remove(str(n)) if (str(n),) in counter._metrics else None
            bridge.collect()
        else:
            bridge.collect()
    views = world.views()
    assert views.of("c_total") == {(n,): total for n, total in added.items()}
    assert views.total("h_sum") == sum(observed)
    assert [views.of("h_bucket").get(("y", le), 0) for le in ("2.0", "4.0", "+Inf")] == [
        len([value for value in observed if value <= most]) for most in (2, 4, 5)
    ]


def test_threads_that_count_while_it_looks() -> None:
    """No count is lost or doubled by looks from several threads at once, and from the bridge's own."""
    world = World()
    counter = Counter("c", "x", ["i"], registry=world.registry)
    bridge = world.bridge(interval_ms=1)

    def work(i: int) -> None:
        for n in range(500):
            counter.labels(str(i % 2)).inc()
            if n % 50 == 0:
                bridge.collect()

    in_threads(4, work)
    assert world.views().of("c_total") == {("0",): 1_000, ("1",): 1_000}


def test_a_collector_may_come_back_to_the_bridge() -> None:
    """A collector that looks at the bridge or closes it, as a signal handler may, neither hangs nor counts twice."""
    world = World()
    counter = Counter("c", "x", registry=world.registry)
    calls: list[Callable[[], None]] = []

    class Reentrant:
        def describe(self) -> Iterable[Metric]:
            return []

        def collect(self) -> Iterable[Metric]:
            if calls:
                calls.pop()()
            return []

    world.registry.register(Reentrant())
    bridge = world.bridge()
    counter.inc()
    calls.append(bridge.collect)
    bridge.collect()
    counter.inc()
    calls.append(bridge.close)
    bridge.close()
    assert world.views().of("c_total") == {(): 2}


# Processes

PRELUDE = """
import gc
from prometheus_client import CollectorRegistry, Counter, Histogram
import pipeline.connect as connect
connect.log_writer = lambda *_: log
registry = CollectorRegistry()
counter = Counter("jobs", "x", ["who"], registry=registry)
took = Histogram("took", "x", buckets=(1, 2), registry=registry)
def count(who, n):
    counter.labels(who).inc(n)
    for _ in range(n): took.observe(1.5)
def bridged(**options):
    pub = connect.Publisher("memory:", flush_interval_ms=10)
    return pub, pub.bridge(registry, interval_ms=3_600_000, **options)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def views_of(path: Path) -> Views:
    found = fold(FileLog(path).read())
    assert not found.dead
    return found


@pytest.mark.parametrize("ending", ["", "raise RuntimeError", "os.kill(os.getpid(), signal.SIGINT); time.sleep(20)"])
def test_the_end_of_the_interpreter_takes_the_rest(path: Path, ending: str) -> None:
    """A process that ends on its own, in any way, publishes its counts."""
    run_script(path, PRELUDE + "pub, bridge = bridged()\ncount('a', 3)\n" + ending, check=False)
    assert views_of(path).of("jobs_total") == {("a",): 3}


def test_forked_children_publish_what_they_count(path: Path) -> None:
    """Counts from before the fork are the parent's, looked at or not, for children of children, too."""
    run_script(
        path,
        PRELUDE
        + """
pub, bridge = bridged()
count("before", 2)
bridge.collect()
count("before", 3)      # not looked at when it forks
for n in range(4):
    if not os.fork():
        count("child", 10)
        count("before", 100)
        if n == 0 and not os.fork():
            count("grandchild", 1000)
            sys.exit(0)
        if n == 0: assert os.wait()[1] == 0
        if n == 1: pub.close(); os._exit(0)
        sys.exit(0)
    count("parent", 1)
for _ in range(4): assert os.wait()[1] == 0
""",
    )
    views = views_of(path)
    assert views.of("jobs_total") == {("before",): 405, ("child",): 40, ("parent",): 4, ("grandchild",): 1_000}
    assert views.of("took_count") == {(): 1_449}
    assert views.of("took_bucket") == {("1.0",): 0, ("2.0",): 1_449, ("+Inf",): 1_449}
    assert views.of("took_sum") == {(): 1_449 * 1.5}


def test_processes_that_share_files_each_publish_their_own(tmp_path: Path, path: Path) -> None:
    """In prometheus_client's multiprocess mode each process publishes its own part, and together they have the total."""
    (tmp_path / "shared").mkdir()
    run_script(
        path,
        PRELUDE
        + """
pub, bridge = bridged()
count("parent", 10)
for number in range(2):
    if not os.fork():
        count("child", 10)
        sys.exit(0)
for _ in range(2):
    assert os.wait()[1] == 0
""",
        first=f"import os\nos.environ['PROMETHEUS_MULTIPROC_DIR'] = {str(tmp_path / 'shared')!r}\n",
    )
    assert views_of(path).of("jobs_total") == {("parent",): 10, ("child",): 20}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_of_multiprocessing_publish_the_rest(path: Path, method: str) -> None:
    """Children end without `atexit`, and before the first look; spawned ones have a registry and bridge of their own."""
    run_script(
        path,
        PRELUDE
        + f"""
import multiprocessing as mp
def work(path, n):
    if "{method}" == "spawn":
        pub, bridge = bridged()
    count("child", n)
if __name__ == "__main__":
    context = mp.get_context("{method}")
    if "{method}" == "fork":
        pub, bridge = bridged()
        count("parent", 7)
    children = [context.Process(target=work, args=(sys.argv[1], n)) for n in (1, 2)]
    for child in children: child.start()
    for child in children: child.join(30)
    assert [child.exitcode for child in children] == [0, 0]
""",
    )
    jobs = views_of(path).of("jobs_total")
    assert jobs == {("child",): 3, **({("parent",): 7} if method == "fork" else {})}


def test_forks_while_threads_count(path: Path) -> None:
    """At any moment of four counting threads, after a fork each process publishes its own part, and no child hangs."""
    done = run_script(
        path,
        PRELUDE
        + """
import pipeline.adapters.bridge as module
module._FORK_TIMEOUT_S = 3.0
pub = connect.Publisher("memory:", flush_interval_ms=1)
bridge = pub.bridge(registry, interval_ms=1)
stop = threading.Event()
counts = [0] * 4
def work(i):
    while not stop.is_set():
        for _ in range(20): counter.labels("t").inc()
        counts[i] += 20
        time.sleep(0.001)
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for thread in threads: thread.start()
for n in range(15):
    time.sleep(0.003)
    child = os.fork()
    if not child:
        signal.alarm(30)
        if not bridge._closed:  # else a lock was held: told, counted, and nothing published
            Counter("mine", "x", registry=registry).inc()
        pub.close()
        os._exit(7 if bridge._closed and not bridge._thread.stopping.is_set() else 0)
    assert os.waitpid(child, 0)[1] in (0, 7 << 8), n
stop.set()
for thread in threads: thread.join(30)
pub.close()
print(sum(counts))
""",
    )
    assert views_of(path).of("jobs_total") == {("t",): int(done.stdout)}


def test_a_lock_that_was_held_at_the_fork_hangs_nobody(path: Path) -> None:
    """A metric that can't be read in the child any more is logged and left out, and the child goes on."""
    done = run_script(
        path,
        PRELUDE
        + """
import pipeline.adapters.bridge as module
module._FORK_TIMEOUT_S = 0.2
class Locked:
    def __init__(self): self.lock = threading.Lock()
    def describe(self): return []
    def collect(self):
        with self.lock: return []
locked = Locked()
registry.register(locked)
pub, bridge = bridged()
count("parent", 1)
with locked.lock:
    if not os.fork():
        count("child", 1)
        pub.sum("own").add(5)
        sys.exit(0)
assert os.wait()[1] == 0
""",
    )
    assert "the child's metrics are not published" in done.stderr
    views = views_of(path)
    assert views.of("jobs_total") == {("parent",): 1}
    assert views.of("own") == {(): 5}


def test_a_reader_gets_what_processes_counted(path: Path) -> None:
    """The sum over eight children of a prefork server, counting at once, is exact, by series."""
    run_script(
        path,
        PRELUDE
        + """
count("master", 5)
pub, bridge = bridged()
children = []
for n in range(8):
    child = os.fork()
    if not child:
        for i in range(200): count(f"w{i % 3}", 1)
        sys.exit(0)
    children.append(child)
for child in children: assert os.waitpid(child, 0)[1] == 0
""",
    )
    views = views_of(path)
    assert views.of("jobs_total") == {("master",): 5, ("w0",): 8 * 67, ("w1",): 8 * 67, ("w2",): 8 * 66}
    assert views.of("took_count") == {(): 1_605}


def test_a_full_buffer_delays_the_last_look_and_loses_nothing() -> None:
    """Counts for which there is no room when a bridge is closed are published once a flush has made room."""
    log = FaultyLog()
    pub = publisher(log, on_full="raise", buffer_bytes_max=65_536, flush_interval_ms=3_600_000)
    registry = CollectorRegistry()
    counter = Counter("c", "", ["n"], registry=registry)
    for i in range(300):
        counter.labels(str(i)).inc()
    Bridge(pub, registry, clock=CLOCK, interval_ms=3_600_000, gauges=False).close()
    pub.close()
    assert fold(log.log).total("c_total") == 300
