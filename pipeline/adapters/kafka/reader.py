"""A cursor over partitions of one topic: a consumer that is assigned by hand and never joins a group."""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from pipeline.adapters.kafka.errors import Verdict, code_of, describe, error_of, translate
from pipeline.core.record import EPOCH_NONE, Records
from pipeline.errors import Discontinuous, Invalid, PipelineError, RecordsLost, Unavailable
from pipeline.ports import NO_EPOCHS, Clock
from pipeline.secret import revealed

_log = logging.getLogger(__name__)
_REFUSED_MAX = 3
_SEEK_S = 5.0
_PAUSE_S = 0.005
_LOT = 500
"""Messages that one call of librdkafka hands over. They become columns before the next call: measured, that costs half of
what it costs with lots of 5,000, which the processor's cache does not hold and Python's garbage collector walks over."""
ASK_INTERVAL_S = 4.0
"""Time between requests for the end offsets. Two answers reveal a stall, well before the watchdog ends the worker."""
STALLED_S = 3.0
"""Time without progress in spite of waiting records after which a partition counts as stalled."""

AskEnds = Callable[[Iterable[int]], Mapping[int, "Future[Any]"]]


class _Run:
    """Columns of what one poll has read of a partition so far."""

    def __init__(self, next_offset: int, leader_epoch: int) -> None:
        self.next_offset = next_offset
        self.leader_epoch = leader_epoch
        self.offsets: list[int] = []
        self.at_ms: list[int] = []
        self.keys: list[bytes | None] = []
        self.values: list[bytes | None] = []


