"""Checks an embedded log before it is opened for writing, which would delete files that could be saved.

Three facts together reveal the loss of any file, or of a part of it: - RocksDB does not open without a file that its
manifest names, and verifies a checksum of every block that it reads. - A write-ahead log that is missing or cut, or an old
manifest, looks like a regular end to RocksDB. But then a partition ends below the end offset in the checkpoint, or its chain
of chunks has a gap. - At the start such a gap can only be in records that were not in files yet when the log was used last.
The chain is read from there on. Readers, and `pipeline verify`, check the rest.

Whether to go on without lost records is a person's decision: `accept_loss`. The log's files are then copied aside (immutable
files are linked), RocksDB repairs what it can if it does not open, and all of it is read. Each gap is filled with a chunk
without records that says so, because an offset must never mean two records: a token of a lost one would be satisfied by
another. A reader that comes to such a chunk without `accept_loss` raises `RecordsLost`. Only a gap at the end of a compacted
topic is not filled: the topic then ends earlier, so that its stores are ahead of it, which is a decision of its own.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol

from rocksdict import WriteBatch

import pipeline.metrics as m
from pipeline.adapters.datadir import aside, translate_os
from pipeline.adapters.embedded.checkpoint import CheckpointOffsets
from pipeline.adapters.embedded.chunks import Chunk, Partition, encode, lost_chunk
from pipeline.adapters.rocks import Cursor
from pipeline.errors import LogCorrupt
from pipeline.metrics import Metrics

_log = logging.getLogger(__name__)
_GAPS_MAX = 5


class CheckedLog(Protocol):
    """The methods of `EmbeddedLog` that the checks call."""

    def all_partitions(self) -> list[Partition]: ...

    def cursor(self) -> Cursor: ...

    def stored_chunks(self, cursor: Cursor, partition: Partition, next_offset: int) -> Iterator[tuple[int, Chunk, int]]: ...

    def checkpointed(self, partition: Partition) -> CheckpointOffsets: ...

    def gap(self, partition: Partition, begin: int, end: int) -> LogCorrupt: ...

    def put_meta(self, batch: WriteBatch, partition: Partition) -> None: ...

    def write(self, batch: WriteBatch, *, durable: bool) -> None: ...

    def close(self) -> None: ...


class Gap(NamedTuple):
    """A range of offsets of a partition whose records are lost."""

    topic: str
    partition: int
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.topic}-{self.partition}: {self.end - self.begin} records ({self.begin} to {self.end - 1}) are gone"


def find_gaps(log: CheckedLog, *, full: bool = False) -> list[Gap]:
    """Return the gaps of a log: with `full` of all of it, otherwise of its newest part (see above).

    Raises `LogCorrupt` if a chunk can't be read, or files of different times are mixed.
    """
    cursor = log.cursor()
    return [
        Gap(partition.topic.name, partition.number, begin, end)
        for partition in log.all_partitions()
        for begin, end in _gaps(log, cursor, partition, full=full)
    ]


def _gaps(log: CheckedLog, cursor: Cursor, partition: Partition, *, full: bool) -> Iterator[tuple[int, int]]:
    checkpointed, meta = log.checkpointed(partition), partition.meta
    start, end = max(meta.start_offset, checkpointed.start_offset), max(meta.end_offset, checkpointed.end_offset)
    # From one offset before: the manifest names the chunk that ends there, so a missing one reveals an older manifest.
    begin = start if full else max(start, checkpointed.flushed_offset - 1)
    if begin > start:
        first = next(log.stored_chunks(cursor, partition, start), None)
        if first is not None and first[1].begin > start:
            yield start, min(begin, first[1].begin)
    expected = begin
    for last_offset, chunk, _ in log.stored_chunks(cursor, partition, begin):
        if chunk.begin > expected:
            yield expected, chunk.begin
        elif chunk.begin < expected and expected != begin:
            raise log.gap(partition, expected, chunk.begin)
        expected = last_offset + 1
    if expected < end:
        yield expected, end


def describe_gaps(gaps: Sequence[Gap]) -> str:
    """Return in words how many records are lost, and where."""
    some = "; ".join(map(str, gaps[:_GAPS_MAX]))
    more = f"; and {len(gaps) - _GAPS_MAX} more gaps" if len(gaps) > _GAPS_MAX else ""
    return f"{sum(gap.end - gap.begin for gap in gaps)} records are gone: {some}{more}"


def check(
    path: Path,
    ends: Path,
    *,
    open_read_only: Callable[[], CheckedLog],
    repair: Callable[[], None],
    accept_loss: bool,
    now_ms: int,
) -> list[Gap]:
    """Return the accepted gaps of a log that is about to be opened for writing.

    `open_read_only` opens the log for reading. Raises `LogCorrupt` if there are gaps that are not accepted.
    """
    if not _is_there(path):
        if not ends.exists() or not ends.stat().st_size:
            return []
        text = f"log {path} is gone: {ends} says that there was one"
        if not accept_loss:
            raise LogCorrupt(f"{text}; bring it back, or start with --accept-loss to begin anew")
        _log.error("%s; beginning anew", text)
        ends.unlink()
        return []
    try:
        gaps = _gaps_found(open_read_only, full=accept_loss)
    except LogCorrupt as error:
        if not accept_loss:
            hint = "bring it back from a backup, or start with --accept-loss to go on with what can be read"
            raise LogCorrupt(f"{error}; {hint}") from None
        kept = keep_copy(path, now_ms)
        _log.error("%s; all that is there is kept in %s, and what can be read is repaired", error, kept)
        repair()
        gaps = _gaps_found(open_read_only, full=True)
    else:
        if not gaps:
            return []
        if not accept_loss:
            hint = "bring the log back from a backup, or start with --accept-loss to go on without them"
            raise LogCorrupt(f"log {path}: {describe_gaps(gaps)}; {hint}")
        kept = keep_copy(path, now_ms)
    if gaps:
        _log.error("log %s: %s; going on without them; the log as it was is kept in %s", path, describe_gaps(gaps), kept)
    return gaps


def _is_there(path: Path) -> bool:
    """Return whether there is a log, or a part of one. A first start that was killed leaves no such file."""
    return (path / "CURRENT").exists() or any(path.glob("*.sst"))


def _gaps_found(open_read_only: Callable[[], CheckedLog], *, full: bool) -> list[Gap]:
    with closing(open_read_only()) as log:
        return find_gaps(log, full=full)


def keep_copy(path: Path, now_ms: int) -> Path:
    """Copy the files of a log aside, and return the folder. Immutable files are linked, which costs nothing."""
    kept = aside(path, now_ms)
    with translate_os(f"a copy of {path}"):
        kept.mkdir()
        for file in path.iterdir():
            if file.name == "LOCK" or not file.is_file():
                continue
            if file.suffix == ".sst":
                try:
                    os.link(file, kept / file.name)
                    continue
                except OSError:  # a file system without links
                    pass
            shutil.copy2(file, kept / file.name)
    return kept


def mark_lost(log: CheckedLog, gaps: Sequence[Gap], metrics: Metrics, now_ms: int) -> None:
    """Fill the gaps of a log that was just opened, in one write: by chunks that say so, or by an earlier end."""
    batch = WriteBatch(raw_mode=True)
    partitions = {(it.topic.name, it.number): it for it in log.all_partitions()}
    for gap in gaps:
        partition = partitions[gap.topic, gap.partition]
        meta = partition.meta
        metrics.inc(m.LOG_LOST, gap.end - gap.begin, gap.topic)
        if gap.end >= meta.end_offset and partition.topic.cleanup_policy == "compact":
            meta.end_offset = gap.begin
            meta.clean_end_offset = min(meta.clean_end_offset, gap.begin)
            meta.horizon_offset = min(meta.horizon_offset, gap.begin)
        else:
            batch.put(partition.key(gap.end - 1), encode(lost_chunk(gap.begin, now_ms)))
            meta.end_offset, meta.newest_ms = max(meta.end_offset, gap.end), max(meta.newest_ms, now_ms)
        log.put_meta(batch, partition)
    log.write(batch, durable=True)
