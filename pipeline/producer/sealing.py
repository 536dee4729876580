"""From merged deltas to sealed batches: route, cut to size, number, encode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol
from zlib import crc32

from pipeline.core.codec import encode_drafted
from pipeline.core.kinds import State
from pipeline.core.record import Batch, Definition, series_prefix
from pipeline.core.sequence import Outbox, Sealed
from pipeline.publisher.drafts import Draft, Merged, cut


class Item(Protocol):
    """Merged deltas of one series."""

    @property
    def definition(self) -> Definition: ...
    @property
    def suffix(self) -> bytes: ...
    @property
    def state(self) -> State: ...


def number(draft: Draft, outbox: Outbox, now_ms: int) -> Sealed:
    """Return a draft as the next batch of a producer; the caller adds it to the outbox."""
    sequence, floor = outbox.next_numbers(draft.partition)
    batch = Batch(outbox.producer_id, outbox.epoch, draft.partition, sequence, floor, now_ms, [])
    return Sealed(draft.partition, sequence, encode_drafted(batch, draft.groups), draft.series_count)


def seal(items: Iterable[Item], outbox: Outbox, *, partition_count: int, batch_bytes_max: int, now_ms: int) -> list[Sealed]:
    """Put series, each of them once, into batches of at most `batch_bytes_max`, numbered by `outbox`, which keeps them.

    A series that is larger by itself gets a batch by itself. All or nothing: what fails raises, and nothing is sealed.
    """
    known: dict[Definition, tuple[Definition, bytes]] = {}
    routed = []
    for item in items:
        definition, prefix = known.setdefault(item.definition, (item.definition, series_prefix(item.definition)))
        partition = crc32(prefix + item.suffix) % partition_count
        routed.append(Merged(partition, definition, item.suffix, item.state))
    out: list[Sealed] = []
    try:
        for draft in cut(routed, batch_bytes_max):
            out.append(number(draft, outbox, now_ms))
            outbox.add(out[-1])
    except BaseException:
        for sealed in out:
            outbox.acknowledge(sealed.partition, sealed.sequence)
        raise
    return out
