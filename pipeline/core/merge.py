"""One algebra for buffers, batches, overlays, stores and answers.

Every kind is a commutative monoid over its *states*: `merge` is associative and commutative, and merging nothing is the
identity (a series without deltas has no entry). So deltas can be merged wherever they meet, in any grouping and order,
and the answer is the same; sums of floats can differ in their last bits, as addition of floats does.

| kind | state |
|---|---|
| sum | int (exact at any size) or float; of a monotone one never below 0 |
| min, max | int or float, finite |
| mean | (sum, count) |
| last | (ts_ms, value) |

A sum of finite floats can overflow to an infinity; it stays one, and answers show it as null.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from math import inf, isfinite, ldexp
from operator import index
from typing import Any, ClassVar

import msgspec
from msgspec.msgpack import Ext

from pipeline.core.record import Definition
from pipeline.errors import BadRecord, Invalid

State = Any
"""A state of some kind: see the table above."""

INT_BITS_MAX = 8_192
"""Largest recorded int. Sums grow beyond it; 2**64 of the largest stay printable (Python prints up to 4,300 digits)."""
BATCH_INT_BYTES_MAX = 1_040
"""Longest int in a batch: the largest recorded int, merged more often than anybody can."""
STATE_INT_BYTES_MAX = 1_100
"""Longest int in a state. Batches stay so far below it that no number of them reaches it."""
TEXT_BYTES_MAX = 65_536
"""Longest text of a `last` view."""
TS_MS_MAX = 2**53

_INT64_MIN, _UINT64_MAX = -(2**63), 2**64 - 1
_PLAIN = frozenset((int, float))
_NUMBER_TYPES = frozenset((int, float, Ext))
_LONG_INT = 1
"""The msgpack extension type of ints beyond 64 bits: signed, big endian."""
_encode = msgspec.msgpack.Encoder().encode


def number(value: object) -> int | float:
    """`value` as an int or a finite float; `Invalid` if it is neither.

    Bools are ints, as in Python. Other numbers (NumPy, Decimal, Fraction) become ints if they are integral types and
    floats if not.
    """
    kind = type(value)
    if kind is float:
        if isfinite(value):  # type: ignore[arg-type]
            return value  # type: ignore[return-value]
        raise Invalid(f"a finite number is needed, got {value}")
    if kind is not int:
        if isinstance(value, str | bytes | bytearray) or value is None:
            raise Invalid(f"a number is needed, got {type(value).__name__}")
        try:
            value = index(value)  # type: ignore[arg-type]
        except TypeError:
            try:
                return number(ldexp(value, 0))  # type: ignore[arg-type]  # float() would read text and buffers too
            except (TypeError, ValueError, OverflowError):
                raise Invalid(f"a number is needed, got {type(value).__name__}") from None
    if value.bit_length() > INT_BITS_MAX:  # type: ignore[attr-defined]
        raise Invalid(f"an int of {value.bit_length()} bits; at most {INT_BITS_MAX}")  # type: ignore[attr-defined]
    return value  # type: ignore[return-value]


def numbers(values: Sequence[Any]) -> Sequence[int | float]:
    """`values`, each as by `number`; unchanged when they are plain already."""
    return values if _PLAIN.issuperset(map(type, values)) else [number(value) for value in values]


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return inf if value > 0 else -inf


def add(a: int | float, b: int | float) -> int | float:
    """Exact for ints; for floats it saturates to infinity instead of raising."""
    try:
        return a + b
    except OverflowError:
        return _as_float(a) + _as_float(b)


def _sum(values: Sequence[int | float]) -> int | float:
    try:
        return sum(values)
    except OverflowError:
        return reduce(add, values)


def _plain(fold: Callable[[Sequence[Any]], Any], deltas: Sequence[Any]) -> int | float:
    """`fold(deltas)` as a plain number. One that is not plain among them shows in the type of what they fold to."""
    try:
        state = fold(deltas)
        if type(state) in _PLAIN:
            return state  # type: ignore[no-any-return]
    except Exception:  # they do not mix, or warn, as NumPy's do: plain ones will not
        pass
    return fold(numbers(deltas))  # type: ignore[no-any-return]


def _widen(column: list[Any]) -> list[Any]:
    """Ints beyond 64 bits as an extension type, because msgpack has no such ints."""
    return [
        Ext(_LONG_INT, v.to_bytes(v.bit_length() // 8 + 1, "big", signed=True))
        if type(v) is int and not _INT64_MIN <= v <= _UINT64_MAX
        else v
        for v in column
    ]


def _narrow(column: list[Any], what: str, int_bytes_max: int) -> list[Any]:
    """The inverse of `_widen`; `BadRecord` unless every value is a number."""
    types = set(map(type, column))
    if not _NUMBER_TYPES.issuperset(types):
        raise BadRecord(f"{what}: a number is needed")
    if Ext not in types:
        return column
    if any(type(v) is Ext and (v.code != _LONG_INT or memoryview(v.data).nbytes > int_bytes_max) for v in column):
        raise BadRecord(f"{what}: an int of over {int_bytes_max} bytes, or another extension type")
    return [int.from_bytes(v.data, "big", signed=True) if type(v) is Ext else v for v in column]


def _check_finite(column: list[Any], what: str) -> None:
    if any(type(v) is float and not isfinite(v) for v in column):
        raise BadRecord(f"{what}: not finite")


class Kind:
    """What one kind of view does with deltas and states. Instances are stateless; `KINDS` holds one of each."""

    name: ClassVar[str]
    method: ClassVar[str]
    """What recording a delta is called: `add`, `observe` or `set`."""
    single: ClassVar[bool] = False
    """Whether the state of one delta is that delta."""
    merge: Callable[[State, State], State]
    """The monoid's operation. May return either argument; arguments are never changed."""

    def check(self, value: object, ts_ms: int) -> Any:
        """`value` as one raw delta, or `Invalid`. `ts_ms` matters to kinds that order deltas."""
        return number(value)

    def are_plain(self, values: Sequence[Any]) -> bool:
        """Whether `check` would surely return each number of `values` as it is; False says nothing."""
        try:
            return _PLAIN.issuperset(map(type, values)) and all(map(isfinite, values))
        except OverflowError:  # an int beyond all floats
            return False

    def collect(self, deltas: Sequence[Any]) -> State:
        """The state of a non-empty run of raw deltas, as `check` returns them."""
        raise NotImplementedError

    def to_columns(self, states: list[State]) -> list[list[Any]]:
        """States as columns that msgpack can carry, once `to_wire` has seen to large ints."""
        return [states]

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        """The inverse of `to_columns`, from untrusted input: `BadRecord` unless it is `count` states of this kind."""
        raise NotImplementedError

    def answer(self, state: State) -> Any:
        """What a reader sees: a number, text, bool or None."""
        return state if type(state) is not float or isfinite(state) else None

    def _one_column(self, columns: list[list[Any]], count: int) -> list[Any]:
        return self._columns(columns, 1, count)[0]

    def _columns(self, columns: list[list[Any]], width: int, count: int) -> list[list[Any]]:
        if len(columns) != width or any(len(column) != count for column in columns):
            raise BadRecord(f"kind {self.name}: {width} columns of {count} values expected")
        return columns


