"""Hundreds of damages to the files of a killed process: the result is exact, or the report says what is damaged."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.core.kinds import State
from pipeline.errors import PipelineError
from pipeline.publisher.spool.orphan import Orphan, inspect
from pipeline.publisher.spool.ring import HEADER, segment_path
from tests.publisher.spool.support import Recorder, Task, as_kill_leaves_it, claim, end, suffix
from tests.support import LONG

DAMAGES, SLOTS = (2_000, 40) if LONG else (250, 10)
FILES = ("spool.db", "spool.db", "spool.db-wal", "spool.db-wal", "SEAL", "ring", "ring", "ring")
WAYS = ("flip", "flip", "flip", "flip", "truncate", "truncate", "missing", "zero", "twice", "larger")
SERIES = 9


def recorded(folder: Path, chance: random.Random, *, closed: bool) -> tuple[Path, list[bytes], dict[bytes, State]]:
    """Return a slot as a process has left it, the batches folded by then, and the exact result."""
    recorder, folded, truth = Recorder(folder), [], Counter[bytes]()

    def record(most: int, series: int) -> None:
        for _ in range(chance.randrange(most)):
            recorder.add(name := chance.randrange(series), shard=chance.randrange(2))
            truth[suffix(name)] += 1

    for _ in range(chance.randrange(2, 6)):
        record(400, SERIES)
        recorder.commit(chance.randrange(SERIES))
        for batch in [*recorder.outbox.pending()]:
            if chance.random() < 0.5:
                folded.append(recorder.spool.load(batch.partition, batch.sequence))
                if chance.random() < 0.5:
                    recorder.acknowledge(batch)
    record(300, SERIES + 2)
    if closed:
        assert not recorder.spool.close()
    copy = as_kill_leaves_it(recorder.spool.path, folder.with_name(folder.name + "-killed"))
    end(recorder.spool)
    return copy, folded, dict(truth)


def damage(path: Path, chance: random.Random) -> str:
    """Damage a file of a slot, and return how."""
    while True:
        kind, way = chance.choice(FILES), chance.choice(WAYS)
        files = [file for file in path.iterdir() if file.name == kind or file.name.startswith(f"{kind}-0")]
        files = [file for file in sorted(files) if file.stat().st_size]
        if not files:
            continue
        file = chance.choice(files)
        data = bytearray(file.read_bytes())
        place = chance.randrange(len(data))
        if kind == "ring" and chance.random() < 0.8:  # mostly where something is
            place %= len(data.rstrip(b"\0"))
        if kind == "SEAL":
            place %= 264
        if way == "missing":
            file.unlink()
        elif way == "flip":
            data[place] ^= 1 << chance.randrange(8)
        elif way == "truncate":
            del data[place:]
        elif way == "twice":
            data[place:place] = data[place : place + 512]
        elif way == "larger":
            data += chance.choice((bytes(5_000), chance.randbytes(5_000)))
        else:
            # A sector that was never written, in the midst of what was. (As the last one it would be the end of a ring that
            # a power loss cut off, which `durability="process"` does not promise to stand.)
            start = place // 512 * 512
            if not any(data[start + 512 :]) or not any(data[start : start + 512]):
                continue
            data[start : start + 512] = bytes(512)
        if way != "missing":
            file.write_bytes(data)
        return f"{kind} {way}"


@pytest.mark.parametrize("part", range(8))
def test_no_damage_is_silent(tmp_path: Path, part: int) -> None:
    """Any damaged bit, sector or file makes nothing count twice, and missing deltas are reported."""
    for slot in range(part, SLOTS, 8):
        chance = random.Random(slot)
        origin, folded, truth = recorded(tmp_path / f"s{slot}", chance, closed=chance.random() < 0.4)
        for turn in range(DAMAGES // SLOTS):
            path = as_kill_leaves_it(origin, tmp_path / "copy")
            task = Task()
            for value in folded:
                task.fold(value)
            what = damage(path, chance)
            inspect(path.parent)
            orphan = claim(path)
            report = orphan.report
            if turn % 3 == 0:  # a claim that comes to nothing changes nothing
                orphan.release()
                orphan = claim(path)
            task.finish(orphan)
            told = bool(report.corrupt or report.bad_count)
            assert told or task.states == truth, (slot, turn, what, task.states, truth)
            assert all(state <= truth[key] for key, state in task.states.items()), (slot, turn, what, report)
            assert told == path.with_name(path.name + ".corrupt").exists(), (slot, turn, what)
            shutil.rmtree(path.parent)


@pytest.mark.parametrize("what", ["batch", "pending", "name", "old row", "old database", "old seal"])
def test_what_sqlite_finds_nothing_wrong_with(tmp_path: Path, what: str) -> None:
    """Rows that vanish or come back, each whole in itself, make nothing count twice, and missing deltas are reported."""
    recorder = Recorder(tmp_path / "s")
    for n in range(8):
        recorder.add(n)
    recorder.commit(0)
    before = as_kill_leaves_it(recorder.spool.path, tmp_path / "before")
    recorder.commit(6)
    for n in range(8):
        recorder.add(n)
    path = as_kill_leaves_it(recorder.spool.path, tmp_path / "k")
    if what in ("old database", "old seal"):
        for name in ("SEAL",) if what == "old seal" else ("spool.db", "spool.db-wal"):
            shutil.copy(before / name, path / name)
    else:
        with closing(sqlite3.connect(path / "spool.db")) as database, database:
            if what == "old row":
                database.execute("ATTACH ? AS old", [str(before / "spool.db")])
                database.execute("INSERT INTO pending SELECT * FROM old.pending")
            else:
                table = {"batch": "batches", "pending": "pending", "name": "names"}[what]
                database.execute(f"DELETE FROM {table} WHERE rowid = (SELECT max(rowid) FROM {table})")
    task, orphan = Task(), claim(path)
    task.finish(orphan)
    exact = what in ("old row", "old seal")
    assert bool(orphan.report.corrupt or orphan.report.bad_count) == (not exact)
    assert (task.states == {suffix(n): 2 for n in range(8)}) == exact
    assert all(state <= 2 for state in task.states.values())


def test_records_behind_damage_count(tmp_path: Path) -> None:
    """One record of a hundred can't be read: the others have their own checksums, and are sent."""
    recorder = Recorder(tmp_path / "s")
    for n in range(100):
        recorder.add("a", 2**n)
    path = as_kill_leaves_it(recorder.spool.path, tmp_path / "k")
    file = segment_path(path, 1, 0)
    data = bytearray(file.read_bytes())
    data[HEADER.size + 30 * 24 + 16] ^= 1
    file.write_bytes(data)
    task, orphan = Task(), claim(path)
    assert len(orphan.report.corrupt) == 1
    task.finish(orphan)
    assert task.states == {suffix("a"): 2**100 - 1 - 2**30}


def test_a_missing_lock_is_nobodys(tmp_path: Path) -> None:
    """A slot without LOCK can't be claimed: nobody can say that it is no copy."""
    recorder = Recorder(tmp_path / "s")
    recorder.add("a")
    assert not recorder.spool.close()
    (recorder.spool.path / "LOCK").unlink()
    assert Orphan.claim(recorder.spool.path) is None
    with pytest.raises(PipelineError):
        Recorder(tmp_path / "s")
