"""Tells others how far a worker is: lag as metrics, and its positions where Kafka's own tools look for them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping

import pipeline.metrics as m
from pipeline.errors import Invalid, PipelineError
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock

_log = logging.getLogger(__name__)
_LOOK_S = 1.0

Offsets = Callable[[], Mapping[int, int]]


class Mirror:
    """A thread that looks every second, and mirrors what has changed every `interval_ms` (0: never).

    `positions` are the worker's by partition, of those of `ours` that fold; `end_offsets` and `start_offsets` those of the
    deltas topic, `commit` puts positions where tools find them. Failures are logged and change nothing: nobody of ours reads
    what is mirrored.
    """

    def __init__(
        self,
        positions: Offsets,
        *,
        end_offsets: Offsets,
        start_offsets: Offsets,
        commit: Callable[[Mapping[int, int]], None],
        clock: Clock,
        interval_ms: int,
        ours: Callable[[], Collection[int]] | None = None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self.end_offsets: Mapping[int, int] = {}
        """Where the topic ended when it was last looked at; empty while the log is away."""
        self.told: tuple[float, Mapping[int, int]] = (clock.monotonic_s(), {})
        """When the log told its end offsets last, and what it told."""
        self._positions = positions
        self._ask_ends = end_offsets
        self._ask_starts = start_offsets
        self._commit = commit
        self._clock = clock
        self._ours = ours or positions
        self._interval_s = interval_ms / 1000
        self._metrics = metrics
        self._mirrored: dict[int, int] = {}
        self._looked_at: frozenset[int] = frozenset()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pipeline-mirror", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, without waiting. Twice is fine."""
        self._stop.set()

    def _run(self) -> None:
        next_commit_s, warned = 0.0, False
        while not self._stop.is_set():
            try:
                self._look()
            except PipelineError as error:
                self.end_offsets = {}
                _log.debug("nobody says where the log ends: %s", error)
            if self._interval_s and self._clock.monotonic_s() >= next_commit_s:
                next_commit_s = self._clock.monotonic_s() + self._interval_s
                try:
                    self.mirror()
                except PipelineError as error:
                    # Of what passes by itself others complain.
                    level = logging.WARNING if isinstance(error, Invalid) and not warned else logging.DEBUG
                    warned |= level == logging.WARNING
                    _log.log(level, "lag tools do not see positions, nothing else depends on it: %s", error)
            self._stop.wait(_LOOK_S)

    def _look(self) -> None:
        ours = frozenset(self._ours())
        for number in self._looked_at - ours:
            self._metrics.forget(number)  # another's now, who says how far it is
        self._looked_at = ours
        positions = {number: it for number, it in self._positions().items() if number in ours}
        self.end_offsets = self._ask_ends()
        self.told = self._clock.monotonic_s(), self.end_offsets
        starts = self._ask_starts()
        for number, next_offset in positions.items():
            self._metrics.set(m.LAG, max(0, self.end_offsets.get(number, 0) - next_offset), number)
            self._metrics.set(m.RETENTION_MARGIN, next_offset - starts.get(number, 0), number)

    def mirror(self) -> None:
        """Mirror the positions that have changed since the last time."""
        changed = {n: offset for n, offset in self._positions().items() if self._mirrored.get(n) != offset}
        if changed:
            self._commit(changed)
            self._mirrored.update(changed)
