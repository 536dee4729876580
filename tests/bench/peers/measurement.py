"""One tool at one piece of work on a running broker: CPU, memory and time of its processes, with its totals checked."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import NewTopic, OffsetSpec

from tests.bench.children import Asked, Child, Failed, cpu_s, until
from tests.bench.peers.tools import Place, Tool
from tests.bench.peers.work import Work, expected, key, labels, value
from tests.broker.kafka import Broker, Port, admin_client, create_topics

WAIT_S = 1_800.0
"""Time that any step may take."""


class Options(NamedTuple):
    """Settings that all measurements have in common."""

    partitions: int
    commit_ms: int
    flush_ms: int
    probes: int
    cache: Path


class Measured(msgspec.Struct):
    """Result of one measurement. CPU is in seconds, memory in MB."""

    deltas: int
    publisher_s: float
    worker_s: float
    broker_s: float
    wall_s: float
    publisher_mb: float
    """Peak, less what the prepared input took before."""
    worker_mb: float
    restored: int = 0
    """Entries that were restored; 0: not measured."""
    restore_cpu_s: float = 0
    """From the start of the process to its being ready, less the same of a start with nothing to restore."""
    restore_wall_s: float = 0
    restore_mb: float = 0

    @property
    def client_us(self) -> float:
        """CPU of all client processes for one delta."""
        return (self.publisher_s + self.worker_s) / self.deltas * 1e6


class Bench:
    """A broker, and the topics and processes of one measurement after the other."""

    def __init__(self, broker: Broker, scratch: Path, options: Options) -> None:
        self.broker = broker
        self.options = options
        self._scratch = scratch
        self._admin = admin_client(broker.bootstrap)
        self._number = 0

    @contextmanager
    def place(self, tool: Tool, commit_ms: int) -> Iterator[Place]:
        """Yield a new place with the topic of the deltas; all its topics and files are deleted in the end."""
        self._number += 1
        name = f"peer{self._number}"
        folder = self._scratch / name
        folder.mkdir()
        port = Port()
        count = self.options.partitions
        place = Place(self.broker.bootstrap, name, folder / "data", count, port.number, commit_ms, self.options.cache)
        try:
            if tool.is_ours:
                create_topics(self.broker.bootstrap, name, count)
            else:
                topic = NewTopic(place.topic, count, 1, config={"message.timestamp.type": "LogAppendTime"})
                self._admin.create_topics([topic])[place.topic].result(30)
            yield place
        finally:
            port.close()
            shutil.rmtree(folder, ignore_errors=True)
            for future in self._admin.delete_topics(self._topics(place)).values():
                future.result(30)

    def measure(self, tool: Tool, work: Work, *, restore: bool) -> Measured:
        """Let one tool do one piece of work, and a restore of all its entries; raise `Failed` if a total is wrong."""
        with self.place(tool, self.options.commit_ms) as place, ExitStack() as stack:
            worker = stack.enter_context(self.worker(tool, place))
            idle_cpu_s = self._ready(tool, place, worker)
            arguments = [tool.publisher, place.url if tool.is_ours else place.bootstrap, place.topic, tool.values]
            numbers = [work.series_count, work.delta_count, int(work.once), self.options.flush_ms]
            command = [sys.executable, "-m", "tests.bench.peers.publish", *arguments, *map(str, numbers)]
            publisher = stack.enter_context(Asked("publisher", place.data.parent, command, tool.env))
            publisher.line(WAIT_S)
            publisher.ask("warm", WAIT_S, worker)
            self._wait_committed(tool, place, worker)
            time.sleep(1)
            result = self._timed(tool, place, worker, publisher, work)
            totals = expected(work)
            self._check(tool, place, totals)
            if restore and tool.tells_ready:
                self._restore(tool, place, worker, result, len(totals), idle_cpu_s)
                publisher.ask("one", WAIT_S, worker)
                self._wait_committed(tool, place, worker)
                self._check(tool, place, {**totals, key(labels(0)): totals[key(labels(0))] + value(0)})
            return result

    def worker(self, tool: Tool, place: Place) -> Child:
        return Child("worker", place.data.parent, tool.command(place), tool.env)

    def _timed(self, tool: Tool, place: Place, worker: Child, publisher: Asked, work: Work) -> Measured:
        before_mb = publisher.memory_mb("VmRSS")
        for child in (publisher, worker):
            child.forget_peak()
        before = [publisher.cpu_s(), worker.cpu_s(), cpu_s(self.broker.pid)]
        began_s = time.monotonic()
        publisher.ask("go", WAIT_S, worker)
        self._wait_committed(tool, place, worker)
        wall_s = time.monotonic() - began_s
        after = [publisher.cpu_s(), worker.cpu_s(), cpu_s(self.broker.pid)]
        used = [b - a for a, b in zip(before, after, strict=True)]
        return Measured(
            work.delta_count,
            *used,
            wall_s=wall_s,
            publisher_mb=publisher.memory_mb("VmHWM") - before_mb,
            worker_mb=worker.memory_mb("VmHWM"),
        )

    def _ready(self, tool: Tool, place: Place, worker: Child) -> float:
        """Wait until the worker is ready, if it tells, and return its CPU time until then."""
        if tool.prints_ready:
            worker.line(WAIT_S)
        elif tool.ready is not None:
            ready = tool.ready
            until(lambda: ready(place), "the worker to be ready", WAIT_S, worker)
        return worker.cpu_s()

    def _restore(
        self, tool: Tool, place: Place, worker: Child, result: Measured, entry_count: int, idle_cpu_s: float
    ) -> None:
        worker.stop()
        shutil.rmtree(place.data)
        began_s = time.monotonic()
        worker.start()
        result.restore_cpu_s = self._ready(tool, place, worker) - idle_cpu_s
        result.restore_wall_s = time.monotonic() - began_s
        result.restored = entry_count
        result.restore_mb = worker.memory_mb("VmHWM")

    def _wait_committed(self, tool: Tool, place: Place, worker: Child) -> None:
        """Wait until the tool's group has committed the end of every partition: then all before it is in the changelog."""
        group = place.name + tool.group
        places = [TopicPartition(place.topic, number) for number in range(place.partitions)]
        found = self._admin.list_offsets(dict.fromkeys(places, OffsetSpec.latest()))
        ends = {it.partition: found[it].result(30).offset for it in places}

        def committed() -> bool:
            asked = self._admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group, places)])
            try:
                offsets = {it.partition: it.offset for it in asked[group].result(30).topic_partitions}
            except KafkaException:
                return False
            return all(offsets.get(number, 0) >= end for number, end in ends.items() if end)

        until(committed, f"{tool.name} to commit everything", WAIT_S, worker)

    def changelog(self, tool: Tool, place: Place) -> str:
        """Return the name of the tool's changelog topic, or an empty text if there is none yet."""
        return next((it for it in self._topics(place) if "changelog" in it), "")

    def _topics(self, place: Place) -> list[str]:
        names = self._admin.list_topics(timeout=30).topics
        # A name of one app may begin another's: peer1 and peer10.
        return [it for it in names if place.name in it.replace("_", ".").replace("-", ".").split(".")]

    def _check(self, tool: Tool, place: Place, totals: Mapping[str, int]) -> None:
        """Raise `Failed` unless the committed changelog holds exactly these totals."""
        check(tool.read(entries(self.broker.bootstrap, self.changelog(tool, place), place.partitions)), totals)


