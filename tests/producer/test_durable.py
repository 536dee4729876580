"""With a `durability` beyond memory, a delta outlives its process however that ends, and counts once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import BufferFull, Invalid, PipelineError, Unavailable
from pipeline.publisher.rescue import drain
from pipeline.publisher.spool.look import inspect
from pipeline.settings import PublisherSettings
from tests.producer.support import (
    CLOCK,
    FaultyLog,
    FileLog,
    Views,
    fold,
    publisher,
    run_script,
    same,
    wait_until,
)

USE = """
import resource
from pathlib import Path
from pipeline.errors import *
from pipeline.publisher.spool.look import inspect
spool = str(log.path.with_suffix(".spool"))
def durable(**settings):
    hour = {"flush_interval_ms": 3_600_000, "snapshot_interval_ms": 3_600_000}
    return publisher(log, durability="process", spool_dir=spool, **{**hour, **settings})
"""
RECORD = (
    USE
    + """
pub = durable()
view = pub.sum("v", labels=("who",))
cell = view.labels("main")
cell.add(1.0)
cell.add(2)
view.labels("big").add(2**90)
view.labels("big").add(-3)
cell.add_many([0.5, 0.5])
pub.last("l").labels().set("text", 1)
"""
)
RECORDED = {("v", ("main",)): 4, ("v", ("big",)): 2**90 - 3, ("l", ()): "text"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def drained(path: Path) -> Views:
    """What the log has, once everything that is left was sent."""
    spool = path.with_suffix(".spool")
    for slot in drain(spool, FileLog(path), CLOCK, PublisherSettings(), timeout_s=30):
        wrong = slot.error, slot.live, slot.report.bad_count, slot.report.corrupt
        assert not any(wrong), slot
    assert inspect(spool) == []
    found = fold(FileLog(path).read())
    assert not found.dead
    return found


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise RuntimeError('unhandled')", 1),
        ("os._exit(4)", 4),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)", -15),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("os.abort()", -6),
        ("pub.close(0.1)", None),
        ("pub.__enter__()\nwith pub: 1 / 0", 1),
        ("threading.Thread(target=lambda: os._exit(0)).start(); pub.flush(20)", None),
    ],
)
def test_however_a_process_ends(path: Path, ending: str, code: int | None, away: bool) -> None:
    """Nothing that was recorded is lost, and nothing counts twice, whether the log was there at the end or not."""
    if away:
        FileLog(path).away.touch()
    done = run_script(path, RECORD.replace("durable()", "durable(close_timeout_ms=300)") + ending, check=False)
    assert code is None or done.returncode == code, done.stderr
    assert "at exit" not in done.stderr or away
    FileLog(path).away.unlink(missing_ok=True)
    found = drained(path)
    same(found.answers, RECORDED)
    assert found.duplicates == 0


def test_the_next_process_sends_what_one_has_left(path: Path) -> None:
    """`close` without a log leaves the slot, and says so; whoever opens the spool next sends it, while it records itself."""
    FileLog(path).away.touch()
    done = run_script(path, RECORD + "try: pub.close(0.2)\nexcept Unavailable as error: print(error)", check=False)
    assert "not acknowledged" in done.stdout
    assert "is left in" in done.stderr
    [slot] = inspect(path.with_suffix(".spool"))
    assert not slot.live
    FileLog(path).away.unlink()
    run_script(
        path,
        RECORD + f"wait_until(lambda: all(slot.slot != {slot.slot!r} for slot in inspect(Path(spool))), 60)",
    )
    found = drained(path)
    same(found.answers, {("v", ("main",)): 8, ("v", ("big",)): 2 * (2**90 - 3), ("l", ()): "text"})


# Forks


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)", "pub.close(); os._exit(0)"])
def test_a_child_has_a_slot_of_its_own(path: Path, end: str) -> None:
    """What the parent had not drained is the parent's to send, what the child records the child's, however they end."""
    run_script(
        path,
        RECORD
        + f"""
child = os.fork()
if not child:
    for who in (cell, view.labels("child")):
        who.add(100.0)
        who.add(100)
    {end}
os.waitpid(child, 0)
left = [slot for slot in inspect(Path(spool)) if not slot.live]
assert len(left) <= {0 if "close" in end else 1}, left  # or sent by the parent already
cell.add(8.0)
{end}
""",
        check=False,
    )
    found = drained(path)
    same(found.of("v"), {("main",): 212, ("big",): 2**90 - 3, ("child",): 200})
    assert found.duplicates == 0


def test_forks_in_the_midst_of_everything(path: Path) -> None:
    """Threads record, drain and commit while the process forks; each child records too and dies: each delta counts once."""
    done = run_script(
        path,
        USE
        + """
