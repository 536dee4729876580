"""A partition notices when a topic under it is another one, and writes dead letters that their topic can take."""

from __future__ import annotations

from itertools import count

import msgspec
import pytest

import pipeline.metrics as m
from pipeline.adapters.memory import MemoryStores
from pipeline.core.codec import FORMAT, DeadLetter, decode_letter, encode_batch, encode_position
from pipeline.core.record import (
    POSITION_KEY,
    STORE_META_KEY,
    Batch,
    Definition,
    Group,
    Position,
    definition_key,
    producer_key,
    series_suffix,
)
from pipeline.errors import Discontinuous, LogCorrupt, NewerFormat, NotReady, RecordsLost, StoreAhead
from pipeline.ports import Message
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.follower import StoreMeta, read_meta, read_position, write_entries
from tests.support import HandClock
from tests.worker.support import VIEW, ChangingLog, Recorder, Worker, fold_all, new_partition, series_of


@pytest.fixture
def worker() -> Worker:
    clock = HandClock()
    return Worker(ChangingLog(1, clock), clock)


def again(worker: Worker, *, stores: MemoryStores | None = None, accept_loss: bool = False, metrics: Recorder | None = None):  # type: ignore[no-untyped-def]
    """Return another process, on the same stores unless others are given."""
    settings = WorkerSettings(accept_loss=accept_loss)
    partition = new_partition(0, worker.log, stores or worker.stores, worker.clock, settings=settings, metrics=metrics)
    partition.start()
    worker.partitions[0] = partition
    return partition


def test_a_commit_says_of_which_topics_it_is(worker: Worker) -> None:
    """The position names the deltas topic by its id, and the store its changelog."""
    worker.commit(0, {"a": 1})
    store = worker.partitions[0].store
    assert read_position(store).source_id == "first"
    assert read_meta(store).topic_id == "first"
    assert read_meta(store).changelog_next_offset == worker.log.watermarks(CHANGELOG, 0).end_offset


@pytest.mark.parametrize("length", [0, 1, 2, 5])
def test_deltas_made_anew_are_not_taken_for_the_old_ones(worker: Worker, length: int) -> None:
    """A new topic's records are not taken for the old one's, however many; with `accept_loss` all are folded once."""
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
    assert read_position(partition.store).next_offset == partition.task.position.next_offset
    assert partition.task.position.source_id == "second"
    assert not again(worker).task.dirty
    partition = worker.partitions[0]
    assert series_of(partition.store) == {"a": 2 + length}


@pytest.mark.parametrize("folded_before", [0, 1])
def test_deltas_made_anew_under_a_worker(worker: Worker, folded_before: int) -> None:
    """Records of a new topic that is as long as the old one are never committed, nor anything folded with them."""
    worker.commit(0, {"a": 1})
    worker.commit(0, {"a": 1})
    partition = worker.partitions[0]
    for _ in range(folded_before):
        worker.append(0, {"a": 1})
        fold_all(worker.log, partition)
    worker.log.make_anew(DELTAS, "second")
    for _ in range(4):
        worker.append(0, {"b": 1})
    fold_all(worker.log, partition)
    assert partition.task.dirty
    end_offset = worker.log.watermarks(CHANGELOG, 0).end_offset
    with pytest.raises(LogCorrupt, match="was made anew while it was folded"):
        partition.commit()
    assert worker.log.watermarks(CHANGELOG, 0).end_offset == end_offset
    assert series_of(partition.store) == {"a": 2}
    partition = again(worker, accept_loss=True)
    fold_all(worker.log, partition)
    partition.commit()
    assert series_of(partition.store) == {"a": 2, "b": 4}


def test_deltas_that_end_before_the_position(worker: Worker) -> None:
    """Deltas that end before the position were truncated, and later records there are not the folded ones."""
    worker.commit(0, {"a": 1})
    worker.commit(0, {"a": 1})
    worker.log.cut(DELTAS, 0, 1)
    with pytest.raises(RecordsLost, match="ends at 1"):
        again(worker)


def test_a_position_from_before_topics_had_ids(worker: Worker) -> None:
    """A position without a topic id is taken for one of the present topic, and the next commit names it."""
    worker.log.ids[DELTAS] = ""
    worker.commit(0, {"a": 1})
    worker.log.ids[DELTAS] = "first"
    again(worker)
    worker.commit(0, {"a": 1})
    assert read_position(worker.partitions[0].store).source_id == "first"


