"""Processes end and fork: recorded deltas are drained, once, by the process that recorded them."""

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.publisher.modes import MODES, SPOOL, all_sent, settings_of
from tests.publisher.support import FileLog, Views, batches, fold, run_script

USE = """
pub = publisher(log, flush_interval_ms=3_600_000, **settings)
view = pub.sum("v", labels=("who",))
cell = view.labels("main")
cell.add(1.0)
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL); time.sleep(20)"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def run(
    path: Path, script: str, mode: str = "memory", *, check: bool = True, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Run a script that finds `settings`, with those of the mode."""
    return run_script(path, f"settings = {settings_of(mode, path.parent) | settings!r}\n{script}", check=check)


def views(path: Path) -> Views:
    """Return the totals of everything that any process has sent."""
    found = all_sent(path)
    assert not found.duplicates or (path.parent / "spool").exists()  # what was acknowledged and not forgotten is sent again
    return found


@pytest.mark.parametrize(("mode", "away"), [*[(mode, False) for mode in MODES], ("process", True)])
@pytest.mark.parametrize(
    ("ending", "code", "drains"),
    [
        ("import atexit; atexit.register(last)", 0, True),
        ("last(); raise RuntimeError('unhandled')", 1, True),
        ("last(); os.kill(os.getpid(), signal.SIGINT); time.sleep(20)", -signal.SIGINT, True),
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); last(); os.kill(os.getpid(), 15); time.sleep(20)", 5, True),
        ("threading.Thread(target=lambda: (threading.main_thread().join(), last(), 1 / 0)).start(); del pub, view", 0, True),
        ("last(); threading.Thread(target=lambda: [cell.add(0) for _ in iter(int, 1)], daemon=True).start()", 0, True),
        ("last(); os._exit(7)", 7, False),
        ("last(); os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)", -signal.SIGTERM, False),
        (f"last(); {KILL}", -signal.SIGKILL, False),
    ],
)
def test_however_a_process_ends(path: Path, mode: str, ending: str, code: int, *, drains: bool, away: bool) -> None:
    """Deltas are sent where Python runs to its end, and the exit code stays that of the program.

    After `os._exit`, SIGTERM without a handler, and kill -9 only flushed deltas are there, unless a spool has the rest.
    """
    go_away = "log.away.touch()" if away else ""
    script = f"{USE}pub.flush(20)\n{go_away}\nlast = lambda: (cell.add(2.5), cell.add(4))\n{ending}"
    done = run(path, script, mode, check=False, close_timeout_ms=300 if away else 20_000)
    assert done.returncode == code, done.stderr
    if "daemon" not in ending:  # which can be caught in the midst of recording
        assert ("is left in" in done.stderr) == (away and drains)
        assert "at exit" not in done.stderr or away
    FileLog(path).away.unlink(missing_ok=True)
    assert fold(FileLog(path).read()).of("v") == {("main",): 7.5 if drains and not away else 1}
    assert views(path).of("v") == {("main",): 7.5 if drains or SPOOL in MODES[mode].values() else 1}


def test_an_exit_without_a_log_takes_close_timeout_ms(path: Path) -> None:
    """The exit gives up in time, logs the losses, and leaves the exit code alone."""
    FileLog(path).away.touch()
    assert "at exit: not acknowledged within 0.3 s" in run(path, USE, close_timeout_ms=300).stderr


@pytest.mark.parametrize(("mode", "then"), [("memory", "sys.exit(0)"), ("process", "os._exit(0)")])
def test_a_signal_handler_may_close(path: Path, mode: str, then: str) -> None:
    """A handler of SIGTERM in the midst of recording, again and again, drains by `close`, whatever it interrupted."""
    run(
        path,
        f"""
for i in range(15):
    ready, started = os.pipe()
    child = os.fork()
    if not child:
        pub = publisher(log, flush_interval_ms=1, series_idle_ms=1, snapshot_interval_ms=1, **settings)
        view = pub.sum("v", labels=("child",))
        cell, n = view.labels(str(i)), 0
        def stop(*_):
            started = time.monotonic()
            pub.close(30)
            assert time.monotonic() - started < 50
            with publisher(log) as done: done.sum("n", labels=("child",)).add(n, child=str(i))
            {then}
        signal.signal(signal.SIGTERM, stop)
        os.write(started, b"x")
        while True:
            cell.add(2**70)
            view.add(0.0, child=f"{{i}} {{n}}")
            n += 1
    os.read(ready, 1)
    os.close(ready), os.close(started)
    time.sleep((i / 15) ** 4 * 0.03)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == 0
""",
        mode,
    )
    found = views(path)
    total, counted = found.of("v"), found.of("n")
    assert len(counted) == 15
    assert max(counted.values()) > 0
    assert all(n * 2**70 <= total.get(child, 0) <= (n + 1) * 2**70 for child, n in counted.items())


