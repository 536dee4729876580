"""Programs that fork as servers do: gunicorn and Celery, the real ones, lose and double nothing.

For uWSGI see `test_uwsgi`, for multiprocessing `test_process`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.publisher.serving import GUNICORN, Server, Watched
from tests.publisher.support import FileLog, batches, fold
from tests.support import Program, wait_until

CELERY = [sys.executable, "-m", "celery"]


@pytest.mark.parametrize(
    ("options", "boot"),
    [
        ("", 22),
        ("--preload --max-requests 15", 11),
        pytest.param("-k gthread --threads 4 --preload", 11, marks=pytest.mark.long),
        ("-k gevent", 22),
        pytest.param("-k gevent --preload", 11, marks=pytest.mark.long),
    ],
)
def test_gunicorn_is_exact(tmp_path: Path, free_port: int, options: str, boot: int) -> None:
    """Each worker sends its own deltas, with a publisher made before the fork or in it, and a graceful stop loses none.

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
import time
from celery import Celery
from tests.publisher.support import FileLog, publisher

class SlowLog(FileLog):
    def append(self, *args, **options):
        time.sleep(1.5 * (os.getpid() != parent))  # a warm shutdown takes less
        return super().append(*args, **options)

app = Celery("tasks", broker="filesystem://")
app.conf.update(
    broker_transport_options={{"data_folder_in": "{folder}/queue", "data_folder_out": "{folder}/queue",
        "control_folder": "{folder}/control", "polling_interval": 0.02}},
    worker_max_tasks_per_child=10,
    worker_enable_remote_control=False,
    broker_connection_retry_on_startup=True,
    task_ignore_result=True,
)
parent = os.getpid()
pub = publisher(SlowLog("{folder}/log"), flush_interval_ms=3_600_000)  # in which no test ends
view = pub.sum("v", labels=("who",))
cell = view.labels("task")
view.add(1, who="boot")

@app.task
def work(n):
    cell.add(n)
    view.add(1, who="all")
    with open("{folder}/done", "ab", 0) as file:
        file.write(b"x")
"""

SEND = "import tasks\nfor i in range({count}): tasks.work.delay(i)\ntasks.view.add(1, who='sender')\n"


@pytest.mark.long
@pytest.mark.parametrize("pool", ["prefork", pytest.param("gevent", marks=pytest.mark.long)])
def test_celery_is_exact(tmp_path: Path, pool: str) -> None:
    """Children end without `atexit`: their deltas are sent all the same, when they are replaced and at the end.

    A child that still sends when its parent ends goes on.
    """
    count, done = 30, tmp_path / "done"
    for folder in ("queue", "control"):
        (tmp_path / folder).mkdir()
    done.touch()
    (tmp_path / "tasks.py").write_text(TASKS.format(folder=tmp_path))
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    with Watched([*CELERY, "-A", "tasks", "worker", "-P", pool, "-c", "2", *quiet], tmp_path) as worker:
        send = ["-c", SEND.format(count=count)]
        with Program(*send, stderr=tmp_path / "sent", cwd=tmp_path, program=[sys.executable]) as sender:
            assert sender.wait() == 0, sender.stderr()
        wait_until(lambda: done.stat().st_size >= count or worker.process.poll() is not None, "all tasks are done")
        worker.end()
        assert worker.process.returncode == 0, worker.output()
        exact = {("task",): count * (count - 1) // 2, ("all",): count, ("boot",): 2, ("sender",): 1}
        wait_until(lambda: fold(FileLog(tmp_path / "log").read()).of("v") == exact, "all children to have sent")
    read = FileLog(tmp_path / "log").read()
    assert fold(read).of("v") == exact
    producers = {batch.producer_id for batch in batches(read)}
    assert len(producers) > 4 if pool == "prefork" else len(producers) == 2, "children are replaced, green threads are not"
