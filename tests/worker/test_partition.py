"""A partition notices when a topic under it is another one, and writes dead letters that their topic can take."""

from __future__ import annotations

import msgspec
import pytest

import pipeline.metrics as m
from pipeline.adapters.memory import MemoryStores
from pipeline.core.record import POSITION_KEY, STORE_META_KEY, definition_key, producer_key
from pipeline.core.task import DeadLetter
from pipeline.errors import LogCorrupt, NotReady, RecordsLost, StoreCorrupt
from pipeline.ports import Message
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.follower import read_meta, read_position
from tests.support import HandClock
from tests.worker.support import ChangingLog, Recorder, Worker, fold_all, new_partition, series_of


@pytest.fixture
def worker() -> Worker:
    clock = HandClock()
    return Worker(ChangingLog(1, clock), clock)


def again(worker: Worker, *, stores: MemoryStores | None = None, accept_loss: bool = False, metrics: Recorder | None = None):  # type: ignore[no-untyped-def]
    """Another process, on the same stores unless others are given."""
    settings = WorkerSettings(accept_loss=accept_loss)
    partition = new_partition(0, worker.log, stores or worker.stores, worker.clock, settings=settings, metrics=metrics)
    partition.start()
    worker.partitions[0] = partition
    return partition


def test_a_commit_says_of_which_topics_it_is(worker: Worker) -> None:
    """The position names the deltas, the store its changelog."""
    worker.commit(0, {"a": 1})
    store = worker.partitions[0].store
    assert read_position(store).source_id == "first"
    assert read_meta(store).topic_id == "first"
    assert read_meta(store).changelog_next_offset == worker.log.watermarks(CHANGELOG, 0).end_offset


@pytest.mark.parametrize("length", [0, 1, 2, 5])
def test_deltas_made_anew_are_not_taken_for_the_old_ones(worker: Worker, length: int) -> None:
    """However long the new topic is; with `accept_loss` all of it is folded, from its start, and once."""
    worker.commit(0, {"a": 1})
    worker.commit(0, {"a": 1})
    worker.log.make_anew(DELTAS, "second")
    for _ in range(length):
        worker.append(0, {"a": 1})
    with pytest.raises(RecordsLost, match=r"made anew.*--accept-loss"):
        again(worker)
    with pytest.raises(RecordsLost, match="made anew"):
        again(worker, stores=MemoryStores())
    partition = again(worker, accept_loss=True)
    fold_all(worker.log, partition)
    assert partition.task.dirty
    partition.commit()
    assert not partition.task.dirty
    assert read_position(partition.store) == partition.task.position
    assert partition.task.position.source_id == "second"
    assert not again(worker).task.dirty
    partition = worker.partitions[0]
    assert series_of(partition.store) == {"a": 2 + length}


def test_deltas_that_end_before_the_position(worker: Worker) -> None:
    """Were truncated: what is written there next is not what was folded."""
    worker.commit(0, {"a": 1})
    worker.commit(0, {"a": 1})
    worker.log.cut(DELTAS, 0, 1)
    with pytest.raises(RecordsLost, match="ends at 1"):
        again(worker)


def test_a_position_from_before_topics_had_ids(worker: Worker) -> None:
    """Is taken for one of this topic; the next commit names it."""
    worker.log.ids[DELTAS] = ""
    worker.commit(0, {"a": 1})
    worker.log.ids[DELTAS] = "first"
    again(worker)
    worker.commit(0, {"a": 1})
    assert read_position(worker.partitions[0].store).source_id == "first"


def test_a_changelog_made_anew_under_a_worker(worker: Worker) -> None:
    """Its commit comes out below the last one: it says so, writes nothing to its store, and the process ends."""
    for _ in range(3):
        worker.commit(0, {"a": 1})
    store = worker.partitions[0].store
    meta = read_meta(store)
    worker.log.make_anew(CHANGELOG, "second")
    with pytest.raises(LogCorrupt, match=r"went back from 10 to 0: it was made anew or truncated"):
        worker.commit(0, {"a": 1})
    assert series_of(store) == {"a": 3}
    assert read_meta(store) == meta


