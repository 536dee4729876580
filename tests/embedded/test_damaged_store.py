"""A store whose bytes change under a running process: out of service at once, rebuilt, and exact again without a restart."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pipeline.metrics as m
from pipeline.adapters.rocks import TranslatedErrors
from pipeline.core.answer import Answer
from pipeline.core.exposition import Exposition
from pipeline.core.query import Query, parse_matcher
from pipeline.core.record import Definition, definition_key, prefix_end, view_prefix
from pipeline.errors import LogCorrupt, NoSpace, NotReady, StoreCorrupt, Unavailable
from pipeline.ports import RawDelta
from pipeline.query.reader import ViewReader
from pipeline.roles.embedded import Engine
from pipeline.settings import LogSettings
from tests.publisher.support import Meter as PublisherMeter
from tests.support import wait_until

SERIES = 3_000
DEFINITION = Definition("v", "sum", ("n",))
PARTITIONS = 2
TOTAL = sum(range(SERIES))
LATER_S = 1e12


def flip_everywhere(path: Path) -> None:
    """Change a byte of every block of data, but not the blocks behind them, which are read when a file is opened."""
    for file in path.glob("*.sst"):
        data = bytearray(file.read_bytes())
        for at in range(100, int(len(data) * 0.7), 500):
            data[at] ^= 0xFF
        with file.open("r+b") as opened:  # the same file: the process has it open
            opened.write(data)


class Meter(PublisherMeter):
    """A `metrics.Metrics` that counts what a worker counts; its gauges go with a partition."""

    def forget(self, partition: int) -> None:
        """Do nothing: only counters matter here."""


class Running:
    """An engine on a data directory, whose stores are on disk and in no cache."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.meter = Meter()
        self.fatal: list[BaseException] = []
        self.engine = self._start()
        deltas = [RawDelta("v", "sum", {"n": str(n)}, n) for n in range(SERIES)]
        self.publish(deltas)
        self.wait_folded()
        self.restart()

    def _start(self) -> Engine:
        engine = Engine(
            LogSettings(data=str(self.data), partitions=PARTITIONS), metrics=self.meter, on_fatal=self.fatal.append
        )
        engine.start()
        assert engine.wait_ready(20)
        return engine

    def restart(self) -> None:
        assert self.engine.stop()
        self.engine = self._start()

    def publish(self, deltas: list[RawDelta]) -> None:
        self.engine.ingest.deltas(deltas)

    def wait_folded(self) -> None:
        def folded() -> bool:
            try:
                return all(state.lag == 0 for state in self.reader.partitions())
            except NotReady:
                return False

        wait_until(folded, "everything to be folded")

    @property
    def reader(self) -> ViewReader:
        return self.engine.reader

    def damage(self, *numbers: int) -> None:
        for number in numbers:
            flip_everywhere(self.data / "stores" / str(number))

    def wait_ready(self) -> None:
        wait_until(lambda: self.engine.ready, "the rebuild")
        assert not self.fatal

    def rebuilt(self) -> list[int]:
        return [self.meter.of(m.STORES_REBUILT, number) for number in range(PARTITIONS)]

    def total(self) -> object:
        return self.read(by=()).series[0].value

    def read(self, **query: object) -> Answer:
        return self.reader.read(Query("v", **query), deadline_s=LATER_S)  # type: ignore[arg-type]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path / "data")
    yield made
    made.engine.stop()


READS: dict[str, Callable[[Running], object]] = {
    "scan": lambda it: it.read(),
    "total": lambda it: it.read(by=()),
    "filtered": lambda it: it.read(where=(parse_matcher("n=~1.*"),)),
    "point": lambda it: [it.read(where=(parse_matcher(f"n={n}"),)) for n in range(0, SERIES, 7)],
    "scrape": lambda it: it.reader.scrape(deadline_s=LATER_S),
}


