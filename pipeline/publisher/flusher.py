"""The flusher: drains the table into batches, commits to the spool, takes snapshots, and evicts silent series."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any
from zlib import crc32

import msgspec

import pipeline.metrics as m
from pipeline.core.record import Definition
from pipeline.errors import BufferFull, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock
from pipeline.publisher.batching import Pending
from pipeline.publisher.memory import MemoryAccount
from pipeline.publisher.sender import Sender
from pipeline.publisher.views import BaseView, Table
from pipeline.settings import PublisherSettings

if TYPE_CHECKING:
    from pipeline.publisher.spool.publisher import PublisherSpool

_log = logging.getLogger(__name__)
_EVICT_EVERY_S = 1.0
_SEAL_EVERY_S, _SEAL_EVERY_S_MAX = 1.0, 600.0
"""While batches pile up in a spool, how often more are made: less and less while none is acknowledged, so that what an
outage takes follows the number of series."""
_WARN_S = 10.0


class TableFlusher:
    """Drains the table of a publisher into its batches. For one thread, the flusher's."""

    def __init__(
        self,
        table: Table,
        views: Mapping[str, BaseView],
        sender: Sender,
        settings: PublisherSettings,
        clock: Clock,
        metrics: Metrics,
        account: MemoryAccount,
        spool: PublisherSpool | None = None,
    ) -> None:
        self.delta_count = 0
        """The number of deltas that were sealed."""
        self.taken_s = clock.monotonic_s()
        """The time of the last snapshot, on the monotonic clock."""
        self.table = table
        self._views = views
        self._sender = sender
        self._snapshot_s = settings.snapshot_interval_ms / 1000
        self._idle_s = settings.series_idle_ms / 1000
        self._clock = clock
        self._metrics = metrics
        self._account = account
        self._bytes_max = table_bytes(settings)
        self._drain_count = 0
        self._turn = crc32(sender.outbox.producer_id.encode())  # so that publishers differ in their turns
        self._torn = False
        """True if the last drain has failed: deltas may be out of the table and in no batch."""
        self._history: deque[tuple[float, int]] = deque()
        """Times and numbers of drains, from about `series_idle_ms` ago on."""
        self._changed = False
        """True if anything was recorded since the last snapshot."""
        self._spool = spool
        self._spill_bytes = settings.buffer_bytes_max // 4
        self._fsync_s = settings.fsync_interval_ms / 1000 if settings.durability == "disk" else 0.0
        self._synced_s = self._warned_s = self._seal_again_s = self._seal_pause_s = 0.0
        self._acknowledged = 0
        self._cut_due = False
        """True if there was a drain since `Table.cut` was last called."""
        self._positions: Mapping[int, tuple[int, int]] = {}
        """By shard, where the ring ended at the last drain; everything before that was drained."""
        self._gone: list[int] = []
        """Numbers of evicted series all of whose records were drained."""
        self._late: list[int] = []
        """Numbers of evicted series that a failed checkpoint named; a later one, or the next drain, removes them."""
        self._swept_s = 0.0
        """The time at which series of ended windows were last evicted."""
        self._evicted = False
        """True if series were evicted whose names the spool still has."""
        self._overflowed = self._overflow_count()  # a forked child's views count on from their parent's

    @property
    def _is_short(self) -> bool:
        """True if most of the table's memory is in use, so that series in which nothing waits should go."""
        return self.table.used_bytes > self._bytes_max * 3 // 4

    def snapshot_due(self, now_s: float) -> bool:
        """Return whether the snapshot that `local` reads is as old as it may become."""
        return now_s - self.taken_s >= self._snapshot_s

    def drain(self, now_s: float, *, take_snapshot: bool, seal: bool) -> bool:
        """Seal what there is room for, if `seal` says so; return whether everything recorded before is sealed now.

        With `take_snapshot`, take a snapshot even if none is due.
        """
        self._account.drained()
        everything = True
        if self.table.waiting_count:
            self._changed = True
            everything = seal and self._seal(now_s)
        elif seal:
            self._sender.seal_drafts([], self._clock.now_ms())
        if self._spool is not None:
            self._keep(self._spool, now_s)
        self._metrics.set(m.PUBLISHER_SNAPSHOT_AGE, self._clock.monotonic_s() - self.taken_s)
        if take_snapshot or self.snapshot_due(now_s):
            if self._changed:
                self.table.snapshot()
                self._changed = False
            self.taken_s = now_s
        self._evict(now_s)
        self._set_metrics()
        return everything

    def _seal(self, now_s: float) -> bool:
        now_ms = self._clock.now_ms()
        partition_count, busy = self._sender.room()
        if not partition_count or (self._spool is not None and busy and not self._seals_more(now_s)):
            return False
        flags = bytes([number in busy for number in range(partition_count)]) if busy and self._spool is None else None
        self._torn = True
        drafts = self.table.drain(partition_count, flags, self._sender.batch_bytes_max, self._turn)
        self._torn = False
        self._turn += 1
        try:  # first: if it fails, it has them all the same
            self._sender.seal_drafts(drafts, now_ms)
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
        if self._sender.batch_count != self._acknowledged:
            self._acknowledged = self._sender.batch_count
            self._seal_again_s, self._seal_pause_s = min(self._seal_again_s, now_s + _SEAL_EVERY_S), 0.0
        if now_s < self._seal_again_s and not self._is_short:
            return False
        self._seal_pause_s = min(max(_SEAL_EVERY_S, 2 * self._seal_pause_s), _SEAL_EVERY_S_MAX)
        self._seal_again_s = now_s + self._seal_pause_s
        return True

    # The spool

    def _keep(self, spool: PublisherSpool, now_s: float) -> None:
        """Commit drained deltas to the spool, and sync it. If it can't be written now, the next flush tries again."""
        try:
            try:
                if not spool.durable:
                    self._sender.spill_if_short()
                elif not self._sender.has_drafts and not self._torn:  # else drained deltas may be in no batch
                    self._commit(spool)
            finally:  # the rings need no more room on the disk
                if self._fsync_s and now_s - self._synced_s >= self._fsync_s:
                    self._synced_s = now_s
                    spool.sync()
        except (Unavailable, BufferFull) as error:
            self._sender.trouble = f"; the spool: {error}"
            if not self._warned_s or now_s - self._warned_s >= _WARN_S:
                self._warned_s = now_s
                _log.warning("the spool can't be written; batches wait for it: %s", error)
        finally:
            self._account.freed()  # the sender waits for it

    def _commit(self, spool: PublisherSpool) -> None:
        """Commit sealed batches, and unsealed deltas as merged series once these take less room than the rings."""
        if self._cut_due:
            self._positions, gone = self.table.cut()
            self._gone += self._late + gone
            self._late, self._cut_due, self._evicted = [], False, False
        if spool.is_behind:
            spool.commit((), self._positions, self._gone)
            self._gone = []
            spool.release_memory(self._spill_bytes)
        # A spool that is full of names of series records nothing, so no drain comes that would take the names away.
        if spool.is_checkpoint_due() or (self._evicted and not self.table.waiting_count):
            waiting = self.table.waiting_states()
            positions, gone = self.table.cut()
            self._late += gone
            spool.commit(_pending(waiting), positions, self._gone + self._late)
            self._gone, self._late, self._evicted = [], [], False

    def _evict(self, now_s: float) -> None:
        """Evict series of windows that have ended and series that were silent for `series_idle_ms`; or, if there is no room,
        all in which nothing waits.
        """
        if self._is_short or (self._spool is not None and self._spool.is_full_of_names):
            if self.table.evict(0):
                self._evicted = True
                self._account.freed()
            return
        if now_s - self._swept_s >= _EVICT_EVERY_S:
            self._swept_s = now_s
            self._evicted |= self.table.evict_ended() > 0
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

    def _set_metrics(self) -> None:
        overflowed = self._overflow_count()
        self._metrics.inc(m.PUBLISHER_OVERFLOWED, overflowed - self._overflowed)
        self._overflowed = overflowed
        self._metrics.set(m.PUBLISHER_BYTES, self.table.used_bytes + self._account.used_bytes)
        self._metrics.set(m.PUBLISHER_SERIES, self.table.series_count)
        self._metrics.set(m.PUBLISHER_IN_FLIGHT, len(self._sender.outbox))
        self._metrics.set(m.PUBLISHER_HELD_BACK, self._sender.held_count)
        if self._spool is not None:
            self._metrics.set(m.PUBLISHER_SPOOL_BYTES, self._spool.used_bytes)

    def show_closed(self) -> None:
        """Set the gauges of a publisher that is closed: nothing waits in its memory any more."""
        self._set_metrics()
        for gauge in (m.PUBLISHER_BYTES, m.PUBLISHER_SERIES, m.PUBLISHER_IN_FLIGHT, m.PUBLISHER_HELD_BACK):
            self._metrics.set(gauge, 0)


def _pending(waiting: Iterable[tuple[bytes, bytes, Any, int]]) -> Iterator[Pending]:
    decode = cache(msgspec.msgpack.Decoder(Definition).decode)
    return (Pending(decode(definition), suffix, state, count) for definition, suffix, state, count in waiting)


def table_bytes(settings: PublisherSettings) -> int:
    """Return what a table may use of a publisher's memory; the rest is for batches that are not acknowledged."""
    return settings.buffer_bytes_max // 2
