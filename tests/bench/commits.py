"""Benchmark of producing a commit on a real broker: all its messages in one call of librdkafka, against one by one."""

from __future__ import annotations

import statistics

import pipeline.adapters.kafka.transaction as transaction_module
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka import batches
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.adapters.kafka.transaction import KafkaTransaction
from pipeline.ports import MessageRun
from pipeline.settings import KafkaSettings
from pipeline.topics import CHANGELOG
from tests.bench.kafka import broker
from tests.bench.measure import Figure, Row, at_least_times, cpu_seconds
from tests.broker.mock import one_by_one

_WAYS = {"at once": batches.new_producer, "one by one": one_by_one}


def commit(quick: bool) -> list[Row]:
    """Commit many messages of a changelog's size, in turn both ways; medians of this process' CPU, with all its threads."""
    count, rounds = (5_000, 2) if quick else (100_000, 9)
    keys, values = [b"sales-k%020d" % it for it in range(count)], [b"value-%09d" % it for it in range(count)]
    messages = MessageRun(CHANGELOG, 0, keys, values)
    took: dict[str, list[float]] = {way: [] for way in _WAYS}
    with broker() as url:
        log = KafkaLog(parse_url(url), KafkaSettings(), SystemClock())
        transactions: dict[str, KafkaTransaction] = {}
        for way, new_producer in _WAYS.items():
            transaction_module.new_producer = new_producer
            transactions[way] = log.transaction(way)
        transaction_module.new_producer = batches.new_producer
        for number in range(rounds):
            for way, transaction in transactions.items():
                seconds = cpu_seconds(lambda transaction=transaction: transaction.commit(messages, timeout_s=60))
                took[way] += [count / seconds] * (number > 0)
        log.close()
    bare = Figure(statistics.median(took["one by one"]), "messages/CPU s", "produced one by one")
    return [at_least_times("Kafka: commit", Figure(statistics.median(took["at once"]), "messages/CPU s"), bare, 1.5)]
