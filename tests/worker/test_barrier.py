"""A new owner begins where the last one ended, whatever end the log reports; a commit begins where it has to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.adapters.memory import MemoryStores
from pipeline.core import codec
from pipeline.core.answer import known
from pipeline.core.codec import encode_batch
from pipeline.core.letters import no_letter_key
from pipeline.core.record import EPOCH_NONE, FENCE_KEY, POSITION_KEY, Batch, Group, producer_key, series_suffix
from pipeline.errors import Discontinuous, NotReady, PipelineError, RecordsLost, StoreAhead, Unavailable
from pipeline.ports import Message, Transaction, Watermarks
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.figures import partition_status
from pipeline.worker.follower import Follower, read_meta, read_position
from pipeline.worker.partition import OwnedPartition
from pipeline.worker.restore import PATIENCE_S, RestoreProgress
from tests.support import HandClock
from tests.worker.support import VIEW, ChangingLog, fold_all, new_partition, series_of


class _Log(ChangingLog):
    """A log that shows everything once its readers have waited for `show_after_s`."""

    def __init__(self, clock: HandClock, *, marker_count: int) -> None:
        super().__init__(1, clock)
        self.marker_count = marker_count
        self.clock = clock
        self.show_at_s = float("inf")

    def waited(self, timeout_s: float) -> None:
        self.clock.s += timeout_s
        if self.clock.s >= self.show_at_s:
            self.show()


class _World:
    """One partition, one producer, and successive owners, each on a machine of its own."""

    def __init__(self, marker_count: int) -> None:
        self.clock = HandClock()
        self.log = _Log(self.clock, marker_count=marker_count)
        self.sequence = 0
        self.told: list[RestoreProgress] = []

    def send(self, **series: float) -> None:
        group = Group(VIEW, [series_suffix((name,)) for name in series], [*series.values()])
        batch = Batch("p", 0, 0, self.sequence, 0, self.clock.now_ms(), [group])
        self.sequence += 1
        self.log.append([Message(DELTAS, 0, None, encode_batch(batch))], timeout_s=1)

    def owner(
        self,
        stores: MemoryStores | None = None,
        stopping: Callable[[], bool] = lambda: False,
        *,
        accept_loss: bool = False,
    ) -> OwnedPartition:
        settings = WorkerSettings(commit_timeout_ms=5_000, accept_loss=accept_loss)
        partition = new_partition(0, self.log, stores or MemoryStores(), self.clock, settings=settings)
        self.told.clear()
        partition.start(self.told.append, stopping)
        return partition

    def fold(self, partition: OwnedPartition, count: int) -> None:
        """Fold so many of the next records."""
        reader = self.log.reader(DELTAS)
        reader.assign({0: partition.task.next_offset})
        (records,) = reader.poll(record_count_max=count, bytes_max=2**20, timeout_s=0)
        partition.fold(records)

    def end(self) -> int:
        return self.log.watermarks(CHANGELOG, 0).end_offset


@pytest.fixture(params=[0, 1], ids=["no markers", "markers"])
def world(request: pytest.FixtureRequest) -> _World:
    return _World(request.param)


def two_commits(world: _World) -> int:
    """Send three batches, and commit twice as a first owner; return where the changelog ended between the commits."""
    first = world.owner()
    world.send(x=1, y=1)
    fold_all(world.log, first)
    first.commit()
    end_offset = world.end()
    world.send(x=10)
    world.send(y=10)
    fold_all(world.log, first)
    first.commit()
    return end_offset


def go_on(world: _World) -> dict[str, float]:
    """Let two more owners take over: the first folds one record more, if there is one, and commits."""
    second = world.owner()
    assert second.task.next_offset == 3, "where the first owner's last commit ended"
    if second.task.next_offset < 3:
        world.fold(second, 1)
        second.commit()
    third = world.owner()
    fold_all(world.log, third)
    if third.task.dirty:
        third.commit()
    return series_of(third.store)


def test_a_deposed_leader_that_answers_with_an_old_end(world: _World, caplog: pytest.LogCaptureFixture) -> None:
    """A deposed leader reports the old end, and serves no reads beyond it, until metadata names the real leader."""
    end_offset = two_commits(world)
    world.log.hold_back(CHANGELOG, 0, end_offset)
    world.log.show_at_s = world.clock.s + 3 * PATIENCE_S
    with caplog.at_level(logging.WARNING):
        assert go_on(world) == {"x": 11, "y": 11}
    waits = [record for record in caplog.records if "is not ready" in record.message]
    assert 1 <= len(waits) <= 3, "said again, but not with every poll"
    assert f"can be read up to {end_offset} only" in waits[0].message


def test_a_hanging_transaction_that_pins_the_last_stable_offset(world: _World) -> None:
    """While the transaction is open no owner is ready, and the status says why and what to do; then all is there."""
    end_offset = two_commits(world)
    world.log.hold_back(CHANGELOG, 0, end_offset)
    begun_s = world.clock.s
    with pytest.raises(NotReady, match="find-hanging"):
        world.owner(stopping=lambda: world.clock.s > begun_s + 5 * PATIENCE_S)
    waiting = new_partition(0, world.log, MemoryStores(), world.clock)
    status = partition_status(waiting, None, world.told[-1])
    restore = known(status.restore)
    assert restore is not None
    assert "a transaction of somebody else is open" in restore.waiting
    assert "kafka-transactions.sh" in restore.waiting
    world.log.show()
    assert go_on(world) == {"x": 11, "y": 11}
    assert not world.told[-1].waiting


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("from_commit", [False, True], ids=["of fences", "of a commit and fences"])
def test_markers_that_are_left_out(world: _World, count: int, from_commit: bool) -> None:
    """A start that can't read its own fence record writes more, until a marker stands for all, and goes on behind it.

    Each of `count` transactions lacks its marker: of the start alone, or the first one is the last owner's commit.
    """
    committed_end = two_commits(world)
    rows = world.log.partition(CHANGELOG, 0).rows
    before, end_offset = len(rows), world.end()
    world.log.hold_back(CHANGELOG, 0, committed_end if from_commit else end_offset)
    transaction = world.log.transaction
    written = 0

    def new_transaction(name: str) -> Transaction:
        made = transaction(name)
        commit = made.commit

        def committed(*arguments: Any, **options: Any) -> list[int]:
            nonlocal written
            offsets = commit(*arguments, **options)
            if written == count - from_commit:
                world.log.show()
                world.log.compact(CHANGELOG, 0, world.end())  # which leaves the newest fence record only
            written += 1
            return offsets

        made.commit = committed  # type: ignore[method-assign]
        return made

    world.log.transaction = new_transaction  # type: ignore[method-assign]
    begun_s = world.clock.s
    owner = world.owner(stopping=lambda: world.clock.s > begun_s + 5 * PATIENCE_S)
    assert written == count - from_commit + 1
    letters = [(row.key, row.value) for row in world.log.partition(DEAD_LETTERS, 0).rows]
    assert letters == [(no_letter_key(0), None)] * (written - 1), "dead letters lack the same markers"
    assert len(world.log.partition(CHANGELOG, 0).rows) < before + written, "compacted"
    assert series_of(owner.store) == {"x": 11, "y": 11}
    world.send(x=1)
    fold_all(world.log, owner)
    owner.commit()
    assert series_of(world.owner().store) == {"x": 12, "y": 11}


def test_a_reader_that_hangs_has_no_excuse(world: _World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restore names no reason if the fence record is readable and yet nothing comes: the watchdog may judge."""
    end_offset = two_commits(world)
    world.log.hold_back(CHANGELOG, 0, end_offset)
    monkeypatch.setattr(world.log, "watermarks", lambda *_: Watermarks(0, end_offset + 1_000))
    begun_s = world.clock.s
    with pytest.raises(NotReady):
        world.owner(stopping=lambda: world.clock.s > begun_s + 5 * PATIENCE_S)
    assert not any(it.waiting for it in world.told)


