"""Logs and stores under test, each with more than its port for the suites; and helpers to read a log."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import NewTopic

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.embedded.cleaner import Cleaner
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.adapters.memory import MemoryLog, MemoryStores
from pipeline.adapters.rocks import RocksStores
from pipeline.ports import Log, LogReader, Message, Store, Stores, Transaction
from pipeline.settings import KafkaSettings, LogSettings
from pipeline.topics import Topic
from tests.broker.kafka import admin_client, leaders_answer

DEADLINE_S = 20.0
DAY_MS = 86_400_000
PARTITIONS = 4


class ManualClock:
    """A `ports.Clock` that stands still until a test moves it."""

    def __init__(self) -> None:
        self.at_ms = 1_700_000_000_000
        self._ns = 0

    def now_ms(self) -> int:
        return self.at_ms

    def rising_ns(self) -> int:
        self._ns = max(self._ns + 1, self.at_ms * 1_000_000)
        return self._ns

    def monotonic_s(self) -> float:
        return time.monotonic()

    def thread_cpu_s(self) -> float:
        return 0.0

    def new_id(self) -> str:
        return f"id-{time.monotonic_ns()}"


TOPICS = {
    "events": Topic("events", PARTITIONS, "delete", retention_ms=DAY_MS),
    "notes": Topic("notes", PARTITIONS, "delete"),
    "table": Topic("table", PARTITIONS, "compact", delete_retention_ms=DAY_MS, min_cleanable_dirty_ratio=0.0),
}


class LogLab(Protocol):
    """A log with three fresh topics of `PARTITIONS` partitions, and ways to change it from outside."""

    can_grow: bool
    """True if a topic can get more partitions."""
    log: Log
    events: str
    """A topic of which `expire` can take everything."""
    notes: str
    """Another topic, whose records all stay."""
    table: str
    """A compacted topic."""

    def set_clock_back(self) -> bool:
        """Move the log's clock back by an hour; return False if that can't be done."""
        ...

    def expire(self) -> None:
        """Let retention take everything in `events`."""
        ...

    def compact(self, *, drop_tombstones: bool = False) -> bool:
        """Compact everything in `table`; return False if that can't be done at will."""
        ...

    def leave_open(self, topic: str, partition: int, *values: bytes) -> Hanging | None:
        """Leave a foreign transaction open behind an append; return None if the log has no such thing."""
        ...


class Hanging(Protocol):
    """A transaction that is open."""

    def commit(self) -> None: ...

    def abort(self) -> None: ...


class MemoryLab:
    """The log in memory."""

    can_grow = False
    events, notes, table = "events", "notes", "table"

    def __init__(self) -> None:
        self.clock = ManualClock()
        self._memory = MemoryLog(dict.fromkeys(TOPICS, PARTITIONS), self.clock.now_ms)
        self.log: Log = self._memory

    def set_clock_back(self) -> bool:
        self.clock.at_ms -= 3_600_000
        return True

    def expire(self) -> None:
        for partition in range(PARTITIONS):
            self._memory.truncate("events", partition, self.log.watermarks("events", partition).end_offset)

    def compact(self, *, drop_tombstones: bool = False) -> bool:
        for partition in range(PARTITIONS):
            end_offset = self.log.watermarks("table", partition).end_offset
            self._memory.compact("table", partition, end_offset, drop_tombstones=drop_tombstones)
        return True

    def leave_open(self, topic: str, partition: int, *values: bytes) -> Hanging | None:
        return self._memory.leave_open([Message(topic, partition, None, value) for value in values])


class EmbeddedLab:
    """The embedded log, with the cleaner that belongs to it."""

    can_grow = False
    events, notes, table = "events", "notes", "table"

    def __init__(self, path: Path, *, fsync: bool = False, topics: Mapping[str, Topic] = TOPICS, **settings: Any) -> None:
        self.clock = ManualClock()
        self.settings = LogSettings(data=str(path), fsync=fsync, **settings)
        self.path = path
        self.topics = topics
        self.embedded = EmbeddedLog(path, topics, self.settings, self.clock)
        self.log: Log = self.embedded

    def reopen(self) -> None:
        self.embedded.close()
        self.embedded = EmbeddedLog(self.path, self.topics, self.settings, self.clock)
        self.log = self.embedded

    def clean(self) -> int:
        """Run one round of the cleaner, however little there is to clean; return the number of removed records."""
        return Cleaner(self.embedded, self.settings, self.clock).clean(dirty_count_min=0)

    def set_clock_back(self) -> bool:
        self.clock.at_ms -= 3_600_000
        return True

    def expire(self) -> None:
        self.clock.at_ms += DAY_MS + 1
        self.clean()

    def compact(self, *, drop_tombstones: bool = False) -> bool:
        self.clean()
        if drop_tombstones:
            self.clock.at_ms += DAY_MS + 1
            # A pass needs something new to begin; this record is older than none and supersedes none.
            for partition in range(PARTITIONS):
                self.log.append([Message("table", partition, b"\xff\xff", b"")], timeout_s=DEADLINE_S)
            self.clean()
        return True

    def leave_open(self, topic: str, partition: int, *values: bytes) -> Hanging | None:
        return None