class Sum(Kind):
    """The total of all deltas."""

    name = "sum"
    method = "add"
    single = True
    merge = staticmethod(add)

    def collect(self, deltas: Sequence[Any]) -> State:
        return _plain(_sum, deltas)

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        return _narrow(self._one_column(columns, count), "sum", int_bytes_max)


class MonotoneSum(Sum):
    """The total of deltas none of which is negative. Its states are those of a sum; `kind_of` finds it."""

    def check(self, value: object, ts_ms: int) -> Any:
        delta = number(value)
        if delta < 0:
            raise Invalid("a monotone sum takes no negative number")
        return delta

    def are_plain(self, values: Sequence[Any]) -> bool:
        return super().are_plain(values) and min(values, default=0) >= 0

    def collect(self, deltas: Sequence[Any]) -> State:
        # Plain numbers are what they were when they were checked; other objects may have changed since.
        if not _PLAIN.issuperset(map(type, deltas)):
            deltas = [self.check(delta, 0) for delta in deltas]
        return _sum(deltas)

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        column = super().from_columns(columns, count, int_bytes_max)
        if [v for v in column if not v >= 0]:  # `not >=` finds NaN, too
            raise BadRecord("sum: negative, in a monotone view")
        return column


class Min(Kind):
    """The smallest delta."""

    name = "min"
    method = "observe"
    single = True
    merge = staticmethod(min)

    def collect(self, deltas: Sequence[Any]) -> State:
        return _plain(min, deltas)

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        column = _narrow(self._one_column(columns, count), self.name, int_bytes_max)
        _check_finite(column, self.name)
        return column


