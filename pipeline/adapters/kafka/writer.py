"""Appends without transactions, for publishers and gateways."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka import Message as Delivered
from confluent_kafka.admin import ClusterMetadata

from pipeline.adapters.kafka.errors import LastError, RateLimitFilter, Verdict, code_of, describe, error_of
from pipeline.adapters.kafka.metadata import Denied, Metadata
from pipeline.adapters.kafka.options import Address, publisher_options, try_user_options
from pipeline.errors import Invalid, PipelineError, Unavailable
from pipeline.ports import Clock, Message
from pipeline.secret import revealed
from pipeline.threads import GREEN_INTERVAL_S, POLL_INTERVAL_S, PeriodicThread, are_green, wait_in_c
from pipeline.topics import DELTAS

_log = logging.getLogger(__name__)
_log.addFilter(RateLimitFilter())
_GRACE_S = 2.0
"""Time beyond the deadline: librdkafka looks for messages that have timed out once a second."""
_PURGE_S = 5.0
_ASK_S = 2.0


class _Append:
    """Messages of one call, and their results."""

    def __init__(self, count: int) -> None:
        self.results: list[int | PipelineError] = [_UNANSWERED] * count
        self.done = threading.Event()
        self._left = count
        self._lock = threading.Lock()

    def answer(self, number: int, result: int | PipelineError) -> None:
        """Set the result of one message."""
        with self._lock:
            self.results[number] = result
            self._left -= 1
        if not self._left:
            self.done.set()


_UNANSWERED = Unavailable("not acknowledged in time; it may be appended all the same")
_NO_OFFSET = Unavailable("appended, but the broker does not say where")


class _Client:
    """A producer, and the thread that serves its callbacks. It belongs to the process that made it."""

    def __init__(self, options: Mapping[str, Any], clock: Clock) -> None:
        self.pid = os.getpid()
        self.producer = Producer(revealed(options))
        self.broken = False
        """True if the producer has a fatal error, and must be replaced."""
        self.fatal: KafkaError | None = None
        """The fatal error, once it is known."""
        self._green = are_green()
        """True with green threads: `poll` then never waits, because a wait in C stops all of them."""
        self._fatal_known = threading.Event()
        self._thread = PeriodicThread(
            "pipeline-kafka",
            lambda: self._poll(0 if self._green else POLL_INTERVAL_S),
            log=_log,
            clock=clock,
            interval_s=POLL_INTERVAL_S if self._green else 0,
            waits_first=self._green,
            on_end=lambda: self._poll(0),
        )
        self._thread.start()

    def _poll(self, timeout_s: float) -> None:
        """Serve callbacks. What they raise must not end the thread: every later append would wait for an answer in vain."""
        try:
            self.producer.poll(timeout_s)
        except KafkaException as exception:
            self.fatal = error_of(exception)
            self.broken = True
            self._fatal_known.set()
            _log.warning("%s", describe(self.fatal, "librdkafka has given a producer up, the next append makes a new one"))
        except Exception:
            _log.exception("a delivery report could not be read")

    def wait_answered(self, call: _Append, timeout_s: float) -> bool:
        """Wait until all messages of `call` have a result, or time is over; return whether they have."""
        waits = ceil(timeout_s / GREEN_INTERVAL_S) if self._green else 0
        for _ in range(waits):  # a green thread has to ask for the callbacks itself, again and again
            self._poll(0)
            if call.done.wait(GREEN_INTERVAL_S):
                return True
        return call.done.wait(0 if waits else timeout_s)

    def wait_fatal(self, timeout_s: float) -> None:
        """Wait until the fatal error is known, or time is over."""
        self._fatal_known.wait(timeout_s)

    def wait_stopped(self, timeout_s: float) -> bool:
        """Wait until the client is closed, or time is over; return whether it is closed."""
        return self._thread.stopping.wait(timeout_s)

    def close(self) -> bool:
        """Give up everything that is not delivered; return whether the thread has ended."""
        self.producer.purge()
        return self._thread.stop(_PURGE_S)

    def abandon(self) -> None:
        """Leave the producer to the parent, in a forked child: freeing it would wait for threads that do not exist there."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.producer))


