"""`pipeline up`, `worker` and `serve`: run a service until a signal or a fatal error ends it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.cli import console
from pipeline.cli.agents import load_app
from pipeline.cli.bars import RestoreBars
from pipeline.config import Config
from pipeline.roles.service import (
    OnProgress,
    Service,
    embedded_service,
    gather_service,
    query_service,
    return_memory,
    worker_service,
)
from pipeline.roles.signals import stopping_on_signals


def run_up(config: Config, *, as_json: bool) -> int:
    """Run the embedded mode until SIGINT or SIGTERM; return the exit code."""
    return _run(lambda on_progress: embedded_service(config, on_progress), config, as_json=as_json)


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
    """Fold until SIGINT or SIGTERM; return the exit code. `agents` is MODULE:APP."""

    def make(on_progress: OnProgress) -> Service[Any]:
        app = load_app(agents) if agents else None
        return worker_service(
            config, url, partitions=partitions, name=name or "", static=static, agents=app, on_progress=on_progress
        )

    return _run(make, config, as_json=as_json)


def run_serve(config: Config, url: str, *, ingest: bool, partitions: Sequence[int] | None = None, as_json: bool) -> int:
    """Answer reads until SIGINT or SIGTERM; return the exit code."""

    def make(on_progress: OnProgress) -> Service[Any]:
        return query_service(config, url, ingest=ingest, partitions=partitions, on_progress=on_progress)

    return _run(make, config, as_json=as_json)


def run_gather(config: Config, urls: Sequence[str], *, as_json: bool) -> int:
    """Merge what other servers have until SIGINT or SIGTERM; return the exit code."""
    return _run(lambda on_progress: gather_service(config, urls, on_progress), config, as_json=as_json, has_data=False)


def _run(make: Callable[[OnProgress], Service[Any]], config: Config, *, as_json: bool, has_data: bool = True) -> int:
    os.umask(0o077)  # also for the files that RocksDB makes
    return_memory()
    bars = RestoreBars()
    service = make(bars)

    def announce(url: str) -> None:
        bars.close()
        count = service.role.status().partition_count
        if as_json:
            data = {"data": config.log.data} if has_data else {}
            console.print_json({"url": url, **data, "partition_count": count})
        else:
            where = f"data in {config.log.data}, " if has_data else ""
            console.show(f"ready at {url}  ({where}{count} partitions, Ctrl-C stops)")

    try:
        with stopping_on_signals(service.stop):
            code = service.run(announce)
    finally:
        bars.close()
    if service.fatal is not None:
        console.print_error(service.fatal)
    console.wait_if_restart_is_useless(code)
    if code != console.OK:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a thread that hangs in a disk's write would keep the interpreter from ending
    return code
