"""A worker as a member of its group: passes on what the membership says, and tells it what is warm."""

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
"""How long leaving may take beside what agents and commits are given."""
_LET_GO_S = 1.0


class FeedFollower(Protocol):
    """Follows the partitions that are folded here: `roles.agents.Feeds`."""

    def follow(self, partitions: frozenset[int]) -> None:
        """These from now on. Does not block."""
        ...

    def release(self, timeout_s: float) -> None:
        """Wait, for so long, until what is not followed any more is left in order."""
        ...


class ClusterMember:
    """Listens to `membership` for the loop that folds and the one that keeps standbys warm. `fail` ends the process."""

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
        self._telling = True
        """Whether the membership is there to be told anything."""

    def join(self) -> None:
        """Returns at once."""
        self._membership.start(self)

    def leave(self) -> None:
        """Commit, and let others have the partitions. Folding goes on until they do. Twice is fine."""
        self._stop_telling()
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
            self._feeds.release(_LET_GO_S)

    def on_assigned(self, actives: frozenset[int], standbys: frozenset[int], generation: int) -> None:
        """See `MembershipListener`."""
        _log.info("generation %d: partitions %s, standbys %s", generation, sorted(actives), sorted(standbys))
        self._loop.assign(actives, standbys, generation)
        if self._feeds is not None:
            self._feeds.follow(actives)

    def on_failed(self, error: PipelineError) -> None:
        """See `MembershipListener`."""
        self._stop_telling()
        self._fail(error)

    def _stop_telling(self) -> None:
        with self._lock:
            self._telling = False

    def tell_warm(self) -> None:
        """Of what could be taken over at once, if it has changed. Called by both loops."""
        with self._lock:
            started = (number for number, it in self._loop.partitions.items() if it.started)
            warm = self._standbys.caught_up() | frozenset(started)
            if self._telling and warm != self._warm:
                self._warm = warm
                self._membership.set_warm(warm)
