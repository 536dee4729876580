"""A log in memory that grows, goes away and is made anew; a worker that commits on demand."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from pipeline.adapters.memory import MemoryLog, MemoryPartition, MemoryStore, MemoryStores
from pipeline.core.codec import decode_states, encode_batch
from pipeline.core.kinds import KINDS
from pipeline.core.record import FENCE_KEY, Batch, Definition, Group, Records, prefix_end, series_prefix, series_suffix
from pipeline.errors import StoreCorrupt, Unavailable
from pipeline.metrics import PARTITION_GAUGES, Metric
from pipeline.ports import NO_EPOCHS, LogReader, Message, ReadableStore, Store, Watermarks
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.partition import OwnedPartition
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
        """Do nothing."""

    def forget(self, partition: int) -> None:
        for key in [*self.values]:
            if key[1:] == (partition,) and key[0] in {it.name for it in PARTITION_GAUGES}:
                del self.values[key]

    def of(self, metric: Metric, *labels: object) -> float:
        return self.values[metric.name, *labels]


class ChangingLog(MemoryLog):
    """A log as operators and networks make it: more partitions, topics deleted and recreated, nobody reachable."""

    def __init__(self, partition_count: int, clock: HandClock) -> None:
        super().__init__(dict.fromkeys(TOPICS, partition_count), clock.now_ms)
        self.away = False
        self.ids = dict.fromkeys(TOPICS, "first")
        self.bytes_max = 2**24
        self.readable: dict[tuple[str, int], int] = {}
        """Offsets that readers do not get beyond, as with a deposed leader or an open foreign transaction."""
        self.told: dict[tuple[str, int], int] = {}
        """Ends that are reported in place of the real ones."""

    def waited(self, timeout_s: float) -> None:
        """Let time pass: a reader found nothing, and would have waited for this long."""

    def check(self) -> None:
        if self.away:
            raise Unavailable("the log is away")

    def grow(self, partition_count: int) -> None:
        for partitions in self._topics.values():
            partitions += [MemoryPartition() for _ in range(partition_count - len(partitions))]

    def make_anew(self, topic: str, name: str) -> None:
        """Delete a topic, and create it."""
        self._topics[topic] = [MemoryPartition() for _ in self._topics[topic]]
        self.ids[topic] = name

    def cut(self, topic: str, partition: int, end_offset: int) -> None:
        """Lose the tail of a partition."""
        at = self.partition(topic, partition)
        at.rows = [row for row in at.rows if row.offset < end_offset]
        at.end_offset = end_offset

    def topic_id(self, topic: str) -> str:
        self.check()
        return self.ids[topic]

    def hold_back(self, topic: str, partition: int, end_offset: int) -> None:
        """Hide everything beyond an offset, until `show`, from readers and in reported ends."""
        self.readable[topic, partition] = self.told[topic, partition] = end_offset

    def show(self) -> None:
        """Show everything again."""
        self.readable, self.told = {}, {}

    def end_offsets(self, topic: str) -> Mapping[int, int]:
        self.check()
        return {number: self.told.get((topic, number), end) for number, end in super().end_offsets(topic).items()}

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        self.check()
        return super().high_watermarks(topic)

    def watermarks(self, topic: str, partition: int) -> Watermarks:
        self.check()
        start, end = super().watermarks(topic, partition)
        return Watermarks(start, self.told.get((topic, partition), end))

    def message_bytes_max(self, topic: str) -> int:
        return self.bytes_max

    def reader(self, topic: str) -> LogReader:
        return _Reader(self, topic, super().reader(topic))


class _Reader:
    """A reader that never blocks, but lets time pass if it finds nothing."""

    def __init__(self, log: ChangingLog, topic: str, inner: LogReader) -> None:
        self._log = log
        self._topic = topic
        self._inner = inner
        self._next: dict[int, int] = {}

    def assign(self, next_offsets: Mapping[int, int], leader_epochs: Mapping[int, int] = NO_EPOCHS) -> None:
        self._log.check()
        self._next = dict(next_offsets)
        self._inner.assign(next_offsets, leader_epochs)

    def poll(self, *, record_count_max: int, bytes_max: int, timeout_s: float) -> list[Records]:
        self._log.check()
        fetched = self._inner.poll(record_count_max=record_count_max, bytes_max=bytes_max, timeout_s=0)
        ends = {number: self._log.readable.get((self._topic, number), 2**63) for number in self._next}
        shown = [it if it.next_offset <= ends[it.partition] else self._cut(it, ends[it.partition]) for it in fetched]
        shown = [it for it in shown if it.next_offset > self._next[it.partition]]
        self._next |= {it.partition: it.next_offset for it in shown}
        if len(shown) < len(fetched) or any(it not in fetched for it in shown):
            self._inner.assign(self._next)
        if not shown:
            self._log.waited(timeout_s)
        return shown

    def _cut(self, records: Records, end_offset: int) -> Records:
        count = bisect_left(records.offsets, end_offset)
        columns = (column[:count] for column in (records.offsets, records.at_ms, records.keys, records.values))
        return Records(records.partition, *columns, max(end_offset, self._next[records.partition]))

    def close(self) -> None:
        self._inner.close()


class WatchedStore(MemoryStore):
    """A store that counts its writes; the next write raises `broken`, once."""

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
        self.partitions: dict[int, OwnedPartition] = {}
        self._sequence = 0

    def partition(self, number: int) -> OwnedPartition:
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
        """Send one batch, and commit it."""
        self.append(number, series)
        fold_all(self.log, self.partition(number))
        self.partition(number).commit()


def is_fence(messages: Sequence[Message]) -> bool:
    """Return whether messages are a fence record, perhaps with a record that says nothing, and no commit."""
    return messages[-1].key == FENCE_KEY


def new_partition(
    number: int,
    log: MemoryLog,
    stores: MemoryStores,
    clock: HandClock,
    *,
    settings: WorkerSettings | None = None,
    metrics: Recorder | None = None,
    young_s: float = 0.0,
) -> OwnedPartition:
    return OwnedPartition(
        number,
        log=log,
        stores=stores,
        clock=clock,
        settings=settings or WorkerSettings(),
        delete_retention_ms=DAY_MS,
        ask_lag_max_s=lambda: young_s,
        metrics=metrics or Recorder(),
    )


def fold_all(log: MemoryLog, partition: OwnedPartition) -> None:
    reader = log.reader(DELTAS)
    reader.assign({partition.number: partition.task.next_offset})
    while fetched := reader.poll(record_count_max=1_000, bytes_max=2**30, timeout_s=0):
        for records in fetched:
            partition.fold(records)


def series_of(store: ReadableStore) -> dict[str, float]:
    """Return the states of `VIEW` in a store, by the one label value."""
    prefix = series_prefix(VIEW)
    found = [*store.scan(prefix, prefix_end(prefix))]
    states = decode_states(KINDS["sum"], [value for _, value in found])
    names = [key[len(prefix) + 10 :].decode() for key, _ in found]  # window start, array of one, short text
    return dict(zip(names, states, strict=True))
