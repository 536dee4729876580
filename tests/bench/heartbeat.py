"""Time for which a worker's heaviest steps hold up its other threads, of which the heartbeats' are in Python."""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import tests.bench.data as data
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.memory import MemoryLog
from pipeline.adapters.rocks import RocksStores
from pipeline.core.codec import decode_batch
from pipeline.ports import Message
from pipeline.settings import LogSettings, WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.partition import OwnedPartition
from tests.bench.measure import Figure, Row, at_most

_BEAT_S = 0.01
LARGEST_BATCH_ENTRIES = 370_000
"""Number of entries that fill 16 MiB, the largest batch."""
_LATE_MAX_MS = 200.0
_WHAT = "latest heartbeat beside a loop of Python, which gives way every 5 ms"


def latest_ms(work: Callable[[], object]) -> float:
    """Return by how many ms at most a thread that wants to run every 10 ms comes too late, while `work` runs here."""
    late_s = [0.0]
    begun, done = threading.Event(), threading.Event()

    def beat() -> None:
        due_s = time.monotonic() + _BEAT_S
        begun.set()
        while not done.is_set():
            time.sleep(max(0.0, due_s - time.monotonic()))
            now_s = time.monotonic()
            late_s[0] = max(late_s[0], now_s - due_s)
            due_s = now_s + _BEAT_S

    thread = threading.Thread(target=beat)
    thread.start()
    begun.wait()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return late_s[0] * 1000


def held_ms(work: Callable[[], object], thread_id: int | None = None) -> tuple[float, str]:
    """Return the most ms for which `work` keeps a thread waiting that wants to run all the time, and the place.

    The time is CPU time of the working thread, this one or another, so that other load of the machine matters little. A wait
    that uses no CPU, and keeps the others waiting all the same, is not seen.
    """
    here = threading.get_ident() if thread_id is None else thread_id
    clock = time.pthread_getcpuclockid(here)
    longest = (0.0, "")
    begun, done = threading.Event(), threading.Event()

    def watch() -> None:
        nonlocal longest
        last_s = time.clock_gettime(clock)
        begun.set()
        while not done.is_set():
            time.sleep(0.0005)
            now_s = time.clock_gettime(clock)
            if now_s - last_s > longest[0]:
                longest = now_s - last_s, "".join(traceback.format_stack(sys._current_frames()[here], limit=3))
            last_s = now_s

    thread = threading.Thread(target=watch)
    thread.start()
    begun.wait()
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(0.001)
    try:
        work()
    finally:
        sys.setswitchinterval(interval_s)
        done.set()
        thread.join()
    return longest[0] * 1000, longest[1]


def _python_loop() -> None:
    end_s = time.monotonic() + 0.5
    while time.monotonic() < end_s:
        pass


class Worker:
    """One partition on a log in memory and a RocksDB store, with the limits that a worker has by default."""

    def __init__(self, path: Path, log: MemoryLog | None = None) -> None:
        clock = SystemClock()
        self.log = log or MemoryLog(dict.fromkeys((DELTAS, CHANGELOG, DEAD_LETTERS), 1), clock.now_ms)
        self.stores = RocksStores(path, LogSettings(data=str(path)))
        self.partition = OwnedPartition(
            0,
            log=self.log,
            stores=self.stores,
            clock=clock,
            settings=WorkerSettings(),
            delete_retention_ms=86_400_000,
        )

    def publish(self, batches: Iterable[tuple[int, bytes]]) -> None:
        for _, value in batches:
            self.log.append([Message(DELTAS, 0, None, value)], timeout_s=1)

    def fold(self) -> None:
        """Fold all published batches, with a commit whenever the overlay is full, and at the end."""
        settings = WorkerSettings()
        reader = self.log.reader(DELTAS)
        reader.assign({0: self.partition.task.next_offset})
        while fetched := reader.poll(
            record_count_max=settings.fetch_record_count_max, bytes_max=settings.fetch_bytes_max, timeout_s=0
        ):
            self.partition.fold(fetched[0])
            if self.partition.task.full:
                self.partition.commit()
        if self.partition.task.dirty:
            self.partition.commit()

    def close(self) -> None:
        self.partition.close()
        self.stores.close()


def heartbeat(quick: bool) -> list[Row]:
    """Measure the steps in which a worker does most at once, at its default limits; for each the best of some runs."""
    scale = 50 if quick else 1
    baseline = min(latest_ms(_python_loop) for _ in range(1 if quick else 3))
    best: dict[str, float] = {}

    def measure(name: str, work: Callable[[], object]) -> None:
        gc.collect()
        best[name] = min(best.get(name, float("inf")), latest_ms(work))

    entry_count = LARGEST_BATCH_ENTRIES // scale
    (_, largest), *_ = data.batches(entry_count, entry_count, 1, entry_count)
    series_count = 200_000 // scale
    batches = [*data.batches(2 * series_count, series_count, 1)]
    new, known = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    for _ in range(1 if quick else 5):
        measure(f"decode a batch of {len(largest) / 2**20:.0f} MiB", partial(decode_batch, largest))
        with TemporaryDirectory(prefix="pipeline-bench-") as folder:
            worker = Worker(Path(folder) / "a")
            worker.partition.start()
            worker.publish(new)
            measure(f"fold and commit {series_count:,} new series", worker.fold)
            worker.publish(known)
            measure("the same series again", worker.fold)
            worker.close()
            again = Worker(Path(folder) / "b", worker.log)
            measure(f"restore {series_count:,} series", again.partition.start)
            again.close()
    return [
        at_most(f"heartbeats while: {name}", Figure(late, "ms late"), Figure(baseline, "ms late", _WHAT), _LATE_MAX_MS)
        for name, late in best.items()
    ]
