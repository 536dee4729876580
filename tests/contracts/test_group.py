"""Metadata of group members, a leader's decisions on it, and an observer's view of the group."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import UNSET, UnsetType

from pipeline.adapters.faust.group import STABLE, ConsumerGroup
from pipeline.adapters.faust.member_metadata import (
    NOBODY,
    AppIdentity,
    as_topic_groups,
    elect,
    identity_of,
    name_and_url,
    refusal,
    warm_of,
)
from pipeline.adapters.kafka.options import parse_url
from pipeline.core.answer import PartitionStatus, RestoreStatus, Status
from pipeline.errors import Invalid, NewerFormat
from pipeline.ports import Member
from pipeline.roles.overview import Overview, _joined, client_for
from pipeline.secret import Secret
from pipeline.settings import ClientSettings

OURS, NEWER, OTHER = (
    AppIdentity("deltas", "changelog", 1),
    AppIdentity("deltas", "changelog", 2),
    AppIdentity("x.deltas", "x.changelog", 7),
)
RESTORE = RestoreStatus(10, 30, 5.0, 6.0)


def test_what_is_told_is_understood() -> None:
    """Topics, format and warm partitions come back; a program that sends none of them has none."""
    said = as_topic_groups(OURS, {1, 12})
    assert (identity_of(said), warm_of(said)) == (OURS, {1, 12})
    assert identity_of({"a-topic": 3}) == NOBODY
    assert name_and_url("http://h:1/#w.1") == ("w.1", "http://h:1")
    assert name_and_url("http://0.0.0.0/#w") == ("w", "")


@pytest.mark.parametrize(
    ("members", "leader", "expected"),
    [
        ({OURS: 0}, OURS, OURS),
        ({OURS: 4, OTHER: 0}, OTHER, OURS),
        ({OURS: 0, OTHER: 4}, OURS, OTHER),
        ({OURS: 0, OTHER: 0}, OURS, OURS),
        ({OURS: 0, OTHER: 0}, OTHER, OTHER),
        ({OURS: 4, NEWER: 0}, OURS, NEWER),
        ({OURS: 2, NEWER: 1, OTHER: 2}, OTHER, NEWER),
        ({OURS: 0, NOBODY: 9}, OURS, OURS),
    ],
)
def test_whose_group_it_is(members: dict[AppIdentity, int], leader: AppIdentity, expected: AppIdentity) -> None:
    """The group belongs to the app with most partitions, in its newest format; a tie goes to the leader's app."""
    assert elect(members, leader) == expected


def test_who_may_stay() -> None:
    """A member may stay if it folds the same topics and is not older; the error names the difference, with both sides."""
    assert refusal(OURS, OURS, "g") is None
    assert refusal(NEWER, OURS, "g") is None
    older, other, foreign = refusal(OURS, NEWER, "g"), refusal(OURS, OTHER, "g"), refusal(OURS, NOBODY, "g")
    assert isinstance(older, NewerFormat)
    assert "format 1" in str(older)
    assert "format 2" in str(older)
    assert isinstance(other, Invalid)
    assert "'x.deltas', not 'deltas'" in str(other)
    assert "is not this program's" in str(foreign)


def overview_of(state: str, *answers: Any) -> Overview:
    """Return a report on two members and three partitions, of which the last has no owner."""
    placed = (frozenset({0}), frozenset({1})), (frozenset({1}), frozenset({0}))
    names = zip(("a", "b"), placed, strict=True)
    moving = frozenset[int]()
    members = [Member(name, "", *(it if state == STABLE else (moving, moving))) for name, it in names]
    return _joined(
        parse_url("kafka://h:1"), ConsumerGroup(state, members), answers, {0: 100, 1: 50, 2: 7}, {0: 90, 2: 7}, []
    )


def folded(
    number: int, phase: str, next_offset: int, at_ms: int, restore: RestoreStatus | UnsetType = UNSET
) -> PartitionStatus:
    return PartitionStatus(partition=number, phase=phase, next_offset=next_offset, committed_at_ms=at_ms, restore=restore)


