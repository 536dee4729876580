"""Deltas recorded many at a time make the same totals as one by one, or none at all."""

import array
import math
import re
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

import pipeline.publisher.columns as columns_module
from pipeline.core.kinds import TS_MS_MAX
from pipeline.core.record import parse_suffix
from pipeline.errors import Invalid
from tests.publisher.support import CLOCK, batches, fold, memory_log, publisher, wait_until

np = pytest.importorskip("numpy")
pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")


def test_values_to_one_series_make_the_totals_that_they_make_one_by_one() -> None:
    """`add_many` and `observe_many`, of handles and of views, count each value, also when they are called twice."""
    log = memory_log()
    with publisher(log) as pub:
        total, mean = pub.sum("total", labels=("b", "a")), pub.mean("mean", labels=("a",))
        cell, seen = total.labels("y", "x"), mean.labels("x")
        cell.add(2)
        for _ in range(2):
            assert cell.add_many([1, 2**80, True]) == 3
            assert total.add_many(np.array([15, 25]), a="x", b="y") == 2
            assert seen.observe_many(range(5)) == 5
            assert mean.observe_many(pa.array([10, 20]), a="x") == 2
        assert total.add_many(iter([]), a="never", b="") == 0
        pub.min("low").observe_many((3, 1, 2))
        pub.max("high").labels().observe_many(deltas for deltas in (3, 1, 2))
    views = fold(log)
    assert views.of("total") == {("x", "y"): 2 + 2 * (1 + 2**80 + 1) + 2 * 40}
    assert views.of("mean") == {("x",): (10 + 30) / 7}
    assert views.of("low") == {(): 1}
    assert views.of("high") == {(): 3}


def columns_of(items: list[Any], *, text: bool = False) -> list[Any]:
    """Return a column in every shape that can hold these items."""
    half = len(items) // 2
    arrow = pa.array(items)
    shapes: list[Any] = [
        items, tuple(items), iter(items), np.array(items), np.array(items, dtype=object), np.array(items * 2)[: len(items)],
        np.repeat(np.array(items), 2)[::2], arrow, pa.array([*items, *items]).slice(len(items)),
        pa.chunked_array([items[:half], items[half:]]), arrow.dictionary_encode(),
        pa.chunked_array([arrow[:0], arrow]).dictionary_encode(),
        pa.array([*items, *items]).dictionary_encode().slice(len(items)),
        pa.chunked_array([pa.array(part).dictionary_encode() for part in (items[:half], items[half:])]),
    ]  # fmt: skip
    if text:
        return [*shapes, arrow.cast(pa.large_string()), arrow.cast(pa.string_view())]
    return [*shapes, array.array("q" if isinstance(items[0], int) else "d", items), memoryview(np.array(items))]


