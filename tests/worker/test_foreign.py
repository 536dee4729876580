"""Foreign records in a changelog change no number: owners, followers and restores leave them out, count and log them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import chain

import pytest

import pipeline.metrics as m
from pipeline.adapters.memory import MemoryStores
from pipeline.core.codec import FORMAT, decode_position, encode_fence, encode_position
from pipeline.core.letters import no_letter_key
from pipeline.core.record import (
    FENCE_KEY,
    POSITION_KEY,
    STORE_META_KEY,
    TAG_DEFINITION,
    TAG_SERIES,
    Fence,
    Position,
    definition_key,
    fingerprint,
    producer_key,
    series_prefix,
    series_suffix,
)
from pipeline.errors import RecordsLost, StoreAhead, StoreCorrupt, Unavailable
from pipeline.ports import Message
from pipeline.query.dead_letters import DeadLetters, LetterFilter
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.partition import OwnedPartition
from pipeline.worker.replicas import ReplicaLoop
from tests.support import HandClock
from tests.worker.support import DAY_MS, VIEW, ChangingLog, Recorder, Worker, fold_all, new_partition, series_of

A = series_prefix(VIEW) + series_suffix(("a",))
GHOST = series_prefix(VIEW) + series_suffix(("ghost",))
LATER = bytes((FORMAT + 1,))


class _World:
    """An owner, a server that follows it, and a stranger who may write to the changelog."""

    def __init__(self, marker_count: int) -> None:
        self.clock = HandClock()
        self.log = ChangingLog(1, self.clock)
        self.log.marker_count = marker_count
        self.worker = Worker(self.log, self.clock)
        self.worker.stores = MemoryStores()
        self.metrics = Recorder()
        self.accept_loss = False
        self.server = self.new_server()

    def new_server(self) -> ReplicaLoop:
        return ReplicaLoop(
            log=self.log,
            stores=MemoryStores(),
            clock=self.clock,
            settings=WorkerSettings(),
            delete_retention_ms=DAY_MS,
            on_fatal=lambda error: pytest.fail(str(error)),
            metrics=self.metrics,
        )

    def commit(self, **series: float) -> None:
        self.worker.commit(0, series)

    def write(self, key: bytes | None, value: bytes | None) -> None:
        """Append a foreign record."""
        self.log.append([Message(CHANGELOG, 0, key, value)], timeout_s=1)

    def read(self) -> dict[str, float]:
        """Return the server's answer once it has had time."""
        for _ in range(6):
            self.clock.s += 1.1
            self.server.step()
        return series_of(self.server.stores()[0])

    def new_owner(self, stores: MemoryStores | None = None, *, young_s: float = 0.0) -> OwnedPartition:
        settings = WorkerSettings(accept_loss=self.accept_loss)
        owner = new_partition(0, self.log, stores or MemoryStores(), self.clock, settings=settings, young_s=young_s)
        self.worker.partitions[0] = owner
        owner.start()
        return owner

    def newest(self) -> dict[bytes | None, bytes | None]:
        """Return the newest value of each key, which compaction would keep."""
        return {row.key: row.value for row in self.log.partition(CHANGELOG, 0).rows}


@pytest.fixture(params=[0, 1], ids=["no markers", "markers"])
def world(request: pytest.FixtureRequest) -> _World:
    it = _World(request.param)
    it.commit(a=1, b=2)
    it.commit(a=1)
    return it


