"""A foreign transaction stays open on deltas: records behind it are known to be missing, and count once it is over."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path

import pytest

import pipeline.metrics as m
from pipeline import Publisher, Reader
from pipeline.errors import NotFound, NotReady
from pipeline.metrics import Metric
from pipeline.topics import DELTAS
from tests.broker.drive import PUBLISHER, Role, server, worker
from tests.broker.kafka import App, create_topics
from tests.contracts.support import KafkaHanging
from tests.support import wait_until

PARTITIONS = 3
HELD = {0: "abort", 2: "commit"}
"""Partitions with an open transaction, and how it ends."""
SERIES = 50
HELD_UP_MS = 8_000
"""Longer than a worker waits before it says that it is held up."""
FRESH_MS = 1_000


def gauge(role: Role, metric: Metric, partition: int) -> float:
    """Return a gauge of one partition as a process exposes it now."""
    with urllib.request.urlopen(f"{role.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = re.findall(rf'^{metric.name}\{{partition="{partition}"\}} (\S+)$', text, re.M)
    return float(found[0]) if found else -1.0


def lags(role: Role) -> dict[int, int]:
    """Return the lag of each partition in `/v1/status`."""
    with Reader(role.url) as reader:
        return {it["partition"]: it["lag"] for it in reader.status()["partitions"]}


def total(reader: Reader, **options: int) -> tuple[float, int]:
    """Return the sum over all series, and the staleness of the answer."""
    answer = reader.get("v", by=[], **options)
    assert answer.as_of.staleness_ms is not None
    return sum(it.value for it in answer.series), answer.as_of.staleness_ms


@pytest.mark.long
@pytest.mark.timeout(180)
def test_staleness_and_lag_show_what_waits(app: App, tmp_path: Path) -> None:
    """Staleness is never below the age of an acknowledged delta that an answer lacks, lag is above 0 wherever it is shown,
    and the worker says once what to do. When the transaction is over, all counts, once.
    """
    create_topics(app.bootstrap, app.app, PARTITIONS)
    with (
        worker(app, tmp_path / "worker", stall_timeout_ms=3_000) as folds,
        server(app, tmp_path / "server") as reads,
        Publisher(app.url, **PUBLISHER) as publisher,
        Reader(reads.url) as reader,
    ):

        def publish() -> float:
            before_s = time.monotonic()
            for number in range(SERIES):
                publisher.sum("v", labels=("n",)).add(1, n=str(number))
            publisher.flush(timeout_s=30)
            return before_s

        publish()
        wait_until(lambda: _value(reader) == SERIES, "the first round", 60)
        wait_until(lambda: total(reader)[1] < FRESH_MS, "a fresh answer", 30)
        hanging = {number: KafkaHanging(app.bootstrap, app.topic(DELTAS), number, b"theirs") for number in HELD}
        try:
            publish()
            acknowledged_s = time.monotonic()
            waited_ms = 0.0
            while waited_ms < HELD_UP_MS:
                # Before the read: so old is what is missing at least.
                waited_ms = (time.monotonic() - acknowledged_s) * 1000
                value, staleness_ms = total(reader)
                assert SERIES <= value < 2 * SERIES, "what is behind the transaction can't be read"
                assert staleness_ms >= waited_ms
                time.sleep(0.05)
            with pytest.raises(NotReady):
                total(reader, max_staleness_ms=FRESH_MS, timeout_ms=300)
            for role in (folds, reads):
                wait_until(lambda role=role: all(lags(role)[number] > 0 for number in HELD), "lag in the status")
                assert lags(role)[1] == 0, "the other partition is not held up"
                for it in HELD:
                    wait_until(lambda role=role, it=it: gauge(role, m.LAG, it) == lags(role)[it], "lag in the metrics")
            for it in HELD:
                assert gauge(reads, m.STALENESS, it) >= HELD_UP_MS / 1000
                wait_until(lambda it=it: gauge(folds, m.HELD_UP, it) == lags(folds)[it], "what is held up")
            assert gauge(folds, m.HELD_UP, 1) == 0
            assert folds.exit_code is None, "it waits, and is not taken for one that stands still"
            assert folds.program.stderr().count("kafka-transactions.sh") == 2 * len(HELD), "two commands for each"
            for it in HELD:
                assert f"--topic {app.topic(DELTAS)} --partition {it} --start-offset" in folds.program.stderr()
        finally:
            for number, end in HELD.items():
                getattr(hanging[number], end)()
        wait_until(lambda: _value(reader) == 2 * SERIES, "all of it", 60)
        for role in (folds, reads):
            wait_until(lambda role=role: lags(role) == dict.fromkeys(range(PARTITIONS), 0), "no lag")
            for it in HELD:
                wait_until(lambda role=role, it=it: gauge(role, m.LAG, it) == 0, "no lag in the metrics")
        wait_until(lambda: total(reader)[1] < FRESH_MS, "a fresh answer", 30)
        for it in HELD:
            wait_until(lambda it=it: gauge(folds, m.HELD_UP, it) == 0, "nothing held up")
        publish()
        wait_until(lambda: _value(reader) == 3 * SERIES, "the third round", 60)


def _value(reader: Reader) -> float:
    try:
        return total(reader)[0]
    except (NotFound, NotReady):
        return 0
