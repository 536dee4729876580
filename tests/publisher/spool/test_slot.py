"""Folders, locks, forks and full disks: who may touch a slot, and when it goes."""

from __future__ import annotations

import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.errors import BufferFull, Fenced, Invalid, PipelineError, Unavailable
from pipeline.publisher.spool.database import Database
from pipeline.publisher.spool.leftover import Leftover, leftovers
from pipeline.publisher.spool.live import Spool
from pipeline.publisher.spool.look import inspect
from pipeline.publisher.spool.ring import Position, segment_path
from tests.publisher.spool.support import Recorder, Task, as_kill_leaves_it, claim, sealed, suffix

ROOT = Path(__file__).resolve().parents[3]


def filled(folder: Path, **options: object) -> Recorder:
    """A spool with one batch, three series pending, and one delta in a ring."""
    recorder = Recorder(folder, **options)
    for n in range(4):
        recorder.add(n, 2**n)
    recorder.commit(1)
    recorder.add(0, 100)
    return recorder


TRUTH = {suffix(0): 101, suffix(1): 2, suffix(2): 4, suffix(3): 8}


def test_a_live_slot_is_nobody_elses(tmp_path: Path) -> None:
    """While its process lives, or somebody has claimed it, a slot can't be claimed, and looking changes nothing."""
    spool = filled(tmp_path / "s").spool
    files = {path.name: path.read_bytes() for path in spool.path.iterdir()}
    assert Leftover.claim(spool.path) is None
    [info] = inspect(tmp_path / "s")
    assert (info.live, info.epoch, info.batch_count, info.entry_count) == (True, 0, 1, 1)
    assert (info.series_count, info.delta_count, info.oldest_ms, info.corrupt) == (4, 4, 1, "")
    assert files == {path.name: path.read_bytes() for path in spool.path.iterdir()}
    assert not spool.close()
    leftover = claim(spool.path)
    assert inspect(tmp_path / "s")[0].live
    assert Leftover.claim(spool.path) is None
    with pytest.raises(Invalid, match="not empty"):
        leftover.remove()
    leftover.release()
    leftover = claim(spool.path)
    assert leftover.epoch == 2
    assert sum(item.state for item in leftover.pending) == 114
    leftover.release()


def test_looking_never_touches_the_log(tmp_path: Path) -> None:
    """SQLite deletes an empty log when it closes a database; not that of a process that goes on to write there."""
    recorder = Recorder(tmp_path / "s")
    assert inspect(tmp_path / "s")[0].live
    recorder.add("a")
    recorder.commit()
    leftover = claim(as_kill_leaves_it(recorder.spool.path, tmp_path / "k"))
    assert (leftover.report.corrupt, len(leftover.batches)) == ([], 1)
    leftover.release()


