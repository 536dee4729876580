"""Runs the `pipeline` program as users do, in processes of its own that never outlive the test; waits, threads, a clock."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

from pipeline import Reader, Token
from tests.preloaded import PROGRAM, PreloadedPopen

ROOT = Path(__file__).resolve().parent.parent
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
NO_LISTENER = os.strerror(errno.ECONNREFUSED)
"""The system's text for a port without a listener."""
LONG = os.environ.get("PIPELINE_LONG_TESTS") == "1"
"""True in long runs, in which tests that kill at random do so as often as for a release; else about a fifth of that, and
hypothesis tries fewer examples.
"""


def examples(long_count: int) -> int:
    """Return the number of hypothesis examples for a test that deserves `long_count` in a long run."""
    return long_count if LONG else max(10, long_count // 5)


READY_S = 60.0
"""Time that a start may take on a busy machine."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process' environment without settings of the program, and with `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PIPELINE_")}
    return {**kept, "PYTHONPATH": str(ROOT), **(extra or {})}


def pipeline(
    *arguments: str,
    input: str | bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 60.0,
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    sent = input.encode() if isinstance(input, str) else input
    stdin = subprocess.DEVNULL if sent is None else subprocess.PIPE
    command, streams = [*PROGRAM, *arguments], {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with PreloadedPopen(command, env=environment(env), cwd=cwd, **streams) as process:
        try:
            out, err = process.communicate(sent, timeout_s)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(
        command, process.returncode, out.decode(errors="replace"), err.decode(errors="replace")
    )


def wait_until(done: Callable[[], Any], what: str, timeout_s: float = 60.0, *, seen: Callable[[], str] = lambda: "") -> Any:
    """Return the first true result of `done`; fail, with `what` and the result of `seen`, if there is none in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        asked_s = time.monotonic()
        result = done()
        if result:
            return result
        now_s = time.monotonic()
        assert now_s < deadline, f"not in {timeout_s:g} s: {what}\n{seen()}".rstrip()
        time.sleep(min(max(0.01, 3 * (now_s - asked_s)), 0.3))  # so that a question that is dear leaves the CPU to others


@contextmanager
def traced(trace: Callable[[FrameType, str, Any], Any]) -> Iterator[None]:
    """Have `trace` called at each line that this thread runs in the block; see `sys.settrace`."""
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


@contextmanager
def again_and_again(work: Callable[[], object], pause_s: float) -> Iterator[None]:
    """Do `work` in a thread, with pauses, until the context ends and it is done for the last time."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(pause_s):
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class HandClock:
    """One time for both clocks, which stands still until it is told to go on."""

    def __init__(self) -> None:
        self.s = 1_000.0
        self._ns = 0

    def now_ms(self) -> int:
        return int((self.s + 1_700_000_000) * 1000)

    def rising_ns(self) -> int:
        self._ns = max(self._ns + 1, self.now_ms() * 1_000_000)
        return self._ns

    def monotonic_s(self) -> float:
        return self.s

    def thread_cpu_s(self) -> float:
        return 0.0

    def new_id(self) -> str:
        return "an-id"


def everything(reader: Reader) -> Token:
    """Return a token that covers everything in the server's log."""
    status = reader.status()
    return Token({it["partition"]: it["end_offset"] for it in status["partitions"]}, status["topic_id"])


class Program:
    """One command that goes on running, whose standard error goes to a file."""

    def __init__(
        self,
        *arguments: str,
        stderr: Path,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self._stderr = stderr
        with stderr.open("ab") as errors:
            self.process = PreloadedPopen(
                [*program, *arguments],
                bufsize=0,  # a line in a buffer of ours would be none to `select`
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(env),
                cwd=cwd,
                start_new_session=True,  # a Ctrl-C in the terminal is for pytest
            )

    def stderr(self) -> str:
        """Return the command's standard error so far."""
        return self._stderr.read_text(errors="replace")

    def read_line(self, timeout_s: float = READY_S) -> str:
        """Return the next line of standard output."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout_s)[0]:
            raise AssertionError(f"nothing printed in {timeout_s:g} s; {self.stderr()}")
        return self.process.stdout.readline().decode()

    def signal(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for the end, and return the exit code."""
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """Kill the command with kill -9, and wait. May be called twice."""
        self.process.kill()
        self.process.wait(30.0)
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Terminal:
    """The screen end of a terminal that a program writes to; all of it is read, as a real one would."""

    def __init__(self) -> None:
        self._screen, self.fd = os.openpty()
        self._parts: list[bytes] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while part := os.read(self._screen, 65_536):
                self._parts.append(part)
        except OSError:
            pass  # how a terminal says that nobody has it open any more

    def close(self) -> str:
        """Return the text that the ended program wrote, without colours and movements."""
        os.close(self.fd)
        self._thread.join(30)
        os.close(self._screen)
        return _ESCAPE.sub("", b"".join(self._parts).decode())


class UpProcess:
    """A role on a data directory, such as `pipeline up`: started and ready on entering the context, gone after it.

    `command` is the role with its own arguments: ("worker", "--from", url). `start` after `kill` or `terminate` starts it
    again, on the same port. `program` runs instead of `pipeline`.
    """

    def __init__(
        self,
        data: Path,
        *arguments: str,
        command: Sequence[str] = ("up",),
        port: int = 0,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        program: Sequence[str] = PROGRAM,
        stdin: int | None = subprocess.DEVNULL,
    ) -> None:
        self.data = data
        self.port = port
        self.ready: dict[str, Any] = {}
        """JSON that the role prints when it is ready."""
        self._command = command
        self._arguments = arguments
        self._env = env
        self._cwd = cwd
        self._line = program
        self._stdin = stdin
        self._program: Program | None = None

    @property
    def url(self) -> str:
        """URL of the role's server."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def program(self) -> Program:
        """The process that was started last."""
        assert self._program is not None
        return self._program

    def start(self, *, wait_ready: bool = True) -> None:
        """Start the role; with `wait_ready`, wait until it says that it is ready."""
        errors = self.data.with_name(f"{self.data.name}.stderr")
        errors.parent.mkdir(parents=True, exist_ok=True)
        options = ("--data", str(self.data), "--port", str(self.port), "--json")
        given = (*self._command, *options, *self._arguments)
        self._program = Program(*given, stderr=errors, stdin=self._stdin, env=self._env, cwd=self._cwd, program=self._line)
        if wait_ready:
            try:
                self.wait_ready()
            except BaseException:
                self.kill()
                raise

    def wait_ready(self) -> None:
        """Wait until the role says that it is ready."""
        line = self.program.read_line()
        assert line, f"pipeline {self._command[0]} ended with {self.program.wait()}: {self.program.stderr()}"
        self.ready = json.loads(line)
        self.port = int(self.ready["url"].rpartition(":")[2])

    def kill(self) -> None:
        """Kill the role with kill -9. May be called twice."""
        if self._program is not None:
            self._program.kill()

    def terminate(self, number: int = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        """Ask the role to stop, wait, and return the exit code."""
        self.program.signal(number)
        code = self.program.wait(timeout_s)
        self.program.kill()
        return code

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
