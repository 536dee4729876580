"""The algebra: every kind is a commutative monoid, exactly where numbers add exactly."""

import math
from collections.abc import Sequence
from copy import deepcopy
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.codec import decode_states, encode_states
from pipeline.core.kinds import INT_BITS_MAX, KINDS, TEXT_BYTES_MAX, TS_MS_MAX, Kind, State, add, number, numbers
from pipeline.errors import Invalid
from tests.core import strategies as some
from tests.support import examples

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
numeric_kind = pytest.mark.parametrize("kind", [KINDS[name] for name in ("sum", "min", "max", "mean")])


def fold(kind: Kind, parts: Sequence[State]) -> State:
    state = parts[0]
    for part in parts[1:]:
        state = kind.merge(state, part)
    return state


@every_kind
@given(data=st.data())
def test_merging_any_split_is_collecting_the_whole(kind: Kind, data: st.DataObject) -> None:
    """However a run of deltas is cut up, collected and merged, the state is that of the whole run."""
    (run,) = data.draw(some.runs(kind.name, size_max=12))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(run)))) | {len(run)})
    parts = [kind.collect(run[start:end]) for start, end in zip([0, *cuts], cuts, strict=False)]
    whole = kind.collect(run)
    assert some.same(kind, fold(kind, parts), whole)
    order = data.draw(st.permutations(parts))
    assert some.same(kind, fold(kind, order), whole)
    assert some.same(kind, kind.collect(data.draw(st.permutations(run))), whole)


@every_kind
@given(data=st.data())
def test_associative(kind: Kind, data: st.DataObject) -> None:
    """(a + b) + c = a + (b + c)."""
    a, b, c = data.draw(some.states(kind.name, count=3))
    assert some.same(kind, kind.merge(kind.merge(a, b), c), kind.merge(a, kind.merge(b, c)))


@every_kind
@given(data=st.data())
def test_commutative(kind: Kind, data: st.DataObject) -> None:
    """a + b = b + a."""
    a, b = data.draw(some.states(kind.name, count=2))
    assert some.same(kind, kind.merge(a, b), kind.merge(b, a))


@every_kind
@given(data=st.data())
def test_arguments_are_unchanged(kind: Kind, data: st.DataObject) -> None:
    """`merge` and `collect` leave what they are given as it was, and nothing they return shares its later changes."""
    a, b = data.draw(some.states(kind.name, count=2))
    (run,) = data.draw(some.runs(kind.name))
    states = [some.image(kind, it) for it in (a, b)]
    before = deepcopy(run)
    merged = kind.merge(a, b)
    image = some.image(kind, merged)
    kind.merge(merged, b)
    kind.merge(a, merged)
    kind.collect(run)
    assert repr(run) == repr(before)
    assert [some.image(kind, it) for it in (a, b)] == states
    assert some.image(kind, merged) == image


@every_kind
@given(data=st.data())
def test_equal_deltas_make_equal_bytes(kind: Kind, data: st.DataObject) -> None:
    """A state is a function of its deltas: two processes that collect the same run store the same bytes."""
    (run,) = data.draw(some.runs(kind.name))
    state = kind.collect(run)
    assert some.image(kind, state) == some.image(kind, kind.collect(deepcopy(run)))
    assert some.image(kind, decode_states(kind, encode_states(kind, [state]))[0]) == some.image(kind, state)


@every_kind
def test_nothing_is_the_identity(kind: Kind) -> None:
    """A series without deltas has no state, so the identity has no entry and no bytes."""
    assert encode_states(kind, []) == []
    assert decode_states(kind, []) == []


@numeric_kind
@given(value=some.numbers)
def test_one_delta_is_its_own_answer(kind: Kind, value: float) -> None:
    """A series with one delta answers that delta."""
    answer = kind.answer(kind.collect([kind.check(value, 0)]))
    assert answer == (value if kind.name != "mean" or type(value) is float else kind.answer((value, 1)))


def exact(total: Any) -> Fraction:
    """Return the exact value of a sum: its float and its error term together."""
    return sum(map(Fraction, total), Fraction(0)) if type(total) is tuple else Fraction(total)


def merged_in_any_tree(data: st.DataObject, kind: Kind, values: list[Any]) -> State:
    """Return the state of `values`, collected in runs and merged in an order and grouping that is drawn."""
    shuffled = data.draw(st.permutations(values))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(values)))) | {len(values)})
    parts = [kind.collect(shuffled[start:end]) for start, end in zip([0, *cuts], cuts, strict=False)]
    while len(parts) > 1:
        at = data.draw(st.integers(0, len(parts) - 2))
        parts[at : at + 2] = [kind.merge(parts[at], parts[at + 1])]
    return parts[0]


