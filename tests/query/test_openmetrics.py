"""`GET /v1/openmetrics`: samples of the views, and the names of the views that are left out."""

import asyncio
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from pipeline.adapters.prometheus import render_views
from pipeline.core.exposition import Exposed, Exposition, choose
from pipeline.core.query import merge_definitions
from pipeline.core.record import Definition, definition_key, series_prefix, series_suffix
from pipeline.errors import NotFound, Unavailable
from pipeline.query.service import ReadService
from pipeline.settings import QuerySettings
from tests import prompb
from tests.query.support import Reply, Server, World, serving
from tests.support import HandClock

OPENMETRICS = {"Accept": "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5"}
PROTOBUF = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
Samples = dict[tuple[tuple[str, str], ...], float]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Serve one view of each sort."""
    world = World()
    world.publish(
        Definition("hits", "sum", ("path", "code"), monotone=True), {("/", "200"): 3, ("/", "500"): 2**60, ("é", ""): 0}
    )
    world.publish(Definition("errors_total", "sum", ("host",), monotone=True), {("a",): 1.5, ("b",): 10**400})
    world.publish(Definition("balance", "sum", ("region",)), {("eu",): -2.5, ("us",): 7})
    world.publish(Definition("low", "min"), {(): -3})
    world.publish(Definition("peak", "max", ("le", "quantile")), {("1", "x"): 12345678.25})
    world.publish(Definition("load", "mean", ("host",)), {("a",): (3, 2), ("b",): (1, 3)})
    states = {("n",): (1, 0, 2.5), ("t",): (1, 0, "up"), ("y",): (2, 0, True), ("f",): (2, 0, False), ("0",): (3, 0, None)}
    world.publish(Definition("state", "last", ("host",)), states)
    world.publish(Definition("flood", "sum", ("x",)), {("a",): 2 * 10**308, ("b",): 1})
    with serving(world) as running:
        yield running


def families(text: bytes | Reply, *, plain: bool = False) -> dict[str, Metric]:
    """Return the metric families of an exposition by name, of which each must be unique."""
    body = text.body if isinstance(text, Reply) else text
    if isinstance(text, Reply):
        assert text.status == 200, text.body
    found = [*(parse_plain if plain else parse_openmetrics)(body.decode())]
    assert len({family.name for family in found}) == len(found)
    return {family.name: family for family in found}


def samples(family: Metric) -> Samples:
    return {tuple(sorted(sample.labels.items())): sample.value for sample in family.samples}


def omitted(found: Mapping[str, Metric]) -> dict[str, str]:
    return {s.labels["view"]: s.labels["reason"] for s in found["pipeline_view_omitted"].samples if s.value == 1}


def as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@pytest.mark.parametrize("plain", [False, True])
def test_every_view_is_a_family_with_the_values_of_the_api(server: Server, plain: bool) -> None:
    """Both formats parse; each series has the API's value as a float; text, null and overflow are left out."""
    found = families(server.request("GET", "/v1/openmetrics", headers={} if plain else OPENMETRICS), plain=plain)
    assert omitted(found) == {}
    names = {"hits": "hits", "errors_total": "errors"}
    views = [view["name"] for view in server.get("/v1/views").json()["views"]]
    assert {names.get(view, view) for view in views} == found.keys() - {
        "pipeline_view_omitted",
        "pipeline_view_staleness_seconds",
    }
    for view in views:
        family = found[names.get(view, view)]
        assert family.type == ("counter" if view in names else "gauge")
        if view in names:
            assert {sample.name for sample in family.samples} == {f"{family.name}_total"}
        expected = {
            tuple(sorted(series["labels"].items())): as_float(series["value"])
            for series in server.view(view)["series"]
            if series["value"] is not None and not isinstance(series["value"], str)
        }
        assert samples(family) == expected
    assert samples(found["state"]).keys() == {(("host", "n"),), (("host", "y"),), (("host", "f"),)}
    assert samples(found["errors"])[(("host", "b"),)] == math.inf
    assert found["hits"].documentation == "View of kind sum, monotone."
    assert found["load"].documentation == "View of kind mean."


def test_the_format_is_what_accept_asks_for(server: Server) -> None:
    """The format is plain text unless OpenMetrics is asked for, also if the header is malformed."""
    for accept, media_type, end in (
        ("", "text/plain; version=0.0.4", b""),
        ("*/*", "text/plain; version=0.0.4", b""),
        ("text/plain;version=0.0.4", "text/plain; version=0.0.4", b""),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text; version=1.0.0", b"# EOF\n"),
        ("application/openmetrics-text; version=x", "text/plain; version=0.0.4", b""),
    ):
        for path in ("/v1/openmetrics", "/metrics"):
            reply = server.request("GET", path, headers={"Accept": accept})
            assert reply.status == 200
            assert reply.headers["content-type"].startswith(media_type)
            assert reply.body.endswith(b"# EOF\n") == bool(end)


