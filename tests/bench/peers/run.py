"""Benchmark of this pipeline beside other tools that keep totals of a stream, on one real broker.

Each tool in turn gets the same deltas on as many partitions of the same broker, commits at the same interval, and keeps its
totals in a store with a changelog. CPU is that of the publisher's and the worker's process, from the first delta to the
commit of the last, after a warm-up of a tenth as many; the broker's is apart. Every total is read from the changelog and
compared.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NoReturn

from tests.bench.children import Failed
from tests.bench.measure import machine
from tests.bench.peers import report
from tests.bench.peers.latency import measure_latency
from tests.bench.peers.measurement import Bench, Measured, Options
from tests.bench.peers.tools import TOOLS, Tool
from tests.bench.peers.work import Work
from tests.broker.jars import Missing, cache
from tests.broker.kafka import Broker


def numbers(text: str) -> list[int]:
    """Return whole numbers that are separated by commas."""
    return [int(it) for it in text.split(",") if it]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m tests.bench peers", description=__doc__, allow_abbrev=False)
    add = made.add_argument
    add("--deltas", type=int, default=2_000_000, help="deltas on each of --series (%(default)s)")
    add("--series", type=numbers, default=[100, 1_000, 10_000, 100_000], help="numbers of series (100,1000,10000,100000)")
    add("--once", type=int, default=1_000_000, help="series that come once each, and are restored; 0: none (%(default)s)")
    add(
        "--slow",
        type=int,
        default=200_000,
        help="the most deltas for Quix Streams, and ten times those for Faust (%(default)s)",
    )
    add("--rounds", type=int, default=3, help="rounds, of which medians are printed (%(default)s)")
    add("--partitions", type=int, default=4, help="partitions of each topic (%(default)s)")
    add("--commit-ms", type=int, default=100, help="commit interval of every worker (%(default)s)")
    add("--flush-ms", type=int, default=100, help="time for which every publisher gathers deltas (%(default)s)")
    add("--probes", type=int, default=200, help="deltas for the latency; 0: none (%(default)s)")
    add("--tools", default="", help="only these, with commas, by the beginning of their names")
    add("--out", type=Path, help="folder for peers.md, peers.json and peers.svg")
    add("--cache", type=Path, default=cache().parent / "peers", help="where the peers are installed (%(default)s)")
    add("--quick", action="store_true", help="smoke run of one round with few deltas; its figures mean nothing")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; print tables to standard output and progress to standard error. 1 if a tool failed."""
    given = parser().parse_args(arguments)
    if given.quick:
        given.deltas, given.once, given.series, given.rounds, given.slow = 5_000, 2_000, given.series[:1], 1, 1_000
        given.probes = min(given.probes, 5)
    works = [Work(min(count, given.deltas), given.deltas) for count in given.series]
    if given.once:
        works.append(Work(given.once, given.once, once=True))
    options = Options(given.partitions, given.commit_ms, given.flush_ms, given.probes, given.cache)
    found = report.Report(
        datetime.now(UTC).date().isoformat(),
        f"python -m tests.bench peers {' '.join(arguments)}".strip(),
        machine(),
        given.quick,
    )
    try:
        _run(given, works, options, found)
    finally:  # after Ctrl-C, too, what there is
        text = report.text(found)
        print(text)
        if given.out is not None:
            report.save(found, text, given.out)
    return 1 if found.failed else 0


def _run(given: argparse.Namespace, works: Sequence[Work], options: Options, found: report.Report) -> None:
    with ending_in_order(), TemporaryDirectory(prefix="pipeline-peers-", ignore_cleanup_errors=True) as folder:
        tools = _installed(given.tools, given.cache, found)
        with Broker(Path(folder) / "kafka") as broker:
            bench = Bench(broker, Path(folder), options)
            for number in range(given.rounds):
                for work in works:
                    for tool in tools:
                        _measure(bench, tool, work, given.slow, number, found)
            for tool in tools if given.probes else ():
                _latency(bench, tool, found)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Let SIGTERM end the benchmark as Ctrl-C does, so that every process and file goes."""

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, end))
        yield


def _installed(names: str, folder: Path, found: report.Report) -> list[Tool]:
    """Return the tools that are there; what is absent is noted with the reason."""
    wanted = [name.strip().lower() for name in names.split(",") if name.strip()]
    tools = []
    for tool in TOOLS:
        if wanted and not any(tool.name.lower().startswith(name) for name in wanted):
            continue
        say(f"{tool.name}: looking whether it is installed")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            tool.install(folder)
        except Missing as error:
            found.skipped[tool.name] = str(error)
            say(f"{tool.name}: skipped: {error}")
            continue
        found.says[tool.name] = tool.says
        tools.append(tool)
    return tools


def _measure(bench: Bench, tool: Tool, work: Work, slow: int, number: int, found: report.Report) -> None:
    if (tool.name, work.name) in found.failed:
        return
    given = work
    if tool.slow and work.delta_count > slow // tool.slow:
        most = slow // tool.slow
        given = Work(min(work.series_count, most), most, work.once)
    say(f"round {number + 1}, {work.name}: {tool.name}, {given.delta_count:,} deltas")
    try:
        result = bench.measure(tool, given, restore=work.once)
    except Failed as error:
        found.failed[tool.name, work.name] = str(error)
        say(f"FAILED: {error}")
        return
    found.measured.setdefault(work.name, {}).setdefault(tool.name, []).append(result)
    say(f"  {_told(result)}")


def _told(it: Measured) -> str:
    parts = f"publisher {it.publisher_s / it.deltas * 1e6:.2f}, worker {it.worker_s / it.deltas * 1e6:.2f}"
    restored = f"; restored {it.restored:,} in {it.restore_cpu_s:.2f} s CPU" if it.restored else ""
    return f"{it.client_us:.2f} us CPU a delta ({parts}), {it.wall_s:.1f} s, totals exact{restored}"


def _latency(bench: Bench, tool: Tool, found: report.Report) -> None:
    say(f"latency: {tool.name}")
    try:
        took = measure_latency(bench, tool)
    except Failed as error:
        found.failed[tool.name, "latency"] = str(error)
        say(f"FAILED: {error}")
        return
    found.latency_ms[tool.name] = took
    say(f"  median {median(took):.1f} ms")
