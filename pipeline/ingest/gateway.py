"""Takes deltas published over HTTP: single deltas, which it merges and seals, and batches that are sealed already."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

import pipeline.metrics as m
from pipeline.budget import CHECK_EVERY, check_budget
from pipeline.core.codec import RefusedGroup, encode_batch
from pipeline.core.distribution import HISTOGRAM, Distribution
from pipeline.core.grants import Bounds
from pipeline.core.kinds import KIND_NAMES, KINDS, check_ahead, kind_of
from pipeline.core.limits import TaskLimits
from pipeline.core.record import (
    CONTROL_ACTIONS,
    LABEL_COUNT_MAX,
    NAME,
    Batch,
    Control,
    Definition,
    Group,
    check_label_values,
    parse_suffix,
    series_prefix,
    series_suffix,
    spread_of,
    start_of_window_ms,
)
from pipeline.core.sequence import Outbox, Sealed
from pipeline.core.token import Token
from pipeline.errors import BadRecord, GroupsForbidden, Invalid, PipelineError, Unavailable
from pipeline.ingest.admission import NoFacts, Rooms, check_batch, check_owner, groups_outside, refusal
from pipeline.ingest.definitions import DefinitionFinder, DefinitionOf, DefinitionsOf, KnownViews
from pipeline.ingest.idempotency import chunks, partition_of_request, producer_of_request
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, Facts, LogWriter, Message, RawDelta, Refusal, RequestKey
from pipeline.publisher.batching import Pending, drafts_of, partition_of, seal
from pipeline.publisher.tokens import TokenMaker
from pipeline.settings import PublisherSettings
from pipeline.topics import DELTAS


class _Series(NamedTuple):
    """The key under which deltas of a request merge into one state of a batch."""

    part: int
    """Number of the batch within a request with a key; else 0."""
    definition: Definition
    suffix: bytes


class Gateway:
    """A `ports.Ingest` on a log. `definition_of` returns the known definition of a view: a delta that leaves something out
    gets it from there.

    If anything in a request is wrong, nothing of it is appended. The rest is one append: on the embedded log that is atomic,
    on Kafka a broker's failure can cut it between partitions. A client that gets no answer and sends single deltas again
    counts them twice, unless they had a key.

    Definitions never conflict, so a delta with other labels, or of another kind, than its view has is of another definition.
    """

    def __init__(
        self,
        writer: LogWriter,
        clock: Clock,
        settings: PublisherSettings,
        definition_of: DefinitionOf,
        metrics: Metrics = NO_METRICS,
        *,
        limits: TaskLimits | None = None,
        facts: Facts | None = None,
        idempotent_partitions: int = 1,
        definitions_of: DefinitionsOf = lambda view, kind, window_s, bounds: (),
    ) -> None:
        """`limits` are those of the tasks; `facts` knows their state; `definitions_of` is as in `definitions`."""
        self._writer = writer
        self._tokens = TokenMaker(writer)
        self._clock = clock
        self._settings = settings
        self._definitions = DefinitionFinder(clock, definition_of, definitions_of)
        self._metrics = metrics
        self._limits = limits or TaskLimits()
        self._facts = facts or NoFacts()
        self._rooms = Rooms(self._facts, self._limits.views_max)
        self._idempotent_partitions = idempotent_partitions
        self._lock = threading.Lock()
        self._outbox = Outbox(clock.new_id(), 0)
        self._turn = crc32(self._outbox.producer_id.encode())
        """Number of the next request, which chooses among the partitions of series that are spread."""

    # Deltas

    def deltas(self, deltas: Sequence[RawDelta], key: RequestKey | None = None, bounds: Bounds | None = None) -> Token:
        """Accept all deltas or none; see `ports.Ingest`."""
        return self._take(deltas, deltas, None, key, bounds)

    def fitting(
        self, deltas: Sequence[RawDelta], key: RequestKey | None = None, bounds: Bounds | None = None
    ) -> tuple[Token, list[Refusal]]:
        """Accept the deltas that are valid; see `ports.Ingest`.

        An empty label counts as missing. All deltas of one view and kind get all labels that one of them has, or that the
        view is known with: so a text of metrics makes one definition of a view, not one for each set of labels in it.
        """
        refused: list[Refusal] = []
        return self._take(self._fitted(deltas, bounds), deltas, refused, key, bounds), refused

    def _take(
        self,
        deltas: Sequence[RawDelta],
        said: Sequence[RawDelta],
        refused: list[Refusal] | None,
        key: RequestKey | None,
        bounds: Bounds | None,
    ) -> Token:
        """Append the deltas; those that are wrong go to `refused`, or without it raise `Invalid` before anything is done.

        `said` are the deltas as the client sent them. A request with a key is cut by these, because the known labels of a
        view can be others when the request is repeated.
        """
        now_ms = self._clock.now_ms()
        parts = [*chunks(said)] if key is not None else [range(len(deltas))]
        # A delta that is refused now may be valid in a repeat, where tasks would not count it, because they know the batch
        # by its key. So a request with a key is then refused as a whole.
        refused_now = refused if key is None else None
        known = KnownViews({}, {})
        raw: dict[_Series, list[Any]] = {}
        numbers: dict[_Series, list[int]] = {}
        spreads: dict[Definition, int] = {}
        for part, members in enumerate(parts):
            for number in members:
                if number % CHECK_EVERY == 0:
                    check_budget()
                delta, reason = deltas[number], "view"
                try:
                    definition = self._definitions.of(delta, known, bounds)
                    spread = spread_of(definition, delta.spread, self._settings.spread)
                    reason = "labels"
                    labels = check_label_values(definition, [delta.labels[name] for name in definition.labels])
                    reason = "value"
                    value, ts_ms = self._check(definition, delta, now_ms)
                except Invalid as error:
                    self._refuse(number, reason, error, refused)
                    continue
                try:
                    if definition.kind == "last" or definition.window_s:
                        check_ahead(ts_ms, now_ms, self._limits.ts_ahead_max_ms)
                except Invalid as error:
                    self._refuse(number, reason, error, refused_now)
                    continue
                series = _Series(part, definition, series_suffix(labels, start_of_window_ms(definition, ts_ms)))
                raw.setdefault(series, []).append(value)
                numbers.setdefault(series, []).append(number)
                spreads[definition] = max(spread, spreads.get(definition, 1))
        sealed, wanted = self._seal(raw, numbers, spreads, refused_now, key, now_ms)
        token = self._send(sealed, wanted, key)
        self._definitions.remember({it.definition: None for it in raw}, now_ms, bounds)
        self._metrics.inc(m.DELTAS_INGESTED, len(deltas) - len(refused or ()))
        return token

    def _refuse(self, number: int, reason: str, error: object, refused: list[Refusal] | None) -> None:
        if refused is None:
            raise Invalid(f"delta {number}: {error}") from None
        refused.append(Refusal(number, reason, str(error)))

    def _check(self, definition: Definition, delta: RawDelta, now_ms: int) -> tuple[Any, int]:
        """Return the value of a delta, as its kind keeps it, and its time."""
        ts_ms = now_ms if delta.ts_ms is None else delta.ts_ms
        if definition.window_s:
            KINDS["last"].check(None, ts_ms)  # whatever the kind is, the time decides about the window
        if definition.kind == HISTOGRAM and isinstance(delta.value, Distribution):
            return delta.value, ts_ms
        return kind_of(definition).check(delta.value, ts_ms, self._clock.rising_ns()), ts_ms

    def _fitted(self, deltas: Sequence[RawDelta], bounds: Bounds | None) -> list[RawDelta]:
        """Return the deltas, each with all labels of its view and kind within bounds: missing ones are empty."""
        unions: dict[tuple[str, str], dict[str, str]] = {}
        for delta in deltas:
            mine = {name: "" for name, value in delta.labels.items() if value}
            unions.setdefault((delta.view, delta.kind), {}).update(mine)
        for (view, kind), union in unions.items():
            known = self._definitions.known(view, kind, bounds)
            if known is not None and len(union.keys() | {*known.labels}) <= LABEL_COUNT_MAX:
                union.update(dict.fromkeys(known.labels, ""))
        fitted = []
        for delta in deltas:
            labels = {name: value for name, value in delta.labels.items() if value}
            union = unions[delta.view, delta.kind]
            # Together they may have more labels than a definition can; each delta by itself may have few enough.
            fitted.append(delta._replace(labels={**union, **labels} if len(union) <= LABEL_COUNT_MAX else labels))
        return fitted

    # From deltas to batches

    def _seal(
        self,
        raw: dict[_Series, list[Any]],
        numbers: dict[_Series, list[int]],
        spreads: Mapping[Definition, int],
        refused: list[Refusal] | None,
        key: RequestKey | None,
        now_ms: int,
    ) -> tuple[list[Sealed], dict[int, Collection[Definition]]]:
        """Return the batches of a request, and by partition the definitions for which room was reserved."""
        if not raw:
            return [], {}
        partition_count = self._writer.partition_count(DELTAS)
        bytes_max = self._writer.message_bytes_max(DELTAS)
        fixed, producer_id = -1, ""
        if key is not None:
            producer_id = producer_of_request(key)
            fixed = partition_of_request(producer_id, self._idempotent_partitions)
            if fixed >= partition_count:
                raise Unavailable(f"idempotent_partitions goes beyond the {partition_count} partitions that there are")
        with self._lock:
            turn, self._turn = self._turn, self._turn + 1
        wanted: dict[int, dict[Definition, None]] = {}
        oldest: dict[tuple[int, Definition], int] = {}
        for it in [*raw]:
            of, partition = it.definition, fixed
            if key is None:
                partition = partition_of(series_prefix(of), it.suffix, partition_count, spreads[of], turn)
                if of.window_s and of.retention_s:  # with a key it can be a repeat, which tasks know and count once
                    if (partition, of) not in oldest:
                        oldest[partition, of] = self._facts.expired_before_ms(partition, of)
                    if parse_suffix(it.suffix)[0] < oldest[partition, of]:
                        del raw[it]
                        for number in numbers.pop(it):
                            self._refuse(number, "expired", _expired(of, oldest[partition, of]), refused)
                        continue
            wanted.setdefault(partition, {})[of] = None
        if not raw:
            return [], {}
        full = self._rooms.take(wanted)
        try:
            if full:
                for it in [it for it in raw if it.definition in full]:
                    for number in numbers.pop(it):
                        self._refuse(number, "view", full[it.definition], refused)
                raw = {it: run for it, run in raw.items() if it.definition not in full}
            states = {it: _collected(it.definition, run) for it, run in raw.items()}
            if key is not None:
                sealed = _seal_parts(states, producer_id, fixed, now_ms)
            else:
                merged = [Pending(it.definition, it.suffix, state) for it, state in states.items()]
                most = min(self._settings.batch_bytes_max, bytes_max)
                sizes = {"partition_count": partition_count, "batch_bytes_max": most}
                drafts = drafts_of(merged, **sizes, spreads=spreads, turn=turn)
                with self._lock:  # not for longer: other requests wait for it
                    sealed = seal(drafts, self._outbox, now_ms=now_ms)
            for batch in sealed:
                if len(batch.value) > bytes_max:
                    self._settle(sealed, key)
                    raise Invalid(f"a batch of {len(batch.value)} bytes; the log takes up to {bytes_max} only")
        except BaseException:
            self._rooms.sent(wanted, {})
            raise
        return sealed, {partition: [*definitions] for partition, definitions in wanted.items()}

    def _send(self, sealed: Sequence[Sealed], wanted: Mapping[int, Collection[Definition]], key: RequestKey | None) -> Token:
        """Append batches, none of which is ever sent again."""
        offsets: dict[int, int] = {}
        messages = [Message(DELTAS, batch.partition, None, batch.value) for batch in sealed]
        try:
            before = self._tokens.topic_id_before() if messages else ""
            results = self._append(messages)
            offsets = _covering(messages, results)
            errors = [result for result in results if isinstance(result, PipelineError)]
            if errors and len(errors) == len(results) and all(isinstance(error, Invalid) for error in errors):
                raise errors[0]
            _offsets(results)
        finally:
            self._settle(sealed, key)
            self._rooms.sent(wanted, offsets)
        return self._tokens.make(offsets, before)

    def _settle(self, sealed: Sequence[Sealed], key: RequestKey | None) -> None:
        """Forget batches that are acknowledged or given up, so that the floor may pass them.

        Batches of a request with a key have a producer of their own: the outbox can have others under the same sequences.
        """
        if key is not None:
            return
        with self._lock:
            for batch in sealed:
                self._outbox.acknowledge(batch.partition, batch.sequence)

    def _append(self, messages: list[Message]) -> list[int | PipelineError]:
        return self._writer.append(messages, timeout_s=self._settings.request_timeout_ms / 1000) if messages else []

    # Batches

    def batches(self, batches: Sequence[bytes], secret: str, bounds: Bounds | None = None) -> tuple[list[int], Token]:
        """Accept a publisher's sealed batches; see `ports.Ingest`."""
        partition_count = self._writer.partition_count(DELTAS)
        now_ms = self._clock.now_ms()
        messages: list[Message] = []
        wanted: dict[int, dict[Definition, None]] = {}
        of_batch: list[list[tuple[int, Definition]]] = []
        for number, value in enumerate(batches):
            check_budget()
            try:
                received, refused = check_batch(value, now_ms, self._limits, self._facts)
                check_owner(received.batch.producer_id, secret)
            except BadRecord as error:
                raise BadRecord(f"batch {number}: {error}") from None
            if outside := groups_outside(received, bounds):
                raise refusal(number, outside, GroupsForbidden)
            if refused:
                raise refusal(number, refused)
            partition = received.batch.partition
            if partition >= partition_count:  # its publisher may have heard of new partitions first
                raise Unavailable(f"batch {number}: there is no partition {partition} yet, of {partition_count}")
            definitions = [group.definition for group in received.batch.groups]
            wanted.setdefault(partition, {}).update(dict.fromkeys(definitions))
            of_batch.append([*zip(received.indexes, definitions, strict=True)])
            messages.append(Message(DELTAS, partition, None, value))
        return self._append_batches(messages, wanted, of_batch)

    def _append_batches(
        self,
        messages: list[Message],
        wanted: Mapping[int, Collection[Definition]],
        of_batch: list[list[tuple[int, Definition]]],
    ) -> tuple[list[int], Token]:
        """Append batches of publishers, if there is room for their definitions."""
        full = self._rooms.take(wanted)
        offsets: dict[int, int] = {}
        try:
            for number, groups in enumerate(of_batch if full else ()):
                refused = [RefusedGroup(index, it.view, full[it]) for index, it in groups if it in full]
                if refused:
                    raise refusal(number, refused)
            before = self._tokens.topic_id_before() if messages else ""
            results = self._append(messages)
            offsets = _covering(messages, results)
            for number, result in enumerate(results):
                if isinstance(result, Invalid | BadRecord):  # even if others were accepted: they may be sent again
                    raise BadRecord(f"batch {number}: {result}")
            done = _offsets(results)
        finally:
            self._rooms.sent(wanted, offsets)
        self._metrics.inc(m.BATCHES_INGESTED, len(messages))
        return done, self._tokens.make(offsets, before)

    # Orders

    def controls(self, controls: Sequence[Control], key: RequestKey | None = None) -> Token:
        """Append orders to every partition, so that each carries them out once, between two batches.

        Raises `Invalid` for an unknown order; `Unavailable` if some partitions may not have it. With a `key` a repeat is
        carried out once in each partition, also in those that were added meanwhile.
        """
        for control in controls:
            if control.action not in CONTROL_ACTIONS:
                raise Invalid(f"{control.action:.50}: no order; known: {', '.join(CONTROL_ACTIONS)}")
            if not NAME.match(control.view):
                raise Invalid(f"not the name of a view: {control.view[:200]!r}")
            if control.kind and control.kind not in KIND_NAMES:
                raise Invalid(f"unknown kind {control.kind[:50]!r}; known: {', '.join(KIND_NAMES)}")
        orders = [
            msgspec.structs.replace(it, labels=None if it.labels is None else tuple(sorted(it.labels))) for it in controls
        ]
        # The log is asked anew, because a partition that this process does not know yet can hold series. A partition that is
        # added from now on can hold none of before.
        now_ms, partitions = self._clock.now_ms(), sorted(self._writer.high_watermarks(DELTAS)) if orders else []
        sealed: list[Sealed] = []
        with self._lock:
            for partition in partitions:
                producer_id, numbers = self._outbox.producer_id, self._outbox.next_numbers(partition)
                if key is not None:
                    producer_id, numbers = producer_of_request(key), (0, 0)
                batch = Batch(producer_id, 0, partition, *numbers, now_ms, [], controls=orders)
                sealed.append(Sealed(partition, numbers[0], encode_batch(batch), 0))
                if key is None:
                    self._outbox.add(sealed[-1])
        return self._send(sealed, {}, key)


