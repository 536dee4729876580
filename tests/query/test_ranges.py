"""Reads of views with windows: points equal a recomputation from all deltas."""

from collections.abc import Mapping
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.core.answer import Answer
from pipeline.core.kinds import KINDS
from pipeline.core.query import Labels, Query, parse_matcher
from pipeline.core.record import Definition, prefix_end, series_prefix
from pipeline.core.span import FILLS, AskedRange
from pipeline.errors import Invalid, NotFound
from pipeline.query.ends import EndsNow
from pipeline.query.reader import ViewReader
from pipeline.query.staleness import LogTime, final_before_ms
from pipeline.settings import QuerySettings, WorkerSettings
from pipeline.topics import DELTAS
from tests.core import strategies as some
from tests.query.support import World, scanned
from tests.support import HandClock

FAR_S = 1e18
W = 10_000
WINDOWS = 24


def read(world: World, query: Query) -> Answer:
    return world.reader.read(query, deadline_s=FAR_S)


def points(answer: Answer) -> dict[Labels, list[tuple[int, Any]]]:
    return {tuple(series.labels.values()): series.points for series in answer}


class Delta(NamedTuple):
    """A state of one series in one window, in one partition."""

    partition: int
    part: int
    window: int
    labels: Labels
    state: Any


small = st.sampled_from(["", "a", "b"])
PARTS = (("x", "y"), ("x",))
"""Labels of the view's two definitions."""


def recomputed(
    kind: Any, deltas: list[Delta], expired: Mapping[int, int], query: Query, start: int, end: int, step: int, over: int
) -> dict[Labels, list[tuple[int, Any]]]:
    """Return the points of each group, computed from the deltas one by one."""
    names = ("x", "y")
    groups: dict[Labels, dict[int, Any]] = {}
    ends = range(start + step, end + 1, step)
    for delta in deltas:
        labels = dict.fromkeys(names, "") | dict(zip(PARTS[delta.part], delta.labels, strict=True))
        if delta.window < expired.get(delta.part, 0) or any(labels[it.label] != it.pattern for it in query.where):
            continue
        group = tuple(labels[name] for name in (names if query.by is None else query.by))
        for point in ends:
            if point - over <= delta.window < point:
                found = groups.setdefault(group, {})
                known = point - over in found
                found[point - over] = kind.merge(found[point - over], delta.state) if known else delta.state
    answers: dict[Labels, list[tuple[int, Any]]] = {}
    for group in sorted(groups):
        values = {at: kind.answer(state) for at, state in groups[group].items()}
        out, last = [], None
        for at in [it - over for it in ends]:
            if at in values:
                last = values[at]
                out.append((at, last))
            elif query.range.fill == "null":
                out.append((at, None))
            elif query.range.fill == "zero":
                out.append((at, 0 if at >= max(expired.values(), default=0) else None))
            elif query.range.fill == "previous" and out:
                out.append((at, last))
        answers[group] = out
    return answers


@given(data=st.data(), kind=st.sampled_from([*KINDS.values()]))
def test_points_are_a_recomputation_from_all_deltas(data: st.DataObject, kind: Any) -> None:
    """Points equal a recomputation for any windows, range, step, length, fill, grouping, partitions and expiry."""
    world = World(partition_count=2)
    definitions = [Definition("v", kind.name, labels, window_s=W // 1_000, retention_s=0) for labels in PARTS]
    shapes = data.draw(
        st.lists(
            st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, WINDOWS - 1).map(lambda n: n * W), small, small),
            min_size=1,
            max_size=10,
        )
    )
    states = data.draw(some.states(kind.name, count=len(shapes)))
    deltas = [
        Delta(partition, part, window, (x, y)[: len(PARTS[part])], state)
        for (partition, part, window, x, y), state in zip(shapes, states, strict=True)
    ]
    for delta in deltas:
        world.append(delta.partition, definitions[delta.part], {delta.labels: delta.state}, delta.window)
    world.fold()
    expired = {}
    for part in sorted({delta.part for delta in deltas}):
        holders = sorted({delta.partition for delta in deltas if delta.part == part})
        before = data.draw(st.sampled_from([0, 0, 3 * W, 8 * W]), "expired")
        if before:
            expired[part] = before
            world.expire(definitions[part], before, data.draw(st.sampled_from(holders)))
            if len(holders) > 1:
                world.expire(definitions[part], before - W, next(it for it in holders))
                world.expire(definitions[part], before, holders[-1])
    start, end = sorted(data.draw(st.tuples(st.integers(0, WINDOWS * W), st.integers(0, WINDOWS * W)), "range"))
    step = data.draw(st.integers(1, 5)) * W
    over = step + data.draw(st.integers(0, 8)) * W
    fills = [None, *FILLS] if kind.name == "sum" else [None, "null", "previous"]
    asked = AskedRange(start, end + 1, None, step, over, data.draw(st.sampled_from(fills)))
    view_labels = sorted({label for delta in deltas for label in PARTS[delta.part]})
    by = data.draw(st.sampled_from([None, (), ("x",)]))
    where = data.draw(st.sampled_from([(), ("x=a",), ("x=a", "y=b")]))
    if view_labels == ["x"]:
        where = where[:1]
    query = Query("v", tuple(map(parse_matcher, where)), by, range=asked)
    first, count = start // W * W, -(-(end + 1 - start // W * W) // step)
    expected = recomputed(kind, deltas, expired, query, first, first + count * step, step, over)
    if view_labels == ["x"] and by is None:
        expected = {labels[:1]: its for labels, its in expected.items()}
    answer = read(world, query)
    assert points(answer) == expected
    assert [*points(answer)] == sorted(expected)
    assert points(scanned(world.reader, query)) == expected
    assert (answer.start_ms, answer.end_ms, answer.step_ms, answer.over_ms) == (first, first + count * step, step, over)
    assert (answer.expired_before_ms or 0) == max(expired.values(), default=0)
    assert points(msgspec.json.decode(msgspec.json.encode(answer), type=Answer)) == expected


