"""With a `durability` beyond memory, recorded deltas outlive full disks, damage and kills, and count once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import BufferFull, Invalid, PipelineError, Unavailable
from pipeline.publisher.spool.orphan import inspect
from tests.publisher.modes import all_sent, kept_count
from tests.publisher.support import FaultyLog, FileLog, fold, publisher, run_script, same, wait_until

USE = """
import resource
from pathlib import Path
import pipeline.metrics as m
from pipeline.errors import *
from tests.publisher.modes import kept_count
from tests.publisher.support import FaultyLog, Meter
meter, spool = Meter(), log.path.with_name("spool")
def durable(log=log, **settings):
    hour = {"durability": "process", "flush_interval_ms": 3_600_000, "snapshot_interval_ms": 3_600_000}
    return publisher(log, meter, spool_dir=str(spool), **{**hour, **settings})
def files_end_at(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def disk_is_full(more=0):
    "Files stay writable where they are: the segments, which are there already."
    [size] = [file.stat().st_size for file in spool.glob("*/spool.db-wal")]
    files_end_at(size + more)
def disk_has_room():
    files_end_at(resource.RLIM_INFINITY)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def run(path: Path, script: str) -> list[str]:
    """Run a script that may make a `durable` publisher; return the words that it has printed."""
    return run_script(path, USE + script).stdout.split()


# The disk


def test_folders_that_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A spool that can't be made is an error where the publisher is made, with the reason.

    A folder that others can read is reported, once; one that they can write to is refused.
    """

    def folder(name: str, inside: str = "", text: str = "", mode: int = 0o700) -> Path:
        made = tmp_path / name
        made.mkdir()
        made.chmod(mode)
        if inside:
            (made / inside).write_text(text)
        return made

    (file := tmp_path / "file").touch()
    cases: list[tuple[Path, type[PipelineError], str]] = [
        (file, Unavailable, "File exists"),
        (file / "below", Unavailable, "Not a directory"),
        (folder("other", "VERSION", "pipeline spool 99\n"), Invalid, "pipeline spool 99"),
        (folder("full", "somebody's"), Invalid, "not empty and no spool"),
        (folder("everybody's", mode=0o777), Invalid, "everybody can write to it"),
        (Path("/proc/none"), Unavailable, "/proc/none"),
    ]
    for wrong, error, message in cases:
        for durability in ("process", "memory"):
            with pytest.raises(error, match=message):
                publisher(FaultyLog(), spool_dir=str(wrong), durability=durability)
    with pytest.raises(Invalid, match="spool_dir"):
        publisher(FaultyLog(), durability="disk")
    begun = folder("begun", ".VERSION-1")  # another process is just making it a spool
    seen = folder("seen", mode=0o755)
    for right, told in ((begun, 0), (seen, 1), (seen, 0), (tmp_path / "new" / "spool", 0)):
        caplog.clear()
        with publisher(FaultyLog(), durability="process", spool_dir=str(right)) as pub:
            pub.sum("v").add(1)
            assert (right.stat().st_mode & 0o777 == 0o700) == (right != seen)
            producer_id = pub._runtime.sender.outbox.producer_id
            assert not [path for path in right.rglob("*") if producer_id in path.name]
        assert caplog.text.count("others can look into it") == told


def test_a_disk_that_is_full_from_the_start(path: Path) -> None:
    """A publisher that cannot make its spool raises, and leaves nothing behind."""
    said = run(path, "files_end_at(2**19)\ntry: durable()\nexcept BufferFull as error: print(error, os.listdir(spool))")
    assert "making a segment" in " ".join(said)
    assert said[-1] == "['VERSION']"


@pytest.mark.parametrize("on_full", ["block", "raise", "drop_newest"])
def test_a_disk_that_fills_up(path: Path, on_full: str) -> None:
    """Recording is refused as `on_full` says; deltas recorded before arrive; with room again, it goes on.

    With `drop_newest`, a batch returns the number of recorded deltas, and each other one is counted once.
    """
    count, rows = map(
        int,
        run(
            path,
            f"""
pub = durable(on_full={on_full!r}, block_timeout_ms=50, flush_interval_ms=5)
files_end_at(2**19)
log.away.touch()
view, wide = pub.last("v", labels=("n",)), pub.sum("w", labels=("n",))
count = refused = rows = 0
if {on_full!r} == "drop_newest":
    for i in range(5):
        names = [f"{{'x' * 3_000}}{{i}}-{{j}}" for j in range(100)] * 3
        rows += pub.record_batch(wide, {{"n": names, "value": [1] * 300}})
    rows += wide.labels(f"{{'x' * 3_000}}0-0").add_many([1, 1])
    assert 0 < rows < 1_502 == rows + meter.of(m.PUBLISHER_DROPPED, "buffer_full")
dropped = meter.of(m.PUBLISHER_DROPPED, "buffer_full")
while count < 2_000 and not refused:
    try: view.set("x" * 1_000, n=str(count))
    except BufferFull: refused = 1
    else: count += 1
    if meter.of(m.PUBLISHER_DROPPED, "buffer_full") > dropped: refused, count = 1, count - 1
assert refused
assert meter.of(m.PUBLISHER_REFUSED) == {0 if on_full == "drop_newest" else 1}
disk_has_room()
log.away.unlink()
view.set("y", n=str(count))
print(count, rows)
pub.close()
""",
        ),
    )
    assert count > 100 or rows
    found = all_sent(path)
    same(found.of("v"), {(str(n),): "x" * 1_000 for n in range(count)} | {(str(count),): "y"})
    assert found.total("w") == rows


def test_a_commit_that_failed_is_tried_again_without_new_deltas(path: Path) -> None:
    """Batches that could not be kept on a full disk leave as soon as there is room, and not before, even if nobody
    records.
    """
    run(
        path,
        """
pub = durable(flush_interval_ms=5, snapshot_interval_ms=5)
cell = pub.sum("v").labels()
cell.add(1.0)
pub.flush(60)
disk_is_full(10)
before = log.path.stat().st_size
cell.add(2.0)
try: pub.flush(0.3)
except Unavailable as error: assert "writing to the database" in str(error), error
else: raise AssertionError
assert log.path.stat().st_size == before, "sent before it is kept"
disk_has_room()
pub.flush(60)
""",
    )
    same(all_sent(path).of("v"), {(): 3})


@pytest.mark.parametrize(
    ("away", "idle_ms"),
    [
        pytest.param(True, 3_600_000, id="of what is acknowledged then"),
        pytest.param(False, 500, id="of names that are silent"),
        pytest.param(False, 3_600_000, id="of names that need not be silent"),
    ],
)
def test_a_spool_that_was_full_has_room_again(tmp_path: Path, away: bool, idle_ms: int) -> None:
    """A spool does not stay full with free pages of its database, or names of evicted series, though nothing is recorded."""
    log = FaultyLog()
    settings = {"spool_bytes_max": 2**22, "series_idle_ms": idle_ms, "on_full": "raise"}
    with publisher(log, durability="process", spool_dir=str(tmp_path / "s"), **settings) as pub:
        view, n = pub.sum("v", labels=("a",)), 0

        def is_recorded(name: str) -> bool:
            try:
                view.add(1, a=name)
            except BufferFull:
                return False
            return True

        log.away = away
        while is_recorded(f"{'x' * 2_000}{n}"):
            n += 1
        log.away = False
        pub.flush(20)
        wait_until(lambda: not kept_count(tmp_path / "s"))
        for i in range(50 if away else 3 * n):
            wait_until(lambda name=f"{'y' * 2_000}{i}": is_recorded(name))  # type: ignore[misc]


@pytest.mark.parametrize("room_again", [True, False])
def test_what_the_spool_could_not_forget(path: Path, room_again: bool) -> None:
    """A batch that a full spool could not forget is forgotten once there is room. Until then tasks do not learn that the
    producer has ended: another process may send the batch again, much later, and tasks must know that it was counted.
    """
    said = run(
        path,
        f"""
import logging
log, told = FaultyLog(), []
pub = durable(log)
logging.getLogger("pipeline.publisher.spool.publisher").addFilter(told.append)
cell = pub.sum("v").labels()
cell.add(1.0)
pub.flush(60)
wait_until(lambda: not kept_count(spool))
log.fate = lambda n, batch: disk_is_full() or "kept"
cell.add(2.0)
pub.flush(60)
wait_until(lambda: told)
if {room_again}:
    disk_has_room()
    log.fate = lambda n, batch: "kept"
    cell.add(4.0)
    pub.flush(60)
pub.close()
print(len(log.closings))
""",
    )
    assert said == ["1" if room_again else "0"]
    assert len(inspect(path.with_name("spool"))) == (0 if room_again else 1)


def test_what_is_recorded_is_forced_to_a_disk_that_is_full(path: Path) -> None:
    """The segments exist already, so `durability="disk"` keeps its promise although no batch can be kept."""
    run(
        path,
        """
synced, fsync = [], os.fsync
def listed(fd):
    synced.append(os.readlink(f"/proc/self/fd/{fd}"))
    fsync(fd)
os.fsync = listed
pub = durable(durability="disk", fsync_interval_ms=10, flush_interval_ms=5)
cell = pub.sum("v").labels()
cell.add(1.0)
pub.flush(60)
wait_until(lambda: not kept_count(spool))
disk_is_full()
cell.add(2.0)
wait_until(lambda: "the spool" in pub._runtime.sender.trouble)
synced.clear()
wait_until(lambda: any("/ring-001-" in name for name in synced))
disk_has_room()
pub.close()
""",
    )
    same(all_sent(path).of("v"), {(): 3})


def test_a_batch_that_is_damaged_in_the_spool_holds_up_no_other(tmp_path: Path) -> None:
    """The flush says that the batch is lost, all others arrive, and the slot is left for a person to clear."""
    log = FaultyLog(lambda n, batch: Unavailable("away"), partitions=1)
    pub = publisher(log, durability="process", spool_dir=str(tmp_path / "s"))
    view, running = pub.sum("v", labels=("a",)), pub._runtime
    for i in range(3):
        view.add(10**i, a=str(i))
        wait_until(lambda sealed=i + 1: running.spool.kept_count == sealed)  # type: ignore[misc, union-attr]
    running.spool.release_memory(0)  # type: ignore[union-attr]
    database = running.spool._spool._database  # type: ignore[union-attr]
    with database.lock:
        database._connection.execute("UPDATE batches SET value = zeroblob(9) WHERE sequence = 1")  # type: ignore[union-attr]
    log.fate = lambda n, batch: "kept"
    with pytest.raises(Invalid, match=r"1 batches were rejected.*is damaged"):
        pub.flush(10)
    assert fold(log.log).of("v") == {("0",): 1, ("2",): 100}
    pub.close()
    assert not log.closings
    [slot] = inspect(tmp_path / "s")
    assert "wrong checksum" in slot.corrupt


def test_nothing_is_sent_before_it_is_kept(tmp_path: Path) -> None:
    """Each batch in the log is in the journal when it is sent, and the sender never sends in vain."""
    seen: list[int] = []

    def fate(n: int, batch: Any) -> str:
        [slot] = inspect(tmp_path)
        seen.append(slot.batch_count)
        return "kept"

    log = FaultyLog(fate)
    with publisher(log, durability="process", spool_dir=str(tmp_path)) as pub:
        cell = pub.sum("v").labels()
        for _ in range(20):
            cell.add(1.0)
            pub.flush(60)
    assert len(seen) == 20
    assert min(seen) >= 1
    assert all(log.attempts)
    same(fold(log.log).of("v"), {(): 20})


def test_a_signal_handler_may_record(path: Path) -> None:
    """The handler interrupts its own thread's writes to the journal; after a kill each delta of both counts once.

    The journal has little room, so that some of the deltas are kept as pending series.
    """
    script = """
log.away.touch()
pub = durable(snapshot_interval_ms=5, spool_bytes_max=2**22)
view = pub.sum("v", labels=("who",))
main, handler = view.labels("main"), view.labels("handler")
counts = [0, 0]
def handle(*_):
    handler.add(2**80)
    counts[1] += 1
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
while counts[0] < 40_000 or counts[1] < 50 or not pub._runtime.spool._spool.pending_bytes:
    main.add(2**70)
    counts[0] += 1
signal.setitimer(signal.ITIMER_REAL, 0)
print(*counts, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    main, handler = map(int, run_script(path, USE + script, check=False).stdout.split())
    FileLog(path).away.unlink()
    same(all_sent(path).of("v"), {("main",): main * 2**70, ("handler",): handler * 2**80})