@pytest.fixture(params=["with NumPy", "without"])
def numpy_is_loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return whether the program has loaded NumPy, which Arrow does not need."""
    if request.param == "without":
        monkeypatch.setattr(columns_module, "sys", SimpleNamespace(modules={}))


@pytest.mark.usefixtures("numpy_is_loaded")
def test_columns_of_every_shape_hold_the_same_rows() -> None:
    """Labels and values may be sequences, NumPy and Arrow arrays, sliced, chunked or encoded."""
    log = memory_log()
    texts, ints, floats = ["a", "b", "a", "ü", ""], [1, -2, 2**62, 4, 5], [0.1, 0.2, 0.3, 0.4, -0.5]
    with publisher(log) as pub:
        for name, values in (("ints", ints), ("floats", floats)):
            made = 0
            for texts_column, values_column in zip(columns_of(texts, text=True), columns_of(values), strict=True):
                view = pub.max(f"{name}_{made}", labels=("t", "row"))
                rows = [str(i) for i in range(5)]
                assert pub.record_batch(view, {"t": texts_column, "row": rows, "value": values_column}) == 5
                made += 1
    views = fold(log)
    for name, values in (("ints", ints), ("floats", floats)):
        for i in range(made):
            expected = {(str(row), text): values[row] for row, text in enumerate(texts)}
            assert views.of(f"{name}_{i}") == expected, (name, i)  # labels come in the order of their names
            assert {type(answer) for answer in views.of(f"{name}_{i}").values()} == {type(values[0])}


def test_data_frames_of_every_library_hold_the_same_rows() -> None:
    """Data frames may have text by code, numbers of nullable types, and columns that were made by a filter."""
    columns = {"b": ["1", "1", "2"], "a": ["x", "y", "x"], "value": [1, 2**62, 4], "more": [None, 1, 2]}
    pandas, polars = pd.DataFrame(columns), pl.DataFrame(columns, strict=False)
    frames = [
        pandas,
        polars,
        pa.table(columns),
        pa.table(columns).to_batches()[0],
        pandas.astype({"a": "category", "value": "Int64"}),
        polars.with_columns(pl.col("a").cast(pl.Categorical)),
        pd.concat([pandas, pandas])[2:5],
    ]
    log = memory_log()
    with publisher(log) as pub:
        for number, frame in enumerate(frames):
            view = pub.sum(f"v_{number}", labels=("b", "a"))
            with pytest.raises(Invalid, match=r"got .*'more'.*name the others in `ignore`; nothing was recorded"):
                pub.record_batch(view, frame)
            assert pub.record_batch(view, frame, ignore=["more", "gone"]) == 3
            assert pub.record_batch(view, frame[:0], ignore=["more"]) == 0
        view, none = pub.sum("v", labels=("b", "a")), pub.sum("none")
        for a, b, value, count in (  # one value in place of a column, or no rows at all
            ("x", np.str_("1"), [10, 20], 2),
            (["x", "z"], pa.scalar("1"), np.int64(100), 2),
            ("z", "1", np.array(0.5), 1),
            ([], "1", 1, 0),
            (pa.chunked_array([], pa.string()), pa.chunked_array([], pa.string()), [], 0),
        ):
            assert pub.record_batch(view, {"a": a, "b": b, "value": value}) == count
        assert pub.record_batch(none, {"value": [1, 2, 3]}) == 3
    views = fold(log)
    for number in range(len(frames)):
        assert views.of(f"v_{number}") == {("x", "1"): 1, ("y", "1"): 2**62, ("x", "2"): 4}
    assert views.of("v") == {("x", "1"): 130, ("z", "1"): 100.5}
    assert views.of("none") == {(): 6}


OK = ["x", "y", "z"]
MISSING: list[tuple[str, Any, str]] = [  # None, NaN, NA, NaT and null, in labels and in values
    *(("sum", {"a": ["x", "y"], "value": value}, f"column value, row 1: a {says}") for value, says in [
        (pd.array([1, pd.NA], dtype="Int64"), "number is needed, got NAType"),
        (pd.Series([1, None]), "finite number is needed, got nan"),
        (pd.Series([1, pd.NA], dtype="object"), "number is needed, got NAType"),
        (pd.Series([1, pd.NaT], dtype="object"), "number is needed, got NaTType"),
        (pl.Series([1, None]), "number is needed, got NoneType"),
        (pl.Series([1.0, math.nan]), "finite number is needed, got nan"),
        (pa.array([1, None]), "number is needed, got NoneType"),
    ]),
    *(("sum", {"a": label, "value": [1, 2]}, f"row 1: label a of view v: text expected, got {says}") for label, says in [
        (pd.array(["x", pd.NA], dtype="string"), "NAType"),
        (pd.Series(["x", None], dtype="category"), "float"),
        (pl.Series(["x", None]), "NoneType"),
        (pl.Series(["x", None], dtype=pl.Categorical), "NoneType"),
        (pa.array(["x", None]).dictionary_encode(), "NoneType"),
    ]),
]  # fmt: skip
BAD: list[tuple[str, Any, str]] = [
    ("sum", {"a": OK, "value": b"123"}, "column value, row 0: a number is needed, got bytes"),
    ("sum", {"a": OK, "value": np.array([1.0, np.nan, 2.0])}, "column value, row 1"),
    ("sum", {"a": OK, "value": np.array([1.0, 2.0, np.inf], dtype=np.float32)}, "column value, row 2"),
    ("sum", {"a": OK, "value": np.array([1, 2, 3], dtype="M8[ns]")}, "column value: dates"),
    ("sum", {"a": OK, "value": np.array([1, 2, 3], dtype="m8[ns]")}, "column value: dates"),
    ("sum", {"a": OK, "value": np.array([1, 2, 3], dtype=complex)}, "column value, row 0"),
    ("sum", {"a": OK, "value": np.ones((3, 1))}, "column value: one dimension is needed, got 2"),
    ("sum", {"a": OK, "value": np.ma.array([1, 2, 3], mask=[0, 0, 1])}, "column value, row 2"),
    ("sum", {"a": OK, "value": pa.array([1.0, 2.0, float("nan")])}, "column value, row 2"),
    ("sum", {"a": OK, "value": pa.array([1, 2, 3], pa.timestamp("ms"))}, "column value, row 0"),
    ("sum", {"a": OK, "value": {1: 2, 3: 4, 5: 6}}, "column value: a dict is no column"),
    ("sum", {"a": OK, "value": {1, 2, 3}}, "column value: a set is no column"),
    ("monotone", {"a": OK, "value": np.array([1, 2, -3])}, "column value, row 2: a monotone sum"),
    ("sum", {"a": ["x", 1, "z"], "value": 1}, "row 1: label a of view v: text expected, got int"),
    ("sum", {"a": [b"x", "y", "z"], "value": 1}, "row 0: label a of view v: text expected, got bytes"),
    ("sum", {"a": pa.array([1, 2, 3]), "value": 1}, "row 0: label a of view v: text expected, got int"),
    ("sum", {"a": None, "value": [1, 2]}, "row 0: label a of view v: text expected, got NoneType"),
    ("sum", {"a": OK, "value": [1, 2]}, "column a has 3 rows, column value 2"),
    ("sum", {"a": [], "value": [1, 2]}, "column a has 0 rows, column value 2"),
    ("sum", {"a": OK}, "columns ['a', 'value'] are needed; got ['a']"),
    ("sum", {"value": [1]}, "columns ['a', 'value'] are needed; got ['value']"),
    ("sum", {"a": OK, "value": 1, "b": OK}, "got ['a', 'value', 'b']"),
    ("sum", {"a": OK, "value": 1, "ts_ms": 1}, "got ['a', 'value', 'ts_ms']"),
    ("sum", [1, 2, 3], "a mapping of columns is needed, or a table, got list"),
    ("sum", pa.table([OK, OK], names=["a", "a"]), "got ['a', 'a']"),
    ("last", {"a": OK, "value": 1, "ts_ms": [1, 2, -1]}, "column ts_ms, row 2"),
    ("last", {"a": OK, "value": 1, "ts_ms": [1, 2.0, 3]}, "column ts_ms, row 1"),
    ("last", {"a": OK, "value": "t", "ts_ms": [1, 2, TS_MS_MAX + 1]}, "column ts_ms, row 2"),
    ("last", {"a": OK, "value": 1, "ts_ms": np.array([1, 2, 3], dtype="M8[ms]")}, "column ts_ms: dates"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "columns", "says"), [*MISSING, *BAD])
@pytest.mark.usefixtures("numpy_is_loaded")
def test_a_bad_row_is_named_and_nothing_is_recorded(kind: str, columns: Any, says: str) -> None:
    """`Invalid` has the column and the row, and no series is left behind."""
    log = memory_log()
    with publisher(log) as pub:
        monotone = kind == "monotone"
        view = pub.view("sum" if monotone else kind, "v", labels=("a",), monotone=monotone)
        with pytest.raises(Invalid, match=re.escape(says)):
            pub.record_batch(view, columns)
        assert pub.stats()["series"] == pub.stats()["buffer_bytes"] == 0
        pub.flush()
        assert pub.stats()["deltas"] == 0
    assert fold(log).answers == {}


@pytest.mark.parametrize("library", ["numpy", "arrow"])
@pytest.mark.usefixtures("numpy_is_loaded")
def test_every_width_of_number_is_exact(library: str) -> None:
    """The largest and smallest number of each width become that Python number."""
    log, expected = memory_log(), {}
    with publisher(log) as pub:
        view = pub.max("v", labels=("row", "width"))
        for width in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"):
            kind = np.dtype(width)
            limits: Any = np.finfo(kind) if kind.kind == "f" else np.iinfo(kind)
            items = np.array([limits.max, limits.min, kind.type(1)], dtype=kind)
            column = items if library == "numpy" else pa.array(items)
            pub.record_batch(view, {"row": ["0", "1", "2"], "width": width, "value": column})
            expected.update({(str(row), width): item for row, item in enumerate(items.tolist())})
    found = fold(log).of("v")
    assert found == expected
    assert all(type(found[series]) is type(number) for series, number in expected.items())


@pytest.mark.usefixtures("numpy_is_loaded")
def test_rows_of_one_series_merge_in_their_order() -> None:
    """Two codes of one text are one series; a `last` view keeps the newest row by time, or the last of equal times."""
    log = memory_log()
    twice = pa.DictionaryArray.from_arrays([0, 1, 2, 0], ["x", "y", "x"])
    with publisher(log) as pub:
        total, newest, timed = pub.sum("v", labels=("a",)), pub.last("n", labels=("a",)), pub.last("t", labels=("a",))
        assert pub.record_batch(total, {"a": twice, "value": [1, 2, 4, 8]}) == 4
        assert pub.record_batch(newest, {"a": twice, "value": ["z", True, 4, "a"]}) == 4
        rows = {"a": ["x", "x", "y", "y"], "value": ["new", "old", None, "t" * 60_000], "ts_ms": [2, 1, 1, 2]}
        assert pub.record_batch(timed, rows) == 4
    views = fold(log)
    assert views.of("v") == {("x",): 13, ("y",): 2}
    assert views.of("n") == {("x",): "a", ("y",): True}
    assert views.of("t") == {("x",): "new", ("y",): "t" * 60_000}


def test_rows_of_a_view_with_windows_have_times() -> None:
    """`ts_ms` is ms since 1970, or dates with their offset from UTC in every library; without it rows are of now."""
    log = memory_log()
    ms = [60_000, 119_999, 120_000]
    dates = [datetime.fromtimestamp(at / 1_000, UTC) for at in ms]
    elsewhere = timezone(timedelta(hours=5, minutes=30))
    shapes: list[Any] = [
        ms, np.array(ms), pa.array(ms), pd.Series(ms), pl.Series(ms), dates, [at.astimezone(elsewhere) for at in dates],
        pa.array(dates, pa.timestamp("ms", tz="UTC")), pa.array(dates, pa.timestamp("us", tz="Asia/Kolkata")),
        pd.Series(dates), pl.Series(dates), pd.DatetimeIndex(dates), pa.array(dates, pa.timestamp("ns", tz="UTC")),
    ]  # fmt: skip
    with publisher(log) as pub:
        view = pub.sum("v", labels=("a",), window_s=60)
        for shape in shapes:
            assert pub.record_batch(view, {"a": "x", "value": 1, "ts_ms": shape}) == 3
        assert view.labels("x").add_many([1, 1, 1], ts_ms=dates) == 3
        assert pub.mean("m", window_s=60).labels().observe_many([1, 3], ts_ms=[60_000, 60_001]) == 2
        assert pub.record_batch(view, {"a": ["x"], "value": 1, "ts_ms": dates[0]}) == 1
        before_ms = CLOCK.now_ms()
        assert pub.record_batch(view, {"a": ["now"], "value": 1}) == 1
        after_ms = CLOCK.now_ms()
        for wrong in (
            np.array(ms, dtype="M8[ms]"), pd.Series(np.array(ms, dtype="M8[ns]")), [at.replace(tzinfo=None) for at in dates],
            pa.array([at.replace(tzinfo=None) for at in dates]), [*dates[:2], None], [*dates[:2], pd.NaT], ["1970", 1, 2],
            [*ms[:2], after_ms + 3_700_000],
        ):  # fmt: skip
            with pytest.raises(Invalid, match="ts_ms"):
                pub.record_batch(view, {"a": "x", "value": 1, "ts_ms": wrong})
        with pytest.raises(Invalid, match="ts_ms"):
            pub.record_batch(pub.sum("none", labels=("a",)), {"a": ["x"], "value": 1, "ts_ms": [1]})
        with pytest.raises(Invalid, match="no windows"):
            pub.sum("none", labels=("a",)).labels("x").add_many([1], ts_ms=[1])
    found: Counter[tuple[str, int]] = Counter()
    for batch in batches(log):
        for group in batch.groups:
            for suffix, state in zip(group.suffixes, group.states, strict=True):
                start_ms, labels = parse_suffix(suffix)
                found["now" if labels == ("now",) else group.definition.view, start_ms] += (
                    state if type(state) is int else state[1]
                )
    (now_ms,) = [start_ms for name, start_ms in found if name == "now"]
    assert before_ms - 60_000 < now_ms <= after_ms
    count = len(shapes) + 1
    assert found == {("v", 60_000): 2 * count + 1, ("v", 120_000): count, ("m", 60_000): 2, ("now", now_ms): 1}


def test_what_cannot_be_recorded_at_once_is_refused() -> None:
    """Ambiguous names, another publisher's views, values that are no sequence, and calls after the close are refused."""
    with publisher(memory_log()) as pub, publisher(memory_log()) as other:
        mine, cell = pub.sum("v", labels=("a",)), pub.sum("w").labels()
        with pytest.raises(Invalid, match="row 2: a finite number"):
            cell.add_many([1, 2.5, math.nan])
        for wrong in (5, "12", None):
            with pytest.raises(Invalid, match="a sequence is needed"):
                cell.add_many(wrong)
        for ignore in ("more", ["more", "value"], ["a"]):  # a text is no list of names, and its letters might be
            with pytest.raises(Invalid, match="ignore: names of columns that are not needed"):
                pub.record_batch(mine, {"a": "x", "value": 1, "more": 2}, ignore=ignore)
        for view in (pub.sum("x", labels=("value",)), pub.last("y", labels=("ts_ms",))):
            with pytest.raises(Invalid, match="record by handles"):
                pub.record_batch(view, {"value": [1]})
        assert pub.record_batch(pub.sum("z", labels=("ts_ms",)), {"ts_ms": "5", "value": [1]}) == 1
        for theirs, says in ((other.sum("v", labels=("a",)), "not of this publisher"), ("v", "got str")):
            with pytest.raises(Invalid, match=says):
                pub.record_batch(theirs, {"a": "x", "value": [1]})  # type: ignore[arg-type]
        pub.flush()
        assert pub.stats()["deltas"] == 1
    for closed in (lambda: pub.record_batch(mine, {"a": "x", "value": [1]}), lambda: cell.add_many([1])):
        with pytest.raises(Invalid, match="closed"):
            closed()


