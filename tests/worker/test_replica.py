"""Replicas: a query server reads whole commits of the present changelog, or has to wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping

import pytest

import pipeline.metrics as m
from pipeline.adapters.memory import MemoryStores
from pipeline.core.answer import PartitionStatus, known
from pipeline.core.record import POSITION_KEY, STORE_META_KEY, TAG_SERIES
from pipeline.errors import NotReady, RecordsLost, StoreCorrupt, Unavailable
from pipeline.ports import Message
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG
from pipeline.worker.follower import read_meta, read_position
from pipeline.worker.replicas import LAG_MAX_S, ReplicaLoop
from pipeline.worker.restore import RestoreProgress
from tests.support import HandClock
from tests.worker.support import DAY_MS, ChangingLog, Recorder, WatchedStores, Worker, series_of


class Server:
    """A replica loop that is driven by hand, and a worker that commits to its changelog."""

    def __init__(self, partition_count: int = 1) -> None:
        self.clock = HandClock()
        self.log = ChangingLog(partition_count, self.clock)
        self.worker = Worker(self.log, self.clock)
        self.stores = WatchedStores()
        self.metrics = Recorder()
        self.progress: list[RestoreProgress] = []
        self.fatal: list[BaseException] = []
        self.loop = self.start()

    def start(self, **settings: int) -> ReplicaLoop:
        """Start another process on the same stores."""
        self.loop = ReplicaLoop(
            log=self.log,
            stores=self.stores,
            clock=self.clock,
            settings=WorkerSettings(**settings),
            delete_retention_ms=DAY_MS,
            on_fatal=self.fatal.append,
            on_progress=self.progress.append,
            metrics=self.metrics,
        )
        return self.loop

    def step(self, count: int = 1, *, s: float = 0.0) -> None:
        for _ in range(count):
            self.clock.s += s
            self.loop.step()

    def follow(self) -> None:
        """Step until all partitions can be read, and some steps more; there is always enough time for a look."""
        for _ in range(10):
            self.step(s=1.0)
        assert self.loop.ready

    def read(self, number: int = 0) -> dict[str, float]:
        return series_of(self.loop.stores()[number])


@pytest.fixture
def server() -> Iterator[Server]:
    it = Server()
    yield it
    it.loop.close()
    assert not it.fatal


@pytest.fixture
def pair() -> Iterator[Server]:
    it = Server(2)
    yield it
    it.loop.close()


def only_half(server: Server) -> None:
    """Show the newest commit without its position record from now on; see `whole`."""
    last = server.log.partition(CHANGELOG, 0).rows[-1]
    assert last.key == POSITION_KEY
    server.log.readable[CHANGELOG, 0] = last.offset


def whole(server: Server) -> None:
    server.log.show()


def test_what_was_committed_can_be_read(server: Server) -> None:
    """Nothing can be read before the changelog's end is reached; then all of it, and every later commit."""
    server.worker.commit(0, {"a": 1, "b": 2})
    with pytest.raises(NotReady):
        server.loop.stores()
    assert not server.loop.wait_ready(0)
    server.follow()
    assert server.loop.wait_ready(0)
    assert server.read() == {"a": 1, "b": 2}
    server.worker.commit(0, {"a": 5})
    server.step()
    assert server.read() == {"a": 6, "b": 2}
    assert server.loop.status() == [
        PartitionStatus(partition=0, phase="following", changelog_next_offset=9, changelog_remaining=0)
    ]


def test_an_empty_changelog_is_followed_at_once(server: Server) -> None:
    """An empty changelog can be read at once."""
    server.step()
    assert server.read() == {}


def test_a_poll_is_one_write(server: Server) -> None:
    """A poll is one write, however many commits it brings, and a poll without records none."""
    for i in range(20):
        server.worker.commit(0, {"a": 1, str(i): i})
    server.step()
    assert server.stores.at(0).writes == 1
    server.step(5, s=1.0)
    assert server.stores.at(0).writes == 1
    assert server.read()["a"] == 20


def test_half_a_commit_is_never_read(server: Server) -> None:
    """Entries behind the last position record wait for the next one."""
    server.worker.commit(0, {"a": 1})
    server.follow()
    server.worker.commit(0, {"a": 1, "b": 1})
    only_half(server)
    server.follow()
    assert server.read() == {"a": 1}
    assert read_meta(server.stores.at(0)).changelog_next_offset < (known(server.loop.status()[0].changelog_next_offset) or 0)
    whole(server)
    server.step()
    assert server.read() == {"a": 2, "b": 1}


