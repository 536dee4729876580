"""A store that is opened again finds out whether the changelog still has all that the store has read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pipeline.adapters.memory import MemoryStores
from pipeline.core.codec import encode_fence
from pipeline.core.record import FENCE_KEY, POSITION_KEY, Fence, Records
from pipeline.errors import StoreAhead, StoreCorrupt
from pipeline.ports import Store
from pipeline.topics import CHANGELOG
from pipeline.worker.follower import Follower, read_meta
from tests.worker.support import WatchedStore, series_of
from tests.worker.test_follower import A, B, position, records
from tests.worker.test_foreign import _World, strange, world  # noqa: F401

C, D = b"\x02c", b"\x02d"
FENCE = (FENCE_KEY, encode_fence(Fence("pipeline-0:later", 1)))


def follow(store: Store, *read: Records, entries_max: int = 1) -> Follower:
    """Open a store, and read on from where its follower begins."""
    follower = Follower(0, store, buffer_entries_max=entries_max, topic_id="t")
    for it in read:
        if it.next_offset > follower.next_offset:
            follower.apply(it)
    return follower


def read_all(world: _World, store: Store, *, entries_max: int, count_max: int) -> Follower:  # noqa: F811
    """Follow a changelog to its end; at each boundary the store reflects it beyond the commit that it is at."""
    follower = Follower(0, store, buffer_entries_max=entries_max, topic_id="first")
    reader = world.log.reader(CHANGELOG)
    reader.assign({0: follower.next_offset})
    while fetched := reader.poll(record_count_max=count_max, bytes_max=2**20, timeout_s=0):
        for it in fetched:
            follower.apply(it)
        meta = read_meta(store)
        assert meta.between_boundaries or meta.changelog_next_offset > meta.position_offset
    return follower


@pytest.mark.parametrize("kind", ["a series that nobody has recorded", "the first position again", "no key"])
@pytest.mark.parametrize("entries_max", [1, 2, 100])
@pytest.mark.parametrize("count_max", [1, 2, 3, 100])
def test_a_start_behind_what_others_wrote(world: _World, kind: str, entries_max: int, count_max: int) -> None:  # noqa: F811
    """A store left at any point before a stranger's records is brought to the commit behind them."""
    world.worker.partitions[0].close()
    world.write(*strange(world)[kind])
    stores = MemoryStores()
    read_all(world, stores.open(0), entries_max=entries_max, count_max=count_max)
    assert series_of(world.new_owner(stores).store) == {"a": 2, "b": 2}


def test_what_others_wrote_is_no_loss(world: _World) -> None:  # noqa: F811
    """A store that a stranger's records have left between boundaries is made anew, if the changelog has its last commit."""
    world.worker.partitions[0].close()
    stores = world.worker.stores
    end_offset = read_meta(stores.open(0)).changelog_next_offset
    world.write(*strange(world)["a series that nobody has recorded"])
    read_all(world, stores.open(0), entries_max=1, count_max=100)
    assert read_meta(stores.open(0)).between_boundaries
    assert read_meta(stores.open(0)).changelog_next_offset > end_offset
    assert series_of(world.new_owner(stores).store) == {"a": 2, "b": 2}


def between(behind: Sequence[tuple[bytes, bytes | None]]) -> WatchedStore:
    """Return a store with the commit of offsets 3 to 5, and with the entries that it has read behind that."""
    store = WatchedStore()
    follow(store, records(0, (A, b"1"), (B, b"1"), position(0), (A, b"2"), (B, b"2"), position(3, 3)), records(6, *behind))
    assert read_meta(store).between_boundaries
    assert read_meta(store).position_offset == 5
    return store


COMMIT = ((A, b"2"), (B, b"2"), position(3, 3))
TAKEN = ((A, b"3"), (B, b"3"), (A, b"4"), (C, b"5"))


