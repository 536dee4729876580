"""Sends what processes that are gone have left in their slots of a spool folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pipeline.core.codec import decode_batch
from pipeline.core.sequence import Outbox, Sealed
from pipeline.errors import Invalid, PipelineError, Unavailable
from pipeline.ports import Clock, LogWriter, Message, ProvesProducers
from pipeline.publisher.batching import seal
from pipeline.publisher.sender import FOR_GOOD, SEND_BYTES_MAX, held_after_ms
from pipeline.publisher.spool.orphan import Orphan, SlotReport, find_slots
from pipeline.settings import PublisherSettings
from pipeline.topics import DELTAS

_SEND_COUNT_MAX = 500


class DrainedSlot(msgspec.Struct):
    """The result of draining one slot."""

    slot: str
    """The name of its folder."""
    live: bool = False
    """True if its process lives, or another one drains it: it was not touched."""
    epoch: int = 0
    delta_count: int = 0
    """Number of deltas that were in no batch."""
    batch_count: int = 0
    """Number of batches that were acknowledged now."""
    left_count: int = 0
    """Number of batches that were not, and wait for the next attempt."""
    report: SlotReport = msgspec.field(default_factory=SlotReport)
    error: str = ""
    again: bool = False
    """True if the log was away, so that the next attempt may succeed."""


def drain(
    folder: Path,
    writer: LogWriter,
    clock: Clock,
    settings: PublisherSettings,
    *,
    timeout_s: float,
    stop: threading.Event | None = None,
    force: bool = False,
) -> Iterator[DrainedSlot]:
    """Send the content of each slot of a spool folder whose process is gone, slot by slot, and remove the slot.

    Batches that are not acknowledged within `timeout_s` stay for another attempt, under the same sequences. Raises `Invalid`
    for a folder that is no spool; errors of one slot are in its result. `stop` ends the draining early. Batches that are so
    old that tasks may have forgotten whether they folded them (`producer_ttl_ms` less a day) are sent with `force` only.
    """
    stop = stop or threading.Event()
    end_s = clock.monotonic_s() + timeout_s
    for path in find_slots(folder):
        result = DrainedSlot(path.name)
        try:
            orphan = Orphan.claim(path, fsync=True)
            if orphan is None:
                result.live = True
            else:
                try:
                    if not force:
                        _check_age(orphan, clock.now_ms(), held_after_ms(settings.producer_ttl_ms))
                    if isinstance(writer, ProvesProducers):
                        writer.introduce(orphan.secret)
                    _drain_slot(orphan, result, writer, clock, settings, end_s, stop)
                finally:
                    if isinstance(writer, ProvesProducers):
                        writer.dismiss(orphan.secret)
                    orphan.release()
        except PipelineError as error:
            result.error, result.again = str(error), isinstance(error, Unavailable)
        yield result


def _check_age(orphan: Orphan, now_ms: int, age_max_ms: int) -> None:
    firsts = {batch.partition: batch for batch in reversed(orphan.batches)}
    for batch in firsts.values():
        age_ms = now_ms - decode_batch(orphan.load(batch.partition, batch.sequence)).created_at_ms
        if age_ms > age_max_ms:
            raise Invalid(
                f"batches were sealed {age_ms / 86_400_000:.3g} days ago: if a task has folded them and forgotten it "
                "(producer_ttl_ms), they would count twice; --force sends them all the same"
            )


def _drain_slot(
    orphan: Orphan,
    result: DrainedSlot,
    writer: LogWriter,
    clock: Clock,
    settings: PublisherSettings,
    end_s: float,
    stop: threading.Event,
) -> None:
    outbox = Outbox.restored(orphan.producer_id, orphan.epoch, orphan.next_sequences, orphan.batches)
    result.epoch = orphan.epoch
    result.report = orphan.report
    result.delta_count = sum([merged.delta_count for merged in orphan.pending])
    result.left_count = len(outbox)
    if orphan.pending:
        partition_count, message_bytes_max = _ask(writer, clock, settings, end_s, stop)
        sealed = seal(
            orphan.pending,
            outbox,
            partition_count=partition_count,
            batch_bytes_max=min(settings.batch_bytes_max, message_bytes_max),
            now_ms=clock.now_ms(),
        )
        orphan.commit(sealed)
    backoff_s = 0.0
    while len(outbox):
        result.left_count = len(outbox)
        accepted, error = _send(orphan, outbox, writer, settings)
        result.batch_count += accepted
        result.left_count -= accepted
        if isinstance(error, FOR_GOOD):
            raise error
        if error is not None:
            backoff_s = min(max(settings.retry_backoff_ms / 1000, 2 * backoff_s), settings.retry_backoff_max_ms / 1000)
            if clock.monotonic_s() + backoff_s > end_s:
                raise error
            if stop.wait(backoff_s):
                raise error
    orphan.remove()


def _ask(
    writer: LogWriter, clock: Clock, settings: PublisherSettings, end_s: float, stop: threading.Event
) -> tuple[int, int]:
    """Return the number of partitions, and the largest batch; raise `Unavailable` if the log is away until `end_s`."""
    while True:
        try:
            return writer.partition_count(DELTAS), writer.message_bytes_max(DELTAS)
        except Unavailable:
            pause_s = settings.retry_backoff_max_ms / 1000
            if clock.monotonic_s() + pause_s > end_s or stop.wait(pause_s):
                raise


def _send(
    orphan: Orphan, outbox: Outbox, writer: LogWriter, settings: PublisherSettings
) -> tuple[int, PipelineError | None]:
    """Send the first batches once; return how many were accepted, and an error of those that were not."""
    batches: list[Sealed] = []
    size = 0
    for sealed in outbox.pending():
        size += len(sealed.value) or orphan.size_of(sealed.partition, sealed.sequence)
        if batches and (size > SEND_BYTES_MAX or len(batches) == _SEND_COUNT_MAX):
            break
        batches.append(sealed)
    values = [sealed.value or orphan.load(sealed.partition, sealed.sequence) for sealed in batches]
    messages = [Message(DELTAS, batch.partition, None, value) for batch, value in zip(batches, values, strict=True)]
    results = writer.append(messages, timeout_s=settings.request_timeout_ms / 1000)
    accepted = [sealed for sealed, answer in zip(batches, results, strict=True) if isinstance(answer, int)]
    errors = [answer for answer in results if not isinstance(answer, int)]
    orphan.acknowledge([(sealed.partition, sealed.sequence) for sealed in accepted])
    for sealed in accepted:
        outbox.acknowledge(sealed.partition, sealed.sequence)
    fatal = [error for error in errors if isinstance(error, FOR_GOOD)]
    return len(accepted), (fatal or errors or [None])[0]
