"""Logs that fail on purpose, a count of metrics, and the views that the real task folds from a log."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.memory import MemoryLog, MemoryStores
from pipeline.core.codec import DeadLetter, decode_batch, decode_definition, decode_letter, decode_states
from pipeline.core.kinds import KINDS
from pipeline.core.record import TAG_DEFINITION, Batch, canonical, parse_suffix, prefix_end, series_prefix, series_suffix
from pipeline.errors import PipelineError, Unavailable
from pipeline.metrics import Metric
from pipeline.ports import MESSAGE_BYTES_MAX, LogWriter, Message
from pipeline.publisher.client import BasePublisher
from pipeline.settings import PublisherSettings, WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.partition import OwnedPartition

ROOT = Path(__file__).resolve().parents[2]
CLOCK = SystemClock()
HOUR_MS = 3_600_000


class MovedClock(SystemClock):
    """The machine's clocks, which a test moves: the wall clock and the monotonic one apart."""

    ms = 0
    s = 0.0

    def now_ms(self) -> int:
        return super().now_ms() + self.ms

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.s


def memory_log(partitions: int = 4) -> MemoryLog:
    return MemoryLog(dict.fromkeys((DELTAS, CHANGELOG, DEAD_LETTERS), partitions), CLOCK.now_ms)


def publisher(writer: LogWriter, metrics: Meter | None = None, **settings: Any) -> BasePublisher:
    """Return a publisher that is quick to flush and to try again."""
    quick = {
        "flush_interval_ms": 5,
        "flush_interval_min_ms": settings.get("flush_interval_ms", 5),
        "retry_backoff_ms": 1,
        "retry_backoff_max_ms": 5,
        "close_timeout_ms": 10_000,
    }
    return BasePublisher(writer, CLOCK, PublisherSettings(**{**quick, **settings}), metrics or Meter())


def partition_of(view: Any, *labels: str, partitions: int = 4) -> int:
    """Return the partition of a series."""
    definition = canonical(view.definition)
    named = dict(zip(view.definition.labels, labels, strict=True))
    return crc32(series_prefix(definition) + series_suffix([named[name] for name in definition.labels])) % partitions


