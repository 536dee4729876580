"""The publisher against its targets: cost of a delta, many threads, the slowest add, flushes, memory."""

from __future__ import annotations

from pathlib import Path

import tests.bench.contention as contention
import tests.bench.draining as draining
import tests.bench.recording as recording
from tests.bench.measure import Row


def publisher(quick: bool, folder: Path | None = None) -> list[Row]:
    """Run all benchmarks of the publisher; with a `folder`, write plots of them there as SVG."""
    costs = recording.costs(quick)
    rates = contention.rates(quick)
    latencies = contention.latencies(quick)
    if folder is not None:
        import tests.bench.plots as plots

        plots.bars(folder / "publisher-cost.svg", "CPU time to record one delta, in one thread", costs, "ns")
        plots.lines(
            folder / "publisher-threads.svg", "Deltas recorded by all threads together", rates, "threads", "deltas/s"
        )
        plots.exceedance(folder / "publisher-tail.svg", "Time of one add by one of 64 threads, while flushing", latencies)
    return [
        *recording.cost_rows(costs),
        *contention.rate_rows(rates),
        *contention.tail_rows(latencies),
        *draining.flush_rows(quick),
        *draining.memory_rows(quick),
    ]
