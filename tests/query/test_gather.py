"""A server that merges others answers as one server with all partitions would, or says what is missing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.metrics as m
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http import HttpLogWriter, HttpReader
from pipeline.adapters.http_parts import HttpPart
from pipeline.adapters.prometheus import PrometheusMetrics, render_views
from pipeline.core.answer import Answer, Answers, Views
from pipeline.core.gathered import (
    PARTS_VERSION,
    StatesAsked,
    StatesFound,
    StatesRead,
    decode_asked,
    decode_found,
    encode_part,
)
from pipeline.core.kinds import KINDS
from pipeline.core.query import Matcher, Query
from pipeline.core.record import Definition
from pipeline.core.span import NO_RANGE, AskedRange, Span
from pipeline.core.token import Token
from pipeline.errors import BadRecord, Invalid, NotFound, NotReady, OtherTopic, PipelineError, Unavailable
from pipeline.query.gather import GatherService
from pipeline.query.gather_api import create_gather_app
from pipeline.query.media import encode_body
from pipeline.query.params import ReadHeaders, ReadRequest, SeveralRequest
from pipeline.query.part_servers import PartServers
from pipeline.query.reader import ViewReader
from pipeline.query.streams import Streams
from pipeline.roles.gather import Gatherer
from pipeline.settings import QuerySettings
from tests.query.support import Part, Server, World, running, serving
from tests.support import HandClock, examples

SETTINGS = QuerySettings(gather_interval_ms=10)
PARTITIONS = 4
BASE_MS = 1_700_000_100_000 // 60_000 * 60_000
"""Start of the first window; the clock is 15 windows behind it."""
REGIONS = ("eu", "us", "", "\u00fc", "x" * 20)


class LocalPart:
    """A `PartServer` in this process, which can be away, slow, or wrong."""

    def __init__(self, name: str, part: Part | World) -> None:
        self.url = f"http://{name}"
        self.part = part
        self.error: PipelineError | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[StatesAsked] = []
        self.change: Callable[[StatesFound], StatesFound] = lambda found: found

    def ask(self, body: bytes, timeout_s: float) -> bytes:
        asked = decode_asked(body)
        self.asked.append(asked)
        if not self.gate.wait(timeout_s):
            raise Unavailable(f"{self.url}: no answer in time")
        if self.error is not None:
            raise self.error
        clock = self.part.clock
        found = self.part.reader.states(asked, arrived_s=clock.monotonic_s(), deadline_s=clock.monotonic_s() + 60)
        return encode_part(self.change(found))

    @property
    def reads(self) -> list[StatesAsked]:
        """Requests for states."""
        return [asked for asked in self.asked if asked.reads]

    def close(self) -> None:
        """Do nothing."""


def gather_of(servers: Sequence[LocalPart], clock: Any, settings: QuerySettings = SETTINGS) -> GatherService:
    return GatherService(PartServers(servers, clock, m.NO_METRICS, 0.01), clock, settings, m.NO_METRICS)


def asked_of(query: Query, **more: Any) -> ReadRequest:
    return ReadRequest(query=query, timeout_ms=more.pop("timeout_ms", 20_000), **more)


async def answered(service: GatherService, query: Query, **more: Any) -> Answer:
    encoded = await service.answer(asked_of(query, **more))
    return msgspec.json.decode(b"".join(encoded.parts), type=Answer)


def gathered(service: GatherService, query: Query, **more: Any) -> Answer:
    return asyncio.run(answered(service, query, **more))


def all_gathered(service: GatherService, queries: Sequence[Query]) -> list[Answer]:
    """Return the answers of one request of several queries."""
    encoded = asyncio.run(service.answers(SeveralRequest(queries=tuple(queries), timeout_ms=20_000), ReadHeaders()))
    return [*msgspec.json.decode(b"".join(encoded.parts), type=Answers).answers]


def whole(reader: ViewReader, query: Query) -> Answer:
    answer = reader.read(query, deadline_s=2**60)
    return msgspec.json.decode(encode_body(answer, "application/json"), type=Answer)


# As one server of all partitions


def some_value(rng: Random, kind: str) -> Any:
    if kind in ("distinct", "topk"):
        return rng.choice("abcdefgh")
    return rng.choice((rng.randint(-50, 50), rng.randint(-400, 400) / 8, 10**20))


@pytest.fixture(scope="module")
def world() -> World:
    """Views of all kinds, with and without windows, of several definitions; series are in any partitions."""
    rng = Random(5)
    world = World(PARTITIONS, clock=HandClock(), settings=SETTINGS)
    definitions = [Definition(f"v_{kind}", kind, ("a", "b"), window) for kind in KINDS for window in (0, 60)]
    definitions += [Definition("v_sum", "sum", ("a", "c"), window, True) for window in (0, 60)]
    definitions += [Definition("silent", "sum", ("a",), 0, False, 600), Definition("bare", "sum")]
    definitions += [Definition("old", "sum", ("a",), 60, False, 600)]
    for number in range(60):
        definition = rng.choice(definitions)
        kind = KINDS[definition.kind]
        series = {}
        for _ in range(rng.randint(1, 6)):
            labels = tuple(rng.choice(REGIONS) for _ in definition.labels)
            values = [some_value(rng, definition.kind) for _ in range(rng.randint(1, 3))]
            if definition.monotone:
                values = [abs(value) for value in values]
            series[labels] = kind.collect([kind.check(value, BASE_MS, number) for value in values])
        window_ms = BASE_MS + rng.randrange(15) * 60_000 if definition.window_s else 0
        world.append(rng.randrange(PARTITIONS), definition, series, window_ms)
        if rng.random() < 0.3:
            world.fold(rng.randrange(PARTITIONS))
    world.fold()
    world.expire(Definition("old", "sum", ("a",), 60, False, 600), BASE_MS + 5 * 60_000, *_having(world, "old")[:1])
    return world


def _having(world: World, view: str) -> list[int]:
    return [number for number in range(PARTITIONS) if any(it.name == view for it in world.part(number).reader.views().views)]


labels = st.sampled_from(["a", "b", "c", "nothing"])
matchers = st.builds(
    Matcher,
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["=", "!=", "=~", "!~"]),
    st.sampled_from([*REGIONS, "[eu].*"]),
)
ranges = st.just(NO_RANGE) | st.builds(
    AskedRange,
    start_ms=st.none() | st.integers(0, 15).map(lambda n: BASE_MS + n * 60_000),
    end_ms=st.none() | st.integers(1, 16).map(lambda n: BASE_MS + n * 60_000),
    step_ms=st.none() | st.sampled_from([60_000, 120_000, 180_000, 7]),
    over_ms=st.none() | st.sampled_from([180_000, 360_000]),
    fill=st.none() | st.sampled_from(["null", "zero", "previous"]),
    compare_ms=st.none() | st.sampled_from([60_000, 300_000, 7]),
)
queries = st.builds(
    Query,
    st.sampled_from([f"v_{kind}" for kind in KINDS] + ["silent", "bare", "old", "v_sun"]),
    where=st.lists(matchers, max_size=3).map(tuple),
    by=st.none() | st.lists(labels, max_size=2, unique=True).map(tuple),
    top=st.none() | st.integers(1, 5),
    limit=st.sampled_from([1, 2, 5, 10_000]),
    kind=st.none() | st.none() | st.sampled_from([*KINDS]),
    window_s=st.none() | st.sampled_from([0, 60, 60]),
    range=ranges,
    fn=st.none() | st.none() | st.sampled_from(["rate", "delta", "avg", "cumulative", "share"]),
    quantiles=st.just(()) | st.just(()) | st.just((0.5, 0.99)),
)
queries |= queries.map(lambda query: msgspec.structs.replace(query, top=None, bottom=query.top))
splits = st.lists(st.lists(st.integers(0, PARTITIONS - 1), unique=True), min_size=1, max_size=4).map(
    lambda parts: [*parts, [number for number in range(PARTITIONS) if number not in {it for part in parts for it in part}]]
)


@given(queries, splits)
@settings(max_examples=examples(60), deadline=None)
def test_any_split_answers_as_one_server(world: World, query: Query, split: list[list[int]]) -> None:
    """Whichever servers have which partitions, some several of them: answers and refusals are those of one server."""
    servers = [LocalPart(f"s{index}", world.part(*numbers)) for index, numbers in enumerate(split)]
    service = gather_of(servers, world.clock)
    try:
        expected, error = None, None
        try:
            expected = whole(world.reader, query)
        except PipelineError as refusal:
            error = refusal
        if error is not None:
            with pytest.raises(type(error)):
                gathered(service, query)
            return
        found = gathered(service, query)
        assert found == expected
        assert gathered(service, query) == expected  # with the definitions known
        for server in servers:
            for asked in server.reads:
                assert asked.partitions
    finally:
        service.close()


@given(st.lists(queries, min_size=1, max_size=4), splits)
@settings(max_examples=examples(30), deadline=None)
def test_several_queries_are_answered_as_by_one_server(world: World, asked: list[Query], split: list[list[int]]) -> None:
    """Several queries have the answers of one server, or its refusal with the index of the query that is wrong."""
    service = gather_of([LocalPart(f"s{index}", world.part(*it)) for index, it in enumerate(split)], world.clock)
    try:
        try:
            expected = [whole(world.reader, query) for query in asked]
        except PipelineError as error:
            with pytest.raises(type(error), match=r"query \d: "):
                all_gathered(service, asked)
            return
        for _ in range(2):  # with the definitions known, too
            assert all_gathered(service, asked) == expected
    finally:
        service.close()


def test_ranges_are_compared_as_by_one_server(world: World) -> None:
    """A range beside an earlier one is answered alone and among other queries, which have states of their own."""
    service = gather_of([LocalPart("s0", world.part(0, 2)), LocalPart("s1", world.part(1, 3))], world.clock)
    span = AskedRange(BASE_MS + 5 * 60_000, BASE_MS + 10 * 60_000, compare_ms=300_000)
    compared = Query("v_mean", by=("a",), window_s=60, range=span)
    others = [Query("v_sum", by=(), window_s=0), compared, Query("v_max", window_s=0)]
    expected = [whole(world.reader, query) for query in (compared, *others)]
    assert any(it.points and it.compare for it in expected[0])
    assert [gathered(service, compared), *all_gathered(service, others)] == expected
    assert all_gathered(service, others) == expected[1:]


def test_definitions_that_change_are_noticed_by_any_query() -> None:
    """A query that fits today's definitions is answered, also if it does not fit those of the read before."""
    world = World(PARTITIONS, clock=HandClock(), settings=SETTINGS)
    by_region, by_product = Query("hits", by=("region",)), Query("hits", by=("product",))
    world.publish(Definition("hits", "sum", ("region",)), {("eu",): 3})
    service = gather_of([LocalPart("s0", world.part(0, 1)), LocalPart("s1", world.part(2, 3))], world.clock)
    assert gathered(service, by_region) == whole(world.reader, by_region)
    for _ in range(2):
        with pytest.raises(Invalid, match="product"):
            gathered(service, by_product)
    world.publish(Definition("hits", "sum", ("region", "product")), {("eu", "tea"): 2})
    assert gathered(service, by_product) == whole(world.reader, by_product)
    assert all_gathered(service, [by_region, by_product]) == [whole(world.reader, it) for it in (by_region, by_product)]


