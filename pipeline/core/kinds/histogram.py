"""The kind `histogram`: count, sum, extremes, and buckets from which every quantile is known within a relative error.

The buckets are those of OpenTelemetry's exponential histograms and of Prometheus' native ones. With *schema* s, the base is
2**(2**-s), and bucket i holds the numbers above base**i up to base**(i + 1), that one included. Negative numbers have
buckets of their own, by their absolute value. Numbers whose absolute value is below 2**-1022 (zero and the subnormal floats)
are only counted, as zeros. So i of schema s and i >> 1 of schema s - 1 hold the same number, also where i is negative.

At most `BUCKETS_MAX` buckets, positive and negative ones together, hold something. A state has the finest schema, up to
`SCHEMA_MAX`, with which that is so; the coarsest, `SCHEMA_MIN`, has 128 buckets for all the numbers that there are.

**Why the order of merges does not matter.** Let f(s) be the number of buckets of schema s that hold a number of a set. Of a
larger set it is no smaller, and with a coarser schema no larger, because each bucket lies within one of the coarser schema.
The schema of a state is the finest s with f(s) <= `BUCKETS_MAX` that is no finer than the schema of any part. A schema that
is too fine for a part is too fine for the whole: so what was decided on the way excludes nothing that the whole would allow.
Schema and counts depend on the set of numbers only.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate, repeat
from math import ceil, exp2, frexp, inf, isqrt, ldexp
from typing import Any

import msgspec
from msgspec.msgpack import Ext

from pipeline.core.kinds.base import (
    COUNT_BYTES_MAX,
    PACKED,
    STATE_INT_BYTES_MAX,
    Kind,
    State,
    count_max,
    encode,
    encode_list,
    from_wire,
    number,
    numbers,
    packed_bytes,
    value_bytes,
)
from pipeline.core.kinds.numeric import Mean, Sum, add, total_of, totals
from pipeline.errors import BadRecord, Invalid

SCHEMA_MAX = 8
SCHEMA_MIN = -5
BUCKETS_MAX = 160
LEAST = 2.0**-1022
"""Least positive number that has a bucket."""
BITS_MAX = 1_024
"""Longest int that a histogram takes: longer ones are beyond all floats."""
QUANTILES = (0.5, 0.9, 0.99)
"""Quantiles of an answer, unless others are asked for."""
QUANTILES_MAX = 100
PACKED_BYTES_MAX = 4_096
"""Most bytes of the buckets of a state."""

Buckets = Mapping[int, int]
"""Number of observations by index of the bucket; none is 0."""

_PRECISION = 128
_root = 2 << _PRECISION
for _ in range(SCHEMA_MAX):
    _root = isqrt(_root << _PRECISION)
_exact = accumulate(repeat(_root, (1 << SCHEMA_MAX) - 1), lambda a, b: a * b >> _PRECISION, initial=1 << _PRECISION)
_LONG_BOUNDS = [bound >> _PRECISION - 63 for bound in _exact]
"""Powers of the finest base from 1 to below 2, times 2**63, rounded down. All but the first are irrational."""
_BOUNDS = [ldexp(bound >> 11, -53) for bound in _LONG_BOUNDS]
"""Half of them as floats, rounded down: the part of a float that `frexp` returns is compared with them."""


def index_of(value: float) -> int:
    """Return the bucket, of the finest schema, of a number of at least `LEAST`. It is exact, of ints of any size too."""
    if type(value) is float or value.bit_length() <= 53:  # type: ignore[attr-defined]  # an int
        part, exponent = frexp(value)
        return (exponent - 1 << SCHEMA_MAX) + bisect_left(_BOUNDS, part) - 1
    whole = int(value)
    exponent = whole.bit_length()
    more = exponent - 64
    top = whole >> more if more > 0 else whole << -more
    place = bisect_left(_LONG_BOUNDS, top)
    if more > 0 and place < len(_LONG_BOUNDS) and top == _LONG_BOUNDS[place]:  # its other bits decide, which is rare
        place += whole.bit_length() <= BITS_MAX and whole ** (1 << SCHEMA_MAX) > 1 << (exponent - 1 << SCHEMA_MAX) + place
    return (exponent - 1 << SCHEMA_MAX) + place - 1


_LOWEST, _HIGHEST = index_of(LEAST), (BITS_MAX << SCHEMA_MAX) - 1


def places(schema: int) -> tuple[int, int]:
    """Return the first and the last bucket of a schema that a number can be in."""
    return _LOWEST >> SCHEMA_MAX - schema, _HIGHEST >> SCHEMA_MAX - schema


def bound_of(power: int, schema: int) -> float:
    """Return a power of a schema's base, rounded down; infinity if it is beyond all floats."""
    place = power << SCHEMA_MAX - schema
    exponent = (place >> SCHEMA_MAX) + 1
    return ldexp(_BOUNDS[place & (1 << SCHEMA_MAX) - 1], exponent) if exponent <= BITS_MAX else inf


