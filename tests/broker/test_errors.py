"""Decisions on Kafka's errors: the table is whole, and each decision holds with librdkafka as it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from confluent_kafka import KafkaError

import pipeline.adapters.kafka.transaction as transaction_module
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.errors import CODES, Verdict, code_of, describe, translate, verdict_of
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.metadata import _Known
from pipeline.adapters.kafka.options import reader_options
from pipeline.adapters.kafka.writer import KafkaLogWriter
from pipeline.errors import Discontinuous, Displaced, Fenced, Invalid, PipelineError, Unavailable
from pipeline.settings import KafkaSettings
from tests.broker.mock import (
    ADD_PARTITIONS,
    END_TXN,
    FETCH,
    FIND_COORDINATOR,
    INIT_PRODUCER_ID,
    LIST_OFFSETS,
    PRODUCE,
    MockCluster,
    address,
    begun,
    one_by_one,
    reader_of,
    three,
)

NOT_OURS = frozenset(
    [
        "DELEGATION_TOKEN_AUTHORIZATION_FAILED",
        "DELEGATION_TOKEN_AUTH_DISABLED",
        "DELEGATION_TOKEN_EXPIRED",
        "DELEGATION_TOKEN_NOT_FOUND",
        "DELEGATION_TOKEN_OWNER_MISMATCH",
        "DELEGATION_TOKEN_REQUEST_NOT_ALLOWED",
        "DUPLICATE_RESOURCE",
        "DUPLICATE_VOTER",
        "ELECTION_NOT_NEEDED",
        "FEATURE_UPDATE_FAILED",
        "FENCED_INSTANCE_ID",
        "FENCED_MEMBER_EPOCH",
        "FENCED_STATE_EPOCH",
        "FETCH_SESSION_ID_NOT_FOUND",
        "GROUP_ID_NOT_FOUND",
        "GROUP_MAX_SIZE_REACHED",
        "GROUP_SUBSCRIBED_TO_TOPIC",
        "ILLEGAL_GENERATION",
        "INCONSISTENT_GROUP_PROTOCOL",
        "INCONSISTENT_VOTER_SET",
        "INVALID_COMMIT_OFFSET_SIZE",
        "INVALID_FETCH_SESSION_EPOCH",
        "INVALID_GROUP_ID",
        "INVALID_PRINCIPAL_TYPE",
        "INVALID_RECORD_STATE",
        "INVALID_REGISTRATION",
        "INVALID_REGULAR_EXPRESSION",
        "INVALID_REPLICA_ASSIGNMENT",
        "INVALID_SESSION_TIMEOUT",
        "INVALID_SHARE_SESSION_EPOCH",
        "INVALID_UPDATE_VERSION",
        "INVALID_VOTER_KEY",
        "LOG_DIR_NOT_FOUND",
        "MEMBER_ID_REQUIRED",
        "MISMATCHED_ENDPOINT_TYPE",
        "NON_EMPTY_GROUP",
        "NO_REASSIGNMENT_IN_PROGRESS",
        "OFFSET_METADATA_TOO_LARGE",
        "PREFERRED_LEADER_NOT_AVAILABLE",
        "REASSIGNMENT_IN_PROGRESS",
        "REBALANCE_IN_PROGRESS",
        "RESOURCE_NOT_FOUND",
        "SHARE_SESSION_LIMIT_REACHED",
        "SHARE_SESSION_NOT_FOUND",
        "STALE_BROKER_EPOCH",
        "STALE_CTRL_EPOCH",
        "STALE_MEMBER_EPOCH",
        "STREAMS_INVALID_TOPOLOGY",
        "STREAMS_INVALID_TOPOLOGY_EPOCH",
        "STREAMS_TOPOLOGY_FENCED",
        "TELEMETRY_TOO_LARGE",
        "TOPIC_ALREADY_EXISTS",
        "TOPIC_DELETION_DISABLED",
        "UNACCEPTABLE_CREDENTIAL",
        "UNKNOWN_CONTROLLER_ID",
        "UNKNOWN_MEMBER_ID",
        "UNKNOWN_SUBSCRIPTION_ID",
        "UNRELEASED_INSTANCE_ID",
        "UNSUPPORTED_ASSIGNOR",
        "UNSUPPORTED_ENDPOINT_TYPE",
        "VOTER_NOT_FOUND",
        "_APPLICATION",
        "_ASSIGNMENT_LOST",
        "_ASSIGN_PARTITIONS",
        "_EXISTING_SUBSCRIPTION",
        "_GAPLESS_GUARANTEE",
        "_INVALID_DIFFERENT_RECORD",
        "_ISR_INSUFF",
        "_KEY_DESERIALIZATION",
        "_KEY_SERIALIZATION",
        "_MAX_POLL_EXCEEDED",
        "_NODE_UPDATE",
        "_NOOP",
        "_NO_OFFSET",
        "_OUTDATED",
        "_PARTIAL",
        "_REVOKE_PARTITIONS",
        "_UNKNOWN_GROUP",
        "_VALUE_DESERIALIZATION",
        "_VALUE_SERIALIZATION",
    ]
)
"""Codes of requests that we don't make: groups with members, share groups, streams, tokens, voters, reassignments."""