EDGES = [1.7976931348623157e308, -1.7976931348623157e308, 1e308, -1e308, 5e-324, 2.0**-1022, 1e16, 1.0, -1e16, 2.0**53, -0.0]
sums = st.lists(some.numbers | st.sampled_from(EDGES) | some.grid, min_size=1, max_size=16)


@settings(max_examples=examples(300))
@given(values=sums, data=st.data())
def test_sums_are_exact_to_100_bits(values: list[Any], data: st.DataObject) -> None:
    """Sums equal exact fractions, in any order and grouping: ints are exact, and a float's answer is off by its last bit at
    most, unless all but 2**-100 of the total has cancelled out. No sum is ever an infinity or NaN.
    """
    tolerance = sum(abs(Fraction(value)) for value in values) / 2**100
    true = sum(map(Fraction, values))
    for kind in (KINDS["sum"], KINDS["mean"]):
        state = merged_in_any_tree(data, kind, values)
        total, count = (state, 1) if kind is KINDS["sum"] else state
        assert_is_total(total)
        if {*map(type, values)} == {int}:
            assert total == true
        assert abs(exact(total) - true) <= tolerance
        answer = kind.answer(state)
        last_bit = Fraction(0) if type(answer) is int else Fraction(math.ulp(answer))
        assert abs(Fraction(answer) - true / count) <= last_bit + tolerance


def assert_is_total(total: Any) -> None:
    """Check that a sum is an int, a finite float, or a float with the error that its last bit could not hold."""
    if type(total) is tuple:
        high, low = total
        assert type(high) is type(low) is float
        assert low != 0
        assert high + low == high
        assert math.isfinite(high)
    else:
        assert type(total) in (int, float)
        assert math.isfinite(total) if type(total) is float else True


totals = sums.map(KINDS["sum"].collect)


@settings(max_examples=examples(300))
@given(a=totals, b=totals)
def test_float_sums_commute_to_the_last_bit(a: Any, b: Any) -> None:
    """a + b and b + a are the same bytes, whatever the operands."""
    assert some.image(KINDS["sum"], add(a, b)) == some.image(KINDS["sum"], add(b, a))


@pytest.mark.parametrize("edge", EDGES)
@given(b=totals | st.sampled_from(EDGES) | st.floats(-1e300, 1e300))
def test_sums_commute_at_the_edges(edge: float, b: Any) -> None:
    """Sums of the largest and smallest floats, and of floats where ints end, commute, too."""
    there, back = add(edge, b), add(b, edge)
    assert_is_total(there)
    assert (type(there), some.image(KINDS["sum"], there)) == (type(back), some.image(KINDS["sum"], back))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@settings(max_examples=examples(200))
@given(data=st.data())
def test_columns_are_merged_as_each_state_is(kind: Kind, data: st.DataObject) -> None:
    """`merge_all` is `merge`, to the bit, for columns of one type and of many, at the edges of floats too."""
    states = data.draw(st.sampled_from([some.any_states(kind.name), some.states(kind.name)])).map(lambda found: found[0])
    if kind.name == "sum":
        plain = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(EDGES)
        floats = st.lists(plain, min_size=1, max_size=4).map(kind.collect).filter(lambda it: type(it) is not int)
        states = data.draw(st.sampled_from([states, plain, floats, some.big_ints, plain | floats]))
    rows = data.draw(st.lists(st.tuples(states, states), max_size=6))
    a, b = [row[0] for row in rows], [row[1] for row in rows]
    merged = [kind.merge(*row) for row in rows]
    assert encode_states(kind, kind.merge_all(a, b)) == encode_states(kind, merged)
    assert [*map(type, kind.merge_all(a, b))] == [*map(type, merged)]


