"""A load of every kind of view, with a count of its own to compare answers with."""

from __future__ import annotations

import random
import re
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pipeline.metrics as m
from pipeline import Publisher, Reader, Token
from pipeline.metrics import Metric
from tests.support import everything

SERIES = 40
SEED = 20
LOADS_MAX = 64
"""Limit to the threads: more would share timestamps of kind last."""

Counts = dict[str, dict[tuple[str, str], Any]]
"""States of a naive count, by view and series."""

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
        assert metric is not m.PUBLISHER_DROPPED or not amount, "a delta or batch was given up"

    def set(self, metric: Metric, value: float, *labels: object) -> None:
        pass

    def observe(self, metric: Metric, value: float, *labels: object) -> None:
        pass


class Load(threading.Thread):
    """Records to every view until it is told to stop, and keeps a count of its own."""

    def __init__(self, publisher: Publisher, number: int, *, pause_s: float = 0.004) -> None:
        super().__init__(daemon=True)
        self.counts: Counts = {kind: {} for kind in MERGE}
        self.delta_count = 0
        self.stopping = threading.Event()
        self._number = number
        self._pause_s = pause_s
        self._rng = random.Random(SEED + number)
        labels = ("type", "n")
        self._views: dict[str, Any] = {kind: publisher.view(kind, kind, labels=labels) for kind in MERGE}

    def run(self) -> None:
        while not self.stopping.wait(self._pause_s):
            for _ in range(15):
                for kind in MERGE:
                    self._record(kind)

    def _record(self, kind: str) -> None:
        """Record ints beyond 64 bits, and floats whose sums are exact, in series of their own."""
        rng = self._rng
        series = rng.choice(("int", "float")), str(rng.randrange(SERIES))
        value = rng.getrandbits(70) - 2**69 if series[0] == "int" else rng.randrange(-(2**20), 2**20) / 1024
        cell = self._views[kind].labels(*series)
        self.delta_count += 1
        state: Any = value
        if kind == "sum":
            cell.add(value)
        elif kind == "last":
            ts_ms = self.delta_count * LOADS_MAX + self._number  # nobody else's
            state = ts_ms, value
            cell.set(value, ts_ms)
        else:
            state = (value, 1) if kind == "mean" else value
            cell.observe(value)
        mine = self.counts[kind]
        mine[series] = MERGE[kind](mine[series], state) if series in mine else state


def stop(threads: Sequence[Load]) -> None:
    """Stop the threads, after which all recorded deltas are counted."""
    for thread in threads:
        thread.stopping.set()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()


def merged(loads: Sequence[Load]) -> dict[str, dict[tuple[str, str], Any]]:
    """Return the answer that each series of each view must have."""
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
    """Return every series of every view, with everything in the log."""
    with Reader(url) as reader:
        token = after or everything(reader)
        return {
            kind: {
                (series.labels["type"], series.labels["n"]): series.value
                for series in reader.get(kind, after=token, timeout_ms=60_000).series
            }
            for kind in MERGE
        }


def metric(url: str, metric: Metric) -> float:
    """Return the counts of a process since its start, over all labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(float(count) for count in re.findall(rf"^{metric.name}(?:\{{.*\}})? (\S+)$", text, re.M))
