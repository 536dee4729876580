"""The sender: numbers drafts, and sends sealed batches until the log has acknowledged them, or refused them for good."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime
from itertools import zip_longest
from typing import TYPE_CHECKING

import pipeline.metrics as m
from pipeline.core.codec import decode_batch, encode_batch
from pipeline.core.parts import without_groups
from pipeline.core.record import Batch
from pipeline.core.sequence import GAP_COUNT_MAX, Outbox, Sealed
from pipeline.core.token import Token
from pipeline.errors import BadRecord, BufferFull, Fenced, GroupsRefused, Invalid, PipelineError, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock, LogWriter, Message
from pipeline.publisher.batching import Draft, number
from pipeline.publisher.memory import MemoryAccount
from pipeline.publisher.tokens import TokenMaker
from pipeline.settings import PublisherSettings
from pipeline.topics import DELTAS

if TYPE_CHECKING:
    from pipeline.publisher.spool.publisher import PublisherSpool

_log = logging.getLogger(__name__)
SEND_BYTES_MAX = 4 * 2**20
_WAITING_MAX = 16
"""Batches that may wait for a partition. Beyond that its series go on merging in the table."""
_REASONS_MAX = 3
_HELD_WARNING_S = 600.0
_DAY_MS = 86_400_000
_OUTAGE_S = 1.0
"""A log that fails for less is not worth a warning."""
_FLUSH_LATENCIES = 4
"""The time between flushes, in latencies of acknowledgement: a delta then waits for its flush as long as for two of them."""
_LATENCY_WEIGHT = 0.2
"""The weight of the newest latency in the average; TCP's round-trip time (RFC 6298) gives it an eighth."""
FOR_GOOD = (Invalid, BadRecord, Fenced)
"""Answers of a log after which sending the same bytes again can't help. After every other error the sender tries again."""

Key = tuple[int, int]
"""Partition and sequence of a batch."""


