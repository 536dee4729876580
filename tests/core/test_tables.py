"""Answers as rows for other programs: every value comes through whole, and no published text becomes markup."""

import csv
import io
import json
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.answer import Answer, AsOf, Series
from pipeline.core.kinds import KINDS
from pipeline.core.tables import HTML_ROWS_MAX, number_of, sparkline
from pipeline.query.media import to_csv, to_ndjson
from tests.core import strategies as some

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def answer(values: list[Any], *, windowed: bool = True, label: str = "x", of: str = "a") -> Answer:
    """Return an answer of a series with a point for each value, or of a series for each value."""
    if windowed:
        points = [(i * 1_000, value) for i, value in enumerate(values)]
        return Answer("v", "sum", (label,), [Series({label: of}, points=points)], AsOf(3, {}), step_ms=1_000, over_ms=1_000)
    return Answer("v", "sum", (label,), [Series({label: f"{of}{i}"}, v) for i, v in enumerate(values)], AsOf(3, {}))


@pytest.mark.parametrize(
    ("values", "arrow", "pandas", "polars"),
    [
        ([1, -(2**63) + 1], "int64", "int64", "Int64"),
        ([1, None], "int64", "Int64", "Int64"),
        ([2**64, None], "decimal128(38, 0)", "object", "Decimal(precision=38, scale=0)"),
        ([-(10**38) + 1], "decimal128(38, 0)", "object", "Decimal(precision=38, scale=0)"),
        ([10**38, 1], "decimal256(76, 0)", "object", "String"),
        ([10**76, 1], "string", "object", "String"),
        ([1, 0.5, None], "double", "float64", "Float64"),
        ([10**400, 0.5], "string", "object", "String"),
        ([True, None], "bool", "boolean", "Boolean"),
        ([True, False], "bool", "bool", "Boolean"),
        (["é", None], "string", "object", "String"),
        (["1", 1, True], "string", "object", "String"),
        ([{"count": 2}], "string", "object", "String"),
        ([None, None], "null", "object", "Null"),
        ([], "null", "object", "Null"),
    ],
)
@pytest.mark.parametrize("windowed", [True, False])
def test_values_come_through_whole(windowed: bool, values: list[Any], arrow: str, pandas: str, polars: str) -> None:
    """Each library's columns have a type that holds all values; starts are times in UTC, to the millisecond."""
    it = answer(values, windowed=windowed)
    table, frame, other = it.to_arrow(), it.to_pandas(), it.to_polars()
    assert (str(table.schema.field("value").type), str(frame.dtypes["value"]), str(other.schema["value"])) == (
        arrow,
        pandas,
        polars,
    )
    rows = len(values)
    assert (table.num_rows, len(frame), len(other)) == (rows, rows, rows)
    json_texts = arrow == "string" and set(map(type, values)) - {str, type(None)}
    whole: list[Any] = [json.dumps(v) if json_texts and v is not None else v for v in values]
    if arrow.startswith("decimal"):
        whole = [None if v is None else Decimal(v) for v in values]
    found = [json.loads(v) if json_texts and v else v for v in table["value"].to_pylist()]
    assert found == (values if json_texts else whole)
    column = frame["value"].astype(object)
    assert [None if missing else v for v, missing in zip(column, column.isna(), strict=True)] == values
    if polars == "String" and arrow != "string":
        whole = [str(v) for v in values]
    if not json_texts:
        assert other["value"].to_list() == whole
    if windowed:
        starts = [EPOCH + timedelta(seconds=i) for i in range(rows)]
        assert str(table.schema.field("start").type) == "timestamp[ms, tz=UTC]"
        assert table["start"].to_pylist() == starts
        assert [*frame["start"]] == starts
        assert other["start"].to_list() == starts
    if rows or windowed:
        names = ["x", "start", "value"] if windowed else ["x", "value"]
        assert table.column_names == [*frame.columns] == other.columns == names


@given(st.lists(some.scalars, max_size=6), st.booleans())
def test_any_values_have_a_table(values: list[Any], windowed: bool) -> None:
    """Any values of `last` become tables, HTML and sparklines."""
    it = answer(values, windowed=windowed)
    assert it.to_arrow().num_rows == len(it.to_pandas()) == len(it.to_polars()) == len(values)
    assert isinstance(it._repr_html_(), str)
    sparkline(values, 3)


