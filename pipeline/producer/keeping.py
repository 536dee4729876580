"""Which sealed batches a journal has, so that they are sent only when they are safe, and need not stay in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Protocol

import pipeline.metrics as m
from pipeline.core.sequence import Outbox, Sealed
from pipeline.errors import BufferFull, Unavailable
from pipeline.metrics import Metrics
from pipeline.producer.account import Account
from pipeline.producer.sealing import Merged

_log = logging.getLogger(__name__)
_CHECKPOINT_BYTES = 4 * 2**20
"""While nothing can be sealed, what was recorded is committed as merged series whenever it takes so many bytes."""
_COMMIT_EVERY_S = 1.0
"""While some of it can't be sealed, the rest is committed this often, because all that is left over is written each time."""


class Journal(Protocol):
    """Where batches survive this process; `pipeline.producer.spool` has them on disk."""

    @property
    def used_bytes(self) -> int:
        """What it takes on the disk."""
        ...

    @property
    def ring_bytes(self) -> int:
        """What was recorded since the last commit."""
        ...

    @property
    def pending_bytes(self) -> int:
        """What the last commit's `pending` took."""
        ...

    def commit(self, batches: Sequence[Sealed], pending: Sequence[Merged]) -> None:
        """Keep batches, and `pending` in place of what was pending before, all or nothing.

        Raises `Unavailable` or `BufferFull` if it can't now; then it is called again.
        """
        ...

    def acknowledge(self, batches: Sequence[tuple[int, int]]) -> None:
        """Forget batches, by partition and sequence."""
        ...

    def load(self, partition: int, sequence: int) -> bytes:
        """The bytes of a batch that is kept."""
        ...

    def sync(self) -> None:
        """Force what was recorded to the disk."""
        ...


class Keeper:
    """The journal's side of a delivery. `lock` is the delivery's: it guards the outbox and what is kept."""

    def __init__(
        self,
        journal: Journal,
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
        self._journal = journal
        self._outbox = outbox
        self._account = account
        self._lock = lock
        self._metrics = metrics
        self._kept: set[tuple[int, int]] = set()
        self._new: dict[tuple[int, int], Sealed] = {}
        self._committed_s = 0.0

    @property
    def used_bytes(self) -> int:
        """What the journal takes on the disk."""
        return self._journal.used_bytes

    @property
    def kept_count(self) -> int:
        """Unacknowledged batches that the journal has."""
        return len(self._kept)

    # The flusher

    def sealed(self, batches: Iterable[Sealed]) -> None:
        """These were sealed. The caller holds the lock."""
        for batch in batches:
            self._new[batch.partition, batch.sequence] = batch

    def checkpoint_due(self) -> bool:
        """Whether to commit although nothing can be sealed, so that what was recorded takes less room."""
        return self._journal.ring_bytes > min(max(_CHECKPOINT_BYTES, 2 * self._journal.pending_bytes), self._ring_bytes_max)

    @property
    def behind(self) -> bool:
        """Whether batches are held back until a commit succeeds."""
        return self.durable and bool(self._new)

    def commit_due(self, now_s: float) -> bool:
        """Whether to seal and commit although part of it can't be sealed."""
        return now_s - self._committed_s >= _COMMIT_EVERY_S or self.checkpoint_due()

    def commit(self, pending: Sequence[Merged], now_s: float) -> None:
        """Keep all that was sealed, and what is drained but not sealed; from then on it can be sent. Raises as a journal."""
        with self._lock:
            batches = [*self._new.values()]
        self._journal.commit(batches, pending)
        self._committed_s = now_s
        gone = []
        with self._lock:
            for batch in batches:
                key = batch.partition, batch.sequence
                if self._new.pop(key, None) is None:  # acknowledged meanwhile
                    gone.append(key)
                else:
                    self._kept.add(key)
        self.forget(gone)

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
        return sealed.value or self._journal.load(sealed.partition, sealed.sequence)

    def settled(self, partition: int, sequence: int) -> bool:
        """A batch is never sent again: whether the journal is to `forget` it. The caller holds the lock."""
        key = partition, sequence
        self._new.pop(key, None)
        kept = key in self._kept
        self._kept.discard(key)
        return kept

    def forget(self, batches: Sequence[tuple[int, int]]) -> None:
        """Have the journal forget batches, without the lock."""
        if not batches:
            return
        try:
            self._journal.acknowledge(batches)
        except (Unavailable, BufferFull) as error:  # whoever finds them sends them again, and they are dropped there
            _log.warning("the spool keeps %d batches that were acknowledged: %s", len(batches), error)

    def sync(self) -> None:
        """Force what was recorded to the disk."""
        self._journal.sync()
