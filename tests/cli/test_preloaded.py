"""Programs that tests fork from a process with everything loaded behave as those that an interpreter starts."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.preloaded import PROGRAM, PreloadedPopen, _Helper
from tests.support import Terminal, UpProcess, environment

PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def started(kind: type[subprocess.Popen[bytes]], *arguments: str, **given: Any) -> tuple[int, bytes, bytes]:
    """Return the exit code and output of a command that is started by `kind`."""
    with kind([*PROGRAM, *arguments], **PIPES, **given) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("arguments", [("--version",), ("get", "--no-such"), ("dead-letters", "ls", "--data", "none")])
def test_the_same_ends(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Exit codes and texts are the same."""
    env = environment({"PIPELINE_LOG_FORMAT": "json"})
    ends = [started(kind, *arguments, cwd=tmp_path, env=env) for kind in (PreloadedPopen, subprocess.Popen)]
    assert ends[0] == ends[1]


@pytest.mark.skipif(sys.platform != "linux", reason="processes cannot be adopted")
def test_a_child_that_can_be_killed(tmp_path: Path) -> None:
    """The program is a child of this process, in its own session, and can be killed."""
    with UpProcess(tmp_path / "data") as up:
        process = up.program.process
        stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        assert [int(it) for it in stat[1:4]] == [os.getpid(), process.pid, process.pid]
        assert os.readlink(f"/proc/{process.pid}/cwd") == os.getcwd()
        up.kill()
        assert process.returncode == -signal.SIGKILL


def test_a_terminal_is_seen(tmp_path: Path) -> None:
    """The program checks its own streams for a terminal."""
    ends = []
    for kind in (PreloadedPopen, subprocess.Popen):
        terminal = Terminal()
        code = kind([*PROGRAM, "get", "--help"], stdin=subprocess.DEVNULL, stdout=terminal.fd, env=environment()).wait(60)
        ends.append((code, terminal.close()))
    assert ends[0] == ends[1]


@pytest.mark.skipif(sys.platform != "linux", reason="processes cannot be adopted")
def test_another_start_is_a_start() -> None:
    """An environment that affects the interpreter's start, or the package's, makes a real start."""
    assert _Helper.of_this_process(environment()) is not None
    assert _Helper.of_this_process(environment({"PIPELINE_NATIVE": "no"})) is None
    assert _Helper.of_this_process(environment({"PYTHONOPTIMIZE": "1"})) is None
