"""kill -9 of the server, again and again under load: nothing acknowledged is lost, nothing is counted twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import pipeline.metrics as m
from pipeline import NotReady, Publisher, Reader, Token, Unavailable
from tests.process.load import SEED, SERIES, Load, Retries, answers, merged, metric
from tests.process.network import SlowNetwork
from tests.support import LONG, UpProcess, pipeline, wait_until

KILLS = 20 if LONG else 2
KILLS_MAX = 60
THREADS = 4


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
    """Return a free port that the system gives to no client, so that it is still free when the server comes back."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def kill_again_and_again(up: UpProcess, rng: random.Random) -> int:
    """Kill at random moments: under load, during a start, and once with the stores gone at the next start.

    Return how many duplicate batches were dropped, and go on until there is one.
    """
    duplicate_count = 0
    for number in range(KILLS_MAX):
        if number >= KILLS and duplicate_count:
            break
        if number % 5 == 4:  # before it is ready, perhaps before it has opened the log
            time.sleep(rng.uniform(0.3, 1.3))
        else:
            up.wait_ready()
            time.sleep(rng.uniform(0.05, 0.7))
            # What was sent before and not acknowledged comes first, so once a batch is folded that is counted too.
            wait_until(lambda: metric(up.url, m.BATCHES_FOLDED) > 0, "a batch to be folded", 60)
            duplicate_count += int(metric(up.url, m.BATCHES_DUPLICATE))
        up.kill()
        if number == KILLS // 2:
            shutil.rmtree(up.data / "stores")
        up.start(wait_ready=False)
    up.wait_ready()
    return duplicate_count


@pytest.mark.timeout(400)
def test_killed_under_load(tmp_path: Path) -> None:
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
