"""Programs that fork or interleave as servers do: asyncio, gunicorn and Celery, the real ones, lose and double nothing."""

from __future__ import annotations

import asyncio
import signal
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import Reader
from tests.producer.modes import MODES, settings_of
from tests.producer.support import FileLog, batches, fold, memory_log, publisher
from tests.support import Program, UpProcess, everything, wait_until

GUNICORN = [sys.executable, "-m", "gunicorn"]
CELERY = [sys.executable, "-m", "celery"]
NEVER_MS = 3_600_000
"""A flush interval in which no test ends: what is found was drained by the end of a process."""


@pytest.mark.parametrize("mode", MODES)
def test_tasks_of_one_event_loop_are_exact(tmp_path: Path, mode: str) -> None:
    """A thousand tasks in one thread record between their awaits, and flush without holding the loop up."""
    log = memory_log()
    turns = 20

    async def main() -> int:
        beats = 0
        done = asyncio.Event()

        async def beat() -> None:
            nonlocal beats
            while not done.is_set():
                beats += 1
                await asyncio.sleep(0)

        async def work(i: int) -> None:
            cell = view.labels(str(i % 50))
            for turn in range(turns):
                cell.add(1)
                view.add(1, who="all")
                await asyncio.sleep(0)
                if i % 100 == turn:
                    await asyncio.to_thread(pub.flush, 30)

        beating = asyncio.create_task(beat())
        await asyncio.gather(*[work(i) for i in range(1_000)])
        done.set()
        await beating
        return beats

    with publisher(log, flush_interval_ms=2, **settings_of(mode, tmp_path)) as pub:
        view = pub.sum("v", labels=("who",))
        beats = asyncio.run(main())
    assert beats > turns
    found = fold(log)
    assert found.of("v") == {("all",): 1_000 * turns, **{(str(i),): 20 * turns for i in range(50)}}
    assert (found.duplicates, found.dead) == (0, [])


# gunicorn

APP = """
import os, sys
from pipeline import Publisher

pub = Publisher({url!r}, **{settings!r})
view = pub.sum("requests", labels=("path",))
boot = pub.sum("boot")
boot.add(1)
pub.flush()     # its connection, and the threads, are there before the fork
boot.add(10)    # and this waits in the parent
handle = view.labels("/")

def app(environ, start_response):
    handle.add(1)
    view.add(1, path="all")
    if environ["PATH_INFO"] == "/flush":
        pub.flush()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
"""


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        pid: str = answer.read().decode()
        return pid


def answers(url: str) -> bool:
    try:
        get(url)
    except OSError:
        return False
    return True


def test_gunicorn_with_preload_is_exact(tmp_path: Path, free_port: int) -> None:
    """A publisher made before the fork: each worker sends its own, also when it is replaced; a graceful stop loses none."""
    url = f"http://127.0.0.1:{free_port}"
    with UpProcess(tmp_path / "data") as up:
        (tmp_path / "app.py").write_text(APP.format(url=up.url, settings={"flush_interval_ms": NEVER_MS}))
        options = ["--preload", "-w", "2", "-b", url.removeprefix("http://"), "--max-requests", "40", "app:app"]
        with Program(*options, stderr=tmp_path / "stderr", cwd=tmp_path, program=GUNICORN) as server:
            wait_until(lambda: answers(url) or server.process.poll() is not None, "gunicorn answers")
            with ThreadPoolExecutor(4) as pool:
                pids = set(pool.map(get, [f"{url}/{'flush' if i % 10 == 0 else ''}" for i in range(199)]))
            assert len(pids) > 2, "no worker was replaced"
            server.signal(signal.SIGTERM)
            assert server.wait() == 0, server.stderr()
            assert "Traceback" not in server.stderr()
        with Reader(up.url) as reader:
            token = everything(reader)
            assert reader.get("boot", after=token).value() == 11
            counts = {series.labels["path"]: series.value for series in reader.get("requests", after=token).series}
    assert counts == {"/": 200, "all": 200}


# Celery

TASKS = """
import os
from celery import Celery
from tests.producer.support import FileLog, publisher

app = Celery("tasks", broker="filesystem://")
app.conf.update(
    broker_transport_options={{"data_folder_in": {queue!r}, "data_folder_out": {queue!r}, "control_folder": {control!r}}},
    worker_max_tasks_per_child=10,
    worker_enable_remote_control=False,
    broker_connection_retry_on_startup=True,
    task_ignore_result=True,
)
pub = publisher(FileLog({log!r}), **{settings!r})
view = pub.sum("v", labels=("who",))
cell = view.labels("task")
view.add(1, who="boot")

@app.task
def work(n):
    cell.add(n)
    view.add(1, who="all")
    with open({done!r}, "ab", 0) as file:
        file.write(b"x")
"""

SEND = "import tasks\nfor i in range({count}): tasks.work.delay(i)\ntasks.view.add(1, who='sender')\n"


def test_celery_prefork_is_exact(tmp_path: Path) -> None:
    """Its children end without `atexit`: what they recorded is sent all the same, when they are replaced and at the end."""
    count = 30
    queue, control, done, log = (tmp_path / name for name in ("queue", "control", "done", "log"))
    queue.mkdir()
    control.mkdir()
    done.touch()
    paths = {"queue": f"{queue}", "control": f"{control}", "done": str(done), "log": str(log)}
    settings = {"flush_interval_ms": NEVER_MS}
    (tmp_path / "tasks.py").write_text(TASKS.format(settings=settings, **paths))
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    options = ["-A", "tasks", "worker", "-P", "prefork", "-c", "2", *quiet]
    with Program(*options, stderr=tmp_path / "stderr", cwd=tmp_path, program=CELERY) as worker:
        send = ["-c", SEND.format(count=count)]
        with Program(*send, stderr=tmp_path / "sent", cwd=tmp_path, program=[sys.executable]) as sender:
            assert sender.wait() == 0, sender.stderr()
        wait_until(lambda: done.stat().st_size >= count or worker.process.poll() is not None, "all tasks are done")
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0, worker.stderr()
        assert "Traceback" not in worker.stderr()
    read = FileLog(log).read()
    found = fold(read)
    assert found.of("v") == {("task",): count * (count - 1) // 2, ("all",): count, ("boot",): 2, ("sender",): 1}
    assert len({batch.producer_id for batch in batches(read)}) > 4, "no child was replaced"
