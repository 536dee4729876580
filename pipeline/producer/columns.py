"""Columns of a batch: sequences, NumPy arrays, Arrow arrays and chunked arrays.

They are known by what they can do, so that neither library is needed here, or loaded.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from math import isfinite
from typing import Any

from pipeline.errors import Invalid

_NOT_NUMBERS = ("m", "M")
"""NumPy's kinds of dates and spans, whose `tolist` can yield bare ints of some unit."""
_FORMATS = {
    "int8": "b", "int16": "h", "int32": "i", "int64": "q", "uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q",
    "float": "f", "double": "d",
}  # fmt: skip
"""Arrow's numbers, as the buffer protocol calls them."""
_TEXTS = frozenset(("string", "large_string", "string_view"))


class Scalar:
    """One value in place of a column: every row has it."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Coded:
    """Texts of a column by their places in a list of all of them: what an Arrow dictionary is."""

    __slots__ = ("codes", "words")

    def __init__(self, codes: Any, words: list[Any]) -> None:
        self.codes = codes
        """A NumPy array of ints."""
        self.words = words
        """Each but once."""

    def __len__(self) -> int:
        return len(self.codes)

    def rows(self) -> list[Any]:
        """The text of each row."""
        return [*map(self.words.__getitem__, self.codes.tolist())]


class Vector:
    """Plain numbers in a NumPy array: ints or floats of at most 64 bits."""

    __slots__ = ("array",)

    def __init__(self, array: Any) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def rows(self) -> list[Any]:
        """The number of each row."""
        return self.array.tolist()  # type: ignore[no-any-return]

    def is_plain(self, *, monotone: bool) -> bool:
        """Whether all of them can be recorded."""
        if not len(self.array):
            return True
        low, high = self.array.min(), self.array.max()  # not a number, if one of them is not
        return isfinite(low) and isfinite(high) and not (monotone and low < 0)


Column = list[Any] | Scalar | Coded | Vector


def rows_of(column: Column, row_count: int) -> list[Any]:
    """What each row has."""
    if isinstance(column, Scalar):
        return [column.value] * row_count
    return column if isinstance(column, list) else column.rows()


def read(name: str, column: Any) -> Column:
    """A column as a list of its own, or the one value that stands for it. `Invalid` if it has no order or is no column."""
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


def read_label(name: str, column: Any) -> Column:
    """As `read`; by codes, if Arrow has them and NumPy, which makes use of them, is there anyway."""
    chunks = getattr(column, "chunks", [column]) if "numpy" in sys.modules else []
    if len(chunks) == 1 and hasattr(chunks[0], "dictionary_encode") and not chunks[0].null_count:
        array = chunks[0].dictionary_encode() if str(chunks[0].type) in _TEXTS else chunks[0]
        if hasattr(array, "indices") and str(array.dictionary.type) in _TEXTS:
            words = array.dictionary.to_pylist()
            if len(words) == len(set(words)):
                return Coded(array.indices.to_numpy(), words)
    return read(name, column)


def read_value(name: str, column: Any) -> Column:
    """As `read`; numbers stay in the NumPy array that they are in, or that Arrow makes of them for nothing."""
    if numpy := sys.modules.get("numpy"):
        chunks = getattr(column, "chunks", [column])
        if len(chunks) == 1 and str(getattr(chunks[0], "type", "")) in _FORMATS and not chunks[0].null_count:
            return Vector(chunks[0].to_numpy())
        if type(column) is numpy.ndarray and column.ndim == 1 and column.dtype.kind in "iuf" and column.dtype.itemsize <= 8:
            return Vector(column.copy())
    return read(name, column)


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
        return array.to_pylist()  # type: ignore[no-any-return]
    data = memoryview(array.buffers()[1])
    start, size = array.offset, struct.calcsize(form)
    return data[start * size : (start + len(array)) * size].cast(form).tolist()  # type: ignore[call-overload,no-any-return]
