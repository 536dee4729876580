"""kill -9 of the server, twenty times under load: nothing acknowledged is lost, nothing is counted twice."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import pipeline.metrics as m
from pipeline import NotReady, Publisher, Reader, Token, Unavailable
from pipeline.metrics import Metric
from tests.process.network import SlowNetwork
from tests.support import UpProcess, everything, pipeline

KILLS = 20
THREADS = 4
SERIES = 40
SEED = 20

Counts = dict[str, dict[tuple[str, str], Any]]
"""By view and series, with the state of a naive count."""

MERGE: Mapping[str, Callable[[Any, Any], Any]] = {
    "sum": lambda old, new: old + new,
    "min": min,
    "max": max,
    "mean": lambda old, new: (old[0] + new[0], old[1] + new[1]),
    "last": max,
}
ANSWER: Mapping[str, Callable[[Any], Any]] = {"mean": lambda state: state[0] / state[1], "last": lambda state: state[1]}


class Retries:
    """Metrics of a publisher, of which one matters here."""

    def __init__(self) -> None:
        self.count = 0.0

    def inc(self, metric: Metric, amount: float = 1, *labels: object) -> None:
        if metric is m.PUBLISHER_RETRIES:
            self.count += amount
        assert metric is not m.PUBLISHER_DROPPED, "a delta or batch was given up"

    def set(self, metric: Metric, value: float, *labels: object) -> None:
        pass

    def observe(self, metric: Metric, value: float, *labels: object) -> None:
        pass


class Load(threading.Thread):
    """Records to every view until it is told to stop, and keeps a count of its own."""

    def __init__(self, publisher: Publisher, number: int) -> None:
        super().__init__(daemon=True)
        self.counts: Counts = {kind: {} for kind in MERGE}
        self.delta_count = 0
        self.stopping = threading.Event()
        self._number = number
        self._rng = random.Random(SEED + number)
        labels = ("type", "n")
        self._views: dict[str, Any] = {kind: publisher.view(kind, kind, labels=labels) for kind in MERGE}

    def run(self) -> None:
        while not self.stopping.wait(0.004):
            for _ in range(15):
                for kind in MERGE:
                    self._record(kind)

    def _record(self, kind: str) -> None:
        """Ints beyond 64 bits, and floats whose sums are exact, in series of their own."""
        rng = self._rng
        series = rng.choice(("int", "float")), str(rng.randrange(SERIES))
        value = rng.getrandbits(70) - 2**69 if series[0] == "int" else rng.randrange(-(2**20), 2**20) / 1024
        cell = self._views[kind].labels(*series)
        self.delta_count += 1
        state: Any = value
        if kind == "sum":
            cell.add(value)
        elif kind == "last":
            ts_ms = self.delta_count * THREADS + self._number  # nobody else's
            state = ts_ms, value
            cell.set(value, ts_ms)
        else:
            state = (value, 1) if kind == "mean" else value
            cell.observe(value)
        mine = self.counts[kind]
        mine[series] = MERGE[kind](mine[series], state) if series in mine else state


class ReadYourWrites(threading.Thread):
    """Adds 1, flushes, and reads its own series after the token, through all outages."""

    def __init__(self, publisher: Publisher, url: str) -> None:
        super().__init__(daemon=True)
        self.stopping = threading.Event()
        self.added = 0
        self.checked_count = 0
        self.wrong: list[str] = []
        self._publisher = publisher
        self._url = url

    def run(self) -> None:
        own = self._publisher.sum("own")
        with Reader(self._url, timeout_s=5.0) as reader:
            while not self.stopping.wait(0.02):
                own.add(1)
                self.added += 1
                token = self._publisher.flush(timeout_s=90)
                value = self._read(reader, token)
                if value not in (self.added, None):
                    self.wrong.append(f"after {self.added} additions {value}")
                self.checked_count += value is not None

    def _read(self, reader: Reader, token: Token) -> Any:
        while not self.stopping.is_set():
            try:
                return reader.get("own", after=token, timeout_ms=2000).value()
            except (Unavailable, NotReady):
                self.stopping.wait(0.02)
        return None


def quiet_port() -> int:
    """A free port that the system gives to no client, so that it is still free when the server comes back."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def merged(loads: list[Load]) -> dict[str, dict[tuple[str, str], Any]]:
    """The answer that each series of each view must have."""
    counts: Counts = {kind: {} for kind in MERGE}
    for load in loads:
        for kind, series in load.counts.items():
            for labels, state in series.items():
                old = counts[kind].get(labels)
                counts[kind][labels] = state if old is None else MERGE[kind](old, state)
    return {
        kind: {labels: ANSWER.get(kind, lambda state: state)(state) for labels, state in series.items()}
        for kind, series in counts.items()
    }


