"""Batches of parts of a batch that was received: what was refused of it, or what is left without that."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from pipeline.core.codec import Received, WireBatch, encode_batch, receive_batch, seal
from pipeline.core.groups import WireGroup
from pipeline.core.record import Group, Origin, travelling

_encode = msgspec.msgpack.Encoder().encode


def with_group(received: Received, index: int, *, whole: bool = False) -> bytes:
    """Return the bytes of a batch with one group of the batch that was received, as it came.

    The rest of the received batch is folded: so the new one has no control records, and no origin, which counts as folded.
    With `whole` the group is all that the batch had; then the origin was not folded, and stays.
    """
    origin = received.wire.origin if whole else None
    wire = msgspec.structs.replace(received.wire, closing=False, origin=origin, controls=[], groups=[])
    return _sealed(received, wire, [received.wire.groups[index]])


def with_rows(received: Received, group: Group) -> bytes:
    """Return the bytes of a batch with one group of the batch that was received, as far as `group` has it.

    The rest is folded, as for `with_group`.
    """
    return encode_batch(msgspec.structs.replace(received.batch, closing=False, origin=None, controls=[], groups=[group]))


def with_producer(received: Received, producer_id: str, origin: Origin | None) -> bytes:
    """Return the bytes of the only batch of a producer, with all groups of the batch that was received, as they came."""
    numbers = {"epoch": 0, "sequence": 0, "floor": 0}
    wire = msgspec.structs.replace(
        received.wire, producer_id=producer_id, **numbers, closing=False, origin=origin, controls=[], groups=[]
    )
    return _sealed(received, wire, received.wire.groups)


def without_groups(batch: bytes, indexes: Collection[int]) -> bytes:
    """Return an encoded batch without some of its groups."""
    received = receive_batch(batch)
    return _sealed(received, received.wire, [it for index, it in enumerate(received.wire.groups) if index not in indexes])


def _sealed(received: Received, wire: WireBatch, groups: Sequence[WireGroup]) -> bytes:
    """Return the bytes of a batch with the header fields of `wire` and these groups."""
    travel = [(travelling(definition), suffixes, columns) for definition, suffixes, columns in groups]
    return seal(received.batch.partition, _encode((*msgspec.structs.astuple(wire)[:-1], travel)))