def test_several_queries_are_of_one_moment(small: World) -> None:
    """The states for all queries come in one answer of each server, so that no commit lies between them."""
    servers = [LocalPart("s0", small.part(0, 1)), LocalPart("s1", small.part(2, 3))]
    service = gather_of(servers, small.clock)
    assert [it.value() for it in all_gathered(service, [TOTAL, Query("hits", by=()), TOTAL])] == [1111, 1115, 1111]
    assert [[len(asked.reads) for asked in server.reads] for server in servers] == [[3], [3]]
    with pytest.raises(Invalid, match=r"query 1: .*x"):
        all_gathered(service, [TOTAL, Query("hits", by=("x",))])


def test_views_and_scrapes_are_those_of_one_server(world: World) -> None:
    """The list of views and what Prometheus scrapes are the same, counts and omissions included."""
    servers = [LocalPart("s0", world.part(0, 3)), LocalPart("s1", world.part(1, 2))]
    service = gather_of(servers, world.clock)
    views = asyncio.run(service.views(ReadHeaders()))
    assert msgspec.json.decode(b"".join(views.parts), type=Views) == world.reader.views()
    for chosen in ((), ("v_sum", "bare")):
        text, _ = asyncio.run(service.scrape(chosen, render_views, ""))
        assert text == render_views(world.reader.scrape(chosen, deadline_s=2**60), "")[0]
    small = QuerySettings(gather_interval_ms=10, openmetrics_series_max=8)
    service = gather_of(servers, world.clock, small)
    reader = World.new_reader(world)
    reader._settings = small
    text, _ = asyncio.run(service.scrape((), render_views, ""))
    assert text == render_views(reader.scrape((), deadline_s=2**60), "")[0]
    with pytest.raises(NotFound, match="no view 'nothing'"):
        asyncio.run(service.scrape(("nothing",), render_views, ""))


