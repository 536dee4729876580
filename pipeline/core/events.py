"""Server-sent events as bytes of a stream bring them: the format of the HTML standard, section "Server-sent events"."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.errors import BadRecord

_LINE_BYTES = 50
"""Memory of a line beside its text."""


class ServerEvent(NamedTuple):
    """One event of a stream."""

    name: str
    data: bytes
    id: str
    """Id of this event or, if it has none, of the last one that had."""


class EventParser:
    """Makes events of bytes, however they are cut. Lines end with LF or CR LF."""

    def __init__(self, bytes_max: int) -> None:
        """Raise `BadRecord`, in `feed`, for an event of over `bytes_max` bytes."""
        self._bytes_max = bytes_max
        self._size = 0
        """Number of bytes since the last empty line, without those in `_rest`."""
        self._rest = bytearray()
        """Bytes after the last line end."""
        self._searched = 0
        """Number of bytes in `_rest` that are known to hold no line end."""
        self._name = ""
        self._data: list[bytes] = []
        self._id = ""
        self._within = False
        """True after a line that no empty line has followed."""

    @property
    def within_event(self) -> bool:
        """True if the last bytes began an event that is not complete."""
        return self._within or bool(self._rest)

    def feed(self, data: bytes) -> list[ServerEvent]:
        """Return the events that are complete with these bytes."""
        rest = self._rest
        rest += data
        events: list[ServerEvent] = []
        start = 0
        while (end := rest.find(b"\n", max(start, self._searched))) >= 0:
            event = self._line(bytes(rest[start:end]).removesuffix(b"\r"))
            if event is not None:
                events.append(event)
            start = end + 1
        del rest[:start]
        if self._size + len(rest) > self._bytes_max:
            raise BadRecord(f"an event of over {self._bytes_max} bytes")
        self._searched = len(rest)
        return events

    def _line(self, line: bytes) -> ServerEvent | None:
        self._within = bool(line)
        self._size += len(line) + _LINE_BYTES
        if not line:
            self._size = 0
            event = ServerEvent(self._name or "message", b"\n".join(self._data), self._id) if self._data else None
            self._name, self._data = "", []
            return event
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = value.decode(errors="replace")
        elif field == b"id" and b"\0" not in value and b"\r" not in value:
            self._id = value.decode("latin-1")
        return None  # comments, and fields of later versions of the format
