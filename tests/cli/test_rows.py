"""Reading rows: every row is a checked delta or a bad row with its line number, in bounded memory."""

from __future__ import annotations

import csv
import io
import os
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli.rows import (
    NO_CSV,
    ROW_BYTES_MAX,
    BadRow,
    Columns,
    Interrupted,
    Lines,
    Row,
    check_delimiter,
    early_hint,
    parse_number,
    parse_scalar,
    parse_time_ms,
    read_rows,
)
from pipeline.core.kinds import TS_MS_MAX
from pipeline.core.record import Definition
from pipeline.errors import Invalid
from pipeline.json_errors import OUT_OF_RANGE, TOO_DEEP

TOO_LONG = f"a row of over {ROW_BYTES_MAX} bytes, or a quote that is never closed"


def rows_of(
    data: bytes, format_: str = "csv", *, kind: str = "sum", labels: tuple[str, ...] = ("a",), value: str | None = "v",
    ts: str | None = None, ts_unit: str = "ms", latest_ms: int = TS_MS_MAX, delimiter: str = ",",
) -> list[Row | BadRow]:  # fmt: skip
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        definition = Definition("view", kind, labels)
        lines, columns = Lines(file.fileno(), lambda: False), Columns(labels, value, ts, ts_unit)
        return list(read_rows(lines, format_, definition, columns, lambda: latest_ms, delimiter))


def good(rows: list[Row | BadRow]) -> list[tuple[int, tuple[str, ...], Any]]:
    assert not [row for row in rows if isinstance(row, BadRow)]
    return [(row.line, row.labels, row.value) for row in rows if isinstance(row, Row)]


def bad(rows: list[Row | BadRow]) -> dict[int, str]:
    return {row.line: row.reason for row in rows if isinstance(row, BadRow)}


texts = st.text(st.characters(codec="utf-8"), max_size=20)
ints = st.integers(-(10**60), 10**60)


@given(st.lists(st.tuples(texts, texts, ints), max_size=20))
def test_a_csv_comes_back_as_it_was_written(rows: list[tuple[str, str, int]]) -> None:
    """A CSV is read back as written, with commas, quotes and line ends in cells, and ints at any size."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerows([("a", "v", "b"), *((a, v, b) for a, b, v in rows)])
    found = good(rows_of(file.getvalue().encode(), labels=("a", "b")))
    assert [(*labels, value) for _, labels, value in found] == rows


@given(st.lists(st.tuples(texts, st.one_of(ints, st.floats(allow_nan=False, allow_infinity=False))), max_size=20))
def test_ndjson_comes_back_as_it_was_written(rows: list[tuple[str, int | float]]) -> None:
    """Ints stay ints at any size, floats the same floats, and columns that nobody asked for don't matter."""
    data = b"".join(msgspec.json.encode({"a": a, "other": [{}], "v": v}) + b"\n" for a, v in rows)
    found = good(rows_of(data, "ndjson"))
    assert [(a, repr(v)) for _, (a,), v in found] == [(a, repr(v)) for a, v in rows]


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), (" -12 ", -12), ("+3", 3), ("1e3", 1000.0), (".5", 0.5), ("1.0", 1.0), ("18446744073709551617", 2**64 + 1)],
)
def test_numbers_of_a_csv(text: str, number: int | float) -> None:
    """A number that is written as an int is an exact int, every other one a float."""
    assert repr(parse_number(text)) == repr(number)


@pytest.mark.parametrize("text", ["", " ", "x", "1,5", "1_000", "0x10", "1 2", "--1", "9" * 5000])
def test_what_is_no_number(text: str) -> None:
    """A text that is not plainly a number is refused."""
    with pytest.raises(Invalid, match="a number is needed"):
        parse_number(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("1.5", 1.5), ("true", True), ("false", False), ("null", None), ('"12"', "12"), ("", ""),
        ("007", "007"), ("True", "True"), ("a b", "a b"), ("{}", "{}"), ("[1]", "[1]"), ("NaN", "NaN"), ("1e999", "1e999"),
    ],
)  # fmt: skip
def test_cells_of_kind_last(text: str, value: Any) -> None:
    """A cell that is a JSON scalar has its value; any other is text."""
    assert repr(parse_scalar(text)) == repr(value)


@pytest.mark.parametrize(
    ("value", "ts_ms"),
    [
        (1700000000123, 1700000000123), ("1700000000123", 1700000000123), ("1970-01-01T00:00:01Z", 1000),
        ("1970-01-01T01:00:00.001+01:00", 1), ("1970-01-01 00:00:00.5+00:00", 500),
    ],
)  # fmt: skip
def test_times(value: object, ts_ms: int) -> None:
    """A time is milliseconds since 1970, or RFC 3339."""
    assert parse_time_ms(value, "ts") == ts_ms


