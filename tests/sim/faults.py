"""The ports, as the code under test sees them in the simulator: the adapters in memory, with everything that can go wrong.

A `Process` is one life of one process. Each call through a port passes `Process.point`, where the world may kill it, make
the call fail, or let others act first. What a process wrote before it died stays, as far as the ports promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random

from pipeline.adapters.memory import MemoryLog, MemoryStore
from pipeline.core.record import Records
from pipeline.errors import Fenced, Invalid, PipelineError, StoreCorrupt, Unavailable
from pipeline.ports import LogReader, Message, Store, StoreView, Transaction, Watermarks
from pipeline.topics import DELTAS
from tests.sim.auditor import Auditor, Failure


class SimulatedCrash(BaseException):
    """The process is dead. Not an Exception: nothing in the code under test may live on after it."""


class Process:
    """One life: at each `point` the world decides whether it goes on."""

    def __init__(self, name: str, interrupt: Callable[[Process, str], None]) -> None:
        self.name = name
        self.alive = True
        self._interrupt = interrupt

    def point(self, where: str) -> None:
        self.check()
        self._interrupt(self, where)
        self.check()

    def check(self) -> None:
        if not self.alive:
            raise SimulatedCrash(f"{self.name} is dead")


class SimClock:
    """A `ports.Clock` that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.at_ms = 1_700_000_000_000

    def now_ms(self) -> int:
        return self.at_ms

    def monotonic_s(self) -> float:
        return self.at_ms / 1000

    def new_id(self) -> str:
        raise Failure("nothing in the protocol makes up identities")


class Cluster:
    """The log itself: what survives every process, and who owns which transactional id."""

    def __init__(self, topics: Mapping[str, int], clock: SimClock, auditor: Auditor) -> None:
        self.memory = MemoryLog(topics, clock.now_ms)
        self.auditor = auditor
        self.owners: dict[str, FaultyTransaction] = {}
        self.safe_offsets = dict.fromkeys(range(topics[DELTAS]), 0)
        """Up to here each partition was read or acknowledged: no crash may take it back."""
        self.markers = False
        """Whether the end of a transaction takes an offset, as in Kafka."""

    def deliver(self, message: Message) -> int:
        """Append one record of the deltas topic; its offset."""
        (result,) = self.memory.append([message], timeout_s=0)
        assert isinstance(result, int)
        row = self.memory._partition(DELTAS, message.partition).rows[-1]
        self.auditor.appended(message.partition, row.at_ms, message.value)
        return result - 1

    def skip(self, topic: str, partition: int) -> None:
        """An offset without a record."""
        self.memory._partition(topic, partition).end_offset += 1
        if topic == DELTAS:
            self.auditor.skipped(partition)

    def tear(self, partition: int, rng: Random) -> int:
        """Lose some of the newest records that nobody has read and nobody was told to be safe; how many."""
        at = self.memory._partition(DELTAS, partition)
        keep = rng.randint(min(self.safe_offsets[partition], at.end_offset), at.end_offset)
        torn = at.end_offset - keep
        if torn:
            at.rows = [row for row in at.rows if row.offset < keep]
            at.end_offset = keep
            self.auditor.torn(partition, keep)
        return torn

    def acknowledge(self, partition: int, next_offset: int) -> None:
        self.safe_offsets[partition] = max(self.safe_offsets[partition], next_offset)


Fate = Callable[[Message], str]
"""What becomes of a message that is sent: `in`, `unsure` (in, but its sender never hears so), `late` (the sender gives up
waiting, the message comes in later), `gone`, `refused`, `crash before` or `crash after`."""


class FaultyLog:
    """A `ports.Log` for one process."""

    def __init__(
        self,
        cluster: Cluster,
        process: Process,
        *,
        fate: Fate = lambda _: "in",
        fenced_others: Callable[[], None] = lambda: None,
    ) -> None:
        self._cluster = cluster
        self._process = process
        self._fate = fate
        self._fenced_others = fenced_others
        self.late: list[Message] = []

    def partition_count(self, topic: str) -> int:
        return self._cluster.memory.partition_count(topic)

    def watermarks(self, topic: str, partition: int) -> Watermarks:
        self._process.check()
        return self._cluster.memory.watermarks(topic, partition)

    def end_offsets(self, topic: str) -> Mapping[int, int]:
        self._process.point("end offsets")
        return self._cluster.memory.end_offsets(topic)

    def start_offsets(self, topic: str) -> Mapping[int, int]:
        self._process.check()
        return self._cluster.memory.start_offsets(topic)

    def topic_id(self, topic: str) -> str:
        return self._cluster.memory.topic_id(topic)

    def message_bytes_max(self, topic: str) -> int:
        return self._cluster.memory.message_bytes_max(topic)

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        return [self._append(message) for message in messages]

    def _append(self, message: Message) -> int | PipelineError:
        self._process.check()
        fate = self._fate(message)
        if fate in ("in", "unsure", "crash after"):
            next_offset = self._cluster.deliver(message) + 1
            if fate == "in":
                self._cluster.acknowledge(message.partition, next_offset)
                return next_offset
        if fate.startswith("crash"):
            raise SimulatedCrash(f"{self._process.name}: {fate} an append")
        if fate == "late":
            self.late.append(message)
        return Invalid("too large") if fate == "refused" else Unavailable("no answer in time")

    def reader(self, topic: str) -> LogReader:
        return FaultyReader(self._cluster, self._process, topic)

    def transaction(self, transactional_id: str) -> Transaction:
        self._process.point("transaction")
        transaction = FaultyTransaction(self._cluster, self._process, transactional_id)
        self._cluster.owners[transactional_id] = transaction
        self._fenced_others()
        self._process.point("fenced")
        return transaction

    def close(self) -> None:
        """Nothing to give back."""


