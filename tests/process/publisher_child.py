"""Publishers that tell through a pipe what they are about to record and what they have recorded, until they are killed.

    python -m tests.process.publisher_child

Reads a JSON object a line: a publisher to be started, in a process that is forked from this one, so that each start costs no
imports. It tells, two bytes at a time, what happens: `Told`, and the number of the thread.
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

FAILED = 3
"""Exit code of a publisher that ended by itself, and not in order."""


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
    pipe = os.open(job["pipe"], os.O_WRONLY)
    sys.setswitchinterval(job["switch_s"])

    def tell(what: Told, thread: int = 0) -> None:
        os.write(pipe, bytes((what, thread)))

    publisher = Publisher(job["url"], **job["settings"])
    tell(Told.OPEN)

    def work(thread: int) -> None:
        name = f"{job['name']}-{thread}"
        rng, recorder, pause = random.Random(name), Recorder(publisher), threading.Event()
        left = 0
        try:
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
        except BaseException:
            traceback.print_exc()
            os._exit(FAILED)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(job["threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tell(Told.CLOSE)
    publisher.close(60)
    tell(Told.CLOSED)


def main() -> None:
    """Start what is asked for, say its process id, until the end of the input; then all of them are killed."""
    children: set[int] = set()
    for line in sys.stdin:
        pid = os.fork()
        if pid:
            children.add(pid)
            print(pid, flush=True)
            continue
        sys.stdin.close()
        os.close(1)
        try:
            run(json.loads(line))
        except BaseException:
            traceback.print_exc()
            os._exit(FAILED)
        os._exit(0)
    for pid in children:
        os.kill(pid, signal.SIGKILL)  # not waited for yet, so nobody else has its number
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
