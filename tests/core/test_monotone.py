"""Monotone sums in the core: their values, their bytes, and definitions that differ from them."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import codec
from pipeline.core.kinds import KIND_NAMES, KINDS, kind_of
from pipeline.core.query import describe, merged
from pipeline.core.record import Batch, Definition, Group, canonical, check_definition, definition_id, series_suffix
from pipeline.errors import BadRecord, Invalid
from tests.core import strategies as some
from tests.core.driver import Shell, batch, group, totals

PLAIN = Definition("v", "sum", ("a",))
RISING = Definition("v", "sum", ("a",), monotone=True)
X = series_suffix(("x",))


def test_only_a_sum_is_monotone() -> None:
    """A monotone definition of another kind is `Invalid`, and its bytes are a bad record."""
    check_definition(RISING, KIND_NAMES)
    for kind in KINDS.keys() - {"sum"}:
        definition = Definition("v", kind, monotone=True)
        with pytest.raises(Invalid, match=f"a {kind} cannot be monotone"):
            check_definition(definition, KIND_NAMES)
        with pytest.raises(BadRecord, match="cannot be monotone"):
            codec.decode_definition(codec.encode_definition(codec.DefinitionEntry(definition, 0, 0)))


def test_it_is_part_of_the_definition() -> None:
    """Monotone is part of a definition: it survives `canonical`, is named in messages, and makes another id."""
    definition = Definition("v", "sum", ("b", "a"), monotone=True)
    assert canonical(definition) == Definition("v", "sum", ("a", "b"), 0, True)
    assert canonical(definition) != canonical(msgspec.structs.replace(definition, monotone=False))
    assert (describe(PLAIN), describe(RISING)) == ("sum(a)", "monotone sum(a)")


def test_only_what_is_monotone_has_a_fifth_field() -> None:
    """Other definitions have three fields; five fields with false are read, too, and are the same definition."""
    wire = {False: ["v", "sum", ["a"]], True: ["v", "sum", ["a"], 0, True]}
    for definition in (PLAIN, RISING):
        entry = codec.DefinitionEntry(definition, 3, 4)
        value = codec.encode_definition(entry)
        assert msgspec.msgpack.decode(value[1:]) == [wire[definition.monotone], 3, 4]
        assert codec.decode_definition(value) == entry
        sealed = codec.encode_batch(Batch("p", 0, 0, 0, 0, 0, [Group(definition, [X], [1])]))
        assert msgspec.msgpack.decode(sealed[9:])[-1] == [[wire[definition.monotone], [X], [[1]]]]
    for tail in ([0], [0, False], [0, False, 0, []]):
        value = codec.VERSION + msgspec.msgpack.encode([["v", "sum", ["a"], *tail], 3, 4])
        assert codec.decode_definition(value).definition == PLAIN
        assert definition_id(codec.decode_definition(value).definition) == definition_id(PLAIN)
    for fields in (["v", "sum", ["a"], 0, 1], ["v", "sum", ["a"], 0, None], ["v", "sum", ["a"], 0, True, True]):
        with pytest.raises(BadRecord):
            codec.decode_definition(codec.VERSION + msgspec.msgpack.encode([fields, 3, 4]))


@pytest.mark.parametrize("state", [-1, -0.5, -(2**70), (-1e16, 1.0), -5e-324])
def test_a_negative_state_is_a_bad_record(state: Any) -> None:
    """A negative state anywhere in a batch of a monotone sum is bad. An error term may be negative, a sum not."""
    for states in ([state], [1, state, 2]):
        suffixes = [series_suffix((str(i),)) for i in range(len(states))]
        value = codec.encode_batch(Batch("p", 0, 0, 0, 0, 0, [Group(RISING, suffixes, states)]))
        with pytest.raises(BadRecord, match="monotone"):
            codec.decode_batch(value)
        codec.decode_batch(codec.encode_batch(Batch("p", 0, 0, 0, 0, 0, [Group(PLAIN, suffixes, states)])))
        rising = Group(RISING, suffixes, [(1e16, -1.0)] * len(states))
        assert codec.decode_batch(codec.encode_batch(Batch("p", 0, 0, 0, 0, 0, [rising]))).groups == [rising]


@given(st.lists(some.numbers, min_size=1, max_size=8))
def test_it_takes_what_a_sum_takes_unless_that_is_negative(deltas: list[Any]) -> None:
    """A monotone sum checks and collects as a sum, except for negative numbers; any state of it travels."""
    kind = kind_of(RISING)
    for delta in deltas:
        if delta < 0:
            with pytest.raises(Invalid, match="negative"):
                kind.check(delta, 0)
        else:
            assert kind.check(delta, 0) is delta
    rising = [abs(delta) for delta in deltas]
    state = kind.collect(rising)
    assert some.image(kind, state) == some.image(KINDS["sum"], KINDS["sum"].collect(rising))
    value = codec.encode_batch(Batch("p", 0, 0, 0, 0, 0, [Group(RISING, [X], [state])]))
    assert codec.decode_batch(value).groups[0].states == [state]
    for edge in (0, 0.0, -0.0, True, 2**64):
        assert kind.check(edge, 0) == edge
    with pytest.raises(Invalid, match="a number is needed"):
        kind.check("1", 0)


def test_a_negative_group_is_a_dead_letter() -> None:
    """No delta of a negative group is folded; its good neighbours and later groups are."""
    shell = Shell()
    good = batch(0, group(RISING, {("x",): 2}))
    wrong = Group(RISING, [series_suffix(("y",)), X], [1, -1])
    bad = batch(1, group(Definition("w", "max"), {(): 9}), wrong)
    shell.fold(good, bad, batch(2, group(RISING, {("x",): 3})))
    shell.commit()
    (letter,) = shell.letters()
    assert (letter.offset, letter.view, letter.value) == (1, "v", batch(1, wrong))
    assert "monotone" in letter.reason
    assert totals(shell, "w") == [9]
    assert totals(shell) == [5]
    assert shell.definition("v") == RISING
    shell.restart()
    shell.fold(batch(3, group(RISING, {("x",): 4})))
    shell.commit()
    assert len(shell.dead_letters) == 1, "the definition came back as it was"
    assert totals(shell) == [9]


@pytest.mark.parametrize(("first", "second"), [(PLAIN, RISING), (RISING, PLAIN)])
def test_to_be_monotone_or_not_makes_another_definition(first: Definition, second: Definition) -> None:
    """Both definitions live side by side, before and after a restart; a read merges them, and is monotone if both are."""
    shell = Shell()
    shell.fold(batch(0, group(first, {("x",): 1})), batch(1, group(second, {("x",): 2})))
    shell.commit()
    shell.restart()
    shell.fold(batch(2, group(second, {("x",): 4})))
    shell.commit()
    assert shell.letters() == []
    assert shell.series_of(first) == {("x",): 1}
    assert shell.series_of(second) == {("x",): 6}
    found = merged("v", shell.entries("v"))
    assert {*found.parts} == {first, second}
    assert not found.definition.monotone
