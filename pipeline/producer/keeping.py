"""Knows which batches the spool has, so that they are sent only when they are safe, and need not stay in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import pipeline.metrics as m
from pipeline.core.sequence import Outbox, Sealed
from pipeline.errors import BufferFull, Unavailable
from pipeline.metrics import Metrics
from pipeline.producer.account import Account
from pipeline.publisher.drafts import Pending

if TYPE_CHECKING:
    from pipeline.producer.spooling import OwnSpool

_log = logging.getLogger(__name__)
_CHECKPOINT_BYTES = 4 * 2**20
"""While nothing can be sealed, what was recorded is committed as merged series whenever it takes so many bytes."""


class Keeper:
    """The batches of a delivery that are in the spool. `lock` is the delivery's: it guards the outbox and what is kept."""

    def __init__(
        self,
        spool: OwnSpool,
        outbox: Outbox,
        account: Account,
        lock: threading.RLock,
        metrics: Metrics,
        *,
        durable: bool,
        ring_bytes_max: int,
    ) -> None:
        self.durable = durable
        """Whether a batch may be sent only once it is kept."""
        self._ring_bytes_max = ring_bytes_max
        self._spool = spool
        self._outbox = outbox
        self._account = account
        self._lock = lock
        self._metrics = metrics
        self._kept: set[tuple[int, int]] = set()
        self._new: dict[tuple[int, int], Sealed] = {}
        self._stale: set[tuple[int, int]] = set()
        """Batches that the spool could not forget when they were acknowledged."""

    @property
    def used_bytes(self) -> int:
        """The bytes that the spool takes on the disk."""
        return self._spool.used_bytes

    @property
    def is_full_of_names(self) -> bool:
        """True if the spool refuses to record, and has room again once series are evicted."""
        return self._spool.is_full_of_names

    @property
    def kept_count(self) -> int:
        """How many unacknowledged batches the spool has."""
        return len(self._kept)

    # The flusher

    def sealed(self, batches: Iterable[Sealed]) -> None:
        """These were sealed. The caller holds the lock."""
        for batch in batches:
            self._new[batch.partition, batch.sequence] = batch

    def checkpoint_due(self) -> bool:
        """Whether to commit although nothing can be sealed, so that what was recorded takes less room."""
        return self._spool.ring_bytes > min(max(_CHECKPOINT_BYTES, 2 * self._spool.pending_bytes), self._ring_bytes_max)

    @property
    def behind(self) -> bool:
        """Whether batches are held back until a commit succeeds."""
        return self.durable and bool(self._new)

    def commit(
        self,
        pending: Iterable[Pending] = (),
        positions: Mapping[int, tuple[int, int]] = MappingProxyType({}),
        gone: Iterable[int] = (),
    ) -> None:
        """Keep all that was sealed, which can be sent from then on, and what is pending; see `OwnSpool.commit`."""
        with self._lock:
            batches = [*self._new.values()]
        self._spool.commit(batches, pending, positions, gone)
        settled = []
        with self._lock:
            for batch in batches:
                key = batch.partition, batch.sequence
                if self._new.pop(key, None) is None:  # acknowledged meanwhile
                    settled.append(key)
                else:
                    self._kept.add(key)
        self.forget(settled)

    def stow(self, bytes_max: int) -> None:
        """Let go of the bytes of kept batches until the outbox has no more than so many."""
        back = count = 0
        with self._lock:
            if self._outbox.bytes_total > bytes_max:
                # The newest first: the oldest are sent next.
                for batch in reversed([*self._outbox.pending()]):
                    if (batch.partition, batch.sequence) in self._kept:
                        sealed = self._outbox.stow(batch.partition, batch.sequence)
                        back += len(sealed.value) if sealed else 0
                        count += sealed is not None
                        if self._outbox.bytes_total <= bytes_max:
                            break
        self._account.refund(back)
        self._metrics.inc(m.PUBLISHER_SPILLED, count)

    # The sender

    def holds_back(self, sealed: Sealed) -> bool:
        """Whether a batch may not be sent yet. The caller holds the lock."""
        return self.durable and (sealed.partition, sealed.sequence) not in self._kept

    def load(self, sealed: Sealed) -> bytes:
        """The bytes of a batch."""
        return sealed.value or self._spool.load(sealed.partition, sealed.sequence)

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
            self._spool.acknowledge([*stale])
        except (Unavailable, BufferFull) as error:  # whoever finds them sends them again, and they are dropped there
            _log.warning("the spool keeps %d batches that were acknowledged: %s", len(stale), error)
            with self._lock:
                self._stale |= stale
        else:
            with self._lock:
                self._stale -= stale
            self._account.freed()  # whoever closes the publisher waits for it

    def sync(self) -> None:
        """Force what was recorded to the disk."""
        self._spool.sync()
