"""Retention and compaction of the embedded log: what goes, what stays, and that neither disturbs anybody."""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.metrics as m
from pipeline.adapters.embedded.chunks import CHUNK_BYTES, CHUNK_RECORDS_MAX
from pipeline.adapters.embedded.cleaner import Cleaner
from pipeline.errors import LogCorrupt, RecordsLost, Unavailable
from pipeline.ports import Message
from pipeline.settings import LogSettings
from pipeline.topics import Topic
from tests.contracts.support import DAY_MS, EmbeddedLab, Row, append, appended, poll, read, read_on, threads, until

HOUR_MS = 3_600_000
ONE = {
    "events": Topic("events", 1, "delete", retention_ms=DAY_MS),
    "forever": Topic("forever", 1, "delete"),
    "table": Topic("table", 1, "compact", delete_retention_ms=DAY_MS, min_cleanable_dirty_ratio=0.0),
}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[EmbeddedLab]:
    made = EmbeddedLab(tmp_path / "log", topics=ONE)
    yield made
    made.embedded.close()


class Stopped(Exception):
    """Simulated end of the process."""


def offsets(lab: EmbeddedLab, topic: str) -> list[int]:
    return [row.offset for row in read(lab.log, topic, 0)]


def chunk_sizes(lab: EmbeddedLab, topic: str) -> list[int]:
    partition = lab.embedded.partitions(topic)[0]
    return [len(chunk.values) for _, chunk, _ in lab.embedded.chunks(lab.embedded.cursor(), partition, 0)]


# Retention


def test_records_go_when_they_are_older_than_retention(lab: EmbeddedLab) -> None:
    """Records go by the age of the newest record of their append, oldest first; the start moves up behind them for good."""
    for hour in range(0, 30, 6):
        append(lab.log, "events", 0, b"%d" % hour, b"%d" % hour)
        append(lab.log, "forever", 0, b"%d" % hour)
        lab.clock.at_ms += 6 * HOUR_MS
    # Their ages are 30, 24, 18, 12 and 6 hours now: what is exactly as old as retention stays.
    assert lab.clean() == 2
    for _ in range(2):
        assert lab.log.watermarks("events", 0) == (2, 10)
        assert offsets(lab, "events") == [*range(2, 10)]
        assert lab.clean() == 0
        lab.reopen()
    lab.clock.at_ms += 1
    assert lab.clean() == 2
    lab.clock.at_ms += 100 * DAY_MS
    assert lab.clean() == 6
    for _ in range(2):
        assert lab.log.watermarks("events", 0) == (10, 10)
        assert offsets(lab, "events") == []
        lab.reopen()
    assert append(lab.log, "events", 0, b"goes on") == [11]
    assert offsets(lab, "forever") == [*range(5)]


def test_retention_leaves_what_is_still_needed(lab: EmbeddedLab) -> None:
    """Records from `keep_from` on stay, however old: they are not in the state yet."""
    for number in range(5):
        append(lab.log, "events", 0, b"%d" % number)
    lab.clock.at_ms += 100 * DAY_MS
    cleaner = Cleaner(lab.log, LogSettings(), lab.clock, keep_from=lambda topic, partition: 3)
    assert cleaner.clean() == 3
    assert lab.log.watermarks("events", 0) == (3, 5)


def test_what_a_clean_removes_is_counted(tmp_path: Path) -> None:
    """Removed records are counted by topic and by retention or compaction."""
    counts: dict[Any, float] = {}

    class Recorder:
        def inc(self, metric: m.Metric, amount: float = 1, *labels: object) -> None:
            counts[(metric.name, *labels)] = amount

    lab = EmbeddedLab(tmp_path, topics=ONE)
    append(lab.log, "events", 0, b"a", b"b", b"c")
    append(lab.log, "table", 0, b"a", b"b", key=b"k")
    lab.clock.at_ms += DAY_MS + 1
    cleaner = Cleaner(lab.embedded, lab.settings, lab.clock, Recorder())  # type: ignore[arg-type]
    assert cleaner.clean(dirty_count_min=1) == 4
    removed = {labels: count for labels, count in counts.items() if labels[0] == m.LOG_REMOVED.name}
    assert removed == {(m.LOG_REMOVED.name, "events", "delete"): 3, (m.LOG_REMOVED.name, "table", "compact"): 1}
    lab.embedded.close()


# Compaction


