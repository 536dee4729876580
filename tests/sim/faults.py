"""The ports, as the code under test sees them in the simulator: the adapters in memory, with everything that can go wrong.

A `Process` is one life of one process. Each call through a port passes `Process.point`, where the world may kill it, make
the call fail, or let others act first. What a process wrote before it died stays, as far as the ports promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random

import msgspec

from pipeline.adapters.memory import MemoryStore
from pipeline.core.record import Records
from pipeline.errors import Discontinuous, Displaced, Fenced, Invalid, PipelineError, RecordsLost, StoreCorrupt, Unavailable
from pipeline.ports import (
    NO_BEGINS,
    NO_EPOCHS,
    Begins,
    LogReader,
    Message,
    Store,
    StoreView,
    Transaction,
    Watermarks,
)
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.follower import read_meta
from tests.sim.clocks import NodeClock
from tests.sim.cluster import Cluster, Deposed
from tests.sim.entries import POSITION, Failure


class SimulatedCrash(BaseException):
    """Death of the process. Not an Exception: nothing in the code under test may live on after it."""


class Process:
    """One life of a process: at each `point` the world decides whether it goes on."""

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


Fate = Callable[[Message], str]
"""Outcome for a message that is sent: `in`, `unsure` (in, but its sender never hears so), `late` (the sender gives up
waiting, the message comes in later), `gone`, `refused`, `crash before` or `crash after`.
"""


class FaultyLog:
    """A `ports.Log` for one process."""

    def __init__(
        self,
        cluster: Cluster,
        process: Process,
        *,
        fate: Fate = lambda _: "in",
        fenced_others: Callable[[], None] = lambda: None,
        deposed: Deposed | None = None,
        leaves_out_marker: Callable[[], bool] = lambda: False,
    ) -> None:
        self._cluster = cluster
        self._process = process
        self._leaves_out_marker = leaves_out_marker
        self._deposed = deposed or Deposed({}, 0)
        self._fate = fate
        self._fenced_others = fenced_others
        self.late: list[Message] = []

    def partition_count(self, topic: str) -> int:
        return self._cluster.memory.partition_count(topic)

    def watermarks(self, topic: str, partition: int) -> Watermarks:
        self._process.check()
        self._deposed.called()
        return self._seen(topic, partition)

    def _seen(self, topic: str, partition: int) -> Watermarks:
        start, end = self._cluster.stable(topic, partition)
        return Watermarks(start, self._deposed.end_offset(topic, partition, end))

    def end_offsets(self, topic: str) -> Mapping[int, int]:
        self._process.point("end offsets")
        self._deposed.called()
        return {n: self._seen(topic, n).end_offset for n in range(self.partition_count(topic))}

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        self._process.point("high watermarks")
        return self._cluster.memory.high_watermarks(topic)

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
        return FaultyReader(self._cluster, self._process, topic, self._deposed)

    def transaction(self, transactional_id: str) -> Transaction:
        self._process.point("transaction")
        transaction = FaultyTransaction(self._cluster, self._process, transactional_id, self._leaves_out_marker)
        self._cluster.owners[transactional_id] = transaction
        self._fenced_others()
        self._process.point("fenced")
        return transaction

    def close(self) -> None:
        pass


class FaultyReader:
    """A `ports.LogReader` that may be cut off, that may see an old end, and that makes what it has read safe."""

    def __init__(self, cluster: Cluster, process: Process, topic: str, deposed: Deposed) -> None:
        self._cluster = cluster
        self._process = process
        self._topic = topic
        self._deposed = deposed
        self._inner = cluster.memory.reader(topic)
        self._next: dict[int, int] = {}
        self._epochs: dict[int, int] = {}

    def assign(self, next_offsets: Mapping[int, int], leader_epochs: Mapping[int, int] = NO_EPOCHS) -> None:
        self._next, self._epochs = dict(next_offsets), dict(leader_epochs)
        self._inner.assign(next_offsets)

    def poll(self, *, record_count_max: int, bytes_max: int, timeout_s: float) -> list[Records]:
        self._process.point("poll")
        self._deposed.called()
        if self._topic == DELTAS:
            self._check_epochs()
        polled = self._inner.poll(record_count_max=record_count_max, bytes_max=bytes_max, timeout_s=0)
        seen = [*map(self._visible, polled)]
        fetched = [records for records in seen if records is not None]
        if not fetched:
            for partition in self._next:
                self._cluster.wait_in_vain(self._topic, partition)
        for records in fetched:
            self._next[records.partition] = records.next_offset
            if self._topic == DELTAS:
                self._cluster.acknowledge(records.partition, records.next_offset)
        if any(a is not b for a, b in zip(seen, polled, strict=True)):
            self._inner.assign(self._next)
        return [self._with_epoch(records) for records in fetched] if self._topic == DELTAS else fetched

    def _check_epochs(self) -> None:
        for partition, next_offset in self._next.items():
            if self._cluster.is_gone(partition, next_offset, self._epochs.get(partition, -1)):
                raise RecordsLost(f"what was read below {next_offset} of partition {partition} is not in the log any more")

    def _with_epoch(self, records: Records) -> Records:
        next_offset = records.next_offset  # the broker tells the client of the epochs of holes, too, but not its caller
        self._epochs[records.partition] = self._cluster.leader_epoch(records.partition, next_offset - 1)
        if not records.offsets:
            return records
        return msgspec.structs.replace(
            records, leader_epoch=self._cluster.leader_epoch(records.partition, records.offsets[-1])
        )

    def _visible(self, records: Records) -> Records | None:
        """Return the visible part of the records, or None."""
        end = self._cluster.stable(self._topic, records.partition).end_offset
        end = self._deposed.end_offset(self._topic, records.partition, end)
        if records.next_offset <= end:
            return records
        if self._next[records.partition] >= end:
            return None
        count = sum(offset < end for offset in records.offsets)
        columns = {name: getattr(records, name)[:count] for name in ("offsets", "at_ms", "keys", "values")}
        return msgspec.structs.replace(records, **columns, next_offset=end)

    def close(self) -> None:
        self._inner.close()


class FaultyTransaction:
    """A `ports.Transaction` that may fail before or after it is durable."""

    def __init__(
        self, cluster: Cluster, process: Process, transactional_id: str, leaves_out_marker: Callable[[], bool]
    ) -> None:
        self._cluster = cluster
        self._process = process
        self._id = transactional_id
        self._leaves_out_marker = leaves_out_marker
        self._inner = cluster.memory.transaction(transactional_id)

    @property
    def fenced(self) -> bool:
        return self._cluster.owners[self._id] is not self

    @property
    def marker_count(self) -> int:
        return self._inner.marker_count

    def commit(self, messages: Sequence[Message], *, timeout_s: float, begins: Begins = NO_BEGINS) -> list[int]:
        self._process.point("commit: before")
        partitions = {(message.topic, message.partition) for message in messages}
        before = [self._cluster.memory.watermarks(*at) for at in partitions]
        try:
            offsets = self._inner.commit(messages, timeout_s=timeout_s, begins=begins)
        except Discontinuous as error:
            raise self._aborted(messages, begins) or error from None
        except Fenced:
            if not self.fenced:
                raise Failure(f"{self._process.name} owns {self._id}, but was fenced") from None
            if before != [self._cluster.memory.watermarks(*at) for at in partitions]:
                raise Failure(f"{self._process.name} was fenced, but wrote to the log") from None
            raise
        if self.fenced:
            raise Failure(f"{self._process.name} was fenced, but could commit as {self._id}")
        partition, auditor = int(self._id.rsplit("-", 1)[1]), self._cluster.auditor
        in_letters = any(message.topic == DEAD_LETTERS for message in messages)
        self._cluster.markers_written(partition, in_letters=in_letters)
        if self.marker_count and self._leaves_out_marker():
            count = sum(message.topic == CHANGELOG for message in messages)
            self._cluster.leave_out_marker(partition, count, len(messages) - count)
        if auditor.committed(partition, [(m.topic, m.partition, m.key, m.value) for m in messages]):
            self._cluster.committed(partition, auditor.states[partition][POSITION])
        self._process.point("commit: after")
        return offsets

    def _aborted(self, messages: Sequence[Message], begins: Begins) -> Displaced | None:
        """Abort as Kafka does; return the error if that takes commits with it whose markers are missing."""
        partition = int(self._id.rsplit("-", 1)[1])
        place = CHANGELOG, partition
        if partition not in self._cluster.markers_missing or place not in begins:
            return None
        count = sum(message.topic == CHANGELOG for message in messages)
        self._cluster.abort_with_unmarked(partition, count, in_letters=count < len(messages))
        return Displaced("the broker has left out the marker of the last transaction")

    def close(self) -> None:
        pass


class Disk:
    """One partition's store on one machine, with every state since its writes were last made safe."""

    def __init__(self) -> None:
        self.memory = MemoryStore()
        self.versions = [self.memory.entries]
        self.opened_by: Process | None = None
        self.damage = ""
        """`open` or `read`: the call that finds the damage; `bytes`: an entry differs from what was written."""

    def entries(self) -> dict[bytes, bytes]:
        return self.memory.entries

    def lose_writes(self, rng: Random) -> int:
        """Go back to the state after some earlier write, as a crash may; return how many writes were lost."""
        index = rng.randrange(len(self.versions))
        lost = len(self.versions) - 1 - index
        self.memory.entries = self.versions[index]
        self.versions = [self.memory.entries]
        return lost

    def garble(self, key: bytes, value: bytes) -> None:
        """Change an entry without anybody knowing."""
        self.memory.entries = {**self.memory.entries, key: value}
        self.versions = [self.memory.entries]
        self.damage = "bytes"

    def healed(self) -> None:
        """Note that every wrong entry was written anew: no crash brings the damage back."""
        self.damage = ""
        self.versions = self.versions[-1:]


