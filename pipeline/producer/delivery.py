"""Sealed batches on their way: number them, send them until they are acknowledged, or give them up and say so."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection
from itertools import zip_longest

import pipeline.metrics as m
from pipeline.core.sequence import GAP_COUNT_MAX, Outbox, Sealed
from pipeline.core.token import Token
from pipeline.errors import BadRecord, BufferFull, Fenced, Invalid, PipelineError, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import LogWriter, Message
from pipeline.producer.account import Account
from pipeline.producer.keeping import Keeper
from pipeline.producer.linger import Linger
from pipeline.producer.sealing import Refused, Run, seal_runs
from pipeline.settings import PublisherSettings
from pipeline.topics import DELTAS

_log = logging.getLogger(__name__)
SEND_BYTES_MAX = 4 * 2**20
_WAITING_MAX = 16
"""Batches that wait for a partition; then its series go on merging, and are sealed when some are acknowledged."""
_REASONS_MAX = 3
FOR_GOOD = (Invalid, BadRecord, Fenced)
"""Answers of a log after which sending the same bytes again can't help. Everything else is tried again."""


class Delivery:
    """The batches of one producer. The flusher seals, the sender sends; `lock` guards what both touch."""

    def __init__(
        self,
        outbox: Outbox,
        writer: LogWriter,
        settings: PublisherSettings,
        metrics: Metrics,
        account: Account,
        lock: threading.RLock,
        changed: threading.Condition,
        now_s: Callable[[], float],
        keeper: Keeper | None = None,
    ) -> None:
        self.outbox = outbox
        self.linger = Linger(settings.linger_ms, settings.flush_interval_ms)
        self.token = Token({})
        """Covers everything that was acknowledged."""
        self.batch_count = self.entry_count = self.rejected_count = 0
        self.trouble = ""
        """What went wrong with the last attempt, to be added to a message."""
        self._writer = writer
        self._settings = settings
        self._metrics = metrics
        self._account = account
        self._lock = lock
        self._changed = changed
        self._now_s = now_s
        self._keeper = keeper
        self._spills = keeper is not None and settings.on_full == "spill"
        self.unsealed: list[Run] = []
        """What there was no memory to seal."""
        self._batch_bytes_max = settings.batch_bytes_max
        self._suspects: dict[tuple[int, int], Sealed] = {}
        self._reasons: deque[str] = deque(maxlen=_REASONS_MAX)

    # The flusher

    def room(self, now_ms: int) -> tuple[int, Collection[int]]:
        """How many partitions there are, 0 if nothing can be sealed now, and those that have enough batches waiting."""
        self.spill_if_pressed()
        with self._lock:
            if self.outbox.bytes_total > self._settings.buffer_bytes_max // 2:
                return 0, ()
            waiting = Counter([sealed.partition for sealed in self.outbox.pending()])
        try:
            partition_count = self._writer.partition_count(DELTAS)
            self._account.message_bytes_max = self._writer.message_bytes_max(DELTAS)
            self._batch_bytes_max = min(self._settings.batch_bytes_max, self._account.message_bytes_max)
        except PipelineError as error:
            self.trouble = f"; the log is away: {error}"
            return 0, ()
        if self.unsealed and not self.seal([], partition_count, now_ms):
            return 0, ()
        if self._spills and self._account.pressed:  # better on disk than in memory
            return partition_count, ()
        return partition_count, {partition for partition, count in waiting.items() if count >= _WAITING_MAX}

    def spill_if_pressed(self) -> None:
        """If that is what `on_full` says, put the bytes of all batches to disk while memory is short, if there is room."""
        if self._keeper is None or not self._spills or not self._account.pressed:
            return
        try:
            if not self._keeper.durable:
                self._keeper.commit((), self._now_s())
            self._keeper.stow(0)
        except (Unavailable, BufferFull) as error:
            self.trouble = f"; the spool: {error}"
            _log.warning("batches stay in memory: %s", error)

    def seal(self, runs: list[Run], partition_count: int, now_ms: int) -> bool:
        """Seal merged deltas, and what could not be sealed before; whether nothing is left over.

        A batch that can't be encoded is lost, and counted; the others are not.
        """
        self.unsealed += runs
        if not self.unsealed or not partition_count:
            return not self.unsealed
        refused: list[Refused] = []
        with self._lock:
            sealed = seal_runs(
                self.unsealed,
                self.outbox,
                partition_count=partition_count,
                batch_bytes_max=self._batch_bytes_max,
                now_ms=now_ms,
                refused=refused,
            )
            self.unsealed = []
            if self._keeper is not None:
                self._keeper.sealed(sealed)
            self._account.force(sum([len(batch.value) for batch in sealed]))
            lost = 0
            for series, error in refused:
                if isinstance(error, MemoryError):  # it can pass
                    self.unsealed += series
                else:
                    lost += 1
                    self._reject(f"{sum(map(len, series))} series can't be encoded: {type(error).__name__}: {error}")
            self._changed.notify_all()
        if lost:
            self._report(lost)
        return not self.unsealed

    def unkept_count(self) -> int:
        """Batches that end with this process."""
        kept_count = self._keeper.kept_count if self._keeper is not None else 0
        return len(self.outbox) - kept_count

    # The sender

    def next_batches(self) -> list[Sealed]:
        """What to send together: partitions in turn, so that none holds up the others, each in the order of sequences.

        The caller holds `lock`.
        """
        for suspect in self._suspects.values():
            return [suspect]
        by_partition: dict[int, list[Sealed]] = {}
        for sealed in self.outbox.pending():
            if self._keeper is not None and self._keeper.holds_back(sealed):
                continue
            run = by_partition.setdefault(sealed.partition, [])
            # A task remembers so many gaps: what is sent must stay that close to the oldest that it may lack.
            if not run or sealed.sequence < run[0].sequence + GAP_COUNT_MAX:
                run.append(sealed)
        batches: list[Sealed] = []
        size = 0
        for turn in zip_longest(*by_partition.values()):
            for sealed in turn:
                if sealed is not None:
                    size += len(sealed.value) or self._batch_bytes_max
                    if batches and size > SEND_BYTES_MAX:
                        return batches
                    batches.append(sealed)
        return batches

    def send(self, batches: list[Sealed]) -> bool:
        """One attempt; whether it has changed anything, so that the next one need not wait."""
        load = self._keeper.load if self._keeper is not None else _value
        messages = [Message(DELTAS, sealed.partition, None, load(sealed)) for sealed in batches]
        started_s = self._now_s()
        results = self._writer.append(messages, timeout_s=self._settings.request_timeout_ms / 1000)
        took_s = self._now_s() - started_s
        accepted: list[tuple[Sealed, int]] = []
        refused: list[Sealed] = []
        errors: list[object] = []
        for sealed, result in zip(batches, results, strict=True):
            if isinstance(result, int):
                accepted.append((sealed, result))
            else:
                errors.append(result)
                if isinstance(result, FOR_GOOD):
                    refused.append(sealed)
        alone = len(batches) == 1
        gone: list[tuple[int, int]] = []
        with self._lock:
            if accepted:
                self.linger.observe(took_s)
            for sealed, next_offset in accepted:
                gone += self._settle(sealed)
                self.token |= Token({sealed.partition: next_offset})
                self.batch_count += 1
                self.entry_count += sealed.entry_count
            for sealed in batches:
                self._suspects.pop((sealed.partition, sealed.sequence), None)
            for sealed in refused:
                if alone:
                    gone += self._settle(sealed)
                    self._reject(f"batch {sealed.sequence} for partition {sealed.partition}: {errors[0]}")
                else:  # a log may refuse all because of one: each is asked for alone before it is given up
                    self._suspects[sealed.partition, sealed.sequence] = sealed
            self.trouble = f"; the last error: {errors[-1]}" if errors else ""
            self._changed.notify_all()
        if self._keeper is not None:
            self._keeper.forget(gone)
        self._metrics.inc(m.PUBLISHER_BATCHES, len(accepted))
        if accepted:
            self._metrics.observe(m.PUBLISHER_ACKNOWLEDGED, took_s)
        if alone and refused:
            self._report(1)
        elif errors:
            self._metrics.inc(m.PUBLISHER_RETRIES, len(errors))
            _log.info("%d of %d batches not acknowledged, trying again: %s", len(errors), len(batches), errors[-1])
        return bool(accepted or refused)

    def _settle(self, sealed: Sealed) -> list[tuple[int, int]]:
        """It is never sent again. What the journal can forget; the caller holds `lock`."""
        key = sealed.partition, sealed.sequence
        gone = self.outbox.acknowledge(*key)
        if gone is None:
            return []
        self._account.used_bytes -= len(gone.value)
        return [key] if self._keeper is not None and self._keeper.settled(*key) else []

    # What became of them

    def _reject(self, reason: str) -> None:
        """Count a batch as lost, before anybody can see that it is settled. The caller holds `lock`."""
        self.rejected_count += 1
        self._reasons.append(reason)

    def _report(self, count: int) -> None:
        """Without `lock`: metrics and log handlers are other people's code."""
        self._metrics.inc(m.PUBLISHER_DROPPED, count, "rejected")
        _log.error("%d batches are lost: %s", count, "; ".join(self._reasons))

    def rejected_since(self, rejected_count: int) -> str:
        """What was rejected beyond so many, in words; empty: nothing. The caller holds `lock`."""
        count = self.rejected_count - rejected_count
        return f"{count} batches were rejected and are lost: {'; '.join([*self._reasons][-count:])}" if count else ""


def _value(sealed: Sealed) -> bytes:
    return sealed.value
