"""The embedded log beyond the contract: opening, closing, failing, and promises of one process only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline.metrics as m
from pipeline.adapters.embedded.chunks import CHUNK_BYTES, CHUNK_RECORDS_MAX, Partition
from pipeline.adapters.embedded.log import RECORD_BYTES_MAX, EmbeddedLog
from pipeline.errors import Invalid, NotFound, NotReady, PipelineError, RecordsLost, Unavailable
from pipeline.ports import Message
from pipeline.settings import LogSettings
from pipeline.topics import Topic
from tests.contracts.support import (
    DAY_MS,
    PARTITIONS,
    TOPICS,
    EmbeddedLab,
    ManualClock,
    RocksStoreLab,
    append,
    appended,
    poll,
    read,
    threads,
    until,
)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[EmbeddedLab]:
    made = EmbeddedLab(tmp_path / "log")
    yield made
    made.embedded.close()


def open_log(lab: EmbeddedLab, topics: dict[str, Topic] = TOPICS, **settings: Any) -> EmbeddedLog:
    return EmbeddedLog(lab.path, topics, LogSettings(**settings), lab.clock)


# Opening and closing


def test_everything_is_there_after_opening_again(lab: EmbeddedLab) -> None:
    """Records, offsets and watermarks of every topic and partition are there, and appending goes on behind them."""
    for topic in TOPICS:
        for partition in range(PARTITIONS):
            append(lab.log, topic, partition, b"%d" % partition, b"second", key=b"k")
    before = {(topic, p): read(lab.log, topic, p) for topic in TOPICS for p in range(PARTITIONS)}
    for _ in range(2):
        lab.reopen()
        assert {(topic, p): read(lab.log, topic, p) for topic in TOPICS for p in range(PARTITIONS)} == before
    assert append(lab.log, "table", 3, b"third") == [3]


def test_the_number_of_partitions_is_fixed(lab: EmbeddedLab) -> None:
    """Another number than the log has is refused, with both, and changes nothing; the same one, or none, is fine."""
    append(lab.log, "events", 3, b"x")
    lab.embedded.close()
    for _ in range(2):
        with pytest.raises(Invalid, match=r"partitions .*4.*; the setting says 8, and it can't change"):
            open_log(lab, partitions=8)
        with pytest.raises(Invalid, match="the setting says 2"):
            open_log(lab, {**TOPICS, "new": Topic("new", 2, "delete")}, partitions=2)
    for settings in ({"partitions": 4}, {}):
        log = open_log(lab, **settings)
        assert {topic: log.partition_count(topic) for topic in TOPICS} == dict.fromkeys(TOPICS, 4)
        with pytest.raises(Invalid):
            log.partition_count("new")
        assert len(read(log, "events", 3)) == 1
        log.close()


def test_the_setting_decides_for_a_new_log(tmp_path: Path) -> None:
    """All topics of a new log get as many partitions as the setting says."""
    log = EmbeddedLog(tmp_path / "log", TOPICS, LogSettings(partitions=7), ManualClock())
    assert {log.partition_count(topic) for topic in TOPICS} == {7}
    log.close()


def test_a_topic_may_come_later(lab: EmbeddedLab) -> None:
    """A new topic gets as many partitions as the others, and each keeps its records, also while another is not declared."""
    append(lab.log, "events", 3, b"x")
    lab.embedded.close()
    more = {"a-new-one": Topic("a-new-one", 1, "delete"), **TOPICS}
    for count in range(1, 4):
        log = open_log(lab, more)
        assert log.partition_count("a-new-one") == 4
        append(log, "a-new-one", 3, b"y")
        assert [row.value for row in read(log, "a-new-one", 3)] == [b"y"] * count
        assert [row.value for row in read(log, "events", 3)] == [b"x"]
        log.close()
    log = open_log(lab, {name: topic for name, topic in more.items() if name != "events"})
    with pytest.raises(Invalid, match="events"):
        log.reader("events")
    assert len(read(log, "a-new-one", 3)) == 3
    log.close()
    assert len(read(open_log(lab, more), "events", 3)) == 1


def test_reading_only(lab: EmbeddedLab, tmp_path: Path) -> None:
    """A log can be read without a change to it, and none is made where there is none."""
    append(lab.log, "events", 0, b"x")
    lab.embedded.close()
    before = {path.name: path.read_bytes() for path in lab.path.glob("*.*") if not path.name.startswith("LOG")}
    log = EmbeddedLog(lab.path, TOPICS, LogSettings(), lab.clock, read_only=True)
    assert [row.value for row in read(log, "events", 0)] == [b"x"]
    (refused,) = log.append([Message("events", 0, None, b"y")], timeout_s=1)
    assert isinstance(refused, PipelineError)
    log.close()
    assert {name: (lab.path / name).read_bytes() for name in before} == before
    for path in (tmp_path / "nothing", tmp_path / "empty"):
        if path.name == "empty":
            path.mkdir()
        with pytest.raises(NotFound):
            EmbeddedLog(path, TOPICS, LogSettings(), lab.clock, read_only=True)
    assert not (tmp_path / "nothing").exists()


def test_a_second_log_in_the_same_folder_is_refused(lab: EmbeddedLab) -> None:
    """A second log in one folder is refused by RocksDB's own lock, too, behind that of the data directory."""
    with pytest.raises(Unavailable, match="lock"):
        open_log(lab)
    append(lab.log, "events", 0, b"still works")


