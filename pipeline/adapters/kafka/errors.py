"""The meaning of each of Kafka's error codes for the caller: a table, with the source of each decision.

Codes below 0 are librdkafka's own. An error also says itself whether it can be retried, aborts a transaction, or ends a
producer; that takes precedence, because librdkafka knows its own state. The table decides everything else.

Sources: [K] org.apache.kafka.common.protocol.Errors of Kafka 4.3, by the class of the exception (RetriableException,
ApiException, AuthorizationException...); [T] KIP-98 and KIP-360; [A] KIP-890 (TRANSACTION_ABORTABLE); [L] librdkafka's
rdkafka.h and INTRODUCTION.md; [M] measured, see tests/broker.
"""

from __future__ import annotations

import logging
import re
from enum import Enum
from typing import NamedTuple

from confluent_kafka import KafkaError, KafkaException

from pipeline.errors import Fenced, Invalid, PipelineError, Unavailable


class Verdict(Enum):
    """Ways to handle an error."""

    RETRY = "again, as it was, until the deadline"
    ABORT = "abort the transaction, then do all of it again"
    FENCED = "another owner has taken over: stop writing"
    MESSAGE = "this message can never be taken"
    OPERATOR = "somebody must change the broker or a setting; nothing is lost until then"
    FATAL = "end the process; whoever starts it again begins at the last commit"


class Code(NamedTuple):
    """One row of the table."""

    verdict: Verdict
    source: str
    advice: str = ""
    """Advice to an operator."""


_R, _A, _F, _M, _O = Verdict.RETRY, Verdict.ABORT, Verdict.FENCED, Verdict.MESSAGE, Verdict.OPERATOR
_GRANT = "grant it with kafka-acls"
_NEEDS = "READ, WRITE or DESCRIBE on the topic"
_FRAME = re.compile(r"^\S+/(?:bootstrap|\d+): | \(after \d+ms in state .*$")
"""Connection name and time that librdkafka puts around an error text."""
_UPGRADE = "Kafka 2.5 or newer is needed"
_REPEAT_S = 60.0
_REMEMBERED_MAX = 1_000
_VARYING = re.compile(r"\d+ms|#\w+-\d+|, \d+ identical error\(s\) suppressed")

