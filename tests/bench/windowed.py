"""Cost of windows where deltas are recorded: views with windows against views without, in one run."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

from pipeline.adapters.clock import SystemClock
from pipeline.core.record import Definition
from tests.bench.measure import Figure, Row, at_least_times, cpu_seconds
from tests.bench.recording import LABELS, best_ns, publisher
from tests.bench.table import open_view, ways

_WINDOW_S = 60
_PUBLISHED = 1_000_000
_WAYS = {"native": 0.7, "plain": 0.35}
"""Least part of the rate without windows, by table: the plain one pays for a call to read the clock."""


def _recording_rows(quick: bool) -> list[Row]:
    """Measure one delta to one series, again and again."""
    clock = SystemClock()
    loops: dict[str, Callable[[int], None]] = {}
    names: list[tuple[str, str]] = []
    for way in ways():
        table, view = open_view(way, now_ms=clock.now_ms, now_ns=clock.now_ns)
        windowed = table.define(Definition("windowed", "sum", LABELS, _WINDOW_S), 1 << 31)
        for kind, of in (("without windows", view), ("with windows", windowed)):
            series = of.labels("eu", "tea")

            def bound(count: int, series: Any = series) -> None:
                for _ in repeat(None, count):
                    series.add(12.5)

            def keyed(count: int, view: Any = of) -> None:
                for _ in repeat(None, count):
                    view.add(12.5, region="eu", product="tea")

            loops[f"{way}, bound, {kind}"], loops[f"{way}, keyed, {kind}"] = bound, keyed
        names += [(way, f"{way}, bound"), (way, f"{way}, keyed")]
    ns = best_ns(loops, 2_000 if quick else 200_000)
    return [
        at_least_times(
            f"{name}: deltas recorded, with windows",
            Figure(1e9 / ns[f"{name}, with windows"], "deltas/s"),
            Figure(1e9 / ns[f"{name}, without windows"], "deltas/s", "without windows"),
            _WAYS[way],
        )
        for way, name in names
    ]


def _publish_rate(series_count: int, delta_count: int, window_s: int) -> float:
    """Return deltas for each CPU second of the whole process, from `add` until all are acknowledged."""
    pairs = [(f"region-{i % 16}", f"product-{i:07d}") for i in range(series_count)]
    with publisher(buffer_bytes_max=2**29) as opened:
        view = opened.sum("sales", labels=LABELS, window_s=window_s)

        def publish() -> None:
            for _ in range(delta_count // series_count):
                for region, product in pairs:
                    view.add(12.5, region=region, product=product)
            opened.flush(60)

        return delta_count // series_count * series_count / cpu_seconds(publish)


def _publish_rows(quick: bool) -> list[Row]:
    """Publish deltas by key in windows of a minute, and of a second, in each of which every series is new."""
    rows = []
    delta_count = _PUBLISHED // (100 if quick else 1)
    for series_count in (100, 100_000 // (50 if quick else 1)):
        best = dict.fromkeys((0, 1, _WINDOW_S), 0.0)
        for _ in range(1 if quick else 3):
            for window_s in best:
                best[window_s] = max(best[window_s], _publish_rate(series_count, delta_count, window_s))
        plain = Figure(best[0], "deltas/CPU s", "without windows")
        name = f"published, {series_count:,} series, windows of"
        rows.append(at_least_times(f"{name} {_WINDOW_S} s", Figure(best[_WINDOW_S], "deltas/CPU s"), plain, 0.7))
        rows.append(at_least_times(f"{name} 1 s", Figure(best[1], "deltas/CPU s"), plain, 0.3))
    return rows


def record_windows(quick: bool) -> list[Row]:
    """Run all benchmarks of recording to windows."""
    return [*_recording_rows(quick), *_publish_rows(quick)]