def test_no_delta_vanishes_beside_a_large_one() -> None:
    """Small deltas, which a plain float would forget, are still counted when the large number has gone again."""
    merge = KINDS["sum"].merge
    assert merge(merge(1e16, 1), -1e16) == 1
    assert merge(merge(1e16, 1.0), -1e16) == 1
    total = merge(2**53 + 1_000, 0.0)
    for _ in range(20):
        total = merge(total, 1)
    assert merge(total, -(2**53)) == 1_020
    assert KINDS["sum"].collect([1e16, 1.0, -1e16]) == 1
    assert KINDS["sum"].collect([1e16, 1, -1e16, 0.5]) == 1.5
    assert KINDS["mean"].answer(KINDS["mean"].collect([1e308, 1e308])) == 1e308
    assert KINDS["mean"].answer(KINDS["mean"].merge((1e16, 1), KINDS["mean"].merge((1.0, 1), (-1e16, 1)))) == 1 / 3


@given(values=st.lists(some.big_ints, min_size=1))
def test_ints_are_exact_at_any_size(values: list[int]) -> None:
    """Sums and means of ints never go through a float."""
    assert KINDS["sum"].collect(values) == sum(values)
    assert type(KINDS["sum"].collect(values)) is int
    assert KINDS["mean"].collect(values) == (sum(values), len(values))
    assert KINDS["min"].collect(values) == min(values)
    assert KINDS["max"].collect(values) == max(values)


def test_ints_and_floats_compare_exactly() -> None:
    """2**53 + 1 is larger than 2.0**53, although they are the same float."""
    assert KINDS["max"].merge(2.0**53, 2**53 + 1) == 2**53 + 1
    assert KINDS["min"].merge(2**53 + 1, 2.0**53) == 2.0**53
    assert KINDS["max"].collect([-1e308, -(10**400)]) == -1e308


def test_a_sum_beyond_floats_goes_on_as_an_int() -> None:
    """A sum beyond all floats is an int, as exact as a float of that size; below, it is a float again."""
    merge = KINDS["sum"].merge
    big = int(1e308)
    assert merge(1e308, 1e308) == 2 * big
    assert merge(merge(1e308, 1e308), -1e308) == 1e308
    assert merge(merge(merge(merge(1e308, 1e308), -1e308), 0.5), -1e308) == 0.5
    assert merge((1e308, 1e290), (1e308, 1e290)) == 2 * (big + int(1e290))
    assert merge(10**400, 0.5) == 10**400
    assert merge(0.5, -(10**400)) == -(10**400)
    assert merge(10**400, -(10**400)) == 0
    assert KINDS["sum"].collect([0.5, 10**400, 1]) == 10**400 + 1
    assert KINDS["sum"].collect([1e308] * 4) == 4 * big
    assert KINDS["mean"].merge((1e308, 1), (1e308, 2)) == (2 * big, 3)
    assert KINDS["mean"].collect([-1e308, -(10**400)]) == (-(10**400) - big, 2)


def test_answers_of_sum() -> None:
    """A sum answers an int of any size, or the float that is nearest to the exact sum."""
    answer = KINDS["sum"].answer
    for state in (10**400, 0, 0.5):
        assert answer(state) is state
    assert answer((1e16, 1.0)) == 1e16


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ((6, 4), 1.5),
        ((0, 3), 0.0),
        ((1.5, 2), 0.75),
        ((2**64, 2), 2.0**63),
        ((10**400, 10), 10**399),
        ((-(10**400), 10**400), -1.0),
        ((3, 10**400), 0.0),
        ((1.5, 10**400), 0.0),
        ((1e308, 2**1023), 1e308 / 2**1023),
        ((1e308, 2**1024), 1e308 / 2**1023 / 2),
        ((-1e308, 10**309), -0.1),
        (((1e308, 1e290), 2**1024), 1e308 / 2**1023 / 2),
        (((1e16, 1.0), 1), 1e16),
        (((1e16, 1.0), 2**53), (10**16 + 1) / 2**53),
        (((3.0, 2.0**-53), 3), 1.0),
        ((2 * int(1e308), 2), 1e308),
    ],
)
def test_answers_of_mean(state: State, expected: float) -> None:
    """The mean is sum by count, whatever their sizes: there is always a number."""
    assert KINDS["mean"].answer(state) == expected


sets = st.tuples(some.stamps, some.recorded, some.scalars)


