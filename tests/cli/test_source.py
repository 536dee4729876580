"""Input of any packing, encoding and line ends is the same lines, in bounded memory."""

from __future__ import annotations

import gzip
import os
import random
import sys
import tempfile
import threading
import tracemalloc
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.cli import source
from pipeline.cli.rows import BadRow, Columns, Row, read_rows
from pipeline.cli.source import Damaged, Interrupted, Lines, check_encoding
from pipeline.core.record import Definition
from pipeline.errors import Invalid
from tests.support import LONG

zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
TEXT = "a,v\nx,1\né,2\n\u20ac,3\n"


def lines_of(data: bytes, encoding: str | None = None) -> list[bytes]:
    return list(_lines(data, encoding))


def _lines(data: bytes, encoding: str | None) -> Iterator[bytes]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        lines = Lines(file.fileno(), lambda: False, encoding)
        while True:
            lines.begin()
            try:
                yield next(lines)
            except StopIteration:
                return


def rows_of(data: bytes, encoding: str | None = None) -> list[Row | BadRow]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        lines = Lines(file.fileno(), lambda: False, encoding)
        return list(read_rows(lines, "csv", Definition("view", "sum", ("a",)), Columns(("a",), "v", None)))


def with_checksum(data: bytes) -> bytes:
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})


def split(data: bytes) -> tuple[bytes, bytes]:
    middle = len(data) // 2
    return data[:middle], data[middle:]


@pytest.mark.parametrize(
    "pack",
    [
        gzip.compress,
        zstd.compress,
        lambda data: b"".join(map(gzip.compress, split(data))) + bytes(1_000),
        lambda data: b"".join(map(zstd.compress, split(data))),
        lambda data: gzip.compress(b"") + gzip.compress(data) + gzip.compress(b""),
    ],
    ids=["gzip", "zstd", "gzip members", "zstd frames", "empty members"],
)
@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_packed_input_is_its_content(pack: object, size: int) -> None:
    """Packed input is known by its first bytes; all members count, of any number, and padding does not."""
    data = "".join(f"{number},{number * 7}\n" for number in range(size)).encode()
    assert callable(pack)
    assert b"".join(lines_of(pack(data))) == data


@pytest.mark.parametrize("pack", [gzip.compress, with_checksum], ids=["gzip", "zstd"])
@pytest.mark.parametrize("harm", ["cut", "turned", "garbage"])
def test_damaged_input_is_no_end(pack: object, harm: str) -> None:
    """Packed input that ends too early or is damaged is an error, not an end, behind the lines that it surely holds."""
    assert callable(pack)
    data = b"".join(b"%d,%d\n" % (number, random.Random(number).getrandbits(64)) for number in range(50_000))
    packed = pack(data)
    middle = len(packed) // 2
    if harm == "cut":
        packed = packed[:middle]
    elif harm == "turned":
        packed = packed[:middle] + bytes(b ^ 0xFF for b in packed[middle : middle + 100]) + packed[middle + 100 :]
    else:
        packed += b"garbage"
    found = []
    with pytest.raises(Damaged, match=r"gzip|zstd"):
        found.extend(_lines(packed, None))  # it keeps what came before the error
    if harm != "turned":
        assert data.startswith(b"".join(found))


def test_a_bomb_costs_bounded_memory() -> None:
    """A packed file that grows a thousandfold costs no more memory than its longest row may."""
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    bomb = b"".join(packer.compress(bytes(1_000_000)) for _ in range(100)) + packer.flush()
    for packed in (bomb, zstd.compress(bytes(50_000_000))):
        tracemalloc.start()
        try:
            with pytest.raises(Invalid, match="a row of over"):
                lines_of(packed)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 16 * source.ROW_BYTES_MAX