def test_staleness_is_told(server: Server) -> None:
    """Staleness is exported in seconds and equals an answer's `staleness_ms`; it is infinite while it is unknown."""
    found = families(server.request("GET", "/v1/openmetrics", headers=OPENMETRICS))
    (sample,) = found["pipeline_view_staleness_seconds"].samples
    assert 0 <= sample.value < 5
    unknown = families(render_views(Exposition([], {}, None))[0], plain=True)["pipeline_view_staleness_seconds"]
    assert unknown.samples[0].value == math.inf
    told = families(render_views(Exposition([], {}, 1_500))[0], plain=True)["pipeline_view_staleness_seconds"]
    assert told.samples[0].value == 1.5


def test_only_some_views(server: Server) -> None:
    """`view` can be repeated, an unknown view is 404, any other parameter 400; the default is all views."""
    found = families(server.get("/v1/openmetrics", ("view", "hits"), ("view", "low")), plain=True)
    assert found.keys() == {"hits", "low", "pipeline_view_omitted", "pipeline_view_staleness_seconds"}
    assert "'nobody'" in server.problem(404, server.get("/v1/openmetrics", ("view", "hits"), ("view", "nobody")))
    assert "known: view" in server.problem(400, server.get("/v1/openmetrics", ("where", "a=b")))
    assert "true or false" in server.problem(400, server.get("/v1/openmetrics", ("windowed", "0")))
    many = [("view", "hits")] * 65
    assert "`view` parameters" in server.problem(400, server.get("/v1/openmetrics", *many))
    server.problem(414, server.request("GET", "/v1/openmetrics?view=" + "x" * 60_001))


def test_nothing_is_an_exposition_too() -> None:
    """Without views the answer is still an exposition, in both formats."""
    with serving(World()) as empty:
        for plain in (False, True):
            found = families(empty.request("GET", "/v1/openmetrics", headers={} if plain else OPENMETRICS), plain=plain)
            assert found.keys() == {"pipeline_view_omitted", "pipeline_view_staleness_seconds"}
        empty.world.ready = False
        assert empty.problem(503, empty.get("/v1/openmetrics"))


def scrape(world: World, *views: str) -> Exposition:
    return world.reader.scrape(views, deadline_s=world.clock.monotonic_s() + 30)


def names(exposition: Exposition) -> list[str]:
    return [exposed.definition.view for exposed in exposition.views]


def test_series_are_bounded_and_views_whole() -> None:
    """In the order of names each view that still fits is there, whole; the others are named; an exact fit fits."""
    world = World(settings=QuerySettings(openmetrics_series_max=10))
    for view, count in (("a", 4), ("b", 7), ("c", 6), ("d", 1)):
        world.publish(Definition(view, "sum", ("n",)), {(str(n),): n for n in range(count)})
    found = scrape(world)
    assert (names(found), found.omitted) == (["a", "c"], {"b": "series_max", "d": "series_max"})
    assert [len(exposed.labels) for exposed in found.views] == [4, 6]
    assert names(scrape(world, "b", "d")) == ["b", "d"]


def test_a_series_of_several_partitions_counts_once() -> None:
    """Partitions are merged before series are counted against the limit, and no more is read than there is room for."""
    world = World(settings=QuerySettings(openmetrics_series_max=3))
    for number in range(4):
        world.append(number, Definition("spread", "sum", ("n",)), {(str(n),): 1 for n in range(3)})
        world.append(number, Definition("wide", "sum", ("n",)), {(f"{number}{n}",): 1 for n in range(3)})
    world.fold()
    found = scrape(world, "spread")
    (exposed,) = found.views
    assert dict(zip(exposed.labels, exposed.values, strict=True)) == {(str(n),): 4 for n in range(3)}
    assert scrape(world, "wide").omitted == {"wide": "series_max"}


