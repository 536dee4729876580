"""A feed delivers each change of a view at least once, in order, with the previous value."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

import pipeline.worker.changes as changes
from pipeline.adapters.faust.changes import Gate
from pipeline.adapters.memory import MemoryLog, MemoryStore, MemoryStores
from pipeline.core.codec import DefinitionEntry, encode_definition, encode_position, encode_states
from pipeline.core.kinds import KINDS
from pipeline.core.record import (
    POSITION_KEY,
    Definition,
    Position,
    definition_key,
    series_prefix,
    series_suffix,
    view_prefix,
)
from pipeline.errors import LogCorrupt, NotReady, StoreCorrupt, Unavailable
from pipeline.ports import Message
from pipeline.topics import CHANGELOG
from pipeline.worker.changes import Change, ChangeFeed
from pipeline.worker.follower import StoreMeta, write_entries
from tests.support import HandClock, wait_until

VIEW = Definition("revenue", "sum", ("region",))
MEAN = Definition("mean", "mean", ())


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "POLL_INTERVAL_S", 0.0)


class Group:
    """Offsets of a group, in memory."""

    def __init__(self) -> None:
        self.offsets: dict[int, int] = {}
        self.away = False

    def read(self) -> Mapping[int, int]:
        if self.away:
            raise Unavailable("away")
        return dict(self.offsets)

    def write(self, next_offsets: Mapping[int, int]) -> None:
        self.read()
        self.offsets.update(next_offsets)


def known(definition: Definition | None) -> list[DefinitionEntry]:
    """Return the definitions of a view in a partition's state."""
    if definition is None:
        raise NotReady("it is not restored yet")
    return [DefinitionEntry(definition, 1, 0)]


class World:
    """A changelog of two partitions, a group, and feeds that are driven by hand."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.log = MemoryLog({CHANGELOG: 2}, self.clock.now_ms)
        self.group = Group()
        self.heard: list[Change] = []
        self.limit: int | None = None
        """Number of changes to take before the feed must stop."""

    def commit(self, partition: int = 0, definition: Definition | None = None, /, **sums: Any) -> None:
        """Commit the sums by region, and the definition if given."""
        keys = [series_prefix(VIEW) + series_suffix((region,)) for region in sums]
        values = [None if value is None else encode_states(KINDS["sum"], [value])[0] for value in sums.values()]
        entries = [*zip(keys, values, strict=True), (POSITION_KEY, encode_position(Position(1, 1, 1)))]
        if definition is not None:
            entries.insert(0, (definition_key(definition), encode_definition(DefinitionEntry(definition, len(sums), 0))))
        messages = [Message(CHANGELOG, partition, key, value) for key, value in entries]
        self.log.transaction(f"t-{partition}").commit(messages, timeout_s=1)

    def drop(self, *regions: str) -> None:
        """Commit a drop: the series that there were, then their definition."""
        keys = [*[series_prefix(VIEW) + series_suffix((region,)) for region in regions], definition_key(VIEW)]
        messages = [Message(CHANGELOG, 0, key, None) for key in keys]
        position = Message(CHANGELOG, 0, POSITION_KEY, encode_position(Position(1, 1, 1)))
        self.log.transaction("t-0").commit([*messages, position], timeout_s=1)

    def feed(
        self,
        stores: MemoryStores | None = None,
        definition: Definition | None = VIEW,
        view: str = "revenue",
        *,
        nothing: bool = False,
    ) -> ChangeFeed:
        """Return a feed on these stores, or new ones. Its worker's state knows `definition`, or `nothing`."""

        def deliver(some: Sequence[Change], stopping: Callable[[], bool]) -> int:
            count = len(some) if self.limit is None else min(self.limit, len(some))
            self.heard += some[:count]
            return count

        return ChangeFeed(
            view,
            log=self.log,
            stores=stores or MemoryStores(),
            clock=self.clock,
            progresses=self.group,
            definitions_of=lambda _: [] if nothing else known(definition),
            deliver=deliver,
            on_fatal=lambda error: pytest.fail(repr(error)),
        )

    def run(self, feed: ChangeFeed, *partitions: int) -> list[tuple[Any, ...]]:
        """Follow until everything is read, and return the delivered changes as (region, old, new)."""
        self.heard.clear()
        feed.follow(frozenset(partitions or (0, 1)))
        for _ in range(4):
            feed.step()
        return [(*it.labels.values(), it.old, it.new) for it in self.heard]


