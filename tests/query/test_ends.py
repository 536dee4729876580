"""End offsets of the log: their time is never later than the question, and a read across a change is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest

from pipeline.core.query import Query
from pipeline.core.record import Definition
from pipeline.errors import Invalid, NotReady, Unavailable
from pipeline.ports import Store
from pipeline.query.ends import EndsNow, EndsPolled, LogEnds
from pipeline.query.reader import ViewReader
from pipeline.topics import DELTAS
from tests.query.support import World, scanned
from tests.support import HandClock, wait_until

DEFINITION = Definition("v", "sum", ("n",))


class Log:
    """A log that says where it ends, takes its time for it, or fails."""

    def __init__(self, clock: HandClock) -> None:
        self.clock = clock
        self.end = 7
        self.takes_s = 0.0
        self.error: Exception | None = None
        self.looks = self.start_looks = 0

    def end_offsets(self) -> Mapping[int, int]:
        self.looks += 1
        if self.error is not None:
            raise self.error
        end = self.end
        self.clock.s += self.takes_s
        return {0: end}

    def start_offsets(self) -> Mapping[int, int]:
        self.start_looks += 1
        self.clock.s += self.takes_s
        return {0: 2}


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def log(clock: HandClock) -> Log:
    return Log(clock)


@contextmanager
def polled(log: Log) -> Iterator[EndsPolled]:
    ends = EndsPolled(log.end_offsets, log.start_offsets, log.clock, interval_ms=1)
    ends.start()
    try:
        yield ends
    finally:
        ends.stop()
        ends.stop()
        assert ends.thread.stop(60)


def look_twice(log: Log) -> None:
    looks = log.looks
    wait_until(lambda: log.looks >= looks + 2, "two looks", 60)


def test_now_asks_at_each_read(log: Log) -> None:
    """Ends have the time before the log was asked, however slow it is; reads within a millisecond share one answer."""
    ends = EndsNow(log.end_offsets, log.start_offsets, log.clock)
    began_s = log.clock.s
    log.takes_s = 3
    seen = ends()
    assert seen == LogEnds(began_s, {0: 7}, {0: 2})
    log.takes_s, log.end = 0, 8
    assert ends().end_offsets == {0: 8}
    log.clock.s += 0.0005
    log.end = 9
    assert ends().end_offsets == {0: 8}
    log.clock.s += 0.001
    assert ends().end_offsets == {0: 9}


def test_now_says_nothing_while_the_log_is_away(log: Log) -> None:
    """While the log is away there are no ends, and the very next read asks again."""
    ends = EndsNow(log.end_offsets, log.start_offsets, log.clock)
    ends()
    log.clock.s += 1
    log.error = Unavailable("away")
    assert ends() == LogEnds(log.clock.s, {}, {})
    log.error = None
    assert ends().end_offsets == {0: 7}
    log.error = Invalid("a bug")
    log.clock.s += 1
    with pytest.raises(Invalid):
        ends()


def test_polled_knows_nothing_at_first(log: Log) -> None:
    """A read before the first answer has no ends."""
    ends = EndsPolled(log.end_offsets, log.start_offsets, log.clock, interval_ms=1)
    assert ends() == LogEnds(log.clock.s, {}, {})
    ends.stop()


def test_polled_time_is_from_before_the_look(log: Log) -> None:
    """The time of the ends is that before the log was asked for them, and does not include asking for the start offsets."""
    log.takes_s = 3
    with polled(log) as ends:
        wait_until(lambda: ends().end_offsets, "an answer", 60)
        for _ in range(20):
            seen = ends()
            assert seen.at_s <= log.clock.s - 3
            assert (seen.at_s - 1_000) % 3 == 0


def test_polled_sees_what_is_new(log: Log) -> None:
    """The polling thread asks for the ends every time, for the starts every 10 s."""
    with polled(log) as ends:
        wait_until(lambda: ends().end_offsets == {0: 7}, "the end", 60)
        log.end = 8
        wait_until(lambda: ends().end_offsets == {0: 8}, "the new end", 60)
        assert log.start_looks == 1
        log.clock.s += 10
        wait_until(lambda: log.start_looks == 2, "the start again", 60)


def test_polled_asks_for_the_topic_after_its_ends(log: Log) -> None:
    """Ends of a topic never go with the id of an older one, which positions could have."""
    asked: list[int] = []

    def source_id() -> str:
        asked.append(log.looks)
        return f"id after look {log.looks}"

    ends = EndsPolled(log.end_offsets, log.start_offsets, log.clock, interval_ms=1, source_id=source_id)
    ends.start()
    wait_until(lambda: len(asked) > 3, "four looks", 60)
    ends.stop()
    assert ends.thread.stop(60)
    assert asked[:3] == [1, 2, 3]
    assert ends().source_id == f"id after look {log.looks}"


def test_polled_keeps_its_time_while_the_log_is_away(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    """The last answer is returned with its own time, so that staleness grows; each outage is logged once."""
    with polled(log) as ends, caplog.at_level(logging.WARNING):
        wait_until(lambda: ends().end_offsets, "an answer", 60)
        look_twice(log)
        log.error = Unavailable("away")
        look_twice(log)
        seen = ends()
        for _ in range(3):
            log.clock.s += 60
            look_twice(log)
            assert ends() is seen
        assert caplog.text.count("staleness grows") == 1
        log.error = None
        wait_until(lambda: ends().at_s == log.clock.s, "the present", 60)
        log.error = Invalid("the topic is gone")
        wait_until(lambda: caplog.text.count("staleness grows") == 2, "a second warning", 60)
        log.error = None
        log.clock.s += 1
        wait_until(lambda: ends().at_s == log.clock.s, "the present", 60)


def test_staleness_grows_while_the_log_is_away(clock: HandClock) -> None:
    """Staleness grows from when the log was last seen to end at the position, and falls when the log is back."""
    world = World(partition_count=1, clock=clock)
    world.append(0, DEFINITION, {("a",): 1})
    world.fold()
    log = Log(clock)
    log.end = 1
    with polled(log) as ends:
        reader = ViewReader(stores=world.stores, ends=ends, clock=clock, settings=world.settings)

        def staleness_ms() -> int | None:
            return reader.read(Query("v"), deadline_s=1e18).as_of.staleness_ms

        wait_until(lambda: ends().end_offsets, "an answer", 60)
        assert staleness_ms() == 0
        log.error = Unavailable("away")
        look_twice(log)
        for _ in range(3):
            before = staleness_ms()
            assert before is not None
            clock.s += 60
            assert staleness_ms() == before + 60_000
        log.error = None
        wait_until(lambda: staleness_ms() == 0, "a young answer", 60)
        log.end = 2  # one record more, which the store lacks
        wait_until(lambda: ends().end_offsets == {0: 2}, "the new end", 60)
        clock.s += 5
        assert (staleness_ms() or 0) >= 5_000


class Taken(World):
    """A world whose stores are taken away at a chosen look."""

    def __init__(self) -> None:
        super().__init__(partition_count=2)
        self.looks = 0
        self.taken_at = 10**9
        self.change: Callable[[dict[int, Store]], None] = lambda stores: None

    def stores(self) -> Mapping[int, Store]:
        stores = dict(super().stores())
        self.looks += 1
        if self.looks > self.taken_at:
            self.change(stores)
        return stores


def gone(stores: dict[int, Store]) -> None:
    del stores[1]


def anew(stores: dict[int, Store]) -> None:
    stores[1] = stores[0]


def hidden(stores: dict[int, Store]) -> None:
    raise NotReady("restoring")


def more(stores: dict[int, Store]) -> None:
    stores[2] = stores[0]


READS: dict[str, Callable[[ViewReader], object]] = {
    "definition": lambda reader: reader.definition("v"),
    "point": lambda reader: reader.point(Query("v", by=())),
    "scan": lambda reader: scanned(reader, Query("v", by=())),
    "views": lambda reader: reader.views(),
    "scrape": lambda reader: reader.scrape(deadline_s=1e18),
    "partitions": lambda reader: reader.partitions(),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("change", [gone, anew, hidden])
def test_a_read_across_a_change_is_refused(name: str, change: Callable[[dict[int, Store]], None]) -> None:
    """A read of a store that is taken away before the read is done is refused."""
    world = Taken()
    view = Definition("v", "sum") if name == "point" else DEFINITION
    world.publish(view, {(): 1} if name == "point" else {(str(i),): i for i in range(20)})
    reader = world.new_reader()
    if name != "definition":
        reader.definition("v")
    READS[name](reader)
    if name == "definition":
        reader = world.new_reader()
    world.change, world.taken_at = change, world.looks + 1
    with pytest.raises(NotReady):
        READS[name](reader)


@pytest.mark.parametrize("name", READS)
def test_a_partition_more_disturbs_no_read(name: str) -> None:
    """A partition that is added after a read began does not disturb it."""
    world = Taken()
    world.publish(Definition("v", "sum"), {(): 1})
    reader = world.new_reader()
    world.change, world.taken_at = more, world.looks + 1
    READS[name](reader)


def test_the_log_is_asked_about_deltas() -> None:
    """A server shows the ends of deltas, not of the topic that it follows."""
    world = World(partition_count=1)
    world.append(0, DEFINITION, {("a",): 1})
    world.fold()
    assert world.reader.partitions()[0].end_offset == world.log.end_offsets(DELTAS)[0]
