"""The kind `histogram`: exact buckets, one state whatever the order of merges, true bounds of errors, and bad input."""

import math
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from math import isqrt
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext, encode

from pipeline.core import codec
from pipeline.core.kinds import BATCH_INT_BYTES_MAX, KINDS
from pipeline.core.kinds.histogram import (
    BITS_MAX,
    BUCKETS_MAX,
    LEAST,
    SCHEMA_MAX,
    SCHEMA_MIN,
    check_quantiles,
    count_of,
    index_of,
    pack,
    parse_quantiles,
    quantiles_of,
    relative_error,
    unpack,
)
from pipeline.errors import BadRecord, Invalid
from tests.core.test_codec import array, peak_bytes, reencoded_batch, sealed

HISTOGRAM = KINDS["histogram"]
STEPS = 1 << SCHEMA_MAX
FLOAT_MAX = 1.7976931348623157e308


def floor_of_power(place: int) -> int:
    """Return 2**(place / 256), rounded down, by roots of ints alone."""
    root = 1 << place
    for _ in range(SCHEMA_MAX):
        root = isqrt(root)
    return root


def is_in_bucket(value: float, index: int) -> bool:
    """Return whether base**index < value <= base**(index + 1), by ints alone: the 256th power of the base is 2."""
    top, bottom = Fraction(value).as_integer_ratio()
    shift = STEPS * (bottom.bit_length() - 1) + index
    power = top**STEPS
    below, end = (1 << shift, 2 << shift) if shift >= 0 else (Fraction(1, 1 << -shift), Fraction(2, 1 << -shift))
    return below < power <= end


def near_bounds() -> st.SearchStrategy[float]:
    """Draw floats, and ints of any size, close to the bounds of buckets, on both sides."""
    steps = st.integers(-3, 3)
    exponents = st.integers(-1021, 1022) | st.integers(-70, 70)
    floats = st.builds(
        lambda place, exponent, step: math.ldexp(2.0 ** (place / STEPS) + step * 2.0**-52, exponent),
        st.integers(0, STEPS),
        exponents,
        steps,
    )
    ints = st.builds(
        lambda place, step: floor_of_power(place) + step, st.integers(2 * STEPS, BITS_MAX * STEPS - 1), steps
    ) | st.builds(lambda place, step: floor_of_power(place) + step, st.integers(2 * STEPS, 66 * STEPS), steps)
    return floats | ints.filter(lambda it: it.bit_length() <= BITS_MAX)


positive = st.floats(LEAST, FLOAT_MAX) | st.integers(1, 2**BITS_MAX - 1) | st.integers(1, 2**70)


@settings(max_examples=400)
@given(value=near_bounds() | positive)
def test_buckets_are_exact(value: float) -> None:
    """A bucket holds its upper bound and not its lower one, as exact ints show near the bounds."""
    index = index_of(value)
    assert is_in_bucket(value, index)
    assert not is_in_bucket(value, index + 1)


def test_powers_of_two_are_upper_bounds() -> None:
    """2**k is the last number of the bucket that ends there, and the next float is the first of the following one."""
    for exponent in (-1022, -1, 0, 1, 52, 53, 54, 1023):
        value = 2.0**exponent
        assert index_of(value) == exponent * STEPS - 1
        assert index_of(math.nextafter(value, math.inf)) == exponent * STEPS
    for exponent in (53, 63, 64, 65, 100, 1023):
        assert index_of(2**exponent) == exponent * STEPS - 1
        assert index_of(2**exponent + 1) == exponent * STEPS
        assert index_of(2**exponent - 1) == exponent * STEPS - 1
    assert index_of(FLOAT_MAX) == index_of(2**BITS_MAX - 1) == 1024 * STEPS - 1


def test_the_bounds_of_buckets_are_those_of_roots() -> None:
    """The table of bounds, made by products, equals roots of ints, which take too long for an import."""
    for place in range(STEPS):
        bound = floor_of_power(63 * STEPS + place)
        assert index_of(bound) == 63 * STEPS + place - 1
        assert index_of(bound + 1) == 63 * STEPS + place


# States


wide = st.lists(st.integers(-(2**16), 2**16) | st.integers(-90, 90).map(lambda n: n * 2.0**-7), min_size=1, max_size=400)


