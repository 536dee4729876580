"""Reads a file or a pipe as lines of UTF-8: unpacked, decoded, with any line ends, in bounded memory.

What it is packed with, its encoding and its line ends are told by its first bytes, not by its name.
"""

from __future__ import annotations

import codecs
import os
import re
import select
import sys
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader, RawIOBase
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import Invalid
from pipeline.threads import POLL_INTERVAL_S

ROW_BYTES_MAX = 1_048_576
"""Longest row, of one line or of several in a quoted cell; a longer row is bad."""

_BUFFER_BYTES = 262_144
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, each with the encoding that reads it; that of UTF-32 begins with that of UTF-16."""
_BOM_CHARACTER = "\ufeff"
_CR_AS_LF = bytes.maketrans(b"\r\n", b"\n\r")
_BAD = "\udcff"
"""A stand-in for bytes that are none of their encoding: it becomes bytes that are none of UTF-8, so its row is bad."""
_BAD_BYTES = "pipeline.bad_bytes"
codecs.register_error(_BAD_BYTES, lambda error: (_BAD, error.end if isinstance(error, UnicodeDecodeError) else 0))


class Interrupted(Exception):
    """Raised when reading was asked to stop; all rows before were whole."""


class Damaged(Exception):
    """Raised where packed input is damaged or ends early; what it holds from there on is not known."""


def check_encoding(name: str) -> None:
    """Raise `Invalid` if Python knows no text encoding of this name."""
    try:
        codecs.getincrementaldecoder(name)().decode(b"", True)
        b"a".decode(name, "replace")
    except (LookupError, UnicodeError, ValueError, TypeError):
        raise Invalid(
            f"--encoding {name:.50}: no encoding that is known, such as utf-8, latin-1, cp1252 or utf-16"
        ) from None


class Lines(Iterator[bytes]):
    """Numbered lines of a file descriptor, which the caller closes. `begin` starts a row.

    Raises `Invalid` for a row that is too long, whose rest is skipped; `Interrupted` once `stopped` is true; `Damaged`.
    """

    def __init__(self, fd: int, stopped: Callable[[], bool], encoding: str | None = None) -> None:
        """Without an `encoding` a byte order mark says which it is; without that it is UTF-8."""
        self.line = 0
        """Number of the last line that was returned."""
        self.opened_on = 0
        """Line of the row on which a quote was opened last that went on to the next line; 0: none was."""
        self.encoding = encoding or "UTF-8"
        """Name of the encoding, for messages."""
        self._wanted = encoding
        self._is_open = False
        self._source = _Source(fd, stopped)
        self._stopped = stopped
        self._room = 0
        self._swaps = False
        self._stream: BufferedReader | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes that were read from the file descriptor."""
        return self._source.bytes_read

    def begin(self) -> int:
        """Begin a row; return the number of its first line."""
        self._room = ROW_BYTES_MAX
        self.opened_on, self._is_open = 0, False
        return self.line + 1

    def __next__(self) -> bytes:
        if self._stopped():
            raise Interrupted
        line = self._read(self._room + 1)
        if not line.endswith(b"\n") and self._stopped():
            raise Interrupted  # it may be half a line
        if not line:
            raise StopIteration
        self.line += 1
        self._room -= len(line)
        if line.count(b'"') % 2:
            self._is_open = not self._is_open
            if self._is_open:
                self.opened_on = self.line
        if self._room < 0:
            self._skip_rest(line)
            raise Invalid(f"a row of over {ROW_BYTES_MAX} bytes, or a quote that is never closed")
        return line.translate(_CR_AS_LF) if self._swaps else line

    def _read(self, size: int) -> bytes:
        try:
            if self._stream is None:
                self._stream = self._open()
            return self._stream.readline(size)
        except Damaged:
            if self._stopped():  # the end of the input is that of the time for it
                raise Interrupted from None
            raise

    def _open(self) -> BufferedReader:
        decoded, self.encoding = _decoded(_unpacked(iter(self._source)), self._wanted)
        chunks, self._swaps = _with_line_feeds(decoded)
        return BufferedReader(_Chunks(chunks), _BUFFER_BYTES)

    def _skip_rest(self, line: bytes) -> None:
        while line and not line.endswith(b"\n"):
            if self._stopped():
                raise Interrupted
            line = self._read(_BUFFER_BYTES)


