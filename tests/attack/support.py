"""A real `pipeline up` under attack, and a bystander that is served meanwhile: its answers must be right and in time.

    with attacked(up) as bystander:
        ...  # the attack: bounded in count and time
    bystander.check(grown_bytes_max=100_000_000)

Attacks come from 127.0.0.1, and so does the bystander unless it is given another address of 127.0.0.0/8.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.preloaded import PROGRAM
from tests.support import UpProcess

LOOPBACK = "127.0.0.1"
HEALTH_S_MAX = 1.0
"""Longest time that `/healthz` and `/metrics` may take under any attack."""
_TIMEOUT_S = 5.0
_END_S = 30.0
"""Time after an attack in which what the bystander has begun must succeed."""
_VIEW = "bystander"


def up_process(
    data: Path, *arguments: str, descriptors: int | None = None, env: Mapping[str, str] | None = None
) -> UpProcess:
    """Return a `pipeline up` that is not started yet; with `descriptors`, as under `ulimit -n` (soft and hard limit)."""
    program = PROGRAM
    if descriptors is not None:
        limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))"
        program = [sys.executable, "-c", f"{limit}; from pipeline.cli import main; main()"]
    return UpProcess(data, *arguments, env=env, program=program)


@dataclass
class Reply:
    """Response to one request on a connection of its own."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the decoded body."""
        return json.loads(self.body)


def request(
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    address: str = LOOPBACK,
    timeout_s: float = _TIMEOUT_S,
) -> Reply:
    """Send one request on a connection of its own from `address`. Raises `OSError` or `HTTPException` without a response."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=timeout_s, source_address=(address, 0))
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
    finally:
        connection.close()


def connect(port: int, *, address: str = LOOPBACK, timeout_s: float = _TIMEOUT_S, receive_bytes: int = 0) -> socket.socket:
    """Return a connected socket; `receive_bytes` makes its receive buffer small, for clients that read slowly."""
    client = socket.socket()
    if receive_bytes:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(timeout_s)
    try:
        client.bind((address, 0))
        client.connect((LOOPBACK, port))
    except BaseException:
        client.close()
        raise
    return client


def flood(client: socket.socket, part: bytes, bytes_max: int, seconds_max: float = 10.0) -> int:
    """Send `part` again and again; return the number of bytes that the server's system took until it was cut off or full."""
    sent, ends_s = 0, time.monotonic() + seconds_max
    client.settimeout(1.0)
    with suppress(OSError):
        while sent < bytes_max and time.monotonic() < ends_s:
            sent += client.send(part)
    return sent


def read_to_end(client: socket.socket, timeout_s: float = _TIMEOUT_S) -> bytes | None:
    """Return everything until the server closes the connection; None if it is still open after `timeout_s`."""
    parts: list[bytes] = []
    ends_s = time.monotonic() + timeout_s
    while True:
        client.settimeout(max(0.01, ends_s - time.monotonic()))
        try:
            part = client.recv(1_000_000)
        except TimeoutError:
            return None
        except ConnectionError:
            return b"".join(parts)
        if not part:
            return b"".join(parts)
        parts.append(part)


