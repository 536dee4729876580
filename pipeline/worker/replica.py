"""A copy of one partition, and whether reads may be answered from it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Protocol

from pipeline.core.transitions import next_state
from pipeline.ports import ReadableStore, Store
from pipeline.worker.follower import Follower
from pipeline.worker.restore import RestoreProgress


class ReplicaState(Enum):
    """State of a replica's store."""

    RESTORING = "restoring"
    """The store may lack series, or is too far behind: nothing is read from it."""
    SERVED = "served"
    DAMAGED = "damaged"
    """A reader found damage: nothing is read from the store until it is rebuilt."""


class ReplicaEvent(Enum):
    """Event that changes the state of a replica's store."""

    SERVE = "serve"
    HIDE = "hide"
    DISTRUST = "distrust"


TRANSITIONS: Mapping[tuple[ReplicaState, ReplicaEvent], ReplicaState] = {
    (ReplicaState.RESTORING, ReplicaEvent.SERVE): ReplicaState.SERVED,
    (ReplicaState.RESTORING, ReplicaEvent.HIDE): ReplicaState.RESTORING,
    (ReplicaState.SERVED, ReplicaEvent.HIDE): ReplicaState.RESTORING,
    (ReplicaState.SERVED, ReplicaEvent.DISTRUST): ReplicaState.DAMAGED,
    (ReplicaState.DAMAGED, ReplicaEvent.HIDE): ReplicaState.DAMAGED,
}
"""Every legal event; any other raises `IllegalTransition`."""


class LagMax(Protocol):
    """Bound of how far behind a store may be and be served; see `adapters.kafka.checks.CompactionLag`."""

    why_not: str
    """Reason why nothing may be served, as of the last call; empty: stores may be served."""

    def __call__(self) -> float:
        """Return the bound in seconds; 0: nothing may be served. Raises `Unavailable`."""
        ...


class _Served:
    """A store while it is served without a break; after a break there is a new object, so that readers notice."""

    def __init__(self, store: Store) -> None:
        self.get, self.scan, self.snapshot = store.get, store.scan, store.snapshot


class Replica:
    """Copy of one partition: its store, its follower, and whether it can be read.

    Owned by the loop's thread; the loop's lock guards the state, which readers change by `distrust`.
    """

    def __init__(self, number: int, store: Store, follower: Follower, started_s: float) -> None:
        self.number = number
        self.store = store
        self.follower = follower
        self.started_s = started_s
        self.caught_up_s = started_s
        """Latest time at which all that the changelog held is known to have been read."""
        self.state = ReplicaState.RESTORING
        self.damage = ""
        """Damage that a reader found."""
        self._served: ReadableStore = _Served(store)
        self.target: tuple[float, int] | None = None
        """Time at which the end of the changelog was asked for, and that end, which is to be reached."""
        self.remaining = 0

    @property
    def served(self) -> ReadableStore | None:
        """Store to read from; None while it may not be read."""
        return self._served if self.state is ReplicaState.SERVED else None

    def _step(self, event: ReplicaEvent) -> None:
        self.state = next_state(TRANSITIONS, self.state, event, self.number)

    def catch_up(self, now_s: float, lag_max_s: float) -> bool:
        """Return whether the target is reached within `lag_max_s`. A target that is reached, in time or not, is dropped."""
        if self.target is None or self.follower.next_offset < self.target[1] or not self.follower.at_boundary:
            return False
        asked_s, _ = self.target
        self.target = None
        if now_s - asked_s > lag_max_s:
            return False
        self.caught_up_s = asked_s
        return True

    def progress(self, now_s: float) -> RestoreProgress:
        """Return how far the copy is."""
        entries, seconds = self.follower.entries_total, now_s - self.started_s
        return RestoreProgress(self.number, entries, self.remaining, seconds, done=self.state is ReplicaState.SERVED)

    def serve(self) -> None:
        """Let the store be read from now on."""
        self._step(ReplicaEvent.SERVE)
        self._served, self.remaining = _Served(self.store), 0

    def hide(self) -> None:
        """Let nothing be read until the store has caught up again."""
        self._step(ReplicaEvent.HIDE)
        self.target = None

    def distrust(self, damage: str) -> None:
        """Let nothing be read until the store is rebuilt."""
        self.damage = damage  # first: another thread rebuilds the store once it sees the state
        self._step(ReplicaEvent.DISTRUST)
