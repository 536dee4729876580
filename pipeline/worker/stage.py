"""Stages of a partition that a worker owns, and what leads from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Stage(Enum):
    """State of a partition's store, and of the right to commit."""

    NEW = "new"
    OWNING = "owning"
    """The old owner is fenced; the store is not restored yet."""
    OPEN = "open"
    """The store is at a commit boundary: folding and committing can go on."""
    DISTRUSTED = "distrusted"
    """The store is damaged, and open until `close` deletes it."""
    DISCARDED = "discarded"
    """The damaged store was deleted."""
    CLOSED = "closed"


class StageEvent(Enum):
    """Event that changes the stage of a partition."""

    OWN = "own"
    """Take the right to commit, anew if it was ours before."""
    OPEN = "open"
    DISTRUST = "distrust"
    DISCARD = "discard"
    CLOSE = "close"


TRANSITIONS: Mapping[tuple[Stage, StageEvent], Stage] = {
    (Stage.NEW, StageEvent.OWN): Stage.OWNING,
    (Stage.OWNING, StageEvent.OWN): Stage.OWNING,
    (Stage.DISCARDED, StageEvent.OWN): Stage.OWNING,
    (Stage.CLOSED, StageEvent.OWN): Stage.OWNING,
    (Stage.OWNING, StageEvent.OPEN): Stage.OPEN,
    (Stage.OPEN, StageEvent.DISTRUST): Stage.DISTRUSTED,
    (Stage.DISTRUSTED, StageEvent.DISTRUST): Stage.DISTRUSTED,
    (Stage.DISCARDED, StageEvent.DISTRUST): Stage.DISCARDED,
    (Stage.OPEN, StageEvent.DISCARD): Stage.DISCARDED,
    (Stage.DISTRUSTED, StageEvent.DISCARD): Stage.DISCARDED,
    **{(stage, StageEvent.CLOSE): Stage.CLOSED for stage in Stage},
}
"""Every legal event; any other raises `IllegalTransition`."""