pub = durable(flush_interval_ms=1, snapshot_interval_ms=1, series_idle_ms=1)
view = pub.sum("v", labels=("who",))
counts, stop = [0] * 3, threading.Event()
def work(i):
    cell = view.labels(str(i))
    while not stop.is_set():
        cell.add(1.0)
        view.add(2**70, who=f"big {i}")
        view.add(1, who=f"{i} {counts[i]}")
        counts[i] += 1
        if counts[i] % 50 == 0:
            stop.wait(0.001)
with hurried_threads():
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads: thread.start()
    for n in range(20):
        child = os.fork()
        if not child:
            for i in range(3):
                for _ in range(10):
                    view.labels(str(i)).add(1000.0)
            view.add(1.0, who=f"child {n}")
            if n % 3 == 0: os._exit(0)
            if n % 3 == 1: os.kill(os.getpid(), signal.SIGKILL)
            pub.close()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        time.sleep(0.01)
    stop.set()
    for thread in threads: thread.join()
print(*counts)
os._exit(0)
""",
    )
    counts = [*map(int, done.stdout.split())]
    expected: dict[tuple[str, ...], Any] = {(str(i),): n + 200_000 for i, n in enumerate(counts)}
    expected |= {(f"big {i}",): n * 2**70 for i, n in enumerate(counts)}
    expected |= {(f"{i} {k}",): 1 for i, n in enumerate(counts) for k in range(n)}
    same(drained(path).of("v"), expected | {(f"child {n}",): 1 for n in range(20)})


def test_a_fork_while_a_series_gets_its_number(path: Path) -> None:
    """The child gives it one of its own: it records to it as to any other."""
    done = run_script(
        path,
        USE
        + """
from tests.producer.support import Meter
import pipeline.metrics as m
class Forks(Meter):
    child = None
    def inc(self, metric, amount=1, *labels):
        super().inc(metric, amount, *labels)
        if metric is m.PUBLISHER_DROPPED and amount and self.child is None:
            self.child = os.fork()
from tests.producer.support import BasePublisher, CLOCK, PublisherSettings
meter = Forks()
pub = BasePublisher(log, CLOCK, PublisherSettings(
    durability="process", spool_dir=spool, on_full="drop_newest", buffer_bytes_max=65_536, flush_interval_ms=3_600_000,
), meter)
log.away.touch()
view = pub.sum("v", labels=("who",))
cells = [view.labels(str(n)) for n in range(500)]
for cell in cells:
    cell.add(1.0)
    if meter.child == 0:
        break
if meter.child:
    assert os.waitpid(meter.child, 0)[1] == 0
    os._exit(0)
cell.add(1.0)
kept = cells.index(cell)
del cells
view.add(1.0, who="child")
print(kept)
sys.stdout.flush()
os._exit(0)
""",
    )
    FileLog(path).away.unlink()
    kept = int(done.stdout)
    found = drained(path).of("v")
    assert found["child",] == 1
    assert found[str(kept),] == 1
    assert found["0",] == 1


# The disk


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    """A spool that can't be made is an error where the publisher is made, and it says what is wrong."""
    file = tmp_path / "file"
    file.write_text("x")
    other = tmp_path / "other"
    other.mkdir()
    (other / "VERSION").write_text("pipeline spool 99\n")
    full = tmp_path / "full"
    full.mkdir()
    (full / "somebody's").touch()
    cases: list[tuple[Path, type[PipelineError], str]] = [
        (file, Unavailable, "File exists"),
        (file / "below", Unavailable, "Not a directory"),
        (other, Invalid, "pipeline spool 99"),
        (full, Invalid, "not empty and no spool"),
        (Path("/proc/none"), Unavailable, "/proc/none"),
    ]
    for folder, error, message in cases:
        for durability in ("process", "memory"):
            with pytest.raises(error, match=message):
                publisher(FaultyLog(), spool_dir=str(folder), durability=durability)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / ".VERSION-1").touch()  # another process is just making it a spool
    publisher(FaultyLog(), durability="process", spool_dir=str(begun)).close()
    with pytest.raises(Invalid, match="spool_dir"):
        publisher(FaultyLog(), durability="disk")


def test_a_disk_that_is_full_from_the_start(path: Path) -> None:
    """It is an error where the publisher is made, and nothing is left behind."""
    done = run_script(
        path,
        USE
        + """
resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))
try: durable()
except BufferFull as error: print(error)
assert [it.name for it in Path(spool).iterdir()] == ["VERSION"]
""",
    )
    assert "making a segment" in done.stdout


