"""Processes end and fork: what was recorded is drained, once, by the process that recorded it."""

import signal
import time
from pathlib import Path

import pytest

from tests.producer.modes import MODES, SPOOL, send_spools, settings_of
from tests.producer.support import PRELUDE, FileLog, Views, batches, fold, run_script, start_script

USE = """
pub = publisher(log, flush_interval_ms=3_600_000)
view = pub.sum("v", labels=("who",))
cell = view.labels("main")
cell.add(1)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def views(path: Path) -> Views:
    found = fold(FileLog(path).read())
    assert not found.dead
    assert found.duplicates == 0
    return found


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise RuntimeError('unhandled')", 1),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(20)", -signal.SIGINT),
        ("signal.raise_signal(signal.SIGINT)", -signal.SIGINT),
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)", 5),
        ("with pub: raise RuntimeError('of the app')", 1),
        ("threading.Thread(target=sys.exit).start()", 0),
        ("threading.Thread(target=lambda: 1 / 0).start()", 0),
        ("import atexit; atexit.register(lambda: cell.add(0))", 0),
        ("pub.close(); pub.close()", 0),
        ("del pub, view, cell", 0),
    ],
)
def test_the_end_of_the_interpreter_drains(path: Path, ending: str, code: int) -> None:
    """However a process ends on its own, and by Ctrl-C, what was recorded is sent; its exit code is its own."""
    done = run_script(path, USE + ending, check=False)
    assert done.returncode == code, done.stderr
    assert "at exit" not in done.stderr
    assert views(path).of("v") == {("main",): 1}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("os._exit(7)", 7),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)", -signal.SIGTERM),
        ("os.kill(os.getpid(), signal.SIGKILL); time.sleep(20)", -signal.SIGKILL),
    ],
)
def test_an_end_that_runs_no_python_keeps_what_the_mode_promises(path: Path, mode: str, ending: str, code: int) -> None:
    """`os._exit`, SIGTERM without a handler, kill -9: what was flushed is there; the rest is lost, unless a spool has it."""
    settings = settings_of(mode, path.parent)
    opening = f"pub = publisher(log, flush_interval_ms=3_600_000, **{settings!r})\n"
    view = 'cell = pub.sum("v", labels=("who",)).labels("main")\n'
    done = run_script(path, f"{opening}{view}cell.add(1)\npub.flush()\ncell.add(10)\n{ending}", check=False)
    assert done.returncode == code, done.stderr
    assert views(path).of("v") == {("main",): 1}
    if SPOOL in MODES[mode].values():
        send_spools(path.parent / "spool", FileLog(path))
    found = fold(FileLog(path).read())
    assert found.of("v") == {("main",): 11 if SPOOL in MODES[mode].values() else 1}


def test_threads_that_outlive_the_main_one_are_drained(path: Path) -> None:
    """The interpreter waits for them before it ends; a daemon that still records is no hindrance."""
    run_script(
        path,
        USE
        + """
def late():
    time.sleep(0.2)
    for _ in range(1000): view.add(1, who="late")
def daemon():
    try:
        while True: cell.add(0)
    except Exception as error:
        assert "closed" in str(error)
threading.Thread(target=late).start()
threading.Thread(target=daemon, daemon=True).start()
""",
    )
    assert views(path).of("v") == {("main",): 1, ("late",): 1_000}


def test_ctrl_c_at_any_moment_loses_nothing(path: Path) -> None:
    """SIGINT in the midst of recording: every delta whose call returned is sent, and no more than one beyond them."""
    file = path.with_suffix(".py")
    # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
    listening = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    ending = "n = 1\ntry:\n    print('go', flush=True)\n    while True: cell.add(1); n += 1\nfinally: print(n)\n"
    file.write_text(PRELUDE + USE + listening + ending)
    for _ in range(6):
        path.unlink(missing_ok=True)
        process = start_script(file, path)
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        time.sleep(0.03)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGINT, err
        count = int(out)
        assert count > 100
        assert count <= views(path).of("v")["main",] <= count + 1


def test_an_exit_without_a_log_takes_close_timeout_ms(path: Path) -> None:
    """It gives up in time, logs what is lost, and leaves the exit code alone."""
    FileLog(path).away.touch()
    started = time.monotonic()
    done = run_script(path, USE.replace("flush_interval_ms", "close_timeout_ms=300, flush_interval_ms"), check=False)
    assert time.monotonic() - started < 15
    assert done.returncode == 0
    assert "at exit: not acknowledged within 0.3 s" in done.stderr


@pytest.mark.parametrize("then", ["sys.exit(0)", "os._exit(0)"])
def test_a_signal_handler_may_close(path: Path, then: str) -> None:
    """SIGTERM in the midst of recording, again and again: `close` in the handler drains, whatever it interrupted."""
    run_script(
        path,
        """
