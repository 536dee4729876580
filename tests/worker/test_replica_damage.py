"""Stores of a query server that are damaged under it: out of service at once, made anew, exact again."""

from __future__ import annotations

from pathlib import Path

import pytest

import pipeline.metrics as m
from pipeline.adapters.memory import MemoryLog
from pipeline.adapters.rocks import RocksStores
from pipeline.core.query import Query
from pipeline.core.record import Definition, prefix_end, view_prefix
from pipeline.errors import LogCorrupt, NotReady, StoreCorrupt, Unavailable
from pipeline.ports import ReadableStore
from pipeline.query.ends import EndsNow
from pipeline.query.reader import ViewReader
from pipeline.settings import LogSettings, QuerySettings, WorkerSettings
from pipeline.topics import DELTAS
from pipeline.worker.replicas import ReplicaLoop
from tests.embedded.test_damaged_store import flip_everywhere
from tests.support import HandClock
from tests.worker.support import DAY_MS, VIEW, ChangingLog, Recorder, Worker

SERIES = 2_000
TOTAL = sum(range(SERIES))


class Server:
    """A loop that is driven by hand, on real stores of two partitions, and a reader of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = HandClock()
        self.log = ChangingLog(2, self.clock)
        self.worker = Worker(self.log, self.clock)
        self.metrics = Recorder()
        self.fatal: list[BaseException] = []
        for number in range(2):
            self.worker.commit(number, {str(n): n for n in range(number, SERIES, 2)})
            self.worker.commit(number, {str(number): 0})  # what a start reads of the store is the last commit only
        self.start()
        self.follow()

    def start(self) -> None:
        self.stores = RocksStores(self.path, LogSettings())
        self.loop = ReplicaLoop(
            log=self.log,
            stores=self.stores,
            clock=self.clock,
            settings=WorkerSettings(),
            delete_retention_ms=DAY_MS,
            on_fatal=self.fatal.append,
            metrics=self.metrics,
        )
        self.reader = ViewReader(
            stores=self.loop.stores,
            ends=EndsNow(lambda: MemoryLog.end_offsets(self.log, DELTAS), dict, self.clock),
            clock=self.clock,
            settings=QuerySettings(),
            on_damage=self.loop.distrust,
        )

    def follow(self) -> None:
        for _ in range(10):
            self.clock.s += 1.0
            self.loop.step()
        assert self.loop.ready

    def restart(self) -> None:
        self.loop.close()
        self.stores.close()
        self.start()
        self.follow()

    def damage(self, number: int) -> None:
        """Restart, so that all entries are in files and in no cache; then damage the files of one store."""
        self.restart()
        flip_everywhere(self.path / str(number))

    def total(self) -> object:
        return self.reader.read(Query(VIEW.view, by=()), deadline_s=1e12).series[0].value

    def rebuilt(self) -> list[float]:
        return [self.metrics.of(m.STORES_REBUILT, number) for number in range(2)]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "stores")


def test_a_damaged_store_is_made_anew(server: Server) -> None:
    """From the read that meets the damage on no read is answered; then everything is there, and one store is new."""
    assert server.total() == TOTAL
    server.damage(1)
    with pytest.raises(NotReady, match="partition 1: its store was damaged"):
        server.total()
    assert not server.loop.ready
    for look in (server.total, server.reader.views, server.reader.partitions):
        with pytest.raises(NotReady, match=r"restoring: about .* rebuilding what was damaged"):
            look()
    assert [it.phase for it in server.loop.status()] == ["following", "restoring"]
    server.follow()
    assert server.total() == TOTAL
    assert server.rebuilt() == [0, 1]
    server.worker.commit(1, {"1": 1_000})
    server.follow()
    assert server.total() == TOTAL + 1_000
    assert not server.fatal


def test_while_the_log_is_away_nothing_is_deleted(server: Server) -> None:
    """A damaged store stays, unserved, while the log is away, as it may be all there is; then it is rebuilt."""
    server.damage(0)
    with pytest.raises(NotReady):
        server.total()
    server.log.away = True
    for _ in range(5):
        server.clock.s += 1.0
        with pytest.raises(Unavailable):
            server.loop.step()
        assert not server.loop.ready
    assert [*(server.path / "0").glob("*.sst")]
    assert server.rebuilt() == [0, 0]
    server.log.away = False
    server.follow()
    assert server.total() == TOTAL
    assert server.rebuilt() == [1, 0]


def test_what_is_said_of_an_older_store_is_not_held_against_the_new_one(server: Server) -> None:
    """A slow read's report of damage in an earlier store does not condemn the one that was made since."""
    old: ReadableStore = server.loop.stores()[0]
    server.loop.distrust(0, old, StoreCorrupt("a block", 0))
    server.loop.distrust(0, old, StoreCorrupt("the same block, met by another read", 0))
    server.follow()
    server.loop.distrust(0, old, StoreCorrupt("the same block, met by a slow read", 0))
    assert server.loop.ready
    server.follow()
    assert server.rebuilt() == [1, 0]


def test_what_the_changelog_has_too_is_not_rebuilt_for_ever(server: Server) -> None:
    """Damage that the changelog has, too, is rebuilt once; then the log is named, and everything else is served."""
    prefix = view_prefix(VIEW.view)
    for count in range(2):
        store = server.stores._open[0]
        key, _ = next(store.scan(prefix, prefix_end(prefix)))
        store.write([key], [b"\xffgarbage"])
        with pytest.raises(LogCorrupt if count else NotReady):
            server.total()
        server.follow()
    assert server.rebuilt() == [1, 0]
    assert server.loop.ready
    with pytest.raises(LogCorrupt):
        server.total()
    assert server.reader.definition(VIEW.view) == Definition(VIEW.view, VIEW.kind, VIEW.labels)
