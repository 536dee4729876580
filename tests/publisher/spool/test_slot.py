"""Folders, locks and forks: which process may touch a slot, and when it goes."""

from __future__ import annotations

import shutil
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.errors import Fenced, Invalid, PipelineError, Unavailable
from pipeline.publisher.spool.database import Database
from pipeline.publisher.spool.live import Spool
from pipeline.publisher.spool.orphan import Orphan, find_slots, inspect
from pipeline.publisher.spool.ring import segment_path
from tests.publisher.spool.support import Recorder, Task, as_kill_leaves_it, claim, sealed, suffix
from tests.publisher.support import ROOT, in_threads


def filled(folder: Path, name: str = "p") -> Recorder:
    """Return a spool with one batch, three series pending, and one delta in a ring."""
    recorder = Recorder(folder, name)
    for n in range(4):
        recorder.add(n, 2**n)
    recorder.commit(1)
    recorder.add(0, 100)
    return recorder


TRUTH = {suffix(0): 101, suffix(1): 2, suffix(2): 4, suffix(3): 8}


def test_a_live_slot_is_nobody_elses(tmp_path: Path) -> None:
    """A slot whose process lives, or that somebody has claimed, can't be claimed, and looking changes nothing.

    Not even SQLite's empty log, which is usually deleted at the end of a look at a database, is touched.
    """
    recorder = Recorder(tmp_path / "s")
    assert inspect(tmp_path / "s")[0].live
    recorder.add("a")
    recorder.commit()
    left = claim(as_kill_leaves_it(recorder.spool.path, tmp_path / "k"))
    assert (left.report.corrupt, len(left.batches)) == ([], 1)
    spool = filled(tmp_path / "t").spool
    files = {path.name: path.read_bytes() for path in spool.path.iterdir()}
    assert Orphan.claim(spool.path) is None
    [info] = inspect(tmp_path / "t")
    assert (info.live, info.epoch, info.batch_count, info.entry_count) == (True, 0, 1, 1)
    assert (info.series_count, info.delta_count, info.oldest_ms, info.corrupt) == (4, 4, 1, "")
    assert files == {path.name: path.read_bytes() for path in spool.path.iterdir()}
    assert not spool.close()
    left = claim(spool.path)
    assert inspect(tmp_path / "t")[0].live
    assert Orphan.claim(spool.path) is None
    with pytest.raises(Invalid, match="not empty"):
        left.remove()
    left.release()
    left = claim(spool.path)
    assert (left.epoch, sum(item.state for item in left.pending)) == (2, 114)
    left.release()


def test_claims_at_once(tmp_path: Path) -> None:
    """One of many claimants of a slot gets it."""
    path = filled(tmp_path / "s").spool.path
    for n in range(20):
        copy, got = as_kill_leaves_it(path, tmp_path / f"k{n}"), list[Orphan | None]()
        in_threads(4, lambda i, copy=copy, got=got: got.append(Orphan.claim(copy)))  # type: ignore[misc]
        [left] = filter(None, got)
        task = Task()
        task.finish(left)
        assert task.states == TRUTH


def test_a_copy_is_refused(tmp_path: Path) -> None:
    """A copy of a slot can't be claimed: its deltas would be sent by the original, too. A folder that was moved can."""
    filled(tmp_path / "s").spool.close()
    shutil.copytree(tmp_path / "s", tmp_path / "t")
    with pytest.raises(Fenced, match="copy"):
        Orphan.claim(tmp_path / "t" / "p")
    (tmp_path / "s").rename(tmp_path / "u")
    task = Task()
    task.finish(claim(tmp_path / "u" / "p"))
    assert (task.states, find_slots(tmp_path / "u")) == (TRUTH, [])


