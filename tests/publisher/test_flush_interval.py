"""The time between flushes follows the log, within the settings, and batches the size that the log accepts."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

import pipeline.metrics as m
from pipeline.errors import PipelineError
from pipeline.ports import Message
from pipeline.publisher.sender import FlushInterval
from tests.publisher.support import FaultyLog, Meter, fold, publisher, wait_until

latencies = st.floats(0, 100, allow_nan=False)


@given(st.lists(st.tuples(latencies, st.floats(0, 10))), st.integers(1, 10_000), st.integers(1, 10_000))
def test_the_interval_follows_latencies_within_its_bounds(
    seen: list[tuple[float, float]], least_ms: int, most_ms: int
) -> None:
    """The upper bound wins over the lower one; a slower log never makes the interval shorter."""
    quick, slow = FlushInterval(least_ms, most_ms), FlushInterval(least_ms, most_ms)
    least_s, most_s = min(least_ms, most_ms) / 1000, most_ms / 1000
    assert quick.current_s == least_s
    for latency_s, more_s in seen:
        quick.observe(latency_s)
        slow.observe(latency_s + more_s)
        assert least_s <= quick.current_s <= most_s
        # the average begins anew after one of exactly 0, as nobody measures it
        assert slow.current_s >= quick.current_s - 1e-9 or 0.0 in [it[0] for it in seen]


@given(st.floats(0.0001, 10), st.floats(0.0001, 10))
def test_it_adapts_both_ways(before_s: float, after_s: float) -> None:
    """After sixty acknowledgements of a new latency the interval is within a tenth of the one for that latency.

    Each acknowledgement has a fifth of the weight.
    """
    interval = FlushInterval(1, 3_600_000)
    for latency_s in (before_s, after_s):
        for _ in range(60):
            interval.observe(latency_s)
    target_s = max(0.001, 4 * after_s)
    assert abs(interval.current_s - target_s) <= 0.1 * target_s + 1e-3 * before_s
    interval.observe(after_s + 1)
    assert abs(interval.current_s - max(0.001, 4 * (after_s + 0.2))) <= 0.1 * target_s + 1e-3 * before_s


class SlowLog(FaultyLog):
    """A log that takes its time to acknowledge, and no message beyond `bytes_max`."""

    pause_s = 0.0
    bytes_max = 1 << 20

    def message_bytes_max(self, topic: str) -> int:
        return self.bytes_max

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        time.sleep(self.pause_s)
        assert all(len(message.value or b"") <= self.bytes_max for message in messages)
        return super().append(messages, timeout_s=timeout_s)


def test_the_interval_follows_the_log() -> None:
    """A slow log brings the interval to `flush_interval_ms`, a quick one back to `flush_interval_min_ms`."""
    log, meter = SlowLog(), Meter()
    pub = publisher(log, meter, flush_interval_min_ms=2, flush_interval_ms=60)
    cell = pub.sum("v").labels()

    def interval_is(least_s: float, most_s: float) -> bool:
        cell.add(1)
        return least_s <= meter.of(m.PUBLISHER_LINGER) <= most_s

    log.pause_s = 0.03
    wait_until(lambda: interval_is(0.06, 0.06))
    before, started_s = meter.of(m.PUBLISHER_FLUSH), time.monotonic()
    while time.monotonic() < started_s + 0.5:
        cell.add(1)
        time.sleep(0.005)
    assert meter.of(m.PUBLISHER_FLUSH) - before <= (time.monotonic() - started_s) / 0.06 + 2
    log.pause_s = 0.0
    wait_until(lambda: interval_is(0, 0.03))
    pub.close()


def test_a_batch_never_exceeds_what_the_log_takes() -> None:
    """However large `batch_bytes_max` is, series are spread over batches that the log accepts."""
    log = SlowLog()
    log.bytes_max = 2_000
    with publisher(log, batch_bytes_max=1 << 20, flush_interval_ms=100_000) as pub:
        view = pub.sum("v", labels=("a",))
        pub.flush()
        for i in range(1_000):
            view.add(1, a=f"series {i}")
        pub.flush()
        assert pub.stats()["batches"] > 10
        assert pub.stats()["rejected"] == 0
    assert fold(log.log).total("v") == 1_000
