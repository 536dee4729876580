"""One moment of each store, for reads of several views that belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from pipeline.core.record import Position
from pipeline.ports import ReadableStore, StoreView
from pipeline.query.ends import LogEnds


class Cut(NamedTuple):
    """Snapshots of all stores, and what is known of the log at that moment."""

    stores: Mapping[int, ReadableStore]
    snapshots: Mapping[int, StoreView]
    positions: Mapping[int, Position]
    seen: LogEnds
    """Ends of the log, as seen before the snapshots were taken."""
    final_before_ms: int
    """Time that all partitions have reached."""
    check: Callable[[str], None]
    """Raises if a read of the view that it names must end."""
