"""Views with windows in a publisher: exact at the edges, and gone from memory and spool as soon as possible."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline.adapters.clock import SystemClock
from pipeline.core.record import parse_suffix
from pipeline.publisher.client import BasePublisher
from pipeline.publisher.spool.database import NAME
from pipeline.publisher.spool.ring import SERIES
from pipeline.settings import PublisherSettings
from tests.publisher.support import batches, memory_log, wait_until

MINUTE_MS = 60_000
START_MS = 1_700_000_040_000


class Hand(SystemClock):
    """A clock whose time of day is moved by hand."""

    now_ns = None  # type: ignore[assignment]  # nothing reads the system's clock past it

    def __init__(self) -> None:
        self.ms = START_MS

    def now_ms(self) -> int:
        return self.ms


def counts(log: Any) -> dict[int, int]:
    """Return the totals in a log by window."""
    found: dict[int, int] = {}
    for batch in batches(log):
        for group in batch.groups:
            for suffix, state in zip(group.suffixes, group.states, strict=True):
                start_ms = parse_suffix(suffix)[0]
                found[start_ms] = found.get(start_ms, 0) + state
    return found


def series_named(file: Path) -> int:
    """Return the number of series that a spool has names of; -1 while its owner writes, who shares the file with nobody."""
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        try:
            (count,) = connection.execute("SELECT count(*) FROM names WHERE kind = ?", (SERIES,)).fetchone()
        except sqlite3.OperationalError:
            return -1
    return int(count)


@pytest.mark.parametrize("durability", ["memory", "process"])
def test_thousands_of_windows_pass_through(tmp_path: Path, durability: str) -> None:
    """Every delta is counted in its window, while table, spool and `local` keep only series in use."""
    log, clock = memory_log(), Hand()
    spool = {} if durability == "memory" else {"spool_dir": str(tmp_path / "s"), "spool_bytes_max": 2**22}
    settings = PublisherSettings(durability=durability, flush_interval_ms=20, flush_interval_min_ms=1, **spool)
    bytes_seen = []
    with BasePublisher(log, clock, settings) as pub:
        view = pub.sum("v", labels=("a",), window_s=60)
        bound = [view.labels(str(i)) for i in range(5)]
        for window in range(3_000):
            clock.ms = START_MS + window * MINUTE_MS
            for series in bound:
                series.add(1)
            view.add(1, a="keyed")
            if not window % 100:
                pub.flush()
                if pub._runtime.spool is not None:
                    bytes_seen.append(pub._runtime.spool.used_bytes)
        pub.flush()
        assert dict(view.local()) == {(label,): 3_000 for label in ("0", "1", "2", "3", "4", "keyed")}
        clock.ms += MINUTE_MS

        def is_empty() -> bool:
            pub.flush()
            return pub._table.series_count == 0

        wait_until(is_empty, 20)
        if pub._runtime.spool is not None:
            file = pub._runtime.spool._spool.path / NAME  # type: ignore[union-attr]
            wait_until(lambda: series_named(file) == 0, 20)
            assert max(bytes_seen) <= 2**21
    assert counts(log) == {START_MS + window * MINUTE_MS: 6 for window in range(3_000)}