ELSEWHERE = frozenset(
    [
        "NO_ERROR",
        "OFFSET_OUT_OF_RANGE",
        "_AUTO_OFFSET_RESET",
        "_FATAL",
        "_LOG_TRUNCATION",
        "_PARTITION_EOF",
        "DUPLICATE_SEQUENCE_NUMBER",
    ]
)
"""Codes that are handled where they can come, without the table."""

BUGS = frozenset(
    [
        "INVALID_MSG_SIZE",
        "INVALID_REQUEST",
        "INVALID_TXN_STATE",
        "OPERATION_NOT_ATTEMPTED",
        "PRINCIPAL_DESERIALIZATION_FAILURE",
        "UNKNOWN",
        "_BAD_COMPRESSION",
        "_CONFLICT",
        "_CRIT_SYS_RESOURCE",
        "_DESTROY",
        "_FAIL",
        "_FS",
        "_INCONSISTENT",
        "_INTR",
        "_INVALID_ARG",
        "_INVALID_TYPE",
        "_NOT_CONFIGURED",
        "_NOT_IMPLEMENTED",
        "_READ_ONLY",
        "_STATE",
        "_UNDERFLOW",
        "_UNKNOWN_BROKER",
        "_UNKNOWN_PROTOCOL",
    ]
)
"""Codes for faults of a client or broker that are not foreseen: the process ends and begins again at the last commit."""


def code(name: str) -> int:
    number: int = getattr(KafkaError, name)
    return number


def test_the_table_knows_every_code() -> None:
    """Every code of librdkafka is in the table or a list here, so that a new one is noticed; each row has a code."""
    all_codes = {name for name in dir(KafkaError) if name.upper() == name and isinstance(getattr(KafkaError, name), int)}
    sorted_ones = [CODES.keys(), NOT_OURS, ELSEWHERE, BUGS]
    assert sum(map(len, sorted_ones)) == len(all_codes)
    assert set().union(*sorted_ones) == all_codes


def test_what_is_in_no_table_is_fatal() -> None:
    """A code without a row ends the process, unless librdkafka calls it retriable."""
    for name in BUGS | NOT_OURS:
        assert verdict_of(KafkaError(code(name))) is Verdict.FATAL
        assert type(translate(KafkaError(code(name)), "it")) is PipelineError
    assert verdict_of(KafkaError(code("UNKNOWN"), retriable=True)) is Verdict.RETRY
    assert code_of(KafkaError(code("UNKNOWN"), retriable=True)).verdict is Verdict.RETRY


