"""`pipeline up`: log, worker and query API in one process."""

from __future__ import annotations

from functools import partial

from pipeline.cli.served import Hooks, Served, query_app, return_memory, run_served
from pipeline.config import Config
from pipeline.engine import Engine


class Up(Served[Engine]):
    """The whole pipeline with its HTTP server."""

    def __init__(self, config: Config) -> None:
        def make(hooks: Hooks) -> Engine:
            return Engine(
                config.log,
                worker_settings=config.worker,
                query_settings=config.query,
                publisher_settings=config.publisher,
                metrics=hooks.metrics,
                on_fatal=hooks.on_fatal,
                on_progress=hooks.on_progress,
            )

        super().__init__(config.query, make, partial(query_app, config.query), accept_loss=config.worker.accept_loss)


def run_up(config: Config, *, as_json: bool) -> int:
    """Run until SIGINT or SIGTERM; the exit code."""
    return_memory()
    return run_served(Up(config), data=config.log.data, as_json=as_json)
