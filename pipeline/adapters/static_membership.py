"""Membership without a group: the partitions that are listed, or all, those that are added later too."""

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
    """All partitions of `partition_count()`, or the listed ones, as long as it runs. Whoever starts last fences."""

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
            put_off=self._put_off,
        )
        """The thread that looks how many partitions there are."""

    def start(self, listener: MembershipListener) -> None:
        """See `Membership`."""
        self._listener = listener
        self.thread.start()

    def stop(self, *, leave: bool, timeout_s: float) -> bool:
        """See `Membership`. There is nobody to hand over to, so nothing is revoked."""
        return self.thread.stop(timeout_s)

    def set_warm(self, partitions: frozenset[int]) -> None:
        """Nobody asks."""

    def members(self) -> list[Member]:
        """Nobody knows."""
        return []

    def step(self) -> None:
        """Look once, and tell the listener if there are other partitions than before."""
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

    def _put_off(self, error: Unavailable) -> None:
        _log.debug("which partitions there are is not known: %s", error)
        self.thread.stopping.wait(_MEMBERSHIP_INTERVAL_S)
