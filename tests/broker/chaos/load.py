"""A load of known sums: deltas, the times of their acknowledgement, and batches that are sent again on purpose."""

from __future__ import annotations

import random
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Self

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from pipeline import Publisher, Token, Unavailable
from pipeline.topics import DELTAS
from tests.broker.chaos.stranger import Place
from tests.broker.chaos.windows import Windows
from tests.broker.kafka import App

VIEW = "chaos"
LABELS = ("group", "series")
SERIES = 20_000
GROUPS = 400
"""Number of groups, of 50 series each; the reader asks for whole groups."""
SAMPLE = "0"
"""Group of which each acknowledged amount is remembered."""
TICK_S = 0.2
BURST_TICKS = 10
"""Limit to the ticks for which deltas are recorded late, after the publisher was blocked."""
FLUSH_S = 2.0
SETTINGS: dict[str, Any] = {
    "flush_interval_ms": 100,
    "retry_backoff_max_ms": 100,
    "request_timeout_ms": 3_000,
    "metadata_refresh_ms": 100,
}

Labels = tuple[str, str]


class Came(NamedTuple):
    """Time at which a partition was seen to be committed at `position`."""

    at_s: float
    position: int


class Acked(NamedTuple):
    """Amounts that were known to be acknowledged at `at_s`, on the monotonic clock."""

    at_s: float
    total: int
    sample: Mapping[Labels, int]
    token: Token


class History:
    """Everything recorded, and acknowledged amounts with their times. One thread writes all but `others`; any may read."""

    def __init__(self) -> None:
        self.total = 0
        self.others = 0
        """Amount that other publishers may have added to the same view."""
        self.acked: list[Acked] = []

    def acknowledged(self, at_s: float) -> Acked | None:
        """Return the last acknowledged amounts by that time."""
        i = bisect_right(self.acked, at_s, key=lambda it: it.at_s)
        return self.acked[i - 1] if i else None

    def pauses(self, came: Mapping[int, Sequence[Came]], since_s: float, until_s: float) -> dict[int, float]:
        """Return, by partition, the longest time in this range with lag and an unmoved position; `came` rises."""
        acked = [*self.acked]
        pauses: dict[int, float] = {}
        for number, positions in came.items():
            ends = [it.token.next_offsets.get(number, 0) for it in acked]
            first = bisect_right(positions, since_s, key=lambda it: it.at_s)
            last = bisect_left(positions, until_s, key=lambda it: it.at_s)
            longest = 0.0
            for i in range(first, last + 1):
                before = positions[i - 1] if i else Came(0.0, 0)
                behind = bisect_right(ends, before.position)
                if behind == len(ends):
                    continue  # it had all there was
                began_s = max(since_s, acked[behind].at_s, before.at_s)
                longest = max(longest, (positions[i].at_s if i < last else until_s) - began_s)
            pauses[number] = longest
        return pauses


def series_of(number: int) -> Labels:
    """Return the labels of a series."""
    return str(number % GROUPS), str(number)