def test_a_view_that_cannot_fit_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view with too many series is left out by its count alone, which bounds the work of a scrape."""
    world = World(1, settings=QuerySettings(openmetrics_series_max=2))
    world.publish(Definition("big", "sum", ("n",)), {(str(n),): n for n in range(3)})
    monkeypatch.setattr(world.reader, "_select", lambda *_: pytest.fail("read"))
    assert scrape(world).omitted == {"big": "series_max"}


def gauge(view: str, *labels: str) -> Definition:
    return Definition(view, "sum", labels)


def counter(view: str, *labels: str) -> Definition:
    return Definition(view, "sum", labels, monotone=True)


@pytest.mark.parametrize(
    ("views", "out"),
    [
        ([counter("x"), gauge("x_total")], {"x_total": "name_collision"}),
        ([gauge("x"), counter("x_total")], {"x_total": "name_collision"}),
        ([counter("x"), counter("x_total")], {"x_total": "name_collision"}),
        ([counter("x"), gauge("x_created")], {"x_created": "name_collision"}),
        ([gauge("x"), gauge("x_total")], {}),
        ([gauge("x_total"), counter("x_total_total")], {"x_total_total": "name_collision"}),
        ([counter("_total"), counter("x")], {}),
        ([gauge("pipeline_view_omitted"), gauge("y")], {"pipeline_view_omitted": "name_collision"}),
        ([counter("pipeline_view_staleness_seconds")], {"pipeline_view_staleness_seconds": "name_collision"}),
        ([gauge("up", "region"), gauge("upper")], {"up": "reserved_name"}),
        (
            [counter("scrape_samples_scraped"), gauge("ALERTS")],
            {"scrape_samples_scraped": "reserved_name", "ALERTS": "reserved_name"},
        ),
        ([counter("pipeline_stalls"), gauge("x")], {"pipeline_stalls": "reserved_name"}),
        ([gauge("pipeline_stalls_total")], {"pipeline_stalls_total": "reserved_name"}),
        ([gauge("x", "__name__"), gauge("y", "_ok")], {"x": "reserved_label"}),
        ([gauge("x", "__a"), counter("x_total")], {"x": "reserved_label"}),
    ],
)
def test_views_that_cannot_stand_side_by_side(views: Sequence[Definition], out: dict[str, str]) -> None:
    """The first of conflicting views by name stays, the others are named with the reason, and the exposition is valid."""
    world = World(1)
    for definition in views:
        world.publish(definition, {tuple("v" for _ in definition.labels): 1})
    found = scrape(world)
    assert found.omitted == out
    assert {*names(found)} == {definition.view for definition in views} - out.keys()
    for accept, plain in ((OPENMETRICS["Accept"], False), ("", True)):
        body, _ = render_views(found, accept)
        parsed = families(body, plain=plain)
        assert omitted(parsed) == out
        assert sum(len(family.samples) for name, family in parsed.items() if not name.startswith("pipeline_")) == len(
            names(found)
        )


def test_a_view_that_exists_stays() -> None:
    """A later view whose name collides with an earlier one's leaves that in the scrape, whatever their names are."""
    clock = HandClock()
    world = World(2, clock=clock)
    world.publish(counter("x_total"), {(): 1})
    clock.s += 1
    world.publish(gauge("x"), {(): 1})
    assert scrape(world).omitted == {"x": "name_collision"}


def test_a_broken_view_does_not_fail_the_scrape(caplog: pytest.LogCaptureFixture) -> None:
    """Entries that can't be read leave out their view and no other; a counter that is a gauge elsewhere is a gauge."""
    world = World(2)
    for number in range(2):
        for view in ("bad_definition", "bad_state", "good"):
            world.append(number, gauge(view, "n"), {("a",): 1})
        world.append(number, (gauge, counter)[number]("torn"), {(): 1})
    world.fold()
    store = world.partitions[1].store
    store.write([definition_key(gauge("bad_definition", "n"))], [b"\x02\xc0"])
    store.write([series_prefix(gauge("bad_state", "n")) + series_suffix(("a",))], [b"\x02\x93\xa3sum\x00"])
    with serving(world) as broken:
        found = families(broken.get("/v1/openmetrics"), plain=True)
        assert omitted(found) == {"bad_definition": "unreadable", "bad_state": "unreadable"}
        assert (found["torn"].type, samples(found["torn"])) == ("gauge", {(): 2})
        assert samples(found["good"]) == {(("n", "a"),): 2}
        assert omitted(families(broken.get("/v1/openmetrics", ("view", "bad_state")), plain=True)).keys() == {"bad_state"}
        assert "view bad_state is left out of a scrape" in caplog.text