def test_old_and_new_of_each_commit() -> None:
    """Each entry is a change from the previous one, with its place; an unchanged entry is no change."""
    world = World()
    world.commit(0, VIEW, eu=1, us=5)
    world.commit(0, eu=3, us=5)
    world.commit(0, eu=None)
    assert world.run(world.feed()) == [("eu", None, 1), ("us", None, 5), ("eu", 1, 3), ("eu", 3, None)]
    assert [(it.partition, it.offset) for it in world.heard] == [(0, 1), (0, 2), (0, 4), (0, 7)]
    assert world.heard[0].window_start is None


def test_a_restart_goes_on_where_it_was() -> None:
    """A change that was delivered does not come again; one that was not comes again, with the same old value."""
    world, stores = World(), MemoryStores()
    world.commit(0, VIEW, eu=1)
    world.commit(0, eu=3)
    world.commit(0, eu=6)
    world.limit = 1
    first = world.feed(stores)
    first.follow(frozenset({0}))
    first.step()
    first.close()
    world.limit = None
    assert world.run(world.feed(stores)) == [("eu", 1, 3), ("eu", 3, 6)]


def test_a_partition_moves() -> None:
    """Another worker goes on from the group's progress, and knows the earlier values without delivering them."""
    world = World()
    world.commit(0, VIEW, eu=1, us=1)
    world.commit(1, VIEW, eu=10)
    first = world.feed()
    world.run(first)
    first.follow(frozenset({1}))
    first.step()
    world.commit(0, eu=2)
    assert world.run(world.feed(), 0) == [("eu", 1, 2)]


def test_a_partition_comes_back() -> None:
    """A store that another worker has overtaken is brought up to that worker's progress."""
    world, stores = World(), MemoryStores()
    world.commit(0, VIEW, eu=1)
    world.run(world.feed(stores), 0)
    world.commit(0, eu=2)
    other = world.feed()
    assert world.run(other, 0) == [("eu", 1, 2)]
    other.close()
    world.commit(0, eu=3)
    assert world.run(world.feed(stores), 0) == [("eu", 2, 3)]


def test_a_definition_behind_its_series() -> None:
    """A definition that compaction has moved behind its series is taken from the worker's state."""
    world = World()
    world.commit(0, eu=1)
    world.commit(0, VIEW)
    assert world.run(world.feed()) == [("eu", None, 1)]
    world.group.offsets.clear()
    with pytest.raises(Unavailable):  # until it knows of it
        world.run(world.feed(definition=None), 0)


def test_answers_not_states() -> None:
    """A mean is delivered as a number; one that is the same after more observations is no change."""
    world = World()
    key = series_prefix(MEAN) + series_suffix(())
    for state in ((4, 2), (6, 3), (9, 3)):
        world.log.transaction("t").commit(
            [Message(CHANGELOG, 0, key, encode_states(KINDS["mean"], [state])[0])], timeout_s=1
        )
    assert world.run(world.feed(definition=MEAN, view="mean")) == [(None, 2.0), (2.0, 3.0)]


def test_a_store_of_another_changelog() -> None:
    """A store beyond the changelog's end is made anew."""
    world, stores = World(), MemoryStores()
    store = stores.open(0)
    write_entries(store, [], [], StoreMeta(changelog_next_offset=99))
    store.close()
    world.commit(0, VIEW, eu=1)
    assert world.run(world.feed(stores), 0) == [("eu", None, 1)]


def test_progress_that_cannot_be_reported() -> None:
    """Progress that cannot be reported to the group is kept in the store, and reported later."""
    world = World()
    feed = world.feed()
    feed.follow(frozenset({0}))
    feed.step()
    world.commit(0, VIEW, eu=1)
    feed.step()
    world.group.away = True
    world.clock.s += 1
    with pytest.raises(Unavailable):
        feed.step()
    world.group.away = False
    assert world.run(feed, 0) == []
    feed.close()
    assert world.group.offsets == {0: 3}


class Agent:
    """Takes changes from a gate, in a loop of its own thread."""

    def __init__(self, gate: Gate) -> None:
        self.taken: list[Any] = []
        self.go_on = threading.Semaphore(0)
        self._gate = gate
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    async def _run(self) -> None:
        while True:
            value = await self._gate.take()
            self.taken.append(value)
            await asyncio.to_thread(self.go_on.acquire)
            if value == "end":
                return


def test_the_gate_counts_what_is_done() -> None:
    """A change is done when the next one is asked for; those that were not begun are taken back at a stop."""
    gate, stop = Gate(), threading.Event()
    agent = Agent(gate)
    counts: list[int] = []
    offering = threading.Thread(target=lambda: counts.append(gate.offer(["a", "b", "c"], stop.is_set)))
    offering.start()
    agent.go_on.release()
    wait_until(lambda: agent.taken == ["a", "b"], "the second to be taken")
    stop.set()
    wait_until(lambda: not gate._waiting, "the third to be taken back")
    agent.go_on.release()
    offering.join(10)
    assert counts == [2]
    stop.clear()
    offering = threading.Thread(target=lambda: counts.append(gate.offer(["end"], stop.is_set)))
    offering.start()
    wait_until(lambda: agent.taken == ["a", "b", "end"], "the next offer to be taken")
    stop.set()
    offering.join(10)
    assert counts == [2, 0]
    agent.go_on.release(2)


