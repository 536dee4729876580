"""The log on Apache Kafka: readers, transactions and offsets of one app's topics."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from confluent_kafka import ConsumerGroupTopicPartitions, IsolationLevel, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ClusterMetadata, ConfigResource, OffsetSpec

from pipeline.adapters.kafka import batches
from pipeline.adapters.kafka.errors import LastError, Verdict, code_of, describe, error_of, translate
from pipeline.adapters.kafka.metadata import Metadata, id_text
from pipeline.adapters.kafka.options import Address, admin_options, reader_options, transaction_options
from pipeline.adapters.kafka.reader import KafkaReader
from pipeline.adapters.kafka.tokens import why_no_token
from pipeline.adapters.kafka.transaction import KafkaTransaction
from pipeline.adapters.kafka.writer import KafkaLogWriter
from pipeline.errors import Invalid, PipelineError, Unavailable
from pipeline.ports import Clock, Message, Watermarks
from pipeline.secret import revealed
from pipeline.settings import KafkaSettings
from pipeline.topics import DELTAS

T = TypeVar("T")
_BACKOFF_S = 0.1
_ATTEMPT_S = 5.0
"""Longest time for one request before it is repeated, so that `close` need not wait for longer."""
_FIRST_ATTEMPT_S = 1.0
"""Longest time for the first attempt to connect: the reason for a failure is logged only between attempts."""
_log = logging.getLogger(__name__)


class KafkaLog:
    """A `ports.Log`. Safe from any thread; every call has the deadline `kafka_timeout_ms`, unless it takes one.

    Offsets are asked from the broker at each call, as read_committed sees them, except by `high_watermarks`.
    """

    def __init__(self, address: Address, settings: KafkaSettings, clock: Clock, *, request_timeout_ms: int = 10_000) -> None:
        self.address = address
        self._settings = settings
        self._clock = clock
        self._timeout_s = settings.kafka_timeout_ms / 1000
        self._closed = threading.Event()
        self._last_error = LastError()
        self._metadata = Metadata(
            address,
            settings.kafka,
            self._list_topics,
            self._last_error,
            clock,
            refresh_s=settings.metadata_refresh_ms / 1000,
        )
        self._writer = KafkaLogWriter(
            address,
            settings.kafka,
            clock,
            timeout_ms=request_timeout_ms,
            metadata_refresh_ms=settings.metadata_refresh_ms,
            metadata=self._metadata,
        )
        # Behind the writer, which tries the user's options: it says more of a wrong one than this client does.
        self._admin = AdminClient({**revealed(admin_options(address, settings.kafka)), "error_cb": self._last_error})

    def _list_topics(self, topic: str, timeout_s: float) -> ClusterMetadata:
        try:
            return self._admin.list_topics(topic, timeout_s)
        finally:
            self._admin.poll(0)  # errors and log lines wait for it, and take memory

    # Topics

    def connect(self, topics: Sequence[str], on_wait: Callable[[Unavailable], None] | None = None) -> None:
        """Raise `Unavailable` or `Invalid`, saying what to do, unless a broker answers and has these topics.

        `on_wait` is called after each attempt that fails; by default a warning is logged once.
        """
        attempt_s = _FIRST_ATTEMPT_S

        def ask() -> None:
            nonlocal attempt_s
            try:
                for topic in topics:
                    self._metadata.ask(topic, min(self._timeout_s, attempt_s))
            except Unavailable as away:
                error = away
                cause = self._last_error.last
                if cause is not None and code_of(cause).verdict is Verdict.OPERATOR:
                    reason = why_no_token(self._settings.kafka) or translate(cause, str(self.address))
                    if not isinstance(reason, Unavailable):
                        raise reason from None
                    error = Unavailable(f"{self.address}: {reason}")
                if on_wait is not None:
                    on_wait(error)
                elif attempt_s == _FIRST_ATTEMPT_S:
                    _log.warning("waiting up to %g s: %s", self._timeout_s, error)
                attempt_s = min(attempt_s * 2, _ATTEMPT_S)
                raise error from None

        self._retry(ask)

    def partition_count(self, topic: str) -> int:
        """Return the partition count of a topic, which can be some seconds old."""
        return self._metadata.partition_count(topic)

    def message_bytes_max(self, topic: str) -> int:
        """Return the size of the largest value that the topic takes."""
        return self._metadata.message_bytes_max(topic, self._timeout_s)

    def topic_id(self, topic: str) -> str:
        """Return the broker's id of the topic, which a topic that was created again does not share."""
        name = self.address.topic(topic)

        def ask() -> str:
            attempt_s = min(self._timeout_s, _ATTEMPT_S)
            futures = self._admin.describe_topics(TopicCollection([name]), request_timeout=attempt_s)
            return id_text(self._result(futures[name], f"describe {name}").topic_id)

        return self._retry(ask)

    def topic_options(self, topic: str) -> Mapping[str, str]:
        """Return the topic's configuration, by Kafka's names; empty without the permission to read it."""
        resource = ConfigResource(ConfigResource.Type.TOPIC, self.address.topic(topic))

        def ask() -> Mapping[str, str]:
            futures = self._admin.describe_configs([resource], request_timeout=min(self._timeout_s, _ATTEMPT_S))
            found = self._result(futures[resource], f"configuration of {resource.name}")
            return {name: entry.value for name, entry in found.items()}

        try:
            return self._retry(ask)
        except Invalid:
            _log.info("no DESCRIBE_CONFIGS on topic %s: whether it keeps what it must is not checked", resource.name)
            return {}

    def missing(self, names: Sequence[str]) -> list[str]:
        """Return those of the given topics, named as on the broker, that do not exist. Creates none."""
        if not names:
            return []
        there = self._retry(self._all_topics)
        return [name for name in names if name not in there]

    def _all_topics(self) -> Collection[str]:
        try:
            return set(self._admin.list_topics(timeout=min(self._timeout_s, _ATTEMPT_S)).topics)
        except KafkaException as exception:
            raise translate(error_of(exception), "list of topics") from None

    # Offsets

    def watermarks(self, topic: str, partition: int) -> Watermarks:
        """Return the partition's offsets now; the end is the last stable offset."""
        self._metadata.check(topic, partition)
        place = TopicPartition(self.address.topic(topic), partition)
        (start,) = self._offsets([place], OffsetSpec.earliest()).values()
        (end,) = self._offsets([place], OffsetSpec.latest()).values()
        return Watermarks(min(start, end), end)

    def end_offsets(self, topic: str) -> Mapping[int, int]:
        """Return the end offset of each present partition, in two requests however many there are.

        Asked without retries: callers ask periodically, and must not be held up by one partition without a leader.
        """
        return self._ask_offsets(self._places(topic), OffsetSpec.latest())

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        """Return what `end_offsets` does as read_uncommitted sees it; see `ports.LogWriter`.

        The partition count is asked anew: an order goes to all partitions that this names.
        """
        places = self._some(topic, range(self._metadata.ask(topic, min(self._timeout_s, _ATTEMPT_S))))
        return self._ask_offsets(places, OffsetSpec.latest(), IsolationLevel.READ_UNCOMMITTED)

    def start_offsets(self, topic: str) -> Mapping[int, int]:
        """Return the start offset of each present partition."""
        return self._retry(lambda: self._ask_offsets(self._places(topic), OffsetSpec.earliest()))

    def _places(self, topic: str) -> list[TopicPartition]:
        return self._some(topic, range(self._metadata.recent(topic, min(self._timeout_s, _ATTEMPT_S))))

    def _some(self, topic: str, partitions: Iterable[int]) -> list[TopicPartition]:
        return [TopicPartition(self.address.topic(topic), partition) for partition in partitions]

    def _offsets(self, places: Sequence[TopicPartition], spec: OffsetSpec) -> dict[int, int]:
        return self._retry(lambda: self._ask_offsets(places, spec))

    def _ask_offsets(
        self,
        places: Sequence[TopicPartition],
        spec: OffsetSpec,
        isolation: IsolationLevel = IsolationLevel.READ_COMMITTED,
    ) -> dict[int, int]:
        found: dict[int, int] = {}
        for partition, future in self._begin_offsets(places, spec, isolation).items():
            what = f"offsets of {places[0].topic}-{partition}"
            offset: int = self._result(future, what).offset
            if offset < 0:  # how librdkafka says, without an error, that one of several leaders did not answer
                raise Unavailable(f"{what}: its leader does not answer{self._last_error.reason()}")
            found[partition] = offset
        return found

    def _begin_offsets(
        self,
        places: Sequence[TopicPartition],
        spec: OffsetSpec,
        isolation: IsolationLevel = IsolationLevel.READ_COMMITTED,
    ) -> dict[int, Future[Any]]:
        """Send the request and return at once the future offsets by partition, all of one topic."""
        futures = self._admin.list_offsets(
            dict.fromkeys(places, spec),
            isolation_level=isolation,
            request_timeout=min(self._timeout_s, _ATTEMPT_S),
        )
        return {place.partition: future for place, future in futures.items()}

    def _retry(self, ask: Callable[[], T]) -> T:
        """Repeat `ask` until it succeeds or time is over: leaders move, and new topics take a moment to be known."""
        deadline_s = self._clock.monotonic_s() + self._timeout_s
        while True:
            try:
                return ask()
            except Unavailable:
                if self._closed.wait(_BACKOFF_S) or self._clock.monotonic_s() >= deadline_s:
                    raise

    def _result(self, future: Future[Any], what: str) -> Any:
        try:
            return future.result(self._timeout_s + 1.0)
        except KafkaException as exception:
            error = error_of(exception)
            if reason := self._last_error.reason(error):
                raise Unavailable(f"{describe(error, what)}{reason}") from None
            raise translate(error, what) from None
        except TimeoutError:
            raise Unavailable(f"{what}: no answer within {self._timeout_s} s") from None

    # Clients

    def reader(self, topic: str) -> KafkaReader:
        """Return a new cursor, with a consumer of its own."""
        self._metadata.partition_count(topic)
        return KafkaReader(
            reader_options(self.address, self._settings.kafka),
            self.address.topic(topic),
            clock=self._clock,
            partition_count=lambda: self._metadata.ask(topic, self._timeout_s),
            start_offsets=lambda partitions: self._offsets(self._some(topic, partitions), OffsetSpec.earliest()),
            end_offsets=lambda partitions: self._offsets(self._some(topic, partitions), OffsetSpec.latest()),
            ask_ends=lambda partitions: self._begin_offsets(self._some(topic, partitions), OffsetSpec.latest()),
        )

    def transaction(self, transactional_id: str) -> KafkaTransaction:
        """Return a new owner of `transactional_id`. Older owners are fenced by then, and their open transactions aborted."""
        options = transaction_options(
            self.address,
            self._settings.kafka,
            transactional_id=transactional_id,
            timeout_ms=self._settings.transaction_timeout_ms,
        )
        return KafkaTransaction(
            options,
            transactional_id,
            timeout_s=self._timeout_s,
            clock=self._clock,
            check=self._metadata.check,
            broker_topic=self.address.topic,
        )

    def produces_at_once(self) -> bool:
        """Return whether transactions produce thousands of messages in one call; see `kafka.batches`."""
        return batches.are_in_use(self._settings.kafka)

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        """Append outside transactions; see `ports.LogWriter`."""
        return self._writer.append(messages, timeout_s=timeout_s)

    # Groups

    def mirror_positions(self, next_offsets: Mapping[int, int]) -> None:
        """Commit positions to the memberless group `{app}-position`, for lag tools. This program reads them nowhere for a
        decision.
        """
        self.commit_offsets(self.address.group, DELTAS, next_offsets)

    def commit_offsets(self, group: str, topic: str, next_offsets: Mapping[int, int]) -> None:
        """Commit offsets of a topic to a group that has no members."""
        name = self.address.topic(topic)
        offsets = [TopicPartition(name, partition, offset) for partition, offset in next_offsets.items()]
        futures = self._admin.alter_consumer_group_offsets(
            [ConsumerGroupTopicPartitions(group, offsets)], request_timeout=self._timeout_s
        )
        done = self._result(futures[group], f"commit to group {group}")
        failed = [place for place in done.topic_partitions if place.error is not None]
        if failed:
            raise translate(failed[0].error, f"commit to group {group}")

    def committed_offsets(self, group: str, topic: str) -> Mapping[int, int]:
        """Return the offsets of a topic that a group has committed, by partition."""
        places = self._some(topic, range(self._metadata.partition_count(topic)))

        def ask() -> Mapping[int, int]:
            futures = self._admin.list_consumer_group_offsets(
                [ConsumerGroupTopicPartitions(group, places)], request_timeout=min(self._timeout_s, _ATTEMPT_S)
            )
            found = self._result(futures[group], f"offsets of group {group}").topic_partitions
            if failed := [place for place in found if place.error is not None]:
                raise translate(failed[0].error, f"offsets of group {group}")
            return {place.partition: place.offset for place in found if place.offset >= 0}

        return self._retry(ask)

    def static_members(self, group: str) -> frozenset[str]:
        """Return the group's static members (KIP-345 `group.instance.id`), as its coordinator knows them now."""
        futures = self._admin.describe_consumer_groups([group], request_timeout=min(self._timeout_s, _ATTEMPT_S))
        found = self._result(futures[group], f"describe group {group}")
        return frozenset(it.group_instance_id for it in found.members if it.group_instance_id)

    def mirrored_positions(self) -> Mapping[int, int]:
        """Return the mirrored positions by partition, for display."""
        return self.committed_offsets(self.address.group, DELTAS)

    def close(self) -> None:
        """Close connections, and end all calls that wait for an answer. Idempotent."""
        self._closed.set()
        self._writer.close()
