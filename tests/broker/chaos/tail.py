"""The last records of a partition, as anybody who can read the topic sees them."""

from __future__ import annotations

from typing import NamedTuple

from confluent_kafka import Consumer, KafkaException, TopicPartition

from tests.broker.kafka import App


class Found(NamedTuple):
    """One record."""

    offset: int
    key: bytes
    """Empty if the record has none."""
    value: bytes | None


def tail(app: App, topic: str, partition: int, count: int) -> list[Found]:
    """Return the committed records among the last `count` offsets of one partition; none if its leader is away."""
    options = {"bootstrap.servers": app.bootstrap, "group.id": "look", "enable.auto.commit": False, "log_level": 0}
    consumer = Consumer({**options, "isolation.level": "read_committed", "error_cb": lambda _: None})
    place = TopicPartition(app.topic(topic), partition)
    try:
        start, end = consumer.get_watermark_offsets(place, 10)
        begin = max(start, end - count)
        consumer.assign([TopicPartition(app.topic(topic), partition, begin)])
        messages = consumer.consume(end - begin, 1.0)
        return [Found(it.offset(), it.key() or b"", it.value()) for it in messages if it.error() is None]
    except KafkaException:
        return []
    finally:
        consumer.close()
