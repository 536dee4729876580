"""What the flusher does each time with a table: drain it into batches, have the spool know, take a snapshot, evict."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec

import pipeline.metrics as m
from pipeline.core.record import Definition
from pipeline.errors import BufferFull, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock
from pipeline.publisher.account import Account
from pipeline.publisher.batching import Pending
from pipeline.publisher.delivery import Delivery
from pipeline.publisher.views import BaseView, Table
from pipeline.settings import PublisherSettings

if TYPE_CHECKING:
    from pipeline.publisher.spooling import PublisherSpool

_log = logging.getLogger(__name__)
_EVICT_EVERY_S = 1.0
_SEAL_EVERY_S, _SEAL_EVERY_S_MAX = 1.0, 600.0
"""While batches pile up in a spool, how often more are made: less and less while none is acknowledged, so that what an
outage takes follows the number of series."""
_COMPLAIN_S = 10.0


class TableFlusher:
    """Drains the table of a publisher into its batches. For one thread, the flusher's."""

    def __init__(
        self,
        table: Table,
        views: Mapping[str, BaseView],
        delivery: Delivery,
        settings: PublisherSettings,
        clock: Clock,
        metrics: Metrics,
        account: Account,
        spool: PublisherSpool | None = None,
    ) -> None:
        self.delta_count = 0
        """Deltas that were sealed."""
        self.taken_s = clock.monotonic_s()
        """When the last snapshot was taken."""
        self.table = table
        self._views = views
        self._delivery = delivery
        self._snapshot_s = settings.snapshot_interval_ms / 1000
        self._idle_s = settings.series_idle_ms / 1000
        self._clock = clock
        self._metrics = metrics
        self._account = account
        self._bytes_max = table_bytes(settings)
        self._drain_count = 0
        self._torn = False
        """True if the last drain has failed: the table may have taken out deltas that nobody else has yet."""
        self._history: deque[tuple[float, int]] = deque()
        """When how many drains had been made, from about `series_idle_ms` ago on."""
        self._changed = False
        self._spool = spool
        self._stow_bytes = settings.buffer_bytes_max // 4
        self._fsync_s = settings.fsync_interval_ms / 1000 if settings.durability == "disk" else 0.0
        self._synced_s = self._complained_s = self._seal_again_s = self._seal_pause_s = 0.0
        self._acknowledged = 0
        self._cut_due = False
        """True if there was a drain since the last look at the table's cut."""
        self._positions: Mapping[int, tuple[int, int]] = {}
        """By shard, where the ring ended at the last drain; everything before that was drained."""
        self._gone: list[int] = []
        self._late: list[int] = []
        """Numbers of evicted series that a failed checkpoint named; they go with a later one, or with the next drain."""
        self._evicted = False
        """True if series were evicted whose names the spool still has."""
        self._overflowed = self._overflow_count()  # a forked child's views count on from what their parent has told

    @property
    def pressed(self) -> bool:
        """Whether most of the table's memory is in use, so that what is not needed should go."""
        return self.table.used_bytes > self._bytes_max * 3 // 4

    def snapshot_due(self, now_s: float) -> bool:
        """Return whether what `local` returns is as old as it may become."""
        return now_s - self.taken_s >= self._snapshot_s

    def drain(self, now_s: float, *, parked: bool, seal: bool) -> bool:
        """Seal what there is room for, if `seal` says so; return whether all that was recorded before is sealed now.

        `parked` takes a snapshot: somebody waits for the flush.
        """
        self._account.drained()
        everything = True
        if self.table.waiting_count:
            self._changed = True
            everything = seal and self._seal(now_s)
        elif seal:
            self._delivery.seal_drafts([], self._clock.now_ms())
        if self._spool is not None:
            self._keep(self._spool, now_s)
        self._metrics.set(m.PUBLISHER_SNAPSHOT_AGE, self._clock.monotonic_s() - self.taken_s)
        if parked or self.snapshot_due(now_s):
            if self._changed:
                self.table.snapshot()
                self._changed = False
            self.taken_s = now_s
        self._evict(now_s)
        self._tell()
        return everything

    def _seal(self, now_s: float) -> bool:
        now_ms = self._clock.now_ms()
        partition_count, busy = self._delivery.room(now_ms)
        if not partition_count or (self._spool is not None and busy and not self._seals_more(now_s)):
            return False
        flags = bytes([number in busy for number in range(partition_count)]) if busy and self._spool is None else None
        self._torn = True
        drafts = self.table.drain(partition_count, flags, self._delivery.batch_bytes_max)
        self._torn = False
        try:  # first: if it fails, it has them all the same
            self._delivery.seal_drafts(drafts, now_ms)
        finally:
            self._cut_due = True
            self._drain_count += 1
            deltas, series = sum([draft.delta_count for draft in drafts]), sum([draft.series_count for draft in drafts])
            self.delta_count += deltas
            self._metrics.inc(m.PUBLISHER_DELTAS, deltas)
            self._metrics.inc(m.PUBLISHER_MERGED_AWAY, deltas - series)
            self._account.freed()  # the memory of long values
        return not flags or not self.table.waiting_count

    def _seals_more(self, now_s: float) -> bool:
        """Return whether to make more batches, although many wait: now and then, because not all partitions need be away."""
        if self._delivery.batch_count != self._acknowledged:
            self._acknowledged = self._delivery.batch_count
            self._seal_again_s, self._seal_pause_s = min(self._seal_again_s, now_s + _SEAL_EVERY_S), 0.0
        if now_s < self._seal_again_s and not self.pressed:
            return False
        self._seal_pause_s = min(max(_SEAL_EVERY_S, 2 * self._seal_pause_s), _SEAL_EVERY_S_MAX)
        self._seal_again_s = now_s + self._seal_pause_s
        return True

    # The spool

    def _keep(self, spool: PublisherSpool, now_s: float) -> None:
        """Have the spool know what became of what was recorded. If it can't be written now, the next flush tries again."""
        try:
            try:
                if not spool.durable:
                    self._delivery.stow_if_pressed()
                elif not self._delivery.has_drafts and not self._torn:  # else what was drained is not all in batches
                    self._commit(spool)
            finally:  # what is in the rings needs no room on the disk
                if self._fsync_s and now_s - self._synced_s >= self._fsync_s:
                    self._synced_s = now_s
                    spool.sync()
        except (Unavailable, BufferFull) as error:
            self._delivery.trouble = f"; the spool: {error}"
            if not self._complained_s or now_s - self._complained_s >= _COMPLAIN_S:
                self._complained_s = now_s
                _log.warning("the spool can't be written; batches wait for it: %s", error)
        finally:
            self._account.freed()  # the sender waits for it

    def _commit(self, spool: PublisherSpool) -> None:
        """Commit what was sealed; and what can't be, as merged series, once that takes less room than the rings."""
        if self._cut_due:
            self._positions, gone = self.table.cut()
            self._gone += self._late + gone
            self._late, self._cut_due, self._evicted = [], False, False
        if spool.is_behind:
            spool.commit((), self._positions, self._gone)
            self._gone = []
            spool.release_memory(self._stow_bytes)
        # Names can be what the spool is full of: then nothing is recorded, and no drain comes that they would go with.
        if spool.is_checkpoint_due() or (self._evicted and not self.table.waiting_count):
            waiting = self.table.waiting_states()
            positions, gone = self.table.cut()
            self._late += gone
            spool.commit(_pending(waiting), positions, self._gone + self._late)
            self._gone, self._late, self._evicted = [], [], False

    def _evict(self, now_s: float) -> None:
        """Let go of series that were silent for `series_idle_ms`, or, if there is no room, of all in which nothing waits."""
        if self.pressed or (self._spool is not None and self._spool.is_full_of_names):
            if self.table.evict(0):
                self._evicted = True
                self._account.freed()
            return
        history = self._history
        if history and now_s - history[-1][0] < min(_EVICT_EVERY_S, self._idle_s / 4):
            return
        history.append((now_s, self._drain_count))
        while len(history) > 1 and now_s - history[1][0] >= self._idle_s:
            history.popleft()
        if now_s - history[0][0] >= self._idle_s:
            self._evicted |= self.table.evict(self._drain_count - history[0][1]) > 0

    def _overflow_count(self) -> int:
        return sum([view.overflow_count for view in [*self._views.values()]])

    def _tell(self) -> None:
        overflowed = self._overflow_count()
        self._metrics.inc(m.PUBLISHER_OVERFLOWED, overflowed - self._overflowed)
        self._overflowed = overflowed
        self._metrics.set(m.PUBLISHER_BYTES, self.table.used_bytes + self._account.used_bytes)
        self._metrics.set(m.PUBLISHER_SERIES, self.table.series_count)
        self._metrics.set(m.PUBLISHER_IN_FLIGHT, len(self._delivery.outbox))
        self._metrics.set(m.PUBLISHER_HELD_BACK, self._delivery.held_count)
        if self._spool is not None:
            self._metrics.set(m.PUBLISHER_SPOOL_BYTES, self._spool.used_bytes)


def _pending(waiting: Iterable[tuple[bytes, bytes, Any, int]]) -> Iterator[Pending]:
    decode = cache(msgspec.msgpack.Decoder(Definition).decode)
    return (Pending(decode(definition), suffix, state, count) for definition, suffix, state, count in waiting)


def table_bytes(settings: PublisherSettings) -> int:
    """Return what a table may use of a publisher's memory; the rest is for batches that are not acknowledged."""
    return settings.buffer_bytes_max // 2