def test_numbers_of_other_libraries_are_read_once() -> None:
    """Numbers of other libraries become plain numbers at the call, and later changes to them change nothing."""
    log = memory_log()
    values = [Decimal("1.5"), Fraction(1, 4), np.int64(2**62), np.float32(0.1)]
    own, array = [1, 2], np.array([1.0, 2.0])
    column = columns_module.read_value("value", array)
    array[:] = math.nan  # as another thread can, behind the check
    assert columns_module.rows_of(column, 2) == [1.0, 2.0]
    with publisher(log) as pub:
        pub.sum("v").add_many(values)
        pub.sum("own").add_many(own)
        own[:] = [100, 200]
    assert fold(log).of("v") == {(): 1.5 + 0.25 + 2**62 + float(np.float32(0.1))}
    assert fold(log).of("own") == {(): 3}


def test_a_batch_that_meets_the_close_says_how_much_of_it_is_in() -> None:
    """The number of rows that the call returns is the number that is counted."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=1)
    view = pub.sum("v", labels=("a",))
    table = {"a": [str(i % 1_000) for i in range(20_000)], "value": 1}
    recorded, said = [0], []

    def record() -> None:
        try:
            while True:
                recorded[0] += pub.record_batch(view, table)
        except Invalid as error:
            said.append(str(error))

    thread = threading.Thread(target=record)
    thread.start()
    wait_until(lambda: recorded[0])
    pub.close()
    thread.join(20)
    part = re.search(r"closed; (\d+) of the batch of 20000 deltas were recorded before", said[0])
    assert part, said
    assert fold(log).total("v") == recorded[0] + int(part[1])
    assert pub.stats()["waiting"] == 0