def expected(values: list[Any]) -> tuple[Any, ...]:
    """Return the state of values by its definition: the finest schema with which few enough buckets hold something."""
    for schema in range(SCHEMA_MAX, SCHEMA_MIN - 1, -1):
        found = [Counter(index_of(s * v) >> SCHEMA_MAX - schema for v in values if s * v >= LEAST) for s in (1, -1)]
        if sum(map(len, found)) <= BUCKETS_MAX:
            zeros = sum(abs(v) < LEAST for v in values)
            return sum(map(Fraction, values)), min(values), max(values), schema, zeros, *found
    raise AssertionError("the coarsest schema has buckets for all numbers")


@settings(max_examples=60, deadline=None)
@given(values=wide, data=st.data())
def test_any_order_of_merges_gives_the_state_of_the_whole(values: list[Any], data: st.DataObject) -> None:
    """The state depends on the numbers only, whoever merged them, also where the resolution is halved on the way."""
    shuffled = data.draw(st.randoms(use_true_random=False)).sample(values, len(values))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(values)), max_size=12)) | {len(values)})
    parts = [HISTOGRAM.collect(shuffled[start:end]) for start, end in zip([0, *cuts], cuts, strict=False)]
    while len(parts) > 1:
        at = data.draw(st.integers(0, len(parts) - 2))
        parts[at : at + 2] = [HISTOGRAM.merge(parts[at], parts[at + 1])]
    (state,) = parts
    assert state == expected(values)
    assert state == HISTOGRAM.collect(values)
    (packed,) = HISTOGRAM.to_columns([state])[3]
    assert packed == HISTOGRAM.to_columns([HISTOGRAM.collect(values)])[3][0]


def test_all_numbers_fit() -> None:
    """Numbers from one end of the floats to the other, of both signs, fit with the coarsest schema."""
    values = [sign * 2.0**exponent for exponent in range(-1022, 1024) for sign in (1, -1)]
    state = HISTOGRAM.collect([*values, FLOAT_MAX, -FLOAT_MAX, 0, 5e-324])
    assert state[3] == SCHEMA_MIN
    assert len(state[5]) == len(state[6]) == 64
    assert count_of(state) == len(values) + 4
    (again,) = codec.decode_states(HISTOGRAM, codec.encode_states(HISTOGRAM, [state]))
    assert again == state
    (half,) = HISTOGRAM.to_columns([HISTOGRAM.collect([v for v in values if v > 0])])[3]
    assert unpack(half.data)[0] == -4


def test_zeros() -> None:
    """Zero, minus zero and the subnormal floats are counted as zeros; the least normal float has a bucket."""
    below = math.nextafter(LEAST, 0)
    state = HISTOGRAM.collect([0, 0.0, -0.0, 5e-324, -5e-324, below, -below])
    assert state[3:] == (SCHEMA_MAX, 7, {}, {})
    assert HISTOGRAM.answer(state)["quantiles"] == {"0.5": 0, "0.9": below, "0.99": below}
    assert quantiles_of(state, (0, 0.5, 1)) == [-below, 0, below]
    assert HISTOGRAM.collect([LEAST, -LEAST])[4:] == (0, {-1022 * STEPS - 1: 1}, {-1022 * STEPS - 1: 1})


@pytest.mark.parametrize("value", [2**BITS_MAX, -(2**BITS_MAX), 10**400])
def test_ints_beyond_all_floats_are_refused(value: int) -> None:
    """An int beyond 2**1024 - 1 has no bucket, and is refused."""
    with pytest.raises(Invalid, match="1024 bits"):
        HISTOGRAM.check(value)
    assert not HISTOGRAM.are_plain([1, value])
    assert HISTOGRAM.check(2**BITS_MAX - 1) == 2**BITS_MAX - 1
    assert HISTOGRAM.answer(HISTOGRAM.collect([2**BITS_MAX - 1]))["max"] == 2**BITS_MAX - 1


# Quantiles


def uniform(random: random.Random) -> float:
    return random.random()


def log_normal(random: random.Random) -> float:
    return random.lognormvariate(-4, 2)


def bimodal(random: random.Random) -> float:
    return random.gauss(0.001, 0.0001) if random.random() < 0.7 else random.gauss(2_000, 30)


def of_both_signs(random: random.Random) -> float:
    return random.gauss(-5, 10)


def tiny(random: random.Random) -> float:
    return random.lognormvariate(-690, 3)


def whole(random: random.Random) -> int:
    return random.randrange(10)


def all_over(random: random.Random) -> float:
    return random.choice((1, -1)) * 2.0 ** random.uniform(-1000, 1000)


