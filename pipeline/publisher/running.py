"""What a publisher has in one process: its outbox, its spool, and the threads that drain its table.

Two threads: the flusher drains and seals, the sender sends batches until they are acknowledged. With a spool folder a
third, the rescuer, sends what processes that are gone have left in it. While the log, or a partition of it, is away, few
batches are sealed for it: deltas pile up as merged series, not as batches.

A forked child makes all of it anew: what the parent has is the parent's to send.
"""

from __future__ import annotations

import _thread
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline.metrics as m
from pipeline.core.record import producer_id_of
from pipeline.core.sequence import Outbox
from pipeline.core.token import Token
from pipeline.errors import Invalid, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock, LogWriter
from pipeline.publisher.account import Account
from pipeline.publisher.delivery import Delivery
from pipeline.publisher.flusher import TableFlusher, table_bytes
from pipeline.publisher.identity import introduce
from pipeline.publisher.outage import WatchedLog
from pipeline.publisher.views import Table
from pipeline.settings import PublisherSettings
from pipeline.threads import ReentrantCondition

if TYPE_CHECKING:
    from pipeline.publisher.spooling import PublisherSpool

_log = logging.getLogger(__name__)
_PARKED_INTERVAL_S = 1.0
_RETRY_S = 0.05
_COMPLAIN_S = 10.0
_HELD_INTERVAL_S = 10.0
"""How often to look whether batches are still held back: a clock may have been put right."""
_CLOSING_S = 1.0
"""How long to try to say that this producer sends nothing more."""
_RESCUE_AGAIN_S = 0.5
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
        views: Mapping[str, Any],
        parent: Running | None,
        table: Table,
    ) -> None:
        """`table` is where deltas wait. `parent`: what this forked child was made from."""
        # `with self.lock` can't be interrupted between taking it and the block; `with self.changed` can.
        self.lock = threading.RLock()
        self.changed = ReentrantCondition(self.lock)
        self._writer = writer
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self.account = Account(settings, metrics, self.lock, self.changed)
        secret = clock.new_id()
        introduce(writer, secret)
        outbox = Outbox(producer_id_of(secret), 0)
        self.spool: PublisherSpool | None = None
        """The spool of this process, if it has one."""
        if settings.spool_dir:
            # Only who has a spool pays for these. Not in a thread: a fork in the midst of an import would hang the child's.
            from pipeline.publisher.rescue import drain
            from pipeline.publisher.spooling import PublisherSpool

            self._drain = drain
            self.spool = PublisherSpool(settings, secret, table.ends, outbox, self.account, self.lock, metrics)
        watched = WatchedLog(writer, clock, self._what_waits)
        self.delivery = Delivery(
            outbox, watched, settings, metrics, self.account, self.lock, self.changed, clock, self.spool
        )
        if parent is not None and parent.spool is not None:
            parent.spool.abandon()
        self._table = table
        self.flusher = TableFlusher(table, views, self.delivery, settings, clock, metrics, self.account, self.spool)
        self.threads: dict[str, threading.Thread] = {}
        self.flushes: list[_Flush] = []
        self._started = self._stopping = self._halting = False  # for good; or the threads, perhaps for a while
        self._stop_rescue = threading.Event()
        self._rescued = threading.Event()
        """Set once everything that others have left was looked at, and sent if it could be."""
        self._told_count = 0
        """Rejected batches that a flush has raised for."""

    @property
    def in_own_thread(self) -> bool:
        """Whether the caller is one of the threads that do the work, in a finaliser or log handler that it ran by chance."""
        return threading.get_ident() in self.account.own_threads

    @property
    def is_held(self) -> bool:
        """Whether the caller has interrupted its own thread in a write to the spool."""
        return self.spool is not None and self.spool.is_held

    @property
    def used_bytes(self) -> int:
        """The memory of series and of batches that are not acknowledged."""
        return self.account.used_bytes + self._table.used_bytes

    @property
    def series_count(self) -> int:
        """The series in memory."""
        return self._table.series_count

    @property
    def pressed(self) -> bool:
        """Whether over half of the buffer is in use, and batches wait for their acknowledgement."""
        return self.used_bytes > self._settings.buffer_bytes_max // 2 and len(self.delivery.outbox) > 0

    def full(self, size: int, count: int) -> bool:
        """Have the flusher make room for `size` bytes; False if the `count` deltas that need them are to be dropped.

        Raises `BufferFull` as `on_full` says. Called by the table, without its locks.
        """
        self.start_threads()  # which makes room
        return self.account.make_room(size, count, lambda: self._table.used_bytes + size <= table_bytes(self._settings))

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
                "series": self.series_count,
                "buffer_bytes": self.used_bytes,
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
                    self._check_outcome(flush, timeout_s)
            finally:
                if flush in self.flushes:
                    self.flushes.remove(flush)
            return self.delivery.name()

    @contextmanager
    def locks_released(self) -> Iterator[None]:
        """Before waiting for other threads: in a signal handler or finaliser, this thread can hold what they need."""
        locks = [self.lock, *self._table.step_over()]
        counts = [_release(lock) for lock in locks]
        try:
            yield
        finally:
            for lock, count in zip(locks, counts, strict=True):
                for _ in range(count):
                    lock.acquire()

    def _check_outcome(self, flush: _Flush, timeout_s: float) -> None:
        if rejected := self.delivery.rejected_since(flush.rejected_count):
            self._told_count = max(self._told_count, self.delivery.rejected_count)
            raise Invalid(rejected)
        if not self._settled(flush):
            raise self.late("the publisher was closed" if self._stopping else f"not acknowledged within {timeout_s} s")

    def late(self, why: str) -> Unavailable:
        """What a flush raises that was not acknowledged in time. Takes no lock."""
        return Unavailable(
            f"{why}: {len(self.delivery.outbox)} batches and {self.series_count} buffered series wait{self.delivery.trouble}"
            + (f"; {held}" if (held := self.delivery.held_words) else "")
        )

    def _what_waits(self) -> str:
        """What waits for the log, in words; empty if nothing does."""
        batches = len(self.delivery.outbox)
        if not batches and not self.waiting_count():
            return ""
        return f"{batches} batches and {self.series_count} buffered series wait ({self.used_bytes:,} bytes)"

    def _settled(self, flush: _Flush) -> bool:
        return flush.barrier is not None and self.delivery.outbox.settled(flush.barrier)

    def say_closed(self, timeout_s: float) -> None:
        """Tell the tasks that this producer sends nothing more, so that they need not remember it for long.

        Only if all that it has recorded is acknowledged, and the spool has nothing left that would be sent again: that must
        be known again then. One attempt: if it fails, they forget the producer later.
        """
        spool, timeout_s = self.spool, min(timeout_s, _CLOSING_S)
        if spool is not None:
            with self.lock:
                self.changed.wait_for(lambda: not spool.batch_count, timeout_s)  # the sender is having it forget the last
        if self.waiting_count() or (spool is not None and not spool.is_empty):
            return
        self.delivery.say_closed(timeout_s)

    def wait_for_rescue(self, timeout_s: float) -> None:
        """Wait until what others have left was sent, if this process looks for it: it may be the last one to do so."""
        if self.spool is not None and self._started:
            self._rescued.wait(timeout_s)

    def stop(self) -> int:
        """End the threads, and let go of the spool: how many deltas and batches are lost, about."""
        with self.lock:
            self._stopping = True
        self._halt(5.0)
        if self.spool is not None and not self.spool.close():
            _log.warning("what was not acknowledged is left in %s", self._settings.spool_dir)
        if self._settings.durability != "memory":
            return 0
        return self.delivery.unkept_count() + self.waiting_count()

    def rests(self) -> bool:
        """Return whether no thread runs, nor had the lock of this when this process was forked."""
        if self._started or self.threads or not self.lock.acquire(blocking=False):
            return False
        self.lock.release()
        return True

    def rest(self) -> bool:
        """End the threads until they are started again; return whether they have ended, and nobody waits for them."""
        alive = self._halt(self._settings.request_timeout_ms / 1000)
        with self.lock:
            self._halting = False
            self._stop_rescue.clear()
            self.threads, self._started = alive, False
            rests = not alive and not self.flushes
        if not rests:  # one that is alive may not have seen that it should end
            self.start_threads()
        return rests

    def _halt(self, timeout_s: float) -> dict[str, threading.Thread]:
        """Have the threads end, each at most so late; return those that have not."""
        with self.lock:
            self._halting = True
            self._stop_rescue.set()
            self.changed.notify_all()
            threads = [*self.threads.items()]
        for _, thread in threads:
            thread.join(timeout_s)
        return {name: thread for name, thread in threads if thread.is_alive()}

    def waiting_count(self) -> int:
        """Deltas that are in no batch yet."""
        return self._table.waiting_count

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
            _thread.start_new_thread(self._start_both, ())  # looked up now: gevent may have replaced it since the import
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
                if self.spool is not None:
                    self._start_thread("rescuer", self._rescue_until_stopped)
        except Exception:
            _log.exception("the publisher's threads can't be started; what is recorded waits")
            self._started = False  # whoever registers a series or flushes next tries again

    def _start_thread(self, name: str, run: Callable[[], None]) -> None:
        if name in self.threads or self._halting:
            return

        def run_owned() -> None:
            me = threading.get_ident()
            self.account.own_threads.add(me)
            try:
                run()
            finally:
                self.account.own_threads.discard(me)  # another thread may get the number

        thread = threading.Thread(target=run_owned, name=f"pipeline-{name}", daemon=True)
        thread.start()
        self.threads[name] = thread

    # The flusher

    def _flush_until_stopped(self) -> None:
        snapshot_s = self._settings.snapshot_interval_ms / 1000
        looked_s = pause_s = complained_s = 0.0
        flushed_s = self._clock.monotonic_s()  # as if it had just flushed: what comes first lingers too
        while True:
            linger_s = self.delivery.linger.interval_s
            with self.lock:
                # Whoever is starved must not keep this thread, and the interpreter lock, busy.
                interval_s = min(linger_s, snapshot_s)
                self.changed.wait_for(self._flush_asked, min(pause_s, interval_s))
                self.changed.wait_for(self._seal_asked, max(0.0, interval_s - pause_s))
                if self._halting:
                    return
                flushes = [flush for flush in self.flushes if flush.barrier is None]
                asked = self._seal_asked()
            started_s = self._clock.monotonic_s()
            look = bool(flushes) or started_s - looked_s >= _PARKED_INTERVAL_S
            looked_s = started_s if look else looked_s
            seal = asked or started_s - flushed_s >= linger_s
            flushed_s = started_s if seal else flushed_s
            try:
                due = seal or self.flusher.snapshot_due(started_s)
                everything = due and self.flusher.drain(started_s, parked=look, seal=seal)
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
                    self.changed.wait_for(lambda: self._halting, min(interval_s, _RETRY_S))

    def _seal_asked(self) -> bool:
        return self.account.starved or self.account.due or self._flush_asked()

    def _flush_asked(self) -> bool:
        return self._halting or any(flush.barrier is None for flush in self.flushes)

    # The sender

    def _send_until_stopped(self) -> None:
        backoff_s = 0.0
        while True:
            with self.lock:
                if backoff_s:
                    self.changed.wait_for(lambda: self._halting, backoff_s)
                self.changed.wait_for(lambda: self._halting or len(self.delivery.outbox) > 0)
                if self._halting:
                    return
                batches = self.delivery.next_batches()
                if not batches:  # none is kept yet, and whoever keeps them says so; or all are held back
                    self.changed.wait(_HELD_INTERVAL_S)
            self.delivery.tell_held()
            if not batches:
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
        folder, writer, drain = Path(self._settings.spool_dir), self._writer, self._drain
        while not self._stop_rescue.is_set():
            again = False
            try:
                for slot in drain(folder, writer, self._clock, self._settings, timeout_s=_RESCUE_S, stop=self._stop_rescue):
                    again |= slot.again
                    self._metrics.inc(m.PUBLISHER_RESCUED, slot.batch_count)
                    if slot.batch_count or slot.error or slot.report.corrupt:
                        _log.info("slot %s of the spool: %s", slot.slot, slot)
            except Exception:
                _log.exception("looking for what other processes have left failed; trying again")
            if not again:
                self._rescued.set()
            self._stop_rescue.wait(_RESCUE_AGAIN_S if again else _RESCUE_S)


def _release(lock: threading.RLock) -> int:
    """Release `lock` as often as this thread holds it; how often that was."""
    count = 0
    while True:
        try:
            lock.release()
        except RuntimeError:  # not held, or no more
            return count
        count += 1