def test_two_claims_at_once(tmp_path: Path) -> None:
    """Of many that claim a slot in the same moment one gets it."""
    path = filled(tmp_path / "s").spool.path
    for _ in range(20):
        copy = as_kill_leaves_it(path, tmp_path / "k")
        got, barrier = [], threading.Barrier(4)

        def work(copy: Path = copy, got: list[Leftover] = got, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if leftover := Leftover.claim(copy):
                got.append(leftover)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [leftover] = got
        task = Task()
        task.finish(leftover)
        assert task.states == TRUTH
        shutil.rmtree(tmp_path / "k")


def test_a_copy_is_refused(tmp_path: Path) -> None:
    """A copy of a slot can't be claimed: its deltas would be sent by the original, too. A folder that was moved can."""
    spool = filled(tmp_path / "s").spool
    spool.close()
    shutil.copytree(tmp_path / "s", tmp_path / "t")
    with pytest.raises(Fenced, match="copy"):
        Leftover.claim(tmp_path / "t" / "p")
    (tmp_path / "s").rename(tmp_path / "u")
    task = Task()
    task.finish(claim(tmp_path / "u" / "p"))
    assert (task.states, leftovers(tmp_path / "u")) == (TRUTH, [])


def test_folders(tmp_path: Path) -> None:
    """They are for one user; of another version, or of somebody else, they are refused and stay as they are."""
    recorder = filled(tmp_path / "s")
    for path in (tmp_path / "s", recorder.spool.path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in recorder.spool.path.iterdir():
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    with pytest.raises(Invalid, match="has a slot p already"):
        Recorder(tmp_path / "s")
    with pytest.raises(Invalid, match="no room for 4 segments"):
        Spool(tmp_path / "s", "q", bytes_max=2**18, ends=dict)
    for name in ("", ".x", "a/b", "x.corrupt", "a\nb", "VERSION", "x" * 101):
        with pytest.raises(Invalid):
            Recorder(tmp_path / "s", name or ".")
    (tmp_path / "s" / "VERSION").write_text("pipeline spool 2\n")
    (tmp_path / "f").mkdir(mode=0o700)
    (tmp_path / "f" / "letter").touch()
    for folder, match in ((tmp_path / "s", "'pipeline spool 2'.*'pipeline spool 3'"), (tmp_path / "f", "no spool")):
        for call in (lambda folder=folder: Recorder(folder, "q"), lambda folder=folder: leftovers(folder)):
            with pytest.raises(Invalid, match=match):
                call()


def test_what_is_half_made_or_half_removed_goes(tmp_path: Path) -> None:
    """Of processes that died in the midst nothing stays, and an empty slot goes at the end."""
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
    """A segment of another slot, one that no transaction knows, and one that is gone: the rest is sent, and it is told."""
    one, other = filled(tmp_path / "s"), filled(tmp_path / "s", name="q")
    unknown = segment_path(other.spool.path, 9, 0)
    shutil.copy(segment_path(one.spool.path, 1, 0), unknown)
    shutil.copy(segment_path(one.spool.path, 1, 0), segment_path(other.spool.path, 1, 0))
    segment_path(other.spool.path, 0, 0).unlink()
    (other.spool.path / "ring-x").touch()
    other.spool._database.close()
    leftover = claim(as_kill_leaves_it(other.spool.path, tmp_path / "k"))
    told = "; ".join(leftover.report.corrupt)
    for part in ("ring-000-00000000: missing", "ring-001-00000000: a wrong header", "does not know", "ring-x: a foreign"):
        assert part in told, told
    assert sorted(item.state for item in leftover.pending) == [2, 4, 8]
    task = Task()
    task.finish(leftover)
    assert task.states == {**TRUTH, suffix(0): 1}
    assert (tmp_path / "k" / "q.corrupt" / "ring-001-00000000.corrupt").exists()


def test_a_full_disk(tmp_path: Path) -> None:
    """Whatever can't be written is refused in words that say so, and goes through, once, when there is room."""
    recorder = filled(tmp_path / "s", bytes_max=2**26)
    refused = 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for n in range(4_000):
        recorder.add(str(n) * 100)
    waiting, outbox = {**recorder.waiting}, recorder.outbox.next_sequences()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        with pytest.raises((BufferFull, Unavailable)):
            recorder.commit(0)
        recorder.waiting = {**waiting}
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**10, hard))
        with pytest.raises(BufferFull, match="making a segment"):
            [recorder.append(1, b"\x01", 1) for _ in range(10_000)]
        with pytest.raises((BufferFull, Unavailable)):
            recorder.acknowledge(next(recorder.outbox.pending()))
        refused += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert (refused, outbox) == (1, recorder.outbox.next_sequences())
    recorder.commit()
    for batch in [*recorder.outbox.pending()]:
        recorder.acknowledge(batch)
    recorder.spool.acknowledge([*recorder.spool._database.batches])
    assert recorder.spool.close()


def test_a_handler_that_raises_behind_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transaction stands; the same commit again does nothing twice."""
    recorder = filled(tmp_path / "s")
    waiting, outbox = {**recorder.waiting}, recorder.outbox

    def interrupt(database: Database) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Database, "_store_seal", interrupt)
    positions = recorder.ends()
    batches = sealed([*waiting.values()], outbox)
    for _ in range(2):
        with suppress(KeyboardInterrupt):
            recorder.spool.commit(batches, [], positions)
    assert not recorder.spool.close()
    task, leftover = Task(), claim(recorder.spool.path)
    assert not leftover.report.corrupt
    task.finish(leftover)
    assert task.states == TRUTH


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """When somebody deletes the spool under a process, it is told so."""
    recorder = filled(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(Unavailable, match="making a segment"):
        [recorder.add("a") for _ in range(1000)]
    with suppress(PipelineError):
        recorder.spool.close()


def test_disk_mode(tmp_path: Path) -> None:
    """What a sync or a commit has seen stands when all that was not synced is gone."""
    recorder = filled(tmp_path / "s", fsync=True)
    for n in range(500):
        recorder.add(n % 4, 2**20)
    recorder.spool.sync()
    assert recorder.ends()[0] > Position(1, 0)
    path = as_kill_leaves_it(recorder.spool.path, tmp_path / "k")
    leftover = Leftover.claim(path, fsync=True)
    assert leftover is not None
    task = Task()
    task.finish(leftover)
    assert task.states == {key: value + 125 * 2**20 for key, value in TRUTH.items()}


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
    for call in (
        lambda: recorder.append(1, b"\\x01"),
        lambda: recorder.add("b"),
        lambda: recorder.commit(),
        lambda: recorder.spool.acknowledge([(0, 0)]),
    ):
        try:
            call()
        except Invalid:
            refused += 1
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
    """It can't write to its parent's slot, not even by ending as a program does, also if nobody has told it of the fork."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "s"), how], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "4\n", done.stderr
    assert done.returncode == -signal.SIGKILL
    task = Task()
    for path in leftovers(tmp_path / "s"):
        leftover = claim(path)
        assert not leftover.report.corrupt
        task.finish(leftover)
    assert task.states == {suffix("a"): 4, suffix("c"): 1}


def test_a_program_that_is_started_inherits_nothing(tmp_path: Path) -> None:
    """A slot is free as soon as its process is gone, whatever that process has started."""
    spool = filled(tmp_path / "s").spool
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1, close_fds=False
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline()  # it has begun
        spool.close()
        claim(spool.path).release()
        program.communicate(b"\n")
    assert spool.path.exists()
