"""Kinds that estimate from bounded memory: `distinct` counts different items, `topk` finds the most frequent ones.

`distinct` is HyperLogLog with the estimator of Ertl, "New cardinality estimation algorithms for HyperLogLog sketches"
(2017, arXiv:1702.01284), algorithm 6. The few hashes of a small set are kept as they are, so its count is exact. A state
depends on nothing but the set of its items, in whatever order and grouping they were merged.

`topk` is the summary of Misra and Gries in the mergeable form of Agarwal et al., "Mergeable Summaries" (2012), section 2.
Its counts are exact until there are more than `TOPK_ITEMS_MAX` different items. From then on the state depends on the order
of merges, but its bounds hold in any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from hashlib import blake2b
from math import inf, log, sqrt
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
    encode_list,
    from_wire,
    packed_bytes,
    value_bytes,
)
from pipeline.errors import BadRecord, Invalid

ITEM_BYTES_MAX = 256
"""Longest item. A `topk` state holds up to `TOPK_ITEMS_MAX` of them."""
TOPK_ITEMS_MAX = 256
COUNT_MAX = 2**63 - 1
EXACT_MAX = 256
"""Largest number of different items that `distinct` counts exactly."""
_PRECISION = 12
_REGISTERS = 1 << _PRECISION
_REST_BITS = 64 - _PRECISION
_HASH_BYTES = 8
_TOP_BITS = int.from_bytes(b"\x80" * _REGISTERS, "big")
STANDARD_ERROR = 1.04 / sqrt(_REGISTERS)
"""Relative standard error of an estimate of `distinct` (Flajolet et al., "HyperLogLog", 2007)."""

Hashes = frozenset[int]
Ranked = tuple[int, int, dict[str, int]]
"""State of `topk`: total of all counts, what each count may lack, and counts by item. Never changed once it is made."""


def item_text(value: object) -> str:
    """Return an item as text; ints in decimal, so that 7 and "7" are one item. Raises `Invalid` for anything else."""
    if isinstance(value, str):
        text = str.__str__(value)  # plain, also from an Enum
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= ITEM_BYTES_MAX:
        text = format(int(value), "d")
    else:
        raise Invalid(f"an item is a text or an int of at most {ITEM_BYTES_MAX} bits, got {type(value).__name__}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise Invalid("an item that is not valid Unicode (lone surrogate)") from None
    if size > ITEM_BYTES_MAX:
        raise Invalid(f"an item of {size} bytes; at most {ITEM_BYTES_MAX}")
    return text


def item_hash(value: object) -> int:
    """Return the 64 bits that stand for an item, as a signed int: the BLAKE2b digest of that length."""
    return int.from_bytes(blake2b(item_text(value).encode(), digest_size=_HASH_BYTES).digest(), "big", signed=True)


def _union(a: Hashes | bytes, b: Hashes | bytes) -> Hashes | bytes:
    if isinstance(a, frozenset):
        if isinstance(b, frozenset):
            both = a if b <= a else a | b
            return both if len(both) <= EXACT_MAX else _with_hashes(bytes(_REGISTERS), both)
        return _with_hashes(b, a)
    if isinstance(b, frozenset):
        return _with_hashes(a, b)
    return _greater(a, b)


def _with_hashes(registers: bytes, hashes: Hashes) -> bytes:
    """Return registers that have seen some hashes, too."""
    changed: bytearray | None = None
    for it in hashes:
        index = it >> _REST_BITS & _REGISTERS - 1
        rank = _REST_BITS + 1 - (it & (1 << _REST_BITS) - 1).bit_length()
        if (changed or registers)[index] < rank:
            changed = changed or bytearray(registers)
            changed[index] = rank
    return registers if changed is None else bytes(changed)


def _greater(a: bytes, b: bytes) -> bytes:
    """Return the greater of each two registers, all of them at once within one long int: no register has its top bit."""
    one, other = int.from_bytes(a, "big"), int.from_bytes(b, "big")
    greater = ((((one | _TOP_BITS) - other) & _TOP_BITS) >> 7) * 0xFF
    return (other ^ ((one ^ other) & greater)).to_bytes(_REGISTERS, "big")


def _estimate(registers: bytes) -> float:
    found = Counter(registers)
    counts = [found[rank] for rank in range(_REST_BITS + 2)]
    z = _REGISTERS * _tau(1 - counts[-1] / _REGISTERS)
    for count in counts[-2:0:-1]:
        z = 0.5 * (z + count)
    z += _REGISTERS * _sigma(counts[0] / _REGISTERS)
    return _REGISTERS * _REGISTERS / (2 * log(2) * z)


def _sigma(x: float) -> float:
    if x == 1:
        return inf
    y, z, before = 1.0, x, -1.0
    while z != before:
        x, before = x * x, z
        z, y = z + x * y, y + y
    return z


def _tau(x: float) -> float:
    if x in (0, 1):
        return 0.0
    y, z, before = 1.0, 1 - x, -1.0
    while z != before:
        x, y, before = sqrt(x), y / 2, z
        z -= (1 - x) ** 2 * y
    return z / 3


class Distinct(Kind):
    """Number of different items: exact up to `EXACT_MAX`, estimated beyond it."""

    name = "distinct"
    method = "observe"
    takes_numbers = False
    merge = staticmethod(_union)

    def check(self, value: object, ts_ms: int = 0, recorded_ns: int = 0) -> int:
        return item_hash(value)

    def are_plain(self, values: Sequence[Any]) -> bool:
        return False

    def delta_of(self, state: State) -> int:
        one: int = next(iter(state))
        return one

    def decode_deltas(self, encoded: bytes) -> list[int]:
        hashes = _decode_hashes(encoded)
        if not all(-(2**63) <= it < 2**63 for it in hashes):
            raise BadRecord("distinct: a hash of over 64 bits")
        return hashes

    def size(self, state: State) -> int:
        return 8 + (_REGISTERS if isinstance(state, bytes) else _HASH_BYTES * len(state))

    def heap_bytes(self, state: State) -> int:
        return 64 + (_REGISTERS if isinstance(state, bytes) else 200 + 100 * len(state))

    def collect(self, deltas: Sequence[int]) -> State:
        return _union(frozenset(deltas), frozenset())

    def to_columns(self, states: list[State]) -> list[list[Any]]:
        return [[Ext(PACKED, it if isinstance(it, bytes) else self._pack(it)) for it in states]]

    @staticmethod
    def _pack(hashes: Hashes) -> bytes:
        return b"".join([it.to_bytes(_HASH_BYTES, "big", signed=True) for it in sorted(hashes)])

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        return [self._unpack(it) for it in packed_bytes(self._one_column(columns, count), self.name)]

    @staticmethod
    def _unpack(packed: bytes) -> State:
        if len(packed) == _REGISTERS:
            if not 0 < max(packed) <= _REST_BITS + 1:
                raise BadRecord("distinct: a register out of range")
            return packed
        hashes = [
            int.from_bytes(packed[i : i + _HASH_BYTES], "big", signed=True) for i in range(0, len(packed), _HASH_BYTES)
        ]
        if len(packed) % _HASH_BYTES or not 0 < len(hashes) <= EXACT_MAX or sorted(set(hashes)) != hashes:
            raise BadRecord(f"distinct: 1 to {EXACT_MAX} hashes in order are needed, or {_REGISTERS} registers")
        return frozenset(hashes)

    def number(self, answer: Any) -> Any:
        return answer["estimate"]

    def ranker(self, quantiles: Sequence[float]) -> Callable[[State], Any]:
        return lambda state: self.number(self.answer(state))

    def answer(self, state: State) -> dict[str, int]:
        """Return the estimate, and bounds within which the true number is with a probability of 95 %."""
        if isinstance(state, frozenset):
            return dict.fromkeys(("estimate", "lower", "upper"), len(state))
        estimate = _estimate(state)
        least = max(EXACT_MAX + 1, _REGISTERS - state.count(0))
        lower, upper = estimate / (1 + 2 * STANDARD_ERROR), estimate / (1 - 2 * STANDARD_ERROR)
        return {
            "estimate": max(least, round(estimate)),
            "lower": max(least, int(lower)),
            "upper": max(least, int(upper) + 1),
        }


def _ranked(total: int, error: int, counts: dict[str, int]) -> Ranked:
    if len(counts) > TOPK_ITEMS_MAX:
        cut = sorted(counts.values(), reverse=True)[TOPK_ITEMS_MAX]
        counts = {item: count - cut for item, count in counts.items() if count > cut}
        error += cut
    return total, error, counts


def _merge_ranked(a: Ranked, b: Ranked) -> Ranked:
    small, large = (a, b) if len(a[2]) <= len(b[2]) else (b, a)
    counts = large[2].copy()
    for item, count in small[2].items():
        counts[item] = counts.get(item, 0) + count
    return _ranked(a[0] + b[0], a[1] + b[1], counts)


class TopK(Kind):
    """The most frequent items, each with bounds of how often it was added."""

    name = "topk"
    method = "observe"
    takes_numbers = False
    merge = staticmethod(_merge_ranked)

    def check(self, value: object, ts_ms: int = 0, recorded_ns: int = 0) -> tuple[str, int]:
        """Return an item and how often it is added, which is once if `value` is no pair."""
        item, count = value if isinstance(value, tuple | list) and len(value) == 2 else (value, 1)  # a pair
        if type(count) is not int or not 0 < count <= COUNT_MAX:
            raise Invalid(f"an item is added a whole number of times, from 1 to {COUNT_MAX}")
        return item_text(item), count

    def are_plain(self, values: Sequence[Any]) -> bool:
        return False

    def delta_of(self, state: State) -> tuple[str, int]:
        counts: dict[str, int] = state[2]
        return next(iter(counts.items()))

    def decode_deltas(self, encoded: bytes) -> list[tuple[str, int]]:
        return [*map(self.check, _decode_pairs(encoded))]

    def size(self, state: State) -> int:
        total, error, counts = state
        return 16 + value_bytes((total, error)) + sum([16 + value_bytes(it) for it in counts.items()])

    def heap_bytes(self, state: State) -> int:
        return 400 + sum([160 + len(item) * 4 for item in state[2]])

    def number(self, answer: Any) -> Any:
        return None

    def ranker(self, quantiles: Sequence[float]) -> Callable[[State], Any]:
        return lambda state: state[0]

    def collect(self, deltas: Sequence[tuple[str, int]]) -> State:
        return reduce(_merge_ranked, [(count, 0, {item: count}) for item, count in deltas])

    def to_columns(self, states: list[State]) -> list[list[Any]]:
        packed = [Ext(PACKED, self._pack(counts)) for _, _, counts in states]
        return [[state[0] for state in states], [state[1] for state in states], packed]

    @staticmethod
    def _pack(counts: Mapping[str, int]) -> bytes:
        """Return the msgpack of [item, count, item, count, ...] in the order of the items' code points."""
        return encode_list([part for row in sorted(counts.items()) for part in row])

    def from_columns(self, columns: list[list[Any]], count: int, int_bytes_max: int = STATE_INT_BYTES_MAX) -> list[State]:
        totals, errors, packed = self._columns(columns, 3, count)
        total_max = count_max(int_bytes_max)
        totals, errors = (from_wire(it, self.name, COUNT_BYTES_MAX) for it in (totals, errors))
        states = []
        for total, error, row in zip(totals, errors, packed_bytes(packed, self.name), strict=True):
            if type(total) is not int or type(error) is not int or not 0 < total <= total_max:
                raise BadRecord(f"topk: a total is an int from 1 to {total_max}")
            states.append(self._checked(total, error, self._unpack(row)))
        return states

    def _unpack(self, packed: bytes) -> dict[str, int]:
        try:
            flat = _decode_counts(packed)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise BadRecord(f"topk: {error}") from None
        items = [item for item in flat[::2] if isinstance(item, str)]
        numbers = from_wire(flat[1::2], self.name, COUNT_BYTES_MAX)
        if len(flat) > 2 * TOPK_ITEMS_MAX or 2 * len(items) != len(flat) or len(items) != len(numbers):
            raise BadRecord(f"topk: up to {TOPK_ITEMS_MAX} items, each with its count, are needed")
        if not {int}.issuperset(map(type, numbers)):
            raise BadRecord("topk: a count that is no int")
        counts = dict(zip(items, numbers, strict=True))
        if self._pack(counts) != packed:
            raise BadRecord("topk: items that are not in order, or ints that are longer than they must be")
        if any(len(item.encode()) > ITEM_BYTES_MAX for item in counts):
            raise BadRecord(f"topk: an item of over {ITEM_BYTES_MAX} bytes")
        return counts

    @staticmethod
    def _checked(total: int, error: int, counts: dict[str, int]) -> Ranked:
        # Each step that adds to the error takes as much away from each of so many items and one.
        if error < 0 or min(counts.values(), default=1) < 1 or sum(counts.values()) + (TOPK_ITEMS_MAX + 1) * error > total:
            raise BadRecord("topk: counts that do not fit to their total")
        if not error and sum(counts.values()) != total:
            raise BadRecord("topk: exact counts that are not all of their total")
        return total, error, counts

    def answer(self, state: State) -> dict[str, Any]:
        """Return the items, the most frequent first, with how often each was added: at least `count`, at most `upper`."""
        total, error, counts = state
        ranked: Mapping[str, int] = dict(sorted(counts.items(), key=lambda it: (-it[1], it[0])))
        return {
            "total": total,
            "items": [{"item": item, "count": count, "upper": count + error} for item, count in ranked.items()],
        }


_decode_hashes = msgspec.msgpack.Decoder(list[int]).decode
_decode_pairs = msgspec.msgpack.Decoder(list[tuple[str, int]]).decode
_decode_counts = msgspec.msgpack.Decoder(list[str | int | Ext]).decode