def test_a_commit_begins_where_the_last_one_ended(world: _World) -> None:
    """The position of a commit says where the previous commit ended, also behind a fence record."""
    first = world.owner()
    for number in range(3):
        world.send(**{f"s{number}": 1})
        fold_all(world.log, first)
        first.commit()
    second = world.owner()
    world.send(x=1)
    fold_all(world.log, second)
    second.commit()
    rows = world.log.partition(CHANGELOG, 0).rows
    positions = [(row.offset, codec.decode_position(row.value or b"")) for row in rows if row.key == POSITION_KEY]
    fences = [row.offset for row in rows if row.key == FENCE_KEY]
    markers = world.log.marker_count
    ends = [0, *[offset + 1 for offset, _ in positions]]
    assert [position.previous_end_offset for _, position in positions] == ends[:-1]
    begins = [fences[0] + 1 + markers, *[end + markers for end in ends[1:3]], fences[1] + 1 + markers]
    assert [position.begin_offset for _, position in positions] == begins
    assert {position.owner_id.partition("@")[0] for _, position in positions} == {"pipeline-0:an-id"}


@pytest.mark.parametrize("back_by", [1, 3, 7])
def test_a_changelog_that_went_back_takes_no_commit(world: _World, back_by: int) -> None:
    """After a truncation under its owner nothing is written to changelog or store, and the process ends."""
    two_commits(world)
    stores = MemoryStores()
    owner = world.owner(stores)
    end_offset, meta = world.end() - back_by, read_meta(owner.store)
    world.log.cut(CHANGELOG, 0, end_offset)
    world.send(x=1)
    fold_all(world.log, owner)
    with pytest.raises(Discontinuous, match=f"went back from {end_offset + back_by} to {end_offset}"):
        owner.commit()
    assert (world.end(), read_meta(owner.store)) == (end_offset, meta)