@pytest.mark.parametrize("name", ["pyarrow", "pandas", "polars"])
def test_a_library_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for a missing library has the command that installs it."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"needs {name}: pip install {name}"):
        getattr(answer([1]), f"to_{name.removeprefix('py')}")()


def test_labels_keep_their_names() -> None:
    """A label may be called as the columns of starts and values are; those make room."""
    assert answer([1], label="value").to_arrow().column_names == ["value", "start", "value_"]
    assert answer([1], label="start").to_polars().columns == ["start", "start_", "value"]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_every_kind_can_be_shown(kind: str, data: st.DataObject) -> None:
    """Answers of each kind become rows everywhere, with points and without; a drawn value is a number or nothing."""
    values = [None, *map(KINDS[kind].answer, data.draw(some.states(kind, count=2)))]
    for windowed in (True, False):
        it = msgspec.structs.replace(answer(values, windowed=windowed), kind=kind)
        assert "<table>" in it._repr_html_()
        assert it.to_arrow().num_rows == len(to_ndjson(it).splitlines()) == len(values)
    drawn = [number_of(it, value) for value in values]
    assert drawn[0] is None
    if kind != "last":
        assert all(value is None or isinstance(value, int | float) for value in drawn)
    assert (drawn[1] is None) == (kind == "topk" or values[1] is None)


@given(st.lists(some.scalars, max_size=6), some.texts, st.booleans())
def test_rows_as_text(values: list[Any], of: str, windowed: bool) -> None:
    """CSV and NDJSON parse, to the same rows, with all digits."""
    it = answer(values, windowed=windowed, of=of)
    rows = [json.loads(line) for line in to_ndjson(it).decode().split("\n")[:-1]]
    expected = [
        {"labels": series.labels, "start_ms": start, "value": value} for series in it for start, value in series.points
    ]
    assert rows == (expected if windowed else [{"labels": series.labels, "value": series.value} for series in it])
    head, *cells = csv.reader(io.StringIO(to_csv(it).decode(), newline=""))
    assert head == ["x", *(["start_ms"] if windowed else []), "value"]
    assert [row[0] for row in cells] == [row["labels"]["x"] for row in rows]
    for row, value in zip(cells, values, strict=True):
        assert (
            row[-1] == ("" if value is None else value if isinstance(value, str) else json.dumps(value))
            or json.loads(row[-1]) == value
        )


def test_html_has_no_markup_of_others() -> None:
    """Names, labels and texts are escaped; too many rows are cut, and the table says so."""
    evil = '<script>alert(1)</script>&"'
    it = Answer(evil, "last", (evil,), [Series({evil: evil}, evil)], AsOf(None, {}))
    text = it._repr_html_()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 4
    assert "staleness unknown" in text
    many = answer([0] * (HTML_ROWS_MAX + 5), windowed=False)._repr_html_()
    assert f"{HTML_ROWS_MAX} of {HTML_ROWS_MAX + 5} series" in many
    assert "<td>▁▅█</td>" in answer([0, 5, 9])._repr_html_()
    assert "0 series" in Answer("v", "sum", None, [], AsOf(3, {}))._repr_html_()


def test_sparklines() -> None:
    """Bars reach from 0, or the least, to the most; a value that is no number is blank; a bar shows its largest value."""
    assert sparkline([0, 1, 2, 7], 10) == "▁▂▃█"
    assert sparkline([7, 7], 10) == "██"
    assert sparkline([-7, 0], 10) == "▁█"
    assert sparkline([None, 1, "a", True], 10) == " █  "
    assert sparkline([0, 0], 10) == "▁▁"
    assert sparkline([], 10) == ""
    assert sparkline([0, 9, 0, 0, None, None], 3) == "█▁ "
    assert sparkline([10**400, 1.5], 10) == "█▁"


def test_answers_are_iterable() -> None:
    """Iteration yields an answer's series; points say whether they are final; a single point is a value."""
    it = answer([1, 2])
    assert [*it] == it.series
    with pytest.raises(Exception, match="2 points"):
        it.value()
    assert answer([5]).value() == 5
    assert answer([]).value() is None
    final = Answer("v", "sum", (), [], AsOf(3, {}), step_ms=10, over_ms=20, final_before_ms=100)
    assert [final.is_final(point) for point in ((79, 1), (80, 1), (81, 1))] == [True, True, False]