def windowed(world: World, labels: tuple[str, ...] = ("x",), kind: str = "sum") -> Definition:
    """A view of three series in ten windows: series i has i + 1 in each window from window i on."""
    definition = Definition("v", kind, labels, window_s=W // 1_000)
    for window in range(10):
        world.append(window % 2, definition, {("abc"[i],): i + 1 for i in range(3) if window >= i}, window * W)
    world.fold()
    return definition


def test_a_read_without_a_range_is_of_the_last_steps() -> None:
    """A read without a range covers 60 windows that end with the server's present one, and says which points are final."""
    clock = HandClock()
    clock.s += 5
    world = World(2, clock=clock)
    now = clock.now_ms()
    definition = Definition("v", "sum", (), window_s=W // 1_000)
    present = now // W * W
    for window, value in ((present - 60 * W, 1), (present - 59 * W, 2), (present, 4)):
        world.append(0, definition, {(): value}, window)
    world.fold()
    answer = read(world, Query("v"))
    assert points(answer) == {(): [(present - 59 * W, 2), (present, 4)]}
    assert (answer.start_ms, answer.end_ms) == (present - 59 * W, present + W)
    assert [answer.is_final(point) for point in answer.series[0].points] == [True, False]
    assert answer.final_before_ms == now
    with pytest.raises(Invalid, match="2 points; ask with at="):
        answer.value()
    assert read(world, Query("v", range=AskedRange(at_ms=now))).value() == 4
    assert read(world, Query("v", range=AskedRange(at_ms=now, over_ms=60 * W))).value() == 6


def test_a_pinned_read_gets_its_keys() -> None:
    """Few windows are read by their keys, in the caller's thread; many by keys in another; very many by a scan."""
    world = World(2)
    windowed(world)

    def ask(end: int) -> Query:
        return Query("v", (parse_matcher("x=b"),), range=AskedRange(start_ms=0, end_ms=end))

    few, many = ask(10 * W), ask(400 * W)
    found = world.reader.point(few)
    assert found is not None
    assert points(found) == points(scanned(world.reader, few)) == {("b",): [(i * W, 2) for i in range(1, 10)]}
    assert world.reader.point(many) is None
    assert points(read(world, many)) == points(found)
    assert world.reader.point(Query("v", range=AskedRange(start_ms=0, end_ms=10 * W))) is None


def test_series_have_points_at_the_same_starts() -> None:
    """Null and zero fill all series alike; previous begins with a series' first point within the range."""
    world = World(2)
    windowed(world)
    for fill, missing in (("null", None), ("zero", 0)):
        found = points(read(world, Query("v", range=AskedRange(start_ms=0, end_ms=4 * W, fill=fill))))
        assert found[("c",)] == [(0, missing), (W, missing), (2 * W, 3), (3 * W, 3)]
        assert {tuple(start for start, _ in its) for its in found.values()} == {(0, W, 2 * W, 3 * W)}
    found = points(read(world, Query("v", range=AskedRange(start_ms=8 * W, end_ms=13 * W, fill="previous"))))
    assert found[("c",)] == [(i * W, 3) for i in range(8, 13)]
    assert points(read(world, Query("v", range=AskedRange(start_ms=10 * W, end_ms=13 * W, fill="previous")))) == {}


def test_zero_is_for_sums() -> None:
    """`fill=zero` is refused for a max: the largest of nothing is not 0."""
    world = World(2)
    windowed(world, kind="max")
    with pytest.raises(Invalid, match="fill=zero: a max of nothing is not 0"):
        read(world, Query("v", range=AskedRange(start_ms=0, end_ms=W, fill="zero")))


def test_what_has_expired_is_not_known_to_be_zero() -> None:
    """Expired windows are hidden from both kinds of reads at once; the answer says from which time on it is complete."""
    world = World(2)
    definition = windowed(world)
    asked = AskedRange(start_ms=0, end_ms=4 * W, fill="zero")
    pinned = Query("v", (parse_matcher("x=a"),), range=asked)
    assert read(world, pinned).expired_before_ms is None
    world.expire(definition, 2 * W, 1)
    for answer in (read(world, pinned), scanned(world.reader, pinned)):
        assert points(answer) == {("a",): [(0, None), (W, None), (2 * W, 1), (3 * W, 1)]}
        assert answer.expired_before_ms == 2 * W
    for fn, known in (("delta", [0]), ("rate", [1_000 / W, 1_000 / W]), ("cumulative", [1, 2])):
        derived = points(read(world, Query("v", (parse_matcher("x=a"),), range=asked, fn=fn)))[("a",)]
        assert [value for _, value in derived] == [*[None] * (4 - len(known)), *map(pytest.approx, known)], fn
    world.expire(definition, 50 * W, 0)
    assert read(world, pinned).series == scanned(world.reader, pinned).series == []


def test_top_ranks_by_the_whole_range() -> None:
    """`top` and `bottom` rank by the merged value of all that the points cover, not by the newest; limit counts series."""
    world = World(2)
    definition = Definition("v", "sum", ("x",), window_s=W // 1_000)
    for window, values in enumerate(({("a",): 5, ("b",): 1}, {("a",): 1, ("b",): 3, ("c",): 1})):
        world.append(0, definition, values, window * W)
    world.fold()
    asked = AskedRange(start_ms=0, end_ms=2 * W)
    best = read(world, Query("v", top=2, range=asked))
    assert [*points(best)] == [("a",), ("b",)]
    assert (best.truncated, best.series_total) == (True, 3)
    cut = read(world, Query("v", limit=1, range=asked))
    assert points(cut) == {("a",): [(0, 5), (W, 1)]}
    assert (cut.truncated, cut.series_total) == (True, 3)
    last = read(world, Query("v", top=1, range=AskedRange(start_ms=W, end_ms=2 * W)))
    assert [*points(last)] == [("b",)]
    overlapping = read(world, Query("v", top=1, range=AskedRange(start_ms=W, end_ms=2 * W, over_ms=2 * W)))
    assert points(overlapping) == {("a",): [(0, 6)]}
    for fn in ("rate", "avg", "share"):  # which rank over the range as the values do
        assert [*points(read(world, Query("v", top=1, range=asked, fn=fn)))] == [("a",)]
        assert [*points(read(world, Query("v", bottom=2, range=asked, fn=fn)))] == [("c",), ("b",)]


def test_shares_are_of_all_series() -> None:
    """Shares are of the total of every series that matches, also of those that top and limit cut."""
    world = World(2)
    windowed(world)
    asked = AskedRange(start_ms=W, end_ms=3 * W, fill="null")
    found = points(read(world, Query("v", top=1, range=asked, fn="share")))
    assert found == {("b",): [(W, 2 / 3), (2 * W, 2 / 6)]}
    found = points(read(world, Query("v", (parse_matcher("x=c"),), range=asked, fn="share")))
    assert found == {("c",): [(W, None), (2 * W, 1.0)]}
    found = points(read(world, Query("v", (parse_matcher("x=b"),), range=AskedRange(start_ms=0, end_ms=2 * W), fn="rate")))
    assert found == {("b",): [(W, 0.2)]}


@pytest.mark.parametrize(
    ("settings", "query", "said"),
    [
        ({"answer_points_max": 5}, Query("v", range=AskedRange(start_ms=0, end_ms=4 * W)), "over 5 points of all series"),
        ({"answer_points_max": 11}, Query("v", range=AskedRange(start_ms=0, end_ms=4 * W, fill="null")), "over 11 points"),
        ({"answer_points_max": 20}, Query("v", range=AskedRange(start_ms=0, end_ms=8 * W, over_ms=3 * W)), "over 20 points"),
        (
            {"answer_points_max": 11},
            Query("v", range=AskedRange(start_ms=0, end_ms=4 * W), fn="cumulative"),
            "over 11 points",
        ),
        ({"points_max": 3}, Query("v", range=AskedRange(start_ms=0, end_ms=4 * W)), "4 points in the range; at most 3"),
        ({}, Query("v", range=AskedRange(start_ms=0, end_ms=4 * W, fill="nil")), "fill: one of null, zero, previous"),
        ({}, Query("v", range=AskedRange(start_ms=-1)), "start: a time from 1970"),
        ({}, Query("v", range=AskedRange(step_ms=0)), "step: a length above 0"),
        ({}, Query("v", by=("z",), range=AskedRange(start_ms=0, end_ms=W)), "no label 'z'; its labels: x"),
        ({}, Query("w", range=AskedRange(end_ms=W)), "view w has no windows"),
        ({}, Query("w", fn="rate"), "view w has no windows"),
        ({}, Query("w", (parse_matcher("x=a"),), range=AskedRange(fill="null")), "view w has no windows"),
    ],
)
def test_a_wrong_read_is_refused(settings: dict[str, int], query: Query, said: str) -> None:
    """A wrong range is refused before points are built, whether the keys are pinned or not."""
    world = World(2, settings=QuerySettings(**settings))
    windowed(world)
    world.publish(Definition("w", "sum", ("x",)), {("a",): 1})
    with pytest.raises(Invalid, match=said):
        read(world, query)


def test_an_unknown_view_is_told_the_nearest() -> None:
    """An unknown view's error names the nearest known view, if one is near."""
    world = World(2)
    for view in ("requests_total", "failures", "revenue"):
        world.publish(Definition(view, "sum"), {(): 1})
    with pytest.raises(NotFound, match=r"^no view 'request_total'; is it requests_total\?"):
        read(world, Query("request_total"))
    with pytest.raises(NotFound, match=r"^no view 'zzz'$"):
        read(world, Query("zzz"))
    with pytest.raises(NotFound, match="has no definition of this kind and window"):
        read(world, Query("revenue", window_s=60))
    assert world.reader.point(Query("request_total")) is None


actions = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 2)),
    st.tuples(st.just("fold"), st.integers(0, 2)),
    st.tuples(st.just("wait"), st.sampled_from([0.001, 0.5, 3.25])),
    st.tuples(st.just("look")),
    st.tuples(st.just("read")),
)


