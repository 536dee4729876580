"""RocksDB, through rocksdict: the stores, and the parts that the embedded log shares with them.

A store has no write-ahead log, because the changelog is one. RocksDB flushes whole write batches in their order, so after a
crash a store is as it was after some earlier write, as `ports.Store` promises. Kafka Streams does the same.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from types import TracebackType
from typing import Any, Protocol

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    DbClosedError,
    DBCompressionType,
    Options,
    Rdict,
    WriteBatch,
    WriteBufferManager,
    WriteOptions,
)

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import aside, translate_os
from pipeline.adapters.open_files import files_limit, files_of_store
from pipeline.core.query import Entry
from pipeline.core.record import runs
from pipeline.errors import Invalid, NoSpace, NotFound, NotReady, PipelineError, StoreCorrupt, Unavailable
from pipeline.folders import check_entries, replace_small
from pipeline.ports import Store, StoreView
from pipeline.settings import LogSettings

_log = logging.getLogger(__name__)
_REASON = "WHY-ASIDE"
"""Name of a file in a store that was set aside: it tells a person why."""
_CORRUPT = ("Corruption:", "Invalid argument:", "NotFound:", "Not implemented:")
_GONE = ("No such file", "Input/output error")
"""Errors of the file system after which another attempt does not help: a missing file, an unreadable sector."""
_STALL = "Result incomplete: Write stall"
_STALLED = ("rocksdb.is-write-stopped", "rocksdb.actual-delayed-write-rate")
_STALL_INTERVAL_S = 0.01
_BLOCK_MIN, _BLOCK_MAX = 16, 1_024
"""Entries that a `BlockCursor` reads at once, first and at most."""
_STALL_WAITS = 100
"""Waits before the next attempt of a write, even if RocksDB still reports a stall: it may have failed meanwhile."""
_FULL = ("No space left on device", "Disk quota exceeded")
_HOPELESS = ("Permission denied", "Read-only file system", "Not a directory", "Is a directory", "File exists")


class TranslatedErrors:
    """`with TranslatedErrors(...):` raises errors of `pipeline.errors` for rocksdict's. Reusable, from any thread.

    `what` begins every text. `corrupt` is raised when bytes can't be trusted, `closed` when the RocksDB is closed.
    """

    def __init__(
        self,
        what: str,
        *,
        corrupt: type[PipelineError] = StoreCorrupt,
        closed: type[PipelineError] = NotReady,
        partition: int | None = None,
    ) -> None:
        self.what = what
        self._partition = partition
        self.corrupt = corrupt
        self._closed = closed

    def translate(self, error: Exception) -> PipelineError:
        """Return the error for one of rocksdict's, whose types say little: the status of RocksDB or the system is in the
        text.
        """
        text = f"{self.what}: {error}"
        if isinstance(error, DbClosedError):
            return self._closed(f"{self.what} is closed")
        if str(error).startswith(_CORRUPT) or (str(error).startswith("IO error:") and any(it in text for it in _GONE)):
            damage = self.corrupt(text)
            if isinstance(damage, StoreCorrupt):
                damage.partition = self._partition
            return damage
        if any(reason in text for reason in _FULL):
            return NoSpace(text)
        return Invalid(text) if any(reason in text for reason in _HOPELESS) else Unavailable(text)

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, PipelineError):
            return
        # rocksdict raises bare Exception, or OSError from the file system; anything else is a bug of ours.
        if type(error) is Exception or isinstance(error, DbClosedError | OSError):
            raise self.translate(error) from None


def open_db(path: Path, options: Options, translated: TranslatedErrors, *, read_only: bool = False) -> Any:
    """Open or create a RocksDB. With `read_only` raise `NotFound` if there is none; nothing in its folder changes."""
    with translated:
        if not read_only:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_entries(path)
            return Rdict(str(path), options)
        if not path.is_dir() or not any(path.iterdir()):
            raise NotFound(f"{translated.what} does not exist")
        check_entries(path)
        with TemporaryDirectory(prefix="pipeline-") as logs:  # of the log that RocksDB keeps of itself; it goes on unlinked
            options.set_db_log_dir(logs)
            return Rdict(str(path), options, access_type=AccessType.read_only())


class Owner(Protocol):
    """An object that has a RocksDB open."""

    db: Any


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def protect_from_forks(owner: Owner) -> None:
    """Keep forked children from closing the parent's RocksDB: its threads do not exist there, so they would crash."""
    _watch_forks()
    _owners.add(owner)


@cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _after_fork_in_child() -> None:
    for owner in _owners:  # to let go of it would be to wait for its threads
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner.db))
    # At the end of a process RocksDB joins its threads. In a child that is a crash, so its end must not come so far.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)


def close_quietly(db: Any, what: str) -> None:
    """Close a RocksDB and log an error. After a failed write the close fails too, but the files are released."""
    try:
        db.close()
    except Exception as error:
        _log.warning("closing %s: %s", what, error)


class Cursor:
    """An iterator over a RocksDB as it was when the cursor was made.

    rocksdict's `items()` ends without an error at a corrupt block, and the iterators of its `Snapshot` show later writes.
    """

    def __init__(self, db: Rdict, translated: TranslatedErrors) -> None:
        self._translated = translated
        with translated:
            self._iterator: Any = db.iter()

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `ports.StoreView.get`."""
        return [self._get(key) for key in keys]

    def _get(self, key: bytes) -> bytes | None:
        self._iterator.seek(key)
        if self._iterator.valid():
            return self._iterator.value() if self._iterator.key() == key else None
        self._check()
        return None

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """See `ports.StoreView.scan`."""
        iterator = self._iterator
        valid, get_key, get_value, forward = iterator.valid, iterator.key, iterator.value, iterator.next
        iterator.seek(start)
        while valid():
            key = get_key()
            if key >= end:
                return
            yield key, get_value()
            forward()
        del iterator, valid, get_key, get_value, forward
        self._check()

    def last_before(self, end: bytes) -> tuple[bytes, bytes] | None:
        """Return the entry with the largest key below `end`."""
        self._iterator.seek_for_prev(end)
        if self._iterator.valid() and self._iterator.key() == end:
            self._iterator.prev()
        if self._iterator.valid():
            return self._iterator.key(), self._iterator.value()
        self._check()
        return None

    def _check(self) -> None:
        """Raise the error, if one and not the end of the range has stopped the iterator.

        After an error the cursor drops its iterator, which would keep files open that the error's handler may want to
        delete: a traceback holds every frame, and so the cursor, as long as the error is handled.
        """
        try:
            self._iterator.status()
        except Exception as error:
            self._iterator = None
            raise self._translated.translate(error) from None


class BlockCursor(Cursor):
    """A cursor whose scans read ahead in blocks: for ranges of many small entries.

    rocksdict's `items()` walks at less than half the cost of `iter()`, but shows the RocksDB of the moment at which it is
    called, and ends without an error at a corrupt block. So a scan takes it if there was no write since the cursor was made,
    and looks with its own iterator at what is behind the end.
    """

    def __init__(self, db: Rdict, translated: TranslatedErrors) -> None:
        self._db = db
        with translated:
            self._sequence = db.latest_sequence_number()  # before the iterator is made: not a newer one than the iterator's
        super().__init__(db, translated)

    def scan(self, start: bytes, end: bytes) -> Iterator[Entry]:
        try:
            items: Any = self._db.items(from_key=start)
            unchanged = self._db.latest_sequence_number() == self._sequence
        except DbClosedError:
            unchanged = False  # for others: the cursor's iterator keeps it open
        return chain.from_iterable(self._blocks(items, start, end)) if unchanged else super().scan(start, end)

    def _blocks(self, items: Iterator[Entry], start: bytes, end: bytes) -> Iterator[Iterable[Entry]]:
        size, rest = _BLOCK_MIN, start
        while block := [*islice(items, size)]:
            if block[-1][0] >= end:
                yield block[: bisect_left(block, end, key=itemgetter(0))]
                return
            yield block
            size, rest = min(4 * size, _BLOCK_MAX), block[-1][0] + b"\x00"
        del items
        yield super().scan(rest, end)  # nothing, unless damage was the end


class RocksStore:
    """A `ports.Store` in a folder."""

    def __init__(self, path: Path, options: Options, *, partition: int | None = None, read_only: bool = False) -> None:
        self._translated = TranslatedErrors(f"store {path}", partition=partition)
        self._read_only = read_only
        self.db = open_db(path, options, self._translated, read_only=read_only)
        protect_from_forks(self)
        write_options: Any = WriteOptions()
        write_options.disable_wal = True  # an attribute, whatever the stub says
        write_options.no_slowdown = True
        self._write_options = write_options
        self._pause = Event()
        self.closed = False

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        with self._translated:
            return self.db.get(list(keys))  # type: ignore[no-any-return]  # one MultiGet: of one moment, without the GIL

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        return Cursor(self.db, self._translated).scan(start, end)

    def write(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        with self._translated:
            while not self._is_written(self._batch(keys, values)):
                for _ in range(_STALL_WAITS):
                    if not any(map(self.db.property_int_value, _STALLED)):
                        break
                    self._pause.wait(_STALL_INTERVAL_S)

    def _is_written(self, batch: WriteBatch) -> bool:
        """Write; return False if RocksDB stalls. It must not wait by itself, because it would hold the GIL, and stop even
        heartbeats.
        """
        try:
            self.db.write(batch, self._write_options)
        except Exception as error:
            if not str(error).startswith(_STALL):
                raise
            return False
        return True

    def _batch(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> WriteBatch:
        batch = WriteBatch(raw_mode=True)
        with_tombstones = not all(values) and None in values  # `all` takes a fifth of the time
        for order in runs(range(len(keys))):
            # In the order of keys, the memtable takes them in half the time. A stable sort: of one key's, the last wins.
            order.sort(key=keys.__getitem__)
            entries = map(keys.__getitem__, order), map(values.__getitem__, order)
            if with_tombstones:
                for key, value in zip(*entries, strict=True):
                    batch.delete(key) if value is None else batch.put(key, value)
            else:
                deque(map(batch.put, *entries), maxlen=0)
        return batch

    def snapshot(self) -> StoreView:
        return BlockCursor(self.db, self._translated)

    def close(self) -> None:
        if self.closed:
            return
        try:
            if not self._read_only:
                with self._translated:
                    self.db.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close without making the newest writes durable."""
        if not self.closed:
            self.closed = True
            close_quietly(self.db, self._translated.what)


