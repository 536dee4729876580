"""Reads CSV and NDJSON from a file or a pipe as checked deltas with their line numbers, in bounded memory."""

from __future__ import annotations

import csv
import os
import re
import select
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from io import BufferedReader, RawIOBase
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from pipeline.core.kinds import KINDS, TS_MS_MAX, kind_of
from pipeline.core.record import Definition, check_label_values
from pipeline.core.times import datetime_ms
from pipeline.errors import Invalid
from pipeline.json_errors import Field, is_scalar, object_error, utf8_error
from pipeline.threads import POLL_INTERVAL_S

ROW_BYTES_MAX = 1_048_576
"""Longest row, of one line or of several in a quoted cell; a longer row is bad."""
FORMATS = ("csv", "ndjson")
NO_CSV = "not CSV: a quote that is never closed or has text behind it, or a line break of which half is missing"

_BUFFER_BYTES = 262_144
_REMEMBERED_MAX = 100_000
_INT = re.compile(r"[+-]?[0-9]+")
_BOM = b"\xef\xbb\xbf"

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


class Interrupted(Exception):
    """Raised when reading was asked to stop; all rows before were whole."""


class Columns(NamedTuple):
    """Columns of the labels, in the order of the definition, of the value and of the time."""

    labels: tuple[str, ...]
    value: str | None
    """None: every row counts as 1."""
    ts: str | None

    def distinct(self) -> tuple[str, ...]:
        """Return each column once."""
        return tuple(dict.fromkeys(name for name in (*self.labels, self.value, self.ts) if name is not None))


class _Pipe(RawIOBase):
    """A stream of a file descriptor of the caller's; it ends when `stopped` turns true, even while no bytes arrive."""

    def __init__(self, fd: int, stopped: Callable[[], bool]) -> None:
        self._fd = fd
        self._stopped = stopped

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not select.select([self._fd], [], [], POLL_INTERVAL_S)[0]:
            if self._stopped():
                return 0
        data = os.read(self._fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Lines(Iterator[bytes]):
    """Numbered lines of a file descriptor, which the caller closes. `begin` starts a row.

    Raises `Invalid` for a row that is too long, whose rest is skipped, and `Interrupted` once `stopped` is true.
    """

    def __init__(self, fd: int, stopped: Callable[[], bool]) -> None:
        self.line = 0
        """Number of the last line that was returned."""
        self.bytes_read = 0
        self._stream = BufferedReader(_Pipe(fd, stopped), _BUFFER_BYTES)
        self._stopped = stopped
        self._room = 0

    def begin(self) -> int:
        """Begin a row; return the number of its first line."""
        self._room = ROW_BYTES_MAX
        return self.line + 1

    def __next__(self) -> bytes:
        if self._stopped():
            raise Interrupted
        line = self._stream.readline(self._room + 1)
        if not line.endswith(b"\n") and self._stopped():
            raise Interrupted  # it may be half a line
        if not line:
            raise StopIteration
        self.line += 1
        self.bytes_read += len(line)
        self._room -= len(line)
        if self._room < 0:
            self._skip_rest(line)
            raise Invalid(f"a row of over {ROW_BYTES_MAX} bytes, or a quote that is never closed")
        return line.removeprefix(_BOM) if self.line == 1 else line

    def _skip_rest(self, line: bytes) -> None:
        while line and not line.endswith(b"\n"):
            if self._stopped():
                raise Interrupted
            line = self._stream.readline(_BUFFER_BYTES)
            self.bytes_read += len(line)


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
        ts_ms = None if self._ts is None else parse_time_ms(cells[self._ts], self._columns.ts)
        if ts_ms is not None and TS_MS_MAX >= ts_ms > (latest_ms := self._latest_ms()):
            raise Invalid(
                f"column {self._columns.ts}: {ts_ms} is too far ahead of now; at most {latest_ms} (ts_ahead_max_ms)"
            )
        if self._value is None:
            return Row(line, last_line, labels, 1, ts_ms)
        try:
            value = to_value(cells[self._value])
            self._kind.check(value, ts_ms or 0)
        except Invalid as error:
            raise Invalid(f"column {self._columns.value}: {error}") from None
        return Row(line, last_line, labels, value, ts_ms)

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


def parse_time_ms(value: object, column: str | None) -> int:
    """Return milliseconds since 1970 from an int, digits, or RFC 3339; `Invalid` for other values."""
    if type(value) is int:
        return value
    if isinstance(value, str):
        if _INT.fullmatch(value.strip()):
            return int(value)
        try:
            at = datetime.fromisoformat(value.strip())
        except ValueError:
            at = None
        if at is not None and at.tzinfo is not None:
            return datetime_ms(at)
    raise Invalid(f"column {column}: milliseconds since 1970, or RFC 3339 with its offset, is needed, got {value!r:.50}")


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
) -> Iterator[Row | BadRow]:
    """Yield the rows of all lines, without empty ones. The header of a CSV is read at once, rows when they are asked for.
    A row with a time beyond `latest_ms()` is bad.

    Raises `Invalid` if the header or one of the columns is missing, and `Interrupted` when `lines` does.
    """
    checker = _Checker(definition, columns, latest_ms)
    if format_ == "csv":
        to_value = parse_number if KINDS[definition.kind].takes_numbers else _same  # items are texts
        return _csv_rows(lines, checker, parse_scalar if definition.kind == "last" else to_value, columns)
    return _ndjson_rows(lines, checker, columns)


def _csv_rows(lines: Lines, checker: _Checker, to_value: Callable[[str], Any], columns: Columns) -> Iterator[Row | BadRow]:
    csv.field_size_limit(ROW_BYTES_MAX)
    reader = csv.reader(map(bytes.decode, lines), strict=True)
    lines.begin()
    try:
        header = next(reader)
    except StopIteration:
        raise Invalid("no line at all: a CSV begins with its header") from None
    except (Invalid, UnicodeDecodeError, csv.Error) as error:
        raise Invalid(f"line 1, the header: {_reason(error)}") from None
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
                row = BadRow(line, lines.line, _reason(error))
            yield row

    return rows()


def _picker(header: Sequence[str], columns: Columns) -> Callable[[Sequence[str]], Sequence[str]]:
    index = []
    for name in columns.distinct():
        if header.count(name) != 1:
            what = "stands twice in" if name in header else "is not in"
            raise Invalid(f"column {name!r} {what} the header: {', '.join(header)!r:.500}")
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
            row = BadRow(line, line, object_error(text, wanted, others=True) or str(error))
        yield row


def _row_type(names: Mapping[str, str]) -> type[msgspec.Struct]:
    return msgspec.defstruct("Row", [(field, _Scalar) for field in names], rename=dict(names))


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return utf8_error(error)
    return NO_CSV if isinstance(error, csv.Error) else str(error)
