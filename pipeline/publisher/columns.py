"""Columns of a batch: sequences, NumPy arrays, Arrow arrays and chunked arrays, columns of pandas and Polars.

Columns are recognised by their methods, so that none of these libraries has to be imported.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import datetime
from typing import Any

from pipeline.core.record import Definition
from pipeline.core.times import datetime_ms
from pipeline.errors import Invalid

_NOT_NUMBERS = ("m", "M")
"""NumPy's kinds of dates and time spans, whose `tolist` can return bare ints of some unit."""
_FORMATS = {
    "int8": "b", "int16": "h", "int32": "i", "int64": "q", "uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q",
    "float": "f", "double": "d",
}  # fmt: skip
"""Arrow's types of numbers, with their names in the buffer protocol."""
_TEXTS = frozenset(("string", "large_string", "string_view"))


class Scalar:
    """One value in place of a column: every row has it."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Vector:
    """Plain numbers in a NumPy array: ints or floats of at most 64 bits."""

    __slots__ = ("array",)

    def __init__(self, array: Any) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def rows(self) -> list[Any]:
        """Return the number of each row."""
        numbers: list[Any] = self.array.tolist()
        return numbers


Column = list[Any] | Scalar | Vector


def rows_of(column: Column, row_count: int) -> list[Any]:
    """Return the value of each row."""
    if isinstance(column, Scalar):
        return [column.value] * row_count
    return column if isinstance(column, list) else column.rows()


def read(name: str, column: Any) -> Column:
    """Return a column as a new list, or one value for all rows. Raise `Invalid` if it has no order or is no column."""
    if column is None or isinstance(column, str | bytes | bytearray):
        return Scalar(column)
    if getattr(getattr(column, "dtype", None), "kind", "") in _NOT_NUMBERS:
        raise Invalid(f"column {name}: dates and spans of time have a unit; give plain numbers")
    if hasattr(column, "to_pylist"):
        return _read_chunks(getattr(column, "chunks", [column]))
    if hasattr(column, "as_py"):
        return Scalar(column.as_py())
    dimensions = getattr(column, "ndim", 1)
    if not dimensions:
        return Scalar(column.tolist())
    if dimensions != 1:
        raise Invalid(f"column {name}: one dimension is needed, got {dimensions}")
    for method in ("tolist", "to_list"):
        if hasattr(column, method):
            return list(getattr(column, method)())
    if isinstance(column, Mapping | Set):
        raise Invalid(f"column {name}: a {type(column).__name__} is no column")
    return list(column) if isinstance(column, Iterable) else Scalar(column)


def read_value(name: str, column: Any) -> Column:
    """Do as `read` does, but leave numbers in a NumPy array, if they are in one or Arrow makes one without a copy."""
    if numpy := sys.modules.get("numpy"):
        chunks = getattr(column, "chunks", [column])
        if len(chunks) == 1 and str(getattr(chunks[0], "type", "")) in _FORMATS and not chunks[0].null_count:
            return Vector(chunks[0].to_numpy())
        array = _array_of(column, numpy)
        if array is not None and array.ndim == 1 and array.dtype.kind in "iuf" and array.dtype.itemsize <= 8:
            return Vector(array.copy())
    return read(name, column)


def _array_of(column: Any, numpy: Any) -> Any:
    """Return the NumPy array that a column is, or that pandas or Polars make of one in which no value is missing."""
    if type(column) is numpy.ndarray:
        return column
    if not hasattr(column, "to_numpy") or hasattr(column, "to_pylist"):
        return None
    missing_count = getattr(column, "null_count", None)  # Polars'; pandas has plain numbers in NumPy's types
    has_all = not missing_count() if callable(missing_count) else isinstance(getattr(column, "dtype", None), numpy.dtype)
    return column.to_numpy() if has_all else None


def _read_chunks(chunks: Sequence[Any]) -> list[Any]:
    items: list[Any] = []
    for chunk in chunks:
        items += _read_arrow(chunk)
    return items


def _read_arrow(array: Any) -> Sequence[Any]:
    kind = str(array.type)
    if kind in _TEXTS:
        array = array.dictionary_encode()  # so that each text becomes a Python object once
    if hasattr(array, "indices") and hasattr(array, "dictionary"):
        words = array.dictionary.to_pylist()
        codes = _read_arrow(array.indices)
        return [*map(words.__getitem__, codes)] if not array.null_count else [None if c is None else words[c] for c in codes]
    form = _FORMATS.get(kind)
    if form is None or array.null_count or not len(array):
        values: list[Any] = array.to_pylist()
        return values
    data = memoryview(array.buffers()[1])
    start, size = array.offset, struct.calcsize(form)
    numbers: list[Any] = data[start * size : (start + len(array)) * size].cast(form).tolist()  # type: ignore[call-overload]  # takes literals
    return numbers


def read_table(definition: Definition, table: Any, ignore: Iterable[str] = ()) -> dict[str, Column]:
    """Return the columns of a mapping, a data frame, or an Arrow table or record batch, by name: one a label, and `value`.

    Raises `Invalid` if one is missing, or unknown and not in `ignore`.
    """
    labels, timed = definition.labels, has_times(definition)
    needed = {*labels, "value"}
    known = {*needed, "ts_ms"} if timed else needed
    if len(needed) == len(labels) or (timed and "ts_ms" in labels):
        raise _invalid(definition, "a label is named as the column of values or times is; record by handles")
    if hasattr(table, "column_names") and hasattr(table, "column"):
        names, get = list(table.column_names), table.column
    elif hasattr(table, "keys") and hasattr(table, "__getitem__"):
        names, get = list(table.keys()), table.__getitem__
    elif hasattr(table, "columns") and hasattr(table, "get_column"):
        names, get = list(table.columns), table.get_column
    else:
        raise _invalid(definition, f"a mapping of columns is needed, or a table, got {type(table).__name__}")
    if isinstance(ignore, str) or needed & (ignored := {*ignore}):
        raise _invalid(definition, f"ignore: names of columns that are not needed, got {ignore!r:.100}")
    names = [name for name in names if name not in ignored]
    if len(names) != len(set(names)) or not needed <= {*names} <= known:
        wanted = [*labels, "value", *(["ts_ms, if they have times"] if timed else [])]
        raise _invalid(definition, f"columns {wanted} are needed; got {names}; name the others in `ignore`")
    ways = {} if definition.kind == "last" else {"value": read_value}
    if timed:
        ways["ts_ms"] = read_times
    return {name: ways.get(name, read)(name, get(name)) for name in names}


def has_times(definition: Definition) -> bool:
    """Return whether the deltas of a view have times of their own."""
    return definition.kind == "last" or definition.window_s > 0


def read_times(name: str, column: Any) -> Column:
    """Do as `read` does, and make ms since 1970 of dates that have an offset from UTC; other dates are refused."""
    kind = getattr(getattr(column, "dtype", None), "kind", "")
    if kind == "M" and not getattr(column.dtype, "tz", None):
        raise Invalid(f"column {name}: dates without an offset from UTC; give them one, or ms since 1970")
    found = list(column.tolist()) if kind == "M" else read(name, column)
    if isinstance(found, Scalar):
        return Scalar(_ms_of(name, found.value, 0))
    return [_ms_of(name, value, row) for row, value in enumerate(rows_of(found, len(found)))]


def _ms_of(name: str, at: Any, row: int) -> Any:
    """Return a date in ms since 1970; of anything else the table says whether it is a time."""
    if type(at) is int:
        return at
    if at is None or (isinstance(at, datetime) and (at != at or at.tzinfo is None)):  # noqa: PLR0124  # pandas' NaT
        raise Invalid(f"column {name}, row {row}: a date needs its offset from UTC, got {at!r:.60}; nothing was recorded")
    return datetime_ms(at) if isinstance(at, datetime) else at


def rows_in(definition: Definition, columns: Mapping[str, Column]) -> int:
    """Return the number of rows; 1 if all columns are single values."""
    count, first = 1, ""
    for name, column in columns.items():
        if isinstance(column, Scalar):
            continue
        if first and len(column) != count:
            raise _invalid(definition, f"column {first} has {count} rows, column {name} {len(column)}")
        count, first = len(column), name
    return count


def _invalid(definition: Definition, what: str) -> Invalid:
    return Invalid(f"view {definition.view}: {what}; nothing was recorded")
