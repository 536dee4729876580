"""The embedded log: topics, partitions, offsets and transactions as in Kafka, in one RocksDB of one process.

    "r" topic(1) partition(4) last-offset(8)  ->  a chunk of records (chunks.py)
    "m" topic(1) partition(4)                 ->  msgpack of Meta
    "t" topic name                            ->  msgpack([topic number, partition count, topic id])

Every append is one RocksDB write with its write-ahead log. It is acknowledged when the kernel has it, so that kill -9 of
this process loses nothing; with `fsync`, when the disk has it. A transaction is one such write over several topics.

Lost records are detected when the log is opened (integrity.py, checkpoint.py) and by every reader: the chunks of a partition
are a chain without gaps. A log with gaps opens only with `accept_loss`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from rocksdict import DBCompressionType, DBRecoveryMode, Options, Rdict, WriteBatch

import pipeline.metrics as m
from pipeline.adapters.embedded.checkpoint import CheckpointOffsets, OffsetCheckpoint
from pipeline.adapters.embedded.chunks import Chunk, Meta, Partition, cut, decode_chunk, encode, last_offset_of, record_sizes
from pipeline.adapters.embedded.integrity import Gap, check, mark_lost
from pipeline.adapters.embedded.reader import EmbeddedReader
from pipeline.adapters.open_files import files_limit, files_of_log
from pipeline.adapters.rocks import Cursor, TranslatedErrors, close_quietly, open_db, protect_from_forks
from pipeline.errors import Fenced, Invalid, LogCorrupt, NoSpace, PipelineError, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import NO_BEGINS, Begins, Clock, Message, MessageRun, Watermarks, check_begins
from pipeline.settings import LogSettings
from pipeline.topics import Topic

_log = logging.getLogger(__name__)
T = TypeVar("T")
RECORD_BYTES_MAX = 32 * 2**20
"""Largest size of a record's key and value together."""


