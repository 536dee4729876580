"""Programs that fork or interleave as servers do: asyncio, gunicorn and Celery, the real ones, lose and double nothing.

`test_uwsgi` has that of uWSGI, and `test_process` those of multiprocessing.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.producer.modes import MODES, settings_of
from tests.producer.serving import GUNICORN, Server, Watched
from tests.producer.support import FileLog, batches, fold, memory_log, publisher
from tests.support import Program, wait_until

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


@pytest.mark.parametrize(
    ("options", "boot"),
    [
        ("", 22),
        ("--preload --max-requests 15", 11),
        ("-k gthread --threads 4 --preload", 11),
        ("-k gevent", 22),
        ("-k gevent --preload", 11),
    ],
)
def test_gunicorn_is_exact(tmp_path: Path, free_port: int, options: str, boot: int) -> None:
    """A publisher made before the fork, or in each worker: each sends its own, and a graceful stop loses none.

    A worker that is replaced drains too. Threads become green behind the fork.
    """
    address = f"127.0.0.1:{free_port}"
    command = [*GUNICORN, "-w", "2", "-b", address, *options.split(), "app:app"]
    with Server(command, tmp_path, address) as server:
        count = server.ask(3 if "--max-requests" in options else 2)
        found, producers = server.stop()
    assert found.of("v") == {("/",): count, ("all",): count}
    assert found.of("boot") == {(): boot}
    assert (found.duplicates, found.dead) == (0, [])
    assert producers >= boot // 11 + ("--preload" in options)


# Celery

TASKS = """
import os
from celery import Celery
from tests.producer.serving import GUNICORN, Server, Watched
from tests.producer.support import FileLog, publisher

app = Celery("tasks", broker="filesystem://")
app.conf.update(
    broker_transport_options={{"data_folder_in": {queue!r}, "data_folder_out": {queue!r}, "control_folder": {control!r},
        "polling_interval": 0.02}},
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


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_celery_is_exact(tmp_path: Path, pool: str) -> None:
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
    options = ["-A", "tasks", "worker", "-P", pool, "-c", "2", *quiet]
    with Watched([*CELERY, *options], tmp_path) as worker:
        send = ["-c", SEND.format(count=count)]
        with Program(*send, stderr=tmp_path / "sent", cwd=tmp_path, program=[sys.executable]) as sender:
            assert sender.wait() == 0, sender.stderr()
        wait_until(lambda: done.stat().st_size >= count or worker.process.poll() is not None, "all tasks are done")
        worker.end()
        assert worker.process.returncode == 0, worker.output()
    read = FileLog(log).read()
    found = fold(read)
    assert found.of("v") == {("task",): count * (count - 1) // 2, ("all",): count, ("boot",): 2, ("sender",): 1}
    producers = {batch.producer_id for batch in batches(read)}
    assert len(producers) > 4 if pool == "prefork" else len(producers) == 2, "children are replaced, green threads are not"
