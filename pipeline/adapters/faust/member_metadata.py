"""What members of a group tell each other in Faust's metadata, in fields that Faust leaves to us; and what follows from it.

One that joins says which topics it folds, which format it writes, and what it could take over at once. The leader finds out
which app's group this is and what the newest format in it is, and tells all. Who is of another app, or older, is given
nothing and ends: topics of another app would be folded by those who do not have them, and entries of a newer format can't
be read by an older program.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pipeline.errors import Invalid, NewerFormat, PipelineError

NOWHERE = "http://0.0.0.0/"
"""The address of a member that has none."""
CLIENT = "-membership-"
"""Between the app and the member's name in its client id."""
_WARM = "warm:"
_STANDBYS = "standbys:"
_DELTAS, _CHANGELOG, _FORMAT = "deltas:", "changelog:", "format"


class AppIdentity(NamedTuple):
    """What members have to have in common: topics, by their names on the broker, and the format that they write."""

    deltas: str
    changelog: str
    format: int

    def same_app(self, other: AppIdentity) -> bool:
        """Whether they fold the same topics."""
        return (self.deltas, self.changelog) == (other.deltas, other.changelog)


NOBODY = AppIdentity("", "", 0)
"""Of a program that is none of ours."""


def as_topic_groups(identity: AppIdentity, warm: Iterable[int] = ()) -> dict[str, int]:
    """Encode an identity, and what is warm, as the topic groups of Faust's metadata, which Faust does not need."""
    said = {_FORMAT: identity.format, _DELTAS + identity.deltas: 1, _CHANGELOG + identity.changelog: 1}
    return said | {f"{_WARM}{number}": 1 for number in warm}


def identity_of(groups: Mapping[str, int]) -> AppIdentity:
    """Return the identity that `as_topic_groups` has encoded; `NOBODY` if there is none."""
    deltas = [it.removeprefix(_DELTAS) for it in groups if it.startswith(_DELTAS)]
    changelogs = [it.removeprefix(_CHANGELOG) for it in groups if it.startswith(_CHANGELOG)]
    return AppIdentity(deltas[0], changelogs[0], groups.get(_FORMAT, 0)) if deltas and changelogs else NOBODY


def warm_of(groups: Mapping[str, int]) -> frozenset[int]:
    """The partitions that a member could take over at once."""
    return frozenset(int(group.removeprefix(_WARM)) for group in groups if group.startswith(_WARM))


def elect(members: Mapping[AppIdentity, int], leader: AppIdentity) -> AppIdentity:
    """Return whose group this is: of the app with most partitions, by `members`, in the newest format that it has there.

    Of apps that have as many, it is the leader's.
    """
    apps: dict[tuple[str, str], int] = {}
    for identity, count in members.items():
        if identity != NOBODY:
            apps[identity.deltas, identity.changelog] = apps.get((identity.deltas, identity.changelog), 0) + count
    own = (leader.deltas, leader.changelog)
    app = max(apps, key=lambda it: (apps[it], it == own, it), default=own)
    return AppIdentity(*app, max((it.format for it in members if (it.deltas, it.changelog) == app), default=leader.format))


def refusal(own: AppIdentity, rules: AppIdentity, group: str) -> PipelineError | None:
    """Why a member may not stay: `Invalid` if it is of another app, `NewerFormat` if it is older. None: it may."""
    if not own.same_app(rules):
        whose = "is not this program's" if rules == NOBODY else f"folds topic {rules.deltas!r}"
        return Invalid(f"group {group!r} is of another app, which {whose}, not {own.deltas!r}: give this app another name")
    if own.format < rules.format:
        return NewerFormat(
            f"this program writes format {own.format}, and group {group!r} has a member that writes format {rules.format}: "
            "start the newer program"
        )
    return None


def standbys_key(changelog: str) -> str:
    """Where the leader's distribution has a member's standbys: beside the topics, as if it were one."""
    return _STANDBYS + changelog


def name_and_url(url: str) -> tuple[str, str]:
    """A member's name, and where it can be asked (empty: nowhere), of the address that Faust knows it by."""
    place, _, name = url.rpartition("#")
    return name, "" if place == NOWHERE else place.rstrip("/")


def partitions_of(metadata: Mapping[str, Any], deltas: str, changelog: str) -> tuple[frozenset[int], frozenset[int]]:
    """Actives and standbys of an assignment, as Faust's metadata have it."""
    assignment = metadata.get("assignment") or {}
    actives, standbys = assignment.get("actives") or {}, assignment.get("standbys") or {}
    return frozenset(actives.get(deltas, ())), frozenset(standbys.get(changelog, ()))