def test_after_close_everything_is_unavailable(lab: EmbeddedLab) -> None:
    """Appends, commits and polls of a closed log are Unavailable, with or without records; it can be closed again."""
    append(lab.log, "events", 0, b"x")
    transaction = lab.log.transaction("t")
    behind, at_end = lab.log.reader("events"), lab.log.reader("events")
    behind.assign({0: 0})
    at_end.assign({0: 1})
    lab.log.close()
    lab.log.close()
    (answer,) = lab.log.append([Message("events", 0, None, b"y")], timeout_s=1)
    assert isinstance(answer, Unavailable)
    with pytest.raises(Unavailable, match="is closed"):
        transaction.commit([Message("events", 0, None, b"y")], timeout_s=1)
    with pytest.raises(Unavailable, match="is closed"):  # what the cleaner begins with
        lab.embedded.cursor()
    for reader in (behind, at_end):
        for _ in range(2):
            with pytest.raises(Unavailable, match="is closed"):
                poll(reader, timeout_s=30)


def test_close_wakes_who_waits(lab: EmbeddedLab) -> None:
    """A poll that waits ends when the log is closed, long before its timeout."""
    reader = lab.log.reader("events")
    reader.assign({0: 0})
    waiting = threading.Event()

    def waiter() -> None:
        waiting.set()
        with pytest.raises(Unavailable):
            poll(reader, timeout_s=600)

    with threads(waiter):
        assert waiting.wait(10)
        lab.log.close()


def test_a_store_after_close_is_not_ready(tmp_path: Path) -> None:
    """A read of a store that is being closed raises NotReady, not StoreCorrupt; a snapshot stays readable."""
    lab = RocksStoreLab(tmp_path)
    store = lab.stores.open(0)
    store.write([b"k"], [b"v"])
    view = store.snapshot()
    store.close()
    for call in (
        lambda: store.get([b"k"]),
        lambda: list(store.scan(b"", b"\xff")),
        store.snapshot,
        lambda: store.write([b"k"], [b"w"]),
    ):
        with pytest.raises(NotReady, match="is closed"):
            call()
    assert view.get([b"k"]) == [b"v"]
    with pytest.raises(Unavailable, match="lock"):
        lab.stores.open(0)
    del view
    assert lab.stores.open(0).get([b"k"]) == [b"v"]
    with pytest.raises(Unavailable, match="is open already"):
        lab.stores.open(0)
    lab.stores.close()


# Writing


def test_records_have_a_largest_size(lab: EmbeddedLab) -> None:
    """One byte more is Invalid, for the record itself and for a transaction with it; its neighbours are appended."""
    largest, too_large = b"x" * (RECORD_BYTES_MAX - 1), b"x" * RECORD_BYTES_MAX
    answers = lab.log.append(
        [Message("events", 0, b"k", largest), Message("events", 0, b"k", too_large), Message("events", 0, b"k", b"")],
        timeout_s=10,
    )
    assert [type(answer) for answer in answers] == [int, Invalid, int]
    with pytest.raises(Invalid, match="a record of over"):
        lab.log.transaction("t").commit(
            [Message("events", 0, b"k", b""), Message("events", 0, b"k", too_large)], timeout_s=5
        )
    assert [len(row.value or b"") for row in read(lab.log, "events", 0)] == [len(largest), 0]


