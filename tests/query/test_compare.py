"""Comparison of a range with an earlier one: both sides are as two reads have them, aligned point by point."""

import csv
import io
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from pipeline.adapters.http import HttpReader
from pipeline.core.answer import Answer
from pipeline.core.query import Query
from pipeline.core.record import Definition
from pipeline.core.span import AskedRange
from pipeline.errors import Invalid
from pipeline.query.media import CSV, NDJSON
from pipeline.settings import QuerySettings
from tests.query.support import Server, World, serving

W = 60_000
MINUTES = Definition("minutes", "sum", ("x", "y"), window_s=60)
FAR_S = 1e18


def points_of(answer: Answer, name: str) -> dict[tuple[str, ...], dict[int, Any]]:
    return {tuple(it.labels.values()): dict(getattr(it, name)) for it in answer.series}


@given(
    data=st.data(),
    deltas=st.dictionaries(st.tuples(st.sampled_from("abc"), st.sampled_from("pq"), st.integers(0, 11)), st.integers(1, 9)),
    by=st.sampled_from([None, (), ("x",)]),
    fill=st.sampled_from([None, "null", "zero", "previous"]),
    fn=st.sampled_from([None, "rate", "delta", "share", "cumulative"]),
    steps=st.sampled_from([(1, 1), (2, 2), (1, 3), (2, 4)]),
    distance=st.integers(1, 6),
)
def test_a_comparison_is_two_reads(
    data: st.DataObject, deltas: Any, by: Any, fill: Any, fn: Any, steps: tuple[int, int], distance: int
) -> None:
    """Each side has the points that a read of its range alone has, and null where only the other one has a point."""
    assume(deltas)
    assume(fn != "cumulative" or steps[0] == steps[1])
    world = World(partition_count=2)
    for (x, y, window), value in deltas.items():
        world.append(data.draw(st.integers(0, 1)), MINUTES, {(x, y): value}, window * W)
    world.fold()
    step, over = steps
    asked = AskedRange(6 * W, 10 * W, step_ms=step * W, over_ms=over * W, fill=fill)
    query = Query("minutes", by=by, range=asked, fn=fn)
    shift = distance * W

    def read(it: AskedRange, **changes: Any) -> Answer:
        return world.reader.read(replace(query, range=it, **changes), deadline_s=FAR_S)

    both = read(replace(asked, compare_ms=shift))
    now = read(asked)
    before = read(replace(asked, start_ms=6 * W - shift, end_ms=10 * W - shift))
    found, earlier = points_of(both, "points"), points_of(both, "compare")
    expected, expected_earlier = points_of(now, "points"), points_of(before, "points")
    assert [*found] == sorted(expected.keys() | expected_earlier.keys())
    for labels, points in found.items():
        other = earlier[labels]
        assert [start_ms - shift for start_ms in points] == [*other]
        alone, other_alone = expected.get(labels, {}), expected_earlier.get(labels, {})
        nothing = 0 if fill == "zero" else None
        for values, own in ((points, alone), (other, other_alone)):
            for start_ms, value in values.items():
                # A function of a series that one range lacks altogether is that of a sum of nothing.
                assert value == own.get(start_ms, nothing if fn is None else value)
        assert {*alone} | {it + shift for it in other_alone} <= {*points}
    assert (both.start_ms, both.end_ms, both.compare_ms) == (6 * W, 10 * W, shift)
    if fn is None:
        ranked = read(replace(asked, compare_ms=shift), top=2)
        best = [*points_of(read(asked, top=2), "points")]
        rest = sorted(expected_earlier.keys() - expected.keys())
        assert [*points_of(ranked, "points")] == [*best, *rest][:2]
        cut = read(replace(asked, compare_ms=shift), limit=1)
        assert [*points_of(cut, "points")] == [*found][:1]
        assert cut.truncated == (len(found) > 1)
        assert cut.series_total == (len(found) if len(found) > 1 else None)


@pytest.fixture(scope="module")
def shop() -> Iterator[Server]:
    with serving(World(partition_count=1)) as server:
        for window, series in (
            (10, {("a", "p"): 1}),
            (11, {("a", "p"): 2, ("b", "p"): 3}),
            (20, {("a", "p"): 4, ("c", "p"): 5}),
        ):
            server.world.append(0, MINUTES, series, window * W)
        server.world.publish(Definition("plain", "sum", ("x",)), {("a",): 1})
        compared = Definition("named", "sum", ("compare",), window_s=60)
        server.world.append(0, compared, {("a",): 1}, 20 * W)
        server.world.fold()
        yield server


QUERY = f"start={20 * W}&end={22 * W}&compare=10m"