@pytest.mark.parametrize("value", ["", "yesterday", "2024-05-01", "2024-05-01T12:00:00", "1.5", 1.5, True, None])
def test_what_is_no_time(value: object) -> None:
    """A time without its offset could be any of a day's: it is refused."""
    with pytest.raises(Invalid, match="column ts: milliseconds since 1970"):
        parse_time_ms(value, "ts")


@pytest.mark.parametrize(
    ("value", "unit", "ts_ms"),
    [
        (1_700_000_000, "s", 1_700_000_000_000), ("1700000000.1239", "s", 1_700_000_000_123), (1.5, "s", 1_500),
        ("1700000000123456", "us", 1_700_000_000_123), (1_700_000_000_123_456_789, "ns", 1_700_000_000_123),
        ("-1", "us", -1), ("1970-01-01T00:00:01Z", "ns", 1_000), (" 7 ", "s", 7_000),
    ],
)  # fmt: skip
def test_times_of_other_units(value: object, unit: str, ts_ms: int) -> None:
    """A number is of the unit, exactly, rounded down to whole milliseconds; RFC 3339 is of no unit."""
    assert parse_time_ms(value, "ts", unit) == ts_ms


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("value", ["", "1e9", "9" * 5_000, "1_000", "nan", None, True, "1.2.3", "0x1"])
def test_what_is_no_time_of_any_unit(value: object, unit: str) -> None:
    """A text that is no plain number, or an endless one, is refused."""
    with pytest.raises(Invalid, match=r"column ts: .* since 1970"):
        parse_time_ms(value, "ts", unit)


@pytest.mark.parametrize(
    ("cell", "unit", "hint"),
    [
        ("1700000000123456", "ms", "; in us it is 2023-11-14: --ts-unit us"),
        ("1700000000123456789", "ms", "; in ns it is 2023-11-14: --ts-unit ns"),
        ("1700000000123", "s", "; in ms it is 2023-11-14: --ts-unit ms"),
        ("1700000000123456", "s", "; in us it is 2023-11-14: --ts-unit us"),
        ("99999999999999999999", "ms", ""),
        ("4102444800000", "ms", ""),
    ],
)
def test_a_time_of_another_unit_is_noticed(cell: str, unit: str, hint: str) -> None:
    """A time that is out of range in its unit, and one of our days in another, is refused, and the reason says so."""
    rows = rows_of(f"a,v,t\nx,1,{cell}\n".encode(), kind="last", ts="t", ts_unit=unit, latest_ms=1_800_000_000_000)
    assert bad(rows)[2].startswith("column t: ")
    assert bad(rows)[2].partition("(ts_ahead_max_ms)")[2] == hint or bad(rows)[2].endswith(hint)
    assert ("--ts-unit" in bad(rows)[2]) is bool(hint)


def test_a_time_in_seconds_that_is_taken_for_ms_is_noticed() -> None:
    """A time that is in January 1970, and one of our days in seconds, is likely to be in seconds."""
    columns = Columns((), "v", "t")
    assert "column t: 1700000000 ms after 1970 is 1970-01-20; in s it is 2023-11-14" in early_hint(1_700_000_000, columns)
    for ts_ms in (0, 5, 60_000, 1_700_000_000_000):
        assert not early_hint(ts_ms, columns)
    assert not early_hint(1_700_000_000, columns._replace(ts_unit="us"))


@pytest.mark.parametrize("text", [";", "|", "tab", "\\t", "\t", "§"])
def test_cells_are_separated_as_told(text: str) -> None:
    """Any one character can separate cells; a comma is text then, and quotes stay quotes."""
    between = check_delimiter(text)
    data = f'a{between}v\n"x{between},"{between}1\n'.encode()
    assert good(rows_of(data, delimiter=between)) == [(2, (f"x{between},",), 1)]
    if text != "§":
        with pytest.raises(Invalid, match="cells that are separated by another character: --delimiter"):
            rows_of(data)


@pytest.mark.parametrize("text", ["", ",,", '"', "\n", "\r", "\udcff", "tabs"])
def test_what_separates_nothing(text: str) -> None:
    """A delimiter is one character, and none that has another meaning."""
    with pytest.raises(Invalid, match="--delimiter"):
        check_delimiter(text)