def copied(number: int, phase: str, restore: RestoreStatus | UnsetType = UNSET) -> PartitionStatus:
    return PartitionStatus(partition=number, phase=phase, changelog_remaining=30, restore=restore)


def answer(name: str, has: PartitionStatus, standby: PartitionStatus) -> Status:
    return Status(
        role="worker",
        app="pipeline",
        name=name,
        ready=True,
        at_ms=5_000,
        partition_count=3,
        partitions=[has],
        standbys=[standby],
        fenced_count=2,
    )


@pytest.mark.parametrize("state", [STABLE, "PreparingRebalance"])
def test_a_group_is_joined_with_what_members_say(state: str) -> None:
    """A report has lag, age of the last commit, restores with the time left, and fences, also while partitions move."""
    a = answer("a", folded(0, "folding", 96, 4_000), copied(1, "restoring", RESTORE))
    b = answer("b", folded(1, "assigned", 0, 0, RESTORE), copied(0, "following"))
    found = overview_of(state, a, b)
    assert [(it.name, it.partitions, it.standbys, it.lag, it.fenced_count) for it in found.members] == [
        ("a", [0], [1], 4, 2), ("b", [1], [0], None, 2),
    ]  # fmt: skip
    zero, one, two = found.partitions
    assert (zero.member, zero.phase, zero.next_offset, zero.lag, zero.commit_age_ms) == ("a", "folding", 96, 4, 1_000)
    assert (one.member, one.phase, one.next_offset, one.lag, one.commit_age_ms) == ("b", "restoring", None, None, None)
    assert one.restore == RESTORE
    assert [(it.member, it.phase, it.restore) for it in (*zero.standbys, *one.standbys)] == [
        ("b", "following", None), ("a", "restoring", RESTORE),
    ]  # fmt: skip
    assert (two.member, two.phase, two.lag, two.standbys) == (None, "unknown", 0, [])


def test_an_unreachable_member_hides_nothing_else() -> None:
    """The group still shows an unreachable member's partitions, and the mirrored positions their progress."""
    b = answer("b", folded(1, "folding", 50, 4_000), copied(0, "following"))
    found = overview_of(STABLE, "timed out", b)
    assert [(it.name, it.error, it.lag) for it in found.members] == [("a", "timed out", 10), ("b", None, 0)]
    zero, one, _ = found.partitions
    assert (zero.member, zero.phase, zero.next_offset, zero.commit_age_ms) == ("a", "unknown", 90, None)
    assert [(it.member, it.phase) for it in one.standbys] == [("a", "unknown")]


def test_what_an_unreachable_member_has_while_partitions_move_is_unknown() -> None:
    """An unreachable member's partitions and lag are unknown, not none, while partitions move."""
    b = answer("b", folded(1, "folding", 50, 4_000), copied(0, "following"))
    a, _ = overview_of("PreparingRebalance", "timed out", b).members
    assert (a.partitions, a.standbys, a.lag) == (None, None, None)


@pytest.mark.parametrize(
    ("url", "ca_file", "is_sent"),
    [
        ("http://127.0.0.1:6066", "", True),
        ("http://[::1]:6066", "", True),
        ("https://worker:6066", "ca.pem", True),
        ("https://worker:6066", "", False),
        ("http://worker:6066", "ca.pem", False),
        ("http://127.0.0.1@worker:6066", "", False),
        ("http://10.1.2.3:6066", "ca.pem", False),
    ],
)
@pytest.mark.parametrize("given", [{"token": Secret("secret")}, {"token_file": "token"}])
def test_a_member_that_can_be_a_stranger_gets_no_token(url: str, ca_file: str, is_sent: bool, given: Any) -> None:
    """The access token is sent only where a member's name in the group can't lead to a stranger's server."""
    client = ClientSettings(ca_file=ca_file, **given)
    found = client_for(url, client)
    assert (found == client) is is_sent
    assert is_sent or not (found.token or found.token_file)
    assert found.ca_file == ca_file