def test_nothing_is_read_between_boundaries(server: Server) -> None:
    """A commit larger than the buffer is written in parts: the store is hidden until the commit is whole."""
    server.start(restore_buffer_entries_max=2)
    server.worker.commit(0, {"a": 1})
    server.follow()
    server.worker.commit(0, {"a": 1, "b": 1, "c": 1})
    only_half(server)
    seen: list[object] = []
    store = server.stores.at(0)
    write = store.write

    def watched(*arguments: object) -> None:
        with pytest.raises(NotReady):
            server.loop.stores()
        seen.append(arguments)
        write(*arguments)  # type: ignore[arg-type]

    store.write = watched  # type: ignore[method-assign]
    server.step(5, s=1.0)
    assert len(seen) == 1
    assert read_meta(store).between_boundaries
    assert not server.loop.ready
    del store.write  # type: ignore[method-assign]
    whole(server)
    server.follow()
    assert server.read() == {"a": 2, "b": 1, "c": 1}


def test_a_break_in_serving_is_seen_by_whoever_read_across_it(server: Server) -> None:
    """A store that was hidden and is served again is another object, so that a read from before the break is not trusted."""
    server.start(restore_buffer_entries_max=2)
    server.worker.commit(0, {"a": 1})
    server.follow()
    before = server.loop.stores()
    assert server.loop.stores()[0] is before[0]
    server.worker.commit(0, {"a": 1, "b": 1, "c": 1})
    only_half(server)
    server.step()
    whole(server)
    server.follow()
    assert server.loop.stores()[0] is not before[0]
    assert series_of(before[0]) == server.read()


def test_it_goes_on_where_it_was(server: Server) -> None:
    """A new process reads on from the store's offset, and serves it only when it has caught up."""
    server.worker.commit(0, {"a": 1})
    server.follow()
    server.loop.close()
    server.worker.commit(0, {"a": 1})
    server.start()
    with pytest.raises(NotReady):
        server.loop.stores()
    server.follow()
    assert server.read() == {"a": 2}
    assert server.progress[-1].done
    assert server.progress[-1].entries == 3, "series, producer, position: the second commit only"
    assert not server.stores.destroyed


def test_between_boundaries_is_remembered(server: Server) -> None:
    """A process that starts on a store between boundaries serves it only from the next boundary on."""
    server.start(restore_buffer_entries_max=2)
    server.worker.commit(0, {"x": 1})
    server.follow()
    server.worker.commit(0, {"a": 1, "b": 1, "c": 1})
    only_half(server)
    server.step()
    server.start()
    server.step(5, s=1.0)
    assert not server.loop.ready
    whole(server)
    server.follow()
    assert server.read() == {"a": 1, "b": 1, "c": 1, "x": 1}


def test_a_changelog_made_anew_is_a_decision(pair: Server) -> None:
    """A store of a changelog made anew, even a longer one, is neither served nor deleted; by decision it is kept aside."""
    for number in (0, 1):
        pair.worker.commit(number, {"old": 1})
    pair.follow()
    pair.log.make_anew(CHANGELOG, "second")
    other = Worker(pair.log, pair.clock)
    for number in (0, 1):
        other.partition(number).task.skip_to(1)
        for _ in range(5):
            other.commit(number, {"new": 1})
    pair.clock.s += 2
    pair.step(5, s=1.0)
    with pytest.raises(NotReady, match=r"of another changelog, 'first', than there is now, 'second'; .*--accept-loss"):
        pair.loop.stores()
    assert not pair.stores.destroyed
    assert series_of(pair.stores.at(0)) == {"old": 1}
    pair.start(accept_loss=True)
    pair.follow()
    assert pair.read(0).keys() == pair.read(1).keys() == {"new"}
    assert not pair.stores.destroyed
    assert [series_of(store) for store in pair.stores.aside.values()] == [{"old": 1}] * 2
    assert pair.metrics.of(m.STORES_SET_ASIDE, 0) == 1
    assert read_meta(pair.stores.at(0)).topic_id == "second"


