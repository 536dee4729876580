"""The base class of kinds, plain numbers, and long ints on the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isfinite, ldexp
from operator import index
from typing import Any, ClassVar

import msgspec
from msgspec.msgpack import Ext

from pipeline.errors import BadRecord, Invalid

State = Any
"""State of some kind: see the table in `pipeline.core.kinds`."""

INT_BITS_MAX = 8_192
"""Largest recorded int. Sums grow beyond it; 2**64 of the largest stay printable (Python prints up to 4,300 digits)."""
BATCH_INT_BYTES_MAX = 1_040
"""Longest int in a batch: the largest recorded int, merged more often than anybody can."""
STATE_INT_BYTES_MAX = 1_100
"""Longest int in a state. Batches stay so far below it that no number of them reaches it."""

PLAIN = frozenset((int, float))
_INT64_MIN, _UINT64_MAX = -(2**63), 2**64 - 1
_NUMBER_TYPES = frozenset((int, float, Ext))
_LONG_INT = 1
"""Msgpack extension type of ints beyond 64 bits: signed, big endian."""
PACKED = 2
"""Msgpack extension type of states, or parts of them, that are bytes in a form of their kind."""
SHORT = 2.0**190
"""Numbers up to this size need no check and no memory beyond their own, because they are small as states too."""
encode = msgspec.msgpack.Encoder().encode
_decode_numbers = msgspec.msgpack.Decoder(list[int | float | Ext]).decode


def number(value: Any) -> int | float:
    """Return `value` as an int or a finite float. Raises `Invalid` if it is neither.

    Bools are ints, as in Python. Other numbers (NumPy, Decimal, Fraction) become ints if they are integral types and
    floats if not.
    """
    if type(value) is float:
        if isfinite(value):
            return value
        raise Invalid(f"a finite number is needed, got {value}")
    if type(value) is int:
        whole = value
    else:
        if isinstance(value, str | bytes | bytearray) or value is None:
            raise Invalid(f"a number is needed, got {type(value).__name__}")
        try:
            whole = index(value)
        except TypeError:
            try:
                return number(ldexp(value, 0))  # float() would read text and buffers too
            except (TypeError, ValueError, OverflowError):
                raise Invalid(f"a number is needed, got {type(value).__name__}") from None
    if whole.bit_length() > INT_BITS_MAX:
        raise Invalid(f"an int of {whole.bit_length()} bits; at most {INT_BITS_MAX}")
    return whole


def numbers(values: Sequence[Any]) -> Sequence[int | float]:
    """Return `values`, each as by `number`; unchanged if they are plain already."""
    return values if PLAIN.issuperset(map(type, values)) else [number(value) for value in values]


def to_wire(column: list[Any]) -> list[Any]:
    """Return the column with ints beyond 64 bits as an extension type, because msgpack has no such ints.

    This costs one pass: callers encode the plain column first, and call this if that overflows.
    """
    return [
        Ext(_LONG_INT, v.to_bytes(v.bit_length() // 8 + 1, "big", signed=True))
        if type(v) is int and not _INT64_MIN <= v <= _UINT64_MAX
        else v
        for v in column
    ]


def from_wire(column: list[Any], what: str, int_bytes_max: int) -> list[Any]:
    """Undo `to_wire`. Raises `BadRecord` unless every value is a finite number."""
    types = set(map(type, column))
    if not _NUMBER_TYPES.issuperset(types):
        raise BadRecord(f"{what}: a number is needed")
    if Ext in types:
        if any(type(v) is Ext and (v.code != _LONG_INT or memoryview(v.data).nbytes > int_bytes_max) for v in column):
            raise BadRecord(f"{what}: an int of over {int_bytes_max} bytes, or another extension type")
        column = [int.from_bytes(v.data, "big", signed=True) if type(v) is Ext else v for v in column]
    if float in types:
        check_finite(column, what)
    return column


COUNT_BYTES_MAX = 17
"""Longest count in a state."""


def count_max(int_bytes_max: int) -> int:
    """Return the largest count in a state, or, given the smaller limit of ints that batches have, in a batch.

    As with ints, batches stay so far below states that no number of them reaches the limit.
    """
    return 2**64 - 1 if int_bytes_max < STATE_INT_BYTES_MAX else 2**128 - 1


def encode_list(values: list[Any]) -> bytes:
    """Return values as msgpack, with ints beyond 64 bits as `to_wire` has them."""
    try:
        return encode(values)
    except OverflowError:
        return encode(to_wire(values))


def packed_bytes(column: Sequence[Any], what: str) -> list[bytes]:
    """Return the bytes of a column of states that are packed. Raises `BadRecord` for anything else in it."""
    if any(type(it) is not Ext or it.code != PACKED for it in column):
        raise BadRecord(f"{what}: packed bytes are needed")
    return [bytes(it.data) for it in column]


def check_finite(column: Iterable[Any], what: str) -> None:
    """Raise `BadRecord` if one of the numbers is an infinity or NaN."""
    column = list(column)
    try:
        if isfinite(sum(column)):  # a sum is not finite, once one of its terms is not: one call in C for all of them
            return
    except OverflowError:  # an int beyond all floats
        pass
    if any(type(v) is float and not isfinite(v) for v in column):
        raise BadRecord(f"{what}: not finite")


def value_bytes(value: Any) -> int:
    """Return the most that a value takes in a batch beyond the head that every series has: over 0 for texts and ints."""
    kind = type(value)
    if kind is int:
        return int(value.bit_length() + 7) // 8
    if kind is str:
        return len(value.encode())
    return sum(map(value_bytes, value)) if kind is tuple else 0


class Kind:
    """A kind of view: what is done with its deltas and states. Instances are stateless; `KINDS` holds one of each."""

    name: ClassVar[str]
    method: ClassVar[str]
    """Name of the method that records a delta: `add`, `observe` or `set`."""
    single: ClassVar[bool] = False
    """True if the state of one delta is that delta."""
    takes_numbers: ClassVar[bool] = True
    """True if `check` returns an ordinary number as it is."""
    has_quantiles: ClassVar[bool] = False
    """True if a read may ask for quantiles."""
    merge: Callable[[State, State], State]
    """Operation of the monoid. May return either argument; arguments are never changed."""

    def merge_all(self, a: Sequence[State], b: Sequence[State]) -> list[State]:
        """Return the `merge` of each state of `a` with the state of `b` at the same index."""
        return [*map(self.merge, a, b)]

    def check(self, value: object, ts_ms: int = 0, recorded_ns: int = 0) -> Any:
        """Return `value` as one raw delta, or raise `Invalid`. `ts_ms` and `recorded_ns` are for kinds that order deltas."""
        return number(value)

    def are_plain(self, values: Sequence[Any]) -> bool:
        """Return True if `check` would surely return each number of `values` as it is; False leaves that open."""
        try:
            return PLAIN.issuperset(map(type, values)) and all(map(isfinite, values))
        except OverflowError:  # an int beyond all floats
            return False

    def collect(self, deltas: Sequence[Any]) -> State:
        """Return the state of at least one raw delta, as `check` returns them, in the order in which they were recorded."""
        raise NotImplementedError

    def delta_of(self, state: State) -> Any:
        """Return the raw delta of a state that `collect` returned for one delta."""
        return state

    def decode_deltas(self, encoded: bytes) -> list[Any]:
        """Return raw deltas from the msgpack of a list of them. Raises `Invalid`, `BadRecord` or an error of msgspec if the
        bytes are anything else.
        """
        deltas = from_wire(_decode_numbers(encoded), self.name, STATE_INT_BYTES_MAX)
        return deltas if self.are_plain(deltas) else [*map(self.check, deltas)]

    def size(self, state: State) -> int:
        """Return the most bytes that a state takes in a batch beyond `ENTRY_BYTES` of `publisher.batching`."""
        return value_bytes(state)

    def heap_bytes(self, state: State) -> int:
        """Return the memory that a publisher is charged for a state, beyond that of its series: texts and long ints."""
        kind = type(state)
        if kind is float or (kind is int and -SHORT <= state <= SHORT):
            return 0
        size = self.size(state)
        return 64 + size if size > 24 else 0

    def to_columns(self, states: list[State]) -> list[list[Any]]:
        """Return states as columns that msgpack can encode, once `to_wire` has replaced large ints."""
        return [states]

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        """Undo `to_columns` for untrusted input. Raises `BadRecord` unless the input is `count` states of this kind."""
        raise NotImplementedError

    def check_times(self, states: Sequence[State], latest_ms: int) -> None:
        """Raise `BadRecord` if a state's own timestamp is beyond `latest_ms`; most kinds have none."""

    def answer(self, state: State) -> Any:
        """Return the answer of a state: a number, text, bool or None; of a histogram an object."""
        return state

    def number(self, answer: Any) -> Any:
        """Return what stands for an answer where only one number can be shown, in bars and scrapes; None: nothing can."""
        return answer

    def answerer(self, quantiles: Sequence[float]) -> Callable[[State], Any]:
        """Return a function from a state to its answer, with these quantiles. Raises `Invalid` if the kind has none."""
        if quantiles:
            raise Invalid(f"q: a {self.name} has no quantiles, only a histogram has")
        return self.answer

    def ranker(self, quantiles: Sequence[float]) -> Callable[[State], Any]:
        """Return a function from a state to what `top` orders it by: a number, or None to come last."""
        return self.answer

    def _one_column(self, columns: list[list[Any]], count: int) -> list[Any]:
        return self._columns(columns, 1, count)[0]

    def _columns(self, columns: list[list[Any]], width: int, count: int) -> list[list[Any]]:
        if len(columns) != width or any(len(column) != count for column in columns):
            raise BadRecord(f"kind {self.name}: {width} columns of {count} values expected")
        return columns
