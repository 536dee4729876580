"""The embedded log: topics, partitions, offsets and transactions as in Kafka, in one RocksDB of one process.

    "r" topic(1) partition(4) last-offset(8)  ->  a chunk of records (chunk.py)
    "m" topic(1) partition(4)                 ->  msgpack of Meta
    "t" topic name                            ->  msgpack([topic number, partition count])

Every append is one RocksDB write with its write-ahead log, so it is acknowledged when the kernel has it (kill -9 of this
process loses nothing); with `fsync`, when the disk has it. A transaction is one such write over several topics.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from rocksdict import DBCompressionType, DBRecoveryMode, Options, WriteBatch

import pipeline.metrics as m
from pipeline.adapters.chunk import Chunk, cut, decode_chunk, encode, record_sizes
from pipeline.adapters.rocks import Cursor, Translated, close_quietly, keep_from_children, open_db
from pipeline.core.record import Records
from pipeline.errors import Fenced, Invalid, LogCorrupt, PipelineError, RecordsLost, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, Message, Watermarks
from pipeline.settings import LogSettings
from pipeline.topics import Topic

_log = logging.getLogger(__name__)
_RECORD_KEY = struct.Struct(">cBIQ")
_META_KEY = struct.Struct(">cBI")
RECORD_BYTES_MAX = 32 * 2**20
"""Largest key and value of a record together."""


class Meta(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What a partition holds. It is written when the cleaner changes it; appends move only what the last chunk tells too."""

    start_offset: int = 0
    end_offset: int = 0
    clean_end_offset: int = 0
    clean_count: int = 0
    """Records below `clean_end_offset`."""
    newest_ms: int = 0
    """When the newest record was accepted; it may be gone since."""
    horizon_offset: int = 0
    """Whoever begins to read after `horizon_ms` finds nothing that a tombstone below this offset has deleted."""
    horizon_ms: int = 0


T = TypeVar("T")


class Partition:
    """One partition of the log: where its records are, and which there are."""

    def __init__(self, topic: Topic, topic_number: int, number: int, meta: Meta) -> None:
        self.topic = topic
        self.topic_number = topic_number
        self.number = number
        self.meta = meta

    def key(self, last_offset: int) -> bytes:
        """Of the chunk whose last record is at `last_offset`."""
        return _RECORD_KEY.pack(b"r", self.topic_number, self.number, last_offset)

    @property
    def end_key(self) -> bytes:
        """Behind the keys of all chunks."""
        return _META_KEY.pack(b"r", self.topic_number, self.number + 1)

    @property
    def meta_key(self) -> bytes:
        """Of the partition's meta."""
        return _META_KEY.pack(b"m", self.topic_number, self.number)