class Load(threading.Thread):
    """Adds to the series of one monotone sum at a steady rate, and flushes about five times a second.

    Each series has the same chance, amounts are 1 to 9. The load goes on recording while the broker is away.
    """

    def __init__(self, app: App, *, per_s: float, seed: int, windows: bool = False) -> None:
        """With `windows`, every hundredth delta goes to the views of `Windows`, too."""
        super().__init__(name="load", daemon=True)
        self.delta_count = 0
        self.history = History()
        self.publisher = Publisher(app.url, close_timeout_ms=5_000, **SETTINGS)
        self._view = self.publisher.sum(VIEW, labels=LABELS, monotone=True)
        self._cells = [self._view.labels(*series_of(n)) for n in range(SERIES)]
        self._model = [0] * SERIES
        self.windows = Windows(self.publisher, seed) if windows else None
        self._per_s = per_s
        self._rng = random.Random(seed)
        self._stop_asked = threading.Event()
        self._go = threading.Event()
        self._idle = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            due_s = time.monotonic()
            while not self._stop_asked.is_set():
                if not self._go.is_set():
                    self._idle.set()
                    self._go.wait(TICK_S)
                    due_s = time.monotonic()
                    continue
                self._idle.clear()
                now_s = time.monotonic()
                due_s = max(due_s, now_s - BURST_TICKS * TICK_S)
                self._record(round((now_s - due_s) * self._per_s))
                due_s = now_s
                self._flush()
                self._stop_asked.wait(max(0.0, TICK_S - (time.monotonic() - now_s)))
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._idle.set()

    def _record(self, count: int) -> None:
        rng, cells, model = self._rng, self._cells, self._model
        for _ in range(count):
            number, amount = int(rng.random() * SERIES), int(rng.random() * 9) + 1
            cells[number].add(amount)
            model[number] += amount
            self.history.total += amount
        self.delta_count += count
        for _ in range(count // 100 if self.windows is not None else 0):
            self.windows.record()  # type: ignore[union-attr]

    def _flush(self) -> bool:
        total = self.history.total
        sample = {series_of(n): self._model[n] for n in range(int(SAMPLE), SERIES, GROUPS)}
        try:
            token = self.publisher.flush(timeout_s=FLUSH_S)
        except Unavailable:
            return False
        self.history.acked.append(Acked(time.monotonic(), total, sample, token))
        return True

    def resume(self) -> None:
        """Record from now on."""
        self._idle.clear()
        self._go.set()

    def pause(self, timeout_s: float = 60.0) -> Token:
        """Stop recording until `resume`, wait until everything is acknowledged, and return the token of it."""
        self._go.clear()
        assert self._idle.wait(30), "the load does not stop"
        if self.error is not None:
            raise self.error
        deadline_s = time.monotonic() + timeout_s
        while not self._flush():
            assert time.monotonic() < deadline_s, f"not acknowledged in {timeout_s:g} s: {self.publisher.stats()}"
        return self.history.acked[-1].token

    def burst(self, count: int) -> None:
        """Record so many deltas at once, while the load is paused."""
        assert self._idle.is_set()
        while count > 0:
            self._record(min(count, 20_000))
            self._flush()
            count -= 20_000

    def expected(self) -> dict[Labels, int]:
        """Return the value that each series must have, while the load is paused."""
        return {series_of(n): value for n, value in enumerate(self._model) if value}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self._go.set()
        self.join(30)
        with suppress(Unavailable):  # a drive that failed: there may be no broker
            self.publisher.close(timeout_s=1.0)


class Again:
    """Sends batches again that are in the log already: the same bytes, under the same key, to the same partition."""

    def __init__(self, app: App, partition_count: int, rng: random.Random, but: Collection[Place] = ()) -> None:
        """Send no record at one of the places `but` again."""
        self._but = but
        self._topic = app.topic(DELTAS)
        self._partitions = range(partition_count)
        self._rng = rng
        self.count = 0
        """Number of batches that were sent again and acknowledged."""
        quiet = {"bootstrap.servers": app.bootstrap, "log_level": 0, "reconnect.backoff.max.ms": 200}
        self._reading = {**quiet, "group.id": "look", "enable.auto.commit": False, "error_cb": lambda _: None}
        self._producer = Producer({**quiet, "acks": "all", "enable.idempotence": True})

    def send(self, count: int, timeout_s: float = 60.0) -> dict[int, int]:
        """Send some of the last batches of random partitions again, once or more; return the offsets behind them."""
        ends: dict[int, int] = {}
        failed: list[KafkaError] = []

        def delivered(error: KafkaError | None, message: Any) -> None:
            if error is not None:
                failed.append(error)
            else:
                ends[message.partition()] = max(ends.get(message.partition(), 0), message.offset() + 1)

        sent = 0
        deadline_s = time.monotonic() + timeout_s
        while sent < count:
            assert time.monotonic() < deadline_s, "nothing to send again can be read"
            consumer = Consumer(self._reading)  # a new one: an old one may wait for an answer of a broker that was away
            try:
                batches = self._tail(consumer, self._rng.choice(self._partitions))
            finally:
                consumer.close()
            for _ in range(min(count - sent, 5) if batches else 0):
                message = self._rng.choice(batches)
                self._producer.produce(self._topic, message.value(), message.key(), message.partition(), delivered)
                sent += 1
        assert not self._producer.flush(timeout_s), "what is sent again is not acknowledged"
        assert not failed, failed[0]
        self.count += sent
        return ends

    def _tail(self, consumer: Consumer, partition: int) -> list[Any]:
        place = TopicPartition(self._topic, partition)
        try:
            start, end = consumer.get_watermark_offsets(place, 10)
        except KafkaException:
            return []  # its leader has just changed
        consumer.assign([TopicPartition(self._topic, partition, max(start, end - 100))])
        found = []
        for message in consumer.consume(min(100, end - start), 2.0):
            if message.error() is None and Place(message.partition(), message.offset()) not in self._but:
                found.append(message)
        return found

    def close(self) -> None:
        self._producer.purge()
