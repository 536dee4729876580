"""Publishers that tell in a file what they are about to record and what they have recorded, until they are killed.

    python -m tests.process.publisher_child

Reads a JSON object a line, and answers with a process id. A job is a publisher to be started, in a process that is forked
from this one, so that each start costs no imports; {"kill": id} has such a process killed, and is answered once it is gone.
What happens is told two bytes at a time: `Told`, and the number of the thread.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import traceback
from enum import IntEnum
from typing import Any

from pipeline import Publisher
from tests.process.publisher_stream import Recorder, stream


class Told(IntEnum):
    """What a byte says."""

    BEGIN = 1
    """A thread is about to record."""
    END = 2
    """What it was about to record is recorded."""
    OPEN = 3
    """The publisher is there."""
    CLOSE = 4
    """It is about to close."""
    CLOSED = 5


def run(job: dict[str, Any]) -> None:
    """Record in several threads until killed, or `count` calls in each, and close."""
    file = os.open(job["told"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    sys.setswitchinterval(job["switch_s"])

    def tell(what: Told, thread: int = 0) -> None:
        os.write(file, bytes((what, thread)))

    publisher = Publisher(job["url"], **job["settings"])
    tell(Told.OPEN)

    def work(thread: int) -> None:
        name = f"{job['name']}-{thread}"
        rng, recorder, pause, left = random.Random(name), Recorder(publisher), threading.Event(), 0
        for number, op in enumerate(stream(name, job["slot"] + thread)):
            if number == job["count"]:
                return
            if not left:
                left = rng.randrange(1, job["burst"])
                pause.wait(rng.random() * job["pause_s"])
            left -= 1
            tell(Told.BEGIN, thread)
            recorder.record(op)
            tell(Told.END, thread)

    threads = [threading.Thread(target=end_of, args=(lambda n=n: work(n),)) for n in range(job["threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tell(Told.CLOSE)
    publisher.close(60)
    tell(Told.CLOSED)


def end_of(work: Any) -> None:
    """Do `work`; a failure ends the process, with a traceback."""
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(3)


def main() -> None:
    """Start and kill what is asked for, until the end of the input; then all of them are killed."""
    children: set[int] = set()

    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)  # not waited for yet, so nobody else has its number
        os.waitpid(pid, 0)
        children.remove(pid)

    for line in sys.stdin:
        job = json.loads(line)
        if pid := job.get("kill"):
            kill(pid)
        elif pid := os.fork():
            children.add(pid)
        else:
            sys.stdin.close()
            os.close(1)
            end_of(lambda job=job: run(job))
            os._exit(0)
        print(pid, flush=True)
    for pid in [*children]:
        kill(pid)


if __name__ == "__main__":
    main()
