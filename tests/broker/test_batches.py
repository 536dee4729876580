"""A commit's messages in one call of librdkafka: what a consumer reads, and every error, are as if produced one by one."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka import Message as Read

import pipeline.adapters.kafka.transaction as transaction_module
from pipeline import native
from pipeline.adapters.kafka import batches
from pipeline.errors import Fenced, Invalid, Unavailable
from pipeline.ports import Message
from tests.broker.mock import INIT_PRODUCER_ID, MockCluster, address, begun, one_by_one, three
from tests.contracts.support import threads

COUNT = 25_000
"""More than the native core gives to librdkafka in one call."""


@pytest.fixture
def mock() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create("deltas", 4)
        yield cluster


@pytest.fixture(params=["at once", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have messages produced in one of the two ways, and return its name."""
    if request.param == "one by one":
        monkeypatch.setattr(transaction_module, "new_producer", one_by_one)
    elif not batches.are_in_use({}):
        pytest.skip(batches.describe({}))
    return str(request.param)


@pytest.fixture
def at_once() -> None:
    """Skip the test where messages are never produced in one call."""
    if not batches.are_in_use({}):
        pytest.skip(batches.describe({}))


def read(mock: MockCluster, count: int, partition: int = 0) -> list[Read]:
    """Return the first `count` records of a partition."""
    consumer = Consumer({"bootstrap.servers": mock.bootstrap, "group.id": "g", "fetch.wait.max.ms": 10})
    try:
        consumer.assign([TopicPartition("deltas", partition, 0)])
        found: list[Read] = []
        deadline_s = time.monotonic() + 20
        while len(found) < count:
            assert time.monotonic() < deadline_s
            found += consumer.consume(count - len(found), 0.5)
        return found
    finally:
        consumer.close()


def numbered(count: int, partition: int = 0) -> list[Message]:
    return [Message("deltas", partition, b"k%d" % number, b"v%d" % number * (number % 9)) for number in range(count)]


def test_consumers_read_the_same(mock: MockCluster, way: str) -> None:
    """Keys, values, no headers, and the time of the call, in the order of the commit; none, empty and large ones too."""
    some = [None, b"", b"\x00", b"\xff" * 9, bytes(range(256)) * 400]
    odd = [Message("deltas", 0, key, value) for key in some for value in some]
    transaction = begun(mock)
    before_ms = int(time.time() * 1000)
    covering = transaction.commit([*odd, *numbered(COUNT)], timeout_s=30)
    after_ms = int(time.time() * 1000)
    transaction.close()
    assert covering == [len(odd) + COUNT] * (len(odd) + COUNT)
    found = read(mock, len(odd) + COUNT)
    assert [(it.key(), it.value()) for it in found] == [(it.key, it.value) for it in [*odd, *numbered(COUNT)]]
    assert {it.headers() is None for it in found} == {True}
    kinds, times = zip(*(it.timestamp() for it in found), strict=True)
    assert set(kinds) == {1}, "the time of the producer"
    assert before_ms <= min(times) <= max(times) <= after_ms


def test_a_full_queue_is_waited_for(mock: MockCluster, way: str) -> None:
    """A commit that is larger than librdkafka's queue goes on where the queue was full: nothing is left out or twice."""
    transaction = begun(mock, **{"queue.buffering.max.messages": 700, "linger.ms": 1})
    assert set(transaction.commit(numbered(5_000), timeout_s=30)) == {5_000}
    assert [(it.key, it.value) for it in numbered(5_000)] == [(it.key(), it.value()) for it in read(mock, 5_000)]
    transaction.close()


def test_a_queue_that_stays_full_is_unavailable(mock: MockCluster, way: str) -> None:
    """A queue that is full until the deadline aborts the commit, and says so, or that the abort, too, had no time."""
    transaction = begun(mock, **{"queue.buffering.max.messages": 2, "linger.ms": 900})
    with pytest.raises(Unavailable, match=r"librdkafka's queue stays full|abort of transaction t-0 is undecided"):
        transaction.commit(numbered(5_000), timeout_s=0.1)
    transaction.close()


