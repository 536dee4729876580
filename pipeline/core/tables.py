"""Answers as rows for other programs: HTML, and the tables of Arrow, pandas and polars.

A row is a series, or a point of one: the label values, the start of the point where there are points, and the value. The
libraries are imported only when their table is asked for. Values keep all digits: ints beyond 64 bits are decimals where the
library has decimals that are long enough, and texts where it has not.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from decimal import Decimal
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from pipeline.core.kinds import KINDS

if TYPE_CHECKING:
    from pipeline.core.answer import Answer

HTML_ROWS_MAX = 100
_HEIGHT_MAX = 1e307
_SPARKS = "▁▂▃▄▅▆▇█"
_INT64_MAX = 2**63 - 1
_DECIMAL128_DIGITS, _DECIMAL256_DIGITS = 38, 76
_encode = msgspec.json.Encoder().encode


class AnswerColumns(NamedTuple):
    """Rows of an answer, column by column."""

    labels: dict[str, list[str]]
    start: str | None
    """Name of the column of starts; None: the answer has no points."""
    starts: list[int]
    value: str
    """Name of the column of values."""
    values: list[Any]
    compare: str | None = None
    """Name of the column of the earlier range's values; None: none was asked for."""
    compares: Sequence[Any] = ()

    def measures(self) -> list[tuple[str, Sequence[Any]]]:
        """Return the columns of values, each with its name."""
        return [(self.value, self.values), *([] if self.compare is None else [(self.compare, self.compares)])]


def columns(answer: Answer) -> AnswerColumns:
    """Return the rows of an answer. A column that is no label gets a `_` behind its name while a label has that name."""
    names = [*answer.series[0].labels] if answer.series else [*(answer.by or ())]
    value, start, compare = [_free(name, names) for name in ("value", "start", "compare")]
    if answer.step_ms is None:
        labels = {name: [series.labels[name] for series in answer] for name in names}
        return AnswerColumns(labels, None, [], value, [series.value for series in answer])
    rows = [(series.labels, point) for series in answer for point in series.points]
    labels = {name: [of[name] for of, _ in rows] for name in names}
    starts, values = [point[0] for _, point in rows], [point[1] for _, point in rows]
    if answer.compare_ms is None:
        return AnswerColumns(labels, start, starts, value, values)
    compares = [before for series in answer for _, before in series.compare]
    return AnswerColumns(labels, start, starts, value, values, compare, compares)


def _free(name: str, taken: Sequence[str]) -> str:
    while name in taken:
        name += "_"
    return name