@pytest.mark.parametrize("draw", [uniform, log_normal, bimodal, of_both_signs, tiny, whole, all_over])
@pytest.mark.parametrize("count", [1, 2, 99, 5_000])
def test_quantiles_are_within_their_relative_error(draw: Callable[[random.Random], float], count: int) -> None:
    """Each quantile of any distribution is off from that of the sorted numbers by the stated relative error at most."""
    rng = random.Random(7)
    values = sorted(draw(rng) for _ in range(count))
    wanted = tuple(i / 200 for i in range(201))
    state = HISTOGRAM.collect(values)
    answer = HISTOGRAM.answerer(wanted)(state)
    error = Fraction(answer["relative_error"])
    assert len(answer["quantiles"]) == len(wanted)
    for quantile, found in zip(wanted, answer["quantiles"].values(), strict=True):
        exact = values[max(1, math.ceil(Fraction(str(quantile)) * count)) - 1]
        assert abs(Fraction(found) - Fraction(exact)) <= error * abs(Fraction(exact))
        assert values[0] <= found <= values[-1]
    assert (answer["count"], answer["min"], answer["max"]) == (count, values[0], values[-1])
    assert answer["sum"] == pytest.approx(math.fsum(values))
    assert answer["mean"] == pytest.approx(math.fsum(values) / count)


def test_the_relative_error_of_each_schema() -> None:
    """The stated error is that of both ends of a bucket against its geometric middle, rounded up."""
    assert [relative_error(schema) for schema in (8, 7, 3, 0, -1)] == [0.001355, 0.002712, 0.044274, 0.414214, 1.0]
    for schema in range(SCHEMA_MIN, SCHEMA_MAX + 1):
        base = 2.0**2.0**-schema
        assert relative_error(schema) >= math.sqrt(base) - 1
        assert relative_error(schema) >= 1 - 1 / math.sqrt(base)


def test_quantiles_are_meant_as_they_are_written() -> None:
    """0.07 of 100 numbers is the 7th of them, although a product of floats is above 7."""
    state = HISTOGRAM.collect([*range(1, 101)])
    assert math.ceil(0.07 * 100) == 8
    assert quantiles_of(state, (0.07, 0, 1, 0.07)) == [pytest.approx(7, rel=0.0014), 1, 100, pytest.approx(7, rel=0.0014)]
    assert parse_quantiles(["0.5", "1", "0.50", ".9"]) == (0.5, 1.0, 0.9)
    assert [*HISTOGRAM.answerer((0.5, 1.0, 0.0))(state)["quantiles"]] == ["0.5", "1", "0"]


@pytest.mark.parametrize("text", ["", "x", "-0.1", "1.1", "nan", "inf", "0.5,0.9", "1e999", "\0"])
def test_quantiles_that_are_none(text: str) -> None:
    """A quantile is a number from 0 to 1."""
    with pytest.raises(Invalid, match="q: a number from 0 to 1"):
        parse_quantiles([text])


def test_too_many_quantiles_are_refused() -> None:
    """A read may ask for a limited number of quantiles."""
    assert len(check_quantiles([i / 100 for i in range(100)])) == 100
    with pytest.raises(Invalid, match="101 quantiles; at most 100"):
        check_quantiles([i / 100 for i in range(101)])
    with pytest.raises(Invalid, match="a number from 0 to 1"):
        check_quantiles([True])


def test_other_kinds_have_no_quantiles() -> None:
    """A kind without quantiles says so, by name."""
    for kind in KINDS.values():
        if not kind.has_quantiles:
            with pytest.raises(Invalid, match=f"q: a {kind.name} has no quantiles"):
                kind.answerer((0.5,))


def test_histograms_are_ranked_by_count_or_by_a_quantile() -> None:
    """`top` ranks histograms by their counts, or by the first quantile that is asked for."""
    few, many = HISTOGRAM.collect([100, 200]), HISTOGRAM.collect([1, 2, 3])
    assert [HISTOGRAM.ranker(())(it) for it in (few, many)] == [2, 3]
    assert HISTOGRAM.ranker((1.0, 0.5))(few) == 200
    assert KINDS["sum"].ranker(())(7) == 7


# Bytes


