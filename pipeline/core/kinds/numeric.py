"""Kinds over numbers: sum (monotone or not), min, max and mean.

A sum is an exact int as long as only ints are added. Once a float joins, it is a float and the error term that the
additions so far have left, so that no delta vanishes beside a large one: TwoSum (Knuth, The Art of Computer Programming,
volume 2, section 4.2.2) keeps what an addition of floats rounds away. An error of zero is left out, so most float sums are
plain floats. A sum that no float can hold goes on as an int: no state is ever an infinity or NaN.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import chain
from math import fsum, isfinite
from typing import Any, cast

from pipeline.core.kinds.base import PLAIN, STATE_INT_BYTES_MAX, Kind, State, check_finite, from_wire, number, numbers
from pipeline.errors import BadRecord, Invalid

Total = int | float | tuple[float, float]
"""State of a sum: an exact int, a float, or a float and its error term, not zero and smaller than the float's last bit."""


def add(a: Total, b: Total) -> Total:
    """Return the sum of two sums."""
    if type(a) is int and type(b) is int:
        return a + b
    try:
        # Written out, without calls: a worker does this for each float that it folds.
        if type(a) is float:
            a_high, a_low = a, 0.0
        else:
            a_high, a_low = a if type(a) is tuple else _as_floats(a)  # type: ignore[arg-type]  # an int
        if type(b) is float:
            b_high, b_low = b, 0.0
        else:
            b_high, b_low = b if type(b) is tuple else _as_floats(b)  # type: ignore[arg-type]  # an int
    except OverflowError:
        return _add_exactly(a, b)
    total = a_high + b_high
    part = total - a_high
    error = (a_high - (total - part)) + (b_high - part) + (a_low + b_low)
    if not error:  # false for NaN, which an overflow leaves
        return total
    high = total + error
    part = high - total
    low = (total - (high - part)) + (error - part)
    if not low:
        return high
    return (high, low) if isfinite(low) else _add_exactly(a, b)


def _as_floats(value: int) -> tuple[float, float]:
    high = float(value)
    return high, float(value - int(high))


def _add_exactly(a: Total, b: Total) -> int:
    """Return the sum as an int, for sums so large that the last bit of a float is far above one."""
    parts = [*(a if type(a) is tuple else (a,)), *(b if type(b) is tuple else (b,))]
    return sum(map(int, parts))


def total_of(deltas: Sequence[int | float]) -> Total:
    """Return the sum of plain numbers; a sum of floats only is exact to the last bit of the error term."""
    if len(deltas) == 1:
        return deltas[0]
    types, totals = set(map(type, deltas)), cast("Sequence[Total]", deltas)
    if types == {int}:
        return sum(deltas)
    if types == {float}:
        try:
            high = fsum(deltas)
            low = fsum(chain(deltas, (-high,)))
        except OverflowError:
            return reduce(add, totals)
        # The error term was rounded, too: it can be half of the last bit, and then the float must be the next one.
        return add(high, low) if low else high
    return reduce(add, totals)


def _quotient(total: Total, count: int) -> int | float:
    """Return `total` by `count`, where one of them, or the quotient of two ints, is beyond all floats."""
    if type(total) is int:
        return total // count
    high: float = total[0] if type(total) is tuple else total  # type: ignore[assignment]  # no tuple
    numerator, denominator = high.as_integer_ratio()
    return numerator / (denominator * count)


def _plain(fold: Callable[[Sequence[Any]], Any], deltas: Sequence[Any]) -> Any:
    """Return `fold(deltas)`, with each delta as a plain number."""
    return fold(deltas if PLAIN.issuperset(map(type, deltas)) else numbers(deltas))


def totals(column: list[Any], what: str, int_bytes_max: int) -> list[Total]:
    """Return the sums of a column from outside. Raises `BadRecord` unless each is one that `add` can return."""
    pairs = [v for v in column if type(v) is tuple] if tuple in set(map(type, column)) else []
    if not pairs:
        return from_wire(column, what, int_bytes_max)
    check_finite(chain.from_iterable(pairs), what)
    if not all(low and high + low == high for high, low in pairs):
        raise BadRecord(f"{what}: an error term that is zero, or larger than the last bit of its float")
    plain = iter(from_wire([v for v in column if type(v) is not tuple], what, int_bytes_max))
    return [v if type(v) is tuple else next(plain) for v in column]


class Sum(Kind):
    """Total of all deltas."""

    name = "sum"
    method = "add"
    single = True
    merge = staticmethod(add)

    def merge_all(self, a: Sequence[State], b: Sequence[State]) -> list[State]:
        ints = {int}.issuperset(map(type, a)) and {int}.issuperset(map(type, b))
        return [*map(operator.add if ints else add, a, b)]

    def collect(self, deltas: Sequence[Any]) -> State:
        return _plain(total_of, deltas)

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        return totals(self._one_column(columns, count), "sum", int_bytes_max)

    def answer(self, state: State) -> Any:
        return state[0] if type(state) is tuple else state


class MonotoneSum(Sum):
    """Total of deltas none of which is negative. States are those of `Sum`; `kind_of` returns this kind."""

    def check(self, value: object, ts_ms: int = 0, recorded_ns: int = 0) -> Any:
        delta = number(value)
        if delta < 0:
            raise Invalid("a monotone sum takes no negative number")
        return delta

    def are_plain(self, values: Sequence[Any]) -> bool:
        return super().are_plain(values) and min(values, default=0) >= 0

    def collect(self, deltas: Sequence[Any]) -> State:
        # Plain numbers are what they were when they were checked; other objects may have changed since.
        if not PLAIN.issuperset(map(type, deltas)):
            deltas = [self.check(delta) for delta in deltas]
        return total_of(deltas)

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        column = super().from_columns(columns, count, int_bytes_max)
        if any((v[0] if type(v) is tuple else v) < 0 for v in column):
            raise BadRecord("sum: negative, in a monotone view")
        return column


class Min(Kind):
    """Smallest delta."""

    name = "min"
    method = "observe"
    single = True
    merge = staticmethod(min)

    def collect(self, deltas: Sequence[Any]) -> State:
        return _plain(min, deltas)

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        return from_wire(self._one_column(columns, count), self.name, int_bytes_max)


class Max(Min):
    """Largest delta."""

    name = "max"
    merge = staticmethod(max)

    def collect(self, deltas: Sequence[Any]) -> State:
        return _plain(max, deltas)


class Mean(Kind):
    """Arithmetic mean of all deltas, kept as their sum and count."""

    name = "mean"
    method = "observe"

    @staticmethod
    def merge(a: State, b: State) -> State:
        return add(a[0], b[0]), a[1] + b[1]

    def collect(self, deltas: Sequence[Any]) -> State:
        return _plain(total_of, deltas), len(deltas)

    def delta_of(self, state: State) -> Any:
        return state[0]

    def to_columns(self, states: list[State]) -> list[list[Any]]:
        return [[state[0] for state in states], [state[1] for state in states]]

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        sums, counts = self._columns(columns, 2, count)
        sums, counts = totals(sums, "mean", int_bytes_max), from_wire(counts, "mean", int_bytes_max)
        if any(type(n) is not int or n < 1 for n in counts):
            raise BadRecord("mean: a count below 1")
        return list(zip(sums, counts, strict=True))

    def answer(self, state: State) -> Any:
        total, count = state
        try:
            return total[0] / count + total[1] / count if type(total) is tuple else total / count
        except OverflowError:
            return _quotient(total, count)
