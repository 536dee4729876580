"""What librdkafka says by itself, between calls: kept for the message of a call that then fails, and logged seldom."""

from __future__ import annotations

import logging
import re

from confluent_kafka import KafkaError

from pipeline.adapters.kafka.errors import text_of

_AGAIN_S = 60.0
_REMEMBERED_MAX = 1_000
_VARYING = re.compile(r"\d+ms|#\w+-\d+|, \d+ identical error\(s\) suppressed")


class Cause:
    """An `error_cb`: why nobody answers. Safe from any thread, as long as somebody polls the client."""

    def __init__(self) -> None:
        self.last: KafkaError | None = None
        """What was wrong with a connection, since `forget`."""

    def __call__(self, error: KafkaError) -> None:
        if error.code() != KafkaError._ALL_BROKERS_DOWN:  # says less than the one before
            self.last = error

    def forget(self) -> None:
        """Somebody has answered."""
        self.last = None

    def text(self, error: KafkaError) -> str:
        """The reason in words; `error` is what the call failed with, which says little."""
        return text_of(self.last or error)


class RateLimitFilter(logging.Filter):
    """Lets a line through once a minute: a broker that is away is told of at each attempt, which is many a second."""

    def __init__(self) -> None:
        super().__init__()
        self._next_s: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it."""
        key = _VARYING.sub("", record.getMessage())
        if record.created < self._next_s.get(key, 0.0):
            return False
        if len(self._next_s) >= _REMEMBERED_MAX:
            self._next_s.clear()
        self._next_s[key] = record.created + _AGAIN_S
        return True
