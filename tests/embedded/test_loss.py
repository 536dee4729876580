"""A log that has lost something says so, when it is opened or read, and deletes nothing before a person decides."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import pytest

import pipeline.metrics as m
from pipeline.adapters.embedded.integrity import find_gaps
from pipeline.adapters.embedded.log import EmbeddedLog, checkpoint_path
from pipeline.errors import LogCorrupt, RecordsLost
from pipeline.ports import Message
from pipeline.settings import LogSettings
from pipeline.topics import Topic
from tests.contracts.support import EmbeddedLab, ManualClock, Row, append, appended, read, until

THREE = {
    "events": Topic("events", 2, "delete"),
    "dead-letters": Topic("dead-letters", 2, "delete"),
    "table": Topic("table", 2, "compact", min_cleanable_dirty_ratio=0.0),
}
FLUSHES, PENDING = "rocksdb.num-running-flushes", "rocksdb.mem-table-flush-pending"
PLACES = [(topic, partition) for topic in THREE for partition in range(2)]
Contents = Mapping[tuple[str, int], list[Row]]


class Counted:
    """Metrics that count what is lost."""

    def __init__(self) -> None:
        self.lost = 0

    def inc(self, metric: m.Metric, amount: float = 1, *labels: object) -> None:
        self.lost += int(amount) if metric is m.LOG_LOST else 0


def open_log(
    path: Path, *, accept_loss: bool = False, read_only: bool = False, counted: Counted | None = None
) -> EmbeddedLog:
    metrics: m.Metrics = counted or m.NO_METRICS  # type: ignore[assignment]
    return EmbeddedLog(path, THREE, LogSettings(), ManualClock(), metrics, accept_loss=accept_loss, read_only=read_only)


def contents(log: EmbeddedLog) -> Contents:
    return {place: read(log, *place) for place in PLACES}


def files_of(path: Path) -> dict[str, bytes]:
    """Return all files that a start could change, except RocksDB's own log and lock."""
    return {file.name: file.read_bytes() for file in path.iterdir() if not file.name.startswith(("LOG", "LOCK"))}


def copy_of(path: Path, to: Path) -> Path:
    """Copy the files of a log as they are, and the file beside them, as after kill -9."""
    shutil.copytree(path, to, ignore=shutil.ignore_patterns("LOCK"))
    shutil.copy(checkpoint_path(path), checkpoint_path(to))
    return to


def fill(lab: EmbeddedLab, count: int, size: int = 3_000, seed: int = 1) -> None:
    """Append so many records to each place, of bytes that can't be compressed; keys recur."""
    rng = random.Random(seed)
    for number in range(count):
        appended(lab.log, [Message(*place, b"%d" % (number % 40), rng.randbytes(size)) for place in PLACES])


def settle(lab: EmbeddedLab) -> None:
    """Move all records to files, and note that."""
    lab.embedded.flush()
    lab.reopen()
    wait_until_quiet(lab)


def wait_until_quiet(lab: EmbeddedLab) -> None:
    """Let RocksDB finish its background work, so that a copy is of one moment."""
    get = lab.embedded.db.property_int_value
    until(lambda: not any(map(get, ("rocksdb.num-running-compactions", "rocksdb.compaction-pending", FLUSHES, PENDING))))


@pytest.fixture
def lab(tmp_path: Path) -> EmbeddedLab:
    """A log with records in several files, some of them compacted, and the newest in a write-ahead log only."""
    made = EmbeddedLab(tmp_path / "log", topics=THREE, log_write_buffer_bytes=2**20)
    for seed in range(2):  # fewer files than RocksDB begins to merge
        fill(made, 25, seed=seed)
        made.embedded.flush()
    made.clean()
    settle(made)
    fill(made, 10, seed=9)
    wait_until_quiet(made)
    return made


