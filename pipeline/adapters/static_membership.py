"""Membership without a group: listed partitions, or all, including those that are added later."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from pipeline.adapters.clock import SystemClock
from pipeline.errors import PipelineError, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, Member, MembershipListener
from pipeline.threads import PeriodicThread

_log = logging.getLogger(__name__)
_MEMBERSHIP_INTERVAL_S = 0.5


class StaticMembership:
    """Assigns the listed partitions, or all `partition_count()` ones, for as long as it runs.

    Of two processes with the same partition the one that starts later fences the other.
    """

    def __init__(
        self,
        partition_count: Callable[[], int],
        partitions: Iterable[int] | None = None,
        *,
        clock: Clock | None = None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._partition_count = partition_count
        self._listed = None if partitions is None else frozenset(partitions)
        self._listener: MembershipListener | None = None
        self._assigned: frozenset[int] | None = None
        self._generation = 0
        self.thread = PeriodicThread(
            "pipeline-membership",
            self.step,
            log=_log,
            clock=clock or SystemClock(),
            metrics=metrics,
            interval_s=_MEMBERSHIP_INTERVAL_S,
            on_unavailable=self._on_unavailable,
        )
        """Thread that looks for new partitions."""

    def start(self, listener: MembershipListener) -> None:
        """See `ports.Membership`."""
        self._listener = listener
        self.thread.start()

    def stop(self, *, leave: bool, timeout_s: float) -> bool:
        """See `ports.Membership`. Nothing is revoked, because there is no other member."""
        return self.thread.stop(timeout_s)

    def set_warm(self, partitions: frozenset[int]) -> None:
        """Do nothing: there is no other member."""

    def members(self) -> list[Member]:
        """Return no members: there is no group."""
        return []

    def step(self) -> None:
        """Read the partition count, and call the listener if the partitions have changed."""
        assert self._listener is not None
        try:
            actives = frozenset(range(self._partition_count())) if self._listed is None else self._listed
        except Unavailable:
            raise
        except PipelineError as error:
            self._listener.on_failed(error)
            self.thread.stopping.set()
            return
        if actives != self._assigned:
            self._listener.on_assigned(actives, frozenset(), self._generation + 1)
            self._generation, self._assigned = self._generation + 1, actives

    def _on_unavailable(self, error: Unavailable) -> None:
        _log.debug("which partitions there are is not known: %s", error)
        self.thread.stopping.wait(_MEMBERSHIP_INTERVAL_S)
