"""A publisher on Kafka while its broker is stopped, killed, or not there yet: nothing lost, nothing counted twice."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import NewPartitions

from pipeline import BufferFull, Publisher, Unavailable
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.options import parse_url
from pipeline.adapters.kafka.writer import KafkaLogWriter
from pipeline.ports import Message
from tests.broker.kafka import App, Broker, admin_client, create_topics, new_app
from tests.broker.log import fold, raw_records
from tests.contracts.support import threads
from tests.support import ROOT, environment

QUICK = {"flush_interval_ms": 10, "request_timeout_ms": 1_000, "metadata_refresh_ms": 200, "retry_backoff_max_ms": 100}
PARTITIONS = 3


@pytest.fixture(scope="module")
def shared(kafka_jars: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker that tests stop and start again; it runs when a test ends."""
    with Broker(tmp_path_factory.mktemp("kafka")) as own:
        yield own


@pytest.fixture
def own(shared: Broker) -> Iterator[App]:
    """Fresh topics on the shared broker."""
    fresh = new_app(shared.bootstrap)
    create_topics(shared.bootstrap, fresh.app, PARTITIONS)
    yield fresh
    if not shared.running:
        shared.start()
    shared.resume()


def add(publisher: Publisher, expected: Counter[tuple[str, ...]], count: int, first: int = 0) -> None:
    """Record `count` additions over a few series."""
    view = publisher.sum("sales", labels=("key",))
    for number in range(first, first + count):
        view.add(number, key=f"k{number % 40}")
        expected["sales", f"k{number % 40}"] += number


@pytest.mark.parametrize("how", ["paused", pytest.param("killed", marks=pytest.mark.long)])
def test_a_broker_that_is_away(shared: Broker, own: App, how: str) -> None:
    """Batches that timed out go again with their numbers, in order; few copies, however often they were tried."""
    expected: Counter[tuple[str, ...]] = Counter()
    with Publisher(own.url, **QUICK) as publisher:
        add(publisher, expected, 500)
        publisher.flush()
        (shared.pause if how == "paused" else shared.kill)()
        add(publisher, expected, 500, 500)
        with pytest.raises(
            Unavailable, match=r"not acknowledged within 3.5 s: \d+ batches .*wait; .*(timed out|no broker|_)"
        ):
            publisher.flush(3.5)
        add(publisher, expected, 500, 1_000)
        (shared.resume if how == "paused" else shared.start)()
        publisher.flush(30)
        add(publisher, expected, 500, 1_500)
        publisher.flush(30)
    folding = fold(raw_records(own.bootstrap, own.topic("deltas")))
    assert folding.totals == expected
    assert folding.in_order
    assert max(folding.copies.values()) <= 2
    assert sum(folding.copies.values()) <= 2 * len(folding.copies)


def test_the_account_holds_while_the_broker_is_away(shared: Broker, own: App) -> None:
    """At the memory limit each `on_full` policy holds, memory stays below it, and all accepted deltas arrive."""
    expected: Counter[tuple[str, ...]] = Counter()
    small = {**QUICK, "buffer_bytes_max": 200_000, "batch_bytes_max": 2_048}
    full = [
        Publisher(own.url, **small, on_full="raise"),
        Publisher(own.url, **small, on_full="block", block_timeout_ms=300),
        Publisher(own.url, **small, on_full="drop_newest"),
    ]
    for number, publisher in enumerate(full):
        publisher.sum("sales", labels=("key",)).add(1, key=f"{number}-first")
        expected["sales", f"{number}-first"] += 1
        publisher.flush()
    shared.pause()
    for number, publisher in enumerate(full):
        view = publisher.sum("sales", labels=("key",))
        started_s = time.monotonic()
        for added in range(3_000):
            key = f"{number}-{'x' * 50}-{added}"
            try:
                view.add(1, key=key)
            except BufferFull:
                assert number < 2
                break
            expected["sales", key] += 1
        else:
            assert number == 2, "policies that raise, did not"
        assert publisher.stats()["buffer_bytes"] <= 200_000
        if number == 1:
            assert time.monotonic() - started_s >= 0.3
    shared.resume()
    for publisher in full:
        publisher.close(30)
    totals = fold(raw_records(own.bootstrap, own.topic("deltas"))).totals
    dropped = expected - totals
    assert totals - expected == Counter(), "nothing twice"
    assert dropped, "drop_newest dropped something"
    assert all(key.startswith("2-x") for _, key in dropped), "only what was dropped by policy is missing"


