"""Cached metadata of topics: partition count, topic id, high watermarks, and the largest message."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from math import ceil
from typing import Any, NamedTuple

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition, Uuid
from confluent_kafka.admin import AdminClient, ClusterMetadata, ConfigResource, OffsetSpec

from pipeline.adapters.kafka.errors import LastError, error_of, translate
from pipeline.adapters.kafka.options import Address, admin_options
from pipeline.errors import Invalid, PipelineError, Unavailable
from pipeline.ports import Clock
from pipeline.secret import revealed
from pipeline.threads import GREEN_INTERVAL_S, are_green, guarded

_log = logging.getLogger(__name__)
_FIRST_S = 1.0
"""Longest wait for a first answer, so that a publisher that buffers meanwhile is not held up."""
_FRESH_S = 0.5
"""Age from which a partition count is fetched again before a partition is reported as missing, or offsets are asked for."""
_ASSUMED_BYTES_MAX = 1_000_000
"""Assumed limit without the permission to read it: a little below Kafka's default, for the overhead."""
_OVERHEAD_BYTES = 1_024
"""Overhead of a batch of one message, with the growth of incompressible bytes under compression (lz4: 0.4 %)."""

_URL_SAFE = str.maketrans("+/", "-_", "=")

ListTopics = Callable[[str, float], ClusterMetadata]


class _Known(NamedTuple):
    partition_count: int
    at_s: float


class Denied(Invalid):
    """Fix a permission or a setting: the broker refuses to answer until then."""


