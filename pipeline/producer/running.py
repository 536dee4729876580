"""What a publisher has in one process: its buffers, its outbox, its spool, and the threads that empty them.

Two threads: the flusher merges and seals, the sender sends batches until they are acknowledged. With a spool folder a
third, the rescuer, sends what processes that are gone have left in it; with `drain_threads` further ones help the flusher
to empty shards. While the log, or a partition of it, is away, few batches are sealed for it: deltas pile up as merged
series, not as batches.

A forked child makes all of it anew: what the parent has is the parent's to send.
"""

from __future__ import annotations

import logging
import threading
from _thread import start_new_thread
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pipeline.metrics as m
from pipeline.core.sequence import Outbox
from pipeline.core.token import Token
from pipeline.errors import Invalid, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock, LogWriter
from pipeline.producer.account import Account
from pipeline.producer.buffer import Buffering, Owner, View
from pipeline.producer.buffering import buffering_of
from pipeline.producer.delivery import Delivery
from pipeline.producer.flusher import Flusher
from pipeline.producer.keeping import Keeper
from pipeline.producer.shards import ShardedBuffering
from pipeline.producer.snapshot import Totals
from pipeline.settings import PublisherSettings

if TYPE_CHECKING:
    from pipeline.producer.spooling import OwnSpool

_log = logging.getLogger(__name__)
_PARKED_LOOK_S = 1.0
_RETRY_S = 0.05
_MOVE_S = 0.1
"""How often threads' own lists are emptied at least: nothing else stops them from growing."""
_HELP_S = 0.02
"""How often a drainer looks for full shards, if nobody calls it."""
_COMPLAIN_S = 10.0
_CHECKPOINT_SHARE = 4
"""Of a spool, what was recorded and not committed takes about one in so many bytes, and the rest is free for others."""
_RESCUE_S = 10.0
"""How often to look for what other processes have left, and how long to try to send it."""


class _Flush:
    """One caller's wait: `barrier` says, once everything was sealed, which sequences must be settled."""

    def __init__(self, rejected_count: int) -> None:
        self.rejected_count = rejected_count
        """Rejected batches that somebody was told of when the wait began."""
        self.barrier: Mapping[int, int] | None = None


