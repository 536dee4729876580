"""What the cluster says of topics: how many partitions they have, and the largest message they take."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ClusterMetadata, ConfigResource

from pipeline.adapters.kafka.errors import error_of, translate
from pipeline.adapters.kafka.options import Address, admin_options
from pipeline.errors import Invalid, PipelineError, Unavailable
from pipeline.ports import Clock

_log = logging.getLogger(__name__)
_FIRST_S = 1.0
"""A first answer is waited for no longer, so that whoever buffers meanwhile is not held up; it is asked for again."""
_UNTOLD_BYTES_MAX = 1_000_000
"""Where nobody tells: a little below Kafka's default, whatever it counts as overhead."""
_OVERHEAD_BYTES = 1_024
"""Of a batch of one message, with what compression adds to bytes that can't be compressed (lz4: 0.4 %)."""

ListTopics = Callable[[str, float], ClusterMetadata]


class _Known(NamedTuple):
    partition_count: int
    at_s: float


class Metadata:
    """Topics of one app, remembered for `refresh_s` and then asked for again in the background. Safe from any thread.

    `list_topics` asks a client: topic name on the broker, timeout in seconds.
    """

    def __init__(
        self, address: Address, user: Mapping[str, Any], list_topics: ListTopics, clock: Clock, *, refresh_s: float
    ) -> None:
        self._address = address
        self._user = user
        self._list_topics = list_topics
        self._clock = clock
        self._refresh_s = refresh_s
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._asking: set[str] = set()
        self._bytes_max: dict[str, int] = {}

    def partition_count(self, topic: str) -> int:
        """How many partitions a topic has; `Invalid` if there is none of the name, `Unavailable` if nobody says."""
        known = self._known.get(topic)
        if known is None:
            return self.ask(topic, _FIRST_S)
        if self._clock.monotonic_s() - known.at_s > self._refresh_s:
            self._ask_behind(topic)
        return known.partition_count

    def ask(self, topic: str, timeout_s: float) -> int:
        """As `partition_count`, but of now."""
        name = self._address.topic(topic)
        try:
            found = self._list_topics(name, timeout_s).topics.get(name)
        except KafkaException as exception:
            error = error_of(exception)
            if error.code() in (KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._ALL_BROKERS_DOWN):
                raise Unavailable(
                    f"no broker answers at {self._address.bootstrap} ({error.name()}): check the address, the broker, and "
                    "security.protocol in the setting `kafka`"
                ) from None
            raise translate(error, f"metadata of {name}") from None
        if found is None or found.error is not None:
            code = KafkaError.UNKNOWN_TOPIC_OR_PART if found is None else found.error.code()
            if code == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise Invalid(
                    f"there is no topic {name} at {self._address.bootstrap}: pipeline topics apply --to {self._address}"
                )
            raise translate(found.error, f"metadata of {name}")
        self._known[topic] = _Known(len(found.partitions), self._clock.monotonic_s())
        return len(found.partitions)

    def _ask_behind(self, topic: str) -> None:
        with self._lock:
            if topic in self._asking:
                return
            self._asking.add(topic)

        def ask() -> None:
            try:
                self.ask(topic, self._refresh_s)
            except PipelineError as error:
                _log.debug("metadata of %s is not refreshed: %s", topic, error)
            finally:
                self._asking.discard(topic)

        threading.Thread(target=ask, name="pipeline-kafka-metadata", daemon=True).start()

    def check(self, topic: str, partition: int) -> None:
        """Raise `Invalid` if there is no such partition."""
        count = self.partition_count(topic)
        if not 0 <= partition < count:
            raise Invalid(f"topic {self._address.topic(topic)} has no partition {partition}; it has {count}")

    def message_bytes_max(self, topic: str, timeout_s: float) -> int:
        """The largest value that the topic takes, less some overhead. Asked for once."""
        known = self._bytes_max.get(topic)
        if known is not None:
            return known
        name = self._address.topic(topic)
        admin = AdminClient(admin_options(self._address, self._user))
        resource = ConfigResource(ConfigResource.Type.TOPIC, name)
        try:
            (future,) = admin.describe_configs([resource], request_timeout=timeout_s).values()
            limit = int(future.result(timeout_s)["max.message.bytes"].value)
        except (KafkaException, KeyError, TimeoutError) as error:
            _log.info("max.message.bytes of %s is unknown: %s", name, error)
            limit = _UNTOLD_BYTES_MAX
        limit = limit - limit // 128 - _OVERHEAD_BYTES
        self._bytes_max[topic] = limit
        return limit