class EmbeddedLog:
    """A `ports.Log` in a folder. One process, any number of threads.

    `on_failed` is called once when the disk fails a write: the log then takes no more, and the process should end.
    With `read_only` no data file is written; `NotFound` if there is no log in the folder.
    """

    def __init__(
        self,
        path: Path,
        topics: Mapping[str, Topic],
        settings: LogSettings,
        clock: Clock,
        metrics: Metrics = NO_METRICS,
        on_failed: Callable[[PipelineError], None] = lambda _: None,
        *,
        read_only: bool = False,
    ) -> None:
        self._clock = clock
        self._metrics = metrics
        self._on_failed = on_failed
        self._failed = ""
        self._pid = os.getpid()
        self._owners: dict[str, int] = {}
        self.closed = False
        self.changed = threading.Condition()
        """Guards every write and every partition's meta; notified when records come."""
        self._translated = Translated(f"log {path}", corrupt=LogCorrupt, closed=Unavailable)
        self._fsync = settings.fsync
        self.db = open_db(path, _options(settings), self._translated, read_only=read_only)
        keep_from_children(self)
        try:
            self._partitions = self._load(topics, settings.partitions, create=not read_only)
        except BaseException:
            close_quietly(self.db, self._translated.what)
            raise

    def _load(self, topics: Mapping[str, Topic], partition_count: int, *, create: bool) -> dict[str, list[Partition]]:
        known: dict[str, tuple[int, int]] = {}
        for key, value in self.cursor().scan(b"t", b"u"):
            known[key[1:].decode()] = self._decoded(value, tuple[int, int])
        counts = {name: count for name, (_, count) in known.items() if name in topics}
        if partition_count and counts and set(counts.values()) != {partition_count}:
            raise Invalid(
                f"{self._translated.what} has partitions {counts}; the setting says {partition_count}, and it can't change"
            )
        if create:
            # A topic that joins a log gets as many partitions as the others have, if they agree.
            agreed = next(iter(counts.values())) if len(set(counts.values())) == 1 else 0
            batch = WriteBatch(raw_mode=True)
            for name in [name for name in topics if name not in known]:
                known[name] = len(known), partition_count or agreed or topics[name].partitions
                batch.put(b"t" + name.encode(), encode(known[name]))
            with self._translated:
                self.db.write(batch)
        return {
            name: [self._load_partition(topic, known[name][0], number) for number in range(known[name][1])]
            for name, topic in topics.items()
            if name in known
        }

    def _load_partition(self, topic: Topic, topic_number: int, number: int) -> Partition:
        partition = Partition(topic, topic_number, number, Meta())
        with self._translated:
            value = self.db.get(partition.meta_key)
        if value is not None:
            partition.meta = meta = self._decoded(value, Meta)
        meta = partition.meta
        last = self.cursor().last_before(partition.end_key)
        if last is not None and last[0] >= partition.key(0):
            meta.end_offset = max(meta.end_offset, _RECORD_KEY.unpack(last[0])[3] + 1)
            meta.newest_ms = max(meta.newest_ms, self._decoded(last[1], Chunk).newest_ms)
        return partition

    def _decoded(self, value: bytes, kind: type[T]) -> T:
        try:
            return msgspec.msgpack.decode(value, type=kind)
        except msgspec.MsgspecError as error:
            raise LogCorrupt(f"{self._translated.what}: {error}") from None

    def partitions(self, topic: str) -> list[Partition]:
        """All partitions of a topic; `Invalid` if there is none of this name."""
        found = self._partitions.get(topic)
        if found is None:
            raise Invalid(f"no topic {topic}")
        return found

    def all_partitions(self) -> list[Partition]:
        """The partitions of every topic."""
        return [partition for partitions in self._partitions.values() for partition in partitions]

    def _partition(self, topic: str, number: int) -> Partition:
        partitions = self.partitions(topic)
        if not 0 <= number < len(partitions):
            raise Invalid(f"no partition {number} of topic {topic}")
        return partitions[number]

    def partition_count(self, topic: str) -> int:
        return len(self.partitions(topic))

    def end_offsets(self, topic: str) -> Mapping[int, int]:
        return {n: self.watermarks(topic, n).end_offset for n in range(self.partition_count(topic))}

    def start_offsets(self, topic: str) -> Mapping[int, int]:
        return {n: self.watermarks(topic, n).start_offset for n in range(self.partition_count(topic))}

    def message_bytes_max(self, topic: str) -> int:
        return RECORD_BYTES_MAX

    def topic_id(self, topic: str) -> str:
        self.partition_count(topic)
        return ""  # the stores are in the same folder

    def watermarks(self, topic: str, partition: int) -> Watermarks:
        meta = self._partition(topic, partition).meta
        return Watermarks(meta.start_offset, meta.end_offset)

    def _check_process(self) -> None:
        """To be called before `changed` is taken: in a forked process nobody may ever let go of it."""
        if self._pid != os.getpid():
            raise Invalid("an embedded log can't be used in a forked process; publish to http://host:port instead")

    # Writing

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        refused = [self._refusal(message) for message in messages]
        try:
            self._check_process()
            with self.changed:
                offsets = iter(self._append([m for m, error in zip(messages, refused, strict=True) if error is None]))
        except PipelineError as error:
            return [refusal or error for refusal in refused]
        return [next(offsets) if refusal is None else refusal for refusal in refused]

    def _refusal(self, message: Message) -> Invalid | None:
        """Why this message can never be appended."""
        try:
            self._partition(message.topic, message.partition)
        except Invalid as error:
            return error
        if len(message.key or b"") + len(message.value or b"") > RECORD_BYTES_MAX:
            return Invalid(f"a record of over {RECORD_BYTES_MAX} bytes")
        return None

    def _append(self, messages: Sequence[Message]) -> list[int]:
        """One atomic write. The caller holds `changed`."""
        if not messages:
            return []
        out = [0] * len(messages)
        now_ms = self._clock.now_ms()
        batch = WriteBatch(raw_mode=True)
        written: list[tuple[Partition, int, int, int]] = []
        for topic, number, indices, keys, values in _runs(messages):
            partition = self._partition(topic, number)
            start = partition.meta.end_offset
            sizes = record_sizes(keys, values)
            if max(sizes) > RECORD_BYTES_MAX:
                raise Invalid(f"a record of over {RECORD_BYTES_MAX} bytes")
            at_ms = max(now_ms, partition.meta.newest_ms)
            for last_offset, chunk in cut(start, at_ms, keys, values, sizes):
                batch.put(partition.key(last_offset), encode(chunk))
            end = start + len(values)
            if len(values) == len(messages):
                out = [*range(start + 1, end + 1)]
            else:
                for index, next_offset in zip(indices, range(start + 1, end + 1), strict=True):
                    out[index] = next_offset
            written.append((partition, end, at_ms, sum(sizes)))
        self.write(batch, durable=True)
        for partition, end, at_ms, size in written:
            self._metrics.inc(m.LOG_APPENDED, end - partition.meta.end_offset, partition.topic.name)
            self._metrics.inc(m.LOG_BYTES, size, partition.topic.name)
            partition.meta.end_offset = end
            partition.meta.newest_ms = at_ms
        self.changed.notify_all()
        return out

    def write(self, batch: WriteBatch, *, durable: bool) -> None:
        """Write a batch. The caller holds `changed`. After one failure nothing more is written.

        `durable`: with `fsync`, wait for the disk. A write that loses nothing when it is lost need not be.
        """
        if self._failed:
            raise Unavailable(self._failed)
        try:
            with self._translated:
                self.db.write(batch)
                if durable and self._fsync:
                    self.db.flush_wal(True)  # not WriteOptions.sync: that waits for the disk with the GIL held
        except PipelineError as error:
            # What reached the disk is unknown, so offsets are too: only opening the log again can tell.
            self._failed = f"{error}; restart to go on"
            _log.critical("%s", self._failed)
            self.changed.notify_all()
            self._on_failed(Unavailable(self._failed))
            raise Unavailable(self._failed) from None

    def put_meta(self, batch: WriteBatch, partition: Partition) -> None:
        """Add a partition's meta to a batch. The caller holds `changed`."""
        batch.put(partition.meta_key, encode(partition.meta))

    def flush(self) -> None:
        """Move the newest records from memory to files."""
        with self._translated:
            self.db.flush()

    # Reading

    def reader(self, topic: str) -> _EmbeddedReader:
        return _EmbeddedReader(self, topic)

    def cursor(self) -> Cursor:
        """The log at one moment."""
        return Cursor(self.db, self._translated)

    def chunks(self, cursor: Cursor, partition: Partition, next_offset: int) -> Iterator[tuple[int, Chunk, int]]:
        """The chunk that holds `next_offset` and those behind it: last offset, chunk, size in bytes."""
        for key, value in cursor.scan(partition.key(next_offset), partition.end_key):
            try:
                chunk = decode_chunk(value)
            except msgspec.MsgspecError as error:
                where = f"{partition.topic.name}-{partition.number}"
                raise LogCorrupt(f"{self._translated.what}: {where}: {error}") from None
            yield _RECORD_KEY.unpack(key)[3], chunk, len(value)

    def transaction(self, transactional_id: str) -> _EmbeddedTransaction:
        self._check_process()
        with self.changed:
            self._owners[transactional_id] = owner = self._owners.get(transactional_id, 0) + 1
        return _EmbeddedTransaction(self, transactional_id, owner)

    def commit(self, transactional_id: str, owner: int, messages: Sequence[Message]) -> list[int]:
        """What a transaction does, if it still owns its id."""
        self._check_process()
        with self.changed:
            if self._owners[transactional_id] != owner:
                raise Fenced(f"transactional id {transactional_id} has a newer owner")
            return self._append(messages)

    def poll(self, places: Mapping[Partition, int], timeout_s: float) -> list[tuple[Partition, Watermarks, Cursor]]:
        """Wait for records beyond the given offsets: where there are some, with a cursor of the same moment.

        Of the same moment, because offsets alone go out of date: the cleaner may delete or merge chunks at any time.
        """
        self._check_process()

        def behind() -> list[Partition]:
            return [partition for partition, next_offset in places.items() if next_offset < partition.meta.end_offset]

        with self.changed:
            if not self.changed.wait_for(lambda: behind() or self._failed, timeout_s):
                return []
            if self.closed or (self._failed and not behind()):
                raise Unavailable(self._failed)
            cursor = self.cursor()
            return [(p, Watermarks(p.meta.start_offset, p.meta.end_offset), cursor) for p in behind()]

    def close(self) -> None:
        """Let go of the files. Twice is fine."""
        if self._pid != os.getpid():
            return
        with self.changed:
            if not self.closed:
                self.closed = True
                self._failed = f"{self._translated.what} is closed"
                close_quietly(self.db, self._translated.what)
                self.changed.notify_all()


