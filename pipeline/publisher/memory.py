"""The memory account of a publisher: the bytes of its batches, and the threads that wait for memory or for room on disk."""

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
from pipeline.threads import ReentrantCondition

T = TypeVar("T")
_SERIES_BYTES = 48
"""The bytes that a new series adds to a batch, about."""
_RETRY_S = 0.02
"""The pause between attempts of a thread that waits for room on disk."""
_ASK_AGAIN_S = 0.1
"""The time after which a thread that waits for memory calls the flusher again."""
_NEVER = threading.Lock()
"""A lock that is never released: to wait for it is to sleep."""
_NEVER.acquire()


class MemoryAccount:
    """Bytes in use by batches, out of `buffer_bytes_max`. Safe from any thread.

    `changed`, a condition on `lock`, is notified whenever bytes come back, and when the flusher should come early: because
    a thread found no room (`exhausted`), or because new series fill a batch (`batch_due`).
    """

    def __init__(self, settings: PublisherSettings, metrics: Metrics) -> None:
        # `with self.lock` can't be interrupted between taking it and the block; `with self.changed` can.
        self.lock = threading.RLock()
        self.changed = ReentrantCondition(self.lock)
        self.used_bytes = 0
        self.exhausted = False
        """True if a thread has found no room since the last drain."""
        self.own_threads: set[int] = set()
        """The publisher's own threads. They must not wait for bytes, because they are the ones that bring them back."""
        self.bytes_max = settings.buffer_bytes_max
        self.message_bytes_max = MESSAGE_BYTES_MAX
        """The largest batch that the log takes, once it is known."""
        self._new_bytes = 0
        """The bytes in batches, about, of the series that came in since the last drain."""
        self._batch_max = settings.batch_bytes_max
        self._on_full = settings.on_full
        self._timeout_s = settings.block_timeout_ms / 1000
        self._metrics = metrics

    @property
    def is_short(self) -> bool:
        """True if batches use over half of their share, which is half of `buffer_bytes_max`."""
        return self.used_bytes > self.bytes_max // 4

    @property
    def batch_due(self) -> bool:
        """True if the series that came in since the last drain fill a batch."""
        return self._new_bytes >= self._batch_max

    def add_series(self) -> None:
        """Count the bytes that a new series will take in a batch, and call the flusher once they fill one."""
        self._new_bytes += _SERIES_BYTES
        if self.batch_due:
            self.freed()

    def make_room(self, size: int, count: int, is_there: Callable[[], bool]) -> bool:
        """Have the flusher make room, and wait as `on_full` says; return False if `count` deltas are to be dropped."""
        if self._drops(count):
            return False
        if size <= self.bytes_max // 2 and self._may_wait():
            with self.lock:
                for _ in range(max(1, ceil(self._timeout_s / _ASK_AGAIN_S))):
                    if self.changed.wait_for(is_there, min(_ASK_AGAIN_S, self._timeout_s)):
                        return True
                    self._call_flusher()  # again: other threads can have taken the room that was made
        self._metrics.inc(m.PUBLISHER_REFUSED)
        raise BufferFull(f"{size} bytes needed, {self.bytes_max} (buffer_bytes_max) are in use; on_full={self._on_full}")

    def wait_for_disk(self, attempt: Callable[[], T]) -> T | None:
        """Return the result of `attempt`, which fails while the disk is full or away; wait as `on_full` says.

        Return None if the delta that it is for is to be dropped.
        """
        try:
            return attempt()
        except BufferFull as error:
            full = error
        except Unavailable as error:
            full = BufferFull(str(error))
        if self._drops(1):
            return None
        if self._may_wait():
            # Without the lock: the attempt takes the spool's, whose holder can come to the account in a finaliser.
            for _ in range(max(1, ceil(self._timeout_s / _RETRY_S))):
                _NEVER.acquire(timeout=min(_RETRY_S, self._timeout_s))
                with suppress(BufferFull, Unavailable):
                    return attempt()
        self._metrics.inc(m.PUBLISHER_REFUSED)
        raise full

    def _drops(self, count: int) -> bool:
        """Call the flusher, which makes room; return whether `count` deltas are dropped instead of waiting for it."""
        self._call_flusher()
        if self._on_full != "drop_newest":
            return False
        self._metrics.inc(m.PUBLISHER_DROPPED, count, "buffer_full")
        return True

    def _call_flusher(self) -> None:
        """Have the flusher make room, unless it was called since the last drain: to wake it wakes all that wait."""
        with self.lock:
            if not self.exhausted:
                self.exhausted = True
                self.changed.notify_all()

    def _may_wait(self) -> bool:
        waits = self._on_full == "block" and threading.get_ident() not in self.own_threads
        if waits:
            self._metrics.inc(m.PUBLISHER_BLOCKED)
        return waits

    def freed(self) -> None:
        """Have all that wait look again."""
        with self.lock:
            self.changed.notify_all()

    def force(self, size: int) -> None:
        """Take `size` bytes, even if they are not there: the table was charged for them before."""
        with self.lock:
            self.used_bytes += size

    def refund(self, size: int) -> None:
        """Give bytes back."""
        if size:
            with self.lock:
                self.used_bytes -= size
                self.changed.notify_all()

    def drained(self) -> None:
        """Begin anew to count the bytes of new series, and to notice who finds no room."""
        with self.lock:
            self.exhausted = False
            self._new_bytes = 0