@given(a=sets, b=sets)
def test_last_is_the_newest(a: tuple[int, int, Any], b: tuple[int, int, Any]) -> None:
    """The newer timestamp wins, then the later recording, then the larger encoding, whichever came first."""
    kind = KINDS["last"]
    winner = kind.merge(a, b)
    assert winner is a or winner is b
    loser = b if winner is a else a
    image_won, image_lost = some.image(kind, winner), some.image(kind, loser)
    assert winner[:2] > loser[:2] or (winner[:2] == loser[:2] and image_won >= image_lost)
    assert some.image(kind, kind.merge(b, a)) == image_won


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (0, 1), (1, None), (None, False), (False, True), (True, 0.5), ("a", "b"), ("b", "aa"), (1, 1.0), (1, True),
        (5, "a"), (0.0, -0.0), (2**63, 2**64 - 1), (2**70, 1.0), ("x" * 31, "x" * 32), ("x", -1), (-2, -1), (2**70, 2**71),
    ],
)  # fmt: skip
def test_ties_of_last(small: Any, large: Any) -> None:
    """Ties are decided by the first byte of msgpack, then by the next ones: the same everywhere and for ever."""
    kind = KINDS["last"]
    assert kind.merge((7, 3, small), (7, 3, large))[2] is large
    assert kind.merge((7, 3, large), (7, 3, small))[2] is large
    assert kind.merge((7, 4, small), (7, 3, large))[2] is small
    assert kind.merge((8, 0, small), (7, 3, large))[2] is small


@given(values=st.lists(some.scalars, min_size=2, max_size=5), ts_ms=some.stamps)
def test_of_two_sets_in_one_millisecond_the_later_wins(values: list[Any], ts_ms: int) -> None:
    """Sets of one run may have one time of recording, sets of two states may not."""
    kind = KINDS["last"]
    for gap in (0, 1):
        run = [kind.check(value, ts_ms, 5 + gap * i) for i, value in enumerate(values)]
        assert kind.collect(run) is run[-1]
    parts = [kind.collect([delta]) for delta in run]
    assert fold(kind, parts) is fold(kind, parts[::-1]) is run[-1]


def test_answers_of_last() -> None:
    """`last` answers the text, number, bool or null that was set."""
    for value in ("", "text", 0, 1.5, True, False, None, 10**100):
        assert KINDS["last"].answer((5, 6, value)) is value


# What may be recorded


class Weight(IntEnum):
    HEAVY = 7


class Colour(StrEnum):
    RED = "red"


class OldColour(str, Enum):  # noqa: UP042
    RED = "red"


class Text(str):
    __slots__ = ()


class Celsius(float):
    __slots__ = ()


class Indexed:
    def __index__(self) -> int:
        return 5


class Floating:
    def __float__(self) -> float:
        return 2.5


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0), (-3, -3), (2.5, 2.5), (-0.0, -0.0), (True, 1), (False, 0), (10**100, 10**100), (Weight.HEAVY, 7),
        (Decimal("1.25"), 1.25), (Decimal(3), 3.0), (Fraction(1, 4), 0.25), (Celsius(1.5), 1.5), (Indexed(), 5),
        (Floating(), 2.5), (2**INT_BITS_MAX - 1, 2**INT_BITS_MAX - 1), (1 - 2**INT_BITS_MAX, 1 - 2**INT_BITS_MAX),
        (1.7976931348623157e308, 1.7976931348623157e308), (5e-324, 5e-324),
    ],
)  # fmt: skip
@numeric_kind
def test_numbers_that_are_taken(kind: Kind, value: Any, expected: float) -> None:
    """Any real, finite number becomes a plain int or float of the same value; bools are ints."""
    for found in (number(value), kind.check(value, 0), *numbers([value]), *numbers([1, value, 2.5])[1:2]):
        assert found == expected
        assert type(found) is type(expected)
        assert math.copysign(1, found) == math.copysign(1, expected) if type(found) is float else True


@pytest.mark.parametrize(
    "value",
    [
        math.nan, math.inf, -math.inf, None, "", "1", b"1", bytearray(b"1"), memoryview(b"1"), Text("1"), Colour.RED,
        Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), Decimal("1e400"), Fraction(10**400), 1j, complex(1, 0),
        {1}, [1], (1,), {1: 1}, object(), int, lambda: 1, 2**INT_BITS_MAX, -(2**INT_BITS_MAX), Celsius("nan"), range(1),
    ],
    ids=lambda value: f"{value!r:.30}".partition(" at 0x")[0],
)  # fmt: skip
@numeric_kind
def test_numbers_that_are_refused(kind: Kind, value: Any) -> None:
    """Anything but a finite real number of a size that can be stored is `Invalid`, with a short message."""
    with pytest.raises(Invalid) as caught:
        number(value)
    assert len(str(caught.value)) < 200
    with pytest.raises(Invalid):
        kind.check(value, 0)


