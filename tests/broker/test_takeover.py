"""Takeovers on a real broker: behind a foreign transaction, and in a history that the log has lost."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from confluent_kafka import Producer

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.adapters.memory import MemoryStores
from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Group, series_suffix
from pipeline.errors import LogCorrupt, RecordsLost, Unavailable
from pipeline.ports import Message
from pipeline.settings import KafkaSettings, WorkerSettings
from pipeline.topics import CHANGELOG, DELTAS
from pipeline.worker.partition import OwnedPartition
from tests.broker.kafka import App, Broker, create_topics, delete_topics, new_app
from tests.support import wait_until
from tests.worker.support import DAY_MS, VIEW, Recorder, series_of

SEEN_S = 30.0


class _World:
    """One partition of an app, and its successive owners, each with stores of its own."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.log = KafkaLog(parse_url(app.url), KafkaSettings(kafka_timeout_ms=20_000), SystemClock())
        self.sequence = 0

    def send(self, **series: float) -> None:
        group = Group(VIEW, [series_suffix((name,)) for name in series], [*series.values()])
        batch = encode_batch(Batch("p", 0, 0, self.sequence, 0, SystemClock().now_ms(), [group]))
        self.sequence += 1
        (covers,) = self.log.append([Message(DELTAS, 0, None, batch)], timeout_s=20)
        assert isinstance(covers, int)

    def owner(self, *, commit_timeout_ms: int = 20_000, accept_loss: bool = False) -> OwnedPartition:
        return OwnedPartition(
            0,
            log=self.log,
            stores=MemoryStores(),
            clock=SystemClock(),
            settings=WorkerSettings(commit_timeout_ms=commit_timeout_ms, accept_loss=accept_loss),
            delete_retention_ms=DAY_MS,
            app=self.app.app,
            metrics=Recorder(),
        )

    def fold(self, partition: OwnedPartition, next_offset: int) -> None:
        with closing(self.log.reader(DELTAS)) as reader:
            offset, epoch = partition.resume()
            reader.assign({0: offset}, {0: epoch})

            def folded() -> bool:
                for records in reader.poll(record_count_max=100, bytes_max=2**20, timeout_s=0.5):
                    partition.fold(records)
                return partition.task.next_offset >= next_offset

            wait_until(folded, "folding", SEEN_S)


@pytest.fixture
def world(app: App) -> Iterator[_World]:
    create_topics(app.bootstrap, app.app, 1)
    it = _World(app)
    yield it
    it.log.close()


@pytest.mark.long
def test_a_hanging_transaction_on_the_changelog(world: _World) -> None:
    """Nothing is committed past the transaction and nobody is ready behind it; once it is over, both numbers are exact."""
    first = world.owner()
    first.start()
    world.send(x=1, y=1)
    world.fold(first, 1)
    first.commit()
    world.send(x=10)
    world.send(y=10)
    stranger = Producer({"bootstrap.servers": world.app.bootstrap, "transactional.id": f"{world.app.app}-stranger"})
    stranger.init_transactions(20)
    stranger.begin_transaction()
    stranger.produce(world.app.topic(CHANGELOG), b"v", b"\x02k", 0)
    assert stranger.flush(20) == 0

    second = world.owner(commit_timeout_ms=4_000)
    told: list[str] = []
    started = threading.Event()

    def start() -> None:
        second.start(lambda progress: told.append(progress.waiting))
        started.set()

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    wait_until(lambda: any("find-hanging" in waiting for waiting in told), "an explanation", SEEN_S)
    assert not started.is_set()
    stranger.abort_transaction(20)
    assert started.wait(SEEN_S)
    thread.join()
    world.fold(second, 2)
    second.commit()

    stranger.begin_transaction()
    stranger.produce(world.app.topic(CHANGELOG), b"v", b"\x02k", 0)
    assert stranger.flush(20) == 0
    world.fold(second, 3)
    with pytest.raises(Unavailable, match="can't be read up to"):
        second.commit()
    stranger.commit_transaction(20)

    third = world.owner()
    third.start()
    world.fold(third, 3)
    third.commit()
    world.send(x=0)
    world.fold(third, 4)
    third.commit()
    fourth = world.owner()
    fourth.start()
    assert series_of(fourth.store) == {"x": 11, "y": 11}
    assert fourth.task.next_offset == 4


@pytest.mark.long
def test_records_of_a_leader_that_are_gone(kafka_jars: Path, tmp_path: Path) -> None:
    """A position whose offset exists, but in another history of a log that has lost what was folded, is refused."""
    with Broker(tmp_path) as broker:
        app = new_app(broker.bootstrap)
        create_topics(app.bootstrap, app.app, 1)
        world = _World(app)
        for _ in range(5):
            world.send(x=1)
        broker.stop()
        (folder,) = (tmp_path / "data").glob(f"{app.topic(DELTAS)}-0")
        shutil.copytree(folder, tmp_path / "old")
        broker.start()
        for _ in range(5):
            world.send(x=1)
        owner = world.owner()
        owner.start()
        world.fold(owner, 10)
        owner.commit()
        assert owner.resume()[1] > 0
        world.log.close()
        broker.stop()
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "old", folder)
        broker.start()
        world.log = KafkaLog(parse_url(app.url), KafkaSettings(kafka_timeout_ms=20_000), SystemClock())
        for _ in range(10):
            world.send(x=1)
        again = world.owner()
        again.start()
        assert again.task.next_offset == 10
        with pytest.raises(RecordsLost, match="what was read below 10, of leader epoch"):
            world.fold(again, 15)
        accepting = world.owner(accept_loss=True)
        accepting.start()
        assert accepting.task.next_offset == 5, "below that the log holds what was folded, from there on what was not"
        world.fold(accepting, 15)
        accepting.commit()
        assert series_of(accepting.store) == {"x": 20}
        world.log.close()


def test_deltas_that_are_made_anew_while_they_are_folded(world: _World) -> None:
    """Records of the new topic that continue the old one's offsets are read, and never committed."""
    for _ in range(3):
        world.send(x=1)
    owner = world.owner()
    owner.start()
    world.fold(owner, 3)
    owner.commit()
    delete_topics(world.app.bootstrap, world.app.app, only=(DELTAS,))
    create_topics(world.app.bootstrap, world.app.app, 1, only=(DELTAS,))
    for _ in range(5):
        world.send(y=1)
    world.fold(owner, 5)
    with pytest.raises(LogCorrupt, match="made anew"):
        owner.commit()
    assert series_of(owner.store) == {"x": 3}
    accepting = world.owner(accept_loss=True)
    accepting.start()
    world.fold(accepting, 5)
    accepting.commit()
    assert series_of(accepting.store) == {"x": 3, "y": 5}
