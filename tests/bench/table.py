"""The publisher's tables by themselves: recording, threads, draining and memory, the native one beside the plain one."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import msgspec

from pipeline import native
from pipeline.core.record import Definition
from pipeline.publisher.table import Table
from pipeline.publisher.view import check_value
from tests.bench.measure import ROOT, Figure, Row, at_most, at_most_times, cheaper
from tests.bench.recording import INC, LABELS, LABELS_INC, OTEL, UPDATE, adding, best_ns, observing, others

_ROUNDS = 9
SERIES = 1_000


def ways() -> list[str]:
    """Return the tables that can be used here."""
    return ["native", "plain"] if native.in_use() else ["plain"]


def open_view(way: str, **settings: Any) -> tuple[Any, Any]:
    """Return a table that never refuses, and a view of it."""
    kind: Any = native.extension().Table if way == "native" else Table
    table = kind(
        bytes_max=1 << 40,
        check=check_value,
        opening=int,
        full=lambda bytes_needed, delta_count: False,
        **{"now_ms": int, **settings},
    )
    return table, table.define(Definition("sales", "sum", LABELS), 1 << 31)


def _recording() -> dict[str, Callable[[int], None]]:
    instead = others()
    loops = {name: instead[name] for name in (UPDATE, INC, LABELS_INC, OTEL)}
    for way in ways():
        _, view = open_view(way)
        series = view.labels("eu", "tea")

        def bound(count: int, series: Any = series) -> None:
            for _ in repeat(None, count):
                series.add(12.5)

        def keyed(count: int, view: Any = view) -> None:
            for _ in repeat(None, count):
                view.add(12.5, region="eu", product="tea")

        loops[f"{way}, bound: add(v)"] = bound
        loops[f"{way}, two labels: add(v, ...)"] = keyed
    return loops


def recording_rows(quick: bool) -> list[Row]:
    """Measure one delta, against a dictionary update and against other libraries."""
    ns = best_ns(_recording(), 2_000 if quick else 200_000, _ROUNDS)

    def figures(name: str, baseline: str) -> tuple[str, Figure, Figure]:
        return name, Figure(ns[name], "ns"), Figure(ns[baseline], "ns", baseline)

    rows = []
    for way in ways():
        bound, keyed = f"{way}, bound: add(v)", f"{way}, two labels: add(v, ...)"
        most = (0.7, 2) if way == "native" else (9, 16)
        rows += [at_most_times(*figures(bound, UPDATE), most[0]), at_most_times(*figures(keyed, UPDATE), most[1])]
        if way == "native":
            rows += [
                cheaper(*figures(bound, INC), 12),
                cheaper(*figures(keyed, LABELS_INC), 20),
                cheaper(*figures(keyed, OTEL), 100),
            ]
    return rows


def threads_ns(way: str, thread_count: int, series_count: int, per_thread: int, **settings: int) -> tuple[float, float]:
    """Return the wall ns for one delta of all threads together, keyed, and the 99.99th percentile of one thread's `add`."""
    table, view = open_view(way, **settings)
    pairs = [(f"region-{i % 16}", f"product-{i:07d}") for i in range(series_count)]
    start = threading.Barrier(thread_count + 1)
    stop = threading.Event()

    def record(number: int) -> None:
        mine = pairs[number * 37 % series_count :] + pairs[: number * 37 % series_count]
        start.wait()
        done = 0
        while done < per_thread:
            for region, product in mine[: per_thread - done]:
                view.add(12.5, region=region, product=product)
            done += len(mine)

    def drain() -> None:
        while not stop.wait(0.05):
            table.drain(4, None, 1 << 20)

    threads = [threading.Thread(target=record, args=(number,)) for number in range(thread_count)]
    drainer = threading.Thread(target=drain)
    for thread in [*threads, drainer]:
        thread.start()
    start.wait()
    before = time.perf_counter_ns()
    for thread in threads:
        thread.join()
    took = time.perf_counter_ns() - before
    single, clock = [], time.perf_counter_ns
    for region, product in pairs[:1_000] * max(1, min(per_thread, 100_000) // 1_000):
        began = clock()
        view.add(12.5, region=region, product=product)
        single.append(clock() - began)
    stop.set()
    drainer.join()
    return took / (thread_count * per_thread), float(sorted(single)[-1 - len(single) // 10_000])


def thread_rows(quick: bool) -> list[Row]:
    """Compare threads that share 1,000 series, while the table is drained, with one thread."""
    total = 4_000 if quick else 400_000
    rows = []
    for way in ways():
        one = min(threads_ns(way, 1, SERIES, total)[0] for _ in range(1 if quick else 3))
        for count in (2, 8, 64):
            many = min(threads_ns(way, count, SERIES, total // count)[0] for _ in range(1 if quick else 3))
            name = f"{way}, {count} threads on {SERIES:,} series, two labels"
            rows.append(at_most_times(name, Figure(many, "ns"), Figure(one, "ns", "one thread"), 1 / 0.8))
    return rows


def drain_rows(quick: bool) -> list[Row]:
    """Measure the draining and encoding of dirty series."""
    count = 1_000 if quick else 100_000
    rows = []
    for way in ways():
        table, view = open_view(way)
        bound = [view.labels(f"region-{i % 16}", f"product-{i:07d}") for i in range(count)]
        totals: dict[int, float] = {}
        best = least = float("inf")
        for _ in range(3 if quick else 7):
            for series in bound:
                series.add(12.5)
            before = time.process_time_ns()
            drafts = [draft.groups for draft in table.drain(4, None, 1 << 20)]
            best = min(best, (time.process_time_ns() - before) / count)
            assert drafts
            before = time.process_time_ns()
            for i in range(count):
                totals[i] = totals.get(i, 0.0) + 12.5
            least = min(least, (time.process_time_ns() - before) / count)
        baseline = Figure(least, "ns", "d[i] = d.get(i, 0.0) + v")
        name = f"{way}, drain and encode {count:,} series, each"
        rows.append(at_most(name, Figure(best, "ns"), baseline, 500 if way == "native" else 10_000))
    return rows


def rss() -> int:
    """Return the memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory(way: str, count: int) -> dict[str, float]:
    """Return bytes a series as the system and as the table count them, and CPU ns a delta to new and to known series."""
    table, view = open_view(way, local_series_max=0)
    view.add(1, region="x", product="y")
    regions = [f"region-{i}" for i in range(16)]
    before, began = rss(), time.process_time_ns()
    for i in range(count):
        view.add(1.5, region=regions[i % 16], product=f"product-{i:07d}")
    first = time.process_time_ns() - began
    grown, counted, began = rss() - before, table.used_bytes, time.process_time_ns()
    for i in range(count):
        view.add(1.5, region=regions[i % 16], product=f"product-{i:07d}")
    again, began = time.process_time_ns() - began, time.process_time_ns()
    for i in range(count):
        f"product-{i:07d}", regions[i % 16]
    text = time.process_time_ns() - began
    return {
        "measured": grown / count,
        "counted": counted / count,
        "first_ns": (first - text) / count,
        "again_ns": (again - text) / count,
    }


def histogram_memory(way: str, count: int) -> dict[str, float]:
    """Return bytes a histogram of 20 buckets, as the system and as the table count them."""
    table, _ = open_view(way, local_series_max=0)
    view = table.define(Definition("slow", "histogram", ("route",)), 1 << 31)
    view.observe(1, route="x")
    before = rss()
    for i in range(count):
        for n in range(20):
            view.observe(100.5 + 1.4 * n, route=f"/route-{i:07d}")
    return {"measured": (rss() - before) / count, "counted": table.used_bytes / count}


def _of_process(call: str) -> dict[str, float]:
    code = f"import json; from tests.bench.table import *; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    return msgspec.json.decode(done.stdout, type=dict[str, float])


def memory_rows(quick: bool) -> list[Row]:
    """Measure the memory a series, in a process of its own."""
    rows = []
    for way in ways():
        count = 20_000 if quick else 1_000_000 if way == "native" else 100_000
        found = _of_process(f"memory({way!r}, {count})")
        counted = Figure(found["counted"], "bytes", "as the table counts")
        name = f"{way}, {count:,} series: memory a series"
        rows.append(at_most(name, Figure(found["measured"], "bytes"), counted, 200 if way == "native" else 1_000))
        known = Figure(found["again_ns"], "ns", "a known one of as many")
        rows.append(
            at_most_times(f"{way}, {count:,} series: delta to a new one", Figure(found["first_ns"], "ns"), known, 12)
        )
    return rows


def histogram_rows(quick: bool) -> list[Row]:
    """Measure what a histogram of 20 buckets costs: to observe a number, bound, and memory, in a process of its own."""
    rows = []
    for way in ways():
        table, view = open_view(way)
        slow = table.define(Definition("slow", "histogram", LABELS), 1 << 31).labels("eu", "tea")
        loops = {"add": adding(view.labels("eu", "tea")), "observe": observing(slow)}
        ns = best_ns(loops, 2_000 if quick else 200_000)
        add = Figure(ns["add"], "ns", "add(v) of a bound sum")
        most = 3 if way == "native" else 12
        rows.append(at_most_times(f"{way}, bound histogram: observe(v)", Figure(ns["observe"], "ns"), add, most))
        count = 2_000 if quick else 100_000 if way == "native" else 10_000
        found = _of_process(f"histogram_memory({way!r}, {count})")
        counted = Figure(found["counted"], "bytes", "as the table counts")
        name = f"{way}, {count:,} histograms of 20 buckets: memory each"
        rows.append(at_most(name, Figure(found["measured"], "bytes"), counted, 600 if way == "native" else 2_500))
    return rows


def table(quick: bool) -> list[Row]:
    """Run all benchmarks of the tables."""
    return [*recording_rows(quick), *thread_rows(quick), *drain_rows(quick), *memory_rows(quick)]
