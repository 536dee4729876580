"""A partition that librdkafka stops to fetch is detected and read on; one without new records is left alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from types import SimpleNamespace
from typing import Any, cast

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as KafkaMessage

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.adapters.kafka.reader import KafkaReader, StallDetector
from pipeline.errors import PipelineError
from pipeline.ports import Message
from pipeline.settings import KafkaSettings
from pipeline.topics import DELTAS
from tests.broker.kafka import App, create_topics
from tests.broker.mock import reader_of
from tests.support import HandClock, wait_until

PARTITIONS = 3
ASK_S, STALLED_S = 1.0, 0.75
DETECTED_S = 3 * ASK_S
"""Time for the two answers after the request that was under way."""


@pytest.fixture(autouse=True)
def intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask four times as often as in production."""
    monkeypatch.setattr("pipeline.adapters.kafka.reader.ASK_INTERVAL_S", ASK_S)
    monkeypatch.setattr("pipeline.adapters.kafka.reader.STALLED_S", STALLED_S)


@pytest.fixture
def log(app: App) -> Iterator[KafkaLog]:
    """The log of topics that are empty."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    with closing(KafkaLog(parse_url(app.url), KafkaSettings(), SystemClock())) as made:
        yield made


def inside(reader: KafkaReader) -> Consumer:
    """Return the present consumer of a reader."""
    consumer = reader._consumer
    assert consumer is not None
    return consumer


def append(log: KafkaLog, *values: bytes) -> None:
    """Append one record to each partition, for each value."""
    messages = [Message(DELTAS, partition, None, value) for value in values for partition in range(PARTITIONS)]
    assert all(isinstance(it, int) for it in log.append(messages, timeout_s=20))


def read(reader: KafkaReader, into: dict[int, list[bytes | None]]) -> None:
    """Add the records that arrive within a moment to `into`."""
    for records in reader.poll(record_count_max=100, bytes_max=100_000, timeout_s=0.1):
        into[records.partition] += records.values


@pytest.mark.usefixtures("kafka_jars")
def test_a_partition_that_librdkafka_forgets_is_read_on(log: KafkaLog, app: App) -> None:
    """A forgotten partition is read on within seconds, with each record once; other partitions do not wait."""
    with closing(log.reader(DELTAS)) as reader:
        reader.assign(dict.fromkeys(range(PARTITIONS), 0))
        found: dict[int, list[bytes | None]] = {partition: [] for partition in range(PARTITIONS)}
        append(log, b"1")
        wait_until(lambda: read(reader, found) or all(found.values()), "the first of each")
        first = inside(reader)
        first.pause([TopicPartition(app.topic(DELTAS), 1)])  # what it looks like from outside
        append(log, b"2", b"3")
        wait_until(lambda: read(reader, found) or len(found[0]) == len(found[2]) == 3, "the other two")
        wait_until(lambda: read(reader, found) or len(found[1]) == 3, "the one that was forgotten")
        assert inside(reader) is not first
        append(log, b"4")
        wait_until(lambda: read(reader, found) or all(len(it) == 4 for it in found.values()), "all")
        assert [*found.values()] == [[b"1", b"2", b"3", b"4"]] * PARTITIONS


@pytest.mark.usefixtures("kafka_jars")
def test_an_idle_reader_keeps_its_consumer(log: KafkaLog) -> None:
    """A reader at the end keeps its consumer, also behind a transaction, whose end is a marker that no reader sees."""
    with closing(log.reader(DELTAS)) as reader:
        reader.assign(dict.fromkeys(range(PARTITIONS), 0))
        found: dict[int, list[bytes | None]] = {partition: [] for partition in range(PARTITIONS)}
        append(log, b"1")
        with closing(log.transaction("t")) as transaction:
            transaction.commit([Message(DELTAS, 0, None, b"2")], timeout_s=20)
        first, until_s = inside(reader), time.monotonic() + DETECTED_S
        while time.monotonic() < until_s:
            read(reader, found)
        assert found == {0: [b"1", b"2"], 1: [b"1"], 2: [b"1"]}
        assert inside(reader) is first


class World:
    """A log that answers when it is told to, and the time."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.ends: dict[int, int | Exception] = {}
        self.asked: list[dict[int, Future[Any]]] = []
        self.detector = StallDetector(self.ask, self.clock)

    def ask(self, partitions: Any) -> Mapping[int, Future[Any]]:
        self.asked.append({it: Future() for it in partitions})
        return self.asked[-1]

    def answer(self) -> None:
        for partition, future in self.asked.pop().items():
            end = self.ends[partition]
            if isinstance(end, Exception):
                future.set_exception(end)
            else:
                future.set_result(SimpleNamespace(offset=end))

    def look(self, after_s: float, cursors: Mapping[int, int], *, answered: bool = True) -> dict[int, int]:
        """Advance the clock, let the log answer, and return the stalled partitions."""
        self.clock.s += after_s
        found = self.detector.stalled(cursors)
        if answered and self.asked:
            self.answer()
            found |= self.detector.stalled(cursors)
        return found


