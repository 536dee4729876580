"""Many threads that record to the same series: deltas a second, and the slowest single ones."""

from __future__ import annotations

import queue
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from statistics import median
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter

from tests.bench.measure import Figure, Row, at_least_times, cheaper
from tests.bench.recording import LABELS, publisher, together

THREADS = (1, 2, 8, 64)
_SERIES = 1_000
_RATE_DELTAS = 400_000
"""Number of deltas per measurement, by all threads; slower ways do a part of it, so that each takes about as long."""
_SAMPLES = 3_000_000
_TAIL = 0.9999
OURS = "bound series"
_LOCK, _QUEUE, _PROMETHEUS = "one lock and dict", "one queue.Queue", "prometheus_client"

Way = Callable[[], Sequence[Any]]
"""Called by each thread: returns its handles, by series, which have a method `add`."""


@contextmanager
def _ours() -> Iterator[Way]:
    with publisher() as opened:
        view = opened.sum("sales", labels=LABELS)
        bound = [view.labels("eu", str(i)) for i in range(_SERIES)]
        yield lambda: bound


class _Totals:
    """Totals in a dict behind a lock, as most people write them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_series = dict.fromkeys(range(_SERIES), 0.0)

    def handles(self) -> list[_Total]:
        return [_Total(self, i) for i in range(_SERIES)]

    def flush(self) -> None:
        """Take the totals."""
        fresh = dict.fromkeys(range(_SERIES), 0.0)
        with self.lock:
            taken, self.by_series = self.by_series, fresh
        sum(taken.values())


class _Total:
    __slots__ = ("_series", "_totals")

    def __init__(self, totals: _Totals, series: int) -> None:
        self._totals = totals
        self._series = series

    def add(self, value: float) -> None:
        totals = self._totals
        with totals.lock:
            totals.by_series[self._series] += value


@contextmanager
def _locked() -> Iterator[Way]:
    yield _Totals().handles


@contextmanager
def _queued() -> Iterator[Way]:
    waiting: queue.Queue[float] = queue.Queue()
    yield lambda: [SimpleNamespace(add=waiting.put) for _ in range(_SERIES)]


@contextmanager
def _prometheus() -> Iterator[Way]:
    counter = Counter("sales", "As many.", LABELS, registry=CollectorRegistry())
    children = [SimpleNamespace(add=counter.labels("eu", str(i)).inc) for i in range(_SERIES)]
    yield lambda: children


_WAYS: Mapping[str, tuple[Callable[[], Any], int]] = {
    OURS: (_ours, 4),
    _LOCK: (_locked, 2),
    _PROMETHEUS: (_prometheus, 1),
    _QUEUE: (_queued, 1),
}
"""Ways to record, with the part of the deltas that each can record in the same time."""


def _rate(opened: Any, threads: int, delta_count: int) -> float:
    """Return deltas a second by so many threads, each to all series in turn."""
    rounds = max(1, delta_count // (threads * _SERIES))
    with opened as way:
        ready = threading.Barrier(threads)

        def record() -> None:
            handles = way()
            ready.wait()
            started.append(time.perf_counter())
            for _ in repeat(None, rounds):
                for handle in handles:
                    handle.add(12.5)
            ended.append(time.perf_counter())

        started: list[float] = []
        ended: list[float] = []
        together([record] * threads)
        return threads * rounds * _SERIES / (max(ended) - min(started))


def rates(quick: bool) -> dict[str, dict[int, float]]:
    """Return deltas a second by way and number of threads; each the median of rounds that measure all."""
    found: dict[str, dict[int, list[float]]] = {name: {threads: [] for threads in THREADS} for name in _WAYS}
    for _ in range(1 if quick else 3):
        for threads in THREADS:
            for name, (open_way, part) in _WAYS.items():
                count = _SERIES if quick else _RATE_DELTAS * part
                found[name][threads].append(_rate(open_way(), threads, count))
    return {name: {threads: median(turns) for threads, turns in by.items()} for name, by in found.items()}


def rate_rows(found: Mapping[str, Mapping[int, float]]) -> list[Row]:
    """Compare the rates with their targets."""

    def row(name: str, threads: int, other: str, other_threads: int, times: float) -> Row:
        number = f"{threads} thread{'s' if threads > 1 else ''}, {_SERIES:,} series, {name}"
        beside = other if threads == other_threads else f"{other_threads} thread, {other}"
        baseline = Figure(found[other][other_threads], "deltas/s", beside)
        return at_least_times(number, Figure(found[name][threads], "deltas/s"), baseline, times)

    return [
        *[row(OURS, threads, _QUEUE, threads, 10) for threads in THREADS],
        *[row(OURS, threads, _LOCK, threads, 4) for threads in THREADS],
        row(OURS, THREADS[-1], _PROMETHEUS, THREADS[-1], 6),
        row(OURS, THREADS[-1], OURS, 1, 0.8),
    ]


def _latencies(way: Way, flush: Callable[[], object], sample_count: int) -> list[int]:
    """Return the sorted ns of each add of 64 threads, wall time, while another flushes all the time."""
    per_thread = sample_count // THREADS[-1]
    rounds = max(1, per_thread // _SERIES)
    found: list[array[int]] = []
    done = threading.Event()
    warm = threading.Barrier(THREADS[-1])

    def record() -> None:
        handles = way()
        samples = array("q", bytes(8 * per_thread))
        clock = time.perf_counter_ns
        for _ in repeat(None, rounds):  # the first make a series known, and its buffer as large as it has to be
            for handle in handles:
                handle.add(12.5)
        warm.wait()
        for i in range(per_thread):
            handle = handles[i % _SERIES]
            add = handle.add
            before = clock()
            add(12.5)
            samples[i] = clock() - before
        found.append(samples)

    def flush_always() -> None:
        while not done.is_set():
            flush()

    flushing = threading.Thread(target=flush_always)
    flushing.start()
    try:
        together([record] * THREADS[-1])
    finally:
        done.set()
        flushing.join()
    return sorted(ns for samples in found for ns in samples)


def latencies(quick: bool) -> dict[str, list[int]]:
    """Return sorted ns of single adds by 64 threads while flushing, by way."""
    sample_count = 6_400 if quick else _SAMPLES
    found: dict[str, list[int]] = {}
    with publisher() as opened:
        view = opened.sum("sales", labels=LABELS)
        bound = [view.labels("eu", str(i)) for i in range(_SERIES)]
        found[OURS] = _latencies(lambda: bound, opened.flush, sample_count)
    totals = _Totals()
    found[_LOCK] = _latencies(totals.handles, totals.flush, sample_count)
    return found


def tail(sorted_ns: Sequence[int]) -> float:
    """Return the time that one add in ten thousand exceeds."""
    return sorted_ns[min(int(len(sorted_ns) * _TAIL), len(sorted_ns) - 1)]


def tail_rows(found: Mapping[str, Sequence[int]]) -> list[Row]:
    """Compare the slowest adds with those of a locked dict."""
    baseline = Figure(tail(found[_LOCK]) / 1000, "us", f"the same, {_LOCK}")
    name = f"p99.99 of one add, 64 threads, while flushing, {OURS}"
    return [cheaper(name, Figure(tail(found[OURS]) / 1000, "us"), baseline, 20)]