class RocksStores:
    """A `ports.Stores` with one RocksDB for each partition and one memory budget for all.

    About `count` of them are open at once. With `read_only`, `open` raises `NotFound` if there is no store, and nothing
    changes.
    """

    def __init__(self, path: Path, settings: LogSettings, *, count: int = 16, read_only: bool = False) -> None:
        self._path = path
        self._files_max = files_of_store(files_limit(), count)
        self._read_only = read_only
        self._cache = Cache(settings.store_cache_bytes)
        self._buffers = WriteBufferManager.new_write_buffer_manager_with_cache(
            settings.store_write_buffer_bytes, False, self._cache
        )
        self._open: dict[int, RocksStore] = {}

    def _options(self) -> Options:
        table = BlockBasedOptions()
        table.set_block_cache(self._cache)
        # Most lookups of a commit are for new series: both filters answer those without a search.
        table.set_bloom_filter(10, False)
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_block_based_table_factory(table)
        options.set_memtable_whole_key_filtering(True)
        # A memtable takes its filter at once and its room by the block, used or not: of 64 stores that must be little, or
        # it fills the budget of all, which then writes files of a few KB all the time.
        options.set_memtable_prefix_bloom_ratio(0.02)  # 16 bits for each of 160,000 entries
        options.set_arena_block_size(256 * 2**10)
        options.set_write_buffer_manager(self._buffers)
        options.set_write_buffer_size(16 * 2**20)
        options.set_compression_type(DBCompressionType.none())
        options.set_max_open_files(self._files_max)
        options.set_keep_log_file_num(2)
        options.set_max_background_jobs(2)
        return options

    def open(self, partition: int) -> Store:
        store = self._open.get(partition)
        if store is not None and not store.closed:
            raise Unavailable(f"store {partition} is open already")
        self._open[partition] = store = RocksStore(
            self._path / str(partition), self._options(), partition=partition, read_only=self._read_only
        )
        return store

    def destroy(self, partition: int) -> None:
        store = self._open.pop(partition, None)
        if store is not None:
            store.abandon()
        path = self._path / str(partition)
        with TranslatedErrors(f"store {path}"):
            if path.exists():  # a crash half way leaves a store that can't be opened, which is destroyed again
                shutil.rmtree(path)

    def set_aside(self, partition: int, reason: str) -> str:
        store = self._open.pop(partition, None)
        if store is not None:
            store.close()
        path = self._path / str(partition)
        kept = aside(path, SystemClock().now_ms())
        with translate_os(f"store {path}"):
            replace_small(path / _REASON, f"{reason}\n".encode(errors="replace"), new=path / f"{_REASON}.new")
            path.rename(kept)
        return str(kept)

    def close(self) -> None:
        failed: PipelineError | None = None
        for store in self._open.values():
            try:
                store.close()
            except PipelineError as error:
                failed = error
        self._open.clear()
        if failed is not None:
            raise failed