def strange(world: _World) -> dict[str, tuple[bytes | None, bytes | None]]:
    """Return a record of each kind that a stranger can write, including copies of the owner's earlier records."""
    rows = {row.key: row.value for row in world.log.partition(CHANGELOG, 0).rows}
    first = next(row for row in world.log.partition(CHANGELOG, 0).rows if row.key == POSITION_KEY)
    end = world.log.watermarks(CHANGELOG, 0).end_offset
    elsewhere = Position(9, 9, 9, begin_offset=end, previous_end_offset=end, owner_id="pipeline-1:id")
    return {
        "a series with a state that is not ours": (A, rows[A][:-1] + b"\x63"),  # type: ignore[index]
        "a series that nobody has recorded": (GHOST, rows[A]),
        "a series that is deleted": (A, None),
        "a series with a value that can't be read": (A, b"\xff\xff"),
        "a series of no definition": (TAG_SERIES + b"nonsense", b"\x02"),
        "a producer that is forgotten": (producer_key("p"), None),
        "a producer with noise": (producer_key("p"), b"noise"),
        "the first position again": (POSITION_KEY, first.value),
        "the last position again": (POSITION_KEY, rows[POSITION_KEY]),
        "the position of another partition": (POSITION_KEY, encode_position(elsewhere)),
        "no position": (POSITION_KEY, None),
        "noise for a position": (POSITION_KEY, b"garbage"),
        "noise that looks like a newer position": (POSITION_KEY, LATER + b"garbage"),
        "a newer position of another place": (POSITION_KEY, LATER + rows[POSITION_KEY][1:]),  # type: ignore[index]
        "no key": (None, b"v"),
        "an empty key": (b"", b"v"),
        "a key of no kind": (b"k", b"v"),
        "a store's own key": (STORE_META_KEY, b"\x95\x01\xcd\x03\xe7\xc2\xa0"),
        "a longer position key": (POSITION_KEY + b"x", rows[POSITION_KEY]),
        "a fence of noise": (FENCE_KEY, b"noise"),
        "the fence of another partition": (FENCE_KEY, encode_fence(Fence("pipeline-7:x", 1))),
    }


def kinds() -> list[str]:
    it = _World(0)
    it.commit(a=1)
    return [*strange(it)]


