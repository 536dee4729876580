"""A log in memory that grows, goes away and is made anew; a worker that commits on demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.adapters.memory import MemoryLog, MemoryStore, MemoryStores, _Partition
from pipeline.core.codec import decode_states, encode_batch
from pipeline.core.merge import KINDS
from pipeline.core.record import Batch, Definition, Group, Records, series_prefix, series_suffix
from pipeline.errors import StoreCorrupt, Unavailable
from pipeline.metrics import PARTITION_GAUGES, Metric
from pipeline.ports import LogReader, Message, ReadableStore, Store, Watermarks
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.partition import Partition
from tests.support import HandClock

DAY_MS = 86_400_000
VIEW = Definition("v", "sum", ("n",))
TOPICS = (DELTAS, CHANGELOG, DEAD_LETTERS)


class Recorder:
    """A `metrics.Metrics` that keeps the last value of gauges and the sum of counters, by name and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[object, ...], float] = {}

    def inc(self, metric: Metric, amount: float = 1, *labels: object) -> None:
        self.values[metric.name, *labels] = self.values.get((metric.name, *labels), 0) + amount

    def set(self, metric: Metric, value: float, *labels: object) -> None:
        self.values[metric.name, *labels] = value

    def observe(self, metric: Metric, value: float, *labels: object) -> None:
        """Of no interest."""

    def forget(self, partition: int) -> None:
        for key in [*self.values]:
            if key[1:] == (partition,) and key[0] in {it.name for it in PARTITION_GAUGES}:
                del self.values[key]

    def of(self, metric: Metric, *labels: object) -> float:
        return self.values[metric.name, *labels]


class ChangingLog(MemoryLog):
    """A log as an operator and a network make it: more partitions, topics deleted and recreated, nobody there."""

    def __init__(self, partition_count: int, clock: HandClock) -> None:
        super().__init__(dict.fromkeys(TOPICS, partition_count), clock.now_ms)
        self.away = False
        self.ids = dict.fromkeys(TOPICS, "first")
        self.bytes_max = 2**24

    def check(self) -> None:
        if self.away:
            raise Unavailable("the log is away")

    def grow(self, partition_count: int) -> None:
        for partitions in self._topics.values():
            partitions += [_Partition() for _ in range(partition_count - len(partitions))]

    def make_anew(self, topic: str, name: str) -> None:
        """Delete a topic, and create it."""
        self._topics[topic] = [_Partition() for _ in self._topics[topic]]
        self.ids[topic] = name

    def cut(self, topic: str, partition: int, end_offset: int) -> None:
        """Lose a tail."""
        at = self._partition(topic, partition)
        at.rows = [row for row in at.rows if row.offset < end_offset]
        at.end_offset = end_offset

    def topic_id(self, topic: str) -> str:
        self.check()
        return self.ids[topic]

    def end_offsets(self, topic: str) -> Mapping[int, int]:
        self.check()
        return super().end_offsets(topic)

    def watermarks(self, topic: str, partition: int) -> Watermarks:
        self.check()
        return super().watermarks(topic, partition)

    def message_bytes_max(self, topic: str) -> int:
        return self.bytes_max

    def reader(self, topic: str) -> LogReader:
        return _Reader(self, super().reader(topic))


class _Reader:
    """Never waits."""

    def __init__(self, log: ChangingLog, inner: LogReader) -> None:
        self._log = log
        self._inner = inner

    def assign(self, next_offsets: Mapping[int, int]) -> None:
        self._log.check()
        self._inner.assign(next_offsets)

    def poll(self, *, record_count_max: int, bytes_max: int, timeout_s: float) -> list[Records]:
        self._log.check()
        return self._inner.poll(record_count_max=record_count_max, bytes_max=bytes_max, timeout_s=0)

    def close(self) -> None:
        self._inner.close()


class WatchedStore(MemoryStore):
    """Counts its writes, and fails when it is told to: `broken` is raised once, by the next write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0
        self.broken: Exception | None = None

    def write(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        broken, self.broken = self.broken, None
        if broken is not None:
            raise broken
        self.writes += 1
        super().write(keys, values)


class WatchedStores(MemoryStores):
    """Stores that are watched; those in `rotten` can't be opened until they are destroyed."""

    def __init__(self) -> None:
        super().__init__()
        self.destroyed: list[int] = []
        self.rotten: set[int] = set()

    def open(self, partition: int) -> Store:
        if partition in self.rotten:
            raise StoreCorrupt("a file is missing")
        return self._stores.setdefault(partition, WatchedStore())

    def at(self, partition: int) -> WatchedStore:
        store = self._stores[partition]
        assert isinstance(store, WatchedStore)
        return store

    def destroy(self, partition: int) -> None:
        self.destroyed.append(partition)
        self.rotten.discard(partition)
        super().destroy(partition)


class Worker:
    """Partitions that fold and commit when they are told to."""

    def __init__(self, log: ChangingLog, clock: HandClock) -> None:
        self.log = log
        self.clock = clock
        self.stores = MemoryStores()
        self.partitions: dict[int, Partition] = {}
        self._sequence = 0

    def partition(self, number: int) -> Partition:
        if number not in self.partitions:
            self.partitions[number] = partition = new_partition(number, self.log, self.stores, self.clock)
            partition.start()
        return self.partitions[number]

    def batch(self, number: int, series: Mapping[str, float]) -> bytes:
        group = Group(VIEW, [series_suffix((name,)) for name in series], [*series.values()])
        self._sequence += 1
        return encode_batch(Batch("p", 0, number, self._sequence - 1, 0, self.clock.now_ms(), [group]))

    def append(self, number: int, series: Mapping[str, float]) -> None:
        self.log.append([Message(DELTAS, number, None, self.batch(number, series))], timeout_s=1)

    def commit(self, number: int, series: Mapping[str, float]) -> None:
        """One batch, one commit."""
        self.append(number, series)
        fold_all(self.log, self.partition(number))
        self.partition(number).commit()


def new_partition(
    number: int,
    log: MemoryLog,
    stores: MemoryStores,
    clock: HandClock,
    *,
    settings: WorkerSettings | None = None,
    metrics: Recorder | None = None,
) -> Partition:
    return Partition(
        number,
        log=log,
        stores=stores,
        clock=clock,
        settings=settings or WorkerSettings(),
        delete_retention_ms=DAY_MS,
        metrics=metrics or Recorder(),
    )


def fold_all(log: MemoryLog, partition: Partition) -> None:
    reader = log.reader(DELTAS)
    reader.assign({partition.number: partition.task.next_offset})
    while fetched := reader.poll(record_count_max=1_000, bytes_max=2**30, timeout_s=0):
        for records in fetched:
            partition.fold(records)


def series_of(store: ReadableStore) -> dict[str, float]:
    """What a store holds of `VIEW`, by its one label value."""
    prefix = series_prefix(VIEW.view)
    found = [*store.scan(prefix, prefix[:-1] + b"\x01")]
    states = decode_states(KINDS["sum"], [value for _, value in found])
    names = [key[len(prefix) + 10 :].decode() for key, _ in found]  # window start, array of one, short text
    return dict(zip(names, states, strict=True))