class Max(Min):
    """The largest delta."""

    name = "max"
    merge = staticmethod(max)

    def collect(self, deltas: Sequence[Any]) -> State:
        return _plain(max, deltas)


class Mean(Kind):
    """The arithmetic mean of all deltas, kept as their sum and count."""

    name = "mean"
    method = "observe"

    @staticmethod
    def merge(a: State, b: State) -> State:
        return add(a[0], b[0]), a[1] + b[1]

    def collect(self, deltas: Sequence[Any]) -> State:
        return _plain(_sum, deltas), len(deltas)

    def to_columns(self, states: list[State]) -> list[list[Any]]:
        return [[state[0] for state in states], [state[1] for state in states]]

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        sums, counts = self._columns(columns, 2, count)
        sums, counts = _narrow(sums, "mean", int_bytes_max), _narrow(counts, "mean", int_bytes_max)
        if any(type(n) is not int or n < 1 for n in counts):
            raise BadRecord("mean: a count below 1")
        return list(zip(sums, counts, strict=True))

    def answer(self, state: State) -> Any:
        total, count = state
        try:
            return super().answer(total / count)
        except OverflowError:
            return total // count if type(total) is int else super().answer(total / inf)


def _last(a: State, b: State) -> State:
    if a[0] != b[0]:
        return a if a[0] > b[0] else b
    return a if _encode(_widen([a[1]])) >= _encode(_widen([b[1]])) else b


def _is_long(text: str) -> bool:
    if len(text) * 4 <= TEXT_BYTES_MAX:
        return False
    return len(text) > TEXT_BYTES_MAX or len(text.encode("utf-8", "replace")) > TEXT_BYTES_MAX


class Last(Kind):
    """The newest value by its own timestamp; of two with one timestamp, the one with the larger encoding."""

    name = "last"
    method = "set"
    merge = staticmethod(_last)

    def check(self, value: object, ts_ms: int) -> Any:
        if type(ts_ms) is not int or not 0 <= ts_ms <= TS_MS_MAX:
            raise Invalid(f"ts_ms is milliseconds since 1970 as an int, 0 to {TS_MS_MAX}; got {ts_ms!r:.50}")
        if value is None or isinstance(value, bool):
            return ts_ms, value
        if isinstance(value, str):
            if _is_long(value):
                raise Invalid(f"a text of over {TEXT_BYTES_MAX} bytes")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise Invalid("a text that is not valid Unicode (lone surrogate)") from None
            return ts_ms, str.__str__(value)  # plain, also from an Enum
        try:
            return ts_ms, number(value)
        except Invalid as error:
            raise Invalid(f"text, a number, a bool or None is needed: {error}") from None

    def collect(self, deltas: Sequence[Any]) -> State:
        return reduce(_last, deltas)

    def to_columns(self, states: list[State]) -> list[list[Any]]:
        return [[state[0] for state in states], [state[1] for state in states]]

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        stamps, values = self._columns(columns, 2, count)
        if any(type(ts) is not int or not 0 <= ts <= TS_MS_MAX for ts in stamps):
            raise BadRecord("last: a timestamp out of range")
        plain = [0 if value is None or type(value) in (str, bool) else value for value in values]
        narrow = _narrow(plain, "last", int_bytes_max)
        _check_finite(narrow, "last")
        if any(type(value) is str and _is_long(value) for value in values):
            raise BadRecord(f"last: a text of over {TEXT_BYTES_MAX} bytes")
        values = [v if v is None or type(v) in (str, bool) else n for v, n in zip(values, narrow, strict=True)]
        return list(zip(stamps, values, strict=True))

    def answer(self, state: State) -> Any:
        return state[1]


KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (Sum(), Min(), Max(), Mean(), Last())}
"""Every kind by name."""

KIND_NAMES: tuple[str, ...] = tuple(KINDS)
_MONOTONE_SUM = MonotoneSum()


def kind_of(definition: Definition) -> Kind:
    """What takes in deltas of a view, and states from outside. For merging and storing, `KINDS` is enough."""
    return _MONOTONE_SUM if definition.monotone else KINDS[definition.kind]


def to_wire(column: list[Any]) -> list[Any]:
    """A column with ints beyond 64 bits replaced, so that msgpack can carry it. Costs one pass: call it on overflow."""
    return _widen(column)