def test_a_store_of_another_changelog_is_not_served(server: Server) -> None:
    """A store of another changelog is not served, even if made anew during downtime; with the old one it goes on."""
    server.worker.commit(0, {"old": 1})
    server.follow()
    server.log.ids[CHANGELOG] = "second"
    server.start()
    server.step(3, s=1.0)
    with pytest.raises(NotReady, match="of another changelog"):
        server.loop.stores()
    server.log.ids[CHANGELOG] = "first"
    server.follow()
    assert server.read() == {"old": 1}
    assert not server.stores.destroyed


def test_a_changelog_that_lost_its_tail(pair: Server) -> None:
    """A store ahead of its changelog is not served, and not deleted; its neighbour is followed."""
    for number in (0, 1):
        for _ in range(3):
            pair.worker.commit(number, {"a": 1})
    pair.follow()
    pair.log.cut(CHANGELOG, 0, 8)
    pair.loop._reader.poll = _lost_once(pair)  # type: ignore[method-assign, union-attr]
    pair.worker.commit(1, {"a": 1})
    pair.step(5, s=1.0)
    with pytest.raises(NotReady, match=r"partition 0: the store has the changelog up to 11, but it ends at 8"):
        pair.loop.stores()
    assert pair.loop.caught_up() == {1}
    assert (series_of(pair.stores.at(0)), series_of(pair.stores.at(1))) == ({"a": 3}, {"a": 4})
    pair.start(accept_loss=True)
    pair.follow()
    assert (pair.read(0), pair.read(1)) == ({"a": 2}, {"a": 4})
    assert not pair.stores.destroyed


def _lost_once(server: Server) -> object:
    """Return a poll that raises once, as a broker's reader does beyond the end, where the one in memory waits."""
    reader = server.loop._reader
    poll = reader.poll  # type: ignore[union-attr]

    def lost(**_: object) -> object:
        reader.poll = poll  # type: ignore[method-assign, union-attr]
        raise RecordsLost("changelog-0 ends before: truncated or made anew")

    return lost


def test_what_was_read_beyond_the_end_is_read_again(server: Server) -> None:
    """A tail that was held back for its boundary and is gone is forgotten; the store was never wrong, and stays."""
    server.worker.commit(0, {"a": 1})
    server.follow()
    end_offset = server.log.watermarks(CHANGELOG, 0).end_offset
    server.worker.commit(0, {"a": 1})
    only_half(server)
    server.step()
    server.log.cut(CHANGELOG, 0, end_offset)
    server.log.show()
    server.loop._reader.poll = _lost_once(server)  # type: ignore[method-assign, union-attr]
    server.step()
    assert not server.stores.destroyed
    other = Worker(server.log, server.clock)
    other.partition(0).task.skip_to(2)
    other._sequence = 10
    other.commit(0, {"b": 1})
    server.follow()
    assert server.read() == {"a": 1, "b": 1}


def test_a_changelog_that_begins_too_late_is_fatal(server: Server) -> None:
    """A changelog from which no new store can be made ends the loop at once with what is gone."""
    server.worker.commit(0, {"a": 1})
    server.worker.commit(0, {"a": 1})
    server.log.truncate(CHANGELOG, 0, 4)
    with pytest.raises(RecordsLost, match="4 records from 0 on are gone"):
        server.step(3)


def test_a_store_below_the_start_of_the_changelog_is_not_read_on(server: Server) -> None:
    """A store whose next records are gone stays and is reported, as the rest restores no store."""
    server.worker.commit(0, {"a": 1})
    server.follow()
    for _ in range(3):
        server.worker.commit(0, {"a": 1})
    server.log.truncate(CHANGELOG, 0, 9)
    with pytest.raises(RecordsLost):
        server.step(5, s=1.0)
    assert not server.stores.destroyed
    assert series_of(server.stores.at(0)) == {"a": 1}


def test_a_store_that_was_away_for_too_long_is_made_anew(server: Server) -> None:
    """A store away for longer than tombstones are kept is made anew, except at the end of its changelog."""
    server.worker.commit(0, {"a": 1})
    server.follow()
    server.clock.s += DAY_MS / 1000 + 1
    server.start()
    server.follow()
    assert not server.stores.destroyed
    server.worker.commit(0, {"a": 1})
    server.follow()
    server.clock.s += DAY_MS / 1000 - 20
    server.worker.commit(0, {"a": 1})
    server.start()
    server.follow()
    assert not server.stores.destroyed
    server.clock.s += DAY_MS / 1000 + 1
    server.worker.commit(0, {"a": 1})
    server.start()
    server.follow()
    assert server.stores.destroyed == [0]
    assert server.read() == {"a": 4}