@pytest.mark.parametrize("on_full", ["block", "raise", "drop_newest"])
def test_a_disk_that_fills_up(path: Path, on_full: str) -> None:
    """Recording is refused as `on_full` says; what was recorded before arrives; with room again, it goes on."""
    done = run_script(
        path,
        USE
        + f"""
import pipeline.metrics as m
from tests.producer.support import Meter
meter = Meter()
pub = publisher(log, meter, durability="process", spool_dir=spool, on_full={on_full!r}, block_timeout_ms=50)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, resource.RLIM_INFINITY))
log.away.touch()
view = pub.last("v", labels=("n",))
count = refused = 0
while count < 2_000 and not refused:
    try: view.set("x" * 1_000, n=str(count))
    except BufferFull as error: refused = 1
    else: count += 1
    if meter.of(m.PUBLISHER_DROPPED, "buffer_full"): refused, count = 1, count - 1
assert refused
assert meter.of(m.PUBLISHER_REFUSED) == {0 if on_full == "drop_newest" else 1}
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.away.unlink()
view.set("y", n=str(count))
print(count)
pub.close()
""",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count = int(done.stdout)
    assert count > 100
    found = drained(path).of("v")
    same(found, {(str(n),): "x" * 1_000 for n in range(count)} | {(str(count),): "y"})


def test_a_commit_that_failed_is_tried_again_without_new_deltas(path: Path) -> None:
    """The disk was full when batches were to be kept: they leave as soon as there is room, though nobody records."""
    run_script(
        path,
        USE
        + """
pub = durable(flush_interval_ms=5, snapshot_interval_ms=5)
cell = pub.sum("v").labels()
cell.add(1.0)
pub.flush(60)
[size] = [file.stat().st_size for file in Path(spool).glob("*/spool.db-wal")]
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
cell.add(2.0)
try: pub.flush(0.3)
except Unavailable as error: assert "writing to the database" in str(error), error
else: raise AssertionError
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
pub.flush(60)
""",
    )
    same(drained(path).of("v"), {(): 3})


@pytest.mark.parametrize(
    ("away", "idle_ms"),
    [
        pytest.param(True, 3_600_000, id="of what is acknowledged then"),
        pytest.param(False, 500, id="of names that are silent"),
        pytest.param(False, 3_600_000, id="of names that need not be silent"),
    ],
)
def test_a_spool_that_was_full_has_room_again(tmp_path: Path, away: bool, idle_ms: int) -> None:
    """Neither free pages of the database nor names of series that are gone keep it full, though nothing is recorded then."""
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
        wait_until(lambda: not pub._running.spool.batch_count)  # type: ignore[union-attr]
        for i in range(50 if away else 3 * n):
            wait_until(lambda name=f"{'y' * 2_000}{i}": is_recorded(name))  # type: ignore[misc]


@pytest.mark.parametrize("room_again", [True, False])
def test_what_the_spool_could_not_forget(path: Path, room_again: bool) -> None:
    """The next time that there is room, it is forgotten. Until then tasks are not told that the producer has ended: whoever
    finds the slot sends the batch again, perhaps much later, and it must be known that it was counted.
    """
    done = run_script(
        path,
        USE
        + f"""
import logging
from tests.producer.support import FaultyLog
log = FaultyLog()
pub = durable()
told = []
logging.getLogger("pipeline.publisher.spooling").addFilter(told.append)
kept = pub._running.spool._spool._database.batches
cell = pub.sum("v").labels()
cell.add(1.0)
pub.flush(60)
wait_until(lambda: not kept)
def full(n, batch):
    [size] = [file.stat().st_size for file in Path(spool).glob("*/spool.db-wal")]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    return "kept"
log.fate = full
cell.add(2.0)
pub.flush(60)
wait_until(lambda: told)
if {room_again}:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.fate = lambda n, batch: "kept"
    cell.add(4.0)
    pub.flush(60)
pub.close()
print(len(log.closings))
""",
    )
    assert done.stdout.split() == ["1" if room_again else "0"]
    assert len(inspect(path.with_suffix(".spool"))) == (0 if room_again else 1)


def test_what_is_recorded_is_forced_to_a_disk_that_is_full(path: Path) -> None:
    """The segments are there already, so `durability="disk"` keeps its promise although no batch can be kept."""
    run_script(
        path,
        USE
        + """
synced, fsync = [], os.fsync
def listed(fd):
    synced.append(os.readlink(f"/proc/self/fd/{fd}"))
    fsync(fd)
os.fsync = listed
pub = publisher(log, durability="disk", spool_dir=spool, fsync_interval_ms=10)
cell = pub.sum("v").labels()
cell.add(1.0)
pub.flush(60)
wait_until(lambda: not pub._running.spool.batch_count)
[size] = [file.stat().st_size for file in Path(spool).glob("*/spool.db-wal")]
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
cell.add(2.0)
wait_until(lambda: "the spool" in pub._running.delivery.trouble)
synced.clear()
wait_until(lambda: any("/ring-001-" in name for name in synced))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
pub.close()
""",
    )
    same(drained(path).of("v"), {(): 3})


def test_a_batch_that_is_damaged_in_the_spool_holds_up_no_other(tmp_path: Path) -> None:
    """The flush says that it is lost, all others arrive, and the slot is left for whoever puts the damage aside."""
    log = FaultyLog(lambda n, batch: Unavailable("away"), partitions=1)
    pub = publisher(log, durability="process", spool_dir=str(tmp_path / "s"))
    view, running = pub.sum("v", labels=("a",)), pub._running
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
    """Each batch that the log has seen is in the journal when it is sent, and the sender does not send for nothing."""
    log = FaultyLog()
    seen: list[int] = []

    def fate(n: int, batch: Any) -> str:
        [slot] = inspect(tmp_path)
        seen.append(slot.batch_count)
        return "kept"

    log.fate = fate
    with publisher(log, durability="process", spool_dir=str(tmp_path)) as pub:
        cell = pub.sum("v").labels()
        for _ in range(20):
            cell.add(1.0)
            pub.flush(60)
    assert len(seen) == 20
    assert min(seen) >= 1
    assert all(log.attempts)
    same(fold(log.log).of("v"), {(): 20})


# Signals


def test_a_signal_handler_may_close(path: Path) -> None:
    """SIGTERM in the midst of recording, again and again: `close` in the handler waits for nobody who waits for it."""
    run_script(
        path,
        USE
        + """
import random
rng = random.Random(1)
for i in range(25):
    ready, started = os.pipe()
    child = os.fork()
    if not child:
        pub = durable(flush_interval_ms=1, snapshot_interval_ms=1, series_idle_ms=1)
        view = pub.sum("v", labels=("child",))
        cell, n = view.labels(str(i)), 0
        def stop(*_):
            started = time.monotonic()
            pub.close(30)
            assert time.monotonic() - started < 15
            done = publisher(log)
            done.sum("n", labels=("child",)).add(n, child=str(i))
            done.close()
            os._exit(0)
        signal.signal(signal.SIGTERM, stop)
        os.write(started, b"x")
        while True:
            cell.add(2**70)
            view.add(0.0, child=f"{i} {n}")
            n += 1
    os.read(ready, 1)
    os.close(ready), os.close(started)
    time.sleep(rng.random() ** 4 * 0.03)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == 0
""",
    )
    found = drained(path)
    total, counted = found.of("v"), found.of("n")
    assert len(counted) == 25
    for (child,), n in counted.items():
        assert 2**70 * n <= total.get((child,), 0) <= 2**70 * (n + 1)


def test_a_signal_handler_may_record(path: Path) -> None:
    """It comes in while its own thread writes the journal; the process is killed; each delta of both is there once."""
    done = run_script(
        path,
        USE
        + """
log.away.touch()
pub = durable(snapshot_interval_ms=5)
view = pub.sum("v", labels=("who",))
main, handler = view.labels("main"), view.labels("handler")
counts = [0, 0]
def handle(*_):
    handler.add(2**80)
    counts[1] += 1
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
end = time.monotonic() + 1
while time.monotonic() < end:
    main.add(2**70)
    counts[0] += 1
signal.setitimer(signal.ITIMER_REAL, 0)
print(*counts, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
""",
        check=False,
    )
    FileLog(path).away.unlink()
    main, handler = map(int, done.stdout.split())
    assert handler > 10
    same(drained(path).of("v"), {("main",): main * 2**70, ("handler",): handler * 2**80})


def test_a_batch_that_a_full_disk_drops_says_so(path: Path) -> None:
    """With `drop_newest`, what a batch returns is what was recorded, and each delta that was not is counted once."""
    done = run_script(
        path,
        USE
        + """
import pipeline.metrics as m
from tests.producer.support import Meter
meter = Meter()
pub = publisher(log, meter, durability="process", spool_dir=spool, on_full="drop_newest")
resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, resource.RLIM_INFINITY))
log.away.touch()
view = pub.sum("v", labels=("n",))
told = given = 0
for i in range(5):
    given += 300
    told += pub.record_batch(view, {"n": [f"{'x' * 3_000}{i}-{j}" for j in range(100)] * 3, "value": [1] * 300})
known = view.labels(f"{'x' * 3_000}0-0")
told, given = told + known.add_many([1, 1]), given + 2
dropped = meter.of(m.PUBLISHER_DROPPED, "buffer_full")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.away.unlink()
pub.close()
print(given, told, int(dropped))
""",
    )
    given, told, dropped = map(int, done.stdout.split())
    assert 0 < told < given
    assert dropped == given - told
    assert drained(path).total("v") == told