def test_a_scrape_has_a_deadline_and_an_end() -> None:
    """A scrape past its deadline, or on a stopping server, is `Unavailable`; an unknown view is `NotFound`."""
    world = World(1)
    world.publish(gauge("v"), {(): 1})
    with pytest.raises(Unavailable, match="timeout_ms"):
        world.reader.scrape(deadline_s=world.clock.monotonic_s() - 1)
    with pytest.raises(NotFound, match="'w'"):
        scrape(world, "w")
    world.reader.close()
    with pytest.raises(Unavailable, match="stopping"):
        scrape(world)


def test_a_scrape_is_at_one_moment_of_each_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views that always change together are seen together, although they are read one after the other."""
    world = World(1)
    select: Callable[..., Any] = world.reader._select

    def commit() -> None:
        world.append(0, gauge("a"), {(): 1})
        world.append(0, gauge("b"), {(): 1})
        world.fold()

    def select_then_commit(*arguments: Any) -> Any:
        commit()
        return select(*arguments)

    commit()
    monkeypatch.setattr(world.reader, "_select", select_then_commit)
    assert [exposed.values for exposed in scrape(world).views] == [[1], [1]]


def test_scrapes_run_in_the_read_threads_and_are_bounded() -> None:
    """The event loop neither reads nor renders; at `reads_waiting_max` one more scrape is refused."""
    world = World(1, settings=QuerySettings(reads_waiting_max=1))
    world.publish(gauge("v"), {(): 1})
    threads: list[str] = []
    go = threading.Event()

    def render(exposition: Exposition, accept: str) -> tuple[bytes, str]:
        threads.append(threading.current_thread().name)
        assert go.wait(20)
        return accept.encode(), names(exposition)[0]

    async def run() -> None:
        service = ReadService(world.reader, world.settings, world.metrics)
        first = asyncio.create_task(service.scrape((), render, "this"))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="no more are taken"):
            await service.scrape((), render, "that")
        go.set()
        assert await first == (b"this", "v")
        service.close()

    asyncio.run(run())
    assert [name.startswith("pipeline-read") for name in threads] == [True]


label_texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\\\n\r\x85\u2028{},= #'), max_size=12)
numbers = st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | st.integers(-(10**400), 10**400) | st.booleans()


@given(rows=st.dictionaries(st.tuples(label_texts, label_texts), numbers, max_size=5), monotone=st.booleans())
def test_labels_and_values_come_through(rows: dict[tuple[str, str], Any], monotone: bool) -> None:
    """Quotes, backslashes, line ends and all of Unicode in labels, and each number as its float, survive in both formats."""
    if monotone:
        rows = {labels: abs(value) for labels, value in rows.items()}
    definition = Definition("v", "sum", ("b", "a"), monotone=monotone)
    exposition = Exposition([Exposed(definition, [*rows], [*rows.values()])], {}, 5)
    expected = {(("a", a), ("b", b)): as_float(value) for (b, a), value in rows.items()}
    for accept, parse in ((OPENMETRICS["Accept"], parse_openmetrics), ("", parse_plain)):
        body, _ = render_views(exposition, accept)
        found = {family.name: family for family in parse(body.decode())}
        assert samples(found["v"]) == expected
        assert body.decode().count("\n") == len(rows) + 6 + 1 + (parse is parse_openmetrics)


@given(
    st.lists(
        st.tuples(st.sampled_from(["x", "y"]), st.lists(st.sampled_from(["_total", "_created"]), max_size=3), st.booleans())
    )
)
def test_whatever_is_chosen_is_an_exposition(parts: list[tuple[str, list[str], bool]]) -> None:
    """Any set of view names makes a valid exposition, in which each view is either present or named as omitted."""
    definitions = {d.view: d for d in (Definition(x + "".join(more), "sum", (), 0, mono) for x, more, mono in parts)}
    chosen, out = choose({view: merge_definitions([it]) for view, it in definitions.items()})
    assert {d.view for d in chosen} | out.keys() == definitions.keys()
    body, _ = render_views(Exposition([Exposed(d, [()], [1]) for d in chosen], out, None), OPENMETRICS["Accept"])
    assert len([*parse_openmetrics(body.decode())]) == len(chosen) + 2


def test_a_view_with_windows_shows_its_newest_final_window() -> None:
    """A view's newest final window is shown, sums as gauges; windows that have expired, or are not final, are not."""
    clock = HandClock()
    world = World(2, clock=clock)
    definition = Definition("hits", "sum", ("path",), window_s=60, monotone=True)
    present = clock.now_ms() // 60_000 * 60_000
    for number, (window, values) in enumerate(
        (
            (present - 120_000, {("a",): 1}),
            (present - 60_000, {("a",): 2, ("b",): 3}),
            (present - 60_000, {("a",): 4}),
            (present, {("a",): 8}),
        )
    ):
        world.append(number % 2, definition, values, window)
    world.fold()
    (exposed,) = scrape(world).views
    assert dict(zip(exposed.labels, exposed.values, strict=True)) == {("a",): 6, ("b",): 3}
    assert world.reader.scrape((), windowed=False, deadline_s=world.clock.monotonic_s() + 30).views == []
    family = families(render_views(scrape(world), OPENMETRICS["Accept"])[0])["hits"]
    assert (family.type, samples(family)) == ("gauge", {(("path", "a"),): 6, (("path", "b"),): 3})
    assert family.documentation == "View of kind sum, in windows of 60 s: the newest that is final."
    clock.s += 60
    (exposed,) = scrape(world).views
    assert exposed.values == [8]
    clock.s += 60
    (exposed,) = scrape(world).views
    assert exposed.values == []
    world.expire(definition, present + 120_000, 0)
    assert scrape(world).views == []
    world.append(0, definition, {("a",): 1}, present)
    assert scrape(world).views == []


