"""What the flusher does each time: move deltas into cells, merge, take a snapshot, seal, and have the spool know of it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import pipeline.metrics as m
from pipeline.errors import BufferFull, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock
from pipeline.producer.account import Account
from pipeline.producer.buffer import Buffering, View
from pipeline.producer.cell import Cell
from pipeline.producer.delivery import Delivery
from pipeline.producer.keeping import Keeper
from pipeline.producer.sealing import Run
from pipeline.producer.snapshot import Totals
from pipeline.settings import PublisherSettings

_log = logging.getLogger(__name__)
_COMPLAIN_S = 10.0


class Flusher:
    """Drains the buffers of a publisher into its delivery. One thread at a time, which is the flusher's, but for `merge`."""

    def __init__(
        self,
        views: Mapping[str, View],
        buffering: Buffering,
        delivery: Delivery,
        account: Account,
        totals: Totals,
        settings: PublisherSettings,
        clock: Clock,
        metrics: Metrics,
        keeper: Keeper | None,
    ) -> None:
        self.delta_count = 0
        """Deltas that were sealed."""
        self.lost_count = 0
        """Deltas that turned out to be no numbers when they were merged."""
        self._contended_count = 0
        self._views = views
        self._buffering = buffering
        self._delivery = delivery
        self._account = account
        self._totals = totals
        self._snapshot_s = settings.snapshot_interval_ms / 1000
        self._idle_s = settings.series_idle_ms / 1000
        self._clock = clock
        self._metrics = metrics
        self._keeper = keeper
        self._stow_bytes = settings.buffer_bytes_max // 4
        self._complained_s = self._synced_s = 0.0
        self._fsync_s = settings.fsync_interval_ms / 1000 if settings.durability == "disk" else 0.0

    def drain(self, now_s: float, *, parked: bool, seal: bool) -> bool:
        """Merge all buffers and, to `seal`, seal what there is room for; whether all that was recorded is sealed now.

        `parked` also looks into cells that were let go of, and takes a snapshot: somebody waits for the flush.
        """
        self._account.drained()
        pressed = self._account.pressed
        views = [*self._views.values()]
        self._buffering.drain()
        idle_s = 0.0 if pressed else self._idle_s
        found = [(view, view.look(now_s=now_s, idle_s=idle_s, parked=parked)) for view in views]
        everything = True
        keeper = self._keeper if self._keeper is not None and self._keeper.durable else None
        behind = keeper is not None and keeper.behind  # the last commit failed
        if behind or any(cells or view.orphans for view, cells in found) or self._delivery.unsealed:
            now_ms = self._clock.now_ms()
            partition_count, busy = self._delivery.room(now_ms) if seal else (0, ())
            if keeper is not None and busy and not keeper.commit_due(now_s):
                partition_count, busy = 0, ()
            everything = self._take(found, partition_count, busy, pressed=pressed, now_ms=now_ms)
            self._delivery.spill_if_pressed()
            if keeper is not None and (behind or partition_count or keeper.checkpoint_due()):
                self._commit(views, now_s)
        self._metrics.set(m.PUBLISHER_SNAPSHOT_AGE, self._clock.monotonic_s() - self._totals.taken_s)
        if parked or self.snapshot_due(now_s):
            self._publish(found, now_s)
        if self._fsync_s and now_s - self._synced_s >= self._fsync_s:
            self._synced_s = now_s
            self._sync()
        self._tell(views)
        return everything

    def _sync(self) -> None:
        assert self._keeper is not None
        try:
            self._keeper.sync()
        except (Unavailable, BufferFull) as error:
            _log.error("what was recorded can't be forced to the disk: %s", error)

    def snapshot_due(self, now_s: float) -> bool:
        """Whether what `local` returns is as old as it may become."""
        return now_s - self._totals.taken_s >= self._snapshot_s

    def move(self) -> bool:
        """Only move deltas into cells, because a buffer is full. False: nothing is sealed."""
        self._account.hurried = False
        self._buffering.drain()
        return False

    def _commit(self, views: list[View], now_s: float) -> None:
        """Have the spool know what became of everything that was drained. If it can't now, the next flush tries again."""
        assert self._keeper is not None
        pending = [merged for run in self._delivery.unsealed for merged in run.merged()]
        for view in views:
            pending += view.waiting()
        try:
            self._keeper.commit(pending, now_s)
            self._keeper.stow(self._stow_bytes)
        except (Unavailable, BufferFull) as error:
            self._delivery.trouble = f"; the spool: {error}"
            if not self._complained_s or now_s - self._complained_s >= _COMPLAIN_S:
                self._complained_s = now_s
                _log.warning("the spool can't be written; batches wait for it: %s", error)
        finally:
            self._account.freed()  # the sender waits for it

    def _take(
        self,
        found: list[tuple[View, list[Cell]]],
        partition_count: int,
        busy: Collection[int],
        *,
        pressed: bool,
        now_ms: int,
    ) -> bool:
        everything = True
        runs: list[Run] = []
        try:
            for view, cells in found:
                run = Run(view.definition)
                runs.append(run)
                everything &= view.drain(cells, run, partition_count=partition_count, busy=busy, pressed=pressed)
        finally:
            try:  # first: if it fails, it has them all the same
                everything &= self._delivery.seal([run for run in runs if len(run)], partition_count, now_ms)
            finally:
                delta_count = sum([sum(run.counts) for run in runs])
                self.delta_count += delta_count
                for (view, _), run in zip(found, runs, strict=False):
                    view.totals.add_all(run.suffixes, run.states)
                self._metrics.inc(m.PUBLISHER_DELTAS, delta_count)
                self._metrics.inc(m.PUBLISHER_MERGED_AWAY, delta_count - sum(map(len, runs)))
        return everything

    def merge(self) -> None:
        """Merge what waits in cells, and give back the memory that it took: for a thread that has no memory left."""
        for view in [*self._views.values()]:
            cells = view.look(now_s=self._clock.monotonic_s(), idle_s=0.0, parked=False)
            view.drain(cells, Run(view.definition), partition_count=0, busy=(), pressed=True)

    def _publish(self, found: list[tuple[View, list[Cell]]], now_s: float) -> None:
        for view, cells in found:
            view.publish(cells, now_s)
        self._totals.taken_s = now_s

    def _tell(self, views: list[View]) -> None:
        for view in views:
            if lost := view.take_lost_count():
                self.lost_count += lost
                self._metrics.inc(m.PUBLISHER_DROPPED, lost, "no_number")
                _log.error("view %s: %d deltas were no numbers when they were merged", view.definition.view, lost)
        self._metrics.set(m.PUBLISHER_BYTES, self._account.used_bytes)
        self._metrics.set(m.PUBLISHER_SERIES, sum(map(len, views)))
        self._metrics.set(m.PUBLISHER_IN_FLIGHT, len(self._delivery.outbox))
        if self._keeper is not None:
            self._metrics.set(m.PUBLISHER_SPOOL_BYTES, self._keeper.used_bytes)
        gauges = self._buffering.gauges
        self._metrics.set(m.PUBLISHER_THREADS, gauges.thread_count)
        self._metrics.set(m.PUBLISHER_SHARDS, gauges.shard_count)
        self._metrics.set(m.PUBLISHER_SHARD_UTILISATION, gauges.utilisation)
        contended, self._contended_count = gauges.contended_count - self._contended_count, gauges.contended_count
        self._metrics.inc(m.PUBLISHER_CONTENDED, max(0, contended))
