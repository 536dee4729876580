"""The memory account of a publisher: everything that can grow is charged here first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from math import ceil
from typing import TypeVar

import pipeline.metrics as m
from pipeline.errors import BufferFull, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import MESSAGE_BYTES_MAX
from pipeline.settings import PublisherSettings

T = TypeVar("T")
_WAIT = ("block", "merge_harder", "spill")
"""What `on_full` can be so that a caller waits for bytes."""
_PAUSES = 4
_LOOK_S = 0.02
"""How often a thread that waits for room on the disk tries again."""
_NEVER = threading.Lock()
"""Taken for ever, so that to wait for it is to sleep."""
_NEVER.acquire()


class Account:
    """Bytes in use out of `buffer_bytes_max`. Safe from any thread.

    `changed`, a condition on `lock`, is notified whenever bytes come back, and when the flusher should come early:
    because somebody ran out of bytes (`starved`), or because new deltas fill a batch (`due`).
    """

    def __init__(
        self, settings: PublisherSettings, metrics: Metrics, lock: threading.RLock, changed: threading.Condition
    ) -> None:
        self.used_bytes = 0
        self.starved = False
        self.fresh_bytes = 0
        """Bytes that series registered since the last drain, and long texts, will take in batches, about."""
        self.hurried = False
        """Whether a thread found a buffer full, so that the flusher should come early."""
        self.merge_harder: Callable[[], object] = lambda: None
        """What merges all that waits, and gives back the bytes that it does not need then."""
        self.own_threads: set[int] = set()
        """Threads that must not wait for bytes, because nobody else would bring them back."""
        self.bytes_max = settings.buffer_bytes_max
        self.message_bytes_max = MESSAGE_BYTES_MAX
        """The largest batch that the log takes, once it is known."""
        self._batch_max = settings.batch_bytes_max
        self._on_full = settings.on_full
        self._timeout_s = settings.block_timeout_ms / 1000
        self._metrics = metrics
        self._lock = lock
        self._changed = changed

    @property
    def pressed(self) -> bool:
        """Whether over half of the account is used, so that what is not needed should go."""
        return self.used_bytes > self.bytes_max // 2

    @property
    def due(self) -> bool:
        """Whether what was charged since the last drain fills a batch."""
        return self.fresh_bytes >= self._batch_max

    def charge(self, size: int, fresh: int = 0, count: int = 1) -> bool:
        """Take `size` bytes; False if the `count` deltas that need them are to be dropped, `BufferFull` if refused."""
        if self.try_take(size, fresh):
            return True
        if self._drops(count):
            return False
        waits = self._on_full in _WAIT and size <= self.bytes_max and threading.get_ident() not in self.own_threads
        if waits and self._on_full == "merge_harder":
            self._metrics.inc(m.PUBLISHER_MERGED_HARDER)
            self.merge_harder()
            if self.try_take(size, fresh):
                return True
        if waits:
            self._metrics.inc(m.PUBLISHER_BLOCKED)
            with self._lock:
                if self._changed.wait_for(lambda: self.used_bytes + size <= self.bytes_max, self._timeout_s):
                    self._take(size, fresh)
                    return True
        self._metrics.inc(m.PUBLISHER_REFUSED)
        raise BufferFull(
            f"{size} bytes needed, {self.used_bytes} of {self.bytes_max} (buffer_bytes_max) in use; on_full={self._on_full}"
        )

    def insist(self, attempt: Callable[[], T], count: int = 1) -> T | None:
        """What `attempt` returns, which fails while there is no room on the disk, or no disk: then as `on_full` says.

        None if the `count` deltas that it is for are to be dropped.
        """
        try:
            return attempt()
        except BufferFull as error:
            full = error
        except Unavailable as error:
            full = BufferFull(str(error))
        if self._drops(count):
            return None
        if self._on_full in _WAIT and threading.get_ident() not in self.own_threads:
            self._metrics.inc(m.PUBLISHER_BLOCKED)
            # Without `_lock`: the attempt takes the spool's, whose holder can come to the account in a finaliser.
            for _ in range(max(1, ceil(self._timeout_s / _LOOK_S))):
                _NEVER.acquire(timeout=min(_LOOK_S, self._timeout_s))
                with suppress(BufferFull, Unavailable):
                    return attempt()
        self._metrics.inc(m.PUBLISHER_REFUSED)
        raise full

    def _drops(self, count: int) -> bool:
        """There is no room: have the flusher come. Whether the `count` deltas that need it are dropped, and counted."""
        with self._lock:
            self.starved = True
            self._changed.notify_all()
        if self._on_full != "drop_newest":
            return False
        self._metrics.inc(m.PUBLISHER_DROPPED, count, "buffer_full")
        return True

    def freed(self) -> None:
        """There may be room on the disk again."""
        with self._lock:
            self._changed.notify_all()

    def try_take(self, size: int, fresh: int = 0) -> bool:
        """Take `size` bytes if they are there."""
        with self._lock:
            fits = self.used_bytes + size <= self.bytes_max
            if fits:
                self._take(size, fresh)
            return fits

    def pause(self, until: Callable[[], object], timeout_s: float) -> bool:
        """Let the flusher run until something is true, but no longer than so; whether it is true then. Takes no lock.

        (A signal handler that raises within the wait of a condition leaves its lock in a state that nobody can tell.)
        """
        for _ in range(_PAUSES if threading.get_ident() not in self.own_threads else 0):
            if until():
                return True
            _NEVER.acquire(timeout=timeout_s / _PAUSES)
        return bool(until())

    def wake(self) -> None:
        """Have the flusher come early, because a buffer is full."""
        if not self.hurried:
            with self._lock:
                self.hurried = True
                self._changed.notify_all()

    def _take(self, size: int, fresh: int) -> None:
        self.used_bytes += size
        self.fresh_bytes += fresh
        if self.due:
            self._changed.notify_all()

    def freshen(self, fresh: int) -> None:
        """Count what was charged before as fresh."""
        if fresh > 0:
            with self._lock:
                self._take(0, fresh)

    def try_charge(self, size: int) -> bool:
        """Take `size` bytes for what is merely quicker, if the account is not pressed by it."""
        with self._lock:
            if self.used_bytes + size > self.bytes_max // 2:
                return False
            self.used_bytes += size
            return True

    def force(self, size: int) -> None:
        """Take `size` bytes, even if they are not there: for what was charged before, in another form."""
        with self._lock:
            self.used_bytes += size

    def refund(self, size: int) -> None:
        """Give bytes back."""
        if size:
            with self._lock:
                self.used_bytes -= size
                self._changed.notify_all()

    def drained(self) -> None:
        """Start to count what is fresh, and to listen to who is starved, anew."""
        with self._lock:
            self.starved = self.hurried = False
            self.fresh_bytes = 0