class _Source:
    """Chunks of a file descriptor of the caller's; they end when `stopped` turns true, even while no bytes arrive."""

    def __init__(self, fd: int, stopped: Callable[[], bool]) -> None:
        self.bytes_read = 0
        self._fd = fd
        self._stopped = stopped

    def __iter__(self) -> Iterator[bytes]:
        while True:
            while not select.select([self._fd], [], [], POLL_INTERVAL_S)[0]:
                if self._stopped():
                    return
            data = os.read(self._fd, _BUFFER_BYTES)
            if not data:
                return
            self.bytes_read += len(data)
            yield data


class _Chunks(RawIOBase):
    """A stream of chunks of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            data = next(self._chunks, None)
            if data is None:
                return 0
            self._rest = memoryview(data)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _headed(chunks: Iterator[bytes], is_enough: Callable[[bytes], bool]) -> tuple[bytes, Iterator[bytes]]:
    """Return the first bytes, as many as are enough or there are, and all chunks."""
    head = b""
    for data in chunks:
        head += data
        if is_enough(head):
            break
    return head, chain((head,), chunks)


# What is packed


class _Unpacker(Protocol):
    """A decompressor of one frame or member, as those of the standard library."""

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


class _Gunzipper:
    """A `_Unpacker` of a gzip member, which keeps what it has no room for."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 16)

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


def _unpacked(chunks: Iterator[bytes]) -> Iterator[bytes]:
    head, chunks = _headed(chunks, lambda head: len(head) >= len(_ZSTD))
    if head.startswith(_GZIP):
        return _members(chunks, _Gunzipper, zlib.error, "gzip", padding=b"\0")
    if head.startswith(_ZSTD):
        if TYPE_CHECKING or sys.version_info < (3, 14):
            from backports import zstd
        else:
            from compression import zstd
        return _members(chunks, zstd.ZstdDecompressor, zstd.ZstdError, "zstd")
    return chunks


def _members(
    chunks: Iterator[bytes], make: Callable[[], _Unpacker], failure: type[Exception], name: str, padding: bytes = b""
) -> Iterator[bytes]:
    """Yield what gzip members, or zstd frames, one behind the other, hold."""
    unpacker: _Unpacker | None = None
    data = b""
    while True:
        if unpacker is None:
            data = data.lstrip(padding) if padding else data
            if not data:
                if not (data := next(chunks, b"")):
                    return
                continue
            unpacker = make()
        try:
            found, data = unpacker.decompress(data, _BUFFER_BYTES), b""
        except failure as error:
            raise Damaged(f"the {name} data is damaged: {error}") from None
        if found:
            yield found
        elif not unpacker.eof and not (data := next(chunks, b"")):
            raise Damaged(f"the {name} data ends too early")
        if unpacker.eof:
            data, unpacker = unpacker.unused_data, None


# Text


def _decoded(chunks: Iterator[bytes], encoding: str | None) -> tuple[Iterator[bytes], str]:
    """Return the text as UTF-8, without a byte order mark, and the name of its encoding."""
    head, chunks = _headed(chunks, lambda head: len(head) >= 4)
    if encoding is None:
        encoding = next((encoding for bom, encoding in _BOMS if head.startswith(bom)), "utf-8")
    if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig"):
        return _recoded(chunks, encoding), encoding
    return chain((next(chunks, b"").removeprefix(codecs.BOM_UTF8),), chunks), "UTF-8"


def _recoded(chunks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)(errors=_BAD_BYTES)
    is_first = True
    for data in chain(chunks, (b"",)):
        text = decoder.decode(data, final=not data)
        if is_first and text:
            text, is_first = text.removeprefix(_BOM_CHARACTER), False
        yield text.encode("utf-8", "surrogatepass")


_LINE_END = re.compile(rb'"[^"]*"?|\r\n?|\n')


def _with_line_feeds(chunks: Iterator[bytes]) -> tuple[Iterator[bytes], bool]:
    """Return the chunks, and whether CR and LF have changed places in them, because the first line ends with a CR alone."""
    head, chunks = _headed(chunks, lambda head: len(head) >= _BUFFER_BYTES or bool(_first_line_end(head)))
    if _first_line_end(head + b" ") != b"\r":
        return chunks, False
    return (data.translate(_CR_AS_LF) for data in chunks), True


def _first_line_end(head: bytes) -> bytes:
    """Return the first line end that is not in quotes; empty if there is none yet, CR if its LF may be to come."""
    for found in _LINE_END.finditer(head) if b"\r" in head or b"\n" in head else ():
        if found[0][:1] != b'"':
            return b"" if found[0] == b"\r" and found.end() == len(head) else found[0]
    return b""
