"""Transactional writes: one producer for each transactional id, fenced by the next one of the same id (KIP-98)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby, repeat
from operator import attrgetter
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka import Message as Delivered

from pipeline.adapters.kafka.batches import BatchProducer, new_producer
from pipeline.adapters.kafka.errors import Verdict, code_of, describe, error_of, translate, verdict_of
from pipeline.errors import Discontinuous, Displaced, Fenced, PipelineError, Unavailable
from pipeline.ports import NO_BEGINS, Begins, Clock, Message, MessageRun, check_begins
from pipeline.secret import revealed

_log = logging.getLogger(__name__)
_BACKOFF_S = 0.05
_WAIT_S = 0.1


class _Aborted(Exception):
    """Nothing of the attempt is or will become visible; the same messages can be sent again."""


def _runs(messages: Sequence[Message]) -> list[MessageRun]:
    """Return neighbouring messages for the same partition together: a commit has tens of thousands, in one or two runs."""
    if isinstance(messages, MessageRun):
        return [messages]
    runs = []
    for (topic, partition), neighbours in groupby(messages, attrgetter("topic", "partition")):
        run = [*neighbours]
        runs.append(MessageRun(topic, partition, [it.key for it in run], [it.value for it in run]))
    return runs


class _Reports:
    """Offsets of delivered messages. Only the first and the last message of each run report: the others lie between them."""

    def __init__(self, *, every: bool) -> None:
        self.every = every
        self.first: dict[tuple[str, int], int] = {}
        self.covering: dict[tuple[str, int], int] = {}
        self.placeless: set[tuple[str, int]] = set()
        """Partitions of which the broker took a message without telling its offset, because it has had the message before.
        """
        self.failed = False
        """True if a message was not delivered, so that the transaction can't be committed."""
        self.hopeless: tuple[KafkaError, str] | None = None
        """Error and place of a message that can never be delivered."""

    def callback(self, topic: str, partition: int) -> Callable[[KafkaError | None, Delivered], None]:
        """Return the delivery callback of a message."""
        return partial(self._delivered, (topic, partition))

    def _delivered(self, place: tuple[str, int], error: KafkaError | None, message: Delivered) -> None:
        if error is None:
            offset = message.offset()
            if offset is None:
                self.placeless.add(place)
            else:
                self.first[place] = min(self.first.get(place, offset), offset)
                self.covering[place] = max(self.covering.get(place, 0), offset + 1)
        else:
            self.failed = True
            if code_of(error).verdict in (Verdict.MESSAGE, Verdict.OPERATOR):
                self.hopeless = error, f"write to {message.topic()}-{message.partition()}"


