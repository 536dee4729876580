"""A publisher that reports in a file each call before and after it, until it is killed."""

from __future__ import annotations

import os
import random
import sys
import threading
import traceback
from enum import IntEnum
from typing import Any

from pipeline import Publisher
from tests.process.publisher_stream import Recorder, stream


class Told(IntEnum):
    """Codes of reports, each of two bytes: one of these, and the number of the thread."""

    BEGIN = 1
    """A thread is about to record."""
    END = 2
    """The deltas that the thread was about to record are recorded."""
    OPEN = 3
    """The publisher is there."""
    CLOSE = 4
    """The publisher is about to close."""
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

    def guarded(thread: int) -> None:
        try:
            work(thread)
        except BaseException:
            traceback.print_exc()
            os._exit(3)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(job["threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tell(Told.CLOSE)
    publisher.close(60)
    tell(Told.CLOSED)