def test_a_series_of_one_range_only_has_nulls_for_the_other(shop: Server) -> None:
    """Each series stands once, with as many points on both sides, each with a start of its own."""
    answer = shop.get(f"/v1/views/minutes?by=x&{QUERY}").json()
    assert answer["compare_ms"] == 10 * W
    assert [(it["labels"]["x"], it["points"], it["compare"]) for it in answer["series"]] == [
        ("a", [[20 * W, 4], [21 * W, None]], [[10 * W, 1], [11 * W, 2]]),
        ("b", [[21 * W, None]], [[11 * W, 3]]),
        ("c", [[20 * W, 5]], [[10 * W, None]]),
    ]
    pinned = shop.get(f"/v1/views/minutes?where=x=a&where=y=p&{QUERY}").json()
    assert pinned["series"][0]["compare"] == [[10 * W, 1], [11 * W, 2]]


def test_rows_have_a_column_more(shop: Server) -> None:
    """CSV, NDJSON and all tables; a label of that name keeps it."""
    reply = shop.request("GET", f"/v1/views/minutes?by=x&{QUERY}", headers={"Accept": CSV})
    rows = [*csv.reader(io.StringIO(reply.body.decode()))]
    assert rows[:3] == [["x", "start_ms", "value", "compare"], ["a", str(20 * W), "4", "1"], ["a", str(21 * W), "", "2"]]
    reply = shop.request("GET", f"/v1/views/minutes?by=x&{QUERY}", headers={"Accept": NDJSON})
    assert json.loads(reply.body.splitlines()[-1]) == {"labels": {"x": "c"}, "start_ms": 20 * W, "value": 5, "compare": None}
    with HttpReader(shop.url) as reader:
        answer = reader.get("minutes", by="x", start=20 * W, end=22 * W, compare=timedelta(minutes=10))
        named = reader.get("named", start=20 * W, end=22 * W, compare="10m")
        (several,) = reader.query([{"view": "minutes", "by": "x", "start": 20 * W, "end": 22 * W, "compare": 600}])
        pages = [*reader.pages("minutes", by="x", page_size=2, start=20 * W, end=22 * W, compare="10m")]
    assert several.series == answer.series == [series for page in pages for series in page]
    values = [4, None, None, 5], [1, 2, 3, None]
    assert answer.to_arrow().column("compare").to_pylist() == values[1]
    assert answer.to_arrow().column("value").to_pylist() == values[0]
    assert answer.to_polars()["compare"].to_list() == values[1]
    assert answer.to_pandas()["compare"].fillna(-1).to_list() == [1, 2, 3, -1]
    assert named.to_arrow().column_names == ["compare", "start", "value", "compare_"]
    assert answer._repr_html_().count("<th>") == 5


def test_points_of_both_ranges_are_counted() -> None:
    """`answer_points_max` is of all points of the answer: those of the range and those beside them."""
    world = World(partition_count=1, settings=QuerySettings(answer_points_max=7))
    world.append(0, MINUTES, {("a", "p"): 1, ("b", "p"): 1}, 20 * W)
    world.fold()
    asked = AskedRange(20 * W, 22 * W, fill="null")
    assert len(world.reader.read(Query("minutes", range=asked), deadline_s=FAR_S).series) == 2
    with pytest.raises(Invalid, match="answer_points_max"):
        world.reader.read(Query("minutes", range=replace(asked, compare_ms=W)), deadline_s=FAR_S)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (f"minutes?start={20 * W}&end={22 * W}&compare=", "compare: a length above 0"),
        (f"minutes?start={20 * W}&end={22 * W}&compare=-1d", "compare: a length above 0"),
        (f"minutes?start={20 * W}&end={22 * W}&compare=0", "compare: a length above 0"),
        (f"minutes?start={20 * W}&end={22 * W}&compare=yesterday", "compare: a length above 0"),
        (f"minutes?start={20 * W}&end={22 * W}&compare=90s", "compare: 90s is no multiple of the view's window"),
        (f"minutes?start={20 * W}&end={22 * W}&compare=21m", "compare: 21m before 1970-01-01T00:20:00Z is before 1970"),
        (f"minutes?start={20 * W}&end={22 * W}&compare=999999999999w", "compare: a length above 0"),
        (f"minutes?start={20 * W}&end={22 * W}&compare=1m&compare=2m", "compare stands twice"),
        ("plain?compare=1d", "view plain has no windows: "),
        (f"minutes?start=0&end={10**12}&compare=1m", "points_max"),
    ],
)  # fmt: skip
def test_a_wrong_distance_is_told(shop: Server, query: str, said: str) -> None:
    """400, with what is wrong, or what would fit."""
    assert said in shop.problem(400, shop.get(f"/v1/views/{query}"))