import random
rng = random.Random(1)
for i in range(30):
    ready, started = os.pipe()
    child = os.fork()
    if not child:
        pub = publisher(log, flush_interval_ms=1, series_idle_ms=1)
        view = pub.sum("v", labels=("child",))
        cells = [view.labels(str(i)) for _ in range(3)]
        n = 0
        def stop(*_):
            pub.close(20)
            done = publisher(log)
            done.sum("n", labels=("child",)).add(n, child=str(i))
            done.close()
            THEN
        signal.signal(signal.SIGTERM, stop)
        os.write(started, b"x")
        while True:
            cells[n % 3].add(1)
            n += 1
    os.read(ready, 1)
    os.close(ready), os.close(started)
    time.sleep(rng.random() ** 4 * 0.03)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == 0
""".replace("THEN", then),
    )
    found = views(path)
    total, counted = found.of("v"), found.of("n")
    assert len(counted) == 30
    assert max(counted.values()) > 0
    assert all(n <= total.get(child, 0) <= n + 1 for child, n in counted.items())


# Forks


def test_a_forked_child_starts_clean(path: Path) -> None:
    """The parent's deltas are the parent's; the child records with inherited and new handles, as another producer."""
    run_script(
        path,
        USE
        + """
unused = view.labels("unused")
for _ in range(600): cell.add(1)       # some merged, some not
child = os.fork()
if not child:
    assert threading.active_count() == 1
    assert pub.stats() == dict.fromkeys(pub.stats(), 0)
    assert pub.flush() == pub.flush()
    assert threading.active_count() == 1
    cell.add(1000); unused.add(2000); view.add(3000, who="child"); pub.sum("w").add(4)
    pub.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
cell.add(1); unused.add(1)
""",
    )
    found = views(path)
    assert found.of("v") == {("main",): 1 + 600 + 1000 + 1, ("unused",): 2001, ("child",): 3000}
    assert found.of("w") == {(): 4}
    assert len({batch.producer_id for batch in batches(FileLog(path).read())}) == 2


def test_batches_on_their_way_are_not_sent_by_the_child(path: Path) -> None:
    """What the parent had sealed when it forked is sent by the parent alone."""
    FileLog(path).away.touch()
    run_script(
        path,
        """
pub = publisher(log)
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
    )
    assert views(path).of("v") == {("child",): 100, **{(str(i),): 1 for i in range(50)}}


def test_a_child_that_records_nothing_starts_no_thread_and_leaves_the_writer_alone(path: Path) -> None:
    """Its end closes nothing that the parent uses, and sends nothing."""
    run_script(
        path,
        USE
        + """
import atexit
log.close = lambda: os.write(2, b"closed by %d\\n" % os.getpid())
child = os.fork()
if not child:
    atexit.register(lambda: os._exit(threading.active_count() - 1))  # runs first
    atexit._run_exitfuncs()
    os._exit(99)
assert os.waitpid(child, 0)[1] == 0
child = os.fork()
if not child:
    pub.close()
    assert threading.active_count() == 1
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
sys.stderr.write(f"parent is {os.getpid()}\\n")
""",
    )
    assert views(path).of("v") == {("main",): 1}


def test_a_forked_child_that_ends_on_its_own_drains(path: Path) -> None:
    """`sys.exit`, or the end of the program, in a child of `os.fork`."""
    done = run_script(
        path,
        USE
        + """
log.close = lambda: os.write(1, b"closed by %d\\n" % (os.getpid() == parent))  # one write, so that lines stay whole
parent = os.getpid()
for i in range(3):
    if not os.fork():
        cell.add(10)
        view.add(1, who=str(i))
        sys.exit(0)
for i in range(3): assert os.wait()[1] == 0
""",
    )
    assert views(path).of("v") == {("main",): 31, ("0",): 1, ("1",): 1, ("2",): 1}
    assert sorted(done.stdout.splitlines()) == ["closed by 0"] * 3 + ["closed by 1"]


