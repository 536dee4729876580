"""Cost of recording a delta, against a dictionary update, and against other libraries."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice, repeat
from tempfile import TemporaryDirectory
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, Counter

from pipeline.adapters.clock import SystemClock
from pipeline.errors import PipelineError
from pipeline.ports import MESSAGE_BYTES_MAX, Message
from pipeline.publisher.client import BasePublisher
from pipeline.settings import PublisherSettings
from tests.bench.measure import Figure, Row, at_most_times, cheaper

LABELS = ("region", "product")
_ROUNDS = 7
_OURS = "bound series: add(v)"
_KEYED = "view: add(v, region=..., product=...)"
_DURABLE = "bound series, kept through kill -9: add(v)"
_OBSERVE = "bound histogram of 20 buckets: observe(v)"
UPDATE = "d[k] += v"
_LOCK = "lock, d[k] += v"
_QUEUE = "queue.Queue.put"
INC = "prometheus_client, bound: inc(v)"
LABELS_INC = "prometheus_client: labels(...).inc(v)"
OTEL = "OpenTelemetry SDK: counter.add(v, {...})"


class _Sink:
    """A log that acknowledges everything at once, so that only the publisher is measured."""

    def message_bytes_max(self, topic: str) -> int:
        return MESSAGE_BYTES_MAX

    def partition_count(self, topic: str) -> int:
        return 4

    def topic_id(self, topic: str) -> str:
        return "sink"

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        return {}

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        return [1] * len(messages)

    def close(self) -> None:
        pass


@contextmanager
def publisher(**settings: Any) -> Iterator[BasePublisher]:
    """A publisher whose flusher and sender run while it is measured."""
    with TemporaryDirectory(prefix="pipeline-bench-") as folder:
        if "durability" in settings:
            settings["spool_dir"] = folder
        with BasePublisher(_Sink(), SystemClock(), PublisherSettings(**settings)) as opened:
            yield opened


def _thread_ns(loop: Callable[[int], None], count: int) -> float:
    """Return the CPU time of this thread for one turn of `loop`, in ns."""
    before = time.thread_time_ns()
    loop(count)
    return (time.thread_time_ns() - before) / count


def _bare(count: int) -> None:
    for _ in repeat(None, count):
        pass


def best_ns(loops: Mapping[str, Callable[[int], None]], count: int, round_count: int = _ROUNDS) -> dict[str, float]:
    """Return the cost of one turn of each loop beyond a bare one: the best of several rounds, each of which runs all."""
    best = dict.fromkeys(loops, float("inf"))
    bare = float("inf")
    for _ in range(round_count):
        bare = min(bare, _thread_ns(_bare, count))
        for name, loop in loops.items():
            turns = count // 10 if name == OTEL else count
            best[name] = min(best[name], _thread_ns(loop, turns))
    return {name: ns - bare for name, ns in best.items()}


def adding(handle: Any) -> Callable[[int], None]:
    """Return a loop that adds to one series."""

    def add(count: int) -> None:
        for _ in repeat(None, count):
            handle.add(12.5)

    return add


def observing(handle: Any) -> Callable[[int], None]:
    """Return a loop that observes numbers of 20 buckets in one series."""

    numbers = [0.01 * 1.003**n for n in range(20)]

    def observe(count: int) -> None:
        for number in islice(cycle(numbers), count):
            handle.observe(number)

    return observe


def _adding_by_key(view: Any) -> Callable[[int], None]:
    def add(count: int) -> None:
        for _ in repeat(None, count):
            view.add(12.5, region="eu", product="tea")

    return add


def others() -> dict[str, Callable[[int], None]]:
    """Return the ways of other libraries, each as its documentation has it."""
    totals = {"eu": 0.0}
    lock = threading.Lock()
    waiting: queue.SimpleQueue[float] | queue.Queue[float] = queue.Queue()
    counter = Counter("sales", "As many.", LABELS, registry=CollectorRegistry())
    child = counter.labels("eu", "tea")
    instrument = MeterProvider([InMemoryMetricReader()]).get_meter("bench").create_counter("sales")

    def update(count: int) -> None:
        for _ in repeat(None, count):
            totals["eu"] += 12.5

    def locked(count: int) -> None:
        for _ in repeat(None, count):
            with lock:
                totals["eu"] += 12.5

    def put(count: int) -> None:
        for _ in repeat(None, count):
            waiting.put(12.5)

    def inc(count: int) -> None:
        for _ in repeat(None, count):
            child.inc(12.5)

    def labels_inc(count: int) -> None:
        for _ in repeat(None, count):
            counter.labels("eu", "tea").inc(12.5)

    def otel(count: int) -> None:
        for _ in repeat(None, count):
            instrument.add(12.5, {"region": "eu", "product": "tea"})

    return {UPDATE: update, _LOCK: locked, _QUEUE: put, INC: inc, LABELS_INC: labels_inc, OTEL: otel}


def costs(quick: bool) -> dict[str, float]:
    """Return the ns of this thread for one delta, by way to record it."""
    with ExitStack() as stack:
        view = stack.enter_context(publisher()).sum("sales", labels=LABELS)
        durable = stack.enter_context(publisher(durability="process")).sum("sales", labels=LABELS)
        slow = stack.enter_context(publisher()).histogram("slow", labels=LABELS).labels("eu", "tea")
        bound = {name: adding(of.labels("eu", "tea")) for name, of in ((_OURS, view), (_DURABLE, durable))}
        return best_ns(
            {**bound, _OBSERVE: observing(slow), _KEYED: _adding_by_key(view), **others()}, 2_000 if quick else 150_000
        )


def cost_rows(ns: Mapping[str, float]) -> list[Row]:
    """Compare the costs with their targets."""

    def figures(name: str, baseline: str) -> tuple[str, Figure, Figure]:
        return name, Figure(ns[name], "ns"), Figure(ns[baseline], "ns", baseline)

    return [
        at_most_times(*figures(_OURS, UPDATE), 0.7),
        at_most_times(*figures(_KEYED, UPDATE), 2),
        cheaper(*figures(_OURS, INC), 12),
        cheaper(*figures(_OURS, LABELS_INC), 20),
        cheaper(*figures(_OURS, OTEL), 100),
        at_most_times(*figures(_DURABLE, _OURS), 3),
        at_most_times(*figures(_OBSERVE, _OURS), 3),
    ]


def together(bodies: Sequence[Callable[[], None]]) -> float:
    """Return the wall time until threads that start together have all done their part."""
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