def test_librdkafka_knows_best() -> None:
    """An error's own flags come before the table; fatal comes first, and keeps its reason if there is one."""
    retry = code("NOT_COORDINATOR")
    assert verdict_of(KafkaError(retry)) is Verdict.RETRY
    assert verdict_of(KafkaError(retry, txn_requires_abort=True)) is Verdict.ABORT
    assert verdict_of(KafkaError(retry, fatal=True, retriable=True, txn_requires_abort=True)) is Verdict.FATAL
    assert verdict_of(KafkaError(code("MSG_SIZE_TOO_LARGE"), retriable=True)) is Verdict.RETRY
    assert verdict_of(KafkaError(code("_FENCED"), fatal=True)) is Verdict.FENCED
    assert verdict_of(KafkaError(code("INVALID_TRANSACTION_TIMEOUT"), fatal=True)) is Verdict.OPERATOR


def test_every_error_has_words() -> None:
    """Each row's error names the action, the code and the advice, and its class says what the caller must do."""
    classes = {
        Verdict.RETRY: Unavailable,
        Verdict.ABORT: Unavailable,
        Verdict.FENCED: Fenced,
        Verdict.MESSAGE: Invalid,
        Verdict.OPERATOR: Invalid,
    }
    for name, row in CODES.items():
        error = translate(KafkaError(code(name)), "what was tried")
        assert type(error) is classes[row.verdict]
        assert str(error).startswith("what was tried: ")
        assert f"({name})" in str(error)
        assert str(error).endswith(row.advice)
        assert row.source.startswith("["), "where the decision comes from"
    assert "Broker: " not in describe(KafkaError(code("NOT_COORDINATOR")), "it")


# With librdkafka's mock cluster


@pytest.fixture
def mock() -> Iterator[MockCluster]:
    with MockCluster() as cluster:
        cluster.create("deltas", 1)
        yield cluster