def test_chunks_are_bounded(lab: EmbeddedLab) -> None:
    """A chunk has a limited number of records, and ends with the record that makes it full, however large an append is."""
    messages = [Message("events", 0, None, b"") for _ in range(CHUNK_RECORDS_MAX + 1)]
    messages += [Message("events", 0, b"k" * 1_000, b"v" * 99_000) for _ in range(7)]
    messages += [Message("events", 0, None, b"v" * CHUNK_BYTES) for _ in range(3)]
    appended(lab.log, messages)
    partition = lab.embedded.partitions("events")[0]
    chunks = [len(chunk.values) for _, chunk, _ in lab.embedded.chunks(lab.embedded.cursor(), partition, 0)]
    assert chunks == [CHUNK_RECORDS_MAX, 4, 3, 2, 1, 1]
    assert [(row.key, row.value) for row in read(lab.log, "events", 0)] == [(m.key, m.value) for m in messages]


class Recorder:
    """A `metrics.Metrics` that keeps the counters."""

    def __init__(self) -> None:
        self.counters: dict[tuple[str, object], float] = {}

    def inc(self, metric: m.Metric, amount: float = 1, *labels: object) -> None:
        self.counters[metric.name, labels[0]] = self.counters.get((metric.name, labels[0]), 0) + amount

    def set(self, metric: m.Metric, value: float, *labels: object) -> None:
        raise AssertionError

    def observe(self, metric: m.Metric, value: float, *labels: object) -> None:
        raise AssertionError

    def forget(self, partition: int) -> None:
        raise AssertionError


def test_appends_are_counted(tmp_path: Path) -> None:
    """Appended records, and bytes of keys and values, are counted by topic."""
    metrics = Recorder()
    log = EmbeddedLog(tmp_path / "log", TOPICS, LogSettings(), ManualClock(), metrics)
    log.append([Message("events", 0, b"key", b"value"), Message("events", 1, None, None)], timeout_s=1)
    log.transaction("t").commit([Message("table", 0, b"k", b"v")] * 3, timeout_s=1)
    assert metrics.counters == {
        (m.LOG_APPENDED.name, "events"): 2,
        (m.LOG_BYTES.name, "events"): 8,
        (m.LOG_APPENDED.name, "table"): 3,
        (m.LOG_BYTES.name, "table"): 6,
    }
    log.close()


class FailingDb:
    """A RocksDB that fails when it is told to."""

    def __init__(self, db: Any) -> None:
        self._db = db
        self.fail_at = ""

    def __getattr__(self, name: str) -> Any:
        if name == self.fail_at:
            raise Exception("IO error: No space left on device: While appending to file")  # as rocksdict does
        return getattr(self._db, name)


@pytest.mark.parametrize("fail_at", ["write", "flush_wal"])
def test_after_a_failed_write_nothing_is_taken(tmp_path: Path, fail_at: str) -> None:
    """After a failed write that and all later ones are Unavailable, `on_failed` is called once, and reading goes on."""
    failures: list[PipelineError] = []
    clock = ManualClock()
    log = EmbeddedLog(tmp_path / "log", TOPICS, LogSettings(fsync=True), clock, on_failed=failures.append)
    append(log, "events", 0, b"before")
    real, log.db = log.db, FailingDb(log.db)
    log.db.fail_at = fail_at
    for _ in range(2):
        (answer,) = log.append([Message("events", 0, None, b"unsure")], timeout_s=1)
        assert isinstance(answer, Unavailable)
        assert "No space left on device" in str(answer)
        log.db.fail_at = ""
    with pytest.raises(Unavailable, match="restart to go on"):
        log.transaction("t").commit([Message("events", 0, None, b"unsure")], timeout_s=1)
    assert [str(failure) for failure in failures] == [str(answer)]
    reader = log.reader("events")
    reader.assign({0: 0})
    assert [row.value for row in poll(reader)[0]] == [b"before"]
    with pytest.raises(Unavailable, match="restart to go on"):
        poll(reader, timeout_s=600)
    assert log.watermarks("events", 0).end_offset == 1
    log.db = real
    log.close()
    log = EmbeddedLog(tmp_path / "log", TOPICS, LogSettings(), clock)
    values = [row.value for row in read(log, "events", 0)]
    assert values == [b"before"] if fail_at == "write" else values in ([b"before"], [b"before", b"unsure"])
    log.close()


