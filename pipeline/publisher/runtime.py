"""Everything of a publisher that belongs to one process: outbox, spool, and the threads that drain its table and send.

There are two threads: the flusher drains and seals, the sender sends batches until they are acknowledged. With a spool
folder there is a third, the rescuer, which sends what processes that are gone have left in the folder. While the log, or a
partition of it, is away, few batches are sealed for it: deltas pile up as merged series, not as batches.

A forked child makes all of it anew, because what the parent has is the parent's to send.
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
from pipeline.ports import Clock, LogWriter, ProvesProducers
from pipeline.publisher.flusher import TableFlusher, table_bytes
from pipeline.publisher.memory import MemoryAccount
from pipeline.publisher.sender import Sender
from pipeline.publisher.views import Table
from pipeline.settings import PublisherSettings

if TYPE_CHECKING:
    from pipeline.publisher.spool.publisher import PublisherSpool

_log = logging.getLogger(__name__)
_SNAPSHOT_FLUSH_S = 1.0
"""The longest time between drains that take a snapshot although no flush waits for one."""
_RETRY_S = 0.05
_WARN_S = 10.0
_HELD_INTERVAL_S = 10.0
"""Seconds between two tries to send batches that are held back: a clock may have been put right."""
_CLOSING_S = 1.0
"""Longest time, in seconds, to try to send the closing batch of this producer."""
_RESCUE_AGAIN_S = 0.5
_RESCUE_S = 10.0
"""Seconds between two looks for spools that other processes have left, and longest time to try to send one."""


class _Flush:
    """One caller that waits. `barrier` says, once everything was sealed, which sequences must be settled."""

    def __init__(self, rejected_count: int) -> None:
        self.rejected_count = rejected_count
        """Rejected batches that a flush had raised for when this one began."""
        self.barrier: Mapping[int, int] | None = None


class Runtime:
    """The threads of a publisher and what they work on, in one process. Safe from any thread."""

    def __init__(
        self,
        writer: LogWriter,
        clock: Clock,
        settings: PublisherSettings,
        metrics: Metrics,
        views: Mapping[str, Any],
        parent: Runtime | None,
        table: Table,
    ) -> None:
        """`table` is where deltas wait. `parent` is the runtime that this forked child has from its parent process."""
        self.account = MemoryAccount(settings, metrics)
        self.lock, self.changed = self.account.lock, self.account.changed
        self._writer = writer
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self._table = table
        secret = clock.new_id()
        if isinstance(writer, ProvesProducers):
            writer.introduce(secret)
        outbox = Outbox(producer_id_of(secret), 0)
        self.spool: PublisherSpool | None = None
        """The spool of this process, if it has one."""
        if settings.spool_dir:
            # Only who has a spool pays for these. Not in a thread: a fork in the midst of an import would hang the child's.
            from pipeline.publisher.rescue import drain
            from pipeline.publisher.spool.publisher import PublisherSpool

            self._drain = drain
            self.spool = PublisherSpool(settings, secret, table.ends, outbox, self.account, metrics)
        self.sender = Sender(outbox, writer, settings, metrics, self.account, clock, self._what_waits, self.spool)
        if parent is not None and parent.spool is not None:
            parent.spool.abandon()
        self.flusher = TableFlusher(table, views, self.sender, settings, clock, metrics, self.account, self.spool)
        self.threads: dict[str, threading.Thread] = {}
        self.flushes: list[_Flush] = []
        self._started = False
        self._stopping = False
        """True once the publisher is closed."""
        self._halting = False
        """True while the threads are to end, perhaps only for now."""
        self._stop_rescue = threading.Event()
        self._rescued = threading.Event()
        """Set once everything that others have left was looked at, and sent if it could be."""
        self._raised_count = 0
        """Rejected batches that a flush has raised for."""

    @property
    def in_own_thread(self) -> bool:
        """True if the caller is one of the publisher's threads, in a finaliser or log handler that happened to run there."""
        return threading.get_ident() in self.account.own_threads

    @property
    def is_held(self) -> bool:
        """True if the caller has interrupted its own thread in a write to the spool."""
        return self.spool is not None and self.spool.is_held

    @property
    def used_bytes(self) -> int:
        """The memory of series and of batches that are not acknowledged."""
        return self.account.used_bytes + self._table.used_bytes

    @property
    def is_short_of_memory(self) -> bool:
        """True if over half of the buffer is in use, and batches wait for their acknowledgement."""
        return self.used_bytes > self._settings.buffer_bytes_max // 2 and len(self.sender.outbox) > 0

    def full(self, size: int, count: int) -> bool:
        """Have the flusher make room for `size` bytes; return False if the `count` deltas that need them are to be dropped.

        Raises `BufferFull` as `on_full` says. Called by the table, without its locks.
        """
        self.start_threads()  # which makes room
        return self.account.make_room(size, count, lambda: self._table.used_bytes + size <= table_bytes(self._settings))

    def stats(self) -> dict[str, int]:
        """Return what `BasePublisher.stats` does."""
        with self.lock:
            sender = self.sender
            return {
                "deltas": self.flusher.delta_count,
                "batches": sender.batch_count,
                "entries": sender.entry_count,
                "rejected": sender.rejected_count,
                "waiting": len(sender.outbox),
                "series": self._table.series_count,
                "buffer_bytes": self.used_bytes,
            }

    # Waiting for the threads

    def flush(self, timeout_s: float) -> Token:
        """Do what `BasePublisher.flush` says."""
        flush = _Flush(self._raised_count)
        with self.locks_released():
            self.start_threads()
            try:
                with self.lock:
                    self.flushes.append(flush)
                    self.changed.notify_all()
                    self.changed.wait_for(lambda: self._stopping or self._is_settled(flush), timeout_s)
                    self._check_outcome(flush, timeout_s)
            finally:
                if flush in self.flushes:
                    self.flushes.remove(flush)
            return self.sender.make_token()

    @contextmanager
    def locks_released(self) -> Iterator[None]:
        """Release, within the block, the locks that other threads need: a signal handler's own thread can hold them."""
        locks = [self.lock, *self._table.step_over()]
        counts = [_release(lock) for lock in locks]
        try:
            yield
        finally:
            for lock, count in zip(locks, counts, strict=True):
                for _ in range(count):
                    lock.acquire()

    def _is_settled(self, flush: _Flush) -> bool:
        return flush.barrier is not None and self.sender.outbox.settled(flush.barrier)

    def _check_outcome(self, flush: _Flush, timeout_s: float) -> None:
        if rejected := self.sender.rejected_since(flush.rejected_count):
            self._raised_count = max(self._raised_count, self.sender.rejected_count)
            raise Invalid(rejected)
        if not self._is_settled(flush):
            raise self.late("the publisher was closed" if self._stopping else f"not acknowledged within {timeout_s} s")

    def late(self, why: str) -> Unavailable:
        """Return the error of a flush that was not acknowledged in time. Takes no lock."""
        held = self.sender.held_words
        return Unavailable(f"{why}: {self._waiting_words()} wait{self.sender.trouble}" + (f"; {held}" if held else ""))

    def _waiting_words(self) -> str:
        return f"{len(self.sender.outbox)} batches and {self._table.series_count} buffered series"

    def _what_waits(self) -> str:
        if not len(self.sender.outbox) and not self._table.waiting_count:
            return ""
        return f"{self._waiting_words()} wait ({self.used_bytes:,} bytes)"

    def say_closed(self, timeout_s: float) -> None:
        """Tell the tasks that this producer sends nothing more, so that they need not remember it for long.

        Does nothing unless all that it has recorded is acknowledged, and the spool has nothing left that would be sent
        again: tasks must know the producer then. If the one attempt fails, they forget it later.
        """
        spool, timeout_s = self.spool, min(timeout_s, _CLOSING_S)
        if spool is not None:
            with self.lock:
                self.changed.wait_for(lambda: not spool.batch_count, timeout_s)  # the sender is having it forget the last
        if not self._table.waiting_count and (spool is None or spool.is_empty):
            self.sender.say_closed(timeout_s)

    def wait_for_rescue(self, timeout_s: float) -> None:
        """Wait until what others have left was sent, if this process looks for it: it may be the last one to do so."""
        if self.spool is not None and self._started:
            self._rescued.wait(timeout_s)

    def stop(self) -> int:
        """End the threads, and close the spool; return how many deltas and batches are lost, about."""
        with self.lock:
            self._stopping = True
        self._halt(5.0)
        self.flusher.show_closed()
        if self.spool is not None and not self.spool.close():
            _log.warning("what was not acknowledged is left in %s", self._settings.spool_dir)
        if self._settings.durability != "memory":
            return 0
        return self.sender.unkept_count() + self._table.waiting_count

    def rests(self) -> bool:
        """Return whether no thread ran when this process was forked, nor held the lock."""
        if self._started or self.threads or not self.lock.acquire(blocking=False):
            return False
        self.lock.release()
        return True

    def rest(self) -> bool:
        """End the threads until they are started again; return whether they have ended, and no flush waits for them."""
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
        """Have the threads end, and wait so long for each; return those that have not ended."""
        with self.lock:
            self._halting = True
            self._stop_rescue.set()
            self.changed.notify_all()
            threads = [*self.threads.items()]
        for _, thread in threads:
            thread.join(timeout_s)
        return {name: thread for name, thread in threads if thread.is_alive()}

    # The threads

    def start_threads(self) -> None:
        """See to it that the threads run soon.

        `Thread.start` waits for the thread, with a lock of its own; a signal handler that came in there could not wait for
        it too. So a helper does it, in a thread that one call starts.
        """
        if self._started:
            return
        try:
            self._started = True  # before the helper, which takes it back if it fails
            _thread.start_new_thread(self._start_all, ())  # looked up now: gevent may have replaced it since the import
        except BaseException as error:
            self._started = False  # two helpers do no harm
            if isinstance(error, RuntimeError):
                raise Unavailable(f"no thread can be started: {error}") from error
            raise

    def _start_all(self) -> None:
        try:
            with self.lock:
                self._start_thread("flusher", self._flush_until_stopped)
                self._start_thread("sender", self._send_until_stopped)
                if self.spool is not None:
                    self._start_thread("rescuer", self._rescue_until_stopped)
        except Exception:
            _log.exception("the publisher's threads can't be started; what is recorded waits")
            self._started = False  # the next new series or flush tries again

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

    def _flush_until_stopped(self) -> None:
        snapshot_s = self._settings.snapshot_interval_ms / 1000
        snapshot_taken_s = pause_s = warned_s = 0.0
        flushed_s = self._clock.monotonic_s()  # as if it had just flushed: the first deltas are merged for a while, too
        while True:
            flush_s = self.sender.flush_interval.current_s
            interval_s = min(flush_s, snapshot_s)
            with self.lock:
                # A thread that finds no room must not keep this thread, and the interpreter lock, busy.
                self.changed.wait_for(self._flush_asked, min(pause_s, interval_s))
                self.changed.wait_for(self._seal_asked, max(0.0, interval_s - pause_s))
                if self._halting:
                    return
                flushes = [flush for flush in self.flushes if flush.barrier is None]
                asked = self._seal_asked()
            started_s = self._clock.monotonic_s()
            take_snapshot = bool(flushes) or started_s - snapshot_taken_s >= _SNAPSHOT_FLUSH_S
            snapshot_taken_s = started_s if take_snapshot else snapshot_taken_s
            seal = asked or started_s - flushed_s >= flush_s
            flushed_s = started_s if seal else flushed_s
            try:
                due = seal or self.flusher.snapshot_due(started_s)
                everything = due and self.flusher.drain(started_s, take_snapshot=take_snapshot, seal=seal)
                if seal:
                    self._metrics.observe(m.PUBLISHER_FLUSH, self._clock.monotonic_s() - started_s)
                    self._metrics.set(m.PUBLISHER_LINGER, flush_s)
            except Exception:  # a flusher that dies would keep everybody's deltas for ever
                everything = False
                if not warned_s or started_s - warned_s >= _WARN_S:
                    warned_s = started_s
                    _log.exception("a flush failed; its deltas are kept and tried again")
            pause_s = max(0.001, self._clock.monotonic_s() - started_s)
            if everything and flushes:
                with self.lock:
                    for flush in flushes:
                        flush.barrier = self.sender.outbox.next_sequences()
                    self.changed.notify_all()
            elif flushes:
                with self.lock:
                    self.changed.wait_for(lambda: self._halting, min(interval_s, _RETRY_S))

    def _seal_asked(self) -> bool:
        return self.account.exhausted or self.account.batch_due or self._flush_asked()

    def _flush_asked(self) -> bool:
        return self._halting or any(flush.barrier is None for flush in self.flushes)

    def _send_until_stopped(self) -> None:
        backoff_s = 0.0
        while True:
            with self.lock:
                if backoff_s:
                    self.changed.wait_for(lambda: self._halting, backoff_s)
                self.changed.wait_for(lambda: self._halting or len(self.sender.outbox) > 0)
                if self._halting:
                    return
                batches = self.sender.next_batches()
                if not batches:  # the spool has none of them yet, and notifies when it has; or all are held back
                    self.changed.wait(_HELD_INTERVAL_S)
            self.sender.warn_of_held()
            if not batches:
                continue
            try:
                progressed = self.sender.send(batches)
            except Exception:  # as above; the batches are still in the outbox
                _log.exception("sending failed; trying again")
                progressed = False
            first, most = self._settings.retry_backoff_ms / 1000, self._settings.retry_backoff_max_ms / 1000
            backoff_s = 0.0 if progressed else min(max(first, 2 * backoff_s), most)

    def _rescue_until_stopped(self) -> None:
        """Send what processes that are gone have left in the spool folder, again and again."""
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
    """Release `lock` as often as this thread holds it; return how often that was."""
    count = 0
    while True:
        try:
            lock.release()
        except RuntimeError:  # not held, or no more
            return count
        count += 1
