"""The memory account of a publisher: everything that can grow is charged here first."""

from __future__ import annotations

import threading

import pipeline.metrics as m
from pipeline.errors import BufferFull
from pipeline.metrics import Metrics
from pipeline.settings import PublisherSettings


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
        self.own_threads: set[int] = set()
        """Threads that must not wait for bytes, because nobody else would bring them back."""
        self._max = settings.buffer_bytes_max
        self._batch_max = settings.batch_bytes_max
        self._on_full = settings.on_full
        self._timeout_s = settings.block_timeout_ms / 1000
        self._metrics = metrics
        self._lock = lock
        self._changed = changed

    @property
    def pressed(self) -> bool:
        """Whether over half of the account is used, so that what is not needed should go."""
        return self.used_bytes > self._max // 2

    @property
    def due(self) -> bool:
        """Whether what was charged since the last drain fills a batch."""
        return self.fresh_bytes >= self._batch_max

    def charge(self, size: int, fresh: int = 0) -> bool:
        """Take `size` bytes; False if the delta that needs them is to be dropped, `BufferFull` if it is refused."""
        with self._lock:
            fits = self.used_bytes + size <= self._max
            if fits:
                self._take(size, fresh)
                return True
            self.starved = True
            self._changed.notify_all()
        if self._on_full == "drop_newest":
            self._metrics.inc(m.PUBLISHER_DROPPED, 1, "buffer_full")
            return False
        if self._on_full == "block" and size <= self._max and threading.get_ident() not in self.own_threads:
            self._metrics.inc(m.PUBLISHER_BLOCKED)
            with self._lock:
                if self._changed.wait_for(lambda: self.used_bytes + size <= self._max, self._timeout_s):
                    self._take(size, fresh)
                    return True
        raise BufferFull(
            f"{size} bytes needed, {self.used_bytes} of {self._max} (buffer_bytes_max) in use; on_full={self._on_full}"
        )

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
            if self.used_bytes + size > self._max // 2:
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
            self.starved = False
            self.fresh_bytes = 0