def test_forks_while_threads_record_and_flush(path: Path) -> None:
    """Any state of eight threads can be caught by a fork: parent and children are exact, and no lock stays held."""
    done = run_script(
        path,
        """
pub = publisher(log, flush_interval_ms=1, series_idle_ms=1)
other = publisher(log, flush_interval_ms=1)
view = pub.sum("v", labels=("who",))
side = other.sum("side")
cells = [view.labels(str(i)) for i in range(4)]
stop = threading.Event()
counts = [0] * 8
def work(i):
    while not stop.is_set():
        for _ in range(50):
            cells[counts[i] % 4].add(1)
            view.add(1, who=f"t{i % 3}")
            side.add(1)
            counts[i] += 1
        if i % 2: pub.flush(20)
        else: time.sleep(0.002)
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
with hurried_threads():
    for thread in threads: thread.start()
    for n in range(40):
        time.sleep(0.003)
        child = os.fork()
        if not child:
            signal.alarm(30)
            if n % 4:
                for cell in cells: cell.add(1_000_000)
                view.add(1_000_000, who="t0")
                side.add(1_000_000)
                pub.flush(20)
            if n % 4 == 1: pub.close()
            if n % 4 == 2 and not os.fork():
                cells[0].add(1_000_000_000)
                pub.close()
                os._exit(0)
            other.close()
            if n % 4 == 2: assert os.wait()[1] == 0
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, n
    stop.set()
    for thread in threads: thread.join(30)
pub.close(); other.close()
print(sum(counts))
""",
    )
    count = int(done.stdout)
    found = views(path)
    assert found.total("v") == 2 * count + 30 * 5 * 1_000_000 + 10 * 1_000_000_000
    assert found.of("side")[()] == count + 30 * 1_000_000


def test_two_threads_may_fork_at_once(path: Path) -> None:
    """Forking takes no lock that another fork could wait for."""
    run_script(
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


# multiprocessing


CHILDREN = """
import multiprocessing as mp

def own(path, who):
    pub = publisher(FileLog(path), flush_interval_ms=3_600_000)
    pub.sum("v", labels=("who",)).add(1, who=who)

def failing(path, who):
    own(path, who)
    raise SystemExit(4)

def inherited(who):
    view.add(1, who=who)

def idle(who):
    assert threading.active_count() == 1

def in_pool(who):
    global pooled
    try: pooled
    except NameError: pooled = publisher(FileLog(sys.argv[1]), flush_interval_ms=3_600_000)
    pooled.sum("v", labels=("who",)).add(1, who=who)
    return os.getpid()
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing_drain(path: Path, method: str) -> None:
    """They end without `atexit`, however they were started; also when they fail."""
    run_script(
        path,
        CHILDREN
        + f"""
if __name__ == "__main__":
    context = mp.get_context("{method}")
    children = [context.Process(target=own, args=(sys.argv[1], str(i))) for i in range(2)]
    children.append(context.Process(target=failing, args=(sys.argv[1], "failing")))
    for child in children: child.start()
    for child in children: child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 4]
""",
    )
    assert views(path).of("v") == {("0",): 1, ("1",): 1, ("failing",): 1}


def test_forked_children_of_multiprocessing_drain_what_they_inherit(path: Path) -> None:
    """A publisher of the parent, used in the child, is drained at the child's end; one not used starts nothing."""
    run_script(
        path,
        CHILDREN
        + """
if __name__ == "__main__":
    context = mp.get_context("fork")
    pub = publisher(log, flush_interval_ms=3_600_000)
    view = pub.sum("v", labels=("who",))
    view.add(1, who="parent")
    children = [context.Process(target=inherited, args=(str(i),)) for i in range(3)]
    children += [context.Process(target=idle, args=(str(i),)) for i in range(2)]
    for child in children: child.start()
    for child in children: child.join(30)
    assert [child.exitcode for child in children] == [0] * 5
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        pids = set(pool.map(in_pool, ["pool"] * 20))
    with context.Pool(2) as pool:
        pool.map(in_pool, ["pool"] * 20)
        pool.close()
        pool.join()
""",
    )
    assert views(path).of("v") == {("parent",): 1, ("0",): 1, ("1",): 1, ("2",): 1, ("pool",): 40}
