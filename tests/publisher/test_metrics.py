"""Each metric of the publisher moves with its subject, as Prometheus sees it, and as `stats` says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline.metrics as m
from pipeline.adapters.prometheus import PrometheusMetrics
from pipeline.errors import BufferFull, Invalid, Unavailable
from pipeline.publisher.client import BasePublisher
from tests.publisher.support import FaultyLog, batches, fold, publisher, wait_until

ALL = {metric.name for name, metric in vars(m).items() if name.startswith("PUBLISHER_")}
shown: set[str] = set()
"""Metrics that some test of this file has seen move."""


class Shown:
    """A publisher on a faulty log, and its metrics as Prometheus sees them."""

    def __init__(self, **settings: Any) -> None:
        self.log = FaultyLog()
        self.metrics = PrometheusMetrics()
        self.pub: BasePublisher = publisher(self.log, self.metrics, **settings)  # type: ignore[arg-type]

    def value(self, metric: m.Metric, **labels: str) -> float:
        """Return a metric as Prometheus would scrape it; for a histogram the number of observations."""
        shown.add(metric.name)
        name = f"{metric.name}_count" if metric.type == "histogram" else metric.name
        for line in self.metrics.render()[0].decode().splitlines():
            family, _, value = line.rpartition(" ")
            if family == name + ("{" + ",".join(f'{k}="{v}"' for k, v in labels.items()) + "}" if labels else ""):
                return float(value)
        return 0.0


@pytest.fixture
def closing() -> Iterator[list[Shown]]:
    """Publishers that are closed afterwards."""
    opened: list[Shown] = []
    yield opened
    for item in opened:
        item.log.away = False
        item.log.gate.set()
        item.pub.close()


def opened(closing: list[Shown], **settings: Any) -> Shown:
    closing.append(Shown(**settings))
    return closing[-1]


def test_what_is_recorded_and_sent(closing: list[Shown]) -> None:
    """Metrics show deltas, merged deltas, batches and their times, the waiting ones, and the age of a snapshot."""
    it = opened(closing, flush_interval_ms=40, flush_interval_min_ms=20, series_idle_ms=1_000, snapshot_interval_ms=30)
    view = it.pub.sum("v", labels=("a",))
    for i in range(100_000):
        view.add(1, a=str(i % 4))
    it.pub.flush()
    assert it.value(m.PUBLISHER_DELTAS) == it.pub.stats()["deltas"] == 100_000
    assert it.value(m.PUBLISHER_MERGED_AWAY) == 100_000 - it.pub.stats()["entries"] > 90_000
    assert it.value(m.PUBLISHER_BATCHES) == it.pub.stats()["batches"] == len(batches(it.log.log))
    assert 1 <= it.value(m.PUBLISHER_ACKNOWLEDGED) <= it.value(m.PUBLISHER_BATCHES)
    wait_until(lambda: it.value(m.PUBLISHER_FLUSH) >= 2)
    wait_until(lambda: 0.02 <= it.value(m.PUBLISHER_LINGER) <= 0.04)
    wait_until(lambda: it.value(m.PUBLISHER_SERIES) == it.pub.stats()["series"] == 4)
    wait_until(lambda: it.value(m.PUBLISHER_BYTES) == it.pub.stats()["buffer_bytes"] > 4 * 100)
    assert it.value(m.PUBLISHER_BUFFER_MAX) == 67_108_864
    it.log.gate.clear()
    view.add(1, a="0")
    wait_until(lambda: it.value(m.PUBLISHER_IN_FLIGHT) == it.pub.stats()["waiting"] == 1)
    it.log.gate.set()
    wait_until(lambda: it.value(m.PUBLISHER_IN_FLIGHT) == it.pub.stats()["waiting"] == 0)
    wait_until(lambda: it.value(m.PUBLISHER_SNAPSHOT_AGE) >= 0.02)
    assert it.value(m.PUBLISHER_SNAPSHOT_AGE) < 20
    wait_until(lambda: it.value(m.PUBLISHER_SERIES) == it.value(m.PUBLISHER_BYTES) == 0)


def test_what_goes_wrong(closing: list[Shown]) -> None:
    """Retries, rejections, losses and batches held back have a counter each, which is there before it happens."""
    it = opened(closing)
    for reason in ("buffer_full", "closed", "rejected"):
        assert f'reason="{reason}"' in it.metrics.render()[0].decode()
    it.log.fate = lambda n, batch: Unavailable("busy") if n < 3 else "kept"
    it.pub.sum("v").add(1)
    it.pub.flush()
    assert it.value(m.PUBLISHER_RETRIES) == 3
    it.log.fate = lambda n, batch: Invalid("too strange")
    it.pub.sum("v").add(1)
    with pytest.raises(Invalid, match="too strange"):
        it.pub.flush()
    assert it.value(m.PUBLISHER_DROPPED, reason="rejected") == it.pub.stats()["rejected"] == 1
    it.log.fate = lambda n, batch: "kept"
    closed, old = Shown(), Shown(producer_ttl_ms=1_000)
    closed.log.away, old.log.fate = True, lambda n, batch: "unheard"
    closed.pub.sum("v").add(1)
    old.pub.sum("v").add(1)
    wait_until(lambda: old.value(m.PUBLISHER_HELD_BACK) == 1)
    for gone, says in ((closed, "the log is away"), (old, "held back")):
        with pytest.raises(Unavailable, match=says):
            gone.pub.close(0.05)
    assert closed.value(m.PUBLISHER_DROPPED, reason="closed") == 1
    assert old.value(m.PUBLISHER_HELD_BACK) == 0


def test_nothing_waits_in_a_closed_publisher() -> None:
    """The gauges of a closed publisher are 0, also when the last flush before saw its batches wait."""
    it = Shown(flush_interval_ms=20)
    it.log.gate.clear()
    it.pub.sum("v").add(1)
    wait_until(lambda: it.value(m.PUBLISHER_IN_FLIGHT) == 1)
    with pytest.raises(Unavailable, match="1 batches"):
        it.pub.close(0.05)
    it.log.gate.set()
    for gauge in (m.PUBLISHER_IN_FLIGHT, m.PUBLISHER_BYTES, m.PUBLISHER_SERIES):
        assert it.value(gauge) == 0, gauge


def test_what_does_not_fit(closing: list[Shown]) -> None:
    """Calls that waited for memory or got none, and label sets beyond `series_max`, are counted. See `test_on_full`, too."""
    it = opened(closing, buffer_bytes_max=65_536, block_timeout_ms=10)
    it.log.away = True
    with pytest.raises(BufferFull):
        it.pub.record_batch(it.pub.sum("v", labels=("a",)), {"a": [str(i) for i in range(2_000)], "value": 1})
    assert it.value(m.PUBLISHER_REFUSED) == it.value(m.PUBLISHER_BLOCKED) == 1
    few = opened(closing, series_max=1)
    for name in "abc":
        few.pub.sum("v", labels=("a",)).add(1, a=name)
        few.pub.flush()
    wait_until(lambda: few.value(m.PUBLISHER_OVERFLOWED) == 2)


def test_the_spool(tmp_path: Path, closing: list[Shown]) -> None:
    """Metrics show the spool's size and limit, its batches, and those found in the spools of others."""
    settings = {"spool_dir": str(tmp_path / "spool"), "spool_bytes_max": 8_000_000}
    gone = Shown(durability="process", **settings)
    gone.log.away = True
    gone.pub.sum("v").add(7)
    with pytest.raises(Unavailable):
        gone.pub.close(0.2)
    it = opened(closing, buffer_bytes_max=65_536, block_timeout_ms=60_000, **settings)
    wait_until(lambda: it.value(m.PUBLISHER_RESCUED) == 1)
    assert fold(it.log.log).total("v") == 7
    assert it.value(m.PUBLISHER_SPOOL_MAX) == 8_000_000
    it.log.gate.clear()
    view, recorded = it.pub.sum("w", labels=("a",)), 0
    while not it.value(m.PUBLISHER_SPILLED):
        for _ in range(50):
            view.add(1, a=f"{recorded:050}")
            recorded += 1
    wait_until(lambda: it.value(m.PUBLISHER_SPOOL_BYTES) > 1_000)
    it.log.gate.set()
    it.pub.flush()
    assert fold(it.log.log).total("w") == recorded


def test_no_metric_is_forgotten() -> None:
    """Every metric of the publisher is seen to move by one of the tests above."""
    assert len(ALL) >= 20
    assert ALL - shown == set()
