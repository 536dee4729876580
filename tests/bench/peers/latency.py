"""Time from a delta to its being readable, one delta at a time, at a flush interval of 5 ms and a commit interval of 10 ms.

python -m tests.bench.peers.latency WAY BOOTSTRAP NAME VALUES CHANGELOG PARTITIONS COUNT

Publisher and reader are in one process. For ours, readable means that a query server, which follows the changelog into its
store, answers with the delta. For the others it means that a consumer of their changelog receives the total with
read_committed; what a query needs from there is not counted. Their producer is flushed at once, ours waits for its flush
interval. Prints the times in ms as JSON.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import msgspec
from confluent_kafka import Consumer, TopicPartition

from tests.bench.children import Child, until
from tests.bench.peers.publish import encode, producer
from tests.bench.peers.work import VIEW

if TYPE_CHECKING:
    from tests.bench.peers.measurement import Bench
    from tests.bench.peers.tools import Tool

FLUSH_MS, COMMIT_MS = 5, 10
_PAUSE_S = 0.1
_KEY = "region|product"
Wait = Callable[[], float]


def measure_latency(bench: Bench, tool: Tool) -> list[float]:
    """Return the times of one tool, in ascending order."""
    from tests.bench.peers.measurement import WAIT_S

    with bench.place(tool, COMMIT_MS) as place, bench.worker(tool, place) as worker:
        if not tool.is_ours:
            until(lambda: bench.changelog(tool, place), "a changelog", 120, worker)
        way = [tool.publisher, place.bootstrap, place.name, tool.values, bench.changelog(tool, place)]
        command = [sys.executable, "-m", "tests.bench.peers.latency", *way, str(place.partitions), str(bench.options.probes)]
        with Child("probe", place.data.parent, command, tool.env) as probe:
            return sorted(msgspec.json.decode(probe.line(WAIT_S, worker), type=list[float]))


@contextmanager
def _ours(url: str) -> Iterator[tuple[Callable[[], None], Callable[[int], float]]]:
    from pipeline import Publisher
    from pipeline.roles.server import ClusterServer
    from pipeline.settings import LogSettings
    from tests.bench.kafka import until_answer

    with TemporaryDirectory(prefix="pipeline-peers-") as folder, Publisher(url, flush_interval_ms=FLUSH_MS) as publisher:
        server = ClusterServer(url, LogSettings(data=folder))
        server.start()
        series = publisher.sum(VIEW).labels()
        try:
            yield lambda: series.add(1), lambda total: until_answer(server, total, VIEW)
        finally:
            server.stop()


@contextmanager
def _peer(
    bootstrap: str, topic: str, kind: str, changelog: str, partitions: int, merging: str
) -> Iterator[tuple[Callable[[], None], Callable[[int], float]]]:
    settings = {"bootstrap.servers": bootstrap, "group.id": "probe", "isolation.level": "read_committed", "log_level": 3}
    consumer = Consumer({**settings, "enable.auto.commit": False, "fetch.wait.max.ms": 100, "fetch.error.backoff.ms": 5})
    consumer.assign([TopicPartition(changelog, number, 0) for number in range(partitions)])
    publish = producer(bootstrap, topic, FLUSH_MS, merging)
    delta = (_KEY.encode(), 1) if merging else (_KEY.encode(), encode(kind, 1))

    def wait(total: int) -> float:
        give_up_s = time.monotonic() + 60
        while time.monotonic() < give_up_s:
            message = consumer.poll(1)
            # One delta at a time: a record of our key that comes after a delta holds it.
            if message is not None and not message.error() and _KEY.encode() in (message.key() or b""):
                return time.monotonic()
        raise TimeoutError(f"total {total} never came")

    try:
        yield lambda: publish([delta]), wait  # type: ignore[list-item]
    finally:
        consumer.close()


def main() -> None:
    """Run with this process' arguments."""
    way, bootstrap, name, kind, changelog, partitions, count = sys.argv[1:]
    if way == "ours":
        opened = _ours(f"kafka://{bootstrap}/{name}")
    else:
        opened = _peer(bootstrap, f"{name}.deltas", kind, changelog, int(partitions), kind * (way == "merging"))
    rng = random.Random(1)
    took = []
    with opened as (add, wait):
        for total in range(1, int(count) + 11):
            time.sleep(rng.random() * _PAUSE_S)
            began_s = time.monotonic()
            add()
            took.append((wait(total) - began_s) * 1000)
    print(msgspec.json.encode(took[10:]).decode())  # the first ones meet what is not yet connected


if __name__ == "__main__":
    main()