def test_what_a_cleaner_leaves_is_whole(lab: EmbeddedLab) -> None:
    """Compaction removes records and tombstones, and leaves a chain that covers every offset all the same."""
    table = [Message("table", 0, b"%d" % number, None) for number in range(40)]
    for _ in range(3):
        appended(lab.log, table)
        lab.clean()
        for _ in range(2):
            lab.clock.at_ms += 2 * 86_400_000
            append(lab.log, "table", 0, b"x", key=b"\xff")
            lab.clean()
        lab.reopen()
        assert find_gaps(lab.embedded, full=True) == []
    assert [row.key for row in read(lab.log, "table", 0)] == [b"\xff"]
    assert lab.log.watermarks("table", 0) == (0, 60 + 3 * 42)
    lab.embedded.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("where", [0, 1, -2, -1])
def test_a_chunk_that_is_missing(lab: EmbeddedLab, tmp_path: Path, place: tuple[str, int], where: int) -> None:
    """A missing chunk, first, second, last but one or last, is found by a full check and by a reader."""
    partition = lab.embedded.partitions(place[0])[place[1]]
    before = [(chunk.begin, last) for last, chunk, _ in lab.embedded.stored_chunks(lab.embedded.cursor(), partition, 0)]
    begin, last = before[where]
    lab.embedded.db.delete(partition.key(last))
    (gap,) = find_gaps(lab.embedded, full=True)
    assert gap == (*place, begin, last + 1)
    with pytest.raises(
        LogCorrupt, match=rf"{place[0]}-{place[1]}: {last + 1 - begin} records \({begin} to {last}\) are gone"
    ):
        read(lab.log, *place)
    lab.embedded.close()