def test_a_restart_without_news_reads_no_more_than_its_own_record(world: _World) -> None:
    """A store that was there reads no more than its new fence record, however often a partition changes its owner."""
    two_commits(world)
    stores = MemoryStores()
    world.owner(stores)
    for _ in range(5):
        world.clock.s += 30 * 86_400  # for longer than tombstones are kept
        owner = world.owner(stores)
        assert world.told[-1].entries == 0
        assert read_meta(owner.store).changelog_next_offset == world.end()
        assert series_of(owner.store) == {"x": 11, "y": 11}


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_deltas_of_another_history(world: _World, kept: int) -> None:
    """A position is not valid in another history: the log lost folded records, and new ones have taken their offsets."""
    owner = world.owner()
    for _ in range(3):
        world.send(x=1)
    fold_all(world.log, owner)
    owner.commit()
    world.log.lose_tail(DELTAS, 0, kept)
    for _ in range(5):
        world.send(x=1)
    again = world.owner()
    assert again.resume() == (3, 0)
    reader = world.log.reader(DELTAS)
    reader.assign({0: 3}, {0: 0})
    with pytest.raises(RecordsLost, match="is not in the log"):
        reader.poll(record_count_max=10, bytes_max=2**20, timeout_s=0)
    with pytest.raises(RecordsLost, match="is not in the log"):
        fold_on(world, owner)
    accepting = world.owner(accept_loss=True)
    assert accepting.task.next_offset == kept, "what is left below was folded"
    fold_on(world, accepting)
    accepting.commit()
    assert series_of(accepting.store) == {"x": 8}
    fold_on(world, world.owner())


@pytest.mark.parametrize("left", [0, 1, 6])
@pytest.mark.parametrize("kept", [0, 1, 3, 5, 7, 8])
def test_deltas_that_lost_their_tail_count_once(world: _World, kept: int, left: int) -> None:
    """After a lost tail each delta counts once, also of forgotten producers, and so do those of new producers."""
    owner = world.owner()
    for number in range(5):
        if number == 2:
            world.log.lose_tail(DELTAS, 0, 2)  # a new leader, and nothing is lost
            world.log.skip(DELTAS, 0)
        send_alone(world, f"early-{number}", a=1)
    fold_all(world.log, owner)
    owner.commit()
    world.clock.s += 30 * 86_400
    for number in range(3):
        send_alone(world, f"late-{number}", b=1)
        fold_all(world.log, owner)
        owner.commit()
    assert owner.store.get([producer_key("early-0"), producer_key("early-4")]) == [None, None], "forgotten"
    assert owner.resume() == (9, 1)
    world.log.lose_tail(DELTAS, 0, kept)
    for number in range(left):
        send_alone(world, f"new-{number}", c=1)
    if left <= 9 - kept:
        with pytest.raises(RecordsLost, match=r"ends at|is not in the log"):
            fold_on(world, world.owner())
    accepting = world.owner(accept_loss=True)
    assert accepting.resume() == ((2, 0) if kept == 3 else (kept, EPOCH_NONE if not kept else int(kept > 3)))
    if left > 1:
        world.fold(accepting, 1)
        accepting.commit()
        accepting = world.owner()  # killed after its first commit
    fold_on(world, accepting)
    accepting.commit()
    last = world.owner()
    assert not last.task.dirty
    assert series_of(last.store) == {"a": 5, "b": 3, **({"c": left} if left else {})}


def send_alone(world: _World, producer_id: str, **series: float) -> None:
    """Send a batch of a producer that sends no other."""
    group = Group(VIEW, [series_suffix((name,)) for name in series], [*series.values()])
    batch = Batch(producer_id, 0, 0, 0, 0, world.clock.now_ms(), [group])
    world.log.append([Message(DELTAS, 0, None, encode_batch(batch))], timeout_s=1)