@given(values=wide)
def test_bytes_come_back(values: list[Any]) -> None:
    """Buckets come back from their bytes, and equal buckets have equal bytes, whatever their order."""
    state = HISTOGRAM.collect(values)
    data = pack(*state[3:])
    assert unpack(data) == state[3:]
    backwards = [dict(reversed([*buckets.items()])) for buckets in state[5:]]
    assert pack(*state[3:5], *backwards) == data
    (column,) = HISTOGRAM.to_columns([state])[3]
    assert len(column.data) + 32 <= HISTOGRAM.size(state)


LAST, FIRST = 1024 * STEPS - 1, -1022 * STEPS - 1
GOOD = (1, 1, 1, [8, 0, 0, -1, 1])
BAD: dict[str, tuple[Any, ...]] = {
    "no buckets": (0, 0, 0, [8, 0, 0]),
    "no ints": (0, 0, 0, []),
    "an even number of ints": (1, 1, 1, [8, 0, 0, -1]),
    "schema too fine": (1, 1, 1, [9, 0, 0, -1, 1]),
    "schema too coarse": (1, 1, 1, [-6, 0, 0, -1, 1]),
    "schema beyond 64 bits": (1, 1, 1, [Ext(1, b"\x01" + bytes(8)), 0, 0, -1, 1]),
    "zeros below 0": (1, 1, 1, [8, -1, 0, -1, 1]),
    "a count of 0": (1, 1, 1, [8, 0, 0, -1, 0]),
    "a count below 0": (1, 1, 1, [8, 0, 0, -1, -1]),
    "more negative buckets than buckets": (1, 1, 1, [8, 0, 2, -1, 1]),
    "a negative number of buckets": (1, 1, 1, [8, 0, -1, -1, 1]),
    "an index twice": (3, 1, 1, [8, 0, 0, -1, 1, -1, 1]),
    "indexes that fall": (3, 0.5, 1, [8, 0, 0, -1, 1, -257, 1]),
    "an index beyond all floats": (1, 1, 1, [8, 0, 0, LAST + 1, 1]),
    "an index below all floats": (1, 1, 1, [8, 0, 0, FIRST - 1, 1]),
    "a gap beyond all floats": (1, 1, FLOAT_MAX, [8, 0, 0, -1, 1, LAST + 1, 1]),
    "an index beyond the schema": (1, 1, 1, [0, 0, 0, 1024, 1]),
    "161 buckets": (1, 1, 1, [8, 0, 0, -1, *[1, 0] * 160, 1]),
    "minimum above maximum": (1, 1, 0.9999, [8, 0, 0, -1, 1]),
    "minimum below the first bucket": (1, 0.5, 1, [8, 0, 0, -1, 1]),
    "minimum above the first bucket": (3, 2, 2, [8, 0, 0, -1, 1, 255, 1]),
    "maximum above the last bucket": (1, 1, 1.5, [8, 0, 0, -1, 1]),
    "maximum below the last bucket": (3, 1, 1, [8, 0, 0, -1, 1, 255, 1]),
    "minimum of the other sign": (1, -1, 1, [8, 0, 0, -1, 1]),
    "maximum of the other sign": (-1, -1, 1, [8, 0, 1, -1, 1]),
    "zeros with another minimum": (1, -1, 1, [8, 1, 0, -1, 1]),
    "only zeros, and a maximum": (1, 0, 1, [8, 1, 0]),
    "a minimum beyond all floats": (1, 10**2000, 10**2000, [8, 0, 0, LAST, 1]),
    "a text": (1, 1, 1, [8, 0, 0, -1, "x"]),
    "a float": (1, 1, 1, [8, 0, 0, -1, 1.0]),
    "a bool": (1, 1, 1, [8, 0, 0, -1, True]),
    "a list": (1, 1, 1, [8, 0, 0, -1, [1]]),
    "an int that is longer than it must be": (1, 1, 1, b"\x95\x08\x00\x00\xff\xcc\x01"),
    "a long int that is no long one": (1, 1, 1, [8, 0, 0, -1, Ext(1, b"\x01")]),
    "a longer head": (1, 1, 1, b"\xdc\x00\x05\x08\x00\x00\xff\x01"),
    "bytes left over": (1, 1, 1, encode([8, 0, 0, -1, 1]) + b"\x00"),
    "bytes missing": (1, 1, 1, encode([8, 0, 0, -1, 1])[:-1]),
    "no bytes": (1, 1, 1, b""),
    "a million buckets": (1, 1, 1, [8, 0, 0, -1, *[1, 0] * 1_000_000, 1]),
    "an array of 4 G": (1, 1, 1, b"\xdd\xff\xff\xff\xff\x08"),
    "deep arrays": (1, 1, 1, b"\x91" * 4_000),
    "another extension": (1, 1, 1, Ext(3, encode([8, 0, 0, -1, 1]))),
    "no extension": (1, 1, 1, 5),
    "a sum that is not finite": (math.inf, 1, 1, [8, 0, 0, -1, 1]),
    "a sum that is packed": (Ext(2, b""), 1, 1, [8, 0, 0, -1, 1]),
    "a minimum that is NaN": (1, math.nan, 1, [8, 0, 0, -1, 1]),
    "a maximum that is no number": (1, 1, "1", [8, 0, 0, -1, 1]),
    "a minimum that is a pair": (1, (1e16, 1.0), 1, [8, 0, 0, -1, 1]),
}