@pytest.mark.parametrize("kind", [*READS])
def test_a_read_that_meets_damage(running: Running, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Any read that meets damage is 503 with progress, not ready, one line in the log; then exact, in the same process."""
    running.damage(0)
    with caplog.at_level(logging.WARNING), pytest.raises(NotReady, match="partition 0: its store was damaged"):
        READS[kind](running)
    assert not running.engine.ready or running.rebuilt() == [1, 0]
    running.wait_ready()
    READS[kind](running)
    assert running.total() == TOTAL
    assert running.rebuilt() == [1, 0]
    lines = [it.getMessage() for it in caplog.records if "rebuilding the store" in it.getMessage()]
    assert len(lines) == 1, lines
    assert "partition 0" in lines[0]
    assert "block checksum mismatch" in lines[0]
    running.publish([RawDelta("v", "sum", {"n": "7"}, 1_000)])
    running.wait_folded()
    assert running.total() == TOTAL + 1_000


def test_while_it_is_rebuilt_nothing_is_answered(running: Running) -> None:
    """From the read that has met the damage on, every read and the readiness say so, until all of it is there again."""
    gate = threading.Event()
    taking = running.engine.partitions[0].start

    def slow_start(*arguments: object) -> None:
        assert gate.wait(20)
        taking(*arguments)  # type: ignore[arg-type]

    running.engine.partitions[0].start = slow_start  # type: ignore[method-assign]
    running.damage(0)
    with pytest.raises(NotReady):
        running.read()
    for look in (running.total, running.reader.views, running.reader.partitions, lambda: READS["scrape"](running)):
        assert not running.engine.ready
        with pytest.raises(NotReady, match="restoring: about"):
            look()
    assert running.engine.status().ready is False
    phases = {it.partition: it.phase for it in running.engine.status().partitions}
    wait_until(lambda: running.rebuilt() == [1, 0], "the store to be deleted")
    assert phases[1] != "restoring"
    gate.set()
    running.wait_ready()
    assert running.total() == TOTAL


def test_readers_at_work(running: Running) -> None:
    """Many threads that read in their own ways get exact answers, or none from damaged data."""
    stop, wrong = threading.Event(), []
    answered = [0] * 3

    def look(number: int) -> None:
        while not stop.is_set():
            try:
                found = running.total() if number < 2 else sum(s.value for s in running.read().series)
                answered[number] += 1
                if found != TOTAL:
                    wrong.append(found)
            except NotReady:
                time.sleep(0.001)
            except BaseException as error:
                wrong.append(error)
                raise

    threads = [threading.Thread(target=look, args=(number,)) for number in range(3)]
    running.damage(0, 1)
    for thread in threads:
        thread.start()
    wait_until(lambda: running.rebuilt() == [1, 1], "both to be rebuilt")
    running.wait_ready()
    before = [*answered]
    wait_until(lambda: all(now > then for now, then in zip(answered, before, strict=True)), "answers to each")
    stop.set()
    for thread in threads:
        thread.join(20)
    assert not wrong


def test_a_commit_that_meets_damage(running: Running) -> None:
    """A worker whose commit meets damage takes the partition over again, and counts each delta once."""
    running.damage(0, 1)
    running.publish([RawDelta("v", "sum", {"n": str(n)}, 10_000) for n in range(SERIES)])
    wait_until(lambda: running.rebuilt() == [1, 1], "both to be rebuilt")
    running.wait_ready()
    running.wait_folded()
    assert running.total() == TOTAL + 10_000 * SERIES
    assert not running.fatal


def test_damage_again_and_again(running: Running) -> None:
    """A store that is damaged again and again is rebuilt each time, and the process does not end."""
    for count in range(1, 4):
        running.restart()  # so that the store is in files again
        running.damage(1)
        with pytest.raises(NotReady):
            running.read()
        running.wait_ready()
        assert running.rebuilt() == [0, count]
        assert running.total() == TOTAL


def the_file(folder: Path, pattern: str) -> Path:
    """Return the newest file of this kind."""
    return sorted(folder.glob(pattern))[-1]


def flip_at(path: Path, part: float) -> None:
    """Change 8 bytes."""
    data = bytearray(path.read_bytes())
    at = min(int(len(data) * part), len(data) - 8)
    data[at : at + 8] = bytes(byte ^ 0xFF for byte in data[at : at + 8])
    path.write_bytes(data)


def cut(path: Path, part: float) -> None:
    """Keep the beginning of a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"a block at {part}": lambda f, part=part: flip_at(the_file(f, "*.sst"), part) for part in (0.0, 0.1, 0.5, 0.8)},  # type: ignore[misc]
    **{f"index or filter at {part}": lambda f, part=part: flip_at(the_file(f, "*.sst"), part) for part in (0.95, 0.99)},  # type: ignore[misc]
    "footer": lambda f: flip_at(the_file(f, "*.sst"), 1.0),
    "all blocks": flip_everywhere,
    "half a file": lambda f: cut(the_file(f, "*.sst"), 0.5),
    "an empty file": lambda f: cut(the_file(f, "*.sst"), 0.0),
    "no file": lambda f: the_file(f, "*.sst").unlink(),
    "manifest": lambda f: flip_at(the_file(f, "MANIFEST-*"), 0.4),
    "half a manifest": lambda f: cut(the_file(f, "MANIFEST-*"), 0.5),
    "no manifest": lambda f: the_file(f, "MANIFEST-*").unlink(),
    "current": lambda f: flip_at(f / "CURRENT", 0.3),
    "no current": lambda f: (f / "CURRENT").unlink(),
    "another file's bytes": lambda f: the_file(f, "*.sst").write_bytes(the_file(f, "MANIFEST-*").read_bytes() * 50),
}