class Running:
    """Everything of a publisher that belongs to this process. Safe from any thread."""

    def __init__(
        self,
        writer: LogWriter,
        clock: Clock,
        settings: PublisherSettings,
        metrics: Metrics,
        views: Mapping[str, View],
        on_register: Callable[[], None],
        parent: Running | None,
    ) -> None:
        """`on_register` is called before a series is registered. `parent`: what this forked child was made from."""
        # `with self.lock` can't be interrupted between taking it and the block; `with self.changed` can.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._views = views
        self._writer = writer
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self.account = Account(settings, metrics, self.lock, self.changed)
        outbox = Outbox(clock.new_id(), 0)
        self.own: OwnSpool | None = None
        """The spool of this process, if it has one."""
        keeper: Keeper | None = None
        if settings.spool_dir:
            from pipeline.producer.spooling import OwnSpool  # only who has a spool pays for it, or needs its file locks

            self.own = OwnSpool(settings, outbox.producer_id)
            durable = settings.durability != "memory"
            most = settings.spool_bytes_max // _CHECKPOINT_SHARE
            keeper = Keeper(self.own, outbox, self.account, self.lock, metrics, durable=durable, ring_bytes_max=most)
        self.delivery = Delivery(
            outbox, writer, settings, metrics, self.account, self.lock, self.changed, clock.monotonic_s, keeper
        )
        self.inherits_handles = False
        """Whether threads' handles of the parent live on here: what they record, nobody announces."""
        self.buffering: Buffering
        if parent is not None:
            self.inherits_handles = parent.buffering.forget(self.account)
            if parent.own is not None:
                parent.own.abandon()
        if parent is not None and (keeper is None or not keeper.durable):
            self.buffering = parent.buffering
        else:
            self.buffering = buffering_of(settings, self.account, self.own)
        totals = Totals(settings.local_series_max, clock.monotonic_s)
        self.owner = Owner(self.account, self.buffering, totals, clock.now_ms, clock.monotonic_s, on_register)
        """What views need to know of this."""
        self.flusher = Flusher(views, self.buffering, self.delivery, self.account, totals, settings, clock, metrics, keeper)
        self.account.merge_harder = self.flusher.merge
        self.threads: dict[str, threading.Thread] = {}
        self.flushes: list[_Flush] = []
        self._started = False
        self._stopping = False
        self._stop_rescue = threading.Event()
        self._told_count = 0
        """Rejected batches that a flush has raised for."""
        self._told_lost_count = 0
        """The same of deltas that were no numbers."""

    @property
    def in_own_thread(self) -> bool:
        """Whether the caller is one of the threads that do the work, in a finaliser or log handler that it ran by chance."""
        return threading.get_ident() in self.account.own_threads

    @property
    def is_held(self) -> bool:
        """Whether the caller has interrupted its own thread in a write to the spool."""
        return self.own is not None and self.own.is_held

    @property
    def pressed(self) -> bool:
        """Whether over half of the buffer is in use, and batches wait for their acknowledgement."""
        return self.account.pressed and len(self.delivery.outbox) > 0

    def stats(self) -> dict[str, int]:
        """See `BasePublisher.stats`."""
        with self.lock:
            delivery = self.delivery
            return {
                "deltas": self.flusher.delta_count,
                "batches": delivery.batch_count,
                "entries": delivery.entry_count,
                "rejected": delivery.rejected_count,
                "waiting": len(delivery.outbox),
                "buffer_bytes": self.account.used_bytes,
            }

    # Waiting for them

    def flush(self, timeout_s: float) -> Token:
        """See `BasePublisher.flush`."""
        flush = _Flush(self._told_count)
        with self.locks_released():
            self.start_threads()
            try:
                with self.lock:
                    self.flushes.append(flush)
                    self.changed.notify_all()
                    self.changed.wait_for(lambda: self._stopping or self._settled(flush), timeout_s)
                    return self._outcome(flush, timeout_s)
            finally:
                if flush in self.flushes:
                    self.flushes.remove(flush)

    @contextmanager
    def locks_released(self) -> Iterator[None]:
        """Before waiting for other threads: in a signal handler or finaliser, this thread can hold what they need."""
        locks = [self.lock, *[view.lock for view in [*self._views.values()]]]
        counts = [_release(lock) for lock in locks]
        try:
            yield
        finally:
            for lock, count in zip(locks, counts, strict=True):
                for _ in range(count):
                    lock.acquire()

    def _outcome(self, flush: _Flush, timeout_s: float) -> Token:
        if rejected := self.delivery.rejected_since(flush.rejected_count):
            self._told_count = max(self._told_count, self.delivery.rejected_count)
            raise Invalid(rejected)
        if not self._settled(flush):
            why = "the publisher was closed" if self._stopping else f"not acknowledged within {timeout_s} s"
            series = sum(map(len, [*self._views.values()]))
            raise Unavailable(
                f"{why}: {len(self.delivery.outbox)} batches and {series} buffered series wait{self.delivery.trouble}"
            )
        if lost := self.flusher.lost_count - self._told_lost_count:
            self._told_lost_count += lost
            raise Invalid(f"{lost} deltas were no numbers, and are lost")
        return self.delivery.token

    def _settled(self, flush: _Flush) -> bool:
        return flush.barrier is not None and self.delivery.outbox.settled(flush.barrier)

    def stop(self) -> int:
        """End the threads, and let go of the spool: how many deltas and batches are lost, about."""
        with self.lock:
            self._stopping = True
            self._stop_rescue.set()
            self.changed.notify_all()
            threads = [*self.threads.values()]
        for thread in threads:
            thread.join(5.0)
        if self.own is not None and not self.own.close():
            _log.warning("what was not acknowledged is left in %s", self._settings.spool_dir)
        if self._settings.durability != "memory":
            return 0
        return self.delivery.unkept_count() + self.waiting_count()

    def waiting_count(self) -> int:
        """Deltas that are in no batch yet."""
        return sum([view.waiting_count() for view in [*self._views.values()]]) + self.buffering.waiting_count()

    # The threads

    def start_threads(self) -> None:
        """See to it that the threads run, soon.

        `Thread.start` waits for the thread, with a lock of its own; a signal handler that came in there could not wait for
        it too. So a helper does it, in a thread that one call starts.
        """
        if self._started:
            return
        try:
            self._started = True  # before the helper, which takes it back if it fails
            start_new_thread(self._start_both, ())
        except BaseException as error:
            self._started = False  # two helpers do no harm
            if isinstance(error, RuntimeError):
                raise Unavailable(f"no thread can be started: {error}") from error
            raise

    def _start_both(self) -> None:
        try:
            with self.lock:
                self._start_thread("flusher", self._flush_until_stopped)
                self._start_thread("sender", self._send_until_stopped)
                if isinstance(self.buffering, ShardedBuffering):
                    for i in range(1, self.buffering.drain_threads):
                        self._start_thread(f"drainer-{i}", partial(self._help_until_stopped, self.buffering, i))
                if self.own is not None:
                    self._start_thread("rescuer", self._rescue_until_stopped)
        except Exception:
            _log.exception("the publisher's threads can't be started; what is recorded waits")
            self._started = False  # whoever registers a series or flushes next tries again

    def _start_thread(self, name: str, run: Callable[[], None]) -> None:
        if name in self.threads or self._stopping:
            return

        def run_owned() -> None:
            self.account.own_threads.add(threading.get_ident())
            run()

        thread = threading.Thread(target=run_owned, name=f"pipeline-{name}", daemon=True)
        thread.start()
        self.threads[name] = thread

    # The flusher

    def _flush_until_stopped(self) -> None:
        snapshot_s = self._settings.snapshot_interval_ms / 1000
        looked_s = pause_s = complained_s = flushed_s = 0.0
        while True:
            linger_s = self.delivery.linger.interval_s
            with self.lock:
                # Whoever is starved must not keep this thread, and the interpreter lock, busy.
                interval_s = min(linger_s, snapshot_s, _MOVE_S if self.buffering.gauges.thread_count else snapshot_s)
                self.changed.wait_for(self._urgent, min(pause_s, interval_s))
                self.changed.wait_for(self._asked, max(0.0, interval_s - pause_s))
                if self._stopping:
                    return
                flushes = [flush for flush in self.flushes if flush.barrier is None]
                asked = self._seal_asked()
            started_s = self._clock.monotonic_s()
            look = bool(flushes) or started_s - looked_s >= _PARKED_LOOK_S
            looked_s = started_s if look else looked_s
            seal = asked or started_s - flushed_s >= linger_s
            flushed_s = started_s if seal else flushed_s
            try:
                if seal or self.flusher.snapshot_due(started_s):
                    everything = self.flusher.drain(started_s, parked=look, seal=seal)
                else:
                    everything = self.flusher.move()
                if seal:
                    self._metrics.observe(m.PUBLISHER_FLUSH, self._clock.monotonic_s() - started_s)
                    self._metrics.set(m.PUBLISHER_LINGER, linger_s)
            except Exception:  # a flusher that dies would keep everybody's deltas for ever
                everything = False
                if not complained_s or started_s - complained_s >= _COMPLAIN_S:
                    complained_s = started_s
                    _log.exception("a flush failed; its deltas are kept and tried again")
            pause_s = max(0.001, self._clock.monotonic_s() - started_s)
            if everything and flushes:
                with self.lock:
                    for flush in flushes:
                        flush.barrier = self.delivery.outbox.next_sequences()
                    self.changed.notify_all()
            elif flushes:
                with self.lock:
                    self.changed.wait_for(lambda: self._stopping, min(interval_s, _RETRY_S))

    def _asked(self) -> bool:
        return self.account.hurried or self.buffering.due or self._seal_asked()

    def _seal_asked(self) -> bool:
        return self.account.starved or self.account.due or self._flush_asked()

    def _urgent(self) -> bool:
        return self.account.hurried or self._flush_asked()

    def _flush_asked(self) -> bool:
        return self._stopping or any(flush.barrier is None for flush in self.flushes)

    def _help_until_stopped(self, shards: ShardedBuffering, number: int) -> None:
        failed = False
        while True:
            with self.lock:
                if failed:
                    self.changed.wait_for(lambda: self._stopping, _RETRY_S)
                self.changed.wait_for(lambda: self._stopping or shards.due, _HELP_S)
                if self._stopping:
                    return
            try:
                while shards.help_out(number):
                    pass
                failed = False
            except Exception:  # its deltas are kept; the flusher tries again, too
                if not failed:
                    _log.exception("emptying a shard failed; trying again")
                failed = True

    # The sender

    def _send_until_stopped(self) -> None:
        backoff_s = 0.0
        while True:
            with self.lock:
                if backoff_s:
                    self.changed.wait_for(lambda: self._stopping, backoff_s)
                self.changed.wait_for(lambda: self._stopping or len(self.delivery.outbox) > 0)
                if self._stopping:
                    return
                batches = self.delivery.next_batches()
                if not batches:  # none is kept yet: whoever keeps them says so
                    self.changed.wait()
                    continue
            try:
                progressed = self.delivery.send(batches)
            except Exception:  # as above; the batches are still in the outbox
                _log.exception("sending failed; trying again")
                progressed = False
            first, most = self._settings.retry_backoff_ms / 1000, self._settings.retry_backoff_max_ms / 1000
            backoff_s = 0.0 if progressed else min(max(first, 2 * backoff_s), most)

    # The rescuer

    def _rescue_until_stopped(self) -> None:
        """Send what processes that are gone have left in the spool folder; look again now and then."""
        from pipeline.producer.spool.drain import drain

        folder, writer = Path(self._settings.spool_dir), self._writer
        while not self._stop_rescue.is_set():
            try:
                for slot in drain(folder, writer, self._clock, self._settings, timeout_s=_RESCUE_S, stop=self._stop_rescue):
                    self._metrics.inc(m.PUBLISHER_RESCUED, slot.batch_count)
                    if slot.batch_count or slot.error or slot.report.corrupt:
                        _log.info("spool of %s: %s", slot.producer_id, slot)
            except Exception:
                _log.exception("looking for what other processes have left failed; trying again")
            self._stop_rescue.wait(_RESCUE_S)


def _release(lock: threading.RLock) -> int:
    """Release `lock` as often as this thread holds it; how often that was."""
    count = 0
    while True:
        try:
            lock.release()
        except RuntimeError:  # not held, or no more
            return count
        count += 1
