"""Workers that share partitions, each in a process of its own: the gain of a second one, the cost of an idle one, and the
time that a partition lies still when another takes it over.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

import tests.bench.data as data
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.core.codec import DefinitionEntry, decode_position, encode_definition, encode_position, encode_states
from pipeline.core.kinds import KINDS
from pipeline.core.record import (
    POSITION_KEY,
    Definition,
    Position,
    definition_key,
    series_prefix,
    series_suffix,
)
from pipeline.ports import Log, Message
from pipeline.settings import KafkaSettings
from pipeline.topics import CHANGELOG, DELTAS
from tests.bench.measure import ROOT, Figure, Row, at_least_times, at_most
from tests.broker.drive import Role, worker
from tests.broker.kafka import App, Broker, create_topics
from tests.support import wait_until

_WAIT_S = 120.0
_LOAD_PER_S = 100
"""Batches a second, of ten series each: enough for every partition to commit ten times a second."""
_STORED = Definition("stored", "sum", ("series",))
_COMMIT = 50_000


def store(log: Log, app: str, partition: int, entry_count: int) -> None:
    """Put so many entries of one view into a partition's changelog, as a worker would have committed them."""
    prefix, now_ms = series_prefix(_STORED), SystemClock().now_ms()
    source_id = log.topic_id(DELTAS)
    transaction = log.transaction(f"{app}-{partition}")
    end_offset = 0
    for start in range(0, entry_count, _COMMIT):
        # Neighbours are far apart in the order of keys, as they are in the changelog of a real load.
        numbers = [i * 7_919 % entry_count for i in range(start, min(start + _COMMIT, entry_count))]
        keys = [prefix + series_suffix((f"p{partition}-{number:09d}",)) for number in numbers]
        values = encode_states(KINDS["sum"], [number / 4 for number in numbers])
        keys += definition_key(_STORED), POSITION_KEY
        values.append(encode_definition(DefinitionEntry(_STORED, start + len(numbers), 0)))
        place = {"begin_offset": end_offset and end_offset + transaction.marker_count, "previous_end_offset": end_offset}
        values.append(encode_position(Position(0, now_ms, 0, source_id, **place)))
        offsets = transaction.commit(
            [Message(CHANGELOG, partition, key, value) for key, value in zip(keys, values, strict=True)], timeout_s=_WAIT_S
        )
        end_offset = offsets[-1]
    transaction.close()


class Bench:
    """A broker, an app on it, and workers."""

    def __init__(self, broker: Broker, scratch: Path, partitions: int) -> None:
        self.broker = broker
        self.scratch = scratch
        self.partitions = partitions
        self.app = App(broker.bootstrap, "bench")
        create_topics(broker.bootstrap, self.app.app, partitions)
        clock = SystemClock()
        self.now_ms = clock.now_ms
        self.log = KafkaLog(parse_url(self.app.url), KafkaSettings(), clock)

    def member(self, name: str, **settings: object) -> Role:
        """Return a worker with default settings, except these."""
        usual = {"metadata_refresh_ms": 2_000, "mirror_interval_ms": 5_000, "commit_interval_ms": 100}
        return worker(self.app, self.scratch / name, "--name", name, **{**usual, **settings})

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Publish small batches to all partitions while the context lasts."""
        command = [sys.executable, "-m", "tests.bench.kafka", self.app.url, str(_LOAD_PER_S)]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def shared(self, *roles: Role, warm: bool = True) -> None:
        """Wait until all workers fold their share, and have warm copies of the other shares."""

        def done() -> bool:
            found = [status(role) for role in roles]
            loads = [sum(it["phase"] != "assigned" and "restore" not in it for it in s["partitions"]) for s in found]
            copies = sum(it["phase"] == "following" for s in found for it in s["standbys"])
            level = sum(loads) == self.partitions and max(loads) <= min(loads) + 1
            return level and (not warm or len(roles) == 1 or copies == self.partitions)

        wait_until(done, "the partitions to be shared", _WAIT_S)

    def ends(self) -> dict[int, int]:
        """Return the ends of the changelog."""
        return dict(self.log.end_offsets(CHANGELOG))

    def flowing(self, since: Mapping[int, int], seconds: float) -> None:
        """Wait until every partition commits, and so much longer."""
        wait_until(lambda: all(len(found) > 1 for found in self.commits(since).values()), "commits", _WAIT_S)
        time.sleep(seconds)

    def commits(self, since: Mapping[int, int]) -> dict[int, list[int]]:
        """Return when each partition committed, on the wall clock in ms, from these offsets of the changelog on."""
        reader = self.log.reader(CHANGELOG)
        reader.assign(since)
        ends, next_offsets = self.ends(), dict(since)
        found: dict[int, list[int]] = {number: [] for number in since}
        while any(next_offsets[number] < end for number, end in ends.items()):
            for records in reader.poll(record_count_max=20_000, bytes_max=2**26, timeout_s=1):
                next_offsets[records.partition] = records.next_offset
                for key, value in zip(records.keys, records.values, strict=True):
                    if key == POSITION_KEY and value is not None:
                        found[records.partition].append(decode_position(value).committed_at_ms)
        reader.close()
        return found

    def close(self) -> None:
        self.log.close()


@contextmanager
def bench(partitions: int) -> Iterator[Bench]:
    """Yield a new bench in a temporary folder."""
    with (
        TemporaryDirectory(prefix="pipeline-bench-", ignore_cleanup_errors=True) as folder,
        Broker(Path(folder) / "kafka") as broker,
    ):
        made = Bench(broker, Path(folder), partitions)
        try:
            yield made
        finally:
            made.close()


def status(role: Role) -> dict[str, Any]:
    """Return a worker's `/v1/status`."""
    try:
        return dict(httpx.get(f"{role.url}/v1/status", timeout=30).json())
    except httpx.HTTPError as error:
        raise AssertionError(f"{error!r}; {role.tail()}") from None