def test_a_process_that_stood_still_for_too_long_makes_its_store_anew(server: Server) -> None:
    """A process that was stopped, or asleep, for too long rebuilds its store, too."""
    server.worker.commit(0, {"a": 1})
    server.follow()
    server.worker.commit(0, {"a": 1})
    server.loop._next_ends_s = 1e18  # it wakes up between a look and a read
    server.clock.s += DAY_MS / 1000 + 1
    server.step()
    assert server.stores.destroyed == [0]
    server.follow()
    assert server.read() == {"a": 2}


def test_a_store_that_fell_behind_is_hidden_until_it_has_caught_up(server: Server) -> None:
    """A store that is behind by more than the compaction lag is hidden at a boundary, too, until it has caught up."""
    server.worker.commit(0, {"a": 1})
    server.follow()
    server.worker.commit(0, {"a": 1})
    server.loop._next_ends_s = 1e18
    server.clock.s += LAG_MAX_S + 1
    server.step()
    assert not server.loop.ready
    assert not server.stores.destroyed
    server.loop._next_ends_s = 0
    server.follow()
    assert server.read() == {"a": 2}


def test_an_end_that_took_too_long_to_reach_does_not_count(server: Server) -> None:
    """An end that took too long to reach does not make a store current; the next one does, if it is reached in time."""
    for _ in range(10):
        server.worker.commit(0, {"a": 1})
    server.start(restore_fetch_count_max=10)
    server.step(4, s=LAG_MAX_S / 2)
    assert server.loop.status()[0].changelog_next_offset == 32
    assert not server.loop.ready
    server.follow()


def test_while_the_log_is_away_the_stores_can_be_read(server: Server) -> None:
    """Stores can be read however long the log is away; then reading goes on, hidden if that was too long."""
    server.worker.commit(0, {"a": 1})
    server.follow()
    server.log.away = True
    for _ in range(5):
        server.clock.s += 60
        with pytest.raises(Unavailable):
            server.loop.step()
        assert server.read() == {"a": 1}
    server.log.away = False
    server.worker.commit(0, {"a": 1})
    server.follow()
    assert server.read() == {"a": 2}
    assert not server.stores.destroyed


