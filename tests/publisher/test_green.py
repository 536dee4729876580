"""Green threads of gevent and eventlet record and flush like real ones, and nothing that waits stops the others."""

from pathlib import Path

import pytest

from tests.publisher.support import FileLog, fold, run_script

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
pub = publisher(log, flush_interval_ms=3_600_000, series_idle_ms=1)
view = pub.sum("v", labels=("who",))
cell = view.labels("all")
for task in [spawn(work, i) for i in range(20)]:
    wait(task)
cell.add(1_000)
"""
SIGNAL = """
def stop(*_):
    pub.close()
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
os.posix_spawnp("sh", ["sh", "-c", f"sleep 0.2; kill -TERM {os.getpid()}"], os.environ)
sleep(20)  # all wait, so that the hub runs the handler, which can't wait: another green thread closes
"""


@pytest.mark.parametrize(("end", "code"), [("pub.close()", 0), ("", 0), (SIGNAL, 3)])
@pytest.mark.parametrize("library", PATCHES)
def test_several_flush_at_once(tmp_path: Path, library: str, end: str, code: int) -> None:
    """Twenty green threads record and flush; the last deltas are sent by `close`, at exit, or by a handler in the hub."""
    path = tmp_path / "log"
    done = run_script(path, MANY + end, check=False, first=PATCHES[library])
    assert done.returncode == code, done.stderr
    assert code or "Traceback" not in done.stderr, done.stderr
    found = fold(FileLog(path).read())
    assert found.of("v") == {("all",): 7_000, **{(str(n),): 600 for n in range(10)}}
    assert (found.duplicates, found.dead) == (0, [])