def test_compaction_waits_until_it_is_worth_it(tmp_path: Path) -> None:
    """Compaction waits for a number of records and for the topic's dirty ratio; superseded records below it stay."""
    topics = {"table": Topic("table", 1, "compact", min_cleanable_dirty_ratio=0.5)}
    lab = EmbeddedLab(tmp_path / "log", topics=topics)
    cleaner = Cleaner(lab.embedded, lab.settings, lab.clock)
    appended(lab.log, [Message("table", 0, b"%d" % (n % 600), b"") for n in range(999)])
    assert cleaner.clean() == 0
    append(lab.log, "table", 0, b"", key=b"0")
    assert cleaner.clean() == 400
    assert cleaner.clean(dirty_count_min=0) == 0
    appended(lab.log, [Message("table", 0, b"%d" % n, b"") for n in range(599)])
    assert cleaner.clean(dirty_count_min=0) == 0  # 599 of 1,199 have not been cleaned: less than half
    append(lab.log, "table", 0, b"", key=b"599")
    assert cleaner.clean(dirty_count_min=0) == 600
    assert len(read(lab.log, "table", 0)) == 600
    lab.embedded.close()


def test_compaction_makes_full_chunks_of_small_ones(lab: EmbeddedLab) -> None:
    """Small chunks are joined, so that a restore reads few; chunks that are full, or hold large records, stay."""
    for number in range(3_000):
        append(lab.log, "table", 0, b"v" * 20, key=b"%d" % number)
    for number in range(4):
        append(lab.log, "table", 0, b"v" * (CHUNK_BYTES - 100), key=b"large-%d" % number)
    before = read(lab.log, "table", 0)
    assert lab.clean() == 0
    assert read(lab.log, "table", 0) == before
    sizes = chunk_sizes(lab, "table")
    assert sizes == [CHUNK_RECORDS_MAX, 1_000, 1, 1, 1, 1]
    append(lab.log, "table", 0, b"v", key=b"another")
    assert lab.clean() == 0
    assert chunk_sizes(lab, "table") == [*sizes[:-1], 2]


def test_records_without_a_key_stay(lab: EmbeddedLab) -> None:
    """Records without a key are not superseded, and supersede nothing."""
    append(lab.log, "table", 0, b"a", b"b")
    append(lab.log, "table", 0, b"c", b"d", key=b"k")
    assert lab.clean() == 1
    assert offsets(lab, "table") == [0, 1, 3]


def test_a_pass_holds_no_more_keys_than_it_may(tmp_path: Path) -> None:
    """A pass rewrites after compaction_keys_max keys, and those of one append, and goes on with the next ones."""
    lab = EmbeddedLab(tmp_path / "log", topics=ONE, compaction_keys_max=100)
    for start in range(0, 3_000, 50):
        appended(lab.log, [Message("table", 0, b"%d" % (n % 700), b"%d" % n) for n in range(start, start + 50)])
    held: list[int] = []

    class Watching(Cleaner):
        def _map(self, partition: Any) -> Any:
            newest, clean_end = super()._map(partition)
            held.append(len(newest))
            return newest, clean_end

    assert Watching(lab.embedded, lab.settings, lab.clock).clean(dirty_count_min=1) == 2_300
    assert len(held) == 30
    assert max(held) < 150
    assert read(lab.log, "table", 0) == [Row(n, lab.clock.at_ms, b"%d" % (n % 700), b"%d" % n) for n in range(2_300, 3_000)]
    lab.embedded.close()


def test_a_tombstone_waits_for_followers(lab: EmbeddedLab) -> None:
    """A tombstone is removed `delete_retention_ms` after the pass that removed the value, whatever its own age."""
    append(lab.log, "table", 0, b"v", key=b"deleted")
    append(lab.log, "table", 0, None, key=b"deleted")
    lab.clock.at_ms += 10 * DAY_MS
    lab.clean()
    assert offsets(lab, "table") == [1]
    append(lab.log, "table", 0, None, key=b"another")
    lab.clock.at_ms += DAY_MS
    lab.reopen()
    lab.clean()
    assert offsets(lab, "table") == [1, 2]
    append(lab.log, "table", 0, b"v", key=b"alive")
    lab.clock.at_ms += 1
    lab.clean()
    assert offsets(lab, "table") == [2, 3]  # the other one has a day from now
    append(lab.log, "table", 0, b"v", key=b"alive")
    lab.clock.at_ms += DAY_MS + 1
    lab.clean()
    assert offsets(lab, "table") == [4]


def test_a_slow_reader_sees_every_deletion(tmp_path: Path) -> None:
    """A reader that has read a value before a round of many passes finds the tombstone, if it takes at most a day."""
    lab = EmbeddedLab(tmp_path / "log", topics=ONE, compaction_keys_max=1)
    append(lab.log, "table", 0, b"v", key=b"k")
    append(lab.log, "table", 0, None, key=b"k")
    for number in range(20):
        append(lab.log, "table", 0, b"v", key=b"%d" % number)
    lab.clock.at_ms += 10 * DAY_MS
    reader = lab.log.reader("table")
    reader.assign({0: 0})
    assert poll(reader, record_count_max=1)[0][0].value == b"v"
    for _ in range(3):
        append(lab.log, "table", 0, b"w", key=b"0")
        lab.clean()
        lab.clock.at_ms += DAY_MS // 3
    assert [row.key for row in poll(reader)[0] if row.value is None] == [b"k"]
    lab.embedded.close()


