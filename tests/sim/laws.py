"""Laws of a series' state, given its deltas: by arithmetic of fractions and by the law alone.

Nothing here knows how the code under test decides. Where the law leaves a choice, every answer that it allows is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple


class Set(NamedTuple):
    """One delta of a `last` view: the process that set it, its number among the sets of that process, and its value."""

    process: str
    index: int
    ts_ms: int
    value: Any
    recorded_ns: int = 0
    """Time that the process gave to the code under test; the law uses only the index."""


class Found(NamedTuple):
    """The state that an entry holds, whatever its format."""

    total: Any = None
    """Total of a sum or mean, number of a min or max, value of a `last`."""
    error: float = 0.0
    """Rounding error to add to a float total."""
    count: int = 0
    """Number of values in a mean."""
    ts_ms: int = 0
    """Timestamp of a `last`."""
    least: Any = None
    most: Any = None
    items: tuple[Any, ...] = ()
    """Hashes of a distinct's items; for a topk: item, count, item, count, ..."""
    buckets: tuple[int, ...] = ()
    """Buckets as they travel: schema, zeros, number of negative buckets, then index, count, gap, count, gap, ..."""


def verdict(kind: str, deltas: Sequence[Any], found: Found) -> str:
    """Return what is wrong with a state; empty if the law allows it."""
    if kind in ("sum", "mean"):
        if kind == "mean" and found.count != len(deltas):
            return f"counts {found.count} of {len(deltas)} deltas"
        return _of_sum(deltas, found)
    if kind in ("min", "max"):
        expected = sorted(deltas)[0 if kind == "min" else -1]
        return (
            "" if found.total == expected and type(found.total) in (int, float) else f"is {found.total!r}, not {expected!r}"
        )
    if kind == "distinct":
        return "" if found.items == (expected := tuple(sorted({*deltas}))) else f"has {found.items}, not {expected}"
    if kind == "topk":
        return _of_topk(deltas, found)
    return _of_histogram(deltas, found) if kind == "histogram" else _of_last(deltas, found)


def _of_topk(deltas: Sequence[tuple[str, int]], found: Found) -> str:
    """Check counts, which are exact for so few items."""
    counts: dict[str, int] = {}
    for item, count in deltas:
        counts[item] = counts.get(item, 0) + count
    expected = sum(counts.values()), 0, tuple(part for row in sorted(counts.items()) for part in row)
    return "" if (found.total, found.error, found.items) == expected else f"is {found}, not {expected}"


FINEST = 8
"""Schema of a histogram whose buckets are few enough."""
BUCKETS_MAX = 160
_LEAST = Fraction(2) ** -1022


def _of_histogram(deltas: Sequence[Any], found: Found) -> str:
    if wrong := _of_sum(deltas, found):
        return wrong
    if (found.least, found.most) != (min(deltas), max(deltas)):
        return f"is from {found.least} to {found.most}, not from {min(deltas)} to {max(deltas)}"
    schema, zeros, negative_count, *rest = found.buckets
    signs: tuple[dict[int, int], dict[int, int]] = {}, {}
    for delta in deltas:
        if abs(Fraction(delta)) >= _LEAST:
            buckets = signs[delta > 0]
            place = _bucket(abs(Fraction(delta)))
            buckets[place] = buckets.get(place, 0) + 1
    finest = FINEST
    while sum(map(len, signs)) > BUCKETS_MAX:
        finest -= 1
        signs = _halved(signs[False]), _halved(signs[True])
    expected: list[int] = []
    for buckets in signs:
        before = None
        for place, count in sorted(buckets.items()):
            expected += place if before is None else place - before - 1, count
            before = place
    small = sum(abs(Fraction(delta)) < _LEAST for delta in deltas)
    if (schema, zeros, negative_count, rest) != (finest, small, len(signs[False]), expected):
        return f"has buckets {found.buckets}, not {(finest, small, len(signs[False]), *expected)}"
    return ""


def _halved(buckets: Mapping[int, int]) -> dict[int, int]:
    """Return the buckets of half the resolution: two neighbours make one."""
    halves: Counter[int] = Counter()
    for place, count in buckets.items():
        halves[place // 2] += count
    return dict(halves)


@lru_cache(maxsize=10_000)
def _bucket(number: Fraction) -> int:
    """Return the i for which base**i < number <= base**(i + 1), where the base is the root of 2 of order 2**FINEST."""
    order = 2**FINEST
    power = number**order
    place = (power.numerator.bit_length() - power.denominator.bit_length()) - 2
    while Fraction(2) ** (place + 1) < power:
        place += 1
    return place


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
    """Return whether two values are equal and of one type: 1, 1.0 and True are equal in Python."""
    return type(a) is type(b) and bool(a == b)
