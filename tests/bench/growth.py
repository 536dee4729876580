"""Growth of a worker's cost with the number of series and of partitions, on one real broker.

For each size, a worker folds deltas of series that are all new, then some of series that are in its store, and after that a
worker without any files restores all entries. The deltas were published before the worker may begin, so only the worker and
the broker run. CPU is that of the worker's process. A cost over 1.5 times that of the reference size is marked with "!".
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import msgspec

import tests.bench.data as data
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Group, producer_id_of, series_prefix, series_suffix
from pipeline.ports import Message
from pipeline.settings import KafkaSettings
from pipeline.topics import CHANGELOG, DELTAS
from tests.bench import plots
from tests.bench.children import Child, cpu_s, until
from tests.bench.measure import machine
from tests.bench.peers.report import table
from tests.bench.peers.run import ending_in_order, numbers, say
from tests.broker.kafka import Broker, Port, create_topics, delete_topics

_WAIT_S = 3_600.0
_BATCH_ENTRIES = 2_000
_KNOWN = 200_000
_REFERENCE = (100_000, 4)
"""Series and partitions of the row to which others are compared, if it is there."""


class Size(msgspec.Struct):
    """One row: what a worker cost at a size. Times an entry are CPU of the worker's process."""

    series: int
    partitions: int
    new_us: float = 0
    """An entry of a new series."""
    known_us: float = 0
    """An entry of a series that is in the store."""
    broker_us: float = 0
    worker_mb: float = 0
    commit_ms: float = 0
    """Mean time from freezing an overlay to its being durable, while all series are new."""
    commit_entries: float = 0
    restore_us: float = 0
    restore_s: float = 0
    """From the start of the process to its being ready."""
    restore_mb: float = 0
    deltas_bytes: float = 0
    """Bytes of an entry on the broker's disk, in `deltas`, with one delta in each."""
    changelog_bytes: float = 0
    store_bytes: float = 0
    """Bytes of a series on the worker's disk."""


def batches(series: Iterable[int], partitions: int, secret: str) -> Iterator[tuple[int, bytes]]:
    """Yield partition and bytes of batches with one delta of each of these series."""
    prefix, producer = series_prefix(data.VIEW), producer_id_of(secret)
    sequences = [0] * partitions
    groups = [Group(data.VIEW, [], []) for _ in range(partitions)]

    def seal(partition: int) -> tuple[int, bytes]:
        group, groups[partition] = groups[partition], Group(data.VIEW, [], [])
        sequence, sequences[partition] = sequences[partition], sequences[partition] + 1
        return partition, encode_batch(Batch(producer, 0, partition, sequence, sequence, 0, [group]))

    for i in series:
        suffix = series_suffix(data.labels(i))
        partition = crc32(prefix + suffix) % partitions
        group = groups[partition]
        group.suffixes.append(suffix)
        group.states.append(data.value(i))
        if len(group.suffixes) == _BATCH_ENTRIES:
            yield seal(partition)
    for partition in range(partitions):
        if groups[partition].suffixes:
            yield seal(partition)