def test_the_first_commit_of_a_process_notices_it_too(worker: Worker) -> None:
    """It knows from its restore how far the changelog went."""
    for _ in range(3):
        worker.commit(0, {"a": 1})
    again(worker)
    worker.log.cut(CHANGELOG, 0, 4)
    with pytest.raises(LogCorrupt, match=r"went back from 10 to"):
        worker.commit(0, {"a": 1})


def test_a_store_of_another_changelog_is_made_anew(worker: Worker) -> None:
    """From what the present one holds: nothing, so all that the deltas still hold is folded again, once."""
    metrics = Recorder()
    worker.commit(0, {"a": 1})
    worker.commit(0, {"a": 1})
    worker.log.make_anew(CHANGELOG, "second")
    partition = again(worker, metrics=metrics)
    assert metrics.of(m.STORES_REBUILT, 0) == 1
    assert partition.task.next_offset == 0
    fold_all(worker.log, partition)
    partition.commit()
    assert series_of(partition.store) == {"a": 2}
    assert read_meta(partition.store).topic_id == "second"


def letters(worker: Worker) -> list[DeadLetter]:
    rows = worker.log._partition(DEAD_LETTERS, 0).rows
    return [msgspec.msgpack.decode(row.value or b"", type=DeadLetter) for row in rows]


@pytest.mark.parametrize("key", [STORE_META_KEY, POSITION_KEY, definition_key("v"), producer_key("p")])
def test_a_store_of_a_newer_format_is_made_anew(worker: Worker, key: bytes) -> None:
    """It is a copy: what is no older than the changelog, and can't be read, is damaged."""
    worker.commit(0, {"a": 1})
    newer = msgspec.msgpack.encode([2, 0]) if key == STORE_META_KEY else b"\x02newer"
    worker.partitions[0].store.write([key], [newer])
    assert series_of(again(worker).store) == {"a": 1}


def test_a_changelog_of_a_newer_format_is_left_as_it_is(worker: Worker) -> None:
    """The start fails naming both formats, as often as it is tried, whatever is in the store."""
    worker.commit(0, {"a": 1})
    worker.log.append([Message(CHANGELOG, 0, POSITION_KEY, b"\x02newer")], timeout_s=1)
    for _ in range(2):
        with pytest.raises(StoreCorrupt, match="format 2, and this program reads 1"):
            again(worker)


def test_a_dead_letter_that_is_too_large_goes_without_its_bytes(worker: Worker) -> None:
    """It says how many they were; its neighbours are whole, and the partition goes on."""
    worker.log.bytes_max = 200
    partition = worker.partition(0)
    sizes = (10, 150, 200, 5_000)  # a letter's reason takes its place, too
    worker.log.append([Message(DELTAS, 0, None, b"x" * size) for size in sizes], timeout_s=1)
    worker.append(0, {"a": 1})
    fold_all(worker.log, partition)
    partition.commit()
    found = letters(worker)
    assert [letter.offset for letter in found] == [0, 1, 2, 3]
    assert [letter.value and len(letter.value) for letter in found] == [10, None, None, None]
    assert found[3].reason.endswith("left out: its 5000 bytes, too many for the dead-letter topic")
    assert "left out" not in found[0].reason
    assert all(len(row.value or b"") <= 200 for row in worker.log._partition(DEAD_LETTERS, 0).rows)
    assert series_of(partition.store) == {"a": 1}


def test_a_partition_that_was_not_started() -> None:
    """Has no store, and closing it is fine."""
    clock = HandClock()
    partition = new_partition(0, ChangingLog(1, clock), MemoryStores(), clock)
    assert not partition.started
    with pytest.raises(NotReady):
        _ = partition.store
    partition.close()