@pytest.mark.parametrize(
    ("encoding", "given", "bom"),
    [
        ("utf-8", None, ""), ("utf-8", None, "\ufeff"), ("utf-16-le", None, "\ufeff"), ("utf-16-be", None, "\ufeff"),
        ("utf-32-le", None, "\ufeff"), ("utf-8", "utf-8", "\ufeff"), ("utf-8", "UTF8", ""), ("utf-16-le", "utf-16-le", ""),
        ("utf-16-le", "utf-16-le", "\ufeff"), ("utf-16", "utf-16", ""), ("cp1252", "cp1252", ""),
        ("cp1252", "windows-1252", ""),
        ("iso8859-15", "iso-8859-15", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_of_any_encoding(encoding: str, given: str | None, bom: str, end: str) -> None:
    """A byte order mark, which is no part of the text, or `--encoding` says which encoding it is; any line end will do."""
    data = (bom + TEXT.replace("\n", end)).encode(encoding)
    for packed in (data, gzip.compress(data)):
        rows = rows_of(packed, given)
        assert [(row.line, row.labels, row.value) for row in rows if isinstance(row, Row)] == [
            (2, ("x",), 1), (3, ("é",), 2), (4, ("€",), 3),
        ]  # fmt: skip
        assert len(rows) == 3


def test_bytes_that_are_none_of_the_encoding() -> None:
    """Bytes that are no text in the encoding make their row bad, and no other."""
    rows = rows_of("a,v\nx,1\n".encode("utf-16") + b"\x00\xd8" + "y,2\nz,3\n".encode("utf-16-le"))
    assert [row.line for row in rows if isinstance(row, Row)] == [2, 4]
    assert [(row.line, row.reason) for row in rows if isinstance(row, BadRow)] == [(3, "not utf-16")]
    rows = rows_of(b"a,v\nx,1\n\x81,2\nz,3\n", "cp1252")
    assert [(row.line, row.reason) for row in rows if isinstance(row, BadRow)] == [(3, "not cp1252")]


@pytest.mark.parametrize("name", ["", "no-such", "hex", "rot13", "zlib", "x" * 10_000, "a\0b", "\udcff", "undefined"])
def test_what_is_no_encoding(name: str) -> None:
    """A name that is no encoding of text is a wrong call."""
    with pytest.raises(Invalid, match="no encoding that is known"):
        check_encoding(name)


def test_line_ends_in_quotes_stay() -> None:
    """CR and LF in a quoted cell are its text, in a file of either line end; the header decides which end lines have."""
    for end in ("\n", "\r\n", "\r"):
        text = end.join(['"a",v', '"x\ny",1', '"x\ry",2', '"x\r\ny",3', ""])
        found = [row.labels[0] for row in rows_of(text.encode()) if isinstance(row, Row)]
        assert found == ["x\ny", "x\ry", "x\r\ny"], end
    header = f'"a\rb{"," * 100_000}'.encode() + b'",v\r\n1,2\r\n'
    assert b"".join(lines_of(header)) == header


@settings(max_examples=10_000 if LONG else 50, deadline=None)
@given(
    st.lists(st.sampled_from([b"\r", b"\n", b'"', b"a", b",", b"\xff", b"\xef\xbb\xbf", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"]))
)
@example([b"\r"])
@example([b"\n", b"\r"])
@example([b'"', b"\r"])
def test_any_bytes_are_lines(parts: list[bytes]) -> None:
    """Bytes come back as they are, but for a byte order mark in front, or are damaged; never another exception."""
    data = b"".join(parts)
    try:
        assert b"".join(lines_of(data)) == data.removeprefix(b"\xef\xbb\xbf")
    except Damaged:
        assert data.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd"))
    for row in rows_of(b"a,v\n" + data):
        assert isinstance(row, BadRow) or row.labels is not None


def test_a_packed_pipe_that_is_stopped() -> None:
    """A signal while a packed pipe is read is no damage: rows before it are whole."""
    reading, writing = os.pipe()
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    os.write(writing, packer.compress(b"a\nb\nc") + packer.flush(zlib.Z_SYNC_FLUSH))
    stopped = threading.Event()
    lines = Lines(reading, stopped.is_set)
    lines.begin()
    assert [next(lines), next(lines)] == [b"a\n", b"b\n"]
    threading.Timer(0.2, stopped.set).start()
    with pytest.raises(Interrupted):
        next(lines)
    os.close(reading)
    os.close(writing)