CODES: dict[str, Code] = {
    # The broker can't be reached, or is about to become leader or coordinator.
    "_TRANSPORT": Code(_R, "[L]"),
    "_ALL_BROKERS_DOWN": Code(_R, "[L]"),
    "_RESOLVE": Code(_R, "[L]", "check the host name"),
    "_TIMED_OUT": Code(_R, "[L]"),
    "_TIMED_OUT_QUEUE": Code(_R, "[L]"),
    "_MSG_TIMED_OUT": Code(_R, "[L] may have been delivered"),
    "_PURGE_QUEUE": Code(_R, "[L]"),
    "_PURGE_INFLIGHT": Code(_R, "[L] may have been delivered"),
    "_QUEUE_FULL": Code(_R, "[L]"),
    "_RETRY": Code(_R, "[L]"),
    "_IN_PROGRESS": Code(_R, "[L]"),
    "_PREV_IN_PROGRESS": Code(_R, "[L]"),
    "_WAIT_COORD": Code(_R, "[L]"),
    "_WAIT_CACHE": Code(_R, "[L]"),
    "_DESTROY_BROKER": Code(_R, "[L]"),
    "_NOENT": Code(_R, "[L] metadata not there yet"),
    "_BAD_MSG": Code(_R, "[L] a response that was cut off by a dying connection"),
    "BROKER_NOT_AVAILABLE": Code(_R, "[K]"),
    "COORDINATOR_LOAD_IN_PROGRESS": Code(_R, "[K] [M] after a restart of the broker"),
    "COORDINATOR_NOT_AVAILABLE": Code(_R, "[K]"),
    "NOT_COORDINATOR": Code(_R, "[K]"),
    "CONCURRENT_TRANSACTIONS": Code(_R, "[K] the last transaction's markers are being written"),
    "ELIGIBLE_LEADERS_NOT_AVAILABLE": Code(_R, "[K]"),
    "FENCED_LEADER_EPOCH": Code(_R, "[K]"),
    "INVALID_MSG": Code(
        _R, "[K] CorruptRecordException: on the wire, or on one replica's disk", "look at the broker's disk"
    ),
    "KAFKA_STORAGE_ERROR": Code(_R, "[K] another replica takes over", "look at the broker's disk"),
    "LEADER_NOT_AVAILABLE": Code(_R, "[K]"),
    "LISTENER_NOT_FOUND": Code(_R, "[K]"),
    "NETWORK_EXCEPTION": Code(_R, "[K]"),
    "NOT_CONTROLLER": Code(_R, "[K]"),
    "NOT_ENOUGH_REPLICAS": Code(_R, "[K]", "fewer replicas are in sync than min.insync.replicas asks for"),
    "NOT_ENOUGH_REPLICAS_AFTER_APPEND": Code(_R, "[K] may be appended", "fewer replicas are in sync than it takes"),
    "NOT_LEADER_FOR_PARTITION": Code(_R, "[K]"),
    "OFFSET_NOT_AVAILABLE": Code(_R, "[K] a new leader does not know the high watermark yet"),
    "REBOOTSTRAP_REQUIRED": Code(_R, "[L]"),
    "REPLICA_NOT_AVAILABLE": Code(_R, "[K]"),
    "REQUEST_TIMED_OUT": Code(_R, "[K]"),
    "THROTTLING_QUOTA_EXCEEDED": Code(_R, "[K]"),
    "UNKNOWN_LEADER_EPOCH": Code(_R, "[K]"),
    "UNKNOWN_TOPIC_ID": Code(_R, "[K] the topic was made anew, or metadata is old"),
    "INCONSISTENT_TOPIC_ID": Code(_R, "[K] the topic was made anew, or metadata is old"),
    "UNKNOWN_TOPIC_OR_PART": Code(_R, "[K] a topic that was just made is not known everywhere yet"),
    "UNSTABLE_OFFSET_COMMIT": Code(_R, "[K]"),
    # The transaction is over, this producer is not.
    "INVALID_PRODUCER_ID_MAPPING": Code(_A, "[T] KIP-360: the broker forgot the id; it gets a new epoch"),
    "OUT_OF_ORDER_SEQUENCE_NUMBER": Code(_A, "[T] KIP-360"),
    "TRANSACTION_ABORTABLE": Code(_A, "[A]"),
    "UNKNOWN_PRODUCER_ID": Code(_A, "[T] KIP-360"),
    # Another producer is the owner now.
    "_FENCED": Code(_F, "[T] [L]"),
    "INVALID_PRODUCER_EPOCH": Code(_F, "[T] another owner's epoch, or the broker aborted what took too long"),
    "PRODUCER_FENCED": Code(_F, "[T]"),
    "TRANSACTION_COORDINATOR_FENCED": Code(_R, "[T] the coordinator, not the producer, has moved"),
    # The message is wrong.
    "MSG_SIZE_TOO_LARGE": Code(
        _M, "[K]", "raise max.message.bytes of the topic; for deltas, lowering batch_bytes_max does too"
    ),
    "RECORD_LIST_TOO_LARGE": Code(_M, "[K]", "raise segment.bytes of the topic, or lower batch_bytes_max"),
    # The setup is wrong.
    "_AUTHENTICATION": Code(_O, "[L]", "check sasl.* in the setting `kafka`"),
    "_SSL": Code(_O, "[L]", "check ssl.* and security.protocol in the setting `kafka`"),
    "_UNSUPPORTED_FEATURE": Code(_O, "[L]", _UPGRADE),
    "CLUSTER_AUTHORIZATION_FAILED": Code(
        _O, "[K] [M]", f"{_NEEDS} is missing, and before Kafka 2.8 IDEMPOTENT_WRITE on the cluster: {_GRANT}"
    ),
    "GROUP_AUTHORIZATION_FAILED": Code(_O, "[K]", f"READ on the group is missing: {_GRANT}"),
    "ILLEGAL_SASL_STATE": Code(_O, "[K]", "check sasl.* in the setting `kafka`"),
    "INVALID_REPLICATION_FACTOR": Code(_O, "[K]", "there are fewer brokers than replicas: lower --replication-factor"),
    "INVALID_CONFIG": Code(_O, "[K]"),
    "INVALID_TIMESTAMP": Code(_O, "[K]", "set message.timestamp.type=LogAppendTime for the topic, or this machine's clock"),
    "INVALID_REQUIRED_ACKS": Code(_O, "[K]"),
    "INVALID_TRANSACTION_TIMEOUT": Code(
        _O, "[T]", "lower transaction_timeout_ms, or raise transaction.max.timeout.ms of the broker"
    ),
    "INVALID_PARTITIONS": Code(_O, "[K]"),
    "POLICY_VIOLATION": Code(_O, "[K]", "the broker has a policy against it: ask who runs it"),
    "SASL_AUTHENTICATION_FAILED": Code(_O, "[K]", "check sasl.* in the setting `kafka`"),
    "SECURITY_DISABLED": Code(_O, "[K]"),
    "INVALID_RECORD": Code(_O, "[K] the topic is compacted, or wants timestamps of now", "pipeline topics plan"),
    "_UNKNOWN_PARTITION": Code(_O, "[L] the topic was made anew with fewer", "pipeline topics apply"),
    "_UNKNOWN_TOPIC": Code(_O, "[L] the topic was deleted", "pipeline topics apply"),
    "TOPIC_AUTHORIZATION_FAILED": Code(_O, "[K]", f"{_NEEDS} is missing: {_GRANT}"),
    "TOPIC_EXCEPTION": Code(_O, "[K] an invalid topic name"),
    "TRANSACTIONAL_ID_AUTHORIZATION_FAILED": Code(_O, "[K]", f"WRITE on the transactional id is missing: {_GRANT}"),
    "UNSUPPORTED_COMPRESSION_TYPE": Code(_O, "[K]", "set another compression.type in the setting `kafka`"),
    "UNSUPPORTED_FOR_MESSAGE_FORMAT": Code(_O, "[K]", _UPGRADE),
    "UNSUPPORTED_SASL_MECHANISM": Code(_O, "[K]", "check sasl.mechanisms in the setting `kafka`"),
    "UNSUPPORTED_VERSION": Code(_O, "[K]", _UPGRADE),
}