class KafkaReader:
    """A `ports.LogReader`. Messages that were fetched in excess of a limit wait here, fewer than `_LOT`."""

    def __init__(
        self,
        options: Mapping[str, Any],
        topic: str,
        *,
        clock: Clock,
        partition_count: Callable[[], int],
        start_offsets: Callable[[Iterable[int]], Mapping[int, int]],
        end_offsets: Callable[[Iterable[int]], Mapping[int, int]],
        ask_ends: AskEnds,
    ) -> None:
        self._topic = topic
        self._clock = clock
        self._partition_count = partition_count
        self._start_offsets = start_offsets
        self._end_offsets = end_offsets
        self._options = dict(options)
        self._stalls = StallDetector(ask_ends, clock)
        self._consumer: Consumer | None = Consumer(revealed(self._options))
        self._drained = False
        """True if librdkafka had no more messages at the last call."""
        self._is_astray = False
        """True if a call failed: messages that it and earlier calls of its poll have taken from librdkafka are lost."""
        self._next: dict[int, int] = {}
        self._epochs: dict[int, int] = {}
        """Leader epoch of the last record that was read, by partition."""
        self._refused: dict[int, tuple[int, int]] = {}
        """By partition, a cursor that was refused although the log has its offset, and how many times in a row."""
        self._pause = threading.Event()
        """Event that is never set, to wait on."""
        self._waiting: list[Message] = []
        self._out_of_range: dict[int, int] = {}
        """By partition, a cursor that the broker called out of range."""

    def assign(self, next_offsets: Mapping[int, int], leader_epochs: Mapping[int, int] = NO_EPOCHS) -> None:
        """Read these partitions, and no others, from these offsets on; see `ports.LogReader`."""
        self._refused = {}
        self._assign(next_offsets, {number: leader_epochs.get(number, EPOCH_NONE) for number in next_offsets})

    def _assign(self, next_offsets: Mapping[int, int], leader_epochs: Mapping[int, int]) -> None:
        count = self._partition_count()
        for partition in next_offsets:
            if not 0 <= partition < count:
                raise Invalid(f"topic {self._topic} has no partition {partition}; it has {count}")
        self._next, self._epochs = dict(next_offsets), dict(leader_epochs)
        starts = self._start_offsets([*next_offsets])
        self._waiting = []
        self._stalls.forget()
        self._out_of_range = {number: offset for number, offset in next_offsets.items() if offset < starts[number]}
        self._place_all(self._open())
        self._is_astray = False

    def _place_all(self, consumer: Consumer) -> None:
        """Assign the cursors to a consumer."""
        places = [
            TopicPartition(self._topic, it, offset, leader_epoch=self._epochs[it]) for it, offset in self._next.items()
        ]
        try:
            consumer.assign(places)
            for place in places:
                # librdkafka asks the leader where an epoch ends when it learns of a leader or is told to seek, not when it
                # is assigned a partition whose leader it knows (its issue 5158).
                if self._epochs[place.partition] >= 0:
                    self._seek(consumer, place)
        except KafkaException as exception:
            raise translate(error_of(exception), f"assign {self._topic}") from None

    def _seek(self, consumer: Consumer, place: TopicPartition) -> None:
        """Seek once librdkafka's own thread has carried out the assignment."""
        deadline_s = self._clock.monotonic_s() + _SEEK_S
        while True:
            try:
                consumer.seek(place)
                return
            except KafkaException as exception:
                if error_of(exception).code() != KafkaError._STATE:
                    raise
                if self._clock.monotonic_s() >= deadline_s:
                    raise Unavailable(f"{self._topic}-{place.partition}: its assignment takes over {_SEEK_S} s") from None
                self._pause.wait(_PAUSE_S)

    def _open(self) -> Consumer:
        if self._consumer is None:
            raise Invalid("this reader is closed")
        return self._consumer

    def poll(self, *, record_count_max: int, bytes_max: int, timeout_s: float) -> list[Records]:
        """Return records from the cursors on; see `ports.LogReader`."""
        deadline_s = self._clock.monotonic_s() + timeout_s
        while True:
            if self._is_astray:
                self._assign(self._next, self._epochs)
            if self._out_of_range:
                self._raise_lost()
            out = self._read(record_count_max, bytes_max, timeout_s)
            if self._drained and not self._waiting and (stalled := self._stalls.stalled(self._next)):
                self._renew(stalled)
            timeout_s = deadline_s - self._clock.monotonic_s()
            if out or timeout_s <= 0:
                return out

    def _read(self, count_max: int, bytes_max: int, timeout_s: float) -> list[Records]:
        """Read what librdkafka has, up to the limits, lot by lot; wait for the first message only."""
        runs: dict[int, _Run] = {}
        errors: list[PipelineError] = []
        while count_max > 0 and bytes_max > 0:
            lot, size = self._lot(count_max, bytes_max, timeout_s)
            for partition, neighbours in groupby(lot, Message.partition):
                if partition in self._next:  # else the messages are of an assignment before this one
                    if partition not in runs:
                        runs[partition] = _Run(self._next[partition], self._epochs[partition])
                    self._add(partition, runs[partition], [*neighbours], errors)
            if self._drained and not self._waiting:
                break
            count_max, bytes_max, timeout_s = count_max - len(lot), bytes_max - size, 0.0
        out = []
        for partition, run in runs.items():
            if run.next_offset > self._next[partition]:
                self._next[partition], self._epochs[partition] = run.next_offset, run.leader_epoch
                self._refused.pop(partition, None)
                out.append(
                    Records(partition, run.offsets, run.at_ms, run.keys, run.values, run.next_offset, run.leader_epoch)
                )
        if errors and not out:
            raise errors[0]
        if self._out_of_range and not out:
            self._raise_lost()
        return out

    def _lot(self, count_max: int, bytes_max: int, timeout_s: float) -> tuple[list[Message], int]:
        """Return the next messages within the limits, and events such as a reached end; and how many bytes they have."""
        waiting = self._waiting or self._fetch(min(count_max, _LOT), timeout_s)
        count, size = min(count_max, len(waiting)), sum(map(len, waiting))
        if count < len(waiting) or size > bytes_max:
            ends = [*accumulate(map(len, waiting[:count]))]
            count = min(count, bisect_left(ends, bytes_max) + 1)
            size = ends[count - 1]
        self._waiting = waiting[count:]
        return waiting[:count], size

    def _fetch(self, count: int, timeout_s: float) -> list[Message]:
        """Return what librdkafka has; wait for the first message only."""
        consumer = self._open()
        try:
            messages: list[Message] = consumer.consume(count, 0.0)
            if not messages and timeout_s > 0:
                first = consumer.poll(timeout_s)
                messages = [] if first is None else [first, *consumer.consume(count - 1, 0.0)] if count > 1 else [first]
        except KafkaException as exception:
            self._is_astray = True
            raise translate(error_of(exception), f"read {self._topic}") from None
        self._drained = len(messages) < count
        return messages

    def _renew(self, stalled: Mapping[int, int]) -> None:
        """Replace the consumer by a new one that reads from the cursors on."""
        for partition, end in stalled.items():
            _log.warning(
                "%s-%d: nothing comes from %d on, though it ends at %d: reading goes on with another consumer",
                *(self._topic, partition, self._next[partition], end),
            )
        self._stalls.forget()
        old, self._consumer = self._open(), Consumer(revealed(self._options))
        # In a thread of its own: the close, too, may wait for an answer that never comes.
        threading.Thread(target=old.close, name="pipeline-kafka-close", daemon=True).start()
        self._place_all(self._consumer)

    def _add(self, partition: int, run: _Run, messages: list[Message], errors: list[PipelineError]) -> None:
        """Add messages of one partition to what was read of it, as columns; note errors among them."""
        failed = [*filter(Message.error, messages)]
        if failed:
            messages = [message for message in messages if message.error() is None]
            for message in failed:
                error = message.error()
                if error.code() == KafkaError._PARTITION_EOF:
                    run.next_offset = max(run.next_offset, message.offset())  # beyond markers, which no reader sees
                elif error.code() != KafkaError.GROUP_AUTHORIZATION_FAILED:  # of a group that no reader joins
                    self._note(partition, error, errors)
        if messages:
            self._check_forward(partition, messages[0].offset())
            run.next_offset = max(run.next_offset, messages[-1].offset() + 1)
            run.leader_epoch = _epoch(messages[-1])
            run.offsets += map(Message.offset, messages)
            run.at_ms += map(itemgetter(1), map(Message.timestamp, messages))
            run.keys += map(Message.key, messages)
            run.values += map(Message.value, messages)

    def _check_forward(self, partition: int, offset: int) -> None:
        if offset < self._next[partition]:
            raise Discontinuous(f"{self._topic}-{partition} went back from {self._next[partition]} to {offset}")

    def _note(self, partition: int, error: KafkaError, errors: list[PipelineError]) -> None:
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._LOG_TRUNCATION):
            self._out_of_range[partition] = self._next[partition]
        elif code_of(error).verdict in (Verdict.RETRY, Verdict.OPERATOR):  # librdkafka goes on trying
            errors.append(Unavailable(describe(error, f"read {self._topic}-{partition}", f"READ on topic {self._topic}")))
        else:
            errors.append(translate(error, f"read {self._topic}-{partition}"))

    def _raise_lost(self) -> None:
        starts, ends = self._start_offsets(self._out_of_range), self._end_offsets(self._out_of_range)
        for partition, next_offset in self._out_of_range.items():
            where = f"{self._topic}-{partition}"
            if next_offset < starts[partition]:
                raise RecordsLost(f"{where}: {starts[partition] - next_offset} records from {next_offset} on are gone")
            if next_offset > ends[partition]:
                raise RecordsLost(f"{where} ends at {ends[partition]}, before {next_offset}: it was truncated or made anew")
            self._check_refused(partition, next_offset)
        self._assign(self._next, self._epochs)  # it is in range after all: a leader that moved

    def _check_refused(self, partition: int, next_offset: int) -> None:
        """Raise `RecordsLost` if the log has the offset, but repeatedly refuses it as one of another leader epoch.

        librdkafka reports an epoch that ends below the cursor with the same code as an offset that is out of range.
        """
        offset, count = self._refused.get(partition, (next_offset, 0))
        self._refused[partition] = next_offset, count + 1 if offset == next_offset else 1
        epoch = self._epochs[partition]
        if epoch >= 0 and self._refused[partition][1] >= _REFUSED_MAX:
            raise RecordsLost(
                f"{self._topic}-{partition}: what was read below {next_offset}, of leader epoch {epoch}, is not in the log"
                " any more: a leader that lacked it was elected, or the topic was brought back from a backup"
            )

    def close(self) -> None:
        """Close the consumer. Idempotent."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.close()


def _epoch(message: Message) -> int:
    epoch = message.leader_epoch()
    return EPOCH_NONE if epoch is None else epoch


class _Asked(NamedTuple):
    at_s: float
    next_offsets: Mapping[int, int]
    """The cursors at the time of the request."""
    ends: Mapping[int, Future[Any]]


class _Behind(NamedTuple):
    next_offset: int
    since_s: float


class StallDetector:
    """Finds partitions that librdkafka has stopped to fetch, which look like partitions without new records.

    librdkafka can leave a partition unread for good while its leader goes and comes back, as happens behind a broker that
    stood still for some seconds: its statistics show fetch state "none", with a leader there and an end beyond the cursor
    (measured: 1 of 12 consumers within 7 such outages of 12 partitions, and a server; confluentinc/librdkafka#4492 reports
    the like). There is no error, the connection stays, and all other partitions go on. So the log is asked for its ends.

    `ask_ends` returns futures of the end offsets, without waiting.
    """

    def __init__(self, ask_ends: AskEnds, clock: Clock) -> None:
        self._ask_ends = ask_ends
        self._clock = clock
        self._asked: _Asked | None = None
        self._behind: dict[int, _Behind] = {}
        self._next_ask_s = clock.monotonic_s() + ASK_INTERVAL_S

    def forget(self) -> None:
        """Start over, because the reader has another assignment or another consumer."""
        self._asked, self._behind = None, {}
        self._next_ask_s = self._clock.monotonic_s() + ASK_INTERVAL_S

    def stalled(self, next_offsets: Mapping[int, int]) -> dict[int, int]:
        """Return the end offset of each stalled partition. Call it when librdkafka has no more messages.

        A partition is stalled if the log said twice, at least `STALLED_S` apart, that there are records behind the cursor,
        and the cursor has not moved. During an outage there is no answer, and so no stall.
        """
        now_s = self._clock.monotonic_s()
        stalled: dict[int, int] = {}
        if self._asked is not None and all(it.done() for it in self._asked.ends.values()):
            stalled = self._judge(self._asked, next_offsets, now_s)
            self._asked = None
        if self._asked is None and next_offsets and now_s >= self._next_ask_s:
            self._next_ask_s = now_s + ASK_INTERVAL_S
            self._asked = _Asked(now_s, dict(next_offsets), self._ask_ends(next_offsets))
        return stalled

    def _judge(self, asked: _Asked, next_offsets: Mapping[int, int], now_s: float) -> dict[int, int]:
        stalled = {}
        for partition, answer in asked.ends.items():
            cursor = asked.next_offsets[partition]
            if answer.cancelled() or answer.exception() is not None:
                continue  # unknown for now: the last answer may still hold
            end: int = answer.result().offset
            if end <= cursor or next_offsets.get(partition) != cursor:
                self._behind.pop(partition, None)
                continue
            before = self._behind.get(partition)
            if before is None or before.next_offset != cursor:
                self._behind[partition] = _Behind(cursor, now_s)
            elif asked.at_s - before.since_s >= STALLED_S:
                stalled[partition] = end
        return stalled
