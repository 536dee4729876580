"""The mirror reports a worker's lag and positions at its intervals, and no failure of it disturbs anything else."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

import pipeline.metrics as m
from pipeline.errors import Unavailable
from pipeline.worker.lag import DeltasEnds, LagReporter
from tests.support import HandClock, wait_until
from tests.worker.support import Recorder


class Watched:
    """A mirror of `positions` and `ends`, and the positions that it has committed."""

    def __init__(self, interval_ms: int = 5_000) -> None:
        self.clock = HandClock()
        self.metrics = Recorder()
        self.positions = {0: 5, 1: 7}
        self.ends = {0: 9, 1: 7}
        self.stable: dict[int, int] = {}
        """Last stable offsets, where they are not the ends."""
        self.commits: list[dict[int, int]] = []
        self.starts = {0: 2, 1: 0}
        self.looks = self.start_looks = 0
        self.ends_fail = self.commits_fail = False
        self.mirror = LagReporter(
            lambda: dict(self.positions),
            ends=self._ask_ends,
            start_offsets=self._ask_starts,
            commit=self._commit,
            clock=self.clock,
            interval_ms=interval_ms,
            metrics=self.metrics,
        )

    def _ask_ends(self) -> DeltasEnds:
        self.looks += 1
        if self.ends_fail:
            raise Unavailable("the log is away")
        return DeltasEnds(self.ends, self.ends | self.stable)

    def _ask_starts(self) -> dict[int, int]:
        self.start_looks += 1
        return dict(self.starts)

    def _commit(self, positions: Mapping[int, int]) -> None:
        if self.commits_fail:
            raise Unavailable("not allowed")
        self.commits.append(dict(positions))

    @contextmanager
    def running(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        self.mirror.thread._interval_s = 0.001
        self.mirror.start()
        try:
            yield
        finally:
            self.mirror.stop()
            assert self.mirror.thread.stop(60)

    def look_twice(self) -> None:
        """Wait until one whole round has passed."""
        looks = self.looks
        wait_until(lambda: self.looks >= looks + 2, "two looks", 60)


def test_lag_and_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lag is the distance to the end, never below 0; the margin is the distance to the start."""
    it = Watched()
    with it.running(monkeypatch):
        it.look_twice()
        assert (it.metrics.of(m.LAG, 0), it.metrics.of(m.LAG, 1)) == (4, 0)
        assert (it.metrics.of(m.RETENTION_MARGIN, 0), it.metrics.of(m.RETENTION_MARGIN, 1)) == (3, 7)
        assert all(
            it.metrics.of(m.START_OFFSET, n) + it.metrics.of(m.RETENTION_MARGIN, n) == it.positions[n] for n in (0, 1)
        )
        assert it.mirror.end_offsets == {0: 9, 1: 7}
        it.positions[1] = 8  # ahead of what was seen
        it.look_twice()
        assert it.metrics.of(m.LAG, 1) == 0


def test_start_offsets_are_asked_for_every_ten_seconds() -> None:
    """The ends are asked for in every step, the start offsets every ten seconds: only retention moves them."""
    it = Watched()
    for _ in range(3):
        it.mirror.step()
    it.starts[0] = 4
    it.mirror.step()
    assert (it.looks, it.start_looks, it.metrics.of(m.RETENTION_MARGIN, 0)) == (4, 1, 3)
    it.clock.s += 10
    it.mirror.step()
    assert (it.looks, it.start_looks, it.metrics.of(m.RETENTION_MARGIN, 0)) == (5, 2, 1)


def test_what_is_lost_has_no_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    """A partition that was lost has no lag here: its new owner reports it, and an old figure would stay for ever."""
    it = Watched()
    with it.running(monkeypatch):
        it.look_twice()
        assert it.metrics.of(m.LAG, 0) == 4
        del it.positions[0]
        it.look_twice()
        assert {key for key in it.metrics.values if key[1:] == (0,)} == set()
        assert it.metrics.of(m.LAG, 1) == 0
        it.positions[0] = 8
        it.ends_fail = True
        it.look_twice()
        it.ends_fail = False
        it.look_twice()
        assert it.metrics.of(m.LAG, 0) == 1