class KafkaLogWriter:
    """A `ports.LogWriter` on the topics of one app. Connects when it is first used; a forked child connects anew.

    A message that is not acknowledged in time is purged if possible, so that a broker which was away gets each batch once or
    twice when it returns, however many attempts there were.
    """

    def __init__(
        self,
        address: Address,
        user: Mapping[str, Any],
        clock: Clock,
        *,
        timeout_ms: int,
        metadata_refresh_ms: int,
        metadata: Metadata | None = None,
    ) -> None:
        try_user_options(address, user, timeout_ms=timeout_ms)
        self._last_error = last_error = LastError()
        self._options = {**publisher_options(address, user, timeout_ms=timeout_ms), "error_cb": last_error}
        self._address = address
        self._clock = clock
        self._timeout_s = timeout_ms / 1000
        self._lock = threading.Lock()
        self._made: _Client | None = None
        self._closed = False
        refresh_s = metadata_refresh_ms / 1000
        self._metadata = metadata or Metadata(address, user, self._list_topics, last_error, clock, refresh_s=refresh_s)

    def _client(self) -> _Client:
        client = self._made
        if client is not None and client.pid == os.getpid() and not client.broken:
            return client
        if client is not None and client.pid != os.getpid():
            self._lock = threading.Lock()  # the parent's may have been taken when it forked
            client.abandon()
            client = self._made = None
        with self._lock:
            if self._closed:
                raise Invalid("this publisher is closed")
            if self._made is None or self._made.broken:
                if self._made is not None:
                    self._made.close()
                self._made = _Client(self._options, self._clock)
            return self._made

    def _list_topics(self, topic: str, timeout_s: float) -> ClusterMetadata:
        return wait_in_c(self._client().producer.list_topics, topic, timeout_s)

    def partition_count(self, topic: str) -> int:
        """Return the partition count of a topic, which can be some seconds old."""
        return self._metadata.partition_count(topic)

    def message_bytes_max(self, topic: str) -> int:
        """Return the size of the largest value that the topic takes."""
        return self._metadata.message_bytes_max(topic, self._timeout_s)

    def topic_id(self, topic: str) -> str:
        """Return the broker's id of the topic. Asks without retries."""
        try:
            return self._metadata.topic_id(topic, min(self._timeout_s, _ASK_S))
        except Invalid as error:  # the topic may be there again soon, and the permission too
            raise Unavailable(str(error)) from None

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        """Return the high watermark of each present partition. Repeated while partitions have no leader yet."""
        deadline_s = self._clock.monotonic_s() + self._timeout_s
        while True:
            try:
                return self._metadata.high_watermarks(topic, min(self._timeout_s, _ASK_S))
            except Unavailable:
                if self._clock.monotonic_s() >= deadline_s or self._client().wait_stopped(POLL_INTERVAL_S):
                    raise

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        """Append, and wait for acks=all of each message; see `ports.LogWriter`."""
        if not messages:
            return []
        deadline_s = self._clock.monotonic_s() + timeout_s + _GRACE_S
        try:
            client = self._client()
        except (PipelineError, KafkaException) as error:
            return [error if isinstance(error, PipelineError) else Unavailable(str(error))] * len(messages)
        call = _Append(len(messages))
        for number, message in enumerate(messages):
            refused = self._produce(client, message, partial(self._delivered, client, call, number), deadline_s)
            if refused is not None:
                call.answer(number, refused)
        if not client.wait_answered(call, max(0.0, deadline_s - self._clock.monotonic_s())):
            _log.warning("%s: messages are taken back after %.1f s", self._address, timeout_s)
            client.producer.purge()
            client.wait_answered(call, _PURGE_S)
        return list(call.results)

    def _produce(
        self, client: _Client, message: Message, report: Callable[..., None], deadline_s: float
    ) -> PipelineError | None:
        """Hand a message to librdkafka; return the error if that fails."""
        topic = self._address.topic(message.topic)
        try:
            if missing := self._metadata.missing(message.topic, message.partition):
                return Unavailable(missing)
            refreshed = False
            while True:
                try:
                    client.producer.produce(topic, message.value, message.key, message.partition, report)
                    return None
                except BufferError:
                    if self._clock.monotonic_s() >= deadline_s or client.wait_stopped(POLL_INTERVAL_S):
                        return Unavailable(f"append to {topic}: librdkafka's queue stays full")
                except KafkaException as exception:
                    if refreshed or error_of(exception).code() != KafkaError._UNKNOWN_PARTITION:
                        raise
                    refreshed = True
                    wait_in_c(client.producer.list_topics, topic, _ASK_S)  # its own view is older than ours
        except KafkaException as exception:
            error = error_of(exception)
            if error.code() == KafkaError._FATAL:  # without a reason, which the polling thread gets
                client.wait_fatal(_ASK_S)
            return self._refusal(client, error, topic, message.partition)
        except Denied as error:
            return Unavailable(str(error))
        except PipelineError as error:
            return error

    def _delivered(self, client: _Client, call: _Append, number: int, error: KafkaError | None, message: Delivered) -> None:
        if error is None:
            self._last_error.forget()
            offset = message.offset()
            # None: the broker has had it before (DUPLICATE_SEQUENCE_NUMBER) and tells no offset; sending a copy will.
            call.answer(number, _NO_OFFSET if offset is None else offset + 1)
        else:
            call.answer(number, self._refusal(client, error, message.topic(), message.partition()))

    def _refusal(self, client: _Client, error: KafkaError, topic: str, partition: int) -> PipelineError:
        where, needs = f"append to {topic}-{partition}", f"WRITE on topic {topic}"
        if error.fatal() or error.code() == KafkaError._FATAL:
            client.broken = True  # the next call makes a new one; batches have numbers of their own
        if client.broken:
            return Unavailable(describe(client.fatal or error, where, needs))
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            self._metadata.forget_bytes_max(DELTAS)  # it takes less than it did
        text = describe(error, where, needs) + self._last_error.reason(error)
        # Only a wrong message is refused for good: a permission can still be granted, and nothing is lost until then.
        return Invalid(text) if code_of(error).verdict is Verdict.MESSAGE else Unavailable(text)

    def rest(self) -> bool:
        """See `ports.Resting`."""
        with self._lock:
            client, self._made = self._made, None
        self._metadata.close()
        return client is None or client.close()

    def close(self) -> None:
        """Close connections. Unacknowledged messages may be lost. Idempotent."""
        with self._lock:
            self._closed = True
            self._metadata.close()
            client, self._made = self._made, None
        if client is not None:
            if client.pid == os.getpid():
                client.close()
            else:
                client.abandon()
