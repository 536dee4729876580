"""Damaged stores: find the store in which a read met an entry that can't be decoded, and have it rebuilt."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pipeline.errors import BadRecord, LogCorrupt, NotReady, PipelineError, StoreCorrupt, Unreadable
from pipeline.ports import ReadableStore, StoreView

T = TypeVar("T")
OnDamage = Callable[[int, ReadableStore, StoreCorrupt], None]
"""Takes a partition's store out of service and rebuilds it; `LogCorrupt` if an earlier rebuild has not helped."""


def decode_stored(partition: int, decode: Callable[..., T], *arguments: Any) -> T:
    """Return `decode(*arguments)` of bytes from a partition's store; `Unreadable` if they are none that a worker wrote."""
    try:
        return decode(*arguments)
    except BadRecord as error:
        raise Unreadable(f"partition {partition}: {error}", partition) from None


def decode_all(partitions: Sequence[int], decode: Callable[[list[bytes]], T], values: list[bytes]) -> T:
    """Decode values in one call; `partitions[i]` holds `values[i]`."""
    try:
        return decode(values)
    except BadRecord:
        for partition, value in zip(partitions, values, strict=True):
            decode_stored(partition, decode, [value])
        raise


def find_unreadable(
    snapshots: Mapping[int, StoreView],
    keys: Sequence[bytes],
    values: Sequence[bytes],
    decode: Callable[[bytes, bytes], object],
) -> StoreCorrupt:
    """Return the error of the first entry that can't be decoded, with its partition, from a scan of several stores."""
    for key, value in zip(keys, values, strict=True):
        try:
            decode(key, value)
        except BadRecord as error:
            holders = [number for number, snapshot in snapshots.items() if snapshot.get([key])[0] == value]
            return Unreadable(f"partition {holders[0]}: entry {key.hex()[:200]}: {error}", holders[0])
    return StoreCorrupt("entries that can't be decoded together can be decoded one by one")


def report_damage(on_damage: OnDamage | None, stores: Mapping[int, ReadableStore], error: StoreCorrupt) -> PipelineError:
    """Have the store rebuilt in which a read of `stores` met `error`; return the error that the read must raise."""
    # The frames, and the functions with their closures, hold scans, and scans hold files that the rebuild deletes.
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    number = error.partition
    if on_damage is None or number is None or number not in stores:
        return error
    try:
        on_damage(number, stores[number], error)
    except LogCorrupt as known:
        return known
    return NotReady(f"partition {number}: its store was damaged; it is being rebuilt from the changelog")