class WrongClock:
    """A clock whose monotonic time goes on as another's, and whose wall clock is far off."""

    def __init__(self, true: HandClock) -> None:
        self._true = true

    def __getattr__(self, name: str) -> Any:
        return getattr(self._true, name)

    def now_ms(self) -> int:
        return 4_000_000_000_000


@given(st.lists(actions, min_size=5, max_size=40))
@example([("look",), ("append", 0), ("wait", 0.001), ("append", 1), ("fold", 1)])
def test_no_record_comes_from_before_the_final_time(script: list[tuple[Any, ...]]) -> None:
    """Every record that an answer lacks, and every later one, has a time from `final_before_ms` on, whatever wall clock the
    server has; where everything is folded, the log's own time is final as of when it was asked for its ends.
    """
    clock = HandClock()
    world = World(3, clock=clock)
    wrong: Any = WrongClock(clock)
    ends = EndsNow(partial(world.log.end_offsets, DELTAS), partial(world.log.start_offsets, DELTAS), clock)
    reader = ViewReader(stores=world.stores, ends=ends, clock=wrong, settings=world.settings)
    definition = Definition("v", "sum", (), window_s=W // 1_000)
    times: dict[int, list[int]] = {0: [clock.now_ms()], 1: [], 2: []}
    world.append(0, definition, {(): 1})
    world.fold()
    bounds: list[tuple[int, list[int]]] = []
    for action, *arguments in [*script, ("read",)]:
        match action:
            case "append":
                times[arguments[0]].append(clock.now_ms())
                world.append(arguments[0], definition, {(): 1})
            case "fold":
                world.fold(arguments[0])
            case "wait":
                clock.s += arguments[0]
            case "look":
                reader.partitions()
            case "read":
                answer = reader.read(Query("v", range=AskedRange(end_ms=W)), deadline_s=FAR_S)
                assert answer.final_before_ms is not None
                folded = [answer.as_of.next_offsets[str(number)] for number in range(3)]
                bounds.append((answer.final_before_ms, folded))
                newest = max(max(its[:n], default=0) for its, n in zip(times.values(), folded, strict=True))
                if folded == [len(its) for its in times.values()]:
                    assert answer.final_before_ms >= newest - ceil((clock.s - ends().at_s) * 1_000)
    for bound, folded in bounds:
        missing = [at for number, its in times.items() for at in its[folded[number] :]]
        assert min(missing, default=bound) >= bound


def test_an_idle_partition_does_not_hold_time_up_but_one_that_lags_does() -> None:
    """An idle partition's time goes on from the newest record by the monotonic clock; one that lags holds time up."""
    clock = HandClock()
    world = World(3, clock=clock)
    definition = Definition("v", "sum", (), window_s=W // 1_000)
    first = clock.now_ms()
    world.append(0, definition, {(): 1})
    world.fold()

    def final() -> int | None:
        return read(world, Query("v", range=AskedRange(end_ms=W))).final_before_ms

    assert final() == first
    clock.s += 5
    assert final() == first + 5_000
    clock.s += 1
    world.append(1, definition, {(): 1})
    assert final() == 0  # nothing is folded of a partition that has a record of any time
    world.fold(1)
    assert final() == first + 6_000
    clock.s += 2
    world.append(1, definition, {(): 1})
    clock.s += 2
    assert final() == first + 6_000
    world.fold()
    assert final() == first + 8_000  # the newest record, which was seen just now
    clock.s += 1
    assert final() == first + 9_000


def test_the_time_of_the_log_starts_with_a_record() -> None:
    """Nothing is final in a log without any record, or without a partition."""
    time = LogTime()
    assert time.reached_ms(10.0) == 0
    time.observe(5_000, 10.0)
    time.observe(4_000, 11.0)
    assert (time.reached_ms(9.0), time.reached_ms(10.0005), time.reached_ms(12.0)) == (4_000, 5_000, 7_000)
    assert final_before_ms([], 7_000) == 0
    assert final_before_ms([None, None], 7_000) == 7_000
    assert final_before_ms([None, 6_000], 7_000) == 6_000
    assert final_before_ms([None, 0], 7_000) == 0


def test_series_that_were_silent_for_too_long_are_hidden() -> None:
    """A stored entry that has expired by its partition's watermark is in no answer, read by key or by scan."""
    clock = HandClock()
    world = World(2, clock=clock)
    definition = Definition("v", "sum", ("x",), retention_s=100)
    other = Definition("v", "sum", ("x", "y"))
    for number in range(2):
        world.append(number, definition, {("a",): 1, ("b",): 2})
        world.append(number, other, {("a", ""): 4})
    world.fold()
    at_ms = clock.now_ms()
    totals = Query("v", by=())
    pinned = Query("v", (parse_matcher("x=a"), parse_matcher("y=")))

    def seen() -> list[Any]:
        (exposed,) = world.reader.scrape(deadline_s=FAR_S).views
        point = world.reader.point(pinned)
        assert point is not None
        return [read(world, totals).value(), point.value(), scanned(world.reader, pinned).value(), exposed.values]

    assert seen() == [14, 10, 10, [10, 4]]
    world.expire(definition, at_ms + 100_000 - 1, 0)
    assert seen() == [14, 10, 10, [10, 4]]
    world.expire(definition, at_ms + 100_000, 0)
    assert seen() == [11, 9, 9, [9, 2]]
    world.expire(definition, at_ms + 100_000, 1)
    assert seen() == [8, 8, 8, [8]]


def test_windows_that_the_worker_expires_are_hidden_at_once() -> None:
    """Expired windows are hidden from the commit that moves the watermark, although it deletes only some of the entries."""
    clock = HandClock()
    world = World(1, clock=clock, worker=WorkerSettings(expired_entries_max=1))
    definition = Definition("v", "sum", ("x",), window_s=10, retention_s=60)
    start = clock.now_ms() // W * W
    for i in range(5):
        world.append(0, definition, {(name,): 1 for name in "abcdefgh"}, start + i * W)
    world.fold()
    asked = Query("v", by=(), range=AskedRange(start_ms=start, end_ms=start + 20 * W, fill="zero"))
    assert [value for _, value in read(world, asked).series[0].points[:6]] == [8, 8, 8, 8, 8, 0]
    world.append(0, definition, {("a",): 0}, start)  # a commit deletes as many entries as the one before has added
    world.fold()
    clock.s += 100
    world.append(0, definition, {("a",): 1}, start + 10 * W)
    world.fold()
    answer = read(world, asked)
    before = answer.expired_before_ms
    assert before == start + 4 * W
    assert [value for _, value in answer.series[0].points[:6]] == [None, None, None, None, 8, 0]
    prefix = series_prefix(definition)
    left = [key for key, _ in world.partitions[0].store.scan(prefix, prefix_end(prefix))]
    assert any(int.from_bytes(key[len(prefix) :][:8], "big") < before for key in left)
