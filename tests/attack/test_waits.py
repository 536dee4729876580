"""Reads that wait for what never comes: they hold no thread, end with their clients, and keep no other read out."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack

from tests.attack.support import attacked, connect, request
from tests.support import UpProcess

COUNT = 300


def ask(up: UpProcess, path: str, number: int = 0) -> socket.socket:
    client = connect(up.port, address=f"127.0.0.{2 + number % 4}")
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    return client


def endless(up: UpProcess) -> str:
    """Return a read that waits: a publisher may know of a partition before the server does."""
    return f"/v1/views/bystander?after={topic_id_of(up)}~9-1&timeout_ms=60000"


def topic_id_of(up: UpProcess) -> str:
    return str(request(up.port, "GET", "/v1/status").json()["topic_id"])


def refused_waits(up: UpProcess) -> float:
    """Return the number of reads that made room for others."""
    text = request(up.port, "GET", "/metrics").body.decode()
    (line,) = [it for it in text.splitlines() if it.startswith('pipeline_reads_refused_total{limit="waits_max"}')]
    return float(line.rpartition(" ")[2])


def scan(up: UpProcess, number: int) -> None:
    """Ask for a scan that no answer is kept for."""
    began_s = time.monotonic()
    assert request(up.port, "GET", f"/v1/views/bystander?limit={1_000 + number}").status == 200
    assert time.monotonic() - began_s < 3.0


def test_waits_whose_clients_are_gone_end(up: UpProcess) -> None:
    """Waiting reads whose sockets are closed at once are forgotten at once: as many again push out none that still waits."""
    before, path = refused_waits(up), endless(up)
    with attacked(up) as bystander:
        for round_number in range(2):
            for client in [ask(up, path, number) for number in range(200)]:
                client.close()
            scan(up, round_number)
            time.sleep(0.2)
        assert refused_waits(up) == before
    assert not bystander.failures, bystander
    bystander.check(grown_bytes_max=100_000_000, rounds_min=2)


def test_waits_leave_room_for_scans_and_for_other_waits(up: UpProcess) -> None:
    """Beside more waiting reads than there may be, scans and reads that wait for a moment are served."""
    before, path = refused_waits(up), endless(up)
    with attacked(up) as bystander, ExitStack() as open_until_then:
        for number in range(COUNT):
            open_until_then.callback(ask(up, path, number).close)
        for number in range(10, 15):
            scan(up, number)
            time.sleep(0.1)
        assert refused_waits(up) > before
    assert not bystander.failures, bystander
    bystander.check(grown_bytes_max=100_000_000, rounds_min=2)


def test_a_token_of_the_future_is_refused(up: UpProcess) -> None:
    """A token beyond the end of the log is 400 at once, and not a wait for a minute."""
    topic_id = topic_id_of(up)
    with attacked(up) as bystander:
        began_s = time.monotonic()
        path = f"/v1/views/bystander?after={topic_id}~0-999999999&timeout_ms=60000"
        clients = [ask(up, path, number) for number in range(COUNT)]
        heads = [client.recv(100) for client in clients]
        for client in clients:
            client.close()
        assert time.monotonic() - began_s < 4.0
        scan(up, 20)
    assert {head.split(b"\r")[0] for head in heads} <= {b"HTTP/1.1 400 Bad Request", b"HTTP/1.1 503 Service Unavailable"}
    assert b"HTTP/1.1 400 Bad Request" in {head.split(b"\r")[0] for head in heads}
    bystander.check(grown_bytes_max=100_000_000)