def _collected(definition: Definition, run: Sequence[Any]) -> Any:
    """Return the state of deltas, of which those of a histogram can be distributions."""
    kind = kind_of(definition)
    if definition.kind != HISTOGRAM:
        return kind.collect(run)
    states = [it.state() for it in run if isinstance(it, Distribution)]
    if single := [it for it in run if not isinstance(it, Distribution)]:
        states.append(kind.collect(single))
    return reduce(kind.merge, states)


def _seal_parts(states: Mapping[_Series, Any], producer_id: str, partition: int, now_ms: int) -> list[Sealed]:
    """Return the batches of a request with a key: the sequence of each is the place of its deltas in the request."""
    parts: dict[int, dict[Definition, tuple[list[bytes], list[Any]]]] = {}
    for (part, definition, suffix), state in states.items():
        suffixes, column = parts.setdefault(part, {}).setdefault(definition, ([], []))
        suffixes.append(suffix)
        column.append(state)
    sealed = []
    for part, by_definition in parts.items():
        groups = [Group(definition, suffixes, column) for definition, (suffixes, column) in by_definition.items()]
        value = encode_batch(Batch(producer_id, 0, partition, part, 0, now_ms, groups))
        sealed.append(Sealed(partition, part, value, sum([len(group.suffixes) for group in groups])))
    return sealed


def _expired(definition: Definition, oldest_ms: int) -> str:
    return (
        f"view {definition.view}: its window has expired: the oldest that is kept starts at {oldest_ms} ms "
        f"(retention_s is {definition.retention_s})"
    )


def _covering(messages: Sequence[Message], results: Sequence[int | PipelineError]) -> dict[int, int]:
    """Return, by partition, the offset behind all that was acknowledged."""
    covering: dict[int, int] = {}
    for message, result in zip(messages, results, strict=True):
        if isinstance(result, int):
            covering[message.partition] = max(result, covering.get(message.partition, 0))
    return covering


def _offsets(results: Sequence[int | PipelineError]) -> list[int]:
    """Return the offsets, or raise `Unavailable` unless each batch was acknowledged."""
    errors = [result for result in results if isinstance(result, PipelineError)]
    if errors:
        raise Unavailable(f"{len(errors)} of {len(results)} batches not acknowledged: {errors[0]}") from errors[0]
    return [result for result in results if isinstance(result, int)]
