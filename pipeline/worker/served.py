"""A copy of one partition, and whether reads may be answered from it."""

from __future__ import annotations

from typing import Protocol

from pipeline.ports import ReadableStore, Store
from pipeline.worker.follower import Follower
from pipeline.worker.restore import RestoreProgress


class LagMax(Protocol):
    """Says how far behind a store may be and be served: `adapters.kafka.checks.CompactionLag`."""

    why_not: str
    """Why nothing may be served, as of the last call; empty: it may."""

    def __call__(self) -> float:
        """Seconds; 0: nothing may be served. Raises `Unavailable`."""
        ...


class _Served:
    """A store for as long as it is served without a break: after one there is another, so that reads notice."""

    def __init__(self, store: Store) -> None:
        self.get, self.scan, self.snapshot = store.get, store.scan, store.snapshot


class Replica:
    """One partition: its store, its follower, and whether it can be read. Owned by the loop's thread."""

    def __init__(self, number: int, store: Store, follower: Follower, started_s: float) -> None:
        self.number = number
        self.store = store
        self.follower = follower
        self.started_s = started_s
        self.caught_up_s = started_s
        """When everything that the changelog held had been read, as far as is known."""
        self.served: ReadableStore | None = None
        """What is read of it now."""
        self.target: tuple[float, int] | None = None
        """When the end of the changelog was asked for, and the answer: to be reached."""
        self.remaining = 0

    @property
    def serving(self) -> bool:
        """Whether it can be read."""
        return self.served is not None

    def catch_up(self, now_s: float, lag_max_s: float) -> bool:
        """Whether the target is reached, in time for it to count; then, or if it took too long, the next one is due."""
        if self.target is None or self.follower.next_offset < self.target[1] or not self.follower.at_boundary:
            return False
        asked_s, _ = self.target
        self.target = None
        if now_s - asked_s > lag_max_s:
            return False
        self.caught_up_s = asked_s
        return True

    def progress(self, now_s: float) -> RestoreProgress:
        """How far it is."""
        entries, seconds = self.follower.entries_total, now_s - self.started_s
        return RestoreProgress(self.number, entries, self.remaining, seconds, done=self.serving)

    def serve(self) -> None:
        """It can be read from now on."""
        self.served, self.remaining = _Served(self.store), 0

    def hide(self) -> None:
        """Serve no reads until it has caught up anew."""
        self.served = self.target = None
