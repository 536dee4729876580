"""A stranger who can write to the topics of an app: records that the pipeline never writes, and open transactions."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException, Producer

from tests.broker.kafka import App

WAIT_S = 60.0


class Place(NamedTuple):
    """Partition and offset of a record."""

    partition: int
    offset: int


class Raw(NamedTuple):
    """A record as it is appended."""

    partition: int
    value: bytes | None
    key: bytes | None = None


class Stranger:
    """Appends records as they are, outside of transactions, and waits until they are acknowledged."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._producer = Producer(_options(app, {"acks": "all", "enable.idempotence": True, "linger.ms": 0}))

    def send(self, topic: str, records: Sequence[Raw]) -> list[Place]:
        """Append to one of the app's topics, and return the place of each record."""
        return _append(self._producer, self._app.topic(topic), records)

    def close(self) -> None:
        self._producer.purge()


class Hanging:
    """A foreign transaction that has reached the broker, and is open until the test or the broker ends it."""

    def __init__(self, app: App, topic: str, records: Sequence[Raw], *, timeout_ms: int) -> None:
        options = {"transactional.id": f"stranger-{uuid.uuid4().hex[:10]}", "transaction.timeout.ms": timeout_ms}
        self._producer = Producer(_options(app, {**options, "linger.ms": 0}))
        self._producer.init_transactions(WAIT_S)
        self._producer.begin_transaction()
        self.places = _append(self._producer, app.topic(topic), records)

    def end(self, how: str) -> None:
        """End the transaction: `commit`, `abort`, or `leave` it to the broker, which aborts it when its time is over."""
        if how == "commit":
            self._producer.commit_transaction(WAIT_S)
        elif how == "abort":
            self._producer.abort_transaction(WAIT_S)
        else:
            assert how == "leave", how


def _options(app: App, more: dict[str, Any]) -> dict[str, Any]:
    quiet = {"log_level": 0, "error_cb": lambda _: None, "reconnect.backoff.max.ms": 200}
    return {"bootstrap.servers": app.bootstrap, "message.max.bytes": 20_000_000, **quiet, **more}


def _append(producer: Producer, topic: str, records: Sequence[Raw]) -> list[Place]:
    places: dict[int, Place] = {}
    failed: list[KafkaError] = []

    def delivered(number: int, error: KafkaError | None, message: Any) -> None:
        if error is not None:
            failed.append(error)
        else:
            places[number] = Place(message.partition(), message.offset())

    for number, it in enumerate(records):
        on_delivery = _bound(delivered, number)
        producer.produce(topic, it.value, it.key, it.partition, on_delivery=on_delivery)
    if producer.flush(WAIT_S):
        raise AssertionError(f"{topic}: what a stranger sends is not acknowledged")
    if failed:
        raise KafkaException(failed[0])
    return [places[number] for number in range(len(records))]


def _bound(delivered: Any, number: int) -> Any:
    return lambda error, message: delivered(number, error, message)
