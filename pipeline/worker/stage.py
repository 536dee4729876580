"""Where a partition that is ours is, between its taking over and its end: a table of what can follow what."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Stage(Enum):
    """Where a partition is."""

    NEW = "new"
    OWNING = "owning"
    """The old owner is fenced; the store is not there yet, or not any more."""
    OPEN = "open"
    """The store is at a commit boundary: folding and committing can go on."""
    CLOSED = "closed"


class Step(Enum):
    """What can happen to it."""

    OWN = "own"
    """Take the right to commit, anew if it was ours before."""
    OPEN = "open"
    DISCARD = "discard"
    """Delete a store that can't be trusted; only another `OWN` brings it back."""
    CLOSE = "close"


TRANSITIONS: Mapping[tuple[Stage, Step], Stage] = {
    (Stage.NEW, Step.OWN): Stage.OWNING,
    (Stage.OWNING, Step.OWN): Stage.OWNING,
    (Stage.CLOSED, Step.OWN): Stage.OWNING,
    (Stage.OWNING, Step.OPEN): Stage.OPEN,
    (Stage.OWNING, Step.DISCARD): Stage.OWNING,
    (Stage.OPEN, Step.DISCARD): Stage.OWNING,
    (Stage.NEW, Step.CLOSE): Stage.CLOSED,
    (Stage.OWNING, Step.CLOSE): Stage.CLOSED,
    (Stage.OPEN, Step.CLOSE): Stage.CLOSED,
    (Stage.CLOSED, Step.CLOSE): Stage.CLOSED,
    (Stage.CLOSED, Step.DISCARD): Stage.CLOSED,
}
"""Every legal step; any other raises `IllegalTransition`."""