# Reading


def test_a_poll_that_fails_loses_nothing(lab: EmbeddedLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one partition can't be read for a while, the next poll returns what this one had of the others."""
    for partition in range(3):
        append(lab.log, "events", partition, b"%d" % partition)
    reader = lab.log.reader("events")
    reader.assign({0: 0, 1: 0, 2: 0})
    chunks = lab.embedded.chunks

    def failing(cursor: Any, partition: Partition, *offsets: int) -> Any:
        if partition.number == 1:
            raise Unavailable("a hiccup")
        return chunks(cursor, partition, *offsets)

    monkeypatch.setattr(lab.embedded, "chunks", failing)
    for _ in range(2):
        with pytest.raises(Unavailable, match="a hiccup"):
            poll(reader)
    monkeypatch.undo()
    assert {p: [row.value for row in rows] for p, rows in poll(reader).items()} == {0: [b"0"], 1: [b"1"], 2: [b"2"]}


def test_one_poll_sees_one_moment(lab: EmbeddedLab) -> None:
    """A poll sees one moment of all its partitions: a transaction is in it with all of its records, or with none."""
    stop = threading.Event()

    def writer() -> None:
        transaction = lab.log.transaction("t")
        while not stop.is_set():
            transaction.commit([Message("events", partition, None, b"x") for partition in range(PARTITIONS)], timeout_s=5)

    reader = lab.log.reader("events")
    reader.assign(dict.fromkeys(range(PARTITIONS), 0))
    with threads(writer):
        try:
            for _ in range(60):
                counts = {partition: len(rows) for partition, rows in poll(reader, record_count_max=10**6).items()}
                assert len(set(counts.values())) <= 1, f"parts of a transaction: {counts}"
                assert len(counts) in (0, PARTITIONS)
        finally:
            stop.set()


def test_retention_is_never_a_silent_gap(lab: EmbeddedLab) -> None:
    """A reader under which records expire gets each of them, or RecordsLost: never just those behind a gap."""
    stop = threading.Event()

    def expirer() -> None:
        number = 0
        while not stop.is_set():
            append(lab.log, "events", 0, *[b"%d" % n for n in range(number, number + 20)])
            number += 20
            lab.clock.at_ms += DAY_MS // 3
            lab.clean()
            stop.wait(0.0002)

    reader = lab.log.reader("events")
    lost = 0
    with threads(expirer):
        try:
            until(lambda: lab.log.watermarks("events", 0).start_offset > 0)
            for _ in range(1_000):
                start = lab.log.watermarks("events", 0).start_offset
                reader.assign({0: start})
                try:
                    rows = poll(reader, record_count_max=7)[0]
                except RecordsLost:
                    lost += 1
                else:
                    assert [(row.offset, row.value) for row in rows] == [(n, b"%d" % n) for n in range(start, start + 7)]
        finally:
            stop.set()
    assert lost < 1_000, "it never came to read"


def test_a_clock_that_goes_back_across_a_restart(lab: EmbeddedLab) -> None:
    """at_ms does not fall, not even if the newest record has expired since."""
    append(lab.log, "events", 0, b"first")
    append(lab.log, "events", 1, b"kept")
    newest_ms = lab.clock.at_ms
    lab.expire()
    append(lab.log, "events", 1, b"later")
    lab.clock.at_ms = newest_ms - DAY_MS
    lab.reopen()
    for partition in (0, 1):
        append(lab.log, "events", partition, b"after")
        (*_, row) = read(lab.log, "events", partition)
        assert row.at_ms >= newest_ms