@pytest.mark.parametrize("how", [pytest.param("stopped", marks=pytest.mark.long), "killed"])
def test_who_is_blocked_goes_on(shared: Broker, own: App, how: str) -> None:
    """With `block` callers wait for the broker's return, with `raise` they get an error. Accepted deltas arrive once."""
    expected: Counter[tuple[str, ...]] = Counter()
    small = {**QUICK, "buffer_bytes_max": 200_000, "batch_bytes_max": 2_048}
    refused = 0
    blocked = threading.Event()
    with (
        Publisher(own.url, **small, on_full="block", block_timeout_ms=60_000) as waits,
        Publisher(own.url, **small, on_full="raise") as tells,
    ):
        views = [it.sum("sales", labels=("key",)) for it in (waits, tells)]
        for view in views:
            view.add(1, key="first")
        for publisher in (waits, tells):
            publisher.flush()
        if how == "stopped":
            shared.pause()
        else:
            shared.kill()

        def record() -> None:
            for added in range(3_000):
                views[0].add(1, key=f"{'x' * 50}-{added}")
            blocked.set()

        thread = threading.Thread(target=record, daemon=True)
        thread.start()
        for added in range(3_000):
            try:
                views[1].add(1, key=f"{'y' * 50}-{added}")
                expected["sales", f"{'y' * 50}-{added}"] += 1
            except BufferFull:
                refused += 1
        assert refused
        assert not blocked.wait(1), "nobody was blocked"
        if how == "stopped":
            shared.resume()
        else:
            shared.start()
        thread.join(60)
        assert blocked.is_set()
        for publisher in (waits, tells):
            publisher.flush(timeout_s=60)
        views[1].add(1, key="last")
        expected["sales", "last"] = 1
    expected.update({("sales", f"{'x' * 50}-{added}"): 1 for added in range(3_000)})
    expected["sales", "first"] += 2
    assert fold(raw_records(own.bootstrap, own.topic("deltas"))).totals == expected


def test_close_keeps_its_time(shared: Broker, own: App) -> None:
    """With the broker away, close ends when it said it would, and says what was lost."""
    publisher = Publisher(own.url, **QUICK)
    publisher.sum("sales", labels=("key",)).add(1, key="a")
    publisher.flush()
    shared.pause()
    publisher.sum("sales", labels=("key",)).add(1, key="a")
    started_s = time.monotonic()
    with pytest.raises(Unavailable, match="not acknowledged within 1"):
        publisher.close(1)
    assert time.monotonic() - started_s < 60


@pytest.mark.long
def test_a_broker_that_comes_later(kafka_jars: Path, tmp_path: Path) -> None:
    """A publisher can be first: the broker and its topics come later, and everything arrives."""
    broker = Broker(tmp_path / "kafka")
    expected: Counter[tuple[str, ...]] = Counter()
    try:
        publisher = Publisher(f"kafka://{broker.bootstrap}/a", **QUICK)
        add(publisher, expected, 100)
        with pytest.raises(Unavailable, match=f"no broker answers at {broker.bootstrap}.*check the address"):
            publisher.flush(1.5)
        bootstrap = broker.bootstrap
        broker.start()
        assert broker.bootstrap == bootstrap
        with pytest.raises(Unavailable, match=r"there is no topic a\.deltas.*pipeline topics apply --to kafka://"):
            publisher.flush(1.5)
        create_topics(broker.bootstrap, "a", 2)
        publisher.close(30)
        assert fold(raw_records(broker.bootstrap, "a.deltas")).totals == expected
    finally:
        broker.close()


def test_new_partitions_are_used(shared: Broker, own: App) -> None:
    """A topic that grows gets new batches for its new partitions, soon; old batches keep theirs."""
    expected: Counter[tuple[str, ...]] = Counter()
    with Publisher(own.url, **QUICK) as publisher:
        add(publisher, expected, 200)
        publisher.flush()
        admin = admin_client(own.bootstrap)
        for grown in admin.create_partitions([NewPartitions(own.topic("deltas"), 7)]).values():
            grown.result(30)
        deadline_s = time.monotonic() + 60
        while max(record.partition for record in raw_records(own.bootstrap, own.topic("deltas"))) < PARTITIONS:
            assert time.monotonic() < deadline_s
            add(publisher, expected, 200)
            publisher.flush()
    assert fold(raw_records(own.bootstrap, own.topic("deltas"))).totals == expected


