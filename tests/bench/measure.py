"""Units and rows of every benchmark's report, and the machine."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""


class Figure(msgspec.Struct, frozen=True):
    """A measured number with its unit."""

    value: float
    unit: str
    what: str = ""


class Row(msgspec.Struct, frozen=True):
    """One line of the table: the measured number, a baseline of the same run, and whether the target is met."""

    name: str
    measured: Figure
    baseline: Figure
    target: str
    met: bool

    @property
    def ratio(self) -> float:
        """Measured over baseline."""
        return self.measured.value / self.baseline.value if self.baseline.value else float("inf")


def at_most(name: str, measured: Figure, baseline: Figure, most: float) -> Row:
    """Return a row whose measured number may be at most `most`."""
    return Row(name, measured, baseline, f"at most {most:,.0f} {measured.unit}", measured.value <= most)


def at_least(name: str, measured: Figure, baseline: Figure, least: float) -> Row:
    """Return a row whose measured number must be at least `least`."""
    return Row(name, measured, baseline, f"at least {least:,.0f} {measured.unit}", measured.value >= least)


def at_most_times(name: str, measured: Figure, baseline: Figure, times: float) -> Row:
    """Return a row whose measured number may be so many times the baseline's."""
    return Row(name, measured, baseline, f"at most {times:g} times", measured.value <= times * baseline.value)


def at_least_times(name: str, measured: Figure, baseline: Figure, times: float) -> Row:
    """Return a row whose measured number must be so many times the baseline's."""
    return Row(name, measured, baseline, f"at least {times:g} times", measured.value >= times * baseline.value)


def cheaper(name: str, measured: Figure, baseline: Figure, times: float) -> Row:
    """Return a row whose baseline must be so many times the measured number."""
    return Row(name, measured, baseline, f"{times:g} times cheaper", times * measured.value <= baseline.value)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of this process, all its threads and the kernel's work for them, that `work` takes."""
    gc.collect()
    before = time.process_time()
    work()
    return time.process_time() - before


def machine() -> dict[str, str]:
    """Return a description of this machine."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()}",
    }
