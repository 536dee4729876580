"""Reads CSV and NDJSON from a file or a pipe as checked deltas with their line numbers, in bounded memory."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from pipeline.cli.source import ROW_BYTES_MAX, Damaged, Interrupted, Lines
from pipeline.core.kinds import KINDS, TS_MS_MAX, kind_of
from pipeline.core.record import Definition, check_label_values
from pipeline.core.times import datetime_ms
from pipeline.errors import Invalid
from pipeline.json_errors import Field, is_scalar, object_error, utf8_error

__all__ = ["ROW_BYTES_MAX", "BadRow", "Columns", "Damaged", "Interrupted", "Lines", "Row", "read_rows"]

FORMATS = ("csv", "ndjson")
NO_CSV = "not CSV: a quote that is never closed or has text behind it, or a line break of which half is missing"

_REMEMBERED_MAX = 100_000
_INT = re.compile(r"[+-]?[0-9]+")
_TIME_LENGTH_MAX = 40
_DECIMAL = re.compile(r"[+-]?[0-9]{1,20}(?:\.[0-9]{0,20})?")
_OTHERS = re.compile(r"[;\t|,]")
"""Other characters that separate cells."""
TS_UNITS: Mapping[str, int] = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
"""Units of times, each with how many are in a second."""
_LIKELY_MS = 946_684_800_000
"""The year 2000: from then on a time is likely to be meant so."""

_Scalar = str | int | float | bool | None
_decode_scalar: Callable[[str], _Scalar] = msgspec.json.Decoder(_Scalar).decode


class Row(NamedTuple):
    """One delta, checked as far as recording it could fail."""

    line: int
    last_line: int
    """Last line of the row; beyond `line` if a quoted CSV cell spans lines."""
    labels: tuple[str, ...]
    value: Any
    ts_ms: int | None


class BadRow(NamedTuple):
    """A row that is no delta, and the reason."""

    line: int
    last_line: int
    reason: str
    opened_on: int = 0
    """Line on which a quote was opened that went on to the next line; 0: none was."""


class Columns(NamedTuple):
    """Columns of the labels, in the order of the definition, of the value and of the time."""

    labels: tuple[str, ...]
    value: str | None
    """None: every row counts as 1."""
    ts: str | None
    ts_unit: str = "ms"

    def distinct(self) -> tuple[str, ...]:
        """Return each column once."""
        return tuple(dict.fromkeys(name for name in (*self.labels, self.value, self.ts) if name is not None))


class _Checker:
    """Makes rows from cells, checked against the definition of the view."""

    def __init__(self, definition: Definition, columns: Columns, latest_ms: Callable[[], int]) -> None:
        self._latest_ms = latest_ms
        self._definition = definition
        self._kind = kind_of(definition)
        names = columns.distinct()
        self._labels = [names.index(name) for name in columns.labels]
        self._value = None if columns.value is None else names.index(columns.value)
        self._ts = None if columns.ts is None else names.index(columns.ts)
        self._columns = columns
        self._known: set[tuple[str, ...]] = set()

    def row(self, line: int, last_line: int, cells: Sequence[Any], to_value: Callable[[Any], Any]) -> Row:
        """Return the row of cells in the order of `columns.distinct()`; `Invalid` if they are no delta."""
        labels = tuple([cells[i] for i in self._labels])
        if labels not in self._known:
            labels = self._checked(labels)
        ts_ms = None if self._ts is None else self._time_ms(cells[self._ts])
        if self._value is None:
            return Row(line, last_line, labels, 1, ts_ms)
        try:
            value = to_value(cells[self._value])
            self._kind.check(value, ts_ms or 0)
        except Invalid as error:
            raise Invalid(f"column {self._columns.value}: {error}") from None
        return Row(line, last_line, labels, value, ts_ms)

    def _time_ms(self, cell: object) -> int:
        columns, latest_ms = self._columns, self._latest_ms()
        ts_ms = parse_time_ms(cell, columns.ts, columns.ts_unit)
        if not 0 <= ts_ms <= TS_MS_MAX:
            hint = _unit_hint(cell, columns.ts_unit, latest_ms)
            raise Invalid(f"column {columns.ts}: a time is 0 to {TS_MS_MAX} ms after 1970, got {ts_ms}{hint}")
        if ts_ms > latest_ms:
            hint = _unit_hint(cell, columns.ts_unit, latest_ms)
            raise Invalid(
                f"column {columns.ts}: {ts_ms} is too far ahead of now; at most {latest_ms} (ts_ahead_max_ms){hint}"
            )
        return ts_ms

    def _checked(self, cells: tuple[Any, ...]) -> tuple[str, ...]:
        labels = tuple([_label_text(cell, name) for cell, name in zip(cells, self._columns.labels, strict=True)])
        labels = check_label_values(self._definition, labels)
        if len(self._known) >= _REMEMBERED_MAX:
            self._known.clear()
        self._known.add(labels)  # texts only: 1 and True would be equal to each other
        return labels


def _label_text(cell: object, column: str) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, int):
        return str(cell)
    raise Invalid(f"column {column}: a label is text, an int or a bool, got {cell!r:.50}")


def parse_number(text: str) -> int | float:
    """Return an int of any size if `text` is one, else a float; `Invalid` if it is no number."""
    plain = text.strip()
    try:
        if _INT.fullmatch(plain):
            return int(plain)
        if "_" not in plain:  # Python would read 1_000
            return float(plain)
    except ValueError:
        pass
    raise Invalid(f"a number is needed, got {text!r:.50}")


def parse_scalar(text: str) -> _Scalar:
    """Return the value of `text` if it is a JSON number, quoted text, true, false or null; else `text` itself."""
    try:
        return _decode_scalar(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return text


def parse_time_ms(value: object, column: str | None, unit: str = "ms") -> int:
    """Return milliseconds since 1970 from a number of the unit, digits, or RFC 3339; `Invalid` for other values."""
    if type(value) is int and unit == "ms":
        return value
    text = repr(value) if type(value) in (int, float) else value.strip() if isinstance(value, str) else ""
    if unit == "ms":
        if _INT.fullmatch(text) and len(text) <= _TIME_LENGTH_MAX:
            return int(text)
    elif _DECIMAL.fullmatch(text):
        return int(Fraction(text) * 1_000 // TS_UNITS[unit])
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is not None and at.tzinfo is not None:
        return datetime_ms(at)
    what = "milliseconds" if unit == "ms" else unit
    raise Invalid(f"column {column}: {what} since 1970, or RFC 3339 with its offset, is needed, got {value!r:.50}")


def _unit_hint(cell: object, unit: str, latest_ms: int) -> str:
    """Return words about the unit in which a time would be one of our days, if it is out of range in this one."""
    for other in TS_UNITS:
        try:
            ts_ms = parse_time_ms(cell, None, other)
        except Invalid:
            continue
        if other != unit and _LIKELY_MS <= ts_ms <= latest_ms:
            return f"; in {other} it is {_date(ts_ms)}: --ts-unit {other}"
    return ""


def _date(ts_ms: int) -> str:
    try:
        return f"{datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ts_ms):%Y-%m-%d}"
    except OverflowError:
        return f"{ts_ms} ms"


def early_hint(ts_ms: int, columns: Columns) -> str:
    """Return words about a time in ms that is likely to be one in seconds; empty if it is not."""
    if columns.ts_unit != "ms" or not _LIKELY_MS // 1_000 <= ts_ms < _LIKELY_MS // 100:
        return ""
    return f"column {columns.ts}: {ts_ms} ms after 1970 is {_date(ts_ms)}; in s it is {_date(ts_ms * 1_000)}: --ts-unit s?"


def check_delimiter(text: str) -> str:
    """Return the character that separates cells. Raises `Invalid` unless it is one, or `tab`."""
    text = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(text) != 1 or text in '"\r\n' or "\ud800" <= text <= "\udfff":
        raise Invalid(f"--delimiter {text[:20]!r}: one character, such as ; or |, or tab")
    return text


def _same(value: Any) -> Any:
    return value


def _no_latest() -> int:
    return TS_MS_MAX


def read_rows(
    lines: Lines,
    format_: str,
    definition: Definition,
    columns: Columns,
    latest_ms: Callable[[], int] = _no_latest,
    delimiter: str = ",",
) -> Iterator[Row | BadRow]:
    """Yield the rows of all lines, without empty ones. The header of a CSV is read at once, rows when they are asked for.
    A row with a time beyond `latest_ms()` is bad.

    Raises `Invalid` if the header or one of the columns is missing, and `Interrupted` and `Damaged` when `lines` does.
    """
    checker = _Checker(definition, columns, latest_ms)
    if format_ == "csv":
        to_value = parse_number if KINDS[definition.kind].takes_numbers else _same  # items are texts
        return _csv_rows(lines, checker, parse_scalar if definition.kind == "last" else to_value, columns, delimiter)
    return _ndjson_rows(lines, checker, columns)


def _csv_rows(
    lines: Lines, checker: _Checker, to_value: Callable[[str], Any], columns: Columns, delimiter: str
) -> Iterator[Row | BadRow]:
    csv.field_size_limit(ROW_BYTES_MAX)
    reader = csv.reader(map(bytes.decode, lines), strict=True, delimiter=delimiter)
    lines.begin()
    try:
        header = next(reader)
    except StopIteration:
        raise Invalid("no line at all: a CSV begins with its header") from None
    except (Invalid, UnicodeDecodeError, csv.Error) as error:
        raise Invalid(f"line 1, the header: {_reason(error, lines)}") from None
    pick = _picker(header, columns)

    def rows() -> Iterator[Row | BadRow]:
        while True:
            line = lines.begin()
            try:
                cells = next(reader)
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise Invalid(f"{len(cells)} cells; the header has {len(header)}")
                row: Row | BadRow = checker.row(line, lines.line, pick(cells), to_value)
            except StopIteration:
                return
            except (Invalid, UnicodeDecodeError, csv.Error) as error:
                row = BadRow(line, lines.line, _reason(error, lines), lines.opened_on if lines.line > line else 0)
            yield row

    return rows()


def _picker(header: Sequence[str], columns: Columns) -> Callable[[Sequence[str]], Sequence[str]]:
    index = []
    for name in columns.distinct():
        if header.count(name) != 1:
            what = "stands twice in" if name in header else "is not in"
            hint = "; cells that are separated by another character: --delimiter" if _OTHERS.search("".join(header)) else ""
            raise Invalid(f"column {name!r} {what} the header: {', '.join(header)!r:.500}{hint if len(header) == 1 else ''}")
        index.append(header.index(name))
    if len(index) > 1:
        return itemgetter(*index)
    return lambda cells: [cells[i] for i in index]


def _ndjson_rows(lines: Lines, checker: _Checker, columns: Columns) -> Iterator[Row | BadRow]:
    names = {f"c{number}": name for number, name in enumerate(columns.distinct())}
    wanted = {name: Field("a text, a number, true, false or null", is_scalar) for name in names.values()}
    decode = msgspec.json.Decoder(_row_type(names)).decode
    as_tuple = msgspec.structs.astuple
    while True:
        line = lines.begin()
        try:
            text = next(lines)
            if not text.strip():
                continue
            row: Row | BadRow = checker.row(line, line, as_tuple(decode(text)), _same)
        except StopIteration:
            return
        except Invalid as error:
            row = BadRow(line, line, str(error))
        except (UnicodeDecodeError, msgspec.MsgspecError, RecursionError) as error:
            row = BadRow(line, line, _in_encoding(object_error(text, wanted, others=True) or str(error), lines))
        yield row


def _row_type(names: Mapping[str, str]) -> type[msgspec.Struct]:
    return msgspec.defstruct("Row", [(field, _Scalar) for field in names], rename=dict(names))


def _reason(error: Exception, lines: Lines) -> str:
    if isinstance(error, UnicodeDecodeError):
        return _in_encoding(utf8_error(error), lines)
    return NO_CSV if isinstance(error, csv.Error) else str(error)


def _in_encoding(reason: str, lines: Lines) -> str:
    """Return the reason; where bytes of another encoding were no text, one that does not speak of UTF-8."""
    return f"not {lines.encoding}" if reason.startswith("not UTF-8") and lines.encoding != "UTF-8" else reason