def test_folders(tmp_path: Path) -> None:
    """Folders are private to one user; those of another version, or of somebody else, are refused and stay as they are."""
    recorder = filled(tmp_path / "s")
    for path in (tmp_path / "s", recorder.spool.path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in recorder.spool.path.iterdir():
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    with pytest.raises(Invalid, match="has a slot p already"):
        Recorder(tmp_path / "s")
    with pytest.raises(Invalid, match="no room for 4 segments"):
        Spool(tmp_path / "s", "q", bytes_max=2**18, ends=dict)
    for name in (".", ".x", "a/b", "x.corrupt", "a\nb", "VERSION", "x" * 101):
        with pytest.raises(Invalid):
            Recorder(tmp_path / "s", name)
    (tmp_path / "s" / "VERSION").write_text("pipeline spool 2\n")
    (tmp_path / "f").mkdir(mode=0o700)
    (tmp_path / "f" / "letter").touch()
    for folder, match in ((tmp_path / "s", "'pipeline spool 2'.*'pipeline spool 3'"), (tmp_path / "f", "no spool")):
        for call in (lambda folder=folder: Recorder(folder, "q"), lambda folder=folder: find_slots(folder)):
            with pytest.raises(Invalid, match=match):
                call()


def test_what_is_half_made_or_half_removed_goes(tmp_path: Path) -> None:
    """Slots that processes left half made or half removed are swept, and an empty slot goes at the end."""
    recorder = Recorder(tmp_path / "s")
    for name in (".new-x", ".gone-x"):
        shutil.copytree(recorder.spool.path, tmp_path / "s" / name)
        lock = tmp_path / "s" / name / "LOCK"
        lock.write_text(str(lock.stat().st_ino))
    (tmp_path / "s" / ".gone-y").mkdir()
    assert recorder.spool.close()
    assert Recorder(tmp_path / "s", "q").spool.close()
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["VERSION"]


def test_foreign_and_missing_segments_are_told(tmp_path: Path) -> None:
    """With a segment that is foreign, in no transaction, or gone, the rest is sent, and the loss is reported."""
    one, other = filled(tmp_path / "s").spool, filled(tmp_path / "s", "q").spool
    for path in (segment_path(other.path, 9, 0), segment_path(other.path, 1, 0)):
        shutil.copy(segment_path(one.path, 1, 0), path)
    segment_path(other.path, 0, 0).unlink()
    (other.path / "ring-x").touch()
    other._database.close()
    left = claim(as_kill_leaves_it(other.path, tmp_path / "k"))
    told = "; ".join(left.report.corrupt)
    for part in ("ring-000-00000000: missing", "ring-001-00000000: a wrong header", "does not know", "ring-x: a foreign"):
        assert part in told, told
    assert sorted(item.state for item in left.pending) == [2, 4, 8]
    task = Task()
    task.finish(left)
    assert task.states == {**TRUTH, suffix(0): 1}
    assert (tmp_path / "k" / "q.corrupt" / "ring-001-00000000.corrupt").exists()


def test_a_handler_that_raises_behind_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit behind which a handler raises stands, and a repeat of it does nothing twice."""
    recorder = filled(tmp_path / "s")

    def interrupt(database: Database) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Database, "_store_seal", interrupt)
    batches, positions = sealed([*recorder.waiting.values()], recorder.outbox), recorder.ends()
    for _ in range(2):
        with suppress(KeyboardInterrupt):
            recorder.spool.commit(batches, [], positions)
    assert not recorder.spool.close()
    task, left = Task(), claim(recorder.spool.path)
    assert not left.report.corrupt
    task.finish(left)
    assert task.states == TRUTH


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """A process whose spool was deleted gets an error that says so."""
    recorder = filled(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(Unavailable, match="making a segment"):
        [recorder.add("a") for _ in range(1000)]
    with suppress(PipelineError):
        recorder.spool.close()


CHILD = """
import os, sys
from pathlib import Path
from pipeline.errors import Invalid
from tests.publisher.spool.support import Recorder
recorder = Recorder(Path(sys.argv[1]))
recorder.add("a"); recorder.commit(0); recorder.add("a")
child = os.fork()
if not child:
    refused = 0
    if sys.argv[2] == "seen":
        recorder.spool.abandon()
    record, acknowledge = lambda: recorder.append(1, b"\\x01"), lambda: recorder.spool.acknowledge([(0, 0)])
    for call in (record, lambda: recorder.add("b"), recorder.commit, acknowledge):
        try: call()
        except Invalid: refused += 1
    mine = Recorder(Path(sys.argv[1]), "child")
    mine.add("c"); mine.commit(0)
    print(refused, flush=True)
    sys.exit(0)
os.waitpid(child, 0)
recorder.add("a"); recorder.commit(0); recorder.add("a")
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["seen", "unseen"])
def test_a_forked_child_lets_go(tmp_path: Path, how: str) -> None:
    """A child can't write to its parent's slot, not even at its end, also if no hook has told it of the fork."""
    command = [sys.executable, "-c", CHILD, str(tmp_path / "s"), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("4\n", -signal.SIGKILL), done.stderr
    task = Task()
    for path in find_slots(tmp_path / "s"):
        left = claim(path)
        assert not left.report.corrupt
        task.finish(left)
    assert task.states == {suffix("a"): 4, suffix("c"): 1}


def test_a_program_that_is_started_inherits_nothing(tmp_path: Path) -> None:
    """A slot is free as soon as its process is gone, whatever that process has started."""
    spool = filled(tmp_path / "s").spool
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, close_fds=False) as program:
        assert program.stdout is not None
        assert program.stdout.readline()  # it has begun
        spool.close()
        claim(spool.path).release()
        program.communicate(b"\n")
    assert spool.path.exists()
