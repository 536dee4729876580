"""What it costs to record a delta, against a dictionary update, and against what people use instead."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from statistics import median
from tempfile import TemporaryDirectory

from prometheus_client import CollectorRegistry, Counter

from pipeline import Publisher
from tests.bench.measure import Figure, Row, at_least_times, at_most_times, cheaper

_REPEATS = 7
_THREADS = 64
_LABELS = ("region", "product")


@contextmanager
def _publisher() -> Iterator[Publisher]:
    """A publisher as an app has it, whose flusher and sender run while it is measured."""
    with TemporaryDirectory(prefix="pipeline-bench-") as folder, Publisher(f"embedded:{folder}") as publisher:
        yield publisher


def _thread_ns(loop: Callable[[int], None], count: int) -> float:
    """CPU time of this thread for one turn of `loop`, in ns."""
    before = time.thread_time_ns()
    loop(count)
    return (time.thread_time_ns() - before) / count


def _bare(count: int) -> None:
    for _ in repeat(None, count):
        pass


def _ns_each(loops: Sequence[Callable[[int], None]], count: int) -> list[float]:
    """What one turn of each loop costs beyond the loop itself: the best of several rounds, each of which runs all."""
    best = [float("inf")] * len(loops)
    bare = float("inf")
    for _ in range(_REPEATS):
        bare = min(bare, _thread_ns(_bare, count))
        best = [min(ns, _thread_ns(loop, count)) for ns, loop in zip(best, loops, strict=True)]
    return [ns - bare for ns in best]


def record(quick: bool) -> list[Row]:
    """One delta through a handle that any thread may share."""
    count = 2_000 if quick else 300_000
    with _publisher() as publisher:
        cell = publisher.sum("sales", labels=_LABELS).labels("eu", "tea")
        totals = {"eu": 0.0}
        counter = Counter("sales", "As many.", _LABELS, registry=CollectorRegistry())
        child = counter.labels("eu", "tea")

        def update(count: int) -> None:
            for _ in repeat(None, count):
                totals["eu"] += 12.5

        def add(count: int) -> None:
            for _ in repeat(None, count):
                cell.add(12.5)

        def inc(count: int) -> None:
            for _ in repeat(None, count):
                child.inc(12.5)

        def labels_inc(count: int) -> None:
            for _ in repeat(None, count):
                counter.labels("eu", "tea").inc(12.5)

        update_ns, add_ns, inc_ns, labels_inc_ns = _ns_each([update, add, inc, labels_inc], count)
    added = Figure(add_ns, "ns")
    return [
        at_most_times("cell.add(v)", added, Figure(update_ns, "ns", "d[k] += v"), 2),
        cheaper("cell.add(v)", added, Figure(inc_ns, "ns", "prometheus_client, bound: inc(v)"), 4),
        cheaper("cell.add(v)", added, Figure(labels_inc_ns, "ns", "prometheus_client: labels(...).inc(v)"), 12),
    ]


def _together(bodies: Sequence[Callable[[], None]]) -> float:
    """Wall time until threads that start together have all done their part."""
    start = threading.Barrier(len(bodies) + 1)

    def run(body: Callable[[], None]) -> None:
        start.wait()
        body()

    threads = [threading.Thread(target=run, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    start.wait()
    before = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - before


def _add_rate(series_count: int, rounds: int) -> float:
    """Deltas a second that threads add to the same series, each to all of them in turn."""
    total = _THREADS * series_count * rounds
    with _publisher() as publisher:
        view = publisher.sum("sales", labels=_LABELS)
        cells = [view.labels("eu", str(i)) for i in range(series_count)]

        def add() -> None:
            for _ in repeat(None, rounds):
                for cell in cells:
                    cell.add(12.5)

        rate = total / _together([add] * _THREADS)
        publisher.flush()
        assert publisher.stats()["deltas"] == total
    return rate


def _put_rate(count: int) -> float:
    """Values a second that threads put into one queue, `count` each."""
    waiting: queue.Queue[float] = queue.Queue()

    def put() -> None:
        for _ in repeat(None, count):
            waiting.put(12.5)

    return _THREADS * count / _together([put] * _THREADS)


def record_threads(quick: bool) -> list[Row]:
    """64 threads add to 1,000 series that they share."""
    series_count, rounds = 1_000, 1 if quick else 100
    # Each for a second or so: how threads get into each other's way shows only once they all run.
    turns = [(_add_rate(series_count, rounds), _put_rate(series_count * rounds // 5)) for _ in range(1 if quick else 3)]
    added, put = median(turn[0] for turn in turns), median(turn[1] for turn in turns)
    return [
        at_least_times(
            "64 threads, 1,000 shared series",
            Figure(added, "deltas/s"),
            Figure(put, "puts/s", "queue.Queue.put by the same threads"),
            8,
        )
    ]