def test_a_tail_that_can_not_be_looked_at(world: _World) -> None:
    """While the log's end cannot be read, nobody knows what is folded: the start ends, and nothing is folded."""
    owner = world.owner()
    for _ in range(4):
        world.send(x=1)
    fold_all(world.log, owner)
    owner.commit()
    world.log.lose_tail(DELTAS, 0, 3)
    world.log.hold_back(DELTAS, 0, 1)
    with pytest.raises(Unavailable, match="can't be read from 1 on"):
        world.owner(accept_loss=True)
    world.log.show()
    accepting = world.owner(accept_loss=True)
    assert accepting.resume() == (3, 0)
    assert series_of(accepting.store) == {"x": 4}


def fold_on(world: _World, owner: OwnedPartition) -> None:
    reader = world.log.reader(DELTAS)
    offset, epoch = owner.resume()
    reader.assign({0: offset}, {0: epoch})
    for records in reader.poll(record_count_max=10, bytes_max=2**20, timeout_s=0):
        owner.fold(records)


def test_deltas_that_do_not_stand_in_order_are_refused(world: _World) -> None:
    """Records out of order, or with an end that is not behind them, are refused."""
    owner = world.owner()
    for _ in range(3):
        world.send(x=1)
    reader = world.log.reader(DELTAS)
    reader.assign({0: 0})
    (records,) = reader.poll(record_count_max=10, bytes_max=2**20, timeout_s=0)
    columns = (records.at_ms, records.keys, records.values)
    for offsets, next_offset in (([0, 2, 1], 3), ([0, 1, 1], 2), ([0, 1, 2], 2)):
        with pytest.raises(Discontinuous):
            owner.fold(type(records)(0, offsets, *columns, next_offset))
    assert read_position(owner.store).next_offset == 0
    owner.fold(records)
    assert owner.task.next_offset == 3


def test_deltas_that_the_log_has_lost_are_refused(world: _World) -> None:
    """Missing records are refused if the log knows of each offset whether it holds a record."""
    owner = world.owner()
    for _ in range(3):
        world.send(x=1)
    world.log.skip(DELTAS, 0)  # as somebody's transaction does
    world.send(x=1)
    fold_all(world.log, owner)
    assert owner.task.next_offset == 5
    world.send(x=1)
    world.send(x=1)
    del world.log.partition(DELTAS, 0).rows[-2]
    with pytest.raises(PipelineError, match="1 records from 5 on are missing"):
        fold_all(world.log, owner)


@pytest.mark.parametrize("longer", [0, 1, 5])
def test_a_store_of_a_history_that_is_gone(world: _World, longer: int) -> None:
    """A store whose last commits the changelog has lost is not continued, although the changelog has grown beyond them."""
    stores = MemoryStores()
    first = world.owner(stores)
    for number in range(4):
        world.send(x=1)
        fold_all(world.log, first)
        first.commit()
        if not number:
            kept = world.end()
    first.close()
    end_offset = world.end()
    world.log.lose_tail(CHANGELOG, 0, kept)
    second = world.owner()
    while world.end() < end_offset + longer:
        world.send(y=1)
        fold_all(world.log, second)
        second.commit()
    expected = series_of(second.store)
    copy = stores.open(0)
    before = series_of(copy)
    follower = Follower(0, copy, buffer_entries_max=10, topic_id=world.log.topic_id(CHANGELOG))
    reader = world.log.reader(CHANGELOG)
    reader.assign({0: follower.next_offset})
    (records,) = reader.poll(record_count_max=1_000, bytes_max=2**20, timeout_s=0)
    with pytest.raises(StoreAhead, match="has another record at"):
        follower.apply(records)
    assert series_of(copy) == before, "it is all that is left of the history that is gone"
    with pytest.raises(StoreAhead):
        world.owner(stores)
    assert series_of(world.owner(stores, accept_loss=True).store) == expected


@pytest.mark.parametrize("is_open", [False, True])
def test_a_start_writes_a_marker_to_unreadable_dead_letters(world: _World, is_open: bool) -> None:
    """A start that finds dead letters behind an open transaction writes a record with a marker of its own there."""
    two_commits(world)
    if is_open:
        world.log.leave_open([Message(DEAD_LETTERS, 0, b"0-1", b"a letter")])
    world.owner()
    keys = [row.key for row in world.log.partition(DEAD_LETTERS, 0).rows]
    assert keys == ([b"0-1", no_letter_key(0)] if is_open else [])