@pytest.mark.parametrize("crash", [False, True])
def test_the_end_stays_when_the_newest_record_goes(lab: EmbeddedLab, crash: bool) -> None:
    """Offsets are never given twice: not when all is deleted, the log opened again, or a pass ends right behind it."""
    append(lab.log, "table", 0, b"v", b"w", key=b"k")
    append(lab.log, "table", 0, None, key=b"k")
    assert lab.clean() == 2
    assert offsets(lab, "table") == [2]
    lab.clock.at_ms += DAY_MS + 1

    class Ending(Cleaner):
        def _replace(self, partition: Any, run: Any) -> None:
            super()._replace(partition, run)
            if crash:
                raise Stopped

    partition = lab.embedded.partitions("table")[0]
    with suppress(Stopped):  # a pass with nothing new to look at, as one that was cut off leaves to the next
        Ending(lab.embedded, lab.settings, lab.clock)._rewrite(partition, {}, 3)
    lab.reopen()
    for _ in range(2):
        assert offsets(lab, "table") == []
        assert lab.log.watermarks("table", 0) == (0, 3)
        reader = lab.log.reader("table")
        reader.assign({0: 1})
        (records,) = reader.poll(record_count_max=9, bytes_max=9, timeout_s=0)
        assert (records.next_offset, [*records.offsets]) == (3, [])
        lab.reopen()
    assert append(lab.log, "table", 0, b"v", key=b"k") == [4]


keys = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])
steps = st.lists(
    st.one_of(
        st.lists(st.tuples(keys, st.none() | st.binary(max_size=2)), min_size=1, max_size=12),
        st.sampled_from(["clean", "clean", "crash", "reopen", "day", "hour"]),
    ),
    max_size=30,
)


class Stopping(Cleaner):
    """A cleaner whose process ends after some of a pass' steps."""

    steps_left = 0

    def _replace(self, partition: Any, run: Any) -> None:
        if not self.steps_left:
            raise Stopped
        self.steps_left -= 1
        super()._replace(partition, run)


@given(steps=steps, keys_max=st.integers(1, 6), crash_after=st.integers(0, 4))
@settings(max_examples=30)
def test_compaction_changes_nothing_that_matters(steps: list[Any], keys_max: int, crash_after: int) -> None:
    """A follower from the start ends with the same state, whatever is written, cleaned, crashed half way and opened again.

    Records that are kept are as they were, offsets rise, and the end never falls. A deleted key may be absent or have a
    tombstone; a tombstone that is younger than a day is there. After a whole pass no key is there twice.
    """
    with tempfile.TemporaryDirectory() as folder:
        lab = EmbeddedLab(Path(folder) / "log", topics=ONE, compaction_keys_max=keys_max)
        written: dict[int, Row] = {}
        end = 0
        for step in steps:
            match step:
                case "clean":
                    lab.clean()
                    kept = [row.key for row in read(lab.log, "table", 0)]
                    assert len(kept) == len(set(kept)), "something superseded is still there"
                case "crash":
                    cleaner = Stopping(lab.embedded, lab.settings, lab.clock)
                    cleaner.steps_left = crash_after
                    try:
                        cleaner.clean(dirty_count_min=0)
                    except Stopped:
                        lab.reopen()
                case "reopen":
                    lab.reopen()
                case "day" | "hour":
                    lab.clock.at_ms += DAY_MS if step == "day" else HOUR_MS
                case records:
                    covering = appended(lab.log, [Message("table", 0, key, value) for key, value in records])
                    assert covering == [*range(end + 1, end + 1 + len(records))]
                    for offset, (key, value) in zip(range(end, covering[-1]), records, strict=True):
                        written[offset] = Row(offset, lab.clock.at_ms, key, value)
                    end = covering[-1]
            check(lab, written, end)
        lab.embedded.close()


def check(lab: EmbeddedLab, written: dict[int, Row], end: int) -> None:
    assert lab.log.watermarks("table", 0) == (0, end)
    rows = read(lab.log, "table", 0, record_count_max=5)
    assert all(written[row.offset] == row for row in rows)
    latest = {row.key: row for row in written.values()}
    got = {row.key: row for row in rows}
    for key, row in latest.items():
        if row.value is not None or row.at_ms > lab.clock.at_ms - DAY_MS:
            assert got.get(key) == row
        else:
            assert got.get(key) in (row, None)
    assert got.keys() <= latest.keys()


