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
    """A definition, as the publisher meant it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    monotone: bool = False

    def as_stored(self) -> list[Any]:
        """Return the expected value of a definition entry, without default values at its end."""
        return [self.name, self.kind, list(self.labels), *[0, True] * self.monotone]


Series = tuple[View, tuple[str, ...]]


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
    """An entry's value, without its version; ints that travelled as bytes are ints again."""
    check(value[:1] == VERSION, "an entry of another version")
    found = msgspec.msgpack.decode(value[1:])
    return [_number(item) for item in found]


def _number(item: Any) -> Any:
    return int.from_bytes(item.data, "big", signed=True) if isinstance(item, msgspec.msgpack.Ext) else item


def state(value: bytes) -> tuple[str, Found]:
    """The kind and state of a series' entry."""
    kind, expires_at_ms, *columns = unpack(value)
    check(expires_at_ms == 0, "a series that expires")
    if kind == "last":
        ts_ms, _, said = columns
        return kind, Found(said, ts_ms=ts_ms)
    total, error = columns[0] if isinstance(columns[0], list) else (columns[0], 0.0)
    return kind, Found(total, error, columns[1] if kind == "mean" else 0)


@lru_cache(maxsize=10_000)
def series_prefix(view: View) -> bytes:
    """Return the prefix of the keys of a definition's series."""
    definition_id = sha256(msgspec.msgpack.encode(view.as_stored())).digest()[:8]
    return SERIES + view.name.encode() + b"\x00" + definition_id


def key_of(series: Series) -> bytes:
    """The key of a series' entry."""
    return series_prefix(series[0]) + bytes(8) + msgspec.msgpack.encode(series[1])


def definition_key(view: View) -> bytes:
    """The key of a definition's entry."""
    return DEFINITION + series_prefix(view)[1:]


def overflow_key(view: View) -> bytes:
    """The key of the series that takes in what is beyond the limit."""
    return key_of((view, (OVERFLOW,) * len(view.labels)))