class _Worker:
    """A worker of all partitions, in no group, that is stopped while there is nothing to measure."""

    def __init__(self, broker: Broker, folder: Path, size: Size) -> None:
        self.broker = broker
        self.size = size
        self.data = folder / "data"
        self.port = Port()
        app = f"growth-{size.series}-{size.partitions}"
        create_topics(broker.bootstrap, app, size.partitions)
        url = f"kafka://{broker.bootstrap}/{app}"
        self.app = app
        self.log = KafkaLog(parse_url(url), KafkaSettings(), SystemClock())
        settings = {"mirror_interval_ms": 500, "stall_timeout_ms": 0, "series_max": 100_000_000}
        program = [sys.executable, "-c", "from pipeline.cli import main; main()", "worker"]
        where = ["--from", url, "--data", str(self.data), "--port", str(self.port.number)]
        self.child = Child("worker", folder, [*program, *where, *[f"--set={name}={it}" for name, it in settings.items()]])

    def start(self) -> tuple[float, float]:
        """Start it; return CPU and time until it is ready."""
        began_s = time.monotonic()
        self.child.start()
        until(self._ready, "the worker to be ready", _WAIT_S, self.child)
        return self.child.cpu_s(), time.monotonic() - began_s

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port.number}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def fold(self, published: Iterable[tuple[int, bytes]]) -> tuple[float, float]:
        """Publish while it is stopped, let it fold everything; return its CPU and the broker's."""
        self.child.signal(signal.SIGSTOP)
        messages = (Message(DELTAS, partition, None, value) for partition, value in published)
        while run := [*islice(messages, 100)]:
            self.log.append(run, timeout_s=60)
        ends = {number: end for number, end in self.log.end_offsets(DELTAS).items() if end}
        time.sleep(1)
        before = self.child.cpu_s(), cpu_s(self.broker.pid)
        self.child.signal(signal.SIGCONT)

        def folded() -> bool:
            found = self.log.mirrored_positions()
            return all(found.get(number, 0) >= end for number, end in ends.items())

        until(folded, "everything to be committed", _WAIT_S, self.child, pause_s=0.1)
        return self.child.cpu_s() - before[0], cpu_s(self.broker.pid) - before[1]

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port.number}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(it.rpartition(" ")[2]) for it in lines if it.startswith((f"{name} ", f"{name}{{")))

    def log_bytes(self, topic: str) -> int:
        """Return the bytes of a topic's segments on the broker's disk."""
        return _bytes((self.broker.folder / "data").glob(f"{self.app}.{topic}-*/*.log"))

    def close(self) -> None:
        self.child.kill()
        self.log.close()
        self.port.close()
        delete_topics(self.broker.bootstrap, self.app)


def _bytes(files: Iterable[Path]) -> int:
    return sum(it.stat().st_size for it in files if it.is_file())


def measure(broker: Broker, scratch: Path, series: int, partitions: int) -> Size:
    """Return what a worker costs at one size."""
    size = Size(series, partitions)
    folder = scratch / f"{series}-{partitions}"
    folder.mkdir()
    worker = _Worker(broker, folder, size)
    try:
        idle_s, _ = worker.start()
        order = [*range(series)]
        random.Random(1).shuffle(order)
        used_s, broker_s = worker.fold(batches(order, partitions, "new"))
        size.new_us, size.broker_us = used_s / series * 1e6, broker_s / series * 1e6
        commits = worker.metric("pipeline_commit_seconds_count")
        size.commit_ms = worker.metric("pipeline_commit_seconds_sum") / commits * 1e3
        size.commit_entries = series / commits
        known = random.Random(2).sample(order, min(series, _KNOWN))
        used_s, _ = worker.fold(batches(known, partitions, "known"))
        size.known_us = used_s / len(known) * 1e6
        size.worker_mb = worker.child.memory_mb("VmHWM")
        size.deltas_bytes, size.changelog_bytes = (
            worker.log_bytes(it) / (series + len(known)) for it in (DELTAS, CHANGELOG)
        )
        worker.child.stop()
        size.store_bytes = _bytes(worker.data.rglob("*")) / series
        shutil.rmtree(worker.data)
        used_s, size.restore_s = worker.start()
        size.restore_us = (used_s - idle_s) / series * 1e6
        size.restore_mb = worker.child.memory_mb("VmHWM")
    finally:
        worker.close()
        shutil.rmtree(folder, ignore_errors=True)
    return size


_COLUMNS: Mapping[str, tuple[str, str]] = {
    "new_us": ("new series, us CPU an entry", "{:.2f}"),
    "known_us": ("known series, us CPU an entry", "{:.2f}"),
    "broker_us": ("broker, us an entry", "{:.2f}"),
    "worker_mb": ("worker's peak, MB", "{:.0f}"),
    "commit_ms": ("commit, mean ms", "{:.1f}"),
    "commit_entries": ("entries a commit", "{:,.0f}"),
    "restore_us": ("restore, us CPU an entry", "{:.2f}"),
    "restore_s": ("start to ready, s", "{:.1f}"),
    "restore_mb": ("restore's peak, MB", "{:.0f}"),
    "deltas_bytes": ("bytes an entry in deltas", "{:.0f}"),
    "changelog_bytes": ("in changelog", "{:.0f}"),
    "store_bytes": ("a series in the store", "{:.0f}"),
}
_MARKED = ("new_us", "known_us", "restore_us")