class KafkaTransaction:
    """A `ports.Transaction`. A new one fences every older one of its id and aborts the transaction that those had open.

    Raises `Unavailable` if no coordinator answers within `timeout_s`, `Invalid` if the broker refuses. The producer is
    dropped, not closed: librdkafka's own close waits for the broker without a deadline.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        transactional_id: str,
        *,
        timeout_s: float,
        clock: Clock,
        check: Callable[[str, int], None],
        broker_topic: Callable[[str], str],
    ) -> None:
        self._id = transactional_id
        self._clock = clock
        self._check = check
        self._broker_topic = broker_topic
        self._over: PipelineError | None = None
        """Error after which nothing can be committed any more."""
        self._ask_all = False
        """True if every message must report: after an abort librdkafka says only that some message has failed."""
        self._needs = "WRITE on the topic"
        self._ends: Mapping[tuple[str, int], int] = {}
        """Offsets behind the records of the last transaction, by the partitions that it wrote to."""
        self._was_away = False
        """True if no broker could be reached at some time since the last transaction was committed."""
        self._producer: Producer | None
        self._producer, self._batches = new_producer({**revealed(options), "error_cb": self._note_error})
        deadline_s = clock.monotonic_s() + timeout_s
        try:
            self._until_decided(self._producer.init_transactions, deadline_s, "start")
        except _Aborted as error:  # pragma: no cover  # librdkafka names none for init_transactions
            raise Unavailable(str(error)) from None

    @property
    def marker_count(self) -> int:
        """One: the broker writes a control record to each partition of a transaction."""
        return 1

    def commit(self, messages: Sequence[Message], *, timeout_s: float, begins: Begins = NO_BEGINS) -> list[int]:
        """Append all messages in one transaction; see `ports.Transaction`.

        Without `begins`, what the broker or librdkafka aborts is repeated until `timeout_s` is over: nothing of it is
        visible. With `begins`, this raises `Displaced` after an abort, and without an attempt if the brokers were away.

        The reason: a coordinator that starts while a partition has no leader takes the partition for a deleted one (Kafka
        4.3: "Couldn't find leader endpoint"). It then leaves out the marker of a transaction that it has acknowledged, and
        the broker takes the next transaction for a part of that one: both are committed, or both are aborted.
        """
        if self._over is not None:
            raise self._over
        if not messages:
            return []
        runs = _runs(messages)
        for run in runs:
            self._check(run.topic, run.partition)
        self._needs = "WRITE on topic " + " or ".join(sorted({self._broker_topic(run.topic) for run in runs}))
        deadline_s = self._clock.monotonic_s() + timeout_s
        try:
            self._poll(0)
            if begins and self._was_away:
                self._was_away = False
                raise Displaced(f"no broker could be reached since transaction {self._id} was last committed")
            while True:
                try:
                    return self._attempt(runs, begins, deadline_s)
                except _Aborted as error:
                    if self._clock.monotonic_s() >= deadline_s:
                        raise Unavailable(f"transaction {self._id}: {error}") from None
                    if begins:
                        raise Displaced(f"transaction {self._id} was aborted: {error}") from None
                    _log.warning("transaction %s was aborted, trying again: %s", self._id, error)
                    self._poll(_BACKOFF_S)
        except Displaced:
            raise
        except PipelineError as error:
            self._over = error
            raise

    def _open(self) -> Producer:
        if self._producer is None:
            raise Fenced(f"transactional id {self._id}: closed")
        return self._producer

    def _poll(self, timeout_s: float) -> None:
        """Serve callbacks. If the producer is broken, the next call of the transactional API reports it."""
        with suppress(KafkaException):
            self._open().poll(timeout_s)

    def _note_error(self, error: KafkaError) -> None:
        self._was_away = self._was_away or error.code() == KafkaError._ALL_BROKERS_DOWN

    def _attempt(self, runs: Sequence[MessageRun], begins: Begins, deadline_s: float) -> list[int]:
        producer = self._open()
        reports = _Reports(every=self._ask_all)
        self._ask_all = False
        self._until_decided(lambda _: producer.begin_transaction(), deadline_s, "begin")
        try:
            try:
                for run in runs:
                    self._produce(producer, run, reports, deadline_s)
            except KafkaException as exception:
                self._abort(deadline_s)
                raise self._judged(error_of(exception), "produce") from None
            except BufferError:
                self._abort(deadline_s)
                raise Unavailable(f"transaction {self._id}: librdkafka's queue stays full") from None
            # Flush before the commit, so that `begins` can be checked: the topic may have been created again meanwhile.
            # It raises if the producer is broken, which the commit will report; as SystemError if librdkafka logs in the
            # same call.
            waiting_count = 0
            with suppress(KafkaException, SystemError):
                waiting_count = producer.flush(max(deadline_s - self._clock.monotonic_s(), 0.001))
            if begins and waiting_count:
                raise Unavailable(f"transaction {self._id}: {waiting_count} messages were not delivered in time")
            if not reports.failed:
                self._check_place(runs, begins, reports, deadline_s)
            self._until_decided(producer.commit_transaction, deadline_s, "commit")
            self._ends = reports.covering
            self._poll(0)
            self._was_away = False
        except _Aborted:
            if reports.hopeless is not None:
                error, where = reports.hopeless
                raise translate(error, f"transaction {self._id}, {where}", needs=self._needs) from None
            self._ask_all = True
            raise
        covering: list[int] = []
        for run in runs:
            next_offset = reports.covering.get((run.topic, run.partition))
            if next_offset is None:
                raise Unavailable(f"transaction {self._id}: committed, but the broker does not say where")
            covering += repeat(next_offset, len(run))
        return covering

    def _check_place(self, runs: Sequence[MessageRun], begins: Begins, reports: _Reports, deadline_s: float) -> None:
        """Abort, and raise, unless everything stands where `begins` says, without foreign records in between.

        Without any report the producer is broken, and the commit reports it.
        """
        for place, begin in begins.items():
            count = sum(len(run) for run in runs if (run.topic, run.partition) == place)
            where = f"{place[0]}-{place[1]}"
            try:
                if count and place in reports.placeless:
                    raise Displaced(f"the broker does not say where in {where} a commit stands")
                if count and place in reports.first:
                    if self._ends.get(place) == reports.first[place] == begin - self.marker_count:
                        raise Displaced(f"the broker has left out the marker of the last transaction in {where}")
                    check_begins({place: begin}, {place: reports.first[place]})
                    if reports.covering[place] - reports.first[place] != count:
                        raise Displaced(f"something else has written to {where} between the records of a commit")
            except Discontinuous:
                self._abort(deadline_s)
                raise

    def _produce(self, producer: Producer, run: MessageRun, reports: _Reports, deadline_s: float) -> None:
        name, report = self._broker_topic(run.topic), reports.callback(run.topic, run.partition)
        silent = 0 if reports.every else len(run) - 1

        def produce_with_report(number: int) -> None:
            arguments = name, run.values[number], run.keys[number], run.partition, report
            self._produce_in_time(producer, arguments, deadline_s)

        if silent:
            produce_with_report(0)
        if self._batches is not None:
            self._produce_at_once(producer, self._batches, run, silent, deadline_s)
        else:
            produce = producer.produce
            for key, value in zip(run.keys[1:silent], run.values[1:silent], strict=True):
                try:
                    produce(name, value, key, run.partition)
                except BufferError:
                    self._produce_in_time(producer, (name, value, key, run.partition), deadline_s)
        for number in range(silent, len(run)):
            produce_with_report(number)

    def _produce_at_once(
        self, producer: Producer, batches: BatchProducer, run: MessageRun, end: int, deadline_s: float
    ) -> None:
        """Produce the messages of a run between the first and number `end`, without reports; raise what `produce` would."""
        name, number = self._broker_topic(run.topic), 1
        while number < end:
            number, code = batches.produce(name, run.partition, run.keys, run.values, number, end)
            if code == KafkaError._QUEUE_FULL:
                if self._clock.monotonic_s() >= deadline_s:
                    raise BufferError
                producer.poll(_WAIT_S)
            elif code:
                raise KafkaException(KafkaError(code, f"Unable to produce message: {KafkaError(code).str()}"))

    def _produce_in_time(self, producer: Producer, arguments: tuple[Any, ...], deadline_s: float) -> None:
        while True:
            try:
                producer.produce(*arguments)
                return
            except BufferError:
                if self._clock.monotonic_s() >= deadline_s:
                    raise
                producer.poll(_WAIT_S)

    def _until_decided(self, call: Callable[[float], None], deadline_s: float, what: str, *, abort: bool = True) -> None:
        """Repeat a call of the transactional API, which continues the previous one, until it is decided or time is over.

        An error that asks for an abort leads to one, except for the abort itself (`abort` False), which is repeated.
        """
        while True:
            left_s = deadline_s - self._clock.monotonic_s()
            try:
                call(max(left_s, 0.001))
                return
            except KafkaException as exception:
                error = error_of(exception)
                verdict = verdict_of(error)
                if verdict is Verdict.ABORT and abort:
                    self._abort_because(error, what, deadline_s)
                if verdict is not Verdict.RETRY and (verdict is not Verdict.ABORT or abort):
                    raise self._judged(error, what) from None
                if self._clock.monotonic_s() >= deadline_s:
                    raise Unavailable(describe(error, f"{what} of transaction {self._id} is undecided")) from None
                _log.info("%s", describe(error, f"{what} of transaction {self._id}, trying again"))
                self._poll(_BACKOFF_S)

    def _judged(self, error: KafkaError, what: str) -> Exception:
        """Return the error to raise once the transaction is aborted, or can't be."""
        verdict = verdict_of(error)
        if verdict in (Verdict.ABORT, Verdict.RETRY):
            return _Aborted(describe(error, what))
        return translate(error, f"{what} of transaction {self._id}", verdict, needs=self._needs)

    def _abort_because(self, error: KafkaError, what: str, deadline_s: float) -> None:
        """Abort, and raise the error itself if only an operator can remove its cause, whether the abort succeeds or not.

        A transaction into which the broker let nothing can't be aborted: it has not begun there (INVALID_TXN_STATE).
        """
        forbidden = code_of(error).verdict is Verdict.OPERATOR
        try:
            self._abort(deadline_s)
        except PipelineError:
            if not forbidden:
                raise
        if forbidden:
            raise translate(error, f"{what} of transaction {self._id}", Verdict.OPERATOR, needs=self._needs) from None

    def _abort(self, deadline_s: float) -> None:
        self._until_decided(self._open().abort_transaction, deadline_s, "abort", abort=False)

    def close(self) -> None:
        """Drop the producer. The next owner, or a time-out, aborts its open transaction. Idempotent."""
        producer, self._producer, self._batches = self._producer, None, None
        if producer is not None:
            producer.purge()