@pytest.fixture(autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transactions produce their messages as they do by themselves, or one by one."""
    if getattr(request, "param", "") == "one by one":
        monkeypatch.setattr(transaction_module, "new_producer", one_by_one)


BOTH_WAYS = pytest.mark.parametrize("way", ["at once", "one by one"], indirect=True)
IN_LONG_RUNS_BOTH_WAYS = pytest.mark.parametrize(
    "way", ["at once", pytest.param("one by one", marks=pytest.mark.long)], indirect=True
)


def ends(mock: MockCluster, run: Callable[[], object]) -> list[int]:
    """Return the transactional requests that `run` made."""
    before = len(mock.requests())
    run()
    ours = (PRODUCE, ADD_PARTITIONS, END_TXN, INIT_PRODUCER_ID)
    return [kind for kind in mock.requests()[before:] if kind in ours]


ONCE = [ADD_PARTITIONS, PRODUCE, END_TXN]

RESUMED = [
    (ADD_PARTITIONS, "COORDINATOR_LOAD_IN_PROGRESS"),
    (ADD_PARTITIONS, "NOT_COORDINATOR"),
    (ADD_PARTITIONS, "CONCURRENT_TRANSACTIONS"),
    (ADD_PARTITIONS, "_TRANSPORT"),
    (PRODUCE, "NOT_LEADER_FOR_PARTITION"),
    (PRODUCE, "NOT_ENOUGH_REPLICAS"),
    (PRODUCE, "REQUEST_TIMED_OUT"),
    (PRODUCE, "KAFKA_STORAGE_ERROR"),
    (END_TXN, "COORDINATOR_LOAD_IN_PROGRESS"),
    (END_TXN, "NOT_COORDINATOR"),
    (END_TXN, "CONCURRENT_TRANSACTIONS"),
    (END_TXN, "_TRANSPORT"),
]


@IN_LONG_RUNS_BOTH_WAYS
@pytest.mark.parametrize(("request_", "name"), RESUMED)
def test_a_commit_goes_on_after_what_passes(mock: MockCluster, request_: int, name: str) -> None:
    """Only the request that failed is made again, and the offsets are right."""
    transaction = begun(mock)
    mock.fail(request_, code(name))
    results: list[list[int]] = []
    made = ends(mock, lambda: results.append(transaction.commit(three(), timeout_s=10)))
    assert results == [[3, 3, 3]]
    assert made == [kind for kind in ONCE for _ in range(2 if kind == request_ else 1)]
    transaction.close()


ABORTED = [
    (ADD_PARTITIONS, "TRANSACTION_ABORTABLE"),
    (ADD_PARTITIONS, "INVALID_PRODUCER_ID_MAPPING"),
    (ADD_PARTITIONS, "UNKNOWN"),
    (PRODUCE, "TRANSACTION_ABORTABLE"),
    (PRODUCE, "INVALID_PRODUCER_ID_MAPPING"),
    (PRODUCE, "UNKNOWN_PRODUCER_ID"),
    (PRODUCE, "UNKNOWN"),
    (END_TXN, "TRANSACTION_ABORTABLE"),
    (END_TXN, "OUT_OF_ORDER_SEQUENCE_NUMBER"),
    (END_TXN, "INVALID_PRODUCER_ID_MAPPING"),
    (END_TXN, "REQUEST_TIMED_OUT"),
]


@IN_LONG_RUNS_BOTH_WAYS
@pytest.mark.parametrize(("request_", "name"), ABORTED)
def test_what_is_aborted_is_done_again(mock: MockCluster, request_: int, name: str) -> None:
    """The transaction is aborted, then all of it is done again: one more end of a transaction than without the error."""
    transaction = begun(mock)
    mock.fail(request_, code(name))
    results: list[list[int]] = []
    made = ends(mock, lambda: results.append(transaction.commit(three(), timeout_s=10)))
    (offsets,) = results
    assert len(set(offsets)) == 1
    assert offsets[0] >= 3
    assert made[-3:] == ONCE
    assert made.count(END_TXN) >= 2
    assert transaction.commit(three(), timeout_s=10)[0] >= offsets[0] + 3
    transaction.close()


PLACE = ("deltas", 0)


@BOTH_WAYS
def test_a_marker_that_is_left_out(mock: MockCluster) -> None:
    """A commit that stands where the marker of the last one should be is aborted, and its owner has to look.

    The mock leaves none out: the transaction is told that its last one ended behind its marker.
    """
    transaction = begun(mock)
    assert transaction.commit(three(), timeout_s=10, begins={PLACE: 0}) == [3, 3, 3]
    transaction._ends = {PLACE: 4}
    with pytest.raises(Displaced, match="left out the marker of the last transaction in deltas-0"):
        transaction.commit(three(), timeout_s=10, begins={PLACE: 5})
    with pytest.raises(Discontinuous, match="went back from 1000 to 8"):
        transaction.commit(three(), timeout_s=10, begins={PLACE: 1_000})
    transaction.close()


@IN_LONG_RUNS_BOTH_WAYS
@pytest.mark.parametrize(("request_", "name"), [ABORTED[0], ABORTED[3], ABORTED[7]])
def test_an_aborted_commit_with_a_place_is_not_done_again(mock: MockCluster, request_: int, name: str) -> None:
    """The abort can have undone the last commit too, so that the owner has to look before the next one."""
    transaction = begun(mock)
    transaction.commit(three(), timeout_s=10, begins={PLACE: 0})
    mock.fail(request_, code(name))
    with pytest.raises(Displaced, match="was aborted"):
        transaction.commit(three(), timeout_s=10, begins={PLACE: 4})
    transaction.commit(three(), timeout_s=10)
    transaction.close()


def test_a_commit_after_an_outage(mock: MockCluster) -> None:
    """After a time without any broker the owner has to look before its commit; one without a place goes on."""
    transaction = begun(mock)
    transaction.commit(three(), timeout_s=10, begins={PLACE: 0})
    for ended in (False, True):
        transaction._note_error(KafkaError(KafkaError._TRANSPORT))
        transaction._note_error(KafkaError(KafkaError._ALL_BROKERS_DOWN))
        if ended:
            transaction.commit(three()[:1], timeout_s=10)
        else:
            with pytest.raises(Displaced, match="no broker could be reached"):
                transaction.commit(three(), timeout_s=10, begins={PLACE: 4})
    assert transaction.commit(three(), timeout_s=10, begins={PLACE: 6}) == [9, 9, 9]
    transaction.close()


@IN_LONG_RUNS_BOTH_WAYS
@pytest.mark.parametrize("name", ["COORDINATOR_LOAD_IN_PROGRESS", "TRANSACTION_ABORTABLE", "UNKNOWN", "_TRANSPORT"])
def test_an_abort_is_tried_again(mock: MockCluster, name: str) -> None:
    """An abort that fails for a while succeeds in the end, and then the commit is done again."""
    transaction = begun(mock)
    mock.fail(END_TXN, code("OUT_OF_ORDER_SEQUENCE_NUMBER"), *[code(name)] * 2)
    made = ends(mock, lambda: transaction.commit(three(), timeout_s=10))
    assert made == [*ONCE, END_TXN, END_TXN, END_TXN, *ONCE]
    transaction.close()


@IN_LONG_RUNS_BOTH_WAYS
@pytest.mark.parametrize("request_", [ADD_PARTITIONS, END_TXN])
@pytest.mark.parametrize("name", ["PRODUCER_FENCED", "INVALID_PRODUCER_EPOCH"])
def test_the_fenced_one_stops(mock: MockCluster, request_: int, name: str) -> None:
    """An error that means another owner is Fenced at once and for good, and no further request is made."""
    transaction = begun(mock)
    mock.fail(request_, code(name))

    def commit() -> None:
        with pytest.raises(Fenced, match="t-0"):
            transaction.commit(three(), timeout_s=10)

    assert ends(mock, commit)[-1] == request_
    assert ends(mock, commit) == []
    transaction.close()


@IN_LONG_RUNS_BOTH_WAYS
@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (ADD_PARTITIONS, "CONCURRENT_TRANSACTIONS"),
        (ADD_PARTITIONS, "UNKNOWN"),
        (PRODUCE, "NOT_ENOUGH_REPLICAS"),
        (PRODUCE, "UNKNOWN"),
        (END_TXN, "NOT_COORDINATOR"),
        (END_TXN, "OUT_OF_ORDER_SEQUENCE_NUMBER"),
        (END_TXN, "INVALID_PRODUCER_ID_MAPPING"),
    ],
)
def test_the_deadline_holds(mock: MockCluster, request_: int, name: str) -> None:
    """An error that does not pass is Unavailable, in time, without haste; success is never reported, then or later."""
    transaction = begun(mock)
    mock.fail(request_, *[code(name)] * 2_000)
    started_s = time.monotonic()

    def commit() -> None:
        with pytest.raises(Unavailable, match="t-0"):
            transaction.commit(three(), timeout_s=0.5)

    made = ends(mock, commit)
    assert time.monotonic() - started_s < 20.0
    assert len(made) < 400
    mock.heal(request_)
    after = {*ends(mock, commit)}  # librdkafka may still be at the request that failed, or at ending the old transaction
    assert not after & {PRODUCE, ADD_PARTITIONS} - {request_}, "after an undecided commit nothing new is appended"
    transaction.close()


@BOTH_WAYS
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("MSG_SIZE_TOO_LARGE", "max.message.bytes"),
        ("TOPIC_AUTHORIZATION_FAILED", "kafka-acls"),
        ("INVALID_RECORD", "validate"),
        ("UNSUPPORTED_FOR_MESSAGE_FORMAT", "Kafka 2.5"),
    ],
)
def test_what_can_never_be_taken_is_told(mock: MockCluster, name: str, advice: str) -> None:
    """A transaction with a record that can never be accepted is aborted and not tried again; the text says what to do."""
    transaction = begun(mock)
    mock.fail(PRODUCE, code(name))

    def commit() -> None:
        with pytest.raises(Invalid, match=advice):
            transaction.commit(three(), timeout_s=10)

    assert ends(mock, commit) == ONCE
    transaction.close()


@IN_LONG_RUNS_BOTH_WAYS
def test_an_offset_that_nobody_tells(mock: MockCluster) -> None:
    """No offset is made up for a batch that the broker had before and gives no offset for."""
    transaction = begun(mock)
    mock.fail(PRODUCE, code("DUPLICATE_SEQUENCE_NUMBER"))
    with pytest.raises(Unavailable, match="does not say where"):
        transaction.commit(three()[:1], timeout_s=10)
    transaction.close()


@pytest.mark.parametrize("request_", [INIT_PRODUCER_ID, FIND_COORDINATOR])
@pytest.mark.parametrize("name", ["COORDINATOR_LOAD_IN_PROGRESS", "COORDINATOR_NOT_AVAILABLE"])
def test_a_start_waits_for_the_coordinator(mock: MockCluster, request_: int, name: str) -> None:
    """A loading coordinator is waited for, up to the given time."""
    mock.fail(request_, code(name))
    begun(mock).close()
    mock.fail(request_, *[code(name)] * 2_000)
    started_s = time.monotonic()
    with pytest.raises(Unavailable, match="start of transaction t-0"):
        begun(mock, timeout_s=0.3)
    assert time.monotonic() - started_s < 20.0


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("INVALID_TRANSACTION_TIMEOUT", "lower transaction_timeout_ms, or raise transaction.max.timeout.ms"),
        ("TRANSACTIONAL_ID_AUTHORIZATION_FAILED", "WRITE on the transactional id is missing"),
        ("CLUSTER_AUTHORIZATION_FAILED", "IDEMPOTENT_WRITE"),
    ],
)
def test_a_start_that_is_not_allowed(mock: MockCluster, name: str, advice: str) -> None:
    """A start that the broker does not allow is Invalid at once, with advice, although librdkafka calls it fatal."""
    mock.fail(INIT_PRODUCER_ID, code(name))
    with pytest.raises(Invalid, match=advice):
        begun(mock)


@pytest.mark.parametrize(("request_", "newest"), [(INIT_PRODUCER_ID, -1), (FIND_COORDINATOR, 0)])
def test_a_broker_without_transactions(mock: MockCluster, request_: int, newest: int) -> None:
    """A broker that is too old is named as that."""
    mock.limit(request_, newest)
    with pytest.raises(Invalid, match=r"Kafka 2\.5 or newer is needed"):
        begun(mock)


# The writer and the reader


def writer_of(mock: MockCluster) -> KafkaLogWriter:
    return KafkaLogWriter(address(mock), {}, SystemClock(), timeout_ms=2_000, metadata_refresh_ms=1_000)


def kinds(results: Sequence[int | PipelineError]) -> set[type]:
    return {*map(type, results)}


@pytest.mark.parametrize(
    "name",
    ["NOT_LEADER_FOR_PARTITION", "NOT_ENOUGH_REPLICAS", "UNKNOWN_TOPIC_OR_PART", "UNKNOWN_PRODUCER_ID", "INVALID_MSG"],
)
def test_an_append_outlasts_what_passes(mock: MockCluster, name: str) -> None:
    """librdkafka tries again within the timeout; each message has its offset."""
    writer = writer_of(mock)
    mock.fail(PRODUCE, code(name))
    assert writer.append(three(), timeout_s=2) == [1, 2, 3]
    writer.close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MSG_SIZE_TOO_LARGE", Invalid),
        ("INVALID_RECORD", Unavailable),
        ("CLUSTER_AUTHORIZATION_FAILED", Unavailable),
        ("UNKNOWN", Unavailable),
        ("INVALID_PRODUCER_EPOCH", Unavailable),
        ("UNSUPPORTED_VERSION", Unavailable),
        ("DUPLICATE_SEQUENCE_NUMBER", Unavailable),
    ],
)
def test_an_append_that_is_refused(mock: MockCluster, name: str, expected: type[PipelineError]) -> None:
    """Only errors of the message itself are for good, and the next append works."""
    writer = writer_of(mock)
    mock.fail(PRODUCE, code(name))
    assert kinds(writer.append(three()[:1], timeout_s=2)) == {expected}
    assert kinds(writer.append(three(), timeout_s=2)) == {int}
    writer.close()


def test_a_producer_that_is_given_up_is_replaced(mock: MockCluster) -> None:
    """An error that ends librdkafka's producer is raised at once, with its cause; the next append has a new producer."""
    writer = writer_of(mock)
    assert kinds(writer.append(three(), timeout_s=2)) == {int}
    mock.fail(PRODUCE, code("OUT_OF_ORDER_SEQUENCE_NUMBER"))
    started_s = time.monotonic()
    refused = writer.append(three(), timeout_s=60)
    assert kinds(refused) == {Unavailable}
    assert "OUT_OF_ORDER_SEQUENCE_NUMBER" in str(refused[0])
    assert kinds(writer.append(three(), timeout_s=60)) == {int}
    assert time.monotonic() - started_s < 50
    mock.fail(INIT_PRODUCER_ID, code("CLUSTER_AUTHORIZATION_FAILED"))
    writer.close()
    again = writer_of(mock)
    assert "IDEMPOTENT_WRITE" in str(again.append(three(), timeout_s=5)[0])
    assert kinds(again.append(three(), timeout_s=5)) == {int}
    again.close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NOT_LEADER_FOR_PARTITION", None),
        ("OFFSET_NOT_AVAILABLE", None),
        ("KAFKA_STORAGE_ERROR", None),
        ("OFFSET_OUT_OF_RANGE", None),
        ("INVALID_MSG", Unavailable),
        ("TOPIC_AUTHORIZATION_FAILED", Unavailable),
        ("UNKNOWN", PipelineError),
    ],
)
def test_a_reader_goes_on(mock: MockCluster, name: str, expected: type[PipelineError] | None) -> None:
    """A passing error is raised at most once, and nothing is skipped. An offset that is in range after all is no loss."""
    writer = writer_of(mock)
    writer.append(three(), timeout_s=2)
    reader = reader_of(reader_options(address(mock), {}), 3)
    mock.fail(FETCH, code(name))
    reader.assign({0: 0})
    offsets: list[int] = []
    errors: list[type] = []
    deadline_s = time.monotonic() + 60
    while len(offsets) < 3:
        assert time.monotonic() < deadline_s
        try:
            for records in reader.poll(record_count_max=10, bytes_max=1_000, timeout_s=0.5):
                offsets += records.offsets
        except PipelineError as error:
            errors.append(type(error))
    assert offsets == [0, 1, 2]
    assert errors in ([], [expected])  # it is not raised by a poll that has also read records
    assert expected is not None or not errors
    reader.close()
    writer.close()


