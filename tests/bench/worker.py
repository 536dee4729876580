"""Entries that a CPU second folds, commits and restores: embedded log, RocksDB stores, everything in one process."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rocksdict import WriteBatch

import pipeline.topics as topics
import tests.bench.data as data
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.adapters.rocks import RocksStore, RocksStores
from pipeline.core.codec import decode_batch
from pipeline.ports import Log, Message
from pipeline.settings import LogSettings, WorkerSettings
from pipeline.topics import CHANGELOG, DELTAS
from pipeline.worker.loop import WorkerLoop
from pipeline.worker.partition import OwnedPartition
from tests.bench.measure import Figure, Row, at_least, cpu_seconds

_UNIT = "entries per CPU s"
_WORKER = WorkerSettings(commit_interval_ms=200)
HouseMaker = Callable[[], AbstractContextManager["House"]]


class House:
    """Log, stores and worker: a pipeline without its HTTP server. `path` is for the stores."""

    def __init__(
        self,
        path: Path,
        log: Log,
        *,
        batch_entries: int = data.BATCH_ENTRIES,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.settle = settle
        """Let the log do now what it would do later, at a cost that is not the worker's."""
        self._batch_entries = batch_entries
        self.clock = SystemClock()
        self.settings = LogSettings(data=str(path))
        self.path = path
        self.log = log
        self.partition_count = self.log.partition_count(DELTAS)

    def publish(self, entry_count: int, series_count: int) -> list[bytes]:
        """Put deltas into the log, as `data.batches` makes them."""
        values = []
        for partition, value in data.batches(entry_count, series_count, self.partition_count, self._batch_entries):
            (result,) = self.log.append([Message(DELTAS, partition, None, value)], timeout_s=10)
            assert isinstance(result, int), result
            values.append(value)
        self.settle()
        return values

    def work(self) -> None:
        """Restore, fold everything that was published, commit it, stop."""
        stores = RocksStores(self.path / "stores", self.settings)
        partitions = [
            OwnedPartition(
                number, log=self.log, stores=stores, clock=self.clock, settings=_WORKER, delete_retention_ms=86_400_000
            )
            for number in range(self.partition_count)
        ]
        failed: list[BaseException] = []
        ends = self.log.end_offsets(DELTAS)
        loop = WorkerLoop(partitions.__getitem__, log=self.log, clock=self.clock, settings=_WORKER, on_fatal=failed.append)
        loop.assign(range(self.partition_count))
        loop.start()
        while not (loop.ready and all(it.task.position.next_offset == ends[it.number] for it in partitions)):
            if failed:
                raise failed[0]
            time.sleep(0.02)
        loop.stop()
        stores.close()

    def entries(self) -> list[list[tuple[bytes, bytes]]]:
        """Return the entries of the changelog, by partition."""
        reader = self.log.reader(CHANGELOG)
        ends, next_offsets = self.log.end_offsets(CHANGELOG), dict.fromkeys(range(self.partition_count), 0)
        reader.assign(next_offsets)
        out: list[list[tuple[bytes, bytes]]] = [[] for _ in range(self.partition_count)]
        while any(next_offsets[number] < end for number, end in ends.items()):
            for records in reader.poll(record_count_max=20_000, bytes_max=2**26, timeout_s=1):
                next_offsets[records.partition] = records.next_offset
                for key, value in zip(records.keys, records.values, strict=True):
                    if key is not None and value is not None:
                        out[records.partition].append((key, value))
        reader.close()
        return out


@contextmanager
def embedded() -> Iterator[House]:
    """Return a new house on the embedded log, in a temporary folder."""
    with TemporaryDirectory(prefix="pipeline-bench-") as folder:
        log = EmbeddedLog(Path(folder) / "log", topics.load(), LogSettings(data=folder), SystemClock())
        try:
            yield House(Path(folder), log, settle=log.flush)
        finally:
            log.close()


def _fold_bare(batches: list[bytes]) -> None:
    """Do the least that a worker must: decode, and add up in a dict."""
    states: dict[bytes, float] = {}
    for value in batches:
        for group in decode_batch(value).groups:
            get = states.get
            for suffix, state in zip(group.suffixes, group.states, strict=True):
                states[suffix] = get(suffix, 0) + state


def fold(name: str, house: HouseMaker, entry_count: int, series_count: int, least: float) -> Row:
    """Fold and commit batches that were published before; against decoding and adding up the same batches."""
    with house() as made:
        batches = made.publish(entry_count, series_count)
        bare = cpu_seconds(lambda: _fold_bare(batches))
        batches.clear()
        seconds = cpu_seconds(made.work)
    return at_least(
        name,
        Figure(entry_count / seconds, _UNIT),
        Figure(entry_count / bare, _UNIT, "decode the batches, add up in a dict; nothing stored"),
        least,
    )


def fold_unique(quick: bool) -> list[Row]:
    """Fold entries that are each a new series, so that nothing merges."""
    count = 20_000 if quick else 1_000_000
    return [fold("worker, unique series", embedded, count, count, 200_000)]


def fold_repeated(quick: bool) -> list[Row]:
    """Fold entries of which each series comes ten times."""
    count = 20_000 if quick else 1_000_000
    return [fold("worker, each series ten times", embedded, count, count // 10, 500_000)]


def _put_bare(store: RocksStore, entries: list[tuple[bytes, bytes]]) -> None:
    """Do the least that a restore must: put the entries into RocksDB, in their order."""
    for start in range(0, len(entries), 20_000):
        batch = WriteBatch(raw_mode=True)
        for key, value in entries[start : start + 20_000]:
            batch.put(key, value)
        store.db.write(batch, store._write_options)


def restore(quick: bool) -> list[Row]:
    """Restore deleted stores from the changelog, against putting the same entries into RocksDB."""
    return [measure_restore("restore", embedded, 20_000 if quick else 1_000_000)]


def measure_restore(name: str, house: HouseMaker, count: int) -> Row:
    """Measure a restore on any log, as `restore` does."""
    with house() as made:
        made.publish(count, count)
        made.work()
        shutil.rmtree(made.path / "stores")
        made.settle()
        entries = made.entries()
        stores = RocksStores(made.path / "bare", made.settings)
        opened = [stores.open(number) for number in range(made.partition_count)]

        def bare() -> None:
            for store, some in zip(opened, entries, strict=True):
                assert isinstance(store, RocksStore)
                _put_bare(store, some)
            stores.close()

        bare_seconds = cpu_seconds(bare)
        total = sum(map(len, entries))
        entries.clear()
        seconds = cpu_seconds(made.work)
    return at_least(
        name,
        Figure(total / seconds, _UNIT),
        Figure(total / bare_seconds, _UNIT, "put the entries into RocksDB with the same options; nothing read"),
        400_000,
    )