# Servers that are away, slow, doubled, or wrong

HITS = Definition("hits", "sum", ("n",))
MINUTES = Definition("minutes", "sum", (), 60)


@pytest.fixture
def small() -> World:
    """One series that is in every partition: with 10 to the power of the partition's number."""
    world = World(PARTITIONS, clock=HandClock(), settings=SETTINGS)
    for number in range(PARTITIONS):
        world.append(number, HITS, {("a",): 10**number, (str(number),): 1})
    world.fold()
    return world


TOTAL = Query("hits", (Matcher("n", "=", "a"),))


def test_each_partition_counts_once(small: World) -> None:
    """One of the servers that have a partition is asked for it: the fresher one, or of equals the first."""
    servers = [LocalPart(f"s{index}", small.part(*numbers)) for index, numbers in enumerate([(0, 1, 2), (1, 2, 3), (0, 3)])]
    service = gather_of(servers, small.clock)
    assert gathered(service, TOTAL).value() == 1111
    assert [asked.partitions for server in servers for asked in server.reads] == [[0, 1, 2], [3]]
    stale = servers[0]
    stale.change = lambda found: msgspec.structs.replace(
        found, partitions=[msgspec.structs.replace(it, staleness_ms=5_000) for it in found.partitions]
    )

    async def again() -> None:
        for known in service._servers._known:
            await service._servers._ask_partitions(known)

    asyncio.run(again())
    before = len(stale.reads)
    assert gathered(service, TOTAL).value() == 1111
    assert len(stale.reads) == before


