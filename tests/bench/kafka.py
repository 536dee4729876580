"""Benchmarks of a worker on a real broker, which is started for the time of a benchmark; only this process' CPU counts.

Another one measures the time of a delta from `add` to an answer, with only publisher and server in this process.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline import Publisher
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.core.codec import encode_batch
from pipeline.core.query import Query
from pipeline.core.record import Batch, Definition, Group, series_suffix
from pipeline.errors import NotFound
from pipeline.ports import Message
from pipeline.roles.server import ClusterServer
from pipeline.settings import KafkaSettings, LogSettings
from pipeline.topics import DELTAS
from tests.bench.measure import ROOT, Figure, Row, at_most
from tests.bench.worker import House, fold, measure_restore
from tests.broker.kafka import Broker, create_topics

BATCH_ENTRIES = 2_000
_LOAD = Definition("load", "sum", ("series",))


@contextmanager
def broker() -> Iterator[str]:
    """Run a broker with our topics, in a temporary folder, and yield its URL."""
    with TemporaryDirectory(prefix="pipeline-bench-", ignore_cleanup_errors=True) as folder, Broker(Path(folder)) as started:
        create_topics(started.bootstrap)
        yield f"kafka://{started.bootstrap}"


@contextmanager
def house() -> Iterator[House]:
    """Return a new house on Kafka."""
    with broker() as url, TemporaryDirectory(prefix="pipeline-bench-") as folder:
        log = KafkaLog(parse_url(url), KafkaSettings(), SystemClock())
        try:
            yield House(Path(folder), log, batch_entries=BATCH_ENTRIES)
        finally:
            log.close()


def fold_unique(quick: bool) -> list[Row]:
    """Fold entries that are each a new series, so that nothing merges."""
    count = 20_000 if quick else 1_000_000
    return [fold("Kafka: worker, unique series", house, count, count, 220_000)]


def fold_repeated(quick: bool) -> list[Row]:
    """Fold entries of which each series comes ten times."""
    count = 20_000 if quick else 1_000_000
    return [fold("Kafka: worker, each series ten times", house, count, count // 10, 600_000)]


def restore(quick: bool) -> list[Row]:
    """Restore deleted stores from the changelog."""
    return [measure_restore("Kafka: restore", house, 20_000 if quick else 1_000_000)]


def latency(quick: bool) -> list[Row]:
    """Measure from `add` to an answer that has it, beside a load of small batches; against a round trip to the broker."""
    count = 5 if quick else 300
    usual = _latency("Kafka: add to answer", count, batches_per_s=1_000, most_ms=(150, 300))
    soon = _latency(
        "Kafka: add to answer, intervals 5 and 10 ms",
        count,
        batches_per_s=100,
        most_ms=(60, 60),
        flush_interval_ms=5,
        commit_interval_ms=10,
    )
    return [*usual, *soon[1:]]


def _latency(
    name: str,
    count: int,
    *,
    batches_per_s: int,
    most_ms: tuple[int, int],
    flush_interval_ms: int = 100,
    commit_interval_ms: int = 100,
) -> list[Row]:
    with broker() as url, TemporaryDirectory(prefix="pipeline-bench-") as folder:
        server = ClusterServer(url, LogSettings(data=f"{folder}/server"))
        settings = ["--set", f"commit_interval_ms={commit_interval_ms}", "--port", "0"]
        program = [sys.executable, "-c", "from pipeline.cli import main; main()"]
        command = [*program, "worker", "--from", url, "--data", f"{folder}/worker", *settings]
        load = [sys.executable, "-m", "tests.bench.kafka", url, str(batches_per_s)]
        with _running(command), _running(load), Publisher(url, flush_interval_ms=flush_interval_ms) as publisher:
            server.start()
            cell = publisher.sum("probe").labels()
            try:
                cell.add(1)
                until_answer(server, 1)
                rng = random.Random(1)
                took = []
                for total in range(2, count + 2):
                    time.sleep(rng.random() * 0.1)
                    started_s = time.monotonic()
                    cell.add(1)
                    took.append((until_answer(server, total) - started_s) * 1000)
            finally:
                server.stop()
        bare = Figure(_bare_ms(url, max(5, count // 10)), "ms", "p50 of produce and consume one message, no transaction")
    took.sort()
    p50, p99 = statistics.median(took), took[int(len(took) * 0.99)]
    return [
        at_most(f"{name}, p50", Figure(p50, "ms"), bare, most_ms[0]),
        at_most(f"{name}, p99", Figure(p99, "ms"), bare, most_ms[1]),
    ]


def until_answer(server: ClusterServer, total: int, view: str = "probe") -> float:
    """Return when an answer had the total, on the monotonic clock."""
    give_up_s = time.monotonic() + 60
    while time.monotonic() < give_up_s:
        with suppress(NotFound):
            if server.ready:
                answer = server.reader.read(Query(view, by=()), deadline_s=give_up_s)
                if answer.series and answer.series[0].value >= total:
                    return time.monotonic()
        time.sleep(0.0005)
    raise TimeoutError(f"the answer never had {total}")


def _bare_ms(url: str, count: int) -> float:
    log = KafkaLog(parse_url(url), KafkaSettings(), SystemClock())
    reader = log.reader(DELTAS)
    reader.assign({0: log.end_offsets(DELTAS)[0]})
    took = []
    for _ in range(count):
        started_s = time.monotonic()
        log.append([Message(DELTAS, 0, None, b"not a batch")], timeout_s=10)
        while not reader.poll(record_count_max=1_000, bytes_max=2**20, timeout_s=1):
            pass
        took.append((time.monotonic() - started_s) * 1000)
    reader.close()
    log.close()
    return statistics.median(took)


@contextmanager
def _running(command: list[str]) -> Iterator[None]:
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def publish_load(url: str, batches_per_s: int, pause: Callable[[float], None] = time.sleep) -> None:
    """Publish small batches, as many publishers would send them, until this process is killed."""
    log = KafkaLog(parse_url(url), KafkaSettings(), SystemClock())
    partition_count = log.partition_count(DELTAS)
    sequence = 0
    started_s = time.monotonic()
    while True:
        due = int((time.monotonic() - started_s) * batches_per_s)
        messages = []
        while sequence < due:
            partition, number = sequence % partition_count, sequence // partition_count
            group = Group(_LOAD, [series_suffix((f"s{(sequence * 7 + i) % 10_000}",)) for i in range(10)], [1.0] * 10)
            value = encode_batch(Batch("load", 0, partition, number, number, 0, [group]))
            messages.append(Message(DELTAS, partition, None, value))
            sequence += 1
        log.append(messages, timeout_s=10)
        pause(0.01)


if __name__ == "__main__":
    publish_load(sys.argv[1], int(sys.argv[2]))
