"""The docs' commands for Kafka, on a broker."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.broker.kafka import App, create_topics
from tests.docs.test_readme import blocks, run

COMMAND_S = 120
SHELL = ["timeout", str(COMMAND_S), "bash", "-ec"]
"""A shell that a time-out ends together with the workers and servers that it has started."""
ENDING = "trap 'kill $(jobs -p) && wait' EXIT\n"
USE = """
printf 'path,ms\\n/,12\\n/cart,30\\n/,8\\n' | pipeline publish requests --to {kafka} --value ms --labels path -
printf 'path,ms\\n/cart,1\\n' | pipeline publish requests --to http://127.0.0.1:{server} --value ms --labels path -
until pipeline get requests --from http://127.0.0.1:{server} --by path 2>/dev/null | grep -q 31; do sleep 0.2; done
pipeline get requests --from http://127.0.0.1:{server} --by path
curl -sf http://127.0.0.1:{worker}/metrics | grep pipeline_commits_total
"""


@pytest.mark.timeout(180)
def test_the_commands_make_a_pipeline(app: App, tmp_path: Path) -> None:
    """Topics, a worker and a query server as the docs start them count what is published to Kafka and to the server."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        worker, server = one.getsockname()[1], other.getsockname()[1]
    commands = _real(blocks("bash")[0], app, {"8081": worker, "8080": server})
    use = USE.format(kafka=app.url, worker=worker, server=server)
    printed = run([*SHELL, ENDING + commands + use], tmp_path, COMMAND_S + 10)
    assert {"20", "31"} <= set(printed.split())


@pytest.mark.long
@pytest.mark.timeout(180)
def test_workers_with_names_share_the_partitions(app: App, tmp_path: Path) -> None:
    """The documented commands start two workers, and the last one shows their partitions."""
    create_topics(app.bootstrap, app.app, 4)
    *workers, status = _real(blocks("bash")[1], app, {"8081": 0, "8082": 0}).splitlines()
    ready = f"until {status} --json 2> /dev/null > shown && grep -q w1 shown && grep -q w2 shown; do sleep 0.5; done\n"
    printed = run([*SHELL, "\n".join([ENDING, *workers, ready, status])], tmp_path, COMMAND_S + 10)
    assert {"w1", "w2"} <= set(printed.split())


def _real(commands: str, app: App, ports: Mapping[str, int]) -> str:
    for shown, real in {"kafka://127.0.0.1:9092": app.url, **{shown: str(port) for shown, port in ports.items()}}.items():
        assert shown in commands
        commands = commands.replace(shown, real)
    return commands