def test_a_view_with_windows_is_bounded_by_the_series_of_one() -> None:
    """`openmetrics_series_max` counts the series of the window that is shown, not every window that is kept."""
    clock = HandClock()
    world = World(1, clock=clock, settings=QuerySettings(openmetrics_series_max=2))
    definition = Definition("v", "sum", ("x",), window_s=60)
    present = clock.now_ms() // 60_000 * 60_000
    for i in range(1, 6):
        world.append(0, definition, {("a",): i, ("b",): i}, present - i * 60_000)
    world.fold()
    (exposed,) = scrape(world).views
    assert exposed.values == [1, 1]
    world.append(0, definition, {("c",): 1}, present - 60_000)
    world.fold()
    assert scrape(world).omitted == {"v": "series_max"}


def test_a_histogram_comes_back_under_the_names_that_it_had() -> None:
    """The sums that a bridge, pushed text or OTLP makes of a histogram are a family again, if they fit."""
    world = World()
    text = "# TYPE took histogram\n"
    for path, counts in (("/", (1, 3, 3)), ("/x", (0, 0, 2))):
        for le, count in zip(("0.5", "10", "+Inf"), counts, strict=True):
            text += f'took_bucket{{path="{path}",le="{le}"}} {count}\n'
        text += f'took_sum{{path="{path}"}} {counts[-1] * 2.5}\ntook_count{{path="{path}"}} {counts[-1]}\n'
    text += '# TYPE odd histogram\nodd_bucket 1\n# TYPE half histogram\nhalf_bucket{le="1"} 1\nhalf_count 1\nhalf_sum 1\n'
    text += '# TYPE mine histogram\nmine_bucket{le="+Inf"} 1\nmine_count 1\nmine_sum 1\n# TYPE mine gauge\nmine 1\n'
    with serving(world) as server:
        reply = server.request("POST", "/v1/openmetrics", text.encode(), {"Content-Type": "text/plain; version=0.0.4"})
        assert reply.json()["reasons"] == {"le": 1}
        world.fold()
        for headers, plain in ((OPENMETRICS, False), ({}, True)):
            found = families(server.request("GET", "/v1/openmetrics", None, headers), plain=plain)
            took = found["took"]
            assert took.type == "histogram"
            assert {(it.name, it.labels["path"], it.labels.get("le")): it.value for it in took.samples} == {
                ("took_bucket", "/", "0.5"): 1, ("took_bucket", "/", "10.0"): 3, ("took_bucket", "/", "+Inf"): 3,
                ("took_count", "/", None): 3, ("took_sum", "/", None): 7.5,
                ("took_bucket", "/x", "0.5"): 0, ("took_bucket", "/x", "10.0"): 0, ("took_bucket", "/x", "+Inf"): 2,
                ("took_count", "/x", None): 2, ("took_sum", "/x", None): 5,
            }  # fmt: skip
            assert {found[name].type for name in ("half_bucket", "mine_bucket", "mine_count")} == {"counter"}
            assert found["mine"].type == "gauge"
        binary = server.request("GET", "/v1/openmetrics", None, {"Accept": PROTOBUF}).body
        family = prompb.families(binary)["took"]
        of = next(it.histogram for it in family.metric if it.label[0].value == "/")
        assert (family.type, of.sample_count_float, of.sample_sum) == (4, 3, 7.5)
        assert [(it.upper_bound, it.cumulative_count_float) for it in of.bucket] == [(0.5, 1), (10, 3), (math.inf, 3)]