class KafkaHanging:
    """A foreign producer with an open transaction that has reached the broker."""

    def __init__(self, bootstrap: str, topic: str, partition: int, *values: bytes, timeout_ms: int = 600_000) -> None:
        options = {"bootstrap.servers": bootstrap, "transaction.timeout.ms": timeout_ms, "linger.ms": 0}
        self._producer = Producer({**options, "transactional.id": f"stranger-{uuid.uuid4().hex[:10]}"})
        self._producer.init_transactions(DEADLINE_S)
        self._producer.begin_transaction()
        for value in values:
            self._producer.produce(topic, value, partition=partition)
        assert not self._producer.flush(DEADLINE_S)

    def commit(self) -> None:
        self._producer.commit_transaction(DEADLINE_S)

    def abort(self) -> None:
        self._producer.abort_transaction(DEADLINE_S)


class KafkaLab:
    """A broker, with fresh topics under names of their own."""

    can_grow = True
    events, notes, table = "events", "notes", "table"

    def __init__(self, bootstrap: str) -> None:
        from pipeline.adapters.kafka.log import KafkaLog
        from pipeline.adapters.kafka.options import parse_url

        self.bootstrap = bootstrap
        self.address = parse_url(f"kafka://{bootstrap}/contract-{uuid.uuid4().hex[:10]}")
        self._admin = admin_client(bootstrap)
        plain = {"message.timestamp.type": "LogAppendTime", "max.message.bytes": str(4 * 2**20)}
        wanted = [
            NewTopic(self.address.topic(self.events), PARTITIONS, config=plain),
            NewTopic(self.address.topic(self.notes), PARTITIONS, config=plain),
            NewTopic(self.address.topic(self.table), PARTITIONS, config={**plain, "cleanup.policy": "compact"}),
        ]
        for made in self._admin.create_topics(wanted, operation_timeout=DEADLINE_S).values():
            made.result(DEADLINE_S)
        names = [topic.topic for topic in wanted]
        until(lambda: leaders_answer(self._admin, names, PARTITIONS))
        kafka = KafkaLog(
            self.address,
            KafkaSettings(kafka={"fetch.wait.max.ms": 10}),
            SystemClock(),
            request_timeout_ms=int(DEADLINE_S * 1000),
        )
        self.log: Log = kafka
        self.kafka = kafka

    def set_clock_back(self) -> bool:
        return False

    def expire(self) -> None:
        ends = self.kafka.end_offsets(self.events)
        places = [TopicPartition(self.address.topic(self.events), partition, end) for partition, end in ends.items()]
        for gone in self._admin.delete_records(places).values():
            gone.result(DEADLINE_S)

    def compact(self, *, drop_tombstones: bool = False) -> bool:
        return False

    def leave_open(self, topic: str, partition: int, *values: bytes) -> Hanging | None:
        return KafkaHanging(self.bootstrap, self.address.topic(topic), partition, *values)

    def make_anew(self, topic: str) -> None:
        """Delete a topic, and create it."""
        name = self.address.topic(topic)
        (gone,) = self._admin.delete_topics([name], operation_timeout=DEADLINE_S).values()
        gone.result(DEADLINE_S)
        until(lambda: name not in self._admin.list_topics(timeout=DEADLINE_S).topics)
        (made,) = self._admin.create_topics([NewTopic(name, PARTITIONS)], operation_timeout=DEADLINE_S).values()
        made.result(DEADLINE_S)
        until(lambda: leaders_answer(self._admin, [name], PARTITIONS))

    def close(self) -> None:
        names = [self.address.topic(name) for name in (self.events, self.notes, self.table)]
        self.kafka.close()
        for gone in self._admin.delete_topics(names).values():
            gone.result(DEADLINE_S)


class StoreLab(Protocol):
    """Stores that can be closed and opened again, as by another process."""

    stores: Stores

    def reopen(self) -> None: ...

    def aside(self, name: str) -> Store:
        """Return the store that was set aside under this name, open."""
        ...


class MemoryStoreLab:
    """The stores in memory."""

    def __init__(self) -> None:
        self._memory = MemoryStores()
        self.stores: Stores = self._memory

    def reopen(self) -> None:
        self.stores.close()

    def aside(self, name: str) -> Store:
        return self._memory.aside[name]