def check(found: Mapping[str, int], totals: Mapping[str, int]) -> None:
    """Raise `Failed` unless the totals that were found are exactly these."""
    if found != totals:
        names = found.keys() | totals.keys()
        wrong = sorted((name, found.get(name), totals.get(name)) for name in names if found.get(name) != totals.get(name))
        sums = f"their sum is {sum(found.values()):,}, must be {sum(totals.values()):,}"
        raise Failed(f"WRONG TOTALS: {len(wrong):,} of {len(totals):,}, such as {wrong[:3]}; {sums}")


def entries(bootstrap: str, topic: str, partitions: int) -> list[tuple[bytes, bytes]]:
    """Return everything that is committed in a topic, in the order of each partition."""
    settings: dict[str, Any] = {
        "bootstrap.servers": bootstrap,
        "group.id": "bench",
        "isolation.level": "read_committed",
        "enable.partition.eof": True,
        "enable.auto.commit": False,
        "log_level": 3,
    }
    consumer = Consumer(settings)
    consumer.assign([TopicPartition(topic, number, 0) for number in range(partitions)])
    ended: set[int] = set()
    out = []
    give_up_s = time.monotonic() + WAIT_S
    while len(ended) < partitions:
        if time.monotonic() > give_up_s:
            raise Failed(f"topic {topic} can't be read to its end")
        for message in consumer.consume(10_000, 1):
            error = message.error()
            if error is None:
                name, content = message.key(), message.value()
                if name is not None and content is not None:
                    out.append((bytes(name), bytes(content)))
            elif error.code() == KafkaError._PARTITION_EOF:
                ended.add(message.partition())
            else:
                raise Failed(f"topic {topic}: {error}")
    consumer.close()
    return out
