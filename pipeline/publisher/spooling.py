"""The spool of a publisher's process: where its table records, and which of its batches are safe."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import pipeline.metrics as m
from pipeline.core.record import producer_id_of
from pipeline.core.sequence import Outbox, Sealed
from pipeline.errors import BufferFull, Unavailable
from pipeline.metrics import Metrics
from pipeline.publisher.account import Account
from pipeline.publisher.batching import Pending
from pipeline.publisher.spool.apart import apart
from pipeline.publisher.spool.live import Spool
from pipeline.publisher.spool.ring import Segment
from pipeline.publisher.spool.slot import slot_name
from pipeline.settings import PublisherSettings

T = TypeVar("T")
Ends = Callable[[], Mapping[int, tuple[int, int]]]
_log = logging.getLogger(__name__)
_CHECKPOINT_BYTES = 4 * 2**20
_CHECKPOINT_SHARE = 4
"""While nothing can be sealed, what was recorded is committed as merged series whenever it takes so many bytes, or one in so
many of the spool's, so that the rest is free for others."""


class PublisherSpool:
    """The spool of this process, made when it is first needed, and the batches of an outbox that it has.

    Safe from any thread. `lock` is that of the delivery: it guards the outbox, and what is said of its batches here.
    """

    def __init__(
        self,
        settings: PublisherSettings,
        secret: str,
        ends: Ends,
        outbox: Outbox,
        account: Account,
        lock: threading.RLock,
        metrics: Metrics,
    ) -> None:
        """`secret` is that of the producer; see `pipeline.publisher.identity`. `ends`: where the table's rings end now."""
        self.durable = settings.durability != "memory"
        """True if a batch may be sent only once it is kept; else batches are kept so that they need no memory."""
        self._settings = settings
        self._secret = secret
        self._ends = ends
        self._outbox = outbox
        self._account = account
        self._lock = lock
        self._metrics = metrics
        self._making = threading.RLock()
        self._spool: Spool | None = None
        self._kept: set[tuple[int, int]] = set()
        self._new: dict[tuple[int, int], Sealed] = {}
        self._stale: set[tuple[int, int]] = set()
        """Batches that the spool could not forget when they were acknowledged."""

    def open(self) -> Spool:
        """Return the spool, which is made now if need be. Raises as `Spool` does."""
        return self._spool or apart(self._make)

    def _make(self) -> Spool:
        with self._making:
            if self._spool is None:
                settings = self._settings
                spool = Spool(
                    Path(settings.spool_dir),
                    producer_id_of(self._secret),
                    secret=self._secret,
                    name=slot_name(producer_id_of(self._secret)),
                    bytes_max=settings.spool_bytes_max,
                    ends=self._ends,
                    fsync=settings.durability == "disk",
                )
                try:
                    if self.durable:
                        spool.prepare()
                except BaseException:
                    spool.close()
                    raise
                self._spool = spool
            return self._spool

    @property
    def used_bytes(self) -> int:
        """The bytes that the spool takes on the disk."""
        return self._spool.used_bytes if self._spool is not None else 0

    @property
    def is_held(self) -> bool:
        """True if this thread was interrupted while it writes to the database, for which other threads wait."""
        return self._spool is not None and self._spool.is_held

    @property
    def batch_count(self) -> int:
        """The number of batches that are kept and not forgotten yet."""
        return self._spool.batch_count if self._spool is not None else 0

    @property
    def is_empty(self) -> bool:
        """True if nothing is left that would be sent again."""
        spool = self._spool
        return spool is None or not (spool.batch_count or spool.ring_bytes or spool.pending_bytes)

    # For the table

    def define(self, definition: bytes, suffix: bytes) -> int | None:
        """Return a number for a series; None if its delta is to be dropped, because there is no room on the disk."""
        return self._insist(lambda: self.open().define(definition, suffix))

    def segment(self, shard: int, full: int, length: int) -> Segment | None:
        """Return where a shard goes on; None if the delta is to be dropped."""
        return self._insist(lambda: self.open().segment(shard, full, length))

    def _insist(self, attempt: Callable[[], T]) -> T | None:
        if self.is_held:  # to wait for room would be in vain: nobody makes room before this returns
            try:
                return attempt()
            except Unavailable as error:
                raise BufferFull(str(error)) from None
        return self._account.insist(attempt)

    # For the flusher

    def sealed(self, batch: Sealed) -> None:
        """Take note of a new batch. The caller holds the lock."""
        self._new[batch.partition, batch.sequence] = batch

    def is_checkpoint_due(self) -> bool:
        """Return whether to commit although nothing can be sealed, so that what was recorded takes less room."""
        spool = self._spool
        most = self._settings.spool_bytes_max // _CHECKPOINT_SHARE
        return spool is not None and spool.ring_bytes > min(max(_CHECKPOINT_BYTES, 2 * spool.pending_bytes), most)

    @property
    def is_behind(self) -> bool:
        """True if batches are held back until a commit succeeds."""
        return self.durable and bool(self._new)

    @property
    def is_full_of_names(self) -> bool:
        """True if the spool refuses to record, and has room again once series are evicted."""
        return self._spool is not None and self._spool.is_full_of_names

    def commit(
        self,
        pending: Iterable[Pending] = (),
        positions: Mapping[int, tuple[int, int]] = MappingProxyType({}),
        gone: Iterable[int] = (),
    ) -> None:
        """Keep all that was sealed, which can be sent from then on, and what is pending; see `Spool.commit`.

        Raises `Unavailable` or `BufferFull` if that can't be done now; then it is called again.
        """
        with self._lock:
            batches = [*self._new.values()]
        if not self.durable:  # else recording is refused in time
            size = 2 * sum([len(batch.value) for batch in batches])  # in the log, then in the database
            if self.used_bytes + size > self._settings.spool_bytes_max * 15 // 16:
                raise BufferFull(f"{self.used_bytes} bytes of the spool are in use, and {size} more are needed")
        if batches or self._spool is not None:
            self.open().commit(batches, pending, positions, gone)
        settled = []
        with self._lock:
            for batch in batches:
                key = batch.partition, batch.sequence
                if self._new.pop(key, None) is None:  # acknowledged meanwhile
                    settled.append(key)
                else:
                    self._kept.add(key)
        self.forget(settled)

    def release_memory(self, bytes_max: int) -> None:
        """Drop the bytes of kept batches from memory until the outbox has at most so many."""
        back = count = 0
        with self._lock:
            if self._outbox.bytes_total > bytes_max:
                # The newest first: the oldest are sent next.
                for batch in reversed([*self._outbox.pending()]):
                    if (batch.partition, batch.sequence) in self._kept:
                        sealed = self._outbox.drop_value(batch.partition, batch.sequence)
                        back += len(sealed.value) if sealed else 0
                        count += sealed is not None
                        if self._outbox.bytes_total <= bytes_max:
                            break
        self._account.refund(back)
        self._metrics.inc(m.PUBLISHER_SPILLED, count)

    def sync(self) -> None:
        """Force what was recorded to the disk."""
        if self._spool is not None:
            self._spool.sync()

    # For the sender

    @property
    def kept_count(self) -> int:
        """The number of unacknowledged batches that the spool has."""
        return len(self._kept)

    def holds_back(self, sealed: Sealed) -> bool:
        """Return whether a batch may not be sent yet. The caller holds the lock."""
        return self.durable and (sealed.partition, sealed.sequence) not in self._kept

    def load(self, sealed: Sealed) -> bytes:
        """Return the bytes of a batch."""
        return sealed.value or self.open().load(sealed.partition, sealed.sequence)

    def settled(self, partition: int, sequence: int) -> bool:
        """Take note that a batch is never sent again; return whether to `forget` it. The caller holds the lock."""
        key = partition, sequence
        self._new.pop(key, None)
        kept = key in self._kept
        self._kept.discard(key)
        return kept

    def forget(self, batches: Sequence[tuple[int, int]]) -> None:
        """Have the spool forget batches, and those that it could not forget before; without the lock."""
        with self._lock:
            stale = {*self._stale, *batches}
        if not stale:
            return
        try:
            self.open().acknowledge([*stale])
        except (Unavailable, BufferFull) as error:  # whoever finds them sends them again, and they are dropped there
            _log.warning("the spool keeps %d batches that were acknowledged: %s", len(stale), error)
            with self._lock:
                self._stale |= stale
        else:
            with self._lock:
                self._stale -= stale
            self._account.freed()  # whoever closes the publisher waits for it

    # The end

    def close(self) -> bool:
        """Let go; return whether nothing is left in the spool."""
        return self._spool is None or self._spool.close()

    def abandon(self) -> None:
        """Let go of what is the parent's, in a forked child."""
        if self._spool is not None:
            self._spool.abandon()
