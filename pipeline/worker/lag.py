"""Reports how far a worker is: lag as metrics, and its positions in the group that Kafka's own tools read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import pipeline.metrics as m
from pipeline.errors import Invalid, PipelineError
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock
from pipeline.threads import PeriodicThread
from pipeline.topics import DELTAS

_log = logging.getLogger(__name__)
INTERVAL_S = 1.0
START_INTERVAL_S = 10.0
"""Time between two questions for the start offsets, which only retention moves."""
HELD_UP_S = 5.0
"""Seconds that a foreign transaction may be open on deltas before it is reported, far above what one takes that ends."""

Offsets = Callable[[], Mapping[int, int]]


class DeltasEnds(NamedTuple):
    """Ends of the partitions of deltas, asked for at one time."""

    high_watermarks: Mapping[int, int]
    """Offsets behind all accepted records; lag counts up to there."""
    stable_offsets: Mapping[int, int]
    """Offsets behind all readable records; a worker can get no further."""


class _HeldUp(NamedTuple):
    """A partition that can't be read on because a transaction is open."""

    stable_offset: int
    since_s: float


class LagReporter:
    """A thread that asks for the ends of `deltas` every `poll_interval_s`, and commits positions to a consumer group.

    The group is for Kafka's tools; no process of ours reads it, so a failure is logged and changes nothing. Positions that
    have changed are committed every `interval_ms`; 0: never. `ours` returns the worker's partitions, `positions` the
    positions of those that fold; `ends` and `start_offsets` ask the log, `commit` writes to the group. `bootstrap` and
    `topic` are what an operator is told to give to Kafka's tools.
    """

    def __init__(
        self,
        positions: Offsets,
        *,
        ends: Callable[[], DeltasEnds],
        start_offsets: Offsets,
        commit: Callable[[Mapping[int, int]], None],
        clock: Clock,
        interval_ms: int,
        poll_interval_s: float = INTERVAL_S,
        ours: Callable[[], Collection[int]] | None = None,
        bootstrap: str = "localhost:9092",
        topic: str = DELTAS,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self.end_offsets: Mapping[int, int] = {}
        """High watermarks of the topic as of the last step; empty while the log is away."""
        self.last_answer: tuple[float, Mapping[int, int]] = (clock.monotonic_s(), {})
        """Time of the log's last answer about its ends, and the stable offsets in it."""
        self._positions = positions
        self._ask_ends = ends
        self._ask_starts = start_offsets
        self._commit = commit
        self._clock = clock
        self._ours = ours or positions
        self._tool = f"kafka-transactions.sh --bootstrap-server {bootstrap}"
        self._topic = topic
        self._interval_s = interval_ms / 1000
        self._metrics = metrics
        self._starts: Mapping[int, int] = {}
        self._next_starts_s = 0.0
        self._mirrored: dict[int, int] = {}
        self._looked_at: frozenset[int] = frozenset()
        self._held_up: dict[int, _HeldUp] = {}
        self._reported_held_up: set[int] = set()
        self._next_commit_s = 0.0
        self._warned = False
        self.thread = PeriodicThread(
            "pipeline-mirror", self.step, log=_log, clock=clock, metrics=metrics, interval_s=poll_interval_s
        )

    def start(self) -> None:
        """Begin."""
        self.thread.start()

    def stop(self) -> None:
        """End, without waiting. Twice is fine."""
        self.thread.stop()

    def step(self) -> None:
        """Ask for the ends once, and mirror positions if it is time to."""
        answered = False
        try:
            self._ask_ends_and_report()
            answered = True
        except PipelineError as error:
            _log.debug("nobody says where the log ends: %s", error)
        finally:
            if not answered:
                self.end_offsets = {}
        self.thread.beat()
        if self._interval_s and self._clock.monotonic_s() >= self._next_commit_s:
            self._next_commit_s = self._clock.monotonic_s() + self._interval_s
            try:
                self.mirror()
            except PipelineError as error:
                # Errors that pass by themselves are logged elsewhere.
                level = logging.WARNING if isinstance(error, Invalid) and not self._warned else logging.DEBUG
                self._warned |= level == logging.WARNING
                _log.log(level, "lag tools do not see positions, nothing else depends on it: %s", error)

    def _ask_ends_and_report(self) -> None:
        ours = frozenset(self._ours())
        for number in self._looked_at - ours:
            self._metrics.forget(number)  # another worker reports it now
        self._looked_at = ours
        positions = {number: it for number, it in self._positions().items() if number in ours}
        ends = self._ask_ends()
        self.thread.beat()
        self.end_offsets = ends.high_watermarks
        self.last_answer = self._clock.monotonic_s(), ends.stable_offsets
        self._note_open_transactions(ends, positions)
        if self._clock.monotonic_s() >= self._next_starts_s:
            self._starts = self._ask_starts()
            self._next_starts_s = self._clock.monotonic_s() + START_INTERVAL_S
        starts = self._starts
        for number, next_offset in positions.items():
            self._metrics.set(m.LAG, max(0, self.end_offsets.get(number, 0) - next_offset), number)
            self._metrics.set(m.START_OFFSET, starts.get(number, 0), number)
            self._metrics.set(m.RETENTION_MARGIN, next_offset - starts.get(number, 0), number)

    def _note_open_transactions(self, ends: DeltasEnds, positions: Mapping[int, int]) -> None:
        """Log once for each open transaction that holds a partition up how an operator can end it."""
        now_s, before = self._clock.monotonic_s(), self._held_up
        self._held_up = {}
        for number in positions:
            stable_offset = ends.stable_offsets.get(number, 0)
            waiting = max(0, ends.high_watermarks.get(number, 0) - stable_offset)
            last = before.get(number)
            same = last is not None and last.stable_offset == stable_offset
            # Not known after one step: records may have come between the two questions.
            self._metrics.set(m.HELD_UP, waiting if same else 0, number)
            if not same or not waiting:
                self._reported_held_up.discard(number)
            if not waiting:
                continue
            self._held_up[number] = it = last if last is not None and same else _HeldUp(stable_offset, now_s)
            if now_s - it.since_s >= HELD_UP_S and number not in self._reported_held_up:
                self._reported_held_up.add(number)
                self._report_held_up(number, stable_offset, waiting, now_s - it.since_s)

    def _report_held_up(self, number: int, stable_offset: int, waiting: int, for_s: float) -> None:
        place = f"--topic {self._topic} --partition {number}"
        _log.error(
            "partition %d of topic %s: a transaction that is none of ours is open from offset %d on, for over %.0f s; the "
            "%d records from there on can't be read, and staleness grows, until its producer ends it. "
            "`%s find-hanging %s` shows one that nobody will end, `%s abort %s --start-offset %d` ends it",
            number,
            self._topic,
            stable_offset,
            for_s,
            waiting,
            self._tool,
            place,
            self._tool,
            place,
            stable_offset,
        )

    def mirror(self) -> None:
        """Mirror the positions that have changed since the last time."""
        changed = {n: offset for n, offset in self._positions().items() if self._mirrored.get(n) != offset}
        if changed:
            self._commit(changed)
            self._mirrored.update(changed)
