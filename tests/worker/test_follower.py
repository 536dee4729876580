"""A follower holds back what is behind the last position record, within bounds, and knows which changelog it follows."""

from __future__ import annotations

import msgspec
import pytest

from pipeline.adapters.memory import MemoryLog, MemoryStore, MemoryStores
from pipeline.core import codec
from pipeline.core.codec import encode_position
from pipeline.core.record import FENCE_KEY, POSITION_KEY, Fence, Position, Records
from pipeline.errors import NewerFormat, NotReady, RecordsLost, StoreAhead, StoreCorrupt
from pipeline.ports import Message
from pipeline.topics import CHANGELOG
from pipeline.worker.follower import MARKERS_MAX, Follower, StoreMeta, read_meta, write_entries
from pipeline.worker.foreign import Barrier
from pipeline.worker.restore import RestoreProgress, check_format, check_restorable, restore
from tests.support import HandClock
from tests.worker.support import DAY_MS, ChangingLog, WatchedStore, Worker, series_of

A, B = b"\x02a", b"\x02b"


def position(begin_offset: int, previous_end_offset: int = 0) -> tuple[bytes, bytes]:
    """Return the position record of a commit that begins at the offset at which the previous one ended."""
    plain = Position(1, 1, 1, begin_offset=begin_offset, previous_end_offset=previous_end_offset)
    return POSITION_KEY, encode_position(plain)


def records(start: int, *rows: tuple[bytes | None, bytes | None], next_offset: int | None = None) -> Records:
    offsets = range(start, start + len(rows))
    end = start + len(rows) if next_offset is None else next_offset
    return Records(0, offsets, [0] * len(rows), [key for key, _ in rows], [value for _, value in rows], end)


def at_boundary(offset: int, at_ms: int, topic_id: str = "first") -> WatchedStore:
    """Return a store that reflects a changelog up to `offset`, committed at `at_ms`."""
    store = WatchedStore()
    value = encode_position(Position(1, at_ms, at_ms))
    write_entries(store, [POSITION_KEY], [value], StoreMeta(changelog_next_offset=offset, topic_id=topic_id))
    return store


def test_up_to_the_last_position_in_one_write() -> None:
    """One write has the last value of each key up to the last position record, and the offset behind that record."""
    store = WatchedStore()
    follower = Follower(0, store, buffer_entries_max=100, topic_id="t")
    follower.apply(records(5, (A, b"1"), position(5), (A, b"2"), (B, b"2"), position(7, 7), (A, b"3")))
    assert (store.writes, store.get([A, B])) == (1, [b"2", b"2"])
    assert read_meta(store) == StoreMeta(changelog_next_offset=10, topic_id="t", position_offset=9)
    assert (follower.next_offset, follower.at_boundary) == (11, False)
    follower.apply(records(11, (B, None), position(10, 10), next_offset=14))
    assert (store.writes, store.get([A, B])) == (2, [b"3", None])
    assert read_meta(store).changelog_next_offset == 14, "beyond the marker"
    assert follower.at_boundary
    follower.apply(records(14, next_offset=20))
    assert (store.writes, follower.next_offset, follower.at_boundary) == (2, 20, True)


@pytest.mark.parametrize(("entries_max", "bytes_max"), [(3, 10**9), (10**9, 30)])
def test_what_is_held_back_is_bounded(entries_max: int, bytes_max: int) -> None:
    """At either bound entries are written and marked, after `on_between` is called; the next position ends that."""
    store = WatchedStore()
    told: list[int] = []
    follower = Follower(
        0,
        store,
        buffer_entries_max=entries_max,
        buffer_bytes_max=bytes_max,
        on_between=lambda: told.append(store.writes),
    )
    row = (b"\x02" * 5, b"v" * 5)
    follower.apply(records(0, row, position(0), row, row))
    assert (store.writes, told) == (1, [])
    follower.apply(records(4, row))
    assert (store.writes, told) == (2, [1]), "told before it was written"
    assert read_meta(store).between_boundaries
    assert read_meta(store).changelog_next_offset == 5
    follower.apply(records(5, row, row, row))
    assert (store.writes, told) == (3, [1]), "told once"
    follower.apply(records(8, row, position(2, 2)))
    assert follower.at_boundary
    assert not read_meta(store).between_boundaries
    follower.apply(records(10, row, row, row))
    assert told == [1, 4]