def test_a_partition_without_a_leader_does_not_stop_the_others(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the log can't say where all partitions end, records are applied all the same."""
    server.worker.commit(0, {"a": 1})
    server.follow()

    def no_leader(topic: str) -> Mapping[int, int]:
        raise Unavailable("one partition has no leader")

    monkeypatch.setattr(server.log, "end_offsets", no_leader)
    for total in (2, 3):
        server.worker.commit(0, {"a": 1})
        server.step(3, s=1.0)
        assert server.read() == {"a": total}


def test_partitions_that_are_added_are_followed(pair: Server) -> None:
    """New partitions hide none of the old ones while they are restored."""
    pair.worker.commit(0, {"a": 1})
    pair.follow()
    pair.log.grow(4)
    pair.worker.commit(3, {"c": 3})
    only = pair.loop.stores()
    pair.step(s=1.0)
    assert pair.loop.ready
    pair.follow()
    assert [*only] == [0, 1]
    assert [*pair.loop.stores()] == [0, 1, 2, 3]
    assert pair.read(3) == {"c": 3}
    pair.worker.commit(3, {"c": 1})
    pair.stores.at(3).broken = StoreCorrupt("a block's checksum is wrong")
    pair.step()
    assert not pair.loop.ready, "once it was part of an answer, none is whole without it"


def test_a_part_of_the_partitions_is_followed(pair: Server) -> None:
    """A loop that is given a part of the partitions opens no other stores, and is ready as soon as it has these."""
    pair.log.grow(3)
    for number in range(2):
        pair.worker.commit(number, {"a": number + 1})
    pair.loop = ReplicaLoop(
        log=pair.log,
        stores=pair.stores,
        clock=pair.clock,
        settings=WorkerSettings(),
        delete_retention_ms=DAY_MS,
        on_fatal=pair.fatal.append,
        metrics=pair.metrics,
        partitions=frozenset({1}),
    )
    with pytest.raises(NotReady):
        pair.loop.stores()
    pair.follow()
    pair.log.grow(4)
    pair.follow()
    assert pair.loop.stores().keys() == {1}
    assert [it.partition for it in pair.loop.status()] == [1]
    assert pair.read(1) == {"a": 2}


def test_no_answer_lacks_a_partition(pair: Server) -> None:
    """Nothing is served before the last of the partitions that exist at the start."""
    pair.worker.commit(0, {"a": 1})
    for _ in range(5):
        pair.worker.commit(1, {"a": 1})
    pair.start(restore_fetch_count_max=5)
    pair.step()
    assert [it.phase for it in pair.loop.status()] == ["following", "restoring"]
    with pytest.raises(NotReady):
        pair.loop.stores()
    pair.follow()
    assert (pair.read(0), pair.read(1)) == ({"a": 1}, {"a": 5})


@pytest.mark.parametrize("error", [StoreCorrupt("a block's checksum is wrong"), Unavailable("no space left on device")])
def test_one_broken_store_does_not_stop_the_others(pair: Server, error: Exception) -> None:
    """A write that fails is repeated, into a new store if this one is corrupt; nothing is lost on either side."""
    for number in (0, 1):
        pair.worker.commit(number, {"a": 1})
    pair.follow()
    for number in (0, 1):
        pair.worker.commit(number, {"a": 1})
    pair.stores.at(0).broken = error
    try:
        pair.step()
        assert isinstance(error, StoreCorrupt)
    except Unavailable:
        assert isinstance(error, Unavailable)
    assert not pair.loop.ready
    pair.follow()
    assert (pair.read(0), pair.read(1)) == ({"a": 2}, {"a": 2})
    assert pair.stores.destroyed == ([0] if isinstance(error, StoreCorrupt) else [])


def test_a_store_that_cannot_be_opened_is_made_anew(pair: Server) -> None:
    """A store that cannot be opened is made anew, and counted."""
    for number in (0, 1):
        pair.worker.commit(number, {"a": 1})
    pair.follow()
    pair.stores.rotten.add(1)
    pair.start()
    pair.follow()
    assert pair.stores.destroyed == [1]
    assert pair.read(1) == {"a": 1}
    assert pair.metrics.of(m.STORES_REBUILT, 1) == 1
    assert pair.metrics.of(m.STORES_REBUILT, 0) == 0


@pytest.mark.parametrize("key", [STORE_META_KEY, POSITION_KEY])
def test_a_store_whose_own_record_is_rotten_is_made_anew(server: Server, key: bytes) -> None:
    """A store whose own record can't be decoded is rebuilt."""
    server.worker.commit(0, {"a": 1})
    server.follow()
    server.stores.at(0).write([key], [b"\x07"])
    server.start()
    server.follow()
    assert server.stores.destroyed == [0]
    assert server.read() == {"a": 1}


def test_it_says_how_far_it_is(server: Server) -> None:
    """The remaining records fall with each poll, in the error, the metric and the status."""
    for i in range(10):
        server.worker.commit(0, {str(i): 1})
    server.start(restore_fetch_count_max=10)
    server.step()
    with pytest.raises(NotReady, match="about 31 changelog records"):
        server.loop.stores()
    assert server.metrics.of(m.RESTORE_REMAINING, 0) == 31
    assert server.loop.status()[0].phase == "restoring"
    server.follow()
    assert [it.remaining for it in server.progress] == [31, 21, 11, 1, 0]
    assert [it.entries for it in server.progress] == [9, 19, 29, 39, 40]
    assert [it.done for it in server.progress] == [False, False, False, False, True]
    assert server.metrics.of(m.RESTORE_REMAINING, 0) == 0


def test_the_thread_follows_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    """The thread follows by itself, logs an absent log now and then, and ends with `stop`."""
    server = Server()
    server.worker.commit(0, {"a": 1})
    server.loop.start()
    assert server.loop.wait_ready(60)
    assert server.read() == {"a": 1}
    with caplog.at_level(logging.WARNING):
        server.log.away = True
        complained = threading.Event()
        while not complained.wait(0.01):
            if "answers grow stale" in caplog.text:
                complained.set()
    assert server.read() == {"a": 1}
    assert server.loop.stop(60)
    assert server.loop.stop(1)
    assert not server.fatal


def test_what_it_cannot_go_on_from_is_fatal() -> None:
    """`on_fatal` is called once with an error from which the loop can't go on."""
    server = Server()
    server.worker.commit(0, {"a": 1})
    server.worker.commit(0, {"a": 1})
    server.log.truncate(CHANGELOG, 0, 4)
    heard = threading.Event()
    loop = ReplicaLoop(
        log=server.log,
        stores=MemoryStores(),
        clock=server.clock,
        settings=WorkerSettings(),
        delete_retention_ms=DAY_MS,
        on_fatal=lambda error: (server.fatal.append(error), heard.set()),
    )
    loop.start()
    assert heard.wait(60)
    assert loop.stop(60)
    assert [type(error) for error in server.fatal] == [RecordsLost]


def test_a_position_that_is_deleted_is_none(server: Server) -> None:
    """A store whose position record is deleted does not know where it is."""
    server.worker.commit(0, {"a": 1})
    server.follow()
    assert read_position(server.stores.at(0)).next_offset == 1


class Lag:
    """A `worker.replica.LagMax` that an operator changes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.asked = 0

    @property
    def why_not(self) -> str:
        return "" if self.seconds else "the lag is too short"

    def __call__(self) -> float:
        self.asked += 1
        return self.seconds


def with_lag(server: Server, lag: Lag) -> None:
    """Start anew, with a lag that is asked for."""
    server.loop = ReplicaLoop(
        log=server.log,
        stores=server.stores,
        clock=server.clock,
        settings=WorkerSettings(),
        delete_retention_ms=DAY_MS,
        on_fatal=server.fatal.append,
        ask_lag_max_s=lag,
    )


def test_the_lag_that_counts_is_the_topics_own(server: Server) -> None:
    """A store that is further behind than the topic's own lag is hidden; the lag is asked for now and then."""
    lag = Lag(20.0)
    with_lag(server, lag)
    server.worker.commit(0, {"a": 1})
    server.follow()
    assert 1 < lag.asked < 5
    server.worker.commit(0, {"a": 1})
    server.loop._next_ends_s = 1e18
    server.clock.s += 21
    server.step()
    assert not server.loop.ready
    server.loop._next_ends_s = 0
    server.follow()
    assert server.read() == {"a": 2}


def test_a_lag_that_becomes_too_short_hides_all(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A lag that is too short hides everything, caught up or not, with the reason, until it is longer again."""
    lag = Lag(300.0)
    with_lag(server, lag)
    server.worker.commit(0, {"a": 1})
    server.follow()
    lag.seconds = 0.0
    server.step(10, s=1.0)
    for _ in range(10):
        with pytest.raises(NotReady, match="the lag is too short"):
            server.loop.stores()
        server.step(s=0.0)
    assert caplog.text.count("nothing is served") == 1
    assert not server.loop.ready
    assert not server.stores.destroyed
    lag.seconds = 300.0
    server.follow()
    assert server.read() == {"a": 1}


@pytest.mark.parametrize("is_between", [False, True])
def test_a_commit_that_is_gone_without_another_in_its_place(is_between: bool) -> None:
    """A store with a commit that the changelog lost is neither served nor deleted until a person decides."""
    server = Server()
    server.worker.commit(0, {"a": 1})
    kept = server.log.watermarks(CHANGELOG, 0).end_offset
    server.worker.commit(0, {"a": 1})
    server.follow()
    if is_between:
        server.start(restore_buffer_entries_max=1)
        server.log.append([Message(CHANGELOG, 0, TAG_SERIES + b"of nobody", b"")], timeout_s=1)
        server.step(s=1.0)
        assert read_meta(server.stores.at(0)).between_boundaries
    end = server.log.watermarks(CHANGELOG, 0).end_offset
    server.log.cut(CHANGELOG, 0, kept)
    server.log.skip(CHANGELOG, 0, end - kept)
    server.start()
    for _ in range(10):
        server.step(s=1.0)
    assert not server.loop.ready
    assert (server.stores.destroyed, series_of(server.stores.at(0))["a"]) == ([], 2)
    server.start(accept_loss=True)
    server.follow()
    assert series_of(server.loop.stores()[0]) == {"a": 1}
    assert len(server.stores.aside) == 1