def columns(total: Any, least: Any, most: Any, packed: Any) -> list[list[Any]]:
    """Return a state as untrusted input has it."""
    if isinstance(packed, list):
        packed = encode(packed)
    return [[total], [least], [most], [Ext(2, packed) if isinstance(packed, bytes) else packed]]


def test_states_that_are_taken() -> None:
    """The state of which the bad ones are variations is accepted."""
    assert HISTOGRAM.from_columns(columns(*GOOD), 1) == [HISTOGRAM.collect([1])]


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_states_that_are_refused(bad: tuple[Any, ...]) -> None:
    """Bytes that are no state, or not the one encoding of a state, are a `BadRecord` with a short reason."""
    for int_bytes_max in ((), (BATCH_INT_BYTES_MAX,)):
        with pytest.raises(BadRecord) as caught:
            HISTOGRAM.from_columns(columns(*bad), 1, *int_bytes_max)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("over", [3, 5])
def test_the_number_of_columns(over: int) -> None:
    """A state with more or fewer columns than four is bad."""
    with pytest.raises(BadRecord, match="4 columns"):
        HISTOGRAM.from_columns([[1]] * over, 1)


def test_counts_stay_far_below_what_a_state_may_have() -> None:
    """A batch has at most 2**64 - 1 observations, so that the merge of many can be stored and read again."""
    whole = [8, 0, 0, -1, 2**64 - 1]
    (state,) = HISTOGRAM.from_columns(columns(1, 1, 1, whole), 1, BATCH_INT_BYTES_MAX)
    for _ in range(40):
        state = HISTOGRAM.merge(state, state)
    assert count_of(state) == (2**64 - 1) << 40
    assert codec.decode_states(HISTOGRAM, codec.encode_states(HISTOGRAM, [state])) == [state]
    for beyond in ([8, 1, 0, -1, 2**64 - 1], [8, 0, 0, -1, Ext(1, b"\x01" + bytes(8))]):
        with pytest.raises(BadRecord, match="observations"):
            HISTOGRAM.from_columns(columns(1, 0 if beyond[1] else 1, 1, beyond), 1, BATCH_INT_BYTES_MAX)
    with pytest.raises(BadRecord, match="observations"):
        HISTOGRAM.from_columns(columns(1, 1, 1, [8, 0, 0, -1, Ext(1, b"\x01" + bytes(16))]), 1)


@pytest.mark.parametrize(
    "packed", [[8, 1, 0], [8, 0, 0, -1, 1], [8, 0, 0, -1, *[1, 0] * 150, 1]], ids=["zero", "one", "many"]
)
def test_histograms_are_decoded_in_bounded_memory(packed: list[int]) -> None:
    """The factor that the codec states holds for histograms of few bytes, and for those of many buckets."""
    count, item = 20_000 // len(packed), encode(Ext(2, encode(packed)))
    number = encode(0 if len(packed) == 3 else 1)
    most = encode(0 if len(packed) == 3 else 2 ** (149.5 / STEPS) if len(packed) > 5 else 1)
    body = b"\x94" + array(number, count) * 2 + array(most, count) + array(item, count)
    head = b"\x99\xa1p\0\0\0\0\xc2\xc0\x90\x91\x93\x93\xa1v\xa9histogram\x90"
    value = sealed(head + array(b"\xc4\x09" + bytes(8) + b"\x90", count) + body)
    assert codec.decode_batch(value).groups[0].states[0][3] == SCHEMA_MAX
    assert peak_bytes(reencoded_batch, value) < codec.MEMORY_FACTOR * len(value) + 100_000
