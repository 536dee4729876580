"""uWSGI forks in C after it has loaded the app: every worker answers, and what is recorded before and behind that counts."""

from __future__ import annotations

import threading
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.producer.modes import send_spools
from tests.producer.serving import UWSGI, Server
from tests.producer.support import FileLog, fold
from tests.support import wait_until

pytestmark = needed = pytest.mark.skipif(not Path(UWSGI[0]).exists(), reason="uWSGI is not installed")
GRACEFUL = ["--hook-master-start", "unix_signal:15 gracefully_kill_them_all"]


def serve(folder: Path, port: int, *options: str, **more: str) -> Server:
    address = f"127.0.0.1:{port}"
    return Server([*UWSGI, "--http-socket", address, "--die-on-term", *options], folder, address, **more)


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ("", ""),
        ("--py-call-osafterfork", ""),
        ("--py-call-uwsgi-fork-hooks --threads 2", ""),
        ("--max-requests 15 --min-worker-lifetime 0", ""),
        ("--skip-atexit-teardown", "import uwsgidecorators"),
    ],
)
def test_what_it_forks_counts_all(tmp_path: Path, free_port: int, options: str, first: str) -> None:
    """What waits in the master is sent by one of its children, and what a worker has when it is stopped is sent too."""
    with serve(tmp_path, free_port, "--master", *GRACEFUL, *options.split(), first=first) as server:
        count = server.ask(3 if "--max-requests" in options else 2)
        found, producers = server.stop()
    assert "threads: MainThread\n" in server.output(), "one that has the interpreter's lock at the fork stops a worker"
    assert found.of("v") == {("/",): count, ("all",): count}
    assert found.of("boot") == {(): 11}
    assert (found.duplicates, found.dead) == (0, [])
    assert producers >= 2


def test_apps_that_workers_load(tmp_path: Path, free_port: int) -> None:
    """With --lazy-apps nothing is there before the fork: each worker has loaded the app, and counts that."""
    with serve(tmp_path, free_port, "--master", *GRACEFUL, "--lazy-apps") as server:
        count = server.ask(2)
        found, producers = server.stop()
    assert found.of("v") == {("/",): count, ("all",): count}
    assert (found.of("boot"), producers) == ({(): 22}, 2)


def test_green_workers(tmp_path: Path, free_port: int) -> None:
    """Its gevent mode runs no exit code at all, so that what was not flushed, or had no time to be sent, is lost."""
    with serve(tmp_path, free_port, "--master", *GRACEFUL, "--gevent", "10", "--gevent-monkey-patch") as server:
        count, flushed = server.ask(2), set[str]()
        while len(flushed) < 2:
            flushed.add(server.get("/flush"))
            count += 1
        found, _ = server.stop()
    assert found.of("v") == {("/",): count, ("all",): count}
    assert found.of("boot") == {(): 11}


def test_a_worker_that_is_nobodys_child(tmp_path: Path, free_port: int) -> None:
    """Without a master the process that has loaded the app answers, too: its threads begin when uWSGI says so."""
    with serve(tmp_path, free_port, "--processes", "1") as server:
        count = server.ask(1)
        server.get("/flush")
        found, producers = server.stop()
    assert found.of("v") == {("/",): count + 1, ("all",): count + 1}
    assert (found.of("boot"), producers) == ({(): 11}, 1)


@pytest.mark.parametrize(("graceful", "mode"), [(True, "memory"), (False, "memory"), (False, "process")])
def test_a_stop_in_the_midst_of_a_request(tmp_path: Path, free_port: int, *, graceful: bool, mode: str) -> None:
    """uWSGI ends a busy worker without a word to Python: what it has not sent is lost, if it was not told to wait.

    With a spool it is not.
    """
    with serve(tmp_path, free_port, "--master", *(GRACEFUL if graceful else []), mode=mode) as server:
        count = server.ask(2)

        def slow() -> None:
            with suppress(OSError, HTTPException):
                server.get("/slow")

        asking = threading.Thread(target=slow)
        asking.start()
        wait_until(lambda: "\nslow\n" in server.output(), "a worker is busy", 10.0, seen=server.output)
        found, _ = server.stop()
        asking.join()
    boot, counted = found.of("boot")[()], found.of("v")[("all",)]
    if graceful:
        assert (boot, counted) == (11, count + 1)
    else:  # all of one worker's, which may be the one that had what waited in the master
        assert boot in (1, 11)
        assert counted < count + 1
    assert found.of("v") == {("/",): counted, ("all",): counted}
    if mode == "process":
        send_spools(tmp_path / "spool", FileLog(server.log))
        found = fold(FileLog(server.log).read())
        assert found.of("v") == {("/",): count + 1, ("all",): count + 1}
        assert (found.of("boot"), found.duplicates) == ({(): 11}, 0)