def wait_until(true: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait for a condition; fail if it does not come."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


@contextmanager
def stalled(pub: BasePublisher) -> Iterator[threading.Event]:
    """Hold the flusher up when it next seals, until the context ends; the event tells that it is held."""
    held, go_on = threading.Event(), threading.Event()
    sender = pub._runtime.sender
    room = sender.room

    def stall() -> Any:
        held.set()
        assert go_on.wait(30)
        return room()

    sender.room = stall  # type: ignore[method-assign]
    try:
        yield held
    finally:
        sender.room = room  # type: ignore[method-assign]
        go_on.set()


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Run `work(i)` in `count` threads at once; raise the first error."""
    errors: list[BaseException] = []
    together = threading.Barrier(count)

    def run(i: int) -> None:
        try:
            together.wait(20)
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@contextmanager
def hurried_threads() -> Iterator[None]:
    """Let the interpreter switch threads as often as it can, so that races are met."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)


class Meter:
    """A `pipeline.metrics.Metrics` that remembers."""

    def __init__(self) -> None:
        self.values: Counter[tuple[object, ...]] = Counter()
        self._lock = threading.Lock()

    def of(self, metric: Metric, *labels: object) -> float:
        return self.values[(metric.name, *labels)]

    def inc(self, metric: Metric, amount: float = 1, *labels: object) -> None:
        assert len(labels) == len(metric.labels)
        with self._lock:
            self.values[(metric.name, *labels)] += amount  # type: ignore[assignment]

    def set(self, metric: Metric, value: float, *labels: object) -> None:
        self.values[(metric.name, *labels)] = value  # type: ignore[assignment]

    def observe(self, metric: Metric, value: float, *labels: object) -> None:
        assert metric.type == "histogram"
        self.inc(metric, 1, *labels)

    def forget(self, partition: int) -> None:
        raise AssertionError("a publisher has no partitions")


Fate = Callable[[int, Batch], PipelineError | str]
"""Outcome of a batch at the n-th append: "kept", "unheard" (appended, but the answer is lost), or an error."""


class FaultyLog:
    """A log in memory whose appends go wrong as `fate` says; `away` refuses all, `gate` holds appends up while it is clear.

    `attempts` has the values of each append, except the last, empty batches of ending producers: `closings`.
    """

    def __init__(self, fate: Fate = lambda n, batch: "kept", partitions: int = 4) -> None:
        self.log = memory_log(partitions)
        self.fate = fate
        self.away = False
        self.gate = threading.Event()
        self.gate.set()
        self.attempts: list[list[bytes]] = []
        self.closings: list[Batch] = []
        self.closed_count = 0
        self.partition_total = partitions
        """Reported number of partitions, which can be behind the real one."""
        self.there_total = partitions
        """Real number of partitions."""

    def message_bytes_max(self, topic: str) -> int:
        return MESSAGE_BYTES_MAX

    def partition_count(self, topic: str) -> int:
        if self.away:
            raise Unavailable("the log is away")
        return self.partition_total

    def topic_id(self, topic: str) -> str:
        if self.away:
            raise Unavailable("the log is away")
        return self.log.topic_id(topic)

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        return {number: end for number, end in self.log.high_watermarks(topic).items() if number < self.there_total}

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        decoded = [decode_batch(message.value or b"") for message in messages]
        if decoded and all(batch.closing for batch in decoded):
            self.closings += decoded
            return [Unavailable("the log is away")] * len(messages) if self.away else self.log.append(messages, timeout_s=1)
        n = len(self.attempts)
        self.attempts.append([message.value or b"" for message in messages])
        assert self.gate.wait(20), "the gate stayed shut"
        return [self._append(n, message) for message in messages]

    def _append(self, n: int, message: Message) -> int | PipelineError:
        fate = Unavailable("the log is away") if self.away else self.fate(n, decode_batch(message.value or b""))
        if isinstance(fate, PipelineError):
            return fate
        (result,) = self.log.append([message], timeout_s=1)
        return Unavailable("no answer in time") if fate == "unheard" else result

    def close(self) -> None:
        self.closed_count += 1


class Views(NamedTuple):
    """The totals that tasks fold from a log."""

    answers: dict[tuple[str, tuple[str, ...]], Any]
    duplicates: int
    dead: list[DeadLetter]

    def of(self, view: str) -> dict[tuple[str, ...], Any]:
        return {labels: answer for (name, labels), answer in self.answers.items() if name == view}

    def total(self, view: str) -> Any:
        return sum(self.of(view).values())


def fold(log: MemoryLog) -> Views:
    """Fold a whole log with real partitions, from the start, and merge their totals."""
    stores = MemoryStores()
    states: dict[tuple[str, tuple[str, ...]], Any] = {}
    kinds: dict[str, str] = {}
    duplicates = 0
    for number in range(log.partition_count(DELTAS)):
        partition = OwnedPartition(
            number, log=log, stores=stores, clock=CLOCK, settings=WorkerSettings(), delete_retention_ms=HOUR_MS
        )
        partition.start()
        reader = log.reader(DELTAS)
        reader.assign({number: partition.task.next_offset})
        for records in reader.poll(record_count_max=10**9, bytes_max=10**12, timeout_s=0):
            partition.fold(records)
        partition.commit()
        duplicates += partition.task.counts.batches_duplicate
        store = partition.store
        for _, value in store.scan(TAG_DEFINITION, prefix_end(TAG_DEFINITION)):
            definition = decode_definition(value).definition
            kinds[definition.view] = definition.kind
            kind, prefix = KINDS[definition.kind], series_prefix(definition)
            for key, entry in store.scan(prefix, prefix_end(prefix)):
                (state,) = decode_states(kind, [entry])
                series = definition.view, parse_suffix(key.removeprefix(prefix))[1]
                states[series] = kind.merge(states[series], state) if series in states else state
        partition.close()
    dead = [
        decode_letter(value)
        for number in range(log.partition_count(DEAD_LETTERS))
        for value in values(log, DEAD_LETTERS, number)
        if value  # else the letter was replayed
    ]
    return Views({series: KINDS[kinds[series[0]]].answer(s) for series, s in states.items()}, duplicates, dead)


def values(log: MemoryLog, topic: str, partition: int) -> list[bytes]:
    """Return all records of a partition."""
    reader = log.reader(topic)
    reader.assign({partition: 0})
    polled = reader.poll(record_count_max=10**9, bytes_max=10**12, timeout_s=0)
    return [value or b"" for records in polled for value in records.values]


def batches(log: MemoryLog) -> list[Batch]:
    """Return all batches of a log that are not empty, partition by partition."""
    found = [decode_batch(value) for number in range(log.partition_count(DELTAS)) for value in values(log, DELTAS, number)]
    return [batch for batch in found if batch.groups]


# Across processes


class FileLog:
    """A log in a file, to which several processes can append: each append is one write, which the system keeps whole.

    While a file beside it with the suffix `.away` exists, the log accepts nothing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.away = self.path.with_suffix(".away")

    def message_bytes_max(self, topic: str) -> int:
        return MESSAGE_BYTES_MAX

    def partition_count(self, topic: str) -> int:
        return 2

    def topic_id(self, topic: str) -> str:
        return "file"

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        return {}

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        if self.away.exists():
            return [Unavailable("the log is away") for _ in messages]
        data = b"".join(struct.pack(">II", m.partition, len(m.value or b"")) + (m.value or b"") for m in messages)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:  # no lock: a child that is forked now would inherit it for ever
            assert os.write(file, data) == len(data)
        finally:
            os.close(file)
        return [1 for _ in messages]

    def close(self) -> None:
        pass

    def read(self) -> MemoryLog:
        """Return everything that was appended, as a log in memory."""
        log = memory_log(2)
        data = self.path.read_bytes() if self.path.exists() else b""
        start = 0
        while start < len(data):
            partition, size = struct.unpack_from(">II", data, start)
            log.append([Message(DELTAS, partition, None, data[start + 8 : start + 8 + size])], timeout_s=1)
            start += 8 + size
        return log


PRELUDE = """
import os, signal, sys, threading, time
from tests.publisher.support import FileLog, publisher, wait_until, in_threads, hurried_threads
log = FileLog(sys.argv[1])
"""


def start_script(file: Path, path: Path) -> subprocess.Popen[str]:
    """Run a file of Python code in a process of its own, with the path of a FileLog as its argument."""
    return subprocess.Popen(
        [sys.executable, str(file), str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_script(
    path: Path, script: str, *, check: bool = True, timeout_s: float = 60, first: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, with `log` the FileLog at `path`; a traceback fails the test.

    `first` is code that runs before anything else is imported.
    """
    file = path.with_suffix(".py")
    file.write_text(first + PRELUDE + script)
    with start_script(file, path) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    if check:
        assert process.returncode == 0, err
        assert "Traceback" not in err, err
    return subprocess.CompletedProcess(file, process.returncode, out, err)


def same(found: Mapping[Any, Any], expected: Mapping[Any, Any]) -> None:
    """Check equality, and name only the differences."""
    wrong = {k: (found.get(k), expected.get(k)) for k in found.keys() | expected.keys() if found.get(k) != expected.get(k)}
    assert not wrong
