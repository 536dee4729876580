"""Membership without a group: the partitions that are listed, or all, those that are added later too."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from pipeline.errors import PipelineError, Unavailable
from pipeline.ports import Member, MembershipListener

_log = logging.getLogger(__name__)
_LOOK_S = 0.5


class StaticMembership:
    """All partitions of `partition_count()`, or the listed ones, as long as it runs. Whoever starts last fences."""

    def __init__(self, partition_count: Callable[[], int], partitions: Iterable[int] | None = None) -> None:
        self._partition_count = partition_count
        self._listed = None if partitions is None else frozenset(partitions)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, listener: MembershipListener) -> None:
        """See `Membership`."""
        self._thread = threading.Thread(target=self._run, args=(listener,), name="pipeline-membership", daemon=True)
        self._thread.start()

    def stop(self, *, leave: bool, timeout_s: float) -> bool:
        """See `Membership`. There is nobody to hand over to, so nothing is revoked."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def set_warm(self, partitions: frozenset[int]) -> None:
        """Nobody asks."""

    def members(self) -> list[Member]:
        """Nobody knows."""
        return []

    def _run(self, listener: MembershipListener) -> None:
        generation, had = 0, None
        while not self._stop.is_set():
            try:
                actives = frozenset(range(self._partition_count())) if self._listed is None else self._listed
            except Unavailable as error:
                _log.debug("which partitions there are is not known: %s", error)
            except PipelineError as error:
                listener.on_failed(error)
                return
            else:
                if actives != had:
                    generation, had = generation + 1, actives
                    listener.on_assigned(actives, frozenset(), generation)
            self._stop.wait(_LOOK_S)
