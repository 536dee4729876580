"""Runs one benchmark in this process and prints its rows as JSON: what `pipeline bench` starts, one after the other.

python -m tests.bench            list of names
python -m tests.bench NAME [--quick] [--plots=FOLDER]
python -m tests.bench peers --help     this pipeline beside other tools, as tables
python -m tests.bench growth --help    cost over series and partitions, as a table
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from tests.bench import (
    commits,
    heartbeat,
    kafka,
    keyed,
    polling,
    publisher,
    ranges,
    serving,
    streams,
    table,
    windows,
    worker,
    workers,
)
from tests.bench.measure import Row, machine

BENCHMARKS: Mapping[str, Callable[[bool], list[Row]]] = {
    "publisher": publisher.publisher,
    "table": table.table,
    "fold-unique": worker.fold_unique,
    "fold-repeated": worker.fold_repeated,
    "windows": windows.windows,
    "restore": worker.restore,
    "heartbeat": heartbeat.heartbeat,
    "point": serving.point,
    "group-by": serving.group_by,
    "query": ranges.query,
    "polling": polling.polling,
    "streams": streams.streams,
    "memory": serving.memory,
}
"""Benchmarks by name; each takes whether to be quick, which proves that it runs and measures nothing."""

ON_KAFKA: Mapping[str, Callable[[bool], list[Row]]] = {
    "kafka-publish": keyed.publish_keyed,
    "kafka-fold-unique": kafka.fold_unique,
    "kafka-fold-repeated": kafka.fold_repeated,
    "kafka-commit": commits.commit,
    "kafka-restore": kafka.restore,
    "kafka-latency": kafka.latency,
    "kafka-scaling": workers.scaling,
    "kafka-spread": workers.spread,
    "kafka-idle": workers.idle,
    "kafka-join": workers.join,
    "kafka-takeover": workers.takeover,
}
"""Benchmarks that start a broker."""

WITH_PLOTS: Mapping[str, Callable[[bool, Path], list[Row]]] = {"publisher": publisher.publisher}
"""Benchmarks that can draw their results into a folder."""


def run(name: str, *, quick: bool, plots: Path | None = None) -> list[Row]:
    """Return the rows of one benchmark, drawn into `plots` if it can be drawn."""
    if plots is not None and name in WITH_PLOTS:
        return WITH_PLOTS[name](quick, plots)
    return {**BENCHMARKS, **ON_KAFKA}[name](quick)


def main(arguments: list[str]) -> None:
    """Run the named benchmark, or list them all."""
    if arguments[:1] and arguments[0] in ("peers", "growth"):
        from tests.bench import growth
        from tests.bench.peers import run as peers

        sys.exit({"peers": peers, "growth": growth}[arguments[0]].main(arguments[1:]))
    names = [argument for argument in arguments if not argument.startswith("--")]
    folders = [Path(argument.removeprefix("--plots=")) for argument in arguments if argument.startswith("--plots=")]
    result: Any
    if names:
        rows = run(names[0], quick="--quick" in arguments, plots=folders[0] if folders else None)
        result = [{**msgspec.to_builtins(row), "ratio": row.ratio} for row in rows]
    else:
        result = {"machine": machine(), "names": [*BENCHMARKS], "kafka_names": [*ON_KAFKA]}
    print(msgspec.json.encode(result).decode())


if __name__ == "__main__":
    main(sys.argv[1:])