def coarser(buckets: Buckets, by: int) -> Buckets:
    """Return buckets of a schema that is coarser by so many steps."""
    if not by:
        return buckets
    found: dict[int, int] = {}
    for index, count in buckets.items():
        found[index >> by] = found.get(index >> by, 0) + count
    return found


def _together(a: Buckets, b: Buckets) -> Buckets:
    if len(a) < len(b):
        a, b = b, a
    if not b:
        return a
    found = {**a}
    for index, count in b.items():
        found[index] = found.get(index, 0) + count
    return found


def _settled(
    total: Any, least: float, most: float, schema: int, zeros: int, positive: Buckets, negative: Buckets
) -> tuple[Any, ...]:
    while len(positive) + len(negative) > BUCKETS_MAX:
        schema, positive, negative = schema - 1, coarser(positive, 1), coarser(negative, 1)
    return total, least, most, schema, zeros, positive, negative


def count_of(state: State) -> int:
    """Return the number of observations."""
    return int(state[4] + sum(state[5].values()) + sum(state[6].values()))


# Quantiles


def parse_quantiles(texts: Iterable[str]) -> tuple[float, ...]:
    """Return quantiles from their texts. Raises `Invalid` for one that is no number from 0 to 1, and for too many."""
    found: list[float] = []
    for text in texts:
        try:
            found.append(float(text))
        except ValueError:
            raise Invalid(f"q: a number from 0 to 1 is needed, got {text[:50]!r}") from None
    return check_quantiles(found)


def check_quantiles(quantiles: Iterable[Any]) -> tuple[float, ...]:
    """Return quantiles, each once. Raises `Invalid` unless each is a number from 0 to 1."""
    found = tuple(dict.fromkeys(quantiles))
    for quantile in found:
        if isinstance(quantile, bool) or not isinstance(quantile, int | float) or not 0 <= quantile <= 1:
            raise Invalid(f"q: a number from 0 to 1 is needed, got {quantile!r:.50}")
    if len(found) > QUANTILES_MAX:
        raise Invalid(f"q: {len(found)} quantiles; at most {QUANTILES_MAX}")
    return found


@lru_cache(maxsize=1_000)
def _ratio(quantile: float) -> tuple[int, int]:
    """Return a quantile as it is written: 0.07 of 100 observations is the 7th, which a product of floats misses."""
    return Fraction(str(float(quantile))).as_integer_ratio()


@lru_cache(maxsize=1_000)
def quantile_name(quantile: float) -> str:
    """Return the key of a quantile in an answer: `0.5`, `1`."""
    return str(float(quantile)).removesuffix(".0")


@lru_cache(maxsize=SCHEMA_MAX - SCHEMA_MIN + 1)
def relative_error(schema: int) -> float:
    """Return the most by which a quantile differs from the true one, as a part of that, rounded up.

    The answer is the geometric middle of a bucket, so both ends are farthest from it, and the lower one more.
    """
    return ceil((exp2(exp2(-schema - 1)) - 1) * 10**6) / 10**6


def middle_of(index: int, schema: int) -> float:
    """Return the geometric middle of a bucket."""
    return exp2(ldexp(2 * index + 1, -schema - 1))


def _in_order(state: State) -> Iterator[tuple[float, int]]:
    """Yield the middle and the count of each bucket, from the least numbers to the largest."""
    _, _, _, schema, zeros, positive, negative = state
    for index in sorted(negative, reverse=True):
        yield -middle_of(index, schema), negative[index]
    if zeros:
        yield 0, zeros
    for index in sorted(positive):
        yield middle_of(index, schema), positive[index]


