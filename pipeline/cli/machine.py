"""Activity of this machine as deltas: the input of `pipeline demo`.

A counter of the system is recorded as its growth between two samples. The first sample records nothing, and a counter that
was reset has grown by its present value, so no delta is negative.

Values are ints, texts, bools, and floats that are multiples of 1/64. Such floats add up without rounding, in any order, so
that answers must equal the demo's own count exactly.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil

from pipeline.core.record import Definition
from pipeline.ports import Clock

VIEWS: tuple[Definition, ...] = (
    Definition("cpu_ms", "sum", ("process",)),
    Definition("busiest", "topk"),
    Definition("processes_seen", "distinct"),
    Definition("cpu_percent", "max", ("cpu",)),
    Definition("network_bytes", "sum", ("interface", "direction")),
    Definition("disk_bytes", "sum", ("disk", "direction")),
    Definition("switches", "sum", ("kind",)),
    Definition("memory_available_bytes", "min"),
    Definition("load", "mean"),
    Definition("samples", "sum"),
    Definition("samples_by_second", "sum", window_s=1),
    Definition("sample_us", "histogram", ("source",)),
    Definition("machine", "last", ("fact",)),
)
"""Views of the demo. The threads of all samplers record to the one series of `samples`, and to that of each second.

`busiest` counts CPU ms by name of the process, as `cpu_ms` does.
"""
_ITEM_MAX = 64
"""Characters of an item of `busiest`: at most 256 bytes, as an item may have."""

_SYS_BLOCK = Path("/sys/block")


class Sink(Protocol):
    """Receiver of samples."""

    def record(self, view: str, value: Any, *labels: str) -> None:
        """Record a delta of a view of `VIEWS`, with label values in the order of its labels; of a topk, item and count."""
        ...


class NoCounters(Exception):
    """Raised if this machine has no such counters, or a sandbox hides them."""


class Sampler(Protocol):
    """A group of counters, sampled from one thread."""

    name: str

    def sample(self, sink: Sink) -> None:
        """Record the growth since the last sample. Raises `NoCounters`, and what psutil raises."""
        ...


class Growth:
    """Growth of counters since the last sample."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, ...], int] = {}

    def of(self, values: Mapping[tuple[str, ...], int]) -> list[tuple[tuple[str, ...], int]]:
        """Return the counters that have grown, and by how much; counters that are missing in `values` are forgotten."""
        seen, self._seen = self._seen, dict(values)
        grown = []
        for key, value in values.items():
            before = seen.get(key, value)
            delta = value - before if value >= before else value
            if delta > 0:
                grown.append((key, delta))
        return grown


def printable(text: str) -> str:
    """Return a foreign name as valid Unicode without control characters, for a label value and a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)[:200] or "?"


class Processes:
    """CPU ms by name of the process, and how many there were. What a process did after the last sample of it is not seen."""

    name = "processes"

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], int] | None = None

    def sample(self, sink: Sink) -> None:
        seen: dict[tuple[int, float], int] = {}
        for process in psutil.process_iter(["name", "create_time", "cpu_times"]):
            times = process.info["cpu_times"]
            if times is None:
                continue  # no permission to read them
            key = process.pid, process.info["create_time"] or 0.0  # pids are used again
            if self._seen is None or key not in self._seen:
                sink.record("processes_seen", f"{key[0]} since {key[1]}")
            total_ms = round(1000 * (times.user + times.system))
            # A process that the last sample did not show has started since: all of its time is new.
            before_ms = total_ms if self._seen is None else self._seen.get(key, 0)
            if total_ms > before_ms:
                name = printable(process.info["name"] or "?")
                sink.record("cpu_ms", total_ms - before_ms, name)
                sink.record("busiest", (name[:_ITEM_MAX], total_ms - before_ms))
            seen[key] = max(total_ms, before_ms)
        if not seen:
            raise NoCounters("no CPU time of processes")
        self._seen = seen


class Cpus:
    """Use of each CPU in whole percent; the view keeps the maximum."""

    name = "cpus"

    def __init__(self) -> None:
        self._first = True

    def sample(self, sink: Sink) -> None:
        percents = psutil.cpu_percent(percpu=True)  # since this thread's last call
        if not percents:
            raise NoCounters("no use of CPUs")
        if not self._first:
            for cpu, percent in enumerate(percents):
                sink.record("cpu_percent", round(percent), str(cpu))
        self._first = False


class Counters:
    """The growth of counters, each with the labels of its series."""

    def __init__(self, name: str, view: str, read: Callable[[], Mapping[tuple[str, ...], int]]) -> None:
        self.name = name
        self._view = view
        self._read = read
        self._growth = Growth()

    def sample(self, sink: Sink) -> None:
        values = self._read()
        if not values:
            raise NoCounters(f"no counters of {self.name}")
        for labels, delta in self._growth.of(values):
            sink.record(self._view, delta, *map(printable, labels))


def read_network() -> dict[tuple[str, ...], int]:
    """Return bytes by interface and direction."""
    counters = psutil.net_io_counters(pernic=True, nowrap=False) or {}
    received = {(name, "received"): it.bytes_recv for name, it in counters.items()}
    return received | {(name, "sent"): it.bytes_sent for name, it in counters.items()}


def read_disks() -> dict[tuple[str, ...], int]:
    """Return bytes by disk and direction."""
    counters = psutil.disk_io_counters(perdisk=True, nowrap=False) or {}
    # Linux lists partitions beside their disks, which would count each byte twice.
    disks = {n: c for n, c in counters.items() if not _SYS_BLOCK.is_dir() or (_SYS_BLOCK / n).exists()}
    read = {(name, "read"): it.read_bytes for name, it in disks.items()}
    return read | {(name, "written"): it.write_bytes for name, it in disks.items()}


def read_switches() -> dict[tuple[str, ...], int]:
    """Return context switches and interrupts of the whole machine, by kind; none where a sandbox hides them as zeros."""
    it = psutil.cpu_stats()
    counts: dict[tuple[str, ...], int] = {
        ("context",): it.ctx_switches,
        ("interrupt",): it.interrupts,
        ("soft_interrupt",): it.soft_interrupts,
    }
    return counts if any(counts.values()) else {}


class Memory:
    """Available memory in bytes; the view keeps the minimum."""

    name = "memory"

    def sample(self, sink: Sink) -> None:
        sink.record("memory_available_bytes", int(psutil.virtual_memory().available))


class HostInfo:
    """Load, and properties of the machine: texts, numbers and a bool."""

    name = "facts"

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def sample(self, sink: Sink) -> None:
        sink.record("machine", printable(platform.node()), "hostname")
        sink.record("machine", printable(f"{platform.system()} {platform.release()}"), "system")
        cpu_count = os.cpu_count() or 1
        sink.record("machine", cpu_count, "cpu_count")
        load = psutil.getloadavg()[0]
        sink.record("load", round(load * 64) / 64)
        sink.record("machine", load > cpu_count, "overloaded")
        up_s = max(0, self._clock.now_ms() // 1000 - int(psutil.boot_time()))
        sink.record(
            "machine", f"{up_s // 86_400} d {up_s // 3600 % 24:02} h {up_s // 60 % 60:02} min {up_s % 60:02} s", "uptime"
        )


def samplers(clock: Clock) -> list[Sampler]:
    """Return all samplers, one for each thread that records."""
    counters = [
        Counters("network", "network_bytes", read_network),
        Counters("disks", "disk_bytes", read_disks),
        Counters("switches", "switches", read_switches),
    ]
    return [Processes(), Cpus(), *counters, Memory(), HostInfo(clock)]
