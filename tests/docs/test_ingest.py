"""The docs' StatsD, against a server."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.docs.test_readme import blocks, run
from tests.support import UpProcess

ENDING = "trap 'kill $(jobs -p) 2> /dev/null && wait' EXIT\n"
LISTENS = "until (exec 3<> /dev/tcp/127.0.0.1/{port}) 2> /dev/null; do sleep 0.05; done\n"
READ = "until pipeline get checkout_orders --from {url} 2> /dev/null | grep eu; do sleep 0.1; done\n"


def test_it_counts_what_a_shell_sends(tmp_path: Path) -> None:
    """The documented commands start the server and send to it: a counter sampled at one in ten counts ten."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start, send = blocks("console")[0].strip().splitlines()
    with UpProcess(tmp_path / "data") as up:
        script = [ENDING, start, LISTENS.format(port=port), send, READ.format(url=up.url)]
        shown = "\n".join(script).replace("http://127.0.0.1:8080", up.url).replace("8125", str(port))
        printed = run(["bash", "-ec", shown], tmp_path)
    assert ["eu", "10"] in [line.split() for line in printed.splitlines()]
