"""Reads under load, whose staleness is held against a clock outside: `python -m tests.embedded.staleness --reads 10000`.

Publishers note when each flush has returned. A read that begins at t and says that it is at most s stale must hold whatever
was acknowledged before t - s; one that does not has understated how stale it is.

With `--to kafka://host:port/app --from http://host:port` it asks a server of a Kafka log; without, an `Engine` of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pipeline import Publisher, Reader
from pipeline.adapters.clock import SystemClock
from pipeline.core.answer import Answer
from pipeline.core.query import Query
from pipeline.publisher.client import BasePublisher
from pipeline.roles.embedded import Engine
from pipeline.settings import LogSettings, PublisherSettings, WorkerSettings

VIEW = "marks"
_PUBLISHERS = 3
_READERS = 2
_SERIES = 16
"""Series of each publisher, so that every partition has some."""


class Marks:
    """Numbers that one publisher has flushed, in order, and when each flush had returned."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def flushed_by(self, at_s: float) -> int:
        """Return the last number that was acknowledged by then; 0 if none was."""
        return bisect_right(self.at_s, at_s)


class Outcome(NamedTuple):
    """Counts of reads."""

    reads: int
    behind: int
    """Reads that lacked what was acknowledged before they began: those for which the bound matters."""
    understated: list[str]


def judge(answer: Answer, began_s: float, marks: list[Marks]) -> tuple[bool, list[str]]:
    """Return whether an answer lacks what was acknowledged before the read, and what it should not lack by its own bound."""
    values = {(it.labels["publisher"], it.labels["series"]): it.value for it in answer}
    stale_ms = answer.as_of.staleness_ms
    behind, wrong = False, []
    for publisher, own in enumerate(marks):
        now, needed = own.flushed_by(began_s), 0 if stale_ms is None else own.flushed_by(began_s - stale_ms / 1_000)
        for series in range(_SERIES):
            value = values.get((str(publisher), str(series)), 0)
            behind = behind or value < now
            if value < needed:
                wrong.append(f"publisher {publisher}, series {series}: {value} in place of {needed}, at {stale_ms} ms")
    return behind, wrong


def measure(publishers: list[BasePublisher], read: Callable[[], Answer], read_count: int) -> Outcome:
    """Read `read_count` times while all publishers flush one number after the other."""
    marks = [Marks() for _ in publishers]
    stop = threading.Event()
    outcomes: list[tuple[bool, list[str]]] = []

    def publish(number: int) -> None:
        view = publishers[number].max(VIEW, labels=("publisher", "series"))
        mark = 0
        while not stop.is_set():
            mark += 1
            for series in range(_SERIES):
                view.observe(mark, publisher=str(number), series=str(series))
            publishers[number].flush(30)
            marks[number].at_s.append(time.monotonic())
            time.sleep(0.001)

    def ask() -> None:
        for _ in range(read_count // _READERS):
            began_s = time.monotonic()
            outcomes.append(judge(read(), began_s, marks))

    writers = [threading.Thread(target=publish, args=(number,)) for number in range(len(publishers))]
    readers = [threading.Thread(target=ask) for _ in range(_READERS)]
    for thread in writers:
        thread.start()
    while any(len(it.at_s) < 3 for it in marks):
        time.sleep(0.01)
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    for thread in writers:
        thread.join()
    wrong = [text for _, found in outcomes for text in found]
    return Outcome(len(outcomes), sum(behind for behind, _ in outcomes), wrong)


@contextmanager
def embedded(folder: str) -> Iterator[tuple[list[BasePublisher], Callable[[], Answer]]]:
    """Yield publishers and a read of an `Engine`, which commits so seldom that answers lag."""
    engine = Engine(LogSettings(data=folder, partitions=4), worker_settings=WorkerSettings(commit_interval_ms=100))
    engine.start()
    try:
        assert engine.wait_ready(30)
        settings = PublisherSettings()
        publishers = [BasePublisher(engine.log, SystemClock(), settings) for _ in range(_PUBLISHERS)]
        query = Query(VIEW)
        publishers[0].max(VIEW, labels=("publisher", "series")).observe(0, publisher="-", series="-")
        token = publishers[0].flush(30)
        while not all(
            state.next_offset >= token.next_offsets.get(state.partition, 0) for state in engine.reader.partitions()
        ):
            time.sleep(0.01)
        yield publishers, lambda: engine.reader.read(query, deadline_s=time.monotonic() + 30)
    finally:
        engine.stop()


def main() -> None:
    """Print the outcome; fail if a read has understated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reads", type=int, default=10_000)
    parser.add_argument("--to")
    parser.add_argument("--from", dest="url")
    asked = parser.parse_args()
    if asked.to:
        with Reader(asked.url) as reader:
            publishers: list[BasePublisher] = [Publisher(asked.to) for _ in range(_PUBLISHERS)]
            publishers[0].max(VIEW, labels=("publisher", "series")).observe(0, publisher="-", series="-")
            reader.get(VIEW, after=publishers[0].flush(30))
            found = measure(publishers, lambda: reader.get(VIEW), asked.reads)
    else:
        with tempfile.TemporaryDirectory() as folder, embedded(f"{folder}/data") as (publishers, read):
            found = measure(publishers, read, asked.reads)
    print(
        f"{found.reads} reads, {found.behind} of them behind, {len(found.understated)} understated {found.understated[:3]}"
    )
    raise SystemExit(bool(found.understated))


if __name__ == "__main__":
    main()