def test_cleaning_disturbs_neither_reader_nor_writer(lab: EmbeddedLab) -> None:
    """Followers from the start and followers of the newest end with the same table while a writer appends."""
    rng = random.Random(2)
    table: dict[bytes, bytes | None] = {}
    stop, done = threading.Event(), threading.Event()

    def writer() -> None:
        for number in range(400):
            records = [(b"%d" % rng.randrange(60), b"%d" % number if rng.random() < 0.8 else None) for _ in range(10)]
            table.update(records)
            appended(lab.log, [Message("table", 0, key, value) for key, value in records])
        done.set()

    def cleaner() -> None:
        while not stop.is_set():
            lab.clean()

    def from_the_start() -> None:
        while not done.is_set():
            read(lab.log, "table", 0, record_count_max=rng.choice([3, 50, 1_000]))

    def follower() -> None:
        reader = lab.log.reader("table")
        reader.assign({0: 0})
        seen: dict[bytes | None, bytes | None] = {}
        last = -1
        while last < 3_999:
            for rows in poll(reader, record_count_max=17).values():
                for row in rows:
                    assert row.offset > last
                    last = row.offset
                    seen[row.key] = row.value
        finished.append(seen)

    finished: list[dict[bytes | None, bytes | None]] = []
    with threads(writer, cleaner, from_the_start, follower, follower):
        try:
            until(lambda: len(finished) == 2)
        finally:
            stop.set()
            done.set()
    assert finished == [table, table]
    lab.clean()
    assert {row.key: row.value for row in read(lab.log, "table", 0)} == table


def test_the_cleaner_runs_by_itself(tmp_path: Path) -> None:
    """The cleaner runs every maintenance_interval_ms, until it is stopped; it can be stopped twice, or before it began."""
    lab = EmbeddedLab(tmp_path / "log", topics=ONE, maintenance_interval_ms=10)
    Cleaner(lab.embedded, lab.settings, lab.clock).stop()
    cleaner = Cleaner(lab.embedded, lab.settings, lab.clock)
    cleaner.start()
    append(lab.log, "events", 0, b"x")
    lab.clock.at_ms += DAY_MS + 1
    until(lambda: lab.log.watermarks("events", 0).start_offset == 1)
    cleaner.stop()
    cleaner.stop()
    assert not any(thread.name == "pipeline-cleaner" for thread in threading.enumerate())
    lab.embedded.close()


def test_a_stopped_cleaner_leaves_a_pass_where_it_is(lab: EmbeddedLab) -> None:
    """stop() waits for one chunk, not for a pass; the next pass completes the work."""
    for number in range(0, 8_000, 2_000):
        appended(lab.log, [Message("table", 0, b"%d" % (n % 3_000), b"") for n in range(number, number + 2_000)])

    class Interrupted(Cleaner):
        def _replace(self, partition: Any, run: Any) -> None:
            super()._replace(partition, run)
            self._stop.set()

    Interrupted(lab.embedded, lab.settings, lab.clock).clean()
    assert lab.embedded.partitions("table")[0].meta.clean_end_offset == 0
    lab.clean()
    assert offsets(lab, "table") == [*range(5_000, 8_000)]


def test_an_error_does_not_end_the_cleaner(lab: EmbeddedLab, caplog: pytest.LogCaptureFixture) -> None:
    """An error is logged, nothing is deleted, and the next round tries again."""
    settings_ = LogSettings(maintenance_interval_ms=10)
    rounds = [LogCorrupt("a broken block"), Unavailable("busy")]

    class Failing(Cleaner):
        def _expire(self, partition: Any) -> int:
            if rounds:
                raise rounds.pop(0)
            return super()._expire(partition)

    append(lab.log, "events", 0, b"x")
    lab.clock.at_ms += DAY_MS + 1
    cleaner = Failing(lab.embedded, settings_, lab.clock)
    cleaner.start()
    until(lambda: lab.log.watermarks("events", 0).start_offset == 1)
    cleaner.stop()
    assert "a broken block" in caplog.text
    assert "busy" in caplog.text


def test_who_was_away_too_long_is_told(lab: EmbeddedLab) -> None:
    """A cursor below the start is lost, at the start it is not."""
    append(lab.log, "events", 0, b"a", b"b")
    lab.clock.at_ms += DAY_MS + 1
    append(lab.log, "events", 0, b"c")
    lab.clean()
    reader = lab.log.reader("events")
    reader.assign({0: 1})
    with pytest.raises(RecordsLost, match="events-0: 1 records from 1 on are gone"):
        poll(reader)
    assert [row.value for row in read_on(reader, 0, 2, 3)] == [b"c"]
