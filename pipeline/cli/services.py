"""`pipeline up`, `worker` and `serve`: run a service until a signal or a fatal error ends it."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.adapters.clock import SystemClock
from pipeline.cli import console
from pipeline.cli.agents import load_app
from pipeline.cli.bars import RestoreBars
from pipeline.config import Config
from pipeline.errors import Invalid
from pipeline.roles.service import OnProgress, Service, embedded_service, query_service, return_memory, worker_service
from pipeline.roles.signals import stopping_on_signals
from pipeline.roles.supervisor import Supervisor, child_command

_PORT_MAX = 65_535


def parse_partitions(text: str | None) -> list[int] | None:
    """Return the numbers of `0,2,5-7`; None for None and for `all`."""
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
    app = load_app(agents) if agents else None

    def make(on_progress: OnProgress) -> Service[Any]:
        return worker_service(
            config, url, partitions=partitions, name=name or "", static=static, agents=app, on_progress=on_progress
        )

    return _run(make, config, as_json=as_json)


def run_serve(config: Config, url: str, *, ingest: bool, as_json: bool) -> int:
    """Answer reads until SIGINT or SIGTERM; return the exit code."""
    return _run(
        lambda on_progress: query_service(config, url, ingest=ingest, on_progress=on_progress), config, as_json=as_json
    )


def _run(make: Callable[[OnProgress], Service[Any]], config: Config, *, as_json: bool) -> int:
    return_memory()
    bars = RestoreBars()
    service = make(bars)

    def announce(url: str) -> None:
        bars.close()
        count = service.role.status().partition_count
        if as_json:
            console.print_json({"url": url, "data": config.log.data, "partition_count": count})
        else:
            print(f"ready at {url}  (data in {config.log.data}, {count} partitions, Ctrl-C stops)", flush=True)

    with stopping_on_signals(service.stop):
        code = service.run(announce)
    bars.close()
    if service.fatal is not None:
        console.print_error(service.fatal)
    console.wait_if_restart_is_useless(code)
    if code != console.OK:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a thread that hangs in a disk's write would keep the interpreter from ending
    return code


def run_processes(count: int, config: Config, *, name: str | None, as_json: bool) -> int:
    """Run `count` workers with this process' own command line until SIGINT or SIGTERM; return the exit code.

    Without a name they take the host's, so that they have the same names after a restart.
    """
    name = name or re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:90] or "worker"
    port = config.query.port
    if port and port + count - 1 > _PORT_MAX:
        raise Invalid(f"--processes {count}: ports {port} to {port + count - 1} are needed, and {_PORT_MAX} is the last")
    own = [sys.executable, *sys.orig_argv[1:]]

    def say(label: str, what: str) -> None:
        if as_json:
            console.print_json({"worker": label, "event": what})
        else:
            print(f"{label} {what}", flush=True)

    supervisor = Supervisor(
        [child_command(own, index, name=name, data=config.log.data, port=port) for index in range(count)],
        labels=[f"{name}-{index}" for index in range(count)],
        clock=SystemClock(),
        say=say,
    )
    with stopping_on_signals() as stop:
        code = supervisor.run(stop)
    return code if stop.is_set() else console.wait_if_restart_is_useless(code)
