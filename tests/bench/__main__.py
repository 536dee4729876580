"""Runs one benchmark in this process and prints its rows as JSON: what `pipeline bench` starts, one after the other.

python -m tests.bench            list of names
python -m tests.bench NAME [--quick]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from tests.bench import heartbeat, kafka, recording, serving, worker, workers
from tests.bench.measure import Row, machine

BENCHMARKS: Mapping[str, Callable[[bool], list[Row]]] = {
    "record": recording.record,
    "record-threads": recording.record_threads,
    "fold-unique": worker.fold_unique,
    "fold-repeated": worker.fold_repeated,
    "restore": worker.restore,
    "heartbeat": heartbeat.heartbeat,
    "point": serving.point,
    "group-by": serving.group_by,
    "memory": serving.memory,
}
"""By name; each takes whether to be quick, which proves that it runs and measures nothing."""

ON_KAFKA: Mapping[str, Callable[[bool], list[Row]]] = {
    "kafka-fold-unique": kafka.fold_unique,
    "kafka-fold-repeated": kafka.fold_repeated,
    "kafka-restore": kafka.restore,
    "kafka-latency": kafka.latency,
    "kafka-scaling": workers.scaling,
    "kafka-idle": workers.idle,
    "kafka-join": workers.join,
    "kafka-takeover": workers.takeover,
}
"""Those that start a broker."""


def main(arguments: list[str]) -> None:
    """Run the named benchmark, or list them all."""
    names = [argument for argument in arguments if not argument.startswith("--")]
    result: Any
    if names:
        result = [
            {**msgspec.to_builtins(row), "ratio": row.ratio}
            for row in {**BENCHMARKS, **ON_KAFKA}[names[0]]("--quick" in arguments)
        ]
    else:
        result = {"machine": machine(), "names": [*BENCHMARKS], "kafka_names": [*ON_KAFKA]}
    print(msgspec.json.encode(result).decode())


if __name__ == "__main__":
    main(sys.argv[1:])
