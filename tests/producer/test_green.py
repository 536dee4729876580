"""Green threads of gevent and eventlet record and flush like real ones, and nothing that waits stops the others."""

from pathlib import Path

import pytest

from tests.producer.support import FileLog, fold, run_script

PATCHES = {
    "gevent": "from gevent import monkey; monkey.patch_all()\nfrom gevent import spawn, sleep\nwait = lambda t: t.get()\n",
    "eventlet": "import eventlet; eventlet.monkey_patch()\nfrom eventlet import spawn, sleep\nwait = lambda t: t.wait()\n",
}
MANY = """
def work(i):
    for n in range(300):
        view.add(1, who=str(n % 10))
        cell.add(1)
        if n % 100 == i:
            pub.flush(30)
        if n % 7 == 0:
            sleep(0)
pub = publisher(log, flush_interval_ms=1, series_idle_ms=1)
view = pub.sum("v", labels=("who",))
cell = view.labels("all")
for task in [spawn(work, i) for i in range(20)]:
    wait(task)
END
"""
SIGNAL = """
pub = publisher(log, flush_interval_ms=3_600_000)
cell = pub.sum("v", labels=("who",)).labels("all")
cell.add(1)
def stop(*_):
    pub.close()
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
os.posix_spawnp("sh", ["sh", "-c", f"sleep 0.2; kill -TERM {os.getpid()}"], os.environ)
sleep(20)  # all wait, so that the hub runs the handler
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.mark.parametrize("end", ["pub.close()", "cell.add(1_000)"])
@pytest.mark.parametrize("library", PATCHES)
def test_several_flush_at_once(path: Path, library: str, end: str) -> None:
    """Twenty green threads record and flush; what comes last is sent by `close`, or at exit."""
    run_script(path, MANY.replace("END", end), first=PATCHES[library])
    found = fold(FileLog(path).read())
    more = 0 if "close" in end else 1_000
    assert found.of("v") == {("all",): 6_000 + more, **{(str(n),): 600 for n in range(10)}}
    assert (found.duplicates, found.dead) == (0, [])


@pytest.mark.parametrize("library", PATCHES)
def test_a_signal_handler_that_closes_in_the_hub(path: Path, library: str) -> None:
    """The hub can't wait: another green thread closes, before the process ends."""
    done = run_script(path, SIGNAL, check=False, first=PATCHES[library])
    assert done.returncode == 3, done.stderr
    assert fold(FileLog(path).read()).of("v") == {("all",): 1}