def test_a_message_that_is_too_large_is_invalid(mock: MockCluster, way: str) -> None:
    """A message that librdkafka refuses ends the commit with advice, wherever it stands; the transaction goes on."""
    transaction = begun(mock, **{"message.max.bytes": 2_000})
    for place in (0, 1, 1_500, 1_999):
        messages = numbered(2_000)
        messages[place] = Message("deltas", 0, b"k", b"x" * 3_000)
        refused = r"produce of transaction t-0: Unable to produce message: .*MSG_SIZE_TOO_LARGE.*raise max.message.bytes"
        with pytest.raises(Invalid, match=refused):
            transaction.commit(messages, timeout_s=10)
        transaction._over = None
    first = transaction.commit(three(), timeout_s=10)[0]
    assert [it.value() for it in read(mock, first)[-3:]] == [b"0", b"1", b"2"]
    transaction.close()


def test_several_producers_at_once(mock: MockCluster, way: str) -> None:
    """Each transaction of a process writes by its own producer, also after others have been closed and opened anew."""
    names = [f"t-{partition}" for partition in range(4)]
    opened = [begun(mock, name) for name in names]

    def commit(partition: int) -> None:
        for _ in range(3):
            assert len(opened[partition].commit(numbered(2_000, partition), timeout_s=30)) == 2_000

    for _ in range(2):
        with threads(*(lambda partition=partition: commit(partition) for partition in range(4))):  # type: ignore[misc]
            pass
        opened[0].close()
        opened[0] = begun(mock, names[0])
        opened[3].close()
        opened[3] = begun(mock, names[3])
    for partition in range(4):
        assert {it.value() for it in read(mock, 12_000, partition)} == {it.value for it in numbered(2_000)}
        opened[partition].close()


def test_a_closed_transaction_is_fenced(mock: MockCluster, way: str) -> None:
    """A closed transaction takes nothing more."""
    transaction = begun(mock)
    transaction.commit(three(), timeout_s=10)
    transaction.close()
    with pytest.raises(Fenced, match="closed"):
        transaction.commit(three(), timeout_s=10)


def test_a_transaction_that_is_dropped_is_freed(mock: MockCluster, at_once: None) -> None:
    """A transaction that nobody closed is freed, with its producer and that producer's threads."""
    transaction = begun(mock)
    transaction.commit(three(), timeout_s=10)
    assert transaction._batches is not None
    left = weakref.ref(transaction)
    del transaction
    gc.collect()
    assert left() is None


def in_transaction(mock: MockCluster, options: Any = ()) -> tuple[Producer, Any]:
    made, native_one = batches.new_producer(
        {"bootstrap.servers": mock.bootstrap, "transactional.id": "t", "log_level": 0, **dict(options)}
    )
    assert native_one is not None
    made.init_transactions(10)
    return made, native_one


def test_errors_have_the_codes_of_produce(mock: MockCluster, at_once: None) -> None:
    """Outside a transaction, at an unknown partition, and after a fatal error both calls give the same code."""
    producer, several = in_transaction(mock)

    def codes(partition: int) -> tuple[int, int]:
        with pytest.raises(KafkaException) as caught:
            producer.produce("deltas", b"v", b"k", partition)
        number, code = several.produce("deltas", partition, [b"k"] * 3, [b"v"] * 3, 0, 3)
        assert number == 0
        return caught.value.args[0].code(), code

    assert codes(0) == (KafkaError._STATE, KafkaError._STATE)
    producer.list_topics("deltas", 10)
    producer.begin_transaction()
    producer.produce("deltas", b"v", b"k", 0)
    producer.flush(10)
    assert codes(9) == (KafkaError._UNKNOWN_PARTITION, KafkaError._UNKNOWN_PARTITION)
    producer.abort_transaction(10)
    mock.fail(INIT_PRODUCER_ID, KafkaError.CLUSTER_AUTHORIZATION_FAILED)
    fatal, several = batches.new_producer({**address_of(mock), "transactional.id": "u", "log_level": 0})
    producer = fatal
    with pytest.raises(KafkaException):
        fatal.init_transactions(10)
    one, other = codes(0)
    assert one == other == KafkaError._FATAL


