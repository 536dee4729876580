"""`pipeline worker` and `pipeline serve`: the two roles on Kafka."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import partial
from typing import Any

from pipeline.adapters.prometheus import PrometheusMetrics
from pipeline.cli.agents import load_app
from pipeline.cli.served import Hooks, Served, query_app, return_memory, run_served
from pipeline.cluster import ClusterServer, ClusterWorker
from pipeline.config import Config
from pipeline.errors import Invalid
from pipeline.query.api import create_operations_app


def parse_partitions(text: str | None) -> list[int] | None:
    """`0,2,5-7` as numbers; None, and `all`, mean all there are."""
    if text is None or text.strip() == "all":
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 20:
            raise Invalid(f"--partitions {text:.100}: numbers and ranges are needed, such as 0,2,5-7, or all")
        numbers += range(int(first), min(int(last or first), int(first) + 100_000) + 1)
    if not numbers:
        raise Invalid(f"--partitions {text:.100}: no partition is in it")
    return numbers


def run_worker(
    config: Config,
    url: str,
    *,
    partitions: Sequence[int] | None,
    name: str | None,
    static: bool,
    agents: str = "",
    as_json: bool,
) -> int:
    """Fold until SIGINT or SIGTERM; the exit code. `agents` is MODULE:APP."""
    return_memory()
    app = load_app(agents) if agents else None

    def make(hooks: Hooks) -> ClusterWorker:
        return ClusterWorker(
            url,
            config.log,
            kafka_settings=config.kafka,
            worker_settings=config.worker,
            partitions=partitions,
            name=name or "",
            static=static,
            agents=app,
            publisher_settings=config.publisher,
            metrics=hooks.metrics,
            on_fatal=hooks.on_fatal,
            on_progress=hooks.on_progress,
        )

    def make_app(worker: ClusterWorker, metrics: PrometheusMetrics) -> Any:
        return create_operations_app(config.query, metrics, worker.clock, worker.status, lambda: worker.ready)

    served = Served(config.query, make, make_app, accept_loss=config.worker.accept_loss)
    # Where others ask for its status: everybody's address is nobody's.
    wildcard = config.query.host in ("0.0.0.0", "::")
    served.role.url = f"http://{socket.gethostname()}:{served.url.rpartition(':')[2]}" if wildcard else served.url
    return run_served(served, data=config.log.data, as_json=as_json)


def run_serve(config: Config, url: str, *, ingest: bool, as_json: bool) -> int:
    """Answer until SIGINT or SIGTERM; the exit code."""
    return_memory()

    def make(hooks: Hooks) -> ClusterServer:
        return ClusterServer(
            url,
            config.log,
            kafka_settings=config.kafka,
            worker_settings=config.worker,
            query_settings=config.query,
            publisher_settings=config.publisher,
            ingest=ingest,
            metrics=hooks.metrics,
            on_fatal=hooks.on_fatal,
            on_progress=hooks.on_progress,
        )

    served = Served(config.query, make, partial(query_app, config.query), accept_loss=config.worker.accept_loss)
    return run_served(served, data=config.log.data, as_json=as_json)