class EmbeddedLog:
    """A `ports.Log` in a folder, for one process and any number of threads.

    Raises `LogCorrupt`, with the number of lost records, before any file is changed. With `accept_loss` the log opens
    without them, and a copy of its files is kept beside it (integrity.py).

    `on_failed` is called once when the disk fails a write: the log then takes no more, and the process should end. With
    `read_only` no data file is written, and a log with gaps opens, for inspection; `NotFound` if the folder has no log.
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
        accept_loss: bool = False,
    ) -> None:
        self._clock = clock
        self._metrics = metrics
        self._on_failed = on_failed
        self._failure: Unavailable | None = None
        self._pid = os.getpid()
        self._owners: dict[str, int] = {}
        self.closed = False
        self.passes_lost = read_only or accept_loss
        """True if readers skip records that are known to be lost; False if they raise `RecordsLost`."""
        self.changed = threading.Condition()
        """Guards every write and every partition's meta; notified when records come."""
        self.path = path
        self._translated = TranslatedErrors(f"log {path}", corrupt=LogCorrupt, closed=Unavailable)
        self._fsync = settings.fsync
        options = log_options(settings)
        gaps = [] if read_only else self._check_whole(topics, settings, options, accept_loss=accept_loss)
        self.db = open_db(path, options, self._translated, read_only=read_only)
        protect_from_forks(self)
        self._checkpoint: OffsetCheckpoint | None = None
        self._flushing: tuple[int, dict[Partition, int]] | None = None
        try:
            self._checkpoint = OffsetCheckpoint(checkpoint_path(path), read_only=read_only)
            self._partitions = self._load(topics, settings.partitions, create=not read_only)
            if gaps:
                mark_lost(self, gaps, metrics, clock.now_ms())
            if not read_only:  # opening has moved all there was from write-ahead logs to files
                for partition in self.all_partitions():
                    self.note(partition, partition.meta.end_offset)
        except BaseException:
            self._close_files()
            raise

    def _check_whole(
        self, topics: Mapping[str, Topic], settings: LogSettings, options: Options, *, accept_loss: bool
    ) -> list[Gap]:
        def repair() -> None:
            with self._translated:
                Rdict.repair(str(self.path), options)

        def open_read_only() -> EmbeddedLog:
            return EmbeddedLog(self.path, topics, settings, self._clock, read_only=True)

        return check(
            self.path,
            checkpoint_path(self.path),
            open_read_only=open_read_only,
            repair=repair,
            accept_loss=accept_loss,
            now_ms=self._clock.now_ms(),
        )

    def _load(self, topics: Mapping[str, Topic], partition_count: int, *, create: bool) -> dict[str, list[Partition]]:
        known: dict[str, tuple[int, int, str]] = {}
        for key, value in self.cursor().scan(b"t", b"u"):
            known[key[1:].decode()] = self._decoded(value, tuple[int, int, str])
        stored = set(known)
        if not known:  # a new log, or remains of one: the checkpoint then shows what is missing
            copy = b"" if self._checkpoint is None else self._checkpoint.get_topics()
            if copy:
                known = self._decoded(copy, dict[str, tuple[int, int, str]])
            elif self.cursor().last_before(b"s") is not None:
                raise LogCorrupt(f"{self._translated.what}: which records are of which topic is gone")
        counts = {name: count for name, (_, count, _) in known.items() if name in topics}
        if partition_count and counts and set(counts.values()) != {partition_count}:
            raise Invalid(
                f"{self._translated.what} has partitions {counts}; the setting says {partition_count}, and it can't change"
            )
        if create:
            # A topic that joins a log gets as many partitions as the others have, if they agree.
            agreed = next(iter(counts.values())) if len(set(counts.values())) == 1 else 0
            batch = WriteBatch(raw_mode=True)
            for name in [name for name in topics if name not in known]:
                # The id distinguishes the topic from those of other folders, and of this one after it was emptied.
                known[name] = len(known), partition_count or agreed or topics[name].partitions, self._clock.new_id()
            for name in known.keys() - stored:
                batch.put(b"t" + name.encode(), encode(known[name]))
            with self._translated:
                self.db.write(batch)
            if self._checkpoint is not None:
                self._checkpoint.put_topics(encode(known))
        self._topic_ids = {name: topic_id for name, (_, _, topic_id) in known.items()}
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
            meta.end_offset = max(meta.end_offset, last_offset_of(last[0]) + 1)
            meta.newest_ms = max(meta.newest_ms, self._decoded(last[1], Chunk).newest_ms)
        return partition

    def _decoded(self, value: bytes, kind: type[T]) -> T:
        try:
            return msgspec.msgpack.decode(value, type=kind)
        except msgspec.MsgspecError as error:
            raise LogCorrupt(f"{self._translated.what}: {error}") from None

    def partitions(self, topic: str) -> list[Partition]:
        """Return all partitions of a topic; `Invalid` if there is no such topic."""
        found = self._partitions.get(topic)
        if found is None:
            raise Invalid(f"no topic {topic}")
        return found

    def all_partitions(self) -> list[Partition]:
        """Return the partitions of all topics."""
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

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        return self.end_offsets(topic)  # what is appended is committed

    def start_offsets(self, topic: str) -> Mapping[int, int]:
        return {n: self.watermarks(topic, n).start_offset for n in range(self.partition_count(topic))}

    def message_bytes_max(self, topic: str) -> int:
        return RECORD_BYTES_MAX

    def topic_id(self, topic: str) -> str:
        self.partition_count(topic)
        return self._topic_ids[topic]

    def watermarks(self, topic: str, partition: int) -> Watermarks:
        meta = self._partition(topic, partition).meta
        return Watermarks(meta.start_offset, meta.end_offset)

    def _check_process(self) -> None:
        """Raise `Invalid` in a forked process. Call it before `changed` is taken, which may be locked for ever there."""
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
        """Return the reason why this message can never be appended, or None."""
        try:
            self._partition(message.topic, message.partition)
        except Invalid as error:
            return error
        if len(message.key or b"") + len(message.value or b"") > RECORD_BYTES_MAX:
            return Invalid(f"a record of over {RECORD_BYTES_MAX} bytes")
        return None

    def _append(self, messages: Sequence[Message]) -> list[int]:
        """Append in one atomic write. The caller holds `changed`."""
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
            self.note(partition)
        self.changed.notify_all()
        return out

    def write(self, batch: WriteBatch, *, durable: bool) -> None:
        """Write a batch. The caller holds `changed`. After one failure nothing more is written.

        `durable`: with `fsync`, wait for the disk. Only a write that may be lost without harm need not be durable.
        """
        if self._failure is not None:
            raise self._failure_again()
        try:
            with self._translated:
                self.db.write(batch)
                if durable and self._fsync:
                    self.db.flush_wal(True)  # not WriteOptions.sync: that waits for the disk with the GIL held
        except PipelineError as error:
            # It is unknown what reached the disk, and so which offsets are taken, until the log is opened again.
            self._failure = (NoSpace if isinstance(error, NoSpace) else Unavailable)(f"{error}; restart to go on")
            _log.critical("%s", self._failure)
            self.changed.notify_all()
            self._on_failed(self._failure_again())
            raise self._failure_again() from None

    def _failure_again(self) -> Unavailable:
        """Return a new error with the text of the failure: one object, raised twice, would collect the frames of both."""
        kind = NoSpace if isinstance(self._failure, NoSpace) else Unavailable
        return kind(str(self._failure))

    def put_meta(self, batch: WriteBatch, partition: Partition) -> None:
        """Add a partition's meta to a batch. The caller holds `changed`."""
        batch.put(partition.meta_key, encode(partition.meta))

    def flush(self) -> None:
        """Write the newest records from memory to files."""
        with self._translated:
            self.db.flush()

    # How far it goes

    def checkpointed(self, partition: Partition) -> CheckpointOffsets:
        """Return the offsets of a partition in the checkpoint."""
        return CheckpointOffsets() if self._checkpoint is None else self._checkpoint.get(partition)

    def note(self, partition: Partition, flushed_offset: int | None = None) -> None:
        """Write the offsets of a partition to the checkpoint. The caller holds `changed`, or is the only thread."""
        if self._checkpoint is not None:
            before = partition.flushed_offset
            partition.flushed_offset = before if flushed_offset is None else flushed_offset
            meta = partition.meta
            self._checkpoint.put(partition, CheckpointOffsets(meta.start_offset, partition.flushed_offset, meta.end_offset))

    def note_flushed(self) -> None:
        """Write to the checkpoint which offsets are in files by now, so that opening the log need not check them again.

        RocksDB does not report offsets. So the end offsets are remembered together with the number of the newest write-ahead
        log, and are flushed once RocksDB needs that write-ahead log no more.
        """
        with self.changed, self._translated:
            if self.closed:
                return
            needed = self.db.property_int_value("rocksdb.min-log-number-to-keep") or 0
            if self._flushing is not None and self._flushing[0] < needed:
                for partition, end_offset in self._flushing[1].items():
                    self.note(partition, end_offset)
                self._flushing = None
            if self._flushing is None:
                newest = max((int(file.stem) for file in self.path.glob("*.log") if file.stem.isdecimal()), default=0)
                self._flushing = newest, {it: it.meta.end_offset for it in self.all_partitions()}

    # Reading

    def reader(self, topic: str) -> EmbeddedReader:
        return EmbeddedReader(self, topic)

    def cursor(self) -> Cursor:
        """Return a cursor over the log as it is now."""
        return Cursor(self.db, self._translated)

    def stored_chunks(self, cursor: Cursor, partition: Partition, next_offset: int) -> Iterator[tuple[int, Chunk, int]]:
        """Yield the chunk of `next_offset` and all after it: last offset, chunk, size in bytes. Gaps raise nothing."""
        for key, value in cursor.scan(partition.key(next_offset), partition.end_key):
            try:
                chunk = decode_chunk(value)
            except msgspec.MsgspecError as error:
                raise LogCorrupt(f"{self._translated.what}: {partition.name}: {error}") from None
            yield last_offset_of(key), chunk, len(value)

    def chunks(
        self, cursor: Cursor, partition: Partition, next_offset: int, end_offset: int = 0
    ) -> Iterator[tuple[int, Chunk, int]]:
        """Yield what `stored_chunks` does. Raises `LogCorrupt` if an offset up to `end_offset` is in no chunk."""
        expected = next_offset
        for last_offset, chunk, size in self.stored_chunks(cursor, partition, next_offset):
            if chunk.begin > expected or (chunk.begin < expected != next_offset):
                raise self.gap(partition, expected, chunk.begin)
            yield last_offset, chunk, size
            expected = last_offset + 1
        if expected < end_offset:
            raise self.gap(partition, expected, end_offset)

    def gap(self, partition: Partition, begin: int, end: int) -> LogCorrupt:
        """Return the error for a chain that should go on at `begin`, and goes on at `end`."""
        where = f"{self._translated.what}: {partition.name}"
        if end <= begin:
            return LogCorrupt(f"{where}: what should begin at {begin} begins at {end}: files of different times are mixed")
        return LogCorrupt(f"{where}: {end - begin} records ({begin} to {end - 1}) are gone")

    def transaction(self, transactional_id: str) -> _EmbeddedTransaction:
        self._check_process()
        with self.changed:
            self._owners[transactional_id] = owner = self._owners.get(transactional_id, 0) + 1
        return _EmbeddedTransaction(self, transactional_id, owner)

    def commit(self, transactional_id: str, owner: int, messages: Sequence[Message], begins: Begins) -> list[int]:
        """Append messages in one transaction if `owner` still owns the id."""
        self._check_process()
        with self.changed:
            if self._owners[transactional_id] != owner:
                raise Fenced(f"transactional id {transactional_id} has a newer owner")
            check_begins(begins, {place: self._partition(*place).meta.end_offset for place in begins})
            return self._append(messages)

    def poll(self, places: Mapping[Partition, int], timeout_s: float) -> list[tuple[Partition, Watermarks, Cursor]]:
        """Wait for records from the given offsets on; return the partitions that have some, each with a cursor.

        Offsets and cursor are of the same moment, because the cleaner may delete or merge chunks at any time.
        """
        self._check_process()

        def behind() -> list[Partition]:
            return [partition for partition, next_offset in places.items() if next_offset < partition.meta.end_offset]

        with self.changed:
            if not self.changed.wait_for(lambda: behind() or self._failure, timeout_s):
                return []
            if self.closed or (self._failure is not None and not behind()):
                raise self._failure_again()
            cursor = self.cursor()
            return [(p, Watermarks(p.meta.start_offset, p.meta.end_offset), cursor) for p in behind()]

    def close(self) -> None:
        """Close the files. Idempotent."""
        if self._pid != os.getpid():
            return
        with self.changed:
            if not self.closed:
                self.closed = True
                self._failure = Unavailable(f"{self._translated.what} is closed")
                self._close_files()
                self.changed.notify_all()

    def _close_files(self) -> None:
        close_quietly(self.db, self._translated.what)
        if self._checkpoint is not None:
            self._checkpoint.close()