def test_it_takes_two_answers() -> None:
    """A partition is stalled once two answers show records behind a cursor that does not move, each by itself."""
    world = World()
    world.ends = {0: 5, 1: 5, 2: 5}
    assert world.look(ASK_S - 0.1, {0: 5, 1: 3, 2: 3}) == {}, "it is not asked all the time"
    assert world.look(0.1, {0: 5, 1: 3, 2: 3}) == {}
    assert world.look(ASK_S, {0: 5, 1: 3, 2: 4}) == {1: 5}


def test_an_outage_is_no_stall() -> None:
    """A log that does not answer makes no partition stalled, however long that lasts."""
    world = World()
    world.ends = {0: 5}
    assert world.look(ASK_S, {0: 3}) == {}
    world.ends = {0: RuntimeError("away")}
    for _ in range(10):
        assert world.look(ASK_S, {0: 3}) == {}
    assert world.look(ASK_S, {0: 3}, answered=False) == {}
    assert world.look(100 * ASK_S, {0: 3}, answered=False) == {}, "no answer yet"
    world.ends = {0: 5}
    world.answer()
    assert world.look(0.0, {0: 5}, answered=False) == {}, "it was read meanwhile"


def test_another_assignment_begins_anew() -> None:
    """An answer for an earlier assignment says nothing about the present one."""
    world = World()
    world.ends = {0: 5}
    assert world.look(ASK_S, {0: 3}) == {}
    world.detector.forget()
    assert world.look(ASK_S, {0: 3}) == {}
    assert world.look(max(ASK_S, STALLED_S), {0: 3}) == {0: 5}


class _Failing:
    """A consumer that fails at its third call, after two lots; assigned again, it goes on from there."""

    def __init__(self) -> None:
        self.next_offset = self.calls = 0
        self.epochs: list[int | None] = []

    def assign(self, places: list[TopicPartition]) -> None:
        """Go on from an offset."""
        self.next_offset = places[0].offset
        self.epochs.append(places[0].leader_epoch)

    def seek(self, place: TopicPartition) -> None:
        """Do nothing: `assign` has gone there."""

    def consume(self, count: int, _: float) -> list[KafkaMessage]:
        """Return the next messages."""
        self.calls += 1
        if self.calls == 3:
            raise KafkaException(KafkaError(KafkaError._FAIL, "it fails once"))
        offsets = range(self.next_offset, min(self.next_offset + count, 2_000))
        self.next_offset = offsets.stop
        return [KafkaMessage("deltas", 0, it, None, b"value", timestamp=(1, 5), leader_epoch=7) for it in offsets]

    def poll(self, _: float) -> None:
        """Wait for nothing."""


def test_a_call_that_fails_within_a_poll_loses_nothing() -> None:
    """A reader reads again the messages that a poll had taken before one of its calls failed."""
    reader = reader_of({"bootstrap.servers": "", "group.id": "nobody"}, 2_000)
    with closing(inside(reader)):
        reader._consumer = cast("Consumer", failing := _Failing())
        reader.assign({0: 0})
        with pytest.raises(PipelineError):
            reader.poll(record_count_max=2_000, bytes_max=2**20, timeout_s=0.1)
        (records,) = reader.poll(record_count_max=2_000, bytes_max=2**20, timeout_s=0.1)
    assert (failing.calls, records.next_offset, [*records.offsets]) == (7, 2_000, [*range(2_000)])
    assert {*records.at_ms} == {5}
    assert (failing.epochs, records.leader_epoch) == ([None, None], 7), (
        "the epoch of messages that were lost counts as unread"
    )