def rss_bytes(pid: int, name: str = "VmRSS") -> int:
    """Return a figure of /proc/PID/status; `VmHWM` is the peak since `attacked` began."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name} of process {pid}")


@dataclass
class Bystander:
    """A client during an attack: it writes, reads its own writes, asks for health and metrics, and notes what it sees."""

    port: int
    pid: int
    address: str
    headers: Mapping[str, str]
    health_s: list[float] = field(default_factory=list)
    """Times of `/healthz` and `/metrics`, each on a fresh connection, less the time in which the server's loop was ready to
    run and other processes had the cores; infinite without a 200.
    """
    round_s: list[float] = field(default_factory=list)
    """Times from the begin of a write to the end of the read that has it."""
    failures: list[str] = field(default_factory=list)
    """Requests that were refused or had no answer: no harm by themselves, for they can be repeated."""
    wrong: list[str] = field(default_factory=list)
    """Answers that were not what was written."""
    grown_bytes: int = 0
    """Peak of the server's memory during the attack, less what it had before."""
    written: int = 0
    """Writes of 1 that were acknowledged."""

    def check(self, *, grown_bytes_max: int, health_s_max: float = HEALTH_S_MAX, rounds_min: int = 1) -> None:
        """Fail if the attack did harm: a wrong answer, late health, memory beyond a bound, or too few rounds."""
        print(self)  # `pytest -rP` shows it
        assert not self.wrong, self
        assert self.health_s, self
        assert max(self.health_s) < health_s_max, self
        assert self.grown_bytes <= grown_bytes_max, self
        assert len(self.round_s) >= rounds_min, self

    def __str__(self) -> str:
        rounds = sorted(self.round_s) or [float("inf")]
        return (
            f"health: {len(self.health_s)}, longest {max(self.health_s, default=float('inf')):.3f} s; rounds: "
            f"{len(self.round_s)}, median {rounds[len(rounds) // 2]:.3f} s, longest {rounds[-1]:.3f} s; memory +"
            f"{self.grown_bytes / 1e6:.0f} MB; failures: {len(self.failures)} {self.failures[:3]}; wrong: {self.wrong[:3]}"
        )

    __repr__ = __str__

    def ask_health(self, number: int) -> None:
        """Time one request for health, or each fifth time for metrics."""
        path = "/healthz" if number % 5 else "/metrics"
        began_s, starved_s = time.monotonic(), self._starved_s()
        try:
            status = request(self.port, "GET", path, headers=self.headers, address=self.address).status
        except (OSError, http.client.HTTPException) as error:
            self.failures.append(f"{path}: {error!r}")
            self.health_s.append(float("inf"))
        else:
            took_s = time.monotonic() - began_s - (self._starved_s() - starved_s)
            if status != 200:
                self.failures.append(f"{path}: {status}")
            self.health_s.append(took_s if status == 200 else float("inf"))

    def _starved_s(self) -> float:
        """Return how long the server's loop, on its main thread, was ready to run and had no core."""
        try:
            return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9
        except FileNotFoundError:
            return 0.0

    def go_round(self, number: int) -> None:
        """Write 1 and read the sum, once each; the write is repeated under its key until it is acknowledged."""
        began_s = time.monotonic()
        token = self._write()
        if token is not None and self._read(token):
            self.round_s.append(time.monotonic() - began_s)

    def _write(self) -> str | None:
        body = json.dumps([{"view": _VIEW, "kind": "sum", "labels": {}, "value": 1}]).encode()
        headers = {"content-type": "application/json", "idempotency-key": f'"{self.address}-{self.written}"'}
        reply = self._ask("POST", "/v1/deltas", body, headers)
        if reply is None:
            return None
        self.written += 1
        return str(reply.json()["token"])

    def _read(self, token: str) -> bool:
        reply = self._ask("GET", f"/v1/views/{_VIEW}?after={quote(token)}")
        if reply is None:
            return False
        values = [it["value"] for it in reply.json()["series"]]
        if values != [self.written]:
            self.wrong.append(f"{values} after {self.written} writes of 1")
        return True

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply | None:
        given = {**self.headers, **(headers or {})}
        try:
            reply = request(self.port, method, path, body, given, address=self.address)
        except (OSError, http.client.HTTPException) as error:
            self.failures.append(f"{method} {path[:40]}: {error!r}")
            return None
        if reply.status != 200:
            self.failures.append(f"{method} {path[:40]}: {reply.status} {reply.body[:100]!r}")
            return None
        return reply


@contextmanager
def attacked(up: UpProcess, *, address: str = LOOPBACK, headers: Mapping[str, str] | None = None) -> Iterator[Bystander]:
    """Yield a bystander that goes on until the context ends, and then must get one more right answer."""
    pid = up.program.process.pid
    bystander = Bystander(up.port, pid, address, headers or {})
    bystander.written = _written_before(bystander)
    bystander.go_round(0)
    assert bystander.round_s, bystander
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
    before = rss_bytes(pid)
    ended = threading.Event()
    threads = [
        threading.Thread(target=_again, args=(bystander.ask_health, 0.05, ended)),
        threading.Thread(target=_again, args=(bystander.go_round, 0.1, ended)),
    ]
    for thread in threads:
        thread.start()
    try:
        yield bystander
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        assert up.program.process.poll() is None, f"the server ended: {up.program.stderr()[-2_000:]}"
        bystander.grown_bytes = rss_bytes(pid, "VmHWM") - before
    rounds, ends_s = len(bystander.round_s), time.monotonic() + _END_S
    while len(bystander.round_s) == rounds:
        assert time.monotonic() < ends_s, f"no answer {_END_S:g} s after the attack: {bystander}"
        bystander.go_round(0)
    assert not bystander.wrong, bystander


def _again(work: Callable[[int], None], pause_s: float, ended: threading.Event) -> None:
    number = 0
    while True:  # once at least, however short the attack is
        number += 1
        work(number)
        if ended.wait(pause_s):
            return


def _written_before(bystander: Bystander) -> int:
    """Return the number of writes during earlier attacks on the same server."""
    reply = request(bystander.port, "GET", f"/v1/views/{_VIEW}", headers=bystander.headers, address=bystander.address)
    return int(reply.json()["series"][0]["value"]) if reply.status == 200 and reply.json()["series"] else 0