@pytest.mark.parametrize("damage", [*DAMAGES])
def test_a_start_on_a_damaged_store(running: Running, damage: str) -> None:
    """Damage done while nothing ran is noticed by the start, or the first read; at most one rebuild; exact."""
    assert running.engine.stop()
    DAMAGES[damage](running.data / "stores" / "0")
    running.engine = running._start()
    for read in READS.values():
        try:
            read(running)
        except NotReady:
            running.wait_ready()
            read(running)
    assert running.total() == TOTAL
    assert sum(view.series_count for view in running.reader.views().views) == SERIES
    assert running.rebuilt() in ([0, 0], [1, 0])
    assert running.rebuilt() == [1, 0] or damage in HARMLESS
    assert not running.fatal


HARMLESS = {"index or filter at 0.95", "half a manifest"}
"""Damage that need not be noticed: a filter is not needed, and a manifest's end may not be, or the store is an older one."""


@pytest.mark.parametrize("where", ["value", "definition"])
def test_an_entry_that_can_not_be_decoded(running: Running, where: str) -> None:
    """A store with whole bytes that can't be decoded is rebuilt as if a block were broken."""
    partition = running.engine.partitions[0]
    if where == "value":
        prefix = view_prefix("v")
        key = next(partition.store.scan(prefix, prefix_end(prefix)))[0]
    else:
        key = definition_key(DEFINITION)
    partition.store.write([key], [b"\xffgarbage"])
    with pytest.raises(NotReady, match="partition 0: its store was damaged"):
        running.read()
    running.wait_ready()
    assert running.rebuilt() == [1, 0]
    assert running.total() == TOTAL


def test_who_holds_the_error_does_not_hold_the_store(running: Running) -> None:
    """A rebuild waits for scans of the old store, and no error that a read has raised holds one."""
    running.damage(0)
    held = []
    for kind in ("scan", "scrape"):
        try:
            READS[kind](running)
        except NotReady as error:
            held.append(error)
            running.wait_ready()
        running.restart()
        running.damage(0)
    assert len(held) == 2


def test_a_changelog_that_holds_it_too(running: Running) -> None:
    """A store that has the same entry again after a rebuild is not rebuilt for ever: the log is named."""
    partition = running.engine.partitions[0]
    prefix = view_prefix("v")
    key = next(partition.store.scan(prefix, prefix_end(prefix)))[0]
    partition.store.write([key], [b"\xffgarbage"])
    with pytest.raises(NotReady):
        running.read()
    running.wait_ready()
    partition.store.write([key], [b"\xffgarbage"])  # as the restore would have done
    with pytest.raises(LogCorrupt, match="the changelog holds it too"):
        running.read()
    assert running.rebuilt() == [1, 0]
    assert running.engine.ready
    shown = running.reader.scrape(deadline_s=LATER_S)
    assert isinstance(shown, Exposition)
    assert shown.omitted == {"v": "unreadable"}


def test_a_commit_that_meets_what_can_not_be_decoded(running: Running) -> None:
    """A store is rebuilt once, and each delta counts once; if the entry comes again, the worker ends and names the log."""
    partition = running.engine.partitions[0]
    prefix = view_prefix("v")
    key = next(partition.store.scan(prefix, prefix_end(prefix)))[0]
    everything = [RawDelta("v", "sum", {"n": str(n)}, 1) for n in range(SERIES)]
    partition.store.write([key], [b"\xffgarbage"])
    running.publish(everything)
    wait_until(lambda: running.rebuilt() == [1, 0], "the rebuild")
    running.wait_ready()
    running.wait_folded()
    assert running.total() == TOTAL + SERIES
    running.engine._loop.distrust(0, partition.store, StoreCorrupt("a block", 0))  # so that no state is in the task's cache
    wait_until(lambda: running.rebuilt() == [2, 0], "the second rebuild")
    running.wait_ready()
    partition.store.write([key], [b"\xffgarbage"])  # as the restore would have done
    running.publish(everything)
    wait_until(lambda: running.fatal, "the end")
    assert isinstance(running.fatal[0], LogCorrupt)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Corruption: block checksum mismatch in 000008.sst", StoreCorrupt),
        ("IO error: While pread offset 0 len 4096: 000008.sst: Input/output error", StoreCorrupt),
        ("IO error: No such file or directory: While open a file for random read: 000008.sst", StoreCorrupt),
        ("IO error: lock hold by current process: LOCK: No locks available", Unavailable),
        ("IO error: No space left on device", NoSpace),
    ],
)
def test_what_rocksdb_says(said: str, kind: type[Exception]) -> None:
    """Errors of unreadable data are damage, and name the partition; errors that can pass are not."""
    error = TranslatedErrors("store 3", partition=3).translate(Exception(said))
    assert type(error) is kind
    assert getattr(error, "partition", 3) == 3