def test_the_bound_counts_tombstones_and_starts_anew() -> None:
    """A deletion counts with its key; entries that are written count no more."""
    store = WatchedStore()
    follower = Follower(0, store, buffer_entries_max=100, buffer_bytes_max=30)
    follower.apply(records(0, (b"\x02" * 29, None)))
    assert store.writes == 0
    follower.apply(records(1, position(0), (b"\x02" * 29, None)))
    assert store.writes == 1
    follower.apply(records(3, (b"\x02", None)))
    assert store.writes == 2


@pytest.mark.parametrize("behind", range(4))
def test_markers_are_nothing_to_be_behind(behind: int) -> None:
    """A store at the end, or before markers only, lacks no tombstone, however long it was away."""
    clock = HandClock()
    log = ChangingLog(1, clock)
    log.append([Message(CHANGELOG, 0, b"k", b"v")] * 10, timeout_s=1)
    store = at_boundary(10 - behind, clock.now_ms())
    clock.s += DAY_MS / 1000
    check_restorable(0, store, log, clock, DAY_MS)
    clock.s += 1
    if behind <= MARKERS_MAX:
        check_restorable(0, store, log, clock, DAY_MS)
    else:
        with pytest.raises(StoreCorrupt, match="tombstones"):
            check_restorable(0, store, log, clock, DAY_MS)


@pytest.mark.parametrize("wrong_ms", [-5 * DAY_MS, 0, 5 * DAY_MS])
@pytest.mark.parametrize("hole", [0, 3])
def test_the_log_says_how_long_a_store_was_away(hole: int, wrong_ms: int) -> None:
    """A store is as old as its last read, whatever positions say: it is corrupt if a tombstone may have gone since."""
    start_ms = 100 * DAY_MS
    store = WatchedStore()
    value = encode_position(Position(1, start_ms + wrong_ms, start_ms, begin_offset=0))
    write_entries(store, [POSITION_KEY], [value], StoreMeta(changelog_next_offset=10, topic_id="t", position_offset=-1))
    follower = Follower(0, store, buffer_entries_max=100, topic_id="t", delete_retention_ms=DAY_MS)
    begin = 10 + hole
    value = encode_position(Position(2, start_ms + wrong_ms, start_ms, begin_offset=begin, previous_end_offset=begin))
    read = msgspec.structs.replace(records(begin, (A, b"1"), (POSITION_KEY, value)), at_ms=[start_ms + DAY_MS + 1] * 2)
    if hole:  # a tombstone may have been there
        with pytest.raises(StoreCorrupt, match="tombstones"):
            follower.apply(read)
    else:
        follower.apply(read)


@pytest.mark.parametrize(
    ("offset", "topic_id", "reason"),
    [
        (0, "", None),
        (0, "other", None),  # nothing of it is in the store
        (5, "first", None),
        (10, "first", None),
        (5, "", "of another changelog"),  # from before topics had ids, or from the embedded log
        (5, "other", "of another changelog"),
        (11, "first", "ends at 10"),
        (1, "first", "1 records from 1 on are gone"),
        (2, "first", None),
    ],
)
def test_which_stores_can_be_read_on(offset: int, topic_id: str, reason: str | None) -> None:
    """A store can be read on if it reflects a part of this changelog that is still there; one beyond its end is ahead."""
    clock = HandClock()
    log = ChangingLog(1, clock)
    log.append([Message(CHANGELOG, 0, b"k", b"v")] * 10, timeout_s=1)
    log.truncate(CHANGELOG, 0, 2)
    store = at_boundary(offset, clock.now_ms(), topic_id)
    if reason is None:
        check_restorable(0, store, log, clock, DAY_MS)
    else:
        with pytest.raises(RecordsLost if "gone" in reason else StoreAhead, match=reason):
            check_restorable(0, store, log, clock, DAY_MS)