def test_a_changelog_made_anew_under_a_worker(worker: Worker) -> None:
    """A commit whose offsets are below the last one's is reported, writes nothing to the store, and ends the process."""
    for _ in range(3):
        worker.commit(0, {"a": 1})
    store = worker.partitions[0].store
    meta = read_meta(store)
    worker.log.make_anew(CHANGELOG, "second")
    with pytest.raises(Discontinuous, match=r"went back from 11 to 0: it was made anew or truncated"):
        worker.commit(0, {"a": 1})
    assert series_of(store) == {"a": 3}
    assert read_meta(store) == meta


def test_the_first_commit_of_a_process_notices_it_too(worker: Worker) -> None:
    """A process' first commit notices a changelog made anew, as the restore has seen its end."""
    for _ in range(3):
        worker.commit(0, {"a": 1})
    again(worker)
    worker.log.cut(CHANGELOG, 0, 4)
    with pytest.raises(Discontinuous, match=r"went back from 12 to 4"):
        worker.commit(0, {"a": 1})


def test_a_store_that_is_ahead_is_set_aside(worker: Worker) -> None:
    """A store ahead of its changelog is never deleted: a person decides; then the changelog counts, the store is kept."""
    for _ in range(3):
        worker.commit(0, {"a": 1})
    before = dict(worker.stores.open(0).scan(b"", b"\xff\xff"))
    worker.log.cut(CHANGELOG, 0, 8)
    for end_offset in (8, 9):  # with the record of the owner that noticed it first
        with pytest.raises(StoreAhead, match=rf"partition 0: .* up to 11, but it ends at {end_offset}; .*--accept-loss"):
            again(worker)
        assert dict(worker.stores.open(0).scan(b"", b"\xff\xff")) == before
    metrics = Recorder()
    partition = again(worker, accept_loss=True, metrics=metrics)
    assert [dict(store.scan(b"", b"\xff\xff")) for store in worker.stores.aside.values()] == [before]
    assert (metrics.of(m.STORES_SET_ASIDE, 0), metrics.of(m.STORES_REBUILT, 0)) == (1, 0)
    assert series_of(partition.store) == {"a": 2}
    fold_all(worker.log, partition)
    partition.commit()
    assert series_of(partition.store) == {"a": 3}, "the deltas are there still"
    assert series_of(again(worker).store) == {"a": 3}


def test_a_changelog_that_lost_its_beginning(worker: Worker) -> None:
    """A changelog without its beginning restores nothing, so the store stays, whatever was decided."""
    for _ in range(3):
        worker.commit(0, {"a": 1})
    behind = MemoryStores()
    behind.open(0).write(*zip(*worker.stores.open(0).scan(b"", b"\xff\xff"), strict=True))
    write_entries(behind.open(0), [], [], StoreMeta(changelog_next_offset=4, topic_id="first"))
    worker.log.truncate(CHANGELOG, 0, 7)
    for accept_loss in (False, True):
        with pytest.raises(RecordsLost, match="changelog-0: 3 records from 4 on are gone"):
            again(worker, stores=behind, accept_loss=accept_loss)
    assert series_of(behind.open(0)) == {"a": 3}


def test_a_store_of_another_changelog_is_set_aside(worker: Worker) -> None:
    """Nothing in the present changelog was folded, so all deltas that are still there are folded again, once."""
    metrics = Recorder()
    worker.commit(0, {"a": 1})
    worker.commit(0, {"a": 1})
    worker.log.make_anew(CHANGELOG, "second")
    with pytest.raises(StoreAhead, match=r"of another changelog, 'first', than there is now, 'second'; .*--accept-loss"):
        again(worker)
    partition = again(worker, accept_loss=True, metrics=metrics)
    assert metrics.of(m.STORES_SET_ASIDE, 0) == 1
    assert partition.task.next_offset == 0
    fold_all(worker.log, partition)
    partition.commit()
    assert series_of(partition.store) == {"a": 2}
    assert read_meta(partition.store).topic_id == "second"