def quantiles_of(state: State, quantiles: Sequence[float]) -> list[float]:
    """Return quantiles of the observations: of n, quantile q is the one of rank q * n, rounded up, in ascending order."""
    _, least, most, *_ = state
    count = count_of(state)
    ranks = [max(1, -(-count * a // b)) for a, b in map(_ratio, quantiles)]
    found: dict[int, float] = {1: least, count: most}
    wanted = iter(sorted({*ranks} - found.keys()))
    rank, seen = next(wanted, None), 0
    for middle, more in _in_order(state) if rank is not None else ():
        seen += more
        while rank is not None and rank <= seen:
            found[rank] = min(max(middle, least), most)
            rank = next(wanted, None)
    return [found[rank] for rank in ranks]


# Bytes


_decode = msgspec.msgpack.Decoder(list[int | Ext]).decode


def pack(schema: int, zeros: int, positive: Buckets, negative: Buckets) -> bytes:
    """Return schema and buckets as bytes. Equal ones have equal bytes.

    The bytes are the msgpack of [schema, zeros, number of negative buckets, index, count, gap, count, gap, count, ...]: the
    negative buckets in the order of their indexes, then the positive ones. The first of each is known by its index, each
    other one by the number of empty buckets before it.
    """
    found = [schema, zeros, len(negative)]
    for buckets in (negative, positive):
        before = None
        for index, count in sorted(buckets.items()):
            found += index if before is None else index - before - 1, count
            before = index
    return encode_list(found)


def _buckets(gaps: Sequence[int], counts: Sequence[int], schema: int) -> Buckets:
    """Return the buckets of one sign. Raises `BadRecord` unless they rise, and some number is in each."""
    if not gaps:
        return {}
    indexes = [*map(operator.add, accumulate(gaps), range(len(gaps)))]
    first, last = places(schema)
    if min(gaps[1:], default=0) < 0 or indexes[0] < first or indexes[-1] > last:
        raise BadRecord(f"histogram: buckets that do not rise, or beyond {first} to {last}, with schema {schema}")
    return dict(zip(indexes, counts, strict=True))


def unpack(data: bytes) -> tuple[int, int, Buckets, Buckets]:
    """Undo `pack` for untrusted input. Raises `BadRecord` unless the bytes are those that `pack` returns for something."""
    if len(data) > PACKED_BYTES_MAX:
        raise BadRecord(f"histogram: buckets of {len(data)} bytes; at most {PACKED_BYTES_MAX}")
    try:
        ints: list[Any] = _decode(data)
        if encode(ints) != data:
            raise BadRecord("histogram: ints that are longer than they must be")
        if Ext in set(map(type, ints)):
            ints = from_wire(ints, "histogram", COUNT_BYTES_MAX)
            if encode_list(ints) != data:
                raise BadRecord("histogram: ints that are longer than they must be")
    except (msgspec.MsgspecError, ValueError) as error:
        raise BadRecord(f"histogram: {error}") from None
    if not 3 <= len(ints) <= 2 * BUCKETS_MAX + 3 or len(ints) % 2 == 0 or not 0 <= ints[2] <= len(ints) // 2 - 1:
        raise BadRecord(f"histogram: {len(ints)} ints make no buckets, or over {BUCKETS_MAX} of them")
    schema, zeros, negative_count = ints[:3]
    if not SCHEMA_MIN <= schema <= SCHEMA_MAX:
        raise BadRecord(f"histogram: schema {schema}; {SCHEMA_MIN} to {SCHEMA_MAX}")
    gaps, counts = ints[3::2], ints[4::2]
    if zeros < 0 or min(counts, default=1) < 1:
        raise BadRecord("histogram: a bucket with a count below 1")
    negative = _buckets(gaps[:negative_count], counts[:negative_count], schema)
    return schema, zeros, _buckets(gaps[negative_count:], counts[negative_count:], schema), negative


def _place(value: float, schema: int) -> int | None:
    """Return the bucket of a number's absolute value; None if it is a zero."""
    value = abs(value)
    return index_of(value) >> SCHEMA_MAX - schema if value >= LEAST else None


def _check_extremes(state: State) -> None:
    _, least, most, schema, zeros, positive, negative = state
    lowest = (-1, max(negative)) if negative else (0, None) if zeros else (1, min(positive))
    highest = (1, max(positive)) if positive else (0, None) if zeros else (-1, min(negative))
    for value, (sign, place) in ((least, lowest), (most, highest)):
        own = _place(value, schema)
        if own != place or (own is not None and (value > 0) != (sign > 0)):
            raise BadRecord(f"histogram: {value!r:.50} is not in the outermost bucket")
    if least > most:
        raise BadRecord("histogram: its minimum is above its maximum")


class Histogram(Kind):
    """Distribution of all deltas.

    A state is (sum, least, most, schema, zeros, positive buckets, negative buckets); the sum is that of the kind `sum`.
    """

    name = "histogram"
    method = "observe"
    has_quantiles = True

    def check(self, value: object, ts_ms: int = 0, recorded_ns: int = 0) -> Any:
        delta = number(value)
        if type(delta) is int and delta.bit_length() > BITS_MAX:
            raise Invalid(f"a histogram takes ints of at most {BITS_MAX} bits, got {delta.bit_length()}")
        return delta

    @staticmethod
    def merge(a: State, b: State) -> State:
        schema = min(a[3], b[3])
        to_a, to_b = a[3] - schema, b[3] - schema
        return _settled(
            add(a[0], b[0]),
            min(a[1], b[1]),
            max(a[2], b[2]),
            schema,
            a[4] + b[4],
            _together(coarser(a[5], to_a), coarser(b[5], to_b)),
            _together(coarser(a[6], to_a), coarser(b[6], to_b)),
        )

    def collect(self, deltas: Sequence[Any]) -> State:
        positive: dict[int, int] = {}
        negative: dict[int, int] = {}
        zeros, deltas = 0, numbers(deltas)
        for value in deltas:
            if -LEAST < value < LEAST:
                zeros += 1
                continue
            buckets, index = (positive, index_of(value)) if value > 0 else (negative, index_of(-value))
            buckets[index] = buckets.get(index, 0) + 1
        return _settled(total_of(deltas), min(deltas), max(deltas), SCHEMA_MAX, zeros, positive, negative)

    def delta_of(self, state: State) -> Any:
        return state[0]

    def size(self, state: State) -> int:
        return 32 + value_bytes(state[:3]) + len(pack(*state[3:]))

    def heap_bytes(self, state: State) -> int:
        return 200 + 56 * (len(state[5]) + len(state[6]))

    def to_columns(self, states: list[State]) -> list[list[Any]]:
        columns: list[list[Any]] = [[state[i] for state in states] for i in range(3)]
        return [*columns, [Ext(PACKED, pack(*state[3:])) for state in states]]

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        sums, least, most, packed = self._columns(columns, 4, count)
        sums = totals(sums, self.name, int_bytes_max)
        extremes = [from_wire(column, self.name, int_bytes_max) for column in (least, most)]
        most_observed = count_max(int_bytes_max)
        states: list[State] = []
        for total, low, high, data in zip(sums, *extremes, packed_bytes(packed, self.name), strict=True):
            state = total, low, high, *unpack(data)
            if not 0 < (observed := count_of(state)) <= most_observed:
                raise BadRecord(f"histogram: {observed} observations; 1 to {most_observed}")
            _check_extremes(state)
            states.append(state)
        return states

    def answer(self, state: State) -> Any:
        return self._answer(QUANTILES, state)

    def number(self, answer: Any) -> Any:
        return next(iter(answer["quantiles"].values()), None)

    def answerer(self, quantiles: Sequence[float]) -> Callable[[State], Any]:
        return partial(self._answer, quantiles or QUANTILES)

    def ranker(self, quantiles: Sequence[float]) -> Callable[[State], Any]:
        return (lambda state: quantiles_of(state, quantiles[:1])[0]) if quantiles else count_of

    def _answer(self, quantiles: Sequence[float], state: State) -> dict[str, Any]:
        total, least, most, schema, *_ = state
        count = count_of(state)
        return {
            "count": count,
            "sum": Sum().answer(total),
            "min": least,
            "max": most,
            "mean": Mean().answer((total, count)),
            "quantiles": dict(zip(map(quantile_name, quantiles), quantiles_of(state, quantiles), strict=True)),
            "relative_error": relative_error(schema),
        }
