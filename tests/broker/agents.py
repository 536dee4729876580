"""Helpers for tests of users' agents: a topic to read, a module with agents, a worker that runs it."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import NewTopic

from pipeline import Reader, Unavailable
from pipeline.errors import NotFound
from tests.broker.drive import Role
from tests.broker.kafka import App, admin_client, create_topics
from tests.support import wait_until

PARTITIONS = 3
"""Number of partitions of deltas and changelog."""
SOURCE_PARTITIONS = 5
SESSION_MS = 6_000
WAIT_S = 90.0

SHOP = """
import asyncio, os, pipeline
app = pipeline.faust_app()
seen = app.publisher.sum("seen", labels=("id",))
orders = app.topic(os.environ["ORDERS"], value_serializer="json")

@app.agent(orders)
async def record(stream):
    async for order in stream:
        await asyncio.sleep({pause_s})
        seen.add(1, id=str(order["id"]))
"""

BOTH = f"""{SHOP}
also = app.publisher.sum("also", labels=("id",))

@app.agent(orders)
async def record_also(stream):
    async for order in stream:
        await asyncio.sleep({{pause_s}} / 2)
        also.add(1, id=str(order["id"]))
"""

FORMATS = """
import json, os, faust, pipeline
from faust.serializers import codecs

class Mine(codecs.Codec):
    def _loads(self, value):
        return json.loads(value)["id"]

    def _dumps(self, value):
        return json.dumps(value).encode()

class Order(faust.Record, serializer="json"):
    id: int

codecs.register("mine", Mine())
app = pipeline.faust_app(stream_buffer_maxsize=100)
seen = {name: app.publisher.sum(name, labels=("id",)) for name in ("raw", "record", "codec")}

@app.agent(app.topic(os.environ["ORDERS"], value_type=bytes, value_serializer="raw"))
async def raw(stream):
    async for order in stream:
        seen["raw"].add(1, id=str(json.loads(order)["id"]))

@app.agent(app.topic(os.environ["ORDERS"], value_type=Order))
async def record(stream):
    async for order in stream:
        seen["record"].add(1, id=str(order.id))

@app.agent(app.topic(os.environ["ORDERS"], value_serializer="mine"))
async def codec(stream):
    async for batch in stream.take(10, within=0.2):
        for number in batch:
            seen["codec"].add(1, id=str(number))
"""


class Source:
    """A topic of events that agents read; each has an id."""

    def __init__(self, app: App, scratch: Path, code: str = SHOP.format(pause_s=0)) -> None:
        self.app, self.scratch = app, scratch
        create_topics(app.bootstrap, app.app, PARTITIONS)
        self.topic = f"{app.app}.orders"
        admin = admin_client(app.bootstrap)  # to be kept until it has answered
        admin.create_topics([NewTopic(self.topic, SOURCE_PARTITIONS, 1)])[self.topic].result(WAIT_S)
        self.write(code)
        self.places: dict[str, tuple[int, int]] = {}
        """Partition and offset of each id."""
        self._producer = Producer({"bootstrap.servers": app.bootstrap, "linger.ms": 5})

    def write(self, code: str) -> None:
        """Write the module `shop`."""
        (self.scratch / "shop.py").write_text(code)

    def send(self, ids: Iterable[int], **more: Any) -> None:
        """Send one event for each id, and wait until all are acknowledged."""

        def note(number: int, error: Any, message: Any) -> None:
            assert error is None, error
            self.places[str(number)] = (message.partition(), message.offset())

        for number in ids:
            value = json.dumps({"id": number, **more}).encode()
            self.send_raw(value, number % SOURCE_PARTITIONS, lambda *a, number=number: note(number, *a))
        assert self._producer.flush(WAIT_S) == 0

    def send_raw(self, value: bytes, partition: int = 0, on_delivery: Any = None) -> None:
        """Send bytes, which the next `send` waits for."""
        self._producer.produce(self.topic, value, partition=partition, on_delivery=on_delivery)
        self._producer.poll(0)

    def worker(self, name: str, *arguments: str, env: Mapping[str, str] | None = None, **settings: Any) -> Role:
        """Return a worker that runs the module's agents."""
        role = Role(
            "worker",
            self.app,
            self.scratch / name,
            *("--name", name, "-A", "shop:app", *arguments),
            **{"session_timeout_ms": SESSION_MS, "flush_interval_ms": 20, **settings},
        )
        role._env, role._cwd = {"ORDERS": self.topic, **(env or {})}, self.scratch
        return role

    def committed(self) -> list[int]:
        """Return the source offset that the group has committed in each partition; 0 where there is none."""
        consumer = Consumer({"bootstrap.servers": self.app.bootstrap, "group.id": self.app.app})
        try:
            places = [TopicPartition(self.topic, number) for number in range(SOURCE_PARTITIONS)]
            return [max(0, it.offset) for it in consumer.committed(places, WAIT_S)]
        finally:
            consumer.close()

    def all_committed(self) -> bool:
        """Return whether the group has committed everything that was sent."""
        counts = Counter(partition for partition, _ in self.places.values())
        return all(offset >= counts[number] for number, offset in enumerate(self.committed()))


def counted(server: Role, view: str = "seen") -> dict[str, Any]:
    """Return the series of a view with one label; empty as long as there is none."""
    try:
        with Reader(server.url) as reader:
            return {next(iter(it.labels.values())): it.value for it in reader.get(view, limit=1_000_000).series}
    except (NotFound, Unavailable):
        return {}


def wait_counted(server: Role, ids: Iterable[str], *workers: Role, view: str = "seen") -> dict[str, Any]:
    """Wait until each of the ids has a series, and return the series."""
    wanted = set(ids)
    found: dict[str, Any] = {}

    def done() -> bool:
        nonlocal found
        found = counted(server, view)
        return wanted <= found.keys()

    try:
        wait_until(done, "all to be counted", WAIT_S)
    except AssertionError as error:
        said = "\n".join(it.tail() for it in workers)
        raise AssertionError(f"{error}: {len(wanted - found.keys())} of {len(wanted)} missing\n{said}") from None
    return found


def metric(role: Any, name: str) -> float:
    """Return the value of a metric, summed over all labels; 0 if it is absent."""
    with urllib.request.urlopen(f"{role.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))
