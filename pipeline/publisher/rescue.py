"""Sends what is left in the slots of processes that never come back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pipeline.core.codec import decode_batch
from pipeline.core.sequence import Outbox, Sealed
from pipeline.errors import Invalid, PipelineError, Unavailable
from pipeline.ports import Clock, LogWriter, Message
from pipeline.publisher.batching import seal
from pipeline.publisher.delivery import FOR_GOOD, SEND_BYTES_MAX, held_after_ms
from pipeline.publisher.identity import dismiss, introduce
from pipeline.publisher.spool.leftover import Leftover, SlotReport, leftovers
from pipeline.settings import PublisherSettings
from pipeline.topics import DELTAS

_SEND_COUNT_MAX = 500


class DrainedSlot(msgspec.Struct):
    """What became of one slot."""

    slot: str
    """The name of its folder."""
    live: bool = False
    """Its process lives, or somebody else sends what is left in it: it was not touched."""
    epoch: int = 0
    delta_count: int = 0
    """Deltas that were in no batch."""
    batch_count: int = 0
    """Batches that were acknowledged now."""
    left_count: int = 0
    """Batches that were not, and wait for the next attempt."""
    report: SlotReport = msgspec.field(default_factory=SlotReport)
    error: str = ""
    again: bool = False
    """Whether the log was away: to try again is all that it takes."""


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
    """Send what is left in each slot of a spool folder whose process is gone, slot by slot, and remove it.

    What is not acknowledged within `timeout_s` stays for another attempt, under the same sequences. Raises `Invalid` for a
    folder that is no spool; what is wrong with one slot is in its result. `stop` ends it early.
    Batches that were sealed so long ago that tasks may have forgotten by now whether they have folded them
    (`producer_ttl_ms` less a day) are only sent with `force`.
    """
    stop = stop or threading.Event()
    end_s = clock.monotonic_s() + timeout_s
    for path in leftovers(folder):
        result = DrainedSlot(path.name)
        try:
            leftover = Leftover.claim(path, fsync=True)
            if leftover is None:
                result.live = True
            else:
                try:
                    if not force:
                        _check_age(leftover, clock.now_ms(), held_after_ms(settings.producer_ttl_ms))
                    introduce(writer, leftover.secret)
                    _drain_slot(leftover, result, writer, clock, settings, end_s, stop)
                finally:
                    dismiss(writer, leftover.secret)
                    leftover.release()
        except PipelineError as error:
            result.error, result.again = str(error), isinstance(error, Unavailable)
        yield result


def _check_age(leftover: Leftover, now_ms: int, age_max_ms: int) -> None:
    firsts = {batch.partition: batch for batch in reversed(leftover.batches)}
    for batch in firsts.values():
        age_ms = now_ms - decode_batch(leftover.load(batch.partition, batch.sequence)).created_at_ms
        if age_ms > age_max_ms:
            raise Invalid(
                f"batches were sealed {age_ms / 86_400_000:.3g} days ago: if a task has folded them and forgotten it "
                "(producer_ttl_ms), they would count twice; --force sends them all the same"
            )


def _drain_slot(
    leftover: Leftover,
    result: DrainedSlot,
    writer: LogWriter,
    clock: Clock,
    settings: PublisherSettings,
    end_s: float,
    stop: threading.Event,
) -> None:
    outbox = Outbox.restored(leftover.producer_id, leftover.epoch, leftover.next_sequences, leftover.batches)
    result.epoch = leftover.epoch
    result.report = leftover.report
    result.delta_count = sum([merged.delta_count for merged in leftover.pending])
    result.left_count = len(outbox)
    if leftover.pending:
        partition_count, message_bytes_max = _ask(writer, clock, settings, end_s, stop)
        sealed = seal(
            leftover.pending,
            outbox,
            partition_count=partition_count,
            batch_bytes_max=min(settings.batch_bytes_max, message_bytes_max),
            now_ms=clock.now_ms(),
        )
        leftover.commit(sealed)
    backoff_s = 0.0
    while len(outbox):
        result.left_count = len(outbox)
        accepted, error = _send(leftover, outbox, writer, settings)
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
    leftover.remove()


def _ask(
    writer: LogWriter, clock: Clock, settings: PublisherSettings, end_s: float, stop: threading.Event
) -> tuple[int, int]:
    """How many partitions there are, and how large a batch may be; `Unavailable` if the log is away until `end_s`."""
    while True:
        try:
            return writer.partition_count(DELTAS), writer.message_bytes_max(DELTAS)
        except Unavailable:
            pause_s = settings.retry_backoff_max_ms / 1000
            if clock.monotonic_s() + pause_s > end_s or stop.wait(pause_s):
                raise


def _send(
    leftover: Leftover, outbox: Outbox, writer: LogWriter, settings: PublisherSettings
) -> tuple[int, PipelineError | None]:
    """One attempt with the first batches: how many were accepted, and why others were not."""
    batches: list[Sealed] = []
    size = 0
    for sealed in outbox.pending():
        size += len(sealed.value) or leftover.size_of(sealed.partition, sealed.sequence)
        if batches and (size > SEND_BYTES_MAX or len(batches) == _SEND_COUNT_MAX):
            break
        batches.append(sealed)
    values = [sealed.value or leftover.load(sealed.partition, sealed.sequence) for sealed in batches]
    messages = [Message(DELTAS, batch.partition, None, value) for batch, value in zip(batches, values, strict=True)]
    results = writer.append(messages, timeout_s=settings.request_timeout_ms / 1000)
    accepted = [sealed for sealed, answer in zip(batches, results, strict=True) if isinstance(answer, int)]
    errors = [answer for answer in results if not isinstance(answer, int)]
    leftover.acknowledge([(sealed.partition, sealed.sequence) for sealed in accepted])
    for sealed in accepted:
        outbox.acknowledge(sealed.partition, sealed.sequence)
    fatal = [error for error in errors if isinstance(error, FOR_GOOD)]
    return len(accepted), (fatal or errors or [None])[0]
