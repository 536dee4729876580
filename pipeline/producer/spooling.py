"""The spool of a publisher's process: a journal to its table, and to the keeper of its batches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pipeline.core.record import producer_id_of
from pipeline.core.sequence import Sealed
from pipeline.errors import BufferFull, Unavailable
from pipeline.producer.account import Account
from pipeline.publisher.drafts import Pending
from pipeline.publisher.spool.apart import apart
from pipeline.publisher.spool.live import Spool
from pipeline.publisher.spool.ring import Segment
from pipeline.publisher.spool.slot import slot_name
from pipeline.settings import PublisherSettings

T = TypeVar("T")


class OwnSpool:
    """The spool of this process, made when it is first needed. Safe from any thread."""

    def __init__(
        self,
        settings: PublisherSettings,
        secret: str,
        account: Account,
        ends: Callable[[], Mapping[int, tuple[int, int]]],
    ) -> None:
        """`secret` is that of the producer; see `pipeline.producer.identity`. `ends`: where the table's rings end now."""
        self._settings = settings
        self._secret = secret
        self._account = account
        self._ends = ends
        self._lock = threading.RLock()
        self._spool: Spool | None = None

    def get(self) -> Spool:
        """Return the spool, which is made now if need be. Raises as `Spool` does."""
        return self._spool or apart(self._make)

    def _make(self) -> Spool:
        with self._lock:
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
                    if settings.durability != "memory":
                        spool.prepare()
                except BaseException:
                    spool.close()
                    raise
                self._spool = spool
            return self._spool

    # The table's side

    def define(self, definition: bytes, suffix: bytes) -> int | None:
        """Return a number for a series; None if its delta is to be dropped, because there is no room on the disk."""
        return self._insist(lambda: self.get().define(definition, suffix))

    def segment(self, shard: int, full: int, length: int) -> Segment | None:
        """Return where a shard goes on; None if the delta is to be dropped."""
        return self._insist(lambda: self.get().segment(shard, full, length))

    def _insist(self, attempt: Callable[[], T]) -> T | None:
        if self.is_held:  # to wait for room would be in vain: nobody makes room before this returns
            try:
                return attempt()
            except Unavailable as error:
                raise BufferFull(str(error)) from None
        return self._account.insist(attempt)

    # The keeper's side

    @property
    def is_held(self) -> bool:
        """True if this thread was interrupted while it writes to the database, for which other threads wait."""
        return self._spool is not None and self._spool.is_held

    @property
    def used_bytes(self) -> int:
        """The bytes that the spool takes on the disk."""
        return self._spool.used_bytes if self._spool is not None else 0

    @property
    def is_full_of_names(self) -> bool:
        """See `Spool.is_full_of_names`."""
        return self._spool is not None and self._spool.is_full_of_names

    @property
    def batch_count(self) -> int:
        """Batches that are kept and not forgotten yet."""
        return self._spool.batch_count if self._spool is not None else 0

    @property
    def ring_bytes(self) -> int:
        """The bytes that were recorded since the last commit, about."""
        return self._spool.ring_bytes if self._spool is not None else 0

    @property
    def pending_bytes(self) -> int:
        """The bytes of the pending deltas in the last commit."""
        return self._spool.pending_bytes if self._spool is not None else 0

    def commit(
        self,
        batches: Sequence[Sealed],
        pending: Iterable[Pending],
        positions: Mapping[int, tuple[int, int]],
        gone: Iterable[int],
    ) -> None:
        """Keep batches, and `pending` in place of what was pending before, all or nothing; see `Spool.commit`.

        Raises `Unavailable` or `BufferFull` if that can't be done now; then it is called again.
        """
        if self._settings.durability == "memory":  # else recording is refused in time
            size = 2 * sum([len(batch.value) for batch in batches])  # in the log, then in the database
            if self.used_bytes + size > self._settings.spool_bytes_max * 15 // 16:
                raise BufferFull(f"{self.used_bytes} bytes of the spool are in use, and {size} more are needed")
        if batches or self._spool is not None:
            self.get().commit(batches, pending, positions, gone)

    def acknowledge(self, batches: Sequence[tuple[int, int]]) -> None:
        """Forget batches, by partition and sequence."""
        self.get().acknowledge(batches)

    def load(self, partition: int, sequence: int) -> bytes:
        """Return the bytes of a batch."""
        return self.get().load(partition, sequence)

    def sync(self) -> None:
        """Force what was recorded to the disk."""
        if self._spool is not None:
            self._spool.sync()

    def close(self) -> bool:
        """Let go; return whether nothing is left in it."""
        return self._spool is None or self._spool.close()

    def abandon(self) -> None:
        """Let go of what is the parent's, in a forked child."""
        if self._spool is not None:
            self._spool.abandon()
