"""uWSGI forks in C after it has loaded the app: every worker answers, and deltas of before and after the fork count."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.publisher.modes import all_sent
from tests.publisher.serving import UWSGI, Server
from tests.support import wait_until

pytestmark = needed = pytest.mark.skipif(not Path(UWSGI[0]).exists(), reason="uWSGI is not installed")
GRACEFUL = ["--hook-master-start", "unix_signal:15 gracefully_kill_them_all"]


def serve(folder: Path, port: int, *options: str, **more: str) -> Server:
    address = f"127.0.0.1:{port}"
    return Server([*UWSGI, "--http-socket", address, "--die-on-term", *options], folder, address, **more)


@pytest.mark.parametrize(
    ("options", "workers", "boot"),
    [
        ("", 2, 11),
        pytest.param("--py-call-osafterfork", 2, 11, marks=pytest.mark.long),
        ("--py-call-uwsgi-fork-hooks --threads 2", 2, 11),
        ("--max-requests 15 --min-worker-lifetime 0", 3, 11),
        pytest.param("--skip-atexit-teardown", 2, 11, marks=pytest.mark.long),
        ("--lazy-apps", 2, 22),
        ("--gevent 10 --gevent-monkey-patch", 2, 11),
        pytest.param("--processes 1", 1, 11, marks=pytest.mark.long),
    ],
)
def test_what_it_forks_counts_all(tmp_path: Path, free_port: int, options: str, workers: int, boot: int) -> None:
    """Deltas that wait in the master are sent by one of its children, and those of a worker when it is stopped.

    With --lazy-apps each worker has loaded the app, and counts that. The gevent mode runs no exit code at all, and a single
    process without a master starts its threads when uWSGI says so, without Python: unflushed deltas are lost there.
    """
    first = "import uwsgidecorators" if "--skip" in options else ""
    master = ["--master", *GRACEFUL] if workers > 1 else []
    with serve(tmp_path, free_port, *master, *options.split(), first=first) as server:
        count, flushed = server.ask(workers), set[str]()
        while ("gevent" in options or workers == 1) and len(flushed) < workers:
            flushed.add(server.get("/flush"))
            count += 1
        found, producers = server.stop()
    if "lazy" not in options and "gevent" not in options:
        assert "threads: MainThread\n" in server.output(), "one that has the interpreter's lock at the fork stops a worker"
    assert found.of("v") == {("/",): count, ("all",): count}
    assert found.of("boot") == {(): boot}
    assert (found.duplicates, found.dead) == (0, [])
    assert producers >= 2 if workers > 1 else producers == 1


@pytest.mark.parametrize(("graceful", "mode"), [(True, "memory"), (False, "memory"), (False, "process")])
def test_a_stop_in_the_midst_of_a_request(tmp_path: Path, free_port: int, *, graceful: bool, mode: str) -> None:
    """uWSGI ends a busy worker without a word to Python: unsent deltas are lost, unless it was told to wait.

    With a spool they are not.
    """
    with serve(tmp_path, free_port, "--master", *(GRACEFUL if graceful else []), mode=mode) as server:
        count = server.ask(2)
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(server.get, "/slow")
            wait_until(lambda: "\nslow\n" in server.output(), "a worker is busy", 10.0, seen=server.output)
            found, _ = server.stop()
            assert not graceful or asked.result()
    boot, counted = found.of("boot")[()], found.of("v")[("all",)]
    # Else all of one worker's is lost, which may be the one that had what waited in the master.
    assert (boot, counted) == (11, count + 1) if graceful else boot in (1, 11) and counted < count + 1
    assert found.of("v") == {("/",): counted, ("all",): counted}
    if mode == "process":
        found = all_sent(server.log)
        assert found.of("v") == {("/",): count + 1, ("all",): count + 1}
        assert (found.of("boot"), found.duplicates) == ({(): 11}, 0)