def test_another_server_is_asked(small: World) -> None:
    """If a server does not answer, or is slow, those that have its partitions are asked, and the answer is whole."""
    servers = [LocalPart("s0", small.part(0, 1)), LocalPart("s1", small.part(2, 3)), LocalPart("s2", small)]
    service = gather_of(servers, small.clock)
    assert gathered(service, TOTAL).value() == 1111
    servers[1].error = Unavailable("it is away")
    assert gathered(service, TOTAL).value() == 1111
    servers[0].error = NotReady("restoring")
    assert gathered(service, TOTAL).value() == 1111
    servers[0].error = servers[1].error = None
    servers[0].gate.clear()
    assert gathered(service, TOTAL, timeout_ms=300).value() == 1111


def test_a_slow_server_holds_up_no_others(small: World) -> None:
    """Reads that wait for a slow server end in their time; meanwhile others are answered by servers that are there."""
    slow, quick = LocalPart("slow", small.part(0, 1)), LocalPart("quick", small)
    service = gather_of([slow, quick], small.clock)
    assert gathered(service, TOTAL).value() == 1111
    slow.gate.clear()

    async def both() -> tuple[Answer, Answer]:
        waiting = asyncio.create_task(answered(service, TOTAL, timeout_ms=1_000))
        await asyncio.sleep(0.01)
        service._servers._known[0].found = None  # as soon as it is known to be slow
        found = await asyncio.wait_for(answered(service, TOTAL), 0.4)
        assert not waiting.done()
        return found, await waiting

    assert [answer.value() for answer in asyncio.run(both())] == [1111, 1111]
    slow.gate.set()


