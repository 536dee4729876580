"""No step of a worker keeps its other threads, which send its heartbeats in Python, waiting for long."""

from __future__ import annotations

import gc
import threading
from functools import partial
from pathlib import Path

import pytest
from rocksdict import Options

import tests.bench.data as data
from pipeline.adapters.rocks import RocksStore
from pipeline.core.codec import decode_batch
from tests.bench.heartbeat import LARGEST_BATCH_ENTRIES, Worker, held_ms
from tests.support import wait_until

_TRIES = 4
_SHARE_MAX = 0.65


@pytest.mark.long
@pytest.mark.timeout(120)
def test_no_step_holds_up_other_threads(tmp_path: Path) -> None:
    """The largest batch is folded, committed, merged and restored in steps much shorter than one sort of its series.

    Such a sort takes about 200 ms. The steps take up to half of it; those that work on all series at once take as long.
    """
    count = LARGEST_BATCH_ENTRIES
    (_, new), (_, known) = data.batches(2 * count, count, 1, count)
    suffixes = decode_batch(new).groups[0].suffixes
    whole_ms = float("inf")
    held: dict[str, tuple[float, str]] = {}
    for number in range(_TRIES):
        whole_ms = min(whole_ms, held_ms(partial(sorted, suffixes))[0])
        worker = Worker(tmp_path / f"{number}a")
        again = Worker(tmp_path / f"{number}b", worker.log)
        worker.partition.start()
        steps = {"new series": worker.fold, "known series": worker.fold, "restore": again.partition.start}
        for (name, step), value in zip(steps.items(), (new, known, None), strict=True):
            if value is not None:
                worker.publish([(0, value)])
            gc.collect()
            held[name] = min(held.get(name, (1e9, "")), held_ms(step))
        assert worker.partition.task.position.next_offset == again.partition.task.position.next_offset
        for it in (worker, again):
            it.close()
        if all(took_ms < whole_ms * _SHARE_MAX for took_ms, _ in held.values()):
            return
    found = "\n".join(f"{name}: {took_ms:.0f} ms at\n{where}" for name, (took_ms, where) in held.items())
    raise AssertionError(f"the sort takes {whole_ms:.0f} ms\n{found}")


def test_a_slow_disk_holds_up_only_the_writer(tmp_path: Path) -> None:
    """Other threads run while RocksDB takes no writes because the disk is slow, and everything that was written is there."""
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(64 * 1024)
    options.set_ratelimiter(128 * 1024, 100_000, 10)  # bytes a second
    store = RocksStore(tmp_path / "store", options)
    entries = {b"%08d" % n: b"x" * 1_000 for n in range(600)}
    keys = [*entries]

    def write() -> None:
        for start in range(0, len(keys), 20):
            some = keys[start : start + 20]
            store.write(some, [entries[key] for key in some])

    thread = threading.Thread(target=write)
    thread.start()
    try:
        # It takes writes again at the end of the very call that waits for it, so who sees this runs beside that call.
        wait_until(lambda: store.db.property_int_value("rocksdb.is-write-stopped"), "a stall", 30)
    finally:
        thread.join(60)
    assert store.get(keys) == [*entries.values()]
    store.close()
