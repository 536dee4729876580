"""A server in a process of its own, held to one core, and a client that keeps it busy."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

from tests.bench.measure import ROOT

_READY_S = 60


class Server:
    """A process that listens on a port of this machine."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        host, port = url.removeprefix("http://").split(":")
        self.address = host, int(port)

    def cpu_seconds(self) -> float:
        """Return the CPU time that the process has used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self, name: str) -> float:
        """Return a line of the process' status, such as VmRSS or VmHWM, in MB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
        raise ValueError(f"no {name}")


@contextmanager
def running(command: Sequence[str], *, core: int | None = None) -> Iterator[Server]:
    """Start a Python program whose first line of output holds its URL; stop it in the end."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with pinned(core):  # which the process inherits
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        start = line.find("http://")
        if start < 0:
            raise RuntimeError(f"{' '.join(command)} did not start")
        yield Server(process, line[start:].split('"')[0].split()[0])
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_READY_S)
        finally:
            process.kill()
            process.stdout.close()


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Keep this process to one core while the context lasts."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def two_cores() -> tuple[int | None, int | None]:
    """Return a core for the server and another for its client; None where there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[1]) if len(cores) > 1 else (None, None)


class _Connection:
    """A connection that sends one request after another, the next when the last was answered."""

    def __init__(self, address: tuple[str, int], requests: Iterator[bytes]) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._requests = requests
        self._received = b""

    def send(self) -> None:
        self._received = b""
        self.socket.sendall(next(self._requests))

    def receive(self) -> bool:
        """Receive bytes, and return whether the answer is complete."""
        data = self.socket.recv(65_536)
        if not data:
            raise ConnectionError("the server closed a connection")
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return False
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(self._received[:300].decode("utf-8", "replace"))
        start = head.lower().index(b"content-length:") + 15
        return len(body) >= int(head[start:].split(b"\r\n", 1)[0])


def load(server: Server, paths: Sequence[str], *, seconds: float, connection_count: int = 32) -> tuple[int, float, float]:
    """Ask for `paths` over and over; return answers, wall time and the server's CPU time, both in s."""
    host = ":".join(map(str, server.address))
    heads = [f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() for path in paths]
    count = 0
    with selectors.DefaultSelector() as selector:
        for i in range(connection_count):
            connection = _Connection(server.address, cycle(heads[i::connection_count] or heads))
            selector.register(connection.socket, selectors.EVENT_READ, connection)
            connection.send()
        cpu, start = server.cpu_seconds(), time.perf_counter()
        end = start + seconds
        while time.perf_counter() < end:
            for key, _ in selector.select(1):
                if key.data.receive():
                    count += 1
                    key.data.send()
        wall_s, cpu_s = time.perf_counter() - start, server.cpu_seconds() - cpu
        for key in [*selector.get_map().values()]:
            key.data.socket.close()
    return count, wall_s, cpu_s


def paced(server: Server, paths: Sequence[str], *, rate: float, seconds: float, connection_count: int = 64) -> list[float]:
    """Ask for `paths` at a steady rate: return the ms from when each request was due to its answer, in ascending order."""
    host = ":".join(map(str, server.address))
    requests = cycle([f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() for path in paths])
    took: list[float] = []
    due_s: dict[_Connection, float] = {}
    with selectors.DefaultSelector() as selector:
        idle = [_Connection(server.address, requests) for _ in range(connection_count)]
        for connection in idle:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        start = time.perf_counter()
        sent, end = 0, start + seconds
        while (now := time.perf_counter()) < end or due_s:
            while idle and (due := start + sent / rate) <= min(now, end):
                connection = idle.pop()
                due_s[connection] = due
                connection.send()
                sent += 1
            for key, _ in selector.select(max(0.0, start + sent / rate - time.perf_counter()) if idle else 0.1):
                if key.data.receive():
                    took.append((time.perf_counter() - due_s.pop(key.data)) * 1_000)
                    idle.append(key.data)
        for key in [*selector.get_map().values()]:
            key.data.socket.close()
    return sorted(took)