@pytest.mark.parametrize("seed", range(20))
def test_changes_add_up(seed: int) -> None:
    """Without repetitions the changes add up to the view, however often a feed is ended, moved, or stopped half-way."""
    chance, world, stores = random.Random(seed), World(), [MemoryStores(), MemoryStores()]
    state = {(number, region): 0 for number in (0, 1) for region in ("eu", "us", "asia")}
    everything: dict[tuple[int, int], Change] = {}
    for _ in range(60):
        for number in (0, 1):
            some = {region: chance.randrange(1, 9) for region in ("eu", "us", "asia") if chance.random() < 0.6}
            for region, amount in some.items():
                state[number, region] += amount
            world.commit(number, VIEW, **{region: state[number, region] for region in some})
        worker = chance.randrange(2)
        feed = world.feed(stores[worker])
        world.limit = chance.choice([None, None, 0, 1, 3])
        world.run(feed, *chance.choice([(0,), (1,), (0, 1)]))
        everything.update({(it.partition, it.offset): it for it in world.heard})
        feed.close()
    world.limit = None
    for each in stores:
        world.run(feed := world.feed(each))
        everything.update({(it.partition, it.offset): it for it in world.heard})
        feed.close()
    totals = dict.fromkeys(state, 0)
    for change in everything.values():
        totals[change.partition, change.labels["region"]] += change.new - (change.old or 0)
    assert totals == state


def test_a_state_that_is_closed_while_it_is_asked() -> None:
    """A feed that asks a state which is being closed waits until the partition is lost or back, and does not end."""
    world = World()
    world.commit(0, eu=1)
    feed = world.feed()
    restored: list[Definition] = []

    def definitions_of(_: int) -> list[DefinitionEntry]:
        if not restored:
            raise NotReady("partition 0 is being restored")
        return known(restored[0])

    feed._definitions_of = definitions_of
    with pytest.raises(Unavailable):
        world.run(feed, 0)
    restored.append(VIEW)
    feed._assigned = False
    assert world.run(feed, 0) == [("eu", None, 1)]


class _Rotten(MemoryStore):
    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if any(key.startswith(view_prefix("revenue")) for key in keys):
            raise StoreCorrupt("a block is missing")
        return super().get(keys)


def test_a_corrupt_store_is_made_anew() -> None:
    """A new store is filled from the changelog, without delivering changes twice; a corrupt changelog ends the feed."""
    world, stores = World(), MemoryStores()
    world.commit(0, VIEW, eu=1)
    first = world.feed(stores)
    assert world.run(first, 0) == [("eu", None, 1)]
    first.close()
    stores._stores[0].__class__ = _Rotten
    world.commit(0, eu=3)
    feed = world.feed(stores)
    assert world.run(feed, 0) == [("eu", 1, 3)]
    key = series_prefix(VIEW) + series_suffix(("eu",))
    world.log.transaction("t-0").commit([Message(CHANGELOG, 0, key, b"\xff")], timeout_s=1)
    with pytest.raises(LogCorrupt):
        world.run(feed, 0)


def test_a_view_that_is_dropped() -> None:
    """A dropped view's series are delivered as gone, though its definition goes in the same commit; later ones are new."""
    world = World()
    world.commit(0, VIEW, eu=1, us=2)
    feed = world.feed()
    assert world.run(feed) == [("eu", None, 1), ("us", None, 2)]
    world.drop("eu", "us")
    world.commit(0, VIEW, eu=7)
    assert world.run(feed) == [("eu", 1, None), ("us", 2, None), ("eu", None, 7)]


def test_a_view_that_was_dropped_while_no_feed_ran() -> None:
    """The series of a view that was dropped while no feed ran are delivered as gone, from the feed's own store."""
    world = World()
    stores = MemoryStores()
    world.commit(0, VIEW, eu=1, us=2)
    feed = world.feed(stores)
    assert len(world.run(feed)) == 2
    feed.close()
    world.drop("eu", "us")
    assert world.run(world.feed(stores, nothing=True)) == [("eu", 1, None), ("us", 2, None)]


def test_a_view_that_is_reset() -> None:
    """A reset view's definition comes first, then each series is delivered as gone."""
    world = World()
    world.commit(0, VIEW, eu=1)
    feed = world.feed()
    world.run(feed)
    world.commit(0, VIEW, eu=None)
    assert world.run(feed) == [("eu", 1, None)]