def _options(settings: LogSettings) -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(settings.log_write_buffer_bytes)
    options.set_max_write_buffer_number(2)
    options.set_compression_type(DBCompressionType.lz4())
    # A torn tail is what kill -9 leaves of a write that was not acknowledged; anything else must not be cut off silently.
    # (What RocksDB can't tell from a torn tail: a changed record length in the last 32 KB of the write-ahead log.)
    options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
    options.set_keep_log_file_num(2)
    options.set_max_background_jobs(2)
    return options


_Run = tuple[str, int, Sequence[int], Sequence[bytes | None], Sequence[bytes | None]]


def _runs(messages: Sequence[Message]) -> Iterator[_Run]:
    """The messages by topic and partition: topic, partition, their indices, keys, values."""
    count = len(messages)
    topics = [message.topic for message in messages]  # not zip(*messages): its many iterators set off the garbage collector
    numbers = [message.partition for message in messages]
    keys = [message.key for message in messages]
    values = [message.value for message in messages]
    if topics.count(topics[0]) == numbers.count(numbers[0]) == count:
        yield topics[0], numbers[0], range(count), keys, values
        return
    places: dict[tuple[str, int], list[int]] = {}
    for index, place in enumerate(zip(topics, numbers, strict=True)):
        places.setdefault(place, []).append(index)
    for (topic, number), indices in places.items():
        yield topic, number, indices, [keys[i] for i in indices], [values[i] for i in indices]