class FaultyReader:
    """A `ports.LogReader` that may be cut off, and that makes what it has read safe."""

    def __init__(self, cluster: Cluster, process: Process, topic: str) -> None:
        self._cluster = cluster
        self._process = process
        self._topic = topic
        self._inner = cluster.memory.reader(topic)

    def assign(self, next_offsets: Mapping[int, int]) -> None:
        self._inner.assign(next_offsets)

    def poll(self, *, record_count_max: int, bytes_max: int, timeout_s: float) -> list[Records]:
        self._process.point("poll")
        fetched = self._inner.poll(record_count_max=record_count_max, bytes_max=bytes_max, timeout_s=0)
        if self._topic == DELTAS:
            for records in fetched:
                self._cluster.acknowledge(records.partition, records.next_offset)
        return fetched

    def close(self) -> None:
        self._inner.close()


class FaultyTransaction:
    """A `ports.Transaction` that may fail before or after it is durable."""

    def __init__(self, cluster: Cluster, process: Process, transactional_id: str) -> None:
        self._cluster = cluster
        self._process = process
        self._id = transactional_id
        self._inner = cluster.memory.transaction(transactional_id)

    @property
    def fenced(self) -> bool:
        return self._cluster.owners[self._id] is not self

    def commit(self, messages: Sequence[Message], *, timeout_s: float) -> list[int]:
        self._process.point("commit: before")
        partitions = {(message.topic, message.partition) for message in messages}
        before = [self._cluster.memory.watermarks(*at) for at in partitions]
        try:
            offsets = self._inner.commit(messages, timeout_s=timeout_s)
        except Fenced:
            if not self.fenced:
                raise Failure(f"{self._process.name} owns {self._id}, but was fenced") from None
            if before != [self._cluster.memory.watermarks(*at) for at in partitions]:
                raise Failure(f"{self._process.name} was fenced, but wrote to the log") from None
            raise
        if self.fenced:
            raise Failure(f"{self._process.name} was fenced, but could commit as {self._id}")
        self._cluster.auditor.committed(
            int(self._id.rsplit("-", 1)[1]), [(m.topic, m.partition, m.key, m.value) for m in messages]
        )
        self._process.point("commit: after")
        return offsets

    def close(self) -> None:
        """Nothing to give back."""


class Disk:
    """One partition's store on one machine, with every state that it was in since its writes were last made safe."""

    def __init__(self) -> None:
        self.memory = MemoryStore()
        self.versions = [self.memory._entries]
        self.opened_by: Process | None = None
        self.damage = ""
        """`open` or `read`: the call that finds out; `bytes`: an entry is not what was written."""

    def entries(self) -> dict[bytes, bytes]:
        return self.memory._entries

    def lose_writes(self, rng: Random) -> int:
        """What a crash may do: go back to the state after some earlier write; how many writes were lost."""
        index = rng.randrange(len(self.versions))
        lost = len(self.versions) - 1 - index
        self.memory._entries = self.versions[index]
        self.versions = [self.memory._entries]
        return lost

    def garble(self, key: bytes, value: bytes) -> None:
        """Change an entry behind everybody's back."""
        self.memory._entries = {**self.memory._entries, key: value}
        self.versions = [self.memory._entries]
        self.damage = "bytes"

    def healed(self) -> None:
        """Every wrong entry was written anew; no crash brings them back."""
        self.damage = ""
        self.versions = self.versions[-1:]


class Machine:
    """What has disks of its own: a process that moves to another machine finds other stores there."""

    def __init__(self, name: str, partition_count: int) -> None:
        self.name = name
        self.disks = [Disk() for _ in range(partition_count)]


class FaultyStores:
    """A `ports.Stores` for one process on one machine."""

    def __init__(self, machine: Machine, process: Process) -> None:
        self._machine = machine
        self._process = process

    def open(self, partition: int) -> Store:
        self._process.point("open")
        disk = self._machine.disks[partition]
        if disk.opened_by is not None and disk.opened_by.alive:
            raise Failure(f"store {partition} of {self._machine.name} is open in {disk.opened_by.name}")
        if disk.damage == "open":
            raise StoreCorrupt("a file is missing")
        disk.opened_by = self._process
        return FaultyStore(disk, self._process)

    def destroy(self, partition: int) -> None:
        self._process.check()
        opened_by = self._machine.disks[partition].opened_by
        if opened_by is not None and opened_by.alive:
            raise Failure(f"store {partition} of {self._machine.name} is destroyed, but open in {opened_by.name}")
        self._machine.disks[partition] = Disk()
        self._process.point("destroyed")

    def close(self) -> None:
        """Nothing to give back."""


class FaultyStore:
    """A `ports.Store` whose newest writes a crash may take back."""

    def __init__(self, disk: Disk, process: Process) -> None:
        self._disk = disk
        self._process = process

    def _check(self) -> None:
        self._process.check()
        if self._disk.opened_by is not self._process:
            raise Failure(f"{self._process.name} uses a store that it has closed")
        if self._disk.damage == "read":
            raise StoreCorrupt("a block's checksum is wrong")

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self._check()
        return self._disk.memory.get(keys)

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        self._check()
        return self._disk.memory.scan(start, end)

    def snapshot(self) -> StoreView:
        self._check()
        return self._disk.memory.snapshot()

    def write(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        self._process.point("write: before")
        self._check()
        self._disk.memory.write(keys, values)
        self._disk.versions.append(self._disk.memory._entries)
        self._process.point("write: after")

    def close(self) -> None:
        if self._process.alive and self._disk.opened_by is self._process:
            self._disk.opened_by = None
            self._disk.versions = self._disk.versions[-1:]