def value_text(value: Any) -> str:
    """Return a value as a cell of text: a text as it is, null as nothing, everything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else _encode(value).decode()


def sparkline(values: Sequence[Any], width: int) -> str:
    """Return at most `width` bars, from the lowest for 0 or less to the highest; a blank for what is no number.

    Where there are more values than bars, a bar is the largest of its values.
    """
    heights = [_height(value) for value in values]
    if len(heights) > width:
        ends = [len(heights) * i // width for i in range(width + 1)]
        heights = [max((it for it in heights[a:b] if it is not None), default=None) for a, b in pairwise(ends)]
    there = [it for it in heights if it is not None]
    least = min(0.0, min(there, default=0.0))
    span = max(there, default=0.0) - least
    top = len(_SPARKS) - 1
    return "".join(" " if it is None else _SPARKS[round((it - least) / span * top) if span else 0] for it in heights)


def number_of(answer: Answer, value: Any) -> Any:
    """Return what a value of an answer is drawn as; None: nothing. A value of an unknown kind is drawn as it is."""
    kind = KINDS.get(answer.kind)
    return value if kind is None or value is None else kind.number(value)


def _height(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(max(-_HEIGHT_MAX, min(_HEIGHT_MAX, value)))


def to_html(answer: Answer) -> str:
    """Return a table for notebooks: a row a series, with the newest point and a line of bars where there are points."""
    names = [*answer.series[0].labels] if answer.series else [*(answer.by or ())]
    windowed = answer.step_ms is not None
    head = [*names, answer.fn or answer.kind, *(["points"] if windowed else [])]
    head += [] if answer.compare_ms is None else ["compare", "points"]
    rows = []
    for series in answer.series[:HTML_ROWS_MAX]:
        cells = [*series.labels.values()]
        if windowed:
            for points in (series.points, series.compare)[: 1 if answer.compare_ms is None else 2]:
                values = [value for _, value in points]
                bars = sparkline([number_of(answer, it) for it in values], 60)
                cells += [value_text(values[-1]) if values else "", bars]
        else:
            cells.append(value_text(series.value))
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    count = answer.series_total or len(answer.series)
    shown = f"{len(rows)} of {count} series" if len(rows) < count else f"{count} series"
    stale = answer.as_of.staleness_ms
    said = f"{shown}, {'staleness unknown' if stale is None else f'at most {stale} ms stale'}"
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return (
        f"<table><caption>{html.escape(answer.view)}: {said}</caption><thead><tr>{titles}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _shape(values: Sequence[Any]) -> str:
    """Return what all values, but for null, have in common: `null`, `bool`, `int`, `long`, `float`, `text` or `other`."""
    there = [value for value in values if value is not None]
    types = set(map(type, there))
    if not types:
        return "null"
    if types == {int}:
        largest = max(map(abs, there))
        return "int" if largest <= _INT64_MAX else "long" if len(str(largest)) <= _DECIMAL256_DIGITS else "other"
    if types <= {int, float}:
        try:
            _ = [*map(float, there)]
        except OverflowError:  # an int beyond all floats
            return "other"
        return "float"
    return {bool: "bool", str: "text"}.get(types.pop(), "other") if len(types) == 1 else "other"


def _digits(values: Sequence[Any]) -> int:
    return max(len(str(abs(value))) for value in values if value is not None)


def _texts(values: Sequence[Any]) -> list[str | None]:
    return [None if value is None else _encode(value).decode() for value in values]


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"to_{name.removeprefix('py')}() needs {name}: pip install {name}") from error


def to_arrow(answer: Answer) -> Any:
    """Return the rows as a `pyarrow.Table`. Values that have no type in common are JSON, as texts."""
    pa = _library("pyarrow")
    it = columns(answer)
    found = {name: pa.array(values, pa.string()) for name, values in it.labels.items()}
    if it.start is not None:
        found[it.start] = pa.array(it.starts, pa.timestamp("ms", "UTC"))
    for name, column in it.measures():
        found[name] = _arrow_array(pa, column)
    return pa.table(found)


def _arrow_array(pa: Any, values: Sequence[Any]) -> Any:
    shape = _shape(values)
    kinds = {"null": pa.null(), "bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
    if shape == "long":
        short = _digits(values) <= _DECIMAL128_DIGITS
        kinds["long"] = pa.decimal128(_DECIMAL128_DIGITS) if short else pa.decimal256(_DECIMAL256_DIGITS)
        values = [None if value is None else Decimal(value) for value in values]
    elif shape == "float":
        values = [None if value is None else float(value) for value in values]
    elif shape == "other":
        values = _texts(values)
    return pa.array(values, kinds.get(shape, pa.string()))


def to_arrow_stream(answer: Answer) -> bytes:
    """Return the table of `to_arrow` in the stream format of Arrow IPC."""
    pa = _library("pyarrow")
    table, sink = to_arrow(answer), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def to_pandas(answer: Answer) -> Any:
    """Return the rows as a `pandas.DataFrame`. Values that have no type in common, and ints beyond 64 bits, are objects."""
    pd = _library("pandas")
    it = columns(answer)
    found: dict[str, Any] = {name: pd.Series(values, dtype="str") for name, values in it.labels.items()}
    if it.start is not None:
        found[it.start] = pd.to_datetime(pd.Series(it.starts, dtype="int64"), unit="ms", utc=True).astype(
            "datetime64[ms, UTC]"
        )
    for name, values in it.measures():
        found[name] = _pandas_series(pd, values)
    return pd.DataFrame(found)


def _pandas_series(pd: Any, values: Sequence[Any]) -> Any:
    whole = None not in values
    types = {
        "bool": "bool" if whole else "boolean",
        "int": "int64" if whole else "Int64",
        "float": "float64",
        "text": "str" if whole else "object",
    }
    return pd.Series([*values], dtype=types.get(_shape(values), "object"))


def to_polars(answer: Answer) -> Any:
    """Return the rows as a `polars.DataFrame`. Values that have no type in common are JSON, as texts."""
    pl = _library("polars")
    it = columns(answer)
    found = [pl.Series(name, values, pl.String) for name, values in it.labels.items()]
    if it.start is not None:
        found.append(pl.Series(it.start, it.starts, pl.Int64).cast(pl.Datetime("ms", "UTC")))
    found += [_polars_series(pl, name, values) for name, values in it.measures()]
    return pl.DataFrame(found)


def _polars_series(pl: Any, name: str, values: Sequence[Any]) -> Any:
    shape = _shape(values)
    kinds = {"null": pl.Null, "bool": pl.Boolean, "int": pl.Int64, "float": pl.Float64}
    if shape == "long" and _digits(values) <= _DECIMAL128_DIGITS:
        kinds["long"] = pl.Decimal(_DECIMAL128_DIGITS, 0)
        values = [None if value is None else Decimal(value) for value in values]
    elif shape == "float":
        values = [None if value is None else float(value) for value in values]
    elif shape in ("long", "other"):
        values = _texts(values)
    return pl.Series(name, values, kinds.get(shape, pl.String))
