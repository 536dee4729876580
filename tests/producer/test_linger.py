"""The time between flushes follows the log, within the settings; batches stay within what the log takes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

import pipeline.metrics as m
from pipeline.errors import PipelineError
from pipeline.ports import Message
from pipeline.publisher.linger import Linger
from tests.producer.support import (
    FaultyLog,
    Meter,
    batches,
    fold,
    hurried_threads,
    in_threads,
    memory_log,
    publisher,
    wait_until,
)

latencies = st.floats(0, 100, allow_nan=False)


@given(st.lists(latencies), st.integers(1, 10_000), st.integers(1, 10_000))
def test_the_interval_stays_within_its_bounds(seen: list[float], least_ms: int, most_ms: int) -> None:
    """Whatever the log takes; the upper bound wins over a lower one beyond it."""
    linger = Linger(least_ms, most_ms)
    assert linger.interval_s == min(least_ms, most_ms) / 1000
    for latency_s in seen:
        linger.observe(latency_s)
        assert min(least_ms, most_ms) / 1000 <= linger.interval_s <= most_ms / 1000


@given(st.lists(st.tuples(latencies, st.floats(0, 10)), min_size=1))
def test_a_slower_log_never_makes_it_shorter(seen: list[tuple[float, float]]) -> None:
    """Of two logs one of which takes at least as long each time, it is at least as long for that one."""
    quick, slow = Linger(1, 3_600_000), Linger(1, 3_600_000)
    for latency_s, more_s in seen:
        quick.observe(latency_s)
        slow.observe(latency_s + more_s)
        # the average begins anew after one of exactly 0, as nobody measures it
        assert slow.interval_s >= quick.interval_s - 1e-9 or 0.0 in [it[0] for it in seen]


@given(st.floats(0.0001, 10), st.floats(0.0001, 10))
def test_it_adapts_both_ways(before_s: float, after_s: float) -> None:
    """After twenty acknowledgements of a new latency it is within a tenth of what that latency calls for."""
    linger = Linger(1, 3_600_000)
    for latency_s in (before_s, after_s):
        for _ in range(60):
            linger.observe(latency_s)
    target_s = max(0.001, 4 * after_s)
    assert abs(linger.interval_s - target_s) <= 0.1 * target_s + 1e-3 * before_s


class SlowLog(FaultyLog):
    """A log that takes its time to acknowledge, and says how large the batches were."""

    def __init__(self, bytes_max: int = 1 << 20) -> None:
        super().__init__()
        self.pause_s = 0.0
        self.bytes_max = bytes_max

    def message_bytes_max(self, topic: str) -> int:
        return self.bytes_max

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        time.sleep(self.pause_s)
        assert all(len(message.value or b"") <= self.bytes_max for message in messages)
        return super().append(messages, timeout_s=timeout_s)


def test_the_interval_follows_the_log() -> None:
    """A slow log brings it to `flush_interval_ms`, a quick one back to `linger_ms`."""
    log, meter = SlowLog(), Meter()
    pub = publisher(log, meter, linger_ms=2, flush_interval_ms=60)
    cell = pub.sum("v").labels()

    def interval_is(expected_s: float) -> bool:
        cell.add(1)
        return abs(pub._running.delivery.linger.interval_s - expected_s) < 0.001

    log.pause_s = 0.03
    wait_until(lambda: interval_is(0.06))
    wait_until(lambda: meter.of(m.PUBLISHER_LINGER) == 0.06)
    before = meter.of(m.PUBLISHER_FLUSH)
    started_s = time.monotonic()
    while time.monotonic() < started_s + 0.5:
        cell.add(1)
        time.sleep(0.005)
    assert meter.of(m.PUBLISHER_FLUSH) - before <= (time.monotonic() - started_s) / 0.06 + 2
    log.pause_s = 0.0
    wait_until(lambda: pub._running.delivery.linger.interval_s < 0.03 or interval_is(0))
    wait_until(lambda: meter.of(m.PUBLISHER_LINGER) < 0.03)
    pub.close()


def test_a_batch_never_exceeds_what_the_log_takes() -> None:
    """However large `batch_bytes_max` is, series are spread over batches that the log accepts."""
    log = SlowLog(bytes_max=2_000)
    with publisher(log, batch_bytes_max=1 << 20, flush_interval_ms=100_000) as pub:
        view = pub.sum("v", labels=("a",))
        pub.flush()
        for i in range(1_000):
            view.add(1, a=f"series {i}")
        pub.flush()
        assert pub.stats()["batches"] > 10
        assert pub.stats()["rejected"] == 0
    assert fold(log.log).total("v") == 1_000


def test_a_storm_of_sets_costs_one_entry_a_flush() -> None:
    """However often and from however many threads one series is set, a flush sends its newest value only."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=100_000)
    view = pub.last("v", labels=("a",))
    view.set("first", ts_ms=0, a="x")
    for round_number in range(3):
        before = pub.stats()

        def storm(i: int, r: int = round_number) -> None:
            for j in range(500):
                view.set(f"{r} {i} {j}", ts_ms=1 + r * 1_000 + j, a="x")

        in_threads(4, storm)
        pub.flush()
        after = pub.stats()
        assert after["entries"] - before["entries"] <= 2  # one, and the first flush of all
        assert after["deltas"] - before["deltas"] >= 2_000
    pub.close()
    assert fold(log).of("v")["x",] in {f"2 {i} 499" for i in range(4)}  # all are of one time: whoever was the last
    assert sum(len(group.suffixes) for batch in batches(log) for group in batch.groups) <= 5


def test_the_last_write_wins_everywhere() -> None:
    """By its timestamp, whichever thread or publisher it came from, and in whatever order it arrives."""
    log = memory_log()
    pubs = [publisher(log, flush_interval_ms=1) for _ in range(2)]
    views = [pub.last("v", labels=("a",)) for pub in pubs]

    def work(i: int) -> None:
        stamps = [*range(i, 1_000, 6)]
        for ts in reversed(stamps) if i % 2 else stamps:
            views[i % 2].set(ts, ts_ms=ts, a=str(ts % 10))

    with hurried_threads():
        in_threads(6, work)
    for pub in pubs:
        pub.close()
    assert fold(log).of("v") == {(str(i),): 990 + i for i in range(10)}
