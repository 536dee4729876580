"""The kind `last`: the newest value, by its own timestamp and then by when it was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import msgspec

from pipeline.core.kinds.base import STATE_INT_BYTES_MAX, Kind, State, encode, from_wire, number, to_wire
from pipeline.errors import BadRecord, Invalid

TEXT_BYTES_MAX = 65_536
"""Bytes of the longest text of a `last` view."""
TS_MS_MAX = 2**53
RECORDED_NS_MAX = 2**63 - 1
_newness = itemgetter(0, 1)
_decode_triples = msgspec.msgpack.Decoder(
    list[tuple[int, int, int | float | str | bool | msgspec.msgpack.Ext | None]]
).decode


def _newer(a: State, b: State) -> State:
    if a[:2] != b[:2]:
        return a if a[:2] > b[:2] else b
    return a if encode(to_wire([a[2]])) >= encode(to_wire([b[2]])) else b


def _is_long(text: str) -> bool:
    if len(text) * 4 <= TEXT_BYTES_MAX:
        return False
    return len(text) > TEXT_BYTES_MAX or len(text.encode("utf-8", "replace")) > TEXT_BYTES_MAX


def check_ahead(ts_ms: int, now_ms: int, ahead_max_ms: int) -> None:
    """Raise `Invalid` if a timestamp is so far ahead of now that a task would refuse it: it would silence its series."""
    if ts_ms > now_ms + ahead_max_ms:
        raise Invalid(f"ts_ms {ts_ms} is {ts_ms - now_ms} ms ahead of now; at most {ahead_max_ms} (ts_ahead_max_ms)")


class Last(Kind):
    """The newest value: the greater (`ts_ms`, `recorded_ns`), and of two with the same the one with the larger encoding.

    `ts_ms` is given by the caller, or now. `recorded_ns` rises within a process with every value that is set, so that the
    later of two values in one millisecond wins.
    """

    name = "last"
    method = "set"
    merge = staticmethod(_newer)

    def check(self, value: object, ts_ms: int = 0, recorded_ns: int = 0) -> Any:
        if type(ts_ms) is not int or not 0 <= ts_ms <= TS_MS_MAX:
            raise Invalid(f"ts_ms is milliseconds since 1970 as an int, 0 to {TS_MS_MAX}; got {ts_ms!r:.50}")
        if value is None or isinstance(value, bool):
            return ts_ms, recorded_ns, value
        if isinstance(value, str):
            if _is_long(value):
                raise Invalid(f"a text of over {TEXT_BYTES_MAX} bytes")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise Invalid("a text that is not valid Unicode (lone surrogate)") from None
            return ts_ms, recorded_ns, str.__str__(value)  # plain, also from an Enum
        try:
            return ts_ms, recorded_ns, number(value)
        except Invalid as error:
            raise Invalid(f"text, a number, a bool or None is needed: {error}") from None

    def collect(self, deltas: Sequence[Any]) -> State:
        return max(reversed(deltas), key=_newness)  # `max` returns the first of equals, which here was recorded last

    def decode_deltas(self, encoded: bytes) -> list[Any]:
        rows = _decode_triples(encoded)
        return self.from_columns([[row[i] for row in rows] for i in range(3)], len(rows))

    def to_columns(self, states: list[State]) -> list[list[Any]]:
        return [[state[i] for state in states] for i in range(3)]

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        stamps, recorded, values = self._columns(columns, 3, count)
        if any(type(ts) is not int or not 0 <= ts <= TS_MS_MAX for ts in stamps):
            raise BadRecord("last: a timestamp out of range")
        if any(type(ns) is not int or not 0 <= ns <= RECORDED_NS_MAX for ns in recorded):
            raise BadRecord("last: a time of recording out of range")
        plain = [0 if value is None or type(value) in (str, bool) else value for value in values]
        narrow = from_wire(plain, "last", int_bytes_max)
        if any(type(value) is str and _is_long(value) for value in values):
            raise BadRecord(f"last: a text of over {TEXT_BYTES_MAX} bytes")
        values = [v if v is None or type(v) in (str, bool) else n for v, n in zip(values, narrow, strict=True)]
        return list(zip(stamps, recorded, values, strict=True))

    def check_times(self, states: Sequence[State], latest_ms: int) -> None:
        if (newest := max((state[0] for state in states), default=0)) > latest_ms:
            raise BadRecord(f"last: a timestamp of {newest}; at most {latest_ms}")

    def answer(self, state: State) -> Any:
        return state[2]