def test_a_store_that_is_ahead_stays_ahead(worker: Worker) -> None:
    """A store stays ahead, however much the owners that noticed it have written to what is left of the changelog."""
    for _ in range(3):
        worker.commit(0, {"a": 1})
    store = worker.partitions[0].store
    worker.log.cut(CHANGELOG, 0, 5)
    for number in range(20):
        with pytest.raises(StoreAhead, match="but it ends at" if number <= 5 else "not hold the last commit|another record"):
            again(worker)
        assert series_of(store) == {"a": 3}


def letters(worker: Worker) -> list[DeadLetter]:
    rows = worker.log.partition(DEAD_LETTERS, 0).rows
    return [decode_letter(row.value or b"") for row in rows]


@pytest.mark.parametrize("key", [STORE_META_KEY, POSITION_KEY, definition_key(Definition("v", "sum")), producer_key("p")])
def test_a_store_of_a_newer_format_is_made_anew(worker: Worker, key: bytes) -> None:
    """A store is a copy: one that can't be read, whatever its format, is rebuilt."""
    worker.commit(0, {"a": 1})
    newer = msgspec.msgpack.encode([2, 0]) if key == STORE_META_KEY else b"\x02newer"
    worker.partitions[0].store.write([key], [newer])
    assert series_of(again(worker).store) == {"a": 1}


def test_a_changelog_of_a_newer_format_is_left_as_it_is(worker: Worker) -> None:
    """The start fails naming both formats, as often as it is tried, whatever is in the store."""
    worker.commit(0, {"a": 1})
    later = bytes((FORMAT + 1,))
    worker.log.append([Message(CHANGELOG, 0, POSITION_KEY, later + b"noise")], timeout_s=1)
    end_offset = again(worker)._begin
    position = Position(1, 1, 1, begin_offset=end_offset, previous_end_offset=5)
    worker.log.append([Message(CHANGELOG, 0, POSITION_KEY, later + encode_position(position)[1:])], timeout_s=1)
    for _ in range(2):
        with pytest.raises(NewerFormat, match=f"format {later[0]}, and this program reads {FORMAT}"):
            again(worker)


def test_a_dead_letter_that_is_too_large_goes_without_its_bytes(worker: Worker) -> None:
    """The letter says how many bytes were left out; its neighbours are whole, and the partition goes on."""
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
    assert all(len(row.value or b"") <= 200 for row in worker.log.partition(DEAD_LETTERS, 0).rows)
    assert series_of(partition.store) == {"a": 1}


def test_a_partition_that_was_not_started() -> None:
    """A partition that was not started has no store, and can be closed."""
    clock = HandClock()
    partition = new_partition(0, ChangingLog(1, clock), MemoryStores(), clock)
    assert not partition.started
    with pytest.raises(NotReady):
        _ = partition.store
    partition.close()


class JumpingClock(HandClock):
    """A machine's clock that is set wrong: the wall clock jumps, the monotonic one does not."""

    ahead_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.ahead_ms


def test_a_machine_whose_clock_is_set_ahead_forgets_nobody() -> None:
    """A batch sent again counts once, although log, publishers and worker of one machine are all wrong by 8 days."""
    clock = JumpingClock()
    log = ChangingLog(1, clock)
    worker = Worker(log, clock)
    first = worker.batch(0, {"a": 1})
    log.append([Message(DELTAS, 0, None, first)], timeout_s=1)
    fold_all(log, worker.partition(0))
    worker.partition(0).commit()
    clock.ahead_ms = 8 * 86_400_000
    for _ in range(3):
        log.append([Message(DELTAS, 0, None, others(clock.now_ms()))], timeout_s=1)
        fold_all(log, worker.partition(0))
        worker.partition(0).commit()
    clock.ahead_ms = 0
    log.append([Message(DELTAS, 0, None, first)], timeout_s=1)
    fold_all(log, worker.partition(0))
    worker.partition(0).commit()
    assert series_of(worker.partition(0).store) == {"a": 1, "b": 3}
    clock.s += 8 * 86_400  # now it is true
    for _ in range(3):
        log.append([Message(DELTAS, 0, None, others(clock.now_ms()))], timeout_s=1)
        fold_all(log, worker.partition(0))
        worker.partition(0).commit()
    assert worker.partition(0).store.get([producer_key("p")]) == [None]


_others = count()


def others(now_ms: int) -> bytes:
    """Return a batch of a producer of its own."""
    group = Group(VIEW, [series_suffix(("b",))], [1])
    return encode_batch(Batch(f"other-{next(_others)}", 0, 0, 0, 0, now_ms, [group]))
