"""What a read does with a store that it can't trust: find out which one it is, and have it rebuilt."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pipeline.errors import BadRecord, LogCorrupt, NotReady, PipelineError, StoreCorrupt, Unreadable
from pipeline.ports import ReadableStore, StoreView

T = TypeVar("T")
Distrust = Callable[[int, ReadableStore, StoreCorrupt], None]
"""Takes a partition's store out of service and has it rebuilt; `LogCorrupt` if that has not helped before."""


def trust(partition: int, decode: Callable[..., T], *arguments: Any) -> T:
    """Decode what a partition's store holds: it was checked before it was written."""
    try:
        return decode(*arguments)
    except BadRecord as error:
        raise Unreadable(f"partition {partition}: {error}", partition) from None


def trust_each(partitions: Sequence[int], decode: Callable[[list[bytes]], T], values: list[bytes]) -> T:
    """Decode values together, of which `partitions[i]` holds `values[i]`."""
    try:
        return decode(values)
    except BadRecord:
        for partition, value in zip(partitions, values, strict=True):
            trust(partition, decode, [value])
        raise


def blame(
    snapshots: Mapping[int, StoreView],
    keys: Sequence[bytes],
    values: Sequence[bytes],
    decode: Callable[[bytes, bytes], object],
) -> StoreCorrupt:
    """Return what is wrong with the first entry that can't be decoded, of a scan of several stores, and with which store."""
    for key, value in zip(keys, values, strict=True):
        try:
            decode(key, value)
        except BadRecord as error:
            holders = [number for number, snapshot in snapshots.items() if snapshot.get([key])[0] == value]
            return Unreadable(f"partition {holders[0]}: entry {key.hex()[:200]}: {error}", holders[0])
    return StoreCorrupt("entries that can't be decoded together can be decoded one by one")


def damaged(distrust: Distrust | None, stores: Mapping[int, ReadableStore], error: StoreCorrupt) -> PipelineError:
    """Have the store rebuilt in which a read of `stores` met `error`, and return what the read must raise."""
    traceback.clear_frames(error.__traceback__)  # they hold scans, and those the files that a rebuild deletes
    number = error.partition
    if distrust is None or number is None or number not in stores:
        return error
    try:
        distrust(number, stores[number], error)
    except LogCorrupt as known:
        return known
    return NotReady(f"partition {number}: its store was damaged; it is being rebuilt from the changelog")