def address_of(mock: MockCluster) -> dict[str, Any]:
    return {"bootstrap.servers": address(mock).bootstrap}


def test_bad_messages_are_refused(mock: MockCluster, at_once: None) -> None:
    """Columns of unequal length, keys that are no bytes, and a topic with NUL raise before anything is enqueued."""
    producer, several = in_transaction(mock)
    producer.begin_transaction()
    one = [b"k"], [b"v"]
    for (keys, values), topic, error in (
        ((["text"], [b"v"]), "deltas", TypeError),
        (([b"k"], [bytearray(b"v")]), "deltas", TypeError),
        ((b"k", [b"v"]), "deltas", TypeError),
        (({0: b"k"}, [b"v"]), "deltas", TypeError),
        (([b"k"], []), "deltas", IndexError),
        (one, "del\x00tas", ValueError),
        (one, "x" * 600, None),
    ):
        if error is None:
            assert several.produce(topic, 0, keys, values, 0, 1) == (0, KafkaError._INVALID_ARG)
        else:
            with pytest.raises(error):
                several.produce(topic, 0, keys, values, 0, 1)
    assert several.produce("deltas", 0, *one, 1, 1) == (1, 0)
    assert len(producer) == 0


# Where it can't be


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Have this process find out anew what it can do, before the test and after it."""
    batches._found.cache_clear()
    yield
    batches._found.cache_clear()


def lacks_function(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(batches, "_FUNCTIONS", ("rd_kafka_no_such_function",))
    return {}


def is_another_version(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(batches, "libversion", lambda: ("3.0.0", 0x030000FF))
    return {}


def loads_no_plugin(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(native.extension(), "__file__", "/no/such/file.so")
    return {}


def is_another_file(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    class Deaf:
        """An extension that is told of nothing, as one that was loaded twice is."""

        expect = staticmethod(lambda *_: None)
        of = staticmethod(lambda _: None)

    monkeypatch.setattr(native.extension(), "BatchProducer", Deaf)
    native.extension().BatchProducer.expect()
    return {}


def has_plugins_of_its_own(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"plugin.library.paths": ""}


@pytest.mark.parametrize(
    ("why", "said"),
    [
        (lacks_function, "functions are not found"),
        (is_another_version, "librdkafka has version 3.0.0"),
        (loads_no_plugin, "can't load the native core.*no/such/file"),
        (is_another_file, "did not tell the native core of a client"),
        (has_plugins_of_its_own, "the setting kafka has plugin.library.paths"),
    ],
)
def test_without_it_commits_go_one_by_one(
    mock: MockCluster,
    at_once: None,
    forgotten: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: Callable[[pytest.MonkeyPatch], dict[str, Any]],
    said: str,
) -> None:
    """Commits work where messages can't be produced in one call; one log line says why, and `require` is an error."""
    caplog.set_level(logging.INFO, batches.__name__)
    options = why(monkeypatch)
    for _ in range(2):
        transaction = begun(mock, **options)
        assert transaction._batches is None
        assert len(set(transaction.commit(three(), timeout_s=10))) == 1
        transaction.close()
    (record,) = caplog.records
    assert f"{said}".split(".*")[0] in record.getMessage()
    assert not batches.are_in_use(options)
    assert "one by one" in batches.describe(options)
    batches._found.cache_clear()
    monkeypatch.setenv(native.VARIABLE, "require")
    with pytest.raises(Invalid, match=f"{said}.*PIPELINE_NATIVE=require: "):
        begun(mock, **options)
