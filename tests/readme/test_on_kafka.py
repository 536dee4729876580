"""The README's commands for Kafka, on a broker."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.broker.kafka import App
from tests.readme.test_readme import blocks, run

USE = """
printf 'path,ms\\n/,12\\n/cart,30\\n/,8\\n' | pipeline publish requests --to {kafka} --value ms --labels path -
printf 'path,ms\\n/cart,1\\n' | pipeline publish requests --to http://127.0.0.1:{server} --value ms --labels path -
until pipeline get requests --from http://127.0.0.1:{server} --by path 2>/dev/null | grep -q 31; do sleep 0.2; done
pipeline get requests --from http://127.0.0.1:{server} --by path
curl -sf http://127.0.0.1:{worker}/metrics | grep pipeline_commits_total
"""


@pytest.mark.timeout(120)
def test_the_commands_make_a_pipeline(app: App, tmp_path: Path) -> None:
    """Topics, a worker and a query server as the README starts them count what is published to Kafka and to the server."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        worker, server = one.getsockname()[1], other.getsockname()[1]
    (commands,) = blocks("bash")
    for shown, real in (("kafka://127.0.0.1:9092", app.url), ("8081", str(worker)), ("8080", str(server))):
        assert shown in commands
        commands = commands.replace(shown, real)
    ending = "trap 'kill $(jobs -p) && wait' EXIT\n"
    printed = run(["bash", "-ec", ending + commands + USE.format(kafka=app.url, worker=worker, server=server)], tmp_path)
    assert {"20", "31"} <= set(printed.split())
