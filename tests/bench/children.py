"""Child processes of a benchmark, with the CPU time and the memory that each used; none outlives this process."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.broker.kafka import GUARDED
from tests.support import environment

_TICKS = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A tool ended, hung or was wrong; the text says how."""


def cpu_s(pid: int) -> float:
    """Return the user and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def memory_mb(pid: int, name: str) -> float:
    """Return a figure of a process' memory, such as VmRSS."""
    line = next(it for it in Path(f"/proc/{pid}/status").read_text().splitlines() if it.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


class Child:
    """A program that runs until the context ends. Its standard error goes to a file in `folder`."""

    _GUARD: Sequence[str] = ("sh", "-c", GUARDED, "sh")

    def __init__(self, name: str, folder: Path, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._errors = folder / f"{name}.stderr"
        self._command = [*self._GUARD, *command]
        self._env = environment(env)
        self._cwd = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the program, which must not run."""
        with self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                self._command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self._env,
                cwd=self._cwd,
                start_new_session=True,  # Ctrl-C ends the benchmark, which ends its children
            )

    def check(self) -> None:
        """Raise an error if the program has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise Failed(f"{self.name} ended with {self._process.returncode}: {self.tail()}")

    def tail(self) -> str:
        """Return the end of what the program wrote to standard error."""
        return self._errors.read_text(errors="replace")[-2_000:]

    def line(self, timeout_s: float, *others: Child) -> str:
        """Return the next line of standard output; raise an error if this program or one of `others` ends first."""
        assert self._process is not None
        assert self._process.stdout is not None
        give_up_s = time.monotonic() + timeout_s
        while not select.select([self._process.stdout], [], [], 0.2)[0]:
            for child in (self, *others):
                child.check()  # its guard still holds the pipe open
            if time.monotonic() > give_up_s:
                raise Failed(f"{self.name} printed nothing in {timeout_s:g} s: {self.tail()}")
        read = self._process.stdout.readline().decode()
        if not read:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            raise Failed(f"{self.name} ended with {self._process.returncode}: {self.tail()}")
        return read.strip()

    def cpu_s(self) -> float:
        """Return the CPU time of the program so far."""
        self.check()
        return cpu_s(self.pid)

    def memory_mb(self, name: str) -> float:
        """Return a figure of the program's memory, such as VmHWM, its peak."""
        self.check()
        return memory_mb(self.pid, name)

    def forget_peak(self) -> None:
        """Let VmHWM begin anew at what is used now."""
        with suppress(OSError):
            Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def signal(self, number: int) -> None:
        """Send a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, timeout_s: float = 60) -> None:
        """Ask the program to end in order, and kill it if that takes long. May be called twice."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """Kill the program, and wait. May be called twice."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                stream.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Asked(Child):
    """A child that reads commands, a line each, and answers each with a line; it ends with its standard input."""

    _GUARD: Sequence[str] = ()

    def ask(self, command: str, timeout_s: float, *others: Child) -> str:
        """Send a command, and return the answer; raise an error if this program or one of `others` ends first."""
        assert self._process is not None
        assert self._process.stdin is not None
        self.check()
        self._process.stdin.write(f"{command}\n".encode())
        return self.line(timeout_s, *others)


def until(done: Callable[[], object], what: str, timeout_s: float, *children: Child, pause_s: float = 0.05) -> None:
    """Wait until `done()` is true; raise an error if it takes too long, or if a child ends."""
    give_up_s = time.monotonic() + timeout_s
    while not done():
        for child in children:
            child.check()
        if time.monotonic() > give_up_s:
            raise Failed(f"not in {timeout_s:g} s: {what}; {'; '.join(child.tail() for child in children)}")
        time.sleep(pause_s)
