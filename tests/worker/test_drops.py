"""Drops of many series: each has a commit of its own."""

from __future__ import annotations

from concurrent.futures import Future

from pipeline.adapters.memory import MemoryStores
from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Control, Definition, Group, prefix_end, series_prefix, series_suffix
from pipeline.ports import Message
from pipeline.settings import WorkerSettings
from pipeline.topics import DELTAS
from pipeline.worker.active import ActivePartition
from tests.support import HandClock
from tests.worker.support import ChangingLog, new_partition

VIEWS = [Definition(name, "sum", ("n",)) for name in ("one", "two", "three")]
SERIES = 30


def filled(definition: Definition, sequence: int, count: int) -> bytes:
    suffixes = [series_suffix((f"series {number}",)) for number in range(count)]
    return encode_batch(Batch("p", 0, 0, sequence, 0, 0, [Group(definition, suffixes, [1] * count)]))


def dropped(definition: Definition, sequence: int) -> bytes:
    return encode_batch(Batch("p", 0, 0, sequence, 0, 0, [], controls=[Control("drop", definition.view)]))


def test_each_drop_has_a_commit_of_its_own() -> None:
    """No commit has the tombstones of two drops that come in one fetch with deltas between them, and nothing is left out."""
    clock = HandClock()
    log, stores = ChangingLog(1, clock), MemoryStores()
    partition = new_partition(0, log, stores, clock, settings=WorkerSettings(overlay_entries_max=SERIES))
    partition.start()
    active = ActivePartition(partition, 60.0)
    active.end_start()
    active.bound.entries_max = 10**6
    values = [filled(it, number, SERIES) for number, it in enumerate(VIEWS)]
    for number, it in enumerate(VIEWS):
        values += [dropped(it, 3 + 2 * number), filled(it, 4 + 2 * number, 1)]
    log.append([Message(DELTAS, 0, None, value) for value in values], timeout_s=1)
    reader = log.reader(DELTAS)
    reader.assign({0: 0})
    for records in reader.poll(record_count_max=1_000, bytes_max=2**30, timeout_s=0):
        active.take(records)
    tombstones = []
    while active.fold() or partition.task.dirty:
        active.freeze()
        active.begin_commit(Future())
        tombstones.append(partition.commit().values.count(None))
        active.end_commit()
    assert partition.task.next_offset == len(values)
    assert max(tombstones) <= SERIES + 1, tombstones
    assert sum(tombstones) >= SERIES * 2, "the first can be folded with what it drops"
    for it in VIEWS:
        prefix = series_prefix(it)
        assert len([*partition.store.scan(prefix, prefix_end(prefix))]) == 1
