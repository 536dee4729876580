"""Retention and compaction of the embedded log, as in Kafka's log cleaner (KIP-58; `LogCleaner.scala`).

Retention removes whole chunks by age. Compaction keeps the newest record of each key: it maps keys of the part that was
never compacted to their newest offsets, as many as memory allows, then copies all chunks below and drops superseded records.
Tombstones go in a later pass, `delete_retention_ms` after the values that they delete: a reader that has seen such a value
has that time to reach the tombstone (KIP-534).
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from itertools import compress, repeat
from operator import le
from typing import NamedTuple

from rocksdict import WriteBatch

import pipeline.metrics as m
from pipeline.adapters.embedded.chunks import CHUNK_BYTES, CHUNK_RECORDS_MAX, Chunk, Partition, encode, record_sizes
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.errors import PipelineError
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock
from pipeline.settings import LogSettings
from pipeline.threads import PeriodicThread

_log = logging.getLogger(__name__)
END_OFFSET_MAX = 2**63 - 1
_RUN_CHUNKS_MAX = 5_000
_DIRTY_COUNT_MIN = 1_000
"""Least number of records that were never compacted for a pass, whatever their ratio is."""


class Cleaner:
    """Runs retention and compaction of one log every `maintenance_interval_ms`, in a thread of its own."""

    def __init__(
        self,
        log: EmbeddedLog,
        settings: LogSettings,
        clock: Clock,
        metrics: Metrics = NO_METRICS,
        keep_from: Callable[[str, int], int] = lambda _topic, _partition: END_OFFSET_MAX,
    ) -> None:
        """`keep_from` returns, for a topic and partition, the offset from which retention must keep all records."""
        self._log = log
        self._keep_from = keep_from
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._thread = PeriodicThread(
            "pipeline-cleaner",
            self.step,
            log=_log,
            clock=clock,
            metrics=metrics,
            interval_s=settings.maintenance_interval_ms / 1000,
            waits_first=True,
        )
        self._stop = self._thread.stopping

    def start(self) -> None:
        """Start the thread."""
        atexit.register(self.stop)  # a thread that is in RocksDB when the interpreter ends would abort the process
        self._thread.start()

    def stop(self) -> None:
        """Stop after the present chunk. Idempotent."""
        atexit.unregister(self.stop)
        self._thread.stop(None)

    def step(self) -> None:
        """Clean once; a failure is logged and repaired by the next call."""
        try:
            self.clean()
        except PipelineError as error:
            _log.error("cleaning: %s", error)

    def clean(self, *, dirty_count_min: int = _DIRTY_COUNT_MIN) -> int:
        """Clean all partitions once; return the number of removed records."""
        removed = 0
        for partition in self._log.all_partitions():
            if self._stop.is_set():
                break
            if partition.topic.cleanup_policy == "delete":
                count = self._expire(partition)
            else:
                count = self._compact(partition, dirty_count_min)
            if count:
                self._metrics.inc(m.LOG_REMOVED, count, partition.topic.name, partition.topic.cleanup_policy)
            removed += count
        self._log.note_flushed()
        return removed

    # Retention

    def _expire(self, partition: Partition) -> int:
        if partition.topic.retention_ms < 0:
            return 0
        oldest_ms = self._clock.now_ms() - partition.topic.retention_ms
        keep_from = self._keep_from(partition.topic.name, partition.number)
        batch = WriteBatch(raw_mode=True)
        start_offset = removed = 0
        for last_offset, chunk, _ in self._log.chunks(self._log.cursor(), partition, partition.meta.start_offset):
            if chunk.newest_ms >= oldest_ms or last_offset >= keep_from:
                break
            batch.delete(partition.key(last_offset))
            start_offset = last_offset + 1
            removed += len(chunk.values)
        if start_offset:
            with self._log.changed:
                partition.meta.start_offset = start_offset
                self._log.put_meta(batch, partition)
                self._log.write(batch, durable=False)
                self._log.note(partition)
        return removed

    # Compaction

    def _compact(self, partition: Partition, dirty_count_min: int) -> int:
        removed = 0
        while not self._stop.is_set():
            meta = partition.meta
            dirty = meta.end_offset - meta.clean_end_offset
            ratio = partition.topic.min_cleanable_dirty_ratio
            if not dirty or dirty < dirty_count_min or dirty < ratio * (dirty + meta.clean_count):
                break
            newest, clean_end = self._map(partition)
            removed += self._rewrite(partition, newest, clean_end)
        return removed

    def _map(self, partition: Partition) -> tuple[_Newest, int]:
        """Return the newest offsets of keys that were never compacted, and the offset up to which they fit in memory."""
        newest: _Newest = {}
        clean_end = partition.meta.clean_end_offset
        end_offset = partition.meta.end_offset
        for last_offset, chunk, _ in self._log.chunks(self._log.cursor(), partition, clean_end):
            if last_offset >= end_offset or len(newest) >= self._settings.compaction_keys_max:
                break
            offsets, _, keys = chunk.columns(last_offset)
            newest.update(zip(keys, offsets, strict=True))
            clean_end = last_offset + 1
        newest.pop(None, None)  # records without a key supersede nothing
        return newest, clean_end

    def _rewrite(self, partition: Partition, newest: _Newest, clean_end: int) -> int:
        """Copy the records below `clean_end` that are not superseded. Steps are atomic, so that a crash costs only time."""
        meta = partition.meta
        ripe = self._clock.now_ms() - meta.horizon_ms > partition.topic.delete_retention_ms
        tombstones_end = meta.horizon_offset if ripe else 0
        kept = removed = 0
        run = _ChunkRun()
        for last_offset, chunk, _ in self._log.chunks(self._log.cursor(), partition, 0):
            if last_offset >= clean_end or self._stop.is_set():
                break
            if chunk.lost:  # it stays: the gap must remain visible
                self._replace(partition, run)
                run = _ChunkRun()
                continue
            columns = _kept(last_offset, chunk, newest, tombstones_end)
            kept += len(columns.values)
            removed += len(chunk.values) - len(columns.values)
            size = sum(record_sizes(columns.keys, columns.values))
            if not run.has_room_for(len(columns.values), size):
                self._replace(partition, run)
                run = _ChunkRun()
            run.add(chunk.begin, last_offset, columns, size, whole=len(columns.values) == len(chunk.values))
        self._replace(partition, run)
        if not self._stop.is_set():
            with self._log.changed:
                meta.clean_end_offset = clean_end
                meta.clean_count = kept
                if ripe:
                    meta.horizon_offset, meta.horizon_ms = clean_end, self._clock.now_ms()
                batch = WriteBatch(raw_mode=True)
                self._log.put_meta(batch, partition)
                self._log.write(batch, durable=False)
            self._log.flush()  # superseded records that are still in memory never reach the disk
        return removed

    def _replace(self, partition: Partition, run: _ChunkRun) -> None:
        """Replace the chunks of a run by one that covers their offsets, even if it holds no record."""
        if run.as_it_was:
            return
        batch = WriteBatch(raw_mode=True)
        for last_offset in run.last_offsets:
            batch.delete(partition.key(last_offset))
        batch.put(partition.key(run.last_offsets[-1]), encode(Chunk(run.begin, *run.columns)))
        with self._log.changed:
            self._log.write(batch, durable=False)


_Newest = dict[bytes | None, int]


class _Columns(NamedTuple):
    """Records of a chunk, with every column written out."""

    at_ms: list[int]
    offsets: list[int]
    keys: list[bytes | None]
    values: list[bytes | None]


def _kept(last_offset: int, chunk: Chunk, newest: _Newest, tombstones_end: int) -> _Columns:
    """Return the records of a chunk that are not superseded, without tombstones below `tombstones_end`."""
    offsets, at_ms, keys = chunk.columns(last_offset)
    keep = [*map(le, map(newest.get, keys, repeat(-1)), offsets)]
    if None in chunk.values and offsets[0] < tombstones_end:
        for index, value in enumerate(chunk.values):
            if value is None and offsets[index] < tombstones_end:
                keep[index] = False
    if all(keep):
        return _Columns(at_ms, [*offsets], keys, chunk.values)
    return _Columns(
        [*compress(at_ms, keep)], [*compress(offsets, keep)], [*compress(keys, keep)], [*compress(chunk.values, keep)]
    )


class _ChunkRun:
    """Neighbouring chunks that become one, and their remaining records."""

    def __init__(self) -> None:
        self.begin = 0
        self.last_offsets: list[int] = []
        self.columns = _Columns([], [], [], [])
        self.as_it_was = True
        """True if writing the run would change nothing."""
        self._bytes = 0

    def has_room_for(self, count: int, size: int) -> bool:
        """Return whether one chunk can hold `count` more records of `size` bytes."""
        return (
            len(self.last_offsets) < _RUN_CHUNKS_MAX
            and len(self.columns.values) + count <= CHUNK_RECORDS_MAX
            and self._bytes + size <= CHUNK_BYTES
        )

    def add(self, begin: int, last_offset: int, more: _Columns, size: int, *, whole: bool) -> None:
        """Add a chunk; `whole` if all of its records remain."""
        self.as_it_was = whole and not self.last_offsets
        self.begin = self.begin if self.last_offsets else begin
        self.last_offsets.append(last_offset)
        self.columns.at_ms.extend(more.at_ms)
        self.columns.offsets.extend(more.offsets)
        self.columns.keys.extend(more.keys)
        self.columns.values.extend(more.values)
        self._bytes += size