@pytest.mark.parametrize("at_once", [True, False])
def test_a_store_between_boundaries_goes_on(at_once: bool) -> None:
    """A store between boundaries goes on if the changelog has all of it; superseded and compacted entries prove nothing."""
    for taken in (TAKEN, TAKEN[1:], TAKEN[2:], ()):
        store = between(TAKEN)
        rest = (*taken, (D, b"6"), position(6, 6))
        start = 6 + len(TAKEN) - len(taken)
        if at_once:
            follower = follow(store, records(3, *COMMIT, next_offset=start), records(start, *rest))
        else:
            singles = (records(start + i, row) for i, row in enumerate(rest))
            follower = follow(store, records(3, *COMMIT, next_offset=start), *singles)
        assert follower.at_boundary
        assert store.get([A, B, C, D]) == [b"4", b"3", b"5", b"6"]


@pytest.mark.parametrize(
    "other",
    [
        (*TAKEN[:3], (C, b"6"), position(6, 6)),
        (*TAKEN[:3], (D, b"5"), position(6, 6)),
        (*TAKEN[:3], position(6, 6), FENCE),
        (FENCE, *TAKEN[:2], (A, b"6"), position(7, 6)),
    ],
)
def test_other_entries_behind_the_last_commit(other: tuple[tuple[bytes, bytes | None], ...]) -> None:
    """A store with a part of a commit that is gone is no copy of any history, and is rebuilt."""
    with pytest.raises(StoreCorrupt, match="has others up to 10"):
        follow(between(TAKEN), records(3, *COMMIT, *other))


@pytest.mark.parametrize(
    "other",
    [
        records(3, (A, b"9"), (B, b"9"), (C, b"9"), (D, b"9"), position(3, 3)),
        records(3, FENCE, (B, b"9"), position(4, 3)),
        records(9, (C, b"9"), (D, b"9"), position(7, 3)),
        records(8, position(7, 3), (D, b"9")),
        records(10, (D, b"9"), position(10, 3)),
    ],
)
def test_a_store_between_boundaries_whose_commit_is_gone(other: Records) -> None:
    """A store whose commit is gone is neither mixed with the history in its place nor written to."""
    store = between(TAKEN)
    entries = dict(store.entries)
    with pytest.raises(StoreAhead):
        follow(store, other)
    assert store.entries == entries


def test_a_commit_by_somebody_who_did_not_know_the_last_one() -> None:
    """A marker in place of the last commit, which no reader sees, makes everything behind it another history."""
    store = WatchedStore()
    follow(store, records(0, (A, b"1"), position(0)), records(4, position(4, 2), next_offset=6))
    entries = dict(store.entries)
    follow(store, records(5, FENCE, (B, b"2"), position(6, 5)), entries_max=9)
    assert store.get([A, B]) == [b"1", b"2"], "the commit before is the store's, which compaction has removed"
    store.entries = dict(entries)
    with pytest.raises(StoreAhead, match="has gone on from 2 without the last commit of the store, which ended at 4"):
        follow(store, records(5, FENCE, (B, b"2"), position(6, 2)), entries_max=9)
    assert store.entries == entries


@pytest.mark.parametrize("commit", [(), ((A, b"1"), position(0))])
def test_fences_that_are_gone_were_no_commits(commit: tuple[tuple[bytes, bytes | None], ...]) -> None:
    """A commit at the offset of a lost fence record is read, and not taken for a stranger's."""
    store, start = WatchedStore(), len(commit)
    follow(store, records(0, *commit, FENCE, FENCE), entries_max=9)
    assert read_meta(store).changelog_next_offset == start + 2
    other = ((A, b"2"), (B, b"2"), position(start, start))
    follower = follow(store, records(0, *commit, *other), entries_max=9)
    assert (follower.at_boundary, follower.foreign.count) == (True, 0)
    assert store.get([A, B]) == [b"2", b"2"]
    assert read_meta(store).changelog_next_offset == start + 3


def test_a_store_that_rots_while_it_is_read() -> None:
    """Damage that the next read of its position finds in a store does not count as a loss of the changelog."""
    store = WatchedStore()
    commit = records(0, (A, b"1"), position(0))
    follow(store, commit)
    follower = Follower(0, store, buffer_entries_max=1, topic_id="t")
    store.write([POSITION_KEY], [b"rotten"])
    follower.apply(commit)
    assert follower.is_proven
