"""Recording many deltas at once: columns are checked, grouped by series, charged together, then recorded.

Nothing is recorded before everything is checked and charged; then each series is merged once.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from math import isfinite, prod
from operator import getitem
from typing import TYPE_CHECKING, Any

from pipeline.core.merge import TS_MS_MAX
from pipeline.errors import BufferFull, Invalid, PipelineError
from pipeline.producer.columns import Coded, Column, Scalar, Vector, read, read_label, read_value, rows_of
from pipeline.producer.sealing import ENTRY_BYTES, long_bytes

if TYPE_CHECKING:
    from pipeline.producer.account import Account
    from pipeline.producer.buffer import View
    from pipeline.producer.cell import Cell

_PLAIN = frozenset((int, float))
_INT = frozenset((int,))
_SAFE_BITS = 1_000
"""Ints of so many bits can be recorded, and added to floats."""
RUN_ROWS_MAX = 20_000
"""Rows that are grouped in one call of C, during which no other thread runs."""
CODES_MAX = 65_536
"""Codes that sort in a time that does not grow with their logarithm."""


class Reservation:
    """Bytes that were charged in advance; an `Account` to the cells that take them. For one thread."""

    def __init__(self, account: Account, size: int) -> None:
        self._account = account
        self._size = size

    def charge(self, size: int, fresh: int = 0) -> bool:
        """Take bytes; beyond the reservation, even of a full account, when a series was let go of meanwhile."""
        short = max(size - self._size, 0)
        self._size += short - size
        self._account.force(short)
        return True

    def refund(self, size: int) -> None:
        """Give bytes back, for the next series."""
        self._size += size

    def freshen(self, fresh: int) -> None:
        """As `Account.freshen`."""
        self._account.freshen(fresh)

    def close(self) -> None:
        """Give back to the account what is left."""
        size, self._size = self._size, 0
        self._account.refund(size)


def read_table(view: View, table: Any) -> dict[str, Column]:
    """The columns of a mapping, or of an Arrow table or record batch, by name: one a label, and `value`.

    `Invalid` if one is missing or unknown.
    """
    labels, last = view.declared.labels, view.definition.kind == "last"
    needed = {*labels, "value"}
    known = {*needed, "ts_ms"} if last else needed
    if len(needed) == len(labels) or (last and "ts_ms" in labels):
        raise _invalid(view, "a label is named as the column of values or times is; record by handles")
    if hasattr(table, "column_names") and hasattr(table, "column"):
        names, get = list(table.column_names), table.column
    elif hasattr(table, "keys") and hasattr(table, "__getitem__"):
        names, get = list(table.keys()), table.__getitem__
    else:
        raise _invalid(view, f"a mapping of columns is needed, or a table, got {type(table).__name__}")
    if len(names) != len(set(names)) or not needed <= {*names} <= known:
        wanted = [*labels, "value", *(["ts_ms, if they have times"] if last else [])]
        raise _invalid(view, f"columns {wanted} are needed; got {names}")
    readers = dict.fromkeys(labels, read_label) | {"value": read if last else read_value}
    return {name: readers.get(name, read)(name, get(name)) for name in names}


def _row_count(view: View, columns: Mapping[str, Column]) -> int:
    """How many rows; 1 if no column says."""
    count, first = 1, ""
    for name, column in columns.items():
        if isinstance(column, Scalar):
            continue
        if first and len(column) != count:
            raise _invalid(view, f"column {first} has {count} rows, column {name} {len(column)}")
        count, first = len(column), name
    return count


# Checking


def _invalid(view: View, what: str) -> Invalid:
    return Invalid(f"view {view.definition.view}: {what}; nothing was recorded")


def _are_plain(values: Sequence[Any], *, monotone: bool = False) -> bool:
    """Whether all are plain, finite numbers that can be recorded; False says nothing. Costs two passes in C."""
    types = set(map(type, values))
    if not types <= _PLAIN:
        return False
    if float in types:
        try:
            if not isfinite(sum(values)):  # as it is, once one of them is not
                return False
        except OverflowError:
            return False
        if not monotone and int not in types:
            return True
    low, high = min(values, default=0), max(values, default=0)
    if monotone and low < 0:
        return False
    return int not in types or max(abs(low), abs(high)) < 1 << _SAFE_BITS


def check_numbers(view: View, column: Column, row_count: int) -> list[Any] | Vector:
    """The deltas that these values are; `Invalid` names the first that is none. An int stays an int, a float a float."""
    monotone = view.definition.monotone
    if isinstance(column, Vector) and column.is_plain(monotone=monotone):
        return column
    values = rows_of(column, row_count)
    return values if _are_plain(values, monotone=monotone) else _check_each(view, values, [0] * row_count)


def _check_stamped(view: View, values: list[Any], stamps: list[Any]) -> list[Any]:
    """The deltas of a last view."""
    if (
        _are_plain(values)
        and set(map(type, stamps)) <= _INT
        and (not stamps or (min(stamps) >= 0 and max(stamps) <= TS_MS_MAX))
    ):
        return [*zip(stamps, values, strict=True)]
    return _check_each(view, values, stamps)


def _check_each(view: View, values: list[Any], stamps: list[Any]) -> list[Any]:
    check = view.kind.check
    deltas = []
    for value, ts_ms in zip(values, stamps, strict=True):
        try:
            deltas.append(check(value, ts_ms))
        except Invalid as error:
            column = "ts_ms" if "ts_ms" in str(error) else "value"
            raise _invalid(view, f"column {column}, row {len(deltas)}: {error}") from None
    return deltas


# Grouping


def _group(columns: Sequence[list[Any]], deltas: list[Any]) -> Iterator[tuple[tuple[Any, ...], list[Any]]]:
    """The keys that the rows of `columns` make, each with the deltas of its rows, in their order.

    One dict a column, so that no tuple is made, hashed and compared for a row.
    """
    groups: Any = _level(len(columns))
    for start in range(0, len(deltas), RUN_ROWS_MAX):
        rows = slice(start, start + RUN_ROWS_MAX)
        found: Any = repeat(groups)
        for column in columns:
            found = map(getitem, found, column[rows])
        deque(map(list.append, found, deltas[rows]), 0)
    return _leaves(groups, len(columns))


def _group_coded(columns: Sequence[Coded], deltas: list[Any] | Vector) -> Iterator[tuple[tuple[Any, ...], list[Any]]]:
    """As `_group`, by sorting codes, up to `CODES_MAX` of them: no object is looked at for a row but its delta."""
    codes = columns[0].codes.astype("int64")
    for column in columns[1:]:
        codes = codes * len(column.words) + column.codes
    codes = codes.astype("uint16")
    order = codes.argsort(kind="stable")
    codes = codes[order]
    in_order = [*map(deltas.__getitem__, order.tolist())] if isinstance(deltas, list) else deltas.array[order].tolist()
    starts = [0, *((codes[1:] != codes[:-1]).nonzero()[0] + 1).tolist()]
    for start, end, code in zip(starts, [*starts[1:], len(deltas)], codes[starts].tolist(), strict=True):
        key: list[Any] = []
        for column in reversed(columns):
            code, place = divmod(code, len(column.words))
            key.insert(0, column.words[place])
        yield tuple(key), in_order[start:end]


def _level(depth: int) -> Any:
    return defaultdict(lambda: _level(depth - 1)) if depth else []


def _leaves(group: Any, depth: int) -> Iterator[tuple[tuple[Any, ...], list[Any]]]:
    if not depth:
        yield (), group
    else:
        for key, inner in group.items():
            for keys, leaf in _leaves(inner, depth - 1):
                yield (key, *keys), leaf


def _groups(columns: Sequence[Column], deltas: list[Any] | Vector) -> Iterator[tuple[tuple[Any, ...], list[Any]]]:
    coded = [column for column in columns if isinstance(column, Coded)]
    if len(coded) == len(columns) and prod([len(column.words) for column in coded]) <= CODES_MAX:
        return _group_coded(coded, deltas)
    row_count = len(deltas)
    return _group([rows_of(column, row_count) for column in columns], rows_of(deltas, row_count))


def _by_cell(view: View, labels: Sequence[Column], deltas: list[Any] | Vector) -> dict[Cell, list[Any]]:
    """The runs of deltas of each series, in the order of rows."""
    varying = [column for column in labels if not isinstance(column, Scalar)]
    try:
        groups = _groups(varying, deltas) if varying else [((), rows_of(deltas, len(deltas)))]
    except TypeError as error:  # not hashable, so not text either
        raise _wrong_labels(view, labels, None, error) from None
    runs: dict[Cell, list[Any]] = {}
    for key, run in groups:
        rest = iter(key)
        values = tuple([column.value if isinstance(column, Scalar) else next(rest) for column in labels])
        try:
            runs[view._cell(values, {})] = run
        except Invalid as error:
            raise _wrong_labels(view, labels, values, error) from None
    return runs


def _wrong_labels(view: View, labels: Sequence[Column], wrong: tuple[Any, ...] | None, error: Exception) -> Invalid:
    """Which row is the first whose labels are `wrong`, or hold what is no text."""
    row_count = max([len(column) for column in labels if not isinstance(column, Scalar)], default=1)
    columns = [rows_of(column, row_count) for column in labels]
    for row, values in enumerate(zip(*columns, strict=True)):
        if values == wrong or not all(isinstance(value, str) for value in values):
            try:
                view._cell(values, {})
            except Invalid as invalid:
                return _invalid(view, f"row {row}: {invalid}")
    return _invalid(view, str(error))


# Recording


def record_columns(view: View, table: Any) -> int:
    """Record the rows of a table. How many were recorded: all, or 0 if they were dropped as `on_full` says."""
    columns = read_table(view, table)
    row_count = _row_count(view, columns)
    deltas: list[Any] | Vector
    if view.definition.kind != "last":
        deltas = check_numbers(view, columns["value"], row_count)
    else:
        values = rows_of(columns["value"], row_count)
        stamps = rows_of(columns["ts_ms"], row_count) if "ts_ms" in columns else [view.now_ms()] * row_count
        deltas = _check_stamped(view, values, stamps)
    runs = _by_cell(view, [columns[name] for name in view.declared.labels], deltas) if row_count else {}
    if "ts_ms" not in columns and view.definition.kind == "last":
        runs = {cell: run[-1:] for cell, run in runs.items()}  # of rows without times, the last is the newest
    return record_runs(view, runs, row_count)


def record_many(cell: Cell, values: Any) -> int:
    """Record values to one series. How many were recorded: all, or 0 if they were dropped as `on_full` says."""
    column = read_value("value", values)
    if isinstance(column, Scalar):
        raise _invalid(cell.view, f"a sequence of numbers is needed, got {type(values).__name__}")
    row_count = len(column)
    deltas = rows_of(check_numbers(cell.view, column, row_count), row_count)
    return record_runs(cell.view, {cell: deltas} if deltas else {}, row_count)


def record_runs(view: View, runs: Mapping[Cell, list[Any]], row_count: int) -> int:
    """Record checked deltas of several series, all or none: bytes are charged for all of them first.

    How many of the rows were recorded, 0 if they were dropped, or fewer if the disk was full in the midst; `BufferFull` if
    they were refused.
    """
    if not runs:
        return row_count
    states = [view.collect(run)[0] for run in runs.values()]
    size = fresh = 0
    for cell, state in zip(runs, states, strict=True):
        if long := long_bytes(state):
            view.check_fits(cell.suffix, long)
            size += long
        if not cell.charge:
            size += view.cell_bytes(cell)
            fresh += ENTRY_BYTES + len(cell.suffix)
    view.open()
    try:
        if size and not view.account.charge(size, fresh, row_count):
            return 0
    except BufferFull as error:
        raise BufferFull(f"{error}; nothing of the batch of {row_count} deltas was recorded") from None
    reserved = Reservation(view.account, size)
    done = dropped = 0
    try:
        for (cell, run), state in zip(runs.items(), states, strict=True):
            if cell.record_run(run, state, reserved):
                done += len(run)
            else:
                dropped += len(run)
    except PipelineError as error:  # closed by another thread; or the disk is full
        raise type(error)(f"{error}; {done} of the batch of {row_count} deltas were recorded before") from None
    finally:
        reserved.close()
    return row_count if not dropped else done
