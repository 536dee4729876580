"""Programs that fork, and web servers with a small app that records: never left running, and limited in number."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from tests.publisher.modes import settings_of
from tests.publisher.support import FileLog, Views, batches, fold
from tests.support import environment, wait_until

PROCESSES_MAX = 12
"""Limit beyond which a program is killed: one that starts its workers again and again would stop the machine."""
PROGRAM_S_MAX = 60.0
GUNICORN = [sys.executable, "-m", "gunicorn"]
UWSGI = [str(Path(sys.executable).with_name("uwsgi")), "--need-app", "--module", "app:app", "--processes", "2"]

APP = """
import os, sys, threading, time
{first}
{publisher}
view = pub.sum("v", labels=("path",))
boot = pub.sum("boot")
handle = view.labels("/")
boot.add(1.0)
pub.flush()
print("threads:", *[thread.name for thread in threading.enumerate()], flush=True)
boot.add(10.0)
handle.add(0.0)  # a series that children inherit

def app(environ, start_response):
    handle.add(1.0)
    view.add(1, path="all")
    also()
    if environ["PATH_INFO"] == "/slow":
        print("slow", flush=True)
    time.sleep({{"/": 0.005, "/slow": 1.0}}.get(environ["PATH_INFO"], 0))  # so that others are asked too
    if environ["PATH_INFO"] == "/flush":
        pub.flush()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
"""

ON_A_FILE = """
from tests.publisher.support import FileLog, publisher
never_ms = 3_600_000  # no test takes so long
pub = publisher(FileLog({log!r}), flush_interval_ms=never_ms, flush_interval_min_ms=never_ms, **{settings!r})
also = lambda: None
"""
ON_KAFKA = """
from prometheus_client import CollectorRegistry, Counter
from pipeline import Publisher
pub = Publisher({url!r}, flush_interval_ms=3_600_000, flush_interval_min_ms=3_600_000)
registry = CollectorRegistry()
also = Counter("asked", "", registry=registry).inc
also()
pub.bridge(registry, interval_ms=50, gauges=False)
"""


class Watched:
    """A program in a folder that starts processes, all of which are gone once the context ends."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._output = folder / "output"
        self._done = threading.Event()
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**environment(), "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{folder}"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._watch = threading.Thread(target=self._kill_in_time)
        self._watch.start()

    def _kill_in_time(self) -> None:
        deadline, program = time.monotonic() + PROGRAM_S_MAX, psutil.Process(self.process.pid)
        try:
            while not self._done.wait(0.05) and time.monotonic() < deadline:
                if len(program.children(recursive=True)) > PROCESSES_MAX:
                    break
        except psutil.NoSuchProcess:
            self._done.wait(max(0.0, deadline - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def output(self) -> str:
        """Return everything that the program has printed so far."""
        return self._output.read_text(errors="replace")

    def end(self, number: int = signal.SIGTERM) -> None:
        """Send a signal, and wait for the end."""
        self.process.send_signal(number)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end\n{self.output()}") from None
        assert "Traceback" not in self.output(), self.output()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watch.join()
        self.process.wait(10)


class Server(Watched):
    """A web server that listens at `address`, with the app above."""

    def __init__(
        self, command: Sequence[str], folder: Path, address: str, *, first: str = "", kafka: str = "", mode: str = "memory"
    ) -> None:
        """`first` is the code of the app before it imports anything of ours; `kafka` is a URL to publish to."""
        self.log = folder / "log"
        settings = settings_of(mode, folder)
        publisher = ON_KAFKA.format(url=kafka) if kafka else ON_A_FILE.format(log=str(self.log), settings=settings)
        (folder / "app.py").write_text(APP.format(publisher=publisher, first=first))
        self._url = f"http://{address}"
        host, port = address.rsplit(":", 1)
        self._place = host, int(port)
        super().__init__(command, folder)

    def get(self, path: str = "/") -> str:
        """Send one request, and return the process id of the answering worker."""
        with urllib.request.urlopen(self._url + path, timeout=30) as answer:
            pid: str = answer.read().decode()
            return pid

    def ask(self, workers: int) -> int:
        """Send 41 requests or more, some at once, until so many processes have answered; return how often each did."""

        def listens() -> bool:
            assert self.process.poll() is None, self.output()
            with suppress(OSError), socket.create_connection(self._place, timeout=5):
                return True
            return False

        wait_until(listens, "a socket", 30.0, seen=self.output)
        pids = {self.get()}  # once: a request that got no answer in time may have been counted
        count = 1
        deadline = time.monotonic() + 30
        with ThreadPoolExecutor(4) as pool:
            while count < 41 or len(pids) < workers:
                assert time.monotonic() < deadline, f"only {pids} answer\n{self.output()}"
                pids.update(pool.map(self.get, ["/flush", *["/"] * 19]))
                count += 20
        return count

    def stop(self) -> tuple[Views, int]:
        """End the server; return the views folded from its log, and the number of producers in it."""
        self.end()
        log = FileLog(self.log).read()
        return fold(log), len({batch.producer_id for batch in batches(log)})
