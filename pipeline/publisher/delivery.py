"""Sealed batches on their way: number them, send them until they are acknowledged, or give them up and say so."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Collection, Iterable
from itertools import zip_longest
from typing import TYPE_CHECKING

import pipeline.metrics as m
from pipeline.core.codec import decode_batch, encode_batch, without_groups
from pipeline.core.record import Batch
from pipeline.core.sequence import GAP_COUNT_MAX, Outbox, Sealed
from pipeline.core.token import Token
from pipeline.errors import BadRecord, BufferFull, Fenced, GroupsRefused, Invalid, PipelineError, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock, LogWriter, Message
from pipeline.publisher.account import Account
from pipeline.publisher.batching import Draft, number
from pipeline.publisher.linger import Linger
from pipeline.publisher.naming import Naming
from pipeline.settings import PublisherSettings
from pipeline.topics import DELTAS

if TYPE_CHECKING:
    from pipeline.publisher.spooling import PublisherSpool

_log = logging.getLogger(__name__)
SEND_BYTES_MAX = 4 * 2**20
_WAITING_MAX = 16
"""Batches that wait for a partition; then its series go on merging, and are sealed when some are acknowledged."""
_REASONS_MAX = 3
_TELL_HELD_S = 600.0
_DAY_MS = 86_400_000
FOR_GOOD = (Invalid, BadRecord, Fenced)
"""Answers of a log after which sending the same bytes again can't help. Everything else is tried again."""


