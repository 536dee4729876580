"""Assignment of partitions to the members of a group: one folds each partition, others keep standby copies of it.

Sticky and balanced. A partition whose owner is gone moves at once, to a warm member (one with a copy that is up to date) if
there is one. A partition whose owner is there moves only to a warm member: a member that has too few partitions gets a
standby copy first, and takes the partition over in a later round. So after a join no partition waits for a restore.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class MemberState(NamedTuple):
    """Partitions that a member had in the last round, and those that it could take over at once."""

    actives: frozenset[int] = frozenset()
    standbys: frozenset[int] = frozenset()
    warm: frozenset[int] = frozenset()


class Assignment(NamedTuple):
    """Partitions that a member has in this round."""

    actives: frozenset[int]
    standbys: frozenset[int]


def place(partition_count: int, members: Mapping[str, MemberState], standby_count: int) -> dict[str, Assignment]:
    """Assign each partition to one member as active, and to `standby_count` others, if there are so many, as standby.

    The result depends on the arguments only. Nothing moves if no two members' counts of actives differ by more than one.
    """
    names = sorted(members)
    if not names:
        return {}
    owners = _owners(partition_count, members, names)
    planned = _level(owners, members, names)
    copies = _copies(partition_count, owners, planned, members, names, standby_count)
    return {
        name: Assignment(
            frozenset(number for number, owner in owners.items() if owner == name),
            frozenset(number for number, holders in copies.items() if name in holders),
        )
        for name in names
    }


def _owners(count: int, members: Mapping[str, MemberState], names: list[str]) -> dict[int, str]:
    """Return the owner of each partition: the one of before; else, within a fair share, a warm member."""
    owners: dict[int, str] = {}
    for name in names:
        for number in sorted(members[name].actives):
            if number < count:
                owners.setdefault(number, name)
    loads = _loads(owners, names)
    share = -(-count // len(names))
    for number in range(count):
        if number not in owners:
            free = [name for name in names if loads[name] < share]
            owner = min(free, key=lambda it: (*_coldness(members[it], number), loads[it], it))
            owners[number] = owner
            loads[owner] += 1
    return owners


def _level(owners: dict[int, str], members: Mapping[str, MemberState], names: list[str]) -> dict[int, str]:
    """Move actives until members are level; return, by partition, the cold members whose moves are only planned."""
    planned: dict[int, str] = {}
    loads = _loads(owners, names)
    while True:
        taker = min(names, key=lambda it: (loads[it], it))
        givers = [name for name in names if loads[name] > loads[taker] + 1]
        options = [number for number, owner in owners.items() if owner in givers and number not in planned]
        if not options:
            return planned
        number = min(options, key=lambda it: (*_coldness(members[taker], it), -loads[owners[it]], it))
        loads[owners[number]] -= 1
        loads[taker] += 1
        if number in members[taker].warm:
            owners[number] = taker
        else:
            planned[number] = taker


def _copies(
    count: int,
    owners: Mapping[int, str],
    planned: Mapping[int, str],
    members: Mapping[str, MemberState],
    names: list[str],
    standby_count: int,
) -> dict[int, set[str]]:
    copies: dict[int, set[str]] = {number: set() for number in range(count)}
    loads = dict.fromkeys(names, 0)
    wanted = min(standby_count, len(names) - 1)
    share = -(-count * wanted // len(names))
    for number in range(count):
        others = [name for name in names if name != owners[number]]
        ranked = sorted(others, key=lambda it: (loads[it] >= share, *_coldness(members[it], number), loads[it], it))
        copies[number].update(ranked[:wanted])
        for name in ranked[:wanted]:
            loads[name] += 1
    for number, taker in planned.items():
        copies[number].add(taker)
    return copies


def _loads(owners: Mapping[int, str], names: list[str]) -> dict[str, int]:
    loads = dict.fromkeys(names, 0)
    for owner in owners.values():
        loads[owner] += 1
    return loads


def _coldness(member: MemberState, number: int) -> tuple[bool, bool]:
    return (number not in member.warm and number not in member.actives, number not in member.standbys)