def test_what_is_missing_is_named(small: World) -> None:
    """Partitions that no server answers for are an error that names them and the servers, or are named in the answer."""
    servers = [LocalPart("s0", small.part(0, 1)), LocalPart("s1", small.part(3))]
    service = gather_of(servers, small.clock)
    with pytest.raises(Unavailable, match=r"partitions 2 are missing: no server follows them; allow_partial=true"):
        gathered(service, TOTAL)
    with pytest.raises(Unavailable, match=r"partitions 2 are missing: no server follows them$"):
        all_gathered(service, [TOTAL])  # it has no such parameter
    partial = gathered(service, TOTAL, allow_partial=True)
    assert partial.value() == 1011
    assert partial.as_of.missing_partitions == [2]
    assert partial.as_of.next_offsets.keys() == {"0", "1", "3"}
    assert not service.ready
    assert [it.phase for it in service.status().partitions] == ["gathered", "gathered", "missing", "gathered"]
    servers[1].error = Unavailable("http://s1: it is away")
    with pytest.raises(Unavailable, match=r"partitions 2, 3 are missing: http://s1: it is away"):
        gathered(service, TOTAL)
    assert gathered(service, TOTAL, allow_partial=True).value() == 11
    servers[0].error = NotReady("restoring")
    with pytest.raises((Unavailable, NotReady), match=r"s0: restoring; http://s1: it is away$"):
        gathered(service, TOTAL, allow_partial=True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"partition_count": 5}, "servers disagree: http://s0 has a topic of 4 partitions, http://s1 one of 5"),
        ({"topic_id": "other"}, "servers disagree: http://s0 follows topic .*, http://s1 follows other"),
    ],
)
def test_servers_that_disagree_are_refused(small: World, change: Mapping[str, Any], text: str) -> None:
    """Servers of topics with other ids or numbers of partitions are never merged, with `allow_partial` neither."""
    servers = [LocalPart("s0", small.part(0, 1)), LocalPart("s1", small.part(2, 3))]
    servers[1].change = lambda found: msgspec.structs.replace(found, **change)
    service = gather_of(servers, small.clock)
    for allow_partial in (False, True):
        with pytest.raises(NotReady, match=text):
            gathered(service, TOTAL, allow_partial=allow_partial)