def test_what_is_lost_while_the_log_is_away_has_no_lag_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """A partition that moved has no lag here, even while the log is away."""
    it = Watched()
    with it.running(monkeypatch):
        it.look_twice()
        it.ends_fail = True
        del it.positions[0]
        it.look_twice()
        assert (m.LAG.name, 0) not in it.metrics.values


def test_positions_are_mirrored_when_they_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed positions are mirrored at each interval, the first at once."""
    it = Watched()
    with it.running(monkeypatch):
        wait_until(lambda: it.commits, "the first commit", 60)
        it.look_twice()
        assert it.commits == [{0: 5, 1: 7}]
        it.positions[0] = 6
        it.look_twice()
        assert len(it.commits) == 1, "not before the interval has passed"
        it.clock.s += 6
        wait_until(lambda: len(it.commits) == 2, "the second commit", 60)
        it.clock.s += 6
        it.look_twice()
    assert it.commits == [{0: 5, 1: 7}, {0: 6}]


def test_an_interval_of_0_mirrors_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an interval of 0 no positions are mirrored, and lag is reported all the same."""
    it = Watched(interval_ms=0)
    with it.running(monkeypatch):
        it.look_twice()
    assert not it.commits
    assert it.metrics.of(m.LAG, 0) == 4


def test_a_log_that_is_away_is_only_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """While the log is away no old end is reported, and afterwards all is as before."""
    it = Watched()
    with it.running(monkeypatch), caplog.at_level(logging.DEBUG):
        it.look_twice()
        it.ends_fail = True
        it.look_twice()
        assert it.mirror.end_offsets == {}
        it.ends_fail = False
        it.look_twice()
        assert it.mirror.end_offsets == {0: 9, 1: 7}
    assert "the log is away" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def test_a_group_that_cannot_be_written_hides_no_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write to the group is tried again at the next interval, with all changes since the last that succeeded."""
    it = Watched()
    it.commits_fail = True
    with it.running(monkeypatch):
        for _ in range(5):
            it.clock.s += 6
            it.look_twice()
            assert it.mirror.end_offsets == {0: 9, 1: 7}
        it.commits_fail = False
        it.clock.s += 6
        wait_until(lambda: it.commits, "a commit", 60)
    assert it.commits == [{0: 5, 1: 7}]


def test_stop_before_start() -> None:
    """A stop before the start does nothing, and may come twice."""
    it = Watched()
    it.mirror.stop()
    it.mirror.stop()
    assert threading.active_count() >= 1
    assert not it.looks


def look_every_second(it: Watched, seconds: int) -> None:
    """Let the mirror look so many times, a second apart."""
    for _ in range(seconds):
        it.clock.s += 1
        it.mirror.step()


def test_an_open_transaction_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Records behind an open transaction count as lag, and are shown separately; one log line says how to end it."""
    it = Watched()
    it.stable = {0: 6}
    look_every_second(it, 4)
    assert it.metrics.of(m.LAG, 0) == 4, "against the high watermark"
    assert it.metrics.of(m.HELD_UP, 0) == 3
    assert it.metrics.of(m.HELD_UP, 1) == 0
    assert it.mirror.end_offsets == {0: 9, 1: 7}
    assert it.mirror.last_answer == (it.clock.s, {0: 6, 1: 7}), "up to where a worker can get"
    assert not caplog.records
    look_every_second(it, 600)
    (told,) = caplog.records
    for text in ("partition 0", "offset 6", "find-hanging --topic deltas --partition 0", "abort", "--start-offset 6"):
        assert text in told.getMessage()
    it.stable = {}
    look_every_second(it, 2)
    assert it.metrics.of(m.HELD_UP, 0) == 0
    it.stable, it.ends = {0: 10}, {0: 12, 1: 7}
    look_every_second(it, 10)
    assert len(caplog.records) == 2, "another one is told again"


def test_traffic_is_no_open_transaction(caplog: pytest.LogCaptureFixture) -> None:
    """Records that arrive between the two questions, and foreign transactions that end, are not reported."""
    it = Watched()
    for offset in range(10, 100):
        it.ends, it.stable = {0: offset + 3, 1: 7}, {0: offset}
        look_every_second(it, 1)
        assert it.metrics.of(m.HELD_UP, 0) == 0
    assert not caplog.records