def process_cpu_s(pid: int) -> float:
    """Return the user and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def _rss_mb(pid: int) -> float:
    line = next(it for it in Path(f"/proc/{pid}/status").read_text().splitlines() if it.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def _fold_rate(
    it: Bench, names: Sequence[str], batches: Iterable[tuple[int, bytes]], entry_count: int, quick: bool, **settings: object
) -> Figure:
    """Return how many entries a second new workers fold of what was published before they may begin.

    Nothing but them and the broker runs meanwhile.
    """
    with ExitStack() as stack:
        # Those that are held up must not be taken for dead, nor find that they stood still.
        patient = {"session_timeout_ms": 300_000, "stall_timeout_ms": 0, **settings}
        roles = [stack.enter_context(it.member(name, **patient)) for name in names]
        it.shared(*roles, warm=bool(settings["standby_count"]))
        pids = [role.program.process.pid for role in roles]
        for role in roles:
            role.program.signal(signal.SIGSTOP)
        messages = (Message(DELTAS, partition, None, value) for partition, value in batches)
        while run := [*islice(messages, 100)]:
            it.log.append(run, timeout_s=30)
        ends = it.log.end_offsets(DELTAS)
        time.sleep(0 if quick else 5)  # what the broker still has to do of that
        before = [process_cpu_s(pid) for pid in (*pids, it.broker.pid)]
        began_s = time.monotonic()
        for role in roles:
            role.program.signal(signal.SIGCONT)

        def folded() -> bool:
            time.sleep(0.1)  # asking is work for those that are measured
            return {p["partition"]: p["next_offset"] for role in roles for p in status(role)["partitions"]} == ends

        wait_until(folded, "everything to be folded", _WAIT_S)
        took_s = time.monotonic() - began_s
        used = [process_cpu_s(pid) - was for pid, was in zip((*pids, it.broker.pid), before, strict=True)]
        cores = f"cores used: {' and '.join(f'{s / took_s:.2f}' for s in used[:-1])}, the broker {used[-1] / took_s:.2f}"
        return Figure(entry_count / took_s, "entries/s", f"{len(names)} of them; {cores}")


def scaling(quick: bool) -> list[Row]:
    """Compare two workers with one, on batches published before they may begin; only they and the broker run.

    Without standbys both fold and nothing else; with them each follows the other's commits, too.
    """
    entry_count, partitions = (20_000, 4) if quick else (4_000_000, 4)
    rates: list[Figure] = []
    for names, standby_count in ((("one",), 0), (("one", "two"), 0), (("one", "two"), 1)):
        with bench(partitions) as it:
            batches = data.batches(entry_count, entry_count // 10, partitions, 2_000)
            rates.append(_fold_rate(it, names, batches, entry_count, quick, standby_count=standby_count))
    one, two, with_standbys = rates
    return [
        at_least_times("Kafka: two workers, each series ten times", two, one, 1.8),
        at_least_times("Kafka: the same, each with copies of what the other folds", with_standbys, one, 1),
    ]


def spread(quick: bool) -> list[Row]:
    """Fold one series that many processes flush, with two workers of four partitions: spread over all four, or not."""
    count, partitions = (2_000, 4) if quick else (400_000, 4)
    rates: list[Figure] = []
    for width in (1, 4):
        with bench(partitions) as it:
            rates.append(_fold_rate(it, ("one", "two"), data.hot(count, width, partitions), count, quick, standby_count=0))
    one, four = rates
    return [at_least_times("Kafka: two workers, one hot series with spread=4", four, one, 1.5)]


def idle(quick: bool) -> list[Row]:
    """Compare a member with 64 idle partitions with a worker of one partition without a group."""
    seconds = 1 if quick else 30
    found = []
    for partitions, alone in ((1, True), (4 if quick else 64, False)):
        with bench(partitions) as it:
            role = worker(it.app, it.scratch / "w") if alone else it.member("one")
            with role:
                it.shared(role)
                time.sleep(0 if quick else 10)  # until what starting cost is over
                pid = role.program.process.pid
                began_s, before_s = time.monotonic(), process_cpu_s(pid)
                time.sleep(seconds)
                percent = (process_cpu_s(pid) - before_s) / (time.monotonic() - began_s) * 100
                found.append((max(percent, 0.01), _rss_mb(pid)))
    (one_percent, one_mb), (percent, mb) = found
    what = "worker of one partition, in no group"
    return [
        at_most(
            "Kafka: idle, 64 partitions, CPU", Figure(percent, "% of a core"), Figure(one_percent, "% of a core", what), 3
        ),
        at_most("Kafka: idle, 64 partitions, memory", Figure(mb, "MB"), Figure(one_mb, "MB", what), 200),
    ]


def join(quick: bool) -> list[Row]:
    """Let a second worker join under a small load, until it gets its share once its copies are warm."""
    entry_count, partitions = (2_000, 2) if quick else (1_000_000, 4)
    with bench(partitions) as it:
        for number in range(partitions):
            store(it.log, it.app.app, number, entry_count)
        with it.member("one") as one, it.loaded():
            it.shared(one)
            since = it.ends()
            it.flowing(since, 1 if quick else 10)
            joined_ms = it.now_ms()
            with it.member("two") as two:
                it.shared(one, two)
                it.flowing(it.ends(), 1 if quick else 5)
                commits = it.commits(since)
    pauses = [(b, b - a) for times in commits.values() for a, b in pairwise(times)]
    calm_s, moved_s = (max(ms for at_ms, ms in pauses if (at_ms < joined_ms) is calm) / 1000 for calm in (True, False))
    what = "longest time between two commits of a partition before"
    name = f"Kafka: join with {entry_count:,} entries a partition, longest pause"
    return [at_most(name, Figure(moved_s, "s"), Figure(calm_s, "s", what), 3)]


def takeover(quick: bool) -> list[Row]:
    """Kill one of two with kill -9, and measure until all its partitions fold again, also with an immediate restart."""
    entry_count, partitions = (2_000, 2) if quick else (200_000, 8)
    with bench(partitions) as it:
        for number in range(partitions):
            store(it.log, it.app.app, number, entry_count)
        with it.member("one") as one, it.member("two") as two, it.loaded():
            it.shared(one, two)
            again = _takeover(it, two, two.start)
            it.shared(one, two)
            gone = _takeover(it, two, lambda **_: None)
    what = "median time between two commits of a partition before"
    return [
        at_most(f"Kafka: kill -9 of one of two, {name}", Figure(took_s, "s"), Figure(calm_s, "s", what), most_s)
        for name, (took_s, calm_s), most_s in (
            ("it is started again at once", again, 4),
            ("a standby takes over", gone, 10),
        )
    ]


def _takeover(it: Bench, role: Role, then: Callable[..., None]) -> tuple[float, float]:
    """Kill a worker; return after how many seconds its partitions have all committed again, and their usual interval."""
    since = it.ends()
    it.flowing(since, 2)
    held = [found["partition"] for found in status(role)["partitions"]]
    commits = it.commits(since)
    calm_ms = statistics.median(b - a for number in held for a, b in pairwise(commits[number]))
    killed_ms = it.now_ms()
    role.kill()
    then(wait_ready=False)
    ended = it.ends()  # by then its last commit is there, or will never be
    for number in held:
        wait_until(lambda number=number: it.commits(ended)[number], f"partition {number} to fold", _WAIT_S)
    return (max(min(it.commits(ended)[number]) for number in held) - killed_ms) / 1000, calm_ms / 1000
