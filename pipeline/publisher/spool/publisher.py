"""The spool of a publisher: where its table records, and which of its batches are safe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import RLock
from types import MappingProxyType
from typing import TypeVar

import pipeline.metrics as m
from pipeline.core.record import producer_id_of
from pipeline.core.sequence import Outbox, Sealed
from pipeline.errors import BufferFull, Unavailable
from pipeline.metrics import Metrics
from pipeline.publisher.batching import Pending
from pipeline.publisher.memory import MemoryAccount
from pipeline.publisher.spool.live import Spool, run_uninterrupted
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

    Safe from any thread. `account.lock` guards the outbox, and the sets of its batches here.
    """

    def __init__(
        self,
        settings: PublisherSettings,
        secret: str,
        ends: Ends,
        outbox: Outbox,
        account: MemoryAccount,
        metrics: Metrics,
    ) -> None:
        """`secret` is the producer's; see `ports.ProvesProducers`. `ends` returns where the table's rings end now."""
        self.durable = settings.durability != "memory"
        """True if a batch may be sent only once the spool has it; else the spool only has batches to save memory."""
        self._settings = settings
        self._secret = secret
        self._ends = ends
        self._outbox = outbox
        self._account = account
        self._lock = account.lock
        self._metrics = metrics
        self._making = RLock()
        self._spool: Spool | None = None
        self._new: dict[tuple[int, int], Sealed] = {}
        """Sealed batches that it does not have yet."""
        self._stale: set[tuple[int, int]] = set()
        """Batches that the spool could not forget when they were acknowledged."""

    def open(self) -> Spool:
        """Return the spool, which is made now if need be. Raises as `Spool` does."""
        return self._spool or run_uninterrupted(self._make)

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
        return self._wait_for_disk(lambda: self.open().define(definition, suffix))

    def segment(self, shard: int, full: int, length: int) -> Segment | None:
        """Return where a shard goes on; None if the delta is to be dropped."""
        return self._wait_for_disk(lambda: self.open().segment(shard, full, length))

    def _wait_for_disk(self, attempt: Callable[[], T]) -> T | None:
        if self.is_held:  # nobody can make room before this returns
            try:
                return attempt()
            except Unavailable as error:
                raise BufferFull(str(error)) from None
        return self._account.wait_for_disk(attempt)

    # For the flusher

    def sealed(self, batch: Sealed) -> None:
        """Take note of a new batch, which the next `commit` keeps. The caller holds the lock."""
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
        """Keep all sealed batches, which can be sent from then on, and what is pending; see `Spool.commit`.

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
        self.forget(settled)

    def release_memory(self, bytes_max: int) -> None:
        """Drop the bytes of kept batches from memory until the outbox has at most so many."""
        back = count = 0
        with self._lock:
            if self._outbox.bytes_total > bytes_max:
                # The newest first: the oldest are sent next.
                for batch in reversed([*self._outbox.pending()]):
                    if self._has(batch.partition, batch.sequence):
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
        return self.batch_count - len(self._stale)

    def holds_back(self, sealed: Sealed) -> bool:
        """Return whether a batch may not be sent yet. The caller holds the lock."""
        return self.durable and not self._has(sealed.partition, sealed.sequence)

    def load(self, sealed: Sealed) -> bytes:
        """Return the bytes of a batch."""
        return sealed.value or self.open().load(sealed.partition, sealed.sequence)

    def settled(self, partition: int, sequence: int) -> bool:
        """Take note that a batch is never sent again; return whether to `forget` it. The caller holds the lock."""
        self._new.pop((partition, sequence), None)
        return self._has(partition, sequence)

    def _has(self, partition: int, sequence: int) -> bool:
        return self._spool is not None and self._spool.has(partition, sequence)

    def forget(self, batches: Sequence[tuple[int, int]]) -> None:
        """Have the spool forget batches, and those that it could not forget before. The caller does not hold the lock."""
        with self._lock:
            stale = {*self._stale, *batches}
        if not stale:
            return
        try:
            self.open().acknowledge([*stale])
        except (Unavailable, BufferFull) as error:  # if they are sent again, tasks drop them
            _log.warning("the spool keeps %d batches that were acknowledged: %s", len(stale), error)
            with self._lock:
                self._stale |= stale
        else:
            with self._lock:
                self._stale -= stale
            self._account.freed()  # `Runtime.say_closed` waits for it

    # The end

    def close(self) -> bool:
        """Close the spool; return whether nothing is left in it."""
        return self._spool is None or self._spool.close()

    def abandon(self) -> None:
        """Forget the parent's spool, in a forked child."""
        if self._spool is not None:
            self._spool.abandon()