def answers(url: str, after: Token | None = None) -> dict[str, dict[tuple[str, str], Any]]:
    """Every series of every view, with all that the log has."""
    with Reader(url) as reader:
        token = after or everything(reader)
        return {
            kind: {
                (series.labels["type"], series.labels["n"]): series.value
                for series in reader.get(kind, after=token, timeout_ms=60_000).series
            }
            for kind in MERGE
        }


def kill_again_and_again(up: UpProcess, rng: random.Random) -> int:
    """At random moments: under load, while it starts, and once with the stores gone when it comes back.

    Returns how many batches were dropped because they had been folded before.
    """
    duplicate_count = 0
    for number in range(KILLS):
        if number % 5 == 4:  # before it is ready, perhaps before it has opened the log
            time.sleep(rng.uniform(0.3, 1.3))
        else:
            up.wait_ready()
            time.sleep(rng.uniform(0.05, 0.7))
            duplicate_count += duplicates(up.url)
        up.kill()
        if number == KILLS // 2:
            shutil.rmtree(up.data / "stores")
        up.start(wait_ready=False)
    up.wait_ready()
    return duplicate_count


def duplicates(url: str) -> int:
    """Batches that this server has dropped since its start."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(int(float(count)) for count in re.findall(r"^pipeline_batches_duplicate_total\{.*\} (\S+)$", text, re.M))


@pytest.mark.timeout(400)
def test_twenty_kills_under_load(tmp_path: Path) -> None:
    """All series of all kinds equal an independent count, and every flush can be read back, whatever was killed."""
    retries = Retries()
    up = UpProcess(tmp_path / "data", "--set", "commit_interval_ms=20", port=quiet_port())
    settings = {"flush_interval_ms": 10, "retry_backoff_ms": 10, "retry_backoff_max_ms": 100}
    try:
        up.start(wait_ready=False)
        with SlowNetwork(up.port) as network, Publisher(network.url, metrics=retries, **settings) as publisher:
            loads = [Load(publisher, number) for number in range(THREADS)]
            reads = ReadYourWrites(publisher, network.url)
            for thread in (*loads, reads):
                thread.start()
            duplicate_count = kill_again_and_again(up, random.Random(SEED))
            for thread in (*loads, reads):
                thread.stopping.set()
            for thread in (*loads, reads):
                thread.join(100)
                assert not thread.is_alive()
            token = publisher.flush(timeout_s=60)
            stats = publisher.stats()
        expected = merged(loads)
        assert min(map(len, expected.values())) == 2 * SERIES
        assert answers(up.url, token) == expected
        assert stats["deltas"] == sum(load.delta_count for load in loads) + reads.added
        assert reads.wrong == []
        assert reads.checked_count > KILLS
        assert min(retries.count, duplicate_count) > 0, "no batch was acknowledged and sent again: nothing is shown"
        assert up.terminate() == 0

        verified = pipeline("verify", "--data", str(up.data), "--json")
        assert json.loads(verified.stdout)["fine"], verified.stdout
        shutil.rmtree(up.data / "stores")
        up.start()
        assert answers(up.url) == expected
    finally:
        up.kill()
