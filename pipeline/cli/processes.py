"""`pipeline worker --processes N`: runs several workers under a supervisor."""

from __future__ import annotations

import re
import socket
import sys

from pipeline.adapters.clock import SystemClock
from pipeline.cli import console
from pipeline.config import Config
from pipeline.errors import Invalid
from pipeline.roles.signals import stopping_on_signals
from pipeline.roles.supervisor import Supervisor, child_command

_PORT_MAX = 65_535


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
            console.show(f"{label} {what}")

    supervisor = Supervisor(
        [child_command(own, index, name=name, data=config.log.data, port=port) for index in range(count)],
        labels=[f"{name}-{index}" for index in range(count)],
        clock=SystemClock(),
        say=say,
    )
    with stopping_on_signals() as stop:
        code = supervisor.run(stop)
    return code if stop.is_set() else console.wait_if_restart_is_useless(code)