_TOLD_S = 0.2
"""CPU of a restore above which it stands out from the differences between two starts of a process."""


def text(sizes: Sequence[Size], command: str, *, quick: bool) -> str:
    """Return a Markdown table."""
    shape = machine()
    by_size = {(it.series, it.partitions): it for it in sizes}
    reference = by_size.get(_REFERENCE, sizes[0])
    rows = []
    for it in sizes:
        cells = []
        for name, (_, form) in _COLUMNS.items():
            bends = name in _MARKED and getattr(it, name) > 1.5 * getattr(reference, name)
            told = name != "restore_us" or it.restore_us * it.series / 1e6 > _TOLD_S
            cells.append(form.format(getattr(it, name)) + " !" * bends if told else "too few to tell")
        rows.append([f"{it.series:,}", str(it.partitions), *cells])
    head = ["series", "partitions", *[title for title, _ in _COLUMNS.values()]]
    made = f"{datetime.now(UTC).date().isoformat()}, `{command}`; {shape['cores']} cores, {shape['cpu']}, {shape['python']}."
    return "\n".join([*(["A quick run: the figures mean nothing.", ""] if quick else []), made, "", *table(head, rows)])


def draw(sizes: Sequence[Size], folder: Path, series: Sequence[int], partitions: Sequence[int]) -> None:
    """Write one plot over the number of series, one over that of partitions."""
    drawn = {name: title for name, (title, _) in _COLUMNS.items() if name in (*_MARKED, "worker_mb", "commit_ms")}
    fixed = {"series": _REFERENCE[1], "partitions": _REFERENCE[0]}
    for over, steps in (("series", series), ("partitions", partitions)):
        other = "partitions" if over == "series" else "series"
        chosen = [it for it in sizes if getattr(it, over) in steps and getattr(it, other) == fixed[over]]
        if len(chosen) > 1:
            values = {title: {getattr(it, over): getattr(it, name) for it in chosen} for name, title in drawn.items()}
            title = f"Cost of a worker over {over}, {fixed[over]:,} {other}"
            plots.lines(folder / f"growth-{over}.svg", title, values, over, "us, ms, MB")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m tests.bench growth", description=__doc__, allow_abbrev=False)
    add: Any = made.add_argument
    series, partitions = [10_000, 100_000, 1_000_000, 10_000_000], [1, 4, 16, 64]
    add("--series", type=numbers, default=series, help="numbers of series, with commas (10000 to 10000000)")
    add("--partitions", type=numbers, default=partitions, help="numbers of partitions, with commas (1,4,16,64)")
    add("--out", type=Path, help="folder for growth.md, growth.json and two plots")
    add("--quick", action="store_true", help="smoke run with few series; its figures mean nothing")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; print a table to standard output and progress to standard error."""
    given = parser().parse_args(arguments)
    wanted = [(count, _REFERENCE[1]) for count in given.series] + [(_REFERENCE[0], it) for it in given.partitions]
    if given.quick:
        wanted = [(1_000, 1), (2_000, 1)]
    sizes = []
    with (
        ending_in_order(),
        TemporaryDirectory(prefix="pipeline-growth-", ignore_cleanup_errors=True) as folder,
        Broker(Path(folder) / "kafka") as broker,
    ):
        for series, partitions in dict.fromkeys(sorted(wanted)):
            say(f"{series:,} series, {partitions} partitions")
            sizes.append(measure(broker, Path(folder), series, partitions))
            say(f"  {sizes[-1]}")
    written = text(sizes, f"python -m tests.bench growth {' '.join(arguments)}".strip(), quick=given.quick)
    print(written)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "growth.md").write_text(written + "\n")
        (given.out / "growth.json").write_bytes(msgspec.json.encode(sizes))
        draw(sizes, given.out, given.series, given.partitions)
    return 0