class Metadata:
    """Metadata of one app's topics, cached for `refresh_s` and refreshed in the background. Safe from any thread.

    `list_topics` asks a client: topic name on the broker, timeout in seconds. `last_error` gets the errors of that client.
    """

    def __init__(
        self,
        address: Address,
        user: Mapping[str, Any],
        list_topics: ListTopics,
        last_error: LastError,
        clock: Clock,
        *,
        refresh_s: float,
    ) -> None:
        self._address = address
        self._user = user
        self._list_topics = list_topics
        self._last_error = last_error
        self._clock = clock
        self._refresh_s = refresh_s
        self._pid = os.getpid()
        """Process whose threads `_asking` is about."""
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._asking: set[str] = set()
        self._gone: dict[str, str] = {}
        self._bytes_max: dict[str, int] = {}
        self._made: tuple[int, AdminClient] | None = None
        """Client for the questions that a producer has no call for, and the process that made it."""

    def partition_count(self, topic: str) -> int:
        """Return the cached partition count; `Invalid` if there is no such topic, `Unavailable` if no broker answers."""
        known = self._known.get(topic)
        if known is None:
            return self.ask(topic, _FIRST_S)
        if self._clock.monotonic_s() - known.at_s > self._refresh_s:
            self._ask_behind(topic)
        return known.partition_count

    def recent(self, topic: str, timeout_s: float) -> int:
        """Return what `ask` does, or its answer of a moment ago: one step asks for several kinds of offsets."""
        known = self._known.get(topic)
        if known is None or self._clock.monotonic_s() - known.at_s > _FRESH_S:
            return self.ask(topic, timeout_s)
        return known.partition_count

    def ask(self, topic: str, timeout_s: float) -> int:
        """Return what `partition_count` does, as the broker says now."""
        name = self._address.topic(topic)
        try:
            found = self._list_topics(name, timeout_s).topics.get(name)
        except KafkaException as exception:
            error = error_of(exception)
            if error.code() in (KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._ALL_BROKERS_DOWN):
                raise Unavailable(
                    f"no broker answers at {self._address.bootstrap} ({self._last_error.text(error)}): check the address, "
                    "the broker, its advertised.listeners, and security.protocol and ssl.* in the setting `kafka`"
                ) from None
            raise translate(error, f"metadata of {name}") from None
        self._last_error.forget()
        if found is None or found.error is not None:
            code = KafkaError.UNKNOWN_TOPIC_OR_PART if found is None else found.error.code()
            if code == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise Invalid(
                    f"there is no topic {name} at {self._address.bootstrap}: pipeline topics apply --to {self._address}"
                )
            error = translate(found.error, f"metadata of {name}", needs=f"DESCRIBE on topic {name}")
            raise Denied(str(error)) if isinstance(error, Invalid) else error
        self._gone.pop(topic, None)
        self._known[topic] = _Known(len(found.partitions), self._clock.monotonic_s())
        return len(found.partitions)

    def _ask_behind(self, topic: str) -> None:
        if self._pid != os.getpid():  # a forked child: the asking threads do not exist here, and one may hold the lock
            self._pid, self._lock, self._asking = os.getpid(), threading.Lock(), set()
        with self._lock:
            if topic in self._asking:
                return
            self._asking.add(topic)

        def ask() -> None:
            try:
                self.ask(topic, self._refresh_s)
            except Invalid as error:
                self._gone[topic] = str(error)
            except PipelineError as error:
                _log.debug("metadata of %s is not refreshed: %s", topic, error)
            finally:
                self._asking.discard(topic)

        run = guarded(_log, "pipeline-kafka-metadata", ask)
        threading.Thread(target=run, name="pipeline-kafka-metadata", daemon=True).start()

    def check(self, topic: str, partition: int) -> None:
        """Raise `Invalid` if there is no such partition. Beyond the cached count the broker is asked: it may be new."""
        count = self.partition_count(topic)
        if partition >= count:
            count = self.ask(topic, _FIRST_S)
        if not 0 <= partition < count:
            raise Invalid(f"topic {self._address.topic(topic)} has no partition {partition}; it has {count}")

    def missing(self, topic: str, partition: int) -> str:
        """Return why nothing can be appended to a partition at the moment, or an empty text. It may come back later."""
        count = self.partition_count(topic)
        if partition >= count and self._clock.monotonic_s() - self._known[topic].at_s > _FRESH_S:
            count = self.ask(topic, _FIRST_S)
        if partition >= count:
            return f"topic {self._address.topic(topic)} has no partition {partition}; it has {count}: pipeline topics apply"
        return self._gone.get(topic, "")

    def topic_id(self, topic: str, timeout_s: float) -> str:
        """Return the broker's id of the topic. Asks without retries."""
        name = self._address.topic(topic)
        admin = self._admin()
        futures = admin.describe_topics(TopicCollection([name]), request_timeout=timeout_s)
        return id_text(self._result(admin, futures[name], f"describe {name}", timeout_s).topic_id)

    def high_watermarks(self, topic: str, timeout_s: float) -> dict[int, int]:
        """Return the high watermark of each present partition. Asks without retries."""
        name = self._address.topic(topic)
        places = [TopicPartition(name, number) for number in range(self.ask(topic, timeout_s))]
        admin = self._admin()
        futures = admin.list_offsets(
            dict.fromkeys(places, OffsetSpec.latest()),
            isolation_level=IsolationLevel.READ_UNCOMMITTED,
            request_timeout=timeout_s,
        )
        found = {
            place.partition: self._result(admin, future, f"offsets of {name}-{place.partition}", timeout_s).offset
            for place, future in futures.items()
        }
        if min(found.values()) < 0:  # how librdkafka says that a leader did not answer
            raise Unavailable(f"offsets of {name}: a leader does not answer")
        return found

    def _admin(self) -> AdminClient:
        made = self._made
        if made is not None and made[0] == os.getpid():
            return made[1]
        if made is not None:  # its threads are the parent's: to free it here would be to wait for them
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(made[1]))
        admin = AdminClient({**revealed(admin_options(self._address, self._user)), "error_cb": self._last_error})
        self._made = os.getpid(), admin
        return admin

    def _result(self, admin: AdminClient, future: Future[Any], what: str, timeout_s: float) -> Any:
        try:
            return _answer(future, timeout_s + _FIRST_S)
        except KafkaException as exception:
            raise translate(error_of(exception), what) from None
        except TimeoutError:
            raise Unavailable(f"{what}: no answer within {timeout_s} s") from None
        finally:
            admin.poll(0)  # errors and log lines wait for it, and take memory

    def close(self) -> None:
        """Close the client of `topic_id` and `high_watermarks`, if this process made it."""
        if self._made is not None and self._made[0] == os.getpid():
            self._made = None

    def forget_bytes_max(self, topic: str) -> None:
        """Forget the size limit of a topic, because it has refused a message within the limit."""
        self._bytes_max.pop(topic, None)

    def message_bytes_max(self, topic: str, timeout_s: float) -> int:
        """Return the size of the largest value that the topic takes. Cached until `forget_bytes_max`."""
        known = self._bytes_max.get(topic)
        if known is not None:
            return known
        name = self._address.topic(topic)
        admin = AdminClient(revealed(admin_options(self._address, self._user)))
        resource = ConfigResource(ConfigResource.Type.TOPIC, name)
        try:
            (future,) = admin.describe_configs([resource], request_timeout=timeout_s).values()
            limit = _less_overhead(int(_answer(future, timeout_s)["max.message.bytes"].value))
        except (KafkaException, KeyError, TimeoutError) as error:
            _log.info("max.message.bytes of %s is unknown: %s", name, error)
            return _less_overhead(_ASSUMED_BYTES_MAX)  # an assumption is not cached
        self._bytes_max[topic] = limit
        return limit


def _answer(future: Future[Any], timeout_s: float) -> Any:
    """Return the result of `future`, which a thread of librdkafka sets.

    A real thread can't wake green ones, and they may not wait for a lock that it holds. So with green threads the future is
    checked repeatedly, without its lock.
    """
    if not are_green():
        return future.result(timeout_s)
    never = threading.Event()
    for _ in range(ceil(timeout_s / GREEN_INTERVAL_S)):
        if future._state == "FINISHED":  # set after result and exception
            if future._exception is not None:
                raise future._exception
            return future._result
        never.wait(GREEN_INTERVAL_S)
    raise TimeoutError


def id_text(topic_id: Uuid) -> str:
    """Return a topic's id as Kafka's own tools write it: URL-safe, unlike `str(topic_id)`."""
    return str(topic_id).translate(_URL_SAFE)


def _less_overhead(bytes_max: int) -> int:
    return bytes_max - bytes_max // 128 - _OVERHEAD_BYTES