@pytest.mark.parametrize(
    "change",
    [
        lambda found: msgspec.structs.replace(found, version=2),
        lambda found: msgspec.structs.replace(found, partitions=found.partitions[:1]),
        lambda found: msgspec.structs.replace(found, reads=[]),
        lambda found: msgspec.structs.replace(found, reads=[*found.reads, *found.reads]),
        lambda found: msgspec.structs.replace(found, entries=[b"\x02nonsense"]),
        lambda found: msgspec.structs.replace(
            found, reads=[msgspec.structs.replace(it, states=[*it.states, b"x"]) for it in found.reads]
        ),
        lambda found: msgspec.structs.replace(
            found, reads=[msgspec.structs.replace(it, states=[b"\x02x"] * len(it.states)) for it in found.reads]
        ),
        lambda found: msgspec.structs.replace(
            found, reads=[msgspec.structs.replace(it, labels=[(*row, "x") for row in it.labels]) for it in found.reads]
        ),
        lambda found: msgspec.structs.replace(
            found, reads=[msgspec.structs.replace(it, rest=b"short") for it in found.reads]
        ),
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(small: World, change: Callable[[StatesFound], StatesFound]) -> None:
    """Another version, other partitions, rows that do not fit: the read fails, and no number comes of it."""
    servers = [LocalPart("s0", small.part(0, 1)), LocalPart("s1", small.part(2, 3))]
    service = gather_of(servers, small.clock)
    assert gathered(service, TOTAL).value() == 1111
    servers[1].change = lambda found: change(found) if found.entries or found.reads else found
    with pytest.raises(Unavailable):
        gathered(service, TOTAL)


def test_tokens_are_split(small: World) -> None:
    """Each server waits for its own partitions; a token of another topic, or of partitions to come, is refused."""
    servers = [LocalPart("s0", small.part(0, 1)), LocalPart("s1", small.part(2, 3))]
    service = gather_of(servers, small.clock)
    token = small.token({0: 1, 3: 1})
    assert gathered(service, TOTAL, after=token).value() == 1111
    assert [Token.parse(asked.after).next_offsets for server in servers for asked in server.reads] == [{0: 1}, {3: 1}]
    with pytest.raises(NotReady, match="no partition 7 yet; these servers have 4"):
        gathered(service, TOTAL, after=small.token({7: 1}))


def test_staleness_has_the_time_on_the_way(small: World) -> None:
    """The staleness of an answer is the worst of its parts, and all the time since these were asked."""
    clock = small.clock
    assert isinstance(clock, HandClock)
    servers = [LocalPart("s0", small.part(0, 1)), LocalPart("s1", small.part(2, 3))]
    service = gather_of(servers, clock)
    gathered(service, TOTAL)

    def slow(found: StatesFound) -> StatesFound:
        if found.reads:
            clock.s += 0.25
        return found

    servers[0].change = slow
    servers[1].change = lambda found: msgspec.structs.replace(
        found, partitions=[msgspec.structs.replace(it, staleness_ms=70) for it in found.partitions]
    )
    assert gathered(service, TOTAL).as_of.staleness_ms in (250, 320)
    servers[0].change = lambda found: found
    assert gathered(service, TOTAL).as_of.staleness_ms == 70
    servers[1].change = lambda found: msgspec.structs.replace(
        found, partitions=[msgspec.structs.replace(it, staleness_ms=None) for it in found.partitions]
    )
    assert gathered(service, TOTAL).as_of.staleness_ms is None


def test_limits_count_series_of_several_servers_once(small: World) -> None:
    """A cut answer says how many series there are, also if some are in several servers and others beyond the limit."""
    servers = [LocalPart(f"s{number}", small.part(number)) for number in range(PARTITIONS)]
    answer = gathered(gather_of(servers, small.clock), Query("hits", limit=2))
    assert ([it.labels["n"] for it in answer], answer.series_total, answer.truncated) == (["0", "1"], 5, True)
    limited = QuerySettings(limit_max=3)
    parts = [LocalPart("s0", small.part(0, 1, 2, 3, settings=limited))]
    with pytest.raises(Invalid, match="over 3 groups"):
        gathered(gather_of(parts, small.clock), Query("hits", top=1))


def test_an_unknown_view_is_named_as_by_one_server(small: World) -> None:
    """404 with the nearest names."""
    service = gather_of([LocalPart("s0", small.part(0, 1)), LocalPart("s1", small.part(2, 3))], small.clock)
    with pytest.raises(NotFound, match="no view 'hit'; is it hits"):
        gathered(service, Query("hit"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"junk",
        msgspec.msgpack.encode({"version": 9}),
        msgspec.msgpack.encode({"version": 1}),
        msgspec.msgpack.encode({"version": 1, "partitions": [-1]}),
        msgspec.msgpack.encode({"version": 1, "partitions": [0], "more": 1}),
        encode_part(StatesAsked(PARTS_VERSION, [0], [StatesRead([])])),
        encode_part(StatesAsked(PARTS_VERSION, [0], [StatesRead([HITS, Definition("other", "sum")])])),
        encode_part(StatesAsked(PARTS_VERSION, [0], [StatesRead([Definition("v", "nothing")])])),
        encode_part(StatesAsked(PARTS_VERSION, [0], [StatesRead([HITS], hidden_before_ms=[1, 2])])),
        encode_part(StatesAsked(PARTS_VERSION, [0], [StatesRead([HITS], span=Span(0, 60_000, 60_000, 60_000))])),
        encode_part(StatesAsked(PARTS_VERSION, [0], [StatesRead([MINUTES], span=Span(0, 90_000, 60_000, 60_000))])),
        encode_part(StatesAsked(PARTS_VERSION, [0], [StatesRead([MINUTES], span=Span(0, 60_000, 0, 0))])),
    ],
)
def test_a_request_for_states_that_makes_no_sense_is_refused(body: bytes) -> None:
    """Anything but a whole request of this version is `Invalid`, and nothing is read."""
    with pytest.raises(Invalid):
        decode_asked(body)


@given(st.binary(max_size=60))
@settings(max_examples=examples(200), deadline=None)
def test_bytes_are_states_or_refused(value: bytes) -> None:
    """Bytes of a server are a part, or `BadRecord`."""
    for body in (value, encode_part(StatesAsked(PARTS_VERSION, [0]))[: len(value)] + value):
        with pytest.raises(BadRecord):
            decode_found(body)


# Over HTTP


@contextmanager
def gatherer(*servers: Server | str) -> Iterator[str]:
    """Run a server that merges others; yield its URL."""
    urls = [it if isinstance(it, str) else it.url for it in servers]
    metrics = PrometheusMetrics()
    it = Gatherer(urls, query_settings=SETTINGS, metrics=metrics)
    with running(create_gather_app(it.service, SETTINGS, metrics, render_views)) as port:
        yield f"http://127.0.0.1:{port}"


def test_over_http() -> None:
    """A reader, tokens, formats and operations work with a server that merges real ones; writes are refused."""
    world = World(PARTITIONS, settings=SETTINGS)
    for number in range(PARTITIONS):
        world.append(number, HITS, {("a",): 10**number, (str(number),): 1})
    world.fold()
    with (
        serving(world.part(0, 1)) as one,
        serving(world.part(2, 3)) as two,
        gatherer(one, two, "http://127.0.0.1:9") as url,
        HttpReader(url) as reader,
    ):
        token = world.token(dict.fromkeys(range(PARTITIONS), 1))
        assert reader.get("hits", where={"n": "a"}, after=token, max_staleness_ms=10_000).value() == 1111
        assert reader.get("hits", by=[]).value() == 1115
        assert [it.name for it in reader.views()] == ["hits"]
        assert b"hits" in reader.fetch("/v1/openmetrics")
        assert reader.fetch("/v1/views/hits?by=", accept="text/csv").endswith(b"1115\r\n")
        with pytest.raises(Invalid, match="allow_partial"):
            reader.fetch("/v1/views/hits?allow_partial=yes")
        with pytest.raises(Invalid, match="cursor: a server that merges others has no pages"):
            reader.fetch("/v1/views/hits?cursor=")
        several = reader.query([{"view": "hits", "by": []}, {"view": "hits", "where": {"n": "a"}}], after=token)
        assert [it.value() for it in several] == [1115, 1111]
        with pytest.raises(OtherTopic):
            reader.get("hits", after=Token({0: 1}, "another"), timeout_ms=3_000)
        with pytest.raises(Invalid, match="offset 5 of partition 1, and the log ends at 1"):
            reader.get("hits", after=world.token({1: 5}), timeout_ms=3_000)
        status = reader.status()
        assert (status["role"], status["ready"], len(status["partitions"])) == ("gatherer", True, PARTITIONS)
        assert sorted(it["name"] == "answers" for it in status["members"]) == [False, True, True]
        assert reader.fetch("/readyz") == b'{"ready":true}'
        merging = Server(world, int(url.rpartition(":")[2]))
        assert 'pipeline_gather_server_up{server="http://127.0.0.1:9"} 0' in merging.get("/metrics").body.decode()
        for path in ("/v1/deltas", "/v1/batches", "/v1/openmetrics", "/v1/views/hits/drop"):
            assert "--ingest" in merging.problem(405, merging.request("POST", path, b"[]"))
        assert "--ingest" in merging.problem(405, merging.request("PUT", "/metrics/job/a", b""))
        assert "remote reads" in merging.problem(501, merging.request("POST", "/api/v1/read", b""))
        assert next(reader.watch("hits", by=[], after=token)).value() == 1115
        with pytest.raises(Invalid, match="the log ends at 1"):
            next(reader.watch("hits", after=world.token({1: 5}), timeout_ms=3_000))
        assert b"<title>" in merging.get("/").body
        writer = HttpLogWriter(url)
        with pytest.raises(Unavailable, match="a gatherer takes no batches"):
            writer.partition_count("deltas")
        with gatherer(url) as second, HttpReader(second) as other, pytest.raises(Unavailable, match="gives no states"):
            other.get("hits", timeout_ms=3_000)


def test_streams(small: World) -> None:
    """A stream has what all servers have, moves with each of them, and says which partitions it lacks meanwhile."""
    parts = [LocalPart("one", small.part(0, 1)), LocalPart("two", small.part(2, 3))]
    service = gather_of(parts, SystemClock())
    query = Query("hits", by=())

    async def stream() -> None:
        observing = asyncio.create_task(service.observe())
        streams = Streams(service, SETTINGS, m.NO_METRICS, service.clock)
        async with asyncio.timeout(60), streams.open(query) as events:
            total = (await until(events, "answer", lambda it: True))["series"][0]["value"]
            for number, own in ((0, 10), (3, 100)):
                small.append(number, HITS, {("new",): own})
                small.fold(number)
                total += own
                await until(events, "update", lambda it: [it["value"] for it in it.get("changed", [])], [total])
            parts[1].error = Unavailable("gone")
            await until(events, "problem", lambda it: "partitions 2, 3 are missing" in it["detail"])
            parts[1].error = None
            await until(events, "answer", lambda it: it["series"][0]["value"], total)
        before = await service.moved({}, 60)
        moving = asyncio.create_task(service.moved(before, 60))
        await asyncio.sleep(0)  # it waits by then
        small.append(1, HITS, {("new",): 1})
        small.fold(1)
        async with asyncio.timeout(30):
            assert await moving == {**before, 1: before[1] + 1}
        observing.cancel()

    async def until(events: AsyncIterator[bytes], name: str, get: Callable[[Any], Any], wanted: Any = True) -> Any:
        async for event in events:
            fields = dict(line.split(b": ", 1) for line in event.splitlines() if line)
            data = msgspec.json.decode(fields[b"data"])
            if fields[b"event"].decode() == name and get(data) == wanted:
                return data
        raise AssertionError("the stream has ended")

    asyncio.run(stream())
    service.close()


@pytest.mark.parametrize("urls", [[], ["ftp://a"], ["http://a:1", "http://a:1/"], ["http://a"] * 300])
def test_urls_that_make_no_sense_are_refused(urls: list[str]) -> None:
    """No server, no HTTP, or one twice is an error before anything runs."""
    with pytest.raises(Invalid):
        Gatherer(urls)


def test_a_part_is_an_http_server() -> None:
    """A server that is not there, or none of this program, is `Unavailable` with its URL."""
    part = HttpPart("http://127.0.0.1:9", World(1).clock)
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:9"):
        part.ask(b"", 1)


def a_final_minute() -> World:
    """A window without labels that is final: 11, of which 10 came in time but later."""
    world = World(1, clock=HandClock(), settings=SETTINGS)
    start_ms = world.clock.now_ms() // 60_000 * 60_000
    world.append(0, MINUTES, {(): 11}, start_ms)
    world.clock.s += 61  # type: ignore[attr-defined]
    world.append(0, MINUTES, {(): 100}, start_ms + 60_000)
    world.fold()
    return world


def test_a_window_without_labels_is_scraped() -> None:
    """The newest final window of a view without labels is exposed, as by one server."""
    world = a_final_minute()
    service = gather_of([LocalPart("s0", world.part(0))], world.clock)
    text, _ = asyncio.run(service.scrape((), render_views, ""))
    assert b"\nminutes 11.0\n" in text


def test_a_window_is_final_where_it_is_read() -> None:
    """A server that has not reached the end of the window is not asked for it in place of one that has."""
    world = a_final_minute()
    fresh, late = LocalPart("fresh", world.part(0)), LocalPart("late", world.part(0))
    late.change = lambda found: msgspec.structs.replace(
        found,
        newest_ms=0,
        partitions=[msgspec.structs.replace(it, folded_ms=1, staleness_ms=120_000) for it in found.partitions],
    )
    service = gather_of([fresh, late], world.clock)
    ask = fresh.ask

    def away(body: bytes, timeout_s: float) -> bytes:
        if decode_asked(body).reads:
            raise Unavailable("it went away between the two questions of a scrape")
        return ask(body, timeout_s)

    fresh.ask = away  # type: ignore[method-assign]
    text, _ = asyncio.run(service.scrape((), render_views, ""))
    assert b"\nminutes " not in text


def test_nothing_is_final_while_partitions_are_missing(small: World) -> None:
    """Neither a gatherer nor a server of a part knows the time that the others have reached."""
    small.append(0, MINUTES, {(): 1}, 0)
    small.fold()
    service = gather_of([LocalPart("s0", small.part(0, 1))], small.clock)
    answer = gathered(service, Query("minutes", by=()), allow_partial=True)
    assert (answer.as_of.missing_partitions, answer.final_before_ms) == ([2, 3], 0)
    own = small.part(0, 1).reader.read(Query("minutes", by=()), deadline_s=2**60)
    assert own.final_before_ms == 0
