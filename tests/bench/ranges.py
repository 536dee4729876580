"""Speed of `pipeline up` when it reads ranges of windows, and groups many series, over HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from pipeline.adapters.http import HttpLogWriter
from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Definition, Group, producer_id_of, series_suffix
from pipeline.core.token import Token
from pipeline.ports import Message
from pipeline.topics import DELTAS
from tests.bench import data
from tests.bench.measure import Figure, Row, at_most
from tests.bench.server import Server
from tests.bench.serving import read, up

MINUTE_MS = 60_000
FIRST_MS = 1_600_000_020_000
"""Start of the first window."""
VIEW = Definition("minutes", "sum", ("route",), window_s=60)
GROUPED = Definition("grouped", "sum", ("group", "item"))
GROUP_COUNT = 100


def _windows(series_count: int, window_count: int) -> Iterator[tuple[bytes, int]]:
    for window in range(window_count):
        for series in range(series_count):
            yield series_suffix((f"/{series}",), FIRST_MS + window * MINUTE_MS), window % 97


def _series(series_count: int) -> Iterator[tuple[bytes, int]]:
    for i in range(series_count):
        yield series_suffix((f"g{i % GROUP_COUNT}", f"item-{i:07d}")), i % 97


def _publish(server: Server, definition: Definition, entries: Iterator[tuple[bytes, int]], producer: str) -> None:
    """Publish entries over HTTP, in turn to each partition, and wait until they can be read."""
    writer = HttpLogWriter(server.url)
    writer.introduce(producer)
    partitions = writer.partition_count(DELTAS)
    offsets: dict[int, int] = {}
    sequences = [0] * partitions
    number = 0
    while True:
        part = [entry for entry, _ in zip(entries, range(data.BATCH_ENTRIES), strict=False)]
        if not part:
            break
        partition = number % partitions
        group = Group(definition, [suffix for suffix, _ in part], [value for _, value in part])
        sequence = sequences[partition]
        sequences[partition] += 1
        batch = Batch(producer_id_of(producer), 0, partition, sequence, sequence, 0, [group])
        (result,) = writer.append([Message(DELTAS, partition, None, encode_batch(batch))], timeout_s=60)
        if not isinstance(result, int):
            raise result
        offsets[partition] = result
        number += 1
    token = Token(offsets, writer.topic_id(DELTAS))
    writer.close()
    read(server, f"/v1/views/{definition.view}?by=&limit=1&after={token}&timeout_ms=60000")


_limits = count(1_000)


def _anew(path: str) -> str:
    """Return a path whose answer no earlier read of the same commit has left for this one."""
    return f"{path}&limit={next(_limits)}" if "?" in path else path


def _times_ms(server: Server, path: str, round_count: int) -> list[float]:
    times = []
    for _ in range(round_count):
        asked = _anew(path)
        start = time.perf_counter()
        read(server, asked)
        times.append((time.perf_counter() - start) * 1_000)
    return times


def query(quick: bool) -> list[Row]:
    """Read 1,440 windows out of a million entries, and a million series in 100 groups with point reads meanwhile."""
    series_count, window_count = (10, 200) if quick else (10, 100_000)
    many = 2_000 if quick else 1_000_000
    points = min(1_440, window_count)
    rounds = 2 if quick else 9
    end = FIRST_MS + window_count * MINUTE_MS
    start = end - points * MINUTE_MS
    with TemporaryDirectory(prefix="pipeline-bench-") as folder, up(Path(folder)) as server:
        _publish(server, VIEW, _windows(series_count, window_count), "minutes")
        plain = _times_ms(server, "/v1/views", rounds)
        asked = f"start={start}&end={end}"
        one = _times_ms(server, f"/v1/views/minutes?where=route=/3&{asked}", rounds)
        total = _times_ms(server, f"/v1/views/minutes?by=&{asked}", rounds)
        sliding = _times_ms(server, f"/v1/views/minutes?by=&{asked}&step=300&over=3600", rounds)
        answer = read(server, f"/v1/views/minutes?by=&{asked}")
        assert len(answer["series"][0]["points"]) == points, answer
        _publish(server, GROUPED, _series(many), "grouped")
        grouped = _times_ms(server, "/v1/views/grouped?by=group&timeout_ms=60000", 1 if quick else 3)
        waits = _waits_ms(server, "/v1/views/grouped?by=group&timeout_ms=60000")
    baseline = Figure(median(plain), "ms", "list of views")
    entries = f"{series_count * window_count:,}"
    return [
        at_most(f"{points:,} points of one series of {entries} windows", _figure(one), baseline, 100),
        at_most(f"{points:,} points of all {series_count} series of {entries} windows", _figure(total), baseline, 100),
        at_most("overlapping points of 1 h every 5 min of the same", _figure(sliding), baseline, 100),
        at_most(f"{many:,} series in {GROUP_COUNT} groups", _figure(grouped), baseline, 1_000),
        at_most("longest point read meanwhile", _figure([max(waits)]), Figure(median(waits), "ms", "their median"), 50),
    ]


def _figure(times: list[float]) -> Figure:
    return Figure(min(times), "ms", f"median {median(times):.0f} ms")


def _waits_ms(server: Server, path: str) -> list[float]:
    """Return the times of point reads while a long read runs."""
    done = threading.Event()

    def scan() -> None:
        with urlopen(server.url + _anew(path)) as response:
            response.read()
        done.set()

    thread = threading.Thread(target=scan)
    thread.start()
    waits: list[float] = []
    while not done.is_set() or not waits:
        waits += _times_ms(server, "/v1/views/grouped?where=group=g7&where=item=item-0000007", 1)
    thread.join()
    return waits