KINDS = kinds()


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_goes_on(world: _World, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A server answers as if the foreign record were not there: before and behind it, and after the next commit."""
    assert world.read() == {"a": 2, "b": 2}
    world.write(*strange(world)[kind])
    assert world.read() == {"a": 2, "b": 2}
    world.commit(b=1)
    assert world.read() == {"a": 2, "b": 3}
    assert world.metrics.of(m.CHANGELOG_FOREIGN, 0) == 1
    said = [record for record in caplog.records if "kafka-acls" in record.message and record.levelno == logging.ERROR]
    assert 1 <= len(said) <= 2, "once by the owner, once by the server"


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_starts_behind_it_becomes_ready(world: _World, kind: str) -> None:
    """A server that starts behind a foreign record becomes ready without another commit, and answers as the owner."""
    world.write(*strange(world)[kind])
    assert world.read() == {"a": 2, "b": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_owner_restores_the_numbers(world: _World, kind: str) -> None:
    """A new owner restores the numbers from nothing and from the last store; compaction ends with the owner's entries."""
    ours = world.newest()
    world.write(*strange(world)[kind])
    for stores in (MemoryStores(), world.worker.stores):
        owner = world.new_owner(stores)
        assert series_of(owner.store) == {"a": 2, "b": 2}
        assert owner.task.next_offset == 2
    newest = world.newest()
    keys = [key for key in ours if key not in (POSITION_KEY, FENCE_KEY)]
    assert [newest[key] for key in keys] == [ours[key] for key in keys]
    assert newest.get(GHOST) is None
    end_offset = world.log.watermarks(CHANGELOG, 0).end_offset
    world.log.compact(CHANGELOG, 0, end_offset, drop_tombstones=True)
    assert series_of(world.new_owner().store) == {"a": 2, "b": 2}
    assert world.read() == {"a": 2, "b": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_an_owner_goes_on_committing(world: _World, kind: str) -> None:
    """The owner's next commit finds the record in its way, repairs what it covers, and begins behind it."""
    world.write(*strange(world)[kind])
    world.commit(b=1)
    world.commit(b=1)
    world.log.compact(CHANGELOG, 0, world.log.watermarks(CHANGELOG, 0).end_offset, drop_tombstones=True)
    assert series_of(world.new_owner().store) == {"a": 2, "b": 4}
    assert world.read() == {"a": 2, "b": 4}


def undo_last_commit(world: _World) -> None:
    """Abort the last commit, as a broker can that has left out its marker; the next transaction's marker is there."""
    at = world.log.partition(CHANGELOG, 0)
    begin, position = decode_position(at.rows[-1].value or b"").begin_offset, at.rows[-1]
    assert position.key == POSITION_KEY
    at.rows = [row for row in at.rows if row.offset < begin]
    at.markers.update(range(begin, at.end_offset))
    world.log.skip(CHANGELOG, 0, 1)


def test_a_commit_that_the_broker_has_undone(world: _World) -> None:
    """The owner sees that its last commit is gone before it commits anything else, and begins anew at the one before.

    Nobody has read that commit, and its deltas are folded again: every answer is exact, a new owner's too.
    """
    undo_last_commit(world)
    owner = world.worker.partitions[0]
    with pytest.raises(StoreCorrupt, match=r"the broker aborted a commit, at \d+, that it had acknowledged"):
        world.commit(b=1)
    assert world.read() == {"a": 1, "b": 2}
    owner.close()
    owner = world.new_owner(world.worker.stores)
    assert series_of(owner.store) == {"a": 1, "b": 2}
    fold_all(world.log, owner)
    owner.commit()
    assert world.read() == {"a": 2, "b": 3}


def test_a_copied_position_of_an_undone_commit(world: _World) -> None:
    """A copy of the aborted commit's position is no commit: not for its owner, nor for servers and new owners."""
    world.worker.partitions[0].close()
    owner = world.new_owner(world.worker.stores, young_s=300)
    world.commit(a=1)
    position = world.newest()[POSITION_KEY]
    undo_last_commit(world)
    world.write(POSITION_KEY, position)
    assert world.read() == {"a": 2, "b": 2}
    with pytest.raises(StoreCorrupt, match="the broker aborted a commit"):
        world.commit(b=1)
    owner.close()
    owner = world.new_owner(world.worker.stores)
    assert series_of(owner.store) == {"a": 2, "b": 2}
    assert owner.task.next_offset == 2
    fold_all(world.log, owner)
    owner.commit()
    assert world.read() == {"a": 3, "b": 3}


def test_an_undone_commit_whose_deltas_are_gone(world: _World) -> None:
    """Then the store is the better copy: it is kept, and a person has to decide."""
    undo_last_commit(world)
    owner = world.worker.partitions[0]
    world.log.truncate(DELTAS, 0, 2)
    with pytest.raises(StoreAhead, match="its records are gone from deltas"):
        world.commit(b=1)
    owner.close()
    with pytest.raises(StoreAhead):
        world.new_owner(world.worker.stores)


def test_a_commit_that_is_still_there(world: _World) -> None:
    """An owner whose commit is displaced by a marker finds its last commit in the changelog, and goes on with its store."""
    owner, store = world.worker.partitions[0], world.worker.partitions[0].store
    for count in (1, 2):
        world.log.skip(CHANGELOG, 0, 1)
        world.commit(b=1)
        assert owner.store is store
        assert world.read() == {"a": 2, "b": 2 + count}


def test_a_commit_whose_marker_is_left_out(world: _World) -> None:
    """An idle owner notices that nobody can read its last commit, and writes what makes it readable, once.

    The log shows everything again with the next transaction, as Kafka does: its marker stands for both.
    """
    owner = world.worker.partitions[0]
    begin = decode_position(world.newest()[POSITION_KEY] or b"").begin_offset
    end = world.log.watermarks(CHANGELOG, 0).end_offset
    committed_s = world.clock.s
    new = world.new_server
    world.log.hold_back(CHANGELOG, 0, begin)
    world.server = new()
    assert world.read() == {"a": 1, "b": 2}
    later_s = committed_s + 5.1
    assert not owner.needs_commit(begin, committed_s + 4.9), "a broker may take its time"
    assert not owner.needs_commit(begin - 1, later_s), "another producer's transaction is open there"
    assert not owner.needs_commit(end, later_s), "the marker is there"
    assert owner.needs_commit(begin, later_s)
    shown, write = world.log.show, owner._right.commit
    owner._right.commit = lambda *args, **options: (shown(), write(*args, **options))[1]  # type: ignore[method-assign]
    store = owner.store
    owner.commit()
    assert owner.store is store, "nothing is lost: the store goes on"
    fences = [row.offset for row in world.log.partition(CHANGELOG, 0).rows if row.key == FENCE_KEY]
    assert fences[-1] == end, "the commit itself would be aborted in the place of the marker, and the last one with it"
    assert world.read() == {"a": 2, "b": 2}
    assert not owner.needs_commit(world.log.watermarks(CHANGELOG, 0).end_offset, later_s + 60)
    world.commit(b=1)
    assert world.read() == {"a": 2, "b": 3}
    assert series_of(world.new_owner().store) == {"a": 2, "b": 3}


def test_dead_letters_whose_marker_is_left_out(world: _World) -> None:
    """The owner writes the next marker to the dead letters of the commit, too, with a record that no reader heeds."""
    world.log.append([Message(DELTAS, 0, None, b"noise")], timeout_s=1)
    rows = world.log.partition(DEAD_LETTERS, 0).rows
    for count in (2, 2):  # the second commit has no letters
        world.commit(b=1)
        owner = world.worker.partitions[0]
        assert owner.needs_commit(owner._committed_begin, world.clock.s + 6)
        owner.commit()
        assert [row.key for row in rows][1:] == [no_letter_key(0)] * (count - 1)
    letters = DeadLetters(world.log, world.clock)
    (line,) = letters.listing(LetterFilter(), 10).letters
    assert letters.get(line.key)
    assert letters.listing(LetterFilter(), 10).foreign_count == 0
    assert [it.result for it in letters.replay(LetterFilter(), limit=9, timeout_s=1).outcomes] == ["not replayed"]


def test_a_start_without_dead_letters(
    world: _World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An owner starts, and commits, while a partition of the dead letters has no leader; it writes nothing to them."""
    ask = world.log.high_watermarks

    def high_watermarks(topic: str) -> Mapping[int, int]:
        if topic == DEAD_LETTERS:
            raise Unavailable("offsets of dead-letters-7: its leader does not answer")
        return ask(topic)

    monkeypatch.setattr(world.log, "high_watermarks", high_watermarks)
    owner = world.new_owner()
    world.commit(b=1)
    assert series_of(owner.store) == {"a": 2, "b": 3}
    assert not world.log.partition(DEAD_LETTERS, 0).rows
    assert [it.levelname for it in caplog.records if "dead-letters-7" in it.message] == ["WARNING"]


def test_a_record_in_the_place_of_a_marker(world: _World) -> None:
    """An owner takes the record for the marker; readers leave it out, and the next owner that reads it repairs its key.

    Further records of the same kind, and commits of other keys, do not hide it. Its key needs no repair once a commit has
    written it.
    """
    at, theirs = world.log.partition(CHANGELOG, 0), strange(world)["a series with a state that is not ours"]
    if world.log.marker_count:
        at.end_offset -= 1
        at.markers.remove(at.end_offset)
        world.write(*theirs)
    else:  # as if the log had markers
        world.worker.partitions[0]._begin += 1
        world.write(*theirs)
    world.commit(b=1)
    world.commit(b=1)
    assert world.read() == {"a": 2, "b": 4}
    assert world.newest()[A] == theirs[1], "the owner has not seen it"
    owner = world.new_owner()
    assert series_of(owner.store) == {"a": 2, "b": 4}
    world.log.compact(CHANGELOG, 0, world.log.watermarks(CHANGELOG, 0).end_offset)
    count = len(at.rows)
    assert series_of(world.new_owner().store) == {"a": 2, "b": 4}
    assert len(at.rows) == count + 1, "a fence record, and no repair"


@pytest.mark.parametrize(
    ("key", "at_start"),
    [(A, True), (producer_key("p"), True), (A, False), (TAG_DEFINITION + series_prefix(VIEW)[1:], False)],
)
def test_a_damaged_store_mends_nothing(world: _World, key: bytes, at_start: bool) -> None:
    """A damaged store's value for an entry that a stranger has covered is not committed in its place."""
    owner, stores = world.worker.partitions[0], world.worker.stores
    world.write(key, b"theirs")
    if at_start:
        owner.close()
    store = stores.open(0)
    store.write([key], [store.get([key])[0][:-1]])  # type: ignore[index]
    with pytest.raises(StoreCorrupt):
        world.new_owner(stores) if at_start else world.commit(b=1)
    assert world.newest()[key] == b"theirs"
    world.worker.partitions[0].close()
    restored = world.new_owner(stores)
    assert series_of(restored.store) == {"a": 2, "b": 2}
    assert world.newest()[key] != b"theirs"


def test_all_of_it_at_once(world: _World) -> None:
    """Foreign records of all kinds, between any commits and while owners change, change no number."""
    kinds = [*strange(world).values()]
    total = 2.0
    for count, (key, value) in enumerate(chain(kinds, reversed(kinds))):
        world.write(key, value)
        if count % 3 == 0:
            world.commit(b=1)
            total += 1
        if count % 5 == 0:
            world.new_owner(world.worker.stores if count % 2 else None)
        assert world.read() == {"a": 2, "b": total}
    fold_all(world.log, world.worker.partitions[0])
    assert series_of(world.new_owner().store) == {"a": 2, "b": total}


def test_somebody_who_never_stops(world: _World) -> None:
    """A commit that meets foreign records again and again ends the process with advice."""
    owner = world.worker.partitions[0]
    world.worker.append(0, {"b": 1})
    fold_all(world.log, owner)
    commit, write = owner.prepare(), world.log.skip

    class Busy:
        marker_count = world.log.marker_count

        def __init__(self, inner: object) -> None:
            self.commit = lambda *args, **options: (write(CHANGELOG, 0), inner.commit(*args, **options))[1]  # type: ignore[attr-defined]

    owner._transaction = Busy(owner._transaction)  # type: ignore[assignment]
    with pytest.raises(Exception, match="something else has written to changelog-0"):
        owner.make_durable(commit)
    assert series_of(owner.store) == {"a": 2, "b": 2}


COVERS = [
    "a series with a state that is not ours",
    "a series that is deleted",
    "a producer that is forgotten",
    "a definition that is deleted",
]


def cover(world: _World, kind: str) -> int:
    """Cover an entry of the owner with a foreign record, and compact hours later; return the end of the changelog."""
    world.write(*(strange(world) | {"a definition that is deleted": (definition_key(VIEW), None)})[kind])
    world.clock.s += 36_000
    end_offset = world.log.watermarks(CHANGELOG, 0).end_offset
    world.log.compact(CHANGELOG, 0, end_offset)
    return end_offset


def copy_of(stores: MemoryStores) -> MemoryStores:
    copy = MemoryStores()
    copy.open(0).write(*zip(*stores.open(0).scan(b"", b"\xff\xff"), strict=True))
    return copy


def written_since(world: _World, end_offset: int) -> set[bytes | None]:
    return {row.key for row in world.log.partition(CHANGELOG, 0).rows if row.offset >= end_offset}


@pytest.mark.parametrize("kind", COVERS)
@pytest.mark.parametrize("disk", ["empty", "behind"])
def test_what_compaction_took_before_a_takeover(world: _World, kind: str, disk: str) -> None:
    """A disk that has not read a covered entry can't tell it: a person decides, and nothing is written before."""
    stores = MemoryStores() if disk == "empty" else copy_of(world.worker.stores)
    world.commit(a=3, b=3, c=1)
    right = {"a": 5, "b": 5, "c": 1}
    end_offset = cover(world, kind)
    for _ in range(2):
        with pytest.raises(RecordsLost, match=r"written over 1 entries \((view v|producer \w+)\), .*--accept-loss"):
            world.new_owner(stores)
        assert written_since(world, end_offset) == {FENCE_KEY}
    owner = world.new_owner(copy_of(world.worker.stores))
    assert series_of(owner.store) == right, "the store of the last owner has it all, and repairs what was covered"
    assert series_of(world.new_owner(stores).store) == right
    cover(world, kind)
    world.accept_loss = True
    world.new_owner(MemoryStores())
    world.accept_loss = False
    world.new_owner(MemoryStores())


def test_a_position_that_compaction_took(world: _World) -> None:
    """Without the position nobody can tell which entries are whole commits: nothing is restored, and nothing is written."""
    end_offset = cover(world, "noise for a position")
    for _ in range(2):
        with pytest.raises(RecordsLost, match=r"written over \d+ entries \(the position, .*--accept-loss"):
            world.new_owner(MemoryStores())
        assert written_since(world, end_offset) == {FENCE_KEY}


def test_a_position_of_a_changelog_without_entries_needs_nobody() -> None:
    """A changelog without entries needs no person: anything missing in it is folded again."""
    world = _World(1)
    world.write(POSITION_KEY, b"noise")
    assert series_of(world.new_owner().store) == {}
    world.commit(a=1)
    assert series_of(world.new_owner().store) == {"a": 1}


@pytest.mark.parametrize("there", ["before", "after"])
def test_a_store_that_has_followed_can_not_tell_either(world: _World, there: str) -> None:
    """A follower's store proves nothing about lost entries: one made since holds what is left, and looks the same."""
    if there == "before":
        assert world.read() == {"a": 2, "b": 2}
    end_offset = cover(world, COVERS[0])
    world.read()
    stores = copy_of_server(world)
    for _ in range(2):
        with pytest.raises(RecordsLost, match="written over 1 entries"):
            world.new_owner(stores)
        assert written_since(world, end_offset) == {FENCE_KEY}
    assert series_of(world.new_owner(copy_of(world.worker.stores)).store) == {"a": 2, "b": 2}


def copy_of_server(world: _World) -> MemoryStores:
    copy = MemoryStores()
    copy.open(0).write(*zip(*world.server.stores()[0].scan(b"", b"\xff\xff"), strict=True))
    return copy


@pytest.mark.parametrize("key", [GHOST, TAG_SERIES + b"nonsense"])
def test_a_series_that_never_was_needs_nobody(world: _World, key: bytes) -> None:
    """A foreign key that was never a series needs no person: the definition's count shows that no series is missing."""
    world.write(key, b"\x02")
    world.clock.s += 86_400
    world.log.compact(CHANGELOG, 0, world.log.watermarks(CHANGELOG, 0).end_offset)
    assert series_of(world.new_owner().store) == {"a": 2, "b": 2}
    assert world.newest()[key] is None


def test_a_record_that_is_too_young_for_compaction_needs_nobody(world: _World) -> None:
    """A record too young for compaction needs no person, unless an older foreign record of its key was there before."""
    world.write(producer_key("ghost"), b"noise")
    world.clock.s += 200
    world.write(producer_key("other"), b"noise")
    world.write(producer_key("ghost"), b"noise")
    world.clock.s += 101
    with pytest.raises(RecordsLost, match=f"over 1 entries .producer {fingerprint('ghost')}"):
        world.new_owner(young_s=300)
    assert series_of(world.new_owner(young_s=302).store) == {"a": 2, "b": 2}
    assert world.newest()[producer_key("ghost")] is None
