"""Metadata that members of a group exchange, in fields of Faust's metadata that Faust itself does not need.

A joining member says which topics it folds, which format it writes, and of which partitions it has caught-up copies. The
leader finds out which app's group this is and which format is the newest, and tells all members. A member of another app, or
with an older format, gets no partitions and ends: it does not have the topics, or can't read the entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pipeline.errors import Invalid, NewerFormat, PipelineError

NOWHERE = "http://0.0.0.0/"
"""Address of a member without a URL."""
CLIENT = "-membership-"
"""Text between the app and the member's name in its client id."""
_WARM = "warm:"
_STANDBYS = "standbys:"
_DELTAS, _CHANGELOG, _FORMAT = "deltas:", "changelog:", "format"


class AppIdentity(NamedTuple):
    """Topics, named as on the broker, and format: all members of a group must share them."""

    deltas: str
    changelog: str
    format: int

    def same_app(self, other: AppIdentity) -> bool:
        """Return whether both fold the same topics."""
        return (self.deltas, self.changelog) == (other.deltas, other.changelog)


NOBODY = AppIdentity("", "", 0)
"""Identity of a program that is not this one."""


def as_topic_groups(identity: AppIdentity, warm: Iterable[int] = ()) -> dict[str, int]:
    """Encode an identity and warm partitions as the topic groups of Faust's metadata."""
    groups = {_FORMAT: identity.format, _DELTAS + identity.deltas: 1, _CHANGELOG + identity.changelog: 1}
    return groups | {f"{_WARM}{number}": 1 for number in warm}


def identity_of(groups: Mapping[str, int]) -> AppIdentity:
    """Return the identity that `as_topic_groups` has encoded; `NOBODY` if there is none."""
    deltas = [it.removeprefix(_DELTAS) for it in groups if it.startswith(_DELTAS)]
    changelogs = [it.removeprefix(_CHANGELOG) for it in groups if it.startswith(_CHANGELOG)]
    return AppIdentity(deltas[0], changelogs[0], groups.get(_FORMAT, 0)) if deltas and changelogs else NOBODY


def warm_of(groups: Mapping[str, int]) -> frozenset[int]:
    """Return the partitions of which a member has a caught-up copy."""
    numbers = [group.removeprefix(_WARM) for group in groups if group.startswith(_WARM)]
    return frozenset(int(it) for it in numbers if it.isascii() and it.isdecimal() and len(it) < 10)


def elect(members: Mapping[AppIdentity, int], leader: AppIdentity) -> AppIdentity:
    """Return the group's identity: the app with most partitions, in its newest format. A tie goes to the leader's app."""
    apps: dict[tuple[str, str], int] = {}
    for identity, count in members.items():
        if identity != NOBODY:
            apps[identity.deltas, identity.changelog] = apps.get((identity.deltas, identity.changelog), 0) + count
    own = (leader.deltas, leader.changelog)
    app = max(apps, key=lambda it: (apps[it], it == own, it), default=own)
    return AppIdentity(*app, max((it.format for it in members if (it.deltas, it.changelog) == app), default=leader.format))


def refusal(own: AppIdentity, rules: AppIdentity, group: str) -> PipelineError | None:
    """Return why a member may not stay: `Invalid` if it is of another app, `NewerFormat` if it is older, None if it may
    stay.
    """
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
    """Return the key under which the leader's distribution holds standbys, as if it were a topic."""
    return _STANDBYS + changelog


def name_and_url(url: str) -> tuple[str, str]:
    """Return a member's name and URL (empty: none) from the address under which Faust knows it."""
    place, _, name = url.rpartition("#")
    return name, "" if place == NOWHERE else place.rstrip("/")
