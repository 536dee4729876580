"""Takes in what others publish over HTTP: single deltas, which it merges and seals, and batches that are sealed already."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

import pipeline.metrics as m
from pipeline.core.codec import decode_batch
from pipeline.core.merge import KIND_NAMES, kind_of
from pipeline.core.record import (
    Definition,
    check_definition,
    check_label_values,
    check_suffixes,
    series_prefix,
    series_suffix,
)
from pipeline.core.sequence import Outbox, Sealed
from pipeline.core.token import Token
from pipeline.core.view import describe
from pipeline.errors import BadRecord, Invalid, PipelineError, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, LogWriter, Message, RawDelta, Refusal
from pipeline.producer.sealing import Merged, seal
from pipeline.settings import PublisherSettings
from pipeline.topics import DELTAS

_DEFINITIONS_MAX = 10_000


class _WrongLabels(Invalid):
    """Fix the labels."""


class _DefinedMeanwhile(Invalid):
    """Fix the definition: another request was quicker. Sent again, it is compared with that one's."""


class Gateway:
    """A `ports.Ingest` on a log. `definition_of` says what is known of a view, so that label order and kind fit.

    If anything in a request is wrong, nothing of it is appended. The rest is one append: on the embedded log that is atomic,
    on Kafka a broker's failure can cut it between partitions. A client that gets no answer and sends single deltas again
    counts them twice: only batches carry sequences.
    """

    def __init__(
        self,
        writer: LogWriter,
        clock: Clock,
        settings: PublisherSettings,
        definition_of: Callable[[str], Definition | None],
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._writer = writer
        self._clock = clock
        self._settings = settings
        self._definition_of = definition_of
        self._metrics = metrics
        self._lock = threading.Lock()
        self._outbox = Outbox(clock.new_id(), 0)
        self._defined: dict[str, Definition] = {}

    def deltas(self, deltas: Sequence[RawDelta]) -> Token:
        """Accept all deltas or none; see `ports.Ingest`."""
        return self._take(deltas, None)

    def fitting(self, deltas: Sequence[RawDelta]) -> tuple[Token, list[Refusal]]:
        """Accept those deltas that can be; see `ports.Ingest`. A new view has all labels that the request gives it."""
        while True:
            refused: list[Refusal] = []
            try:
                return self._take(self._fitted(deltas), refused), refused
            except _DefinedMeanwhile:  # once for each view at most
                continue

    def _take(self, deltas: Sequence[RawDelta], refused: list[Refusal] | None) -> Token:
        """Append the deltas; those that are wrong go to `refused`, or without it raise `Invalid` before anything is done."""
        now_ms = self._clock.now_ms()
        raw: dict[tuple[Definition, bytes], list[Any]] = {}
        defined: dict[str, tuple[Definition, int]] = {}
        for number, delta in enumerate(deltas):
            reason = "view"
            try:
                definition = self._definition(delta, number, defined)
                reason = "labels"
                labels = check_label_values(definition, [delta.labels[name] for name in definition.labels])
                reason = "value"
                value = kind_of(definition).check(delta.value, now_ms if delta.ts_ms is None else delta.ts_ms)
            except Invalid as error:
                if refused is None:
                    raise Invalid(f"delta {number}: {error}") from None
                reason = "labels" if isinstance(error, _WrongLabels) else reason
                refused.append(Refusal(number, reason, str(error)))
                continue
            raw.setdefault((definition, series_suffix(labels)), []).append(value)
        used = {definition.view for definition, _ in raw}
        merged = [
            Merged(definition, suffix, crc32(series_prefix(definition.view) + suffix), kind_of(definition).collect(run))
            for (definition, suffix), run in raw.items()
        ]
        token = self._append(merged, {view: it for view, it in defined.items() if view in used}, now_ms)
        self._metrics.inc(m.DELTAS_INGESTED, len(deltas) - len(refused or ()))
        return token

    def _known(self, view: str) -> Definition | None:
        return self._definition_of(view) or self._defined.get(view)

    def _fitted(self, deltas: Sequence[RawDelta]) -> list[RawDelta]:
        """The deltas, with the labels of their view: those that they lack are empty, empty ones that it lacks are gone."""
        views: dict[str, Iterable[str]] = {}
        new: dict[str, dict[str, None]] = {}
        for delta in deltas:
            if delta.view not in views:
                known = self._known(delta.view)
                views[delta.view] = new.setdefault(delta.view, {}) if known is None else known.labels
            if delta.view in new:
                new[delta.view].update(dict.fromkeys([name for name, value in delta.labels.items() if value]))
        fitted = []
        for delta in deltas:
            labels = dict.fromkeys(views[delta.view], "")
            labels.update({name: value for name, value in delta.labels.items() if value or name in labels})
            fitted.append(delta._replace(labels=labels))
        return fitted

    def _definition(self, delta: RawDelta, number: int, defined: dict[str, tuple[Definition, int]]) -> Definition:
        view, kind, labels, window_s, monotone = _shape(delta)
        known, _ = defined.get(view, (None, 0))
        known = known or self._known(view)
        if known is None:
            known = Definition(view, kind, tuple(sorted(labels)), window_s, bool(monotone))
            check_definition(known, KIND_NAMES)
            if len(self._defined) + len(defined) >= _DEFINITIONS_MAX:
                raise Invalid(f"over {_DEFINITIONS_MAX} views")
            defined[view] = known, number
        if known.kind != kind:
            raise Invalid(f"view {view} is {known.kind}, not {kind:.50}")
        if known.window_s != window_s:
            raise Invalid(f"view {view} has window_s {known.window_s}, not {window_s}")
        if monotone is not None and known.monotone is not monotone:
            raise Invalid(f"view {view} is {'monotone' if known.monotone else 'not monotone'}, unlike this delta")
        if labels.keys() != set(known.labels):
            raise _WrongLabels(f"view {view} has labels {list(known.labels)}; got {sorted(labels)[:40]}")
        return known

    def _append(self, merged: list[Merged], defined: dict[str, tuple[Definition, int]], now_ms: int) -> Token:
        if not merged:
            return Token({})
        partition_count = self._writer.partition_count(DELTAS)
        batch_bytes_max = min(self._settings.batch_bytes_max, self._writer.message_bytes_max(DELTAS))
        with self._lock:
            # Before it is appended: of two requests that define a view differently, one would be dead-lettered.
            for view, (definition, number) in defined.items():
                was = self._defined.get(view, definition)
                if was != definition:
                    raise _DefinedMeanwhile(f"delta {number}: view {view} is {describe(was)} since a moment ago")
            sealed = seal(
                merged,
                self._outbox,
                partition_count=partition_count,
                batch_bytes_max=batch_bytes_max,
                now_ms=now_ms,
            )
            self._defined.update({view: definition for view, (definition, _) in defined.items()})
        try:
            return self._send(sealed)
        finally:
            # Acknowledged or given up: either way these are never sent again, and the floor may pass them.
            with self._lock:
                for batch in sealed:
                    self._outbox.acknowledge(batch.partition, batch.sequence)

    def _send(self, sealed: Sequence[Sealed]) -> Token:
        results = self._results([Message(DELTAS, batch.partition, None, batch.value) for batch in sealed])
        errors = [result for result in results if isinstance(result, PipelineError)]
        if len(errors) == len(results) and all(isinstance(error, Invalid) for error in errors):
            raise errors[0]
        offsets = _offsets(results)
        token = Token({})
        for batch, offset in zip(sealed, offsets, strict=True):
            token |= Token({batch.partition: offset})
        return token

    def _results(self, messages: list[Message]) -> list[int | PipelineError]:
        return self._writer.append(messages, timeout_s=self._settings.request_timeout_ms / 1000)

    def batches(self, batches: Sequence[bytes]) -> list[int]:
        """Accept a publisher's sealed batches; see `ports.Ingest`."""
        partition_count = self._writer.partition_count(DELTAS)
        messages = []
        for number, value in enumerate(batches):
            try:
                batch = decode_batch(value)
                for group in batch.groups:
                    check_suffixes(group.definition, group.suffixes)
            except BadRecord as error:
                raise BadRecord(f"batch {number}: {error}") from None
            if batch.partition >= partition_count:  # its publisher may have heard of new partitions first
                raise Unavailable(f"batch {number}: there is no partition {batch.partition} yet, of {partition_count}")
            messages.append(Message(DELTAS, batch.partition, None, value))
        results = self._results(messages) if messages else []
        for number, result in enumerate(results):
            if isinstance(result, Invalid | BadRecord):  # even if others were accepted: they may be sent again
                raise BadRecord(f"batch {number}: {result}")
        offsets = _offsets(results)
        self._metrics.inc(m.BATCHES_INGESTED, len(batches))
        return offsets


def _shape(delta: RawDelta) -> tuple[str, str, Mapping[str, str], int, bool | None]:
    """View, kind, labels, window and `monotone` of a delta, of the types that they should have; `Invalid` otherwise."""
    view: Any = delta.view
    kind: Any = delta.kind
    labels: Any = delta.labels
    window_s: Any = delta.window_s
    monotone: Any = delta.monotone
    if not isinstance(view, str) or not isinstance(kind, str):
        raise Invalid("view and kind are text")
    if not isinstance(labels, Mapping) or not all(isinstance(name, str) for name in labels):
        raise Invalid(f"view {view:.200}: labels are names with values")
    if window_s is not None and (type(window_s) is not int or window_s < 0):
        raise Invalid(f"view {view:.200}: window_s is a whole number of seconds")
    if monotone is not None and not isinstance(monotone, bool):
        raise Invalid(f"view {view:.200}: monotone is true or false")
    return view, kind, labels, window_s or 0, monotone


def _offsets(results: Sequence[int | PipelineError]) -> list[int]:
    """The offsets; `Unavailable` unless each was acknowledged."""
    errors = [result for result in results if isinstance(result, PipelineError)]
    if errors:
        raise Unavailable(f"{len(errors)} of {len(results)} batches not acknowledged: {errors[0]}") from errors[0]
    return [result for result in results if isinstance(result, int)]