def test_two_publishers_and_many_threads(shared: Broker, own: App) -> None:
    """16 threads on two publishers of one process, and the broker stops in between: every addition counts once."""
    publishers = [Publisher(own.url, **QUICK) for _ in range(2)]

    def record(name: int) -> None:
        view = publishers[name % 2].sum("sales", labels=("key",))
        for number in range(600):
            view.add(1, key=f"k{number % 20}")
            if number % 200 == 199:
                publishers[name % 2].flush(40)

    with threads(*(lambda name=name: record(name) for name in range(16))):  # type: ignore[misc]
        time.sleep(0.1)
        shared.pause()
        time.sleep(2.5)
        shared.resume()
    for publisher in publishers:
        publisher.close()
    folding = fold(raw_records(own.bootstrap, own.topic("deltas")))
    assert folding.totals == Counter({("sales", f"k{number}"): 16 * 30 for number in range(20)})
    assert len({producer for producer, _, _ in folding.copies}) == 2


def test_concurrent_appends(shared: Broker, own: App) -> None:
    """Acknowledged records of 16 threads that append by one writer are in the log, though the broker stopped meanwhile."""
    writer = KafkaLogWriter(parse_url(own.url), {}, SystemClock(), timeout_ms=1_000, metadata_refresh_ms=200)
    acknowledged: list[tuple[int, int, bytes]] = []
    tried: Counter[bytes] = Counter()

    def append(name: int) -> None:
        for number in range(40):
            value = b"%d-%d" % (name, number)
            partition = number % PARTITIONS
            while True:
                tried[value] += 1
                (result,) = writer.append([Message("deltas", partition, None, value)], timeout_s=1)
                if isinstance(result, int):
                    acknowledged.append((partition, result, value))
                    break
                assert isinstance(result, Unavailable)
            time.sleep(0.01)

    with threads(*(lambda name=name: append(name) for name in range(16))):  # type: ignore[misc]
        time.sleep(0.1)
        shared.pause()
        time.sleep(2.5)
        shared.resume()
    writer.close()
    there = {
        (record.partition, record.offset + 1): record.value for record in raw_records(own.bootstrap, own.topic("deltas"))
    }
    assert len(acknowledged) == 640
    assert all(there[partition, covers] == value for partition, covers, value in acknowledged)
    assert all(count <= tried[value or b""] for value, count in Counter(there.values()).items())


FORK = """
import os, sys
from pipeline import Publisher
publisher = Publisher(sys.argv[1], flush_interval_ms=10)
view = publisher.sum("sales", labels=("key",))
view.add(1, key="parent")
publisher.flush()
view.add(10, key="parent")  # not flushed when the child is made: the parent's to send
child = os.fork()
view.add(100, key="child" if child == 0 else "parent")
if child == 0:
    if sys.argv[2] == "flush":
        publisher.flush()
    sys.exit(0)
pid, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("how", ["flush", "exit"])
def test_forks_and_exits(shared: Broker, own: App, how: str) -> None:
    """A child publishes by itself after a fork; both ends flush when the interpreter exits, and none hangs."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, own.url, how], env=environment(), cwd=ROOT, timeout=40, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    folding = fold(raw_records(own.bootstrap, own.topic("deltas")))
    assert folding.totals == Counter({("sales", "parent"): 111, ("sales", "child"): 100})
    assert len({producer for producer, _, _ in folding.copies}) == 2


AWAY = """
import sys
from pipeline import Publisher
publisher = Publisher(sys.argv[1], flush_interval_ms=10, close_timeout_ms=1500, request_timeout_ms=1000)
publisher.sum("sales", labels=("key",)).add(1, key="a")
publisher.flush()
print("ready", flush=True)
sys.stdin.readline()
publisher.sum("sales", labels=("key",)).add(1, key="a")
"""


def test_an_exit_while_the_broker_is_away(shared: Broker, own: App) -> None:
    """The interpreter ends after `close_timeout_ms` and little more, and says what was lost."""
    with subprocess.Popen(
        [sys.executable, "-c", AWAY, own.url],
        env=environment(),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            shared.pause()
            started_s = time.monotonic()
            _, errors = process.communicate(b"\n", timeout=90)
            assert time.monotonic() - started_s < 60
            assert b"not acknowledged within 1.5 s" in errors
        finally:
            process.kill()