@pytest.mark.parametrize(
    ("end", "opened_on"),
    [("", 3), ('y,"z",9\n', 3), ('y,z"\n', 3), ('x,"1"" \n', 3)],
)
def test_a_quote_that_is_closed_too_late_is_located(end: str, opened_on: int) -> None:
    """The bad row says on which line the quote was opened that took the lines behind it."""
    text = 'a,v\nx,1\nx,"2\n' + "x,3\n" * 10 + end
    row = rows_of(text.encode())[-1]
    assert isinstance(row, BadRow)
    assert (row.line, row.last_line, row.opened_on) == (3, 13 + bool(end), opened_on)


@pytest.mark.parametrize("at", [2, 5, 8])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"x", "1 cells; the header has 2"),
        (b"x,1,2", "3 cells; the header has 2"),
        (b"x,", "column v: a number is needed, got ''"),
        (b"x,nan", "column v: a finite number is needed, got nan"),
        (b"x,-inf", "column v: a finite number is needed, got -inf"),
        (b"x,1e999", "column v: a finite number is needed, got inf"),
        (b"x,1" + 3000 * b"0", "column v: an int of 9966 bits; at most 8192"),
        (b"\xff,1", "not UTF-8: byte 0xff at 0"),
        (b'"x"y,1', NO_CSV),
        (b"x" * 5000 + b",1", "label a of view view: 5000 bytes; at most 4096"),
        (b"x" * (ROW_BYTES_MAX + 5), TOO_LONG),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_csv_line_is_one_bad_row(line: bytes, reason: str, at: int) -> None:
    """A bad line anywhere is reported with its number and reason, and all others are read."""
    lines = [b"a,v", *(b"x,%d" % number for number in range(2, 8))]
    lines.insert(at - 1, line)
    rows = rows_of(b"\n".join(lines))
    assert bad(rows) == {at: reason}
    assert sum(row.value for row in rows if isinstance(row, Row)) == sum(range(2, 8))


@pytest.mark.parametrize("at", [1, 4, 7])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON from byte 1 on"),
        (b"[1]", "a JSON object is needed, got an array"),
        (b'{"a":"x"}', "'v' is missing"),
        (b'{"v":1}', "'a' is missing"),
        (b'{"a":"x","v":[1]}', "'v' must be a text, a number, true, false or null, got an array"),
        (b'{"a":null,"v":1}', "column a: a label is text, an int or a bool, got None"),
        (b'{"a":"x","v":"1"}', "column v: a number is needed, got str"),
        (b'{"a":"x","v":null}', "column v: a number is needed, got NoneType"),
        (b'{"a":"x","v":1e999}', OUT_OF_RANGE),
        (b'{"a":"x","v":' + b"1" * 5_000 + b"}", OUT_OF_RANGE),
        (b'{"a":"x","v":NaN}', "not JSON: NaN"),
        (b'{"a":"x","v":1} 2', "not JSON from byte 16 on"),
        (b'{"a":"\xc3\xa9" "v":1}', "not JSON from byte 10 on"),
        (b'{"a":"\xff","v":1}', "not UTF-8: byte 0xff at 6"),
        (b'{"a":"\\ud800","v":1}', "a text that is not valid Unicode (lone surrogate)"),
        (b'{"a":"x","v":1,"o":' + b"[" * 100_000, TOO_DEEP),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_ndjson_line_is_one_bad_row(line: bytes, reason: str, at: int) -> None:
    """A bad line anywhere is reported with its number and reason, and all others are read."""
    lines = [b'{"a":"x","v":%d}' % number for number in range(6)]
    lines.insert(at - 1, line)
    rows = rows_of(b"\n".join(lines), "ndjson")
    assert [*bad(rows)] == [at]
    assert bad(rows)[at] == reason
    assert sum(row.value for row in rows if isinstance(row, Row)) == sum(range(6))


def test_labels_of_ndjson() -> None:
    """A label that is an int or a bool is its JSON text: 1 and "1" are one label, true another."""
    lines = [{"a": label, "v": 1} for label in ("1", 1, True, "true", 1, True, False)]
    rows = rows_of(b"\n".join(map(msgspec.json.encode, lines)), "ndjson")
    assert [labels for _, labels, _ in good(rows)] == [("1",), ("1",), ("true",), ("true",), ("1",), ("true",), ("false",)]


def test_numbers_of_lines_count_every_line() -> None:
    """Empty lines are no rows, and a quoted cell may span lines, but each line counts."""
    rows = rows_of(b'a,v\n\n"x\ny",1\n\r\nz,2\nbad\n')
    assert [row[:2] for row in rows] == [(3, 4), (6, 6), (7, 7)]
    assert rows[0] == Row(3, 4, ("x\ny",), 1, None)