def test_a_first_restore_that_was_cut_off_is_begun_anew() -> None:
    """A store without a position has no known age, so its restore begins anew."""
    clock = HandClock()
    log = ChangingLog(1, clock)
    log.append([Message(CHANGELOG, 0, b"k", b"v")] * 10, timeout_s=1)
    store = WatchedStore()
    write_entries(store, [b"k"], [b"v"], StoreMeta(changelog_next_offset=3, between_boundaries=True, topic_id="first"))
    with pytest.raises(StoreCorrupt, match="never finished"):
        check_restorable(0, store, log, clock, DAY_MS)


@pytest.mark.parametrize("value", [b"", b"\x07", msgspec.msgpack.encode([2, 5]), msgspec.msgpack.encode([1, "x"])])
def test_a_meta_that_cannot_be_read(value: bytes) -> None:
    """A store whose meta cannot be read is not trusted, and its meta is not taken for another kind."""
    store = MemoryStore()
    store.write([b"\xff"], [value])
    with pytest.raises(StoreCorrupt):
        read_meta(store)


@pytest.mark.parametrize("newest", [1, 0])
def test_a_newer_changelog_is_seen_before_it_is_taken_over(newest: int) -> None:
    """A newer format at the end of any partition is refused before a takeover; bytes that only resemble it are noise."""
    clock = HandClock()
    log = MemoryLog({"changelog": 2, "deltas": 2}, clock.now_ms)
    check_format(log)
    later = bytes((codec.FORMAT + 1,))
    for number in (0, 1):
        for offset in range(5):
            log.append([Message("changelog", number, *position(offset, offset))], timeout_s=1)
    _, value = position(5, 5)
    for noise in (b"\xff noise", later + b"noise", later + value[1:-4], later + position(99, 9)[1][1:]):
        log.append([Message("changelog", 0, b"\x02v", noise), Message("changelog", 0, POSITION_KEY, noise)], timeout_s=1)
        check_format(log)
    end_offset = log.watermarks("changelog", newest).end_offset
    log.append([Message("changelog", newest, POSITION_KEY, later + position(end_offset, 5)[1][1:])], timeout_s=1)
    with pytest.raises(NewerFormat, match=f"it has format {later[0]}, and this program reads {codec.FORMAT}"):
        check_format(log)


def test_a_meta_from_before_topics_had_ids() -> None:
    """A meta from before topics had ids is read as one without an id."""
    store = MemoryStore()
    store.write([b"\xff"], [msgspec.msgpack.encode([1, 5, False])])
    assert read_meta(store) == StoreMeta(changelog_next_offset=5)


def fence(log: ChangingLog, clock: HandClock, owner_id: str = "pipeline-0:new") -> Barrier:
    """Return the fence record of a new owner."""
    value = codec.encode_fence(Fence(owner_id, clock.now_ms()))
    (offset,) = log.append([Message(CHANGELOG, 0, FENCE_KEY, value)], timeout_s=1)
    assert isinstance(offset, int)
    return Barrier(offset - 1, owner_id)


def test_restore_says_how_far_it_is_and_can_be_stopped() -> None:
    """A restore reports its progress after each poll; a stopped one leaves a store that another goes on with."""
    clock = HandClock()
    log = ChangingLog(1, clock)
    worker = Worker(log, clock)
    for i in range(10):
        worker.commit(0, {str(i): i})
    stores, told = MemoryStores(), list[RestoreProgress]()
    barrier = fence(log, clock)

    def go(stop_after: int) -> int:
        told.clear()
        return restore(
            0,
            stores.open(0),
            log,
            clock,
            barrier=barrier,
            fence=lambda: fence(log, clock),
            fetch_count_max=10,
            buffer_entries_max=100,
            progress=told.append,
            stopping=lambda: len(told) >= stop_after,
        ).entries_total

    end = barrier.offset + 1
    with pytest.raises(NotReady):
        go(2)
    assert 10 < (held := read_meta(stores.open(0)).changelog_next_offset) <= 20
    assert go(100) == end - held - 1, "without the fence"
    assert [(it.remaining, it.done) for it in told][-2:] == [(0, False), (0, True)]
    meta = StoreMeta(changelog_next_offset=end, topic_id="first", position_offset=barrier.offset - 1)
    assert read_meta(stores.open(0)) == meta, "with the fence"
    assert series_of(stores.open(0)) == {str(i): i for i in range(10)}