def remove(path: Path) -> None:
    path.unlink()


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [remove, halve, empty])
def test_the_newest_file(lab: EmbeddedLab, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """A lost or cut write-ahead log is reported with the number of records; nothing changes until a person decides."""
    everything = contents(lab.embedded)
    path = copy_of(lab.path, tmp_path / "copy")
    lab.embedded.close()
    damage(max(path.glob("*.log")))
    before = files_of(path)
    for _ in range(2):
        with pytest.raises(LogCorrupt, match=r"\d+ records are gone: events-0: .*--accept-loss") as caught:
            open_log(path)
    assert files_of(path) == before
    told = int(str(caught.value).split(" records are gone")[0].split()[-1])
    log = open_log(path, read_only=True)
    left = contents(log)
    log.close()
    assert told == sum(len(everything[place]) - len(left[place]) for place in PLACES) > 0

    counted = Counted()
    log = open_log(path, accept_loss=True, counted=counted)
    assert counted.lost == told
    assert contents(log) == left
    assert append(log, "events", 0, b"next") == [len(everything["events", 0]) + 1], "an offset never means two records"
    ends = {place: log.watermarks(*place).end_offset for place in PLACES}
    assert ends["table", 0] == left["table", 0][-1].offset + 1, "so that its stores are ahead of it"
    log.close()
    (kept,) = tmp_path.glob("copy.lost-*")
    assert files_of(kept) == before
    log = open_log(path)
    assert {place: log.watermarks(*place).end_offset for place in PLACES} == ends
    with pytest.raises(RecordsLost, match=r"events-0: \d+ records .* were lost earlier; start with --accept-loss"):
        read(log, "events", 0)
    assert read(log, "dead-letters", 0) == left["dead-letters", 0]
    log.close()
    log = open_log(path, accept_loss=True)
    assert [row.value for row in read(log, "events", 0)[-1:]] == [b"next"]
    log.close()
    assert [*tmp_path.glob("copy.lost-*")] == [kept], "what was decided is not decided again"


@pytest.mark.parametrize("damage", [remove, halve, empty])
@pytest.mark.parametrize("which", ["oldest", "middle", "newest"])
def test_a_file_of_records(tmp_path: Path, which: str, damage: Callable[[Path], None]) -> None:
    """A log with a damaged file is not opened; once a person decides, the rest is there, and lost records are counted."""
    lab = EmbeddedLab(tmp_path / "log", topics=THREE)
    for seed in range(3):
        fill(lab, 20, seed=seed)
        lab.embedded.flush()
    fill(lab, 10)
    wait_until_quiet(lab)
    everything = contents(lab.embedded)
    path = copy_of(lab.path, tmp_path / "copy")
    lab.embedded.close()
    files = sorted(path.glob("*.sst"))
    assert len(files) == 3
    damage(files[["oldest", "middle", "newest"].index(which)])
    before = files_of(path)
    for _ in range(2):
        with pytest.raises(LogCorrupt, match="start with --accept-loss to go on with what can be read"):
            open_log(path)
    assert files_of(path) == before
    counted = Counted()
    log = open_log(path, accept_loss=True, counted=counted)
    left = contents(log)
    for place in PLACES:
        assert set(left[place]) <= set(everything[place])
    gone = sum(len(everything[place]) - len(left[place]) for place in PLACES)
    assert 0 < gone <= counted.lost
    log.close()
    (kept,) = tmp_path.glob("copy.lost-*")
    assert files_of(kept) == before


@pytest.mark.parametrize("place", [0.0, 0.5, 0.99])
def test_an_older_write_ahead_log_that_is_torn(tmp_path: Path, place: float) -> None:
    """A torn older write-ahead log, harmless to RocksDB as a newer one is there, is found before it is written over."""
    lab = EmbeddedLab(tmp_path / "log", topics=THREE, log_write_buffer_bytes=2**20)
    settle(lab)
    lab.embedded.db.cancel_all_background(True)  # so that nothing moves to files, and both stay needed
    while len([*lab.path.glob("*.log")]) < 2:
        fill(lab, 1)
    fill(lab, 3)
    everything = contents(lab.embedded)
    path = copy_of(lab.path, tmp_path / "copy")
    lab.embedded.close()
    older, newer = sorted(path.glob("*.log"))
    assert older.stat().st_size > newer.stat().st_size > 10_000
    os.truncate(older, int(older.stat().st_size * place))
    before = files_of(path)
    with pytest.raises(LogCorrupt, match="records are gone"):
        open_log(path)
    assert files_of(path) == before
    counted = Counted()
    log = open_log(path, accept_loss=True, counted=counted)
    left = contents(log)
    assert all(left[place][-1] == everything[place][-1] for place in PLACES), "what the newer one has is there"
    assert sum(len(everything[place]) - len(left[place]) for place in PLACES) == counted.lost > 0
    log.close()


def test_an_older_copy_that_is_put_back(lab: EmbeddedLab, tmp_path: Path) -> None:
    """A copy of the folder from an hour ago misses the records that came since."""
    settle(lab)
    shutil.copytree(lab.path, tmp_path / "backup")
    append(lab.log, "events", 1, b"acknowledged", b"too")
    lab.embedded.close()
    shutil.rmtree(lab.path)
    shutil.copytree(tmp_path / "backup", lab.path)
    with pytest.raises(LogCorrupt, match=r"2 records are gone: events-1: 2 records \(60 to 61\) are gone"):
        open_log(lab.path)
    shutil.rmtree(lab.path)
    with pytest.raises(LogCorrupt, match=r"log .* is gone: .*log\.ends says that there was one"):
        open_log(lab.path)
    log = open_log(lab.path, accept_loss=True)
    assert append(log, "events", 1, b"anew") == [1]
    log.close()


def test_a_log_of_which_nothing_is_left(lab: EmbeddedLab, tmp_path: Path) -> None:
    """All records are missed, whether RocksDB opens an empty log in place of the lost one or finds nothing to repair."""
    everything = contents(lab.embedded)
    lab.embedded.close()
    new = EmbeddedLab(tmp_path / "new", topics={})
    new.embedded.close()
    count = sum(lab.embedded.partitions(topic)[number].meta.end_offset for topic, number in PLACES)
    for case in ("another", "unreadable"):
        path = copy_of(lab.path, tmp_path / case)
        if case == "another":
            shutil.rmtree(path)
            shutil.copytree(tmp_path / "new", path)
        else:
            for file in [*path.glob("*.sst"), *path.glob("*.log")]:
                file.write_bytes(bytes(file.stat().st_size))
        with pytest.raises(LogCorrupt, match="--accept-loss"):
            open_log(path)
        counted = Counted()
        log = open_log(path, accept_loss=True, counted=counted)
        assert counted.lost == count >= sum(map(len, everything.values()))
        assert append(log, "events", 0, b"goes on") == [61]
        log.close()


@pytest.mark.parametrize("damage", [remove, halve, empty, lambda path: path.write_bytes(b"\xff" * 50_000)])
def test_the_file_beside_the_log(lab: EmbeddedLab, damage: Callable[[Path], None]) -> None:
    """Without the file beside the log all records are there, and the file is made anew."""
    everything = contents(lab.embedded)
    lab.embedded.close()
    damage(checkpoint_path(lab.path))
    log = open_log(lab.path)
    assert contents(log) == everything
    assert all(log.checkpointed(it).end_offset == it.meta.end_offset for it in log.all_partitions())
    log.close()


def test_opening_looks_at_little(lab: EmbeddedLab) -> None:
    """Opening checks only records that were in no file of the manifest when the log was last used; use moves that on."""
    settle(lab)
    starts = [lab.embedded.checkpointed(it) for it in lab.embedded.all_partitions()]
    assert all(noted.flushed_offset == noted.end_offset for noted in starts)
    fill(lab, 5)
    assert [it.flushed_offset for it in map(lab.embedded.checkpointed, lab.embedded.all_partitions())] == [
        it.flushed_offset for it in starts
    ]
    lab.embedded.note_flushed()
    lab.embedded.flush()
    fill(lab, 1)
    lab.embedded.note_flushed()
    assert [it.flushed_offset for it in map(lab.embedded.checkpointed, lab.embedded.all_partitions())] == [
        it.flushed_offset + 5 for it in starts
    ]
    lab.embedded.close()


def damage_a_file(path: Path, rng: random.Random) -> str:
    """Damage one file of a log, as a dying disk or a careless person does, and return what was done."""
    names = ["*.log", "*.sst", "MANIFEST-*", "CURRENT"]
    file = rng.choice(sorted(path.glob(rng.choice(names))))
    size = file.stat().st_size
    match rng.choice(["remove", "cut", "flip", "zero"]):
        case "remove":
            file.unlink()
            return f"{file.name} removed"
        case "cut":
            at = rng.randrange(size) if size else 0
            os.truncate(file, at)
            return f"{file.name} of {size} cut at {at}"
        case how:
            at = rng.randrange(size) if size else 0
            count = 1 if how == "flip" else min(512, size - at)
            with file.open("r+b") as out:
                old = os.pread(out.fileno(), count, at)
                os.pwrite(
                    out.fileno(), bytes(byte ^ 1 << rng.randrange(8) for byte in old) if how == "flip" else bytes(count), at
                )
            return f"{file.name} of {size} {how} at {at}"


@pytest.mark.parametrize("seed", range(4))
def test_no_loss_is_quiet(lab: EmbeddedLab, tmp_path: Path, seed: int) -> None:
    """Any damage to a file is reported, or nothing is missing, and every loss that is accepted is counted."""
    everything = contents(lab.embedded)
    rng = random.Random(seed)
    noticed = 0
    for case in range(25):
        path = copy_of(lab.path, tmp_path / f"copy-{case}")
        what = damage_a_file(path, rng)
        try:
            with closing(open_log(path)) as log:
                assert contents(log) == everything, f"{what}: nothing was said"
        except LogCorrupt:
            noticed += 1
            if case % 5 == 0:
                accept(path, what, everything)
        shutil.rmtree(path)
    assert noticed > 8
    lab.embedded.close()


def accept(path: Path, what: str, everything: Contents) -> None:
    """Accept the loss and go on; the log may be beyond repair, which must be said."""
    counted = Counted()
    try:
        log = open_log(path, accept_loss=True, counted=counted)
    except LogCorrupt:
        return
    left = contents(log)
    for place in PLACES:
        assert set(left[place]) <= set(everything[place]), what
    assert sum(len(everything[place]) - len(left[place]) for place in PLACES) <= counted.lost, what
    log.close()