_BY_NUMBER = {getattr(KafkaError, name): code for name, code in CODES.items() if hasattr(KafkaError, name)}
_UNKNOWN = Code(Verdict.FATAL, "in no table")


def error_of(exception: KafkaException) -> KafkaError:
    """Return the KafkaError inside an exception."""
    error: KafkaError = exception.args[0]
    return error


def code_of(error: KafkaError) -> Code:
    """Return the row for an error. A code without a row is retried if librdkafka says so, and fatal otherwise."""
    code = _BY_NUMBER.get(error.code(), _UNKNOWN)
    if code is _UNKNOWN and error.retriable():
        return Code(Verdict.RETRY, "[L] retriable")
    return code


def verdict_of(error: KafkaError) -> Verdict:
    """Return how to handle an error of a transaction. librdkafka's own judgement takes precedence."""
    verdict = code_of(error).verdict
    if error.fatal():
        return verdict if verdict in (Verdict.FENCED, Verdict.OPERATOR) else Verdict.FATAL
    if error.txn_requires_abort():
        return Verdict.ABORT
    if error.retriable():
        return Verdict.RETRY
    return verdict


def text_of(error: KafkaError) -> str:
    """Return the text of an error without connection and time."""
    return _FRAME.sub("", error.str()).removeprefix("Broker: ")


def describe(error: KafkaError, what: str, needs: str = _NEEDS) -> str:
    """Return a text that begins with `what`, with advice to an operator; `needs` is the missing permission, should it be
    one.
    """
    advice = code_of(error).advice.replace(_NEEDS, needs)
    text = text_of(error)
    return f"{what}: {text} ({error.name()})" + (f": {advice}" if advice else "")


def translate(error: KafkaError, what: str, verdict: Verdict | None = None, *, needs: str = _NEEDS) -> PipelineError:
    """Return one of our errors. `what` says what was tried, `needs` which permission on a topic that takes."""
    text = describe(error, what, needs)
    match verdict or code_of(error).verdict:
        case Verdict.RETRY | Verdict.ABORT:
            return Unavailable(text)
        case Verdict.FENCED:
            return Fenced(text)
        case Verdict.MESSAGE | Verdict.OPERATOR:
            return Invalid(text)
    return PipelineError(text)


class LastError:
    """An `error_cb` that keeps the last connection error of a client. Safe from any thread; the client must be polled."""

    def __init__(self) -> None:
        self.last: KafkaError | None = None
        """Last error of a connection since `forget`."""

    def __call__(self, error: KafkaError) -> None:
        if error.code() != KafkaError._ALL_BROKERS_DOWN:  # says less than the one before
            self.last = error

    def forget(self) -> None:
        """Forget the error, because a broker has answered."""
        self.last = None

    def reason(self, error: KafkaError | None = None) -> str:
        """Return what an operator must change, where that is why no broker answers, which is all that `error` says."""
        last = self.last
        if last is None or code_of(last).verdict is not Verdict.OPERATOR:
            return ""
        if error is not None and code_of(error).verdict is not Verdict.RETRY:
            return ""
        return describe(last, "; the last connection")

    def text(self, error: KafkaError) -> str:
        """Return the reason in words: the last connection error, or `error`, which often says little."""
        return text_of(self.last or error)


class RateLimitFilter(logging.Filter):
    """Passes a log line once a minute: during an outage librdkafka logs each of many attempts a second."""

    def __init__(self) -> None:
        super().__init__()
        self._next_s: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log the record."""
        key = _VARYING.sub("", record.getMessage())
        if record.created < self._next_s.get(key, 0.0):
            return False
        if len(self._next_s) >= _REMEMBERED_MAX:
            self._next_s.clear()
        self._next_s[key] = record.created + _REPEAT_S
        return True
