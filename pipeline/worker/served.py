"""A copy of one partition, and whether reads may be answered from it."""

from __future__ import annotations

from typing import Protocol

from pipeline.ports import ReadableStore, Store
from pipeline.worker.follower import Follower
from pipeline.worker.restore import RestoreProgress


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
    """Copy of one partition: its store, its follower, and whether it can be read. Owned by the loop's thread."""

    def __init__(self, number: int, store: Store, follower: Follower, started_s: float) -> None:
        self.number = number
        self.store = store
        self.follower = follower
        self.started_s = started_s
        self.caught_up_s = started_s
        """Latest time at which all that the changelog held is known to have been read."""
        self.served: ReadableStore | None = None
        """Store to read from; None while it may not be read."""
        self.target: tuple[float, int] | None = None
        """Time at which the end of the changelog was asked for, and that end, which is to be reached."""
        self.remaining = 0

    @property
    def serving(self) -> bool:
        """True if it can be read."""
        return self.served is not None

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
        return RestoreProgress(self.number, entries, self.remaining, seconds, done=self.serving)

    def serve(self) -> None:
        """Let the store be read from now on."""
        self.served, self.remaining = _Served(self.store), 0

    def hide(self) -> None:
        """Let nothing be read until the store has caught up again."""
        self.served = self.target = None