class _EmbeddedReader:
    def __init__(self, log: EmbeddedLog, topic: str) -> None:
        self._log = log
        self._topic = topic
        self._partitions = log.partitions(topic)
        self._next: dict[Partition, int] = {}

    def assign(self, next_offsets: Mapping[int, int]) -> None:
        for number in next_offsets:
            if not 0 <= number < len(self._partitions):
                raise Invalid(f"no partition {number} of topic {self._topic}")
        self._next = {self._partitions[number]: next_offset for number, next_offset in next_offsets.items()}

    def poll(self, *, record_count_max: int, bytes_max: int, timeout_s: float) -> list[Records]:
        out = {
            partition: self._read(partition, watermarks, cursor, record_count_max, bytes_max)
            for partition, watermarks, cursor in self._log.poll(self._next, timeout_s)
        }
        # Only now: if reading one partition fails, what was read of the others must come again.
        self._next.update((partition, records.next_offset) for partition, records in out.items())
        return [*out.values()]

    def _read(
        self, partition: Partition, watermarks: Watermarks, cursor: Cursor, record_count_max: int, bytes_max: int
    ) -> Records:
        next_offset = self._next[partition]
        start, end = watermarks
        if next_offset < start:
            where = f"{self._topic}-{partition.number}"
            raise RecordsLost(f"{where}: {start - next_offset} records from {next_offset} on are gone")
        offsets: list[int] = []
        at_ms: list[int] = []
        keys: list[bytes | None] = []
        values: list[bytes | None] = []
        size = 0
        for last_offset, chunk, chunk_size in self._log.chunks(cursor, partition, next_offset):
            if last_offset >= end:  # of a write that failed after all
                next_offset = end
                break
            some_offsets, some_at_ms, some_keys = chunk.columns(last_offset)
            skip = bisect_left(some_offsets, next_offset)
            stop = skip + record_count_max - len(offsets)
            offsets += some_offsets[skip:stop]
            at_ms += some_at_ms[skip:stop]
            keys += some_keys[skip:stop]
            values += chunk.values[skip:stop]
            size += chunk_size
            next_offset = last_offset + 1 if stop >= len(chunk.values) else offsets[-1] + 1
            if len(offsets) >= record_count_max or size >= bytes_max:
                break
        else:
            next_offset = end
        return Records(partition.number, offsets, at_ms, keys, values, next_offset)

    def close(self) -> None:
        self._next = {}


class _EmbeddedTransaction:
    def __init__(self, log: EmbeddedLog, transactional_id: str, owner: int) -> None:
        self._log = log
        self._id = transactional_id
        self._owner = owner

    def commit(self, messages: Sequence[Message], *, timeout_s: float) -> list[int]:
        return self._log.commit(self._id, self._owner, messages)

    def close(self) -> None:
        """Nothing to give back."""
