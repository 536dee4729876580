"""Cost of a flush of many series, its effect on other threads, and memory of series and threads."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from tests.bench.heartbeat import held_ms
from tests.bench.measure import ROOT, Figure, Row, at_most, at_most_times
from tests.bench.recording import LABELS, publisher

_SERIES = 100_000
_THREADS = 10_000
_HOUR_MS = 3_600_000


def flush_rows(quick: bool) -> list[Row]:
    """Measure the CPU of the process for a flush of series with one delta each, and how long others wait for the GIL."""
    series_count = _SERIES // (50 if quick else 1)
    totals: dict[int, float] = {}
    cpu_ms = update_ms = hold_ms = float("inf")
    where = ""
    with publisher(flush_interval_ms=_HOUR_MS, buffer_bytes_max=2**29) as opened:
        view = opened.sum("sales", labels=LABELS)
        cells = [view.labels(f"region-{i % 16}", f"product-{i:07d}") for i in range(series_count)]

        def record() -> None:
            for cell in cells:
                cell.add(12.5)

        def timed_ms(work: Any) -> float:
            before = time.process_time()
            work()
            return (time.process_time() - before) * 1000

        def update() -> None:
            for i in range(series_count):
                totals[i] = totals.get(i, 0.0) + 12.5

        record()
        opened.flush(60)  # the threads run now, and every series is known
        flusher = opened._runtime.threads["flusher"].ident
        for _ in range(2 if quick else 7):
            record()
            cpu_ms = min(cpu_ms, timed_ms(lambda: opened.flush(60)))
            update_ms = min(update_ms, timed_ms(update))
            record()
            held, stack = held_ms(lambda: opened.flush(60), flusher)
            if held < hold_ms:
                hold_ms, where = held, stack.strip().rpartition("\n")[2].strip()
    baseline = Figure(update_ms, "ms CPU", "d[k] = d.get(k, 0) + v for as many")
    return [
        at_most(f"flush of {series_count:,} dirty series", Figure(cpu_ms, "ms CPU"), baseline, 100),
        at_most("the same, longest hold of the interpreter's lock", Figure(hold_ms, "ms", where), baseline, 5),
    ]


def fill(series_count: int, thread_count: int, per_thread: int) -> int:
    """Return the peak KiB of this process when so many threads, alive together, have recorded; for a process of its own."""
    threading.stack_size(2**18)
    ready, done = threading.Barrier(thread_count + 1), threading.Event()
    with publisher() as opened:
        view = opened.sum("sales", labels=LABELS)

        def record(number: int) -> None:
            for i in range(per_thread):
                s = (number * 31 + i) % series_count
                view.labels(f"region-{s % 16}", f"product-{s:07d}").add(12.5)
            ready.wait()
            done.wait()

        threads = [threading.Thread(target=record, args=(number,)) for number in range(thread_count)]
        for thread in threads:
            thread.start()
        ready.wait()
        opened.flush(60)
        peak = _peak_kib()
        done.set()
        for thread in threads:
            thread.join()
    return peak


def idle(thread_count: int) -> int:
    """Return the peak KiB of this process with so many threads that record nothing."""
    threading.stack_size(2**18)
    done = threading.Event()
    threads = [threading.Thread(target=done.wait) for _ in range(thread_count)]
    for thread in threads:
        thread.start()
    peak = _peak_kib()
    done.set()
    for thread in threads:
        thread.join()
    return peak


def _peak_kib() -> int:
    """Return this process' peak; `ru_maxrss` would include that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def _in_process(call: str) -> float:
    """Return the peak MB of a process that makes one call of this module."""
    script = f"from tests.bench.draining import fill, idle; print({call})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True)
    return int(msgspec.json.decode(done.stdout)) * 1024 / 1e6


def memory_rows(quick: bool) -> list[Row]:
    """Measure the peak memory of whole processes, the interpreter and the stacks of their threads included."""
    scale = 50 if quick else 1
    series, threads = _SERIES // scale, _THREADS // scale
    empty = Figure(_in_process("idle(8)"), "MB", "a process with as many threads that records nothing")
    crowd = Figure(_in_process(f"idle({threads})"), "MB", empty.what)
    filled = _in_process(f"fill({series}, 8, {series})")
    crowded = _in_process(f"fill(1_000, {threads}, 10)")
    return [
        at_most(f"{series:,} series, each from 8 threads", Figure(filled, "MB"), empty, 150),
        at_most_times(f"1,000 series from {threads:,} threads", Figure(crowded, "MB"), crowd, 1.5),
    ]
