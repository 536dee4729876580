"""Placement of partitions on members."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.placement import Assignment, MemberState, place

NUMBERS = st.frozensets(st.integers(0, 12))
MEMBERS = st.dictionaries(st.sampled_from("abcdef"), st.builds(MemberState, NUMBERS, NUMBERS, NUMBERS), min_size=1)


def warmed(placed: dict[str, Assignment]) -> dict[str, MemberState]:
    """Return the members of the next round, when all their copies are warm."""
    return {name: MemberState(it.actives, it.standbys, it.actives | it.standbys) for name, it in placed.items()}


@given(st.integers(0, 12), MEMBERS, st.integers(0, 3))
def test_whole(count: int, members: dict[str, MemberState], standby_count: int) -> None:
    """Each partition is active once and standby elsewhere, as often as asked for at least; no member has it twice."""
    placed = place(count, members, standby_count)
    assert sorted(number for it in placed.values() for number in it.actives) == list(range(count))
    for it in placed.values():
        assert not it.actives & it.standbys
    for number in range(count):
        copies = sum(number in it.standbys for it in placed.values())
        assert min(standby_count, len(members) - 1) <= copies <= min(standby_count + 1, len(members) - 1)


@given(st.integers(0, 12), MEMBERS, st.integers(0, 3))
def test_settles(count: int, members: dict[str, MemberState], standby_count: int) -> None:
    """With copies warm after each round the placement is level within three, and no active moves after that."""
    placed = place(count, members, standby_count)
    for _ in range(3):
        placed = place(count, warmed(placed), standby_count)
    loads = [len(it.actives) for it in placed.values()]
    assert max(loads) - min(loads) <= 1
    again = place(count, warmed(placed), standby_count)
    assert {name: it.actives for name, it in again.items()} == {name: it.actives for name, it in placed.items()}


@given(st.integers(0, 12), MEMBERS, st.integers(0, 3))
def test_moves_only_to_warm(count: int, members: dict[str, MemberState], standby_count: int) -> None:
    """A partition whose owner is there stays, or goes to a warm member."""
    for name, it in place(count, members, standby_count).items():
        for number in it.actives - members[name].actives:
            owned = any(number in other.actives for other in members.values())
            assert not owned or number in members[name].warm


def test_joiner_warms_first() -> None:
    """A cold joiner is given copies first, and actives in the round after."""
    alone = {"a": MemberState(frozenset(range(4)), warm=frozenset(range(4))), "b": MemberState()}
    first = place(4, alone, 0)
    assert first["a"].actives == frozenset(range(4))
    assert len(first["b"].standbys) == 2
    assert len(place(4, warmed(first), 0)["b"].actives) == 2