# Forks


@pytest.mark.parametrize(
    ("mode", "end"),
    [
        *[("memory", end) for end in ("pub.flush(20); os._exit(0)", "pub.close(20); os._exit(0)", "sys.exit(0)")],
        *[("process", end) for end in ("os._exit(0)", KILL, "pub.close(20); os._exit(0)")],
    ],
)
def test_a_forked_child_starts_clean(path: Path, mode: str, end: str) -> None:
    """The parent's deltas are the parent's; the child records with inherited and new handles, as another producer.

    Unsent deltas of a child are in a slot of its own, if there is a spool.
    """
    done = run(
        path,
        USE
        + f"""
unused = view.labels("unused")
for _ in range(600): cell.add(1)       # some merged, some not
child = os.fork()
if not child:
    assert threading.active_count() == 1
    assert pub.stats() == dict.fromkeys(pub.stats(), 0)
    assert pub.flush() == pub.flush()
    assert threading.active_count() == 1
    for who in (cell, unused, view.labels("child")):
        who.add(1000.0)
        who.add(1000)
    pub.sum("w").add(4)
    {end}
started = time.monotonic()
assert os.waitpid(child, 0)[1] in (0, signal.SIGKILL)
assert time.monotonic() - started < 50, "it has waited for what never comes"
cell.add(1); unused.add(1)
{end}
""",
        mode,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    found = views(path)
    assert found.of("v") == {("main",): 2602, ("unused",): 2001, ("child",): 2000}
    assert found.of("w") == {(): 4}
    assert len({batch.producer_id for batch in batches(FileLog(path).read())}) == 2


@pytest.mark.parametrize("mode", MODES)
def test_batches_on_their_way_are_not_sent_by_the_child(path: Path, mode: str) -> None:
    """Batches that the parent had sealed when it forked are sent by the parent alone."""
    FileLog(path).away.touch()
    run(
        path,
        """
pub = publisher(log, **settings)
view = pub.sum("v", labels=("who",))
for i in range(50): view.add(1, who=str(i))
wait_until(lambda: pub.stats()["waiting"])
child = os.fork()
if not child:
    log.away.unlink()
    view.add(100, who="child")
    pub.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
""",
        mode,
    )
    assert views(path).of("v") == {("child",): 100, **{(str(i),): 1 for i in range(50)}}


def test_children_that_end_on_their_own_drain_and_let_go(path: Path) -> None:
    """Children that end by `sys.exit`, or with the program, drain; one that records nothing starts no thread."""
    done = run(
        path,
        USE
        + """
import atexit
log.close = lambda: os.write(1, b"closed by %d\\n" % (os.getpid() == parent))  # one write, so that lines stay whole
parent = os.getpid()
for i in range(5):
    if not os.fork():
        if i == 3:
            atexit.register(lambda: os._exit(threading.active_count() - 1))  # runs first
            atexit._run_exitfuncs()
            os._exit(99)
        if i == 4:
            pub.close()
            os._exit(threading.active_count() - 1)
        cell.add(10)
        view.add(1, who=str(i))
        sys.exit(0)
for i in range(5): assert os.wait()[1] == 0
""",
    )
    assert views(path).of("v") == {("main",): 31, ("0",): 1, ("1",): 1, ("2",): 1}
    assert sorted(done.stdout.splitlines())[-4:] == ["closed by 0"] * 3 + ["closed by 1"]


def test_two_threads_may_fork_at_once(path: Path) -> None:
    """Forking takes no lock that another fork could wait for, and each releases what it holds itself."""
    run(
        path,
        USE
        + """
pubs = [publisher(log) for _ in range(5)]
for i, p in enumerate(pubs): p.sum("p", labels=("i",)).add(1, i=str(i))
def work(i):
    for n in range(20):
        child = os.fork()
        if not child:
            signal.alarm(30)
            cell.add(1)
            pub.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
in_threads(4, work)
""",
    )
    assert views(path).of("v") == {("main",): 81}
    assert views(path).total("p") == 5


def test_a_signal_handler_may_fork(path: Path) -> None:
    """The handler can interrupt recording; the child goes on from there with a table of its own."""
    done = run(
        path,
        """
pub = publisher(log)
view = pub.sum("v", labels=("who",))
main, big = view.labels("main"), pub.sum("big").labels()
forks, in_child = 0, False

def fork(*_):
    global forks, in_child
    if in_child or forks == 12:
        return
    if os.fork() == 0:
        in_child = True
        view.labels("child").add(1)
    else:
        forks += 1
        signal.setitimer(signal.ITIMER_REAL, 0.003)

signal.signal(signal.SIGALRM, fork)
signal.setitimer(signal.ITIMER_REAL, 0.003)
count = 0
while not in_child and forks < 12:
    main.add(1)
    big.add(2**70)  # merged by a call
    count += 1
if not in_child:
    for _ in range(forks):
        assert os.wait()[1] == 0
pub.close()
if in_child:
    os._exit(0)
print(count)
""",
    )
    count = int(done.stdout)
    found = views(path)
    assert found.of("v")["child",] == 12
    assert count <= found.of("v")["main",] <= count + 12  # a child repeats what it was in the midst of
    assert count <= found.of("big")[()] / 2**70 <= count + 12


@pytest.mark.parametrize("mode", MODES)
def test_a_fork_between_draining_and_sealing(path: Path, mode: str) -> None:
    """Deltas that are in no batch yet are sent by the parent, once, and not by the child."""
    run(
        path,
        """
pub = publisher(log, **settings)
view = pub.sum("v", labels=("who",))
main = view.labels("main")
main.add(1)
pub.flush()
sender = pub._runtime.sender
seal, held, go_on = sender.seal_drafts, threading.Event(), threading.Event()

def stalled(drafts, now_ms):
    drafts = [*drafts]
    if drafts:
        held.set()
        assert go_on.wait(20)
    return seal(drafts, now_ms)

sender.seal_drafts = stalled
main.add(10)
assert held.wait(20)
main.add(100)  # waits in the table
child = os.fork()
if not child:
    view.labels("child").add(1_000)
    main.add(10_000)
    pub.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
go_on.set()
pub.close()
""",
        mode,
    )
    assert views(path).of("v") == {("main",): 10_111, ("child",): 1_000}


# multiprocessing


CHILDREN = """
import multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor

def own(who):
    global pooled
    try: pooled
    except NameError: pooled = publisher(FileLog(sys.argv[1]), flush_interval_ms=3_600_000)
    pooled.sum("v", labels=("who",)).add(1, who=who)

def failing(who):
    own(who)
    raise SystemExit(4)

def inherited(who):
    view.add(1, who=who)

def idle(who):
    assert threading.active_count() == 1

if __name__ == "__main__":
    context, works = mp.get_context(METHOD), [own, own, failing]
    if METHOD == "fork":
        pub = publisher(log, flush_interval_ms=3_600_000)
        view = pub.sum("v", labels=("who",))
        view.add(1, who="parent")
        works += [inherited] * 3 + [idle]
    children = [context.Process(target=work, args=(str(i),)) for i, work in enumerate(works)]
    for child in children: child.start()
    for child in children: child.join(30)
    print(*[child.exitcode for child in children])
    if METHOD == "fork":
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            [*pool.map(own, ["pool"] * 20)]
        with context.Pool(2) as pool:
            pool.map(own, ["pool"] * 20)
            pool.close()
            pool.join()
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing_drain(path: Path, method: str) -> None:
    """Children end without `atexit`, however they were started; they drain also when they fail, or inherit handles.

    A child that uses no publisher starts no thread.
    """
    done = run(path, CHILDREN.replace("METHOD", repr(method)))
    forked = method == "fork"
    assert done.stdout == ("0 0 4 0 0 0 0\n" if forked else "0 0 4\n")
    more = {("parent",): 1, ("3",): 1, ("4",): 1, ("5",): 1, ("pool",): 40} if forked else {}
    assert views(path).of("v") == {("0",): 1, ("1",): 1, ("2",): 1, **more}