def checkpoint_path(path: Path) -> Path:
    """Return the path of the checkpoint of a log."""
    return path.with_name(f"{path.name}.ends")


def log_options(settings: LogSettings) -> Options:
    """Return RocksDB's options for a log."""
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(settings.log_write_buffer_bytes)
    options.set_max_write_buffer_number(2)
    options.set_compression_type(DBCompressionType.lz4())
    # kill -9 leaves a torn tail of a write that was not acknowledged; no other damage must be cut off silently.
    # (RocksDB can't tell a torn tail from a changed record length in the last 32 KB of a write-ahead log, and takes one in
    # an older write-ahead log for harmless: those `integrity.py` finds.)
    options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
    options.set_max_open_files(files_of_log(files_limit()))
    options.set_keep_log_file_num(2)
    options.set_max_background_jobs(2)
    return options


_Run = tuple[str, int, Sequence[int], Sequence[bytes | None], Sequence[bytes | None]]


def _runs(messages: Sequence[Message]) -> Iterator[_Run]:
    """Yield the messages by topic and partition: topic, partition, their indices, keys, values."""
    count = len(messages)
    if isinstance(messages, MessageRun):
        yield messages.topic, messages.partition, range(count), messages.keys, messages.values
        return
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


class _EmbeddedTransaction:
    def __init__(self, log: EmbeddedLog, transactional_id: str, owner: int) -> None:
        self._log = log
        self._id = transactional_id
        self._owner = owner

    marker_count = 0

    def commit(self, messages: Sequence[Message], *, timeout_s: float, begins: Begins = NO_BEGINS) -> list[int]:
        return self._log.commit(self._id, self._owner, messages, begins)

    def close(self) -> None:
        """Nothing to give back."""
