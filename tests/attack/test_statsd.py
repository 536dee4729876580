"""A StatsD sender that takes all it can get: views, series, connections. Others are counted, and memory stays bounded."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from pipeline import Reader
from tests.cli.test_ingest import ingesting
from tests.support import LONG, UpProcess, wait_until

NAMES = 100_000 if LONG else 5_000
LIMITS = {"ingest_views_max": 200, "ingest_series_max": 2_000, "ingest_connections_max": 50, "ingest_idle_timeout_ms": 500}
GROWTH_MAX = 150_000_000


def send(address: tuple[str, int], sender: str, text: str) -> None:
    """Send from an address over TCP, as soon as there is room: a connection too many is closed before it is read."""

    def is_sent() -> bool:
        with socket.create_connection(address, 30, (sender, 0)) as sock:
            sock.settimeout(0.1)
            try:
                sock.recv(1)
            except TimeoutError:
                sock.settimeout(30)
                sock.sendall(text.encode())
                return True
            except ConnectionError:
                pass
        return False

    wait_until(is_sent, "a connection")


@pytest.mark.timeout(120)
def test_a_sender_that_takes_everything(tmp_path: Path) -> None:
    """One address makes views, series and idle connections without end; the counters of another one are right meanwhile."""
    limits = [word for name, most in LIMITS.items() for word in ("--set", f"{name}={most}")]
    with (
        UpProcess(tmp_path / "data") as server,
        ingesting(tmp_path, "--to", server.url, *limits) as ingest,
        ExitStack() as held,
    ):
        process = psutil.Process(ingest.program.process.pid)
        before = process.memory_info().rss
        for _ in range(60):
            held.enter_context(socket.create_connection(ingest.address, 30))
        lines = [f"name{n}:1|c\nbig:1|c|#n:{n}\nt{n}:1|ms|@0.001\n" for n in range(NAMES)]
        send(ingest.address, "127.0.0.1", "".join(lines))
        for part in range(10):
            send(ingest.address, "127.0.0.2", f"good.jobs:1|c|#n:{part}\n" * 50)
        assert process.memory_info().rss - before < GROWTH_MAX
        report = ingest.end()
        with Reader(server.url) as reader:
            found = reader.get("good_jobs", by=[], after=report["token"], timeout_ms=20_000)
    assert found.value() == 10 * 50
    assert report["left_out"]["sender_share"] > 100
    assert report["left_out"]["idle"] > 0
