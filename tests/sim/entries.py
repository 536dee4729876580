"""The bytes of entries, read by bare msgpack and the layout that the design states, not by the code under test."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

import msgspec

from tests.sim.laws import Found

POSITION, DEFINITION, SERIES, PRODUCER, FENCE, META = b"\x00", b"\x01", b"\x02", b"\x03", b"\x04", b"\xff"
VERSION = b"\x02"
OVERFLOW = "__overflow__"

Entries = dict[bytes, bytes]


class Failure(AssertionError):
    """The code contradicts the count, or the law."""


@dataclass(frozen=True)
class View:
    """A definition, as the publisher means it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    monotone: bool = False
    window_s: int = 0
    retention_s: int = 0

    @property
    def window_ms(self) -> int:
        return self.window_s * 1_000

    @property
    def is_silent(self) -> bool:
        """Return whether the view's series expire when they are silent."""
        return bool(self.retention_s) and not self.window_s

    @property
    def is_spread(self) -> bool:
        """Return whether publishers spread the view's series over several partitions."""
        return self.name[-1] in "0235" and not self.is_silent

    def as_stored(self) -> list[Any]:
        """Return the expected value of a definition entry, without default values at its end."""
        fields = [self.name, self.kind, list(self.labels), self.window_s, self.monotone, self.retention_s]
        while not fields[-1] and len(fields) > 3:
            del fields[-1]
        return fields

    def expired_before_ms(self, now_ms: int) -> int:
        """Return the latest watermark that the view may have at a time."""
        if not self.window_s:
            return now_ms
        return max(0, (now_ms - self.retention_s * 1_000) // self.window_ms * self.window_ms)


Place = tuple[tuple[str, ...], int]
"""Label values, and the start of a window."""
Series = tuple[View, Place]


def check(condition: bool, message: str) -> None:
    """Like assert, but there when Python optimises."""
    if not condition:
        raise Failure(message)


def compare(what: str, got: Entries, expected: Entries) -> None:
    """Raise `Failure` with the keys that differ."""
    if got != expected:
        keys = sorted(k for k in got.keys() | expected.keys() if got.get(k) != expected.get(k))
        raise Failure(f"{what}: " + "; ".join(f"{k!r} is {got.get(k)!r}, not {expected.get(k)!r}" for k in keys[:5]))


def unpack(value: bytes) -> list[Any]:
    """Return an entry's value without its version, with ints that travelled as bytes turned back into ints."""
    check(value[:1] == VERSION, "an entry of another version")
    found = msgspec.msgpack.decode(value[1:])
    return [_number(item) for item in found]


def _number(item: Any) -> Any:
    """Return the long int or the bytes that an extension stands for."""
    if not isinstance(item, msgspec.msgpack.Ext):
        return item
    return int.from_bytes(item.data, "big", signed=True) if item.code == 1 else bytes(item.data)


def state(value: bytes) -> tuple[str, Found]:
    """Return the kind and state of a series' entry."""
    kind, _, *columns = unpack(value)
    return kind, state_of(kind, columns)


def state_of(kind: str, columns: list[Any]) -> Found:
    """Return a state, given its value in each column."""
    if kind == "last":
        ts_ms, _, said = columns
        return Found(said, ts_ms=ts_ms)
    if kind == "distinct":
        packed = columns[0]
        return Found(items=tuple(int.from_bytes(packed[i : i + 8], "big", signed=True) for i in range(0, len(packed), 8)))
    if kind == "topk":
        total, error, packed = columns
        return Found(total, error, items=tuple(msgspec.msgpack.decode(packed)))
    if kind == "histogram":
        total, least, most, packed = columns
        total, error = total if isinstance(total, list) else (total, 0.0)
        buckets = msgspec.msgpack.decode(packed)
        return Found(total, error, least=least, most=most, buckets=tuple(buckets))
    total, error = columns[0] if isinstance(columns[0], list) else (columns[0], 0.0)
    return Found(total, error, columns[1] if kind == "mean" else 0)


def expires_at_ms(value: bytes) -> int:
    """Return the time at which a series' entry expires; 0: never."""
    return int(unpack(value)[1])


def rows_of_letter(value: bytes) -> dict[bytes, Found]:
    """Return the series of the only group of a refused batch, by suffix."""
    ((definition, suffixes, columns),) = msgspec.msgpack.decode(value[9:])[-1]
    kind = definition[1]
    rows = zip(*[[_number(item) for item in column] for column in columns], strict=True)
    return {suffix: state_of(kind, [*row]) for suffix, row in zip(suffixes, rows, strict=True)}


@lru_cache(maxsize=10_000)
def series_prefix(view: View) -> bytes:
    """Return the prefix of the keys of a definition's series."""
    definition_id = sha256(msgspec.msgpack.encode(view.as_stored())).digest()[:8]
    return SERIES + view.name.encode() + b"\x00" + definition_id


def key_of(series: Series) -> bytes:
    """Return the key of a series' entry."""
    view, (labels, start_ms) = series
    return series_prefix(view) + start_ms.to_bytes(8, "big") + msgspec.msgpack.encode(labels)


def start_of(key: bytes, view: View) -> int:
    """Return the start of the window in a series' key."""
    at = len(series_prefix(view))
    return int.from_bytes(key[at : at + 8], "big")


def definition_key(view: View) -> bytes:
    """Return the key of a definition's entry."""
    return DEFINITION + series_prefix(view)[1:]


def overflow_key(view: View, start_ms: int) -> bytes:
    """Return the key of the series that takes in the series beyond the limit in a window."""
    return key_of((view, ((OVERFLOW,) * len(view.labels), start_ms)))
