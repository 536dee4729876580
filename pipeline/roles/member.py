"""A worker as a member of its group: applies assignments, and reports which partitions are caught up."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import pipeline.ports as ports
from pipeline.errors import PipelineError
from pipeline.worker.loop import WorkerLoop
from pipeline.worker.replicas import ReplicaLoop

_log = logging.getLogger(__name__)
_LEAVE_S = 10.0
"""Time for leaving, beside the time that agents and commits have."""
_RELEASE_S = 1.0


class FeedFollower(Protocol):
    """Follows the changes of partitions that this worker folds: `roles.agents.Feeds`."""

    def follow(self, partitions: frozenset[int]) -> None:
        """Follow these partitions from now on. Does not block."""
        ...

    def release(self, timeout_s: float) -> None:
        """Wait, at most `timeout_s`, until partitions that are no longer followed are closed in order."""
        ...


class ClusterMember:
    """Listens to `membership` for the folding loop and the loop of standbys. `fail` ends the process."""

    def __init__(
        self,
        membership: ports.Membership,
        loop: WorkerLoop,
        standbys: ReplicaLoop,
        fail: Callable[[BaseException], None],
        *,
        revoke_timeout_s: float,
        feeds: FeedFollower | None = None,
    ) -> None:
        self._feeds = feeds
        self._membership = membership
        self._loop = loop
        self._standbys = standbys
        self._fail = fail
        self._revoke_timeout_s = revoke_timeout_s
        self._lock = threading.Lock()
        self._warm: frozenset[int] = frozenset()
        self._reporting = True
        """False once the membership has ended or is about to."""

    def join(self) -> None:
        """Join the group. Returns at once."""
        self._membership.start(self)

    def leave(self) -> None:
        """Commit, and leave the group. Folding goes on until others have the partitions. May be called twice."""
        self._stop_reporting()
        self._membership.stop(leave=True, timeout_s=self._revoke_timeout_s + _LEAVE_S)

    def members(self) -> Sequence[ports.Member]:
        """See `Membership`."""
        return self._membership.members()

    def on_revoked(self, partitions: frozenset[int], timeout_s: float) -> None:
        """See `MembershipListener`."""
        if self._feeds is not None:
            self._feeds.follow(frozenset())
        self._loop.revoking(partitions, timeout_s)
        if self._feeds is not None:
            self._feeds.release(_RELEASE_S)

    def on_assigned(self, actives: frozenset[int], standbys: frozenset[int], generation: int) -> None:
        """See `MembershipListener`."""
        _log.info("generation %d: partitions %s, standbys %s", generation, sorted(actives), sorted(standbys))
        self._loop.assign(actives, standbys, generation)
        if self._feeds is not None:
            self._feeds.follow(actives)

    def on_failed(self, error: PipelineError) -> None:
        """See `MembershipListener`."""
        self._stop_reporting()
        self._fail(error)

    def _stop_reporting(self) -> None:
        with self._lock:
            self._reporting = False

    def report_warm(self) -> None:
        """Report the partitions that this member could fold at once, if they changed. Both loops call it."""
        with self._lock:
            started = (number for number, it in self._loop.partitions.items() if it.started)
            warm = self._standbys.caught_up() | frozenset(started)
            if self._reporting and warm != self._warm:
                self._warm = warm
                self._membership.set_warm(warm)