def held_after_ms(producer_ttl_ms: int) -> int:
    """How long after a batch may have been sent it is not sent again: well before tasks forget who has sent it."""
    return producer_ttl_ms - min(_DAY_MS, producer_ttl_ms // 2)


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
        clock: Clock,
        spool: PublisherSpool | None = None,
    ) -> None:
        self.outbox = outbox
        self.linger = Linger(settings.flush_interval_min_ms, settings.flush_interval_ms)
        self.token = Token()
        """What `name` returned last."""
        self.batch_count = self.entry_count = self.rejected_count = 0
        self.trouble = ""
        """What went wrong with the last attempt, to be added to a message."""
        self._writer = writer
        self._naming = Naming(writer)
        self._topic_id = ""
        """The id that the topic had before `_acknowledged` began."""
        self._acknowledged: dict[int, int] = {}
        """By partition, what covers all that was acknowledged and is not in `token` yet."""
        self._settings = settings
        self._metrics = metrics
        self._account = account
        self._lock = lock
        self._changed = changed
        self._clock = clock
        self._spool = spool
        self._drafts: deque[Draft] = deque()
        """What was drained from a table and has no number yet."""
        self._partition_count = 0
        """How many there were when the log was last asked; 0: nobody knows."""
        self._batch_bytes_max = settings.batch_bytes_max
        self._suspects: dict[tuple[int, int], Sealed] = {}
        self._reasons: deque[str] = deque(maxlen=_REASONS_MAX)
        self._perhaps_count = 0
        """The value of `rejected_count` at the last rejection of a batch that may have been counted before."""
        self._held_after_ms = held_after_ms(settings.producer_ttl_ms)
        self._tried: dict[tuple[int, int], tuple[float, int]] = {}
        """Batches that may be in the log although they are not acknowledged: when they were first sent, by both clocks."""
        self._without: dict[tuple[int, int], list[set[int]]] = {}
        """Groups that are left out of batches, because a gateway refuses them: one set for each time that it did."""
        self.held_count = 0
        """Batches that are held back just now."""
        self._held_told_s = 0.0

    # The flusher

    def room(self, now_ms: int) -> tuple[int, Collection[int]]:
        """How many partitions there are, 0 if nothing can be sealed now, and those that have enough batches waiting."""
        self.stow_if_pressed()
        with self._lock:
            if self.outbox.bytes_total > self._settings.buffer_bytes_max // (4 if self._spool is None else 2):
                return 0, ()
            waiting = Counter([sealed.partition for sealed in self.outbox.pending()])
        try:
            self._partition_count = self._writer.partition_count(DELTAS)
            self._account.message_bytes_max = self._writer.message_bytes_max(DELTAS)
            self._batch_bytes_max = min(self._settings.batch_bytes_max, self._account.message_bytes_max)
        except PipelineError as error:
            self.trouble = f"; the log is away: {error}"
            if self._spool is None:
                return 0, ()
        return self._partition_count, {partition for partition, count in waiting.items() if count >= _WAITING_MAX}

    def stow_if_pressed(self) -> None:
        """Put the bytes of all batches into the spool while memory is short, if there is one and it has room."""
        if self._spool is None or not self._account.pressed:
            return
        try:
            if not self._spool.durable:
                self._spool.commit()
            self._spool.release_memory(0)
        except (Unavailable, BufferFull) as error:
            self.trouble = f"; the spool: {error}"
            _log.warning("batches stay in memory: %s", error)

    @property
    def batch_bytes_max(self) -> int:
        """How large a batch may be, as far as is known."""
        return self._batch_bytes_max

    def seal_drafts(self, drafts: Iterable[Draft], now_ms: int) -> None:
        """Number drafts and keep them, with those for which there was no memory before."""
        self._drafts += drafts
        with self._lock:
            while self._drafts:
                sealed = number(self._drafts[0], self.outbox, now_ms)
                self.outbox.add(sealed)  # until here, what there was no memory for is tried again; from here on never
                self._drafts.popleft()
                if self._spool is not None:
                    self._spool.sealed(sealed)
                self._account.force(len(sealed.value))
            self._changed.notify_all()

    @property
    def has_drafts(self) -> bool:
        """True if drafts wait for a number, because there was no memory for it."""
        return bool(self._drafts)

    def unkept_count(self) -> int:
        """Batches that end with this process, and deltas of what is no batch yet."""
        kept_count = self._spool.kept_count if self._spool is not None else 0
        return len(self.outbox) - kept_count + sum([draft.delta_count for draft in [*self._drafts]])

    # The sender

    def next_batches(self) -> list[Sealed]:
        """What to send together: partitions in turn, so that none holds up the others, each in the order of sequences.

        The caller holds `lock`.
        """
        for suspect in self._suspects.values():
            if not self._is_held(suspect, self._clock.monotonic_s(), self._clock.now_ms()):
                return [suspect]
        by_partition: dict[int, list[Sealed]] = {}
        self.held_count = 0
        now_s, now_ms = self._clock.monotonic_s(), self._clock.now_ms()
        for sealed in self.outbox.pending():
            if self._is_held(sealed, now_s, now_ms):
                self.held_count += 1
                continue
            if self._spool is not None and self._spool.holds_back(sealed):
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

    def _is_held(self, sealed: Sealed, now_s: float, now_ms: int) -> bool:
        """Whether a batch may be in the log for so long that tasks have forgotten it: then it is not sent again.

        Either clock can say so: one stands still while the machine sleeps, the other can be set. Nothing is lost by a clock
        that is wrong, because the batch stays, and is sent once both clocks agree.
        """
        tried = self._tried.get((sealed.partition, sealed.sequence))
        if tried is None:
            return False
        return max((now_s - tried[0]) * 1_000, now_ms - tried[1]) > self._held_after_ms

    def tell_held(self) -> None:
        """Say, now and then, that batches are held back. Without `lock`."""
        now_s = self._clock.monotonic_s()
        if self.held_count and (not self._held_told_s or now_s - self._held_told_s >= _TELL_HELD_S):
            self._held_told_s = now_s
            _log.error("%s", self.held_words)

    @property
    def held_words(self) -> str:
        """What is held back, in words; empty: nothing."""
        if not self.held_count:
            return ""
        days = self._held_after_ms / 86_400_000
        return (
            f"{self.held_count} batches are held back: they were sent over {days:.3g} days ago without an answer, and tasks "
            "may have folded and forgotten them (producer_ttl_ms); they would count twice"
        )

    def send(self, batches: list[Sealed]) -> bool:
        """One attempt; whether it has changed anything, so that the next one need not wait."""
        values: list[tuple[Sealed, bytes]] = []
        for sealed in batches:
            try:
                values.append((sealed, self._bytes_of(sealed)))
            except BadRecord as error:
                self._give_up(sealed, error)
        batches = [sealed for sealed, _ in values]
        if not batches:
            return True
        messages = [Message(DELTAS, sealed.partition, None, value) for sealed, value in values]
        unheard = [(sealed.partition, sealed.sequence) in self._tried for sealed in batches]
        started_s = self._clock.monotonic_s()
        results = self._append(batches, messages)
        took_s = self._clock.monotonic_s() - started_s
        accepted: list[tuple[Sealed, int]] = []
        refused: list[Sealed] = []
        errors: list[object] = []
        for sealed, result, perhaps in zip(batches, results, unheard, strict=True):
            if isinstance(result, int):
                accepted.append((sealed, result))
            else:
                errors.append(result)
                if isinstance(result, FOR_GOOD):
                    refused.append(sealed)
                    if not perhaps:  # its only try was answered: it is not in the log
                        self._tried.pop((sealed.partition, sealed.sequence), None)
        alone = len(batches) == 1
        gone: list[tuple[int, int]] = []
        with self._lock:
            if accepted:
                self.linger.observe(took_s)
            for sealed, next_offset in accepted:
                gone += self._settle(sealed)
                known = self._acknowledged.get(sealed.partition, 0)
                self._acknowledged[sealed.partition] = max(next_offset, known)
                self.batch_count += 1
                self.entry_count += sealed.entry_count
            for sealed in batches:
                self._suspects.pop((sealed.partition, sealed.sequence), None)
            for sealed in refused:
                if alone and isinstance(errors[0], GroupsRefused) and errors[0].groups:
                    gone += self._leave_out(sealed, errors[0], messages[0].value or b"", perhaps=unheard[0])
                elif alone:
                    gone += self._settle(sealed)
                    what = f"batch {sealed.sequence} for partition {sealed.partition}: {errors[0]}"
                    self._reject(what, perhaps=unheard[0])
                else:  # a log may refuse all because of one: each is asked for alone before it is given up
                    self._suspects[sealed.partition, sealed.sequence] = sealed
            self.trouble = f"; the last error: {errors[-1]}" if errors else ""
            self._changed.notify_all()
        if self._spool is not None:
            self._spool.forget(gone)
        self._metrics.inc(m.PUBLISHER_BATCHES, len(accepted))
        if accepted:
            self._metrics.observe(m.PUBLISHER_ACKNOWLEDGED, took_s)
        if alone and refused:
            self._report(1)
        elif errors:
            self._metrics.inc(m.PUBLISHER_RETRIES, len(errors))
            _log.debug("%d of %d batches not acknowledged, trying again: %s", len(errors), len(batches), errors[-1])
        return bool(accepted or refused)

    def _bytes_of(self, sealed: Sealed) -> bytes:
        """The bytes of a batch, without the groups that can't be taken."""
        value = self._spool.load(sealed) if self._spool is not None else sealed.value
        for indexes in self._without.get((sealed.partition, sealed.sequence), ()):
            value = without_groups(value, indexes)
        return value

    def _give_up(self, sealed: Sealed, error: BadRecord) -> None:
        """Go on without a batch that is damaged in the spool. It stays there: who finds the slot puts it aside."""
        with self._lock:
            perhaps = (sealed.partition, sealed.sequence) in self._tried
            self._suspects.pop((sealed.partition, sealed.sequence), None)
            self._settle(sealed)
            self._reject(f"batch {sealed.sequence} for partition {sealed.partition}: {error}", perhaps=perhaps)
            self._changed.notify_all()
        self._report(1)

    def _leave_out(self, sealed: Sealed, error: GroupsRefused, value: bytes, *, perhaps: bool) -> list[tuple[int, int]]:
        """Go on without groups of a batch, so that what is wrong with one view costs no other. The caller holds `lock`.

        The batch keeps its sequence. `perhaps`: an earlier try, as a whole, may have got into the log after all. Then all
        groups that the task could take are counted, perhaps these too; the others are dead letters, and what is sent now is
        a duplicate.
        """
        indexes = {index for index, _, _ in error.groups}
        what = f"{len(indexes)} groups of batch {sealed.sequence} for partition {sealed.partition}: {error}"
        self._reject(what, perhaps=perhaps)
        if not decode_batch(without_groups(value, indexes)).groups:
            return self._settle(sealed)
        self._without.setdefault((sealed.partition, sealed.sequence), []).append(indexes)
        return []

    def say_closed(self, timeout_s: float) -> None:
        """Send an empty batch to each partition that has had one, which says that it is the last. One attempt."""
        messages = []
        with self._lock:
            if len(self.outbox) or self._drafts:
                return
            for partition in self.outbox.next_sequences():
                sequence, floor = self.outbox.next_numbers(partition)
                numbers = self.outbox.epoch, partition, sequence, floor, self._clock.now_ms()
                value = encode_batch(Batch(self.outbox.producer_id, *numbers, [], closing=True))
                messages.append(Message(DELTAS, partition, None, value))
        if messages:
            results = self._writer.append(messages, timeout_s=timeout_s)
            errors = [result for result in results if not isinstance(result, int)]
            if errors:
                _log.info("not told that this producer has ended, in %d partitions: %s", len(errors), errors[-1])

    def _append(self, batches: list[Sealed], messages: list[Message]) -> list[int | PipelineError]:
        if not self._topic_id:
            try:
                self._topic_id = self._naming.before()
            except Unavailable as error:
                return [error] * len(messages)  # nothing was sent: this is no try
        tried = self._clock.monotonic_s(), self._clock.now_ms()
        for sealed in batches:
            self._tried.setdefault((sealed.partition, sealed.sequence), tried)
        return self._writer.append(messages, timeout_s=self._settings.request_timeout_ms / 1000)

    def name(self) -> Token:
        """Return the token that covers everything that was acknowledged. May ask the log: not to be called with `lock`.

        After a topic was made anew the token covers what the new one acknowledged; the rest is gone with the old one.
        Raises `Unavailable` if that can't be told apart now.
        """
        while True:
            with self._lock:
                acknowledged, before = dict(self._acknowledged), self._topic_id
                if not acknowledged:
                    return self.token
            token = self._naming.name(acknowledged, before)
            with self._lock:
                if self._topic_id != before:
                    continue  # another thread was quicker, and found another topic
                self._topic_id = token.topic_id or before
                left = {p: n for p, n in self._acknowledged.items() if n != acknowledged.get(p)}
                self._acknowledged = left
                same = token.topic_id == self.token.topic_id
                self.token = self.token | token if same else token
                return self.token

    def _settle(self, sealed: Sealed) -> list[tuple[int, int]]:
        """It is never sent again. What the journal can forget; the caller holds `lock`."""
        key = sealed.partition, sealed.sequence
        self._tried.pop(key, None)
        self._without.pop(key, None)
        gone = self.outbox.acknowledge(*key)
        if gone is None:
            return []
        self._account.used_bytes -= len(gone.value)
        return [key] if self._spool is not None and self._spool.settled(*key) else []

    # What became of them

    def _reject(self, reason: str, *, perhaps: bool = False) -> None:
        """Count a batch as lost, before anybody can see that it is settled. The caller holds `lock`.

        `perhaps`: it is, unless an earlier try of it, which was not answered, got into the log.
        """
        self.rejected_count += 1
        if perhaps:
            self._perhaps_count = self.rejected_count
            reason += "; an earlier try of it was not answered, and may have been counted"
        self._reasons.append(reason)

    def _report(self, count: int) -> None:
        """Without `lock`: metrics and log handlers are other people's code."""
        self._metrics.inc(m.PUBLISHER_DROPPED, count, "rejected")
        with self._lock:
            said = self.rejected_since(self.rejected_count - count)
        _log.error("%s", said)

    def rejected_since(self, rejected_count: int) -> str:
        """What was rejected beyond so many, in words; empty: nothing. The caller holds `lock`."""
        count = self.rejected_count - rejected_count
        lost = "are lost unless they were counted before" if self._perhaps_count > rejected_count else "are lost"
        return f"{count} batches were rejected and {lost}: {'; '.join([*self._reasons][-count:])}" if count else ""
