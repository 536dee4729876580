"""The memory account of a publisher: what its batches take, and who waits for memory or for room on the disk."""

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
_SERIES_BYTES = 48
"""The bytes that a new series adds to a batch, about."""
_ROOM_INTERVAL_S = 0.02
"""How often a thread that waits for room on the disk tries again."""
_NEVER = threading.Lock()
"""Taken for ever, so that to wait for it is to sleep."""
_NEVER.acquire()


class Account:
    """Bytes in use by batches, out of `buffer_bytes_max`. Safe from any thread.

    `changed`, a condition on `lock`, is notified whenever bytes come back, and when the flusher should come early:
    because somebody ran out of bytes (`starved`), or because new deltas fill a batch (`due`).
    """

    def __init__(
        self, settings: PublisherSettings, metrics: Metrics, lock: threading.RLock, changed: threading.Condition
    ) -> None:
        self.used_bytes = 0
        self.starved = False
        self.fresh_bytes = 0
        """The bytes in batches, about, of the series that came in since the last drain."""
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
        """True if batches use over half of their share, which is half of `buffer_bytes_max`."""
        return self.used_bytes > self.bytes_max // 4

    @property
    def due(self) -> bool:
        """Whether what was charged since the last drain fills a batch."""
        return self.fresh_bytes >= self._batch_max

    def entered(self) -> None:
        """Count what a new series will take in a batch, about, and call the flusher once that fills one."""
        self.fresh_bytes += _SERIES_BYTES
        if self.due:
            with self._lock:
                self._changed.notify_all()

    def make_room(self, size: int, count: int, is_there: Callable[[], bool]) -> bool:
        """Have the flusher make room, and wait as `on_full` says; return False if `count` deltas are to be dropped."""
        if self._drops(count):
            return False
        if self._on_full == "block" and size <= self.bytes_max // 2 and threading.get_ident() not in self.own_threads:
            self._metrics.inc(m.PUBLISHER_BLOCKED)
            with self._lock:
                if self._changed.wait_for(is_there, self._timeout_s):
                    return True
        self._metrics.inc(m.PUBLISHER_REFUSED)
        raise BufferFull(f"{size} bytes needed, {self.bytes_max} (buffer_bytes_max) are in use; on_full={self._on_full}")

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
        if self._on_full == "block" and threading.get_ident() not in self.own_threads:
            self._metrics.inc(m.PUBLISHER_BLOCKED)
            # Without `_lock`: the attempt takes the spool's, whose holder can come to the account in a finaliser.
            for _ in range(max(1, ceil(self._timeout_s / _ROOM_INTERVAL_S))):
                _NEVER.acquire(timeout=min(_ROOM_INTERVAL_S, self._timeout_s))
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

    def force(self, size: int) -> None:
        """Take `size` bytes, even if they are not there: for what the table was charged for before."""
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
            self.starved = False
            self.fresh_bytes = 0