class Machine:
    """A machine with disks of its own: a process that moves to another machine finds other stores there."""

    def __init__(self, clock: NodeClock, partition_count: int) -> None:
        self.name = clock.name
        self.clock = clock
        self.disks = [Disk() for _ in range(partition_count)]


class FaultyStores:
    """A `ports.Stores` for one process on one machine."""

    def __init__(self, cluster: Cluster, machine: Machine, process: Process) -> None:
        self._cluster = cluster
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
        self._check_worth(partition)
        self._machine.disks[partition] = Disk()
        self._process.point("destroyed")

    def set_aside(self, partition: int, reason: str) -> str:
        self._process.check()
        self._machine.disks[partition] = Disk()
        return f"{self._machine.name}, {partition}"

    def _check_worth(self, partition: int) -> None:
        """Check that a store that is thrown away holds nothing that the changelog has lost."""
        disk = self._machine.disks[partition]
        end_offset = self._cluster.memory.watermarks(CHANGELOG, partition).end_offset
        if not disk.damage and read_meta(disk.memory).changelog_next_offset > end_offset:
            raise Failure(f"store {partition} of {self._machine.name} is ahead of its changelog, and is destroyed")

    def close(self) -> None:
        pass


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
        self._disk.versions.append(self._disk.memory.entries)
        self._process.point("write: after")

    def close(self) -> None:
        if self._process.alive and self._disk.opened_by is self._process:
            self._disk.opened_by = None
            self._disk.versions = self._disk.versions[-1:]