def test_an_open_quote_costs_a_bounded_row() -> None:
    """A quote that is never closed ends with its row's limit; reading goes on behind it."""
    filler = b"x,1\n" * (ROW_BYTES_MAX // 4)
    rows = rows_of(b'a,v\n"x,1\n' + filler + b"y,2\n" * 10)
    assert bad(rows) == {2: TOO_LONG}
    assert [row.labels for row in rows[-10:] if isinstance(row, Row)] == [("y",)] * 10
    assert bad(rows_of(b'a,v\n"x,1\n')) == {2: NO_CSV}


def test_memory_is_bounded_by_the_longest_row() -> None:
    """Neither a line without end nor a quoted cell without end is held in memory."""
    with tempfile.TemporaryFile() as file:
        file.write(b"a,v\n" + b"x" * 30_000_000 + b'\n"' + (b"y" * 65_535 + b"\n") * 500)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        lines = Lines(file.fileno(), lambda: False)
        rows = read_rows(lines, "csv", Definition("v", "sum", ("a",)), Columns(("a",), "v", None))
        tracemalloc.start()
        try:
            reasons = [row.reason for row in rows if isinstance(row, BadRow)]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert reasons[:2] == [TOO_LONG, TOO_LONG]
    assert peak < 16 * ROW_BYTES_MAX


def test_a_byte_order_mark_is_none_of_the_header() -> None:
    """A byte order mark, which spreadsheets write, is not a part of the header."""
    assert good(rows_of(b"\xef\xbb\xbfa,v\r\nx,1\r\n")) == [(2, ("x",), 1)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no line at all: a CSV begins with its header"),
        (b"\n", "column 'a' is not in the header: ''"),
        (b"a,w\n", "column 'v' is not in the header: 'a, w'"),
        (b"a,v,a\n", "column 'a' stands twice in the header: 'a, v, a'"),
        (b"a,\xff\n", "line 1, the header: not UTF-8: byte 0xff at 2"),
        (b"a" * (ROW_BYTES_MAX + 1), f"line 1, the header: {TOO_LONG}"),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_a_header_that_does_not_do(data: bytes, reason: str) -> None:
    """A header without the needed columns is a wrong call."""
    with pytest.raises(Invalid) as error:
        rows_of(data)
    assert str(error.value) == reason


def test_columns_nobody_needs() -> None:
    """Without a value each row counts 1, and a view needs no labels; a bad row is bad all the same."""
    assert good(rows_of(b"a,v\nx,zz\n", labels=(), value=None)) == [(2, (), 1)]
    rows = rows_of(b"{}\n5\n", "ndjson", labels=(), value=None)
    assert good(rows[:1]) == [(1, (), 1)]
    assert bad(rows) == {2: "a JSON object is needed, got an int"}


def test_a_column_can_be_two_things() -> None:
    """One column can be a label and the value."""
    assert good(rows_of(b"v\n12\n", labels=("v",))) == [(2, ("12",), 12)]
    assert good(rows_of(b'{"v":12}', "ndjson", labels=("v",))) == [(1, ("12",), 12)]


def test_time_of_kind_last() -> None:
    """Each row has its own time; one out of range is a bad row."""
    rows = rows_of(b"a,v,t\nx,on,1970-01-01T00:00:02Z\nx,off,3\nx,y,-1\nx,y,\n", kind="last", ts="t")
    assert rows[:2] == [Row(2, 2, ("x",), "on", 2000), Row(3, 3, ("x",), "off", 3)]
    assert bad(rows)[4] == f"column t: a time is 0 to {TS_MS_MAX} ms after 1970, got -1"
    assert "milliseconds since 1970" in bad(rows)[5]


def test_an_interrupted_pipe_yields_whole_rows_only() -> None:
    """Half a line, or half a quoted cell, is no row when reading is asked to stop."""
    for data, whole in ((b"a,v\nx,1\ny,2", 1), (b'a,v\nx,1\n"y\n', 1), (b"a,v\nx,1\ny,2\n", 2)):
        reading, writing = os.pipe()
        stopped: list[bool] = []
        lines = Lines(reading, lambda stopped=stopped: bool(stopped))
        os.write(writing, data)
        rows = read_rows(lines, "csv", Definition("v", "sum", ("a",)), Columns(("a",), "v", None))
        found = [next(rows) for _ in range(whole)]
        stopped.append(True)
        with pytest.raises(Interrupted):
            next(rows)
        assert len(found) == whole
        os.close(reading)
        os.close(writing)


def test_a_file_may_end_without_a_line_end(tmp_path: Path) -> None:
    """The last line counts with or without one."""
    assert good(rows_of(b"a,v\nx,1")) == good(rows_of(b"a,v\nx,1\n")) == [(2, ("x",), 1)]
