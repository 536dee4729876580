"""Laws of a series' state, given its deltas: by arithmetic of fractions and by the law alone.

Nothing here knows how the code under test decides. Where the law leaves a choice, every answer that it allows is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple


class Set(NamedTuple):
    """One delta of a `last` view: which process set it, as which of its sets, and what it said."""

    process: str
    index: int
    ts_ms: int
    value: Any
    recorded_ns: int = 0
    """What the process told the code under test; the law knows the index."""


class Buckets(NamedTuple):
    """The buckets of a histogram, by sign and index."""

    schema: int
    zeros: int
    counts: dict[tuple[int, int], int]


class Found(NamedTuple):
    """The state that an entry holds, whatever its format."""

    total: Any = None
    """Of sums and means, or the number of a min or max; the value of a `last`."""
    error: float = 0.0
    """What is to be added to a float total."""
    count: int = 0
    """Of means."""
    ts_ms: int = 0
    """Of a `last`."""
    least: Any = None
    """Of a histogram, as `most` and `buckets`."""
    most: Any = None
    buckets: Buckets | None = None


def verdict(kind: str, deltas: Sequence[Any], found: Found) -> str:
    """Return what is wrong with a state; empty if the law allows it."""
    if kind == "histogram":
        return _of_histogram(deltas, found) or _of_sum(deltas, found)
    if kind in ("sum", "mean"):
        if kind == "mean" and found.count != len(deltas):
            return f"counts {found.count} of {len(deltas)} deltas"
        return _of_sum(deltas, found)
    if kind in ("min", "max"):
        expected = sorted(deltas)[0 if kind == "min" else -1]
        return (
            "" if found.total == expected and type(found.total) in (int, float) else f"is {found.total!r}, not {expected!r}"
        )
    return _of_last(deltas, found)


def _of_sum(deltas: Sequence[Any], found: Found) -> str:
    exact = sum(map(Fraction, deltas)) if float in map(type, deltas) else sum(deltas)
    if type(exact) is int:
        same = type(found.total) is int and found.total == exact and not found.error
        return "" if same else f"is {found.total!r} and {found.error!r}, not the int {exact}"
    if type(found.total) is not float:
        return f"is {found.total!r}, although a float is among its deltas"
    if Fraction(found.total) + Fraction(found.error) != exact or found.total != float(exact):
        return f"is {found.total!r} and {found.error!r}, not {float(exact)!r}, that is {exact}"
    return ""


def _of_histogram(deltas: Sequence[Any], found: Found) -> str:
    if (found.least, found.most) != (min(deltas), max(deltas)):
        return f"is from {found.least!r} to {found.most!r}, not from {min(deltas)!r} to {max(deltas)!r}"
    zeros = sum(abs(delta) < 2.0**-1022 for delta in deltas)
    places = [((delta > 0) - (delta < 0), _bucket(abs(delta))) for delta in deltas if abs(delta) >= 2.0**-1022]
    schema = next(s for s in range(8, -6, -1) if len({(sign, index >> 8 - s) for sign, index in places}) <= 160)
    expected = Buckets(schema, zeros, Counter((sign, index >> 8 - schema) for sign, index in places))
    return "" if found.buckets == expected else f"has buckets {found.buckets}, not {expected}"


@lru_cache(maxsize=10_000)
def _bucket(value: float) -> int:
    """The bucket of schema 8, whose base has 2 as its 256th power."""
    top, bottom = Fraction(value).as_integer_ratio()
    return (top**256 - 1).bit_length() - 256 * (bottom.bit_length() - 1) - 1


def _of_last(deltas: Sequence[Set], found: Found) -> str:
    newest = max(delta.ts_ms for delta in deltas)
    lasts: dict[str, Set] = {}
    for delta in deltas:
        if delta.ts_ms == newest and (delta.process not in lasts or lasts[delta.process].index < delta.index):
            lasts[delta.process] = delta
    allowed = [delta.value for delta in lasts.values()]
    if found.ts_ms == newest and any(same(found.total, value) for value in allowed):
        return ""
    return f"is {found.total!r} at {found.ts_ms}, not one of {allowed!r} at {newest}"


def same(a: Any, b: Any) -> bool:
    """Equal, and of one type: 1 and 1.0 and True are one to Python."""
    return type(a) is type(b) and bool(a == b)
