"""Tables and a plot of what was measured: medians of the rounds, and ratios to the first tool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import msgspec

from tests.bench.peers.latency import COMMIT_MS, FLUSH_MS
from tests.bench.peers.measurement import Measured


@dataclass
class Report:
    """Everything that one run found. The keys are tools' names, and works' in `measured`."""

    date: str
    command: str
    machine: dict[str, str]
    quick: bool
    says: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    measured: dict[str, dict[str, list[Measured]]] = field(default_factory=dict)
    latency_ms: dict[str, list[float]] = field(default_factory=dict)


def mid(runs: Iterable[Measured], of: Callable[[Measured], float]) -> float:
    """Return the median of a figure over the rounds."""
    return median(of(run) for run in runs)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2g}" if base > 0 and value / base < 100 else f"{value / base:.0f}" if base > 0 else "-"


def _work(name: str, by_tool: dict[str, list[Measured]]) -> list[list[str]]:
    base = mid(next(iter(by_tool.values())), lambda it: it.client_us)
    rows = []
    for tool, runs in by_tool.items():
        client = mid(runs, lambda it: it.client_us)
        us = [mid(runs, lambda it, part=part: getattr(it, part) / it.deltas * 1e6) for part in _PARTS]
        mb = [mid(runs, lambda it, part=part: getattr(it, part)) for part in ("publisher_mb", "worker_mb")]
        rate = mid(runs, lambda it: it.deltas / it.wall_s)
        deltas = f"{runs[0].deltas:,}"
        cells = [
            f"{client:.2f}",
            _ratio(client, base),
            *[f"{it:.2f}" for it in us],
            *[f"{it:.0f}" for it in mb],
            f"{rate:,.0f}",
        ]
        rows.append([name, tool, deltas, *cells])
    return rows


_TOLD_S = 0.2
"""CPU of a restore above which it stands out from the differences between two starts of a process."""
_PARTS = ("publisher_s", "worker_s", "broker_s")


def _restores(found: Report) -> list[str]:
    rows = []
    for by_tool in found.measured.values():
        rates = {tool: _rate(runs) for tool, runs in by_tool.items() if runs[0].restored}
        for tool, rate in rates.items():
            runs = by_tool[tool]
            seconds = mid(runs, lambda it: it.restore_wall_s)
            mb = mid(runs, lambda it: it.restore_mb)
            ratio = _ratio(rate, next(iter(rates.values())))
            cells = [f"{rate:,.0f}", ratio] if mid(runs, lambda it: it.restore_cpu_s) > _TOLD_S else ["too few to tell", "-"]
            rows.append([tool, f"{runs[0].restored:,}", *cells, f"{seconds:.1f}", f"{mb:.0f}"])
    head = ["restore from the changelog", "entries", "entries/CPU s", "ratio", "s from start to ready", "peak MB"]
    return ["", *table(head, rows)] if rows else []


def _rate(runs: Sequence[Measured]) -> float:
    return mid(runs, lambda it: it.restored / max(it.restore_cpu_s, 0.01))


def _latencies(found: Report) -> list[str]:
    rows = []
    for tool, took in found.latency_ms.items():
        p99 = took[min(len(took) - 1, len(took) * 99 // 100)]
        rows.append([tool, f"{median(took):.1f}", f"{p99:.1f}", str(len(took))])
    head = [f"delta to readable, flush {FLUSH_MS} ms, commit {COMMIT_MS} ms", "p50 ms", "p99 ms", "deltas"]
    return ["", *table(head, rows)] if rows else []


def text(found: Report) -> str:
    """Return the whole report as Markdown."""
    shape = f"{found.machine['cores']} cores, {found.machine['cpu']}, {found.machine['python']}, {found.machine['system']}"
    lines = [f"{found.date}, `{found.command}`; {shape}.", ""]
    if found.quick:
        lines[:0] = ["A quick run: the figures mean nothing.", ""]
    head = ["work", "tool", "deltas", "client CPU us a delta", "ratio", "publisher", "worker", "broker, not counted"]
    head += ["publisher peak MB", "worker peak MB", "deltas/s"]
    rows = [row for name, by_tool in found.measured.items() for row in _work(name, by_tool)]
    lines += [*table(head, rows), *_restores(found), *_latencies(found), ""]
    lines += [f"- {tool}: {says}." for tool, says in found.says.items()]
    lines += [f"- {tool}: skipped: {reason}" for tool, reason in found.skipped.items()]
    lines += [f"- {tool}, {work}: FAILED: {reason}" for (tool, work), reason in found.failed.items()]
    return "\n".join(lines)


def save(found: Report, written: str, folder: Path) -> None:
    """Write tables, figures and a plot into a folder."""
    from tests.bench.plots import columns

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peers.md").write_text(written + "\n")
    measured, latency = msgspec.to_builtins(found.measured), found.latency_ms
    figures = {"date": found.date, "command": found.command, "machine": found.machine, "measured": measured}
    (folder / "peers.json").write_bytes(msgspec.json.encode({**figures, "latency_ms": latency}))
    works = list(found.measured)
    by_tool = {
        tool: [
            mid(found.measured[work][tool], lambda it: it.client_us) if tool in found.measured[work] else None
            for work in works
        ]
        for tool in found.says
    }
    if works:
        columns(folder / "peers.svg", "CPU of all client processes for one delta", works, by_tool, "us, logarithmic")
