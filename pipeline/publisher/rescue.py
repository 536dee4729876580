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
from pipeline.publisher.batching import drafts_of, seal
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
    drain = _Drain(writer, clock, settings, clock.monotonic_s() + timeout_s, stop or threading.Event())
    for path in find_slots(folder):
        result = DrainedSlot(path.name)
        try:
            orphan = Orphan.claim(path, fsync=True)
            result.live = orphan is None
            if orphan is not None:
                try:
                    drain.slot(orphan, result, force=force)
                finally:
                    orphan.release()
        except PipelineError as error:
            result.error, result.again = str(error), isinstance(error, Unavailable)
        yield result


class _Drain:
    """One call of `drain`: the log, and how long to try."""

    def __init__(
        self, writer: LogWriter, clock: Clock, settings: PublisherSettings, end_s: float, stop: threading.Event
    ) -> None:
        self._writer = writer
        self._clock = clock
        self._settings = settings
        self._end_s = end_s
        self._stop = stop

    def slot(self, orphan: Orphan, result: DrainedSlot, *, force: bool) -> None:
        """Send all that is in a slot, and remove it."""
        if not force:
            self._check_age(orphan)
        proving = self._writer if isinstance(self._writer, ProvesProducers) else None
        if proving is not None:
            proving.introduce(orphan.secret)
        try:
            self._send_all(orphan, result)
        finally:
            if proving is not None:
                proving.dismiss(orphan.secret)

    def _check_age(self, orphan: Orphan) -> None:
        age_max_ms = held_after_ms(self._settings.producer_ttl_ms)
        firsts = {batch.partition: batch for batch in reversed(orphan.batches)}
        for batch in firsts.values():
            age_ms = self._clock.now_ms() - decode_batch(orphan.load(batch.partition, batch.sequence)).created_at_ms
            if age_ms > age_max_ms:
                raise Invalid(
                    f"batches were sealed {age_ms / 86_400_000:.3g} days ago: if a task has folded them and forgotten it "
                    "(producer_ttl_ms), they would count twice; --force sends them all the same"
                )

    def _send_all(self, orphan: Orphan, result: DrainedSlot) -> None:
        outbox = Outbox.restored(orphan.producer_id, orphan.epoch, orphan.next_sequences, orphan.batches)
        result.epoch, result.report, result.left_count = orphan.epoch, orphan.report, len(outbox)
        result.delta_count = sum([merged.delta_count for merged in orphan.pending])
        if orphan.pending:
            partition_count, bytes_max = self._ask()
            bytes_max = min(self._settings.batch_bytes_max, bytes_max)
            now_ms = self._clock.now_ms()
            drafts = drafts_of(orphan.pending, partition_count=partition_count, batch_bytes_max=bytes_max)
            orphan.commit(seal(drafts, outbox, now_ms=now_ms))
        first_s, most_s = self._settings.retry_backoff_ms / 1000, self._settings.retry_backoff_max_ms / 1000
        backoff_s = 0.0
        while len(outbox):
            result.left_count = len(outbox)
            accepted, error = self._send(orphan, outbox)
            result.batch_count += accepted
            result.left_count -= accepted
            if error is not None:
                backoff_s = min(max(first_s, 2 * backoff_s), most_s)
                if isinstance(error, FOR_GOOD) or not self._pause(backoff_s):
                    raise error
        orphan.remove()

    def _pause(self, pause_s: float) -> bool:
        """Wait before another attempt; return False if there is no time for one."""
        return self._clock.monotonic_s() + pause_s <= self._end_s and not self._stop.wait(pause_s)

    def _ask(self) -> tuple[int, int]:
        """Return the number of partitions, and the largest batch; raise `Unavailable` if the log stays away."""
        while True:
            try:
                return self._writer.partition_count(DELTAS), self._writer.message_bytes_max(DELTAS)
            except Unavailable:
                if not self._pause(self._settings.retry_backoff_max_ms / 1000):
                    raise

    def _send(self, orphan: Orphan, outbox: Outbox) -> tuple[int, PipelineError | None]:
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
        results = self._writer.append(messages, timeout_s=self._settings.request_timeout_ms / 1000)
        accepted = [sealed for sealed, answer in zip(batches, results, strict=True) if isinstance(answer, int)]
        errors = [answer for answer in results if not isinstance(answer, int)]
        orphan.acknowledge([(sealed.partition, sealed.sequence) for sealed in accepted])
        for sealed in accepted:
            outbox.acknowledge(sealed.partition, sealed.sequence)
        fatal = [error for error in errors if isinstance(error, FOR_GOOD)]
        return len(accepted), (fatal or errors or [None])[0]