def test_a_leader_that_goes_tells_no_offsets() -> None:
    """A connection broken by one of two leaders gives no offset: librdkafka's -1001 would be below every position."""
    with MockCluster(2) as cluster:
        cluster.create("deltas", 2)
        log = KafkaLog(address(cluster), KafkaSettings(), SystemClock())
        try:
            assert log.end_offsets("deltas") == {0: 0, 1: 0}
            cluster.fail(LIST_OFFSETS, code("_TRANSPORT"))
            with pytest.raises(Unavailable, match="its leader does not answer"):
                log.end_offsets("deltas")
            cluster.fail(LIST_OFFSETS, code("_TRANSPORT"))
            assert log.start_offsets("deltas") == {0: 0, 1: 0}
            cluster.fail(LIST_OFFSETS, code("_TRANSPORT"), code("_TRANSPORT"))
            assert log.watermarks("deltas", 1) == (0, 0)
        finally:
            log.close()


def test_an_order_goes_to_a_partition_that_was_just_added(mock: MockCluster) -> None:
    """High watermarks name every partition that there is, also one that a count of a moment ago lacks."""
    mock.create("grown", 2)
    log = KafkaLog(address(mock), KafkaSettings(), SystemClock())
    try:
        log._metadata._known["grown"] = _Known(
            1, SystemClock().monotonic_s() + 60
        )  # of a moment ago, for as long as it takes
        assert log.high_watermarks("grown") == {0: 0, 1: 0}
    finally:
        log.close()
