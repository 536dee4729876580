"""The workers: real processes of the command line, started again when they end, as a supervisor does."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from tests.broker.chaos.watch import Problems, folded, status
from tests.broker.drive import Role
from tests.broker.kafka import GUARDED, App
from tests.broker.shifted import SHIFTED_MS
from tests.support import PROGRAM, wait_until

SESSION_MS = 6_000
"""Shortest session that brokers allow."""
SETTLE_S = 60.0
AGAIN_S = 0.5
GUARD = ("sh", "-c", GUARDED, "sh")
"""Shell that ends its process when the drive ends, however that happens."""
SLOW = (sys.executable, "-m", "tests.broker.throttled")
SHIFTED = (sys.executable, "-m", "tests.broker.shifted")


class Worker:
    """A worker's process and its expected end. Exit codes in `excused` are no surprise; with `again` it is started again."""

    def __init__(self, name: str, role: Role) -> None:
        self.name = name
        self.role = role
        self.wanted = False
        """True while the worker is to run: if its process ends, it is started again."""
        self.again = True
        self.excused: frozenset[int] = frozenset()
        self.ended_s: float | None = None


class Fleet:
    """All workers, by name."""

    def __init__(
        self,
        app: App,
        folder: Path,
        partition_count: int,
        problems: Problems,
        say: Callable[[str], None],
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.app, self.folder, self.partition_count, self._settings = app, folder, partition_count, settings or {}
        self.workers: dict[str, Worker] = {}
        self.exits: list[tuple[str, int]] = []
        """Unasked ends: name and code."""
        self.codes: Counter[int] = Counter()
        """Number of ends with each exit code, asked or not."""
        self.excused: frozenset[int] = frozenset()
        """Exit codes that are now no surprise from any worker."""
        self._problems, self._say = problems, say
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)

    # Processes

    def make(
        self, name: str, *arguments: str, bears: str = "", slow: Mapping[str, str] | None = None, ahead_ms: int = 0
    ) -> Worker:
        """Return a worker that is not started yet, as member `bears` if not under its own name.

        `slow` slows its disk down; `ahead_ms` sets its clock ahead.
        """
        program, env = (PROGRAM, None) if slow is None else (SLOW, slow)
        if ahead_ms:
            program, env = SHIFTED, {SHIFTED_MS: str(ahead_ms)}
        return Worker(
            name,
            Role(
                "worker",
                self.app,
                self.folder / name,
                *("--name", bears or name, "--log-level", "info", *arguments),
                program=(*GUARD, *program),
                stdin=subprocess.PIPE,
                env=env,
                **{"session_timeout_ms": SESSION_MS, **self._settings},
            ),
        )

    def add(self, worker: Worker) -> Worker:
        """Start a worker, and keep it running."""
        with self._lock:
            self.workers[worker.name] = worker
            self.start(worker.name)
        return worker

    def start(self, name: str) -> None:
        """Start a worker, again or anew."""
        with self._lock:
            if name not in self.workers:
                self.workers[name] = self.make(name)
            worker = self.workers[name]
            worker.role.kill() if worker.role._program is not None else None
            worker.role.start(wait_ready=False)
            worker.wanted, worker.ended_s = True, None
        self._say(f"  {name} started, pid {worker.role.program.process.pid}")

    def kill(self, *names: str) -> None:
        """Kill these workers with kill -9, all at once; they stay down until `start`."""
        with self._lock:
            for name in names:
                self.workers[name].wanted = False
                self.workers[name].role.program.process.kill()
                self.codes[-signal.SIGKILL] += 1
            for name in names:
                self.workers[name].role.kill()
        self._say(f"  {' '.join(names)} killed")

    def lose_disk(self, name: str) -> None:
        """Delete everything that a stopped worker has on disk."""
        shutil.rmtree(self.workers[name].role.data)
        self._say(f"  the disk of {name} is lost")

    def leave(self, name: str, timeout_s: float = 45.0) -> None:
        """Send SIGTERM to a worker, and wait until it has ended, which must be with 0."""
        with self._lock:
            worker = self.workers[name]
            worker.wanted = False
            worker.role.program.signal(signal.SIGTERM)
        self._say(f"  {name} is asked to leave")
        try:
            code = worker.role.program.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} does not end within {timeout_s:g} s of SIGTERM") from None
        worker.role.kill()
        self.codes[code] += 1
        assert code == 0, f"{name} was asked to leave and ended with {code}"

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a worker."""
        self.workers[name].role.program.signal(number)
        self._say(f"  {name} is sent {signal.Signals(number).name}")

    def discard(self, name: str) -> None:
        """End a worker if it still runs, and forget it."""
        with self._lock:
            self.workers.pop(name).role.__exit__()

    def wait_exit(self, name: str, code: int, timeout_s: float) -> None:
        """Wait until a worker has ended by itself, with this code, and is down."""
        worker = self.workers[name]
        try:
            found = worker.role.program.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} runs on after {timeout_s:g} s; it must end with {code}") from None
        assert found == code, f"{name} ended with {found}, not {code}"
        self._say(f"  {name} ended with {code}, as it must")

    # Who has what

    @property
    def running(self) -> list[str]:
        """Names of the workers that are to run."""
        return sorted(name for name, it in self.workers.items() if it.wanted)

    def urls(self) -> dict[str, str]:
        """Return the URLs of the workers that are to run."""
        with self._lock:
            return {name: self.workers[name].role.url for name in self.running}

    def owned(self, name: str) -> dict[int, int]:
        """Return the partitions that a worker folds, and their positions."""
        return folded(status(self.workers[name].role.url))

    def settled(self, timeout_s: float = SETTLE_S) -> dict[str, set[int]]:
        """Wait until the running workers share the partitions evenly, and, if several, have warm copies of all."""
        said: dict[str, Any] = {}

        def done() -> dict[str, set[int]]:
            names = self.running
            said.clear()
            said.update({name: status(self.workers[name].role.url, 2.0) for name in names})
            held = {name: {*folded(it)} for name, it in said.items()}
            counts = [*map(len, held.values())]
            all_held = sorted(n for numbers in held.values() for n in numbers) == [*range(self.partition_count)]
            if not all_held or max(counts) > min(counts) + 1:
                return {}
            warm = {n["partition"] for it in said.values() for n in it["standbys"] if n["phase"] == "following"}
            return held if len(names) == 1 or len(warm) == self.partition_count else {}

        try:
            found: dict[str, set[int]] = wait_until(done, "", timeout_s)
        except AssertionError:
            raise AssertionError(f"not settled in {timeout_s:g} s: {said}") from None
        return found

    def have(self, count: int) -> dict[str, set[int]]:
        """Start and stop workers so that w1 to w`count` run and no others, settled."""
        wanted = [f"w{n}" for n in range(1, count + 1)]
        for name in self.running:
            if name not in wanted:
                self.leave(name)
        for name in wanted:
            if name not in self.running:
                self.start(name)
        return self.settled()

    def _supervise(self) -> None:
        while not self._stop.wait(0.05):
            with self._lock:
                for worker in self.workers.values():
                    self._look_after(worker)

    def _look_after(self, worker: Worker) -> None:
        code = worker.role.exit_code if worker.wanted else None
        if code is None:
            return
        now_s = time.monotonic()
        if worker.ended_s is None:
            worker.ended_s = now_s
            self.exits.append((worker.name, code))
            self.codes[code] += 1
            self._say(f"  {worker.name} ended by itself with {code}")
            worker.wanted = worker.again
            if code not in self.excused | worker.excused:
                self._problems.add(f"{worker.name} ended by itself with {code}")
        elif now_s - worker.ended_s > AGAIN_S:
            self.start(worker.name)

    def tails(self) -> str:
        """Return the last output of each worker."""
        return "\n\n".join(it.role.tail() for it in self.workers.values())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        for worker in self.workers.values():
            if worker.role._program is not None:
                worker.role.__exit__()