class RocksStoreLab:
    """The stores on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.stores: Stores = RocksStores(path, LogSettings())

    def reopen(self) -> None:
        self.stores.close()
        self.stores = RocksStores(self._path, LogSettings())

    def aside(self, name: str) -> Store:
        folder = self._path.with_name(f"{self._path.name}-aside")
        folder.mkdir(exist_ok=True)
        number = sum(1 for _ in folder.iterdir())
        Path(name).rename(folder / str(number))
        return RocksStores(folder, LogSettings()).open(number)


class Row(NamedTuple):
    """One record, as read."""

    offset: int
    at_ms: int
    key: bytes | None
    value: bytes | None


def append(log: Log, topic: str, partition: int, *values: bytes | None, key: bytes | None = None) -> list[int]:
    """Append values to one partition; return the `next_offset` behind each."""
    return appended(log, [Message(topic, partition, key, value) for value in values])


def appended(log: Log, messages: list[Message]) -> list[int]:
    """Append messages that must all be acknowledged; return their next offsets."""
    out = log.append(messages, timeout_s=DEADLINE_S)
    assert all(isinstance(result, int) for result in out), out
    return [result for result in out if isinstance(result, int)]


def committed(log: Log, transaction: Transaction, *messages: Message) -> list[int]:
    """Commit, and wait until readers can see it."""
    covering = transaction.commit(messages, timeout_s=DEADLINE_S)
    for message, covers in zip(messages, covering, strict=True):
        until(lambda m=message, c=covers: log.watermarks(m.topic, m.partition).end_offset >= c)  # type: ignore[misc]
    return covering


def poll(
    reader: LogReader, *, record_count_max: int = 1_000, bytes_max: int = 2**24, timeout_s: float = 0.5
) -> dict[int, list[Row]]:
    """Poll once, and return rows by partition."""
    out: dict[int, list[Row]] = {}
    for records in reader.poll(record_count_max=record_count_max, bytes_max=bytes_max, timeout_s=timeout_s):
        assert records.partition not in out, "a partition stands twice in one answer"
        rows = [*map(Row, records.offsets, records.at_ms, records.keys, records.values)]
        assert len(rows) == len(records.offsets) == len(records.at_ms) == len(records.keys) == len(records.values)
        assert all(a.offset < b.offset for a, b in pairwise(rows)), "offsets must rise"
        assert not rows or rows[-1].offset < records.next_offset
        assert len(rows) <= record_count_max
        out[records.partition] = rows
    return out


def read(log: Log, topic: str, partition: int, start: int | None = None, **limits: Any) -> list[Row]:
    """Return all rows of a partition, from `start` or its own start up to its present end."""
    watermarks = log.watermarks(topic, partition)
    reader = log.reader(topic)
    return read_on(reader, partition, watermarks.start_offset if start is None else start, watermarks.end_offset, **limits)


def read_on(reader: LogReader, partition: int, next_offset: int, end_offset: int, **limits: Any) -> list[Row]:
    """Return the rows from `next_offset` to `end_offset`, polled until the cursor has reached the end."""
    limits = {"record_count_max": 1_000, "bytes_max": 2**24, "timeout_s": 0.5, **limits}
    reader.assign({partition: next_offset})
    rows: list[Row] = []
    give_up_s = time.monotonic() + DEADLINE_S
    while next_offset < end_offset:
        assert time.monotonic() < give_up_s, f"{next_offset} of {end_offset} in {DEADLINE_S} s"
        for records in reader.poll(**limits):
            assert records.partition == partition
            assert records.next_offset > next_offset, "an answer must move the cursor"
            assert not records.offsets or records.offsets[0] >= next_offset
            next_offset = records.next_offset
            rows += map(Row, records.offsets, records.at_ms, records.keys, records.values)
    assert all(a.offset < b.offset for a, b in pairwise(rows)), "offsets must rise"
    return [row for row in rows if row.offset < end_offset]


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    give_up_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < give_up_s, f"not in {DEADLINE_S} s"
        time.sleep(0.001)


@contextmanager
def threads(*runs: Callable[[], None]) -> Iterator[None]:
    """Run these beside the body, and raise their errors."""
    errors: list[BaseException] = []

    def guarded(run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=guarded, args=(run,), daemon=True) for run in runs]
    for thread in started:
        thread.start()
    try:
        yield
    finally:
        for thread in started:
            thread.join(DEADLINE_S)
        alive = any(thread.is_alive() for thread in started)
    assert not alive, f"a thread still runs after {DEADLINE_S} s"
    if errors:
        raise errors[0]