def test_numpy_scalars_become_plain() -> None:
    """NumPy's numbers become plain ones, so that its types never reach a batch; its NaN is refused like any."""
    np = pytest.importorskip("numpy")
    integral = [np.int8(3), np.int64(3), np.uint64(3), np.array(3)]
    real = [np.float16(3), np.float32(3), np.float64(3), np.longdouble(3), np.array(3.0)]
    assert [(number(v), type(number(v))) for v in integral] == [(3, int)] * len(integral)
    assert [(number(v), type(number(v))) for v in real] == [(3.0, float)] * len(real)
    assert number(np.uint64(2**64 - 1)) == 2**64 - 1
    assert number(np.bool_(True)) == 1
    assert type(KINDS["sum"].collect([np.int64(2), np.int64(3)])) is int
    assert KINDS["max"].collect([np.float64(2.5), 1]) == 2.5
    assert KINDS["last"].check(np.float32(1.5), 4, 5) == (4, 5, 1.5)
    for value in (
        np.float64("nan"),
        np.float32("inf"),
        np.str_("1"),
        np.bytes_(b"1"),
        np.array([1, 2]),
        np.datetime64(0, "s"),
    ):
        with pytest.raises(Invalid):
            number(value)


@pytest.mark.parametrize("value", ["", "text", "\0", None, True, False, 0, -1.5, 10**100, Decimal("0.5"), "é" * 32_768])
def test_values_that_last_takes(value: Any) -> None:
    """`last` takes text, numbers, bools and None as they are."""
    ts_ms, recorded_ns, found = KINDS["last"].check(value, 17, 18)
    assert (ts_ms, recorded_ns, found) == (17, 18, value)
    assert type(found) is (float if isinstance(value, Decimal) else type(value))


@pytest.mark.parametrize("value", [Text("red"), Colour.RED, OldColour.RED])
def test_last_keeps_the_text_of_a_text_like_value(value: str) -> None:
    """A subclass of str is stored as the text that it is, not as its name."""
    *_, found = KINDS["last"].check(value, 0)
    assert found == "red"
    assert type(found) is str


@pytest.mark.parametrize(
    "value",
    [
        math.nan, math.inf, b"x", [1], {1: 2}, object(), 1j, 2**INT_BITS_MAX, "\ud800", "a\udfff",
        "x" * (TEXT_BYTES_MAX + 1), "é" * 32_769, "\U0001f600" * 16_385, "\ud800" * TEXT_BYTES_MAX,
    ],
    ids=lambda value: f"{value!r:.20}".partition(" at 0x")[0],
)  # fmt: skip
def test_values_that_last_refuses(value: Any) -> None:
    """A value that is too long, not Unicode, not finite, or of another type is `Invalid`, with a short message."""
    with pytest.raises(Invalid) as caught:
        KINDS["last"].check(value, 0)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("ts_ms", [-1, TS_MS_MAX + 1, 1.0, True, None, "5", 10**400, math.nan])
def test_timestamps_that_last_refuses(ts_ms: Any) -> None:
    """A timestamp is an int of milliseconds since 1970, in a range that floats hold exactly too."""
    with pytest.raises(Invalid):
        KINDS["last"].check(1, ts_ms)
    assert KINDS["last"].check(1, 0) == (0, 0, 1)
    assert KINDS["last"].check(1, TS_MS_MAX) == (TS_MS_MAX, 0, 1)


@every_kind
@given(data=st.data())
def test_check_takes_or_refuses_anything(kind: Kind, data: st.DataObject) -> None:
    """For any value `check` returns a delta that collects and is stored, or raises `Invalid`: nothing else."""
    value = data.draw(some.wire_values | st.decimals() | st.fractions() | st.complex_numbers() | st.dates() | some.numbers)
    try:
        delta = kind.check(value, data.draw(some.stamps))
    except Invalid:
        return
    state = kind.collect([delta, delta])
    assert some.same(kind, decode_states(kind, encode_states(kind, [state]))[0], state)
    kind.answer(state)


def test_an_error_term_that_is_rounded_up_to_half_of_the_last_bit_moves_the_float() -> None:
    """A collected sum can be read again; a rounded error term would otherwise make its group refused."""
    kind = KINDS["sum"]
    state = kind.collect([1 + 2**-52, 2**-53, -(2**-120)])
    assert decode_states(kind, encode_states(kind, [state])) == [state]
    assert sum(map(Fraction, state)) == Fraction(1 + 2**-52) + Fraction(2**-53)