def held_after_ms(producer_ttl_ms: int) -> int:
    """Return the age after which a batch that was sent before is not sent again: tasks may soon forget its producer."""
    return producer_ttl_ms - min(_DAY_MS, producer_ttl_ms // 2)


class FlushInterval:
    """The time between flushes: long enough to merge, and no longer than the log makes deltas wait anyway."""

    def __init__(self, min_ms: int, max_ms: int) -> None:
        self._max_s = max_ms / 1000
        self._min_s = min(min_ms, max_ms) / 1000
        self._latency_s = 0.0

    def observe(self, latency_s: float) -> None:
        """Take into account how long the log has needed to acknowledge."""
        weight = _LATENCY_WEIGHT if self._latency_s else 1.0
        self._latency_s += weight * (latency_s - self._latency_s)

    @property
    def current_s(self) -> float:
        """Time after a flush at which the next one is due."""
        return min(max(_FLUSH_LATENCIES * self._latency_s, self._min_s), self._max_s)


class _Outage:
    """Logs once that the log is away, and once that it is back, whatever number of attempts fails meanwhile.

    The log is away while every call fails, for a second or more, and something waits for it. It is back when it answers to
    a batch. The sender's and the flusher's thread both call this.
    """

    def __init__(self, clock: Clock, account: MemoryAccount, what_waits: Callable[[], str]) -> None:
        self._clock = clock
        self._lock = account.lock
        self._what_waits = what_waits
        self._since: tuple[float, int] | None = None
        """When the first of the failed calls began, by both clocks."""
        self._warned = False

    def failed(self, began: tuple[float, int], error: PipelineError) -> None:
        if isinstance(error, FOR_GOOD):
            return
        with self._lock:
            self._since = since = self._since or began
            if self._warned or self._clock.monotonic_s() - since[0] < _OUTAGE_S:
                return
            self._warned = True
        if waits := self._what_waits():
            _log.warning("the log is away since %s: %s; the last error: %s", _time(since[1]), waits, error)
        else:
            self._warned = False

    def answered(self) -> None:
        with self._lock:
            since, warned = self._since, self._warned
            self._since, self._warned = None, False
        if warned and since is not None:
            away_s = self._clock.monotonic_s() - since[0]
            waits = self._what_waits() or "nothing waits"
            _log.warning("the log is back; it was away for %.1f s, since %s: %s", away_s, _time(since[1]), waits)


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds")


class Sender:
    """The batches of one producer. The flusher's thread seals, the sender's sends; `account.lock` guards what both touch."""

    def __init__(
        self,
        outbox: Outbox,
        writer: LogWriter,
        settings: PublisherSettings,
        metrics: Metrics,
        account: MemoryAccount,
        clock: Clock,
        what_waits: Callable[[], str],
        spool: PublisherSpool | None = None,
    ) -> None:
        """`what_waits` says in words what waits for the log, for the warning that the log is away; empty if nothing does."""
        self.outbox = outbox
        self.flush_interval = FlushInterval(settings.flush_interval_min_ms, settings.flush_interval_ms)
        self.batch_bytes_max = settings.batch_bytes_max
        """The largest batch, as far as is known: the log may take less than the settings say."""
        self.token = Token()
        """The token that `make_token` returned last."""
        self.batch_count = self.entry_count = self.rejected_count = 0
        self.trouble = ""
        """The reason why the last attempt failed, as the end of a message."""
        self.held_count = 0
        """Batches that are held back now because they are too old to be sent again."""
        self._writer = writer
        self._settings = settings
        self._metrics = metrics
        self._account = account
        self._lock, self._changed = account.lock, account.changed
        self._clock = clock
        self._spool = spool
        self._outage = _Outage(clock, account, what_waits)
        self._tokens = TokenMaker(writer)
        self._topic_id = ""
        """The id that the topic had before anything in `_acknowledged` was sent."""
        self._acknowledged: dict[int, int] = {}
        """By partition, the offset behind all batches that were acknowledged and are not in `token` yet."""
        self._drafts: deque[Draft] = deque()
        """Drained states that have no sequence yet."""
        self._partition_count = 0
        """The number of partitions when the log was last asked; 0: not known."""
        self._suspects: dict[Key, Sealed] = {}
        """Batches that were refused together with others: the log may have refused all because of one."""
        self._reasons: deque[str] = deque(maxlen=_REASONS_MAX)
        self._uncertain_count = 0
        """The value of `rejected_count` at the last rejection of a batch that may have been counted before."""
        self._held_after_ms = held_after_ms(settings.producer_ttl_ms)
        self._held_warned_s = 0.0
        self._tried: dict[Key, tuple[float, int]] = {}
        """When batches that may be in the log, but are not acknowledged, were first sent, by both clocks."""
        self._left_out: dict[Key, list[set[int]]] = {}
        """Groups that are left out of batches because a gateway refuses them: one set for each refusal."""

    # For the flusher

    def room(self) -> tuple[int, Collection[int]]:
        """Return the number of partitions, 0 if nothing can be sealed now, and those for which enough batches wait."""
        self.spill_if_short()
        with self._lock:
            if self.outbox.bytes_total > self._settings.buffer_bytes_max // (4 if self._spool is None else 2):
                return 0, ()
            waiting = Counter([sealed.partition for sealed in self.outbox.pending()])
        began = self._now()
        try:
            self._partition_count = self._writer.partition_count(DELTAS)
            self._account.message_bytes_max = self._writer.message_bytes_max(DELTAS)
            self.batch_bytes_max = min(self._settings.batch_bytes_max, self._account.message_bytes_max)
        except PipelineError as error:
            self._outage.failed(began, error)
            self.trouble = f"; the log is away: {error}"
            if self._spool is None:
                return 0, ()
        return self._partition_count, {partition for partition, count in waiting.items() if count >= _WAITING_MAX}

    def spill_if_short(self) -> None:
        """While memory is short, move the bytes of all batches into the spool, if there is one and it has room."""
        if self._spool is None or not self._account.is_short:
            return
        try:
            if not self._spool.durable:
                self._spool.commit()
            self._spool.release_memory(0)
        except (Unavailable, BufferFull) as error:
            self.trouble = f"; the spool: {error}"
            _log.warning("batches stay in memory: %s", error)

    def seal_drafts(self, drafts: Iterable[Draft], now_ms: int) -> None:
        """Number drafts and keep them, together with those that an earlier call had no memory for."""
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
        """True if drafts wait for a sequence, because there was no memory for it."""
        return bool(self._drafts)

    def unkept_count(self) -> int:
        """Return the number of batches that end with this process, and of deltas in drafts."""
        kept_count = self._spool.kept_count if self._spool is not None else 0
        return len(self.outbox) - kept_count + sum([draft.delta_count for draft in [*self._drafts]])

    # For the sender's thread

    def next_batches(self) -> list[Sealed]:
        """Return the batches to send together: partitions in turn, so that none holds up others, each in its own order.

        The caller holds the lock.
        """
        now_s, now_ms = self._now()
        for suspect in self._suspects.values():
            if not self._is_held(suspect, now_s, now_ms):
                return [suspect]
        by_partition: dict[int, list[Sealed]] = {}
        self.held_count = 0
        for sealed in self.outbox.pending():
            if self._is_held(sealed, now_s, now_ms):
                self.held_count += 1
                continue
            if self._spool is not None and self._spool.holds_back(sealed):
                continue
            run = by_partition.setdefault(sealed.partition, [])
            # A task remembers so many gaps: what is sent must stay that close to the oldest batch that it may lack.
            if not run or sealed.sequence < run[0].sequence + GAP_COUNT_MAX:
                run.append(sealed)
        batches: list[Sealed] = []
        size = 0
        for turn in zip_longest(*by_partition.values()):
            for sealed in turn:
                if sealed is not None:
                    size += len(sealed.value) or self.batch_bytes_max
                    if batches and size > SEND_BYTES_MAX:
                        return batches
                    batches.append(sealed)
        return batches

    def _is_held(self, sealed: Sealed, now_s: float, now_ms: int) -> bool:
        """Return whether a batch may be in the log for so long that tasks have forgotten it, and would count it twice.

        Either clock can say so: one stands still while the machine sleeps, the other can be set. A wrong clock loses
        nothing: the batch stays, and is sent once both clocks agree.
        """
        tried = self._tried.get((sealed.partition, sealed.sequence))
        if tried is None:
            return False
        return max((now_s - tried[0]) * 1_000, now_ms - tried[1]) > self._held_after_ms

    def warn_of_held(self) -> None:
        """Log, now and then, that batches are held back. The caller does not hold the lock."""
        now_s = self._clock.monotonic_s()
        if self.held_count and (not self._held_warned_s or now_s - self._held_warned_s >= _HELD_WARNING_S):
            self._held_warned_s = now_s
            _log.error("%s", self.held_words)

    @property
    def held_words(self) -> str:
        """A sentence about the batches that are held back; empty if there are none."""
        if not self.held_count:
            return ""
        days = self._held_after_ms / _DAY_MS
        return (
            f"{self.held_count} batches are held back: they were sent over {days:.3g} days ago without an answer, and tasks "
            "may have folded and forgotten them (producer_ttl_ms); they would count twice"
        )

    def send(self, batches: list[Sealed]) -> bool:
        """Make one attempt; return whether it has changed anything, so that the next one need not wait."""
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
        uncertain = [(sealed.partition, sealed.sequence) in self._tried for sealed in batches]
        started_s = self._clock.monotonic_s()
        results = self._append(batches, messages)
        took_s = self._clock.monotonic_s() - started_s
        accepted: list[tuple[Sealed, int]] = []
        refused: list[Sealed] = []
        errors: list[object] = []
        for sealed, result, earlier in zip(batches, results, uncertain, strict=True):
            if isinstance(result, int):
                accepted.append((sealed, result))
            else:
                errors.append(result)
                if isinstance(result, FOR_GOOD):
                    refused.append(sealed)
                    if not earlier:  # its only try was answered: it is not in the log
                        self._tried.pop((sealed.partition, sealed.sequence), None)
        alone = len(batches) == 1
        gone: list[Key] = []
        with self._lock:
            if accepted:
                self.flush_interval.observe(took_s)
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
                    gone += self._leave_out(sealed, errors[0], messages[0].value or b"", uncertain=uncertain[0])
                elif alone:
                    gone += self._settle(sealed)
                    self._reject(f"batch {_words(sealed)}: {errors[0]}", uncertain=uncertain[0])
                else:
                    self._suspects[sealed.partition, sealed.sequence] = sealed
            self.trouble = f"; the last error: {errors[-1]}" if errors else ""
            self._changed.notify_all()
        if self._spool is not None:
            self._spool.forget(gone)
        self._metrics.inc(m.PUBLISHER_BATCHES, len(accepted))
        if accepted:
            self._metrics.observe(m.PUBLISHER_ACKNOWLEDGED, took_s)
        if alone and refused:
            self._report_rejected()
        elif errors:
            self._metrics.inc(m.PUBLISHER_RETRIES, len(errors))
            _log.debug("%d of %d batches not acknowledged, trying again: %s", len(errors), len(batches), errors[-1])
        return bool(accepted or refused)

    def _append(self, batches: list[Sealed], messages: list[Message]) -> list[int | PipelineError]:
        began = self._now()
        if not self._topic_id:
            try:
                self._topic_id = self._tokens.topic_id_before()
            except Unavailable as error:
                self._outage.failed(began, error)
                return [error] * len(messages)  # nothing was sent: this is no try
        for sealed in batches:
            self._tried.setdefault((sealed.partition, sealed.sequence), began)
        results = self._writer.append(messages, timeout_s=self._settings.request_timeout_ms / 1000)
        failed = [it for it in results if isinstance(it, PipelineError) and not isinstance(it, FOR_GOOD)]
        if len(failed) < len(results):
            self._outage.answered()
        else:
            self._outage.failed(began, failed[-1])
        return results

    def _now(self) -> tuple[float, int]:
        return self._clock.monotonic_s(), self._clock.now_ms()

    def _bytes_of(self, sealed: Sealed) -> bytes:
        """Return the bytes of a batch, without the groups that were refused."""
        value = self._spool.load(sealed) if self._spool is not None else sealed.value
        for indexes in self._left_out.get((sealed.partition, sealed.sequence), ()):
            value = without_groups(value, indexes)
        return value

    def _give_up(self, sealed: Sealed, error: BadRecord) -> None:
        """Go on without a batch that is damaged in the spool. Whoever recovers the slot later puts it aside there."""
        with self._lock:
            uncertain = (sealed.partition, sealed.sequence) in self._tried
            self._suspects.pop((sealed.partition, sealed.sequence), None)
            self._settle(sealed)
            self._reject(f"batch {_words(sealed)}: {error}", uncertain=uncertain)
            self._changed.notify_all()
        self._report_rejected()

    def _leave_out(self, sealed: Sealed, error: GroupsRefused, value: bytes, *, uncertain: bool) -> list[Key]:
        """Go on without groups of a batch, so that what is wrong with one view costs no other. The caller holds the lock.

        The batch keeps its sequence. If `uncertain`, an earlier try, of the whole batch, may have got into the log after
        all. Then all groups that the task could take are counted, the others are dead letters, and what is sent now is a
        duplicate.
        """
        indexes = {index for index, _, _ in error.groups}
        self._reject(f"{len(indexes)} groups of batch {_words(sealed)}: {error}", uncertain=uncertain)
        if not decode_batch(without_groups(value, indexes)).groups:
            return self._settle(sealed)
        self._left_out.setdefault((sealed.partition, sealed.sequence), []).append(indexes)
        return []

    def _settle(self, sealed: Sealed) -> list[Key]:
        """Forget a batch, which is never sent again; return it if the spool has it too. The caller holds the lock."""
        key = sealed.partition, sealed.sequence
        self._tried.pop(key, None)
        self._left_out.pop(key, None)
        gone = self.outbox.acknowledge(*key)
        if gone is None:
            return []
        self._account.used_bytes -= len(gone.value)
        return [key] if self._spool is not None and self._spool.settled(*key) else []

    def say_closed(self, timeout_s: float) -> None:
        """Send an empty batch to each partition that has had one, which says that it is the last. Make one attempt."""
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

    def make_token(self) -> Token:
        """Return the token that covers everything acknowledged so far. May ask the log, so the lock must not be held.

        After a topic was made anew the token covers what the new one acknowledged; the rest is gone with the old one.
        Raises `Unavailable` if the two can't be told apart now.
        """
        while True:
            with self._lock:
                acknowledged, before = dict(self._acknowledged), self._topic_id
                if not acknowledged:
                    return self.token
            token = self._tokens.make(acknowledged, before)
            with self._lock:
                if self._topic_id != before:
                    continue  # another thread was quicker, and found another topic
                self._topic_id = token.topic_id or before
                left = {p: n for p, n in self._acknowledged.items() if n != acknowledged.get(p)}
                self._acknowledged = left
                same = token.topic_id == self.token.topic_id
                self.token = self.token | token if same else token
                return self.token

    # Rejected batches

    def _reject(self, reason: str, *, uncertain: bool) -> None:
        """Count a batch as lost, before anybody can see that it is settled. The caller holds the lock.

        If `uncertain`, an earlier try of it was not answered, and may have got into the log.
        """
        self.rejected_count += 1
        if uncertain:
            self._uncertain_count = self.rejected_count
            reason += "; an earlier try of it was not answered, and may have been counted"
        self._reasons.append(reason)

    def _report_rejected(self) -> None:
        """Log the last rejection and count it. Without the lock: metrics and log handlers are other people's code."""
        self._metrics.inc(m.PUBLISHER_DROPPED, 1, "rejected")
        with self._lock:
            reason = self.rejected_since(self.rejected_count - 1)
        _log.error("%s", reason)

    def rejected_since(self, rejected_count: int) -> str:
        """Return a sentence about the batches rejected after so many; empty if there are none. The caller holds the lock."""
        count = self.rejected_count - rejected_count
        lost = "are lost unless they were counted before" if self._uncertain_count > rejected_count else "are lost"
        return f"{count} batches were rejected and {lost}: {'; '.join([*self._reasons][-count:])}" if count else ""


def _words(sealed: Sealed) -> str:
    return f"{sealed.sequence} for partition {sealed.partition}"
